"""The recovery: what the intake does about an error of the backend, a lost group among them."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import anyio

from .._failure.backoff import recovery_delay
from .._ground.cancellation import as_failure
from .._ground.errors import GroupLostError, can_pass
from ..abc._observer import ErrorScope
from .context import Context


class Recovery:
    """Errors that can pass are reported and the work is tried again, later with every failure; others end it."""

    def __init__(self, context: Context, scope: ErrorScope) -> None:
        self._context = context
        self._scope: ErrorScope = scope
        self._failures = 0

    @property
    def failed(self) -> bool:
        """Whether the last attempt did."""
        return self._failures > 0

    async def attempt(self, work: Callable[..., Awaitable[bool]], /, *args: float) -> bool:
        try:
            result = await work(*args)
        except BaseException as error:  # noqa: ASYNC103 - raised again in there
            await self._recover(as_failure(error))  # noqa: ASYNC102 - no cancellation comes this far
            return False  # noqa: ASYNC104
        if self._failures:
            self._failures = 0
            self._context.reporter.works(self._scope)
        return result

    async def _recover(self, error: Exception) -> None:
        if not can_pass(error):
            raise error
        self._failures += 1
        if isinstance(error, GroupLostError):
            made = await self._make_again(error)
            if made and self._failures == 1:
                return
        else:
            self._context.reporter.error(self._scope, error, detail="tried again soon", part=self._scope)
        await anyio.sleep(recovery_delay(self._failures, random.random()))

    async def _make_again(self, lost: GroupLostError) -> bool:
        """Make a lost group again where every member had settled everything, else at the start: never a gap.

        At most once it is made at the end: never twice.
        """
        context = self._context
        context.ledger.group_was_lost(lost.stream)
        at_most_once = context.policy.ack_mode == "auto-on-receive"
        position = "$" if at_most_once else lost.safe_id or "0"
        try:
            made = await context.backend.create_group(lost.stream, context.group, position)
        except Exception as error:
            if not can_pass(error):
                raise
            detail = f"the lost group of {lost.stream!r} is not made again yet"
            context.reporter.error(self._scope, error, detail=detail, part=self._scope)
            return False
        if made:
            detail = f"made again at {position}"
            if at_most_once:
                detail += ", the end: what was published before and not handled is lost (at most once)"
            context.reporter.error(self._scope, lost, detail=detail, topic=lost.stream)
            context.reporter.tell("on_group_made_again", "group-made-again", topic=lost.stream, detail=detail)
        return True
