"""A cluster as one backend sees it.

The specification:

- A stream and all keys beside it are in one slot, by the server's own hashing. A topic for which that cannot be so is
  refused, with the reason, before anything is written.
- ``redis+cluster://``, and a plain URL of any node, replicas included, lead to the whole cluster. So do redis-py's
  clients of a cluster. A ``+cluster`` URL of a single server, another database than 0, and a cluster that nobody
  answers for are clear errors.
- Redirections: MOVED leads to the right node at once; a node that redirects is not disconnected from.
- Many messages go to all nodes at once, in order within each topic; a node that does not answer fails its own only.
- A dead letter, an output and a replay in another slot are appended first, and removed again if the entry turns out to be
  no longer ours.
"""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack
from typing import Any

import pytest
from anyio import to_thread
from clusters import RunningCluster
from conftest import SERVER
from harness import QUICK, Recorder, new_topic, quick, until
from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster
from servers import RedisHarness, RunningServer, free_port

import anybus
from anybus import (
    BackendError,
    Delivery,
    JsonCodec,
    Message,
    StreamBus,
    SubscriptionConfig,
    UnsupportedError,
    ValidationError,
    retry_stream,
)
from anybus.abc import Move, Output
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._errors import translate
from anybus.backends.redis._keys import delayed, leases, losses, meta, waiting
from anybus.backends.redis._protocol import ServerError
from anybus.backends.redis._settings import from_client, from_url
from anybus.backends.redis._slots import Address, redirection, slot_map, slot_of

ASKED = Address("127.0.0.1", 7000)


def topology(backend: RedisBackend) -> Any:
    assert backend._cluster is not None
    return backend._cluster.topology


def in_another_slot(topic: str) -> str:
    """A topic that another node has."""
    while True:
        other = new_topic()
        if abs(slot_of(other) - slot_of(topic)) > 6000:
            return other


def beside(topic: str) -> list[str]:
    retries = retry_stream(topic, "g")
    keys = [delayed(topic), meta(topic), leases(topic, "g"), losses(topic, "g"), waiting(topic, "g")]
    return [topic, retries, delayed(retries), meta(retries), *keys]


# --- slots


@pytest.mark.parametrize("name", ["orders", "a.b", "{shop}.orders", "x{shop}", "{}{shop", "ä", "a b"])
def test_the_keys_of_a_topic_share_the_slot_that_the_server_says(cluster: RunningCluster, name: str) -> None:
    try:
        slot = slot_of(name)
    except ValidationError:
        assert name == "{}{shop"
        return
    assert {cluster.nodes[0].ask("CLUSTER", "KEYSLOT", key) for key in beside(name)} == {slot}


@pytest.mark.parametrize("name", ["a}b", "}", "{}x", "a}{b"])
async def test_a_topic_whose_keys_cannot_share_a_slot_is_refused(cluster: RunningCluster, name: str) -> None:
    async with StreamBus(RedisBackend(cluster.url), quick(Recorder())) as bus:
        with pytest.raises(ValidationError, match="share a slot"):
            await bus.publish(Message(name))
        with pytest.raises(ValidationError, match="share a slot"):
            async with bus.deliveries(SubscriptionConfig(name, "g")):
                pass
        [refused, published] = await bus.backend.publish_many(
            [(name, Message(name), None), ("ok", Message("ok"), None)]
        )
        assert isinstance(refused, ValidationError)
        assert isinstance(published, str)
    with cluster.client() as client:
        assert not client.exists(name)


def test_redirections() -> None:
    def of(text: str) -> Any:
        return redirection(translate(ServerError(text)), ASKED)

    assert of("MOVED 1 10.0.0.1:6379") == ("MOVED", ("10.0.0.1", 6379))
    assert of("ASK 1 ::1:6379") == ("ASK", ("::1", 6379))
    assert of("MOVED 1 :6379") == ("MOVED", ("127.0.0.1", 6379))
    assert of("TRYAGAIN Multiple keys request during rehashing of slot") == ("TRYAGAIN", None)
    assert of("CLUSTERDOWN The cluster is down") == ("CLUSTERDOWN", None)
    assert of("UNBLOCKED force unblock from blocking operation, instance state changed") == ("GONE", None)
    assert of("UNBLOCKED the stream key no longer exists") is None
    assert of("WRONGTYPE no") is None
    assert of("MOVED nonsense") is None
    assert redirection(BackendError("x"), ASKED) is None


def test_the_map_of_a_node_that_leaves_out_its_host() -> None:
    slots = [[0, 1, [b"", 7000, b"id"], [b"10.0.0.2", 7001, b"id"]], [2, 2, [None, 7002, b"id"]]]
    found = slot_map(slots, b"cluster_state:fail\r\ncluster_current_epoch:7\r\n", ASKED)
    assert found.owners[:4] == [("127.0.0.1", 7000)] * 2 + [("127.0.0.1", 7002), None]
    assert found.addresses == (("127.0.0.1", 7000), ("10.0.0.2", 7001), ("127.0.0.1", 7002))
    assert (found.epoch, found.is_well) == (7, False)
    assert slot_map(slots, ServerError("NOPERM"), ASKED).is_well


# --- URLs and clients


def test_a_url_names_nodes() -> None:
    settings = from_url("rediss+cluster://user:pass%40word@a,b:7001,[::1]:7002/?client_name=me")
    assert [(seed.host, seed.port) for seed in settings.seeds] == [("a", 6379), ("b", 7001), ("::1", 7002)]
    assert all(seed.cluster and seed.tls is not None and seed.client_name == "me" for seed in settings.seeds)
    assert settings.seeds[1].tls_hostname == "b"
    assert settings.credentials is not None
    assert settings.credentials.get_credentials() == ("user", "pass@word")
    assert "pass" not in f"{settings} {settings.place}"


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://",
        "redis+cluster://a,,b",
        "redis+cluster://a:0",
        "redis+cluster://a/1",
        "redis+cluster://a?db=1",
        "redis+cluster://a?ssl_cert_reqs=none",
        "redis+cluster://a#b",
        "unix+cluster:///run/redis.sock",
        "redis+cluster+sentinel://a",
    ],
)
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises((ValidationError, UnsupportedError)):
        anybus.connect(url)


async def test_any_node_leads_to_the_whole_cluster(cluster: RunningCluster) -> None:
    for node in cluster.nodes:
        topics = [new_topic() for _ in range(12)]
        async with RedisBackend(node.url) as backend:
            assert "connected" in repr(backend)
            ids = await backend.publish_many([(topic, Message(topic), None) for topic in topics])
            assert all(isinstance(one, str) for one in ids)
            assert [await backend.count_entries(topic) for topic in topics] == [1] * 12
        async with backend:  # once more
            assert await backend.count_entries(topics[0]) == 1


async def test_clients_of_a_cluster_bring_their_nodes(cluster: RunningCluster, topic: str) -> None:
    def sync_client() -> Any:
        return cluster.client()

    client = await to_thread.run_sync(sync_client)
    asynchronous = AsyncRedisCluster(host="127.0.0.1", port=cluster.nodes[1].port, client_name="named")
    for one in (client, asynchronous):
        async with RedisBackend.from_client_settings(one) as backend:
            assert await backend.publish(topic, Message(topic))
    await to_thread.run_sync(client.close)
    assert from_client(asynchronous).seeds[0].client_name == "named"


def test_the_security_of_a_client_of_a_cluster_is_kept() -> None:
    client = AsyncRedisCluster(host="10.0.0.1", port=7001, username="me", password="secret", ssl=True)
    settings = from_client(client)
    [seed] = settings.seeds
    assert (seed.host, seed.port, seed.tls is not None) == ("10.0.0.1", 7001, True)
    assert seed.credentials is not None
    assert seed.credentials.get_credentials() == ("me", "secret")
    assert seed.tls_hostname == "10.0.0.1"
    translating = AsyncRedisCluster(host="10.0.0.1", port=7001, address_remap=lambda address: address)
    with pytest.raises(UnsupportedError, match="address_remap"):
        from_client(translating)


async def test_a_single_server_is_no_cluster(server: RunningServer) -> None:
    with pytest.raises(UnsupportedError, match="not in cluster mode"):
        async with RedisBackend(server.url.replace("redis://", "redis+cluster://")):
            pass


async def test_a_cluster_of_which_no_node_answers() -> None:
    ports = free_port(), free_port()
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    with pytest.raises(BackendError) as caught:
        async with RedisBackend(f"redis+cluster://{hosts}"):
            pass
    assert caught.value.can_pass
    assert all(str(port) in str(caught.value) for port in ports)


async def test_one_node_of_the_url_is_enough(cluster: RunningCluster, topic: str) -> None:
    url = f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{cluster.nodes[5].port}"
    async with RedisBackend(url) as backend:
        assert await backend.publish(topic, Message(topic))


# --- redirections


async def test_a_wrong_map_is_corrected_by_the_nodes(cluster: RunningCluster, topic: str) -> None:
    async with RedisBackend(cluster.url) as backend:
        map_of = topology(backend)
        slot = slot_of(topic)
        right = map_of.map.owners[slot]
        wrong = next(owner for owner in map_of.map.owners if owner != right)
        map_of.map.owners[slot] = wrong
        wrong_node = await map_of.node(slot)
        assert await backend.publish(topic, Message(topic))
        assert map_of.map.owners[slot] == right
        map_of.map.owners[slot] = wrong
        [published] = await backend.publish_many([(topic, Message(topic), None)])
        assert isinstance(published, str)
        assert await backend.create_group(topic, "g", "0")
        map_of.map.owners[slot] = wrong
        assert len(await backend.read_new(topic, "g", "c", count=10, timeout=0)) == 2
        assert wrong_node.client.mux.connections == 1
        assert wrong_node.client.mux.is_connected


async def test_a_map_without_the_slot_is_asked_for_again(cluster: RunningCluster, topic: str) -> None:
    async with RedisBackend(cluster.url) as backend:
        topology(backend).map.owners[slot_of(topic)] = None
        assert await backend.publish(topic, Message(topic))


async def test_while_a_slot_moves_publishing_goes_on_in_order(cluster: RunningCluster, topic: str) -> None:
    numbers = [Message.from_json(topic, number) for number in range(30)]
    async with RedisBackend(cluster.url) as backend:
        await backend.publish(topic, numbers[0])
        target = cluster.another(cluster.owner_of(topic))
        source = await to_thread.run_sync(cluster.begin_move, topic, target)
        await backend.publish(topic, numbers[1])
        await to_thread.run_sync(cluster.move_keys, source, target, cluster.keys(source, topic))
        for message in numbers[2:10]:
            await backend.publish(topic, message)
        for message in numbers[10:15]:
            await backend.publish_within(topic, message, timeout=10)
        ids = await backend.publish_many([(topic, message, None) for message in numbers[15:20]])
        assert all(isinstance(one, str) for one in ids)
        await to_thread.run_sync(cluster.end_move, topic, source, target)
        for message in numbers[20:]:
            await backend.publish(topic, message)
    entries = await RedisHarness(cluster).entries(topic)
    assert [message.json() for _, message, _ in entries if message is not None] == list(range(30))


# --- work on several nodes


async def test_a_node_that_does_not_answer_fails_its_own_messages_only(topic: str) -> None:
    def start() -> RunningCluster:
        return RunningCluster(SERVER, "--cluster-require-full-coverage", "no", replicas=0, node_timeout=60).__enter__()

    own = await to_thread.run_sync(start)
    try:
        async with RedisBackend(own.url, connect_timeout=0.5, command_timeout=0.5) as backend:
            other = in_another_slot(topic)
            topics = [topic, other] * 5
            own.owner_of(topic).kill(signal.SIGKILL)
            results = await backend.publish_many([(one, Message(one), None) for one in topics])
            for one, result in zip(topics, results, strict=True):
                assert isinstance(result, BackendError if one == topic else str), result
            assert await backend.count_entries(other) == 5
    finally:
        await to_thread.run_sync(own.__exit__)


async def test_messages_for_many_topics_keep_their_order(cluster: RunningCluster) -> None:
    topics = [new_topic() for _ in range(20)]
    items = [(topic, Message.from_json(topic, number), None) for number in range(20) for topic in topics]
    async with RedisBackend(cluster.url) as backend:
        results = await backend.publish_many(items)
        assert all(isinstance(result, str) for result in results)
        assert len(topology(backend)._nodes) == 3
    harness = RedisHarness(cluster)
    for topic in topics:
        found = [message.json() for _, message, _ in await harness.entries(topic) if message is not None]
        assert found == list(range(20))


async def taken(backend: RedisBackend, topic: str, count: int) -> list[str]:
    await backend.create_group(topic, "g", "0")
    for _ in range(count):
        await backend.publish(topic, Message(topic))
    return [entry.id for entry in await backend.read_new(topic, "g", "c", count=count, timeout=1)]


async def test_outputs_in_other_slots_are_appended_and_the_entry_acknowledged(
    cluster: RunningCluster, topic: str
) -> None:
    other, near = in_another_slot(topic), f"{{{topic}}}.near"
    async with RedisBackend(cluster.url) as backend:
        ids = await taken(backend, topic, 3)
        outputs = [Output(near, Message(near)), Output(other, Message(other)), Output(other, Message(other), delay=60)]
        results = await backend.transfer_many(topic, "g", "c", [(one, outputs) for one in [*ids[:2], "9-9", "no id"]])
        assert results[2:] == [None, None]
        for result in results[:2]:
            assert isinstance(result, list)
            assert len(result) == 3
        assert [await backend.count_entries(one) for one in (near, other)] == [2, 2]
        with cluster.client() as client:
            assert client.zcard(delayed(other)) == 2
        assert [entry.id for entry in await backend.pending_entries(topic, "g")] == [ids[2]]


async def test_an_output_is_removed_again_if_the_entry_is_not_ours_any_more(
    cluster: RunningCluster, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = in_another_slot(topic)
    async with RedisBackend(cluster.url) as backend:
        [entry_id] = await taken(backend, topic, 1)
        assert backend._cluster is not None
        scatter: Any = backend._cluster.scatter
        append = scatter._append

        async def and_lose_the_entry(additions: Any) -> Any:
            results = await append(additions)
            assert await backend.reclaim_idle(topic, "g", "another", min_idle=0, count=1)
            return results

        monkeypatch.setattr(scatter, "_append", and_lose_the_entry)
        outputs = [Output(other, Message(other)), Output(other, Message(other), delay=60)]
        assert await backend.transfer(topic, "g", "c", entry_id, outputs) is None
        assert await backend.count_entries(other) == 0
        with cluster.client() as client:
            assert not client.exists(delayed(other))


async def test_an_output_that_cannot_be_appended_leaves_the_entry_pending(cluster: RunningCluster, topic: str) -> None:
    other, third = in_another_slot(topic), in_another_slot(topic)
    with cluster.client() as client:
        client.set(third, "no stream")
    async with RedisBackend(cluster.url) as backend:
        ids = await taken(backend, topic, 2)
        bad = [Output(other, Message(other)), Output(third, Message(third))]
        results = await backend.transfer_many(topic, "g", "c", [(ids[0], bad), (ids[1], bad[:1])])
        assert isinstance(results[0], BackendError)
        assert not results[0].may_have_happened
        assert isinstance(results[1], list)
        assert await backend.count_entries(other) == 1
        assert [entry.id for entry in await backend.pending_entries(topic, "g")] == [ids[0]]


async def test_a_dead_letter_in_another_slot_comes_and_is_replayed(cluster: RunningCluster, topic: str) -> None:
    dead = f"{topic}.dead"
    assert slot_of(dead) != slot_of(topic)
    failing = True
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        if failing:
            raise ValueError("not yet")
        handled.append(delivery.message.uid)

    async with StreamBus(RedisBackend(cluster.url), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", max_retry=1, retry_backoff=QUICK)
        async with bus.subscribe(config, handler):
            messages = [Message(topic) for _ in range(5)]
            for message in messages:
                await bus.publish(message)
            harness = RedisHarness(cluster)

            async def are_dead() -> bool:
                return len(await harness.entries(dead)) == 5

            await until(are_dead, "five dead letters")
            failing = False
            letters = bus.dead_letters(topic)
            assert await letters.replay() is not None
            await until(lambda: len(handled) == 5, "five to be handled")
            assert sorted(handled) == sorted(message.uid for message in messages)
            assert await harness.entries(dead) == []


async def test_moves_to_another_slot(cluster: RunningCluster, topic: str) -> None:
    other = in_another_slot(topic)
    harness = RedisHarness(cluster)
    raw = await harness.append_raw(topic, {"raw:field": b"value", "message": b"{}"})
    bare = await harness.append_raw(topic, {"field": b"value"})
    codec = JsonCodec()
    encoded = await harness.append_raw(topic, {"message": codec.encode(Message(topic))})
    async with RedisBackend(cluster.url) as backend:
        replaced = Message(other)
        moves = [
            Move(raw, other, None),
            Move(bare, other, None),
            Move(encoded, other, replaced),
            Move("1-1", other, replaced),
            Move("no id", other, None),
        ]
        results = await backend.move_entries(topic, moves)
        assert [type(results[index]) for index in (0, 2)] == [str, str]
        assert isinstance(results[1], BackendError)
        assert not results[1].can_pass
        assert results[3:] == [None, None]
    assert [(rest, message and message.uid) for _, message, rest in await harness.entries(other)] == [
        ({"field": b"value"}, None),
        ({}, replaced.uid),
    ]
    assert [entry_id for entry_id, _, _ in await harness.entries(topic)] == [bare]


async def test_each_slot_has_its_own_blocking_read_and_leaving_closes_all(cluster: RunningCluster) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.topic)

    topics = [new_topic() for _ in range(30)]
    async with StreamBus(RedisBackend(f"{cluster.url}?client_name=many"), quick(Recorder())) as bus:
        async with AsyncExitStack() as stack:
            for topic in topics:
                await stack.enter_async_context(bus.subscribe(SubscriptionConfig(topic, "g"), handler))
            for topic in topics:
                await bus.publish(Message(topic))
            await until(lambda: len(handled) == 30, "all to be handled")
    assert sorted(handled) == sorted(topics)

    def left() -> int:
        return sum(node.ask("CLIENT", "LIST").count(b"name=many") for node in cluster.nodes)

    async def none_left() -> bool:
        return await to_thread.run_sync(left) == 0

    await until(none_left, "the connections to be closed")
