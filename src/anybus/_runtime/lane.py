"""A lane: settlements of one kind on their way to the server, batched, repeated while they fail.

A manual settlement has somebody waiting and is tried once; an automatic one is repeated with backoff while the lease
is ours.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Awaitable, Callable

import anyio

from .._failure.backoff import recovery_delay
from .ledger import Held

Flush = Callable[[list[Held]], Awaitable[None]]


class Lane:
    """A bounded queue (by the ledger's budget) and the task that empties it.

    :param flush: sends a batch; it never raises for a failure of the backend.
    :param threshold: so many waiting are sent at once...
    :param interval: ...else when so many seconds have passed since the last flush. The first after a pause goes
        at once.
    """

    def __init__(self, flush: Flush, clock: Callable[[], float], *, threshold: int = 1, interval: float = 0.0) -> None:
        self._flush = flush
        self._clock = clock
        self._threshold = threshold
        self._interval = interval
        self._queue: list[Held] = []
        self._delayed: list[tuple[float, int, Held]] = []
        self._tickets = itertools.count()
        self._wake: anyio.Event | None = None
        self._wake_at = 1
        self._sending = False
        self._draining = False
        self._drained: anyio.Event | None = None

    def put(self, held: Held) -> None:
        self._queue.append(held)
        if self._wake is not None and len(self._queue) >= self._wake_at:
            self._wake.set()

    def again(self, held: Held) -> None:
        """Try it again, later with every try."""
        held.tries += 1
        due = self._clock() + recovery_delay(held.tries, random.random())
        heapq.heappush(self._delayed, (due, next(self._tickets), held))

    @property
    def is_empty(self) -> bool:
        return not (self._queue or self._delayed or self._sending)

    def begin_drain(self) -> None:
        """Send without waiting for more from now on. What was to be repeated is repeated at once, then by backoff."""
        self._draining = True
        self._queue += [item[2] for item in self._delayed]
        self._delayed.clear()
        if self._wake is not None:
            self._wake.set()

    def unsent(self) -> list[Held]:
        """What waits here, or waits to be tried again."""
        return self._queue + [item[2] for item in self._delayed]

    async def drained(self) -> None:
        """Wait until nothing is left here."""
        while not self.is_empty:
            self._drained = anyio.Event()
            await self._drained.wait()

    async def run(self) -> None:
        last = -self._interval
        while True:
            await self._wait(last)
            batch, self._queue = self._queue, []
            self._sending = True
            try:
                await self._flush(batch)
            finally:
                self._sending = False
            last = self._clock()
            if self._drained is not None and self.is_empty:
                self._drained.set()

    async def _wait(self, last: float) -> None:
        """Until there is something to send, and it is time to send it."""
        # Compared with a point in time, not with a difference: at a late hour of the clock that can round to less than
        # the interval, and the rest be too short to sleep for.
        due = last + self._interval
        while True:
            now = self._clock()
            while self._delayed and self._delayed[0][0] <= now:
                self._queue.append(heapq.heappop(self._delayed)[2])
            if self._queue and (self._draining or len(self._queue) >= self._threshold or now >= due):
                return
            if self._queue:
                await self._sleep(self._threshold, due - now)
            else:
                await self._sleep(1, self._delayed[0][0] - now if self._delayed else None)

    async def _sleep(self, wake_at: int, seconds: float | None) -> None:
        self._wake = anyio.Event()
        self._wake_at = wake_at
        try:
            if seconds is None:
                await self._wake.wait()
            else:
                with anyio.move_on_after(seconds):
                    await self._wake.wait()
        finally:
            self._wake = None
