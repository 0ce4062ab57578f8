"""A blocking reader: a connection for blocking reads, which never lose an entry."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from ._errors import broken
from ._link import BROKEN, PAUSE, Link, open_link
from ._protocol import Command, Protocol, Replies, pack
from ._settings import Settings

_SHIELDED = 1.0


def _nothing() -> None:
    """Replies are awaited by receiving bytes, so nobody has to be woken."""


class BlockingReader:
    """A connection for blocking reads, opened when it is needed. There is one request at a time.

    :param unblock: asks the server to end the blocking command of a client id. Returns true if there was one.
    :param on_lost: called when the connection broke during a request: the server may have delivered entries whose reply
        was lost.
    """

    def __init__(
        self, settings: Settings, unblock: Callable[[int], Awaitable[bool]], on_lost: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._unblock = unblock
        self._on_lost = on_lost
        self._link: Link | None = None
        self._protocol = Protocol()
        self._last_reply = 0.0

    @property
    def client_id(self) -> int:
        """The server's number for the connection; 0 if there is none."""
        return 0 if self._link is None else self._link.client_id

    async def aclose(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.aclose()

    async def request(
        self, commands: list[Command], *, wait: float, hand_back: Callable[[list[Any]], Awaitable[None]]
    ) -> list[Any]:
        """Send commands, and wait for their replies. Error replies are returned, too.

        :param wait: for how many seconds the server may block.
        :param hand_back: called with the replies, shielded, if the caller was cancelled while they were under way.
        :raises BackendError: if the connection cannot be opened, breaks, or is silent for too long.
        """
        link = await self._usable_link()
        replies = Replies(len(commands), _nothing)
        self._protocol.expect(replies)
        try:
            # Shielded, because a command that is sent only in part would make the connection unusable.
            with anyio.CancelScope(shield=True):
                await link.send(pack(commands), silence=self._settings.command_timeout)
            await self._receive(link, replies, wait + self._settings.command_timeout)
        except BROKEN as error:
            await self.abandon()  # noqa: ASYNC120 - shielded inside
            text = f"the connection to {self._settings.place} broke: {str(error) or type(error).__name__}"
            raise broken(text, may_have_happened=True) from error
        except BaseException:
            # Cancelled: entries may be under way. Make the server answer now, and release them.
            try:
                with anyio.move_on_after(_SHIELDED, shield=True) as scope:
                    await self._end_blocking(link, replies)
                    await hand_back(replies.replies)
                if scope.cancelled_caught:
                    self._on_lost()
            finally:
                # Also if a native asyncio cancellation has pierced the shield: the reply may bring others' entries.
                if not replies.complete:
                    await self.abandon()  # noqa: ASYNC102 - shielded inside
            raise
        return replies.replies

    async def _usable_link(self) -> Link:
        """The connection; a new one if there is none, or if it does not answer after a pause."""
        if self._link is not None and anyio.current_time() - self._last_reply > PAUSE:
            link, self._link = self._link, None
            answers = False
            try:
                answers = await link.answers()
            finally:
                if not answers:
                    await link.aclose()  # noqa: ASYNC102 - shielded inside
            self._link = link if answers else None
        if self._link is None:
            self._link = await open_link(self._settings)
            self._protocol = Protocol()
        return self._link

    async def _receive(self, link: Link, replies: Replies, silence: float = math.inf) -> None:
        """
        :param silence: how many seconds the first bytes may take. All later ones may take ``command_timeout``, or what
            is left of this time, if that is longer.
        """
        deadline = anyio.current_time() + silence
        while not replies.complete:
            self._protocol.feed(await link.receive_within(silence))
            silence = max(self._settings.command_timeout, deadline - anyio.current_time())
        self._last_reply = anyio.current_time()
        link.all_answered()

    async def _end_blocking(self, link: Link, replies: Replies) -> None:
        async with anyio.create_task_group() as tasks:

            async def unblock() -> None:
                # Repeated, because the blocking command may not have reached the server yet.
                while not replies.complete:
                    try:
                        if await self._unblock(link.client_id):
                            return
                    except Exception:
                        return  # the shared connection failed: the blocking command ends after its own time
                    await anyio.sleep(0.002)

            tasks.start_soon(unblock)
            try:
                await self._receive(link, replies)
            except BROKEN:
                self._on_lost()
            tasks.cancel_scope.cancel()

    async def abandon(self) -> None:
        """Close this connection, which cannot be used any more. The next request opens a new one."""
        self._on_lost()
        await self.aclose()
