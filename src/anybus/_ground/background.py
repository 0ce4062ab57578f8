"""Tasks that run beside the body of an ``async with`` block."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

from .cancellation import sole


@asynccontextmanager
async def background() -> AsyncGenerator[TaskGroup, None]:
    """A task group whose tasks run beside the body. They must end by the time that the body ends.

    The body's exception comes out as it is, not in a group. If a task fails, the body is cancelled, and the task's
    error comes out.
    """
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            try:
                yield tasks
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:
                failure = error
    except BaseException as error:
        raise sole(error) from error.__cause__  # noqa: ASYNC104 - a cancellation is its own sole error
    if failure is not None:
        raise failure
