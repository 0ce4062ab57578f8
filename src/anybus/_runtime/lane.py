"""A lane: collects settlements of one kind into batches, and sends them to the server.

A settlement by hand is tried once. An automatic one is repeated with backoff as long as the lease is ours.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import random
from collections.abc import Awaitable, Callable

import anyio
from anyio.lowlevel import checkpoint

from .._failure.backoff import recovery_delay
from .entry import Held

Flush = Callable[[list[Held]], Awaitable[None]]


class Lane:
    """A channel that carries batches, and the collector that receives and sends them.

    A batch is flushed on size (``threshold``) or on time (``interval`` seconds after the last flush). The first
    settlement after a pause is flushed at once. The ledger's budget limits the size of a lane.

    :param flush: sends a batch to the server; it never raises for a failure of the backend.
    """

    def __init__(self, flush: Flush, clock: Callable[[], float], *, threshold: int = 1, interval: float = 0.0) -> None:
        self._flush = flush
        self._clock = clock
        self._threshold = threshold
        self._interval = interval
        self._batch: list[Held] = []
        self._wanted_at: float = math.inf
        self._send, self._receive = anyio.create_memory_object_stream[list[Held]](1)
        self._delayed: list[tuple[float, int, Held]] = []
        self._tickets = itertools.count()
        self._flushing = False
        self._draining = False
        self._drained: anyio.Event | None = None

    def put(self, held: Held) -> None:
        self._batch.append(held)
        if len(self._batch) >= self._wanted_at:
            self._pass_on()

    def _pass_on(self) -> None:
        self._wanted_at = math.inf
        with contextlib.suppress(anyio.WouldBlock):  # the collector has not yet received the last batch
            self._send.send_nowait(self._batch)

    def again(self, held: Held) -> None:
        """Repeat it, after a delay that grows with every try."""
        assert held.settlement is not None
        held.settlement.tries += 1
        due = self._clock() + recovery_delay(held.settlement.tries, random.random())
        heapq.heappush(self._delayed, (due, next(self._tickets), held))

    @property
    def is_empty(self) -> bool:
        return not (self._batch or self._delayed or self._flushing)

    def begin_drain(self) -> None:
        """Send without waiting for more from now on. Repetitions are sent at once; if they fail, with backoff again."""
        self._draining = True
        self._batch += [item[2] for item in self._delayed]
        self._delayed.clear()
        if self._wanted_at < math.inf:
            self._pass_on()

    async def drained(self) -> None:
        """Wait until the lane is empty."""
        while not self.is_empty:
            self._drained = anyio.Event()
            await self._drained.wait()

    def close(self) -> None:
        self._send.close()
        self._receive.close()

    async def run(self) -> None:
        last = -self._interval
        while True:
            batch = await self._collect(last)
            self._flushing = True
            try:
                await self._flush(batch)
            finally:
                self._flushing = False
            last = self._clock()
            if self._drained is not None and self.is_empty:
                self._drained.set()

    async def _collect(self, last: float) -> list[Held]:
        """Wait until a batch is to be flushed, and return it."""
        # Compared with a point in time, not with a difference: with a large clock value, a difference can be rounded to
        # less than the interval, and the rest would be too short to sleep for.
        due = last + self._interval
        while True:
            now = self._clock()
            while self._delayed and self._delayed[0][0] <= now:
                self._batch.append(heapq.heappop(self._delayed)[2])
            if self._batch and (self._draining or len(self._batch) >= self._threshold or now >= due):
                batch, self._batch = self._batch, []
                return batch
            if self._batch:
                await self._wait(self._threshold, due - now)
            else:
                await self._wait(1, self._delayed[0][0] - now if self._delayed else None)

    async def _wait(self, size: int, seconds: float | None) -> None:
        """Wait for a batch of this size, or for so many seconds. If cancelled, nothing is lost: we keep the batch."""
        self._wanted_at = size
        try:
            if seconds is None:
                await self._receive.receive()
                await checkpoint()  # what else is handled in this moment goes along
            else:
                with anyio.move_on_after(seconds):
                    await self._receive.receive()
        finally:
            self._wanted_at = math.inf
