"""How many entries to ask for at once, where the server closes connections whose replies are too large for it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from ...abc import ClaimedMessage, FetchedEntry, MalformedEntry

_SMALL = 262_144
"""A reply that no server is too small for."""

_ENOUGH = 1024


class Appetite:
    """Half as many after every second break in a row; more again as far as replies of that size have come through.

    Without it a read of many large entries (``client-output-buffer-limit``) would break the connection for ever. What
    was asked for when a connection breaks for other reasons is as large the next time, and the time after comes
    through.
    """

    def __init__(self) -> None:
        self._most = _ENOUGH
        self._asked = 0
        self._breaks = 0
        self._last_break: Hashable = None
        self._came_through = 0

    def of(self, count: int) -> int:
        """How many to ask for instead of so many."""
        count = min(count, self._most)
        self._asked = max(self._asked, count)
        return count

    def broke(self, connection: Hashable) -> None:
        """This connection broke while entries were on their way."""
        if connection == self._last_break:
            return
        self._last_break = connection
        self._breaks += 1
        if self._breaks > 1:
            self._most = max(1, min(self._most, self._asked) // 2)
            self._asked = 0

    def came(self, entries: Iterable[FetchedEntry]) -> None:
        """These have arrived."""
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
