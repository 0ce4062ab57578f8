"""The data of the memory backend: streams, groups and pending entries. Only a waiting reader awaits here."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

import anyio
import msgspec

from ..._ground.clock import now as wall_clock
from ..._idempotency.table import KeyTable
from ..._messages.message import Message
from ...abc import ClaimedMessage, FetchedEntry, MalformedEntry, MissingEntry
from .deduplication import Records
from .delayed import Delays

if TYPE_CHECKING:
    from .retention import Kept

RETURNED: Final = "anybus:returned"
"""The parking consumer: released entries belong to it until they are reclaimed."""

LEASE_SIGN: Final = 15.0
"""A member counts as running for this many seconds at most, unless it gives a new sign."""

_COMPACT_AT: Final = 256


class Entry(msgspec.Struct, eq=False):
    """An entry of a stream."""

    sequence: int
    id: str
    message: Message | None
    raw: Mapping[str, bytes]
    published_at: datetime
    deleted: bool = False


class Pending(msgspec.Struct, eq=False):
    """An entry that was delivered and is not acknowledged: its consumer, since when, and its number of deliveries."""

    entry: Entry
    consumer: str
    since: float
    deliveries: int = 1

    def deliver_to(self, consumer: str, now: float) -> None:
        self.consumer = consumer
        self.since = now
        self.deliveries += 1

    def release(self) -> None:
        self.consumer = RETURNED
        self.since = -math.inf
        self.deliveries = max(self.deliveries - 1, 0)


class Group:
    """A consumer group: its position, its pending entries, and the readers that wait for entries."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.pending: dict[str, Pending] = {}
        self.cursors: dict[str, int] = {}
        self.consumers: set[str] = set()
        self._waiters: deque[anyio.Event] = deque()

    def owned(self, consumer: str, message_ids: Sequence[str]) -> Iterator[Pending]:
        for message_id in message_ids:
            pending = self.pending.get(message_id)
            if pending is not None and pending.consumer == consumer:
                yield pending

    def floor(self) -> int:
        """The position up to which all members have settled everything."""
        return min((pending.entry.sequence - 1 for pending in self.pending.values()), default=self.position)

    def drop_if_empty(self, consumer: str) -> None:
        if consumer in self.consumers and all(pending.consumer != consumer for pending in self.pending.values()):
            self.consumers.discard(consumer)

    async def wait_for_entry(self, stream: Stream) -> None:
        waiter = anyio.Event()
        self._waiters.append(waiter)
        try:
            await waiter.wait()
        except BaseException:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            else:
                # Woken and cancelled at the same moment: another reader must get the entry.
                self.pass_on(stream)
            raise

    def pass_on(self, stream: Stream) -> None:
        """Wake one waiting reader if there are entries for it. Each reader then wakes the next one."""
        if self._waiters and stream.last > self.position:
            self._waiters.popleft().set()

    def wake_all(self) -> None:
        while self._waiters:
            self._waiters.popleft().set()


class GroupLease:
    """The lease of a group, and the time until which each member counts as running."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.members: dict[str, float] = {}

    def sign(self, consumer: str, lease: float, now: float) -> None:
        """The consumer runs, and uses this lease."""
        self.members = {name: until for name, until in self.members.items() if until > now}
        self.members[consumer] = now + min(lease, LEASE_SIGN)

    def others(self, consumer: str, now: float) -> bool:
        return any(until > now for name, until in self.members.items() if name != consumer)


class KeptSchedule(msgspec.Struct, eq=False):
    """A recurring schedule: its definition, its last tick, and its owner until the end of the lease."""

    definition: str
    generation: int
    last_tick: datetime
    owner: str
    lease_end: datetime


class Stream:
    """The entries in the order of their ids, and the groups that read them."""

    def __init__(self, base: int) -> None:
        self._base = base
        self._log: list[Entry] = []
        self._deletions = 0
        self.delays = Delays()
        self.groups: dict[str, Group] = {}
        self.floors: dict[str, int] = {}
        self.leases: defaultdict[str, GroupLease] = defaultdict(GroupLease)
        self.records = Records()
        self.retention: Kept | None = None
        self.keys: defaultdict[str, KeyTable] = defaultdict(KeyTable)
        self.schedules: dict[str, KeptSchedule] = {}

    @property
    def last(self) -> int:
        return self._base + len(self._log)

    @property
    def first(self) -> int:
        """The sequence of the first entry, which may be deleted."""
        return self._base + 1

    @property
    def length(self) -> int:
        return len(self._log) - self._deletions

    def end_of(self, count: int) -> int:
        """The sequence that follows the first so many entries."""
        if not self._deletions:
            return self._base + min(count, len(self._log)) + 1
        first = list(itertools.islice((entry for entry in self._log if not entry.deleted), count))
        return first[-1].sequence + 1 if len(first) == count else self.last + 1

    def drop_before(self, sequence: int) -> int:
        """Remove all entries before this one. Returns how many there were."""
        gone = self._log[: max(0, sequence - self._base - 1)]
        alive = [entry for entry in gone if not entry.deleted]
        for entry in alive:  # some may be pending
            entry.deleted, entry.message, entry.raw = True, None, {}
        del self._log[: len(gone)]
        self._base += len(gone)
        self._deletions -= len(gone) - len(alive)
        return len(alive)

    def append(self, message: Message | None, raw: Mapping[str, bytes], at: datetime | None = None) -> Entry:
        sequence = self._base + len(self._log) + 1
        entry = Entry(sequence, f"{sequence}-0", message, raw, at or wall_clock())
        self._log.append(entry)
        return entry

    def wake_readers(self) -> None:
        for group in self.groups.values():
            group.pass_on(self)

    def after(self, position: int, count: int) -> list[Entry]:
        start = max(position - self._base, 0)
        if not self._deletions:
            return self._log[start : start + count]
        alive = (entry for entry in itertools.islice(self._log, start, None) if not entry.deleted)
        return list(itertools.islice(alive, count))

    def alive(self) -> list[Entry]:
        return [entry for entry in self._log if not entry.deleted]

    def between(self, after: int, until: int) -> Iterator[Entry]:
        first, end = (min(max(position - self._base, 0), len(self._log)) for position in (after, until))
        return (self._log[index] for index in range(first, end) if not self._log[index].deleted)

    def backwards(self) -> Iterator[Entry]:
        return (entry for entry in reversed(self._log) if not entry.deleted)

    def find(self, entry_id: str) -> Entry | None:
        digits = entry_id.removesuffix("-0")
        # No entry has a longer number, and Python refuses to parse extremely long ones.
        index = int(digits) - self._base - 1 if digits.isascii() and digits.isdigit() and len(digits) < 20 else -1
        entry = self._log[index] if 0 <= index < len(self._log) else None
        return None if entry is None or entry.deleted or entry.id != entry_id else entry

    def delete(self, entry_id: str) -> bool:
        """Delete an entry's body; false = it is already gone."""
        entry = self.find(entry_id)
        if entry is None:
            return False
        self._delete(entry)
        return True

    def _delete(self, entry: Entry) -> None:
        entry.deleted, entry.message, entry.raw = True, None, {}
        self._deletions += 1
        if self._deletions >= _COMPACT_AT and self._deletions * 2 > len(self._log):
            self._compact()

    def acked(self, stream: str, entry: Entry) -> None:
        """Delete an acknowledged entry of a retry stream, which has only one group: nobody else will read it."""
        if stream.startswith("anybus:") and not entry.deleted:
            self._delete(entry)

    def _compact(self) -> None:
        gone = next((index for index, entry in enumerate(self._log) if not entry.deleted), len(self._log))
        del self._log[:gone]
        self._base += gone
        self._deletions -= gone

    def fetch(self, entry: Entry, deliveries: int) -> FetchedEntry:
        if entry.message is not None:
            return ClaimedMessage(entry.id, entry.message, deliveries, entry.published_at)
        if entry.deleted:
            return MissingEntry(entry.id)
        return MalformedEntry(entry.id, entry.raw, "the entry has no message that can be decoded", deliveries)

    def next_due(self) -> float:
        return self.delays.next_due()

    def move_due(self, now: float) -> None:
        """Append what is due. What comes late, because nobody looked, counts as published when it was due."""
        due = self.delays.take_due(now) if self.delays.waiting else ()
        if due:
            at = wall_clock()
            for later in due:
                self.append(later.message, later.raw, at - timedelta(seconds=max(0.0, now - later.key[0])))
            self.wake_readers()
