"""What the deliveries of a subscription ask for: their state, their settlement, their lease."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime

from .._failure.settlement import Outcome, Result
from .._ground.checks import refuse
from .._ground.errors import AlreadySettledError, LeaseLostError, UnsupportedError
from .._messages.message import Message, check_outgoing
from ..abc import Output
from .circuit import Circuit
from .claims import Claims
from .context import Context
from .entry import Held, KeyState, Stage
from .leases import Leases
from .settler import Settler


@dataclass(frozen=True)
class DeliveryState:
    """The state of a delivery. Times are UTC.

    :ivar attempt: the number of this handling of the message in its group, from 1. Releases do not count.
    :ivar max_attempts: the last attempt before the message becomes a dead letter (``max_retry`` + 1).
    :ivar deliveries: how often the server has delivered this entry, this time included. None: it does not count.
    :ivar published_at: when the backend stored the entry. None: it does not say.
    :ivar received_at: when this process took the entry.
    :ivar redelivered: whether the message may have been handled before, here or elsewhere.
    """

    attempt: int
    max_attempts: int
    deliveries: int | None
    published_at: datetime | None
    received_at: datetime
    redelivered: bool


class EntryKeeper:
    """Answers the deliveries of one subscription."""

    def __init__(
        self, context: Context, settler: Settler, leases: Leases, circuit: Circuit | None, claims: Claims | None
    ) -> None:
        self._context = context
        self._settler = settler
        self._leases = leases
        self._circuit = circuit
        self._claims = claims

    def describe(self, entry: Held) -> DeliveryState:
        return DeliveryState(
            attempt=entry.attempt,
            max_attempts=self._context.policy.max_attempts,
            deliveries=entry.deliveries,
            published_at=entry.published_at,
            received_at=entry.received_at,
            redelivered=entry.attempt > 1 or entry.by_reclaim or (entry.deliveries or 1) > 1,
        )

    def is_lease_lost(self, entry: Held) -> bool:
        if entry.stage is Stage.GONE:
            return entry.lost
        return entry.lost or self._context.clock() >= entry.lease_until

    async def settle(self, entry: Held, result: Result | None) -> None:
        self._context.home.check("the delivery")
        await self._settle(entry, result)

    async def ack_with(self, entry: Held, publish: Iterable[Message]) -> None:
        context = self._context
        context.home.check("the delivery")
        if isinstance(publish, Message) or not isinstance(publish, Iterable):
            refuse("publish", publish, "an iterable of anybus.Message")
        limit = context.options.max_payload_bytes
        checked = [check_outgoing(message, limit) for message in publish]
        outputs = [Output(message.topic, message, limited=True) for message in checked]
        if context.policy.ack_mode == "auto-on-receive":
            raise AlreadySettledError(
                f"entry {entry.id} of {entry.stream!r} was acknowledged on receipt (auto-on-receive): use bus.publish"
            )
        await self._settle(entry, None, outputs)

    def transaction(self, entry: Held, connection: object) -> AbstractAsyncContextManager[None]:
        self._context.home.check("the delivery")
        if self._claims is None:
            raise UnsupportedError("transaction() is for guarantee='exactly-once' with an anybus.idempotency.SqlStore")
        return self._claims.transaction(entry, connection)

    async def _settle(self, entry: Held, result: Result | None, outputs: Sequence[Output] = ()) -> None:
        if entry.key is KeyState.IN_TRANSACTION:
            raise RuntimeError("settle the delivery after its transaction, not inside")
        if entry.key is KeyState.COMPLETED and entry.stage in (Stage.OPEN, Stage.RETURNED):
            if result is not None:
                raise AlreadySettledError(
                    f"the transaction of entry {entry.id} is committed, so it has been handled: only ack() is left"
                )
            if outputs:
                refuse("publish", outputs, "empty after transaction(): a crash in between would lose the messages")
        await self._settler.settle(entry, result, outputs)
        if self._circuit is not None:
            self._circuit.saw(Outcome.RETURNED if result is None else result.outcome)

    async def extend(self, entry: Held) -> None:
        self._context.home.check("the delivery")
        if entry.stage not in (Stage.OPEN, Stage.RETURNED):
            if entry.lost:
                raise LeaseLostError(f"entry {entry.id} of {entry.stream!r} is no longer ours")
            raise AlreadySettledError(f"entry {entry.id} of {entry.stream!r} has been settled already")
        await self._leases.extend(entry)
