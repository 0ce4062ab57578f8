"""An entry that this subscription holds: its stages, and the settlement that it is on the way to."""

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
SETTLED_BEFORE = "settled before"
"""The intent of an ack for an entry that was settled here and was redelivered: it is not counted again."""


class Stage(enum.IntEnum):
    PARKED = 0
    """Taken, and not to be started yet: its backoff is not over, or it is a suspect and must be alone."""
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
    # PARKED: as it is taken, a suspect is parked until it is alone.
    Stage.WAITING: frozenset({Stage.PARKED, Stage.OPEN, Stage.SETTLING, Stage.GONE}),
    Stage.OPEN: frozenset({Stage.RETURNED, Stage.SETTLING, Stage.GONE}),
    Stage.RETURNED: frozenset({Stage.SETTLING, Stage.GONE}),
    # Back to OPEN or RETURNED: a settlement by hand failed. SETTLING again: with another intent.
    Stage.SETTLING: frozenset({Stage.OPEN, Stage.RETURNED, Stage.SETTLING, Stage.GONE}),
    Stage.GONE: frozenset(),
}
"""Which stage may follow which. The tests check every change of a stage against this."""


class Waiter:
    """Somebody waits for the server's answer to a settlement.

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
    """What becomes of an entry, until the server has it.

    :ivar outputs: what is appended in the same step.
    :ivar result: what it is settled for. (Cleared at the end: an exception keeps its frames alive.)
    :ivar uncertain: the reply to an earlier try was lost, and that try may have succeeded.
    """

    intent: str
    outputs: Sequence[Output] = ()
    result: Result | None = None
    decision: Decision | None = None
    tries: int = 0
    uncertain: bool = False


PLAIN = Settlement(ACKED)
"""Of an entry that is acked at its first try, like nearly all: it has no settlement of its own."""


class Held(msgspec.Struct, eq=False):
    """One entry that is pending and ours. (A Struct: one is made for every message.)

    :ivar retaken: the server delivered it to us again while it was being settled.
    :ivar settlement: None while it is open, and for a plain ack on its first try.
    :ivar scope: cancels its handler, where that may become necessary.
    :ivar gone: set when it is no longer held; only a suspect has it.
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
        """From here on it is on its way to the server."""
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
