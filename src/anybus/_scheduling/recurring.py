"""Recurring publishing: schedules that a bus runs, and the handle of one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Final

import anyio

from .._ground.cancellation import is_abandoned, is_stray, persist, sole
from .._ground.errors import ClosedError, UnsupportedError
from .._ground.home import Home
from .._options import StreamBusOptions
from .._reporting import Reporter
from ..abc import StreamBackend, TickStore
from .definition import Definition, Given
from .ticking import Ticking

_LOOK: Final = 0.1
"""After a stray cancellation, every so many seconds: whether the owner of a schedule has ended without ending it."""


class Schedule:
    """A schedule that this process takes part in, as ``bus.schedule`` yields it. Only the bus creates schedules."""

    def __init__(self, definition: Definition, ticking: Ticking, home: Home, reporter: Reporter) -> None:
        self._definition = definition
        self._ticking = ticking
        self._home = home
        self._reporter = reporter
        self._scope = anyio.CancelScope()
        self._body = anyio.CancelScope()
        self._ended = anyio.Event()
        self._is_ending = False
        self._failure: BaseException | None = None

    def __repr__(self) -> str:
        state = "superseded" if self.is_superseded else "running" if self.is_running else "ended"
        return f"<Schedule {self.name!r} {state} topic={self.topic!r} {self._definition.spec}>"

    @property
    def name(self) -> str:
        """The schedule's name. It is unique for a topic."""
        return self._definition.name

    @property
    def topic(self) -> str:
        """The topic to which it publishes."""
        return self._definition.topic

    @property
    def next_tick(self) -> datetime | None:
        """The next tick, UTC, whichever process will publish it; None = there will be none.

        It is computed from the definition, and from the server's clock as it is known here.
        """
        return self._definition.ticks.after(self._ticking.now())

    @property
    def is_running(self) -> bool:
        """Whether this process takes part. False after its end, and if another definition has taken over."""
        return not self._is_ending and not self._ended.is_set()

    @property
    def is_superseded(self) -> bool:
        """Whether another definition of this schedule has taken over, so that this one has ended."""
        return self._ticking.is_superseded

    def close(self) -> None:
        """Take part no more. Other processes go on. The body goes on, too. Closing twice is fine."""
        if not self._ended.is_set():
            self._home.check("the schedule")
            self._end()

    async def wait_closed(self) -> None:
        """Wait until this process takes part no more: it was closed, or another definition has taken over."""
        if not self._ended.is_set():
            self._home.check("the schedule")
        await self._ended.wait()

    def _end(self) -> None:
        self._is_ending = True
        self._scope.cancel()

    async def _keep_ticking(self) -> None:
        try:
            await self._ticking.run()
        except BaseException as error:  # noqa: ASYNC103 - a real cancellation is raised again
            if not is_stray(error):
                raise
            # It may have been the loop's last: if the owner has ended without ending this, nobody else will.
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(persist, partial(_until_abandoned, tasks.cancel_scope))
                await persist(self._ticking.run)  # noqa: ASYNC102 - after a stray cancellation, nothing is cancelled
                tasks.cancel_scope.cancel()

    async def _run(self) -> None:
        try:
            with self._scope:
                await self._keep_ticking()
        except BaseException as error:  # noqa: ASYNC103 - the end needs no cancellation any more
            if not isinstance(error, anyio.get_cancelled_exc_class()):
                self._failed(error)
            elif not self._is_ending:
                if not is_stray(error):
                    raise
                self._failed(error)
            # Otherwise it is our own: after a stray one, asyncio lets it out of its scope.
        finally:
            await self._ticking.leave()  # noqa: ASYNC102 - shielded inside
            self._ended.set()

    def _failed(self, error: BaseException) -> None:
        self._failure = sole(error)
        self._body.cancel()

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None, None]:
        body_error: BaseException | None = None
        try:
            try:
                with self._scope:
                    await self._ticking.enter()
            except BaseException:
                await self._ticking.leave()  # noqa: ASYNC102 - shielded inside
                raise
            if self._is_ending:
                raise ClosedError("the bus was closed while the schedule was being entered")
            self._scope = anyio.CancelScope()
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._run)
                    try:
                        with self._body:
                            yield
                    except BaseException as error:  # noqa: ASYNC103 - raised below, when the task has ended
                        self._end()
                        if isinstance(error, anyio.get_cancelled_exc_class()):
                            raise
                        body_error = error  # noqa: ASYNC104
                    else:
                        self._end()
            finally:
                # These errors are raised bare, whatever else happened meanwhile.
                failure = self._failure
                if body_error is not None:
                    if failure is not None:
                        detail = f"a second error of schedule {self.name!r} that ended"
                        self._reporter.error("close", failure, detail=detail)
                    raise body_error
                if failure is not None:
                    raise failure
        finally:
            self._is_ending = True
            self._ended.set()


async def _until_abandoned(scope: anyio.CancelScope) -> None:
    """Cancel the scope when the owner of this task has ended without ending it."""
    while not is_abandoned():  # noqa: ASYNC110 - whose end sets no event
        await anyio.sleep(_LOOK)
    scope.cancel()


class Schedules:
    """The schedules of a bus."""

    def __init__(self, backend: StreamBackend, options: StreamBusOptions) -> None:
        self._backend = backend
        self._options = options
        self._running: set[Schedule] = set()

    @asynccontextmanager
    async def open(self, given: Given, home: Home) -> AsyncGenerator[Schedule, None]:
        """Take part in a schedule while the body runs."""
        if not isinstance(self._backend, TickStore):
            raise UnsupportedError(f"{type(self._backend).__name__} cannot keep schedules (anybus.abc.TickStore)")
        definition = await given.load()
        reporter = Reporter(self._options.observer, topic=definition.topic)
        ticking = Ticking(definition, self._backend, self._options, reporter)
        schedule = Schedule(definition, ticking, home, reporter)
        self._running.add(schedule)
        try:
            async with schedule._running():
                yield schedule
        finally:
            self._running.discard(schedule)

    async def end(self) -> None:
        """End all schedules, and wait until they have ended."""
        live = list(self._running)
        for schedule in live:
            schedule._end()

        async def wait(schedule: Schedule) -> None:
            # A child task, because a native asyncio cancellation pierces a shield in the task that it hits.
            with anyio.CancelScope(shield=True):
                await persist(schedule._ended.wait)

        if live:
            async with anyio.create_task_group() as tasks:
                for schedule in live:
                    tasks.start_soon(wait, schedule)
