"""A backend on a server that is left, or cancelled at any step, ends.

The specification, on asyncio's loops: wherever asyncio's own ``Task.cancel()`` hits the program, between the first step
of entering the backend and the last one of leaving it, that ends by it, soon, and leaves neither a task nor a
connection behind. On every loop: the multiplexed connection is closed whatever closing the readers comes to; and an
interrupt that strikes its task comes out as itself, when what was held has been handed back.
"""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from harness import SOON, Recorder, quick, until
from servers import RedisHarness, RunningServer
from steps import Steps, living_tasks, watched

from anybus import Delivery, Message, StreamBus, SubscriptionConfig
from anybus._ground.cancellation import sole
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._link import Link

ASYNCIO_LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]


async def open_reader(backend: RedisBackend, topic: str) -> Link:
    """Read, until the read has blocked and so has a connection of its own, which stays open."""
    await backend.create_group(topic, "g", "0")
    while True:
        await backend.read_new(topic, "g", "c", count=1, timeout=0.005)
        for pool in backend._taking._readers._pools.values():
            link = pool.shared[0]._reader._link
            if link is not None:
                return link


async def use(backend: RedisBackend, topic: str) -> None:
    async with backend:
        await open_reader(backend, topic)


async def ends(host: asyncio.Task[None], backend: RedisBackend) -> None:
    with anyio.move_on_after(SOON):
        await asyncio.wait([host])
        return
    # It hangs in a shield; without this the test would hang too, instead of telling.
    backend._client.mux.close()
    await asyncio.wait([host])
    raise AssertionError("it does not end")


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_native_cancellation_at_any_step_comes_out_as_one(server: RunningServer, topic: str) -> None:
    before = living_tasks("asyncio")
    number, missed = 0, 0
    while missed < 3:
        number += 1
        steps = Steps()
        backend = RedisBackend(f"{server.url}?client_name=leaving")
        with watched(steps, "asyncio"):
            host = asyncio.ensure_future(use(backend, topic))
            cancelled: list[int] = []

            def cancel(host: asyncio.Task[None] = host, cancelled: list[int] = cancelled) -> None:
                if host.cancel():
                    cancelled.append(1)

            steps.at(number, cancel)
            steps.counting = True
            await ends(host, backend)
        assert host.cancelled() == bool(cancelled), f"cancelled at step {number}: {host}"
        missed = 0 if cancelled else missed + 1
    assert number > 20, "this would be no test"
    await until(lambda: living_tasks("asyncio") == before, "every task to be gone")
    client: Any = server.client()

    def none_left() -> bool:
        return not [item for item in client.client_list() if item["name"] == "leaving"]

    await until(none_left, "every connection to be closed")
    client.close()


async def test_what_goes_wrong_with_closing_a_reader_keeps_no_connection_open(
    server: RunningServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = RedisBackend(server.url)
    error = RuntimeError("closing a reader")
    came_out: list[BaseException] = []
    over = anyio.Event()
    close = Link.aclose

    async def program() -> None:
        try:
            async with backend:
                of_reader = await open_reader(backend, topic)

                async def closes(link: Link) -> None:
                    await close(link)
                    if link is of_reader:
                        raise error

                monkeypatch.setattr(Link, "aclose", closes)
        except BaseException as caught:
            came_out.append(caught)
        over.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(program)
        with anyio.move_on_after(SOON) as scope:
            await over.wait()
        backend._client.mux.close()
    assert not scope.cancelled_caught, "it does not end"
    assert [sole(caught) for caught in came_out] == [error]


@pytest.mark.parametrize("where", ["_serve", "_connect"])
async def test_an_interrupt_of_the_connections_task_comes_out_bare_and_what_is_held_is_handed_back(
    server: RunningServer, topic: str, where: str
) -> None:
    """On trio a Ctrl-C strikes whatever runs in that moment: while the connection serves, or while it is made again."""
    harness = RedisHarness(server)
    backend = harness.make_backend()
    mux = backend._client.mux
    begun = anyio.Event()
    interrupt = KeyboardInterrupt()
    struck: list[str] = []
    real = getattr(mux, where)

    async def strikes(*args: Any) -> Any:
        if struck:
            return await real(*args)
        struck.append(where)
        for link in args:
            await link.aclose()
        raise interrupt

    async def handler(delivery: Delivery) -> None:
        begun.set()
        await anyio.sleep_forever()

    came_out: BaseException | None = None
    with anyio.fail_after(SOON):
        try:
            async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=60)) as bus:
                async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
                    entry_id = await bus.publish(Message(topic))
                    await begun.wait()
                    setattr(mux, where, strikes)
                    mux.reset()
                    await anyio.sleep_forever()
        except BaseException as caught:
            came_out = caught
    assert struck == [where]
    assert came_out is interrupt
    [entry] = await harness.pending(topic, "g")
    assert (entry.id, entry.consumer, entry.deliveries) == (entry_id, "anybus:returned", 0)
