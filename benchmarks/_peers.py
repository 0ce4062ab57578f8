"""The peers: code written by hand with redis-py's asyncio client (hiredis, ``socket_timeout=None``)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import redis.asyncio
from _costs import IdleMeter, Stopwatch
from _figures import Measured, percentile
from _wire import AT_ONCE, GROUP, TOPIC, check_drained, check_length, clear, forget_group

from anybus import JsonCodec, Message


def client(port: int, **more: Any) -> AbstractAsyncContextManager[Any]:
    made: Any = redis.asyncio.Redis(port=port, socket_timeout=None, **more)
    return made  # type: ignore[no-any-return]


async def drain(port: int, count: int) -> Measured:
    """It repeats: read 200, decode, await the handler for each in turn, one XACK."""
    decode = JsonCodec().decode

    async def handler(message: Message) -> None:
        return

    async with client(port) as redis_py:
        await redis_py.ping()
        watch = Stopwatch(port)
        await redis_py.xgroup_create(TOPIC, GROUP, "0")
        left = count
        while left:
            [[_, entries]] = await redis_py.xreadgroup(GROUP, "peer", {TOPIC: ">"}, count=AT_ONCE)
            for _, fields in entries:
                await handler(decode(fields[b"message"]))
            await redis_py.xack(TOPIC, GROUP, *[entry_id for entry_id, _ in entries])
            left -= len(entries)
        measured = watch.stop(count)
    check_drained(port, count)
    forget_group(port)
    return measured


async def publish_bare(port: int, bodies: Sequence[bytes], tasks: int, shared: bool) -> Measured:
    """Bare XADDs of bytes that were encoded before, from ``tasks`` tasks.

    :param shared: all tasks use one connection instead of the client's own pool.
    """
    clear(port)
    async with client(port, single_connection_client=shared) as redis_py:

        async def publish(part: Sequence[bytes]) -> None:
            for body in part:
                await redis_py.xadd(TOPIC, {"message": body})

        # The connections of the pool are opened before the clock starts.
        await asyncio.gather(*[redis_py.ping() for _ in range(tasks)])
        watch = Stopwatch(port)
        await asyncio.gather(*[publish(bodies[number::tasks]) for number in range(tasks)])
        measured = watch.stop(len(bodies))
    check_length(port, len(bodies))
    return measured


async def publish_one_by_one(port: int, count: int) -> Measured:
    """It repeats: create a message, encode it, XADD it, wait."""
    encode = JsonCodec().encode
    clear(port)
    async with client(port) as redis_py:
        await redis_py.ping()
        watch = Stopwatch(port)
        for number in range(count):
            message = Message(TOPIC, b"x" * 300, key=str(number))
            await redis_py.xadd(TOPIC, {"message": encode(message)})
        measured = watch.stop(count)
    check_length(port, count)
    return measured


async def publish_pipelined(port: int, messages: Sequence[Message]) -> Measured:
    """It repeats: encode 200, send them as one pipeline."""
    encode = JsonCodec().encode
    clear(port)
    async with client(port) as redis_py:
        await redis_py.ping()
        watch = Stopwatch(port)
        for start in range(0, len(messages), AT_ONCE):
            pipeline = redis_py.pipeline(transaction=False)
            for message in messages[start : start + AT_ONCE]:
                pipeline.xadd(TOPIC, {"message": encode(message)})
            await pipeline.execute()
        measured = watch.stop(len(messages))
    check_length(port, len(messages))
    return measured


class Latencies:
    """Seconds from publishing each message until its handler began, and until the server had its ack."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.published = [0.0] * count
        self.handled_at = [0.0] * count
        self.acked_at = [0.0] * count

    @property
    def to_handled(self) -> list[float]:
        return [end - begin for begin, end in zip(self.published, self.handled_at, strict=True)]

    @property
    def to_acked(self) -> list[float]:
        return [end - begin for begin, end in zip(self.published, self.acked_at, strict=True)]

    def percentiles(self) -> Measured:
        """In milliseconds."""
        return {
            "handled_p50_ms": percentile(self.to_handled, 0.5) * 1000,
            "handled_p99_ms": percentile(self.to_handled, 0.99) * 1000,
            "acked_p50_ms": percentile(self.to_acked, 0.5) * 1000,
        }


async def latencies(port: int, count: int, interval: float) -> Latencies:
    """Publish one message per interval to a reader that blocks on an empty stream."""
    codec = JsonCodec()
    clear(port)
    seen = Latencies(count)

    async def handler(message: Message) -> None:
        seen.handled_at[int(message.key)] = time.perf_counter()

    async with client(port) as redis_py:
        await redis_py.xgroup_create(TOPIC, GROUP, "0", mkstream=True)

        async def consume() -> None:
            left = count
            while left:
                for _, entries in await redis_py.xreadgroup(GROUP, "peer", {TOPIC: ">"}, count=AT_ONCE, block=2000):
                    numbers: list[int] = []
                    for _, fields in entries:
                        message = codec.decode(fields[b"message"])
                        numbers.append(int(message.key))
                        await handler(message)
                    await redis_py.xack(TOPIC, GROUP, *[entry_id for entry_id, _ in entries])
                    now = time.perf_counter()
                    for number in numbers:
                        seen.acked_at[number] = now
                    left -= len(entries)

        consumer = asyncio.create_task(consume())
        await asyncio.sleep(0.2)
        begin = time.perf_counter()
        for number in range(count):
            await asyncio.sleep(max(0.0, begin + number * interval - time.perf_counter()))
            seen.published[number] = time.perf_counter()
            body = codec.encode(Message(TOPIC, b"x" * 300, key=str(number)))
            await redis_py.xadd(TOPIC, {"message": body})
        await consumer
    check_drained(port, count)
    return seen


async def idle(port: int, seconds: float) -> Measured:
    """A reader that blocks on an empty stream for two seconds at a time."""
    clear(port)
    async with client(port) as redis_py:
        await redis_py.xgroup_create(TOPIC, GROUP, "0", mkstream=True)

        async def consume() -> None:
            while True:
                await redis_py.xreadgroup(GROUP, "peer", {TOPIC: ">"}, count=AT_ONCE, block=2000)

        consumer = asyncio.create_task(consume())
        await asyncio.sleep(1)
        meter = IdleMeter(port)
        await asyncio.sleep(seconds)
        measured = meter.read()
        consumer.cancel()
        await asyncio.wait([consumer])
    return measured
