"""Checks of a window: the time for which a key counts as known."""

from __future__ import annotations

import math
from typing import Any, Final

from .checks import check_number, refuse

LONGEST_WINDOW: Final = 7 * 24 * 3600
"""The longest window in seconds. Each key of the window is kept in the server's memory."""


def check_window(field: str, value: Any) -> float:
    """A window in seconds: positive, and not longer than :data:`LONGEST_WINDOW`."""
    allowed = f"a positive number of seconds, at most {LONGEST_WINDOW} (7 days)"
    seconds = check_number(field, value, allowed)
    if not math.isfinite(seconds) or not 0 < seconds <= LONGEST_WINDOW:
        refuse(field, value, allowed)
    return seconds
