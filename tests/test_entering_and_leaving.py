"""A bus is entered once, by one task, and left by the same.

Specification (DESIGN.md, section 3): entering connects, or raises; a bus belongs to its event loop. Of two tasks that
enter one bus, one gets in. What is left in another task than the one that entered it (as an async fixture of
pytest-asyncio is) cleans up behind itself all the same, and its error says what to use instead.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import pytest
from anyio import to_thread
from harness import SOON, Harness, quick, until
from servers import RedisHarness, RunningServer

from anybus import (
    BackendError,
    ClosedError,
    Delivery,
    MemoryBackend,
    Message,
    StreamBus,
    SubscriptionConfig,
)
from anybus.backends.redis import RedisBackend

ASYNCIO = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]


async def handle(delivery: Delivery) -> None:
    """Everything is fine."""


# --- entered once


class Slow(MemoryBackend):
    """Takes time to enter; fails to be entered so often."""

    def __init__(self, failures: int = 0) -> None:
        super().__init__()
        self.failures = failures
        self.entered = 0
        self.go_on = anyio.Event()

    async def __aenter__(self) -> Slow:  # noqa: PYI034
        self.entered += 1
        await self.go_on.wait()
        if self.failures:
            self.failures -= 1
            raise BackendError("not there yet", can_pass=True)
        return self


async def test_of_two_tasks_that_enter_one_bus_one_gets_in(topic: str) -> None:
    backend = Slow()
    bus = StreamBus(backend, quick())
    outcomes: list[str] = []

    async def enter() -> None:
        try:
            async with bus:
                outcomes.append("in")
                await bus.publish(Message(topic))
        except ClosedError as error:
            assert "once" in str(error)
            outcomes.append("refused")
            backend.go_on.set()

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(enter)
            tasks.start_soon(enter)
    assert outcomes == ["refused", "in"]
    assert backend.entered == 1
    assert len(backend.entries(topic)) == 1


async def test_a_bus_that_is_being_entered_is_not_open_yet(topic: str) -> None:
    backend = Slow()
    bus = StreamBus(backend, quick())

    async def enter() -> None:
        async with bus:
            pass

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(enter)
            await until(lambda: backend.entered == 1)
            with pytest.raises(ClosedError, match="being entered"):
                await bus.publish(Message(topic))
            backend.go_on.set()


async def test_a_bus_that_could_not_be_entered_is_not_entered_again_and_another_one_is(topic: str) -> None:
    backend = Slow(failures=1)
    backend.go_on.set()
    bus = StreamBus(backend, quick())
    with pytest.raises(BackendError, match="not there yet"):
        await bus.__aenter__()
    with pytest.raises(ClosedError, match="create another bus"):
        await bus.__aenter__()
    with pytest.raises(ClosedError):
        await bus.publish(Message(topic))
    with pytest.raises(ClosedError, match="can be left"):
        await bus.__aexit__(None, None, None)
    async with StreamBus(backend, quick()) as other:
        await other.publish(Message(topic))


async def test_a_bus_whose_entering_was_cancelled_is_not_entered_again(topic: str) -> None:
    backend = Slow()
    bus = StreamBus(backend, quick())
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with bus:
            raise AssertionError("it was entered")
    assert scope.cancelled_caught
    with pytest.raises(ClosedError, match="once"):
        await bus.__aenter__()


async def test_a_redis_backend_is_entered_by_one_bus_at_a_time(server: RunningServer, topic: str) -> None:
    backend = RedisBackend(server.url)
    outcomes: list[str] = []
    first_left = anyio.Event()

    async def enter() -> None:
        try:
            async with StreamBus(backend, quick()) as bus:
                await bus.publish(Message(topic))
                await first_left.wait()
        except RuntimeError as error:
            assert "one for each bus" in str(error)
            outcomes.append("refused")
            first_left.set()
        else:
            outcomes.append("in")

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(enter)
            tasks.start_soon(enter)
    assert outcomes == ["refused", "in"]
    async with StreamBus(backend, quick()) as bus:  # one after the other is fine
        await bus.publish(Message(topic))
    assert len(await RedisHarness(server).entries(topic)) == 2


async def test_a_memory_backend_is_shared_by_the_buses_that_it_is_given_to(topic: str) -> None:
    backend = MemoryBackend()
    async with StreamBus(backend, quick()) as one, StreamBus(backend, quick()) as other:
        await one.publish(Message(topic))
        await other.publish(Message(topic))
    assert len(backend.entries(topic)) == 2


# --- left where it was entered


async def in_another_task(awaitable: Any) -> Any:
    """As pytest-asyncio does with each half of an async fixture."""
    return await asyncio.ensure_future(awaitable)


async def leave(context: AbstractAsyncContextManager[Any, Any]) -> None:
    await context.__aexit__(None, None, None)


def check_advice(error: BaseException) -> None:
    for words in (
        "entered in one task and left in another",
        "pytest-asyncio",
        "AnyIO's pytest plugin",
        "inside the test",
    ):
        assert words in str(error)


@pytest.mark.parametrize("anyio_backend", ASYNCIO)
@pytest.mark.parametrize("kind", ["subscribe", "deliveries"])
async def test_a_subscription_that_is_left_in_another_task_ends_and_says_what_to_use_instead(
    kind: str, harness: Harness, topic: str
) -> None:
    with anyio.fail_after(SOON):
        async with StreamBus(harness.make_backend(), quick()) as bus:
            config = SubscriptionConfig(topic, "g")
            context: Any = bus.subscribe(config, handle) if kind == "subscribe" else bus.deliveries(config)
            entered: Any = await in_another_task(context.__aenter__())
            await bus.publish(Message(topic))
            if kind == "subscribe":
                await until(lambda: entered.statistics().handled == 1)
            else:
                await entered.receive()
            with pytest.raises(RuntimeError) as caught:
                await in_another_task(leave(context))
            check_advice(caught.value)
            assert len(bus._members) == 0
            pending = await harness.pending(topic, "g")
            assert [entry.consumer for entry in pending] == (["anybus:returned"] if kind == "deliveries" else [])
            await bus.publish(Message(topic))


@pytest.mark.parametrize("anyio_backend", ASYNCIO)
async def test_a_bus_that_is_left_in_another_task_is_closed_and_says_what_to_use_instead(
    server: RunningServer, topic: str
) -> None:
    bus = StreamBus(RedisBackend(server.url), quick())
    with anyio.fail_after(SOON):
        await in_another_task(bus.__aenter__())
        await bus.publish(Message(topic))
        with pytest.raises(RuntimeError) as caught:
            await in_another_task(leave(bus))
    check_advice(caught.value)
    with pytest.raises(ClosedError):
        await bus.publish(Message(topic))


@pytest.mark.parametrize("anyio_backend", ASYNCIO)
async def test_a_bus_in_memory_may_be_left_in_another_task(topic: str) -> None:
    bus = StreamBus(MemoryBackend(), quick())
    await in_another_task(bus.__aenter__())
    await bus.publish(Message(topic))
    await in_another_task(leave(bus))
    with pytest.raises(ClosedError):
        await bus.publish(Message(topic))


async def test_an_error_of_the_body_that_speaks_of_cancel_scopes_comes_out_as_itself(
    harness: Harness, topic: str
) -> None:
    error = RuntimeError("my own error about a cancel scope")
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with pytest.raises(RuntimeError) as caught:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handle):
                raise error
    assert caught.value is error


async def test_leaving_in_another_loop_is_refused_and_leaves_everything_as_it_was(harness: Harness, topic: str) -> None:
    def elsewhere(context: Any) -> BaseException | None:
        try:
            anyio.run(leave, context)
        except Exception as error:
            return error
        return None

    async with StreamBus(harness.make_backend(), quick()) as bus:
        context = bus.subscribe(SubscriptionConfig(topic, "g"), handle)
        async with context as subscription:
            for entered in (bus, context):
                with anyio.fail_after(SOON):
                    refusal = await to_thread.run_sync(elsewhere, entered, abandon_on_cancel=True)
                assert type(refusal) is RuntimeError
                assert "'MainThread'" in str(refusal)
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
