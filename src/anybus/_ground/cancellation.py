"""Tells real cancellations from stray ones, and unwraps exception groups."""

from __future__ import annotations

import math
import sys
from collections.abc import Awaitable, Callable

import anyio

from .errors import BackendError

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


def is_cancelled() -> bool:
    """Whether a cancel scope around the caller has been cancelled."""
    return anyio.current_effective_deadline() == -math.inf


def is_stray(error: BaseException) -> bool:
    """Whether this is a cancellation exception although no cancel scope around the caller was cancelled.

    A handler can let out the ``asyncio.CancelledError`` of a future that it awaited, for example. Also, when asyncio
    itself cancels everything, it hits each task once. In a task that the bus spawned, such an exception would silently
    end the whole subscription.
    """
    return isinstance(error, anyio.get_cancelled_exc_class()) and not is_cancelled()


def is_abandoned() -> bool:
    """Whether the owner of a task group around the caller, at any level, has ended without waiting for its tasks.

    This happens if a task group was entered by hand and never left. Nobody will ever cancel its scope, so only a native
    cancellation can end its tasks: ``asyncio.run`` cancels each remaining task once, and then waits.
    """
    parents = {task.id: task.parent_id for task in anyio.get_running_tasks()}
    ancestor = anyio.get_current_task().parent_id
    for _ in parents:
        if ancestor is None:
            return False
        if ancestor not in parents:
            return True
        ancestor = parents[ancestor]
    return False


def as_failure(error: BaseException) -> Exception:
    """The error as an ``Exception``, to report and to recover from. A real cancellation or Ctrl-C is raised again."""
    if isinstance(error, Exception):
        return error
    if is_stray(error):
        return BackendError("a stray cancellation", can_pass=True)
    raise error


async def persist(part: Callable[[], Awaitable[object]]) -> None:
    """Run a function to its end. After a stray cancellation it is called again, and continues where it was."""
    while True:
        try:
            await part()
        except BaseException as error:  # noqa: ASYNC103 - a real cancellation is raised again
            if not is_stray(error):
                raise
        else:
            return


def sole(error: BaseException) -> BaseException:
    """The single error that task groups have wrapped; if there are several, the group."""
    members = _members(error)
    while len(members) == 1:
        error = members[0]
        members = _members(error)
    return error


def leaves(error: BaseException) -> list[BaseException]:
    """All errors in a group, at any depth. For any other error, that error alone."""
    members = _members(error)
    return [leaf for member in members for leaf in leaves(member)] if members else [error]


def cancellation_in(error: BaseException) -> BaseException | None:
    """The cancellation in an error: the error itself, or a member of a group. (Trio's task groups mix the two.)"""
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return error
    for member in _members(error):
        found = cancellation_in(member)
        if found is not None:
            return found
    return None


def without_cancellations(error: BaseException) -> BaseException | None:
    """The error without the cancellations in it; None if nothing is left."""
    if not isinstance(error, BaseExceptionGroup):
        return None if isinstance(error, anyio.get_cancelled_exc_class()) else error
    return error.split(anyio.get_cancelled_exc_class())[1]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def is_crash(error: BaseException) -> bool:
    """Whether an error that is not an ``Exception`` was caused by the code that raised it.

    A ``KeyboardInterrupt`` was not: it hits whatever code runs when somebody presses Ctrl-C.
    """
    ends = [leaf for leaf in leaves(error) if not isinstance(leaf, Exception)]
    if not ends:
        return not isinstance(error, Exception)
    return not all(isinstance(leaf, (KeyboardInterrupt, anyio.get_cancelled_exc_class())) for leaf in ends)


def _members(error: object) -> tuple[BaseException, ...]:
    if isinstance(error, BaseExceptionGroup):
        return error.exceptions  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return ()
