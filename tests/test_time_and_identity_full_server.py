"""Delays, schedules, idempotency keys and exactly-once effects on a full server.

The specification, on a real server with ``maxmemory`` and without eviction, on each event loop:

- What would store a message is refused with ``ServerFullError``, and nothing was stored. A key that was published
  before is still known, and a delayed message can be cancelled.
- What is due is appended, and ticks are published, when there is room again. None is lost.
- A subscription with ``guarantee="exactly-once"`` goes on. With a retention it makes room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import anyio
import pytest
from anyio import to_thread
from conftest import SERVER
from harness import Recorder, new_topic, quick, until
from servers import RunningServer

from anybus import (
    Delivery,
    Duplicate,
    Interest,
    JsonCodec,
    Message,
    PublishOptions,
    ServerFullError,
    StreamBus,
    SubscriptionConfig,
)
from anybus._retention import pace
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import dedup_ids, delayed


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


async def of(call: Callable[..., Any], *arguments: Any) -> Any:
    return await to_thread.run_sync(call, *arguments)


async def fill_up(bus: StreamBus, client: Any, topic: str) -> None:
    """The topic's messages take five times the memory that the server has too little."""
    for number in range(5):
        messages = [Message(topic, b"x" * 1000, key=f"{number}-{index}") for index in range(1000)]
        (await bus.publish_batch(messages)).raise_for_errors()

    def limit() -> None:
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 1_000_000)

    await to_thread.run_sync(limit)


def with_key(key: str) -> PublishOptions:
    return PublishOptions(idempotency_key=key, deduplication_window=600)


async def test_nothing_is_stored_and_what_was_stored_is_known(own_server: RunningServer, client: Any) -> None:
    topic = new_topic()
    async with StreamBus(RedisBackend(own_server.url), quick(Recorder(), publish_timeout=0.5)) as bus:
        first = await bus.publish(Message(topic), with_key("first"))
        waits = await bus.publish_later(Message(topic), with_key("delayed"), delay=600)
        await fill_up(bus, client, f"{topic}.other")
        for attempt in (
            lambda: bus.publish(Message(topic), with_key("second")),
            lambda: bus.publish_later(Message(topic), delay=600),
            lambda: bus.publish_later(Message(topic), with_key("third"), delay=600),
        ):
            with pytest.raises(ServerFullError) as full:
                await attempt()
            assert not full.value.may_have_happened
        batch = [Message(topic, idempotency_key=key) for key in ("first", "second", "delayed")]
        outcome = await bus.publish_batch(batch, PublishOptions(deduplication_window=600))
        assert outcome.results[0] == first
        assert [isinstance(result, ServerFullError) for result in outcome.results] == [False, True, True]
        assert isinstance(await bus.publish(Message(topic), with_key("first")), Duplicate)
        again = await bus.publish_later(Message(topic), with_key("delayed"), delay=600)
        assert again.duplicate
        assert again.id == waits.id
        assert (await of(client.xlen, topic), await of(client.zcard, delayed(topic))) == (1, 1)
        assert await waits.cancel()
        await of(client.config_set, "maxmemory", 0)
        for key in ("second", "third", "delayed"):
            assert not isinstance(await bus.publish(Message(topic), with_key(key)), Duplicate)
        assert await of(client.xlen, topic) == 4
        assert await of(client.hlen, dedup_ids(topic)) == 4


async def test_what_was_due_comes_when_there_is_room(own_server: RunningServer, client: Any) -> None:
    topic = new_topic()
    recorder = Recorder()
    async with StreamBus(RedisBackend(own_server.url), quick(recorder)) as bus:
        # Nobody subscribes to the topic.
        async with bus.schedule("s", Message(topic, key="tick"), every=0.1):
            await until_length(client, topic, 1)
            await bus.publish_later(Message(topic, key="delayed"), delay=0.3)
            await of(client.config_set, "maxmemory", 1)
            await until(lambda: len(recorder.of("on_error", "publish")) > 2)
            await anyio.sleep(0.4)  # the delayed message is due
            length = await of(client.xlen, topic)
            assert await of(client.zcard, delayed(topic)) == 1
            await of(client.config_set, "maxmemory", 0)
            await until_length(client, topic, length + 8)

            async def is_appended() -> bool:
                return not await of(client.zcard, delayed(topic))

            await until(is_appended)
        entries = await of(client.xrange, topic)
    messages = [JsonCodec().decode(fields[b"message"]) for _, fields in entries]
    ticks = [message.headers["schedule-tick"] for message in messages if message.key == "tick"]
    assert len(messages) == len(ticks) + 1
    tenths = [round(float(tick[17:-1]) * 10) for tick in ticks]
    steps = {(later - earlier) % 600 for earlier, later in pairwise(tenths)}
    assert steps == {1}


async def until_length(client: Any, topic: str, length: int) -> None:
    async def is_so_long() -> bool:
        return int(await of(client.xlen, topic)) >= length

    await until(is_so_long)


async def test_exactly_once_goes_on_and_makes_room(own_server: RunningServer, client: Any) -> None:
    topic = new_topic()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    async with StreamBus(RedisBackend(own_server.url), quick(Recorder(), publish_timeout=0.5)) as bus:
        await bus.declare_topic(topic, Interest())
        config = SubscriptionConfig(topic, "g", guarantee="exactly-once", group_start_id="0", max_in_flight=100)
        async with bus.subscribe(config, handler):
            pass
        await fill_up(bus, client, topic)
        with pytest.raises(ServerFullError):
            await bus.publish(Message(topic))
        async with bus.subscribe(config, handler) as subscription:

            async def is_empty() -> bool:
                return not await of(client.xlen, topic)

            await until(lambda: subscription.statistics().handled == 5000)
            await until(is_empty)
            message = Message(topic, key="one more", idempotency_key="one more")
            for _ in range(2):
                await bus.publish(message)
            await until(lambda: subscription.statistics().duplicates == 1)
    assert len(set(handled)) == len(handled) == 5001
