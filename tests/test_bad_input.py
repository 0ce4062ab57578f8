"""Bad input is refused at the door.

Specification (DESIGN.md, sections 3 and 5): every option is validated when it is made, and every call before it sends
anything, with an error that names the field, the value and what is allowed. Topics: not blank, at most 1,024 bytes of
UTF-8, no control characters, not beginning with ``anybus:``. Groups and consumers: not blank, at most 256 bytes.
Nothing is lost by a refusal: what was refused is not stored, and what stood beside it is. A delivery is settled once;
a bus is used between its beginning and its end.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from harness import SOON, Harness, new_topic, quick, uids, until
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused

from anybus import (
    DROP,
    AlreadySettledError,
    ClosedError,
    Delivery,
    EventBusError,
    MemoryBackend,
    Message,
    Observer,
    PublishOptions,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
    ValidationError,
    connect,
)

POSITIVE_DURATIONS = (
    "block_timeout",
    "claim_idle_timeout",
    "reclaim_interval",
    "publish_timeout",
    "cleanup_timeout",
)
DURATIONS_FROM_ZERO = ("ack_flush_interval", "close_timeout")
SIZES = {"claim_scan_batch_size": 1, "ack_batch_size": 1, "max_payload_bytes": 0}
COUNTS = {"max_in_flight": 1, "max_pending_acks": 1, "max_retry": 0, "max_deliveries": 4}
NO_NUMBERS = (-1, -0.001, math.nan, math.inf, -math.inf, True, False, "1", "1s", b"1", [1], 1j)


def untyped(value: object) -> Any:
    """A value whose type the checkers shall not look at: it is wrong on purpose."""
    return value


def kind(value: object) -> str:
    """For the names of test cases: a ``repr`` may differ from run to run."""
    return value.__name__ if isinstance(value, type) else type(value).__name__


async def handler(delivery: Delivery) -> None:
    """A handler that accepts everything."""


# --- topics

TOPIC_REFUSALS: dict[str, tuple[Any, str]] = {
    "empty": ("", "not blank"),
    "blank": ("  ", "not blank"),
    "tab": ("\t", "not blank"),
    "1025 bytes": ("t" * 1025, "1024 bytes"),
    "513 characters of two bytes": ("é" * 513, "1024 bytes"),
    "NUL": ("a\0b", "control characters"),
    "line break": ("a\nb", "control characters"),
    "delete": ("a\x7fb", "control characters"),
    "C1 control": ("a\x85b", "control characters"),
    "reserved": ("anybus:orders", "does not begin with 'anybus:'"),
    "reserved alone": ("anybus:", "does not begin with 'anybus:'"),
    "lone surrogate": ("a\ud800", "UTF-8"),
    "None": (None, "a str"),
    "bytes": (b"orders", "a str"),
    "int": (5, "a str"),
}
bad_topics = pytest.mark.parametrize(("value", "allowed"), TOPIC_REFUSALS.values(), ids=TOPIC_REFUSALS.keys())


@bad_topics
def test_a_message_to_a_bad_topic_is_refused(value: Any, allowed: str) -> None:
    with refused("topic", repr(value), allowed):
        Message(value)


@bad_topics
def test_a_subscription_to_a_bad_topic_is_refused(value: Any, allowed: str) -> None:
    with refused("topic", repr(value), allowed):
        SubscriptionConfig(value, "g")


@pytest.mark.parametrize(
    ("value", "allowed"), [pair for name, pair in TOPIC_REFUSALS.items() if name != "None"], ids=lambda value: ""
)
def test_a_bad_dead_letter_topic_is_refused(value: Any, allowed: str) -> None:
    with refused("dead_letter_topic", repr(value), allowed):
        SubscriptionConfig("t", "g", dead_letter_topic=value)


@pytest.mark.parametrize(
    "value",
    ["t" * 1024, "é" * 512, "a b", "Anybus:x", "x.anybus:", "anybus", "{tag}", "emoji 😀", "a\u200bb", ".dead."],
    ids=lambda value: value[:12],
)
def test_every_other_topic_is_accepted(value: str) -> None:
    assert Message(value).topic == value
    assert SubscriptionConfig(value, "g", dead_letter_topic=DROP).topic == value


@given(st.text() | st.text(st.sampled_from("anybus:\n\0 é"), max_size=8))
def test_a_topic_is_accepted_exactly_if_the_rules_allow_it(text: str) -> None:
    encodable = not any(0xD800 <= ord(character) <= 0xDFFF for character in text)
    allowed = (
        encodable
        and bool(text.strip())
        and len(text.encode()) <= 1024
        and not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in text)
        and not text.startswith("anybus:")
    )
    try:
        Message(text)
    except ValidationError:
        assert not allowed
    else:
        assert allowed


def test_a_topic_too_long_for_its_default_dead_letter_topic_needs_one_of_its_own() -> None:
    with refused("dead_letter_topic", "'tttt", "1024 bytes"):
        SubscriptionConfig("t" * 1020, "g")
    assert SubscriptionConfig("t" * 1020, "g", dead_letter_topic="dead").topic == "t" * 1020


# --- groups and consumers

NAME_REFUSALS: dict[str, tuple[Any, str]] = {
    "empty": ("", "not blank"),
    "blank": (" \t", "not blank"),
    "lone surrogate": ("\ud800", "UTF-8"),
    "None": (None, "a str"),
    "int": (5, "a str"),
}


@pytest.mark.parametrize(("value", "allowed"), NAME_REFUSALS.values(), ids=NAME_REFUSALS.keys())
def test_a_bad_group_is_refused(value: Any, allowed: str) -> None:
    with refused("group", repr(value), allowed):
        SubscriptionConfig("t", value)


@pytest.mark.parametrize(("value", "allowed"), NAME_REFUSALS.values(), ids=NAME_REFUSALS.keys())
def test_a_bad_consumer_is_refused(value: Any, allowed: str) -> None:
    with refused("consumer", repr(value), allowed):
        SubscriptionConfig("t", "g", consumer=value)


def test_a_group_holds_256_bytes_and_no_more() -> None:
    assert SubscriptionConfig("t", "é" * 128).group == "é" * 128
    with refused("group", "'éé", "256 bytes"):
        SubscriptionConfig("t", "é" * 128 + "x")


async def test_a_consumers_name_on_the_server_holds_256_bytes_and_no_more(harness: Harness, topic: str) -> None:
    longest = 239
    with refused("consumer", "'ccc", f"{longest} bytes"):
        SubscriptionConfig(topic, "g", consumer="c" * (longest + 1))
    config = SubscriptionConfig(topic, "g", consumer="c" * longest)
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(config, handler) as subscription:
            assert len(subscription.consumer.encode()) == 256
            assert subscription.consumer.startswith(f"{'c' * longest}-")


# --- numbers of the bus's options


@pytest.mark.parametrize("field", [*POSITIVE_DURATIONS, *DURATIONS_FROM_ZERO])
@pytest.mark.parametrize("value", [*NO_NUMBERS, None], ids=repr)
def test_a_duration_that_is_none_is_refused(field: str, value: Any) -> None:
    with refused(field, repr(value), "number of seconds"):
        StreamBusOptions(**{field: value})


@pytest.mark.parametrize("field", POSITIVE_DURATIONS)
def test_a_duration_of_zero_is_refused_where_it_makes_no_sense(field: str) -> None:
    with refused(field, "0", "a positive number"):
        StreamBusOptions(**untyped({field: 0}))


@pytest.mark.parametrize("field", DURATIONS_FROM_ZERO)
def test_a_duration_of_zero_is_accepted_where_it_makes_sense(field: str) -> None:
    assert getattr(StreamBusOptions(**untyped({field: 0})), field) == 0


@pytest.mark.parametrize("field", [*POSITIVE_DURATIONS, *DURATIONS_FROM_ZERO])
def test_an_int_too_large_for_a_float_is_refused_like_any_other_bad_duration(field: str) -> None:
    with refused(field, "1000000", "number of seconds"):
        StreamBusOptions(**untyped({field: 10**400}))


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [1.0, 1.5, math.nan, True, "1", None], ids=repr)
def test_a_size_that_is_no_int_is_refused(field: str, value: Any) -> None:
    with refused(field, repr(value), "an int"):
        StreamBusOptions(**{field: value})


@pytest.mark.parametrize(("field", "least"), SIZES.items())
def test_a_size_below_its_least_is_refused(field: str, least: int) -> None:
    with refused(field, repr(least - 1), f"at least {least}"):
        StreamBusOptions(**untyped({field: least - 1}))
    assert getattr(StreamBusOptions(**untyped({field: least})), field) == least


def test_an_int_that_python_will_not_print_is_refused_like_any_other() -> None:
    with pytest.raises(ValidationError, match="ack_batch_size"):
        StreamBusOptions(ack_batch_size=-(10**5000))


@pytest.mark.parametrize("value", ["", " ", 0, None, b"0"], ids=repr)
def test_a_bad_start_id_is_refused(value: Any) -> None:
    with refused("group_start_id", repr(value), "str" if not isinstance(value, str) else "not blank"):
        StreamBusOptions(group_start_id=value)
    if value is not None:
        with refused("group_start_id", repr(value), "str" if not isinstance(value, str) else "not blank"):
            SubscriptionConfig("t", "g", group_start_id=value)


async def test_a_start_id_that_means_nothing_to_the_backend_fails_loudly_when_subscribing(
    harness: Harness, topic: str
) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with refused("start_id", "'latest'", "'$', '0' or an entry's id"):
            async with bus.subscribe(SubscriptionConfig(topic, "g", group_start_id="latest"), handler):
                raise AssertionError("the body must not run")


@pytest.mark.parametrize("value", [Observer, object(), "print", print], ids=kind)
def test_an_observer_that_is_none_is_refused(value: Any) -> None:
    with refused("observer", repr(value), "anybus.Observer"):
        StreamBusOptions(observer=value)


# --- numbers of a subscription


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [5.0, 4.5, math.inf, True, "5"], ids=repr)
def test_a_count_that_is_no_int_is_refused(field: str, value: Any) -> None:
    with refused(field, repr(value), "an int"):
        SubscriptionConfig("t", "g", **{field: value})


@pytest.mark.parametrize(("field", "least"), COUNTS.items())
def test_a_count_below_its_least_is_refused(field: str, least: int) -> None:
    others = {"max_in_flight": 1} if field == "max_pending_acks" else {}
    with refused(field, repr(least - 1), f"at least {least}"):
        SubscriptionConfig("t", "g", **untyped({**others, field: least - 1}))
    assert getattr(SubscriptionConfig("t", "g", **untyped({**others, field: least})), field) == least


def test_fewer_pending_acks_than_handlers_in_flight_are_refused() -> None:
    with refused("max_pending_acks", "7", "at least max_in_flight (8)"):
        SubscriptionConfig("t", "g", max_in_flight=8, max_pending_acks=7)
    assert SubscriptionConfig("t", "g", max_in_flight=8, max_pending_acks=8).max_pending_acks == 8


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0], ids=repr)
def test_a_handler_timeout_that_is_no_duration_is_refused(value: Any) -> None:
    with refused("handler_timeout", repr(value), "a positive number of seconds"):
        SubscriptionConfig("t", "g", handler_timeout=value)


@pytest.mark.parametrize("value", ["auto", "AUTO-ON-RECEIVE", "", 0, True, ["manual"]], ids=repr)
def test_an_unknown_ack_mode_is_refused(value: Any) -> None:
    with refused("ack_mode", repr(value), "one of auto-on-handler-success, manual, auto-on-receive"):
        SubscriptionConfig("t", "g", ack_mode=value)


@pytest.mark.parametrize("value", ["stop", None, True], ids=repr)
def test_an_unknown_on_lease_lost_is_refused(value: Any) -> None:
    with refused("on_lease_lost", repr(value), "'continue' or 'cancel'"):
        SubscriptionConfig("t", "g", on_lease_lost=value)


@pytest.mark.parametrize("value", [None, "1", {"initial": 1}, int], ids=kind)
def test_a_retry_backoff_that_is_none_is_refused(value: Any) -> None:
    with refused("retry_backoff", repr(value), "anybus.ExponentialBackoff"):
        SubscriptionConfig("t", "g", retry_backoff=value)


def test_a_subscription_cannot_dead_letter_to_its_own_topic() -> None:
    with refused("dead_letter_topic", "'orders'", "a topic other than"):
        SubscriptionConfig("orders", "g", dead_letter_topic="orders")


@pytest.mark.parametrize("options", [StreamBusOptions(), SubscriptionConfig("t", "g"), PublishOptions()], ids=kind)
def test_options_cannot_be_changed_after_they_were_checked(options: Any) -> None:
    for field in options.__dataclass_fields__:
        with pytest.raises(AttributeError):
            setattr(options, field, -1)


def test_everything_after_topic_and_group_is_by_keyword() -> None:
    positional: list[Any] = ["t", "g", "consumer"]
    with pytest.raises(TypeError):
        SubscriptionConfig(*positional)


# --- publish options


@pytest.mark.parametrize("value", [None, "a=1", [("a", "1")], 5], ids=repr)
def test_metadata_that_is_no_mapping_is_refused(value: Any) -> None:
    with refused("metadata", repr(value), "a mapping"):
        PublishOptions(metadata=value)


def test_metadata_that_is_no_text_is_refused() -> None:
    value: Any = {"a": 1}
    with refused("'a'", "1", "a str"):
        PublishOptions(metadata=value)


# --- what a bus is made of


@pytest.mark.parametrize("value", [None, MemoryBackend, "memory://", object()], ids=kind)
def test_a_bus_on_what_is_no_backend_is_refused(value: Any) -> None:
    with refused("backend", repr(value), "anybus.abc.StreamBackend"):
        StreamBus(value)


@pytest.mark.parametrize("value", [{}, {"block_timeout": 1}, PublishOptions(), 5, "fast"], ids=kind)
def test_options_of_another_type_are_refused(value: Any) -> None:
    with refused("options", repr(value), "anybus.StreamBusOptions"):
        StreamBus(MemoryBackend(), value)
    with refused("options", repr(value), "anybus.StreamBusOptions"):
        connect("memory://", value)


@pytest.mark.parametrize("value", [None, b"memory://", 5, MemoryBackend], ids=kind)
def test_a_url_that_is_no_text_is_refused(value: Any) -> None:
    with refused("url", repr(value), "'memory://<name>'"):
        connect(value)


@pytest.mark.parametrize("url", ["", "memory", "memory:", "memory:name", "memory:/name", "localhost", "localhost:6379"])
def test_a_url_without_a_scheme_is_refused(url: str) -> None:
    with refused("url", "a text without '://'", "'memory://<name>'"):
        connect(url)


@pytest.mark.parametrize("scheme", ["http", "kafka", "", "MEMORY", "memory+tls", " memory", "redis+other"])
def test_a_url_of_an_unknown_scheme_is_refused(scheme: str) -> None:
    with refused("url", f"'{scheme}://", "'memory://<name>'"):
        connect(f"{scheme}://localhost")


@pytest.mark.parametrize(
    "url",
    [
        *("http://user:hunter2@host", "user:hunter2@host", "REDIS://user:hunter2@host", "memory://user:hunter2@host"),
        *("redis://user:hunter2@[", "redis://user:hunter2@host:port", "redis://user:hunter2@host?nonsense=1"),
    ],
)
def test_a_refusal_never_repeats_a_password(url: str) -> None:
    with pytest.raises(ValidationError, match="url") as caught:
        connect(url)
    told: BaseException | None = caught.value
    while told is not None:
        assert "hunter2" not in str(told)
        told = told.__cause__ or told.__context__


@pytest.mark.parametrize(
    "url",
    [
        *("memory:///", "memory://a/b", "memory://a?b=1", "memory://?b=1", "memory://a#b"),
        *("memory://user@a", "memory://u:p@a", "memory://a:6379"),
        *("memory://[", "memory://[a", "memory://]"),
    ],
)
def test_a_malformed_memory_url_is_refused(url: str) -> None:
    # What stands before an @ may be a password, and is not shown.
    with refused("url", repr("memory://…" if "@" in url else url), "memory://"):
        connect(url)


# --- handlers


def plain(delivery: Delivery) -> None: ...


async def generator(delivery: Delivery) -> AsyncIterator[None]:
    yield


class Plain:
    def __call__(self, delivery: Delivery) -> None: ...


class Async:
    async def __call__(self, delivery: Delivery) -> None: ...


class InThread:
    """Wraps a blocking function, and keeps it under the same name as functools.partial does."""

    def __init__(self, func: Callable[[Delivery], None]) -> None:
        self.func = func

    async def __call__(self, delivery: Delivery) -> None:
        self.func(delivery)


class Methods:
    async def handle(self, delivery: Delivery) -> None: ...

    @staticmethod
    async def static(delivery: Delivery) -> None: ...

    @classmethod
    async def of_class(cls, delivery: Delivery) -> None: ...


async def with_more(more: int, delivery: Delivery) -> None: ...


BAD_HANDLERS: dict[str, Any] = {
    "None": None,
    "text": "handler",
    "plain def": plain,
    "lambda": lambda delivery: None,  # pyright: ignore[reportUnknownLambdaType]
    "partial of a plain def": functools.partial(plain),
    "object with a plain __call__": Plain(),
    "class with a plain __call__": Plain,
    "class with an async __call__, not an instance": Async,
    "partial of such a class": functools.partial(Async),
    "async generator": generator,
    "builtin": print,
    "coroutine's type": Awaitable,
}
GOOD_HANDLERS: dict[str, Any] = {
    "async def": handler,
    "partial of async def": functools.partial(with_more, 5),
    "partial of a partial": functools.partial(functools.partial(with_more), 5),
    "object with an async __call__": Async(),
    "partial of such an object": functools.partial(Async()),
    "bound method": Methods().handle,
    "static method": Methods.static,
    "class method": Methods.of_class,
    "object with an async __call__ and a plain func": InThread(plain),
}


@pytest.mark.parametrize("value", BAD_HANDLERS.values(), ids=BAD_HANDLERS.keys())
async def test_a_handler_that_is_not_async_is_refused_before_anything_is_made(
    value: Any, harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    async with StreamBus(backend, quick()) as bus:
        with refused("handler", repr(value), "an async function"):
            bus.subscribe(SubscriptionConfig(topic, "g"), value)
        with refused("handler", repr(value), "an async function"):
            await bus.consume(SubscriptionConfig(topic, "g"), value)
        assert await backend.create_group(topic, "g"), "a refusal has made a group"


@pytest.mark.parametrize("value", GOOD_HANDLERS.values(), ids=GOOD_HANDLERS.keys())
async def test_every_handler_that_is_async_is_accepted_and_called(value: Any, harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), value) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
            assert subscription.statistics().failed == 0


# --- calls with values of another type


@pytest.mark.parametrize("value", [None, "topic", b"payload", {"topic": "t"}, Message], ids=kind)
async def test_publishing_what_is_no_message_is_refused(value: Any, harness: Harness) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with refused("message", repr(value), "anybus.Message"):
            await bus.publish(value)
        outcome = await bus.publish_batch([value])
        assert [type(error) for error in outcome.errors] == [ValidationError]


@pytest.mark.parametrize("value", [{}, {"metadata": {}}, StreamBusOptions(), "fast"], ids=kind)
async def test_publish_options_of_another_type_are_refused(value: Any, harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with refused("options", repr(value), "anybus.PublishOptions"):
            await bus.publish(Message(topic), value)
        with refused("options", repr(value), "anybus.PublishOptions"):
            await bus.publish_batch([Message(topic)], value)
        assert await harness.entries(topic) == []


@pytest.mark.parametrize("value", [None, 5, Message("t")], ids=kind)
async def test_a_batch_that_is_no_collection_of_messages_is_refused(value: Any, harness: Harness) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with refused("messages", repr(value), "messages"):
            await bus.publish_batch(value)


@pytest.mark.parametrize("value", [None, "topic", {"topic": "t"}, StreamBusOptions(), SubscriptionConfig], ids=kind)
async def test_a_config_of_another_type_is_refused(value: Any, harness: Harness) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with refused("config", repr(value), "anybus.SubscriptionConfig"):
            bus.subscribe(value, handler)
        with refused("config", repr(value), "anybus.SubscriptionConfig"):
            bus.deliveries(value)


# --- payloads over the limit


async def test_a_payload_over_the_limit_is_refused_and_not_stored(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), StreamBusOptions(max_payload_bytes=10)) as bus:
        with refused("payload", "11", "at most 10 bytes (max_payload_bytes)"):
            await bus.publish(Message(topic, b"x" * 11))
        assert await harness.entries(topic) == []
        await bus.publish(Message(topic, b"x" * 10))
        assert len(await harness.entries(topic)) == 1


async def test_the_default_limit_is_4_mib(harness: Harness, topic: str) -> None:
    limit = 4 * 1024 * 1024
    async with StreamBus(harness.make_backend()) as bus:
        with refused("payload", str(limit + 1), str(limit)):
            await bus.publish(Message(topic, bytes(limit + 1)))
        await bus.publish(Message(topic, bytes(limit)))
        assert len(await harness.entries(topic)) == 1


async def test_a_limit_of_zero_is_no_limit(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), StreamBusOptions(max_payload_bytes=0)) as bus:
        await bus.publish(Message(topic, bytes(5 * 1024 * 1024)))
        assert len(await harness.entries(topic)) == 1


async def test_one_bad_message_of_a_batch_does_not_hold_up_the_others(harness: Harness, topic: str) -> None:
    messages: list[Any] = [
        Message(topic, b"first"),
        Message(topic, b"x" * 11),
        Message(topic, b"second"),
        "no message",
        Message(topic, b"third"),
    ]
    async with StreamBus(harness.make_backend(), StreamBusOptions(max_payload_bytes=10)) as bus:
        outcome = await bus.publish_batch(messages)
    stored = await harness.entries(topic)
    assert uids(stored) == [messages[index].uid for index in (0, 2, 4)]
    assert [outcome.results[index] for index in (0, 2, 4)] == [entry_id for entry_id, _, _ in stored]
    assert [type(outcome.results[index]) for index in (1, 3)] == [ValidationError, ValidationError]
    assert "max_payload_bytes" in str(outcome.results[1])
    assert "anybus.Message" in str(outcome.results[3])
    assert (outcome.all_ok, outcome.ok_count, len(outcome.errors)) == (False, 3, 2)
    with pytest.raises(EventBusError, match="2 of 5 messages"):
        outcome.raise_for_errors()


async def test_a_batch_of_one_bad_message_raises_that_very_error_if_asked_to(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), StreamBusOptions(max_payload_bytes=10)) as bus:
        outcome = await bus.publish_batch([Message(topic, b"x" * 11)])
    with refused("payload", "11", "max_payload_bytes"):
        outcome.raise_for_errors()


async def test_a_batch_of_bad_messages_says_that_nothing_can_have_happened(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), StreamBusOptions(max_payload_bytes=1)) as bus:
        outcome = await bus.publish_batch([Message(topic, b"12"), Message(topic, b"34")])
    with pytest.raises(EventBusError) as caught:
        outcome.raise_for_errors()
    assert getattr(caught.value, "may_have_happened", False) is False


async def test_an_empty_batch_is_all_ok(harness: Harness) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        outcome = await bus.publish_batch([])
    assert (outcome.results, outcome.all_ok, outcome.ok_count, outcome.errors) == ((), True, 0, ())
    outcome.raise_for_errors()


# --- deliveries()


@pytest.mark.parametrize("mode", ["auto-on-handler-success", "auto-on-receive"])
async def test_deliveries_refuse_another_ack_mode(mode: Any, harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with refused("ack_mode", repr(mode), "'manual' or unset"):
            bus.deliveries(SubscriptionConfig(topic, "g", ack_mode=mode))


async def test_deliveries_refuse_what_needs_a_handler(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with refused("handler_timeout", "5", "unset"):
            bus.deliveries(SubscriptionConfig(topic, "g", handler_timeout=5))
        with refused("on_lease_lost", "'cancel'", "'continue'"):
            bus.deliveries(SubscriptionConfig(topic, "g", on_lease_lost="cancel"))


@pytest.mark.parametrize("mode", [None, "manual"])
async def test_deliveries_accept_manual_mode_and_an_unset_one(mode: Any, harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g", ack_mode=mode)) as deliveries:
            await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                await (await deliveries.receive()).ack()


# --- dead-letter topics


async def test_a_subscription_on_a_dead_letter_topic_by_name_must_say_where_its_own_go(
    harness: Harness, topic: str
) -> None:
    dead = f"{topic}.dead"
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with refused("dead_letter_topic", "None", "anybus.DROP"):
            bus.subscribe(SubscriptionConfig(dead, "g"), handler)
        with refused("dead_letter_topic", "None", "anybus.DROP"):
            bus.deliveries(SubscriptionConfig(dead, "g"))
        async with bus.subscribe(SubscriptionConfig(dead, "a", dead_letter_topic=DROP), handler):
            async with bus.subscribe(SubscriptionConfig(dead, "b", dead_letter_topic="elsewhere"), handler):
                pass


async def test_a_subscription_on_a_topic_that_this_bus_dead_letters_to_must_say_so_too(
    harness: Harness, topic: str
) -> None:
    morgue = new_topic()
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", dead_letter_topic=morgue), handler):
            with refused("dead_letter_topic", "None", "anybus.DROP"):
                bus.subscribe(SubscriptionConfig(morgue, "g"), handler)
            async with bus.subscribe(SubscriptionConfig(morgue, "g", dead_letter_topic=DROP), handler):
                pass
        with refused("dead_letter_topic", "None", "anybus.DROP"):
            bus.subscribe(SubscriptionConfig(morgue, "g"), handler)


async def test_a_bus_that_does_not_dead_letter_there_needs_no_such_word(harness: Harness, topic: str) -> None:
    morgue = new_topic()
    async with StreamBus(harness.make_backend(), quick()) as bus, StreamBus(harness.make_backend(), quick()) as other:
        async with bus.subscribe(SubscriptionConfig(topic, "g", dead_letter_topic=morgue), handler):
            async with other.subscribe(SubscriptionConfig(morgue, "g"), handler) as subscription:
                assert subscription.is_running


# --- settling twice

SETTLEMENTS: dict[str, Callable[[Delivery], Awaitable[None]]] = {
    "ack": lambda delivery: delivery.ack(),
    "nack": lambda delivery: delivery.nack("no"),
    "retry": lambda delivery: delivery.retry("later", delay=3600),
    "release": lambda delivery: delivery.release(),
    "release with a delay": lambda delivery: delivery.release(3600),
}


@pytest.mark.parametrize(("first", "second"), list(itertools.product(SETTLEMENTS, SETTLEMENTS)))
async def test_a_second_settlement_is_refused_and_changes_nothing(
    first: str, second: str, harness: Harness, topic: str
) -> None:
    config = SubscriptionConfig(topic, "g", max_in_flight=1)
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.deliveries(config) as deliveries:
            entry_id = await bus.publish(Message(topic, b"once"))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
                await SETTLEMENTS[first](delivery)
            before = await harness.entries(f"{topic}.dead")
            with pytest.raises(AlreadySettledError, match=entry_id):
                await SETTLEMENTS[second](delivery)
            with pytest.raises(AlreadySettledError, match=entry_id):
                await delivery.extend()
            assert await harness.entries(f"{topic}.dead") == before
            assert len(before) == (1 if first == "nack" else 0)


async def test_a_second_settlement_while_the_first_is_on_its_way_is_refused_too(harness: Harness, topic: str) -> None:
    refusals: list[str] = []
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()

            async def settle(name: str) -> None:
                try:
                    await SETTLEMENTS[name](delivery)
                except AlreadySettledError:
                    refusals.append(name)

            async with anyio.create_task_group() as tasks:
                for name in SETTLEMENTS:
                    tasks.start_soon(settle, name)
    assert len(refusals) == len(SETTLEMENTS) - 1


BAD_SETTLEMENTS: dict[str, tuple[Callable[[Delivery], Awaitable[None]], str]] = {
    "retry after a negative time": (lambda delivery: delivery.retry(delay=-1), "delay"),
    "retry after no number": (lambda delivery: delivery.retry(delay=math.nan), "delay"),
    "retry for ever": (lambda delivery: delivery.retry(delay=math.inf), "delay"),
    "retry because of a number": (lambda delivery: delivery.retry(untyped(5)), "reason"),
    "retry because of half a character": (lambda delivery: delivery.retry("\ud800"), "reason"),
    "nack because of nothing": (lambda delivery: delivery.nack(untyped(None)), "reason"),
    "release after a negative time": (lambda delivery: delivery.release(-1), "delay"),
    "release after text": (lambda delivery: delivery.release(untyped("1")), "delay"),
}


@pytest.mark.parametrize(("settle", "field"), BAD_SETTLEMENTS.values(), ids=BAD_SETTLEMENTS.keys())
async def test_a_settlement_with_a_bad_value_is_refused_and_the_delivery_is_still_unsettled(
    settle: Callable[[Delivery], Awaitable[None]], field: str, harness: Harness, topic: str
) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            entry_id = await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
            with pytest.raises(ValidationError, match=field):
                await settle(delivery)
            assert [entry.id for entry in await harness.pending(topic, "g")] == [entry_id]
            await delivery.ack()
            assert await harness.pending(topic, "g") == []


# --- before, after and twice

CALLS: dict[str, Callable[[StreamBus, str], Awaitable[object]]] = {
    "publish": lambda bus, topic: bus.publish(Message(topic)),
    "publish_batch": lambda bus, topic: bus.publish_batch([Message(topic)]),
    "consume": lambda bus, topic: bus.consume(SubscriptionConfig(topic, "g"), handler),
    "subscribe": lambda bus, topic: bus.subscribe(SubscriptionConfig(topic, "g"), handler).__aenter__(),
    "deliveries": lambda bus, topic: bus.deliveries(SubscriptionConfig(topic, "g")).__aenter__(),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@every_call
async def test_a_bus_that_was_not_entered_refuses_every_call(
    call: Callable[[StreamBus, str], Awaitable[object]], harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    bus = StreamBus(backend, quick())
    with pytest.raises(ClosedError, match="not entered: use it inside its 'async with'"):
        await call(bus, topic)
    async with bus:
        assert await harness.entries(topic) == []
        await bus.publish(Message(topic))


@every_call
async def test_a_bus_that_was_left_refuses_every_call(
    call: Callable[[StreamBus, str], Awaitable[object]], harness: Harness, topic: str
) -> None:
    bus = StreamBus(harness.make_backend(), quick())
    async with bus:
        pass
    with pytest.raises(ClosedError, match="closed"):
        await call(bus, topic)
    assert await harness.entries(topic) == []


async def test_what_was_prepared_while_the_bus_was_open_is_refused_after_its_end(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        prepared = (
            bus.subscribe(SubscriptionConfig(topic, "g"), handler),
            bus.deliveries(SubscriptionConfig(topic, "g")),
        )
    for manager in prepared:
        with pytest.raises(ClosedError, match="closed"):
            async with manager:
                raise AssertionError("the body must not run")


async def test_a_bus_cannot_be_entered_again_after_its_end(harness: Harness) -> None:
    bus = StreamBus(harness.make_backend(), quick())
    async with bus:
        pass
    with pytest.raises(ClosedError, match="once"):
        async with bus:
            raise AssertionError("the body must not run")


async def test_a_bus_cannot_be_entered_twice_at_once_and_goes_on(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with pytest.raises((ClosedError, RuntimeError), match="already been entered"):  # AnyIO's own words
            async with bus:
                raise AssertionError("the body must not run")
        await bus.publish(Message(topic))
        assert len(await harness.entries(topic)) == 1
