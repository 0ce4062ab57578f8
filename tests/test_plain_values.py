"""What is checked is what is used.

Specification: a value of a subclass of ``str``, ``int``, ``float``, ``bytes`` or ``datetime`` is taken as what it holds,
wherever an application gives one: what the bus keeps, compares, prints and sends is the plain value. A ``str`` Enum as
topic, group or label therefore reaches the same keys as its text. Under a frozen clock, whose ``datetime`` is a class
of its own, messages are published, retried and given up on as ever.
"""

from __future__ import annotations

import datetime as datetime_module
import enum
import sys
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any
from unittest.mock import Mock

import anyio
import pytest
from harness import SOON, Harness, quick, until
from refusal import refused
from servers import RedisHarness

from anybus import (
    CircuitBreaker,
    Delivery,
    ExponentialBackoff,
    Headers,
    JsonCodec,
    MemoryBackend,
    Message,
    PublishOptions,
    Reject,
    Retry,
    Schema,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
    TraceContext,
    connect,
    retry_stream,
)
from anybus._dead_letters.letter import LetterFilter
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._settings import Settings

MOMENT = datetime(2026, 5, 6, 7, 8, 9, 123456, tzinfo=timezone.utc)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Sly(str):
    """Prints, compares and hashes as something else than it holds."""

    __slots__ = ()

    def __str__(self) -> str:
        return "sly"

    def __format__(self, spec: str) -> str:
        return "sly"

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return 7

    def __bool__(self) -> bool:
        return False

    def encode(self, *args: Any, **kwargs: Any) -> bytes:
        return b"sly"

    def isascii(self) -> bool:
        return False

    def strip(self, *args: Any) -> str:
        return ""

    def startswith(self, *args: Any) -> bool:
        return True


class Name(str, enum.Enum):
    """As applications keep their topics and groups. It prints the same on every Python."""

    def __str__(self) -> str:
        return f"Word.{self.name}"

    def __format__(self, spec: str) -> str:
        return f"Word.{self.name}"


class Word(Name):
    """Some of them, and words for options."""

    ORDERS = "orders.created"
    BILLING = "billing"
    MANUAL = "manual"
    LEAST = "at-least-once"
    CANCEL = "cancel"
    GROUP = "group"
    URL = "redis://localhost:1234/2"
    START = "0"


class Number(enum.IntEnum):
    ONE = 1
    FIVE = 5


class Seconds(float):
    """As numpy.float64: a float that prints as something else."""

    __slots__ = ()

    def __float__(self) -> float:
        return -1.0

    def __repr__(self) -> str:
        return "Seconds"


class Blob(bytes):
    __slots__ = ()

    def __bytes__(self) -> bytes:
        return b"something else"

    def __len__(self) -> int:
        return 0


class Moment(datetime):
    """As pendulum's: its own methods give its own kind, and it may call a time zone what it likes."""

    def astimezone(self, tz: tzinfo | None = None) -> Moment:
        return Moment(1999, 1, 1, tzinfo=tz)

    def date(self) -> Any:
        return None

    def timetz(self) -> Any:
        return None

    def isoformat(self, *args: Any, **kwargs: Any) -> str:
        return "whenever"


def moment(time: datetime = MOMENT) -> Moment:
    return Moment(time.year, time.month, time.day, time.hour, time.minute, time.second, time.microsecond, time.tzinfo)


def plain(value: object) -> bool:
    return type(value) in (str, int, float, bool, bytes, datetime, type(None)) or value == ()


def made_with(**given: Any) -> Message:
    given.setdefault("topic", "t")
    return Message(**given)


# --- messages


@pytest.mark.parametrize("text", ["text", "tëxt"])
@pytest.mark.parametrize(
    "field",
    [
        "topic",
        "uid",
        "key",
        "kind",
        "source",
        "content_type",
        "event_version",
        "idempotency_key",
        "trace_uid",
        "correlation_uid",
    ],
)
def test_every_text_of_a_message_is_kept_as_what_it_holds(field: str, text: str) -> None:
    kept = getattr(made_with(**{field: Sly(text)}), field)
    assert type(kept) is str
    assert kept == text


def test_a_topic_that_was_seen_as_an_enum_first_is_plain_for_everybody_after() -> None:
    assert Message(Word.ORDERS).topic == "orders.created"
    assert all(type(Message(topic).topic) is str for topic in (Word.ORDERS, "orders.created", Sly("orders.created")))
    assert f"{Message(Word.ORDERS).topic}" == "orders.created"


def test_headers_are_kept_as_what_names_and_values_hold() -> None:
    for headers in (
        Message("t", headers={Sly("tenant"): Sly("acme")}).headers,
        Headers({Sly("tenant"): Sly("acme")}),
        PublishOptions(metadata={Sly("tenant"): Sly("acme")}).metadata,
        Headers().__or__({Sly("tenant"): Sly("acme")}),
    ):
        assert dict(headers) == {"tenant": "acme"}
        assert all(type(text) is str for pair in headers.items() for text in pair)


class Shifting(UserDict[str, str]):
    """A mapping that says something else each time it is asked."""

    def __bool__(self) -> bool:
        return False

    def __getitem__(self, name: str) -> str:
        value = super().__getitem__(name)
        self.data[name] = "\ud800"
        return value


class OfItsOwn(Headers):
    """Headers that were checked, and say something else."""

    __slots__ = ()

    def __getitem__(self, name: str) -> str:
        return "something else"


def test_headers_of_every_mapping_are_read_once_and_then_checked() -> None:
    assert dict(Message("t", headers=Shifting(a="1")).headers) == {"a": "1"}
    headers = Message("t", headers=OfItsOwn({"a": "1"})).headers
    assert type(headers) is Headers
    assert dict(headers) == {"a": "something else"}


def test_headers_in_which_two_names_hold_the_same_text_are_refused() -> None:
    with refused("headers", "{'tenant'", "no name twice"):
        Headers({"tenant": "acme", Sly("tenant"): "other"})


def test_a_payload_is_kept_as_the_bytes_that_it_holds() -> None:
    class Buffer(bytearray):
        def __bytes__(self) -> bytes:
            return b"something else"

    for payload in (Blob(b"payload"), Buffer(b"payload"), memoryview(Blob(b"payload"))):
        kept = made_with(payload=payload).payload
        assert type(kept) is bytes
        assert kept == b"payload"


@pytest.mark.parametrize("hours", [0, 5.5])
@pytest.mark.parametrize("field", ["occurred_at", "expires_at"])
def test_a_time_is_kept_as_what_it_holds_in_utc(field: str, hours: float) -> None:
    there = moment(MOMENT.astimezone(timezone(timedelta(hours=hours))))
    kept = getattr(made_with(**{field: there}), field)
    assert type(kept) is datetime
    assert kept == MOMENT
    assert kept.tzinfo is timezone.utc


def test_the_second_of_two_equal_wall_times_in_a_zone_stays_the_second() -> None:
    class Berlin(tzinfo):
        def utcoffset(self, dt: datetime | None) -> timedelta:
            return timedelta(hours=1 if dt is not None and dt.fold else 2)

        def dst(self, dt: datetime | None) -> timedelta:
            return timedelta(0)

        def tzname(self, dt: datetime | None) -> str:
            return "Europe/Berlin"

    time = Moment(2026, 10, 25, 2, 30, tzinfo=Berlin(), fold=1)
    assert Message("t", occurred_at=time).occurred_at == datetime(2026, 10, 25, 1, 30, tzinfo=timezone.utc)


def test_a_changed_copy_is_plain_too() -> None:
    copy = Message("t").replace(topic=Word.ORDERS, key=Sly("k"), occurred_at=moment(), payload=Blob(b"p"))
    assert all(plain(value) for value in (copy.topic, copy.key, copy.occurred_at, copy.payload))
    assert (copy.topic, copy.key, copy.occurred_at, copy.payload) == ("orders.created", "k", MOMENT, b"p")


def test_what_only_pretends_to_be_a_value_is_refused() -> None:
    for field, kind, allowed in (
        ("topic", str, "a str"),
        ("key", str, "a str"),
        ("idempotency_key", str, "a str"),
        ("payload", bytes, "bytes"),
        ("occurred_at", datetime, "a datetime"),
    ):
        with refused(field, "<Mock", allowed):
            made_with(**{field: Mock(spec=kind)})
    with refused("block_timeout", "<Mock", "seconds"):
        StreamBusOptions(block_timeout=Mock(spec=float))
    with refused("ack_batch_size", "<Mock", "an int"):
        StreamBusOptions(ack_batch_size=Mock(spec=int))


# --- everything else that is given

OPTIONS: dict[str, Callable[[], object]] = {
    "bus": lambda: StreamBusOptions(
        block_timeout=Seconds(2.0),
        claim_idle_timeout=Number.FIVE,
        claim_scan_batch_size=Number.ONE,
        reclaim_interval=Seconds(2.0),
        group_start_id=Word.START,
        publish_timeout=Number.FIVE,
        ack_batch_size=Number.ONE,
        ack_flush_interval=Seconds(0.0),
        max_payload_bytes=Number.FIVE,
        close_timeout=Number.FIVE,
        cleanup_timeout=Seconds(1.0),
    ),
    "subscription": lambda: SubscriptionConfig(
        Word.ORDERS,
        Word.BILLING,
        consumer=Sly("label"),
        guarantee=Word.LEAST,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        ack_mode=Word.MANUAL,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        max_in_flight=Number.ONE,
        max_pending_acks=Number.FIVE,
        max_retry=Number.ONE,
        max_deliveries=Number.FIVE,
        retry_backoff=Seconds(1.0),
        max_age=Seconds(1.0),
        dead_letter_topic=Sly("morgue"),
        handler_timeout=Number.ONE,
        group_start_id=Word.START,
        on_lease_lost=Word.CANCEL,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ),
    "backoff": lambda: ExponentialBackoff(initial=Seconds(1.0), factor=Number.FIVE, maximum=Number.FIVE),
    "circuit": lambda: CircuitBreaker(failures=Number.FIVE, pause=Seconds(1.0)),
    "filter": lambda: LetterFilter(
        topic=Word.ORDERS,
        group=Word.BILLING,
        code=Sly("rejected"),
        since=moment(),
        until=moment(MOMENT + timedelta(hours=1)),
        key=Sly("k"),
    ),
    "trace": lambda: TraceContext(Sly(TRACEPARENT), Sly("a=1"), Sly("b=2")),
    "schema": lambda: Schema(Sly("K"), Sly("text/plain"), Sly("2")),
    "server": lambda: Settings(connect_timeout=Number.FIVE, command_timeout=Seconds(1.0)),
}


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_is_kept_as_what_it_holds(make: Callable[[], object]) -> None:
    made = make()
    assert is_dataclass(made)
    kept = {field.name: getattr(made, field.name) for field in fields(made)}
    assert {name: type(value) for name, value in kept.items() if not plain(value)} == {}
    texts = [value for value in kept.values() if isinstance(value, str)]
    assert "sly" not in texts
    assert -1.0 not in kept.values()


def test_a_list_of_delays_is_kept_as_plain_numbers() -> None:
    config = SubscriptionConfig("t", "g", retry_backoff=[Number.ONE, Seconds(2.0)])
    assert isinstance(config.retry_backoff, tuple)
    assert [(type(delay), delay) for delay in config.retry_backoff] == [(float, 1.0), (float, 2.0)]


def test_what_a_handler_raises_is_kept_as_plain_values() -> None:
    retry, reject = Retry(Sly("later"), delay=Seconds(2.0)), Reject(Sly("never"))
    assert [type(value) for value in (retry.reason, retry.delay, *retry.args)] == [str, float, str]
    assert (retry.reason, retry.delay, str(retry)) == ("later", 2.0, "later")
    assert (type(reject.reason), reject.reason, str(reject)) == (str, "never", "never")


def test_a_url_and_a_shared_name_are_taken_as_what_they_hold() -> None:
    assert repr(connect(Word.URL).backend) == "<RedisBackend localhost:1234 not connected>"
    assert repr(RedisBackend(Sly("redis://localhost:1234"))) == "<RedisBackend localhost:1234 not connected>"
    assert isinstance(connect(Sly("memory://name")).backend, MemoryBackend)


async def test_memory_is_shared_by_what_its_name_holds() -> None:
    async with StreamBus(MemoryBackend(Word.ORDERS)) as one, connect("memory://orders.created") as other:
        await one.publish(Message("t"))
        assert isinstance(other.backend, MemoryBackend)
        assert len(other.backend.entries("t")) == 1


async def test_a_stream_in_memory_is_found_by_what_its_name_holds() -> None:
    async with MemoryBackend() as backend:
        assert await backend.create_group(Word.ORDERS, Word.BILLING)
        assert not await backend.create_group("orders.created", "billing")
        entry_id = await backend.publish(Word.ORDERS, Message(Word.ORDERS))
        assert [found[0] for found in backend.entries("orders.created")] == [entry_id]
        assert backend.entries(Word.ORDERS) == backend.entries("orders.created")
        [entry] = await backend.read_new(Word.ORDERS, "billing", "c", count=1, timeout=0)
        assert entry.id == entry_id


def test_a_retry_streams_name_is_made_of_what_the_names_hold() -> None:
    assert retry_stream(Word.ORDERS, Word.BILLING) == retry_stream("orders.created", "billing")
    assert retry_stream(Sly("a{b}"), Sly("g")) == retry_stream("a{b}", "g")


# --- end to end


def names_of(topic: str, group: str) -> tuple[Any, Any]:
    """The two names as members of an Enum."""
    make: Any = Name
    names = make("names", {"TOPIC": topic, "GROUP": group})
    return names.TOPIC, names.GROUP


async def test_retries_and_dead_letters_of_an_enum_go_where_its_text_says(harness: Harness, topic: str) -> None:
    named, group = names_of(topic, "billing")
    assert f"{named}" != topic
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        if delivery.message.key == "malady":
            raise Retry(Sly("not yet"), delay=0.01) if delivery.state.attempt == 1 else Reject(Sly("never"))

    config = SubscriptionConfig(named, group, consumer=Sly("label"))
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(config, handler) as subscription:
            assert subscription.consumer.startswith("label-")
            await bus.publish(
                Message(named, Blob(b"payload"), key=Sly("malady"), headers={Sly("a"): Sly("b")}, occurred_at=moment())
            )
            await until(lambda: subscription.statistics().dead_lettered == 1)
        [(letter_id, letter, _)] = await harness.entries(f"{topic}.dead")
        assert await harness.consumers(topic, "billing") == []
        assert await harness.consumers(retry_stream(topic, "billing"), "billing") == []
        assert letter is not None
        assert (letter.topic, letter.payload, letter.key) == (f"{topic}.dead", b"payload", "malady")
        assert letter.headers["dead-letter-reason"] == "never"
        assert letter.headers["dead-letter-topic"] == topic
        assert letter.headers["retry-reason"] == "not yet"
        found = [one.id async for one in bus.dead_letters(named, group=group, code=Sly("rejected"), key=Sly("malady"))]
        assert found == [letter_id]
        report = await bus.dead_letters(named).replay([Sly(letter_id)], to=Word.GROUP, rate=Seconds(1000.0))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        assert (report.replayed, report.failed) == (1, 0)
    assert attempts == [1, 2]


async def test_members_that_use_an_enum_and_its_text_share_the_work(harness: Harness, topic: str) -> None:
    named, group = names_of(topic, "g")
    handled: list[tuple[str, int]] = []

    def handler_of(member: str) -> Callable[[Delivery], Any]:
        async def handler(delivery: Delivery) -> None:
            handled.append((member, delivery.state.attempt))
            raise Retry(delay=0.01)

        return handler

    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(named, group), handler_of("enum")):
            await bus.publish(Message(topic))
            await until(lambda: len(handled) >= 1)
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_retry=2), handler_of("text")) as subscription:
            await until(lambda: subscription.statistics().dead_lettered == 1)
    assert handled[0] == ("enum", 1)
    assert [attempt for _, attempt in handled] == [1, 2, 3]
    assert handled[-1] == ("text", 3)


async def test_a_message_published_later_is_found_by_the_text_of_its_topic(harness: Harness, topic: str) -> None:
    named, _ = names_of(topic, "g")
    backend = harness.make_backend()
    async with backend:
        await backend.create_group(topic, "g")
        await backend.publish_later(named, Message(named, b"later"), delay=Seconds(0.001))
        with anyio.fail_after(SOON):
            while not (taken := await backend.read_new(topic, "g", "c", count=1, timeout=0.1)):
                pass
        assert len(taken) == 1


# --- a frozen clock


class FrozenType(type):
    """As freezegun's: the frozen class counts every datetime as its own."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, REAL)


REAL: type[datetime] = datetime


class Frozen(datetime, metaclass=FrozenType):
    """As freezegun's FakeDatetime: ``now`` stands still, and what it makes is of its own kind."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Frozen:
        return cls(2001, 2, 3, 4, 5, 6, tzinfo=tz)

    def astimezone(self, tz: tzinfo | None = None) -> Frozen:
        time = super().astimezone(tz)
        return Frozen(*time.timetuple()[:6], time.microsecond, time.tzinfo)


@pytest.fixture
def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As freezegun does it: its class takes the place of ``datetime`` in every module that names it."""
    monkeypatch.setattr(datetime_module, "datetime", Frozen)
    for name, module in list(sys.modules.items()):
        if name.startswith("anybus"):
            for attribute, value in list(vars(module).items()):
                if value is REAL:
                    monkeypatch.setattr(module, attribute, Frozen)


@pytest.mark.usefixtures("frozen_clock")
def test_a_message_made_under_a_frozen_clock_occurred_then_and_can_be_written() -> None:
    message = Message("t", expires_at=Frozen(2001, 2, 4, tzinfo=timezone.utc))
    then = REAL(2001, 2, 3, 4, 5, 6, tzinfo=timezone.utc)
    assert (type(message.occurred_at), message.occurred_at) == (REAL, then)
    assert type(message.expires_at) is REAL
    codec = JsonCodec()
    assert codec.decode(codec.encode(message)) == message
    assert Message("t", occurred_at=REAL(2020, 1, 1, tzinfo=timezone.utc)).occurred_at.year == 2020


@pytest.mark.usefixtures("frozen_clock")
async def test_under_a_frozen_clock_messages_are_published_retried_and_given_up_on(
    harness: Harness, topic: str
) -> None:
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        raise Retry(delay=0.01)

    async with StreamBus(harness.make_backend(), quick()) as bus:
        config = SubscriptionConfig(topic, "g", max_retry=1, max_age=1e9)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().dead_lettered == 1)
        [letter] = [one async for one in bus.dead_letters(topic, since=Frozen(2001, 1, 1, tzinfo=timezone.utc))]
    assert attempts == [1, 2]
    assert (letter.code, letter.at) == ("retries", REAL(2001, 2, 3, 4, 5, 6, tzinfo=timezone.utc))
    if isinstance(harness, RedisHarness):  # which writes it
        assert letter.message is not None
        assert letter.message.occurred_at == REAL(2001, 2, 3, 4, 5, 6, tzinfo=timezone.utc)


def test_a_mapping_type_for_headers_is_typed_as_such() -> None:
    headers: Mapping[str, str] = UserDict(a="1")
    assert dict(Message("t", headers=headers).headers) == {"a": "1"}
