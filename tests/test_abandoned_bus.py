"""A bus that was entered by hand and is never left does not keep its program from ending.

``asyncio.run`` cancels every task that is left once, and then waits for them all. The parts of a bus that outlive a
stray cancellation have to tell that one apart: whoever entered the bus has ended, or ends now.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import anyio
import pytest
from harness import SOON, new_topic, until
from processes import BOUND, CHILDREN
from servers import RunningServer

from anybus import BackendError, Message, connect
from anybus._ground.cancellation import is_abandoned

CHILD = CHILDREN / "abandoning.py"

WAYS = [
    "bus_only",
    "with_subscription",
    "in_a_handler",
    "pulling",
    "generator",
    "elsewhere",
    "beside",
    "disconnected",
    "scheduled",
    "recurring",
    "once_only",
    "in_the_buffer",
]

ASYNCIO_LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]


def run_child(runner: str, url: str, way: str) -> str:
    """What the child says on standard error, having ended by itself."""
    command = [sys.executable, str(CHILD), runner, url, way, new_topic()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr


def check_asyncio(runner: str, url: str, way: str) -> None:
    said = run_child(runner, url, way)
    assert "\nLookupError: the program's own\n" in said.partition("in <module>")[2], said
    assert "Task was destroyed but it is pending" not in said, said


@pytest.mark.parametrize("way", WAYS)
def test_a_program_that_never_leaves_its_bus_ends_with_its_own_traceback(server: RunningServer, way: str) -> None:
    check_asyncio("asyncio.run", server.url, way)


@pytest.mark.parametrize("way", ["bus_only", "in_a_handler"])
def test_on_uvloop_too(server: RunningServer, way: str) -> None:
    check_asyncio("uvloop", server.url, way)


@pytest.mark.parametrize("way", ["bus_only", "in_a_handler", "recurring"])
def test_in_memory_too(way: str) -> None:
    check_asyncio("asyncio", "memory://", way)


@pytest.mark.thorough
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("runner", ["asyncio.run", "asyncio", "uvloop"])
@pytest.mark.parametrize("where", ["memory", "server"])
def test_every_way_on_every_loop(server: RunningServer, where: str, runner: str, way: str) -> None:
    if where == "memory" and way == "disconnected":
        pytest.skip("nothing to be connected to")
    check_asyncio(runner, server.url if where == "server" else "memory://", way)


@pytest.mark.parametrize("way", ["bus_only", "in_a_handler"])
def test_on_trio_the_program_ends_as_trio_ends_programs_that_leave_a_nursery_open(
    server: RunningServer, way: str
) -> None:
    """Trio finds its tasks out of order and gives up at once, with an error of its own. What matters: it ends."""
    assert "Error" in run_child("trio", server.url, way)


def test_what_a_subscription_held_that_was_never_left_is_not_pending_in_its_name(server: RunningServer) -> None:
    topic = new_topic()
    command = [sys.executable, str(CHILD), "asyncio.run", server.url, "in_a_handler", topic]
    subprocess.run(command, capture_output=True, timeout=BOUND, check=False)
    with server.client() as client:
        consumers: Any = client.xinfo_consumers(topic, "g")
    assert [consumer["name"] for consumer in consumers if consumer["name"] != b"anybus:returned"] == []


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_bus_whose_owner_goes_on_outlives_every_stray_cancellation(server: RunningServer) -> None:
    topic = new_topic()
    with anyio.fail_after(SOON):
        async with connect(server.url) as bus:
            await bus.publish(Message(topic))
            for _ in range(3):
                hit = [task for task in asyncio.all_tasks() if "Multiplexer.run" in repr(task)]
                assert len(hit) == 1
                hit[0].cancel()
                await until(lambda: "not connected" in repr(bus.backend))
                await bus.publish(Message(topic))
                await anyio.sleep(0.15)  # past the moment in which it looks whether anybody is left
            await bus.publish(Message(topic))


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_bus_whose_owner_ended_serves_on_until_it_is_cancelled(server: RunningServer) -> None:
    topic = new_topic()

    async def enter() -> Any:
        bus = connect(server.url)
        await bus.__aenter__()
        return bus

    with anyio.fail_after(SOON):
        before = asyncio.all_tasks()
        bus = await asyncio.create_task(enter())
        await bus.publish(Message(topic))
        left = asyncio.all_tasks() - before
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        with pytest.raises(BackendError, match="is closed") as caught:
            await bus.publish(Message(topic))
    assert caught.value.may_have_happened is False


async def test_only_a_task_whose_parents_are_gone_is_abandoned(anyio_backend_name: str) -> None:
    answers: list[bool] = []

    async def grandchild() -> None:
        answers.append(is_abandoned())

    async def child() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(grandchild)
        answers.append(is_abandoned())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child)
    answers.append(is_abandoned())
    assert answers == [False] * 3
    if anyio_backend_name == "trio":
        return  # its nurseries cannot be left open
    go_on = anyio.Event()

    async def late() -> None:
        await go_on.wait()
        await child()

    async def abandon() -> None:
        tasks = anyio.create_task_group()
        await tasks.__aenter__()
        tasks.start_soon(late)

    await asyncio.create_task(abandon())
    go_on.set()
    with anyio.fail_after(SOON):
        await until(lambda: len(answers) == 5)
    assert answers[3:] == [True] * 2
