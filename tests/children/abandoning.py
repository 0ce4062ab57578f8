"""A program that enters a bus by hand and never leaves it: a child of ``test_abandoned_bus.py``.

``abandoning.py asyncio.run|asyncio|uvloop|trio URL WAY TOPIC``. It always ends with the ``LookupError`` that its main
function raises; the ways differ in what it has left open by then.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import anyio

import anybus
from anybus import Delivery, Message, StreamBus, StreamBusOptions, SubscriptionConfig

TOPIC = sys.argv[4]
CONFIG = SubscriptionConfig(TOPIC, "g", group_start_id="0")
kept: list[Any] = []


async def entered(url: str) -> StreamBus:
    bus = anybus.connect(url, StreamBusOptions(claim_idle_timeout=60, publish_buffer_size=100))
    await bus.__aenter__()
    await bus.publish(Message(TOPIC))
    return bus


async def subscribed(bus: StreamBus, *, asleep: bool) -> None:
    at_work = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        at_work.set()
        if asleep:
            await anyio.sleep_forever()

    subscription = bus.subscribe(CONFIG, handler)
    kept.append(subscription)
    await subscription.__aenter__()
    await at_work.wait()


async def bus_only(url: str) -> None:
    kept.append(await entered(url))
    raise LookupError("the program's own")


async def with_subscription(url: str) -> None:
    kept.append(await entered(url))
    await subscribed(kept[0], asleep=False)
    raise LookupError("the program's own")


async def in_a_handler(url: str) -> None:
    kept.append(await entered(url))
    await subscribed(kept[0], asleep=True)
    raise LookupError("the program's own")


async def pulling(url: str) -> None:
    kept.append(await entered(url))
    stream = kept[0].deliveries(CONFIG)
    kept.append(stream)
    await (await stream.__aenter__()).receive()
    raise LookupError("the program's own")


async def generator(url: str) -> None:
    async def buses() -> AsyncGenerator[StreamBus, None]:
        async with anybus.connect(url) as bus:
            yield bus

    kept.append(buses())
    await anext(kept[0])
    raise LookupError("the program's own")


async def elsewhere(url: str) -> None:
    """The bus is entered in a task that has ended by now."""
    kept.append(await asyncio.create_task(entered(url)))
    await kept[0].publish(Message(TOPIC))
    raise LookupError("the program's own")


async def beside(url: str) -> None:
    """The bus is entered in a task that is cancelled with all others, after the bus's own or before."""

    async def hold() -> None:
        bus = await entered(url)
        kept.append(bus)
        await subscribed(bus, asleep=True)
        at_work.set()
        await anyio.sleep_forever()

    at_work = anyio.Event()
    kept.append(asyncio.create_task(hold()))
    await at_work.wait()
    raise LookupError("the program's own")


async def disconnected(url: str) -> None:
    """The connection is down, and something waits for it."""
    kept.append(await entered(url))
    await subscribed(kept[0], asleep=True)
    kept[0].backend._client.mux.reset()
    with suppress(anybus.BackendError):
        await kept[0].publish(Message(TOPIC))
    kept[0].backend._client.mux.reset()
    raise LookupError("the program's own")


async def scheduled(url: str) -> None:
    """A delayed message waits, and one was about to be appended."""
    kept.append(await entered(url))
    for delay in (3600, 0.3):
        await kept[0].publish_later(Message(TOPIC), delay=delay)
    raise LookupError("the program's own")


async def recurring(url: str) -> None:
    """A schedule was entered by hand, too."""
    kept.append(await entered(url))
    kept.append(kept[0].schedule("s", Message(TOPIC), every=0.1))
    await kept[1].__aenter__()
    raise LookupError("the program's own")


async def once_only(url: str) -> None:
    """A handler runs, with its key claimed."""
    kept.append(await entered(url))
    at_work = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        at_work.set()
        await anyio.sleep_forever()

    subscription = kept[0].subscribe(replace(CONFIG, guarantee="exactly-once"), handler)
    kept.append(subscription)
    await subscription.__aenter__()
    await at_work.wait()
    raise LookupError("the program's own")


async def in_the_buffer(url: str) -> None:
    """Something is about to be sent, and something that is to be confirmed."""
    kept.append(await entered(url))
    kept[0].publish_nowait(Message(TOPIC))
    with suppress(anybus.UnsupportedError):
        kept[0].publish_nowait(Message(TOPIC), anybus.PublishOptions(confirmation="replicated"))
    raise LookupError("the program's own")


WAYS: dict[str, Callable[[str], Awaitable[None]]] = {
    way.__name__: way
    for way in (
        bus_only,
        scheduled,
        recurring,
        once_only,
        in_the_buffer,
        with_subscription,
        in_a_handler,
        pulling,
        generator,
        elsewhere,
        beside,
        disconnected,
    )
}

if __name__ == "__main__":
    runner, url, way = sys.argv[1:4]
    if runner == "asyncio.run":
        asyncio.run(WAYS[way](url))  # type: ignore[arg-type]
    elif runner == "trio":
        anyio.run(WAYS[way], url, backend="trio")
    else:
        anyio.run(WAYS[way], url, backend="asyncio", backend_options={"use_uvloop": runner == "uvloop"})
