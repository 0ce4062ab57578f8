"""The clocks: the event loop's, for durations, and the wall clock, for points in time."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone

from anyio.lowlevel import current_token


def loop_clock() -> Callable[[], float]:
    """AnyIO's ``current_time``, bound to the running loop. It is read for every message, so the lookup is saved."""
    token = current_token()
    clock: Callable[[], float] = getattr(token.native_token, "time", token.backend_class.current_time)
    return clock


def now() -> datetime:
    """The wall clock, in UTC. All wall time of this package comes from here.

    A test replaces it for all callers at once, by replacing this module's ``datetime``.
    """
    return datetime.now(timezone.utc)
