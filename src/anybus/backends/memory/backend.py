"""The backend in memory: for tests, for experiments, and for applications that run in one process."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import RunVar, checkpoint

from ..._ground.checks import check_delay, check_name, check_start_id, check_time, plain_text
from ..._ground.clock import now as wall_clock
from ..._ground.errors import EventBusError, GroupLostError, ValidationError
from ..._messages.message import Message, lift_headers
from ...abc import (
    Feature,
    FetchedEntry,
    LeaseKeeper,
    Output,
    PendingEntry,
    PublishItem,
    PublishSpec,
    StreamInspector,
    TransferItem,
)
from .completions import MemoryCompletions
from .dead_letters import MemoryDeadLetters
from .deduplication import MemoryDeduplication, Records
from .delayed import Delays, MemorySchedules
from .retention import MemoryRetention
from .store import RETURNED, Group, Pending, Stream
from .ticks import MemoryTicks

__all__ = ["MemoryBackend"]

if TYPE_CHECKING:
    from typing_extensions import Self


_shared: RunVar[dict[str, dict[str, Stream]]] = RunVar("anybus_shared_memory")


class MemoryBackend(
    MemoryDeduplication,
    StreamInspector,
    LeaseKeeper,
    MemoryDeadLetters,
    MemoryRetention,
    MemoryCompletions,
    MemorySchedules,
    MemoryTicks,
):
    """Streams, groups and pending entries in this process's memory.

    Like a stream on a server, it keeps every published message, for as long as the backend lives. It uses AnyIO's
    clock, so a virtual clock drives it. It belongs to one event loop.

    The public methods that are plain functions are for tests. They do what an operator or an accident does to a server.

    :param name: once entered, the backend shares its streams with all others of this name in the same event loop.
    """

    features: frozenset[Feature] = frozenset(
        {"renew", "release", "fence", "delivery_count", "atomic_transfer", "raw", "delay", "dedup", "inspect", "trim"}
    )

    def __init__(self, name: str | None = None) -> None:
        self._name = None if name is None else check_name("name", name)
        self._streams: dict[str, Stream] = {}

    async def __aenter__(self) -> Self:
        if self._name is not None:
            try:
                shared = _shared.get()
            except LookupError:
                shared = dict[str, dict[str, Stream]]()
                _shared.set(shared)
            self._streams = shared.setdefault(self._name, self._streams)
        return self

    def __repr__(self) -> str:
        return f"<MemoryBackend streams={len(self._streams)}>"

    async def create_group(self, stream: str, group: str, start_id: str = "$") -> bool:
        start_id = check_start_id("start_id", start_id)
        await checkpoint()
        store, group = self._stream(stream), plain_text(group)
        if group in store.groups:
            return False
        store.groups[group] = Group(store.last if start_id == "$" else _sequence(start_id))
        return True

    async def publish(self, stream: str, message: Message) -> str:
        await checkpoint()
        return self._append(stream, message)

    async def publish_many(self, items: Sequence[PublishItem]) -> list[str | EventBusError]:
        await checkpoint()
        results: list[str | EventBusError] = []
        written: set[Stream] = set()
        at = wall_clock()
        for stream, message, spec in items:
            if spec is not None:
                results.append(self._append_once(stream, message, spec))
                continue
            store = self._stream(stream)
            results.append(store.append(lift_headers(message), {}, at).id)
            written.add(store)
        for store in written:
            store.wake_readers()
        return results

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        # The checkpoint comes first, so that nothing can be cancelled between taking entries and returning them.
        await checkpoint()
        taken = self._take_new(stream, group, consumer, count)
        if taken or timeout <= 0:
            return taken
        deadline = anyio.current_time() + timeout
        while not taken:
            now = anyio.current_time()
            if now >= deadline:
                break
            store, members = self._find(stream, group)
            with anyio.move_on_after(min(deadline, store.next_due()) - now):
                await members.wait_for_entry(store)
            taken = self._take_new(stream, group, consumer, count)
        return taken

    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        await checkpoint()
        store, members = self._find(stream, group)
        entries = list(members.pending.values())
        # Ids only grow, so pending entries are in the order of their ids, and the scan can continue by position.
        start = bisect.bisect_right(entries, members.cursors.get(consumer, 0), key=_position)
        now = anyio.current_time()
        taken: list[FetchedEntry] = []
        cursor = 0
        for pending in (*entries[start:], *entries[:start]):
            if now - pending.since < min_idle:
                continue
            pending.deliver_to(consumer, now)
            taken.append(store.fetch(pending.entry, pending.deliveries))
            if len(taken) == count:
                cursor = pending.entry.sequence
                break
        members.cursors[consumer] = cursor
        if taken:
            members.consumers.add(consumer)
        members.drop_if_empty(RETURNED)
        return taken

    async def ack(self, stream: str, group: str, message_id: str) -> None:
        await self.ack_many(stream, group, (message_id,))

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        await checkpoint()
        members = self._group_or_none(stream, group)
        if members is None:
            return list(message_ids) if consumer is not None else []
        store, pending = self._stream(stream), members.pending
        refused: list[str] = []
        for message_id in message_ids:
            entry = pending.get(message_id)
            if entry is not None and (consumer is None or entry.consumer == consumer):
                del pending[message_id]
                store.acked(stream, entry.entry)
            elif consumer is not None:
                refused.append(message_id)
        return refused

    async def agree_lease(self, stream: str, group: str, consumer: str, lease: float, *, change: bool = False) -> float:
        await checkpoint()
        kept, now = self._stream(stream).leases[group], anyio.current_time()
        running = lease
        if kept.seconds is not None and kept.others(consumer, now):
            running = kept.seconds
            if running != lease and not change:
                return running
        kept.seconds = lease
        kept.sign(consumer, lease, now)
        return running

    async def kept_lease(self, stream: str, group: str, consumer: str, lease: float) -> float:
        await checkpoint()
        kept = self._stream(stream).leases[group]
        kept.seconds = lease if kept.seconds is None else kept.seconds
        kept.sign(consumer, lease, anyio.current_time())
        return kept.seconds

    async def forget_consumer(self, stream: str, group: str, consumer: str) -> None:
        await checkpoint()
        if stream in self._streams:
            self._streams[stream].leases[group].members.pop(consumer, None)
        members = self._group_or_none(stream, group)
        if members is not None:
            members.cursors.pop(consumer, None)
            members.drop_if_empty(consumer)

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        await checkpoint()
        _, members = self._find(stream, group)
        now = anyio.current_time()
        owned: list[str] = []
        for pending in members.owned(consumer, message_ids):
            pending.since = now
            owned.append(pending.entry.id)
        return owned

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        await checkpoint()
        _, members = self._find(stream, group)
        for pending in members.owned(consumer, message_ids):
            pending.release()
            members.consumers.add(RETURNED)

    async def transfer(
        self, stream: str, group: str, consumer: str, message_id: str, outputs: Sequence[Output]
    ) -> list[str] | None:
        await checkpoint()
        return self._transfer(stream, group, consumer, message_id, outputs)

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[list[str] | EventBusError | None]:
        await checkpoint()
        return [self._transfer(stream, group, consumer, message_id, outputs) for message_id, outputs in items]

    async def publish_later(
        self,
        stream: str,
        message: Message,
        *,
        delay: float | None = None,
        at: datetime | None = None,
        spec: PublishSpec | None = None,
    ) -> str:
        if (delay is None) == (at is None):
            raise ValidationError("publish_later takes exactly one of delay and at")
        await checkpoint()
        records, now = self._records(stream), anyio.current_time()
        known = records.find(spec, now)
        if known is not None:
            return known
        if at is not None:
            due = self._stream(stream).delays.time_of(check_time("at", at))
        else:
            due = now + check_delay("delay", delay)
        schedule_id = self._schedule(stream, message, None, due)
        records.keep(spec, schedule_id, now, scheduled=True)
        return schedule_id

    async def cancel_later(self, stream: str, schedule_id: str) -> bool:
        await checkpoint()
        if stream not in self._streams or not self._stream(stream).delays.cancel(schedule_id):
            return False
        self._records(stream).forget(schedule_id)
        return True

    async def count_entries(self, stream: str) -> int:
        await checkpoint()
        return len(self.entries(stream))

    async def pending_entries(self, stream: str, group: str, *, limit: int = 1000) -> list[PendingEntry]:
        await checkpoint()
        _, members = self._find(stream, group)
        now = anyio.current_time()
        return [
            PendingEntry(pending.entry.id, pending.consumer, max(0.0, now - pending.since), pending.deliveries)
            for pending in list(members.pending.values())[:limit]
        ]

    async def consumer_names(self, stream: str, group: str) -> list[str]:
        await checkpoint()
        return sorted(self._find(stream, group)[1].consumers)

    def append_raw(self, stream: str, fields: Mapping[str, bytes]) -> str:
        """Append an entry that cannot be decoded. For tests."""
        store = self._stream(stream)
        entry_id = store.append(None, dict(fields)).id
        store.wake_readers()
        return entry_id

    def entries(self, stream: str) -> list[tuple[str, Message | None, Mapping[str, bytes]]]:
        """The entries of a stream: id, message (None if malformed) and raw fields of each. For tests."""
        stream = plain_text(stream)
        store = self._stream(stream) if stream in self._streams else None
        return [] if store is None else [(entry.id, entry.message, entry.raw) for entry in store.alive()]

    def delete_entry(self, stream: str, entry_id: str) -> None:
        """Delete an entry's body, pending or not, as trimming does. For tests."""
        self._stream(stream).delete(entry_id)

    def delete_group(self, stream: str, group: str) -> None:
        """Delete a group, as an operator may do by mistake. Its safe floor is kept. For tests."""
        store, group = self._stream(stream), plain_text(group)
        members = store.groups.pop(group)
        store.floors[group] = members.floor()
        members.wake_all()

    def delete_stream(self, stream: str) -> None:
        """Delete a stream with its entries, groups and floors, as FLUSHALL does. Ids keep growing. For tests."""
        stream = plain_text(stream)
        old = self._streams.pop(stream)
        self._streams[stream] = Stream(old.last)
        for members in old.groups.values():
            members.wake_all()

    def _stream(self, name: str) -> Stream:
        store = self._streams.get(name) if type(name) is str else None
        if store is None:
            store = self._streams.setdefault(plain_text(name), Stream(0))
        if store.delays.waiting:
            store.move_due(anyio.current_time())
        return store

    def _records(self, stream: str) -> Records:
        return self._stream(stream).records

    def _delays(self, stream: str) -> Delays:
        return self._stream(stream).delays if stream in self._streams else Delays()

    def _group_or_none(self, stream: str, group: str) -> Group | None:
        store = self._streams.get(plain_text(stream))
        return None if store is None else store.groups.get(plain_text(group))

    def _find(self, stream: str, group: str) -> tuple[Stream, Group]:
        store = self._streams.get(plain_text(stream))
        members = None if store is None else store.groups.get(plain_text(group))
        if store is None or members is None:
            floor = None if store is None else store.floors.get(group)
            raise GroupLostError(stream, group, None if floor is None else f"{floor}-0")
        return store, members

    def _append(self, stream: str, message: Message) -> str:
        store = self._stream(stream)
        entry = store.append(lift_headers(message), {})
        store.wake_readers()
        return entry.id

    def _take_new(self, stream: str, group: str, consumer: str, count: int) -> list[FetchedEntry]:
        store, members = self._find(stream, group)
        store.move_due(anyio.current_time())
        entries = store.after(members.position, count)
        if not entries:
            members.position = max(members.position, store.last)  # the entries in between were deleted
            return []
        members.position = entries[-1].sequence
        members.consumers.add(consumer)
        now = anyio.current_time()
        taken: list[FetchedEntry] = []
        for entry in entries:
            members.pending[entry.id] = Pending(entry, consumer, now)
            taken.append(store.fetch(entry, 1))
        members.pass_on(store)
        return taken

    def _transfer(
        self, stream: str, group: str, consumer: str, message_id: str, outputs: Iterable[Output]
    ) -> list[str] | None:
        members = self._group_or_none(stream, group)
        pending = None if members is None else members.pending.get(message_id)
        if members is None or pending is None or pending.consumer != consumer:
            return None
        ids = [self._put(output) for output in outputs]
        del members.pending[message_id]
        self._stream(stream).acked(stream, pending.entry)
        return ids

    def _put(self, output: Output) -> str:
        raw = {f"raw:{name}": value for name, value in (output.raw or {}).items()}
        if output.delay > 0:
            return self._schedule(output.stream, output.message, raw, anyio.current_time() + output.delay)
        store = self._stream(output.stream)
        entry_id = store.append(lift_headers(output.message), raw).id
        store.wake_readers()
        return entry_id

    def _schedule(self, stream: str, message: Message, raw: Mapping[str, bytes] | None, due: float) -> str:
        store = self._stream(stream)
        schedule_id = store.delays.add(due, lift_headers(message), dict(raw or {}))
        for members in store.groups.values():
            members.wake_all()  # blocked readers must check again when the next entry is due
        return schedule_id


def _position(pending: Pending) -> int:
    return pending.entry.sequence


def _sequence(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])
