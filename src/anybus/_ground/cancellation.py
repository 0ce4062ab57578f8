"""Telling a real cancellation from a stray one, and an error from the group that wraps it."""

from __future__ import annotations

import math
import sys
from collections.abc import Awaitable, Callable

import anyio

from .errors import BackendError

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


def is_cancelled() -> bool:
    """Whether a scope that we run in has been cancelled."""
    return anyio.current_effective_deadline() == -math.inf


def is_stray(error: BaseException) -> bool:
    """Whether this is a cancellation exception although nobody cancelled the scope we run in.

    A handler can let an ``asyncio.CancelledError`` out (of a future it awaited, say), and ``asyncio``'s own ways of
    cancelling everything hit each task once. In a task that the bus itself spawned that would end the whole
    subscription without a word.
    """
    return isinstance(error, anyio.get_cancelled_exc_class()) and not is_cancelled()


def is_abandoned() -> bool:
    """Whether a task whose task group we run in, or one above it, has ended without waiting for us.

    That takes a task group that was entered by hand and never left. Nobody will ever cancel its scope, so a native
    cancellation is all that can end its tasks: ``asyncio.run`` cancels each task that is left once, and then waits.
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
    """The error as something to report and recover from; what is not (a real cancellation, Ctrl-C) is raised again."""
    if isinstance(error, Exception):
        return error
    if is_stray(error):
        return BackendError("a stray cancellation", can_pass=True)
    raise error


async def persist(part: Callable[[], Awaitable[object]]) -> None:
    """Run a part to its end; a stray cancellation makes it begin again where it was."""
    while True:
        try:
            await part()
        except BaseException as error:  # noqa: ASYNC103 - what nobody cancelled goes on
            if not is_stray(error):
                raise
        else:
            return


def sole(error: BaseException) -> BaseException:
    """The error itself, where task groups have wrapped a single one; else the group."""
    members = _members(error)
    while len(members) == 1:
        error = members[0]
        members = _members(error)
    return error


def leaves(error: BaseException) -> list[BaseException]:
    """The errors in a group, however deep; of anything else, itself."""
    members = _members(error)
    return [leaf for member in members for leaf in leaves(member)] if members else [error]


def cancellation_in(error: BaseException) -> BaseException | None:
    """The cancellation in an error: itself, or a member of a group (trio's task groups mix them with errors)."""
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return error
    for member in _members(error):
        found = cancellation_in(member)
        if found is not None:
            return found
    return None


def without_cancellations(error: BaseException) -> BaseException | None:
    """The error without the cancellations in it; None if nothing else is in it."""
    if not isinstance(error, BaseExceptionGroup):
        return None if isinstance(error, anyio.get_cancelled_exc_class()) else error
    return error.split(anyio.get_cancelled_exc_class())[1]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def is_crash(error: BaseException) -> bool:
    """Whether what is no ``Exception`` was caused by the code it comes out of.

    Not so ``KeyboardInterrupt``: it strikes whatever code runs when somebody presses Ctrl-C.
    """
    ends = [leaf for leaf in leaves(error) if not isinstance(leaf, Exception)]
    if not ends:
        return not isinstance(error, Exception)
    return not all(isinstance(leaf, (KeyboardInterrupt, anyio.get_cancelled_exc_class())) for leaf in ends)


def _members(error: object) -> tuple[BaseException, ...]:
    if isinstance(error, BaseExceptionGroup):
        return error.exceptions  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return ()
