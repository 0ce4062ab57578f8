"""An idempotency store in this process's memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import anyio
from anyio.lowlevel import checkpoint

from ..abc import Claim, IdempotencyStore
from .table import KeyTable


class MemoryStore(IdempotencyStore):
    """Remembers keys in this process's memory: for tests, and for buses of one process.

    It uses AnyIO's clock. What it remembers is lost with the process.

    :param find: where the keys of a topic and a group are; None = in this store.
    """

    def __init__(self, find: Callable[[str, str], KeyTable] | None = None) -> None:
        self._tables: defaultdict[tuple[str, str], KeyTable] = defaultdict(KeyTable)
        self._find = find or self._own

    def _own(self, topic: str, group: str) -> KeyTable:
        return self._tables[topic, group]

    async def claim(self, topic: str, group: str, key: str, consumer: str, *, entry: str, lease: float) -> Claim:
        await checkpoint()
        return self._find(topic, group).claim(key, consumer, entry, lease, anyio.current_time())

    async def renew(self, topic: str, group: str, keys: Sequence[str], consumer: str, *, lease: float) -> None:
        await checkpoint()
        table, now = self._find(topic, group), anyio.current_time()
        for key in keys:
            table.renew(key, consumer, lease, now)

    async def complete(self, topic: str, group: str, key: str, consumer: str, *, window: float) -> None:
        await checkpoint()
        self._find(topic, group).complete(key, window, anyio.current_time())

    async def release(self, topic: str, group: str, key: str, consumer: str) -> None:
        await checkpoint()
        self._find(topic, group).release(key, consumer)
