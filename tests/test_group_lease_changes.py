"""While a group's lease is being changed, nothing that is being handled is taken over."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from trio.testing import MockClock

from anybus import (
    BackendError,
    Delivery,
    MemoryBackend,
    Message,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
)


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


async def test_who_has_learnt_of_a_shorter_lease_takes_nothing_from_who_has_not_yet() -> None:
    backend = MemoryBackend()
    handled: list[str] = []
    began, go_on = anyio.Event(), anyio.Event()

    def handler(name: str) -> Any:
        async def handle(delivery: Delivery) -> None:
            handled.append(name)
            began.set()
            await go_on.wait()

        return handle

    config = SubscriptionConfig("orders", "g", group_start_id="0")
    old = StreamBusOptions(claim_idle_timeout=60.0)
    new = StreamBusOptions(claim_idle_timeout=2.0, change_lease=True)
    async with StreamBus(backend, old) as first, StreamBus(backend, old) as second, StreamBus(backend, new) as third:
        async with first.subscribe(config, handler("early")):
            await anyio.sleep(3)
            async with second.subscribe(config, handler("late")) as late:
                # `early` looks at 5, 10, 15, 20...; `late` at 8, 13, 18, 23...
                await anyio.sleep(1)
                await second.publish(Message("orders"))
                await began.wait()
                holder = handled[0]
                await anyio.sleep(15 if holder == "late" else 12.5)  # until 19 or 16.5: the other one looks first
                async with third.subscribe(config, handler("new")) as newest:
                    await anyio.sleep(20)
                    assert handled == [holder]
                    assert late.statistics().leases_lost == newest.statistics().reclaimed == 0
                    go_on.set()


async def test_a_newcomer_that_lost_a_reply_is_patient_all_the_same() -> None:
    backend: Any = MemoryBackend()
    handled: list[str] = []
    began, go_on = anyio.Event(), anyio.Event()
    agree = backend.agree_lease

    def handler(name: str) -> Any:
        async def handle(delivery: Delivery) -> None:
            handled.append(name)
            began.set()
            await go_on.wait()

        return handle

    lost = 0

    async def lose_the_reply(*args: Any, change: bool = False) -> float:
        nonlocal lost
        running = float(await agree(*args, change=change))
        if change and not lost:
            lost += 1
            raise BackendError("connection lost", may_have_happened=True)
        return running

    config = SubscriptionConfig("orders", "g", group_start_id="0")
    old = StreamBusOptions(claim_idle_timeout=60.0)
    new = StreamBusOptions(claim_idle_timeout=2.0, change_lease=True)
    async with StreamBus(backend, old) as first, StreamBus(backend, new) as second:
        async with first.subscribe(config, handler("old")):
            await first.publish(Message("orders"))
            await began.wait()
            await anyio.sleep(15.1)  # it has just looked, and last renewed the message when it took it
            backend.agree_lease = lose_the_reply
            async with second.subscribe(config, handler("new")):
                await anyio.sleep(20)
                assert lost == 1
                assert handled == ["old"]
                go_on.set()
