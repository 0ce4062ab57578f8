"""Deduplication in memory: the keys that were published to a stream, and until when they count."""

from __future__ import annotations

import abc
import heapq
import math

import anyio
from anyio.lowlevel import checkpoint

from ..._messages.message import Message
from ...abc import Duplicate, PublishSpec, StreamBackend


class Records:
    """The keys that were published to one stream. Times are AnyIO's."""

    def __init__(self) -> None:
        self._ids: dict[str, tuple[float, str]] = {}
        self._ends: list[tuple[float, str]] = []
        self._scheduled: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, spec: PublishSpec | None, now: float) -> Duplicate | None:
        """What the first publish with this key returned; None = there was none within its window."""
        if spec is None or spec.idempotency_key is None:
            return None
        end, first = self._ids.get(spec.idempotency_key, (-math.inf, ""))
        return Duplicate(first) if end > now else None

    def keep(self, spec: PublishSpec | None, first: str, now: float, *, scheduled: bool = False) -> None:
        """Keep the key, if there is one, for its window. Those whose window is over are dropped."""
        if spec is None or spec.idempotency_key is None:
            return
        while self._ends and self._ends[0][0] <= now:
            end, key = heapq.heappop(self._ends)
            known = self._ids.get(key)
            if known is not None and known[0] == end:
                del self._ids[key]
                self._scheduled.pop(known[1], None)
        end = now + spec.deduplication_window
        self._ids[spec.idempotency_key] = (end, first)
        heapq.heappush(self._ends, (end, spec.idempotency_key))
        if scheduled:
            self._scheduled[first] = spec.idempotency_key

    def forget(self, schedule_id: str) -> None:
        """The scheduled message was cancelled: its key is free."""
        key = self._scheduled.pop(schedule_id, None)
        if key is not None:
            del self._ids[key]


class MemoryDeduplication(StreamBackend):
    """The memory backend's part for publishing with options."""

    @abc.abstractmethod
    def _records(self, stream: str) -> Records:
        """The keys of a stream."""

    @abc.abstractmethod
    def _append(self, stream: str, message: Message) -> str:
        """Append a message, and wake readers. Returns its id."""

    async def publish_with(self, stream: str, message: Message, spec: PublishSpec) -> str:
        await checkpoint()
        return self._append_once(stream, message, spec)

    def _append_once(self, stream: str, message: Message, spec: PublishSpec) -> str:
        records, now = self._records(stream), anyio.current_time()
        known = records.find(spec, now)
        if known is not None:
            return known
        entry_id = self._append(stream, message)
        records.keep(spec, entry_id, now)
        return entry_id
