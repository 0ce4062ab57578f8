"""When the retries that a subscription has stored are due, so that a pass follows at once and not at an interval."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Final

import anyio

_MARGIN: Final = 0.001
"""Seconds. A server may count whole milliseconds."""

_SHORTEST: Final = 0.03
"""At least so many seconds pass between two passes, however many retries are due one after the other."""


_MOST: Final = 10_000
"""How many due times are remembered. The next passes at an interval take the other retries."""


class RetryTimes:
    """Due times by our clock. Those of other members are not known: their own passes take these retries."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due: list[float] = []
        self._soonest = -math.inf
        self._nap = anyio.CancelScope()

    def expect(self, delay: float) -> None:
        """The server has just stored a retry with this delay."""
        due, nap = self._clock() + delay + _MARGIN, self._nap
        if len(self._due) < _MOST:
            heapq.heappush(self._due, due)
        if due < nap.deadline:
            nap.deadline = max(due, self._soonest)

    def pass_begins(self) -> None:
        """A pass that begins now takes what is due by now."""
        now = self._clock()
        while self._due and self._due[0] <= now:
            heapq.heappop(self._due)

    def nap(self, interval: float) -> anyio.CancelScope:
        """A scope for a wait between two passes, which ends when a retry is due.

        :param interval: how long the wait lasts otherwise.
        """
        self._soonest = self._clock() + min(interval, _SHORTEST)
        self._nap = anyio.CancelScope(deadline=max(self._due[0], self._soonest) if self._due else math.inf)
        return self._nap
