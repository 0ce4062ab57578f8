"""Promise 8: errors of the backend that can pass do not end a subscription, nor keep it from beginning.

They are reported, and retried with backoff. A group that vanished is made again at its floor, else at ``0``:
duplicates, never a gap; reported with the position. What cannot pass fails loudly at once. An exception in one handler
touches no other message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from harness import QUICK, SOON, Harness, Recorder, nothing_pending, quick, until

from anybus import BackendError, Delivery, MemoryBackend, Message, StreamBus, SubscriptionConfig, UnsupportedError
from anybus._failure.copies import retry_stream
from anybus.abc import PassSource, StreamBackend


def fail(backend: StreamBackend, method: str, error: Exception, times: int) -> Callable[[], int]:
    """Let a method of the backend fail so many times. Returns a function that tells how often it has."""
    if method == "reclaim_idle" and isinstance(backend, PassSource):
        method = "redeliver"
    real: Any = getattr(backend, method)
    failures = 0

    async def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal failures
        if failures < times:
            failures += 1
            raise error
        return await real(*args, **kwargs)

    setattr(backend, method, failing)
    return lambda: failures


class DriverError(Exception):
    """What the client library of some backend raises."""


PASSING = [
    BackendError("LOADING", can_pass=True),
    BackendError("it says no more"),
    ConnectionResetError("reset"),
    TimeoutError("slow"),
    anyio.BrokenResourceError(),
    DriverError("database is locked"),
    RuntimeError("connection pool exhausted"),
]

BUGS = [
    TypeError("read_new() takes 1 positional argument"),
    AttributeError("no such attribute"),
    KeyError("id"),
    ZeroDivisionError("division by zero"),
    NotImplementedError("later"),
    UnsupportedError("not with this backend"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("method", "scope"), [("read_new", "read"), ("reclaim_idle", "reclaim"), ("create_group", "read")]
)
async def test_an_error_that_can_pass_is_reported_and_the_work_goes_on(
    harness: Harness, topic: str, method: str, scope: str, error: Exception
) -> None:
    backend = harness.make_backend()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    recorder = Recorder()
    async with StreamBus(backend, quick(recorder)) as bus:
        failures = fail(backend, method, error, 2)
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await until(lambda: failures() == 2)
            await bus.publish(Message(topic))
            await until(lambda: len(handled) == 1)
            assert subscription.is_running
    events = recorder.of("on_error", scope)
    assert len(events) + len(recorder.of("on_error", "reclaim" if scope == "read" else "read")) >= 2
    assert all(event.error is error for event in events)


@pytest.mark.parametrize("method", ["read_new", "reclaim_idle", "create_group"])
async def test_what_cannot_pass_fails_loudly_at_once(harness: Harness, topic: str, method: str) -> None:
    backend = harness.make_backend()
    error = BackendError("WRONGTYPE Operation against a key holding the wrong kind of value", can_pass=False)

    async def handler(delivery: Delivery) -> None: ...

    async with StreamBus(backend, quick(Recorder())) as bus:
        failures = fail(backend, method, error, 1)
        with pytest.raises(BackendError, match="WRONGTYPE") as caught:  # noqa: PT012
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                # The body is cancelled: it need not look after its subscription.
                with anyio.fail_after(SOON):
                    await subscription.wait_closed()
                    await until(lambda: False)
        assert caught.value is error
    assert failures() == 1


@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
async def test_a_mistake_in_the_backends_code_fails_loudly_at_once(topic: str, error: Exception) -> None:
    backend = MemoryBackend()

    async def handler(delivery: Delivery) -> None: ...

    async with StreamBus(backend, quick(Recorder())) as bus:
        failures = fail(backend, "read_new", error, 1)
        with anyio.fail_after(SOON), pytest.raises(type(error)) as caught:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
                await anyio.sleep_forever()
        assert caught.value is error
    assert failures() == 1


async def test_a_group_that_vanished_is_made_again_at_its_floor_and_nothing_is_lost(
    harness: Harness, topic: str
) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            last_id = (await bus.publish_batch([Message(topic, key=f"before-{n}") for n in range(10)])).results[-1]
            await until(lambda: len(handled) == 10)
            await nothing_pending(harness, topic, "g")
            await harness.delete_group(topic, "g")
            await bus.publish_batch([Message(topic, key=f"after-{number}") for number in range(10)])
            await until(lambda: len({key for key in handled if key.startswith("after")}) == 10)
            await nothing_pending(harness, topic, "g")
    # Everything below the floor had been settled by every member, so here there are not even duplicates.
    assert len(handled) == 20
    [event] = recorder.of("on_group_made_again")
    assert event.topic == topic
    assert event.detail == f"recreated at {last_id}"


async def test_the_floor_of_a_lost_group_is_below_what_any_member_had_pending(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=60)) as bus:
        await backend.create_group(topic, "g", "0")
        await bus.publish(Message(topic, key="of-another-member"))
        await backend.read_new(topic, "g", "another", count=1, timeout=0)
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            await bus.publish(Message(topic, key="mine"))
            await until(lambda: handled == ["mine"])
            await until(lambda: _pending(harness, topic, 1))
            await harness.delete_group(topic, "g")
            await until(lambda: "of-another-member" in handled)
            await nothing_pending(harness, topic, "g")
    # "mine" was read again too, since the floor was below it; having been handled here, it was only acked.
    assert handled == ["mine", "of-another-member"]


async def _pending(harness: Harness, topic: str, count: int) -> bool:
    return len(await harness.pending(topic, "g")) == count


async def test_when_everything_has_vanished_the_group_is_made_again_at_the_start(harness: Harness, topic: str) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            await bus.publish(Message(topic, key="before"))
            await until(lambda: handled == ["before"])
            await nothing_pending(harness, topic, "g")
            await harness.delete_stream(topic)
            await harness.delete_stream(retry_stream(topic, "g"))
            # Appended to a stream without groups, before anybody has noticed.
            await bus.publish(Message(topic, key="after"))
            await until(lambda: handled == ["before", "after"])
            await nothing_pending(harness, topic, "g")
    assert {(event.topic, event.detail) for event in recorder.of("on_group_made_again")} >= {
        (topic, "recreated at 0"),
    }


async def test_a_retry_stream_that_vanished_is_made_again(harness: Harness, topic: str) -> None:
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        if delivery.state.attempt == 1:
            raise RuntimeError("once")

    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", retry_backoff=QUICK), handler):
            await harness.delete_stream(retry_stream(topic, "g"))
            await until(lambda: bool(recorder.of("on_group_made_again")))
            await bus.publish(Message(topic))
            await until(lambda: attempts == [1, 2])


async def test_an_exception_in_one_handler_touches_no_other_message(harness: Harness, topic: str) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        if delivery.message.key == "bad":
            raise RuntimeError("boom")
        handled.append(delivery.message.key)

    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        config = SubscriptionConfig(topic, "g", max_retry=0)
        async with bus.subscribe(config, handler) as subscription:
            keys = [str(number) if number % 3 else "bad" for number in range(30)]
            await bus.publish_batch([Message(topic, key=key) for key in keys])
            await until(lambda: subscription.statistics().dead_lettered == 10 and len(handled) == 20)
            assert subscription.is_running
    assert handled == [key for key in keys if key != "bad"]
    assert len(recorder.of("on_error", "handler")) == 10


async def test_a_stray_cancelled_error_of_a_handler_is_a_failure_and_ends_nothing(
    harness: Harness, topic: str, anyio_backend_name: str
) -> None:
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        if delivery.state.attempt == 1 and anyio_backend_name == "asyncio":
            raise asyncio.CancelledError
        if delivery.state.attempt == 1:
            raise RuntimeError("trio lets nobody make a Cancelled")

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", retry_backoff=QUICK), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: attempts == [1, 2])
            await until(lambda: subscription.statistics().handled == 1)
            assert subscription.is_running


async def test_a_group_made_at_the_end_of_a_topic_that_holds_entries_says_so(
    harness: Harness, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(delivery: Delivery) -> None: ...

    async with StreamBus(harness.make_backend(), quick()) as bus:
        await bus.publish_batch([Message(topic) for _ in range(7)])
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            pass
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            pass
    said = [record.getMessage() for record in caplog.records if "already holds 7 entries" in record.getMessage()]
    assert len(said) == 1
