"""While a group's lease is being changed, nothing that is being handled is taken over."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from trio.testing import MockClock

from anybus import Delivery, MemoryBackend, Message, StreamBus, StreamBusOptions, SubscriptionConfig


@pytest.fixture(params=[pytest.param(0, id="trio")])
def anyio_backend() -> Any:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


@pytest.mark.parametrize(("before", "after"), [(60.0, 2.0), (2.0, 60.0), (9.0, 1.0)])
@pytest.mark.parametrize("holder", ["old", "new"])
async def test_a_message_that_is_being_handled_is_handled_once(before: float, after: float, holder: str) -> None:
    backend = MemoryBackend()
    handled: list[str] = []
    began, finished = anyio.Event(), anyio.Event()

    def handler(name: str) -> Any:
        async def handle(delivery: Delivery) -> None:
            handled.append(name)
            began.set()
            await anyio.sleep(90)
            finished.set()

        return handle

    config = SubscriptionConfig("orders", "g", group_start_id="0")
    old = StreamBusOptions(claim_idle_timeout=before)
    new = StreamBusOptions(claim_idle_timeout=after, change_lease=True)
    async with StreamBus(backend, old) as first, StreamBus(backend, new) as second:
        async with first.subscribe(config, handler("old")) as one:
            if holder == "old":
                await first.publish(Message("orders"))
                await began.wait()
                # Just before it is renewed: by then it has been idle for as long as it ever is.
                await anyio.sleep(before / 3 - 0.01)
            async with second.subscribe(config, handler("new")) as other:
                if holder == "new":
                    one.pause()
                    await second.publish(Message("orders"))
                    await began.wait()
                    one.resume()
                await finished.wait()
                await anyio.sleep(after)
                assert handled == [holder]
                for subscription in (one, other):
                    assert subscription.statistics().leases_lost == 0
                    assert subscription.statistics().reclaimed == 0
