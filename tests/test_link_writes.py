"""One file descriptor for each connection, and everything in order on it, however much the kernel takes at once.

What is small is written past the loop's transport. What does not fit goes by the transport, and nothing may overtake
it.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from harness import SOON, new_topic, until
from servers import RunningServer

from anybus import BackendError, Message
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._link import Link, open_link
from anybus.backends.redis._settings import from_url

ROUNDS = 12
LARGE = 3_000_000
"""More than a socket's buffer on this side and the other one takes at once."""

FOLDER = Path("/proc/self/fd")


def sockets() -> int:
    """How many sockets this process has open."""
    count = 0
    for name in os.listdir(FOLDER):
        try:
            count += os.readlink(FOLDER / name).startswith("socket:")
        except FileNotFoundError:  # the folder's own, gone by now
            continue
    return count


@pytest.mark.skipif(not FOLDER.exists(), reason="needs /proc")
async def test_each_connection_costs_one_file_descriptor(server: RunningServer) -> None:
    before = sockets()
    links = [await open_link(from_url(server.url)) for _ in range(10)]
    assert sockets() == before + 10
    for link in links:
        await link.aclose()
    topic = new_topic()
    async with RedisBackend(server.url) as backend:
        await backend.create_group(topic, "g")
        await backend.read_new(topic, "g", "c", count=1, timeout=0.01)
        assert sockets() <= before + 2


async def storm(server: RunningServer, seed: int, rounds: int) -> None:
    """Commands of all sizes from many tasks: each gets its own reply, and the connection stays the same one."""
    dice = random.Random(seed)
    async with RedisBackend(server.url, command_timeout=60) as backend:
        mux = backend._client.mux

        async def ask(number: int, size: int, pauses: int) -> None:
            for _ in range(pauses):
                await checkpoint()
            text = f"{number}:".encode() + bytes([65 + number % 26]) * size
            if size % 2:
                reply = await mux.single(("ECHO", text), 60)
            else:
                reply = await mux.call("ECHO", text)
            assert reply == text

        for _ in range(rounds):
            with anyio.fail_after(4 * SOON):
                async with anyio.create_task_group() as tasks:
                    for number in range(60):
                        size = dice.choice((1, 2, 40_000, 40_001, 300_000, LARGE if number % 20 == 0 else 3))
                        tasks.start_soon(ask, number, size, dice.choice((0, 0, 1, 2, 5, 9)))
        assert mux.connections == 1


async def test_commands_of_all_sizes_stay_in_order(server: RunningServer) -> None:
    await storm(server, 1, ROUNDS)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(10))
async def test_commands_of_all_sizes_stay_in_order_for_long(server: RunningServer, seed: int) -> None:
    await storm(server, seed, 10 * ROUNDS)


async def test_what_does_not_fit_is_met_at_all(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storm would show little if the kernel took everything."""
    took_part: list[int] = []
    send_nowait = Link.send_nowait

    def watched(link: Link, data: bytes) -> int:
        count = send_nowait(link, data)
        if 0 < count < len(data):
            took_part.append(count)
        return count

    monkeypatch.setattr(Link, "send_nowait", watched)
    async with RedisBackend(server.url, command_timeout=60) as backend:
        text = b"x" * 5 * LARGE

        async def echo() -> None:
            assert await backend._client.call("ECHO", text) == text

        with anyio.fail_after(4 * SOON):
            async with anyio.create_task_group() as tasks:
                # A server that reads meanwhile may let the kernel take everything.
                os.kill(server.pid, signal.SIGSTOP)
                try:
                    tasks.start_soon(echo)
                    await until(lambda: bool(took_part))
                finally:
                    os.kill(server.pid, signal.SIGCONT)
            assert await backend._client.call("ECHO", b"small") == b"small"
        assert backend._client.mux.is_connected
        assert took_part
        session: Any = backend._client.mux._session
        assert session._link.can_send_nowait, "all is answered: it may be written to directly again"


async def test_nothing_is_written_to_a_descriptor_that_was_closed(server: RunningServer) -> None:
    """The number may belong to somebody else by then."""
    link = await open_link(from_url(server.url))
    raw: Any = link._raw
    number = raw.fileno()
    await link.aclose()
    reader, writer = os.pipe()
    try:
        if reader != number and writer != number:
            os.dup2(writer, number)
        assert link.send_nowait(b"not for you") == 0
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 100)
    finally:
        for descriptor in {reader, writer, number}:
            os.close(descriptor)


async def test_a_connection_that_the_other_side_closed_fails_what_is_sent_on_it(server: RunningServer) -> None:
    topic = new_topic()
    async with RedisBackend(server.url) as backend:
        for _ in range(20):
            client_id = await backend._client.call("CLIENT", "ID")
            with anyio.fail_after(SOON):
                try:
                    # Both are answered, or neither is: the second one is written to a socket that is closed, perhaps.
                    await backend._client.mux.start((("CLIENT", "KILL", "ID", client_id, "SKIPME", "no"),))
                    await backend.publish(topic, Message(topic))
                except BackendError as error:
                    assert error.can_pass
                await backend._client.call("PING")
