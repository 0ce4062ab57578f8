"""The names of a bus's consumers on the server."""

from __future__ import annotations

import os
from typing import Final

_REMEMBERED: Final = 10_000


class ConsumerNames:
    """Names of the form ``<label>-<unique>``. No two subscriptions of the same topic and group ever have the same one.

    Subscriptions of other topics, or of other groups, do have the same: so a backend can read for them together.
    """

    def __init__(self) -> None:
        self._uniques: list[str] = []
        self._used: dict[tuple[str, str, str], int] = {}

    def new(self, topic: str, group: str, label: str) -> str:
        """A name for a new subscription."""
        if _REMEMBERED in (len(self._used), len(self._uniques)):
            self._used.clear()
            self._uniques.clear()
        member = (topic, group, label)
        number = self._used[member] = self._used.get(member, 0) + 1
        if number > len(self._uniques):
            self._uniques.append(os.urandom(8).hex())
        return f"{label}-{self._uniques[number - 1]}"
