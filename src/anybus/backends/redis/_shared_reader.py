"""Members of one group wait for new entries together, on one connection.

One of the members that wait leads: it sends a blocking read that names the streams of all of them, and shares out the
reply. When it has got its own part, another one leads. So a member that waits alone needs no other task.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from ..._ground.errors import BackendError
from ._errors import UNEXPECTED, duplicate, leads_elsewhere, unexpected_reply
from ._protocol import Command, ServerError
from ._reader import BlockingReader
from ._settings import Settings

_SHIELDED: Final = 1.0
_GATHERED: Final = 0.002
"""For so many seconds, members that want to join are gathered before the read under way is ended for them."""

_LONGEST_PAUSE: Final = 0.1
"""While the server does not find the read that is to be ended, the pauses grow to so many seconds."""


_MOST_REFUSALS: Final = 10
_REMEMBERED: Final = 10.0
"""After so many seconds, a refusal is forgotten. It is longer than the pauses between the tries of a subscription."""


class Track:
    """What a member knows of its reads.

    :ivar lost: the server may have delivered entries whose reply was lost.
    :ivar last_id: the highest id that a read has returned. The ids of one consumer's reads only grow.
    :ivar came_at: when a read has last returned an entry, on AnyIO's clock.
    """

    __slots__ = ("came_at", "last_id", "lost", "refused", "refused_at")

    def __init__(self) -> None:
        self.lost = False
        self.last_id = "0-0"
        self.came_at = -math.inf
        self.refused = 0
        self.refused_at = -math.inf

    def lose(self) -> None:
        self.lost = True

    def came(self, last_id: str) -> None:
        self.last_id = last_id
        self.came_at = anyio.current_time()

    def is_refused_too_often(self) -> bool:
        """Count a refusal of a read of several streams. True = again and again, so it is not because of one of them."""
        now = anyio.current_time()
        self.refused = self.refused + 1 if now - self.refused_at < _REMEMBERED else 1
        self.refused_at = now
        return self.refused > _MOST_REFUSALS


class Wait:
    """A member that waits for entries of its stream.

    :ivar until: when it gives up, on AnyIO's clock.
    :ivar reply: the server's reply, with the part for this stream only; None = nothing came.
    :ivar alone: whether the reply concerns no other member.
    :ivar request: the same for all members that the last read named.
    """

    __slots__ = ("alone", "count", "done", "error", "event", "name", "reply", "request", "track", "until")

    def __init__(self, stream: str, count: int, until: float, track: Track) -> None:
        self.name = stream.encode()
        self.count = count
        self.until = until
        self.track = track
        self.done = False
        self.alone = True
        self.reply: Any = None
        self.error: BackendError | None = None
        self.event: anyio.Event | None = None
        self.request = object()

    def finish(self, reply: Any, error: BackendError | None = None, *, alone: bool = True) -> None:
        self.reply = reply
        self.error = error
        self.alone = alone
        self.done = True
        self.wake()

    def wake(self) -> None:
        if self.event is not None:
            self.event.set()


class _Read:
    """A blocking read under way."""

    __slots__ = ("ended", "is_ending", "waits")

    def __init__(self, waits: dict[bytes, Wait]) -> None:
        self.waits = waits
        self.ended = anyio.Event()
        self.is_ending = False


class SharedReader:
    """A connection on which members of one group, all of the same consumer name, wait.

    :param tasks: what ends a read under way runs in this task group.
    :param release: called with the part of a reply for a member that waits no longer. It must not wait.
    """

    def __init__(
        self,
        settings: Settings,
        group: str,
        consumer: str,
        *,
        unblock: Callable[[int], Awaitable[bool]],
        tasks: TaskGroup,
        release: Callable[[Any], None],
    ) -> None:
        self._settings = settings
        self._group = group
        self._consumer = consumer
        self._unblock = unblock
        self._tasks = tasks
        self._release = release
        self._reader = BlockingReader(settings, unblock, self._lost)
        self._waits: dict[bytes, Wait] = {}
        self._read: _Read | None = None
        self.members: set[str] = set()

    async def aclose(self) -> None:
        await self._reader.aclose()

    async def abandon(self) -> None:
        await self._reader.abandon()

    async def wait(self, wait: Wait, longest_block: float, *, once: bool = False) -> None:
        """Wait until the server has answered for this member, or until its time is over.

        If this is cancelled, the reply may have come all the same: the caller must release its entries.

        :param longest_block: how many seconds one read waits.
        :param once: return after one read.
        :raises BackendError: if the connection cannot be opened, breaks, or is silent for too long.
        """
        self._waits[wait.name] = wait
        try:
            while not wait.done:
                read = self._read
                if read is None:
                    await self._lead(longest_block)
                    if once and not wait.done:
                        wait.finish(None)
                else:
                    if wait.name not in read.waits:
                        self._end(read)
                    wait.event = anyio.Event()
                    await wait.event.wait()
        except BaseException:
            with anyio.move_on_after(_SHIELDED, shield=True):
                await self._withdraw(wait)
            raise
        finally:
            if self._waits.get(wait.name) is wait:
                del self._waits[wait.name]
            if self._read is None:
                self._pass_on()
        if wait.error is not None:
            raise wait.error

    async def _withdraw(self, wait: Wait) -> None:
        """The server may deliver to this member at any moment: make it answer."""
        read = self._read
        if read is not None and read.waits.get(wait.name) is wait:
            self._end(read)
            await read.ended.wait()

    def _pass_on(self) -> None:
        """Somebody else leads."""
        for wait in self._waits.values():
            if not wait.done:
                wait.wake()
                return

    async def _lead(self, longest_block: float) -> None:
        # Those that have got their answer may not have noticed yet.
        read = self._read = _Read({name: wait for name, wait in self._waits.items() if not wait.done})
        waits = list(read.waits.values())
        request = object()
        for wait in waits:
            wait.request = request
        now = anyio.current_time()
        block = max(0.001, min(longest_block, *(wait.until - now for wait in waits)))
        count, wait_ms = min(wait.count for wait in waits), max(1, int(block * 1000))
        command: Command = (
            *("XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", count, "BLOCK", wait_ms, "STREAMS"),
            *read.waits,
            *[">"] * len(waits),
        )
        answered = False

        async def share(replies: list[Any]) -> None:
            nonlocal answered
            if replies:
                answered = True
                await self._share(read, replies[0])

        try:
            await share(await self._reader.request([command], wait=block, hand_back=share))
        except BackendError as error:
            for wait in waits:
                wait.finish(None, duplicate(error), alone=len(waits) == 1)
        finally:
            self._read = None
            now = anyio.current_time()
            for wait in waits:
                # Without an answer, each looks first for what may have been lost.
                if not wait.done and (not answered or wait.until <= now):
                    wait.finish(None)
            read.ended.set()

    async def _share(self, read: _Read, reply: Any) -> None:
        alone = len(read.waits) == 1
        if isinstance(reply, ServerError):
            if leads_elsewhere(reply):
                # It was this connection's server. The shared connection may already be on the right one.
                await self.aclose()
            for wait in read.waits.values():
                wait.finish(reply, alone=alone)
        elif alone:
            if reply is not None:
                self._deliver(next(iter(read.waits.values())), reply)
        elif reply is not None:
            try:
                for part in reply:
                    self._deliver(read.waits[part[0]], [part])
            except UNEXPECTED:
                await self.abandon()
                for wait in read.waits.values():
                    if not wait.done:
                        wait.finish(None, unexpected_reply(self._settings.place, reply))

    def _deliver(self, wait: Wait, reply: Any) -> None:
        if self._waits.get(wait.name) is wait:
            wait.finish(reply)
        else:
            self._release(reply)

    def _lost(self) -> None:
        if self._read is not None:
            for wait in self._read.waits.values():
                wait.track.lose()

    def _end(self, read: _Read) -> None:
        """Make the server answer a read under way, so that the next one names other streams."""
        if not read.is_ending:
            read.is_ending = True
            self._tasks.start_soon(self._unblock_until_ended, read)

    async def _unblock_until_ended(self, read: _Read) -> None:
        """Repeated, because the blocking command may not have reached the server yet."""
        pause = _GATHERED
        with anyio.CancelScope(shield=True):
            while not read.ended.is_set():
                await anyio.sleep(pause)
                client_id = self._reader.client_id
                if not client_id or read.ended.is_set():
                    continue
                try:
                    if await self._unblock(client_id):
                        return
                except Exception:
                    return  # the shared connection failed: the blocking command ends after its own time
                # Perhaps this connection leads to another server than the shared one (after a failover).
                pause = min(2 * pause, _LONGEST_PAUSE)
