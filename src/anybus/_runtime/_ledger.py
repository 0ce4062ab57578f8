"""The ledger: every entry that this subscription holds, from the moment it is taken until it is settled.

Channels only carry; the ledger owns (a cancelled hand-over can lose what it carried). All of it is synchronous, so
that no await stands between a decision and its bookkeeping. It also keeps the one budget, ``max_pending_acks``, on
which reads and reclaims draw.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from datetime import datetime
from typing import TypeVar

import anyio
import msgspec

from .._message import Message
from .._settlement import Result
from ..abc import Output

_REMEMBERED = 4096
_WORTH_A_READ = 32


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


class Ledger:
    """What is held, stream by stream, in the order taken."""

    def __init__(self, streams: Sequence[str], budget: Budget) -> None:
        self.budget = budget
        self.tables: dict[str, dict[str, Held]] = {stream: {} for stream in streams}
        self.waiting: deque[Held] = deque()
        self._handled: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._acked: deque[tuple[str, str]] = deque(maxlen=_REMEMBERED)
        self._attempts: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._read_room: anyio.Event | None = None
        self._reclaim_room: anyio.Event | None = None
        self._watched: anyio.Event | None = None
        self.on_removed: Callable[[], None] | None = None
        self._settled_meanwhile: set[tuple[str, str]] | None = None

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
        if held.local_attempt:
            _remember(self._attempts, (held.stream, held.id), held.attempt)
        del self.tables[held.stream][held.id]
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

    def remember_handled(self, held: Held) -> None:
        """An entry that was handled here, but whose ack nobody confirmed: should it come back, it is only acked."""
        _remember(self._handled, (held.stream, held.id), None)

    def remove_acked(self, stream: str, entries: Sequence[Held]) -> None:
        """``remember_acked`` and ``remove`` for many of one stream; who waits for room is woken once."""
        table = self.tables[stream]
        if self._settled_meanwhile is not None:
            self._settled_meanwhile.update((stream, held.id) for held in entries)
        by_reclaim = by_read = 0
        for held in entries:
            if held.local_attempt or held.gone is not None:
                self.remove(held)
            elif held.stage is not _GONE:
                held.stage = _GONE
                del table[held.id]
                if held.by_reclaim:
                    by_reclaim += 1
                else:
                    by_read += 1
        self._acked += [(stream, held.id) for held in entries]
        self.budget.by_reclaim -= by_reclaim
        self.budget.by_read -= by_read
        self.changed()
        if self.on_removed is not None:
            self.on_removed()

    def remember_acked(self, held: Held) -> None:
        """An entry that was handled here, and whose ack the server has. Of use only if the server forgets it."""
        self._acked.append((held.stream, held.id))

    def note_settled(self, held: Held) -> None:
        """The server has what settles an entry for good."""
        if self._settled_meanwhile is not None:
            self._settled_meanwhile.add((held.stream, held.id))

    @contextmanager
    def noting_settled(self) -> Generator[set[tuple[str, str]], None, None]:
        """Stream and id of what is settled meanwhile: a reply that is on its way may still call it pending and ours."""
        settled = self._settled_meanwhile = set()
        try:
            yield settled
        finally:
            self._settled_meanwhile = None

    def group_was_lost(self) -> None:
        """What was acked here lately may come back from a group made again: it is only acked then.

        Not otherwise: an operator who moves a group back on purpose shall have his messages handled again.
        """
        for key in self._acked:
            _remember(self._handled, key, None)

    @property
    def remembers(self) -> bool:
        """Whether anything is remembered of entries that are no longer held."""
        return bool(self._handled or self._attempts)

    def recall_attempt(self, stream: str, entry_id: str) -> int:
        """The attempt of an entry that waited here for its retry and was let go, where no copy carries the count."""
        return self._attempts.pop((stream, entry_id), 1) if self._attempts else 1

    def was_handled(self, stream: str, entry_id: str) -> bool:
        """Whether it is such an entry; asking forgets it, since it is about to be acked."""
        key = (stream, entry_id)
        if key not in self._handled:
            return False
        del self._handled[key]
        return True

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
