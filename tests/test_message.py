"""The message: what an application publishes and handles.

Specification (DESIGN.md, sections 3 and 5): ``Message(topic, payload, key=...)`` is enough to make one. Its uid is a
time-ordered UUID (version 7, RFC 9562), its time is UTC, and a time without a zone is refused. It is immutable, its
headers too, and it never shares memory with what it was made from. A value that no server could carry is refused where
it is given, in a text that names the field, the value and what is allowed. Its ``repr`` shows neither payload nor
headers. ``from_json`` and ``json`` raise ``SerializationError`` and nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused

from anybus import Headers, Message, Schema, SerializationError, TraceContext, ValidationError
from anybus._messages import message as _message

MOMENT = datetime(2026, 5, 6, 7, 8, 9, 123456, tzinfo=timezone.utc)
SURROGATE = "a\ud800b"

REQUIRED_TEXTS = ("uid", "key", "kind", "source")
OPTIONAL_TEXTS = ("content_type", "event_version", "idempotency_key", "trace_uid", "correlation_uid")
ALL_FIELDS: dict[str, Any] = {
    "topic": "orders.created",
    "payload": b"hello",
    "uid": "u-1",
    "key": "order-1",
    "kind": "OrderCreated",
    "source": "shop",
    "occurred_at": MOMENT,
    "headers": {"x": "y"},
    "content_type": "text/plain",
    "event_version": "2",
    "idempotency_key": "i-1",
    "expires_at": MOMENT + timedelta(hours=1),
    "trace_uid": "t-1",
    "correlation_uid": "c-1",
}
OTHER_VALUES: dict[str, Any] = {
    "topic": "orders.paid",
    "payload": b"other",
    "uid": "u-2",
    "key": "order-2",
    "kind": "OrderPaid",
    "source": "till",
    "occurred_at": MOMENT + timedelta(microseconds=1),
    "headers": {"x": "z"},
    "content_type": "text/html",
    "event_version": "3",
    "idempotency_key": "i-2",
    "expires_at": None,
    "trace_uid": "t-2",
    "correlation_uid": None,
}


def made_with(**fields: Any) -> Message:
    return Message("t", **fields)


def stopped(nanoseconds: int) -> types.SimpleNamespace:
    """A clock that stands still, in place of the module ``time``."""
    return types.SimpleNamespace(time_ns=lambda: nanoseconds)


def whole() -> Message:
    return Message(**ALL_FIELDS)


@dataclass
class Order:
    number: int
    lines: list[str]


class OrderStruct(msgspec.Struct):
    number: int


# --- construction and defaults


def test_a_topic_is_enough_to_make_a_message() -> None:
    message = Message("orders.created")
    assert message.topic == "orders.created"
    assert message.payload == b""
    assert (message.key, message.kind, message.source) == ("", "", "")
    assert message.headers == {}
    assert all(getattr(message, field) is None for field in (*OPTIONAL_TEXTS, "expires_at"))


def test_topic_and_payload_are_positional_and_the_rest_is_by_keyword() -> None:
    assert Message("t", b"p", key="k").payload == b"p"
    too_many: list[Any] = ["t", b"p", "uid"]
    with pytest.raises(TypeError):
        Message(*too_many)


def test_every_field_is_kept_as_given() -> None:
    message = whole()
    assert {field: getattr(message, field) for field in ALL_FIELDS} == ALL_FIELDS


def test_every_case_of_the_tests_below_covers_every_field() -> None:
    assert set(ALL_FIELDS) == set(OTHER_VALUES) == set(Message.__struct_fields__)


# --- uid


def test_a_uid_is_a_uuid_of_version_7_in_canonical_text() -> None:
    for _ in range(1000):
        text = Message("t").uid
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert parsed.version == 7
        assert parsed.variant == uuid.RFC_4122


def test_a_uid_begins_with_the_unix_time_in_milliseconds() -> None:
    before = datetime.now(timezone.utc)
    text = Message("t").uid
    after = datetime.now(timezone.utc)
    milliseconds = uuid.UUID(text).int >> 80
    assert int(before.timestamp() * 1000) <= milliseconds <= int(after.timestamp() * 1000)


@given(st.lists(st.integers(min_value=0, max_value=2**48 - 1), min_size=2, unique=True))
def test_uids_of_later_milliseconds_sort_after_those_of_earlier_ones(milliseconds: list[int]) -> None:
    made: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for moment in sorted(milliseconds):
            patch.setattr(_message, "time", stopped(moment * 1_000_000 + 999_999))
            made.append(Message("t").uid)
    assert made == sorted(made)
    assert [uuid.UUID(text).int >> 80 for text in made] == sorted(milliseconds)


def test_uids_of_one_millisecond_are_all_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_message, "time", stopped(1_778_000_000_000_000_000))
    assert len({Message("t").uid for _ in range(20_000)}) == 20_000


def test_a_uid_that_is_given_is_kept_whatever_it_looks_like() -> None:
    assert Message("t", uid="order-42").uid == "order-42"


# --- times


def test_occurred_at_is_now_in_utc_unless_given() -> None:
    before = datetime.now(timezone.utc)
    occurred_at = Message("t").occurred_at
    assert before <= occurred_at <= datetime.now(timezone.utc)
    assert occurred_at.utcoffset() == timedelta(0)


@pytest.mark.parametrize("field", ["occurred_at", "expires_at"])
@pytest.mark.parametrize("hours", [-12, -3.5, 0, 2, 14])
def test_a_time_in_another_zone_is_converted_to_utc(field: str, hours: float) -> None:
    there = MOMENT.astimezone(timezone(timedelta(hours=hours)))
    kept = getattr(made_with(**{field: there}), field)
    assert kept == MOMENT
    assert kept.tzinfo is timezone.utc
    assert kept.isoformat() == "2026-05-06T07:08:09.123456+00:00"


@pytest.mark.parametrize("field", ["occurred_at", "expires_at"])
def test_a_time_without_a_zone_is_refused(field: str) -> None:
    naive = MOMENT.replace(tzinfo=None)
    with refused(field, repr(naive), "time zone"):
        made_with(**{field: naive})


@pytest.mark.parametrize("field", ["occurred_at", "expires_at"])
@pytest.mark.parametrize("value", ["2026-05-06T07:08:09Z", 1_778_000_000, MOMENT.date()], ids=repr)
def test_a_time_that_is_no_datetime_is_refused(field: str, value: Any) -> None:
    with refused(field, repr(value), "a datetime"):
        made_with(**{field: value})


def test_occurred_at_cannot_be_none() -> None:
    nothing: Any = None
    with refused("occurred_at", "None", "a datetime"):
        Message("t", occurred_at=nothing)


@pytest.mark.parametrize("field", ["occurred_at", "expires_at"])
@pytest.mark.parametrize(
    "value",
    [
        datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-14))),
    ],
    ids=["before year 1", "after year 9999"],
)
def test_a_time_that_utc_cannot_tell_is_refused_like_any_other_bad_value(field: str, value: datetime) -> None:
    with refused(field, repr(value), "UTC"):
        made_with(**{field: value})


# --- immutability


@pytest.mark.parametrize("field", ALL_FIELDS)
def test_no_field_can_be_changed_or_deleted(field: str) -> None:
    message = whole()
    with pytest.raises(AttributeError):
        setattr(message, field, OTHER_VALUES[field])
    with pytest.raises(AttributeError):
        delattr(message, field)
    assert message == whole()


def test_headers_cannot_be_changed_through_the_message() -> None:
    headers: Any = Message("t", headers={"a": "1"}).headers
    with pytest.raises(TypeError):
        headers["a"] = "2"
    with pytest.raises(TypeError):
        del headers["a"]
    for method in ("update", "pop", "clear", "setdefault", "popitem"):
        assert not hasattr(headers, method)
    assert headers == {"a": "1"}


def test_changing_the_mapping_that_was_given_changes_no_message() -> None:
    given_headers = {"a": "1"}
    message = Message("t", headers=given_headers)
    given_headers["a"] = "2"
    given_headers["b"] = "3"
    assert message.headers == {"a": "1"}


def view(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


@pytest.mark.parametrize("make", [bytearray, view])
def test_a_payload_in_a_mutable_buffer_is_copied(make: Any) -> None:
    buffer = make(b"before")
    message = Message("t", buffer)
    buffer[:] = b"after!"
    assert message.payload == b"before"
    assert type(message.payload) is bytes


def test_a_payload_in_a_memoryview_with_gaps_is_copied_in_its_order() -> None:
    assert Message("t", memoryview(b"a-b-c-")[::2]).payload == b"abc"  # type: ignore[arg-type, unused-ignore]  # pyright: ignore[reportArgumentType]


# --- headers


def test_headers_of_every_mapping_are_kept_as_the_same_immutable_type() -> None:
    for mapping in ({"a": "1"}, types.MappingProxyType({"a": "1"}), Headers({"a": "1"})):
        message = Message("t", headers=mapping)
        assert type(message.headers) is Headers
        assert dict(message.headers) == {"a": "1"}


def test_header_names_are_case_sensitive() -> None:
    headers = Headers({"A": "1", "a": "2"})
    assert (headers["A"], headers["a"], len(headers)) == ("1", "2", 2)
    assert "B" not in headers


def test_two_headers_of_the_same_content_are_equal_and_hash_alike_in_any_order() -> None:
    one, other = Headers({"a": "1", "b": "2"}), Headers({"b": "2", "a": "1"})
    assert one == other
    assert hash(one) == hash(other)
    assert one != Headers({"a": "1"})


def test_merging_headers_makes_a_copy_in_which_the_other_wins() -> None:
    headers = Headers({"a": "1", "b": "2"})
    assert headers | {"b": "3", "c": "4"} == {"a": "1", "b": "3", "c": "4"}
    assert headers == {"a": "1", "b": "2"}


@pytest.mark.parametrize("value", [1, None, b"bytes", ["list"], True], ids=repr)
def test_a_header_value_that_is_no_text_is_refused(value: Any) -> None:
    with refused("header 'x'", repr(value), "a str"):
        Message("t", headers={"x": value})


@pytest.mark.parametrize("name", [1, None, b"bytes"], ids=repr)
def test_a_header_name_that_is_no_text_is_refused(name: Any) -> None:
    with refused("header name", repr(name), "a str"):
        Message("t", headers={name: "x"})


@pytest.mark.parametrize("value", [[("a", "1")], "a=1", 5, None], ids=repr)
def test_headers_that_are_no_mapping_are_refused(value: Any) -> None:
    with refused("headers", repr(value), "a mapping"):
        Message("t", headers=value)


# --- refusals of the other fields


@pytest.mark.parametrize("field", REQUIRED_TEXTS)
@pytest.mark.parametrize("value", [None, 5, b"bytes"], ids=repr)
def test_a_field_that_is_no_text_is_refused(field: str, value: Any) -> None:
    with refused(field, repr(value), "a str"):
        made_with(**{field: value})


@pytest.mark.parametrize("field", OPTIONAL_TEXTS)
@pytest.mark.parametrize("value", [0, 5, b"bytes", False], ids=repr)
def test_an_optional_field_that_is_neither_text_nor_unset_is_refused(field: str, value: Any) -> None:
    with refused(field, repr(value), "a str"):
        made_with(**{field: value})


@pytest.mark.parametrize("field", [*REQUIRED_TEXTS, *OPTIONAL_TEXTS])
def test_a_lone_surrogate_is_refused_in_every_text(field: str) -> None:
    with refused(field, repr(SURROGATE), "UTF-8"):
        made_with(**{field: SURROGATE})


def test_a_lone_surrogate_is_refused_in_topics_and_headers() -> None:
    with refused("topic", repr(SURROGATE), "UTF-8"):
        Message(SURROGATE)
    with refused("header 'x'", repr(SURROGATE), "UTF-8"):
        Message("t", headers={"x": SURROGATE})
    with refused("header name", repr(SURROGATE), "UTF-8"):
        Message("t", headers={SURROGATE: "x"})


@pytest.mark.parametrize("value", ["text", None, 5, ["a"], {"a": 1}], ids=repr)
def test_a_payload_that_is_not_bytes_is_refused_with_a_hint_at_from_json(value: Any) -> None:
    with refused("payload", repr(value), "bytes"):
        Message("t", value)
    with pytest.raises(ValidationError, match="from_json"):
        Message("t", value)


def test_a_refusal_of_a_large_value_is_short() -> None:
    large: Any = "x" * 1_000_000
    with refused("payload", "'xxxxxxxx", "bytes"):
        Message("t", large)


@pytest.mark.parametrize("value", [" ", "\t\n"], ids=repr)
def test_a_blank_idempotency_key_is_refused(value: str) -> None:
    with refused("idempotency_key", repr(value), "not blank"):
        Message("t", idempotency_key=value)


def test_an_idempotency_key_holds_256_bytes_of_utf_8_and_no_more() -> None:
    assert Message("t", idempotency_key="é" * 128).idempotency_key == "é" * 128
    with refused("idempotency_key", "'ééé", "256 bytes"):
        Message("t", idempotency_key="é" * 128 + "x")


def test_an_empty_idempotency_key_is_set_and_not_unset() -> None:
    assert Message("t", idempotency_key="").idempotency_key == ""
    assert Message("t").idempotency_key is None


# --- equality and hash


def test_messages_with_equal_fields_are_equal_and_hash_alike() -> None:
    assert whole() == whole()
    assert hash(whole()) == hash(whole())
    assert len({whole(), whole()}) == 1


@pytest.mark.parametrize("field", ALL_FIELDS)
def test_messages_that_differ_in_one_field_are_not_equal(field: str) -> None:
    other = Message(**{**ALL_FIELDS, field: OTHER_VALUES[field]})
    assert other != whole()
    assert len({other, whole()}) == 2


def test_two_messages_made_alike_are_still_two_messages() -> None:
    assert Message("t", b"p") != Message("t", b"p")


# --- JSON


@pytest.mark.parametrize(
    ("obj", "payload"),
    [
        ({"number": 1}, b'{"number":1}'),
        (Order(1, ["a"]), b'{"number":1,"lines":["a"]}'),
        (OrderStruct(1), b'{"number":1}'),
        (None, b"null"),
        ("é", '"é"'.encode()),
    ],
    ids=["dict", "dataclass", "struct", "None", "text"],
)
def test_from_json_writes_the_payload_and_names_its_content_type(obj: Any, payload: bytes) -> None:
    message = Message.from_json("orders", obj, key="k")
    assert message.payload == payload
    assert (message.topic, message.key, message.content_type) == ("orders", "k", "application/json")


def test_from_json_keeps_a_content_type_that_is_given() -> None:
    message = Message.from_json("orders", {}, content_type="application/cloudevents+json")
    assert message.content_type == "application/cloudevents+json"


def cyclic() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


@pytest.mark.parametrize(
    "obj", [object(), {"x": object()}, "a\ud800b", cyclic(), {("a", "b"): 1}], ids=lambda obj: type(obj).__name__
)
def test_from_json_of_what_json_cannot_hold_raises_a_serialization_error(obj: Any) -> None:
    with pytest.raises(SerializationError, match=f"{type(obj).__name__} cannot be written as JSON"):
        Message.from_json("orders", obj)


def test_from_json_refuses_a_bad_field_like_the_class_itself() -> None:
    with refused("key", "5", "a str"):
        Message.from_json("orders", {}, key=5)


def test_json_reads_the_payload_as_builtins() -> None:
    assert Message("t", b'{"number": 1, "lines": ["a"]}').json() == {"number": 1, "lines": ["a"]}


def test_json_with_a_type_checks_and_converts_the_payload() -> None:
    message = Message.from_json("t", Order(1, ["a"]))
    assert message.json(Order) == Order(1, ["a"])
    assert message.json(OrderStruct) == OrderStruct(1)
    assert Message("t", b"[1,2]").json(list[int]) == [1, 2]
    assert Message("t", b"null").json(type=type(None)) is None


@pytest.mark.parametrize(
    "payload",
    [b"", b"not json", b'{"a":', b"\xff\xfe", b'"\xff"', b"{} trailing", b"[" * 100_000 + b"]" * 100_000],
    ids=["empty", "text", "cut", "bad bytes", "bad text", "trailing", "deep"],
)
def test_json_of_what_is_no_json_raises_a_serialization_error_that_names_the_message(payload: bytes) -> None:
    message = Message("t", payload)
    with pytest.raises(SerializationError, match=message.uid):
        message.json()


@pytest.mark.parametrize("payload", [b'{"number": "one", "lines": []}', b'{"number": 1}', b"[]"], ids=repr)
def test_json_of_another_type_raises_a_serialization_error(payload: bytes) -> None:
    message = Message("t", payload)
    with pytest.raises(SerializationError, match=message.uid):
        message.json(Order)


# --- replace


def test_replace_returns_a_changed_copy_and_leaves_the_original() -> None:
    message = whole()
    other = message.replace(topic="orders.paid", headers={"a": "1"}, payload=bytearray(b"new"))
    assert (other.topic, dict(other.headers), other.payload) == ("orders.paid", {"a": "1"}, b"new")
    assert (other.uid, other.key, other.occurred_at) == (message.uid, message.key, message.occurred_at)
    assert type(other.headers) is Headers
    assert message == whole()


def test_replace_checks_new_values_like_the_class_itself() -> None:
    with refused("topic", "' '", "not blank"):
        whole().replace(topic=" ")
    with refused("occurred_at", repr(MOMENT.replace(tzinfo=None)), "time zone"):
        whole().replace(occurred_at=MOMENT.replace(tzinfo=None))


def test_replace_of_an_unknown_field_is_refused_by_its_name() -> None:
    with pytest.raises(ValidationError, match="topics"):
        whole().replace(topics="orders")


# --- repr


@pytest.mark.parametrize("show", [repr, str, "{}".format], ids=["repr", "str", "format"])
def test_what_is_printed_hides_payload_and_headers(show: Any) -> None:
    text = show(Message("orders", b"secret-payload", key="k-1", uid="u-1", headers={"auth": "secret-header"}))
    assert "secret" not in text
    assert "auth" not in text
    assert all(part in text for part in ("u-1", "orders", "k-1", "14 bytes"))


def test_what_rich_prints_hides_payload_and_headers_too() -> None:
    message: Any = Message("orders", b"secret-payload", headers={"auth": "secret-header"})
    rich_repr = getattr(message, "__rich_repr__", None)
    assert "secret" not in repr(list(rich_repr()) if rich_repr is not None else repr(message))


# --- schema and trace context


def test_schema_gathers_what_describes_the_payload() -> None:
    assert whole().schema == Schema("OrderCreated", "text/plain", "2")
    assert Message("t").schema == Schema("", None, None)


def test_trace_context_is_read_from_the_headers() -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    message = Message("t", headers={"traceparent": traceparent, "tracestate": "a=1", "baggage": "b=2"})
    assert message.trace_context == TraceContext(traceparent, "a=1", "b=2")


@pytest.mark.parametrize("headers", [{}, {"traceparent": "nonsense"}, {"tracestate": "a=1"}], ids=repr)
def test_trace_context_is_none_where_there_is_none_or_it_is_invalid(headers: dict[str, str]) -> None:
    assert Message("t", headers=headers).trace_context is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_makes_other_uids_than_its_parent() -> None:
    program = """
import os
from anybus import Message
Message("t")
child = os.fork()
if child:
    os.waitpid(child, 0)
print(*[Message("t").uid[15:] for _ in range(100)])
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    tails = done.stdout.split()
    assert len(tails) == len(set(tails)) == 200


def test_two_processes_restored_from_one_snapshot_make_other_uids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was saved and is started again twice, perhaps in the same millisecond: no fork tells of it."""
    Message("t")
    saved = list(_message._tails)
    assert saved
    later = time.time_ns() + 1_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    tails: list[str] = []
    for _ in range(2):
        monkeypatch.setattr(_message, "_tails", list(saved))
        monkeypatch.setattr(_message, "_uid_time", (time.time_ns() // 1_000_000 - 1000, ""))
        tails += [Message("t").uid[15:] for _ in range(10)]
    assert len(set(tails)) == 20
