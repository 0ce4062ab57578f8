"""The keys of one topic and one group in memory: which are claimed, and which are completed. Nothing here awaits."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from ..abc import Claim

_CLEANED = 16
"""How many ends one call looks at to forget keys. Each call adds one end at most, so this keeps up."""


@dataclass
class _Key:
    """What is known of a key.

    :ivar until: when the claim's lease ends, or when the completion is forgotten.
    :ivar consumer: who has claimed it; None = it is completed.
    """

    until: float
    consumer: str | None
    entry: str = ""


class KeyTable:
    """Claims and completions. Every method takes the time in seconds."""

    def __init__(self) -> None:
        self._keys: dict[str, _Key] = {}
        self._ends: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def claim(self, key: str, consumer: str, entry: str, lease: float, now: float) -> Claim:
        self._clean(now)
        known = self._keys.get(key)
        if known is not None and known.until > now:
            if known.consumer is None:
                return Claim("completed")
            if known.entry != entry:
                return Claim("busy", known.until - now)
        self._put(key, _Key(now + lease, consumer, entry))
        return Claim("claimed")

    def renew(self, key: str, consumer: str, lease: float, now: float) -> None:
        self._clean(now)
        known = self._keys.get(key)
        if known is not None and known.consumer == consumer:
            self._put(key, _Key(now + lease, consumer, known.entry))

    def complete(self, key: str, window: float, now: float) -> None:
        self._clean(now)
        self._put(key, _Key(now + window, None))

    def release(self, key: str, consumer: str) -> None:
        known = self._keys.get(key)
        if known is not None and known.consumer == consumer:
            del self._keys[key]

    def is_completed(self, key: str, now: float) -> bool:
        known = self._keys.get(key)
        return known is not None and known.consumer is None and known.until > now

    def _put(self, key: str, known: _Key) -> None:
        self._keys[key] = known
        heapq.heappush(self._ends, (known.until, key))

    def _clean(self, now: float) -> None:
        for _ in range(_CLEANED):
            if not self._ends or self._ends[0][0] > now:
                return
            until, key = heapq.heappop(self._ends)
            known = self._keys.get(key)
            if known is not None and known.until <= until:
                del self._keys[key]
