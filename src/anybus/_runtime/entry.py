"""An entry that this subscription holds: its stages, and its settlement."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import anyio
import msgspec

from .._failure.settlement import Decision, Result
from .._messages.message import Message
from ..abc import Output

ACKED, ACKED_WITH, ACCEPTED, RETRIED, DEAD_LETTERED, DROPPED, RELEASED, MISSING = (
    "acked",
    "acked with what it publishes",
    "accepted",
    "retried",
    "dead-lettered",
    "dropped",
    "released",
    "missing",
)
DUPLICATE = "duplicate"
"""The intent of an ack for a message that is not handled, because its key was handled before (exactly-once)."""

SETTLED_BEFORE = "settled before"
"""The intent of an ack for an entry that was settled here and was redelivered: it is not counted again."""


class Stage(enum.IntEnum):
    PARKED = 0
    """Taken, but must not start yet: its backoff is not over, or it is a suspect that must be handled alone."""
    WAITING = 1
    """On its way to a handler."""
    OPEN = 2
    """With a handler, not settled."""
    RETURNED = 3
    """The handler returned without settling (manual mode). The lease is not renewed."""
    SETTLING = 4
    """On its way to the server."""
    GONE = 5
    """No longer held."""


TRANSITIONS: Final[Mapping[Stage, frozenset[Stage]]] = {
    Stage.PARKED: frozenset({Stage.WAITING, Stage.SETTLING, Stage.GONE}),
    Stage.WAITING: frozenset({Stage.PARKED, Stage.OPEN, Stage.SETTLING, Stage.GONE}),
    Stage.OPEN: frozenset({Stage.RETURNED, Stage.SETTLING, Stage.GONE}),
    Stage.RETURNED: frozenset({Stage.SETTLING, Stage.GONE}),
    # Back to OPEN or RETURNED: a settlement by hand failed. SETTLING again: with another intent.
    Stage.SETTLING: frozenset({Stage.OPEN, Stage.RETURNED, Stage.SETTLING, Stage.GONE}),
    Stage.GONE: frozenset(),
}
"""The stages that may follow each stage. The tests check every change of a stage against this table."""


class KeyState(enum.IntEnum):
    """What is known of a message's idempotency key (exactly-once)."""

    UNKNOWN = 0
    CLAIMED = 1
    """Claimed for this entry, so its handler may run."""
    IN_TRANSACTION = 2
    """Its completion is part of the handler's transaction, which is not over."""
    COMPLETED = 3
    """Its completion is stored, so the message must not be handled again."""


class Waiter:
    """A caller that waits for the server's answer to a settlement.

    :ivar stage: the stage that the entry returns to if the settlement fails.
    :ivar result: how the handler ended meanwhile.
    """

    __slots__ = ("done", "error", "result", "stage")

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.done = anyio.Event()
        self.error: Exception | None = None
        self.result: Result | None = None


class Settlement(msgspec.Struct, eq=False):
    """How an entry is to be settled. It exists until the server has accepted it.

    :ivar outputs: messages to append in the same step.
    :ivar result: the result that led to it. (Cleared at the end: an exception keeps its frames alive.)
    :ivar uncertain: the reply to an earlier try was lost, and that try may have succeeded.
    """

    intent: str
    outputs: Sequence[Output] = ()
    result: Result | None = None
    decision: Decision | None = None
    tries: int = 0
    uncertain: bool = False


PLAIN = Settlement(ACKED)
"""Stands for the settlement of an entry that is acked at its first try. Such an entry, like nearly all, has none."""


class Held(msgspec.Struct, eq=False):
    """One entry that is pending and ours. (A Struct: one is made for every message.)

    :ivar retaken: the server delivered it to us again while it was being settled.
    :ivar settlement: None while it is open, and for a plain ack on its first try.
    :ivar scope: cancels its handler; None if that can never be necessary.
    :ivar gone: set when the entry is no longer held. Only a suspect has it.
    :ivar key: what is known of its idempotency key.
    """

    stream: str
    id: str
    message: Message
    attempt: int
    deliveries: int | None
    published_at: datetime | None
    received_at: datetime
    lease_until: float
    by_reclaim: bool
    stage: Stage = Stage.WAITING
    lost: bool = False
    retaken: bool = False
    started_at: float = 0.0
    settlement: Settlement | None = None
    waiter: Waiter | None = None
    scope: anyio.CancelScope | None = None
    gone: anyio.Event | None = None
    key: KeyState = KeyState.UNKNOWN

    @property
    def intent(self) -> str:
        return (self.settlement or PLAIN).intent

    def settle(
        self,
        intent: str,
        outputs: Sequence[Output] = (),
        result: Result | None = None,
        decision: Decision | None = None,
    ) -> None:
        """Begin its settlement: from now on it is on its way to the server."""
        uncertain = self.settlement is not None and self.settlement.uncertain
        self.settlement = Settlement(intent, outputs, result, decision, uncertain=uncertain)
        self.stage = Stage.SETTLING

    def again(self, attempt: int, stage: Stage) -> Held:
        """A new record of the same entry, for its next handling or settlement."""
        return Held(
            self.stream,
            self.id,
            self.message,
            attempt,
            self.deliveries,
            self.published_at,
            self.received_at,
            self.lease_until,
            self.by_reclaim,
            stage,
        )
