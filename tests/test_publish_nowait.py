"""``bus.publish_nowait(message)``: a plain function, which puts the message into a bounded buffer.

- Messages are sent in order. Leaving the bus sends what is left, whatever the reason.
- A full buffer raises ``WouldBlock``. A message that cannot be published is reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from harness import SOON, Harness, Recorder, StepByStep, quick, until
from servers import RedisHarness, RunningServer

from anybus import (
    BackendError,
    ClosedError,
    Delivery,
    EventBusError,
    MemoryBackend,
    Message,
    PublishOptions,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
    UnsupportedError,
    ValidationError,
)
from anybus.abc import PublishItem
from anybus.backends.redis import RedisBackend

ASYNCIO_LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]


class Slow(StepByStep):
    """A backend whose ``publish_many`` waits until it may go on, and then does what it is told."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.called = anyio.Event()
        self.may_go_on = anyio.Event()
        self.error: Exception | None = None

    async def publish_many(self, items: Sequence[PublishItem]) -> list[str | EventBusError]:
        self.called.set()
        await self.may_go_on.wait()
        if self.error is not None:
            raise self.error
        return await super().publish_many(items)


async def keys(harness: Harness, topic: str) -> list[str]:
    return [message.key for _, message, _ in await harness.entries(topic) if message is not None]


async def test_messages_are_sent_soon_and_in_order(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick(publish_buffer_size=1000)) as bus:
        for number in range(700):
            bus.publish_nowait(Message(topic, key=str(number)), PublishOptions(metadata={"a": "b"}))

        async def all_there() -> bool:
            return len(await keys(harness, topic)) == 700

        await until(all_there, "all to be sent")
    entries = await harness.entries(topic)
    assert [message.key for _, message, _ in entries if message is not None] == [str(n) for n in range(700)]
    assert all(message.headers == {"a": "b"} for _, message, _ in entries if message is not None)


@pytest.mark.parametrize("how", ["left", "raised", "cancelled"])
async def test_leaving_the_bus_sends_what_is_left(how: str, harness: Harness, topic: str) -> None:
    class BodyError(Exception):
        pass

    with anyio.CancelScope() as scope:
        try:
            async with StreamBus(harness.make_backend(), quick(publish_buffer_size=1000)) as bus:
                for number in range(300):
                    bus.publish_nowait(Message(topic, key=str(number)))
                if how == "raised":
                    raise BodyError
                if how == "cancelled":
                    scope.cancel()
                    await anyio.sleep_forever()
        except BodyError:
            assert how == "raised"
    assert scope.cancelled_caught == (how == "cancelled")
    assert await keys(harness, topic) == [str(n) for n in range(300)]
    with pytest.raises(ClosedError):
        bus.publish_nowait(Message(topic))


async def test_a_handler_that_still_runs_at_the_end_may_publish(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        began.set()
        await until(lambda: "closing" in repr(bus), "the bus to be closing")
        bus.publish_nowait(delivery.message.replace(topic=f"{topic}.out"))

    began = anyio.Event()
    async with anyio.create_task_group() as tasks:
        async with StreamBus(harness.make_backend(), quick(publish_buffer_size=1000)) as bus:
            await tasks.start(bus.consume, SubscriptionConfig(topic, "g"), handler)
            await bus.publish(Message(topic, key="1"))
            await began.wait()
    assert await keys(harness, f"{topic}.out") == ["1"]


async def test_a_full_buffer_refuses_until_there_is_room(topic: str) -> None:
    backend = Slow(MemoryBackend())
    async with StreamBus(backend, quick(publish_buffer_size=3)) as bus:
        bus.publish_nowait(Message(topic, key="0"))
        await backend.called.wait()
        bus.publish_nowait(Message(topic, key="1"))
        bus.publish_nowait(Message(topic, key="2"))
        with pytest.raises(anyio.WouldBlock):
            bus.publish_nowait(Message(topic, key="3"))
        await bus.publish(Message(topic, key="beside"))
        backend.may_go_on.set()
        await until(lambda: len(backend.inner.entries(topic)) == 4, "all to be sent")
        bus.publish_nowait(Message(topic, key="4"))
    found = [message.key for _, message, _ in backend.inner.entries(topic) if message is not None]
    assert found == ["beside", "0", "1", "2", "4"]


async def test_what_fails_is_reported_and_the_next_ones_are_sent(topic: str) -> None:
    backend, recorder = Slow(MemoryBackend()), Recorder()
    backend.error = BackendError("no room", may_have_happened=False)
    backend.may_go_on.set()
    async with StreamBus(backend, quick(observer=recorder, publish_buffer_size=1000)) as bus:
        bus.publish_nowait(Message(topic))
        await until(lambda: bool(recorder.of("on_error")), "a report")
        backend.error = None
        bus.publish_nowait(Message(topic, key="2"))
    assert [message.key for _, message, _ in backend.inner.entries(topic) if message is not None] == ["2"]
    assert [(event.scope, str(event.error)) for event in recorder.of("on_error")] == [("publish", "no room")]


async def test_what_could_not_be_sent_in_time_is_reported(topic: str) -> None:
    backend, recorder = Slow(MemoryBackend()), Recorder()
    options = quick(observer=recorder, publish_buffer_size=1000, publish_timeout=0.05, cleanup_timeout=0.05)
    async with StreamBus(backend, options) as bus:
        for _ in range(300):
            bus.publish_nowait(Message(topic))
    told = [
        (event.error.may_have_happened, str(event.error))
        for event in recorder.of("on_error")
        if isinstance(event.error, BackendError)
    ]
    assert len(told) == 300
    assert {text for _, text in told} <= {
        "no answer within publish_timeout (0.05 s)",
        "the bus was left before the message was published",
    }


async def test_messages_with_different_options_go_out_together_and_each_gets_what_it_asks_for(
    server: RunningServer, topic: str
) -> None:
    recorder = Recorder()
    async with StreamBus(RedisBackend(server.url), quick(recorder, publish_buffer_size=1000)) as bus:
        bus.publish_nowait(Message(topic, key="0"))
        bus.publish_nowait(Message(topic, key="1"), PublishOptions(idempotency_key="a"))
        bus.publish_nowait(Message(topic, key="unconfirmed"), PublishOptions(confirmation="replicated"))
        bus.publish_nowait(Message(f"{topic}.b", key="unconfirmed"), PublishOptions(confirmation="replicated"))
        bus.publish_nowait(Message(topic, key="2"), PublishOptions(idempotency_key="b"))
        bus.publish_nowait(Message(topic, key="again"), PublishOptions(idempotency_key="a"))
        bus.publish_nowait(Message(topic, key="3"))
    harness = RedisHarness(server)
    assert await keys(harness, topic) == ["0", "1", "2", "3"]
    assert await keys(harness, f"{topic}.b") == []
    errors = [str(event.error) for event in recorder.of("on_error")]
    assert len(errors) == 2
    assert all("0 connected replicas" in error for error in errors)


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_stray_cancellation_ends_neither_the_bus_nor_the_sending(topic: str) -> None:
    backend, recorder = Slow(MemoryBackend()), Recorder()
    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(recorder, publish_buffer_size=1000)) as bus:
            bus.publish_nowait(Message(topic, key="hit"))
            await backend.called.wait()
            bus.publish_nowait(Message(topic, key="next"))
            [task] = [task for task in asyncio.all_tasks() if "outbox" in repr(task).lower()]
            task.cancel()
            await until(lambda: bool(recorder.of("on_error")), "a report")
            backend.may_go_on.set()
            await until(lambda: len(backend.inner.entries(topic)) == 1, "the next one to be sent")
            bus.publish_nowait(Message(topic, key="last"))
            await until(lambda: len(backend.inner.entries(topic)) == 2, "the last one to be sent")
    [event] = recorder.of("on_error")
    assert isinstance(event.error, BackendError)
    assert event.error.may_have_happened


async def test_bad_input_is_refused_at_the_door(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick(max_payload_bytes=10, publish_buffer_size=1)) as bus:
        for wrong in ("text", Message(topic, b"x" * 11)):
            with pytest.raises(ValidationError):
                bus.publish_nowait(wrong)  # type: ignore[arg-type]
        with pytest.raises(ValidationError):
            bus.publish_nowait(Message(topic), {"a": "b"})  # type: ignore[arg-type]
    assert await keys(harness, topic) == []
    with pytest.raises(ClosedError):
        StreamBus(MemoryBackend()).publish_nowait(Message(topic))


async def test_without_a_buffer_it_is_refused(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with pytest.raises(UnsupportedError, match=r"StreamBusOptions\(publish_buffer_size="):
            bus.publish_nowait(Message(topic))
    assert await keys(harness, topic) == []
    with pytest.raises(ValidationError, match="publish_buffer_size must be"):
        StreamBusOptions(publish_buffer_size=-1)
