"""Deduplication on publish: of several publishes to a topic with one key, only the first appends its message.

Specification (docs/deduplication.md): ``PublishOptions(idempotency_key=..., deduplication_window=120)``. A publish with
a key that was published to the same topic within its window appends nothing, and returns the first one's id as a
``Duplicate``; looking, appending and keeping the key are one step, whoever publishes at the same time. The window
begins with the publish that appends, is that publish's own, and is not prolonged. In a batch each message has its own
key, and the order within a topic holds for those with and without one. A message that is put off keeps its key, too;
its first id is its schedule id, and cancelling frees the key. Only what an application publishes with the option is
deduplicated: never a message that merely has a key, nor retries, dead letters, replays, and what is due. What is
refused is refused before anything is stored.

(What a server adds: ``test_redis_deduplication.py``. Killed processes: ``test_deduplication_kill.py``.)
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import pytest
import trio.testing
from harness import QUICK, SOON, Harness, Recorder, StepByStep, new_topic, nothing_pending, quick, uids, until
from refusal import refused

import anybus
from anybus import (
    BatchOutcome,
    Delivery,
    Duplicate,
    MemoryBackend,
    Message,
    PublishOptions,
    Reject,
    Retry,
    SerializationError,
    StreamBus,
    SubscriptionConfig,
    UnsupportedError,
    ValidationError,
)
from anybus.abc import PublishSpec

ONCE = PublishOptions(idempotency_key="order-1")
OWN_KEYS = PublishOptions(deduplication_window=120)
LONG = PublishSpec(idempotency_key="order-1", deduplication_window=3600)
WEEK = 7 * 24 * 3600


@pytest.fixture
async def bus(harness: Harness) -> AsyncGenerator[StreamBus, None]:
    async with StreamBus(harness.make_backend(), quick()) as made:
        yield made


def untyped(value: object) -> Any:
    return value


# --- one message


async def test_the_second_publish_with_a_key_appends_nothing_and_returns_the_firsts_id(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    first = await bus.publish(Message(topic, b"1"), ONCE)
    second = await bus.publish(Message(topic, b"2"), ONCE)
    ((entry_id, stored, _),) = await harness.entries(topic)
    assert stored is not None
    assert (entry_id, stored.payload) == (first, b"1")
    assert second == first
    assert isinstance(second, Duplicate)
    assert not isinstance(first, Duplicate)


async def test_what_is_stored_has_the_key(bus: StreamBus, harness: Harness, topic: str) -> None:
    await bus.publish(Message(topic), ONCE)
    ((_, stored, _),) = await harness.entries(topic)
    assert stored is not None
    assert stored.idempotency_key == "order-1"


async def test_another_key_and_another_topic_are_something_else(bus: StreamBus, harness: Harness, topic: str) -> None:
    other = new_topic()
    published = [
        await bus.publish(Message(topic), ONCE),
        await bus.publish(Message(topic), PublishOptions(idempotency_key="order-2")),
        await bus.publish(Message(topic)),
        await bus.publish(Message(other), ONCE),
    ]
    assert not any(isinstance(entry_id, Duplicate) for entry_id in published)
    assert len(await harness.entries(topic)) == 3
    assert len(await harness.entries(other)) == 1


@pytest.mark.parametrize(
    "keys",
    [
        ("k" * 256, "k" * 255 + "x"),
        ("é" * 128, "é" * 127 + "e"),
        ("a b\nc\0\t", "a b\nc"),
        ("=k", "k"),
        ("@" + "0" * 16, "0" * 16),
        ("#", "=#"),
        ("0", "00"),
        (" k", "k"),
    ],
    ids=["256 bytes", "two bytes each", "control characters", "equals sign", "at sign", "hash sign", "zeros", "space"],
)
async def test_any_two_keys_are_told_apart(keys: tuple[str, str], bus: StreamBus, harness: Harness, topic: str) -> None:
    for _ in range(2):
        for key in keys:
            await bus.publish(Message(topic), PublishOptions(idempotency_key=key))
    stored = [message.idempotency_key for _, message, _ in await harness.entries(topic) if message is not None]
    assert stored == list(keys)


async def test_of_many_that_publish_at_the_same_time_exactly_one_appends(harness: Harness, topic: str) -> None:
    got: list[str] = []
    async with (
        StreamBus(harness.make_backend(), quick()) as one,
        StreamBus(harness.make_backend(), quick()) as other,
        anyio.create_task_group() as tasks,
    ):

        async def publish(bus: StreamBus) -> None:
            got.append(await bus.publish(Message(topic), ONCE))

        for _ in range(20):
            tasks.start_soon(publish, one)
            tasks.start_soon(publish, other)
    ((entry_id, _, _),) = await harness.entries(topic)
    assert got == [entry_id] * 40
    assert [isinstance(one, Duplicate) for one in got].count(False) == 1


async def test_the_window_is_that_of_the_first_publish_and_repeats_do_not_prolong_it(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    short = PublishOptions(idempotency_key="order-1", deduplication_window=0.3)
    long = PublishOptions(idempotency_key="order-1", deduplication_window=WEEK)
    first = await bus.publish(Message(topic), short)
    last: str = Duplicate(first)
    with anyio.fail_after(SOON):
        while isinstance(last, Duplicate):
            assert last == first
            last = await bus.publish(Message(topic), long)
            await anyio.sleep(0.01)
    assert [entry_id for entry_id, _, _ in await harness.entries(topic)] == [first, last]
    assert await bus.publish(Message(topic), short) == last


async def test_a_key_without_the_option_is_data(bus: StreamBus, harness: Harness, topic: str) -> None:
    same = Message(topic, idempotency_key="order-1")
    await bus.publish(same)
    await bus.publish(same, PublishOptions(metadata={"tenant": "acme"}))
    outcome = await bus.publish_batch([same, same])
    assert outcome.duplicates == ()
    assert len(await harness.entries(topic)) == 4
    assert not isinstance(await bus.publish(same, OWN_KEYS), Duplicate)  # the others have left no trace


async def test_a_window_alone_takes_the_messages_own_key(bus: StreamBus, harness: Harness, topic: str) -> None:
    for _ in range(2):
        await bus.publish(Message(topic, idempotency_key="order-1"), OWN_KEYS)
        await bus.publish(Message(topic, headers={"idempotency-key": "order-2"}), OWN_KEYS)
        await bus.publish(Message(topic), OWN_KEYS)
        await bus.publish(Message(topic, idempotency_key=""), OWN_KEYS)
    stored = [message.idempotency_key for _, message, _ in await harness.entries(topic) if message is not None]
    assert stored == ["order-1", "order-2", None, "", None, ""]
    # By the option or by the message: it is the same key.
    assert isinstance(await bus.publish(Message(topic), ONCE), Duplicate)
    assert isinstance(await bus.publish(Message(topic, idempotency_key="order-1"), ONCE), Duplicate)


async def test_the_first_id_is_returned_although_its_entry_is_gone(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    first = await bus.publish(Message(topic), ONCE)
    await harness.delete_entry(topic, first)
    assert await bus.publish(Message(topic), ONCE) == Duplicate(first)
    assert await harness.entries(topic) == []


async def test_the_observer_hears_of_what_is_appended_only(harness: Harness, topic: str) -> None:
    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        first = await bus.publish(Message(topic), ONCE)
        await bus.publish(Message(topic), ONCE)
        await bus.publish_batch([Message(topic, idempotency_key="order-1")], OWN_KEYS)
    assert [event.message_id for event in recorder.of("on_published")] == [first]
    assert recorder.of("on_error") == []


async def test_through_a_wrapper_it_works_as_well(harness: Harness, topic: str) -> None:
    async with StreamBus(StepByStep(harness.make_backend()), quick()) as bus:
        first = await bus.publish(Message(topic), ONCE)
        assert isinstance(await bus.publish(Message(topic), ONCE), Duplicate)
        outcome = await bus.publish_batch([Message(topic, idempotency_key="order-1")], OWN_KEYS)
    assert outcome.duplicates == (first,)


# --- a batch


async def test_a_batch_takes_each_messages_own_key(bus: StreamBus, harness: Harness, topic: str) -> None:
    known = await bus.publish(Message(topic), ONCE)
    keys = ["order-1", "order-2", None, "order-2", "order-3", None]
    messages = [Message(topic, idempotency_key=key) for key in keys]
    outcome = await bus.publish_batch(messages, OWN_KEYS)
    ids = [entry_id for entry_id, _, _ in await harness.entries(topic)]
    second, third, fifth, sixth = ids[1:]
    assert outcome.results == (known, second, third, second, fifth, sixth)
    assert [isinstance(result, Duplicate) for result in outcome.results] == [True, False, False, True, False, False]
    assert outcome.duplicates == (known, second)
    assert (outcome.all_ok, outcome.ok_count, outcome.errors) == (True, 6, ())
    outcome.raise_for_errors()
    again = await bus.publish_batch([message for message in messages if message.idempotency_key], OWN_KEYS)
    assert again.results == again.duplicates == (known, second, second, fifth)


async def test_a_batch_keeps_the_order_of_each_topic_whatever_has_a_key(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    plain, other = new_topic(), new_topic()
    streams = [topic, plain, other]
    messages = [
        Message(
            streams[number % 3],
            str(number).encode(),
            idempotency_key=None if number % 3 == 1 or number % 4 == 0 else f"order-{number}",
        )
        for number in range(3 * 600)  # more than go into one call
    ]
    outcome = await bus.publish_batch(messages, OWN_KEYS)
    assert outcome.all_ok
    for stream in streams:
        entries = await harness.entries(stream)
        assert uids(entries) == [message.uid for message in messages if message.topic == stream]
        expected = [
            result for message, result in zip(messages, outcome.results, strict=True) if message.topic == stream
        ]
        assert [entry_id for entry_id, _, _ in entries] == expected


async def test_large_messages_of_a_batch_keep_their_order(bus: StreamBus, harness: Harness, topic: str) -> None:
    sizes = [10, 700_000, 700_000, 10, 2_000_000, 10]
    messages = [Message(topic, b"x" * size, idempotency_key=f"order-{number}") for number, size in enumerate(sizes)]
    for expected in ((), tuple(messages)):
        outcome = await bus.publish_batch(messages, OWN_KEYS)
        assert outcome.all_ok
        assert len(outcome.duplicates) == len(expected)
    assert uids(await harness.entries(topic)) == [message.uid for message in messages]


async def test_of_a_batch_only_what_is_refused_fails(bus: StreamBus, harness: Harness, topic: str) -> None:
    messages = [
        Message(topic, idempotency_key="order-1"),
        Message(topic, headers={"idempotency-key": " "}),
        Message(topic, b"x" * 5_000_000, idempotency_key="order-2"),
        Message(topic, idempotency_key="order-3"),
    ]
    outcome = await bus.publish_batch(messages, OWN_KEYS)
    assert [type(result) for result in outcome.results] == [str, ValidationError, ValidationError, str]
    assert uids(await harness.entries(topic)) == [messages[0].uid, messages[3].uid]


async def test_a_spec_without_a_key_is_a_plain_publish(harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        first = await backend.publish_with(topic, Message(topic), PublishSpec())
        results = await backend.publish_many([(topic, Message(topic), PublishSpec()), (topic, Message(topic), None)])
    assert [entry_id for entry_id, _, _ in await harness.entries(topic)] == [first, *results]


async def test_one_key_for_several_messages_is_refused_and_nothing_is_stored(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    with refused("idempotency_key", "'order-1'", "each Message its own idempotency_key"):
        await bus.publish_batch([Message(topic), Message(topic)], ONCE)
    assert await harness.entries(topic) == []
    (only,) = (await bus.publish_batch(iter([Message(topic)]), ONCE)).results
    assert (await bus.publish_batch([Message(topic)], ONCE)).duplicates == (only,)
    assert (await bus.publish_batch([], ONCE)).results == ()


# --- later


async def test_what_is_put_off_twice_with_a_key_is_appended_once(harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        first = await backend.publish_later(topic, Message(topic, b"1"), delay=0.05, spec=LONG)
        second = await backend.publish_later(topic, Message(topic, b"2"), delay=0.01, spec=LONG)
        assert isinstance(second, Duplicate)
        assert not isinstance(first, Duplicate)
        assert second == first
        taken: list[Any] = []
        with anyio.fail_after(SOON):
            while not taken:
                taken += await backend.read_new(topic, "g", "c", count=10, timeout=0.2)
        assert [entry.message.payload for entry in taken] == [b"1"]
        # Appended or not, the key's first id is that of the schedule.
        assert await backend.publish_with(topic, Message(topic), LONG) == Duplicate(first)
        assert await backend.publish_later(topic, Message(topic), delay=0, spec=LONG) == Duplicate(first)
        assert await backend.publish_many([(topic, Message(topic), LONG)]) == [Duplicate(first)]
    assert len(await harness.entries(topic)) == 1


async def test_what_was_published_is_not_put_off(harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        first = await backend.publish_with(topic, Message(topic), LONG)
        assert await backend.publish_later(topic, Message(topic), delay=0, spec=LONG) == Duplicate(first)
        assert len(await backend.read_new(topic, "g", "c", count=10, timeout=0)) == 1
    assert len(await harness.entries(topic)) == 1


async def test_the_bus_says_that_a_message_was_put_off_before(bus: StreamBus, harness: Harness, topic: str) -> None:
    first = await bus.publish_later(Message(topic, b"1"), ONCE, delay=3600)
    second = await bus.publish_later(Message(topic, b"2"), ONCE, delay=7200)
    assert (first.duplicate, second.duplicate) == (False, True)
    assert (second.id, second.due) == (first.id, first.due)
    assert [one.id async for one in bus.scheduled(topic)] == [first.id]
    assert await second.cancel()
    third = await bus.publish_later(Message(topic, b"3"), ONCE, delay=3600)
    assert not third.duplicate
    assert await third.cancel()
    assert await harness.entries(topic) == []


async def test_cancelling_frees_the_key(harness: Harness, topic: str) -> None:
    other = PublishSpec(idempotency_key="order-2", deduplication_window=3600)
    async with harness.make_backend() as backend:
        first = await backend.publish_later(topic, Message(topic), delay=3600, spec=LONG)
        kept = await backend.publish_later(topic, Message(topic), delay=3600, spec=other)
        assert await backend.cancel_later(topic, first)
        assert not await backend.cancel_later(topic, first)
        second = await backend.publish_later(topic, Message(topic), delay=3600, spec=LONG)
        assert not isinstance(second, Duplicate)
        assert await backend.cancel_later(topic, second)
        third = await backend.publish_with(topic, Message(topic), LONG)
        assert not isinstance(third, Duplicate)
        assert await backend.publish_with(topic, Message(topic), other) == Duplicate(kept)
    assert len(await harness.entries(topic)) == 1


async def test_cancelling_an_older_one_leaves_the_key_of_a_later_one(harness: Harness, topic: str) -> None:
    """The first one's window is over while it still waits, so that the key was taken again."""
    short = PublishSpec(idempotency_key="order-1", deduplication_window=0.001)
    over = [PublishSpec(idempotency_key=f"early-{number}", deduplication_window=0.001) for number in range(9)]
    async with harness.make_backend() as backend:
        await backend.publish_many(
            [(topic, Message(topic), spec) for spec in over]
        )  # to be removed before the first one
        first = await backend.publish_later(topic, Message(topic), delay=3600, spec=short)
        second: str = Duplicate(first)
        with anyio.fail_after(SOON):
            while isinstance(second, Duplicate):
                await anyio.sleep(0.005)
                second = await backend.publish_later(topic, Message(topic), delay=3600, spec=LONG)
        assert await backend.cancel_later(topic, first)
        assert await backend.publish_with(topic, Message(topic), LONG) == Duplicate(second)
        assert await backend.cancel_later(topic, second)
    assert len(await harness.entries(topic)) == len(over)


# --- what is not deduplicated


async def test_retries_dead_letters_and_replays_are_not_deduplicated(
    bus: StreamBus, harness: Harness, topic: str
) -> None:
    handled: list[int] = []
    is_replayed = False

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.state.attempt)
        assert delivery.message.idempotency_key == "order-1"
        if is_replayed:
            return
        if delivery.state.attempt < 3:
            raise Retry("not yet")
        raise Reject("never")

    config = SubscriptionConfig(topic, "g", group_start_id="0", retry_backoff=QUICK)
    await bus.publish(Message(topic), ONCE)
    async with bus.subscribe(config, handler) as subscription:
        await until(lambda: subscription.statistics().dead_lettered == 1)
        is_replayed = True
        await bus.dead_letters(topic).replay()
        await until(lambda: subscription.statistics().handled == 1)
        await nothing_pending(harness, topic, "g")
    assert handled == [1, 2, 3, 1]
    # The first publish counts, and the replay is an entry of its own.
    assert isinstance(await bus.publish(Message(topic), ONCE), Duplicate)
    assert len(await harness.entries(topic)) == 2


async def test_what_is_due_is_appended_although_its_key_was_published_meanwhile(harness: Harness, topic: str) -> None:
    """Its own window was over; that of the one that came in between is not."""
    short = PublishSpec(idempotency_key="order-1", deduplication_window=0.001)
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        await backend.publish_later(topic, Message(topic, b"late"), delay=0.2, spec=short)
        between: str = Duplicate("")
        with anyio.fail_after(SOON):
            while isinstance(between, Duplicate):
                await anyio.sleep(0.002)
                between = await backend.publish_with(topic, Message(topic, b"between"), LONG)
            taken: list[Any] = []
            while len(taken) < 2:
                taken += await backend.read_new(topic, "g", "c", count=10, timeout=0.2)
    assert sorted(entry.message.payload for entry in taken) == [b"between", b"late"]


# --- what is refused


@pytest.mark.parametrize(
    ("window", "allowed"),
    [
        (WEEK + 0.001, "at most 604800"),
        (0, "positive"),
        (-1, "positive"),
        (math.inf, "at most 604800"),
        (math.nan, "positive"),
        ("120", "a positive number of seconds"),
        (True, "a positive number of seconds"),
        (10**400, "at most 604800"),
    ],
)
def test_a_window_that_cannot_be_is_refused(window: object, allowed: str) -> None:
    with refused("deduplication_window", repr(window)[:30], allowed):
        PublishOptions(deduplication_window=untyped(window))


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("", "not blank"),
        (" \t", "not blank"),
        ("k" * 257, "256 bytes"),
        ("é" * 129, "256 bytes"),
        (1, "a str"),
        (b"k", "a str"),
        ("\ud800", "UTF-8"),
    ],
)
def test_a_key_that_cannot_be_is_refused(key: object, allowed: str) -> None:
    with refused("idempotency_key", repr(key)[:30], allowed):
        PublishOptions(idempotency_key=untyped(key))


def test_the_longest_window_is_a_week() -> None:
    assert PublishOptions(deduplication_window=WEEK).deduplication_window == WEEK


@pytest.mark.parametrize(
    "message",
    [{"idempotency_key": "order-2"}, {"headers": {"idempotency-key": "order-2"}}],
    ids=["field", "header"],
)
async def test_a_key_that_contradicts_the_messages_own_is_refused(
    message: dict[str, Any], bus: StreamBus, harness: Harness, topic: str
) -> None:
    with refused("idempotency_key", "'order-1'", "the message's own ('order-2')"):
        await bus.publish(Message(topic, **message), ONCE)
    (error,) = (await bus.publish_batch([Message(topic, **message)], ONCE)).errors
    assert isinstance(error, ValidationError)
    assert await harness.entries(topic) == []


@pytest.mark.parametrize("options", [ONCE, OWN_KEYS], ids=["key", "window"])
async def test_a_backend_that_cannot_says_so_where_the_option_is_given(options: PublishOptions, topic: str) -> None:
    class Without(MemoryBackend):
        features = MemoryBackend.features - {"dedup"}

    async with StreamBus(Without(), quick()) as bus:
        with pytest.raises(UnsupportedError, match="Without cannot deduplicate"):
            await bus.publish(Message(topic), options)
        with pytest.raises(UnsupportedError, match="Without cannot deduplicate"):
            await bus.publish_batch([Message(topic)], options)
        await bus.publish(Message(topic), PublishOptions(metadata={"tenant": "acme"}))


# --- the values


def test_a_duplicate_is_a_str_that_says_what_it_is() -> None:
    same = Duplicate("1-0")
    assert same == "1-0"
    assert hash(same) == hash("1-0")
    assert repr(same) == "Duplicate('1-0')"
    assert f"{same}" == "1-0"
    for other in (pickle.loads(pickle.dumps(same)), copy.deepcopy(same)):
        assert (other, type(other)) == (same, Duplicate)
    assert anybus.abc.Duplicate is Duplicate


def test_an_outcome_tells_errors_ids_and_duplicates_apart() -> None:
    outcome = BatchOutcome(("1-0", Duplicate("1-0"), SerializationError("no"), Duplicate("2-0")))
    assert outcome.duplicates == ("1-0", "2-0")
    assert (outcome.all_ok, outcome.ok_count, len(outcome.errors)) == (False, 3, 1)


# --- time


@pytest.mark.parametrize("anyio_backend", [("trio", {"clock": trio.testing.MockClock(autojump_threshold=0)})])
async def test_in_memory_a_window_ends_to_the_moment_and_its_key_is_dropped(anyio_backend: object) -> None:
    async with StreamBus(MemoryBackend()) as bus:
        for number in range(1000):
            await bus.publish(Message("t"), PublishOptions(idempotency_key=f"early-{number}"))
        await bus.publish(Message("t"), ONCE)
        await anyio.sleep(119.999)
        assert isinstance(await bus.publish(Message("t"), ONCE), Duplicate)
        await anyio.sleep(0.001)
        assert not isinstance(await bus.publish(Message("t"), ONCE), Duplicate)
        backend = bus.backend
        assert isinstance(backend, MemoryBackend)
        assert len(backend._records("t")) == 1
