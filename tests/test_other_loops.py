"""A bus belongs to the event loop in which it was entered. Used anywhere else it says so, and never hangs.

Specification (DESIGN.md, section 3: "A bus belongs to its event loop"): every public call raises ``RuntimeError`` that
says what to do instead, from another event loop's thread, from a thread without a loop, and from a second loop in the
same thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import pytest
from anyio import to_thread
from harness import SOON, Harness, quick, until

from anybus import (
    BatchOutcome,
    ClosedError,
    Delivery,
    DeliveryStream,
    MemoryBackend,
    Message,
    StreamBus,
    Subscription,
    SubscriptionConfig,
)

HANGS = 3.0
"""Seconds after which a call in another loop counts as one that hangs."""


class Scene:
    """A bus in use, and everything that it gives out."""

    def __init__(self, topic: str, bus: StreamBus, subscription: Subscription, deliveries: DeliveryStream) -> None:
        self.topic = topic
        self.bus = bus
        self.subscription = subscription
        self.deliveries = deliveries
        self.letters = bus.dead_letters(topic)
        self.delivery: Delivery

    async def enter(self, context: Any) -> None:
        async with context:
            pass

    async def first_letter(self) -> None:
        async for _ in self.bus.dead_letters(self.topic):
            pass

    @property
    def config(self) -> SubscriptionConfig:
        return SubscriptionConfig(self.topic, "other")


async def handle(delivery: Delivery) -> None:
    """Everything is fine."""


@asynccontextmanager
async def scene(harness: Harness, topic: str) -> AsyncGenerator[Scene, None]:
    async with StreamBus(harness.make_backend(), quick(claim_idle_timeout=30.0)) as bus:
        async with (
            bus.subscribe(SubscriptionConfig(topic, "g"), handle) as subscription,
            bus.deliveries(SubscriptionConfig(topic, "pulled")) as deliveries,
        ):
            await bus.publish(Message(topic))
            it = Scene(topic, bus, subscription, deliveries)
            it.delivery = await deliveries.receive()
            yield it


ASYNC: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "publish": lambda it: it.bus.publish(Message(it.topic)),
    "publish_batch": lambda it: it.bus.publish_batch([Message(it.topic)]),
    "subscribe": lambda it: it.enter(it.bus.subscribe(it.config, handle)),
    "deliveries": lambda it: it.enter(it.bus.deliveries(it.config)),
    "consume": lambda it: it.bus.consume(it.config, handle),
    "iterate dead letters": lambda it: it.first_letter(),
    "dead_letters.page": lambda it: it.letters.page(),
    "dead_letters.replay": lambda it: it.letters.replay(),
    "dead_letters.purge": lambda it: it.letters.purge(),
    "delivery.ack": lambda it: it.delivery.ack(),
    "delivery.ack(publish)": lambda it: it.delivery.ack(publish=[Message(it.topic)]),
    "delivery.nack": lambda it: it.delivery.nack(),
    "delivery.retry": lambda it: it.delivery.retry(),
    "delivery.release": lambda it: it.delivery.release(),
    "delivery.extend": lambda it: it.delivery.extend(),
    "subscription.wait_closed": lambda it: it.subscription.wait_closed(),
    "subscription.aclose": lambda it: it.subscription.aclose(),
    "stream.receive": lambda it: it.deliveries.receive(),
    "stream.aclose": lambda it: it.deliveries.aclose(),
}

PLAIN: dict[str, Callable[[Any], Any]] = {
    "dead_letters": lambda it: it.bus.dead_letters(it.topic),
    "subscribe": lambda it: it.bus.subscribe(it.config, handle),
    "deliveries": lambda it: it.bus.deliveries(it.config),
    "subscription.pause": lambda it: it.subscription.pause(),
    "subscription.resume": lambda it: it.subscription.resume(),
    "subscription.close": lambda it: it.subscription.close(),
    "subscription.abort": lambda it: it.subscription.abort(),
    "subscription.statistics": lambda it: it.subscription.statistics(),
}


async def caught(call: Callable[[], Awaitable[Any]]) -> BaseException | str:
    """What comes out of a call in the loop that runs here."""
    try:
        with anyio.move_on_after(HANGS):
            await call()
            return "it returned"
    except Exception as error:
        return error
    return "it hangs"


async def in_thread(function: Callable[[], Any]) -> Any:
    with anyio.fail_after(SOON):
        return await to_thread.run_sync(function, abandon_on_cancel=True)


def check_refusal(came_out: Any, *words: str) -> None:
    assert type(came_out) is RuntimeError, came_out
    for word in words:
        assert word in str(came_out), came_out


@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_another_loops_thread_is_refused_at_every_call_and_told_what_to_do(
    other: str, harness: Harness, topic: str
) -> None:
    async with scene(harness, topic) as it:
        for name, call in ASYNC.items():
            came_out = await in_thread(lambda call=call: anyio.run(caught, lambda: call(it), backend=other))  # type: ignore[misc]
            check_refusal(came_out, "'MainThread'", "anyio.from_thread.run(", "BlockingPortal")
            assert it.subscription.is_running, name
        # All of it works as before at home.
        await it.delivery.ack()
        assert not (await it.bus.publish_batch([Message(topic)])).errors
        assert it.subscription.is_running


@pytest.mark.parametrize("name", PLAIN)
async def test_a_thread_without_a_loop_is_refused_at_every_plain_call(name: str, harness: Harness, topic: str) -> None:
    def call() -> Any:
        try:
            return PLAIN[name](it)
        except Exception as error:
            return error

    async with scene(harness, topic) as it:
        check_refusal(await in_thread(call), "'MainThread'", "from_thread.run_sync")
        assert it.subscription.is_running
        await it.bus.publish(Message(topic))
        await until(lambda: it.subscription.statistics().handled == 2)


async def test_what_the_refusal_recommends_works(harness: Harness, topic: str) -> None:
    async with scene(harness, topic) as it, anyio.from_thread.BlockingPortal() as portal:

        def in_a_worker_thread() -> BatchOutcome:
            anyio.from_thread.run(it.bus.publish, Message(topic))
            anyio.from_thread.run(it.delivery.ack)
            anyio.from_thread.run_sync(it.subscription.pause)
            anyio.from_thread.run_sync(it.subscription.resume)
            return anyio.from_thread.run(it.bus.publish_batch, [Message(topic)])

        def in_another_thread() -> None:
            portal.call(it.bus.publish, Message(topic))
            done.append(portal.call(it.subscription.statistics))

        done: list[Any] = []
        assert (await in_thread(in_a_worker_thread)).all_ok
        thread = threading.Thread(target=in_another_thread)
        thread.start()
        await in_thread(thread.join)
        assert len(done) == 1
        await until(lambda: it.subscription.statistics().handled == 4)


async def test_what_has_ended_is_closed_wherever_it_is_used(harness: Harness, topic: str) -> None:
    async with scene(harness, topic) as it:
        pass

    def close_again() -> None:
        it.subscription.close()
        it.subscription.abort()

    await in_thread(close_again)
    came_out = await in_thread(lambda: anyio.run(caught, partial(it.bus.publish, Message(topic))))
    assert isinstance(came_out, ClosedError)


def test_a_second_loop_in_the_same_thread_is_refused() -> None:
    bus = StreamBus(MemoryBackend())
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        first.run_until_complete(bus.__aenter__())
        with pytest.raises(RuntimeError, match="inside the test"):
            second.run_until_complete(bus.publish(Message("topic")))
        with pytest.raises(RuntimeError, match="a bus for each event loop"):
            anyio.run(bus.publish, Message("topic"), backend="trio")
        first.run_until_complete(bus.publish(Message("topic")))
        first.run_until_complete(bus.__aexit__(None, None, None))
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_bus_that_its_loop_has_closed_is_closed_for_the_next_loop(backend: str) -> None:
    bus = StreamBus(MemoryBackend())
    anyio.run(bus.__aenter__, backend=backend)
    with pytest.raises((ClosedError, RuntimeError)):
        anyio.run(bus.publish, Message("topic"), backend=backend)
