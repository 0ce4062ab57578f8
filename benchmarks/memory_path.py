"""The whole path in memory, compared with a bare AnyIO memory stream of the same buffer size in the same run.

The path: ``publish_batch`` of prepared messages, read, handle (the handler does nothing), automatic ack. It includes
ledger, leases and statistics, and ends when nothing is pending on the backend. The floor: two tasks pass the same
objects through a memory object stream with ``send`` and ``receive``. Both alternate round by round, and their medians
are compared: of the rate, and of the CPU time a message.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import anyio
from _costs import Stopwatch
from _figures import BUS, FLOOR, LOOPS, RATE, Measured, interleave, ratio, show, show_costs, show_others
from _record import Others, Record, Run

from anybus import Delivery, MemoryBackend, Message, StreamBus, StreamBusOptions, SubscriptionConfig

TOPIC, GROUP, BATCH = "bench.memory", "bench", 500


def prepare(count: int) -> list[Message]:
    return [Message(TOPIC, b"x" * 300, key=str(number)) for number in range(count)]


async def whole_path(messages: list[Message], max_in_flight: int) -> Measured:
    """From the first publish until nothing is pending."""
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
            watch = Stopwatch(None)
            for start in range(0, len(messages), BATCH):
                outcome = await bus.publish_batch(messages[start : start + BATCH])
                outcome.raise_for_errors()
            await done.wait()
            while await backend.pending_entries(TOPIC, GROUP, limit=1):
                await anyio.sleep(0)
            return watch.stop(len(messages))


async def bare_stream(messages: list[Message], max_in_flight: int) -> Measured:
    """Through a memory object stream that holds as many messages as the bus may hold."""
    send, receive = anyio.create_memory_object_stream[Message](2 * max_in_flight)

    async def produce() -> None:
        async with send:
            for message in messages:
                await send.send(message)

    watch = Stopwatch(None)
    async with anyio.create_task_group() as tasks, receive:
        tasks.start_soon(produce)
        for _ in messages:
            await receive.receive()
    return watch.stop(len(messages))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-in-flight", type=int, default=256)
    parser.add_argument("--loop", choices=LOOPS, action="append")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures to this file")
    arguments = parser.parse_args()
    try:
        record = Record(arguments.json)
    except ValueError as error:
        parser.error(str(error))
    messages = prepare(arguments.messages)
    for loop in arguments.loop or LOOPS:
        others = Others(None)
        on = LOOPS[loop]
        figures = interleave(
            {
                FLOOR: partial(anyio.run, bare_stream, messages, arguments.max_in_flight, **on),
                BUS: partial(anyio.run, whole_path, messages, arguments.max_in_flight, **on),
            },
            arguments.rounds,
        )
        show("memory", loop, f"{ratio(figures[BUS][RATE], figures[FLOOR][RATE])} of the bare stream")
        show_costs("memory", loop, figures, FLOOR)
        share = others.share()
        show_others("memory", loop, share)
        about: Run = {"messages": arguments.messages, "rounds": arguments.rounds, "others": share}
        record.add("memory", loop, about, figures)


if __name__ == "__main__":
    main()
