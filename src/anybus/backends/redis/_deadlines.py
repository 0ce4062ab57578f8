"""When a caller must be told what is known, although its own time is not over."""

from __future__ import annotations

from typing import Final

import anyio

_MARGIN: Final = 0.25
"""On a busy machine the event loop is late. So many seconds before a deadline, at most, it is still in time."""


def last_moment() -> float:
    """Slightly before the caller's own deadline: later, it would be cancelled, and learn nothing."""
    deadline = anyio.current_effective_deadline()
    return deadline - min(_MARGIN, max(0.0, deadline - anyio.current_time()) / 10)
