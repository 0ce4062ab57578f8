"""Dead letters in another slot, while the processes that write them are killed.

The specification, on each event loop: two processes reject every second message, and are killed (kill -9) again and
again. A dead letter is appended on one node before its message is acknowledged on another one. So each rejected message
has a dead letter, and each other message was handled. Dead letters may be doubled by a kill between the two, and by
nothing else: at most one for each message that a killed process had in hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import RunningCluster
from conftest import SERVER
from harness import new_topic
from processes import wait_until
from test_redis_crashes import Child

from anybus import JsonCodec
from anybus.backends.redis._slots import slot_of

pytestmark = pytest.mark.thorough

KILLS = 6
IN_FLIGHT = 8


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[RunningCluster]:
    with RunningCluster(SERVER, replicas=0) as cluster:
        yield cluster


def uids(cluster: RunningCluster, stream: str) -> Counter[str]:
    codec = JsonCodec()
    with cluster.client() as client:
        entries: Any = client.xrange(stream)
    return Counter(codec.decode(fields[b"message"]).uid for _, fields in entries)


def is_settled(cluster: RunningCluster, topic: str) -> bool:
    with cluster.client() as client:
        untyped: Any = client
        [group] = untyped.xinfo_groups(topic)
        return not group["pending"] and group["last-delivered-id"] == untyped.xinfo_stream(topic)["last-generated-id"]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_every_rejected_message_has_a_dead_letter(own_cluster: RunningCluster, tmp_path: Path, loop: str) -> None:
    cluster = own_cluster
    topic = new_topic()
    while cluster.owner_of(topic) is cluster.owner_of(f"{topic}.dead"):
        topic = new_topic()
    assert slot_of(topic) != slot_of(f"{topic}.dead")
    common = ("--loop", loop, "--url", cluster.url, "--topic", topic)

    def consumer(number: int) -> Child:
        label = f"consumer-{number}"
        return Child(tmp_path, "refusing.py", label, *common, "--label", label)

    children = [consumer(number) for number in range(2)]
    dead: list[Child] = []
    (tmp_path / "publisher").mkdir()
    publisher = Child(tmp_path / "publisher", "publisher.py", "publisher", *common, "--pause", "0.002")
    try:
        for number in range(KILLS):
            victim = children.pop(0)
            wait_until(lambda child=victim: len(child.lines("refused")) > 50, "it to reject", every=0.02)  # type: ignore[misc]
            victim.process.kill()
            victim.process.wait()
            dead.append(victim)
            children.append(consumer(2 + number))
        publisher.end()
        wait_until(
            lambda: is_settled(cluster, topic),
            "all to be settled",
            every=0.1,
            growing=lambda: len(uids(cluster, topic)),
        )
        published = uids(cluster, topic)
        letters = uids(cluster, f"{topic}.dead")
        handled = {uid for child in (*dead, *children) for uid in child.uids("handled")}
        refused = {uid for child in (*dead, *children) for uid in child.uids("refused")}
        assert letters.keys() == refused
        assert handled.isdisjoint(refused)
        assert handled | refused == published.keys()
        assert sum(letters.values()) - len(letters) <= KILLS * IN_FLIGHT
        print(f"{len(letters)} dead letters, {sum(letters.values()) - len(letters)} doubled")
    finally:
        for child in (*children, publisher):
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()
