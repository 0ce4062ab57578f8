"""The end always ends, and nothing is stuck on the way: not by strays, hooks, lost replies, or a bus left too early."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from harness import QUICK, SOON, Harness, Recorder, StepByStep, nothing_pending, quick, until

from anybus import (
    BackendError,
    ClosedError,
    Delivery,
    ExponentialBackoff,
    Message,
    Observer,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
)
from anybus._failure.copies import retry_stream
from anybus.abc import BusEvent, StreamBackend

ASYNCIO_LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]


async def nothing(delivery: Delivery) -> None:
    """A handler that does nothing."""


def fail_always(backend: StreamBackend, method: str, error: BaseException, *, times: int | None = None) -> list[int]:
    """Let a method fail, always or so many times; a list that grows with every failure."""
    real: Any = getattr(backend, method)
    failures: list[int] = []

    async def failing(*args: Any, **kwargs: Any) -> Any:
        if times is None or len(failures) < times:
            failures.append(1)
            raise error
        return await real(*args, **kwargs)

    setattr(backend, method, failing)
    return failures


async def test_a_bus_can_be_left_while_a_subscription_is_still_being_entered(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    outcomes: list[str] = []

    async def enter() -> None:
        try:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), nothing):
                outcomes.append("entered")
        except ClosedError:
            outcomes.append("closed")

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with StreamBus(backend, quick(Recorder())) as bus:
                failures = fail_always(backend, "create_group", BackendError("LOADING", can_pass=True))
                tasks.start_soon(enter)
                await until(lambda: bool(failures))
    assert outcomes == ["closed"]


@pytest.mark.parametrize("method", ["read_new", "reclaim_idle", "renew", "ack_many", "forget_consumer"])
async def test_a_stray_cancellation_out_of_the_backend_is_an_error_that_can_pass(
    harness: Harness, topic: str, method: str, anyio_backend_name: str
) -> None:
    if anyio_backend_name == "trio":
        # Trio lets nobody make a Cancelled: there the same must hold for any error that can pass.
        error: BaseException = BackendError("passing", can_pass=True)
    else:
        error = asyncio.CancelledError()
    backend = StepByStep(harness.make_backend())
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)
        if delivery.message.key == "1":
            await until(lambda: bool(failures) or method != "renew")

    recorder = Recorder()
    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(recorder, claim_idle_timeout=1.5)) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                failures = fail_always(backend, method, error, times=1)
                await bus.publish(Message(topic, key="1"))
                await until(lambda: handled.count("1") == 1)
                await bus.publish(Message(topic, key="2"))
                await until(lambda: handled.count("2") == 1)
                await nothing_pending(harness, topic, "g")
                await until(lambda: method == "forget_consumer" or bool(failures))
            assert not subscription.is_running
    assert failures
    assert recorder.of("on_error")


async def test_a_settlement_that_the_end_cuts_off_is_told_so(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    raised: list[type[Exception]] = []

    async def settle_late(delivery: Delivery) -> None:
        try:
            await delivery.ack()
        except (ClosedError, BackendError) as error:
            raised.append(type(error))

    async def never(*args: object, **kwargs: object) -> list[str]:
        await anyio.sleep_forever()
        raise AssertionError

    async with StreamBus(backend, quick(Recorder(), cleanup_timeout=0.2, claim_idle_timeout=60)) as bus:
        await bus.publish(Message(topic))
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with bus.deliveries(SubscriptionConfig(topic, "g", group_start_id="0")) as stream:
                    delivery = await stream.receive()
                    backend.ack_many = never  # type: ignore[method-assign]
                    tasks.start_soon(settle_late, delivery)
                    await anyio.wait_all_tasks_blocked()
                with pytest.raises(ClosedError):
                    await delivery.ack()
    assert raised == [ClosedError]


async def test_a_long_flush_interval_does_not_hold_up_the_acks_of_a_graceful_end(harness: Harness, topic: str) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.id)

    async with StreamBus(harness.make_backend(), quick(ack_flush_interval=600, ack_batch_size=1000)) as bus:
        config = SubscriptionConfig(topic, "g", max_in_flight=64)
        async with bus.subscribe(config, handler):
            await bus.publish_batch([Message(topic) for _ in range(20)])
            await until(lambda: len(handled) == 20)
        assert await harness.pending(topic, "g") == []


async def test_a_handler_that_still_runs_when_the_bus_is_left_can_publish_what_it_came_to(
    harness: Harness, topic: str
) -> None:
    entered = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        entered.set()
        await until(lambda: not subscription.is_running)
        await bus.publish(Message(f"{topic}.results"))

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with StreamBus(harness.make_backend(), quick()) as bus:
                subscription = await tasks.start(bus.consume, SubscriptionConfig(topic, "g"), handler)
                await bus.publish(Message(topic))
                await entered.wait()
    assert len(await harness.entries(f"{topic}.results")) == 1
    assert await harness.pending(topic, "g") == []
    with pytest.raises(ClosedError):
        await bus.publish(Message(topic))


async def test_a_hook_may_pause_the_subscription_without_any_entry_being_settled_twice(
    harness: Harness, topic: str
) -> None:
    class Pausing(Recorder):
        def on_received(self, event: BusEvent) -> None:
            super().on_received(event)
            subscription.pause()

        def on_error(self, event: BusEvent) -> None:
            super().on_error(event)
            subscription.pause()

    observer = Pausing()
    async with StreamBus(harness.make_backend(), quick(observer, claim_idle_timeout=60)) as bus:
        good_id = await bus.publish(Message(topic))
        bad_id = await harness.append_raw(topic, {"nothing": b""})
        async with bus.subscribe(SubscriptionConfig(topic, "g", group_start_id="0"), nothing) as subscription:
            await until(lambda: len(observer.of("on_settled")) >= 2)
            await until(lambda: subscription.statistics().held == 0)
    settled = sorted((event.message_id or "", event.detail) for event in observer.of("on_settled"))
    assert settled == sorted([(good_id, "released"), (bad_id, "dead-lettered")])
    assert len(await harness.entries(f"{topic}.dead")) == 1


async def test_an_entry_taken_again_before_the_reply_to_its_release_is_released_again(
    harness: Harness, topic: str
) -> None:
    backend = StepByStep(harness.make_backend())
    release = backend.release
    retaken = anyio.Event()

    async def slow_reply(stream: str, group: str, consumer: str, message_ids: Any) -> None:
        await release(stream, group, consumer, message_ids)
        if stream == topic and not retaken.is_set():
            # Our own reclaim pass is faster than this reply.
            with anyio.move_on_after(SOON):
                await until(lambda: subscription.statistics().reclaimed >= 1)
            retaken.set()

    backend.release = slow_reply  # type: ignore[method-assign]
    started: list[str] = []

    async def handler(delivery: Delivery) -> None:
        started.append(delivery.id)
        if len(started) == 1:
            with anyio.move_on_after(SOON):
                await delivery.release()

    async with StreamBus(backend, quick(claim_idle_timeout=60)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            # With a lease of a minute, an entry that nobody held would not be seen again in this test.
            await until(lambda: len(started) == 2)
            await nothing_pending(harness, topic, "g")


async def test_an_end_after_the_group_was_lost_does_not_wait_for_what_is_not_there(
    harness: Harness, topic: str
) -> None:
    entered = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        entered.set()
        await anyio.sleep_forever()

    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder, cleanup_timeout=600, block_timeout=600)) as bus:
        with anyio.fail_after(SOON):
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                await bus.publish(Message(topic))
                await entered.wait()
                subscription.pause()
                await anyio.wait_all_tasks_blocked()
                await harness.delete_group(topic, "g")
                subscription.abort()
                await subscription.wait_closed()
    assert not recorder.of("on_error", "close")


async def test_everything_may_be_cancelled_at_once_by_asyncio(
    harness: Harness, topic: str, anyio_backend_name: str
) -> None:
    """As ``asyncio.run`` does at its end: every task is hit once, those of a subscription too."""
    entered = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        entered.set()
        await anyio.sleep_forever()

    with anyio.fail_after(SOON):
        async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=60)) as bus:
            entry_id = await bus.publish(Message(topic))
            with anyio.CancelScope() as scope:
                at_once = ExponentialBackoff(initial=0, maximum=0)
                config = SubscriptionConfig(topic, "g", group_start_id="0", retry_backoff=at_once)
                async with bus.subscribe(config, handler):
                    await entered.wait()
                    if anyio_backend_name == "trio":
                        scope.cancel()  # trio has no other way
                        await anyio.sleep_forever()
                    me = asyncio.current_task()
                    hit = [task for task in asyncio.all_tasks() if task is not me and "_runtime" in repr(task)]
                    assert hit
                    for task in hit:
                        task.cancel()
                    await anyio.wait_all_tasks_blocked()
            pending = await harness.pending(topic, "g")
            retries = await harness.entries(retry_stream(topic, "g"))
    # The handler's stray cancellation is a failure, or its end a release: in no case is the message lost.
    assert [entry.id for entry in pending] in ([entry_id], [])
    assert pending or retries


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
@pytest.mark.parametrize("hit", ["while it waits for more", "before it waits", "as it ends"])
async def test_a_stray_cancellation_of_an_idle_worker_ends_nothing_else(hit: str, harness: Harness, topic: str) -> None:
    """A timer that a handler has left behind, say, which cancels the task that the handler ran in."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    handled: list[str] = []
    workers: list[Any] = []

    async def handler(delivery: Delivery) -> None:
        workers.append(asyncio.current_task())
        handled.append(delivery.message.key)
        if delivery.message.key == "first" and hit != "while it waits for more":
            if hit == "as it ends":
                variable.set(1)  # such a worker does not wait for more
            workers[0].cancel()

    with anyio.fail_after(SOON):
        async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=60)) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                await bus.publish(Message(topic, key="first"))
                await until(lambda: subscription.statistics().handled == 1)
                await anyio.wait_all_tasks_blocked()
                workers[0].cancel()
                await anyio.wait_all_tasks_blocked()
                await bus.publish(Message(topic, key="second"))
                await until(lambda: subscription.statistics().handled == 2)
                await anyio.wait_all_tasks_blocked()
                await bus.publish(Message(topic, key="third"))
                await until(lambda: subscription.statistics().handled == 3)
    assert handled == ["first", "second", "third"]


async def test_a_handlers_context_variables_are_not_seen_by_the_next_message(harness: Harness, topic: str) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="clean")
    seen: list[str] = []

    async def handler(delivery: Delivery) -> None:
        seen.append(variable.get())
        variable.set(delivery.id)

    variable.set("from the subscriber")
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_in_flight=1), handler):
            await bus.publish_batch([Message(topic) for _ in range(5)])
            await until(lambda: len(seen) == 5)
    assert seen == ["from the subscriber"] * 5


async def test_a_cancelled_handler_whose_cleanup_fails_ends_nothing_and_its_message_is_released(
    harness: Harness, topic: str
) -> None:
    entered = anyio.Event()

    async def child() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("in the cleanup")

    async def handler(delivery: Delivery) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
            entered.set()

    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder, claim_idle_timeout=60)) as bus:
        with anyio.fail_after(SOON):
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                await bus.publish(Message(topic))
                await entered.wait()
                await anyio.wait_all_tasks_blocked()
                subscription.abort()
        pending = await harness.pending(topic, "g")
    assert [(entry.consumer, entry.deliveries) for entry in pending] == [("anybus:returned", 0)]
    assert recorder.of("on_error", "handler")


async def test_the_backlog_of_retries_and_of_dead_peers_uses_all_handlers(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    running = peak = 0
    gate = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        if peak == 16:
            gate.set()
        await gate.wait()
        running -= 1

    # On an idle topic a read blocks all the while; what it reserves must not keep reclaim's hands tied.
    async with StreamBus(backend, quick(claim_idle_timeout=60, block_timeout=600)) as bus:
        await backend.create_group(topic, "g", "0")
        await bus.publish_batch([Message(topic) for _ in range(64)])
        await backend.read_new(topic, "g", "dead", count=64, timeout=0)
        await backend.release(topic, "g", "dead", [entry.id for entry in await harness.pending(topic, "g")])
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_in_flight=16, max_pending_acks=17), handler):
            with anyio.fail_after(SOON):
                await gate.wait()
            await nothing_pending(harness, topic, "g")


async def test_an_observer_without_on_error_does_not_silence_errors(
    harness: Harness, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Metrics(Observer):
        """Counts what is settled, and is not interested in errors."""

        def on_settled(self, event: BusEvent) -> None:
            settled.append(event.detail)

    async def handler(delivery: Delivery) -> None:
        if delivery.state.attempt == 1:
            raise RuntimeError("seen by somebody, I hope")

    settled: list[str | None] = []
    options = StreamBusOptions(observer=Metrics(), reclaim_interval=0.02)
    async with StreamBus(harness.make_backend(), options) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", retry_backoff=QUICK), handler):
            await bus.publish(Message(topic))
            await until(lambda: settled == ["retried", "acked"])
    assert "seen by somebody, I hope" in caplog.text


class SlowAcks(StepByStep):
    """Acknowledgements wait for a gate."""

    def __init__(self, inner: StreamBackend) -> None:
        super().__init__(inner)
        self.gate = anyio.Event()
        self.waiting = 0

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        if len(message_ids) > 1:
            self.waiting += 1
            await self.gate.wait()
        return await super().ack_many(stream, group, message_ids, consumer=consumer)


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_stray_cancellation_of_a_flush_in_several_parts_loses_none_of_them(
    harness: Harness, topic: str
) -> None:
    count = 300  # more than fit in one part
    handled: list[str] = []
    go_on = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        await go_on.wait()
        handled.append(delivery.message.key)

    with anyio.fail_after(SOON):
        backend = SlowAcks(harness.make_backend())
        async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=60, ack_batch_size=count)) as bus:
            config = SubscriptionConfig(topic, "g", max_in_flight=count)
            async with bus.subscribe(config, handler) as subscription:
                await bus.publish_batch([Message(topic, key=str(number)) for number in range(count)])
                await until(lambda: subscription.statistics().in_flight == count)
                go_on.set()
                await until(lambda: backend.waiting > 1)
                (lane,) = (
                    task for task in asyncio.all_tasks() if "_in_background" in repr(task) and waits_for_children(task)
                )
                lane.cancel()
                await anyio.wait_all_tasks_blocked()
                backend.gate.set()
                await until(lambda: subscription.statistics().held == 0)
            await nothing_pending(harness, topic, "g")
    assert sorted(handled, key=int) == [str(number) for number in range(count)]


def waits_for_children(task: asyncio.Task[Any]) -> bool:
    """Whether a task is at the end of a task group of its own."""
    return any(other.parent_id == id(task) for other in anyio.get_running_tasks())
