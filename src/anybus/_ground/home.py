"""The event loop to which a bus belongs, and the task that entered it. Calls from anywhere else are refused."""

from __future__ import annotations

import threading
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import NoReturn, TypeVar

import anyio
from anyio.lowlevel import current_token

T = TypeVar("T")

_THREAD = (
    "call it in its own event loop. In a thread that anyio.to_thread.run_sync started, use "
    "anyio.from_thread.run(bus.publish, message), or anyio.from_thread.run_sync for a plain function. In any other "
    "thread, use portal.call(bus.publish, message) with an anyio.from_thread.BlockingPortal opened in that event loop"
)
_LOOP = "create a bus for each event loop, and enter, use and leave it there (in tests: enter it inside the test)"
_TASK = (
    "enter and leave it in the same task, with 'async with'. In tests: pytest-asyncio enters an async fixture in one "
    "task and leaves it in another. Use AnyIO's pytest plugin (its fixtures and the test share a task), or enter it "
    "inside the test, or in a task that the fixture starts (docs/testing.md shows all three)"
)


class Home:
    """The event loop in which this object was created. A check costs about 0.3 microseconds."""

    __slots__ = ("_current", "_native", "_thread")

    def __init__(self) -> None:
        token = current_token()
        # AnyIO's `current_token` without the lookup of the loop's backend, because every publish calls it.
        self._current = token.backend_class.current_token
        self._native = token.native_token
        self._thread = threading.current_thread()

    def check(self, what: str) -> None:
        """
        :raises RuntimeError: if the caller runs in another event loop, or in a thread without one.
        """
        try:
            if self._current() is self._native:
                return
        except RuntimeError:  # no event loop of this kind runs in this thread
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


class Entered(AbstractAsyncContextManager[T, "bool | None"]):
    """Wraps an async context manager with task groups inside, and tells if it is left in the wrong task or loop."""

    def __init__(self, what: str, inner: AbstractAsyncContextManager[T, bool | None]) -> None:
        self._what = what
        self._inner = inner
        self._home: Home | None = None
        self._task = 0

    async def __aenter__(self) -> T:
        self._home = Home()
        self._task = anyio.get_current_task().id
        return await self._inner.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """
        :raises RuntimeError: in another event loop, without any effect; in another task, after everything has ended as
            if the body had raised.
        """
        if self._home is not None:
            self._home.check(self._what)
        try:
            return await self._inner.__aexit__(exc_type, exc_value, traceback)  # noqa: ASYNC102 - passed on
        except RuntimeError as error:
            if anyio.get_current_task().id == self._task or "cancel scope" not in str(error).lower():
                raise
            raise RuntimeError(f"{self._what} was entered in one task and left in another: {_TASK}") from error
