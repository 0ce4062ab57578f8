"""Deduplication on a real server: what its script promises when something goes wrong, and what it leaves behind.

Specification (docs/deduplication.md): a publish whose reply was lost is repeated with its key, and happens once. A key
is never kept without its message: whatever refuses (a full server, a wrong type, a missing right), the same key is
free, or its message is stored and the error says that it may be. No key of the server has an expiry, and what is
kept is removed when its window is over, as publishing goes on. On a cluster a publish with a key follows its slot
without doubling. A server that comes back with its data, and a replica that takes over, know the keys whose messages they have.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import anyio
import pytest
from acl import user_with
from anyio import to_thread
from clusters import RunningCluster
from conftest import SERVER
from harness import SOON, quick, uids, until
from proxy import Answer, CutAfter, CutBefore, proxied
from redis.crc import key_slot
from relay import relayed_to
from servers import RedisHarness, RunningServer

from anybus import (
    BackendError,
    Duplicate,
    JsonCodec,
    Message,
    PublishOptions,
    SerializationError,
    StreamBus,
    ValidationError,
    connect,
)
from anybus.abc import PublishSpec
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import dedup_ends, dedup_ids, delayed
from anybus.backends.redis._slots import slot_of

ONCE = PublishOptions(idempotency_key="order-1")
OWN_KEYS = PublishOptions(deduplication_window=120)
LONG = PublishSpec(idempotency_key="order-1", deduplication_window=3600)


@pytest.fixture
def harness(server: RunningServer) -> RedisHarness:
    return RedisHarness(server)


@pytest.fixture
async def client(server: RunningServer) -> AsyncGenerator[Any, None]:
    with server.client() as client:
        yield client


def window(key: str, seconds: float) -> PublishSpec:
    return PublishSpec(idempotency_key=key, deduplication_window=seconds)


# --- the reply is lost


async def test_a_publish_whose_reply_was_lost_is_repeated_and_happens_once(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with proxied(server.port) as proxy, connect(proxy.url, quick()) as bus:
        proxy.at("publish once", CutAfter())
        with pytest.raises(BackendError) as caught:
            await bus.publish(Message(topic, b"1"), ONCE)
        assert caught.value.may_have_happened
        ((entry_id, _, _),) = await harness.entries(topic)
        again = await bus.publish(Message(topic, b"2"), ONCE)
    assert again == Duplicate(entry_id)
    assert isinstance(again, Duplicate)
    assert len(await harness.entries(topic)) == 1


async def test_a_publish_that_never_arrived_is_repeated_and_happens(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with proxied(server.port) as proxy, connect(proxy.url, quick()) as bus:
        proxy.at("publish once", CutBefore())
        with pytest.raises(BackendError):
            await bus.publish(Message(topic), ONCE)
        again = await bus.publish(Message(topic), ONCE)
    assert not isinstance(again, Duplicate)
    assert [entry_id for entry_id, _, _ in await harness.entries(topic)] == [again]


async def test_a_publish_on_a_connection_that_is_forgotten_is_repeated_and_happens_once(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with relayed_to(server.port) as relay:
        async with StreamBus(RedisBackend(relay.url, command_timeout=0.3), quick(publish_timeout=20)) as bus:
            first = await bus.publish(Message(topic), ONCE)
            relay.forget()
            with pytest.raises(BackendError):
                await bus.publish(Message(topic, idempotency_key="order-2"), OWN_KEYS)
            assert await bus.publish(Message(topic), ONCE) == Duplicate(first)
            assert not isinstance(await bus.publish(Message(topic, idempotency_key="order-2"), OWN_KEYS), Duplicate)
    assert len(await harness.entries(topic)) == 2


@pytest.mark.parametrize("act", [CutAfter(), CutBefore()], ids=["after", "before"])
@pytest.mark.parametrize("part", [1, 2, 3])
async def test_a_batch_that_breaks_in_the_middle_is_repeated_and_happens_once_in_order(
    part: int, act: CutAfter | CutBefore, server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    messages = [Message(topic, idempotency_key=f"order-{number}") for number in range(700)]  # three calls
    async with proxied(server.port) as proxy, connect(proxy.url, quick()) as bus:
        calls = 0

        def rule(command: list[bytes]) -> CutAfter | CutBefore | None:
            nonlocal calls
            if command[0] != b"EVALSHA":
                return None
            calls += 1
            return act if calls == part else None

        proxy.rule = rule
        outcome = await bus.publish_batch(messages, OWN_KEYS)
        stored = [entry_id for entry_id, _, _ in await harness.entries(topic)]
        assert len(stored) == {1: 0, 2: 256, 3: 512}[part] + ([256, 256, 188][part - 1] if act == CutAfter() else 0)
        maybe = [getattr(error, "may_have_happened", None) for error in outcome.errors]
        assert maybe == [True] * [256, 256, 188][part - 1] + [False] * [444, 188, 0][part - 1]
        calls = -1000
        again = await bus.publish_batch(messages, OWN_KEYS)
    assert again.all_ok
    assert list(again.duplicates) == stored
    assert uids(await harness.entries(topic)) == [message.uid for message in messages]


async def test_putting_off_whose_reply_was_lost_is_repeated_and_happens_once(
    server: RunningServer, client: Any, topic: str
) -> None:
    async with proxied(server.port) as proxy, RedisBackend(proxy.url) as backend:
        proxy.at("schedule once", CutAfter())
        with pytest.raises(BackendError) as caught:
            await backend.publish_later(topic, Message(topic), delay=3600, spec=LONG)
        assert caught.value.may_have_happened
        again = await backend.publish_later(topic, Message(topic), delay=3600, spec=LONG)
        assert isinstance(again, Duplicate)
        assert await to_thread.run_sync(client.zcard, delayed(topic)) == 1
        assert await backend.cancel_later(topic, again)
        assert not await to_thread.run_sync(client.exists, delayed(topic), dedup_ids(topic), dedup_ends(topic))


@pytest.mark.parametrize(
    "reply", [b"+OK\r\n", b"*0\r\n", b":1\r\n", b"*1\r\n:1\r\n", b"*2\r\n$1\r\na\r\n$1\r\nb\r\n", b"$-1\r\n"]
)
async def test_a_reply_of_an_unexpected_form_is_an_error_that_may_have_happened(
    reply: bytes, server: RunningServer, topic: str
) -> None:
    async with proxied(server.port) as proxy, connect(proxy.url, quick()) as bus:
        proxy.at("publish once", Answer(reply))
        with pytest.raises(BackendError, match="unexpected reply") as caught:
            await bus.publish(Message(topic), ONCE)
        assert caught.value.may_have_happened
        assert await bus.publish(Message(topic), ONCE)


# --- the server refuses


@pytest.mark.parametrize("key", ["stream", "ids", "ends"])
async def test_where_a_key_has_another_type_nothing_is_stored(
    key: str, server: RunningServer, client: Any, topic: str
) -> None:
    keys = {"stream": topic, "ids": dedup_ids(topic), "ends": dedup_ends(topic), "delayed": delayed(topic)}
    await to_thread.run_sync(client.set, keys[key], "no such thing")
    async with connect(server.url, quick()) as bus:
        messages = [Message(topic), Message(topic, idempotency_key="order-2")]  # the first one has no key
        for error in (await bus.publish_batch(messages, OWN_KEYS)).errors:
            assert "WRONGTYPE" in str(error)
            assert isinstance(error, BackendError)
            assert (error.may_have_happened, error.can_pass) == (False, False)
        with pytest.raises(BackendError, match="WRONGTYPE") as caught:
            await bus.publish(Message(topic), ONCE)
        assert (caught.value.may_have_happened, caught.value.can_pass) == (False, False)
        if key != "stream":
            with pytest.raises(BackendError, match="WRONGTYPE"):
                await bus.backend.publish_later(topic, Message(topic), delay=60, spec=LONG)
        assert await to_thread.run_sync(client.exists, *keys.values()) == 1
        await to_thread.run_sync(client.delete, keys[key])
        assert not isinstance(await bus.publish(Message(topic), ONCE), Duplicate)


async def test_a_full_server_refuses_and_the_key_stays_free(
    server: RunningServer, harness: RedisHarness, client: Any, topic: str
) -> None:
    async with connect(server.url, quick()) as bus:
        for number in range(9):  # whose windows are over: removing them frees some memory, which changes nothing
            await bus.backend.publish_with(topic, Message(topic), window(f"early-{number}", 0.001))
        before = await harness.entries(topic)
        await to_thread.run_sync(client.config_set, "maxmemory", 1)
        try:
            for _ in range(3):
                with pytest.raises(BackendError, match="OOM") as caught:
                    await bus.publish(Message(topic), ONCE)
                assert (caught.value.may_have_happened, caught.value.can_pass) == (False, True)
                (error,) = (await bus.publish_batch([Message(topic, idempotency_key="order-2")], OWN_KEYS)).errors
                assert isinstance(error, BackendError)
                assert not error.may_have_happened
                with pytest.raises(BackendError, match="OOM"):
                    await bus.backend.publish_later(topic, Message(topic), delay=60, spec=LONG)
        finally:
            await to_thread.run_sync(client.config_set, "maxmemory", 0)
        assert await harness.entries(topic) == before
        assert not await to_thread.run_sync(client.exists, delayed(topic))
        assert not isinstance(await bus.publish(Message(topic), ONCE), Duplicate)
        assert (await bus.publish_batch([Message(topic, idempotency_key="order-2")], OWN_KEYS)).duplicates == ()


@pytest.mark.parametrize("right", ["hmget", "zrangebyscore", "time", "xadd", "hdel", "zrem", "zadd", "hset"])
async def test_what_a_missing_right_refuses_is_not_stored_and_its_key_stays_free(
    right: str, server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    messages = [Message(topic, idempotency_key=f"order-{number}") for number in range(3)]
    async with user_with(server, "+@all", f"-{right}") as user, connect(user.url, quick()) as bus:
        # Redis before 7.2 does not say which right is missing.
        with pytest.raises(BackendError, match=r"the server refused: .*\(see docs/redis.md, Rights\)$") as caught:
            await bus.publish(messages[0], OWN_KEYS)
        assert (caught.value.may_have_happened, caught.value.can_pass) == (False, False)
        for error in (await bus.publish_batch(messages, OWN_KEYS)).errors:
            assert isinstance(error, BackendError)
            assert not error.may_have_happened
        assert await harness.entries(topic) == []
        await user.rules(f"+{right}")
        assert (await bus.publish_batch(messages, OWN_KEYS)).duplicates == ()
    assert len(await harness.entries(topic)) == 3


@pytest.mark.parametrize("right", ["hget", "zrangebyscore", "time", "zadd", "hdel", "hset"])
async def test_what_a_missing_right_refuses_is_not_put_off_and_its_key_stays_free(
    right: str, server: RunningServer, client: Any, topic: str
) -> None:
    async with user_with(server, "+@all", f"-{right}") as user, RedisBackend(user.url) as backend:
        with pytest.raises(BackendError) as caught:
            await backend.publish_later(topic, Message(topic), delay=60, spec=LONG)
        assert (caught.value.may_have_happened, caught.value.can_pass) == (False, False)
        assert await to_thread.run_sync(client.zcard, delayed(topic)) == 0
        await user.rules(f"+{right}")
        assert not isinstance(await backend.publish_later(topic, Message(topic), delay=60, spec=LONG), Duplicate)


async def test_what_can_neither_be_kept_nor_taken_back_is_said(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    """It is stored without its key: a second try stores it again, and nothing is lost."""
    async with user_with(server, "+@all", "-hset", "-xdel") as user, connect(user.url, quick()) as bus:
        with pytest.raises(BackendError) as caught:
            await bus.publish(Message(topic), ONCE)
        assert (caught.value.may_have_happened, caught.value.can_pass) == (True, False)
        messages = [Message(topic, idempotency_key=f"order-{number}") for number in range(3)]
        outcome = await bus.publish_batch(messages, OWN_KEYS)
        maybe = [getattr(error, "may_have_happened", None) for error in outcome.errors]
        assert maybe == [True, False, False]
        await user.rules("+hset")
        assert not isinstance(await bus.publish(Message(topic), ONCE), Duplicate)
    assert len(await harness.entries(topic)) == 3


async def test_a_publisher_needs_these_rights_and_no_other(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    commands = [
        "evalsha",
        "time",
        "hmget",
        "hset",
        "hdel",
        "zadd",
        "zrangebyscore",
        "zrem",
        "xadd",
        "xdel",
        "script|load",
    ]
    rights = [
        "resetkeys",
        f"~{topic}",
        f"~{dedup_ids(topic)}",
        f"~{dedup_ends(topic)}",
        *(f"+{one}" for one in commands),
    ]
    async with user_with(server, *rights) as user, connect(user.url, quick()) as bus:
        await bus.publish(Message(topic), ONCE)
        assert isinstance(await bus.publish(Message(topic), ONCE), Duplicate)
        assert (await bus.publish_batch([Message(topic, idempotency_key="order-2")], OWN_KEYS)).all_ok
    assert len(await harness.entries(topic)) == 2


async def test_of_a_batch_only_what_cannot_be_encoded_fails(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    """Beside what has a key, and in the same stream."""
    large = Message(topic, b"x" * 9_000_000)
    good = [Message(topic) for _ in range(3)]
    async with RedisBackend(server.url) as backend:
        results = await backend.publish_many(
            [
                (topic, good[0], LONG),
                (topic, large, LONG),
                (topic, good[1], None),
                (topic, large, None),
                (topic, good[2], window("order-2", 60)),
            ]
        )
    assert [type(result) for result in results] == [str, ValidationError, str, ValidationError, str]
    assert uids(await harness.entries(topic)) == [message.uid for message in good]


async def test_a_server_that_has_forgotten_its_scripts_gets_them_again(
    server: RunningServer, harness: RedisHarness, client: Any, topic: str
) -> None:
    async with connect(server.url, quick()) as bus:
        for key in ("order-1", "order-2"):
            await to_thread.run_sync(client.script_flush)
            for _ in range(2):
                await bus.publish(Message(topic), PublishOptions(idempotency_key=key))
    assert len(await harness.entries(topic)) == 2


async def test_a_large_message_goes_alone_where_the_servers_limit_is_not_known(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with user_with(server, "+@all", "-config") as user, connect(user.url, quick()) as bus:
        messages = [Message(topic, b"x" * size, idempotency_key=f"order-{size}") for size in (10, 2_000_000, 20)]
        first = await bus.publish_batch(messages, OWN_KEYS)
        assert first.all_ok
        assert (await bus.publish_batch(messages, OWN_KEYS)).duplicates == first.results
        assert await bus.publish(messages[1], OWN_KEYS) == Duplicate(first.results[1])
    assert uids(await harness.entries(topic)) == [message.uid for message in messages]


# --- what is kept


async def test_no_key_of_the_server_has_an_expiry(server: RunningServer, client: Any, topic: str) -> None:
    async with RedisBackend(server.url) as backend:
        await backend.publish_with(topic, Message(topic), LONG)
        await backend.publish_later(topic, Message(topic), delay=3600, spec=window("order-2", 60))
        keys = [topic, dedup_ids(topic), dedup_ends(topic), delayed(topic)]
        assert [await to_thread.run_sync(client.ttl, key) for key in keys] == [-1] * 4


async def test_what_is_over_is_removed_as_publishing_goes_on(server: RunningServer, client: Any, topic: str) -> None:
    ids, ends = dedup_ids(topic), dedup_ends(topic)
    over = [f"={number}" for number in range(1100)]
    await to_thread.run_sync(lambda: client.hset(ids, mapping=dict.fromkeys(over, b"1000 1-0")))
    await to_thread.run_sync(lambda: client.zadd(ends, dict.fromkeys(over, 1000)))
    async with RedisBackend(server.url) as backend:
        for number in range(50):
            await backend.publish_with(topic, Message(topic), window(f"late-{number}", 3600))
            await backend.publish_later(topic, Message(topic), delay=3600, spec=window(f"put-off-{number}", 3600))
        assert await to_thread.run_sync(client.hlen, ids) == 1100 - 100 * 4 + 50 + 50 * 2, "more than are added"
        # Of several messages, and never more than twice as many as they are.
        many = [(topic, Message(topic), window(f"many-{number}", 3600)) for number in range(200)]
        await backend.publish_many(many)
        assert await to_thread.run_sync(client.hlen, ids) == 1100 - 100 * 4 - 402 + 150 + 200
        await backend.publish_many([(topic, Message(topic), window(f"more-{number}", 3600)) for number in range(200)])
        kept = await to_thread.run_sync(client.hkeys, ids)
        assert len(kept) == 150 + 400
        assert sorted(kept) == sorted(await to_thread.run_sync(client.zrange, ends, 0, -1))


async def test_a_key_whose_window_is_over_is_kept_anew_although_it_would_be_removed(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    """By the very call that keeps it."""
    async with RedisBackend(server.url) as backend:
        await backend.publish_with(topic, Message(topic), window("order-1", 0.001))
        await anyio.sleep(0.01)
        again = await backend.publish_with(topic, Message(topic), LONG)
        assert not isinstance(again, Duplicate)
        for _ in range(3):
            assert await backend.publish_with(topic, Message(topic), LONG) == Duplicate(again)
            await backend.publish_with(topic, Message(topic), window("order-2", 0.001))


async def test_a_key_that_looks_like_what_is_kept_for_another_is_its_own(
    server: RunningServer, client: Any, topic: str
) -> None:
    """Like a schedule id's field, and like that of a long key."""
    long = "k" * 200
    async with RedisBackend(server.url) as backend:
        token = await backend.publish_later(topic, Message(topic), delay=3600, spec=LONG)
        await backend.publish_with(topic, Message(topic), window(long, 3600))
        for field in await to_thread.run_sync(client.hkeys, dedup_ids(topic)):
            assert not isinstance(
                await backend.publish_with(topic, Message(topic), window(field.decode(), 60)), Duplicate
            )
        assert await backend.cancel_later(topic, token)
        assert isinstance(await backend.publish_with(topic, Message(topic), window(long, 60)), Duplicate)
        assert not isinstance(await backend.publish_with(topic, Message(topic), LONG), Duplicate)


# --- other servers


@pytest.mark.parametrize("reason", ["READONLY", "NOREPLICAS"])
async def test_a_server_that_takes_no_writes_does_not_say_that_a_message_was_published(reason: str, topic: str) -> None:
    """It may have been replaced, and what it knows with it: its answer would lose the message."""
    if (SERVER, reason) == ("redis62", "NOREPLICAS"):
        pytest.skip("before Redis 7, the commands of scripts are not refused for it")
    options = PublishOptions(deduplication_window=120)
    known = Message(topic, idempotency_key="order-1")
    with RunningServer(SERVER) as own:
        client: Any = own.client()
        async with StreamBus(RedisBackend(own.url), quick(publish_timeout=1)) as bus:
            await bus.publish(known, options)
            scheduled = await bus.backend.publish_later(topic, Message(topic), delay=3600, spec=window("order-2", 60))
            if reason == "READONLY":
                await to_thread.run_sync(client.replicaof, "127.0.0.1", 1)
            else:
                await to_thread.run_sync(client.config_set, "min-replicas-to-write", 1)
            with pytest.raises(BackendError, match=reason) as caught:
                await bus.publish(known, options)
            assert (caught.value.may_have_happened, caught.value.can_pass) == (False, True)
            if reason == "READONLY":
                return  # the bus looks for the primary now
            outcome = await bus.publish_batch([known, known, Message(topic), known], options)
            maybe = [error.may_have_happened for error in outcome.errors if isinstance(error, BackendError)]
            assert maybe == [False] * 4
            with pytest.raises(BackendError, match=reason):
                await bus.backend.publish_later(topic, Message(topic), delay=3600, spec=window("order-2", 60))
            await to_thread.run_sync(client.config_set, "min-replicas-to-write", 0)
            assert isinstance(await bus.publish(known, options), Duplicate)
            again = await bus.backend.publish_later(topic, Message(topic), delay=1, spec=window("order-2", 60))
            assert again == Duplicate(scheduled)


async def test_a_server_that_comes_back_knows_the_keys_whose_messages_it_has(topic: str) -> None:
    with RunningServer(SERVER, "--appendonly", "yes", "--appendfsync", "always") as own:
        async with connect(own.url, quick(publish_timeout=SOON)) as bus:
            first = await bus.publish(Message(topic), ONCE)
            await to_thread.run_sync(own.kill, signal.SIGKILL)
            await to_thread.run_sync(own.start)
            assert await bus.publish(Message(topic), ONCE) == Duplicate(first)
        assert len(await RedisHarness(own).entries(topic)) == 1


async def test_a_replica_that_takes_over_knows_the_keys_whose_messages_it_has(topic: str) -> None:
    with RunningServer(SERVER, "--repl-diskless-sync-delay", "0") as primary, RunningServer(SERVER) as replica:
        client: Any = replica.client()
        await to_thread.run_sync(client.replicaof, "127.0.0.1", primary.port)
        async with connect(primary.url, quick()) as bus:
            await bus.publish(Message(topic), ONCE)

            async def is_there() -> bool:
                return bool(await to_thread.run_sync(client.exists, topic))

            await until(is_there, "the message to be replicated")
        await to_thread.run_sync(client.replicaof, "no", "one")
        async with connect(replica.url, quick()) as bus:
            assert isinstance(await bus.publish(Message(topic), ONCE), Duplicate)
        assert len(await RedisHarness(replica).entries(topic)) == 1


# --- a cluster


@pytest.mark.parametrize("name", ["orders", "{shop}.orders", "x{shop}", "ä", "a b", "x" * 500])
def test_the_keys_are_in_their_topics_slot(name: str) -> None:
    assert {key_slot(key.encode()) for key in (name, dedup_ids(name), dedup_ends(name))} == {slot_of(name)}


async def stored_in(cluster: RunningCluster, topic: str) -> list[str]:
    harness = RedisHarness(cluster)
    try:
        return uids(await harness.entries(topic))
    finally:
        await to_thread.run_sync(harness._client.close)


async def test_a_wrong_map_of_the_cluster_doubles_nothing(cluster: RunningCluster, topic: str) -> None:
    slot = slot_of(topic)
    owner = await to_thread.run_sync(cluster.owner_of, topic)
    right = ("127.0.0.1", owner.port)
    async with RedisBackend(cluster.url) as backend:
        assert backend._cluster is not None
        topology = backend._cluster.topology
        owners = topology.map.owners
        for others in range(2):
            topology.map.owners[slot] = next(owner for owner in owners if owner != right)
            if others:
                [result] = await backend.publish_many([(topic, Message(topic), LONG)])
                assert isinstance(result, Duplicate)
            else:
                assert not isinstance(await backend.publish_with(topic, Message(topic), LONG), Duplicate)
    assert len(await stored_in(cluster, topic)) == 1


@pytest.mark.parametrize("first", ["stream", "ids", "ends"])
async def test_while_a_slot_moves_each_key_happens_once(first: str, cluster: RunningCluster, topic: str) -> None:
    """Its keys move one after another. Two publishers publish everything, and try again what was refused."""
    messages = [Message(topic, idempotency_key=f"moved-{number}") for number in range(60)]
    options = quick(publish_timeout=1)

    async def publish(bus: StreamBus, *, at_once: bool) -> None:
        for start in range(0, 60, 5):
            left = messages[start : start + 5]
            while left:
                if at_once:
                    outcome = await bus.publish_batch(left, OWN_KEYS)
                    left = [
                        one for one, result in zip(left, outcome.results, strict=True) if not isinstance(result, str)
                    ]
                    continue
                try:
                    await bus.publish(left[0], OWN_KEYS)
                except BackendError as error:
                    assert error.can_pass
                else:
                    del left[0]

    async with connect(cluster.url, options) as one, connect(cluster.url, options) as other:
        await one.publish(Message(topic), ONCE)
        target = await to_thread.run_sync(cluster.another, await to_thread.run_sync(cluster.owner_of, topic))
        source = await to_thread.run_sync(cluster.begin_move, topic, target)
        keys = {"stream": topic, "ids": dedup_ids(topic), "ends": dedup_ends(topic)}
        order = [keys.pop(first), *keys.values()]
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(publish, one, at_once=False))
                tasks.start_soon(partial(publish, other, at_once=True))
                for key in order:
                    await anyio.sleep(0.05)
                    await to_thread.run_sync(cluster.move_keys, source, target, [key.encode()])
                # All keys are there, and the slot is not yet: publishing goes on all the same.
                assert isinstance(await one.publish(Message(topic), ONCE), Duplicate)
                await to_thread.run_sync(cluster.end_move, topic, source, target)
    stored = await stored_in(cluster, topic)
    assert sorted(stored[1:]) == sorted(message.uid for message in messages)


class Picky(JsonCodec):
    """Its own error escapes, which it should not do."""

    def encode(self, message: Message) -> bytes:
        if message.key == "bad":
            raise KeyError("bad")
        return super().encode(message)


async def test_a_codec_that_raises_fails_its_own_message_only(server: RunningServer, topic: str) -> None:
    once, confirmed = PublishSpec(idempotency_key="k"), PublishSpec(confirmation="replicated", replicas=9)
    other = PublishSpec(idempotency_key="l")
    async with RedisBackend(server.url, codec=Picky()) as backend:
        bad = Message(topic, key="bad")
        items = [(topic, bad, once), (topic, Message(topic), other), (topic, bad, None), (topic, bad, confirmed)]
        results = await backend.publish_many(items)
    assert [type(result) for result in results] == [SerializationError, str, SerializationError, SerializationError]
