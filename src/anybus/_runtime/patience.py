"""The patience with which a subscription starts: transient errors are reported, and a step is tried again."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from .._failure.backoff import recovery_delay
from .._ground.errors import ServerFullError, can_pass
from .context import Context

T = TypeVar("T")


class Patience:
    """Runs the steps of a start."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def until_done(self, not_yet: str, work: Callable[..., Awaitable[T]], /, *args: object, **more: object) -> T:
        """Run one step of the start. Transient errors are reported, and the step is repeated."""
        failures, full_since = 0, None
        while True:
            try:
                return await work(*args, **more)
            except Exception as error:
                if not can_pass(error):
                    raise
                failures += 1
                left = math.inf
                if isinstance(error, ServerFullError) and not self._context.wait_if_full:
                    full_since = self._context.clock() if full_since is None else full_since
                    left = self._full_for(full_since, not_yet, error)
                self._context.reporter.error("read", error, detail=not_yet, times=failures)
                await anyio.sleep(min(left, recovery_delay(failures, random.random())))

    def _full_for(self, since: float, not_yet: str, error: ServerFullError) -> float:
        """For how many seconds the start still waits for room on the server. Raises if they are over."""
        timeout = self._context.options.publish_timeout
        left = since + timeout - self._context.clock()
        if left > 0:
            return left
        raise ServerFullError(
            f"{not_yet}, and the server has been full for publish_timeout ({timeout:g} s): {error}. Free memory "
            "(docs/retention.md), or wait for it with SubscriptionConfig(wait_if_full=True)",
            may_have_happened=False,
        ) from error
