"""Promise 10: the user's own exceptions from the body come out as themselves.

A subscription that failed cancels its body, and its error comes out bare; noise of the shutdown never becomes a second
error.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from harness import SOON, Harness, Recorder, StepByStep, nothing_pending, quick, until

from anybus import BackendError, ClosedError, Delivery, Message, Reject, Retry, StreamBus, SubscriptionConfig

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup

GROUP = "g"
LONG = 60.0

ASYNCIO_LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]

FORMS = ["subscribe", "deliveries", "bus"]


class CustomBaseError(BaseException):
    """No ``Exception``: what a framework may use to end a program."""


ERRORS: list[BaseException] = [
    ValueError("the user's own"),
    TimeoutError("the user's own"),
    ClosedError("the user's own"),
    StopAsyncIteration("the user's own"),
    StopIteration("the user's own"),
    SystemExit(3),
    KeyboardInterrupt(),
    CustomBaseError("the user's own"),
    ExceptionGroup("the user's own", [ValueError("1")]),
    BaseExceptionGroup("the user's own", [ValueError("1"), SystemExit(2)]),
    Retry("the user's own"),
    Reject("the user's own"),
]


def kind(error: BaseException) -> str:
    return type(error).__name__


async def nothing(delivery: Delivery) -> None:
    """A handler that does nothing."""


class Stuck:
    """A handler that goes on until it is cancelled, and then does something."""

    def __init__(self, when_cancelled: BaseException | None = None) -> None:
        self.begun = 0
        self.when_cancelled = when_cancelled

    async def __call__(self, delivery: Delivery) -> None:
        self.begun += 1
        try:
            await anyio.sleep_forever()
        finally:
            if self.when_cancelled is not None:
                raise self.when_cancelled

    async def has_begun(self) -> None:
        await until(lambda: self.begun > 0, "a handler to begin")


@asynccontextmanager
async def entered(bus: StreamBus, form: str, topic: str, handler: Any = nothing) -> AsyncGenerator[None, None]:
    """A body in that form: of a subscription, of a stream of deliveries, or of the bus alone."""
    if form == "subscribe":
        async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler):
            yield
    elif form == "deliveries":
        async with bus.deliveries(SubscriptionConfig(topic, GROUP)):
            yield
    else:
        yield


def fail(backend: StepByStep, method: str, error: BaseException, *, of: str | None = None) -> None:
    """From now on let a method of the backend raise this, for all streams or one."""
    real: Any = getattr(backend, method)

    async def failing(stream: str, *args: Any, **kwargs: Any) -> Any:
        if of in (None, stream):
            raise error
        return await real(stream, *args, **kwargs)

    setattr(backend, method, failing)


def broken() -> BackendError:
    """What will not pass by itself."""
    return BackendError("WRONGTYPE", can_pass=False)


# The body's own


@pytest.mark.parametrize("error", ERRORS, ids=kind)
@pytest.mark.parametrize("form", FORMS)
async def test_what_the_body_raises_comes_out_as_itself(
    harness: Harness, topic: str, form: str, error: BaseException
) -> None:
    recorder = Recorder()
    came_out: BaseException | None = None
    with anyio.fail_after(SOON):
        try:
            async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
                if form == "subscribe":
                    async with bus.subscribe(SubscriptionConfig(topic, GROUP), nothing):
                        raise error
                elif form == "deliveries":
                    async with bus.deliveries(SubscriptionConfig(topic, GROUP)):
                        raise error
                else:
                    raise error
        except BaseException as caught:
            came_out = caught
    assert came_out is error
    assert came_out.__cause__ is None
    assert not recorder.of("on_error")


@pytest.mark.parametrize("cleanup", [ValueError("cleanup"), RuntimeError("cleanup"), None], ids=str)
async def test_what_handlers_raise_while_the_body_ends_them_is_no_second_error(
    harness: Harness, topic: str, cleanup: Exception | None
) -> None:
    error = ValueError("the user's own")
    handler = Stuck(cleanup)
    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder, close_timeout=LONG)) as bus:
        with anyio.fail_after(SOON), pytest.raises(ValueError, match="own") as caught:  # noqa: PT012
            async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler):
                await bus.publish_batch([Message(topic) for _ in range(3)])
                await until(lambda: handler.begun == 3)
                raise error
    assert caught.value is error
    assert [event.scope for event in recorder.of("on_error")] == ["handler"] * (3 if cleanup else 0)


@pytest.mark.parametrize("method", ["release", "ack_many", "forget_consumer"])
@pytest.mark.parametrize("raises", [True, False], ids=["the-body-raises", "the-body-ends"])
async def test_what_fails_at_the_end_is_reported_and_no_second_error(
    harness: Harness, topic: str, method: str, raises: bool
) -> None:
    error = ValueError("the user's own")
    backend = StepByStep(harness.make_backend())
    handled: list[str] = []
    recorder = Recorder()

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.id)
        if len(handled) == 3:
            await anyio.sleep_forever()

    options = quick(recorder, close_timeout=0.05, cleanup_timeout=0.05, ack_flush_interval=LONG)
    came_out: BaseException | None = None
    async with StreamBus(backend, options) as bus:
        try:
            with anyio.fail_after(SOON):
                async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler):
                    await bus.publish(Message(topic))
                    await until(lambda: len(handled) == 1)
                    await nothing_pending(harness, topic, GROUP)
                    # One more is handled, its ack waits for company; one is in its handler when the end comes.
                    await bus.publish_batch([Message(topic), Message(topic)])
                    await until(lambda: len(handled) == 3)
                    fail(backend, method, broken())
                    if raises:
                        raise error
        except BaseException as caught:
            came_out = caught
    assert came_out is (error if raises else None)
    assert recorder.of("on_error")


async def test_what_the_body_raises_while_it_is_cancelled_from_outside_comes_out(harness: Harness, topic: str) -> None:
    error = ValueError("the user's own cleanup")
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with anyio.fail_after(SOON), pytest.raises(ValueError, match="cleanup") as caught:  # noqa: PT012
            with anyio.CancelScope() as scope:
                async with bus.subscribe(SubscriptionConfig(topic, GROUP), nothing):
                    scope.cancel()
                    try:
                        await anyio.sleep_forever()
                    finally:
                        raise error
    assert caught.value is error


async def test_a_cancellation_from_outside_comes_out_as_one(harness: Harness, topic: str) -> None:
    went_on: list[str] = []
    recorder = Recorder()
    handler = Stuck()
    async with StreamBus(harness.make_backend(), quick(recorder, close_timeout=LONG)) as bus:
        with anyio.fail_after(SOON), anyio.CancelScope() as scope:
            async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler):
                await bus.publish(Message(topic))
                await handler.has_begun()
                scope.cancel()
                await anyio.sleep_forever()
            went_on.append("after the block")
    assert scope.cancelled_caught
    assert not went_on
    assert not recorder.of("on_error")


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_cancelled_error_that_nobody_asked_for_comes_out_of_the_body_as_itself(
    harness: Harness, topic: str
) -> None:
    error = asyncio.CancelledError("of a future that somebody else has cancelled")
    came_out: BaseException | None = None
    async with StreamBus(harness.make_backend(), quick()) as bus:
        try:
            async with bus.subscribe(SubscriptionConfig(topic, GROUP), nothing):
                raise error
        except BaseException as caught:
            came_out = caught
        # Nothing is left of it that would hit the next await.
        await anyio.lowlevel.checkpoint()
    assert came_out is error


# A subscription that failed


async def in_subscribe(bus: StreamBus, config: SubscriptionConfig, handler: Any, body: Callable[[], Any]) -> None:
    async with bus.subscribe(config, handler):
        await body()


async def in_deliveries(bus: StreamBus, config: SubscriptionConfig, handler: Any, body: Callable[[], Any]) -> None:
    async with bus.deliveries(config):
        await body()


async def waiting_for_a_delivery(
    bus: StreamBus, config: SubscriptionConfig, handler: Any, body: Callable[[], Any]
) -> None:
    async with bus.deliveries(config) as stream:
        async for delivery in stream:
            await delivery.ack()
    await body()


async def in_consume(bus: StreamBus, config: SubscriptionConfig, handler: Any, body: Callable[[], Any]) -> None:
    await bus.consume(config, handler)
    await body()


async def waiting_for_the_end(
    bus: StreamBus, config: SubscriptionConfig, handler: Any, body: Callable[[], Any]
) -> None:
    async with bus.subscribe(config, handler) as subscription:
        await subscription.wait_closed()
        await body()


Program = Callable[[StreamBus, SubscriptionConfig, Any, Callable[[], Any]], Awaitable[None]]
PROGRAMS: list[Program] = [in_subscribe, in_deliveries, waiting_for_a_delivery, in_consume, waiting_for_the_end]


def named(program: Program) -> str:
    return getattr(program, "__name__", "program").replace("_", "-")


@pytest.mark.parametrize("method", ["create_group", "read_new", "reclaim_idle"])
@pytest.mark.parametrize("program", PROGRAMS, ids=named)
async def test_an_error_of_the_backend_that_will_not_pass_cancels_the_body_and_comes_out_bare(
    harness: Harness, topic: str, program: Program, method: str
) -> None:
    backend = StepByStep(harness.make_backend())
    error = broken()
    recorder = Recorder()
    async with StreamBus(backend, quick(recorder)) as bus:
        fail(backend, method, error, of=topic)
        with anyio.fail_after(SOON), pytest.raises(BackendError, match="WRONGTYPE") as caught:
            await program(bus, SubscriptionConfig(topic, GROUP), nothing, anyio.sleep_forever)
        assert caught.value is error
        # It is the caller's; the bus goes on, and other subscriptions with it.
        await bus.publish(Message(topic))
    ended = [event.error for event in recorder.of("on_ended")]
    assert ended == ([] if method == "create_group" else [error])


@pytest.mark.parametrize("program", [in_subscribe, in_consume, waiting_for_the_end], ids=named)
async def test_what_a_handler_raises_that_is_no_exception_cancels_the_body_and_comes_out_bare(
    harness: Harness, topic: str, program: Program
) -> None:
    error = CustomBaseError("!")
    body_was: list[str] = []

    async def handler(delivery: Delivery) -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    async def body() -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            body_was.append("cancelled")
            raise

    came_out: BaseException | None = None
    async with StreamBus(harness.make_backend(), quick(close_timeout=LONG)) as bus:
        entry_id = await bus.publish(Message(topic))
        with anyio.fail_after(SOON):
            try:
                config = SubscriptionConfig(topic, GROUP, group_start_id="0")
                await program(bus, config, handler, body)
            except BaseException as caught:
                came_out = caught
        assert came_out is error
        # Its message was not handled: it stays pending, and the hand-over counts.
        [entry] = await harness.pending(topic, GROUP)
        assert (entry.id, entry.consumer != "anybus:returned", entry.deliveries) == (entry_id, True, 1)
    assert body_was == (["cancelled"] if program is in_subscribe else [])


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_what_ends_programs_comes_out_bare_too_if_a_handler_raises_it(loop: str, name: str) -> None:
    """In a program of its own: asyncio lets these two out of its loop if they come out of any task of its."""
    command = [sys.executable, str(Path(__file__).parent / "children" / "exiting.py"), loop, name]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr[-2000:]
    report = json.loads(ended.stdout)
    pending = ["anybus:returned", 0] if name == "KeyboardInterrupt" else ["its own", 1]
    assert report == {"as_itself": True, "body_was": "cancelled", "pending": [pending]}


async def test_a_task_group_around_consume_gets_the_bare_error_as_its_only_member(harness: Harness, topic: str) -> None:
    backend = StepByStep(harness.make_backend())
    error = broken()
    async with StreamBus(backend, quick(Recorder())) as bus:
        came_out: BaseException | None = None
        try:
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    await tasks.start(bus.consume, SubscriptionConfig(topic, GROUP), nothing)
                    fail(backend, "read_new", error, of=topic)
                    await anyio.sleep_forever()
        except BaseException as caught:
            came_out = caught
    assert isinstance(came_out, ExceptionGroup)
    assert list(came_out.exceptions) == [error]


async def test_a_consume_that_is_cancelled_before_it_has_begun_says_nothing(harness: Harness, topic: str) -> None:
    """On trio either of two tasks may run first; so it is tried often enough to see both."""
    for _ in range(25):
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks, StreamBus(harness.make_backend(), quick()) as bus:
                tasks.start_soon(bus.consume, SubscriptionConfig(topic, GROUP), nothing)
                tasks.cancel_scope.cancel()
        assert tasks.cancel_scope.cancel_called


async def test_an_error_during_the_graceful_end_after_the_body_comes_out_bare(harness: Harness, topic: str) -> None:
    error = CustomBaseError("!")
    gate = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        await gate.wait()
        raise error

    came_out: BaseException | None = None
    async with StreamBus(harness.make_backend(), quick(close_timeout=LONG)) as bus:
        with anyio.fail_after(SOON):
            try:
                async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler) as subscription:
                    await bus.publish(Message(topic))
                    await until(lambda: subscription.statistics().in_flight == 1)
                    subscription.close()
                    gate.set()
            except BaseException as caught:
                came_out = caught
    assert came_out is error


async def test_a_handlers_base_exception_comes_out_although_the_cause_was_a_cancellation_from_outside(
    harness: Harness, topic: str
) -> None:
    error = CustomBaseError("!")
    handler = Stuck(error)
    came_out: BaseException | None = None
    async with StreamBus(harness.make_backend(), quick(close_timeout=LONG)) as bus:
        with anyio.fail_after(SOON):
            try:
                with anyio.CancelScope() as scope:
                    async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler):
                        await bus.publish(Message(topic))
                        await handler.has_begun()
                        scope.cancel()
                        await anyio.sleep_forever()
            except BaseException as caught:
                came_out = caught
    assert came_out is error


async def test_what_the_body_raises_when_a_failure_has_cancelled_it_is_told_beside_the_failure(
    harness: Harness, topic: str
) -> None:
    backend = StepByStep(harness.make_backend())
    failure, second = broken(), ValueError("the body's cleanup")
    recorder = Recorder()
    async with StreamBus(backend, quick(recorder)) as bus:
        with anyio.fail_after(SOON), pytest.raises(BackendError, match="WRONGTYPE") as caught:  # noqa: PT012
            async with bus.subscribe(SubscriptionConfig(topic, GROUP), nothing):
                fail(backend, "read_new", failure, of=topic)
                try:
                    await anyio.sleep_forever()
                finally:
                    raise second
    assert caught.value is failure
    assert second in [event.error for event in recorder.of("on_error")]


async def test_a_failure_while_the_body_raises_is_told_beside_the_bodys_error(harness: Harness, topic: str) -> None:
    error, gate = ValueError("the user's own"), anyio.Event()
    backend = StepByStep(harness.make_backend())
    recorder = Recorder()
    failure = broken()

    async def read_new(stream: str, *_: object, **__: object) -> Any:
        if stream != topic:
            return []
        try:
            gate.set()
            await anyio.sleep_forever()
        finally:
            raise failure

    async with StreamBus(backend, quick(recorder)) as bus:
        backend.read_new = read_new  # type: ignore[method-assign]
        with anyio.fail_after(SOON), pytest.raises(ValueError, match="own") as caught:  # noqa: PT012
            async with bus.subscribe(SubscriptionConfig(topic, GROUP), nothing):
                await gate.wait()
                raise error
    assert caught.value is error
    told = [event.error for event in recorder.of("on_error")] + [event.error for event in recorder.of("on_ended")]
    assert failure in told


@pytest.mark.parametrize("same", [True, False], ids=["the-same-error", "two-errors"])
async def test_of_two_failures_in_the_same_moment_one_comes_out_bare_and_the_other_is_told(
    harness: Harness, topic: str, same: bool
) -> None:
    """A permission that is taken away hits reading and reclaiming alike; ``except BackendError`` has to find it."""
    backend = StepByStep(harness.make_backend())
    first = BackendError("NOPERM", can_pass=False)
    second = first if same else BackendError("NOPERM of reclaiming", can_pass=False)
    recorder = Recorder()
    asked: list[str] = []

    # Both are called in the first step of their tasks, and neither waits: there is no moment between them.
    async def read_new(stream: str, *_: object, **__: object) -> Any:
        if stream != topic:
            return []
        asked.append("read_new")
        raise first

    async def reclaim_idle(*_: object, **__: object) -> Any:
        asked.append("reclaim_idle")
        raise second

    came_out: BaseException | None = None
    async with StreamBus(backend, quick(recorder)) as bus:
        backend.read_new = read_new  # type: ignore[method-assign]
        backend.reclaim_idle = reclaim_idle  # type: ignore[method-assign]
        with anyio.fail_after(SOON):
            try:
                async with bus.subscribe(SubscriptionConfig(topic, GROUP), nothing):
                    await anyio.sleep_forever()
            except BaseException as caught:
                came_out = caught
    assert sorted(asked) == ["read_new", "reclaim_idle"]
    assert came_out in (first, second)
    assert {first, second} == {came_out, *(event.error for event in recorder.of("on_error"))}


@pytest.mark.parametrize("error", [ValueError("own"), Retry("again"), Reject("never"), TimeoutError("slow")], ids=kind)
async def test_what_a_handler_raises_never_comes_out(harness: Harness, topic: str, error: Exception) -> None:
    raised: list[str] = []

    async def handler(delivery: Delivery) -> None:
        raised.append(delivery.id)
        raise error

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler) as subscription:
            await bus.publish_batch([Message(topic) for _ in range(3)])
            await until(lambda: len(raised) >= 3)
            assert subscription.is_running


async def test_a_failed_subscription_leaves_its_neighbours_on_the_bus_alone(harness: Harness, topic: str) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.id)

    async def exits(delivery: Delivery) -> None:
        raise CustomBaseError("!")

    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "neighbour"), handler) as neighbour:
            came_out: BaseException | None = None
            try:
                with anyio.fail_after(SOON):
                    async with bus.subscribe(SubscriptionConfig(topic, GROUP), exits):
                        await bus.publish(Message(topic))
                        await anyio.sleep_forever()
            except BaseException as caught:
                came_out = caught
            assert isinstance(came_out, CustomBaseError)
            entry_id = await bus.publish(Message(topic))
            await until(lambda: entry_id in handled)
            assert neighbour.is_running


async def test_an_outer_subscriptions_failure_ends_an_inner_one_and_comes_out_bare(
    harness: Harness, topic: str
) -> None:
    inner_handler = Stuck()
    error = CustomBaseError("of the outer one")

    async def exits(delivery: Delivery) -> None:
        raise error

    came_out: BaseException | None = None
    async with StreamBus(harness.make_backend(), quick(close_timeout=LONG)) as bus:
        with anyio.fail_after(SOON):
            try:
                async with bus.subscribe(SubscriptionConfig(topic, "outer"), exits):
                    async with bus.subscribe(SubscriptionConfig(f"{topic}.inner", GROUP), inner_handler) as inner:
                        await bus.publish(Message(f"{topic}.inner"))
                        await inner_handler.has_begun()
                        await bus.publish(Message(topic))
                        await anyio.sleep_forever()
            except BaseException as caught:
                came_out = caught
        assert came_out is error
        assert inner.statistics().held == 0
        assert [entry.consumer for entry in await harness.pending(f"{topic}.inner", GROUP)] == ["anybus:returned"]


async def test_a_wrong_backend_comes_out_of_entering_the_bus_as_itself(harness: Harness) -> None:
    class Refusing(StepByStep):
        async def __aenter__(self) -> Refusing:  # noqa: PYI034
            raise error

    error = BackendError("no permission", can_pass=False)
    with pytest.raises(BackendError, match="no permission") as caught:
        async with StreamBus(Refusing(harness.make_backend())):
            raise AssertionError("it was entered")
    assert caught.value is error
