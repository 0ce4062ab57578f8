"""Promise 2: never more than ``max_in_flight`` handlers; never more than ``max_pending_acks`` entries held.

The bus asks a backend only for what it has room for, so one consumer cannot hoard.
"""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
from harness import SOON, Harness, StepByStep, nothing_pending, quick, until

from anybus import Delivery, Message, StreamBus, SubscriptionConfig


@pytest.mark.parametrize(("max_in_flight", "max_pending_acks"), [(1, 1), (1, 2), (3, 3), (4, 9), (16, 32)])
async def test_handlers_and_held_entries_never_exceed_their_limits(
    harness: Harness, topic: str, max_in_flight: int, max_pending_acks: int
) -> None:
    backend = harness.make_backend()
    running = peak = most_pending = 0
    full = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        nonlocal running, peak, most_pending
        running += 1
        peak = max(peak, running)
        if running == max_in_flight:
            full.set()
        await full.wait()
        await anyio.lowlevel.checkpoint()
        most_pending = max(most_pending, len(await harness.pending(topic, "g")))
        running -= 1

    async with StreamBus(backend, quick()) as bus:
        config = SubscriptionConfig(topic, "g", max_in_flight=max_in_flight, max_pending_acks=max_pending_acks)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish_batch([Message(topic) for _ in range(120)])
            await until(lambda: subscription.statistics().handled == 120)
            await nothing_pending(harness, topic, "g")
    assert peak == max_in_flight
    assert most_pending <= max_pending_acks


async def test_the_bus_asks_a_backend_only_for_what_it_has_room_for(harness: Harness, topic: str) -> None:
    backend = StepByStep(harness.make_backend())
    asked: list[int] = []
    held: list[int] = []
    read_new, reclaim_idle = backend.read_new, backend.reclaim_idle

    async def counting_read(stream: str, group: str, consumer: str, *, count: int, timeout: float) -> object:
        asked.append(count)
        held.append(subscription.statistics().held + count)
        return await read_new(stream, group, consumer, count=count, timeout=timeout)

    async def counting_reclaim(stream: str, group: str, consumer: str, *, min_idle: float, count: int) -> object:
        asked.append(count)
        return await reclaim_idle(stream, group, consumer, min_idle=min_idle, count=count)

    gate = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        await gate.wait()

    async with StreamBus(backend, quick()) as bus:
        await bus.publish_batch([Message(topic) for _ in range(40)])
        config = SubscriptionConfig(topic, "g", max_in_flight=4, max_pending_acks=10, group_start_id="0")
        async with bus.subscribe(config, handler) as subscription:
            backend.read_new = counting_read  # type: ignore[assignment,method-assign]
            backend.reclaim_idle = counting_reclaim  # type: ignore[assignment,method-assign]
            await until(lambda: subscription.statistics().in_flight == 4)
            await anyio.wait_all_tasks_blocked()
            # A quarter is reclaim's: a read leaves it alone.
            assert len(await harness.pending(topic, "g")) == 8
            gate.set()
            await nothing_pending(harness, topic, "g")
            await until(lambda: subscription.statistics().handled == 40)
    assert asked
    assert all(1 <= count <= 10 for count in asked)
    assert all(total <= 10 for total in held)


async def test_a_waiting_entry_goes_to_another_consumer_when_this_one_is_paused(harness: Harness, topic: str) -> None:
    gate = anyio.Event()
    elsewhere: list[str] = []

    async def stuck(delivery: Delivery) -> None:
        await gate.wait()

    async def free(delivery: Delivery) -> None:
        elsewhere.append(delivery.message.uid)

    async with StreamBus(harness.make_backend(), quick(claim_idle_timeout=60)) as bus:
        await bus.publish_batch([Message(topic) for _ in range(6)])
        hoarder = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=8, group_start_id="0")
        async with bus.subscribe(hoarder, stuck) as paused:
            await until(lambda: paused.statistics().waiting == 5)
            async with bus.subscribe(SubscriptionConfig(topic, "g"), free):
                paused.pause()
                with anyio.fail_after(SOON):
                    await until(lambda: len(elsewhere) == 5)
                assert paused.statistics().in_flight == 1
                paused.resume()
                gate.set()
                await nothing_pending(harness, topic, "g")
