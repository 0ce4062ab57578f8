"""The event loop's clock."""

from __future__ import annotations

from collections.abc import Callable

from anyio.lowlevel import current_token


def loop_clock() -> Callable[[], float]:
    """AnyIO's ``current_time``, bound to the running loop. It is read for every message, so the lookup is saved."""
    token = current_token()
    clock: Callable[[], float] = getattr(token.native_token, "time", token.backend_class.current_time)
    return clock
