"""A server that is full: what can start, what frees memory, and what says so.

The specification, on a real server with ``maxmemory`` and without eviction, on each event loop:

- A subscription whose group has to be created cannot start. After ``publish_timeout`` entering raises, and names the
  full server; with ``wait_if_full`` it waits until there is room.
- A subscription whose group exists starts, handles what is there, and trims it. So the server is not full any more.
- A retention can be declared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from anyio import to_thread
from conftest import SERVER
from harness import SOON, Recorder, new_topic, quick, until
from servers import RunningServer

from anybus import Delivery, Interest, Message, ServerFullError, StreamBus, SubscriptionConfig
from anybus._retention import pace
from anybus.backends.redis import RedisBackend


@pytest.fixture(scope="module")
def own_server() -> Iterator[RunningServer]:
    with RunningServer(SERVER) as running:
        yield running


@pytest.fixture
def client(own_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(pace, "LOOK", 0.02)
    monkeypatch.setattr(pace, "QUIET", 0.02)
    with own_server.client() as client:
        yield client
        client.config_set("maxmemory", 0)
        client.flushall()


async def handle(delivery: Delivery) -> None:
    return


async def fill_up(bus: StreamBus, client: Any, topic: str) -> None:
    """The topic's messages take ten times the memory that the server has too little."""
    for _ in range(10):
        (await bus.publish_batch([Message(topic, b"x" * 1000)] * 1000)).raise_for_errors()

    def limit() -> None:
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 1_000_000)

    await to_thread.run_sync(limit)


async def test_a_new_group_cannot_be_entered_on_a_full_server_and_this_is_said(
    own_server: RunningServer, client: Any
) -> None:
    topic, recorder = new_topic(), Recorder()
    async with StreamBus(RedisBackend(own_server.url), quick(recorder, publish_timeout=0.5)) as bus:
        await fill_up(bus, client, topic)
        with pytest.raises(ServerFullError) as full:
            await bus.publish(Message(topic))
        assert not full.value.may_have_happened
        began = anyio.current_time()
        with pytest.raises(ServerFullError, match=rf"{topic}.*publish_timeout \(0.5 s\).*OOM.*wait_if_full"):
            async with bus.subscribe(SubscriptionConfig(topic, "new"), handle):
                pass
        assert anyio.current_time() - began >= 0.49
        assert recorder.of("on_error", "read")

        entered = anyio.Event()

        async def wait() -> None:
            async with bus.subscribe(SubscriptionConfig(topic, "patient", wait_if_full=True), handle):
                entered.set()

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.sleep(1)
                assert not entered.is_set()
                await to_thread.run_sync(client.config_set, "maxmemory", 0)
                await entered.wait()


async def test_an_existing_group_starts_on_a_full_server_and_makes_room(own_server: RunningServer, client: Any) -> None:
    topic = new_topic()
    async with StreamBus(RedisBackend(own_server.url), quick(Recorder(), publish_timeout=0.5)) as bus:
        config = SubscriptionConfig(topic, "g", group_start_id="0")
        async with bus.subscribe(config, handle):
            pass
        await fill_up(bus, client, topic)
        await bus.declare_topic(topic, Interest())
        async with bus.subscribe(config, handle) as one:
            await until(lambda: one.statistics().handled == 10_000)

            async def empty() -> bool:
                return int(await to_thread.run_sync(client.xlen, topic)) == 0

            await until(empty)
            await bus.publish(Message(topic))
            await until(lambda: one.statistics().handled == 10_001)
