"""Recurring publishing: ``bus.schedule`` (docs/recurring.md).

The specification, on memory and on a real server, on every event loop:

- A message is published at each tick, once, however many processes run the schedule. It has a new uid, the tick as
  ``occurred_at``, and the headers ``schedule-name`` and ``schedule-tick``. A function makes each message anew.
- The server's clock decides. A process whose clock is fast publishes nothing early.
- A tick that no process could publish within ten seconds is missed: skipped, or one for all that were missed.
- Another definition takes over. The old one's processes are told, and their handles end. The same one changes nothing.
- A process that no longer owns the schedule, or that comes late, publishes nothing.
- A function that fails is called again. An error of the backend that can pass is retried and reported; any other ends
  the schedule, and comes out bare.
- Leaving the block ends the part of this process, and another one goes on at once.
- Bad input is refused with an error that names the value, and nothing is stored.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import anyio
import pytest
from harness import SOON, Harness, MemoryHarness, Recorder, StepByStep, quick, until
from servers import RedisHarness, RunningServer

from anybus import (
    BackendError,
    ClosedError,
    Delivery,
    MemoryBackend,
    Message,
    StreamBus,
    SubscriptionConfig,
    UnsupportedError,
    ValidationError,
)
from anybus._scheduling import ticking
from anybus._scheduling.ticking import GRACE, LEASE
from anybus.abc import StreamBackend, TickClaim, TickResult, TickStore
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import schedule as key_of

EVERY = 0.1

ASYNCIO_LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]


@pytest.fixture
async def bus(harness: Harness) -> AsyncIterator[StreamBus]:
    with anyio.fail_after(SOON):
        async with StreamBus(harness.make_backend(), quick()) as bus:
            yield bus


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes look at the schedule three times in that time."""
    monkeypatch.setattr(ticking, "LEASE", 0.9)


async def published(harness: Harness, topic: str) -> list[Message]:
    return [message for _, message, _ in await harness.entries(topic) if message is not None]


async def ticks_of(harness: Harness, topic: str) -> list[datetime]:
    return [datetime.fromisoformat(text.replace("Z", "+00:00")) for text in await texts(harness, topic)]


async def texts(harness: Harness, topic: str) -> list[str]:
    return [message.headers["schedule-tick"] for message in await published(harness, topic)]


def some(harness: Harness, topic: str, count: int) -> Callable[[], Any]:
    async def enough() -> bool:
        return len(await published(harness, topic)) >= count

    return enough


async def is_stored(harness: Harness, topic: str, name: str) -> bool:
    if isinstance(harness, MemoryHarness):
        return name in harness.make_backend()._stream(topic).schedules
    assert isinstance(harness, RedisHarness)
    return bool(await anyio.to_thread.run_sync(harness._client.exists, key_of(topic, name)))


def store_of(bus: StreamBus) -> TickStore:
    assert isinstance(bus.backend, TickStore)
    return bus.backend


async def claim(
    bus: StreamBus,
    topic: str,
    owner: str,
    *,
    definition: str = "d",
    generation: int | None = None,
    lease: float = LEASE,
) -> TickClaim:
    return await store_of(bus).claim_schedule(
        topic, "s", owner, definition=definition, generation=generation, lease=lease, grace=GRACE
    )


async def publish(
    bus: StreamBus, topic: str, owner: str, tick: datetime, *, generation: int = 1, grace: float | None = GRACE
) -> TickResult:
    message = Message(topic, tick.isoformat().encode())
    return await store_of(bus).publish_tick(
        topic, "s", owner, message, generation=generation, tick=tick, lease=LEASE, grace=grace
    )


# --- what is published


async def test_each_tick_is_published_once_with_a_new_uid_and_its_time(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    given = Message(topic, b"tick", key="k", headers={"a": "b"})
    async with bus.schedule("clock", given, every=EVERY) as schedule:
        assert (schedule.name, schedule.topic, schedule.is_running) == ("clock", topic, True)
        assert schedule.next_tick is not None
        await until(some(harness, topic, 4))
    messages = await published(harness, topic)
    assert len({message.uid for message in messages} | {given.uid}) == len(messages) + 1
    assert {(message.payload, message.key, message.headers["a"]) for message in messages} == {(b"tick", "k", "b")}
    assert {message.headers["schedule-name"] for message in messages} == {"clock"}
    ticks = await ticks_of(harness, topic)
    assert [message.occurred_at for message in messages] == ticks
    assert ticks == [ticks[0] + number * timedelta(seconds=EVERY) for number in range(len(ticks))]
    assert ticks[0].timestamp() / EVERY == pytest.approx(round(ticks[0].timestamp() / EVERY))


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_a_function_makes_the_message_of_each_tick_or_none(
    kind: str, bus: StreamBus, harness: Harness, topic: str
) -> None:
    called: list[datetime] = []

    def plain(tick: datetime) -> Message | None:
        called.append(tick)
        return Message(topic, str(len(called)).encode()) if len(called) % 2 else None

    async def slow(tick: datetime) -> Message | None:
        await anyio.sleep(0.001)
        return plain(tick)

    async with bus.schedule("clock", plain if kind == "plain" else slow, every=EVERY, topic=topic):
        await until(some(harness, topic, 3))
    assert [message.payload for message in await published(harness, topic)][:3] == [b"1", b"3", b"5"]
    assert (await ticks_of(harness, topic))[:3] == called[:5:2]
    assert {tick.utcoffset() for tick in called} == {timedelta()}


async def test_a_cron_expression_in_a_time_zone_tells_its_next_tick(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    given = Message(topic)
    async with bus.schedule("yearly", given, cron="0 0 29 2 *", timezone="Australia/Lord_Howe") as schedule:
        assert schedule.next_tick is not None
        local = schedule.next_tick.astimezone(ZoneInfo("Australia/Lord_Howe"))
        assert (local.month, local.day, local.hour, local.minute) == (2, 29, 0, 0)
    assert await published(harness, topic) == []


async def test_many_buses_publish_each_tick_once(harness: Harness, topic: str) -> None:
    called: list[str] = []

    def maker(number: int) -> Callable[[datetime], Message]:
        def make(tick: datetime) -> Message:
            called.append(f"{number} {tick.isoformat()}")
            return Message(topic, str(number).encode())

        return make

    with anyio.fail_after(SOON):
        async with AsyncExitStack() as stack:
            for number in range(4):
                bus = await stack.enter_async_context(StreamBus(harness.make_backend(), quick()))
                await stack.enter_async_context(bus.schedule("clock", maker(number), every=EVERY, topic=topic))
            await until(some(harness, topic, 5))
    ticks = await ticks_of(harness, topic)
    assert ticks == [ticks[0] + number * timedelta(seconds=EVERY) for number in range(len(ticks))]
    assert len(called) == len(set(called)), "only the owner makes messages"


async def test_schedules_of_different_names_or_topics_know_nothing_of_each_other(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    other = f"{topic}.other"
    async with (
        bus.schedule("a", Message(topic, b"a"), every=EVERY),
        bus.schedule("b", Message(topic, b"b"), every=0.15),
        bus.schedule("a", Message(other), every=EVERY),
    ):
        await until(some(harness, other, 2))
        await until(some(harness, topic, 5))
    assert {message.payload for message in await published(harness, topic)} == {b"a", b"b"}


async def test_ticks_are_received_as_any_other_message(bus: StreamBus, topic: str) -> None:
    got = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        assert delivery.message.headers["schedule-name"] == "clock"
        got.set()

    async with (
        bus.subscribe(SubscriptionConfig(topic, "g"), handler),
        bus.schedule("clock", Message(topic), every=EVERY),
    ):
        await got.wait()


# --- the lease and the fence, asked directly


async def test_a_tick_is_let_through_once_not_early_not_late_and_only_for_the_owner(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    first = await claim(bus, topic, "one")
    assert (first.is_owner, first.generation) == (True, 1)
    second = await claim(bus, topic, "two")
    assert (second.is_owner, second.lease_end) == (False, first.lease_end)
    future, now = first.now + timedelta(hours=1), first.now
    assert (await publish(bus, topic, "one", future)).status == "early"
    assert (await publish(bus, topic, "one", now)).status == "known", "what came before the schedule began"
    await anyio.sleep(0.02)
    tick = now + timedelta(milliseconds=10)
    assert (await publish(bus, topic, "two", tick)).status == "not-owner"
    assert (await publish(bus, topic, "one", tick, generation=2)).status == "not-owner"
    assert (await publish(bus, topic, "one", tick)).status == "published"
    assert (await publish(bus, topic, "one", tick)).status == "known"
    assert (await publish(bus, topic, "one", tick - timedelta(milliseconds=5))).status == "known"
    assert len(await published(harness, topic)) == 1


async def test_a_process_that_slept_through_its_lease_publishes_nothing_that_another_one_has(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    first = await claim(bus, topic, "frozen", lease=0.01)
    await anyio.sleep(0.03)
    tick = first.now + timedelta(milliseconds=5)
    assert (await claim(bus, topic, "awake", generation=1)).is_owner
    assert (await publish(bus, topic, "awake", tick)).status == "published"
    assert (await publish(bus, topic, "frozen", tick)).status == "not-owner"
    assert not (await claim(bus, topic, "frozen", generation=1)).is_owner
    await store_of(bus).leave_schedule(topic, "s", "frozen")
    assert not (await claim(bus, topic, "frozen", generation=1)).is_owner, "it cannot give up what is another's"
    await store_of(bus).leave_schedule(topic, "s", "awake")
    after = await claim(bus, topic, "frozen", generation=1)
    assert after.is_owner
    assert after.last_tick == tick
    assert (await publish(bus, topic, "frozen", tick)).status == "known"
    assert len(await published(harness, topic)) == 1


async def test_a_tick_that_is_too_late_is_recorded_and_not_published(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    first = await claim(bus, topic, "one")
    tick = first.now + timedelta(milliseconds=1)
    await anyio.sleep(0.05)
    assert (await publish(bus, topic, "one", tick, grace=0.01)).status == "missed"
    assert (await claim(bus, topic, "one")).last_tick == tick
    assert (await publish(bus, topic, "one", tick + timedelta(milliseconds=1), grace=None)).status == "published"
    assert len(await published(harness, topic)) == 1


async def test_the_newest_generation_wins_also_if_the_server_has_lost_it(bus: StreamBus, topic: str) -> None:
    assert (await claim(bus, topic, "old", definition="old")).generation == 1
    new = await claim(bus, topic, "new", definition="new")
    assert (new.generation, new.is_owner) == (2, True)
    old = await claim(bus, topic, "old", definition="old", generation=1)
    assert (old.generation, old.is_owner) == (2, False)
    # A replica that lacks the last writes: only generation 1 is kept.
    lost = f"{topic}.lost"
    assert (await claim(bus, lost, "old", definition="old")).generation == 1
    again = await claim(bus, lost, "new", definition="new", generation=2)
    assert (again.generation, again.is_owner) == (2, True)
    assert not (await claim(bus, lost, "old", definition="old", generation=1)).is_owner
    nothing = f"{topic}.nothing"
    assert (await claim(bus, nothing, "new", definition="new", generation=7)).generation == 7


async def test_a_tick_that_the_server_refuses_is_not_recorded(server: RunningServer, topic: str) -> None:
    async with StreamBus(RedisBackend(server.url), quick()) as bus:
        first = await claim(bus, topic, "one")
        with server.client() as client:
            await anyio.to_thread.run_sync(client.set, topic, "no stream")
        await anyio.sleep(0.005)
        with pytest.raises(BackendError) as caught:
            await publish(bus, topic, "one", first.now + timedelta(milliseconds=1))
        assert (caught.value.can_pass, caught.value.may_have_happened) == (False, False)
        assert (await claim(bus, topic, "one")).last_tick == first.last_tick


async def test_a_message_that_is_refused_is_reported_and_the_schedule_goes_on(topic: str) -> None:
    recorder = Recorder()
    async with StreamBus(MemoryBackend(), quick(recorder, max_payload_bytes=5)) as bus:
        async with bus.schedule("clock", Message(topic, b"too large"), every=EVERY) as schedule:
            await until(lambda: len(recorder.of("on_error", "publish")) >= 2)
            assert schedule.is_running
    assert "payload must be at most 5 bytes" in str(recorder.of("on_error", "publish")[0].error)


# --- a definition that changes


async def test_another_definition_takes_over_and_the_old_processes_are_told(
    short_lease: None, harness: Harness, topic: str
) -> None:
    recorder = Recorder()
    with anyio.fail_after(SOON):
        async with (
            StreamBus(harness.make_backend(), quick(recorder)) as old_bus,
            StreamBus(harness.make_backend(), quick()) as new_bus,
            old_bus.schedule("clock", Message(topic, b"old"), every=EVERY) as old,
        ):
            await until(some(harness, topic, 1))
            async with new_bus.schedule("clock", Message(topic, b"new"), every=0.15) as new:
                await old.wait_closed()
                assert (old.is_superseded, old.is_running) == (True, False)
                assert (new.is_superseded, new.is_running) == (False, True)
                at = len(await published(harness, topic))
                await until(some(harness, topic, at + 2))
    payloads = [message.payload for message in await published(harness, topic)]
    assert payloads == sorted(payloads, reverse=True), "nothing old after the first new one"
    (told,) = recorder.of("on_error", "publish")
    assert isinstance(told.error, ClosedError)
    assert "another definition (generation 2)" in str(told.error)
    assert told.topic == topic


async def test_the_same_definition_and_another_message_take_over_nothing_but_a_version_does(
    short_lease: None, bus: StreamBus, harness: Harness, topic: str
) -> None:
    async with bus.schedule("clock", Message(topic, b"1"), every=EVERY) as first:
        async with bus.schedule("clock", Message(topic, b"2"), every=EVERY) as second:
            await until(some(harness, topic, 3))
            assert first.is_running
            assert second.is_running
            async with bus.schedule("clock", Message(topic, b"3"), every=EVERY, version="2"):
                await first.wait_closed()
                await second.wait_closed()
    assert {message.payload for message in await published(harness, topic)} <= {b"1", b"3"}


# --- the end


async def test_another_process_goes_on_when_one_leaves(short_lease: None, harness: Harness, topic: str) -> None:
    async def seen() -> bool:
        return (await published(harness, topic))[-1].payload == b"2"

    with anyio.fail_after(SOON):
        async with (
            StreamBus(harness.make_backend(), quick()) as one,
            StreamBus(harness.make_backend(), quick()) as two,
            one.schedule("clock", Message(topic, b"1"), every=EVERY) as first,
            two.schedule("clock", Message(topic, b"2"), every=EVERY),
        ):
            await until(some(harness, topic, 2))
            first.close()
            first.close()
            await first.wait_closed()
            assert not first.is_running
            await until(seen)
    messages = await published(harness, topic)
    assert [message.payload for message in messages] == sorted(message.payload for message in messages)
    ticks = await ticks_of(harness, topic)
    assert ticks == [ticks[0] + number * timedelta(seconds=EVERY) for number in range(len(ticks))]


async def test_leaving_the_bus_ends_its_schedules(harness: Harness, topic: str) -> None:
    bus = StreamBus(harness.make_backend(), quick())
    entered, ended = anyio.Event(), anyio.Event()

    async def take_part() -> None:
        async with bus.schedule("clock", Message(topic), every=EVERY) as schedule:
            entered.set()
            await schedule.wait_closed()
        ended.set()

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with bus:
                tasks.start_soon(take_part)
                await entered.wait()
            await ended.wait()
    with pytest.raises(ClosedError):
        bus.schedule("clock", Message(topic), every=EVERY)


async def test_what_the_body_raises_comes_out_as_itself(bus: StreamBus, topic: str) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with bus.schedule("clock", Message(topic), every=EVERY):
            raise KeyError("mine")
    with anyio.move_on_after(0.05) as scope:
        async with bus.schedule("clock", Message(topic), every=EVERY):
            await anyio.sleep_forever()
    assert scope.cancelled_caught


# --- what fails


async def test_a_function_that_fails_is_called_again_for_the_same_tick(harness: Harness, topic: str) -> None:
    recorder, called = Recorder(), list[datetime]()

    def make(tick: datetime) -> Message:
        called.append(tick)
        if len(called) == 1:
            raise LookupError("not yet")
        if len(called) == 2:
            return Message(f"{topic}.wrong")
        if len(called) == 3:
            return "nothing"  # type: ignore[return-value]
        return Message(topic)

    with anyio.fail_after(SOON):
        async with (
            StreamBus(harness.make_backend(), quick(recorder)) as bus,
            bus.schedule("clock", make, every=0.5, topic=topic),
        ):
            await until(some(harness, topic, 1))
    assert called[0] == called[1] == called[2] == called[3] == (await ticks_of(harness, topic))[0]
    errors = recorder.of("on_error", "publish")
    assert [type(event.error) for event in errors] == [LookupError, ValidationError, ValidationError]
    assert all("'clock'" in str(event.detail) for event in errors)


class Failing(MemoryBackend):
    """Fails to claim and to publish ticks, so many times. The reply of a publish may get lost instead."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__()
        self.failures = list(failures)
        self.loses_replies = False

    async def claim_schedule(self, *args: Any, **more: Any) -> TickClaim:
        if self.failures and not self.loses_replies:
            raise self.failures.pop(0)
        return await super().claim_schedule(*args, **more)

    async def publish_tick(self, *args: Any, **more: Any) -> TickResult:
        result = await super().publish_tick(*args, **more)
        if self.failures and self.loses_replies:
            raise self.failures.pop(0)
        return result


async def test_errors_that_can_pass_are_reported_and_it_goes_on(topic: str) -> None:
    recorder = Recorder()
    backend = Failing(BackendError("down"), OSError("down, too"))
    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(recorder)) as bus:
            async with bus.schedule("clock", Message(topic), every=EVERY):
                backend.loses_replies = True
                backend.failures += [BackendError("lost"), BackendError("lost")]
                await until(lambda: not backend.failures)
                await until(lambda: len(backend.entries(topic)) >= 5)
    assert [str(event.error) for event in recorder.of("on_error", "publish")] == ["down", "down, too", "lost", "lost"]
    ticks = [message.headers["schedule-tick"] for _, message, _ in backend.entries(topic) if message is not None]
    assert len(set(ticks)) == len(ticks), "a tick whose reply was lost is not published again"


async def test_an_error_that_cannot_pass_ends_the_schedule_and_comes_out_bare(topic: str) -> None:
    backend = Failing(BackendError("no right", can_pass=False))
    async with StreamBus(backend, quick(Recorder())) as bus:
        with pytest.raises(BackendError, match="no right"):
            async with bus.schedule("clock", Message(topic), every=EVERY):
                raise AssertionError("not entered")
        backend.loses_replies = True
        backend.failures += [BackendError("no right", can_pass=False)]
        with anyio.fail_after(SOON), pytest.raises(BackendError, match="no right"):
            async with bus.schedule("clock", Message(topic), every=EVERY):
                await anyio.sleep_forever()


@pytest.mark.thorough
@pytest.mark.parametrize("keeps", ["everything", "nothing"])
async def test_a_server_that_is_killed_and_comes_back_goes_on_with_the_schedule(keeps: str, topic: str) -> None:
    options = ("--appendonly", "yes", "--appendfsync", "always") if keeps == "everything" else ()
    recorder = Recorder()
    with RunningServer("valkey", *options) as own:
        harness = RedisHarness(own)
        with anyio.fail_after(SOON):
            async with StreamBus(RedisBackend(own.url), quick(recorder)) as bus:
                async with bus.schedule("clock", Message(topic), every=EVERY) as schedule:
                    await until(some(harness, topic, 3))
                    await anyio.to_thread.run_sync(own.kill)
                    await until(lambda: bool(recorder.of("on_error", "publish")))
                    await anyio.to_thread.run_sync(own.start)
                    await until(some(harness, topic, 8))
                    assert schedule.is_running
        ticks = await ticks_of(harness, topic)
        assert len(set(ticks)) == len(ticks)
        if keeps == "everything":
            assert ticks == [ticks[0] + number * timedelta(seconds=EVERY) for number in range(len(ticks))]


async def test_a_crash_in_a_function_ends_the_schedule_and_comes_out_bare(bus: StreamBus, topic: str) -> None:
    def make(tick: datetime) -> Message:
        raise SystemExit("crash")

    with pytest.raises(SystemExit, match="crash"):
        async with bus.schedule("clock", make, every=EVERY, topic=topic):
            await anyio.sleep_forever()


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_schedule_outlives_every_stray_cancellation(bus: StreamBus, harness: Harness, topic: str) -> None:
    async with bus.schedule("clock", Message(topic), every=EVERY) as schedule:
        await until(some(harness, topic, 1))
        for _ in range(3):
            [task] = [task for task in asyncio.all_tasks() if "Schedule._run" in repr(task)]
            task.cancel()
            await until(some(harness, topic, len(await published(harness, topic)) + 2))
        assert schedule.is_running


async def test_a_stray_cancellation_in_a_function_is_a_failure_as_any_other(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    called: list[datetime] = []

    async def make(tick: datetime) -> Message:
        called.append(tick)
        if len(called) == 1 and "asyncio" in sys.modules and anyio.get_cancelled_exc_class().__module__ != "trio":
            raise anyio.get_cancelled_exc_class()
        return Message(topic)

    async with bus.schedule("clock", make, every=EVERY, topic=topic):
        await until(some(harness, topic, 2))


# --- bad input


def factory(tick: datetime) -> Message:
    return Message("t")


PAST = datetime(2020, 1, 1, tzinfo=timezone.utc)

BAD: list[tuple[dict[str, Any], str]] = [
    ({"every": 0}, "every must be from 0.1 seconds .* not 0"),
    ({"every": -1.0}, "not -1.0"),
    ({"every": 0.05}, "not 0.05"),
    ({"every": 3654 * 86400}, "not 315705600"),
    ({"every": float("nan")}, "not nan"),
    ({"every": True}, "not True"),
    ({"every": "1"}, "not '1'"),
    ({"every": 0.10005}, "whole number of milliseconds, not 0.10005"),
    ({}, r"every and cron must be given one without the other, not \(None, None\)"),
    ({"every": 1, "cron": "* * * * *"}, r"not \(1, '\* \* \* \* \*'\)"),
    ({"every": 1, "timezone": "Europe/Berlin"}, "timezone must be unset with every.* not 'Europe/Berlin'"),
    ({"cron": "0 0 30 2 *"}, "cron must be .* fires .*bad day-of-month.*, not '0 0 30 2 \\*'"),
    ({"cron": "* * */20 * 1L"}, "cron must be .* fires"),
    ({"cron": "60 * * * *"}, r"bad minute.*, not '60 \* \* \* \*'"),
    ({"cron": "* * * * * *"}, "five fields"),
    ({"cron": "@daily"}, "not '@daily'"),
    ({"cron": ""}, "five fields"),
    ({"cron": 5}, "cron must be a str, not 5"),
    ({"cron": "* * * * *", "timezone": "Mars/Phobos"}, "timezone must be the name .* not 'Mars/Phobos'"),
    ({"cron": "* * * * *", "timezone": "../../etc/passwd"}, "timezone must be the name"),
    ({"cron": "* * * * *", "timezone": "Europe"}, "timezone must be the name"),
    ({"cron": "* * * * *", "timezone": ""}, "timezone must be the name"),
    ({"cron": "* * * * *", "timezone": timezone.utc}, "timezone must be a str"),
    ({"every": 1, "name": " "}, "name must be a name that is not blank, not ' '"),
    ({"every": 1, "name": "x" * 257}, "name must be at most 256 bytes"),
    ({"every": 1, "missed": "all"}, "missed must be one of skip, catch-up, not 'all'"),
    ({"every": 1, "version": 2}, "version must be a str, not 2"),
    ({"every": 1, "topic": "other"}, "topic must be unset, or the message's own .* not 'other'"),
    ({"every": 1, "message": factory}, "topic must be given with a function.* not None"),
    ({"every": 1, "message": factory, "topic": "anybus:x"}, "topic must be"),
    ({"every": 1, "message": lambda: None, "topic": "t"}, "message must be an anybus.Message, or a function"),
    ({"every": 1, "message": Message("t", idempotency_key="k")}, "message.idempotency_key must be unset, .* not 'k'"),
    ({"every": 1, "message": Message("t", headers={"idempotency-key": "k"})}, "message.idempotency_key must be unset"),
    ({"every": 1, "message": Message("t", expires_at=PAST)}, "message.expires_at must be unset, .* not .*2020"),
    ({"every": 1, "message": b"bytes"}, "message must be an anybus.Message, or a function"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), BAD, ids=[str(number) for number in range(len(BAD))])
async def test_bad_input_is_refused_and_nothing_is_stored(
    changes: dict[str, Any], text: str, harness: Harness, topic: str
) -> None:
    values: dict[str, Any] = {"name": "clock", "message": Message(topic), **changes}
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with pytest.raises(ValidationError, match=text):
            async with bus.schedule(**values):
                raise AssertionError("entered")
    assert not await is_stored(harness, topic, "clock")


async def test_without_cronsim_only_cron_is_refused(
    bus: StreamBus, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cronsim", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'anybus\[cron\]'"):
        async with bus.schedule("clock", Message(topic), cron="* * * * *"):
            raise AssertionError("entered")
    async with bus.schedule("clock", Message(topic), every=EVERY):
        pass


async def test_a_backend_that_cannot_says_so(topic: str) -> None:
    backend: StreamBackend = StepByStep(MemoryBackend())
    async with StreamBus(backend, quick()) as bus:
        with pytest.raises(UnsupportedError, match="StepByStep cannot keep schedules"):
            async with bus.schedule("clock", Message(topic), every=1):
                raise AssertionError("entered")


def test_the_takeover_is_shorter_than_the_grace() -> None:
    assert ticking.LEASE * 4 / 3 < ticking.GRACE
