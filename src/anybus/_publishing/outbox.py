"""The outbox: messages that nobody waits for, until they are sent."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Final

import anyio
from anyio.abc import TaskGroup

from .._ground.background import background
from .._ground.cancellation import persist
from .._ground.errors import BackendError, UnsupportedError
from .._messages.message import Message
from .._options import PublishOptions, StreamBusOptions
from .._reporting import Reporter
from ..abc import PublishItem
from .publisher import Publisher

_TOGETHER: Final = 256


class Outbox:
    """A bounded buffer, and the task that sends what is in it, in order."""

    def __init__(self, publisher: Publisher, options: StreamBusOptions, reporter: Reporter) -> None:
        self._publisher = publisher
        self._size = options.publish_buffer_size
        self._patience = options.publish_timeout + options.cleanup_timeout
        self._reporter = reporter
        self._waiting: deque[PublishItem] = deque()
        self._in_flight = 0
        self._turn = anyio.Lock()
        self._tasks: TaskGroup | None = None
        self._scope: anyio.CancelScope | None = None

    def put(self, message: Message, options: PublishOptions | None) -> None:
        """
        :raises WouldBlock: if the buffer is full.
        :raises UnsupportedError: if there is no buffer.
        """
        if not self._size:
            raise UnsupportedError(
                "publish_nowait needs a buffer: set StreamBusOptions(publish_buffer_size=1000), for example"
            )
        item = self._publisher.prepare(message, options)
        if len(self._waiting) + self._in_flight >= self._size:
            raise anyio.WouldBlock
        self._waiting.append(item)
        if self._scope is None and self._tasks is not None:
            self._scope = anyio.CancelScope()
            self._tasks.start_soon(self._run, self._scope)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Send what is put in while the body runs. The body must call :meth:`aclose` at its end.

        There is a task for this only while there is something to send.
        """
        if not self._size:
            yield
            return
        async with background() as self._tasks:
            yield

    async def _run(self, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                await persist(self._send_all)
        finally:
            self._scope = None

    async def _send_all(self) -> None:
        while self._waiting:
            await self._send()

    async def _send(self) -> None:
        async with self._turn:
            items = [self._waiting.popleft() for _ in range(min(_TOGETHER, len(self._waiting)))]
            self._in_flight = len(items)
            try:
                # Shielded, because nobody would send them again. The publisher limits the time, and reports errors.
                with suppress(Exception), anyio.CancelScope(shield=True):
                    await self._publisher.send(items)
                self._in_flight = 0
            finally:
                self._lost(items[: self._in_flight], may_have_happened=True)
                self._in_flight = 0

    async def aclose(self) -> None:
        """End the task, send what is left, within a limited time, and report what is not sent."""
        self._tasks = None
        if self._scope is not None:
            self._scope.cancel()
        try:
            with anyio.move_on_after(self._patience, shield=True):
                while self._waiting or self._in_flight:
                    await self._send()
        finally:
            left = list(self._waiting)
            self._waiting.clear()
            self._lost(left, may_have_happened=False)

    def _lost(self, items: list[PublishItem], *, may_have_happened: bool) -> None:
        for topic, message, _ in items:
            text = "the bus was left before the message was published"
            error = BackendError(text, may_have_happened=may_have_happened)
            self._reporter.error("publish", error, detail="publish_nowait", topic=topic, message=message)
