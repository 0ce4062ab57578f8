"""The backend of ``backend.py`` with two features: it renews leases, and it releases entries.

The handler takes longer than the lease, and two consumers share the work. Each message is handled once, because the
bus renews its lease. Without ``renew`` the other consumer would take over each message and handle it again.

    python examples/backend_with_features.py [asyncio|trio]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import anyio
from anyio.lowlevel import checkpoint
from backend import DictBackend, Pending

from anybus import Delivery, Message, StreamBus, StreamBusOptions, SubscriptionConfig
from anybus.abc import Feature


class LeasingBackend(DictBackend):
    features: frozenset[Feature] = frozenset({"renew", "release"})

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        await checkpoint()
        owned = self._owned(stream, group, consumer, message_ids)
        for entry in owned.values():
            entry.since = anyio.current_time()
        return list(owned)

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        await checkpoint()
        for entry in self._owned(stream, group, consumer, message_ids).values():
            # Nobody owns the entry now, and any consumer can reclaim it at once.
            entry.consumer, entry.since = "", -math.inf

    def _owned(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> dict[str, Pending]:
        pending = self._group(stream, group).pending
        return {
            message_id: pending[message_id]
            for message_id in message_ids
            if message_id in pending and pending[message_id].consumer == consumer
        }


async def main() -> None:
    async def handle(delivery: Delivery) -> None:
        print("handling", delivery.message.payload.decode())
        await anyio.sleep(3)

    options = StreamBusOptions(claim_idle_timeout=1.0, reclaim_interval=0.1)
    config = SubscriptionConfig("words", "readers")
    async with (
        StreamBus(LeasingBackend(), options) as bus,
        bus.subscribe(config, handle),
        bus.subscribe(config, handle),
    ):
        for word in ("one", "two"):
            await bus.publish(Message("words", word.encode()))
        await anyio.sleep(5)


if __name__ == "__main__":
    anyio.run(main, backend=sys.argv[1] if len(sys.argv) > 1 else "asyncio")
