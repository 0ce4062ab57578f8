"""Appends delayed messages when they are due: for streams on which this backend stored some, and those that it reads.

For the first kind, one command asks about many streams each second. For the second kind, the watch of quiet groups
asks (see ``_watch``), and tells the mover what is due soon. Between these questions the mover sleeps until the next due
time that it knows. If several processes append the same messages, the server's script lets each be appended once.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from typing import Final

import anyio
from anyio.abc import TaskGroup

from ..._ground.cancellation import is_abandoned, is_stray, sole
from ..._ground.errors import EventBusError, words
from ..._ground.log import say

_EVERY: Final = 1.0
"""How often, in seconds, the mover asks about the streams on which this backend has stored something."""

_AHEAD: Final = 1.5
"""What is due later than this, in seconds, is learned from a later question."""

_LOOK: Final = 0.1
"""After a stray cancellation, every so many seconds: whether the owner of this task has ended without ending it."""

_STREAMS_AT_ONCE: Final = 400
_CALLS_AT_ONCE: Final = 32
_AGAIN: Final = 1.0
"""After how many seconds a stream is tried again on which something failed."""


class DueMover:
    """
    :param append_due: appends what is due on a stream; see ``RedisSchedules.append_due``.
    :param due_within: asks about several streams; see ``RedisSchedules.due_within``.
    :param together: streams with the same result may be named in one command.
    """

    def __init__(
        self,
        append_due: Callable[[str], Awaitable[float | None]],
        due_within: Callable[[Sequence[str], float], Awaitable[list[float | None]]],
        together: Callable[[str], Hashable],
    ) -> None:
        self._append_due = append_due
        self._due_within = due_within
        self._together = together
        self._clear()

    def _clear(self) -> None:
        self._own: dict[str, int] = {}
        """The streams on which this backend stored something, and how often."""
        self._times: dict[str, float] = {}
        """When something is due next, by AnyIO's clock, for each stream on which something is due soon."""
        self._queue: list[tuple[float, str]] = []
        self._moving: set[str] = set()
        self._again: set[str] = set()
        """Streams on which something became due while messages were appended there."""
        self._asking: set[Hashable] = set()
        self._failing: set[str] = set()
        self._tasks: TaskGroup | None = None
        self._alarm: Callable[[BaseException], None] | None = None
        self._scope: anyio.CancelScope | None = None
        self._nap: anyio.CancelScope | None = None
        self._asked_at = -math.inf
        self._was_hit = False
        """By a stray cancellation."""

    def start(self, tasks: TaskGroup, alarm: Callable[[BaseException], None]) -> None:
        """
        :param tasks: while there is something to do, the mover runs in this task group.
        :param alarm: called with an error that must end the bus.
        """
        self._clear()
        self._tasks = tasks
        self._alarm = alarm

    def close(self) -> None:
        self._tasks = None
        if self._scope is not None:
            self._scope.cancel()

    def expect(self, stream: str, seconds: float, own: bool = False) -> None:
        """Something is due on a stream in so many seconds.

        :param own: this backend stores it. Then the stream is asked about as long as something waits there.
        """
        if self._tasks is None:
            return
        if own:
            self._own[stream] = self._own.get(stream, 0) + 1
        if seconds <= _AHEAD:
            self._note(stream, anyio.current_time() + seconds)
        if self._scope is None and (self._own or self._queue):
            self._scope = anyio.CancelScope(shield=True)
            self._asked_at = anyio.current_time()
            self._tasks.start_soon(self._run, self._scope)

    def _note(self, stream: str, time: float) -> None:
        if time >= self._times.get(stream, math.inf):
            return
        self._times[stream] = time
        heapq.heappush(self._queue, (time, stream))
        if self._nap is not None and time < self._nap.deadline:
            self._nap.deadline = time

    async def _run(self, scope: anyio.CancelScope) -> None:
        """Shielded: the backend ends it when it is left, after the subscriptions."""
        try:
            with scope:
                while self._is_needed():
                    try:
                        async with anyio.create_task_group() as calls:
                            await self._keep_moving(calls, anyio.CapacityLimiter(_CALLS_AT_ONCE))
                    except BaseException as error:  # noqa: ASYNC103 - a real cancellation is raised again
                        self._moving.clear()
                        self._asking.clear()
                        self._was_hit = True
                        if not is_stray(error):
                            if isinstance(error, anyio.get_cancelled_exc_class()) or self._alarm is None:
                                raise
                            self._alarm(sole(error))
                            return  # noqa: ASYNC104 - no cancellation: the alarm ends the bus with it
        finally:
            self._scope = None

    def _is_needed(self) -> bool:
        """False also if nobody will ever end this: after a stray cancellation, which may have been the loop's last."""
        return bool(self._own or self._queue or self._moving) and not (self._was_hit and is_abandoned())

    async def _keep_moving(self, calls: TaskGroup, limiter: anyio.CapacityLimiter) -> None:
        while self._is_needed():
            for stream in self._take_due():
                self._moving.add(stream)
                calls.start_soon(self._move, stream, limiter)
            now = anyio.current_time()
            if self._own and now - self._asked_at >= _EVERY:
                self._asked_at = now
                for key, part in self._questions():
                    self._asking.add(key)
                    calls.start_soon(self._ask, key, part)
            next_due = self._queue[0][0] if self._queue else math.inf
            next_question = self._asked_at + _EVERY if self._own else now + _EVERY
            next_look = now + _LOOK if self._was_hit else math.inf
            with anyio.CancelScope(deadline=min(next_due, next_question, next_look)) as self._nap:
                await anyio.sleep_forever()
            self._nap = None

    def _take_due(self) -> list[str]:
        now = anyio.current_time()
        due: list[str] = []
        while self._queue and self._queue[0][0] <= now:
            time, stream = heapq.heappop(self._queue)
            if self._times.get(stream) == time:  # otherwise it became due earlier
                del self._times[stream]
                if stream in self._moving:
                    self._again.add(stream)
                else:
                    due.append(stream)
        return due

    async def _move(self, stream: str, limiter: anyio.CapacityLimiter) -> None:
        """Append everything that is due on a stream now."""
        wait: float | None = 0.0
        try:
            while wait == 0:
                async with limiter:
                    wait = await self._append_due(stream)
        except EventBusError as error:
            wait = _AGAIN
            self._failed(stream, error)
        else:
            self._failing.discard(stream)
        finally:
            self._moving.discard(stream)
            if stream in self._again:
                self._again.discard(stream)
                self._note(stream, anyio.current_time())
        if wait is not None and wait <= _AHEAD:
            self._note(stream, anyio.current_time() + wait)

    def _failed(self, stream: str, error: EventBusError) -> None:
        """Logged once: passes of subscriptions meet the same error, and report it."""
        if stream not in self._failing:
            self._failing.add(stream)
            text = "delayed messages of %r cannot be appended now: %s"
            say(logging.WARNING, text, stream, words(error), hidden={"scope": "delayed", "topic": stream})

    def _questions(self) -> Iterator[tuple[Hashable, list[str]]]:
        """Streams that can be named in one command, and what they have in common. None that are being asked about."""
        parts: defaultdict[Hashable, list[str]] = defaultdict(list)
        for number, stream in enumerate(self._own):
            parts[self._together(stream), number // _STREAMS_AT_ONCE].append(stream)
        for key, part in parts.items():
            if key not in self._asking:
                yield key, part

    async def _ask(self, key: Hashable, streams: Sequence[str]) -> None:
        """Learn what is due soon on streams on which this backend stored something, or that nothing waits any more."""
        before = [self._own.get(stream) for stream in streams]
        try:
            waits = await self._due_within(streams, _AHEAD)
        except EventBusError:
            return  # asked again in a second; what is known is appended all the same
        finally:
            self._asking.discard(key)
        for stream, wait, stored in zip(streams, waits, before, strict=True):
            if wait is None and self._own.get(stream) == stored:
                self._own.pop(stream, None)
            elif wait is not None and wait <= _AHEAD:
                self._note(stream, anyio.current_time() + wait)
