"""Over a slow link silence counts, not duration: nothing is given up while bytes still arrive, on either side.

The relay lets through a few bytes at a time. Each test takes several times as long as the timeout that it is about, and
no pause within it is nearly as long.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import anyio
import pytest
from anyio import to_thread
from conftest import SERVER
from harness import SOON, new_topic, until
from relay import Pace, relayed_to, slow_upload_to
from servers import RunningServer

from anybus import BackendError, Message
from anybus.abc import ClaimedMessage
from anybus.backends.redis import RedisBackend

PATIENCE = 0.4
"""The timeout of these tests; a pause of the relay is a tenth of it."""

KB = 1024


@pytest.fixture
def own_server() -> Iterator[RunningServer]:
    """A server that a test may freeze."""
    with RunningServer(SERVER) as running:
        yield running


async def fill(server: RunningServer, topic: str, group: str, count: int) -> None:
    """Entries of 20 KB, unread."""

    def append() -> None:
        with server.client() as client:
            client.xgroup_create(topic, group, "0", mkstream=True)
            for number in range(count):
                client.xadd(topic, {"message": b"%d" % number + b"x" * 20 * KB})

    await to_thread.run_sync(append)


async def test_a_blocking_read_waits_for_a_large_reply_as_long_as_it_arrives(server: RunningServer) -> None:
    topic = new_topic()
    async with relayed_to(server.port) as relay:
        with anyio.fail_after(2 * SOON):
            async with RedisBackend(relay.url, command_timeout=PATIENCE) as backend:
                await backend.create_group(topic, "g")
                relay.down = Pace(8 * KB, PATIENCE / 10)
                read: list[object] = []

                async def read_on() -> None:
                    while not read:
                        read.extend(await backend.read_new(topic, "g", "c", count=16, timeout=PATIENCE))

                def append_when_blocked() -> None:
                    with server.client() as client:
                        while not any(
                            "xreadgroup" in one["cmd"] and "b" in one["flags"] for one in client.client_list()
                        ):
                            pass
                        client.xadd(topic, {"message": b"x" * 480 * KB})

                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read_on)
                    await to_thread.run_sync(append_when_blocked)
                assert len(read) == 1
                relay.down = None


async def test_a_read_of_many_entries_by_the_shared_connection_waits_as_long_as_they_arrive(
    server: RunningServer,
) -> None:
    topic = new_topic()
    await fill(server, topic, "g", 12)
    async with relayed_to(server.port) as relay, RedisBackend(relay.url, command_timeout=PATIENCE) as backend:
        relay.down = Pace(8 * KB, PATIENCE / 10)
        with anyio.fail_after(2 * SOON):
            assert len(await backend.read_new(topic, "g", "c", count=12, timeout=0)) == 12
        relay.down = None


async def test_connecting_waits_as_long_as_the_greeting_arrives(server: RunningServer) -> None:
    async with relayed_to(server.port) as relay:
        relay.down = Pace(40, PATIENCE / 10)
        with anyio.fail_after(2 * SOON):
            async with RedisBackend(relay.url, connect_timeout=PATIENCE, command_timeout=PATIENCE) as backend:
                relay.down = None
                topic = new_topic()
                await backend.publish(topic, Message(topic))


async def test_a_connection_that_was_lost_is_made_again_over_a_slow_link(server: RunningServer) -> None:
    topic = new_topic()
    async with relayed_to(server.port) as relay:
        backend = RedisBackend(relay.url, connect_timeout=PATIENCE, command_timeout=SOON)
        async with backend:
            await backend.publish(topic, Message(topic))
            relay.down = Pace(40, PATIENCE / 10)
            await anyio.aclose_forcefully(relay.all[0].client)
            await until(lambda: "not connected" in repr(backend))
            with anyio.fail_after(2 * SOON):
                await backend.publish(topic, Message(topic))
            relay.down = None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells how much of what was sent has arrived")
async def test_a_large_command_is_not_given_up_while_it_still_goes_out(server: RunningServer) -> None:
    topic = new_topic()
    payload = os.urandom(5 * KB * KB)
    with slow_upload_to(server.port, Pace(48 * KB, PATIENCE / 40)) as port:
        backend = RedisBackend(f"redis://127.0.0.1:{port}", command_timeout=PATIENCE)
        async with backend:
            with anyio.fail_after(4 * SOON):
                await backend._client.call("XADD", topic, "*", "message", payload)
            assert backend._client.mux.connections == 1


async def test_whoever_keeps_sending_to_a_frozen_server_learns_of_it_all_the_same(own_server: RunningServer) -> None:
    """What its kernel takes for it is no sign of life: what was asked first has arrived there long ago."""
    topic = new_topic()
    async with RedisBackend(own_server.url, command_timeout=PATIENCE) as backend:
        await backend.publish(topic, Message(topic))
        os.kill(own_server.pid, signal.SIGSTOP)
        errors: list[BackendError] = []

        async def publish() -> None:
            try:
                await backend.publish(topic, Message(topic, b"x" * KB))
            except BackendError as error:
                errors.append(error)

        try:
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    while not errors:
                        tasks.start_soon(publish)
                        await anyio.sleep(PATIENCE / 40)
                    tasks.cancel_scope.cancel()
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        assert errors[0].may_have_happened
        assert errors[0].can_pass


async def test_a_reply_that_stops_half_way_is_given_up(server: RunningServer) -> None:
    topic = new_topic()
    await fill(server, topic, "g", 12)
    async with relayed_to(server.port) as relay, RedisBackend(relay.url, command_timeout=PATIENCE) as backend:
        relay.down = Pace(8 * KB, PATIENCE / 10)
        read: list[str] = []
        with anyio.fail_after(2 * SOON):
            async with anyio.create_task_group() as tasks:

                async def forget() -> None:
                    await anyio.sleep(PATIENCE)
                    relay.forget()

                tasks.start_soon(forget)
                with pytest.raises(BackendError) as caught:
                    await backend.read_new(topic, "g", "c", count=12, timeout=0)
            assert caught.value.may_have_happened
            relay.down = None
            while len(read) < 12:
                entries = await backend.read_new(topic, "g", "c", count=12, timeout=0)
                read += [entry.id for entry in entries if not isinstance(entry, ClaimedMessage)]
        assert len(set(read)) == 12
