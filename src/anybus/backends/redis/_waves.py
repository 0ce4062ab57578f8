"""Waves: single commands that are sent in one write share one event and one deadline.

An event and a cancel scope for each command would cost more than the rest of a publish.
"""

from __future__ import annotations

from collections import deque

import anyio

from ..._ground.clock import loop_clock
from ._errors import broken
from ._protocol import Replies

_LONGEST_OPEN = 8
"""A wave accepts members for an eighth of its timeout. So a member's deadline can be early by that much."""

_LONGEST_SLEEP = 0.5


class Wave:
    """Commands that are sent together. ``event`` is set when all replies are here, or the deadline has passed."""

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
        """Fail the commands whose reply is not here. A late reply is still received, in order, and dropped."""
        for call in self.calls:
            if not call.replies and call.error is None:
                call.error = broken("no answer within publish_timeout", may_have_happened=call.sent)
        self.event.set()


class Single(Replies):
    """A single command's place in the queue, and the wave with which it is sent."""

    __slots__ = ("sent", "wave")

    def __init__(self, wave: Wave) -> None:
        # Replies.__init__, inlined: one of these is created for every publish.
        self.expected = 1
        self.replies = []
        self.error = None
        self.done = wave.arrived
        self.sent = False
        self.wave = wave
        wave.left += 1
        wave.calls.append(self)


class Waves:
    """The waves of one connection, oldest first."""

    def __init__(self) -> None:
        self._clock = anyio.current_time
        self._open: Wave | None = None
        self._under_way: deque[Wave] = deque()
        self._first = anyio.Event()

    def join(self, timeout: float) -> Single:
        """A place in the wave that is sent next."""
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
        """The queue is sent now: later commands belong to the next wave."""
        self._open = None

    async def expire(self) -> None:
        """Fail the waves whose deadline has passed. Waves are sent in order, so their deadlines are in order, too."""
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
                # A wave that opens while this sleeps must also be sealed in time.
                wake_at = min(wake_at, now + self._under_way[0].timeout / _LONGEST_OPEN)
            if self._open is not None:
                # A wave stays open while the connection accepts nothing. It is sealed in time, so that later commands
                # get a deadline of their own.
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
