"""Exactly-once effects in the memory backend: keys are completed in the step of the acknowledgement."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence

import anyio
from anyio.lowlevel import checkpoint

from ..._ground.errors import EventBusError
from ..._idempotency.memory import MemoryStore
from ..._idempotency.table import KeyTable
from ...abc import Claim, CompletionKeeper, IdempotencyStore, KeyedTransfer, Output
from .store import Stream


class MemoryCompletions(CompletionKeeper):
    """The memory backend's part for exactly-once effects. The keys of a group are kept beside its topic."""

    @abc.abstractmethod
    def _stream(self, name: str) -> Stream: ...

    @abc.abstractmethod
    def _transfer(
        self, stream: str, group: str, consumer: str, message_id: str, outputs: Iterable[Output]
    ) -> list[str] | None: ...

    def _keys(self, topic: str, group: str) -> KeyTable:
        return self._stream(topic).keys[group]

    @property
    def idempotency_store(self) -> IdempotencyStore:
        return MemoryStore(self._keys)

    async def claim_keys(
        self, topic: str, group: str, consumer: str, items: Sequence[tuple[str, str]], *, lease: float
    ) -> list[Claim]:
        await checkpoint()
        keys, now = self._keys(topic, group), anyio.current_time()
        return [keys.claim(key, consumer, entry, lease, now) for key, entry in items]

    async def settle_keyed(
        self, topic: str, stream: str, group: str, consumer: str, items: Sequence[KeyedTransfer], *, window: float
    ) -> list[list[str] | EventBusError | None]:
        await checkpoint()
        keys, now = self._keys(topic, group), anyio.current_time()
        results: list[list[str] | EventBusError | None] = []
        for item in items:
            before = item.step == "complete" and keys.is_completed(item.key, now)
            ids = self._transfer(stream, group, consumer, item.id, () if before else item.outputs)
            if ids is not None and item.step == "complete":
                keys.complete(item.key, window, now)
            elif ids is not None and item.step == "release":
                keys.release(item.key, consumer)
            results.append(ids)
        return results
