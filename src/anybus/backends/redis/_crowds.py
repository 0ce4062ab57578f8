"""Remembers in which groups the entries have many owners. An acknowledgement does not ask for all of them each time."""

from __future__ import annotations

import anyio

_REMEMBERED = 60.0


class Crowds:
    """The number of other owners in a group, for a minute, if it was too large for an acknowledgement."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[int, float]] = {}

    def saw(self, stream: str, group: str, others: int) -> None:
        self._seen[stream, group] = others, anyio.current_time() + _REMEMBERED

    def is_too_large(self, stream: str, group: str, count: int) -> bool:
        """Whether there are too many other owners to acknowledge ``count`` entries together. The script says when."""
        if not self._seen:
            return False
        others, until = self._seen.get((stream, group), (0, 0.0))
        return others > count / 4 and anyio.current_time() < until

    def forget(self, stream: str, group: str) -> None:
        self._seen.pop((stream, group), None)
