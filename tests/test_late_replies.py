"""A reply that comes later than a lease: what it brings may be somebody else's by now, and does not start.

Specification (DESIGN.md, promise 4): a lease counts from the earliest moment at which the server can have handed the
entry over: of every call that takes, from when it was sent. What has not started when it is over does not start, and is
handed back if the server says that it is still ours. A blocking read waits for a third of a lease at most, so that what
it brings at the end of its time still has most of its lease.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from fake_server import Command
from harness import SOON, Harness, Recorder, StepByStep, new_topic, quick, until
from proxy import Act, Hold, name_of, proxied
from servers import RedisHarness, RunningServer

from anybus import Delivery, JsonCodec, Message, StreamBus, SubscriptionConfig
from anybus._failure.copies import retry_stream
from anybus.abc import FetchedEntry, SharedWaiting, StreamBackend
from anybus.backends.redis import RedisBackend

LEASE = 0.6


async def _take_over_and_ack(peer: StreamBackend, stream: str) -> None:
    """As soon as the lease is over, and not before."""
    taken: list[FetchedEntry] = []
    while not taken:
        taken = await peer.reclaim_idle(stream, "g", "peer", min_idle=LEASE, count=10)
        await anyio.sleep(0.02)
    assert await peer.ack_many(stream, "g", [entry.id for entry in taken], consumer="peer") == []


class TakenOver:
    """A subscription behind a proxy, and a peer that takes over what the held reply brings."""

    def __init__(self, server: RunningServer, topic: str) -> None:
        self.server = server
        self.topic = topic
        self.hold = Hold()
        self.stream = topic
        self.handled: list[bytes] = []

    async def handler(self, delivery: Delivery) -> None:
        self.handled.append(delivery.message.payload)

    def publish_at_once(self) -> None:
        with self.server.client() as client:
            client.xadd(self.stream, {"message": JsonCodec().encode(Message(self.topic, b"late"))})

    async def run(
        self, holds: Callable[[Command], bool], *, steps: bool = False, publish: str = "before", **options: float
    ) -> None:
        async with (
            RedisHarness(self.server).make_backend() as peer,
            proxied(self.server.port) as proxy,
        ):
            inner = RedisBackend(proxy.url)
            backend = StepByStep(inner) if steps else inner
            recorder = Recorder()
            async with StreamBus(backend, quick(recorder, claim_idle_timeout=LEASE, **options)) as bus:
                if publish == "before":
                    await peer.publish(self.stream, Message(self.topic, b"late"))

                def rule(command: Command) -> Act | None:
                    if not self.hold.held.is_set() and holds(command):
                        proxy.rule = lambda command: None
                        if publish == "when it is sent":
                            self.publish_at_once()
                        return self.hold
                    return None

                proxy.rule = rule
                config = SubscriptionConfig(self.topic, "g", group_start_id="0")
                async with bus.subscribe(config, self.handler) as subscription:
                    await self.hold.held.wait()
                    await _take_over_and_ack(peer, self.stream)
                    self.hold.let_go.set()
                    await until(lambda: subscription.statistics().received == 1)
                    await until(lambda: subscription.statistics().held == 0)
                    await peer.publish(self.topic, Message(self.topic, b"last"))
                    await until(lambda: b"last" in self.handled)
        assert self.handled == [b"last"]
        assert recorder.of("on_received")


def _is(name: str, *, blocks: bool | None = None, stream: str | None = None) -> Callable[[Command], bool]:
    def matches(command: Command) -> bool:
        if name_of(command) != name:
            return False
        return blocks in (None, b"BLOCK" in command) and (stream is None or stream.encode() in command)

    return matches


async def test_what_a_read_that_does_not_wait_brings_too_late_does_not_start(server: RunningServer, topic: str) -> None:
    with anyio.fail_after(SOON):
        await TakenOver(server, topic).run(_is("XREADGROUP", blocks=False))


async def test_what_a_blocking_read_brings_too_late_does_not_start(server: RunningServer, topic: str) -> None:
    with anyio.fail_after(SOON):
        case = TakenOver(server, topic)
        # Its own passes, which go by another connection, would take it over as well.
        await case.run(_is("XREADGROUP", blocks=True), publish="when it is sent", reclaim_interval=600)


@pytest.mark.parametrize("steps", [False, True])
async def test_what_is_taken_over_from_a_dead_consumer_too_late_does_not_start(
    server: RunningServer, topic: str, steps: bool
) -> None:
    with anyio.fail_after(SOON):
        async with RedisHarness(server).make_backend() as dead:
            await dead.create_group(topic, "g", "0")
            await dead.publish(topic, Message(topic, b"late"))
            await dead.read_new(topic, "g", "dead", count=1, timeout=0)
            await anyio.sleep(LEASE + 0.01)
        case = TakenOver(server, topic)
        # Blocking readers are woken by what is new only: what is idle comes by a pass.
        await case.run(_is("reclaim" if steps else "pass", stream=topic), steps=steps, publish="nothing")


@pytest.mark.parametrize("steps", [False, True])
async def test_a_retry_that_comes_too_late_does_not_start(server: RunningServer, topic: str, steps: bool) -> None:
    with anyio.fail_after(SOON):
        case = TakenOver(server, topic)
        case.stream = retry_stream(topic, "g")
        await case.run(_is("XREADGROUP", stream=case.stream) if steps else _is("pass"), steps=steps)


# --- what still has its lease


class Clocked(StepByStep):
    """Notes how long reads may wait."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.waits: set[float] = set()

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        self.waits.add(timeout)
        return await super().read_new(stream, group, consumer, count=count, timeout=timeout)


@pytest.mark.parametrize("max_pending_acks", [1, 8])
@pytest.mark.parametrize(("lease", "longest"), [(60.0, 2.0), (3.0, 1.0)])
async def test_a_read_waits_for_block_timeout_and_a_third_of_a_lease_at_most(
    harness: Harness, topic: str, lease: float, longest: float, max_pending_acks: int
) -> None:
    async def handler(delivery: Delivery) -> None: ...

    backend = Clocked(harness.make_backend())
    async with StreamBus(backend, quick(claim_idle_timeout=lease, block_timeout=2.0, reclaim_interval=5.0)) as bus:
        config = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=max_pending_acks)
        async with bus.subscribe(config, handler):
            await until(lambda: max(backend.waits, default=0.0) > 0)
    assert backend.waits - {0.0} == {longest}


async def test_what_comes_at_the_end_of_a_blocking_read_starts_however_long_that_may_wait(harness: Harness) -> None:
    """A read that may block for longer than a lease would bring what cannot start."""
    topic = new_topic()
    reads = 0
    backend = harness.make_backend()

    def counted(method: Any) -> Any:
        async def counting(*args: Any, **kwargs: Any) -> list[FetchedEntry]:
            nonlocal reads
            entries: list[FetchedEntry] = await method(*args, **kwargs)
            reads += 1
            return entries

        return counting

    backend.read_new = counted(backend.read_new)  # type: ignore[method-assign]
    if isinstance(backend, SharedWaiting):
        backend.read_when_new = counted(backend.read_when_new)  # type: ignore[method-assign]
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    async with StreamBus(backend, quick(claim_idle_timeout=LEASE, block_timeout=10.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            for number in range(3):
                await until(lambda: reads >= 4 * (subscription.statistics().received + 1))
                await bus.publish(Message(topic))
                await until(lambda number=number: len(handled) == number + 1)  # type: ignore[misc]
