"""Keeps processes on one core for a while, where the platform can (Linux)."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def can_pin() -> bool:
    return sys.platform == "linux"


if sys.platform == "linux":

    def _threads(pid: int) -> list[int]:
        """An affinity belongs to a thread, and a server has several."""
        with suppress(OSError):
            return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        return [pid]

    @contextmanager
    def one_core(*others: int) -> Generator[int, None, None]:
        """Keep all threads of this process and of others on one core that this process may use, and yield the core.

        After the block, each thread may use the cores that it could use before.
        """
        core = max(os.sched_getaffinity(0))  # the first core often has the most interrupts
        before: dict[int, dict[int, set[int]]] = {pid: {} for pid in (os.getpid(), *others)}
        try:
            for pid, affinities in before.items():
                for thread in _threads(pid):
                    affinities[thread] = os.sched_getaffinity(thread)
                    os.sched_setaffinity(thread, {core})
            yield core
        finally:
            for pid, affinities in before.items():
                for thread in _threads(pid):
                    # A thread that was started meanwhile has inherited the one core.
                    with suppress(OSError):
                        os.sched_setaffinity(thread, affinities.get(thread) or affinities[pid])

else:

    @contextmanager
    def one_core(*others: int) -> Generator[int, None, None]:
        raise NotImplementedError("this platform cannot keep a process on one core")
        yield
