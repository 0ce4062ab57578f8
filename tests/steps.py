"""Counts the suspensions of every task of a loop, and does something at chosen ones.

A cancellation can be asked for whenever code runs, and it hits a task where that is suspended: so between two steps
of tasks lies every point at which it can hit anything. These hooks run at the end of each step, with nothing else in
between: asyncio's tasks are made by a factory that drives their coroutines and looks after each ``send``, trio offers
an instrument. A helper task that counts loops of ``checkpoint`` would see only the loop's turns, in which many tasks
take a step, and would never act between two of those.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import trio


class Steps:
    """Counts while it is counting.

    :ivar taken: how many steps tasks have taken.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.counting = False
        self._acts: dict[int, Callable[[], object]] = {}

    def at(self, number: int, act: Callable[[], object]) -> None:
        """Call ``act`` at the end of that step."""
        self._acts[number] = act

    def end(self) -> None:
        """A step has ended."""
        if self.counting:
            self.taken += 1
            act = self._acts.pop(self.taken, None)
            if act is not None:
                act()


class _Driven(Awaitable[Any]):
    """A coroutine whose suspensions are looked at."""

    def __init__(self, inner: Generator[Any, None, Any] | Coroutine[Any, Any, Any], steps: Steps) -> None:
        self._inner = inner
        self._steps = steps

    def __await__(self) -> Generator[Any, Any, Any]:
        sent: Any = None
        thrown: BaseException | None = None
        while True:
            try:
                awaited = self._inner.send(sent) if thrown is None else self._inner.throw(thrown)
            except StopIteration as stop:
                return stop.value
            thrown = None
            self._steps.end()
            try:
                sent = yield awaited
            except BaseException as error:  # asyncio has thrown it in; the coroutine decides what becomes of it
                thrown = error


class _Instrument(trio.abc.Instrument):
    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._steps.end()


@contextmanager
def watched(steps: Steps, library: str) -> Iterator[None]:
    """Watch every task that is started in this block (on trio: every task).

    :param library: ``asyncio`` or ``trio``, in which this runs.
    """
    if library == "trio":
        instrument = _Instrument(steps)
        trio.lowlevel.add_instrument(instrument)
        try:
            yield
        finally:
            trio.lowlevel.remove_instrument(instrument)
        return

    async def drive(inner: Generator[Any, None, Any] | Coroutine[Any, Any, Any]) -> Any:
        return await _Driven(inner, steps)

    def factory(
        loop: asyncio.AbstractEventLoop, inner: Generator[Any, None, Any] | Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        return asyncio.Task(drive(inner), loop=loop, **options)

    loop = asyncio.get_running_loop()
    loop.set_task_factory(factory)  # type: ignore[arg-type, unused-ignore]
    try:
        yield
    finally:
        loop.set_task_factory(None)


def living_tasks(library: str) -> int:
    """How many tasks live in this loop."""
    return trio.lowlevel.current_statistics().tasks_living if library == "trio" else len(asyncio.all_tasks())
