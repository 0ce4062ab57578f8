"""The recovery: what the intake does after an error of the backend, such as a lost group."""

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
    """Repeats work with backoff after transient errors, which it reports. Other errors are raised."""

    def __init__(self, context: Context, scope: ErrorScope) -> None:
        self._context = context
        self._scope: ErrorScope = scope
        self._failures = 0

    @property
    def failed(self) -> bool:
        """Whether the last attempt failed."""
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
            self._context.reporter.error(self._scope, error, detail="it is tried again soon", part=self._scope)
        await anyio.sleep(recovery_delay(self._failures, random.random()))

    async def _make_again(self, lost: GroupLostError) -> bool:
        """Recreate a lost group where every member had settled everything below, otherwise at the start: never a gap.

        With at most once, recreate it at the end: no message is handled twice.
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
            detail = f"the lost group of {lost.stream!r} has not been recreated yet"
            context.reporter.error(self._scope, error, detail=detail, part=self._scope)
            return False
        if made:
            detail = f"recreated at {position}"
            if at_most_once:
                detail += ", the end: messages that were published before and not handled are lost (at most once)"
            context.reporter.error(self._scope, lost, detail=detail, topic=lost.stream)
            context.reporter.tell("on_group_made_again", "group-made-again", topic=lost.stream, detail=detail)
        return True
