"""A real cluster, on which primaries die and slots move, while real processes work on it.

The specification, on each event loop:

- A primary is killed (kill -9). Its replica takes its place, and everything goes on by itself: what was published before
  and after it is handled. The ex-primary that comes back is not connected to.
- The same if the primary lives and is replaced, and if it is frozen, replaced, and wakes up.
- The node of the dead letters is killed, while messages are rejected all the time. Each message is rejected once, and its
  settlement is repeated until it has a dead letter. Only dead letters that were confirmed before the kill can be lost.
- The slot of a topic is moved to another node and back while two processes publish and two consume, its keys one after
  another, with pauses in which some are here and some there. Nothing is lost, and nothing is handled twice, from the
  uids that the processes wrote to files.
- ``thorough``: the topic's primary is killed several times, while two processes publish and four consume. Whatever the last
  primary has was handled. What asynchronous replication lost is counted. Each message that was handled twice had an
  acknowledgement that was lost with a primary or was under way at that time (``repeats.py``).
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from clusters import RunningCluster
from conftest import SERVER
from harness import Recorder, new_topic, quick, until
from processes import wait_until
from repeats import Outage, causes
from servers import RedisHarness
from sweeps import FAILOVERS
from test_sentinel_failovers import Work, publish_patiently

from anybus import Delivery, JsonCodec, Message, Reject, StreamBus, SubscriptionConfig, retry_stream
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import delayed

MOVES = 4


@pytest.fixture(scope="module")
def running() -> Iterator[RunningCluster]:
    with RunningCluster(SERVER) as cluster:
        yield cluster


async def test_a_failover_is_followed_by_everything(running: RunningCluster, topic: str) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    async with StreamBus(RedisBackend(f"{running.url}?client_name=work"), quick(Recorder(), block_timeout=30)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            before = Message(topic)
            await bus.publish(before)
            await until(lambda: before.uid in handled, "a message to be handled")
            old, _ = await to_thread.run_sync(running.kill_owner, topic)
            after = Message(topic)
            await publish_patiently(bus, after)
            await until(lambda: after.uid in handled, "a message to be handled after the failover")
            await to_thread.run_sync(running.bring_back, old)
            last = Message(topic)
            await bus.publish(last)
            await until(lambda: last.uid in handled, "the last message to be handled")
            assert subscription.is_running
            names = await to_thread.run_sync(old.ask, "CLIENT", "LIST")
            assert b"name=work" not in names


async def test_a_primary_that_lives_and_is_replaced_is_left(running: RunningCluster, topic: str) -> None:
    """It ends the blocking reads, and leads everything to the new one."""
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    async with StreamBus(RedisBackend(running.url), quick(Recorder(), block_timeout=30)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            before = Message(topic)
            await bus.publish(before)
            await until(lambda: before.uid in handled, "a message to be handled")
            old = await to_thread.run_sync(running.owner_of, topic)
            await to_thread.run_sync(running.switch, topic)
            after = Message(topic)
            await publish_patiently(bus, after)
            await until(lambda: after.uid in handled, "a message to be handled after the switch")
            await to_thread.run_sync(wait_until, lambda: running.is_well, "all to agree")
            assert await to_thread.run_sync(running.owner_of, topic) is not old
            assert subscription.is_running


async def test_a_primary_that_is_frozen_and_replaced_is_left(running: RunningCluster, topic: str) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    backend = RedisBackend(running.url, connect_timeout=1, command_timeout=1)
    async with StreamBus(backend, quick(Recorder(), block_timeout=30, publish_timeout=1)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            before = Message(topic)
            await bus.publish(before)
            await until(lambda: before.uid in handled, "a message to be handled")
            old = await to_thread.run_sync(running.owner_of, topic)
            os.kill(old.pid, signal.SIGSTOP)
            try:
                after = Message(topic)
                await publish_patiently(bus, after)
                await until(lambda: after.uid in handled, "a message to be handled after the failover")
            finally:
                os.kill(old.pid, signal.SIGCONT)
            for _ in range(20):
                message = Message(topic)
                await publish_patiently(bus, message)  # on a busy machine, the new one may miss the others for a moment
                await until(partial(handled.__contains__, message.uid), "a message to be handled")
            await to_thread.run_sync(wait_until, lambda: running.is_well, "all to agree")


@pytest.mark.thorough
async def test_dead_letters_go_on_if_their_node_dies(running: RunningCluster) -> None:
    """It is another node than the topic's. Only what it had confirmed can be lost with it, by asynchronous replication."""
    topic = new_topic()
    dead = f"{topic}.dead"
    while await to_thread.run_sync(running.owner_of, topic) is await to_thread.run_sync(running.owner_of, dead):
        topic = new_topic()
        dead = f"{topic}.dead"
    rejected: Counter[str] = Counter()
    uids: dict[str | None, str] = {}
    published: list[str] = []
    recorder = Recorder()

    async def handler(delivery: Delivery) -> None:
        rejected[delivery.id] += 1
        uids[delivery.id] = delivery.message.uid
        raise Reject("all of them")

    def lettered() -> set[str]:
        return {uids[event.message_id] for event in recorder.of("on_dead_lettered")}

    async def publish_all_the_time() -> None:
        while True:
            message = Message(topic)
            await publish_patiently(bus, message)
            published.append(message.uid)
            await anyio.sleep(0.002)

    backend = RedisBackend(running.url)
    async with StreamBus(backend, quick(recorder, claim_idle_timeout=30)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_in_flight=64), handler) as subscription:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(publish_all_the_time)
                await until(lambda: len(lettered()) > 200, "dead letters")
                old, _ = await to_thread.run_sync(running.kill_owner, dead)
                before = lettered()
                await until(lambda: len(lettered()) > len(before) + 200, "dead letters after the failover")
                tasks.cancel_scope.cancel()
            await until(lambda: set(published) <= lettered(), "all of them to be dead letters")
            assert subscription.is_running
            assert await backend.pending_entries(topic, "g") == []
    await to_thread.run_sync(running.bring_back, old)
    letters = Counter(message.uid for _, message, _ in await RedisHarness(running).entries(dead) if message is not None)
    lost = set(published) - letters.keys()
    assert lost <= before
    assert [one for one, times in rejected.items() if times > 1] == []
    print(f"{len(published)} messages, {len(lost)} lost, {letters.total() - len(letters)} doubled")


class ClusterWork(Work):
    """Publishers and consumers on a cluster."""

    def __init__(self, cluster: RunningCluster, folder: Path, loop: str) -> None:
        super().__init__(cluster, folder, loop)  # type: ignore[arg-type]  # it has a URL, too
        self.cluster = cluster

    def ids(self) -> dict[str, str]:
        codec = JsonCodec()
        with self.cluster.client() as client:
            entries: Any = client.xrange(self.topic)
        return {codec.decode(fields[b"message"]).uid: entry_id.decode() for entry_id, fields in entries}

    def is_settled(self) -> bool:
        with self.cluster.client() as client:
            untyped: Any = client
            for stream in (self.topic, retry_stream(self.topic, "g")):
                [group] = untyped.xinfo_groups(stream)
                if group["pending"] or group["last-delivered-id"] != untyped.xinfo_stream(stream)["last-generated-id"]:
                    return False
            return not untyped.exists(delayed(retry_stream(self.topic, "g")))


@pytest.fixture(params=["asyncio", "uvloop", "trio"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ClusterWork]:
    with RunningCluster(SERVER) as cluster:
        made = ClusterWork(cluster, tmp_path, request.param)
        try:
            yield made
        finally:
            made.end()


@pytest.mark.thorough
def test_a_slot_that_moves_under_load_loses_and_doubles_nothing(work: ClusterWork) -> None:
    cluster = work.cluster
    for consumer in work.consumers:
        consumer.wait_until_ready()
    work.publish("--pause", "0.005")
    for _ in range(MOVES):
        work.wait_for_publishers(100)
        target = cluster.another(cluster.owner_of(work.topic))
        source = cluster.begin_move(work.topic, target)
        # The topic first: then publishes and reads are redirected (ASK), and what needs other keys as well must wait.
        keys = sorted(cluster.keys(source, work.topic), key=lambda key: key != work.topic.encode())
        for key in keys:
            cluster.move_keys(source, target, [key])
            work.wait_for_publishers(10)
        cluster.end_move(work.topic, source, target)
        work.wait_for_consumers(10, work.wait_for_publishers(20))
    for publisher in work.publishers:
        publisher.end()
    wait_until(work.is_settled, "all of it to be settled", every=0.2, growing=lambda: len(work.handled()))
    confirmed, handled = work.confirmed(), work.handled()
    for consumer in work.consumers:
        consumer.end()
    assert work.stored() == work.attempted() == confirmed
    assert handled.keys() == confirmed
    assert [uid for uid, times in handled.items() if times > 1] == []


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_primaries_that_are_killed_under_load(
    work: ClusterWork, record_property: Callable[[str, object], None]
) -> None:
    cluster = work.cluster
    for consumer in work.consumers:
        consumer.wait_until_ready()
    work.publish("--pause", "0.005")
    figures: list[dict[str, float]] = []
    outages: list[Outage] = []
    for _ in range(FAILOVERS):
        work.wait_for_publishers(300)
        before = work.confirmed()
        began = time.monotonic()
        old, promoted = cluster.kill_owner(work.topic)
        later = work.wait_for_publishers(50, before)
        publishing = time.monotonic() - began
        work.wait_for_consumers(10, later)
        figures.append({"promoted": promoted, "publishing": publishing, "handling": time.monotonic() - began})
        outages.append(Outage(began, time.monotonic()))
        cluster.bring_back(old)
    for publisher in work.publishers:
        publisher.end()
    wait_until(work.is_settled, "all of it to be settled", every=0.2, growing=lambda: len(work.handled()))
    stored, confirmed, handled = work.stored(), work.confirmed(), work.handled()
    assert stored <= handled.keys() <= work.attempted()
    assert stored <= work.attempted()
    lost = confirmed - stored

    # Without a failover, nothing is handled twice, and nothing is lost.
    work.publish("--pause", "0.005", "--count", "500")
    wait_until(lambda: all(child.process.poll() is not None for child in work.publishers), "the last to be published")
    quiet = work.confirmed() - confirmed
    assert len(quiet) == 1000
    wait_until(lambda: quiet <= work.handled().keys(), "all of it to be handled")
    for consumer in work.consumers:
        consumer.end()
    assert all(work.handled()[uid] == 1 for uid in quiet)

    explained, unexplained = causes(work.consumers, outages)
    assert unexplained == []
    told = {
        "confirmed": len(confirmed),
        "lost": len(lost),
        "lost before they were handled": len(lost - handled.keys()),
        "handled": len(handled),
        "handled more than once": sum(times > 1 for times in handled.values()),
        "because of": explained,
        **{f"seconds until {name}, worst": max(one[name] for one in figures) for name in figures[0]},
        **{f"seconds until {name}, mean": sum(one[name] for one in figures) / FAILOVERS for name in figures[0]},
    }
    record_property("figures", json.dumps(told))
    print(json.dumps(told))
