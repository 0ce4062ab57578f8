"""The event loop that a bus belongs to, and the refusal of calls from anywhere else."""

from __future__ import annotations

import threading
from typing import NoReturn

from anyio.lowlevel import current_token

_THREAD = (
    "call it in its own loop, for example by anyio.from_thread.run(bus.publish, message), or from_thread.run_sync for "
    "a plain function, in a thread that anyio.to_thread.run_sync started; in any other thread with "
    "portal.call(bus.publish, message) of an anyio.from_thread.BlockingPortal that was opened in that loop"
)
_LOOP = "make a bus for each event loop, and enter, use and leave it there (in tests: enter it inside the test)"


class Home:
    """The event loop in which this was made. A check costs some 0.3 microseconds."""

    __slots__ = ("_current", "_native", "_thread")

    def __init__(self) -> None:
        token = current_token()
        # AnyIO's `current_token`, without its look for the loop's kind: it is asked at every publish.
        self._current = token.backend_class.current_token
        self._native = token.native_token
        self._thread = threading.current_thread()

    def check(self, what: str) -> None:
        """
        :raises RuntimeError: if this is not the loop in which we run.
        """
        try:
            if self._current() is self._native:
                return
        except RuntimeError:  # no loop of this kind runs in this thread
            pass
        self._refuse(what)

    def _refuse(self, what: str) -> NoReturn:
        here = threading.current_thread()
        if here is not self._thread:
            raise RuntimeError(
                f"{what} belongs to the event loop of thread {self._thread.name!r}, and was used in thread "
                f"{here.name!r}: {_THREAD}"
            )
        raise RuntimeError(f"{what} was used outside the event loop in which the bus was entered: {_LOOP}")
