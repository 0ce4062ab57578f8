"""A service behind real sentinels, and real failovers.

The specification, on each event loop:

- A bus enters by its sentinels, whatever the order of their addresses. After a failover, what was published before and
  after it is handled, and the ex-primary that comes back as a replica is not connected to.
- A primary that is frozen, replaced and wakes up still thinks that it is the primary. Nothing of ours reaches it.
- Sentinels that ask for a password get theirs, and the servers get theirs.
- ``thorough``: the primary is killed (kill -9) several times, while two processes publish and four consume; each comes back
  as a replica. Every subscription goes on by itself: whatever the last primary has was handled, from the uids that the
  processes wrote to files. What asynchronous replication lost is counted. Each message that was handled twice had an
  acknowledgement that was lost with a primary or was under way at that time (``repeats.py``). When all is quiet again,
  nothing is handled twice.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from conftest import SERVER
from harness import Recorder, new_topic, quick, until
from processes import wait_until
from repeats import Outage, causes
from sentinels import SentinelSet
from sweeps import FAILOVERS
from test_redis_crashes import Child

from anybus import BackendError, Delivery, JsonCodec, Message, StreamBus, SubscriptionConfig, retry_stream
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import delayed


@pytest.fixture(scope="module")
def running() -> Iterator[SentinelSet]:
    with SentinelSet(SERVER) as service:
        yield service


@pytest.fixture
def service(running: SentinelSet) -> SentinelSet:
    running.reunite()
    return running


async def publish_patiently(bus: StreamBus, message: Message) -> None:
    while True:
        try:
            await bus.publish(message)
        except BackendError as error:
            assert error.can_pass
        else:
            return
        await anyio.sleep(0.01)


def is_at_the_primary_only(service: SentinelSet) -> bool:
    primary = service.primary
    for member in service.members:
        with member.client() as client:
            connected = any(item["name"] == "work" for item in client.client_list())
        if connected != (member is primary):
            return False
    return True


async def test_a_failover_is_followed_by_everything(service: SentinelSet, topic: str) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    backwards = service.url_by(service.sentinels[::-1])
    async with StreamBus(RedisBackend(f"{backwards}?client_name=work"), quick(Recorder(), block_timeout=30)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            before = Message(topic)
            await bus.publish(before)
            await until(lambda: before.uid in handled, "a message to be handled")
            old, _, _ = await to_thread.run_sync(service.kill_primary)
            after = Message(topic)
            await publish_patiently(bus, after)
            await until(lambda: after.uid in handled, "a message to be handled after the failover")
            await to_thread.run_sync(service.bring_back, old)
            assert subscription.is_running
            last = Message(topic)
            await bus.publish(last)
            await until(lambda: last.uid in handled, "the last message to be handled")
            await until(lambda: to_thread.run_sync(is_at_the_primary_only, service), "it to be at the primary only")


async def test_a_frozen_primary_that_wakes_up_is_left_alone(service: SentinelSet, topic: str) -> None:
    """It answers again, and says that it is the primary, until a sentinel has told it otherwise."""
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    backend = RedisBackend(f"{service.url}?client_name=work", command_timeout=60)
    async with StreamBus(backend, quick(Recorder(), block_timeout=30)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            first = Message(topic)
            await bus.publish(first)
            await until(lambda: first.uid in handled, "a message to be handled")
            frozen = await to_thread.run_sync(service.freeze_primary)
            # Nothing ends the connections to it but the sentinels' word: it is silent, and we are patient.
            second = Message(topic)
            await publish_patiently(bus, second)
            await until(lambda: second.uid in handled, "a message to be handled after the failover")
            service.wake(frozen)
            for _ in range(20):
                message = Message(topic)
                await bus.publish(message)
                await until(partial(handled.__contains__, message.uid), "a message to be handled")
            await until(lambda: to_thread.run_sync(is_at_the_primary_only, service), "it to be at the primary only")


async def test_sentinels_and_servers_have_passwords_of_their_own(topic: str) -> None:
    def start() -> SentinelSet:
        return SentinelSet(SERVER, password="for-sentinels", servers_password="for-servers").__enter__()

    service = await to_thread.run_sync(start)
    try:
        hosts = service.url.removeprefix("redis+sentinel://")
        async with RedisBackend(f"redis+sentinel://:for-servers@{hosts}?sentinel_password=for-sentinels") as backend:
            assert await backend.publish(topic, Message(topic))
        with pytest.raises(BackendError, match="WRONGPASS") as caught:
            async with RedisBackend(f"redis+sentinel://:for-servers@{hosts}?sentinel_password=wrong"):
                pass
        assert "sentinel_password" in str(caught.value)
        with pytest.raises(BackendError, match="NOAUTH"):
            async with RedisBackend(f"redis+sentinel://{hosts}?sentinel_password=for-sentinels"):
                pass
    finally:
        await to_thread.run_sync(service.__exit__)


# --- real processes


def read(publisher: Child, kind: str) -> list[str]:
    """The uids that it has noted."""
    path = publisher.folder / kind
    return path.read_text().split("\n")[:-1] if path.exists() else []


class Work:
    """Two publishers and four consumers on a service behind sentinels."""

    def __init__(self, service: SentinelSet, folder: Path, loop: str) -> None:
        self.service = service
        self.folder = folder
        self.topic = new_topic()
        common = ("--loop", loop, "--url", service.url, "--topic", self.topic)
        self.consumers = [
            Child(folder, "consumer.py", label, *common, "--label", label, "--group", "g", "--lease", "2")
            for label in (f"consumer-{number}" for number in range(4))
        ]
        self._common = common
        self.publishers: list[Child] = []

    def publish(self, *options: str) -> None:
        """Start two publishers. Returns when both are at work: who enters in the middle of a failover is refused."""
        started: list[Child] = []
        for _ in range(2):
            folder = self.folder / f"publisher-{len(self.publishers)}"
            folder.mkdir()
            child = Child(folder, "publisher.py", "publisher", *self._common, *options)
            self.publishers.append(child)
            started.append(child)
        wait_until(lambda: all(read(child, "acknowledged") for child in started), "both to publish")

    def _published(self, kind: str) -> set[str]:
        uids: set[str] = set()
        for publisher in self.publishers:
            uids.update(read(publisher, kind))
        return uids

    def confirmed(self) -> set[str]:
        return self._published("acknowledged")

    def attempted(self) -> set[str]:
        return self._published("attempted")

    def wait_for_publishers(self, count: int, before: set[str] | None = None) -> set[str]:
        """Wait until they have published so many more. Returns those."""
        known = self.confirmed() if before is None else before
        wait_until(lambda: len(self.confirmed() - known) > count, "the publishers to go on", every=0.02)
        return self.confirmed() - known

    def wait_for_consumers(self, count: int, uids: set[str]) -> None:
        """Wait until they have handled so many of these."""
        wait_until(lambda: len(uids & self.handled().keys()) > count, "the consumers to go on", every=0.02)

    def handled(self) -> Counter[str]:
        return Counter(uid for child in self.consumers for uid, *_ in child.lines("handled.g"))

    def stored(self) -> set[str]:
        """The uids that the primary has."""
        return set(self.ids())

    def ids(self) -> dict[str, str]:
        """The ids of their entries."""
        codec = JsonCodec()
        with self.service.primary.client() as client:
            entries: Any = client.xrange(self.topic)
        return {codec.decode(fields[b"message"]).uid: entry_id.decode() for entry_id, fields in entries}

    def is_settled(self) -> bool:
        """Whether nothing is unread, pending, or waiting for its retry."""
        with self.service.primary.client() as client:
            untyped: Any = client
            for stream in (self.topic, retry_stream(self.topic, "g")):
                [group] = untyped.xinfo_groups(stream)
                if group["pending"] or group["last-delivered-id"] != untyped.xinfo_stream(stream)["last-generated-id"]:
                    return False
            return not client.exists(delayed(retry_stream(self.topic, "g")))

    def end(self) -> None:
        for child in (*self.publishers, *self.consumers):
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()


@pytest.fixture(params=["asyncio", "uvloop", "trio"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Work]:
    with SentinelSet(SERVER) as service:
        made = Work(service, tmp_path, request.param)
        try:
            yield made
        finally:
            made.end()


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_primaries_that_are_killed_under_load(work: Work, record_property: Callable[[str, object], None]) -> None:
    service = work.service
    for consumer in work.consumers:
        consumer.wait_until_ready()
    work.publish("--pause", "0.005")
    figures: list[dict[str, float]] = []
    outages: list[Outage] = []
    for _ in range(FAILOVERS):
        work.wait_for_publishers(300)
        before = work.confirmed()
        began = time.monotonic()
        old, _, promoted = service.kill_primary()
        later = work.wait_for_publishers(50, before)
        publishing = time.monotonic() - began
        work.wait_for_consumers(10, later)
        figures.append({"promoted": promoted, "publishing": publishing, "handling": time.monotonic() - began})
        outages.append(Outage(began, time.monotonic()))
        service.bring_back(old)
    for publisher in work.publishers:
        publisher.end()
    stored = work.stored()
    wait_until(
        lambda: stored <= work.handled().keys(),
        "whatever the last primary has to be handled",
        every=0.2,
        growing=lambda: len(work.handled()),
    )
    confirmed, handled = work.confirmed(), work.handled()
    assert stored <= work.attempted()
    assert handled.keys() <= work.attempted()
    lost = confirmed - stored
    twice = sum(count > 1 for count in handled.values())

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
        "handled more than once": twice,
        "because of": explained,
        **{f"seconds until {name}, worst": max(one[name] for one in figures) for name in figures[0]},
        **{f"seconds until {name}, mean": sum(one[name] for one in figures) / FAILOVERS for name in figures[0]},
    }
    record_property("figures", json.dumps(told))
    print(json.dumps(told))


@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.parametrize("replicas", ["0", "1", "2"])
def test_what_a_switch_loses_while_the_old_primary_lives(
    tmp_path: Path, replicas: str, record_property: Callable[[str, object], None]
) -> None:
    """``SENTINEL FAILOVER`` does not stop the old primary: it takes writes until a sentinel tells it to follow.

    With ``min-replicas-to-write``, it refuses them while it has fewer replicas: one of its two is the new primary.

    The two number their entries by the same clock, so a message that is lost and one that is not may have the same id.
    Both are handled.
    """
    with SentinelSet(SERVER, options=("--min-replicas-to-write", replicas, "--min-replicas-max-lag", "1")) as service:
        work = Work(service, tmp_path, "asyncio")
        try:
            for consumer in work.consumers:
                consumer.wait_until_ready()
            work.publish("--pause", "0.01")
            for _ in range(FAILOVERS // 2):
                work.wait_for_publishers(300)
                service.switch()
            for publisher in work.publishers:
                publisher.end()
            wait_until(work.is_settled, "all of it to be settled", every=0.2)
            stored, handled, confirmed = work.ids(), work.handled(), work.confirmed()
            for consumer in work.consumers:
                consumer.end()
            assert not stored.keys() - handled.keys()
        finally:
            work.end()
    told: dict[str, object] = {
        "min-replicas-to-write": replicas,
        "confirmed": len(confirmed),
        "lost": len(confirmed - stored.keys()),
    }
    told["lost in one switch"] = round(len(confirmed - stored.keys()) / (FAILOVERS // 2))
    record_property("figures", json.dumps(told))
    print(json.dumps(told))
