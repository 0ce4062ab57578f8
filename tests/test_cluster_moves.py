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
from clusters import RunningCluster
from conftest import SERVER
from processes import wait_until
from test_cluster_failovers import ClusterWork

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
