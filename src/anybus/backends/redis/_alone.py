"""Commands that use a connection of their own, so that nothing else is affected if the server closes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio

from ..._ground.clock import loop_clock
from ._errors import broken
from ._link import BROKEN, Link, open_link
from ._multiplexer import Multiplexer
from ._protocol import Command, Protocol, Replies, asking, pack
from ._pulse import Pulse
from ._settings import Settings

_AT_ONCE = 4


class Loner:
    """Opens a separate connection for each call, a few at a time."""

    def __init__(self, settings: Settings, mux: Multiplexer) -> None:
        self._settings = settings
        self._mux = mux
        self._places = anyio.Semaphore(_AT_ONCE)

    async def pipeline(
        self, commands: Sequence[Command], timeout: float | None = None, *, patient: bool = False
    ) -> list[Any]:
        """Send commands together. Returns their replies, error replies included, in order.

        While the shared connection is broken, the commands wait until it is open again, like all others.

        :param patient: as in ``Multiplexer.pipeline``.
        :raises BackendError: if there is no connection, if it breaks, or if there is no answer in time.
            ``may_have_happened`` tells whether all of the commands had been sent.
        """
        sent = False
        if self._settings.asking:
            commands = asking(commands)

        def on_sent() -> None:
            nonlocal sent
            sent = True

        with anyio.move_on_after(timeout):
            if not self._mux.is_connected:
                await self._mux.until_connected(patient=patient)
            async with self._places:
                link = await open_link(self._settings)
                try:
                    replies = await self._talk(link, commands, on_sent)
                    return replies[1::2] if self._settings.asking else replies
                except BROKEN as error:
                    text = f"the connection to {self._settings.place} broke: {str(error) or type(error).__name__}"
                    raise broken(text, may_have_happened=sent) from error
                finally:
                    await link.aclose()  # noqa: ASYNC102 - shielded inside
        raise broken("no answer within publish_timeout", may_have_happened=sent)

    async def _talk(self, link: Link, commands: Sequence[Command], on_sent: Any) -> list[Any]:
        protocol = Protocol()
        finished = anyio.Event()
        replies = Replies(len(commands), finished.set)
        protocol.expect(replies)
        failure: BaseException | None = None
        silence = self._settings.command_timeout
        pulse = Pulse(link, protocol, loop_clock(), lambda _: None, lambda: None)
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                nonlocal failure
                await pulse.until_silent(silence, lambda: 0)
                failure = TimeoutError(f"no answer for {silence:.3g} s")
                tasks.cancel_scope.cancel()

            async def send() -> None:
                nonlocal failure
                data = pack(commands)
                try:
                    await link.send(data[:-1])
                    # The server does nothing without the last byte. Sending that byte may be interrupted after it left.
                    on_sent()
                    await link.send(data[-1:])
                except BROKEN as error:
                    failure = error  # noqa: ASYNC104

            tasks.start_soon(watch)
            tasks.start_soon(send)
            # Receive while sending: a server that refuses says so during the sending, and closes the connection.
            try:
                while not finished.is_set():
                    data = await link.receive()
                    pulse.received()
                    protocol.feed(data)
            except BROKEN as error:
                failure = failure or error
            tasks.cancel_scope.cancel()
        if not finished.is_set() and failure is not None:
            raise failure
        return replies.replies
