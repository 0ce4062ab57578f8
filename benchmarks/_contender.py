"""The bus, with the same tasks as its floors and peers."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass

import anyio
from _costs import IdleMeter, Stopwatch
from _figures import Measured
from _peers import Latencies
from _wire import AT_ONCE, GROUP, TOPIC, check_drained, check_length, clear, forget_group

import anybus
from anybus import Delivery, Message, Observer, StreamBus, StreamBusOptions, SubscriptionConfig
from anybus.abc import BusEvent
from anybus.backends.redis import RedisBackend


def connect(port: int, observer: Observer | None = None) -> StreamBus:
    options = StreamBusOptions(group_start_id="0", publish_timeout=60, observer=observer)
    return anybus.connect(f"redis://127.0.0.1:{port}", options)


async def nothing_pending(bus: StreamBus) -> None:
    """Wait until the server has nothing pending."""
    assert isinstance(bus.backend, RedisBackend)
    while await bus.backend.pending_entries(TOPIC, GROUP, limit=1):
        await anyio.sleep(0.0005)


async def drain(port: int, count: int) -> Measured:
    """From subscribing until nothing is pending. The handler does nothing."""
    handled = 0
    done = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        nonlocal handled
        handled += 1
        if handled == count:
            done.set()

    async with connect(port) as bus:
        watch = Stopwatch(port)
        async with bus.subscribe(SubscriptionConfig(TOPIC, GROUP, max_in_flight=256), handler):
            await done.wait()
            await nothing_pending(bus)
            measured = watch.stop(count)
    check_drained(port, count)
    forget_group(port)
    return measured


@dataclass(frozen=True)
class Memory:
    """The most that a drain needed.

    :ivar held: entries held at once.
    :ivar traced: bytes that Python allocated in addition to those at the start.
    """

    held: int
    traced: int


async def drain_measured(port: int, count: int, max_pending_acks: int) -> Memory:
    """A drain that also looks at statistics and allocations. This makes it slow, so it measures no time."""
    handled = held = 0
    done = anyio.Event()

    async with connect(port) as bus:

        async def handler(delivery: Delivery) -> None:
            nonlocal handled, held
            handled += 1
            if handled % 16 == 0:
                held = max(held, subscription.statistics().held)
            if handled == count:
                done.set()

        config = SubscriptionConfig(TOPIC, GROUP, max_in_flight=256, max_pending_acks=max_pending_acks)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        async with bus.subscribe(config, handler) as subscription:
            await done.wait()
            await nothing_pending(bus)
        peak = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
    check_drained(port, count)
    forget_group(port)
    return Memory(held, peak)


async def publish_from_tasks(port: int, count: int, tasks: int) -> Measured:
    """Each task repeats: create a message, publish it, wait for its id."""
    clear(port)
    async with connect(port) as bus:

        async def publish(numbers: range) -> None:
            for number in numbers:
                await bus.publish(Message(TOPIC, b"x" * 300, key=str(number)))

        watch = Stopwatch(port)
        async with anyio.create_task_group() as group:
            for number in range(tasks):
                group.start_soon(publish, range(number, count, tasks))
        measured = watch.stop(count)
    check_length(port, count)
    return measured


async def publish_one_by_one(port: int, count: int) -> Measured:
    return await publish_from_tasks(port, count, 1)


async def publish_batches(port: int, messages: Sequence[Message]) -> Measured:
    """In batches of 200."""
    clear(port)
    async with connect(port) as bus:
        watch = Stopwatch(port)
        for start in range(0, len(messages), AT_ONCE):
            outcome = await bus.publish_batch(messages[start : start + AT_ONCE])
            outcome.raise_for_errors()
        measured = watch.stop(len(messages))
    check_length(port, len(messages))
    return measured


class _AckTimes(Observer):
    def __init__(self) -> None:
        self.at: dict[str | None, float] = {}

    def on_settled(self, event: BusEvent) -> None:
        self.at[event.message_id] = time.perf_counter()


async def latencies(port: int, count: int, interval: float) -> Latencies:
    """Publish one message per interval to a subscription whose reader blocks on an empty stream."""
    clear(port)
    seen = Latencies(count)
    acks = _AckTimes()
    ids: list[str] = [""] * count
    left = count
    done = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        nonlocal left
        number = int(delivery.message.key)
        seen.handled_at[number] = time.perf_counter()
        ids[number] = delivery.id
        left -= 1
        if not left:
            done.set()

    async with connect(port, acks) as bus, bus.subscribe(SubscriptionConfig(TOPIC, GROUP), handler):
        await anyio.sleep(0.2)
        begin = time.perf_counter()
        for number in range(count):
            await anyio.sleep(max(0.0, begin + number * interval - time.perf_counter()))
            seen.published[number] = time.perf_counter()
            await bus.publish(Message(TOPIC, b"x" * 300, key=str(number)))
        await done.wait()
        await nothing_pending(bus)
        await anyio.sleep(0.05)
    check_drained(port, count)
    seen.acked_at = [acks.at[message_id] for message_id in ids]
    return seen


async def slow_handlers(port: int, count: int, each: float, concurrency: int) -> float:
    """Seconds for ``count`` handlers that sleep, until nothing is pending."""
    left = count
    done = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        nonlocal left
        await anyio.sleep(each)
        left -= 1
        if not left:
            done.set()

    async with connect(port) as bus:
        started = time.perf_counter()
        async with bus.subscribe(SubscriptionConfig(TOPIC, GROUP, max_in_flight=concurrency), handler):
            await done.wait()
            await nothing_pending(bus)
            taken = time.perf_counter() - started
    check_drained(port, count)
    forget_group(port)
    return taken


async def idle(port: int, seconds: float) -> Measured:
    """A subscription to an empty stream."""
    clear(port)

    async def handler(delivery: Delivery) -> None:
        return

    async with connect(port) as bus, bus.subscribe(SubscriptionConfig(TOPIC, GROUP), handler):
        await anyio.sleep(1)
        meter = IdleMeter(port)
        await anyio.sleep(seconds)
        return meter.read()
