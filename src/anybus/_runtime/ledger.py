"""The ledger: every entry that this subscription holds, from the moment it is taken until it is settled.

Channels only carry entries, and a cancelled ``receive()`` can lose what a channel carried. So the ledger owns them. It
is synchronous, so that no await stands between a decision and its bookkeeping.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TypeVar

import anyio

from ..abc import ClaimedMessage, FetchedEntry
from .budget import Budget
from .entry import SETTLED_BEFORE, Held, Stage

_REMEMBERED = 4096
_SETTLING, _GONE = Stage.SETTLING, Stage.GONE  # read for every message

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


def _remember(memory: OrderedDict[KeyT, ValueT], key: KeyT, value: ValueT) -> None:
    memory[key] = value
    if len(memory) > _REMEMBERED:
        memory.popitem(last=False)


class Taking:
    """A context manager around a call that takes entries. It reserves the room that the call asks for.

    Calls run concurrently, and their replies may overtake each other: the reply to this call may still bring an entry
    that has left the ledger meanwhile. (One is made for every read, so it is not a generator.)

    :ivar began: when the call was sent. The server cannot have delivered anything earlier, so leases count from here.
    :ivar settled: by stream, the ids of entries that were settled meanwhile or left pending by a crash: not taken.
    :ivar doubtful: by stream, the ids of entries that were released or lost meanwhile. Only the server knows the owner.
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
        self._ledger.budget.use(self._room, by_reclaim=self._by_reclaim)
        return self

    def __exit__(self, *_: object) -> None:
        # The caller enters what the call brought into the ledger before anything else happens.
        self._ledger.under_way.remove(self)
        self._ledger.budget.use(-self._room, by_reclaim=self._by_reclaim)
        self._ledger.changed()


class Ledger:
    """The held entries of each stream, in the order in which they were taken.

    :param streams: the topic, and the group's retry stream.
    """

    def __init__(self, streams: Sequence[str], budget: Budget) -> None:
        self.budget = budget
        self.tables: dict[str, dict[str, Held]] = {stream: {} for stream in streams}
        self.under_way: list[Taking] = []
        self.vanished: dict[str, float] = {}
        """Streams where an entry ceased to be ours within its lease, and when that lease was to end."""
        self._topic = streams[0]
        self._handled: dict[str, OrderedDict[str, tuple[str, str]]] = {stream: OrderedDict() for stream in streams}
        # Ids, and the uids of their messages: after a failover, an id may belong to another message than before.
        self._settled: dict[str, deque[str]] = {stream: deque(maxlen=_REMEMBERED) for stream in streams}
        self._settled_uids: dict[str, deque[str]] = {stream: deque(maxlen=_REMEMBERED) for stream in streams}
        self._replaced = 0
        self._crossing: set[tuple[str, str]] = set()
        self._attempts: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._some_wait = False
        self._read_room: anyio.Event | None = None
        self._reclaim_room: anyio.Event | None = None
        self._change: anyio.Event | None = None

    def __len__(self) -> int:
        return sum(len(table) for table in self.tables.values())

    def all(self) -> list[Held]:
        return [held for table in self.tables.values() for held in table.values()]

    def waiting(self) -> list[Held]:
        """The entries that are on their way to a handler."""
        return [held for held in self.all() if held.stage is Stage.WAITING]

    def add(self, held: Held) -> None:
        self.tables[held.stream][held.id] = held
        self.budget.use(1, by_reclaim=held.by_reclaim)

    def add_new(self, stream: str, batch: Sequence[Held], *, by_reclaim: bool) -> None:
        """``add`` for a batch of one stream."""
        self.tables[stream].update([(held.id, held) for held in batch])
        self.budget.use(len(batch), by_reclaim=by_reclaim)

    def remove(self, held: Held) -> None:
        if held.stage is _GONE:
            return
        held.stage = _GONE
        if held.settlement is not None:
            held.settlement.result = None
        if held.attempt > 1 and held.stream == self._topic:
            _remember(self._attempts, (held.stream, held.id), held.attempt)
        table = self.tables[held.stream]
        if table.get(held.id) is held:
            del table[held.id]
        else:
            self._replaced -= 1
        if self._crossing:
            self._crossing.discard((held.stream, held.id))
        self.budget.use(-1, by_reclaim=held.by_reclaim)
        if held.gone is not None:
            held.gone.set()
        self.changed()
        if self.budget.trial is not None:
            self.budget.trial.look_again()

    def replace(self, held: Held) -> None:
        """Make room for another message with the same id. This entry's settlement is under way, and ends by itself."""
        del self.tables[held.stream][held.id]
        self._replaced += 1

    def remove_acked(self, stream: str, entries: Sequence[Held], ids: Sequence[str]) -> Sequence[Held]:
        """``note_settled`` and ``remove`` for plainly acked entries of one stream. Tasks that wait are woken once.

        :return: the entries that are not plain. They are still held.
        """
        if self._crossing or self._replaced:
            return entries
        table = self.tables[stream]
        unusual: list[Held] = []
        by_reclaim = by_read = 0
        for held in entries:
            if (
                held.stage is _SETTLING
                and held.settlement is None
                and held.waiter is None
                and held.gone is None
                and held.attempt == 1
                and not (held.lost or held.retaken)
            ):
                held.stage = _GONE
                del table[held.id]
                if held.by_reclaim:
                    by_reclaim += 1
                else:
                    by_read += 1
            else:
                unusual.append(held)
        if unusual:
            ids = [held.id for held in entries if held.stage is _GONE]
            uids = [held.message.uid for held in entries if held.stage is _GONE]
        else:
            uids = [held.message.uid for held in entries]
        self.note_settled(stream, ids, uids)
        self.budget.use(-by_reclaim, by_reclaim=True)
        self.budget.use(-by_read, by_reclaim=False)
        self.changed()
        if self.budget.trial is not None:
            self.budget.trial.look_again()
        return unusual

    def note_doubt(self, stream: str, ids: Sequence[str]) -> None:
        """Released or lost, not settled. A call under way may bring these, in a reply older or newer than that."""
        for taking in self.under_way:
            taking.doubtful.setdefault(stream, set()).update(ids)

    def note_crashed(self, held: Held) -> None:
        """Its handling crashed. It stays pending and counted, even if a call under way brings it."""
        for taking in self.under_way:
            taking.settled.setdefault(held.stream, set()).add(held.id)

    def note_settled(self, stream: str, ids: Sequence[str], uids: Sequence[str]) -> None:
        """The server has accepted settlements after which these are no longer pending.

        :param uids: of their messages.
        """
        for taking in self.under_way:
            taking.settled.setdefault(stream, set()).update(ids)
        self._settled[stream] += ids
        self._settled_uids[stream] += uids
        if self._crossing:
            for entry_id, uid in zip(ids, uids, strict=True):
                if (stream, entry_id) in self._crossing:
                    _remember(self._handled[stream], entry_id, (SETTLED_BEFORE, uid))

    def comes_again(self, stream: str, entry: FetchedEntry) -> bool:
        """Whether an entry that was settled while a call was under way may be what the call brought.

        Either its group was recreated, or its server was replaced and the id belongs to another message now.
        """
        if entry.id in self._handled[stream]:
            return True
        if isinstance(entry, ClaimedMessage):
            settled = zip(reversed(self._settled[stream]), reversed(self._settled_uids[stream]), strict=True)
            for entry_id, uid in settled:
                if entry_id == entry.id:
                    return uid != entry.message.uid
        return False

    def group_was_lost(self, stream: str) -> None:
        """A recreated group may redeliver entries that were settled here lately: they are only acked then.

        The same holds for entries that are being settled, as soon as their settlement is known to have worked. Without
        a loss it does not hold: if an operator moves a group back on purpose, its messages are handled again.
        """
        self.vanished.pop(stream, None)
        for entry_id, uid in zip(self._settled[stream], self._settled_uids[stream], strict=True):
            _remember(self._handled[stream], entry_id, (SETTLED_BEFORE, uid))
        self._crossing |= {(stream, held.id) for held in self.tables[stream].values() if held.stage is Stage.SETTLING}

    def note_vanished(self, held: Held, now: float) -> None:
        """The server says that it is not ours. If its lease is not over, perhaps another member recreated the group."""
        if now < held.lease_until:
            self.vanished[held.stream] = held.lease_until

    def was_recreated(self, stream: str, entries: Sequence[FetchedEntry], now: float) -> bool:
        """Whether the group was recreated, as the entries show: it redelivers some that were settled here."""
        until = self.vanished.get(stream)
        if until is None:
            return False
        if now >= until:
            del self.vanished[stream]
            return False
        settled = set(self._settled[stream])
        return any(entry.id in settled for entry in entries)

    def remembers(self, stream: str) -> bool:
        """Whether anything is remembered about entries of this stream that are no longer held."""
        return bool(self._handled[stream] or self._attempts)

    def recall_attempt(self, stream: str, entry_id: str) -> int:
        """The attempt of an entry that was released while it waited here for its retry. (No copy carries the count.)"""
        return self._attempts.pop((stream, entry_id), 1) if self._attempts else 1

    def remember_handled(self, held: Held, intent: str) -> None:
        """This entry was handled here, but its ack was not confirmed. If it is redelivered, it is only acked."""
        _remember(self._handled[held.stream], held.id, (intent, held.message.uid))

    def was_handled(self, stream: str, entry_id: str) -> bool:
        return entry_id in self._handled[stream]

    def recall_handled(self, stream: str, entry: FetchedEntry) -> str | None:
        """The intent with which to ack such an entry, or None. This forgets the entry, since it is acked now.

        It is None if another message had this id.
        """
        intent, uid = self._handled[stream].pop(entry.id, (None, None))
        return None if isinstance(entry, ClaimedMessage) and entry.message.uid != uid else intent

    def some_wait(self) -> None:
        """Entries were sent to the handlers, so a small read is not worthwhile."""
        self._some_wait = True

    def none_wait(self) -> None:
        """No entry is left to start, so a read that waited for more room is worthwhile now."""
        self._some_wait = False
        if self._read_room is not None:
            self.changed()

    async def wait_for_read_room(self) -> None:
        """Wait until there is room for a worthwhile read. While no entry is left to start, any room will do."""
        while not self._worth_reading():
            self.budget.let_reads_wait(True)
            self._read_room = anyio.Event()
            try:
                await self._read_room.wait()
            finally:
                self._read_room = None
                self.budget.let_reads_wait(False)

    def _worth_reading(self) -> bool:
        room = self.budget.read_room()
        return room >= max(1, self.budget.read_part // 4) or (room > 0 and not self._some_wait)

    async def wait_for_reclaim_room(self) -> None:
        while self.budget.reclaim_room() <= 0:
            self._reclaim_room = anyio.Event()
            try:
                await self._reclaim_room.wait()
            finally:
                self._reclaim_room = None

    async def wait_for_change(self) -> None:
        """Wait until something may have left the ledger."""
        if self._change is None:
            self._change = anyio.Event()
        await self._change.wait()

    def changed(self) -> None:
        """Wake the tasks that wait for room or for a change."""
        if self._read_room is not None and self._worth_reading():
            self._read_room.set()
        if self._reclaim_room is not None and self.budget.reclaim_room() > 0:
            self._reclaim_room.set()
        if self._change is not None:
            self._change.set()
            self._change = None
