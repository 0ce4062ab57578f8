"""For tests with real processes: where their programs are, and how they are waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

CHILDREN = Path(__file__).with_name("children")
BOUND = 45.0
"""Seconds after which what a test waits for has not come. Never a measure of speed."""


def wait_until(condition: Callable[[], object], what: str, *, every: float = 0.01) -> None:
    """Look again and again, and not too often: the processes need the cores."""
    deadline = time.monotonic() + BOUND
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain for {what}")
        time.sleep(every)
