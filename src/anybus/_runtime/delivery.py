"""The delivery: one message handed to one handler, settled exactly once."""

from __future__ import annotations

from collections.abc import Iterable

from .._failure.settlement import Outcome, Result
from .._ground.checks import check_delay, check_text
from .._messages.message import Message
from .entry import Held
from .keeper import DeliveryState, EntryKeeper


class Delivery:
    """One message, handed to one handler.

    It is settled once, by :meth:`ack`, :meth:`nack`, :meth:`retry` or :meth:`release`, or by the bus when the handler
    ends. Each of them returns when the server has it. If one raises an error of the backend, the delivery is unsettled
    again; if one is cancelled while the server is asked, the bus sees the settlement through.
    """

    __slots__ = ("_entry", "_keeper")

    def __init__(self, entry: Held, keeper: EntryKeeper) -> None:
        self._entry = entry
        self._keeper = keeper

    def __repr__(self) -> str:
        return f"<Delivery {self.id} attempt={self.state.attempt} of {self.message!r}>"

    @property
    def message(self) -> Message:
        return self._entry.message

    @property
    def id(self) -> str:
        """The entry's id in the stream that it was read from."""
        return self._entry.id

    @property
    def state(self) -> DeliveryState:
        return self._keeper.describe(self._entry)

    @property
    def lease_lost(self) -> bool:
        """A warning: the entry may belong to somebody else by now, by the server's word or by our clock."""
        return self._keeper.is_lease_lost(self._entry)

    async def ack(self, *, publish: Iterable[Message] = ()) -> None:
        """Acknowledge: the message is done.

        :param publish: what the handler has produced, appended in order, in the same step as the acknowledgement where
            the backend can (feature ``atomic_transfer``), before it elsewhere. In one step a message that is handled
            again publishes nothing twice, and what is no longer ours publishes nothing.
        :raises ValidationError: if a message is refused; nothing was sent, and the delivery is unsettled.
        :raises AlreadySettledError: if it was settled before.
        :raises LeaseLostError: if the server says that the entry is no longer ours.
        :raises BackendError: if the server could not be asked; the delivery is unsettled again.
        """
        if publish == ():
            await self._keeper.settle(self._entry, None)
        else:
            await self._keeper.ack_with(self._entry, publish)

    async def nack(self, reason: str = "") -> None:
        """Give the message up now: it becomes a dead letter with this reason. Raises as :meth:`ack` does."""
        await self._keeper.settle(self._entry, Result(Outcome.REJECTED, check_text("reason", reason)))

    async def retry(self, reason: str = "", *, delay: float | None = None) -> None:
        """Have it handled again after a delay in seconds (None = the subscription's backoff). Counts as a failure:
        when ``max_retry`` is used up, the message becomes a dead letter. Raises as :meth:`ack` does.

        :raises ValidationError: if the delay is negative or not a number.
        """
        wait = None if delay is None else check_delay("delay", delay)
        await self._keeper.settle(self._entry, Result(Outcome.RETRY, check_text("reason", reason), delay=wait))

    async def release(self, delay: float = 0.0) -> None:
        """Not now: hand it back to the group, uncounted, at once or after a delay in seconds. Raises as :meth:`ack`
        does.

        :raises ValidationError: if the delay is negative or not a number.
        """
        await self._keeper.settle(self._entry, Result(Outcome.RELEASED, delay=check_delay("delay", delay)))

    async def extend(self) -> None:
        """Renew the lease now, for a whole ``claim_idle_timeout``. While a handler runs the bus does so by itself.

        :raises AlreadySettledError: if it was settled before.
        :raises LeaseLostError: if the server says that the entry is no longer ours.
        :raises UnsupportedError: if the backend cannot renew leases.
        """
        await self._keeper.extend(self._entry)
