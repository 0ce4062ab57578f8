"""Promise 1: at least once. A message is acked only after its handler succeeded; nothing read is ever dropped."""

from __future__ import annotations

import anyio
from harness import SOON, Harness, nothing_pending, quick, until

from anybus import Delivery, Message, StreamBus, SubscriptionConfig


async def test_a_message_is_acked_only_after_its_handler_has_returned(harness: Harness, topic: str) -> None:
    entered, leave = anyio.Event(), anyio.Event()

    async def handler(delivery: Delivery) -> None:
        entered.set()
        await leave.wait()

    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            entry_id = await bus.publish(Message(topic, b"1"))
            with anyio.fail_after(SOON):
                await entered.wait()
            assert [entry.id for entry in await harness.pending(topic, "g")] == [entry_id]
            leave.set()
            await nothing_pending(harness, topic, "g")
            await until(lambda: subscription.statistics().handled == 1)
