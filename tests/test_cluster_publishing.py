"""What a publish promises, whatever the nodes of a cluster do.

The specification:

- The order of a batch within a topic holds, also if a node gets the slot in the middle of the batch. What was redirected
  before that is not repeated after its successors: it fails, and its error says that it was not stored.
- Publishing goes on while a slot is being moved, also for messages that use a connection of their own.
- A message that the codec cannot encode fails alone, whatever the codec raises.
- Two nodes may lead a caller back and forth for a moment, as each learns at another time who has the slot. That moment is
  waited for.
- A publish that fails with ``may_have_happened=False`` is never sent later.
- ``publish_timeout`` bounds a publish, also if no node tells who serves the slot.
- A batch that meets a frozen node knows by ``publish_timeout`` what the other nodes have stored.
- A consumer that is forgotten while its node is frozen leaves nothing behind.
- A bus that has waited for confirmations can be left: the connections for that are closed, too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from anyio import to_thread
from clusters import ClusterNode, RunningCluster
from conftest import SERVER
from harness import SOON, Recorder, new_topic, quick, until
from servers import RedisHarness
from test_cluster import in_another_slot, taken, topology

from anybus import (
    BackendError,
    EventBusError,
    JsonCodec,
    Message,
    SerializationError,
    StreamBus,
)
from anybus.abc import Output, PublishItem
from anybus.backends.redis import RedisBackend, _client
from anybus.backends.redis._link import Link
from anybus.backends.redis._slots import Address, slot_of


@pytest.fixture(scope="module")
def patient() -> Iterator[RunningCluster]:
    """A cluster that does not replace a frozen node."""
    with RunningCluster(SERVER, replicas=0, node_timeout=60) as cluster:
        yield cluster


@contextmanager
def frozen(*nodes: ClusterNode) -> Iterator[None]:
    for node in nodes:
        os.kill(node.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for node in nodes:
            os.kill(node.pid, signal.SIGCONT)


async def test_the_order_holds_if_a_node_gets_the_slot_within_a_batch(
    cluster: RunningCluster, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [Message.from_json(topic, number) for number in range(10)]
    async with RedisBackend(cluster.url) as backend:
        await backend.publish(topic, Message.from_json(topic, -1))
        target = cluster.another(await to_thread.run_sync(cluster.owner_of, topic))
        topology(backend).map.owners[slot_of(topic)] = Address("127.0.0.1", target.port)
        node = await topology(backend).node(slot_of(topic))
        send = node.publish_many

        async def with_a_move_within(items: Sequence[PublishItem]) -> list[str | EventBusError]:
            monkeypatch.setattr(node, "publish_many", send)
            redirected = await send(items[:5])
            source = await to_thread.run_sync(cluster.begin_move, topic, target)
            await to_thread.run_sync(cluster.end_move, topic, source, target)
            return [*redirected, *await send(items[5:])]

        monkeypatch.setattr(node, "publish_many", with_a_move_within)
        results = await backend.publish_many([(topic, message, None) for message in messages])
        stored = [number for number, result in enumerate(results) if isinstance(result, str)]
        assert stored == [5, 6, 7, 8, 9]
        for result in results[:5]:
            assert isinstance(result, BackendError)
            assert not result.may_have_happened
            assert result.can_pass
        assert await backend.publish_many([(topic, Message.from_json(topic, 10), None)])
    entries = await RedisHarness(cluster).entries(topic)
    assert [message.json() for _, message, _ in entries if message is not None] == [-1, *stored, 10]


async def test_a_large_message_reaches_a_slot_that_is_being_moved(
    cluster: RunningCluster, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unknown(link: Link) -> None:
        """It uses a connection of its own then."""

    monkeypatch.setattr(_client, "ask_limit", unknown)
    large = Message(topic, b"x" * 2_000_000)
    async with RedisBackend(cluster.url) as backend:
        target = cluster.another(await to_thread.run_sync(cluster.owner_of, topic))
        source = await to_thread.run_sync(cluster.begin_move, topic, target)
        try:
            assert await backend.publish_within(topic, large, timeout=10)
            results = await backend.publish_many([(topic, message, None) for message in (Message(topic), large)])
            assert all(isinstance(result, str) for result in results)
        finally:
            await to_thread.run_sync(cluster.end_move, topic, source, target)
        assert await backend.count_entries(topic) == 3


async def test_outputs_reach_a_slot_of_which_only_the_stream_has_been_moved(
    cluster: RunningCluster, topic: str
) -> None:
    other = in_another_slot(topic)
    async with RedisBackend(cluster.url) as backend:
        [entry_id] = await taken(backend, topic, 1)
        await backend.publish(other, Message(other))
        await backend.publish_later(other, Message(other), delay=3600)
        target = cluster.another(await to_thread.run_sync(cluster.owner_of, other))
        source = await to_thread.run_sync(cluster.begin_move, other, target)
        try:
            await to_thread.run_sync(cluster.move_keys, source, target, [other.encode()])
            outputs = [Output(other, Message(other)), Output(other, Message(other), delay=3600)]
            assert await backend.transfer(topic, "g", "c", entry_id, outputs)
        finally:
            await to_thread.run_sync(cluster.end_move, other, source, target)
        assert await backend.count_entries(other) == 2


class Picky(JsonCodec):
    """Its own error escapes, which it should not do."""

    def encode(self, message: Message) -> bytes:
        if message.key == "bad":
            raise KeyError("bad")
        return super().encode(message)


async def test_a_codec_that_raises_fails_its_own_message_only(cluster: RunningCluster, topic: str) -> None:
    topics = [topic, in_another_slot(topic)] * 2
    async with RedisBackend(cluster.url, codec=Picky()) as backend:
        messages = [Message(one, key="bad" if number == 1 else "") for number, one in enumerate(topics)]
        results = await backend.publish_many([(message.topic, message, None) for message in messages])
        assert [isinstance(result, str) for result in results] == [True, False, True, True]
        assert isinstance(results[1], SerializationError)


async def test_nodes_that_lead_back_and_forth_are_waited_for(
    cluster: RunningCluster, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = slot_of(topic)
    async with RedisBackend(cluster.url) as backend:
        await backend.create_group(topic, "g", "0")
        target = cluster.another(await to_thread.run_sync(cluster.owner_of, topic))

        def begin() -> ClusterNode:
            source = cluster.begin_move(topic, target)
            cluster.move_keys(source, target, cluster.keys(source, topic))
            source.ask("CLUSTER", "SETSLOT", slot, "NODE", target.id)  # the target should be told first
            return source

        source = await to_thread.run_sync(begin)
        published: list[str | EventBusError] = []
        redirected = 0
        follow = topology(backend).follow

        async def count_and_follow(*args: Any, **more: Any) -> Any:
            nonlocal redirected
            redirected += 1
            return await follow(*args, **more)

        monkeypatch.setattr(topology(backend), "follow", count_and_follow)

        async def publish() -> None:
            published.append(await backend.publish_within(topic, Message(topic), timeout=5))
            published.extend(await backend.publish_many([(topic, Message(topic), None)]))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish)
            await until(lambda: redirected > 4 or bool(published), "the nodes to lead back and forth")
            await to_thread.run_sync(cluster.end_move, topic, source, target)
        assert all(isinstance(one, str) for one in published)
        assert len(published) == 2


async def test_what_was_surely_not_sent_to_a_node_that_gets_the_slot_is_not_sent_later(
    patient: RunningCluster, topic: str
) -> None:
    refused: list[str] = []
    async with RedisBackend(patient.url) as backend:
        target = patient.another(await to_thread.run_sync(patient.owner_of, topic))
        source = await to_thread.run_sync(patient.begin_move, topic, target)
        try:
            await backend.publish_within(topic, Message(topic), timeout=5)

            async def publish(size: int) -> None:
                message = Message(topic, b"x" * size)
                try:
                    await backend.publish_within(topic, message, timeout=0.7)
                except BackendError as error:
                    if not error.may_have_happened:
                        refused.append(message.uid)

            [asker] = topology(backend)._askers.values()
            with frozen(target):
                async with anyio.create_task_group() as tasks:
                    for _ in range(4):
                        tasks.start_soon(publish, 4_000_000)
                    await until(lambda: asker.client.mux._session._sending, "the connection to accept nothing more")
                    for _ in range(3):
                        tasks.start_soon(publish, 10)
            assert refused
            last = Message(topic)
            await backend.publish_within(topic, last, timeout=10)
        finally:
            await to_thread.run_sync(patient.end_move, topic, source, target)
    stored = {message.uid for _, message, _ in await RedisHarness(patient).entries(topic) if message is not None}
    assert last.uid in stored
    assert stored.isdisjoint(refused)


async def test_a_publish_ends_in_time_if_no_node_tells_who_serves_the_slot(patient: RunningCluster, topic: str) -> None:
    async with RedisBackend(patient.url) as backend:
        await backend.publish_within(topic, Message(topic), timeout=5)
        topology(backend).map.owners[slot_of(topic)] = None
        topology(backend)._direct.clear()
        with frozen(*patient.nodes):
            with anyio.fail_after(2):
                with pytest.raises(BackendError) as caught:
                    await backend.publish_within(topic, Message(topic), timeout=0.3)
        assert not caught.value.may_have_happened


async def test_a_batch_knows_what_the_other_nodes_have_stored(patient: RunningCluster, topic: str) -> None:
    other = in_another_slot(topic)
    async with StreamBus(RedisBackend(patient.url), quick(Recorder(), publish_timeout=1)) as bus:
        for one in (topic, other):
            await bus.publish(Message(one))
        with frozen(await to_thread.run_sync(patient.owner_of, topic)):
            outcome = await bus.publish_batch([Message(one) for one in (topic, other) * 3])
        for one, result in zip((topic, other) * 3, outcome.results, strict=True):
            if one == other:
                assert isinstance(result, str)
            else:
                assert isinstance(result, BackendError)
                assert result.may_have_happened


async def test_a_consumer_that_is_forgotten_while_its_node_is_frozen_leaves_nothing_behind(
    patient: RunningCluster,
) -> None:
    topic = new_topic()
    async with RedisBackend(patient.url) as backend:
        await backend.create_group(topic, "g", "0")
        assert await backend.read_new(topic, "g", "c", count=1, timeout=0.1) == []
        node = await topology(backend).node(slot_of(topic))
        assert node.taking._readers._pool_of
        topology(backend).map.owners[slot_of(topic)] = None
        with frozen(*patient.nodes):
            with anyio.move_on_after(0.3):
                await backend.forget_consumer(topic, "g", "c")
        assert not topology(backend)._placed
        assert not topology(backend)._memory.tracks
        assert not node.taking._readers._pool_of


CONFIRMED = """
import sys
import anyio, anybus

async def main():
    async with anybus.connect(sys.argv[1]) as bus:
        for number in range(8):
            await bus.publish(anybus.Message(f"confirmed-{number}"), anybus.PublishOptions(confirmation="replicated"))

anyio.run(main, backend=sys.argv[2])
"""


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_bus_that_waited_for_confirmations_can_be_left(loop: str, cluster: RunningCluster) -> None:
    subprocess.run([sys.executable, "-c", CONFIRMED, cluster.url, loop], timeout=SOON, check=True)
