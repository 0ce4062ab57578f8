"""What one call does is bounded in bytes and in what it looks at; the rest comes with the next calls, soon."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import to_thread
from harness import SOON, quick, until
from proxy import CutAfter, proxied
from servers import RunningServer

from anybus import BackendError, Delivery, ExponentialBackoff, JsonCodec, Message, Retry, StreamBus, SubscriptionConfig
from anybus._failure.copies import retry_stream
from anybus.abc import ClaimedMessage, FetchedEntry, Move, Output
from anybus.backends.redis import RedisBackend
from anybus.backends.redis import _scripts as scripts
from anybus.backends.redis._keys import delayed, waiting

LARGE = 600 * 1024
"""Encoded, two of them are more than the 1 MiB of one call, and one is less."""


@asynccontextmanager
async def groups(server: RunningServer, topic: str) -> AsyncGenerator[tuple[RedisBackend, str], None]:
    async with RedisBackend(server.url) as backend:
        retries = retry_stream(topic, "g")
        await backend.create_group(topic, "g", "0")
        await backend.create_group(retries, "g", "0")
        yield backend, retries


def claimed(entries: Sequence[FetchedEntry]) -> list[ClaimedMessage]:
    return [entry for entry in entries if isinstance(entry, ClaimedMessage)]


def large(topic: str, number: int) -> Message:
    return Message(topic, b"x" * LARGE, key=str(number))


@pytest.fixture
async def client(server: RunningServer) -> AsyncGenerator[Any, None]:
    with server.client() as client:
        yield client


async def test_large_retries_that_are_due_at_once_come_in_parts(server: RunningServer, topic: str) -> None:
    async with groups(server, topic) as (backend, retries):
        for number in range(6):
            await backend.publish_later(retries, large(topic, number), delay=number / 10_000)
        await anyio.sleep(0.01)
        found: list[str] = []
        while len(found) < 6:
            taken = await backend.redeliver(topic, retries, "g", "c", min_idle=60, count=64)
            assert len(taken.retries) <= 2
            assert taken.more or len(found) + len(taken.retries) == 6
            found += [entry.message.key for entry in taken.retries if isinstance(entry, ClaimedMessage)]
        assert found == ["0", "1", "2", "3", "4", "5"]


async def test_large_retries_that_lie_there_come_in_parts(server: RunningServer, topic: str) -> None:
    async with groups(server, topic) as (backend, retries):
        for number in range(6):
            await backend.publish(retries, large(topic, number))
        for left in (4, 2, 0):
            taken = await backend.redeliver(topic, retries, "g", "c", min_idle=60, count=64)
            assert len(taken.retries) == 2
            assert taken.more or not left
        assert not (await backend.redeliver(topic, retries, "g", "c", min_idle=60, count=64)).more


@pytest.mark.parametrize("at_once", [True, False])
async def test_large_idle_entries_are_taken_over_in_parts_and_counted_once(
    server: RunningServer, topic: str, at_once: bool
) -> None:
    async with groups(server, topic) as (backend, retries):
        ids = [await backend.publish(topic, large(topic, number)) for number in range(7)]
        await backend.read_new(topic, "g", "dead", count=7, timeout=0)
        await backend.release(topic, "g", "dead", ids[:3])
        await anyio.sleep(0.02)
        counts: list[tuple[str, int | None]] = []
        while len(counts) < 7:
            if at_once:
                taken = await backend.redeliver(topic, retries, "g", "c", min_idle=0.01, count=64)
                entries = taken.reclaimed
                assert taken.more or len(counts) + len(entries) == 7
            else:
                entries = await backend.reclaim_idle(topic, "g", "c", min_idle=0.01, count=64)
            assert 1 <= len(entries) <= 2
            counts += [(entry.id, entry.deliveries) for entry in entries if isinstance(entry, ClaimedMessage)]
            await backend.ack_many(topic, "g", [entry.id for entry in entries], consumer="c")
        # Handed back, a hand-over does not count; what was left for its size was not handed over.
        assert sorted(counts) == [(entry_id, 1 if number < 3 else 2) for number, entry_id in enumerate(ids)]
        assert "anybus:returned" not in await backend.consumer_names(topic, "g")


async def test_a_scan_over_many_entries_of_a_live_consumer_is_cut_and_goes_on(
    server: RunningServer, client: Any, topic: str
) -> None:
    async with groups(server, topic) as (backend, retries):

        def fill() -> None:
            pipeline = client.pipeline(transaction=False)
            for _ in range(10_001):
                pipeline.xadd(topic, {"message": "{}"})
            ids = pipeline.execute()
            client.xreadgroup("g", "live", {topic: ">"}, count=10_001)
            # Its lease ended long ago: the last one that a scan comes to.
            client.xclaim(topic, "g", "dead", 0, [ids[-1]], time=0, justid=True)

        await to_thread.run_sync(fill)
        calls = 0
        while True:
            calls += 1
            taken = await backend.redeliver(topic, retries, "g", "c", min_idle=600, count=64)
            if taken.reclaimed:
                break
            assert not taken.more  # it goes on in the next pass, without haste
        assert 5 <= calls <= 8


async def test_what_was_handed_back_is_taken_at_once_beside_many_pending_entries(
    server: RunningServer, client: Any, topic: str
) -> None:
    async with groups(server, topic) as (backend, retries):

        def fill() -> list[str]:
            pipeline = client.pipeline(transaction=False)
            for _ in range(10_002):
                pipeline.xadd(topic, {"message": JsonCodec().encode(Message(topic))})
            ids = [entry_id.decode() for entry_id in pipeline.execute()]
            client.xreadgroup("g", "live", {topic: ">"}, count=10_002)
            return ids

        ids = await to_thread.run_sync(fill)
        await backend.release(topic, "g", "live", [ids[-1]])
        taken = await backend.redeliver(topic, retries, "g", "c", min_idle=600, count=64)
        assert [(entry.id, entry.deliveries) for entry in claimed(taken.reclaimed)] == [(ids[-1], 1)]
        assert not taken.more
        assert "anybus:returned" not in await backend.consumer_names(topic, "g")
        await backend.release(topic, "g", "live", [ids[-2]])
        entries = await backend.reclaim_idle(topic, "g", "c", min_idle=600, count=2)
        assert [(entry.id, entry.deliveries) for entry in claimed(entries)] == [(ids[-2], 1)]
        await backend.release(topic, "g", "live", [ids[0]])
        found = [entry.id for entry in await backend.reclaim_idle(topic, "g", "c", min_idle=0, count=8)]
        assert len(found) == len(set(found)) == 8, "each of them once"
        assert found[0] == ids[0]


async def test_what_is_handed_back_again_and_again_leaves_room_for_the_entries_of_dead_consumers(
    server: RunningServer, topic: str
) -> None:
    async with groups(server, topic) as (backend, retries):
        ids = [await backend.publish(topic, Message(topic)) for _ in range(30)]
        await backend.read_new(topic, "g", "dead", count=10, timeout=0)
        await backend.read_new(topic, "g", "c", count=20, timeout=0)
        await backend.release(topic, "g", "c", ids[10:])
        await anyio.sleep(0.02)
        dead: list[str] = []
        for _ in range(10):
            taken = await backend.redeliver(topic, retries, "g", "c", min_idle=0.01, count=4)
            found = {entry.id for entry in taken.reclaimed}
            await backend.release(topic, "g", "c", sorted(found - set(ids[:10])))
            dead += sorted(found & set(ids[:10]))
        assert dead == ids[:10]


async def test_a_pass_that_leaves_entries_does_not_ask_for_all_owners(
    server: RunningServer, client: Any, topic: str
) -> None:
    """XPENDING without a range names every owner: with 100,000 of them, it would block the server for tens of ms."""
    mark = waiting(topic, "g")

    def fill(retries: str) -> None:
        pipeline = client.pipeline(transaction=False)
        for number in range(100):
            pipeline.xadd(retries, {"message": JsonCodec().encode(Message(topic))})
            pipeline.xreadgroup("g", f"dead-{number}", {retries: ">"}, count=1)
        pipeline.execute()

    async with groups(server, topic) as (backend, retries):
        await to_thread.run_sync(fill, retries)
        for _ in range(2):
            await backend.publish(retries, Message(topic))
        marked: list[bool] = []
        with client.monitor() as monitor:
            for found in (1, 1, 0):  # there is room for one
                taken = await backend.redeliver(topic, retries, "g", "c", min_idle=600, count=1)
                assert len(taken.retries) == found
                marked.append(await to_thread.run_sync(client.exists, mark) == 1)
            await to_thread.run_sync(client.echo, "end")
            asked: list[list[str]] = []
            while True:
                seen: Any = await to_thread.run_sync(monitor.next_command)
                words = seen["command"].split()
                if words == ["ECHO", "end"]:
                    break
                if words[0] == "XPENDING":
                    asked.append(words)
    assert marked == [True, True, False]
    assert asked
    assert [words for words in asked if len(words) == 3] == []


async def test_transfers_go_in_parts_of_bounded_size(server: RunningServer, topic: str) -> None:
    async with proxied(server.port) as proxy, RedisBackend(proxy.url) as backend:
        await backend.create_group(topic, "g", "0")
        for number in range(12):
            await backend.publish(topic, Message(topic, key=str(number)))
        ids = [entry.id for entry in await backend.read_new(topic, "g", "c", count=12, timeout=0)]
        items = [
            (entry_id, [Output(f"{topic}.to", large(topic, index) if index < 6 else Message(topic))])
            for index, entry_id in enumerate(ids)
        ]
        results = await backend.transfer_many(topic, "g", "c", items)
        assert all(isinstance(result, list) for result in results)
        assert proxy.seen.count("transfer") == 6
        assert await backend.pending_entries(topic, "g") == []
        assert await backend.count_entries(f"{topic}.to") == 12


async def test_moves_go_in_parts_of_bounded_size(server: RunningServer, topic: str) -> None:
    async with proxied(server.port) as proxy, RedisBackend(proxy.url) as backend:
        ids = [await backend.publish(topic, large(topic, number)) for number in range(6)]
        moves = [Move(entry_id, f"{topic}.to", Message(topic)) for entry_id in (*ids, "1-1")]
        results = await backend.move_entries(topic, moves)
        assert [type(result) for result in results] == [str] * 6 + [type(None)]
        assert 3 <= proxy.seen.count("move") <= 4
        assert await backend.count_entries(topic) == 0


async def test_what_a_lost_reply_had_brought_is_found_in_parts(server: RunningServer, topic: str) -> None:
    async with proxied(server.port) as proxy, RedisBackend(proxy.url) as backend:
        await backend.create_group(topic, "g", "0")
        for number in range(5):
            await backend.publish(topic, large(topic, number))
        proxy.at("XREADGROUP", CutAfter())
        with pytest.raises(BackendError):
            await backend.read_new(topic, "g", "c", count=5, timeout=0)
        found: list[str] = []
        with anyio.fail_after(SOON):
            while len(found) < 5:
                try:
                    entries = await backend.read_new(topic, "g", "c", count=5, timeout=0)
                except BackendError:
                    continue
                assert 1 <= len(entries) <= 2
                found += [entry.message.key for entry in entries if isinstance(entry, ClaimedMessage)]
        assert found == ["0", "1", "2", "3", "4"]


async def test_after_a_part_the_next_one_follows_at_once(server: RunningServer, topic: str) -> None:
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        if delivery.state.attempt == 1:
            raise Retry(delay=0.05)

    # One part a second would take longer than is waited here.
    options = quick(reclaim_interval=1.0, claim_idle_timeout=30.0)
    config = SubscriptionConfig(topic, "g", max_in_flight=12, retry_backoff=ExponentialBackoff(initial=0.05))
    async with StreamBus(RedisBackend(server.url), options) as bus:
        async with bus.subscribe(config, handler):
            for number in range(30):
                await bus.publish(large(topic, number))
            await until(lambda: attempts.count(2) == 30)


async def test_a_delayed_message_is_found_among_many_to_be_cancelled(
    server: RunningServer, client: Any, topic: str
) -> None:
    async with RedisBackend(server.url) as backend:
        many = {b"\x93\xb0" + f"{number:016x}".encode(): 2e12 for number in range(5000)}
        await to_thread.run_sync(client.zadd, delayed(topic), many)
        schedule = await backend.publish_later(topic, Message(topic), delay=60)
        assert await backend.cancel_later(topic, schedule)
        assert not await backend.cancel_later(topic, schedule)
        assert not await backend.cancel_later(topic, "*")
        assert await to_thread.run_sync(client.zcard, delayed(topic)) == 5000


async def test_dead_consumers_are_removed_in_parts(server: RunningServer, client: Any, topic: str) -> None:
    async with groups(server, topic) as (backend, _):

        def fill() -> None:
            pipeline = client.pipeline(transaction=False)
            for number in range(2500):
                pipeline.execute_command("XGROUP", "CREATECONSUMER", topic, "g", f"dead-{number}")
            pipeline.execute()

        await to_thread.run_sync(fill)
        await backend.publish(topic, Message(topic))
        await backend.read_new(topic, "g", "dead-7", count=1, timeout=0)
        await anyio.sleep(0.02)

        def reap() -> int:
            return int(client.eval(scripts.REAP.source, 1, topic, "g", "myself", 5))

        removed = [await to_thread.run_sync(reap) for _ in range(4)]
        assert removed == [1000, 1000, 499, 0]
        assert await backend.consumer_names(topic, "g") == ["dead-7"]
