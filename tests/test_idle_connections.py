"""A connection that was idle may be dead without anybody having said so: it is tried before it is used.

A balancer or a firewall forgets a connection that was idle for too long: what is sent on it is swallowed. A command
that follows a pause waits for the answer to a PING, which has to come soon; if it does not, the command goes by a new
connection. So it was surely not sent before, and nobody hears of it.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import to_thread
from anyio.abc import SocketAttribute
from fake_server import Command, bulk, fake_server
from harness import SOON, new_topic, until
from relay import Relay, relayed_to
from servers import RunningServer, free_port

from anybus import BackendError, Message, StreamBus, StreamBusOptions
from anybus.abc import ClaimedMessage
from anybus.backends.redis import RedisBackend, _link, _pulse, _reader
from anybus.backends.redis._link import Link, open_link
from anybus.backends.redis._settings import from_url

PATIENT = StreamBusOptions(publish_timeout=SOON)


@pytest.fixture(params=["past the transport", "by the transport"])
def every_use_follows_a_pause(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that finds nothing under way counts as the first one after a pause."""
    monkeypatch.setattr(_pulse, "PAUSE", -1.0)
    monkeypatch.setattr(_reader, "PAUSE", -1.0)
    if request.param == "by the transport":  # as with TLS
        monkeypatch.setattr(Link, "can_send_nowait", False)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_link, "_SHORTEST_PROBE", 0.1)


def stored(server: RunningServer, topic: str) -> int:
    with server.client() as client:
        return int(client.xlen(topic))


@asynccontextmanager
async def bus_through_relay(server: RunningServer) -> AsyncGenerator[tuple[StreamBus, Relay], None]:
    async with relayed_to(server.port) as relay:
        with anyio.fail_after(2 * SOON):
            async with StreamBus(RedisBackend(relay.url, command_timeout=SOON), PATIENT) as bus:
                yield bus, relay


async def publish_one(bus: StreamBus, topic: str) -> None:
    await bus.publish(Message(topic))


async def publish_batch(bus: StreamBus, topic: str) -> None:
    (await bus.publish_batch([Message(topic)])).raise_for_errors()


async def publish_by_the_backend(bus: StreamBus, topic: str) -> None:
    await bus.backend.publish(topic, Message(topic))


WAYS = [publish_one, publish_batch, publish_by_the_backend]


@pytest.mark.usefixtures("every_use_follows_a_pause", "impatient")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dead", ["forgotten", "reset when it is used"])
async def test_a_publish_on_a_connection_that_died_while_idle_goes_by_a_new_one(
    server: RunningServer, way: Callable[[StreamBus, str], Awaitable[None]], dead: str
) -> None:
    topic = new_topic()
    async with bus_through_relay(server) as (bus, relay):
        await way(bus, topic)
        for number in range(2):
            before = len(relay.all)
            relay.forget() if dead == "forgotten" else relay.cut_at_next()
            await way(bus, topic)
            assert len(relay.all) > before
            assert await to_thread.run_sync(stored, server, topic) == number + 2


@pytest.mark.usefixtures("every_use_follows_a_pause", "impatient")
async def test_all_who_come_while_a_dead_connection_is_tried_go_by_the_new_one(server: RunningServer) -> None:
    topic = new_topic()
    async with bus_through_relay(server) as (bus, relay):
        relay.forget()
        async with anyio.create_task_group() as tasks:
            for number in range(60):
                tasks.start_soon(WAYS[number % 3], bus, topic)
        assert len(relay.all) > 1
    assert await to_thread.run_sync(stored, server, topic) == 60


@pytest.mark.usefixtures("every_use_follows_a_pause", "impatient")
@pytest.mark.parametrize("way", WAYS)
async def test_where_no_new_connection_can_be_made_a_publish_surely_did_not_happen(
    server: RunningServer, way: Callable[[StreamBus, str], Awaitable[None]]
) -> None:
    topic = new_topic()
    async with relayed_to(server.port) as relay:
        backend = RedisBackend(relay.url, connect_timeout=0.3, command_timeout=0.6)
        # Without a deadline around it: a publish by the backend itself would wait for as long as that allows.
        async with StreamBus(backend, StreamBusOptions(publish_timeout=3.0)) as bus:
            relay.forgets_new = True
            relay.forget()
            with pytest.raises(BackendError) as caught:
                await way(bus, topic)
            assert not caught.value.may_have_happened
            assert caught.value.can_pass
            relay.forgets_new = False
            async with anyio.create_task_group() as tasks:

                async def until_published() -> None:
                    while True:
                        try:
                            await way(bus, topic)
                        except BackendError as error:
                            assert not error.may_have_happened
                        else:
                            return

                tasks.start_soon(until_published)
    assert await to_thread.run_sync(stored, server, topic) == 1


@pytest.mark.usefixtures("every_use_follows_a_pause", "impatient")
async def test_what_waited_for_a_dead_connection_waits_for_the_next_one_as_long_as_a_publish_may(
    server: RunningServer,
) -> None:
    topic = new_topic()
    async with relayed_to(server.port) as relay:
        backend = RedisBackend(relay.url, connect_timeout=0.2, command_timeout=0.3)
        with anyio.fail_after(2 * SOON):
            async with StreamBus(backend, PATIENT) as bus:
                relay.forgets_new = True
                relay.forget()
                async with anyio.create_task_group() as tasks:
                    for way in WAYS[:2]:
                        tasks.start_soon(way, bus, topic)
                    await anyio.sleep(1.0)
                    relay.forgets_new = False
    assert await to_thread.run_sync(stored, server, topic) == 2


@pytest.mark.usefixtures("every_use_follows_a_pause", "impatient")
async def test_leaving_while_a_dead_connection_is_tried_leaves_nobody_waiting(server: RunningServer) -> None:
    async with relayed_to(server.port) as relay:
        backend = RedisBackend(relay.url, connect_timeout=SOON, command_timeout=SOON)
        with anyio.fail_after(2 * SOON):
            async with anyio.create_task_group() as tasks:
                async with backend:
                    relay.forgets_new = True
                    relay.forget()

                    async def publish() -> None:
                        with pytest.raises(BackendError) as caught:
                            await backend.publish("t", Message("t"))
                        assert not caught.value.may_have_happened

                    tasks.start_soon(publish)
                    await until(lambda: len(relay.all) == 2)


@pytest.mark.usefixtures("impatient")
async def test_a_dead_connection_is_found_before_anybody_needs_it(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pulse, "PING_EVERY", 0.05)
    topic = new_topic()
    async with bus_through_relay(server) as (bus, relay):
        await bus.publish(Message(new_topic()))
        relay.forget()
        await until(lambda: "not connected" in repr(bus.backend))
        await bus.publish(Message(topic))
    assert await to_thread.run_sync(stored, server, topic) == 1


def counting(command: Command) -> bytes | None:
    return bulk(b"1-1") if command[0] == b"XADD" else None


async def test_a_connection_in_use_is_not_tried_and_an_idle_one_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_server(counting) as server:
        async with RedisBackend(server.url) as backend:
            with anyio.fail_after(SOON):
                for _ in range(200):
                    await backend.publish("t", Message("t"))
        assert [command for command in server.commands if command[0] == b"PING"] == []
    monkeypatch.setattr(_pulse, "PING_EVERY", 0.1)
    async with fake_server(counting) as server, RedisBackend(server.url):
        began = anyio.current_time()
        with anyio.fail_after(SOON):
            await until(lambda: len([command for command in server.commands if command[0] == b"PING"]) >= 3)
        assert anyio.current_time() - began > 0.25


@pytest.mark.usefixtures("every_use_follows_a_pause")
async def test_who_may_not_use_ping_is_answered_all_the_same() -> None:
    def answer(command: Command) -> bytes | None:
        return counting(command) or b"-NOPERM this user has no permissions to run the 'ping' command\r\n"

    async with fake_server(answer) as server:
        greet = server.greet
        server.greet = lambda command: None if command[0] == b"PING" else greet(command)
        async with RedisBackend(server.url) as backend:
            server.commands.clear()
            with anyio.fail_after(SOON):
                for _ in range(3):
                    assert await backend.publish("t", Message("t")) == "1-1"
        assert server.connections == 1
        assert len([command for command in server.commands if command[0] == b"PING"]) == 3


@pytest.mark.usefixtures("every_use_follows_a_pause", "impatient")
@pytest.mark.parametrize("dead", ["forgotten", "reset when it is used", "no"])
async def test_a_blocking_read_after_a_pause_does_not_wait_on_a_dead_connection(
    server: RunningServer, dead: str
) -> None:
    topic = new_topic()
    got: list[bytes] = []
    async with relayed_to(server.port) as relay, RedisBackend(relay.url, command_timeout=600) as backend:
        await backend.create_group(topic, "g")
        assert await backend.read_new(topic, "g", "c", count=1, timeout=0.01) == []
        connections = len(relay.all)
        if dead == "forgotten":
            relay.all[-1].forgotten = True
        elif dead != "no":
            relay.all[-1].cut_at_next = True

        async def read() -> None:
            for entry in await backend.read_new(topic, "g", "c", count=1, timeout=600):
                assert isinstance(entry, ClaimedMessage)
                assert entry.deliveries == 1
                got.append(entry.message.payload)

        def blocked() -> bool:
            with server.client() as client:
                return any("xreadgroup" in one["cmd"] and "b" in one["flags"] for one in client.client_list())

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await until(lambda: to_thread.run_sync(blocked), "a blocked reader")
                await backend.publish(topic, Message(topic, b"new"))
        assert got == [b"new"]
        assert len(relay.all) > connections or dead == "no"


async def test_a_cancelled_trial_of_a_readers_connection_leaves_no_answer_behind(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reader, "PAUSE", -1.0)
    topic = new_topic()
    async with relayed_to(server.port) as relay, RedisBackend(relay.url) as backend:
        await backend.create_group(topic, "g")
        with anyio.fail_after(SOON):
            assert await backend.read_new(topic, "g", "c", count=1, timeout=0.01) == []
            relay.all[-1].forgotten = True
            with anyio.move_on_after(0.1):
                await backend.read_new(topic, "g", "c", count=1, timeout=600)
            assert await backend.read_new(topic, "g", "c", count=1, timeout=0.01) == []
            await backend.publish(topic, Message(topic))
            assert len(await backend.read_new(topic, "g", "c", count=1, timeout=1)) == 1


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_the_kernel_is_asked_to_keep_tcp_connections_alive(tmp_path: Any, kind: str) -> None:
    if kind == "unix":
        path = tmp_path / "socket"
        with RunningServer("valkey", "--unixsocket", str(path)):
            link = await open_link(from_url(f"unix://{path}"))
            await link.aclose()
        return
    async with fake_server(counting) as server:
        link = await open_link(from_url(server.url))
        raw: Any = link._stream.extra(SocketAttribute.raw_socket)
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
        await link.aclose()


async def test_a_server_that_is_gone_while_the_connection_is_idle_is_told_as_not_connected(
    server: RunningServer,
) -> None:
    async with relayed_to(server.port) as relay:
        options = StreamBusOptions(publish_timeout=0.3)
        async with StreamBus(RedisBackend(relay.url), options) as bus:
            await bus.publish(Message(new_topic()))
            await anyio.aclose_forcefully(relay.all[0].client)
            await until(lambda: "not connected" in repr(bus.backend))
            relay._server_port = free_port()
            with anyio.fail_after(SOON), pytest.raises(BackendError) as caught:
                await bus.publish(Message("t"))
            assert not caught.value.may_have_happened
