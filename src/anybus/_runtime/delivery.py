"""The delivery: one message handed to one handler, settled exactly once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeVar

from .._failure.settlement import Outcome, Result
from .._ground.checks import check_delay, check_text
from .._messages.message import Message


@dataclass(frozen=True)
class DeliveryState:
    """How a delivery stands. Times are UTC.

    :ivar attempt: which handling of the message by this group it is, from 1; releases do not count.
    :ivar max_attempts: the last one before it becomes a dead letter (``max_retry`` + 1).
    :ivar deliveries: how often the server has handed this entry over, this time included; None = it does not count.
    :ivar published_at: when the backend stored the entry; None = it does not say.
    :ivar received_at: when this process took it.
    :ivar redelivered: whether anybody may have handled it before.
    """

    attempt: int
    max_attempts: int
    deliveries: int | None
    published_at: datetime | None
    received_at: datetime
    redelivered: bool


class Entry(Protocol):
    """What a delivery shows of the entry that it stands for."""

    @property
    def id(self) -> str: ...

    @property
    def message(self) -> Message: ...


EntryT = TypeVar("EntryT", bound=Entry)
EntryT_contra = TypeVar("EntryT_contra", bound=Entry, contravariant=True)


class Keeper(Protocol[EntryT_contra]):
    """What a delivery needs of the runtime that made it."""

    def describe(self, entry: EntryT_contra, /) -> DeliveryState: ...

    def is_lease_lost(self, entry: EntryT_contra, /) -> bool: ...

    async def settle(self, entry: EntryT_contra, result: Result | None, /) -> None: ...

    async def ack_with(self, entry: EntryT_contra, publish: Iterable[Message], /) -> None: ...

    async def extend(self, entry: EntryT_contra, /) -> None: ...


class Delivery:
    """One message, handed to one handler.

    It is settled once, by :meth:`ack`, :meth:`nack`, :meth:`retry` or :meth:`release`, or by the bus when the handler
    ends. Each of them returns when the server has it. If one raises an error of the backend, the delivery is unsettled
    again; if one is cancelled while the server is asked, the bus sees the settlement through.
    """

    __slots__ = ("_entry", "_keeper")

    def __init__(self, entry: EntryT, keeper: Keeper[EntryT]) -> None:
        self._entry: Any = entry
        self._keeper: Keeper[Any] = keeper

    def __repr__(self) -> str:
        return f"<Delivery {self.id} attempt={self.state.attempt} of {self.message!r}>"

    @property
    def message(self) -> Message:
        message: Message = self._entry.message
        return message

    @property
    def id(self) -> str:
        """The entry's id in the stream that it was read from."""
        return str(self._entry.id)

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
