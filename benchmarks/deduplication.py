"""What an idempotency key costs a publish, beside the same publish without one, in one run.

In memory and on a server of its own; one by one from 100 tasks, and in batches of 200. All ways alternate round by
round, and their medians are compared. Each key is new, as in normal work. The windows of earlier rounds are over while
later ones run, so removing what is over is part of the cost. ``key as data`` are messages that have a key of their own
and are published without the option. Last comes what a kept key takes of the server's memory.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Awaitable, Callable
from functools import partial

import anyio
from _costs import Stopwatch
from _figures import LOOPS, Measured, interleave, show, show_costs
from _server import own_server
from _wire import Wire

import anybus
from anybus import Message, PublishOptions, StreamBus, StreamBusOptions

TASKS, BATCH, SIZE = 100, 200, 300
WINDOW = 0.5
"""Seconds. Short, so that keys are removed at the rate at which they are added."""

PLAIN, DATA, ONCE = "without a key", "key as data", "deduplicated"
CONTESTANTS: dict[str, tuple[bool, PublishOptions | None]] = {
    PLAIN: (False, None),
    DATA: (True, None),
    ONCE: (True, PublishOptions(deduplication_window=WINDOW)),
}

Way = Callable[[StreamBus, list[Message], PublishOptions | None], Awaitable[None]]

_numbers = itertools.count()


async def one_by_one(bus: StreamBus, messages: list[Message], options: PublishOptions | None) -> None:
    async def work(first: int) -> None:
        for message in messages[first::TASKS]:
            await bus.publish(message, options)

    async with anyio.create_task_group() as tasks:
        for first in range(TASKS):
            tasks.start_soon(work, first)


async def in_batches(bus: StreamBus, messages: list[Message], options: PublishOptions | None) -> None:
    for start in range(0, len(messages), BATCH):
        outcome = await bus.publish_batch(messages[start : start + BATCH], options)
        outcome.raise_for_errors()


async def measure(url: str, port: int | None, way: Way, count: int, name: str) -> Measured:
    has_key, options = CONTESTANTS[name]
    topic = f"bench.{name}"
    keys = [f"order-{next(_numbers)}" if has_key else None for _ in range(count)]
    messages = [Message(topic, b"x" * SIZE, idempotency_key=key) for key in keys]
    async with anybus.connect(url, StreamBusOptions(publish_timeout=60)) as bus:
        watch = Stopwatch(port)
        await way(bus, messages, options)
        return watch.stop(count)


async def bytes_per_key(port: int) -> float:
    """What the server keeps for one key of 20 bytes, while its window lasts."""
    keys, topic = 20_000, "bench.bytes"
    async with anybus.connect(f"redis://127.0.0.1:{port}") as bus:
        messages = [Message(topic, idempotency_key=f"order-{index:014}") for index in range(keys)]
        await in_batches(bus, messages, PublishOptions(deduplication_window=3600))
    wire = Wire(port)
    names = [f"anybus:{{{topic}}}:dedup:{part}" for part in ("ids", "ends")]
    sizes = [int(wire.call("MEMORY", "USAGE", name, "SAMPLES", "0")) for name in names]
    wire.close()
    return sum(sizes) / keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loop", choices=LOOPS, action="append")
    arguments = parser.parse_args()
    with own_server() as server:
        places: dict[str, tuple[str, int | None]] = {
            "in memory": ("memory://", None),
            "on a server": (f"redis://127.0.0.1:{server.port}", server.port),
        }
        ways: dict[str, Way] = {f"one by one from {TASKS} tasks": one_by_one, f"in batches of {BATCH}": in_batches}
        for loop in arguments.loop or ("asyncio", "trio"):
            for place, (url, port) in places.items():
                for text, way in ways.items():
                    show("publish", loop, f"{place}, {text}")
                    contestants = {
                        name: partial(anyio.run, measure, url, port, way, arguments.messages, name, **LOOPS[loop])
                        for name in CONTESTANTS
                    }
                    show_costs("publish", loop, interleave(contestants, arguments.rounds), PLAIN)
        show("memory ", "", f"{anyio.run(bytes_per_key, server.port):.0f} bytes for each key that is kept")


if __name__ == "__main__":
    main()
