"""Delayed messages on Redis: what only a server can show.

- A bus that subscribes appends what a dead process left, also while its own handlers have no room.
- What earlier versions stored is listed, cancelled and appended.
- Cancelling is quick among many messages of the same due time.
- Something that fails on one topic delays no other, is logged once, and is tried again.
- A bus that waits for something far away sends about one command a second, for however many topics.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from acl import user_with
from anyio import to_thread
from conftest import SERVER
from harness import HOUR, SOON, new_topic, quick, until
from servers import RunningServer

from anybus import Delivery, JsonCodec, Message, StreamBus, SubscriptionConfig
from anybus.backends.redis import RedisBackend
from anybus.backends.redis import _mover as mover
from anybus.backends.redis._keys import delayed


@pytest.fixture
def own_server() -> Iterator[RunningServer]:
    with RunningServer(SERVER, "--appendonly", "yes", "--appendfsync", "always") as running:
        yield running


@pytest.fixture
def admin(server: RunningServer) -> Iterator[Any]:
    with server.client() as client:
        yield client


def packed(token: str, message: Message, *more: str) -> bytes:
    """A member as it is stored, with a token of this text. (An independent encoder, for up to 15 values.)"""
    body = JsonCodec().encode(message)
    values = [token.encode(), b"message", body, *(text.encode() for text in more)]
    texts = [
        (bytes([0xA0 + len(value)]) if len(value) < 32 else b"\xda" + len(value).to_bytes(2, "big")) + value
        for value in values
    ]
    head = bytes([0x90 + len(values)]) if len(values) < 16 else b"\xdc" + len(values).to_bytes(2, "big")
    return head + b"".join(texts)


async def length(admin: Any, topic: str) -> int:
    return int(await to_thread.run_sync(admin.xlen, topic))


def has(admin: Any, topic: str, count: int) -> Any:
    async def look() -> bool:
        return await length(admin, topic) == count

    return look


async def test_what_an_earlier_version_stored_is_listed_cancelled_and_appended(
    server: RunningServer, admin: Any, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "_EVERY", 0.1)
    members = {
        packed("0123456789abcdef", Message(topic, b"by id")): 2_000_000_000_000,
        packed("1123456789abcdef", Message(topic, b"listed")): 2_000_000_000_000,
        packed("2123456789abcdef", Message(topic, b"long"), *("x",) * 20): 2_000_000_000_000,
        packed("3123456789abcdef", Message(topic, b"due")): 1,
    }
    async with StreamBus(RedisBackend(server.url), quick()) as bus:
        await to_thread.run_sync(admin.zadd, delayed(topic), members)
        view = bus.scheduled(topic)
        found = {one.message.payload: one async for one in view if one.message is not None}
        assert list(found) == [b"due", b"by id", b"listed", b"long"]
        assert await view.cancel("0123456789abcdef") is True
        assert await view.cancel("0123456789abcdef") is False
        for name in (b"listed", b"long"):
            assert await found[name].cancel() is True
            assert await found[name].cancel() is False
        scheduled = await bus.publish_later(Message(topic, b"mine"), delay=HOUR)
        await until(has(admin, topic, 1))
        assert [one.id async for one in view] == [scheduled.id]


async def test_what_cannot_be_read_is_listed_and_harms_nothing(server: RunningServer, admin: Any, topic: str) -> None:
    members = {b"rubbish": 2_000_000_000_000, packed("5123456789abcdef", Message(topic)): 2_000_000_000_001}
    async with StreamBus(RedisBackend(server.url), quick()) as bus:
        await to_thread.run_sync(admin.zadd, delayed(topic), members)
        rubbish, good = [one async for one in bus.scheduled(topic)]
        assert (rubbish.message, rubbish.error) == (None, "it cannot be read")
        assert good.error is None
        assert await rubbish.cancel() is False
        assert await good.cancel() is True
        await bus.publish_later(Message(topic), delay=0.01)
        await until(has(admin, topic, 1))


async def test_a_subscription_without_room_appends_what_a_dead_process_left(
    server: RunningServer, admin: Any, topic: str
) -> None:
    """Its passes wait for room, but the messages are due for other groups, too."""
    started, gate = anyio.Event(), anyio.Event()

    async def handler(delivery: Delivery) -> None:
        started.set()
        await gate.wait()

    with anyio.fail_after(2 * SOON):
        async with StreamBus(RedisBackend(server.url), quick()) as bus:
            config = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=1)
            async with bus.subscribe(config, handler):
                await bus.publish(Message(topic, b"first"))
                await started.wait()
                member = {packed("4123456789abcdef", Message(topic, b"left")): 1}
                await to_thread.run_sync(admin.zadd, delayed(topic), member)
                await until(has(admin, topic, 2))
                gate.set()


async def test_cancelling_is_quick_among_many_of_the_same_due_time(
    server: RunningServer, admin: Any, topic: str
) -> None:
    due = 2_000_000_000_000

    def fill() -> None:
        for start in range(0, 20_000, 1000):
            admin.zadd(
                delayed(topic), {packed(f"{n:014x}01234567", Message(topic)): due for n in range(start, start + 1000)}
            )

    def calls() -> int:
        stats = admin.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("zrange", "zcount"))

    await to_thread.run_sync(fill)
    async with StreamBus(RedisBackend(server.url), quick()) as bus:
        view = bus.scheduled(topic)
        before = await to_thread.run_sync(calls)
        for number in (0, 777, 19_999):
            assert await view.cancel(f"{due}-{number:014x}01234567") is True
            assert await view.cancel(f"{due}-{number:014x}01234567") is False
        assert await view.cancel(f"{due + 1}-{5:014x}01234567") is False
        # Twice for the score, and for each of eight kinds of members a binary search among 20,000.
        assert await to_thread.run_sync(calls) - before <= 7 * (2 + 8 * 17)
        assert await to_thread.run_sync(admin.zcard, delayed(topic)) == 19_997


async def test_a_topic_that_fails_delays_no_other_and_is_tried_again(
    server: RunningServer, admin: Any, topic: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "_AGAIN", 0.05)
    caplog.set_level(logging.WARNING, "anybus")
    other = new_topic()
    await to_thread.run_sync(admin.set, topic, "no stream")
    async with StreamBus(RedisBackend(server.url), quick()) as bus:
        await bus.publish_later(Message(topic), delay=0.01)
        await bus.publish_later(Message(other), delay=0.02)
        await until(has(admin, other, 1))
        await bus.publish_later(Message(other), delay=0.2)
        await until(has(admin, other, 2))
        lines = [one.getMessage() for one in caplog.records]
        assert [line for line in lines if "cannot be appended now" in line] == lines
        assert len(lines) == 1
        assert topic in lines[0]
        await to_thread.run_sync(admin.delete, topic)
        await until(has(admin, topic, 1))


async def test_the_mover_ends_when_nothing_waits_and_begins_again(
    server: RunningServer, admin: Any, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "_EVERY", 0.1)
    backend = RedisBackend(server.url)
    async with StreamBus(backend, quick()) as bus:
        for count in (1, 2):
            await bus.publish_later(Message(topic), delay=0.01)
            assert backend._mover._scope is not None
            await until(has(admin, topic, count))
            await until(lambda: backend._mover._scope is None)


async def test_a_server_that_has_forgotten_the_scripts_is_told_again(
    server: RunningServer, admin: Any, topic: str
) -> None:
    async with StreamBus(RedisBackend(server.url), quick()) as bus:
        scheduled = await bus.publish_later(Message(topic), delay=0.1)
        await to_thread.run_sync(admin.script_flush)
        await until(has(admin, topic, 1))
        await to_thread.run_sync(admin.script_flush)
        assert await scheduled.cancel() is False
        await to_thread.run_sync(admin.script_flush)
        assert (await bus.scheduled(topic).page()).scheduled == ()


async def test_the_documented_rights_are_enough(server: RunningServer, topic: str) -> None:
    text = (Path(__file__).parent.parent / "docs" / "delayed.md").read_text()
    (rights,) = re.findall(r"`(\+eval [^`]*)`", text)
    async with user_with(server, "resetkeys", f"~{topic}", "~anybus:*", "-@all", *rights.split()) as user:
        async with StreamBus(RedisBackend(user.url), quick()) as bus:
            await bus.publish_later(Message(topic), delay=0.05)
            mistake = await bus.publish_later(Message(topic), delay=HOUR)
            assert mistake.id in [one.id async for one in bus.scheduled(topic)]
            assert await mistake.cancel()
            with server.client() as client:
                await until(has(client, topic, 1))


async def test_messages_outlive_the_server(own_server: RunningServer, topic: str) -> None:
    async with StreamBus(RedisBackend(own_server.url), quick()) as bus:
        await bus.publish_later(Message(topic), delay=0.5)
        await to_thread.run_sync(own_server.kill)
        await anyio.sleep(0.6)
        await to_thread.run_sync(own_server.start)
        with own_server.client() as client:
            await until(has(client, topic, 1))


async def test_what_is_far_away_costs_a_command_a_second(own_server: RunningServer) -> None:
    topics = [new_topic() for _ in range(300)]
    seconds = 1
    with own_server.client() as client:

        def calls() -> int:
            return int(client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])

        async with StreamBus(RedisBackend(own_server.url), quick()) as bus:
            for topic in topics:
                await bus.publish_later(Message(topic), delay=HOUR)
            before = await to_thread.run_sync(calls)
            await anyio.sleep(seconds)
            assert await to_thread.run_sync(calls) - before <= seconds + 2
