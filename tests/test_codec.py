"""What is on the wire: byte for byte what the existing Rust and Go buses write, and everything that they accept.

Specification: DESIGN.md, section 5, and ``tests/golden/wire.json``, whose answers were all given by the Rust code. Its
``level`` says how far an answer binds us: ``must`` (the same answer), ``may_refuse`` (Rust accepts it; refusing is
tolerable), ``may_accept`` (Rust refuses it; accepting is tolerable), ``may_round`` (accepted; digits beyond the
microsecond may be rounded). A codec raises nothing but ``SerializationError``, whatever it is given.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anybus import JsonCodec, Message, MsgpackCodec, SerializationError, ValidationError
from anybus._failure.copies import failed_attempts
from anybus.abc import ClaimedMessage, Codec, MalformedEntry
from anybus.backends.redis._decoding import MAX_ENCODED, MAX_RECEIVED, EntryDecoder

Case = dict[str, Any]

GOLDEN: Case = json.loads((Path(__file__).parent / "golden" / "wire.json").read_text())

REPRESENTABLE: frozenset[str] = frozenset()
"""What of a vector's ``needs`` Python's datetime can do: neither nanoseconds, nor leap seconds, nor the year 0."""

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
TEXTS = (
    "uid",
    "topic",
    "key",
    "kind",
    "source",
    "content_type",
    "event_version",
    "idempotency_key",
    "trace_uid",
    "correlation_uid",
)
CODECS: list[Codec] = [JsonCodec(), MsgpackCodec()]


def cases(kind: str, fits: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """The vectors of a kind; not those that nobody has to read, nor those that Python's types cannot hold."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in GOLDEN[kind] if fits(case)])


def microseconds(at: datetime) -> int:
    return (at - EPOCH) // timedelta(microseconds=1)


def golden_microseconds(at: Case) -> int:
    # A leap second counts 1,000,000,000 nanoseconds and more of the second before.
    return int(at["unix_seconds"]) * 1_000_000 + min(int(at["nanoseconds"]), 999_999_999) // 1000


def golden_time(at: Case) -> datetime:
    return EPOCH + timedelta(microseconds=golden_microseconds(at))


def golden_message(given: Case) -> Message:
    fields = {name: given[name] for name in TEXTS if name != "topic"}
    return Message(
        given["topic"],
        bytes.fromhex(given["payload_hex"]),
        headers=given["headers"],
        occurred_at=golden_time(given["occurred_at"]),
        expires_at=None if given["expires_at"] is None else golden_time(given["expires_at"]),
        **fields,
    )


def assert_same(message: Message, expected: Case, *, tolerance: int = 0) -> None:
    assert {name: getattr(message, name) for name in TEXTS} == {name: expected[name] for name in TEXTS}
    assert dict(message.headers) == expected["headers"]
    assert message.payload.hex() == expected["payload_hex"]
    for found, wanted in ((message.occurred_at, expected["occurred_at"]), (message.expires_at, expected["expires_at"])):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert abs(microseconds(found) - golden_microseconds(wanted)) <= tolerance


def given_bytes(part: Case, name: str) -> bytes:
    data = part[name].encode() if name in part else bytes.fromhex(part[f"{name}_hex"])
    return bytes(data.ljust(part.get("pad_with_spaces_to", 0)))


# --- JSON, written


@cases("encode", lambda case: not set(case["needs"]) - REPRESENTABLE)
def test_a_message_is_written_as_rust_writes_it(case: Case) -> None:
    written = JsonCodec().encode(golden_message(case["message"])).decode()
    wanted: str = case["bytes"]
    if case["time_spelling_free"]:
        # ".500Z" may be ".500000Z".
        wanted = wanted.replace(".500Z", ".500000Z")
    if case["exact"]:
        assert written == wanted
        return
    assert json.loads(written) == json.loads(wanted)
    headers = json.dumps(case["message"]["headers"], ensure_ascii=False, separators=(",", ":"))
    before, _, rest = wanted.partition('"headers":{')
    after = rest[len(headers) - 1 :]
    assert written.startswith(before)
    assert written.endswith(after)


@cases("encode", lambda case: case["decodes_again"] and "year outside 1 to 9999" not in case["needs"])
def test_what_rust_writes_is_read_back(case: Case) -> None:
    # As if its level were may_round: nanoseconds do not fit.
    assert_same(JsonCodec().decode(case["bytes"].encode()), case["message"], tolerance=1 if case["needs"] else 0)


@cases("encode", lambda case: not set(case["needs"]) - REPRESENTABLE)
def test_what_we_write_we_read_back(case: Case) -> None:
    message = golden_message(case["message"])
    for codec in CODECS:
        assert codec.decode(codec.encode(message)) == message


# --- JSON, read


@cases("decode")
def test_what_rust_reads_we_read_as_it_does(case: Case) -> None:
    level = case["level"]
    tolerance = 1 if level == "may_round" else 0
    entry = EntryDecoder(JsonCodec()).entry(b"1-1", (b"message", given_bytes(case, "input")), 1)
    try:
        message = JsonCodec().decode(given_bytes(case, "input"))
    except SerializationError:
        assert isinstance(entry, MalformedEntry)
        assert not case["accepted"] or level == "may_refuse"
        return
    assert isinstance(entry, ClaimedMessage)
    if not case["accepted"]:
        assert level == "may_accept"
        return
    assert_same(message, case["message"], tolerance=tolerance)
    assert_same(entry.message, {**case["message"], **(case.get("lifted") or {})}, tolerance=tolerance)
    if case.get("attempt") is not None:
        assert failed_attempts(entry.message.headers) + 1 == case["attempt"]


@cases("entries")
def test_whole_entries_are_read_as_rust_reads_them(case: Case) -> None:
    fields = [part for item in case["fields"] for part in (item["field"].encode(), given_bytes(item, "value"))]
    entry = EntryDecoder(JsonCodec()).entry(b"1-1", fields, 1)
    if any("pad_with_spaces_to" in item for item in case["fields"]):
        # We leave room for the headers of retries and dead letters beyond Rust's limit; see below for ours.
        assert isinstance(entry, ClaimedMessage)
        return
    assert isinstance(entry, ClaimedMessage if case["accepted"] else MalformedEntry)
    if isinstance(entry, ClaimedMessage):
        assert_same(entry.message, case["message"])
        assert failed_attempts(entry.message.headers) + 1 == case["attempt"]
    else:
        assert list(entry.raw.items()) == list(
            {item["field"]: given_bytes(item, "value") for item in case["fields"]}.items()
        )


@cases("bus")
def test_what_the_rust_bus_wrote_by_itself_is_read(case: Case) -> None:
    for item in case["entries"]:
        data = item["fields"]["message"].encode()
        entry = EntryDecoder(JsonCodec()).entry(b"1-1", (b"message", data), 1)
        assert isinstance(entry, ClaimedMessage)
        assert json.loads(JsonCodec().encode(entry.message)) == json.loads(data)


@pytest.mark.parametrize(
    ("size", "readable"), [(MAX_ENCODED + 1, True), (MAX_RECEIVED, True), (MAX_RECEIVED + 1, False)]
)
def test_an_entry_over_8_mib_and_64_kib_is_malformed_and_keeps_its_bytes(size: int, readable: bool) -> None:
    data = JsonCodec().encode(Message("t")).ljust(size)
    entry = EntryDecoder(JsonCodec()).entry(b"1-1", (b"message", data), 2)
    assert isinstance(entry, ClaimedMessage if readable else MalformedEntry)
    if isinstance(entry, MalformedEntry):
        assert entry.raw["message"] is data
        assert str(MAX_RECEIVED) in entry.error
        assert entry.deliveries == 2


# --- both codecs

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
options = st.none() | texts
times = st.datetimes(min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29), timezones=st.just(timezone.utc))
messages = st.builds(
    Message,
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
        lambda text: bool(text.strip()) and not text.startswith("anybus:")
    ),
    st.binary(max_size=100),
    uid=texts,
    key=texts,
    kind=texts,
    source=texts,
    occurred_at=times,
    headers=st.dictionaries(texts, texts, max_size=3),
    content_type=options,
    event_version=options,
    idempotency_key=st.none() | texts.filter(lambda text: not text or bool(text.strip())),
    expires_at=st.none() | times,
    trace_uid=options,
    correlation_uid=options,
)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@given(message=messages)
def test_a_message_comes_back_whole(codec: Codec, message: Message) -> None:
    assert codec.decode(codec.encode(message)) == message


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@given(message=messages)
def test_a_decoded_message_is_like_any_other(codec: Codec, message: Message) -> None:
    decoded = codec.decode(codec.encode(message))
    assert decoded == message
    assert message == decoded
    assert decoded == codec.decode(codec.encode(message))
    assert hash(decoded) == hash(message)
    assert repr(decoded) == repr(message)
    assert type(decoded.headers) is type(message.headers)
    assert codec.encode(decoded) == codec.encode(message)
    for copied in (pickle.loads(pickle.dumps(decoded)), copy.copy(decoded), copy.deepcopy(decoded), decoded.replace()):
        assert type(copied) is Message
        assert copied == message
    assert decoded.replace(key="other") == message.replace(key="other") != decoded
    assert decoded != decoded.replace(uid=decoded.uid + "x")


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_a_decoded_message_cannot_be_changed_nor_replaced_by_a_refused_one(codec: Codec) -> None:
    decoded = codec.decode(codec.encode(Message("t", headers={"a": "b"})))
    with pytest.raises(AttributeError):
        decoded.key = "other"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        decoded.headers["a"] = "c"  # type: ignore[index]  # pyright: ignore[reportIndexIssue]
    with pytest.raises(ValidationError, match="topic"):
        decoded.replace(topic="anybus:reserved")
    with pytest.raises(ValidationError, match="nothing"):
        decoded.replace(nothing=1)
    assert decoded != "t"


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@given(message=messages)
def test_a_decoded_message_is_replaced_as_any_other_also_by_the_standard_library(
    codec: Codec, message: Message
) -> None:
    decoded: Any = codec.decode(codec.encode(message))
    # `copy.replace` of Python 3.13 calls it.
    for changed in (decoded.__replace__(key="other"), msgspec.structs.replace(decoded, key="other")):
        assert changed == message.replace(key="other")
        assert changed.headers == message.headers
        assert codec.decode(codec.encode(changed)) == changed
    assert type(decoded.__replace__()) is Message
    with pytest.raises(ValidationError, match="payload"):
        decoded.__replace__(payload="text")


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_a_message_is_made_from_json_also_through_a_decoded_one(codec: Codec) -> None:
    decoded = codec.decode(codec.encode(Message("t", b"x")))
    made = decoded.from_json("u", {"a": 1}, key="k")
    assert type(made) is Message
    assert (made.topic, made.json(), made.key) == ("u", {"a": 1}, "k")


REFUSED = {
    "topic": ["", " ", "a\x00", "anybus:t", "t" * 1025],
    "idempotency_key": [" ", "k" * 257],
}


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values])
def test_what_a_message_refuses_is_refused_when_it_is_decoded(codec: Codec, field: str, value: str) -> None:
    form: Any = msgspec.json if isinstance(codec, JsonCodec) else msgspec.msgpack
    envelope = form.decode(codec.encode(Message("t")))
    envelope["message"][field] = value
    with pytest.raises(SerializationError, match=f"{field} must be") as raised:
        codec.decode(form.encode(envelope))
    fields: Any = {"topic": "t", field: value}
    with pytest.raises(ValidationError) as direct:
        Message(**fields)
    assert str(direct.value) in str(raised.value)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("field", ["uid", "topic", "key", "kind", "source", "occurred_at", "headers", "payload"])
def test_no_required_field_may_be_missing(codec: Codec, field: str) -> None:
    form: Any = msgspec.json if isinstance(codec, JsonCodec) else msgspec.msgpack
    envelope = form.decode(codec.encode(Message("t")))
    del envelope["message"][field]
    with pytest.raises(SerializationError, match=field):
        codec.decode(form.encode(envelope))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_message_are_a_serialization_error_and_nothing_else(codec: Codec, data: bytes) -> None:
    with pytest.raises(SerializationError):
        codec.decode(data)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@given(message=messages, data=st.data())
def test_a_damaged_message_is_read_or_is_a_serialization_error_and_nothing_else(
    codec: Codec, message: Message, data: st.DataObject
) -> None:
    whole = bytearray(codec.encode(message))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        codec.decode(bytes(whole))
    except SerializationError as error:
        assert len(str(error)) < 1000


VALUES: list[Any] = [10**400, -(10**25), 1e308, [[[[]]]], {"a": {"b": []}}, None, True]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("field", ["uid", "headers", "payload", "occurred_at", "expires_at", "unknown"])
def test_fields_of_any_other_type_are_a_serialization_error_unless_unknown(field: str, value: Any) -> None:
    envelope = json.loads(JsonCodec().encode(Message("t")))
    envelope["message"][field] = value
    data = json.dumps(envelope).encode()
    if field == "unknown" or (field == "expires_at" and value is None):
        assert JsonCodec().decode(data).topic == "t"
        return
    with pytest.raises(SerializationError):
        JsonCodec().decode(data)


@pytest.mark.parametrize("depth", [100, 5_000, 1_000_000])
@pytest.mark.parametrize("shape", ["[", '{"a":', '{"message":', '{"message":{"x":', '{"message":{"headers":{"a":'])
def test_nesting_however_deep_is_a_serialization_error(shape: str, depth: int) -> None:
    with pytest.raises(SerializationError):
        JsonCodec().decode(shape.encode() * (depth // len(shape)))


@pytest.mark.parametrize("depth", [100, 1_000_000])
@pytest.mark.parametrize(
    "shape", [b"\x91", b"\x81\xa7message", b"\x81\xa1a", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"]
)
def test_nesting_and_sizes_in_messagepack_are_a_serialization_error(shape: bytes, depth: int) -> None:
    with pytest.raises(SerializationError):
        MsgpackCodec().decode(shape * (depth // len(shape)))


def test_deep_nesting_in_an_unknown_field_is_a_serialization_error_or_is_ignored() -> None:
    for depth in (10, 200, 5_000, 200_000):
        data = JsonCodec().encode(Message("t"))[:-2] + b',"x":' + b"[" * depth + b"]" * depth + b"}}"
        try:
            assert JsonCodec().decode(data).topic == "t"
        except SerializationError:
            assert depth > 100


@pytest.mark.parametrize("time", ["extreme", "without zone", "number"])
def test_messagepack_times_that_are_none_are_a_serialization_error(time: str) -> None:
    values: dict[str, Any] = {
        "extreme": msgspec.msgpack.Ext(-1, b"\xff" * 12),
        "without zone": "2026-05-06T07:08:09",
        "number": 2**64 - 1,
    }
    envelope = msgspec.msgpack.decode(MsgpackCodec().encode(Message("t")))
    envelope["message"]["occurred_at"] = values[time]
    with pytest.raises(SerializationError):
        MsgpackCodec().decode(msgspec.msgpack.encode(envelope))


def test_a_message_that_cannot_be_written_is_a_serialization_error() -> None:
    message = Message("t")
    msgspec.structs.force_setattr(message, "key", "\ud800")  # what the door would have refused
    for codec in CODECS:
        with pytest.raises(SerializationError, match=message.uid):
            codec.encode(message)


# --- digits beyond the microsecond

LEAP_SECOND = "2026-12-31T23:59:60Z"
"""As the time at which a message expires, it makes the codec read the whole message leniently."""


def occurred_at(time: str, *, leniently: bool) -> datetime:
    given = {"uid": "u", "topic": "t", "key": "", "kind": "", "source": "", "headers": {}, "payload": ""}
    body = {**given, "occurred_at": time, "expires_at": LEAP_SECOND if leniently else None}
    return JsonCodec().decode(json.dumps({"message": body}).encode()).occurred_at


@pytest.mark.parametrize("leniently", [False, True])
@pytest.mark.parametrize(
    ("time", "rounded"),
    [
        ("2026-05-06T07:08:09.1234564Z", "2026-05-06T07:08:09.123456"),
        ("2026-05-06T07:08:09.1234565Z", "2026-05-06T07:08:09.123457"),
        ("2026-05-06T07:08:09.123456499999999999Z", "2026-05-06T07:08:09.123456"),
        ("2026-05-06T07:08:09.9999995Z", "2026-05-06T07:08:10.000000"),
        ("2026-12-31T23:59:59.9999999Z", "2027-01-01T00:00:00.000000"),
        ("2026-12-31T23:59:59.999999999+00:00", "2027-01-01T00:00:00.000000"),
        ("2026-12-31T23:59:60.5Z", "2026-12-31T23:59:59.999999"),
        ("9999-12-31T23:59:59.9999999Z", "9999-12-31T23:59:59.999999"),
        ("0001-01-01T00:00:00.0000005Z", "0001-01-01T00:00:00.000001"),
    ],
)
def test_a_time_is_rounded_to_the_microsecond_however_it_is_spelled(time: str, rounded: str, leniently: bool) -> None:
    for spelling in (time, time.replace("T", "t"), time.replace("T", " "), time.replace("Z", "z")):
        at = occurred_at(spelling, leniently=leniently)
        assert at.isoformat(timespec="microseconds") == f"{rounded}+00:00"


@given(st.text("0123456789", min_size=1, max_size=12), st.sampled_from(["Z", "+00:00", "-05:30", "+14:00"]))
def test_quick_and_lenient_reading_round_alike(digits: str, zone: str) -> None:
    time = f"2026-12-31T23:59:59.{digits}{zone}"
    assert occurred_at(time, leniently=False) == occurred_at(time, leniently=True)
