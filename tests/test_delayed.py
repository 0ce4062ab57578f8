"""Delayed publishing: ``publish_later``, ``scheduled`` and ``cancel``.

Specification (issue 14, DESIGN.md section 2):

- A message is stored now, and appended when it is due: not before, exactly once, whoever does it, also if its publisher
  is gone, and if nobody reads the topic. Messages of the same due time keep the order in which they were stored.
- While the bus that scheduled it is open, it is appended within 50 ms. After that, every bus that subscribes to the
  topic looks at least once a second.
- It can be cancelled until it is appended; then ``cancel`` is false.
- ``scheduled`` lists what waits, the earliest first.
- A time that is not clear, or too far away, is refused, and nothing is stored.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import anyio
import pytest
from harness import HOUR, SOON, Harness, MemoryHarness, Recorder, StepByStep, new_topic, quick, until

from anybus import (
    BackendError,
    ClosedError,
    Delivery,
    Message,
    PublishOptions,
    Retry,
    StreamBus,
    SubscriptionConfig,
    UnsupportedError,
    ValidationError,
)
from anybus.abc import ScheduleStore
from anybus.backends.redis import _watch

SHORT = 0.15
NOW = datetime(2026, 5, 6, tzinfo=timezone.utc)


@asynccontextmanager
async def open_bus(harness: Harness, **options: Any) -> AsyncGenerator[StreamBus, None]:
    with anyio.fail_after(2 * SOON):
        async with StreamBus(harness.make_backend(), quick(**options)) as bus:
            yield bus


async def payloads(harness: Harness, topic: str) -> list[bytes]:
    return [message.payload for _, message, _ in await harness.entries(topic) if message is not None]


def appended(harness: Harness, topic: str, *expected: bytes) -> Callable[[], Any]:
    async def look() -> bool:
        return await payloads(harness, topic) == list(expected)

    return look


class Handled:
    """A handler that notes what came."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    async def __call__(self, delivery: Delivery) -> None:
        self.payloads.append(delivery.message.payload)


# --- when it is appended


async def test_a_message_is_appended_when_it_is_due_and_not_before(harness: Harness, topic: str) -> None:
    async with open_bus(harness) as bus:
        before = anyio.current_time()
        scheduled = await bus.publish_later(Message(topic, b"later"), delay=SHORT)
        assert await payloads(harness, topic) == []
        await until(appended(harness, topic, b"later"))
        assert anyio.current_time() - before >= SHORT - 0.002  # servers count whole milliseconds
        assert scheduled.topic == topic
        assert scheduled.message is not None
        assert scheduled.message.payload == b"later"
        assert scheduled.due.tzinfo == timezone.utc


async def test_nobody_has_to_read_the_topic(harness: Harness, topic: str) -> None:
    """A topic without a group: a group that is made later reads the message as one of its backlog."""
    async with open_bus(harness, group_start_id="0") as bus:
        await bus.publish_later(Message(topic, b"later"), delay=0.01)
        await until(appended(harness, topic, b"later"))
        handled = Handled()
        async with bus.subscribe(SubscriptionConfig(topic, "g", group_start_id="0"), handled):
            await until(lambda: handled.payloads == [b"later"])


async def test_a_subscription_handles_it(harness: Harness, topic: str) -> None:
    handled = Handled()
    async with open_bus(harness, reclaim_interval=HOUR / 100, block_timeout=HOUR / 100) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handled):
            await bus.publish_later(Message(topic, b"second"), delay=2 * SHORT)
            await bus.publish_later(Message(topic, b"first"), delay=SHORT)
            await until(lambda: handled.payloads == [b"first", b"second"])


async def test_a_point_in_time_may_be_given_in_any_time_zone(harness: Harness, topic: str) -> None:
    at = datetime.now(timezone(timedelta(hours=5))) + timedelta(hours=1)
    async with open_bus(harness) as bus:
        scheduled = await bus.publish_later(Message(topic), at=at)
        assert abs(scheduled.due - at) < timedelta(milliseconds=500)  # a server's clock may be another one
        assert await scheduled.cancel()


async def test_a_time_in_the_past_means_at_once(harness: Harness, topic: str) -> None:
    async with open_bus(harness) as bus:
        for at in (datetime.now(timezone.utc) - timedelta(hours=1), datetime(1, 1, 2, tzinfo=timezone.utc)):
            scheduled = await bus.publish_later(Message(topic, b"past"), at=at)
            assert abs(scheduled.due - datetime.now(timezone.utc)) < timedelta(seconds=SOON)
        await until(appended(harness, topic, b"past", b"past"))


async def test_messages_of_the_same_due_time_keep_their_order(harness: Harness, topic: str) -> None:
    at = datetime.now(timezone.utc) + timedelta(seconds=0.4)
    expected = [b"%d" % number for number in range(50)]
    async with open_bus(harness) as bus:
        for payload in expected:
            await bus.publish_later(Message(topic, payload), at=at)
        await until(appended(harness, topic, *expected))


async def test_the_message_outlives_the_bus_that_scheduled_it(harness: Harness, topic: str) -> None:
    handled = Handled()
    async with open_bus(harness) as other:
        async with other.subscribe(SubscriptionConfig(topic, "g"), handled):
            async with open_bus(harness) as bus:
                await bus.publish_later(Message(topic, b"later"), delay=0.4)
            await until(lambda: handled.payloads == [b"later"])


async def test_what_became_due_while_nobody_ran_is_appended_late(harness: Harness, topic: str) -> None:
    handled = Handled()
    async with open_bus(harness) as bus:
        await bus.publish_later(Message(topic, b"later"), delay=0.02)
        await bus.backend.create_group(topic, "g", "0")
    await anyio.sleep(0.05)
    async with open_bus(harness) as other, other.subscribe(SubscriptionConfig(topic, "g"), handled):
        await until(lambda: handled.payloads == [b"later"])
        await until(appended(harness, topic, b"later"))


async def test_many_topics_at_once(harness: Harness) -> None:
    topics = [new_topic() for _ in range(60)]
    async with open_bus(harness) as bus:
        for topic in topics:
            await bus.publish_later(Message(topic, b"x"), delay=0.3)
        for topic in topics:
            await until(appended(harness, topic, b"x"))


async def test_more_than_one_call_may_append(harness: Harness, topic: str) -> None:
    count = 1500
    at = datetime.now(timezone.utc) + timedelta(seconds=0.4)
    async with open_bus(harness) as bus:
        async with anyio.create_task_group() as tasks:

            async def schedule(first: int) -> None:
                for number in range(first, count, 50):
                    await bus.publish_later(Message(topic, b"%d" % number), at=at)

            for first in range(50):
                tasks.start_soon(schedule, first)

        async def all_there() -> bool:
            return len(await payloads(harness, topic)) == count

        await until(all_there)
        assert sorted(map(int, await payloads(harness, topic))) == list(range(count))


# --- options and limits


async def test_the_options_of_a_publish_apply(harness: Harness, topic: str) -> None:
    async with open_bus(harness) as bus:
        options = PublishOptions(metadata={"tenant": "acme"})
        scheduled = await bus.publish_later(Message(topic, headers={"a": "b"}), options, delay=0)
        assert scheduled.message is not None
        assert scheduled.message.headers == {"a": "b", "tenant": "acme"}

        async def there() -> bool:
            entries = await harness.entries(topic)
            return [message.headers for _, message, _ in entries if message] == [{"a": "b", "tenant": "acme"}]

        await until(there)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, r"delay must be .*one of the two must be given, not None"),
        ({"delay": 1, "at": NOW}, r"delay must be unset together with at=.*, not 1"),
        ({"delay": -0.5}, r"delay must be .*zero or more, not -0.5"),
        ({"delay": float("nan")}, r"delay must be .*not nan"),
        ({"delay": float("inf")}, r"delay must be .*not inf"),
        ({"delay": "1"}, r"delay must be .*not '1'"),
        ({"delay": True}, r"delay must be .*not True"),
        ({"delay": 10 * 366 * 86400.0}, r"delay must be at most 315619200 seconds \(ten years\), not 316224000.0"),
        ({"at": datetime(2026, 5, 6)}, r"at must be a datetime with a time zone .*not datetime.datetime\(2026"),
        ({"at": "2026-05-06"}, r"at must be a datetime, not '2026-05-06'"),
        ({"at": datetime(2999, 1, 1, tzinfo=timezone.utc)}, r"at must be at most ten years from now, not datetime"),
        ({"at": datetime.max.replace(tzinfo=timezone.utc)}, r"at must be at most ten years from now"),
    ],
    ids=repr,
)
async def test_a_time_that_is_not_clear_is_refused_and_nothing_is_stored(
    given: dict[str, Any], told: str, harness: Harness, topic: str
) -> None:
    async with open_bus(harness) as bus:
        with pytest.raises(ValidationError, match=told):
            await bus.publish_later(Message(topic), **given)
        assert [one async for one in bus.scheduled(topic)] == []
        assert await payloads(harness, topic) == []


async def test_what_publish_refuses_is_refused(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick(Recorder(), max_payload_bytes=10)) as bus:
        with pytest.raises(ValidationError, match="payload must be at most 10 bytes"):
            await bus.publish_later(Message(topic, b"x" * 11), delay=HOUR)
        with pytest.raises(ValidationError, match=r"message must be an anybus\.Message"):
            await bus.publish_later("later", delay=HOUR)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValidationError, match=r"options must be an anybus\.PublishOptions"):
            await bus.publish_later(Message(topic), {}, delay=HOUR)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValidationError, match="topic must be"):
            bus.scheduled("anybus:x")
        with pytest.raises(ValidationError, match="limit must be at least 1"):
            await bus.scheduled(topic).page(limit=0)
        with pytest.raises(ValidationError, match="after must be the 'next' of a page, not 'x'"):
            await bus.scheduled(topic).page("x")
        with pytest.raises(ValidationError, match=r"scheduled must be an anybus\.Scheduled or its id, not 3"):
            await bus.scheduled(topic).cancel(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        assert [one async for one in bus.scheduled(topic)] == []


async def test_a_backend_that_cannot_refuses(topic: str) -> None:
    """A wrapper that does not pass the offer on."""
    async with StreamBus(StepByStep(MemoryHarness().make_backend()), quick()) as bus:
        with pytest.raises(UnsupportedError, match=r"StepByStep cannot delay messages: .*anybus\.abc\.ScheduleStore"):
            await bus.publish_later(Message(topic), delay=1)
        with pytest.raises(UnsupportedError, match=r"StepByStep cannot delay messages"):
            bus.scheduled(topic)


async def test_after_its_end_a_bus_refuses(harness: Harness, topic: str) -> None:
    async with open_bus(harness) as bus:
        scheduled = await bus.publish_later(Message(topic), delay=HOUR)
        view = bus.scheduled(topic)
    for call in (scheduled.cancel, view.page, lambda: bus.publish_later(Message(topic), delay=1)):
        with pytest.raises(ClosedError):
            await call()


async def test_a_failure_is_raised_and_reported(topic: str) -> None:
    class Broken(MemoryHarness().make_backend().__class__):  # type: ignore[misc]
        async def publish_later(self, *args: Any, **options: Any) -> str:
            raise BackendError("down", may_have_happened=True, can_pass=True)

    recorder = Recorder()
    async with StreamBus(Broken(), quick(recorder)) as bus:
        with pytest.raises(BackendError, match="down"):
            await bus.publish_later(Message(topic), delay=1)
    [event] = recorder.of("on_error", "publish")
    assert event.topic == topic


# --- cancelling


async def test_a_cancelled_message_is_never_appended(harness: Harness, topic: str) -> None:
    async with open_bus(harness) as bus:
        kept = await bus.publish_later(Message(topic, b"kept"), delay=SHORT)
        dropped = await bus.publish_later(Message(topic, b"dropped"), delay=SHORT)
        by_id = await bus.publish_later(Message(topic, b"by id"), delay=SHORT)
        assert await dropped.cancel() is True
        assert await dropped.cancel() is False
        assert await bus.scheduled(topic).cancel(by_id.id) is True
        await bus.publish_later(Message(topic, b"marker"), delay=2 * SHORT)
        await until(appended(harness, topic, b"kept", b"marker"))
        assert await kept.cancel() is False


@pytest.mark.parametrize("unknown", ["", "x", "1-2", "0123456789abcdef", "1764562230123-0123456789abcdef", "-", "1-*"])
async def test_an_unknown_id_is_not_cancelled(unknown: str, harness: Harness, topic: str) -> None:
    async with open_bus(harness) as bus:
        waiting = await bus.publish_later(Message(topic), delay=HOUR)
        assert await bus.scheduled(topic).cancel(unknown) is False
        assert await bus.scheduled(new_topic()).cancel(waiting) is False
        assert await bus.scheduled(topic).cancel(waiting) is True


# --- listing


async def test_what_waits_is_listed_the_earliest_first(harness: Harness, topic: str) -> None:
    async with open_bus(harness) as bus:
        delays = [30 * HOUR, 10 * HOUR, 20 * HOUR]
        made = [await bus.publish_later(Message(topic, b"%d" % delay), delay=delay) for delay in delays]
        expected = sorted(made, key=lambda one: one.due)
        found = [one async for one in bus.scheduled(topic)]
        assert [(one.id, one.due, one.topic, one.error) for one in found] == [
            (one.id, one.due, topic, None) for one in expected
        ]
        assert [one.message for one in found] == [one.message for one in expected]
        assert await found[1].cancel() is True
        assert [one.id async for one in bus.scheduled(topic)] == [expected[0].id, expected[2].id]


async def test_pages_hold_everything_once_although_the_times_are_equal(harness: Harness, topic: str) -> None:
    at = datetime.now(timezone.utc) + timedelta(hours=1)
    async with open_bus(harness) as bus:
        made = [await bus.publish_later(Message(topic, b"%d" % number), at=at) for number in range(23)]
        view, after, pages = bus.scheduled(topic), None, []
        while True:
            page = await view.page(after, limit=5)
            pages.append([one.id for one in page.scheduled])
            if page.next is None:
                break
            after = page.next
            if len(pages) == 2:  # the place is found although what it names is gone
                assert await view.cancel(made[9])
        assert [len(page) for page in pages] == [5, 5, 5, 5, 3]
        assert [one for page in pages for one in page] == [one.id for one in made]


async def test_a_page_of_large_messages_is_short(harness: Harness, topic: str) -> None:
    async with open_bus(harness) as bus:
        for _ in range(3):
            await bus.publish_later(Message(topic, b"x" * 700_000), delay=HOUR)
        page = await bus.scheduled(topic).page()
        assert len(page.scheduled) == 1
        assert page.next is not None
        assert len([one async for one in bus.scheduled(topic)]) == 3


async def test_an_empty_topic_has_an_empty_page(harness: Harness, topic: str) -> None:
    async with open_bus(harness) as bus:
        page = await bus.scheduled(topic).page()
        assert (page.scheduled, page.next) == ((), None)
        assert repr(bus.scheduled(topic)) == f"<ScheduledMessages for {topic!r}>"
        assert bus.scheduled(topic).topic == topic
        assert isinstance(bus.backend, ScheduleStore)


# --- retries


async def test_a_retry_comes_back_when_it_is_due_and_not_at_an_interval(
    harness: Harness, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_watch, "_TICK", HOUR)
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        raise Retry(delay=SHORT)

    async with open_bus(harness, reclaim_interval=HOUR) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_retry=3), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    assert attempts == [1, 2, 3, 4]


async def test_an_earlier_retry_does_not_wait_for_a_later_one(
    harness: Harness, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_watch, "_TICK", HOUR)
    handled: list[bytes] = []

    async def handler(delivery: Delivery) -> None:
        if delivery.state.attempt == 1:
            raise Retry(delay=HOUR if delivery.message.payload == b"late" else SHORT)
        handled.append(delivery.message.payload)

    async with open_bus(harness, reclaim_interval=HOUR) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            for payload in (b"late", b"early", b"late", b"early"):
                await bus.publish(Message(topic, payload))
            await until(lambda: handled == [b"early", b"early"])
