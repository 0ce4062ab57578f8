"""A blocking reader: a connection of its own for one consumer's blocking reads, which never lose an entry."""

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


class BlockingReader:
    """One consumer's connection, opened when it is needed. One request at a time.

    :param unblock: asks the server to end the blocking command of a client id; true if it did.
    """

    def __init__(self, settings: Settings, unblock: Callable[[int], Awaitable[bool]]) -> None:
        self._settings = settings
        self._unblock = unblock
        self._link: Link | None = None
        self._protocol = Protocol()
        self._last_reply = 0.0
        self.lost_track = False
        """A connection broke while a read was under way: something may have been delivered that nobody has seen."""
        self.last_id = "0-0"
        """The highest id that a read has brought. Reads of one consumer bring ever higher ones."""

    async def aclose(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.aclose()

    async def request(
        self, commands: list[Command], *, wait: float, hand_back: Callable[[list[Any]], Awaitable[None]]
    ) -> list[Any]:
        """Send commands, wait for their replies (error replies included).

        :param wait: seconds for which the server may block.
        :param hand_back: called with the replies, shielded, if the caller was cancelled and they came all the same.
        :raises BackendError: if the connection cannot be made, breaks, or is silent for longer than it may be.
        """
        link = await self._usable_link()
        finished = anyio.Event()
        replies = Replies(len(commands), finished.set)
        self._protocol.expect(replies)
        try:
            # Not cancelled half-way: what is left of a command in the pipe would spoil the connection.
            with anyio.CancelScope(shield=True):
                await link.send(pack(commands), silence=self._settings.command_timeout)
            await self._receive(link, finished, wait + self._settings.command_timeout)
        except BROKEN as error:
            await self.give_up()  # noqa: ASYNC120 - shielded in there
            text = f"the connection to {self._settings.place} broke: {str(error) or type(error).__name__}"
            raise broken(text, may_have_happened=True) from error
        except BaseException:
            # Cancelled: the entries may be on their way. Have the server answer now, and give them back.
            with anyio.move_on_after(_SHIELDED, shield=True) as scope:
                await self._end_blocking(link, finished)
                await hand_back(replies.replies)
            if scope.cancelled_caught:
                self.lost_track = True
            if not finished.is_set():
                await self.give_up()  # noqa: ASYNC102 - shielded in there
            raise
        return replies.replies

    async def _usable_link(self) -> Link:
        """The connection; another one if it does not answer after a pause."""
        if self._link is not None and anyio.current_time() - self._last_reply > PAUSE:
            link, self._link = self._link, None
            answers = False
            try:
                answers = await link.answers()
            finally:
                if not answers:
                    await link.aclose()  # noqa: ASYNC102 - shielded in there
            self._link = link if answers else None
        if self._link is None:
            self._link = await open_link(self._settings)
            self._protocol = Protocol()
        return self._link

    async def _receive(self, link: Link, finished: anyio.Event, silence: float = math.inf) -> None:
        """
        :param silence: seconds until the first part has to come. Between two parts it is ``command_timeout`` at most.
        """
        deadline = anyio.current_time() + silence
        while not finished.is_set():
            self._protocol.feed(await link.receive_within(silence))
            silence = max(self._settings.command_timeout, deadline - anyio.current_time())
        self._last_reply = anyio.current_time()
        link.all_answered()

    async def _end_blocking(self, link: Link, finished: anyio.Event) -> None:
        async with anyio.create_task_group() as tasks:

            async def unblock() -> None:
                # Until it has arrived and is blocked, the server does not know what to unblock.
                while not finished.is_set():
                    try:
                        if await self._unblock(link.client_id):
                            return
                    except Exception:
                        return  # without the other connection: what is blocked here ends by its own time
                    await anyio.sleep(0.002)

            tasks.start_soon(unblock)
            try:
                await self._receive(link, finished)
            except BROKEN:
                self.lost_track = True
            tasks.cancel_scope.cancel()

    def lose_track(self) -> None:
        self.lost_track = True

    async def give_up(self) -> None:
        """This connection is of no use any more; the next request opens another."""
        self.lost_track = True
        await self.aclose()
