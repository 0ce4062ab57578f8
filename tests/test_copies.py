"""The copies that the bus makes of a message: for a retry, and for the dead letters.

Specification (DESIGN.md, sections 4, 5 and 6; golden/README.md):

- ``retry-attempt`` counts as ASCII digits, optionally after one ``+``, that fit 32 bits; anything else is 0.
- A retry copy keeps its topic, payload and other headers, and carries the first entry's id.
- A dead letter's topic is the dead-letter topic; its headers say what it was, and why and when it was given up.
- Reasons are cut to 1 KiB of UTF-8, never within a character.
- The retry stream is ``anybus:{<topic>}:retry:<group>``, in the topic's hash slot, and every group has its own.
- What could not be decoded keeps its raw fields; without ``raw`` the payload is what ``message`` held, cut at 8 MiB.
"""

from __future__ import annotations

import binascii
import re
from datetime import datetime, timezone

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anybus import Message
from anybus._failure.copies import (
    MAX_COPY_BYTES,
    MAX_REASON_BYTES,
    Origin,
    cut,
    dead_letter,
    failed_attempts,
    first_published,
    retry_copy,
    retry_stream,
    undecodable,
)

AT = datetime(2026, 5, 6, 7, 8, 9, 500000, tzinfo=timezone.utc)
ORIGIN = Origin("orders", "7-0", "billing", "worker-1", attempts=4, deliveries=2)

MESSAGE = Message(
    "orders",
    b"\x00payload\xff",
    uid="u-1",
    key="k",
    kind="OrderCreated",
    source="shop",
    headers={"x": "y", "traceparent": "kept as it is"},
    content_type="text/plain",
    event_version="2",
    idempotency_key="i",
    expires_at=AT,
    trace_uid="t",
    correlation_uid="c",
)


def differing_fields(one: Message, other: Message) -> set[str]:
    return {field for field in Message.__struct_fields__ if getattr(one, field) != getattr(other, field)}


# --- retry-attempt


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("7", 7),
        ("+3", 3),
        ("007", 7),
        ("4294967294", 4294967294),
        ("4294967295", 4294967295),
        ("+4294967295", 4294967295),
        ("00000000000000000000000004294967295", 4294967295),
    ],
)
def test_ascii_digits_that_fit_32_bits_count(text: str, count: int) -> None:
    assert failed_attempts({"retry-attempt": text}) == count


@pytest.mark.parametrize(
    "text",
    [
        *("", "+", "++3", "-1", "-0", " 3", "3 ", "3\n", "1_0", "3.0", "0x3", "1e3", "three"),
        *("\u0663", "\uff13", "\u00b2", "\u2460", "3\u0663"),
        *("4294967296", "99999999999999999999", "9" * 5000),
    ],
    ids=lambda text: repr(text)[:30],
)
def test_everything_else_counts_as_no_attempt(text: str) -> None:
    assert failed_attempts({"retry-attempt": text}) == 0


def test_no_header_and_a_header_in_another_case_count_as_no_attempt() -> None:
    assert failed_attempts({}) == 0
    assert failed_attempts({"Retry-Attempt": "3"}) == 0


def test_thousands_of_leading_zeros_are_digits_too() -> None:
    assert failed_attempts({"retry-attempt": "0" * 5000 + "5"}) == 5


@given(st.text() | st.from_regex(r"[+]?[0-9]{0,12}", fullmatch=True))
def test_the_count_is_a_u32_whatever_the_header_holds(text: str) -> None:
    count = failed_attempts({"retry-attempt": text})
    assert 0 <= count <= 2**32 - 1
    if count:
        assert re.fullmatch(r"[+]?0*[1-9][0-9]{0,9}", text, re.ASCII)
        assert int(text) == count


@given(st.integers(min_value=0, max_value=2**32 - 1))
def test_the_count_that_a_retry_copy_carries_is_read_back(failures: int) -> None:
    copy = retry_copy(MESSAGE, failures=failures, reason="why", first_id="7-0")
    assert failed_attempts(copy.headers) == failures


# --- retry copies


def test_a_retry_copy_adds_count_reason_and_first_id_and_changes_nothing_else() -> None:
    copy = retry_copy(MESSAGE, failures=2, reason="no answer", first_id="7-0")
    assert differing_fields(copy, MESSAGE) == {"headers"}
    assert copy.topic == "orders"
    assert dict(copy.headers) == {
        **MESSAGE.headers,
        "retry-attempt": "2",
        "retry-reason": "no answer",
        "retry-first-id": "7-0",
    }


def test_a_retry_copy_tells_when_the_first_entry_was_stored_if_that_is_known() -> None:
    copy = retry_copy(MESSAGE, failures=2, reason="r", first_id="7-0", published_at=AT)
    assert copy.headers["retry-published-at"] == "2026-05-06T07:08:09.500000Z"
    assert first_published(copy.headers) == AT
    again = retry_copy(copy, failures=3, reason="r", first_id="7-0")
    assert "retry-published-at" not in again.headers, "whatever stands there is not of this library's making"
    headers = dead_letter(copy, "d", ORIGIN, code="retries", reason="r", error_type="", at=AT).headers
    assert "retry-published-at" not in headers


@pytest.mark.parametrize("text", ["", "now", "2026-05-06", "2026-05-06T07:08:09", "\udfff", "7-0"])
def test_a_time_that_makes_no_sense_is_none(text: str) -> None:
    assert first_published({"retry-published-at": text}) is None
    assert first_published({}) is None


def test_a_second_retry_copy_overwrites_count_and_reason() -> None:
    first = retry_copy(MESSAGE, failures=1, reason="one", first_id="7-0")
    second = retry_copy(first, failures=2, reason="two", first_id="7-0")
    assert second == retry_copy(MESSAGE, failures=2, reason="two", first_id="7-0")


def test_a_release_with_a_delay_leaves_the_reason_of_an_earlier_retry() -> None:
    retried = retry_copy(MESSAGE, failures=1, reason="one", first_id="7-0")
    assert retry_copy(retried, failures=1, reason=None, first_id="7-0") == retried
    assert "retry-reason" not in retry_copy(MESSAGE, failures=0, reason=None, first_id="7-0").headers


def test_the_original_is_left_as_it_was() -> None:
    before = dict(MESSAGE.headers)
    retry_copy(MESSAGE, failures=1, reason="one", first_id="7-0")
    dead_letter(MESSAGE, "orders.dead", ORIGIN, code="retries", reason="r", error_type="E", at=AT)
    assert dict(MESSAGE.headers) == before
    assert MESSAGE.topic == "orders"


# --- dead letters


def test_a_dead_letter_tells_where_it_comes_from_and_why() -> None:
    copy = dead_letter(MESSAGE, "orders.dead", ORIGIN, code="retries", reason="boom", error_type="shop.Boom", at=AT)
    assert differing_fields(copy, MESSAGE) == {"topic", "headers"}
    assert copy.topic == "orders.dead"
    assert dict(copy.headers) == {
        **MESSAGE.headers,
        "dead-letter-reason": "boom",
        "dead-letter-code": "retries",
        "dead-letter-error-type": "shop.Boom",
        "dead-letter-topic": "orders",
        "dead-letter-id": "7-0",
        "dead-letter-group": "billing",
        "dead-letter-consumer": "worker-1",
        "dead-letter-attempts": "4",
        "dead-letter-deliveries": "2",
        "dead-letter-at": "2026-05-06T07:08:09.500000Z",
    }


def test_what_is_unknown_is_left_out_of_a_dead_letter() -> None:
    origin = Origin("orders", "7-0", "billing", "worker-1", attempts=4, deliveries=None)
    headers = dead_letter(MESSAGE, "d", origin, code="rejected", reason="", error_type="", at=AT).headers
    assert "dead-letter-deliveries" not in headers
    assert "dead-letter-error-type" not in headers
    assert headers["dead-letter-reason"] == ""


def test_a_dead_letter_keeps_the_retrys_headers_but_not_the_buss_own_bookkeeping() -> None:
    retried = retry_copy(MESSAGE, failures=3, reason="boom", first_id="7-0")
    headers = dead_letter(retried, "d", ORIGIN, code="retries", reason="boom", error_type="", at=AT).headers
    assert (headers["retry-attempt"], headers["retry-reason"]) == ("3", "boom")
    assert "retry-first-id" not in headers


def test_a_dead_letter_of_a_dead_letter_tells_of_its_last_death() -> None:
    once = dead_letter(MESSAGE, "d1", ORIGIN, code="retries", reason="one", error_type="E", at=AT)
    origin = Origin("d1", "1-0", "repair", "fixer", attempts=1, deliveries=None)
    headers = dead_letter(once, "d2", origin, code="rejected", reason="two", error_type="", at=AT).headers
    assert (headers["dead-letter-reason"], headers["dead-letter-topic"]) == ("two", "d1")
    assert "dead-letter-error-type" not in headers, "the type of an earlier death is not this one's"
    assert "dead-letter-deliveries" not in headers, "the count of an earlier entry is not this one's"


# --- reasons


def test_a_reason_of_1_kib_is_kept_whole_and_one_byte_more_is_cut() -> None:
    assert MAX_REASON_BYTES == 1024
    assert cut("x" * 1024) == "x" * 1024
    assert cut("x" * 1025) == "x" * 1024


@pytest.mark.parametrize(("character", "size"), [("é", 2), ("€", 3), ("😀", 4)])
def test_a_reason_is_never_cut_within_a_character(character: str, size: int) -> None:
    for padding in range(size):
        kept = cut("x" * padding + character * 1024)
        assert kept == "x" * padding + character * ((1024 - padding) // size)


@given(st.text(st.characters(codec="utf-8")), st.integers(min_value=0, max_value=64))
def test_a_cut_text_is_the_longest_beginning_that_fits(text: str, limit: int) -> None:
    kept = cut(text, limit)
    assert text.startswith(kept)
    assert len(kept.encode()) <= limit
    if kept != text:
        assert len(text[: len(kept) + 1].encode()) > limit


def test_what_utf_8_cannot_carry_is_replaced_and_never_raises() -> None:
    assert cut("a\ud800b") == "a?b"


@pytest.mark.parametrize("reason", ["x" * 5000, "é" * 5000, "\udfff" * 5000], ids=["ascii", "two bytes", "surrogates"])
def test_reasons_and_types_in_headers_are_cut(reason: str) -> None:
    retried = retry_copy(MESSAGE, failures=1, reason=reason, first_id="7-0").headers["retry-reason"]
    headers = dead_letter(MESSAGE, "d", ORIGIN, code="c", reason=reason, error_type=reason, at=AT).headers
    for kept in (retried, headers["dead-letter-reason"], headers["dead-letter-error-type"]):
        assert len(kept.encode()) == 1024


# --- the retry stream's name


def slot(key: str) -> int:
    """The hash slot, as Redis Cluster's specification computes it."""
    data = key.encode()
    start = data.find(b"{")
    end = data.find(b"}", start + 1)
    if start != -1 and end > start + 1:
        data = data[start + 1 : end]
    return binascii.crc_hqx(data, 0) % 16384


def has_tag(topic: str) -> bool:
    start = topic.find("{")
    return start != -1 and topic.find("}", start + 1) > start + 1


@pytest.mark.parametrize(
    ("topic", "group", "name"),
    [
        ("orders", "billing", "anybus:{orders}:retry:billing"),
        ("orders.{42}", "billing", "anybus:11:orders.{42}:retry:billing"),
        ("a{", "g", "anybus:2:{a{}:retry:g"),
        ("{x}.a{y}", "g", "anybus:8:{x}.a{y}:retry:g"),
        ("orders", "group {odd}", "anybus:{orders}:retry:group {odd}"),
    ],
)
def test_the_name_has_the_topics_slot_and_of_a_topic_with_braces_its_length(topic: str, group: str, name: str) -> None:
    assert retry_stream(topic, group) == name


def test_the_slot_function_of_these_tests_is_rediss_own() -> None:
    assert slot("123456789") == 0x31C3 % 16384
    assert slot("{user1000}.following") == slot("{user1000}.followers") == slot("user1000")


topics = st.text(st.sampled_from("ab{}:.") | st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1)


@given(topics, st.text(min_size=1).filter(lambda text: text.isprintable()))
def test_the_retry_stream_lies_in_its_topics_slot(topic: str, group: str) -> None:
    assume(has_tag(topic) or "}" not in topic)
    assert slot(retry_stream(topic, group)) == slot(topic)


@given(topics, st.text("ab:{}", min_size=1), st.text("ab:{}", min_size=1))
def test_every_group_of_a_topic_has_its_own_retry_stream(topic: str, one: str, other: str) -> None:
    assume(one != other)
    assert retry_stream(topic, one) != retry_stream(topic, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "g"), ("{a}", "g")),
        (("a", "b:retry:c"), ("{a}:retry:b", "c")),
        (("{x}", "b:retry:c"), ("{x}:retry:b", "c")),
    ],
)
def test_no_two_topics_share_a_retry_stream(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert retry_stream(*one) != retry_stream(*other)


# --- undecodable


def test_what_was_not_decoded_stands_empty_where_its_raw_fields_are_kept() -> None:
    message = undecodable("orders", {"message": b"not json", "other": b"x"}, keep_bytes=False)
    assert (message.topic, message.payload, dict(message.headers)) == ("orders", b"", {})


@pytest.mark.parametrize("raw", [{}, {"other": b"x"}, {"message": b""}], ids=repr)
def test_an_entry_without_a_message_field_has_an_empty_payload(raw: dict[str, bytes]) -> None:
    assert undecodable("orders", raw, keep_bytes=True).payload == b""


def test_without_raw_fields_the_payload_is_what_the_message_field_held() -> None:
    message = undecodable("orders", {"message": b"not json", "other": b"x"}, keep_bytes=True)
    assert (message.payload, dict(message.headers)) == (b"not json", {})


@pytest.mark.parametrize("more", [0, 1, 100_000])
def test_a_payload_over_8_mib_is_cut_and_a_header_says_so(more: int) -> None:
    assert MAX_COPY_BYTES == 8 * 1024 * 1024
    body = b"abcdefgh" * (MAX_COPY_BYTES // 8) + b"x" * more
    message = undecodable("orders", {"message": body}, keep_bytes=True)
    assert message.payload == body[:MAX_COPY_BYTES]
    told = {"dead-letter-payload-cut-from": str(len(body))} if more else {}
    assert dict(message.headers) == told
