"""Delayed messages in memory. Like a server, it appends them when they are due: at the latest when somebody looks."""

from __future__ import annotations

import abc
import bisect
import itertools
import math
import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Final

import anyio
import msgspec
from anyio.lowlevel import checkpoint

from ..._ground.clock import now as wall_clock
from ..._ground.errors import ValidationError
from ..._messages.message import Message
from ...abc import DelayedEntry, DelayedPage, ScheduleStore

MOVED_AT_ONCE: Final = 1000
"""How many messages one call appends at most, because it does not yield to other tasks."""

_LAST: Final = 1e11
"""Seconds since 1970. A retry may be due later, but no datetime is so far away."""

_DRIFT: Final = 0.005
"""Seconds by which the clocks may differ from what was measured."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Later(msgspec.Struct, eq=False):
    """A message that waits.

    :ivar key: when it is due by AnyIO's clock, and a number that keeps the order of equal times.
    """

    key: tuple[float, int]
    id: str
    message: Message
    raw: Mapping[str, bytes]


class Delays:
    """The messages that wait for a stream, in the order of their due times."""

    def __init__(self) -> None:
        self.waiting: list[Later] = []
        self._keys: dict[str, tuple[float, int]] = {}
        self._tickets = itertools.count(1)
        self._behind = math.inf

    def time_of(self, at: datetime) -> float:
        """A point in time by AnyIO's clock; now, if it is in the past."""
        now = anyio.current_time()
        return max(now, at.timestamp() - self._difference(now))

    def _difference(self, now: float) -> float:
        """How far this clock is behind AnyIO's. Not measured exactly each time: equal times must stay equal."""
        measured = wall_clock().timestamp() - now
        if abs(measured - self._behind) > _DRIFT:
            self._behind = measured
        return self._behind

    def add(self, due: float, message: Message, raw: Mapping[str, bytes]) -> str:
        """
        :param due: by AnyIO's clock.
        """
        ticket = next(self._tickets)
        wall = min(due + self._difference(anyio.current_time()), _LAST)
        later = Later((due, ticket), f"{round(wall * 1000)}-{ticket}", message, raw)
        self._keys[later.id] = later.key
        bisect.insort(self.waiting, later, key=_key)
        return later.id

    def cancel(self, schedule_id: str) -> bool:
        key = self._keys.pop(schedule_id, None)
        if key is None:
            return False
        del self.waiting[bisect.bisect_left(self.waiting, key, key=_key)]
        return True

    def next_due(self) -> float:
        return self.waiting[0].key[0] if self.waiting else math.inf

    def take_due(self, now: float) -> list[Later]:
        """Remove what is due, not more than one call may append."""
        due = self.waiting[: min(bisect.bisect_right(self.waiting, (now, math.inf), key=_key), MOVED_AT_ONCE)]
        del self.waiting[: len(due)]
        for later in due:
            del self._keys[later.id]
        return due

    def after(self, key: tuple[float, int], count: int) -> list[Later]:
        start = bisect.bisect_right(self.waiting, key, key=_key)
        return self.waiting[start : start + count]


class MemorySchedules(ScheduleStore):
    """The memory backend's part for delayed messages."""

    @abc.abstractmethod
    def _delays(self, stream: str) -> Delays:
        """What waits for the stream and is not yet due."""

    def due_of(self, schedule_id: str) -> datetime:
        return _EPOCH + timedelta(milliseconds=int(schedule_id.partition("-")[0]))

    async def delayed_page(self, stream: str, *, after: str | None, count: int, max_bytes: int) -> DelayedPage:
        await checkpoint()
        key = (-math.inf, 0) if after is None else _position(after)
        entries: list[DelayedEntry] = []
        left = max_bytes
        for later in self._delays(stream).after(key, count + 1):
            size = len(later.message.payload)
            left -= size
            if entries and (left < 0 or len(entries) == count):
                return DelayedPage(entries, f"{key[0]!r}/{key[1]}")
            entries.append(DelayedEntry(later.id, self.due_of(later.id), later.message, size=size))
            key = later.key
        return DelayedPage(entries, None)


def _key(later: Later) -> tuple[float, int]:
    return later.key


def _position(after: str) -> tuple[float, int]:
    found = re.fullmatch(r"(\d{1,20}\.\d{1,20}(?:e[+-]?\d{1,3})?)/(\d{1,18})", after, re.ASCII)
    if found is None:
        raise ValidationError(f"after must be the 'next' of a page, not {after!r:.60}")
    return float(found[1]), int(found[2])
