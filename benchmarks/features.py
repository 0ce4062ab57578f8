"""What the features of time and identity cost a message, beside the same message without them, in one run.

On a server of its own. All contestants alternate round by round, and their medians are compared: rates, and processor
time a message of this process and of the server. Deduplication, delayed messages and retention have scripts of their
own, which measure more.
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

import anybus
from anybus import Delivery, Interest, Message, PublishOptions, StreamBus, StreamBusOptions, SubscriptionConfig

TASKS, BATCH, SIZE = 100, 500, 300
PLAIN = "plain"
KEYED = PublishOptions(deduplication_window=60)

_numbers = itertools.count()

Publish = Callable[[StreamBus, str, int], Awaitable[None]]


async def one_by_one(bus: StreamBus, topic: str, count: int, options: PublishOptions | None = None) -> None:
    async def work(first: int) -> None:
        for _ in range(first, count, TASKS):
            key = f"order-{next(_numbers)}" if options is KEYED else None
            await bus.publish(Message(topic, b"x" * SIZE, idempotency_key=key), options)

    async with anyio.create_task_group() as tasks:
        for first in range(TASKS):
            tasks.start_soon(work, first)


async def without_waiting(bus: StreamBus, topic: str, count: int) -> None:
    for _ in range(count):
        while True:
            try:
                bus.publish_nowait(Message(topic, b"x" * SIZE))
                break
            except anyio.WouldBlock:
                await anyio.sleep(0)


PUBLISHING: dict[str, Publish] = {
    PLAIN: one_by_one,
    "topic_ttl": partial(one_by_one, options=PublishOptions(topic_ttl=3600)),
    "idempotency key": partial(one_by_one, options=KEYED),
    "confirmation=persisted": partial(one_by_one, options=PublishOptions(confirmation="persisted")),
    "publish_nowait": without_waiting,
}

HANDLING: dict[str, dict[str, object]] = {
    PLAIN: {},
    "expected_content_type": {"expected_content_type": "text/plain"},
    "exactly-once": {"guarantee": "exactly-once"},
    "retention=Interest": {},
    "with expires_at": {},
}


async def publish(port: int, count: int, name: str) -> Measured:
    options = StreamBusOptions(publish_timeout=60, publish_buffer_size=10_000)
    async with anybus.connect(f"redis://127.0.0.1:{port}", options) as bus:
        topic = f"bench.{name}.{next(_numbers)}"
        watch = Stopwatch(port)
        await PUBLISHING[name](bus, topic, count)
        while await bus.backend.count_entries(topic) < count:  # type: ignore[attr-defined]
            await anyio.sleep(0.001)
        return watch.stop(count)


async def handle(port: int, count: int, name: str) -> Measured:
    """Drain a backlog, until the server has nothing pending."""
    topic, done = f"bench.{name}.{next(_numbers)}", anyio.Event()
    seen = 0

    async def handler(delivery: Delivery) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            done.set()

    async with anybus.connect(f"redis://127.0.0.1:{port}", StreamBusOptions(publish_timeout=60)) as bus:
        if name == "retention=Interest":
            await bus.declare_topic(topic, Interest())
        await bus.backend.create_group(topic, "bench", "$")
        ttl = PublishOptions(topic_ttl=3600) if name == "with expires_at" else None
        for start in range(0, count, BATCH):
            size = min(BATCH, count - start)
            messages = [Message(topic, b"x" * SIZE, content_type="text/plain") for _ in range(size)]
            (await bus.publish_batch(messages, ttl)).raise_for_errors()
        watch = Stopwatch(port)
        config = SubscriptionConfig(topic, "bench", max_in_flight=256, **HANDLING[name])  # type: ignore[arg-type]
        async with bus.subscribe(config, handler):
            await done.wait()
            while await bus.backend.pending_entries(topic, "bench", limit=1):  # type: ignore[attr-defined]
                await anyio.sleep(0.001)
        return watch.stop(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop", choices=LOOPS, action="append")
    arguments = parser.parse_args()
    with own_server("--appendonly", "yes") as server:
        for loop in arguments.loop or ("asyncio", "trio"):
            for part, measure, contestants in (
                ("publish", publish, PUBLISHING),
                ("handle ", handle, HANDLING),
            ):
                show(part, loop, f"{arguments.messages} messages of {SIZE} bytes, {arguments.rounds} rounds")
                runs = {
                    name: partial(anyio.run, measure, server.port, arguments.messages, name, **LOOPS[loop])
                    for name in contestants
                }
                show_costs(part, loop, interleave(runs, arguments.rounds), PLAIN)


if __name__ == "__main__":
    main()
