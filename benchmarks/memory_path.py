"""The whole path in memory, compared with a bare AnyIO memory stream of the same buffer size in the same run.

The path: ``publish_batch`` of prepared messages, read, handle (the handler does nothing), automatic ack. It includes
ledger, leases and statistics, and ends when nothing is pending on the backend. The floor: two tasks pass the same
objects through a memory object stream with ``send`` and ``receive``. Both alternate round by round, and their medians
are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import anyio

from anybus import Delivery, MemoryBackend, Message, StreamBus, StreamBusOptions, SubscriptionConfig

TOPIC, GROUP, BATCH = "bench.memory", "bench", 500
LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}


def prepare(count: int) -> list[Message]:
    return [Message(TOPIC, b"x" * 300, key=str(number)) for number in range(count)]


async def whole_path(messages: list[Message], max_in_flight: int) -> float:
    """Messages per second, from the first publish until nothing is pending."""
    backend = MemoryBackend()
    handled = 0
    done = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        nonlocal handled
        handled += 1
        if handled == len(messages):
            done.set()

    async with StreamBus(backend, StreamBusOptions(publish_timeout=60)) as bus:
        config = SubscriptionConfig(TOPIC, GROUP, max_in_flight=max_in_flight)
        async with bus.subscribe(config, handler):
            started = time.perf_counter()
            for start in range(0, len(messages), BATCH):
                outcome = await bus.publish_batch(messages[start : start + BATCH])
                outcome.raise_for_errors()
            await done.wait()
            while await backend.pending_entries(TOPIC, GROUP, limit=1):
                await anyio.sleep(0)
            return len(messages) / (time.perf_counter() - started)


async def bare_stream(messages: list[Message], max_in_flight: int) -> float:
    """Messages per second through a memory object stream that holds as many messages as the bus may hold."""
    send, receive = anyio.create_memory_object_stream[Message](2 * max_in_flight)

    async def produce() -> None:
        async with send:
            for message in messages:
                await send.send(message)

    started = time.perf_counter()
    async with anyio.create_task_group() as tasks, receive:
        tasks.start_soon(produce)
        for _ in messages:
            await receive.receive()
    return len(messages) / (time.perf_counter() - started)


def spread(figures: list[float]) -> str:
    return f"{statistics.median(figures):>9,.0f}/s ({min(figures):,.0f} to {max(figures):,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-in-flight", type=int, default=256)
    parser.add_argument("--loop", choices=LOOPS, action="append")
    arguments = parser.parse_args()
    messages = prepare(arguments.messages)
    for loop in arguments.loop or LOOPS:
        paths: list[float] = []
        floors: list[float] = []
        for _ in range(arguments.rounds):
            paths.append(anyio.run(whole_path, messages, arguments.max_in_flight, **LOOPS[loop]))
            floors.append(anyio.run(bare_stream, messages, arguments.max_in_flight, **LOOPS[loop]))
        ratio = statistics.median(paths) / statistics.median(floors)
        print(f"{loop:8} path {spread(paths)}  bare stream {spread(floors)}  ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
