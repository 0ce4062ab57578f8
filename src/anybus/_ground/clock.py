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


def _system_now() -> datetime:
    return datetime.now(timezone.utc)


_source: Callable[[], datetime] = _system_now


def now() -> datetime:
    """The wall clock, in UTC. All wall time of this package comes from here."""
    return _source()


def replace_now(source: Callable[[], datetime] | None) -> None:
    """Let :func:`now` return what this function returns; None = the system's clock again. For tests."""
    global _source  # noqa: PLW0603 - one clock for the process
    _source = source or _system_now
