"""What a cluster demands at the edges.

The specification:

- A backend that was used on a single server, and is entered again when that server is a node of a cluster, works on the
  whole cluster.
- A dead-letter topic whose keys cannot share a slot is refused when the subscription starts, not at the first dead
  letter. Another database than 0 is refused by name, whatever the form of the URL.
- What only seems to be a node, and a node that sentinels name, are refused by a clear error, not by a crash.
- A consumer that is forgotten leaves no connection behind, also if its slot has moved since its last read.
- The rights that the docs name are enough, on every node: for retries, a dead letter in another slot, and publishing.
- A node that has lost its slots is left with all that belongs to it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from acl import SECRET
from anyio import to_thread
from anyio.abc import SocketAttribute, SocketStream
from clusters import RunningCluster
from conftest import SERVER
from harness import QUICK, Recorder, new_topic, quick, until
from servers import RedisHarness, RunningServer
from test_redis_rights import DOCUMENTED

from anybus import BackendError, Delivery, Message, StreamBus, SubscriptionConfig, UnsupportedError, ValidationError
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._link import Link, open_link
from anybus.backends.redis._settings import Locator, from_url
from anybus.backends.redis._slots import slot_of

ON_A_CLUSTER = re.search(
    r"In addition to \[these\]\(#rights\): `(.*?)`",
    (Path(__file__).parent.parent / "docs" / "redis.md").read_text(),
)


def topology(backend: RedisBackend) -> Any:
    assert backend._cluster is not None
    return backend._cluster.topology


async def test_a_server_that_is_in_a_cluster_when_it_is_entered_again() -> None:
    cluster = RunningCluster(SERVER, replicas=0)
    single = RunningServer(SERVER)
    single.port = cluster.nodes[0].port
    backend = RedisBackend(f"redis://127.0.0.1:{single.port}")
    topics = [new_topic() for _ in range(12)]
    await to_thread.run_sync(single.__enter__)
    try:
        async with backend:
            assert await backend.publish(topics[0], Message(topics[0]))
    finally:
        await to_thread.run_sync(single.stop)
    try:
        await to_thread.run_sync(cluster.__enter__)
        async with backend:
            for topic in topics:
                assert await backend.publish(topic, Message(topic))
                assert await backend.publish_within(topic, Message(topic), timeout=5)
                assert await backend.count_entries(topic) == 2
            results = await backend.publish_many([(topic, Message(topic), None) for topic in topics])
            assert all(isinstance(result, str) for result in results)
    finally:
        await to_thread.run_sync(cluster.__exit__)


@pytest.mark.parametrize("dead", ["a}b", "{}x"])
async def test_a_dead_letter_topic_that_cannot_be_on_a_cluster_is_refused(
    cluster: RunningCluster, topic: str, dead: str
) -> None:
    async with StreamBus(RedisBackend(cluster.url), quick(Recorder())) as bus:
        with pytest.raises(ValidationError, match="share a slot"):
            async with bus.deliveries(SubscriptionConfig(topic, "g", dead_letter_topic=dead)):
                pass
    with cluster.client() as client:
        assert not client.exists(topic)


async def test_a_database_of_a_cluster_is_refused_for_good(cluster: RunningCluster) -> None:
    with pytest.raises((UnsupportedError, BackendError), match="a cluster has only database 0") as caught:
        async with RedisBackend(f"{cluster.nodes[0].url}/1"):
            pass
    assert not getattr(caught.value, "can_pass", False)


@pytest.mark.parametrize("url", ["redis+cluster://a/1", "redis+cluster://a?db=1"])
def test_a_database_of_a_cluster_is_refused_as_a_wrong_url(url: str) -> None:
    with pytest.raises(ValidationError, match="no other database than 0"):
        RedisBackend(url)


async def test_what_is_no_node_is_no_crash() -> None:
    """It answers every command with a number."""

    async def answer(stream: SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send(b":1\r\n" * data.count(b"*"))

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    port = listener.extra(SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, answer)
        with pytest.raises(BackendError, match="is it a Redis or Valkey server") as caught:
            async with RedisBackend(f"redis+cluster://127.0.0.1:{port}"):
                pass
        assert caught.value.can_pass
        tasks.cancel_scope.cancel()


async def test_a_node_that_sentinels_name_is_refused(cluster: RunningCluster) -> None:
    backend = RedisBackend("redis+sentinel://a/service")
    node = cluster.nodes[0]
    client: Any = backend._client
    sentinels = client.settings.locator

    class ToTheNode(Locator):
        news = anyio.Event()

        async def open(self, *, entering: bool) -> Link:
            return await open_link(from_url(node.url), entering=entering)

        async def watch(self) -> None:
            await sentinels.watch()

    client.mux._settings = client.settings = replace(client.settings, locator=ToTheNode())
    with pytest.raises(UnsupportedError, match="sentinels"):
        async with backend:
            pass


async def move(cluster: RunningCluster, topic: str) -> None:
    def work() -> None:
        target = cluster.another(cluster.owner_of(topic))
        source = cluster.begin_move(topic, target)
        cluster.end_move(topic, source, target)

    await to_thread.run_sync(work)


async def test_a_consumer_that_is_forgotten_after_a_move_leaves_nothing_behind(
    cluster: RunningCluster, topic: str
) -> None:
    async with RedisBackend(f"{cluster.url}?client_name={topic}") as backend:
        await backend.create_group(topic, "g", "0")
        assert await backend.read_new(topic, "g", "c", count=1, timeout=0.2) == []
        old = await topology(backend).node(slot_of(topic))
        assert old.taking._readers._pool_of
        await move(cluster, topic)
        assert await backend.publish(topic, Message(topic))
        await backend.forget_consumer(topic, "g", "c")
        assert not old.taking._readers._pool_of
        assert not topology(backend)._placed
        assert not topology(backend)._memory.tracks


async def test_the_documented_rights_are_enough_on_a_cluster(cluster: RunningCluster) -> None:
    assert DOCUMENTED is not None
    assert ON_A_CLUSTER is not None
    topic = f"orders.{new_topic()}"
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)
        raise ValueError("a retry, and then a dead letter")

    rules = (*DOCUMENTED[1].split(), *ON_A_CLUSTER[1].split())
    for node in cluster.nodes:  # each has users of its own
        await to_thread.run_sync(node.ask, "ACL", "SETUSER", "worker", "on", f">{SECRET}", *rules)
    try:
        hosts = cluster.url.removeprefix("redis+cluster://")
        url = f"redis+cluster://worker:{SECRET}@{hosts}"
        async with StreamBus(RedisBackend(url), quick(Recorder())) as bus:
            config = SubscriptionConfig(topic, "g", max_retry=1, retry_backoff=QUICK)
            async with bus.subscribe(config, handler):
                message = Message(topic)
                await bus.publish(message)

                async def is_dead() -> bool:
                    return len(await RedisHarness(cluster).entries(f"{topic}.dead")) == 1

                await until(is_dead, "the dead letter")
        assert handled == [message.uid] * 2
    finally:
        for node in cluster.nodes:
            await to_thread.run_sync(node.ask, "ACL", "DELUSER", "worker")


@pytest.mark.thorough
async def test_a_node_without_slots_is_left_with_all_that_belongs_to_it() -> None:
    """It is a primary still, as long as its slots are elsewhere."""

    def start() -> RunningCluster:
        return RunningCluster(SERVER, "--cluster-require-full-coverage", "no", replicas=0).__enter__()

    cluster = await to_thread.run_sync(start)
    try:
        topic = new_topic()
        source = await to_thread.run_sync(cluster.owner_of, topic)
        target = cluster.another(source)

        def empty() -> None:
            ranges = [(first, last) for first, last, port in cluster._ranges(source) if port == source.port]
            cluster.end_move(topic, cluster.begin_move(topic, target), target)
            rest = {slot for first, last in ranges for slot in range(first, last + 1)} - {slot_of(topic)}
            for node in (source, *(node for node in cluster.nodes if node is not source)):
                node.ask("CLUSTER", "DELSLOTS", *rest)
            target.ask("CLUSTER", "ADDSLOTS", *rest)
            target.ask("CLUSTER", "BUMPEPOCH")
            cluster.owner(rest.pop())  # once all agree

        handled: list[str] = []

        async def handler(delivery: Any) -> None:
            handled.append(delivery.message.uid)

        backend = RedisBackend(f"{cluster.url}?client_name=left")
        async with StreamBus(backend, quick(Recorder())) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
                await bus.publish(Message(topic))
                await until(lambda: len(handled) == 1, "a message to be handled")
                await to_thread.run_sync(empty)
                last = Message(topic)
                await bus.publish(last)
                await until(lambda: last.uid in handled, "a message to be handled")

                async def is_left() -> bool:
                    names = await to_thread.run_sync(source.ask, "CLIENT", "LIST")
                    # (A publish may find the way by itself, so the map may be asked for a little later.)
                    topology(backend).map.want()
                    return b"name=left" not in names

                await until(is_left, "the node to be left")
                assert source.port not in {address.port for address in topology(backend)._addresses.values()}
    finally:
        await to_thread.run_sync(cluster.__exit__)
