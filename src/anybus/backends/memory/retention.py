"""Retention in memory: what is kept beside a stream, and trimming in small steps."""

from __future__ import annotations

import abc
from collections import Counter, deque
from collections.abc import Sequence
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from ..._ground.errors import EventBusError, ValidationError
from ...abc import Limits, Retention, RetentionKeeper, Trimmed, WorkQueue
from ...abc._retention import DeclareMode
from .store import Stream

MOST_REMOVED: Final = 1000
"""How many entries one step removes from a stream at most."""

LEASE: Final = 2.0
"""For how many seconds others leave a stream alone after one step that removed something."""

GRACE: Final = 600.0
"""For how many seconds a group that has vanished still counts. Its running members recreate it at its floor."""


class Kept:
    """The retention of a stream, and what trimming notes.

    :ivar marks: times, and the last entry that the stream had by then. So the age of entries is known by AnyIO's clock,
        without a look at the clock for each of them.
    """

    def __init__(self, retention: Retention, *, is_default: bool) -> None:
        self.retention = retention
        self.is_default = is_default
        self.by = ""
        self.until = 0.0
        self.lost: Counter[str] = Counter()
        self.gone: dict[str, float] = {}
        self.marks: deque[tuple[float, int]] = deque()


class MemoryRetention(RetentionKeeper):
    """The memory backend's part for retention."""

    @abc.abstractmethod
    def _stream(self, name: str) -> Stream:
        """The stream of this name."""

    async def declare_retention(self, stream: str, retention: Retention, mode: DeclareMode) -> Retention:
        await checkpoint()
        store = self._stream(stream)
        kept = store.retention
        if kept is not None:
            fixed = mode == "default" or (mode == "declare" and not kept.is_default)
            if kept.retention == retention or fixed:
                kept.is_default = kept.is_default and (mode == "default" or kept.retention != retention)
                return kept.retention
        if isinstance(retention, WorkQueue) and len(store.groups) > 1:
            names = ", ".join(sorted(store.groups))
            raise ValidationError(
                f"retention must not be {retention} for {stream!r}, which has several groups: {names}"
            )
        if kept is None:
            store.retention = Kept(retention, is_default=mode == "default")
        else:
            kept.retention, kept.is_default = retention, False
        return retention

    async def admit_group(self, stream: str, group: str, *, made: bool) -> str | None:
        await checkpoint()
        store = self._stream(stream)
        if store.retention is None or not isinstance(store.retention.retention, WorkQueue):
            return None
        other = next((name for name in store.groups if name != group), None)
        if other is not None and made:
            store.groups.pop(group).wake_all()
        return other

    async def trim(self, streams: Sequence[str], *, trimmer: str) -> list[Trimmed | EventBusError]:
        results: list[Trimmed | EventBusError] = []
        for stream in streams:
            await checkpoint()
            results.append(_trim(self._stream(stream), trimmer, anyio.current_time()))
        return results


def _trim(store: Stream, trimmer: str, now: float) -> Trimmed:
    kept = store.retention
    if kept is None:
        return Trimmed(None, store.length)
    if kept.by != trimmer and kept.until > now:
        return Trimmed(kept.retention, store.length, busy=True, lost_in_all=dict(kept.lost))
    holder: str | None = None
    position: int | None = None
    if isinstance(kept.retention, Limits):
        end = _limit(store, kept, kept.retention, now)
    else:
        holder, position = _acknowledged(store, kept, now)
        end = store.first if position is None else position
    steps_end = store.end_of(MOST_REMOVED)
    end = min(end, steps_end)
    lost: Counter[str] = Counter()
    for name, group in store.groups.items() if isinstance(kept.retention, Limits) else ():
        unread = sum(1 for _ in store.between(max(group.position, store.first - 1), end - 1))
        pending = sum(
            store.first <= pending.entry.sequence < end and not pending.entry.deleted
            for pending in group.pending.values()
        )
        lost[name] = unread + pending
    removed = store.drop_before(end)
    if removed:
        kept.by, kept.until = trimmer, now + LEASE
        kept.lost += lost
    return Trimmed(
        kept.retention,
        store.length,
        removed,
        removed >= MOST_REMOVED,
        groups=len(store.groups),
        holder=holder,
        position=None if position is None else f"{position}-0",
        lost={name: count for name, count in lost.items() if count},
        lost_in_all=dict(kept.lost),
    )


def _limit(store: Stream, kept: Kept, limits: Limits, now: float) -> int:
    """The first entry that the limits keep."""
    end = store.first
    if limits.length is not None and store.length > limits.length:
        end = store.end_of(store.length - limits.length)
    if limits.age is not None:
        marks = kept.marks
        if not marks or marks[-1][1] != store.last:
            marks.append((now, store.last))
        while marks and now - marks[0][0] >= limits.age:
            end = max(end, marks.popleft()[1] + 1)
    return end


def _acknowledged(store: Stream, kept: Kept, now: float) -> tuple[str | None, int | None]:
    """The group that has acknowledged least, and the first entry that it may not have acknowledged."""
    if not store.groups:
        return None, None
    floors = {name: group.floor() for name, group in store.groups.items()}
    kept.gone = {name: kept.gone.get(name, now) for name in store.floors if name not in floors}
    floors.update((name, store.floors[name]) for name, since in kept.gone.items() if now - since < GRACE)
    holder = min(floors, key=lambda name: floors[name])
    return holder, floors[holder] + 1
