"""How many entries to request at once. A server closes a connection if a reply is too large for its limits."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from ...abc import ClaimedMessage, FetchedEntry, MalformedEntry

_SMALL = 262_144
"""A reply of this size, in bytes, is allowed by every server."""

_ENOUGH = 1024


class Appetite:
    """The number of entries per request. It is halved from the second broken connection in a row on. It grows again, up
    to the size of replies that have arrived.

    Otherwise, a read of many large entries would break the connection again and again (``client-output-buffer-limit``).
    A single break has other reasons most of the time, so it changes nothing.
    """

    def __init__(self) -> None:
        self._most = _ENOUGH
        self._asked = 0
        self._breaks = 0
        self._last_break: Hashable = None
        self._came_through = 0

    def of(self, count: int) -> int:
        """How many entries to request if ``count`` are wanted."""
        count = min(count, self._most)
        self._asked = max(self._asked, count)
        return count

    def broke(self, connection: Hashable) -> None:
        """A connection broke while the reply to a request for entries was expected."""
        if connection == self._last_break:
            return
        self._last_break = connection
        self._breaks += 1
        if self._breaks > 1:
            self._most = max(1, min(self._most, self._asked) // 2)
            self._asked = 0

    def came(self, entries: Iterable[FetchedEntry]) -> None:
        """These entries have arrived."""
        if not self._breaks and self._most == _ENOUGH:
            return
        sizes = [_size(entry) for entry in entries]
        if not sizes:
            return
        self._breaks = self._asked = 0
        self._came_through = max(self._came_through, sum(sizes))
        if 2 * self._most * max(sizes) <= max(self._came_through, _SMALL):
            self._most = min(2 * self._most, _ENOUGH)


def _size(entry: FetchedEntry) -> int:
    if isinstance(entry, ClaimedMessage):
        return len(entry.message.payload) + sum(map(len, entry.message.headers.values())) + 512
    if isinstance(entry, MalformedEntry):
        return sum(map(len, entry.raw.values())) + 512
    return 64
