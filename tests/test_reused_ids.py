"""An id that belongs to another message than before.

A primary that is replaced may have given ids that its successor has never seen, and gives again: both count by the same
clock. What is known here of an id is known of its message only, so the other message is handled all the same.
"""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import to_thread
from harness import Recorder, quick, until
from servers import RunningServer

from anybus import Delivery, JsonCodec, LeaseLostError, Message, StreamBus, SubscriptionConfig
from anybus.backends.redis import RedisBackend


class Servers:
    """A server, and then its successor, which has never had the lost message."""

    def __init__(self, server: RunningServer, topic: str) -> None:
        self._client: Any = server.client()
        self._topic = topic
        self.first, self.lost, self.kept, self.last = (Message(topic) for _ in range(4))

    def _add(self, target: Any, entry_id: str, message: Message) -> None:
        target.xadd(self._topic, {"message": JsonCodec().encode(message)}, id=entry_id)

    async def add(self, entry_id: str, message: Message) -> None:
        await to_thread.run_sync(self._add, self._client, entry_id, message)

    async def fail_over(self) -> None:
        def replace() -> None:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.delete(self._topic)
                self._add(pipe, "5-1", self.first)
                pipe.xgroup_create(self._topic, "g", "5-1")
                self._add(pipe, "5-2", self.kept)
                pipe.execute()

        await to_thread.run_sync(replace)

    async def pending(self) -> int:
        def count() -> int:
            return int(self._client.xpending(self._topic, "g")["pending"])

        return await to_thread.run_sync(count)


@pytest.mark.parametrize("how", ["held", "settled", "returned"])
async def test_another_message_with_the_id_of_one_that_was_lost_is_handled(
    server: RunningServer, topic: str, how: str
) -> None:
    servers, recorder = Servers(server, topic), Recorder()
    handled: list[str] = []
    gate = anyio.Event()
    late: list[type[BaseException]] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)
        if delivery.message.uid == servers.lost.uid:
            if how == "held":
                await gate.wait()
            if how == "returned":
                return
        try:
            await delivery.ack()
        except LeaseLostError as error:
            late.append(type(error))

    config = SubscriptionConfig(topic, "g", ack_mode="manual")
    async with StreamBus(RedisBackend(server.url), quick(recorder)) as bus, bus.subscribe(config, handler):
        await servers.add("5-1", servers.first)
        await until(lambda: servers.first.uid in handled)
        await servers.add("5-2", servers.lost)
        await until(lambda: servers.lost.uid in handled)
        if how == "settled":

            async def settled() -> bool:
                return await servers.pending() == 0

            await until(settled)
        await servers.fail_over()
        await servers.add("6-1", servers.last)
        await until(lambda: servers.last.uid in handled)
        await until(lambda: servers.kept.uid in handled)
        gate.set()
        if how == "held":
            await until(lambda: late == [LeaseLostError])
    assert handled.count(servers.kept.uid) == 1
    assert await servers.pending() == 0


async def test_an_ack_under_way_of_a_message_that_was_lost_leaves_the_other_one_alone(
    server: RunningServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = Servers(server, topic)
    handled: list[str] = []
    reached, go_on = anyio.Event(), anyio.Event()
    backend = RedisBackend(server.url)
    ack_many = backend.ack_many
    held_up = False

    async def slow(stream: str, group: str, ids: Any, *, consumer: str | None = None) -> list[str]:
        nonlocal held_up
        if "5-2" in ids and not held_up:
            held_up = True
            reached.set()
            await go_on.wait()
        return await ack_many(stream, group, ids, consumer=consumer)

    monkeypatch.setattr(backend, "ack_many", slow)

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    async with StreamBus(backend, quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await servers.add("5-1", servers.first)
            await until(lambda: servers.first.uid in handled)
            await servers.add("5-2", servers.lost)
            await reached.wait()
            await servers.fail_over()
            await until(lambda: servers.kept.uid in handled)
            go_on.set()
            await servers.add("6-1", servers.last)
            await until(lambda: servers.last.uid in handled)
            await until(lambda: subscription.statistics().held == 0)
            assert subscription._context.ledger._replaced == 0
    assert handled.count(servers.kept.uid) == 1
