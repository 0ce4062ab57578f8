"""Dead letters in memory: reading a stream without a group, and removing entries from it."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from anyio.lowlevel import checkpoint

from ..._ground.errors import EventBusError, ValidationError
from ..._messages.message import lift_headers
from ...abc import DeadLetterStore, Move, StoredEntry
from ...abc._dead_letters import RAW_PREFIX
from .store import Entry, Stream


class MemoryDeadLetters(DeadLetterStore):
    """The memory backend's part for dead letters. Reading copies nothing, so no entry is too large to be read."""

    _streams: dict[str, Stream]

    @abc.abstractmethod
    def _stream(self, name: str) -> Stream:
        """The stream of this name."""

    async def last_entry_id(self, stream: str) -> str | None:
        await checkpoint()
        store = self._stream(stream) if stream in self._streams else None
        return None if store is None else next((entry.id for entry in store.backwards()), None)

    async def read_page(
        self, stream: str, *, after: str | None, until: str, count: int, max_bytes: int, max_entry_bytes: int
    ) -> list[StoredEntry]:
        await checkpoint()
        first, last = 0 if after is None else _sequence("after", after), _sequence("until", until)
        page: list[StoredEntry] = []
        store = self._stream(stream) if stream in self._streams else None
        left = max_bytes
        for entry in () if store is None else store.between(first, last):
            stored = _stored(entry)
            left -= stored.size
            if page and (left < 0 or len(page) == count):
                break
            page.append(stored)
        return page

    async def read_entry(self, stream: str, entry_id: str, *, max_entry_bytes: int) -> StoredEntry | None:
        await checkpoint()
        store = self._streams.get(stream)
        entry = None if store is None else store.find(entry_id)
        return None if entry is None else _stored(entry)

    async def has_group(self, stream: str, group: str) -> bool:
        await checkpoint()
        return stream in self._streams and group in self._streams[stream].groups

    async def move_entries(self, stream: str, moves: Sequence[Move]) -> list[str | EventBusError | None]:
        await checkpoint()
        return [self._move(stream, move) for move in moves]

    def _move(self, stream: str, move: Move) -> str | EventBusError | None:
        store = self._streams.get(stream)
        entry = None if store is None else store.find(move.id)
        if store is None or entry is None:
            return None
        target = self._stream(move.stream)
        if move.message is not None:
            appended = target.append(lift_headers(move.message), {})
        else:
            raw = {name[len(RAW_PREFIX) :]: value for name, value in entry.raw.items() if name.startswith(RAW_PREFIX)}
            if not raw:
                return ValidationError(f"entry {move.id} of {stream!r} has no raw fields")
            appended = target.append(None, raw)
        store.delete(entry.id)
        target.wake_readers()
        return appended.id

    async def remove_entries(self, stream: str, entry_ids: Sequence[str]) -> int:
        await checkpoint()
        store = self._streams.get(stream)
        return 0 if store is None else sum(store.delete(entry_id) for entry_id in entry_ids)


def _stored(entry: Entry) -> StoredEntry:
    return StoredEntry(
        entry.id,
        entry.message,
        entry.raw,
        {name: len(value) for name, value in entry.raw.items()},
        None if entry.message is not None else "the entry has no message that can be decoded",
        entry.published_at,
    )


def _sequence(field: str, entry_id: str) -> int:
    number, dash, rest = entry_id.partition("-")
    if not all(
        part.isascii() and part.isdigit() and len(part) <= 20 for part in ((number, rest) if dash else (number,))
    ):
        raise ValidationError(f"{field} must be an entry's id, not {entry_id!r:.60}")
    return int(number)
