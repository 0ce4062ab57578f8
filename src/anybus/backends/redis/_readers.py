"""Which member waits for new entries on which connection.

While a group has few members, each has a connection of its own. From a number on, they share connections. A member to
which entries have just come leaves the shared one for a while, so that the others are not disturbed by every entry.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from ._settings import Settings
from ._shared_reader import SharedReader, Wait

FEW: Final = 16
"""As long as there are fewer connections than this, a new member gets one of its own."""

_CROWDED: Final = 64
"""Beyond that, a group opens another connection for each so many members, until it has 16."""

_MOST_APART: Final = 3

_LIVELY: Final = 2.0
"""For so many seconds after its last entry, a member may have a connection of its own."""

Member = tuple[str, str, str]


class _Pool:
    """The connections of the members of one group that have the same name."""

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.shared: list[SharedReader] = []
        self.place: dict[str, SharedReader] = {}
        self.own: dict[str, SharedReader] = {}


class Readers:
    """The connections for blocking reads.

    :param together: streams with the same result may be named in one command.
    :param release: called with a member's stream, group and consumer, and with a reply that nobody waits for any more.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        unblock: Callable[[int], Awaitable[bool]],
        together: Callable[[str], Hashable],
        release: Callable[[str, str, Any], None],
    ) -> None:
        self._settings = settings
        self._unblock = unblock
        self._together = together
        self._release = release
        self._tasks: TaskGroup | None = None
        self._pools: dict[Hashable, _Pool] = {}
        self._pool_of: dict[Member, _Pool] = {}
        self._shared = 0
        self._apart = 0

    def start(self, tasks: TaskGroup) -> None:
        self._tasks = tasks

    async def aclose(self) -> None:
        for pool in list(self._pools.values()):
            for reader in (*pool.shared, *pool.own.values()):
                await reader.aclose()

    async def forget(self, member: Member) -> None:
        stream = member[0]
        pool = self._pool_of.pop(member, None)
        if pool is None:
            return
        await self._close_own(pool, stream)
        reader = pool.place.pop(stream, None)
        if reader is not None:
            reader.members.discard(stream)
            if not reader.members:
                pool.shared.remove(reader)
                self._shared -= 1
                await reader.aclose()
        if not pool.place:
            self._pools.pop(pool.key, None)

    async def wait(self, member: Member, wait: Wait, longest_block: float) -> SharedReader:
        """Wait for entries. Returns the connection on which the reply came. Raises as ``SharedReader.wait`` does."""
        stream, group, consumer = member
        pool = self._pool_of.get(member)
        if pool is None:
            key = (group, consumer, self._together(stream))
            pool = self._pool_of[member] = self._pools.setdefault(key, _Pool(key))
        while True:
            reader = self._reader_of(pool, stream, group, consumer, wait)
            apart = pool.own.get(stream) is reader
            try:
                await reader.wait(wait, longest_block, once=apart)
            finally:
                if apart and not wait.reply and not self._is_lively(wait):
                    await self._close_own(pool, stream)  # noqa: ASYNC102 - shielded inside
            if not apart or wait.reply is not None or anyio.current_time() >= wait.until:
                return reader
            wait.done = False

    async def _close_own(self, pool: _Pool, stream: str) -> None:
        own = pool.own.pop(stream, None)
        if own is not None:
            self._apart -= 1
            await own.aclose()

    def _is_lively(self, wait: Wait) -> bool:
        return anyio.current_time() - wait.track.came_at < _LIVELY

    def _reader_of(self, pool: _Pool, stream: str, group: str, consumer: str, wait: Wait) -> SharedReader:
        own = pool.own.get(stream)
        if own is not None:
            return own
        reader = pool.place.get(stream)
        if reader is None:
            if self._shared < FEW or len(pool.shared) < min(FEW, math.ceil((len(pool.place) + 1) / _CROWDED)):
                reader = self._open(group, consumer)
                pool.shared.append(reader)
                self._shared += 1
            else:
                reader = min(pool.shared, key=lambda reader: len(reader.members))
            reader.members.add(stream)
            pool.place[stream] = reader
        if len(reader.members) > 1 and self._apart < _MOST_APART and self._is_lively(wait):
            pool.own[stream] = reader = self._open(group, consumer)
            self._apart += 1
        return reader

    def _open(self, group: str, consumer: str) -> SharedReader:
        assert self._tasks is not None

        def release(reply: Any) -> None:
            self._release(group, consumer, reply)

        return SharedReader(self._settings, group, consumer, unblock=self._unblock, tasks=self._tasks, release=release)
