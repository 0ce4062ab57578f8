"""The delivery: one message for one handler, settled exactly once."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager

import msgspec

from .._failure.settlement import Outcome, Result
from .._ground.checks import check_delay, check_text
from .._messages.message import Message
from .entry import Held
from .keeper import DeliveryState, EntryKeeper


class Delivery(msgspec.Struct, eq=False):
    """One message, delivered to one handler.

    It is settled once: by :meth:`ack`, :meth:`nack`, :meth:`retry` or :meth:`release`, or by the bus when the handler
    ends. Each method returns when the server has accepted the settlement. If it raises an error of the backend, the
    delivery is unsettled again. If it is cancelled while it waits for the server, the bus completes the settlement.
    """

    _entry: Held
    _keeper: EntryKeeper

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
        """Whether the entry may belong to another consumer by now: the server said so, or its lease is over."""
        return self._keeper.is_lease_lost(self._entry)

    async def ack(self, *, publish: Iterable[Message] = ()) -> None:
        """Acknowledge: the message is done.

        :param publish: messages that the handler produced. They are appended in order: in one step with the
            acknowledgement if the backend can do that (feature ``atomic_transfer``), otherwise before it. In one step,
            nothing is published twice if the message is handled again, and nothing at all with ``LeaseLostError``.
        :raises ValidationError: if a message is refused. Nothing was sent, and the delivery is unsettled.
        :raises AlreadySettledError: if the delivery was settled before.
        :raises LeaseLostError: if the server says that the entry no longer belongs to this consumer.
        :raises BackendError: if the server could not be reached, or refused. The delivery is unsettled again.
        """
        if publish == ():
            await self._keeper.settle(self._entry, None)
        else:
            await self._keeper.ack_with(self._entry, publish)

    async def nack(self, reason: str = "") -> None:
        """Give up on the message: it becomes a dead letter with this reason. Raises the same errors as :meth:`ack`."""
        await self._keeper.settle(self._entry, Result(Outcome.REJECTED, check_text("reason", reason)))

    async def retry(self, reason: str = "", *, delay: float | None = None) -> None:
        """Have the message handled again after a delay in seconds (None = the subscription's backoff). This counts as a
        failure: after ``max_retry`` retries, the message becomes a dead letter. Raises the same errors as :meth:`ack`.

        :raises ValidationError: if the delay is negative or not a number.
        """
        wait = None if delay is None else check_delay("delay", delay)
        await self._keeper.settle(self._entry, Result(Outcome.RETRY, check_text("reason", reason), delay=wait))

    async def release(self, delay: float = 0.0) -> None:
        """Return the message to the group without counting a failure, at once or after a delay in seconds. Raises the
        same errors as :meth:`ack`.

        :raises ValidationError: if the delay is negative or not a number.
        """
        await self._keeper.settle(self._entry, Result(Outcome.RELEASED, delay=check_delay("delay", delay)))

    def transaction(self, connection: object) -> AbstractAsyncContextManager[None]:
        """A transaction of the handler's own database connection, to which the completion of this message belongs.

        For ``guarantee="exactly-once"`` with an :class:`anybus.idempotency.SqlStore`. If the body returns, its effects
        and the completion are committed together. If it raises, both are rolled back. Settle the delivery afterwards,
        or return.

        :param connection: a DB-API connection that may be used in worker threads, or a connection of SQLAlchemy. It has
            no open transaction.
        :raises UnsupportedError: if the subscription's store cannot take part in a transaction.
        :raises ValidationError: if the connection cannot be used.
        :raises LeaseLostError: if another consumer has taken the message over. Nothing was changed.
        :raises AlreadySettledError: if the delivery was settled before.
        """
        return self._keeper.transaction(self._entry, connection)

    async def extend(self) -> None:
        """Renew the lease now, for a whole ``claim_idle_timeout``. While a handler runs, the bus does this by itself.

        :raises AlreadySettledError: if the delivery was settled before.
        :raises LeaseLostError: if the server says that the entry no longer belongs to this consumer.
        :raises UnsupportedError: if the backend cannot renew leases.
        """
        await self._keeper.extend(self._entry)
