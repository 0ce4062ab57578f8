"""Waves: single commands that leave in one write share one event and one deadline.

An event and a cancel scope for each of them would cost more than the rest of a publish.
"""

from __future__ import annotations

from collections import deque

import anyio

from ..._ground.clock import loop_clock
from ._errors import broken
from ._protocol import Replies

_LONGEST_OPEN = 8
"""A wave takes no more members after an eighth of its time: for so much a deadline can come too early."""

_LONGEST_SLEEP = 0.5


class Wave:
    """Set when all its replies are here, or its deadline has passed."""

    __slots__ = ("calls", "deadline", "event", "left", "timeout")

    def __init__(self, deadline: float, timeout: float) -> None:
        self.deadline = deadline
        self.timeout = timeout
        self.event = anyio.Event()
        self.left = 0
        self.calls: list[Single] = []

    def arrived(self) -> None:
        self.left -= 1
        if not self.left:
            self.event.set()

    def expire(self) -> None:
        """Too late for those whose reply is not here. It is still taken, in order, and dropped."""
        for call in self.calls:
            if not call.replies and call.error is None:
                call.error = broken("no answer within publish_timeout", may_have_happened=call.sent)
        self.event.set()


class Single(Replies):
    """A single command's place in the line, and the wave it leaves with."""

    __slots__ = ("sent", "wave")

    def __init__(self, wave: Wave) -> None:
        # As Replies does, written out: one of these is made for every publish.
        self.expected = 1
        self.replies = []
        self.error = None
        self.done = wave.arrived
        self.sent = False
        self.wave = wave
        wave.left += 1
        wave.calls.append(self)


class Waves:
    """The waves of one connection, the oldest first."""

    def __init__(self) -> None:
        self._clock = anyio.current_time
        self._open: Wave | None = None
        self._under_way: deque[Wave] = deque()
        self._first = anyio.Event()

    def join(self, timeout: float) -> Single:
        """A place in the wave that leaves next."""
        wave = self._open
        if wave is None:
            wave = self._open = Wave(self._clock() + timeout, timeout)
            if not self._under_way:
                self._first.set()
            elif self._under_way[0].event.is_set():
                self._under_way.popleft()
            self._under_way.append(wave)
        return Single(wave)

    def seal(self) -> None:
        """What is in the line leaves now: whoever comes later is in the next wave."""
        self._open = None

    def clear(self) -> None:
        """The connection broke; every member has been told."""
        self._open = None
        self._under_way.clear()

    async def expire(self) -> None:
        """Tell those whose deadline has passed. Waves leave in order, and so do their deadlines come."""
        self._clock = loop_clock()
        while True:
            now = self._clock()
            while self._under_way and (self._under_way[0].event.is_set() or self._under_way[0].deadline <= now):
                wave = self._under_way.popleft()
                if wave is self._open:
                    self._open = None
                if not wave.event.is_set():
                    wave.expire()
            wake_at = now + _LONGEST_SLEEP
            if self._under_way:
                # What opens while this sleeps has to be sealed in time, too.
                wake_at = min(wake_at, now + self._under_way[0].timeout / _LONGEST_OPEN)
            if self._open is not None:
                # A connection that takes nothing keeps it open: those who come later have a time of their own.
                sealed_at = self._open.deadline - self._open.timeout * (1 - 1 / _LONGEST_OPEN)
                if sealed_at <= now:
                    self._open = None
                else:
                    wake_at = min(wake_at, sealed_at)
            if self._under_way:
                await anyio.sleep_until(min(self._under_way[0].deadline, wake_at))
            else:
                self._first = anyio.Event()
                await self._first.wait()
