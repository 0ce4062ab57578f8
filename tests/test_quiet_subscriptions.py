"""A subscription with nothing to do, or with little to do, does nothing in vain.

- While passes append what is due, a read that waited in vain is followed by the next one, without a look in between.
- What becomes due is handled all the same, also while a read waits.
- The handler of a message that ended a wait begins before the next read.
"""

from __future__ import annotations

import anyio
import pytest
from anyio.abc import ByteStream
from harness import HOUR, SOON, quick, until
from servers import RunningServer

from anybus import Delivery, MemoryBackend, Message, StreamBus, SubscriptionConfig
from anybus._failure.copies import retry_stream
from anybus.abc import FetchedEntry
from anybus.backends.redis import RedisBackend, _taking


async def nothing(delivery: Delivery) -> None:
    return


async def test_a_wait_in_vain_is_followed_by_the_next_wait(
    server: RunningServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_taking, "_PASSES", 60.0)  # however late a busy machine makes the passes
    seen = b""

    def reads() -> list[bytes]:
        """What the client itself has sent, not what the scripts have executed."""
        return [line for line in seen.splitlines() if b'"XREADGROUP"' in line and b" lua]" not in line]

    def waits() -> list[int]:
        return [number for number, line in enumerate(reads()) if b'"BLOCK"' in line]

    async def watch(stream: ByteStream) -> None:
        nonlocal seen
        while True:
            seen += await stream.receive()

    with anyio.fail_after(SOON):
        async with await anyio.connect_tcp("127.0.0.1", server.port) as monitor:
            await monitor.send(b"MONITOR\r\n")
            assert await monitor.receive() == b"+OK\r\n"
            async with (
                StreamBus(RedisBackend(server.url), quick()) as bus,
                bus.subscribe(SubscriptionConfig(topic, "g"), nothing),
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(watch, monitor)
                await until(lambda: len(waits()) >= 5)
                tasks.cancel_scope.cancel()
    second, *_, fifth = waits()[1:5]
    assert fifth - second == 3, reads()


async def test_what_becomes_due_is_handled_while_a_read_waits(server: RunningServer, topic: str) -> None:
    handled: list[bytes] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.payload)

    options = quick(block_timeout=4 * SOON, claim_idle_timeout=12 * SOON)
    backend = RedisBackend(server.url)
    with anyio.fail_after(2 * SOON):
        async with StreamBus(backend, options) as bus, bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            await bus.publish(Message(topic, b"now"))
            await until(lambda: handled == [b"now"])
            await backend.publish_later(topic, Message(topic, b"later"), delay=0.5)
            await until(lambda: handled == [b"now", b"later"])


async def test_where_passes_are_rare_a_read_looks_when_the_next_entry_is_due(server: RunningServer, topic: str) -> None:
    """A pass was made a moment ago, but the next one comes late: the read must not wait for it."""
    retries = retry_stream(topic, "g")
    with anyio.fail_after(2 * SOON):
        async with RedisBackend(server.url) as backend:
            for stream in (topic, retries):
                await backend.create_group(stream, "g", "0")
            await backend.redeliver(topic, retries, "g", "c", min_idle=HOUR, count=1)
            await backend.publish_later(topic, Message(topic, b"later"), delay=0.3)
            began = anyio.current_time()
            entries = await backend.read_new(topic, "g", "c", count=1, timeout=SOON)
            assert len(entries) == 1
            assert anyio.current_time() - began < SOON / 2


async def test_the_handler_of_what_ended_a_wait_begins_before_the_next_read(
    topic: str, anyio_backend_name: str
) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("trio runs what may run in random order")
    order: list[str] = []

    class Backend(MemoryBackend):
        async def read_new(
            self, stream: str, group: str, consumer: str, *, count: int, timeout: float
        ) -> list[FetchedEntry]:
            if stream == topic:  # passes read the retry stream
                order.append("read")
            entries = await super().read_new(stream, group, consumer, count=count, timeout=timeout)
            order.extend(["waited"] * bool(entries and timeout))
            return entries

    async def handler(delivery: Delivery) -> None:
        order.append("handler")

    with anyio.fail_after(2 * SOON):
        async with (
            StreamBus(Backend(), quick(block_timeout=SOON, claim_idle_timeout=5 * SOON)) as bus,
            bus.subscribe(SubscriptionConfig(topic, "g"), handler),
        ):
            for _ in range(5):
                await until(lambda: order[-2:] == ["read", "read"])  # it looked in vain, and waits
                order.clear()
                await bus.publish(Message(topic))
                await until(lambda: "handler" in order)
                assert order[:2] == ["waited", "handler"]
