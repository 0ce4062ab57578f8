"""Upkeep of a group: keeps its floors, and removes dead consumers. Done at intervals, by every member."""

from __future__ import annotations

import math
from typing import Final

import anyio

from . import _scripts as scripts
from ._client import Client
from ._keys import meta
from ._protocol import Command

_FLOOR_INTERVAL: Final = 5.0
_UNCHANGED_FLOOR_INTERVAL: Final = 60.0
"""The floor may be gone from the server (after a failover, for example) although the group has not changed."""

_REAP_AT_MOST_EVERY: Final = 1.0


class Upkeep:
    """Tells what is to be done for a group now. The replies need not be awaited."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._kept_at: dict[tuple[str, str], float] = {}
        self._reaped_at: dict[tuple[str, str], float] = {}
        self._changed: set[tuple[str, str]] = set()

    def forget(self, stream: str, group: str) -> None:
        self._kept_at.pop((stream, group), None)
        self._reaped_at.pop((stream, group), None)
        self._changed.discard((stream, group))

    def commands(
        self, stream: str, retry_stream: str, group: str, consumer: str, min_idle: float, *, floors: bool = True
    ) -> list[Command]:
        """
        :param floors: whether the floors may have changed since the last call.
        """
        now, key = anyio.current_time(), (stream, group)
        due: list[Command] = []
        if floors:
            self._changed.add(key)
        interval = _FLOOR_INTERVAL if key in self._changed else _UNCHANGED_FLOOR_INTERVAL
        if now - self._kept_at.get(key, -math.inf) >= interval:
            self._kept_at[key] = now
            self._changed.discard(key)
            keys = (stream, meta(stream), retry_stream, meta(retry_stream))
            due.append(self._client.unwatched(scripts.FLOOR, keys, (group,)))
        if now - self._reaped_at.setdefault(key, now) >= max(min_idle, _REAP_AT_MOST_EVERY):
            self._reaped_at[key] = now
            silent = int(max(2 * min_idle, 5.0) * 1000)
            due += [
                self._client.unwatched(scripts.REAP, (name,), (group, consumer, silent))
                for name in (stream, retry_stream)
            ]
        return due
