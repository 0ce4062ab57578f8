"""The ledger: every entry that this subscription holds, from the moment it is taken until it is settled.

Channels only carry; the ledger owns (a cancelled hand-over can lose what it carried). All of it is synchronous, so
that no await stands between a decision and its bookkeeping. It also keeps the one budget, ``max_pending_acks``, on
which reads and reclaims draw.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime
from typing import TypeVar

import anyio
import msgspec

from .._failure.settlement import Result
from .._messages.message import Message
from ..abc import FetchedEntry, Output

_REMEMBERED = 4096
_WORTH_A_READ = 32

SETTLED_BEFORE = "settled before"
"""The intent of an ack for what had been settled here when it came back: it counts no second time."""


class Stage(enum.IntEnum):
    WAITING = 0
    """Taken, not started (or held until its backoff is over)."""
    OPEN = 1
    """With a handler, not settled."""
    RETURNED = 2
    """The handler returned without settling (manual mode): held without renewal."""
    SETTLING = 3
    """On its way to the server."""
    GONE = 4
    """No longer held."""


_WAITING, _OPEN, _GONE = Stage.WAITING, Stage.OPEN, Stage.GONE  # read for every message


class Waiter:
    """Somebody awaits the server's answer to a settlement."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.error: Exception | None = None


class Held(msgspec.Struct, eq=False):
    """One entry that is pending and ours. (A Struct: one is made for every message.)"""

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
    suspect: bool = False
    parked: bool = False
    local_attempt: bool = False
    reason: str = ""
    retaken: bool = False
    failed: bool = False
    started_at: float = 0.0
    tries: int = 0
    uncertain: bool = False
    intent: str = ""
    outputs: Sequence[Output] = ()
    waiter: Waiter | None = None
    result: Result | None = None
    scope: anyio.CancelScope | None = None
    gone: anyio.Event | None = None
    unsettled: Stage = Stage.OPEN
    ending: Result | None = None
    """What it is retried or given up for, until the server has that. (An exception keeps its frames alive.)"""
    delay: float = 0.0

    def again(self, attempt: int) -> Held:
        """The record of the next handling of the same entry, which waits here."""
        again = Held(
            self.stream,
            self.id,
            self.message,
            attempt,
            self.deliveries,
            self.published_at,
            self.received_at,
            self.lease_until,
            self.by_reclaim,
        )
        again.parked = again.local_attempt = True
        return again


class Budget:
    """How many entries may be held, and whose turn it is to take more (promises 2 and 3).

    A part is always reclaim's: a quarter, at least 1, but only of what lies beyond ``max_in_flight``. Beyond its part
    reclaim takes only while no read waits for room.
    """

    def __init__(self, max_in_flight: int, max_pending_acks: int) -> None:
        self.limit = max_pending_acks
        self.reclaim_part = min(max(max_pending_acks // 4, 1), max_pending_acks - max_in_flight)
        self.read_part = max_pending_acks - self.reclaim_part
        # A third is read while a third is handled and a third acknowledged; all of it in one go would wait in turns.
        self.read_at_once = max(_WORTH_A_READ, -(-self.read_part // 3))
        self.by_read = 0
        self.by_reclaim = 0
        self.read_waits = False
        self.trial: Trial | None = None
        """Set while the circuit is on trial."""

    @property
    def takes_turns(self) -> bool:
        """Nothing lies beyond ``max_in_flight``: read and reclaim take turns."""
        return self.reclaim_part == 0

    def read_room(self) -> int:
        room = min(self.read_part - self.by_read, self.limit - self.by_read - self.by_reclaim)
        return room if self.trial is None else min(room, self.trial.room(by_reclaim=False))

    def reclaim_room(self) -> int:
        free = self.limit - self.by_read - self.by_reclaim
        if self.trial is not None:
            return min(free, self.trial.room(by_reclaim=True))
        if self.takes_turns or not self.read_waits:
            return free
        return min(free, self.reclaim_part - self.by_reclaim)


class Trial:
    """While a circuit is on trial one handling begins at a time, and few entries are taken.

    At most one entry is read and one reclaimed ahead, so that neither side starves. Entries held before the trial do
    not count: their end makes no room.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._older = frozenset(ledger.all())
        self._begun: Held | None = None

    def may_begin(self, running: AbstractSet[Held]) -> bool:
        """Whether the last handling that began is over: its handler has ended, and its entry is settled."""
        begun = self._begun
        return begun is None or (begun.stage is _GONE and begun not in running)

    def begins(self, held: Held) -> None:
        self._begun = held

    def room(self, *, by_reclaim: bool) -> int:
        """How many more entries that side may take (either side, where they take turns)."""
        budget = self._ledger.budget
        apart = [held.by_reclaim for held in self._ledger.all() if held in self._older or held.parked]
        if budget.takes_turns:
            return 1 - (budget.by_read + budget.by_reclaim - len(apart))
        return 1 - ((budget.by_reclaim if by_reclaim else budget.by_read) - apart.count(by_reclaim))


KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


def _remember(memory: OrderedDict[KeyT, ValueT], key: KeyT, value: ValueT) -> None:
    memory[key] = value
    if len(memory) > _REMEMBERED:
        memory.popitem(last=False)


class Taking:
    """A call under way that takes entries: a context manager around it, which reserves the room that it asks for.

    Calls run side by side, and their replies may overtake each other: what left the ledger meanwhile can still be
    pending and ours in the reply to this one. (One is made for every read: no generator.)

    :ivar began: the server can have handed nothing over earlier than this: leases count from here.
    :ivar settled: ids of what was settled meanwhile, or left pending by a crash, by stream. They are not taken.
    :ivar doubtful: ids of what was let go meanwhile, by stream. Only the server knows whose they are.
    """

    __slots__ = ("_by_reclaim", "_ledger", "_room", "began", "doubtful", "settled")

    def __init__(self, ledger: Ledger, began: float, room: int, by_reclaim: bool) -> None:
        self._ledger = ledger
        self._room = room
        self._by_reclaim = by_reclaim
        self.began = began
        self.settled: dict[str, set[str]] = {}
        self.doubtful: dict[str, set[str]] = {}

    def __enter__(self) -> Taking:  # noqa: PYI034
        self._ledger.under_way.append(self)
        self._reserve(self._room)
        return self

    def __exit__(self, *_: object) -> None:
        # What it brought is entered into the ledger before anything else happens.
        self._ledger.under_way.remove(self)
        self._reserve(-self._room)
        self._ledger.changed()

    def _reserve(self, room: int) -> None:
        if self._by_reclaim:
            self._ledger.budget.by_reclaim += room
        else:
            self._ledger.budget.by_read += room


class Ledger:
    """What is held, stream by stream, in the order taken."""

    def __init__(self, streams: Sequence[str], budget: Budget) -> None:
        self.budget = budget
        self.tables: dict[str, dict[str, Held]] = {stream: {} for stream in streams}
        self.waiting: deque[Held] = deque()
        self._handled: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._settled: dict[str, deque[str]] = {stream: deque(maxlen=_REMEMBERED) for stream in streams}
        self._crossing: set[tuple[str, str]] = set()
        self.vanished: dict[str, float] = {}
        """Streams where an entry ceased to be ours within its lease, and when that lease was to end."""
        self._attempts: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._read_room: anyio.Event | None = None
        self._reclaim_room: anyio.Event | None = None
        self._watched: anyio.Event | None = None
        self.on_removed: Callable[[], None] | None = None
        self.under_way: list[Taking] = []

    def __len__(self) -> int:
        return sum(len(table) for table in self.tables.values())

    def all(self) -> list[Held]:
        return [held for table in self.tables.values() for held in table.values()]

    def add(self, held: Held) -> None:
        self.tables[held.stream][held.id] = held
        if held.by_reclaim:
            self.budget.by_reclaim += 1
        else:
            self.budget.by_read += 1

    def remove(self, held: Held) -> None:
        if held.stage is _GONE:
            return
        held.stage = _GONE
        held.ending = held.result = None
        if held.local_attempt:
            _remember(self._attempts, (held.stream, held.id), held.attempt)
        del self.tables[held.stream][held.id]
        if self._crossing:
            self._crossing.discard((held.stream, held.id))
        if held.by_reclaim:
            self.budget.by_reclaim -= 1
        else:
            self.budget.by_read -= 1
        if held.gone is not None:
            held.gone.set()
        if self._read_room is not None or self._reclaim_room is not None or self._watched is not None:
            self.changed()
        if self.on_removed is not None:
            self.on_removed()

    def all_taken(self) -> None:
        """Nothing may wait any more: a read that held out for more room is worth while now."""
        if self._read_room is not None:
            self.changed()

    def has_waiting(self) -> bool:
        while self.waiting and self.waiting[0].stage is not _WAITING:
            self.waiting.popleft()
        return bool(self.waiting)

    def note_doubt(self, stream: str, ids: Sequence[str]) -> None:
        """Let go, and not settled: what a call under way brings of these may be older or newer than that."""
        for taking in self.under_way:
            taking.doubtful.setdefault(stream, set()).update(ids)

    def note_crashed(self, held: Held) -> None:
        """Its handling crashed: it stays pending and counted, whatever a call under way says of it."""
        for taking in self.under_way:
            taking.settled.setdefault(held.stream, set()).add(held.id)

    def remember_handled(self, held: Held, intent: str) -> None:
        """An entry that was handled here, but whose ack nobody confirmed: should it come back, it is only acked."""
        _remember(self._handled, (held.stream, held.id), intent)

    def remove_settled(self, stream: str, entries: Sequence[Held]) -> None:
        """``note_settled`` and ``remove`` for many of one stream; who waits for room is woken once."""
        table = self.tables[stream]
        self.note_settled(stream, [held.id for held in entries])
        by_reclaim = by_read = 0
        for held in entries:
            if held.local_attempt or held.gone is not None or self._crossing:
                self.remove(held)
            elif held.stage is not _GONE:
                held.stage = _GONE
                del table[held.id]
                if held.by_reclaim:
                    by_reclaim += 1
                else:
                    by_read += 1
        self.budget.by_reclaim -= by_reclaim
        self.budget.by_read -= by_read
        self.changed()
        if self.on_removed is not None:
            self.on_removed()

    def note_settled(self, stream: str, ids: Sequence[str]) -> None:
        """The server has what settles these for good."""
        for taking in self.under_way:
            settled = taking.settled.get(stream)
            if settled is None:
                taking.settled[stream] = set(ids)
            else:
                settled.update(ids)
        self._settled[stream] += ids
        if self._crossing:
            for entry_id in ids:
                if (stream, entry_id) in self._crossing:
                    _remember(self._handled, (stream, entry_id), SETTLED_BEFORE)

    def group_was_lost(self, stream: str) -> None:
        """What was settled here lately may come back from a group made again: it is only acked then.

        What is being settled may be on its way back from the server, settled in the group that is gone: it counts as
        soon as that is known. Not otherwise: an operator who moves a group back on purpose shall have his messages
        handled again.
        """
        self.vanished.pop(stream, None)
        for entry_id in self._settled[stream]:
            _remember(self._handled, (stream, entry_id), SETTLED_BEFORE)
        self._crossing |= {(stream, held.id) for held in self.tables[stream].values() if held.stage is Stage.SETTLING}

    def note_vanished(self, held: Held, now: float) -> None:
        """The server says that it is not ours. Within its lease nobody can have reclaimed it: perhaps its group was
        gone, and another member has made it again before a call of ours met that.
        """
        if now < held.lease_until:
            self.vanished[held.stream] = held.lease_until

    def was_made_again(self, stream: str, entries: Sequence[FetchedEntry], now: float) -> bool:
        """Whether that is so, as what is taken now shows: some of it had been settled here."""
        until = self.vanished.get(stream)
        if until is None:
            return False
        if now >= until:
            del self.vanished[stream]
            return False
        settled = set(self._settled[stream])
        return any(entry.id in settled for entry in entries)

    @property
    def remembers(self) -> bool:
        """Whether anything is remembered of entries that are no longer held."""
        return bool(self._handled or self._attempts)

    def recall_attempt(self, stream: str, entry_id: str) -> int:
        """The attempt of an entry that waited here for its retry and was let go, where no copy carries the count."""
        return self._attempts.pop((stream, entry_id), 1) if self._attempts else 1

    def was_handled(self, stream: str, entry_id: str) -> bool:
        return (stream, entry_id) in self._handled

    def recall_handled(self, stream: str, entry_id: str) -> str | None:
        """The intent to ack it with, if it is such an entry; asking forgets it, since it is about to be acked."""
        return self._handled.pop((stream, entry_id), None) if self._handled else None

    async def wait_for_read_room(self) -> int:
        """How many a read may take. Waits for a worthwhile number while there is work to do meanwhile."""
        while not self._worth_reading():
            self.budget.read_waits = True
            self._read_room = anyio.Event()
            try:
                await self._read_room.wait()
            finally:
                self._read_room = None
                self.budget.read_waits = False
        return self.budget.read_room()

    def _worth_reading(self) -> bool:
        room = self.budget.read_room()
        return room >= max(1, self.budget.read_part // 4) or (room > 0 and not self.has_waiting())

    async def wait_for_reclaim_room(self) -> int:
        while True:
            room = self.budget.reclaim_room()
            if room > 0:
                return room
            self._reclaim_room = anyio.Event()
            try:
                await self._reclaim_room.wait()
            finally:
                self._reclaim_room = None

    async def wait_for_only(self, held: Held) -> None:
        """Wait until nothing else is held, or this one no longer waits."""
        while len(self) > 1 and held.stage is _WAITING:
            self._watched = anyio.Event()
            try:
                await self._watched.wait()
            finally:
                self._watched = None

    def changed(self) -> None:
        """Wake those who wait for room, or for the others to be gone."""
        if self._read_room is not None and self._worth_reading():
            self._read_room.set()
        if self._reclaim_room is not None and self.budget.reclaim_room() > 0:
            self._reclaim_room.set()
        if self._watched is not None:
            self._watched.set()
