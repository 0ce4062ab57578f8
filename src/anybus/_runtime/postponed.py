"""Retries that wait in this process until they are due, if the backend cannot delay messages."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import anyio

from .entry import Held


class Postponed:
    """Entries in the order in which they are due. Meanwhile the ledger holds them as parked."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, Held]] = []
        self._tickets = itertools.count()
        self._changed = anyio.Event()

    def put(self, due: float, held: Held) -> None:
        heapq.heappush(self._heap, (due, next(self._tickets), held))
        self._changed.set()

    async def next_due(self) -> Held:
        while not self._heap or self._heap[0][0] > self._clock():
            self._changed = anyio.Event()
            with anyio.move_on_after(self._heap[0][0] - self._clock() if self._heap else None):
                await self._changed.wait()
        return heapq.heappop(self._heap)[2]
