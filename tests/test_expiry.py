"""Expiry: what becomes of a message that has lost its meaning.

The specification, on memory and on a server:

- ``Message.expires_at`` is obeyed: from then on the message is not handled. ``PublishOptions(topic_ttl=...)`` sets it
  when the message is published, unless the message has one.
- A message that has expired becomes a dead letter with the code ``expired``, unhandled. With ``on_expired="drop"`` it
  is acknowledged, and there is no dead letter. Both hold for ``max_age`` as well. It is counted, and the observer is
  told.
- This is decided when the message is taken, again when its handling is about to start, and when it has failed: a retry
  that would come too late is given up on at once.
- So it is in every ack mode, and with ``deliveries()``.
- What has expired already may be published: the consumer's clock decides, and nobody else's.
- Retries and dead letters keep ``expires_at``. A subscription on the dead-letter topic handles them all the same. A
  replay removes it: what an operator sends back is handled.
- No key gets an EXPIRE, and all wall time comes from one function.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import anyio
import pytest
from harness import HOUR, Harness, Recorder, nothing_pending, quick, until
from refusal import refused
from servers import RunningServer
from wallclock import WallClock

import anybus
from anybus import DROP, Delivery, Message, PublishOptions, Retry, StreamBus, SubscriptionConfig, ValidationError

MODES: Sequence[dict[str, Any]] = ({}, {"ack_mode": "manual"}, {"guarantee": "at-most-once"})
SOURCES = Path(__file__).parent.parent / "src" / "anybus"


def in_hours(hours: float) -> datetime:
    return datetime.now(timezone.utc) + timedelta(hours=hours)


async def never(delivery: Delivery) -> None:
    raise AssertionError("it must not be handled")


async def dead(harness: Harness, topic: str) -> dict[str, Message]:
    """The dead letters, by key."""
    return {m.key: m for _, m, _ in await harness.entries(f"{topic}.dead") if m is not None}


@pytest.mark.parametrize("how", ["delay", "at", "past"])
async def test_the_time_to_live_of_a_delayed_message_begins_when_it_is_due(
    harness: Harness, topic: str, how: str
) -> None:
    ttl = PublishOptions(topic_ttl=HOUR)
    async with StreamBus(harness.make_backend(), quick()) as bus:
        if how == "delay":
            scheduled = await bus.publish_later(Message(topic), ttl, delay=5 * HOUR)
        else:
            scheduled = await bus.publish_later(Message(topic), ttl, at=in_hours(5 if how == "at" else -5))
    assert scheduled.message is not None
    assert scheduled.message.expires_at is not None
    begins = in_hours(0) if how == "past" else scheduled.due
    lives = scheduled.message.expires_at - begins
    assert abs(lives - timedelta(seconds=HOUR)) < timedelta(seconds=60)


# --- when it is taken


@pytest.mark.parametrize("mode", MODES, ids=repr)
async def test_what_has_expired_when_it_is_taken_is_a_dead_letter_unhandled(
    harness: Harness, topic: str, wall_clock: WallClock, mode: dict[str, Any]
) -> None:
    recorder = Recorder()
    at = in_hours(1)
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        entry_id = await bus.publish(Message(topic, b"payload", key="k", expires_at=at))
        wall_clock.put_forward()
        async with bus.subscribe(SubscriptionConfig(topic, "g", group_start_id="0", **mode), never) as subscription:
            await until(lambda: subscription.statistics().expired == 1)
            await nothing_pending(harness, topic, "g")
            counts = subscription.statistics()
    assert (counts.dead_lettered, counts.handled, counts.failed) == (1, 0, 0)
    letter = (await dead(harness, topic))["k"]
    assert (letter.payload, letter.expires_at) == (b"payload", at)
    assert letter.headers["dead-letter-code"] == "expired"
    assert "expired at " in letter.headers["dead-letter-reason"]
    assert (letter.headers["dead-letter-id"], letter.headers["dead-letter-attempts"]) == (entry_id, "0")
    (event,) = recorder.of("on_dead_lettered")
    assert event.message_id == entry_id
    assert str(event.detail).startswith("expired: expired at ")
    assert not recorder.of("on_error")


async def test_what_has_not_expired_is_handled(harness: Harness, topic: str, wall_clock: WallClock) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        await bus.publish(Message(topic, key="late", expires_at=in_hours(1)))
        await bus.publish(Message(topic, key="in time", expires_at=in_hours(3)))
        await bus.publish(Message(topic, key="lasting"))
        wall_clock.put_forward(hours=2)
        async with bus.subscribe(SubscriptionConfig(topic, "g", group_start_id="0"), handler) as subscription:
            await until(lambda: subscription.statistics().handled == 2 and subscription.statistics().expired == 1)
    assert sorted(handled) == ["in time", "lasting"]
    assert set(await dead(harness, topic)) == {"late"}


@pytest.mark.parametrize("by", ["expires_at", "max_age"])
async def test_what_has_expired_is_dropped_where_the_subscription_says_so(
    harness: Harness, topic: str, wall_clock: WallClock, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    message = Message(topic, key="k", expires_at=in_hours(1) if by == "expires_at" else None)
    limits: dict[str, Any] = {"max_age": HOUR} if by == "max_age" else {}
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        await bus.publish(message)
        wall_clock.put_forward()
        config = SubscriptionConfig(topic, "g", group_start_id="0", on_expired="drop", **limits)
        with caplog.at_level("INFO", logger="anybus"):
            async with bus.subscribe(config, never) as subscription:
                await until(lambda: subscription.statistics().expired == 1)
                await nothing_pending(harness, topic, "g")
                assert subscription.statistics().dead_lettered == 1
    assert not await harness.entries(f"{topic}.dead")
    assert [event.detail for event in recorder.of("on_settled")] == ["dropped"]
    (event,) = recorder.of("on_dead_lettered")
    assert str(event.detail).startswith("expired: ")
    lines = [record for record in caplog.records if "expired" in record.getMessage()]
    assert not lines, "who hears of it needs no line"


async def test_a_drop_that_was_asked_for_is_no_error_in_the_log(
    harness: Harness, topic: str, wall_clock: WallClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        await bus.publish(Message(topic, key="k", expires_at=in_hours(1)))
        wall_clock.put_forward()
        config = SubscriptionConfig(topic, "g", group_start_id="0", on_expired="drop")
        with caplog.at_level("INFO", logger="anybus"):
            async with bus.subscribe(config, never) as subscription:
                await until(lambda: subscription.statistics().expired == 1)
    (line,) = [record for record in caplog.records if "(expired)" in record.getMessage()]
    assert line.levelname == "INFO"
    assert line.getMessage().startswith("dropped (expired): expired at ")


async def test_what_has_expired_already_may_be_published_and_the_consumer_decides(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), never) as subscription:
            await bus.publish(Message(topic, key="one", expires_at=in_hours(-1)))
            outcome = await bus.publish_batch([Message(topic, key="two", expires_at=in_hours(-1))])
            assert all(isinstance(result, str) for result in outcome.results)
            await until(lambda: subscription.statistics().expired == 2)
    assert set(await dead(harness, topic)) == {"one", "two"}


async def test_what_has_expired_when_it_is_taken_waits_for_no_handler(harness: Harness, topic: str) -> None:
    started, go_on = anyio.Event(), anyio.Event()

    async def handler(delivery: Delivery) -> None:
        started.set()
        await go_on.wait()

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=4)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="first"))
            await started.wait()
            await bus.publish(Message(topic, key="late", expires_at=in_hours(-1)))
            await until(lambda: subscription.statistics().expired == 1)
            assert subscription.statistics().in_flight == 1
            go_on.set()


# --- when it starts


@pytest.mark.parametrize("by", ["expires_at", "max_age"])
@pytest.mark.parametrize("mode", MODES, ids=repr)
async def test_what_expires_while_it_waits_for_a_handler_is_not_handled(
    harness: Harness, topic: str, wall_clock: WallClock, mode: dict[str, Any], by: str
) -> None:
    started, go_on = anyio.Event(), anyio.Event()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)
        started.set()
        await go_on.wait()
        if mode.get("ack_mode") == "manual":
            await delivery.ack()

    limits: dict[str, Any] = {"max_age": HOUR} if by == "max_age" else {}
    expires_at = in_hours(1) if by == "expires_at" else None
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=4, **mode, **limits)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="first"))
            await started.wait()
            await bus.publish(Message(topic, key="waits", expires_at=expires_at))
            await until(lambda: subscription.statistics().waiting == 1)
            wall_clock.put_forward()
            go_on.set()
            await until(lambda: subscription.statistics().expired == 1)
            await nothing_pending(harness, topic, "g")
    assert handled == ["first"]
    letter = (await dead(harness, topic))["waits"]
    assert (letter.headers["dead-letter-code"], letter.headers["dead-letter-attempts"]) == ("expired", "0")


async def test_what_expires_before_it_is_received_is_not_delivered(
    harness: Harness, topic: str, wall_clock: WallClock
) -> None:
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        await bus.publish(Message(topic, key="expired", expires_at=in_hours(-1)))
        await bus.publish(Message(topic, key="first", expires_at=in_hours(3)))
        await bus.publish(Message(topic, key="waits", expires_at=in_hours(1)))
        await bus.publish(Message(topic, key="last"))
        config = SubscriptionConfig(topic, "g", group_start_id="0", max_in_flight=2, max_pending_acks=8)
        async with bus.deliveries(config) as deliveries:
            received = [await deliveries.receive()]
            wall_clock.put_forward()
            received.append(await deliveries.receive())
            for delivery in received:
                await delivery.ack()
            await nothing_pending(harness, topic, "g")
    assert [delivery.message.key for delivery in received] == ["first", "last"]
    assert set(await dead(harness, topic)) == {"expired", "waits"}


async def test_what_expires_while_it_is_handled_is_acknowledged_as_ever(
    harness: Harness, topic: str, wall_clock: WallClock
) -> None:
    async def handler(delivery: Delivery) -> None:
        wall_clock.put_forward()

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic, expires_at=in_hours(1)))
            await until(lambda: subscription.statistics().handled == 1)
            assert subscription.statistics().expired == 0


# --- when it has failed


@pytest.mark.parametrize("on_expired", ["dead-letter", "drop"])
async def test_a_retry_that_would_come_too_late_is_given_up_on_at_once(
    harness: Harness, topic: str, on_expired: Any
) -> None:
    async def handler(delivery: Delivery) -> None:
        raise LookupError("no answer")

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", retry_backoff=[0.0, 2 * HOUR], on_expired=on_expired)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="k", expires_at=in_hours(1)))
            await until(lambda: subscription.statistics().expired == 1)
            await nothing_pending(harness, topic, "g")
            assert (subscription.statistics().failed, subscription.statistics().dead_lettered) == (2, 1)
    letters = await dead(harness, topic)
    if on_expired == "drop":
        assert not letters
        return
    headers = letters["k"].headers
    assert (headers["dead-letter-code"], headers["dead-letter-reason"]) == ("expired", "no answer")
    assert (headers["dead-letter-error-type"], headers["dead-letter-attempts"]) == ("builtins.LookupError", "2")


async def test_a_retry_keeps_the_time_and_is_not_handled_after_it(
    harness: Harness, topic: str, wall_clock: WallClock
) -> None:
    at = in_hours(1)
    seen: list[datetime | None] = []

    async def handler(delivery: Delivery) -> None:
        seen.append(delivery.message.expires_at)
        if len(seen) == 2:
            await delivery.release(delay=0.01)  # it comes back, and its time passes meanwhile
            wall_clock.put_forward()
            return
        raise Retry("again", delay=0)

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic, key="k", expires_at=at))
            await until(lambda: subscription.statistics().expired == 1)
            await nothing_pending(harness, topic, "g")
    assert seen == [at, at]
    headers = (await dead(harness, topic))["k"].headers
    assert (headers["dead-letter-code"], headers["dead-letter-attempts"]) == ("expired", "1")


# --- topic_ttl


async def test_a_ttl_sets_the_time_and_a_message_keeps_its_own(
    harness: Harness, topic: str, wall_clock: WallClock
) -> None:
    own = in_hours(5)
    options = PublishOptions(topic_ttl=HOUR, metadata={"a": "b"})
    wall_clock.put_forward(hours=10)
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        before = wall_clock.now()
        await bus.publish(Message(topic, key="one"), options)
        await bus.publish_batch([Message(topic, key="two"), Message(topic, key="own", expires_at=own)], options)
        await bus.publish(Message(topic, key="without"), PublishOptions(metadata={"a": "b"}))
        after = wall_clock.now()
    stored = {m.key: m for _, m, _ in await harness.entries(topic) if m is not None}
    hour = timedelta(hours=1)
    for key in ("one", "two"):
        at = stored[key].expires_at
        assert at is not None
        assert before + hour <= at <= after + hour
        assert stored[key].headers == {"a": "b"}
    assert stored["own"].expires_at == own
    assert stored["without"].expires_at is None


@pytest.mark.parametrize("value", [0, -1, True, "1", float("nan"), float("inf")], ids=repr)
def test_a_ttl_that_is_no_duration_is_refused(value: Any) -> None:
    with refused("topic_ttl", repr(value), "a positive number of seconds"):
        PublishOptions(topic_ttl=value)


def test_a_ttl_of_more_than_ten_years_is_refused() -> None:
    assert PublishOptions(topic_ttl=315_576_000).topic_ttl == 315_576_000.0
    with refused("topic_ttl", "315576001", "at most ten years (315576000 s)"):
        PublishOptions(topic_ttl=315_576_001)


@pytest.mark.parametrize("value", ["dead_letter", "DROP", "", None, DROP, True], ids=repr)
def test_an_on_expired_that_does_not_exist_is_refused(value: Any) -> None:
    with refused("on_expired", repr(value), "'dead-letter' or 'drop'"):
        SubscriptionConfig("t", "g", on_expired=value)


def test_a_naive_time_is_refused() -> None:
    naive = datetime(2030, 1, 1)
    with pytest.raises(ValidationError, match="expires_at must be a datetime with a time zone"):
        Message("t", expires_at=naive)


# --- dead letters


@pytest.mark.parametrize("to", ["topic", "group"])
async def test_a_replayed_message_is_handled_although_its_time_has_passed(
    harness: Harness, topic: str, to: Any
) -> None:
    handled: list[Message] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message)

    at = in_hours(-1)
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic, b"payload", key="k", expires_at=at))
            await until(lambda: subscription.statistics().expired == 1)
            letters = [letter async for letter in bus.dead_letters(topic, code="expired")]
            assert [letter.message and letter.message.expires_at for letter in letters] == [at]
            report = await bus.dead_letters(topic).replay(to=to)
            assert report.replayed == 1
            await until(lambda: len(handled) == 1)
            await nothing_pending(harness, topic, "g")
            assert subscription.statistics().expired == 1
    assert (handled[0].payload, handled[0].key, handled[0].expires_at) == (b"payload", "k", None)
    assert not await harness.entries(f"{topic}.dead")


async def test_a_subscription_on_the_dead_letter_topic_handles_what_has_expired(harness: Harness, topic: str) -> None:
    codes: list[str] = []

    async def alarm(delivery: Delivery) -> None:
        codes.append(delivery.message.headers["dead-letter-code"])

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        watch = SubscriptionConfig(f"{topic}.dead", "alarms", dead_letter_topic=DROP)
        async with bus.subscribe(watch, alarm), bus.subscribe(SubscriptionConfig(topic, "g"), never):
            await bus.publish(Message(topic, expires_at=in_hours(-1)))
            await until(lambda: codes == ["expired"])


# --- the server


async def test_the_ttl_of_a_delayed_message_counts_from_when_it_is_due(
    harness: Harness, topic: str, wall_clock: WallClock
) -> None:
    options = PublishOptions(topic_ttl=HOUR)
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        before = wall_clock.now()
        await bus.publish_later(Message(topic, key="delay"), options, delay=2 * HOUR)
        await bus.publish_later(Message(topic, key="at"), options, at=in_hours(2))
        await bus.publish_later(Message(topic, key="past"), options, at=in_hours(-2))
        after = wall_clock.now()
        waiting = {one.message.key: one.message async for one in bus.scheduled(topic) if one.message is not None}
    waiting |= {m.key: m for _, m, _ in await harness.entries(topic) if m is not None}
    for key, hours in (("delay", 3), ("at", 3), ("past", 1)):
        expires_at = waiting[key].expires_at
        assert expires_at is not None
        assert before + timedelta(hours=hours, seconds=-1) <= expires_at <= after + timedelta(hours=hours, seconds=1)


async def test_no_key_ever_expires(server: RunningServer, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        raise Retry("again", delay=0 if delivery.state.attempt == 1 else 60)

    async with anybus.connect(server.url, quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", max_retry=5)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic), PublishOptions(topic_ttl=HOUR))
            await bus.publish(Message(topic, expires_at=in_hours(-1)))
            await until(lambda: subscription.statistics().retried == 2 and subscription.statistics().expired == 1)
    with server.client() as client:
        keys = [key for key in client.keys("*") if topic in (key.decode() if isinstance(key, bytes) else key)]
        assert len(keys) >= 3
        assert {client.pttl(key) for key in keys} == {-1}


def test_all_wall_time_comes_from_one_function() -> None:
    reading = re.compile(r"datetime\.(now|utcnow|today)\(|\btime\.time\(")
    readers = {
        str(path.relative_to(SOURCES)): line.strip()
        for path in SOURCES.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if reading.search(line) and "refuse(" not in line  # an error text says how an application may make a time
    }
    assert readers == {"_ground/clock.py": "return datetime.now(timezone.utc)"}
