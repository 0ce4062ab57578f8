"""What children share: notes that outlive their writer, the choice of a loop, and the order to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio


class Notes:
    """A file that only grows by whole lines. Each reaches it in one write: a kill -9 a moment later changes nothing."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def add(self, *words: str) -> None:
        os.write(self._file, (" ".join(words) + "\n").encode())


def run(main: Callable[[], Awaitable[None]], loop: str) -> None:
    """Run on that loop: asyncio, uvloop or trio."""
    # As in a terminal's foreground, whatever the parent was started by.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if loop == "trio":
        anyio.run(main, backend="trio")
    else:
        anyio.run(main, backend="asyncio", backend_options={"use_uvloop": loop == "uvloop"})


@contextmanager
def listening(state: Notes) -> Iterator[Callable[[], Awaitable[None]]]:
    """Listen for SIGTERM, and note ``listens``: nobody may send it before. SIGINT is left alone.

    What comes out waits until it has come; it may have come before.
    """
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        state.add("listens")

        async def until_told_to_end() -> None:
            async for _ in signals:
                return

        yield until_told_to_end
