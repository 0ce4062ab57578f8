"""Telling a real cancellation from a stray one, and an error from the group that wraps it."""

from __future__ import annotations

import math
import sys

import anyio

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


def is_stray(error: BaseException) -> bool:
    """Whether this is a cancellation exception although nobody cancelled the scope we run in.

    A handler can let an ``asyncio.CancelledError`` out (of a future it awaited, say). In a task that the bus itself
    spawned that would end the whole subscription without a word; it is a failure like any other.
    """
    return isinstance(error, anyio.get_cancelled_exc_class()) and anyio.current_effective_deadline() != -math.inf


def sole(error: BaseException) -> BaseException:
    """The error itself, where task groups have wrapped a single one; else the group."""
    members = _members(error)
    while len(members) == 1:
        error = members[0]
        members = _members(error)
    return error


def _members(error: object) -> tuple[BaseException, ...]:
    if isinstance(error, BaseExceptionGroup):
        return error.exceptions  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return ()
