"""Retention: a topic is trimmed as it was declared, and never more.

The specification, on memory and on a server, on each event loop:

- ``declare_topic`` stores a topic's retention on the server. Another one is refused, unless it is a change.
- ``Interest`` and ``WorkQueue`` remove what every group has acknowledged: all of that, and nothing else.
- ``Limits`` remove what is too old or too much. What a group had not acknowledged is a loss: counted exactly, and told.
- An undeclared topic is never trimmed. If it has grown, this is told once.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from acl import user_with
from anyio import to_thread
from harness import Harness, MemoryHarness, Recorder, StepByStep, quick, uids, until
from refusal import refused
from servers import RedisHarness, RunningServer

import anybus
from anybus import (
    DROP,
    Delivery,
    EventBusError,
    ExponentialBackoff,
    Interest,
    Limits,
    Message,
    Retention,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
    UnsupportedError,
    ValidationError,
    WorkQueue,
)
from anybus._reporting import Notices
from anybus._retention import pace
from anybus._retention.caretaker import Caretaker, Ward
from anybus._runtime.statistics import Counters
from anybus.abc import BusEvent, RetentionKeeper, Trimmed
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import retention as retention_key

VIRTUAL, ANOTHER = ({"clock": trio.testing.MockClock(autojump_threshold=0)} for _ in range(2))
"""For one test each: a clock that jumps."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Topics are looked at all the time."""
    monkeypatch.setattr(pace, "LOOK", 0.02)
    monkeypatch.setattr(pace, "QUIET", 0.02)


async def handle(delivery: Delivery) -> None:
    return


async def publish(bus: StreamBus, topic: str, count: int) -> list[str]:
    """Publish so many messages; their uids."""
    messages = [Message(topic, b"%d" % number) for number in range(count)]
    (await bus.publish_batch(messages)).raise_for_errors()
    return [message.uid for message in messages]


def length_is(harness: Harness, topic: str, length: int) -> Any:
    async def same() -> bool:
        return len(await harness.entries(topic)) == length

    return same


@asynccontextmanager
async def keeper_of(harness: Harness) -> AsyncGenerator[Any, None]:
    """A backend, for what is tested step by step."""
    async with harness.make_backend() as backend:
        assert isinstance(backend, RetentionKeeper)
        yield backend


async def trim(backend: Any, topic: str, trimmer: str = "me") -> Trimmed:
    [result] = await backend.trim([topic], trimmer=trimmer)
    assert isinstance(result, Trimmed)
    return result


async def trim_all(backend: Any, topic: str) -> tuple[int, dict[str, int]]:
    """Step after step until nothing is left to do: how many were removed, and what was lost."""
    removed, lost = 0, dict[str, int]()
    while True:
        step = await trim(backend, topic)
        removed += step.removed
        for group, count in step.lost.items():
            lost[group] = lost.get(group, 0) + count
        if not step.more:
            return removed, lost


async def fill(backend: Any, topic: str, count: int) -> list[str]:
    return [str(result) for result in await backend.publish_many([(topic, Message(topic), None)] * count)]


async def forget_retention(harness: Harness, topic: str) -> None:
    """As FLUSHALL does, or a failover before it was replicated."""
    if isinstance(harness, MemoryHarness):
        harness.make_backend()._streams[topic].retention = None
    else:
        assert isinstance(harness, RedisHarness)
        await to_thread.run_sync(harness.server.client().delete, retention_key(topic))


# --- declaring


RETENTIONS: list[Retention] = [Limits(length=5), Limits(age=60.0), Limits(length=5, age=0.001), Interest(), WorkQueue()]


@pytest.mark.parametrize("retention", RETENTIONS, ids=repr)
async def test_what_is_declared_is_stored_and_may_be_declared_again(
    harness: Harness, topic: str, retention: Retention
) -> None:
    async with keeper_of(harness) as backend:
        for _ in range(2):
            assert await backend.declare_retention(topic, retention, "declare") == retention
        assert (await trim(backend, topic)).retention == retention


async def test_a_retention_that_contradicts_what_is_declared_is_refused(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        await bus.declare_topic(topic, Limits(length=1000))
        for other in (Interest(), WorkQueue(), Limits(length=1001), Limits(length=1000, age=1.0)):
            with refused("retention", repr(other), "Limits(length=1000)"):
                await bus.declare_topic(topic, other)
        async with keeper_of(harness) if isinstance(harness, RedisHarness) else nullcontext_of(bus) as backend:
            assert (await trim(backend, topic)).retention == Limits(length=1000)
        await bus.declare_topic(topic, Interest(), change=True)
        with refused("retention", "Limits(length=1000)", "Interest()"):
            await bus.declare_topic(topic, Limits(length=1000))


@asynccontextmanager
async def nullcontext_of(bus: StreamBus) -> AsyncGenerator[Any, None]:
    yield bus.backend


@pytest.mark.parametrize(
    ("field", "shown", "allowed", "values"),
    [
        ("length", "0", "at least 1", {"length": 0}),
        ("length", "-1", "at least 1", {"length": -1}),
        ("length", "1.5", "an int", {"length": 1.5}),
        ("length", "True", "an int", {"length": True}),
        ("length", str(2**53 + 1), "at most", {"length": 2**53 + 1}),
        ("age", "0", "positive", {"age": 0}),
        ("age", "-1", "positive", {"age": -1}),
        ("age", "nan", "positive", {"age": math.nan}),
        ("age", "0.0001", "0.001", {"age": 0.0001}),
        ("age", "1e+09", "10 years", {"age": 1e9 + 0.0}),
        ("age", "'1 d'", "positive", {"age": "1 d"}),
    ],
)
def test_limits_are_refused(field: str, shown: str, allowed: str, values: dict[str, Any]) -> None:
    if shown == "1e+09":
        shown = repr(values["age"])
    with refused(field, shown, allowed):
        Limits(**values)


def test_limits_without_a_limit_are_refused() -> None:
    with pytest.raises(ValidationError, match="length or an age"):
        Limits()


async def test_bad_declarations_are_refused_and_nothing_is_stored(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        for value in (Interest, "interest", 5):
            with refused("retention", repr(value), "anybus.Limits"):
                await bus.declare_topic(topic, value)  # type: ignore[arg-type]
        with refused("retention", "None", "no default"):
            await bus.declare_topic(topic)
        with refused("change", "1", "True or False"):
            await bus.declare_topic(topic, Interest(), change=1)  # type: ignore[arg-type]
        with refused("topic", "''", "not blank"):
            await bus.declare_topic("", Interest())
        for dead in (Interest(), WorkQueue()):
            with refused("retention", repr(dead), "anybus.Limits"):
                await bus.declare_topic(f"{topic}.dead", dead)
        assert isinstance(bus.backend, RetentionKeeper)
        for name in (topic, f"{topic}.dead"):
            assert (await trim(bus.backend, name)).retention is None
    with refused("retention", "'all'", "anybus.Limits"):
        StreamBusOptions(retention="all")  # type: ignore[arg-type]


async def test_a_backend_that_cannot_keep_a_retention_says_so(topic: str) -> None:
    async with StreamBus(StepByStep(anybus.MemoryBackend()), quick()) as bus:
        with pytest.raises(UnsupportedError, match="StepByStep"):
            await bus.declare_topic(topic, Interest())
    with pytest.raises(UnsupportedError, match="StepByStep"):
        StreamBus(StepByStep(anybus.MemoryBackend()), StreamBusOptions(retention=Interest()))


async def test_a_bus_that_is_not_open_declares_nothing(topic: str) -> None:
    bus = StreamBus(anybus.MemoryBackend())
    with pytest.raises(anybus.ClosedError):
        await bus.declare_topic(topic, Interest())


# --- the default


def with_default(retention: Retention) -> StreamBusOptions:
    return StreamBusOptions(retention=retention, group_start_id="0", reclaim_interval=0.02)


async def test_the_default_applies_to_topics_that_have_none_when_a_subscription_starts(
    harness: Harness, topic: str
) -> None:
    async with StreamBus(harness.make_backend(), with_default(Interest())) as bus:
        backend: Any = bus.backend
        await backend.declare_retention(f"{topic}.b", Limits(length=3), "declare")
        for name in (topic, f"{topic}.b", f"{topic}.dead"):
            config = SubscriptionConfig(name, "g", dead_letter_topic=DROP)
            async with bus.subscribe(config, handle):
                pass
        found = [(await trim(backend, name)).retention for name in (topic, f"{topic}.b", f"{topic}.dead")]
        assert found == [Interest(), Limits(length=3), None]
        with refused("retention", "Interest()", "Limits(length=3)"):
            await bus.declare_topic(f"{topic}.b")


async def test_a_declaration_replaces_a_default_and_a_default_replaces_nothing(harness: Harness, topic: str) -> None:
    async with keeper_of(harness) as backend:
        assert await backend.declare_retention(topic, Interest(), "default") == Interest()
        assert await backend.declare_retention(topic, Limits(length=1), "default") == Interest()
        assert await backend.declare_retention(topic, Limits(length=2), "declare") == Limits(length=2)
        assert await backend.declare_retention(topic, Interest(), "default") == Limits(length=2)
        assert await backend.declare_retention(topic, Interest(), "declare") == Limits(length=2)
        # A default that was declared in its own words is no default any more.
        other = f"{topic}.b"
        await backend.declare_retention(other, Interest(), "default")
        await backend.declare_retention(other, Interest(), "declare")
        assert await backend.declare_retention(other, Limits(length=2), "declare") == Interest()


async def test_a_declaration_that_the_server_lost_is_declared_again(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        await bus.declare_topic(topic, Interest())
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handle):
            await publish(bus, topic, 3)
            await until(length_is(harness, topic, 0))
            await forget_retention(harness, topic)
            await publish(bus, topic, 3)
            await until(length_is(harness, topic, 0))


# --- interest


async def test_an_entry_goes_when_every_group_has_acknowledged_it(harness: Harness, topic: str) -> None:
    gate = anyio.Event()

    async def slow(delivery: Delivery) -> None:
        await gate.wait()

    async with StreamBus(harness.make_backend(), quick()) as bus:
        await bus.declare_topic(topic, Interest())
        async with (
            bus.subscribe(SubscriptionConfig(topic, "fast"), handle) as fast,
            bus.subscribe(SubscriptionConfig(topic, "slow", max_in_flight=4), slow) as one,
        ):
            published = await publish(bus, topic, 500)
            await until(lambda: fast.statistics().handled == 500)
            await anyio.sleep(0.2)
            assert uids(await harness.entries(topic)) == published
            gate.set()
            await until(length_is(harness, topic, 0))
            assert one.statistics().handled == 500
            assert one.statistics().lost == fast.statistics().lost == 0


async def test_what_is_in_flight_or_unread_stays_and_what_comes_before_it_goes(harness: Harness, topic: str) -> None:
    async with keeper_of(harness) as backend:
        await backend.create_group(topic, "a", "0")
        await backend.create_group(topic, "b", "0")
        await backend.declare_retention(topic, Interest(), "declare")
        ids = await fill(backend, topic, 300)
        for group in ("a", "b"):
            await backend.read_new(topic, group, "c", count=300, timeout=0)
        await backend.ack_many(topic, "a", [*ids[:150], *ids[200:]])
        await backend.ack_many(topic, "b", ids[:151])
        assert (await trim(backend, topic)).removed == 150
        assert [entry_id for entry_id, _, _ in await harness.entries(topic)] == ids[150:]
        await backend.ack_many(topic, "a", ids[150:151])
        found = await trim(backend, topic)
        assert (found.removed, found.length, found.position) == (1, 149, ids[151])
        assert (found.groups, found.holder) == (2, "a")
        late = await fill(backend, topic, 2)
        await backend.ack_many(topic, "a", ids)
        await backend.ack_many(topic, "b", ids)
        found = await trim(backend, topic)
        assert (found.removed, found.length) == (149, 2)
        assert [entry_id for entry_id, _, _ in await harness.entries(topic)] == late


async def test_without_a_group_nothing_goes_but_by_limits(harness: Harness, topic: str) -> None:
    async with keeper_of(harness) as backend:
        await fill(backend, topic, 30)
        for retention in (Interest(), WorkQueue()):
            await backend.declare_retention(topic, retention, "change")
            assert (await trim(backend, topic)).removed == 0
        await backend.declare_retention(topic, Limits(length=7), "change")
        assert await trim_all(backend, topic) == (23, {})


async def test_an_undeclared_topic_is_never_trimmed(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handle) as one:
            await publish(bus, topic, 300)
            await until(lambda: one.statistics().handled == 300)
            await anyio.sleep(0.2)
            assert len(await harness.entries(topic)) == 300


async def test_retries_and_dead_letters_are_kept_though_the_original_goes(harness: Harness, topic: str) -> None:
    handled: list[int] = []

    async def fail(delivery: Delivery) -> None:
        number = int(delivery.message.payload)
        if number % 10 == 0 and delivery.state.attempt < 3:
            raise ValueError("not yet")
        if number % 10 == 1:
            raise anybus.Reject("no")
        handled.append(number)

    config = SubscriptionConfig(topic, "g", retry_backoff=ExponentialBackoff(initial=0.05, maximum=0.05))
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        await bus.declare_topic(topic, Interest())
        async with bus.subscribe(config, fail):
            await publish(bus, topic, 50)
            await until(length_is(harness, topic, 0))
            await until(lambda: len(handled) == 45)
            await until(length_is(harness, f"{topic}.dead", 5))
    assert sorted(handled) == [number for number in range(50) if number % 10 != 1]


async def test_one_step_is_bounded_and_the_rest_follows(harness: Harness, topic: str) -> None:
    count = 1500 if isinstance(harness, MemoryHarness) else 10_500
    async with keeper_of(harness) as backend:
        await backend.create_group(topic, "g", "0")
        await backend.declare_retention(topic, Interest(), "declare")
        await fill(backend, topic, count)
        taken = 0
        while taken < count:
            entries = await backend.read_new(topic, "g", "c", count=500, timeout=0)
            await backend.ack_many(topic, "g", [entry.id for entry in entries])
            taken += len(entries)
        first = await trim(backend, topic)
        assert first.more
        assert 0 < first.removed < count
        assert first.removed + (await trim_all(backend, topic))[0] == count
        assert await harness.entries(topic) == []


# --- limits


async def test_limits_keep_the_newest(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        await bus.declare_topic(topic, Limits(length=10))
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handle) as one:
            published = await publish(bus, topic, 250)
            await until(length_is(harness, topic, 10))
            assert uids(await harness.entries(topic)) == published[-10:]
            await until(lambda: one.statistics().handled + one.statistics().lost >= 250)


async def test_limits_of_age_remove_what_is_older(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        await bus.declare_topic(topic, Limits(age=0.3))
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handle):
            began = anyio.current_time()
            await publish(bus, topic, 20)
            await until(length_is(harness, topic, 0))
            assert anyio.current_time() - began >= 0.25


@pytest.mark.parametrize("anyio_backend", [pytest.param(("trio", ANOTHER), id="virtual-clock")])
async def test_in_memory_the_age_is_by_anyios_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "LOOK", 5.0)
    monkeypatch.setattr(pace, "QUIET", 60.0)
    harness = MemoryHarness()
    async with StreamBus(harness.make_backend()) as bus:
        await bus.declare_topic("t", Limits(age=3600.0))
        async with bus.subscribe(SubscriptionConfig("t", "g"), handle):
            await publish(bus, "t", 3)
            await anyio.sleep(1800)
            await publish(bus, "t", 3)
            await anyio.sleep(1799)
            assert len(await harness.entries("t")) == 6
            await anyio.sleep(70)
            assert len(await harness.entries("t")) == 3
            await anyio.sleep(1800)
            assert await harness.entries("t") == []


async def test_a_loss_is_counted_for_each_group(harness: Harness, topic: str) -> None:
    async with keeper_of(harness) as backend:
        for group in ("ahead", "behind", "never"):
            await backend.create_group(topic, group, "0")
        await backend.declare_retention(topic, Limits(length=100), "declare")
        ids = await fill(backend, topic, 700)
        await backend.read_new(topic, "ahead", "c", count=700, timeout=0)
        await backend.ack_many(topic, "ahead", [*ids[:350], *ids[360:]])
        await backend.read_new(topic, "behind", "c", count=200, timeout=0)
        await backend.ack_many(topic, "behind", ids[50:150])
        # 600 go. `ahead` has 10 of them pending, `behind` 100, and 400 unread.
        assert await trim_all(backend, topic) == (600, {"ahead": 10, "behind": 500, "never": 600})
        # What is pending and gone is not counted again.
        more = await fill(backend, topic, 50)
        assert await trim_all(backend, topic) == (50, {"behind": 50, "never": 50})
        assert (await trim(backend, topic)).lost_in_all == {"ahead": 10, "behind": 550, "never": 650}
        assert len(more) == 50


async def test_a_loss_is_told_to_the_observer_the_log_and_the_statistics(
    harness: Harness, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder, max_payload_bytes=0)) as bus:
        backend: Any = bus.backend
        await backend.create_group(topic, "dead", "0")
        await bus.declare_topic(topic, Limits(length=1))
        async with (
            bus.subscribe(SubscriptionConfig(topic, "g"), handle) as one,
            bus.subscribe(SubscriptionConfig(f"{topic}.other", "dead"), handle) as other,
        ):
            with caplog.at_level(logging.WARNING, "anybus"):
                for _ in range(5):
                    before = one.statistics().handled
                    await publish(bus, topic, 20)
                    await until(length_is(harness, topic, 1))
                    await until(lambda before=before: one.statistics().handled > before)  # type: ignore[misc]
                await until(lambda: sum(event.count or 0 for event in lost_by(recorder, "dead")) == 99)
            async with bus.subscribe(SubscriptionConfig(topic, "dead"), handle) as late:
                await until(lambda: late.statistics().lost == 99)
            assert other.statistics().lost == 0
    assert all(event.topic == topic and "Limits(length=1)" in str(event.detail) for event in lost_by(recorder, "dead"))
    told = [record.getMessage() for record in caplog.records if "group 'dead' had not acknowledged" in record.message]
    assert len(told) == 1, "the log has one line in ten minutes"


def lost_by(recorder: Recorder, group: str) -> list[Any]:
    return [event for event in recorder.of("on_entries_lost") if event.group == group]


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_done_counts_are_exact_and_nothing_else_goes(harness: Harness, topic: str, seed: int) -> None:
    """Against a model that knows everything."""
    chance = random.Random(seed)
    groups = ["a", "b", "c"][: 1 + seed % 3]
    async with keeper_of(harness) as backend:
        model: list[str] = []
        read = dict.fromkeys(groups, 0)
        pending: dict[str, list[str]] = {group: [] for group in groups}
        gone = 0
        for group in groups:
            await backend.create_group(topic, group, "0")
        for _ in range(25):
            model += await fill(backend, topic, chance.choice((1, 40, 230)))
            for group in groups:
                entries = await backend.read_new(topic, group, "x", count=chance.choice((1, 60, 400)), timeout=0)
                read[group] = max(read[group], gone) + len(entries)
                pending[group] += [entry.id for entry in entries]
                acked = chance.choice((pending[group][: chance.randrange(500)], pending[group][::2]))
                await backend.ack_many(topic, group, acked)
                pending[group] = [entry_id for entry_id in pending[group] if entry_id not in set(acked)]
            length = chance.choice((50, 120, 1000))
            retention = chance.choice((Interest(), Limits(length=length)))
            await backend.declare_retention(topic, retention, "change")
            alive = set(model[gone:])
            if isinstance(retention, Limits):
                end = max(gone, len(model) - length)
            else:
                lowest = [model.index(one[0]) if one else read[name] for name, one in pending.items()]
                end = max(gone, *[min([*lowest, *read.values()])])
            removed = set(model[gone:end])
            expected = {
                group: len(set(model[read[group] :]) & removed) + len(set(pending[group]) & removed & alive)
                for group in groups
            }
            if not isinstance(retention, Limits):
                assert not any(expected.values())
            assert await trim_all(backend, topic) == (
                end - gone,
                {group: count for group, count in expected.items() if count},
            )
            gone = end
            assert [entry_id for entry_id, _, _ in await harness.entries(topic)] == model[gone:]


# --- work queues


async def test_a_work_queue_has_one_group_and_a_second_is_refused(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        await bus.declare_topic(topic, WorkQueue())
        async with bus.subscribe(SubscriptionConfig(topic, "first"), handle) as one:
            await publish(bus, topic, 30)
            with refused("group", "'second'", "'first'"):
                async with bus.subscribe(SubscriptionConfig(topic, "second"), handle):
                    pass
            async with bus.subscribe(SubscriptionConfig(topic, "first"), handle):
                await until(length_is(harness, topic, 0))
            assert one.is_running
        with pytest.raises(anybus.GroupLostError):
            await harness.pending(topic, "second")
        await harness.delete_group(topic, "first")
        async with bus.subscribe(SubscriptionConfig(topic, "second"), handle):
            pass


async def test_a_topic_with_two_groups_cannot_become_a_work_queue(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        backend: Any = bus.backend
        for group in ("b", "a"):
            await backend.create_group(topic, group, "0")
        for change in (False, True):
            with refused("retention", "WorkQueue()", "a, b"):
                await bus.declare_topic(topic, WorkQueue(), change=change)
        assert (await trim(backend, topic)).retention is None


async def test_of_two_groups_that_come_at_once_exactly_one_gets_the_queue(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        for number in range(5):
            name = f"{topic}.{number}"
            await bus.declare_topic(name, WorkQueue())
            inside: list[str] = []
            outside: list[str] = []
            over = anyio.Event()

            async def come(
                group: str, name: str = name, inside: Any = inside, outside: Any = outside, over: Any = over
            ) -> None:
                try:
                    async with bus.subscribe(SubscriptionConfig(name, group), handle):
                        inside.append(group)
                        await over.wait()
                except ValidationError:
                    outside.append(group)

            async with anyio.create_task_group() as tasks:
                for group in ("a", "b"):
                    tasks.start_soon(come, group)
                await until(lambda inside=inside, outside=outside: len(inside) + len(outside) == 2)  # type: ignore[misc]
                over.set()
            assert len(inside) == 1
            assert await harness.pending(name, inside[0]) == []
            for group in outside:
                with pytest.raises(anybus.GroupLostError):
                    await harness.pending(name, group)


async def test_a_work_queue_that_has_two_groups_all_the_same_loses_nothing(
    harness: Harness, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        backend: Any = bus.backend
        await bus.declare_topic(topic, WorkQueue())
        async with bus.subscribe(SubscriptionConfig(topic, "first"), handle) as one:
            await backend.create_group(topic, "foreign", "$")
            with caplog.at_level(logging.WARNING, "anybus"):
                await publish(bus, topic, 30)
                await until(lambda: one.statistics().handled == 30)
                await until(lambda: "has 2 groups" in caplog.text)
            assert len(await harness.entries(topic)) == 30


# --- a group that has vanished


async def test_a_group_that_vanished_keeps_its_entries_until_it_is_made_again(harness: Harness, topic: str) -> None:
    async with keeper_of(harness) as backend:
        await backend.declare_retention(topic, Interest(), "declare")
        for group in ("stays", "goes"):
            await backend.create_group(topic, group, "0")
        ids = await fill(backend, topic, 100)
        for group in ("stays", "goes"):
            await backend.read_new(topic, group, "c", count=100, timeout=0)
        await backend.ack_many(topic, "stays", ids)
        await backend.ack_many(topic, "goes", [*ids[:40], *ids[41:50]])
        await harness.delete_group(topic, "goes")
        found = await trim(backend, topic)
        assert (found.removed, found.holder, found.position) == (40, "goes", ids[40])
        with pytest.raises(anybus.GroupLostError) as lost:
            await backend.read_new(topic, "goes", "c", count=100, timeout=0)
        await backend.create_group(topic, "goes", lost.value.safe_id)
        again = await backend.read_new(topic, "goes", "c", count=100, timeout=0)
        assert [entry.id for entry in again] == ids[40:]
        await backend.ack_many(topic, "goes", ids)
        assert (await trim(backend, topic)).length == 0


async def test_a_group_that_vanished_long_ago_does_not_count(harness: Harness, topic: str) -> None:
    async with keeper_of(harness) as backend:
        await backend.declare_retention(topic, Interest(), "declare")
        for group in ("stays", "goes"):
            await backend.create_group(topic, group, "0")
        ids = await fill(backend, topic, 10)
        await backend.read_new(topic, "stays", "c", count=10, timeout=0)
        await backend.ack_many(topic, "stays", ids)
        await harness.delete_group(topic, "goes")
        assert (await trim(backend, topic)).removed == 0
        if isinstance(harness, MemoryHarness):
            kept = harness.make_backend()._streams[topic].retention
            assert kept is not None
            kept.gone["goes"] -= 601
        else:
            assert isinstance(harness, RedisHarness)
            client, key = harness.server.client(), retention_key(topic)
            since = await to_thread.run_sync(client.hget, key, "gone:goes")
            await to_thread.run_sync(client.hset, key, "gone:goes", str(int(since) - 601_000))
        assert (await trim(backend, topic)).removed == 10


# --- who trims


async def test_one_trims_at_a_time(harness: Harness, topic: str) -> None:
    async with keeper_of(harness) as backend:
        await backend.declare_retention(topic, Limits(length=1), "declare")
        await fill(backend, topic, 10)
        assert (await trim(backend, topic, "me")).removed == 9
        await fill(backend, topic, 10)
        found = await trim(backend, topic, "another")
        assert (found.busy, found.removed) == (True, 0)
        assert (await trim(backend, topic, "me")).removed == 10


async def test_topics_of_many_groups_take_more_than_one_step(harness: Harness, topic: str) -> None:
    if isinstance(harness, MemoryHarness):
        pytest.skip("in memory, each topic is a step of its own")
    names = [f"{{{topic}}}.{number}" for number in range(4)]
    client = harness.server.client() if isinstance(harness, RedisHarness) else None
    async with keeper_of(harness) as backend:
        for name in names:
            await backend.declare_retention(name, Interest(), "declare")
            [entry_id] = await fill(backend, name, 1)

            def make_groups(name: str = name, entry_id: str = entry_id) -> None:
                for number in range(1001):
                    client.xgroup_create(name, f"g{number}", entry_id)  # type: ignore[union-attr]

            await to_thread.run_sync(make_groups)
        results = await backend.trim(names, trimmer="me")
        assert [(result.removed, result.more) for result in results] == [(1, False)] * 2 + [(0, True)] * 2
        assert [result.removed for result in await backend.trim(names[2:], trimmer="me")] == [1, 1]


async def test_many_topics_are_trimmed_in_one_call_and_one_that_fails_harms_no_other(
    harness: Harness, topic: str
) -> None:
    names = [f"{topic}.{number}" for number in range(120)]
    async with keeper_of(harness) as backend:
        for name in names[::2]:
            await backend.declare_retention(name, Limits(length=2), "declare")
        await backend.publish_many([(name, Message(name), None) for name in names for _ in range(5)])
        wrong = names[4]
        if isinstance(harness, RedisHarness):
            client = harness.server.client()
            await to_thread.run_sync(client.delete, wrong)
            await to_thread.run_sync(client.set, wrong, "no stream")
        results = await backend.trim(names, trimmer="me")
        assert len(results) == len(names)
        for name, result in zip(names, results, strict=True):
            if name == wrong and isinstance(harness, RedisHarness):
                assert isinstance(result, anybus.BackendError)
                assert "WRONGTYPE" in str(result)
            else:
                assert isinstance(result, Trimmed)
                assert result.length == (2 if names.index(name) % 2 == 0 else 5)
        assert await backend.trim([], trimmer="me") == []


async def test_when_the_subscription_ends_that_trims_another_one_goes_on(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        await bus.declare_topic(topic, Interest())
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handle) as second:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handle) as first:
                await publish(bus, topic, 30)
                await until(length_is(harness, topic, 0))
                second.pause()
                first.close()
            second.resume()
            await publish(bus, topic, 30)
            await until(length_is(harness, topic, 0))


async def test_dead_letters_have_a_retention_of_their_own(harness: Harness, topic: str) -> None:
    async def reject(delivery: Delivery) -> None:
        raise anybus.Reject("no")

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        await bus.declare_topic(topic, Interest())
        await bus.declare_topic(f"{topic}.dead", Limits(length=5))
        async with bus.subscribe(SubscriptionConfig(topic, "g"), reject) as one:
            await publish(bus, topic, 40)
            await until(lambda: one.statistics().dead_lettered == 40)
            await until(length_is(harness, f"{topic}.dead", 5))
            await until(length_is(harness, topic, 0))
            assert one.statistics().lost == 0


class CountingKeeper(anybus.MemoryBackend):
    """Notes when it is asked, and of how many topics."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[float, int]] = []

    async def trim(self, streams: Sequence[str], *, trimmer: str) -> list[Trimmed | EventBusError]:
        self.asked.append((anyio.current_time(), len(streams)))
        return await super().trim(streams, trimmer=trimmer)


@pytest.mark.parametrize("anyio_backend", [pytest.param(("trio", VIRTUAL), id="virtual-clock")])
async def test_quiet_topics_are_looked_at_once_a_minute_and_those_that_move_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "LOOK", 5.0)
    monkeypatch.setattr(pace, "QUIET", 60.0)
    keeper = CountingKeeper()
    caretaker = Caretaker(keeper, StreamBusOptions(), Notices())
    await caretaker.declare("moves", Interest(), change=False)
    counts = Counters()
    with anyio.move_on_after(600):
        async with anyio.create_task_group() as tasks:
            for number in range(1000):
                tasks.start_soon(caretaker.tend, Ward(f"quiet-{number}", "g", None, Counters()))
            tasks.start_soon(caretaker.tend, Ward("moves", "g", None, counts))
            for _ in range(600):
                await anyio.sleep(1)
                counts.received += 1
    assert len(keeper.asked) <= 600 / 5
    quiet = sum(count - 1 for _, count in keeper.asked)
    assert quiet == 1000 * 10
    assert len(keeper.asked) >= 600 / 5 - 1


# --- what is told


async def test_a_group_that_does_not_go_on_is_told_by_name_once_in_a_while(
    harness: Harness, topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pace, "STALLED", 0.1)
    monkeypatch.setattr(pace, "STALLED_ENTRIES", 20)
    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        backend: Any = bus.backend
        await backend.create_group(topic, "dead", "0")
        await bus.declare_topic(topic, Interest())
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handle) as one:
            await publish(bus, topic, 19)
            await until(lambda: one.statistics().handled == 19)
            await anyio.sleep(0.3)
            assert recorder.of("on_group_stalled") == []
            with caplog.at_level(logging.WARNING, "anybus"):
                await publish(bus, topic, 6)
                await until(lambda: bool(recorder.of("on_group_stalled")))
            await anyio.sleep(0.3)
            [event] = recorder.of("on_group_stalled")
            assert (event.topic, event.group, event.count) == (topic, "dead", 25)
            assert "group 'dead' does not go on" in caplog.text
            monkeypatch.setattr(pace, "REPEAT", 0.2)
            await until(lambda: len(recorder.of("on_group_stalled")) >= 2)


async def test_a_topic_that_has_grown_is_told_once(
    harness: Harness, topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pace, "GROWN", 50)
    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        await bus.declare_topic(f"{topic}.b", Limits(length=1000))
        async with (
            bus.subscribe(SubscriptionConfig(topic, "g"), handle) as one,
            bus.subscribe(SubscriptionConfig(f"{topic}.b", "g"), handle) as other,
        ):
            await publish(bus, topic, 49)
            await publish(bus, f"{topic}.b", 60)
            await until(lambda: one.statistics().handled == 49)
            await anyio.sleep(0.1)
            assert recorder.of("on_topic_grown") == []
            with caplog.at_level(logging.WARNING, "anybus"):
                await publish(bus, topic, 2)
                await until(lambda: bool(recorder.of("on_topic_grown")))
                await publish(bus, topic, 50)
                await until(lambda: one.statistics().handled == 101)
                await anyio.sleep(0.1)
            assert other.is_running
    [event] = recorder.of("on_topic_grown")
    assert (event.topic, event.count) == (topic, 51)
    assert caplog.text.count("has grown to 51 entries") == 1


async def test_an_observer_whose_hooks_raise_harms_nothing(
    harness: Harness, topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Raising(Recorder):
        def _keep(self, hook: str, event: BusEvent) -> None:
            super()._keep(hook, event)
            if hook in ("on_entries_lost", "on_group_stalled", "on_topic_grown"):
                raise RuntimeError(f"{hook} has a bug")

    for name, value in (("STALLED", 0.0), ("STALLED_ENTRIES", 1), ("GROWN", 1)):
        monkeypatch.setattr(pace, name, value)
    recorder = Raising()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        names: dict[str, Retention | None] = {
            "on_entries_lost": Limits(length=1),
            "on_group_stalled": Interest(),
            "on_topic_grown": None,
        }
        async with AsyncExitStack() as stack:
            for hook, retention in names.items():
                if retention is not None:
                    await bus.declare_topic(f"{topic}.{hook}", retention)
                await bus.backend.create_group(f"{topic}.{hook}", "dead", "0")
                await stack.enter_async_context(bus.subscribe(SubscriptionConfig(f"{topic}.{hook}", "g"), handle))
                await publish(bus, f"{topic}.{hook}", 5)
            for hook in names:
                await until(lambda hook=hook: bool(recorder.of(hook)))  # type: ignore[misc]
                assert f"the observer's {hook} raised" in caplog.text
            await publish(bus, f"{topic}.on_entries_lost", 5)
            await until(length_is(harness, f"{topic}.on_entries_lost", 1))


# --- rights


async def test_without_the_right_to_trim_a_subscription_works_and_says_once_that_it_does_not_trim(
    server: RunningServer, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with user_with(server, "+@all", "-xtrim") as user:
        async with StreamBus(RedisBackend(user.url), quick(Recorder())) as bus:
            await bus.declare_topic(topic, Interest())
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handle) as one:
                await publish(bus, topic, 10)
                await until(lambda: "cannot be applied" in caplog.text)
                await publish(bus, topic, 10)
                await until(lambda: one.statistics().handled == 20)
                await anyio.sleep(0.2)
                assert one.is_running
    assert caplog.text.count("cannot be applied") == 1
    assert f"the retention of '{topic}' cannot be applied" in caplog.text


async def test_the_documented_rights_are_enough(server: RunningServer, topic: str) -> None:
    rules = [
        word
        for line in (*documented("docs/redis.md", "ACL SETUSER worker"), *documented("docs/retention.md", "+xtrim"))
        for word in line.split()
        if word[0] in "+-"
    ]
    async with user_with(server, "resetkeys", f"~{topic}*", "~anybus:*", *rules) as user:
        async with StreamBus(RedisBackend(user.url), quick(Recorder())) as bus:
            policies: list[Retention] = [Interest(), WorkQueue(), Limits(length=1), Limits(age=0.01)]
            for number, retention in enumerate(policies):
                name = f"{topic}.{number}"
                await bus.declare_topic(name, retention)
                async with bus.subscribe(SubscriptionConfig(name, "g"), handle):
                    await publish(bus, name, 10)
                    length = 1 if retention == Limits(length=1) else 0
                    await until(length_is(RedisHarness(server), name, length))
            backend: Any = bus.backend
            await backend.create_group(f"{topic}.1", "second", "0")
            assert await backend.admit_group(f"{topic}.1", "second", made=True) == "g"


def documented(page: str, beginning: str) -> list[str]:
    """The block of a page that begins with these words."""
    text = (Path(__file__).parent.parent / page).read_text()
    [block] = re.findall(rf"^```text\n({re.escape(beginning)}.*?)^```", text, re.DOTALL | re.MULTILINE)
    return str(block).splitlines()
