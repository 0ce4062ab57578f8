"""The slot of a topic moves, its keys in any order, while real processes publish and consume.

The specification, on each event loop: the topic's stream may be moved first, last or in between. Whatever is here and
there meanwhile, nothing is lost, and nothing is handled twice, from the uids that the processes wrote to files. One
message in sixteen fails at first: its retry crosses the move, too. The same holds for a server that moves a whole slot
in one step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from anyio import to_thread
from clusters import RunningCluster
from conftest import SERVER
from processes import wait_until
from test_cluster import topology
from test_cluster_failovers import ClusterWork

from anybus import BackendError, Message, retry_stream
from anybus.abc import Output
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import losses, waiting
from anybus.backends.redis._node import Node
from anybus.backends.redis._slots import slot_of

pytestmark = pytest.mark.thorough

MOVES = 4


@pytest.fixture(params=["asyncio", "uvloop", "trio"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ClusterWork]:
    with RunningCluster(SERVER) as cluster:
        made = ClusterWork(cluster, tmp_path, request.param)
        try:
            yield made
        finally:
            made.end()


def settle_and_compare(work: ClusterWork) -> None:
    """Nothing is lost, and nothing is handled twice."""
    for publisher in work.publishers:
        publisher.end()
    wait_until(work.is_settled, "all of it to be settled", every=0.2, growing=lambda: len(work.handled()))
    confirmed, handled = work.confirmed(), work.handled()
    for consumer in work.consumers:
        consumer.end()
    assert work.stored() == work.attempted() == confirmed
    assert handled.keys() == confirmed
    assert [uid for uid, times in handled.items() if times > 1] == []


def test_a_slot_may_move_in_one_step(work: ClusterWork) -> None:
    for consumer in work.consumers:
        consumer.wait_until_ready()
    work.publish("--pause", "0.005")
    for _ in range(2 * MOVES):
        work.wait_for_publishers(100)
        if not work.cluster.move_at_once(work.topic):
            pytest.skip("this server moves the keys of a slot one by one")
        work.wait_for_consumers(10, work.wait_for_publishers(20))
    settle_and_compare(work)


@pytest.mark.parametrize("order", ["stream-last", "shuffled"])
def test_the_keys_of_a_slot_may_move_in_any_order(work: ClusterWork, order: str) -> None:
    cluster = work.cluster
    chance = random.Random(13)
    for consumer in work.consumers:
        consumer.wait_until_ready()
    work.publish("--pause", "0.005")
    for _ in range(MOVES):
        work.wait_for_publishers(100)
        target = cluster.another(cluster.owner_of(work.topic))
        source = cluster.begin_move(work.topic, target)
        keys = sorted(cluster.keys(source, work.topic), key=lambda key: key == work.topic.encode())
        if order == "shuffled":
            chance.shuffle(keys)
        for key in keys:
            cluster.move_keys(source, target, [key])
            work.wait_for_publishers(10)
        cluster.end_move(work.topic, source, target)
        work.wait_for_consumers(10, work.wait_for_publishers(20))
    settle_and_compare(work)


async def test_keys_that_a_script_does_not_declare_may_be_elsewhere(cluster: RunningCluster, topic: str) -> None:
    """The server refuses a script if a declared key is elsewhere. What it does to others may fail, and must not matter."""
    retries = retry_stream(topic, "g")
    undeclared = {losses(topic, "g").encode(), waiting(topic, "g").encode()}
    async with RedisBackend(cluster.url) as backend:
        for stream in (topic, retries):
            await backend.create_group(stream, "g", "0")
            await backend.publish_later(stream, Message(topic), delay=3600)
        for _ in range(100):
            await backend.publish(topic, Message(topic))
        ids = [entry.id for entry in await backend.read_new(topic, "g", "c", count=100, timeout=0)]
        await backend.release(topic, "g", "c", ids[90:])  # creates both
        source = await to_thread.run_sync(cluster.owner_of, topic)
        target = cluster.another(source)

        def move_the_undeclared() -> None:
            cluster.begin_move(topic, target)
            assert undeclared <= set(cluster.keys(source, topic))
            cluster.move_keys(source, target, sorted(undeclared))

        await to_thread.run_sync(move_the_undeclared)
        try:
            node: Node = await topology(backend).node(slot_of(topic))
            assert await node.ack_many(topic, "g", ids[:40], consumer="c") == []
            assert await node.ack_many(topic, "g", ids[:1], consumer="c") == ids[:1]
            assert await node.renew(topic, "g", "c", ids[40:60]) == ids[40:60]
            output = Output(retries, Message(topic))
            results = await node.transfer_many(topic, "g", "c", [(one, [output]) for one in ids[40:50]])
            assert all(isinstance(result, list) for result in results)
            parked = await node.redeliver(topic, retries, "g", "d", min_idle=3600, count=64)
            assert parked.lost is None
            assert {entry.id for entry in parked.reclaimed} == set(ids[90:])
            assert len(parked.retries) == 10
            taken = await node.reclaim_idle(topic, "g", "d", min_idle=0, count=64)
            assert {entry.id for entry in taken} == set(ids[50:])
            # It declares the mark that entries wait: refused as a whole.
            with pytest.raises(BackendError, match="TRYAGAIN") as caught:
                await node.release(topic, "g", "d", ids[50:60])
            assert not caught.value.may_have_happened
            owners = {entry.id: entry.consumer for entry in await node.pending_entries(topic, "g")}
            assert owners == dict.fromkeys(ids[50:], "d")
        finally:
            await to_thread.run_sync(cluster.end_move, topic, source, target)
        await backend.release(topic, "g", "d", ids[50:60])
        owners = {entry.id: entry.consumer for entry in await backend.pending_entries(topic, "g")}
        assert owners == {**dict.fromkeys(ids[60:], "d"), **dict.fromkeys(ids[50:60], "anybus:returned")}
