"""What goes wrong for one of many members that wait together costs the others nothing that they were promised."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import to_thread
from conftest import SERVER
from fake_server import Command
from harness import HOUR, SOON, Recorder, new_topic, quick, until
from proxy import Act, Answer, name_of, proxied
from servers import RunningServer

from anybus import BackendError, Delivery, Message, StreamBus, SubscriptionConfig
from anybus._runtime.naming import ConsumerNames
from anybus.abc import FetchedEntry
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import meta
from anybus.backends.redis._readers import FEW
from anybus.backends.redis._shared_reader import SharedReader
from anybus.backends.redis._taking import Taking

ASYNCIO_LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]


@pytest.fixture
def own_server() -> Any:
    """Its connections are broken."""
    with RunningServer(SERVER) as running:
        yield running


class Crowd:
    """So many members of a backend that two of them share a connection, and wait on it.

    :ivar came: what came for a stream.
    :ivar torn: whose reads are cancelled by asyncio itself, which must not end the others.
    """

    def __init__(self, backend: RedisBackend, streams: list[str]) -> None:
        self.backend = backend
        self.streams = streams
        self.tasks: dict[str, Any] = {}
        self.came: dict[str, list[FetchedEntry]] = {}
        self.errors: dict[str, BackendError] = {}
        self.torn: set[str] = set()

    async def read(self, stream: str, timeout: float = SOON) -> None:
        self.tasks[stream] = native_task()
        try:
            self.came[stream] = await self.backend.read_new(stream, "g", "c", count=100, timeout=timeout)
        except BackendError as error:
            self.errors[stream] = error
        except asyncio.CancelledError:
            if stream not in self.torn:
                raise

    def readers(self) -> list[SharedReader]:
        return [reader for pool in self.backend._taking._readers._pools.values() for reader in pool.shared]

    @property
    def shared(self) -> SharedReader:
        [found] = [reader for reader in self.readers() if len(reader.members) == 2]
        return found

    @property
    def pair(self) -> tuple[str, str]:
        """The leader's stream and the other one."""
        read = self.shared._read
        assert read is not None
        leader, follower = (name.decode() for name in read.waits)
        return leader, follower


def native_task() -> Any:
    """The current task; None on trio."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


@asynccontextmanager
async def crowd(server: RunningServer, url: str | None = None, timeout: float = SOON) -> AsyncGenerator[Crowd]:
    topic = new_topic()
    async with RedisBackend(url or server.url) as backend, anyio.create_task_group() as tasks:
        found = Crowd(backend, [f"{topic}.{number}" for number in range(FEW + 1)])
        for stream in found.streams:
            await backend.create_group(stream, "g", "0")
            tasks.start_soon(found.read, stream, timeout)

        def waiting() -> int:
            return sum(len(reader._read.waits) for reader in found.readers() if reader._read is not None)

        await until(lambda: waiting() == len(found.streams), "all wait")
        yield found
        tasks.cancel_scope.cancel()


async def test_one_break_of_a_shared_connection_counts_once(own_server: RunningServer) -> None:
    """It is one break, and has other reasons than large replies, although it is met by several members."""
    with own_server.client() as admin:
        async with crowd(own_server) as members:
            pair, broken = members.pair, members.shared._reader.client_id
            await to_thread.run_sync(lambda: admin.client_kill_filter(_id=str(broken), skipme=True))
            await until(lambda: set(members.errors) == set(pair))
            assert members.backend._taking._calls.appetite.of(100) == 100


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_leader_that_is_torn_out_of_its_shield_takes_nothing_from_the_others(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio's own cancellation, twice: the second one pierces the shield in which the first waits for the reply."""
    async with crowd(server) as members:
        leader, follower = members.pair
        shared = members.shared
        shared._reader._last_reply = anyio.current_time()  # so the connection is used without a PING
        asked = anyio.Event()
        members.torn.add(leader)

        async def ask_in_vain(client_id: int) -> bool:
            asked.set()
            await anyio.sleep_forever()
            return True

        with monkeypatch.context() as patch:
            patch.setattr(shared._reader, "_unblock", ask_in_vain)
            members.tasks[leader].cancel()
            await asked.wait()
            members.tasks[leader].cancel()
            await until(lambda: shared._read is not None and list(shared._read.waits) == [follower.encode()])
        await members.backend.publish(follower, Message(follower))
        await until(lambda: follower in members.came)
        assert len(members.came[follower]) == 1


async def test_a_blocked_read_that_the_server_does_not_find_is_not_asked_for_without_a_pause(
    server: RunningServer,
) -> None:
    """After a failover, for example: the blocking connection still leads to the old server."""
    asked = 0

    def nothing_blocked(command: Command) -> Act | None:
        nonlocal asked
        if command[:2] == [b"CLIENT", b"UNBLOCK"]:
            asked += 1
            return Answer(b":0\r\n")
        return None

    async with proxied(server.port) as proxy, crowd(server, proxy.url, timeout=1.0) as members:
        proxy.rule = nothing_blocked
        shared, read = members.shared, members.shared._read
        assert read is not None
        shared._end(read)
        await read.ended.wait()
        assert 1 <= asked <= 30


async def test_who_may_not_read_several_streams_at_once_is_told_and_reads_all_the_same(
    server: RunningServer,
) -> None:
    """A proxy before a cluster refuses commands that name several slots."""
    refused = 0

    def one_slot(command: Command) -> Act | None:
        nonlocal refused
        if name_of(command) == "XREADGROUP" and command[-2:] == [b">", b">"]:
            refused += 1
            return Answer(b"-CROSSSLOT Keys in request don't hash to the same slot\r\n")
        return None

    topic, handled, recorder = new_topic(), set[str](), Recorder()
    topics = [f"{topic}.{number}" for number in range(FEW + 4)]

    async def handler(delivery: Delivery) -> None:
        handled.add(delivery.message.topic)

    async with proxied(server.port) as proxy:
        proxy.rule = one_slot
        async with StreamBus(RedisBackend(proxy.url), quick(recorder)) as bus, anyio.create_task_group() as tasks:
            for name in topics:
                await tasks.start(bus.consume, SubscriptionConfig(name, "g"), handler)
            await until(lambda: any("CROSSSLOT" in str(event.error) for event in recorder.of("on_error", "read")))
            for name in topics:
                await bus.publish(Message(name))
            await until(lambda: handled == set(topics))
            before = refused
            await anyio.sleep(1)
            assert refused - before < 100, "not at full speed"
            tasks.cancel_scope.cancel()


async def test_the_floor_of_a_group_that_became_quiet_is_kept_within_seconds(
    server: RunningServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the change is noticed less than an interval after the floor was kept last."""
    monkeypatch.setattr("anybus.backends.redis._upkeep._FLOOR_INTERVAL", 1.0)
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.id)

    options = quick(claim_idle_timeout=1.2, reclaim_interval=0.1)
    async with StreamBus(RedisBackend(server.url), options) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            with server.client() as admin:

                async def is_kept() -> bool:
                    kept: Any = await to_thread.run_sync(lambda: admin.hget(meta(topic), "g"))
                    return bool(kept == handled[-1].encode())

                for number in range(1, 4):
                    await bus.publish(Message(topic))
                    await until(lambda: len(handled) == number)  # noqa: B023
                    await until(is_kept, "the floor is kept")


async def test_names_do_not_pile_up_however_often_one_topic_is_subscribed_to() -> None:
    names = ConsumerNames()
    assert len({names.new("t", "g", "label") for _ in range(30_000)}) == 30_000
    assert len(names._uniques) <= 10_000


async def test_a_read_ends_now_and_then_however_long_the_lease_is(
    server: RunningServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only when it ends is it known that reads work again."""
    timeouts: list[float] = []
    read_new = Taking.read_new

    async def noted(
        self: Taking, stream: str, group: str, consumer: str, count: int, timeout: float, *rest: Any
    ) -> Any:
        timeouts.append(timeout)
        return await read_new(self, stream, group, consumer, count, timeout, *rest)

    monkeypatch.setattr(Taking, "read_new", noted)

    async def handler(delivery: Delivery) -> None: ...

    async with StreamBus(RedisBackend(server.url), quick(claim_idle_timeout=HOUR)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            await until(lambda: any(timeouts))
    assert max(timeouts) <= 20
