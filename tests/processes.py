"""For tests with real processes: where their programs are, and how they are waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

CHILDREN = Path(__file__).with_name("children")
BOUND = 45.0
"""Seconds after which what a test waits for has not come. Never a measure of speed."""


def wait_until(
    condition: Callable[[], object], what: str, *, every: float = 0.01, growing: Callable[[], int] | None = None
) -> None:
    """Look again and again, and not too often: the processes need the cores.

    :param growing: the wait is not in vain as long as this number grows. For work of which there is the more, the
        longer the machine took for what came before.
    """
    grown, deadline = -1, time.monotonic() + BOUND
    while not condition():
        if growing is not None and (number := growing()) > grown:
            grown, deadline = number, time.monotonic() + BOUND
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain for {what}")
        time.sleep(every)
