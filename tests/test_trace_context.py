"""W3C trace context in headers (https://www.w3.org/TR/trace-context/).

Specification: a context is made of a valid ``traceparent`` only (lower-case hexadecimal; version ``ff`` and ids of
zeros are invalid; version ``00`` has four parts exactly, later versions may append some). What arrives invalid counts
as absent, as the W3C asks; what an application makes invalid is refused. Headers written and read give the same
context again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from refusal import refused

from anybus import Headers, Message, PublishOptions, TraceContext

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
VALID = f"00-{TRACE}-{PARENT}-01"

INVALID = {
    "empty": "",
    "three parts": f"00-{TRACE}-{PARENT}",
    "five parts in version 00": f"{VALID}-more",
    "trailing dash in version 00": f"{VALID}-",
    "upper case": VALID.upper(),
    "version ff": f"ff-{TRACE}-{PARENT}-01",
    "trace id of zeros": f"00-{'0' * 32}-{PARENT}-01",
    "parent id of zeros": f"00-{TRACE}-{'0' * 16}-01",
    "trace id too short": f"00-{TRACE[:-1]}-{PARENT}-01",
    "parent id too long": f"00-{TRACE}-{PARENT}0-01",
    "not hexadecimal": f"00-{TRACE[:-1]}g-{PARENT}-01",
    "space before": f" {VALID}",
    "space after": f"{VALID} ",
    "line break after": f"{VALID}\n",
    "digits of another script": VALID.replace("0", "\u0660"),
    "later version with letters glued on": f"01-{TRACE}-{PARENT}-01more",
}


def test_a_context_tells_its_parts() -> None:
    context = TraceContext(VALID, "vendor=1", "user=2")
    assert (context.trace_id, context.parent_id, context.sampled) == (TRACE, PARENT, True)
    assert (context.tracestate, context.baggage) == ("vendor=1", "user=2")


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True), ("02", False), ("03", True), ("ff", True)])
def test_sampled_is_the_lowest_bit_of_the_flags(flags: str, sampled: bool) -> None:
    assert TraceContext(f"00-{TRACE}-{PARENT}-{flags}").sampled is sampled


@pytest.mark.parametrize("traceparent", INVALID.values(), ids=INVALID.keys())
def test_an_invalid_traceparent_is_refused_where_it_is_made(traceparent: str) -> None:
    with refused("traceparent", repr(traceparent), "32 hex digits"):
        TraceContext(traceparent)


@pytest.mark.parametrize("traceparent", INVALID.values(), ids=INVALID.keys())
def test_an_invalid_traceparent_that_arrives_counts_as_absent(traceparent: str) -> None:
    assert TraceContext.from_headers({"traceparent": traceparent, "tracestate": "a=1"}) is None


@pytest.mark.parametrize("field", ["traceparent", "tracestate", "baggage"])
@pytest.mark.parametrize("value", [None, 5, b"bytes"], ids=repr)
def test_a_field_that_is_no_text_is_refused(field: str, value: Any) -> None:
    fields: dict[str, Any] = {"traceparent": VALID, field: value}
    with refused(field, repr(value), "a str"):
        TraceContext(**fields)


@pytest.mark.parametrize("field", ["tracestate", "baggage"])
def test_a_lone_surrogate_is_refused(field: str) -> None:
    fields = {"traceparent": VALID, field: "\ud800"}
    with refused(field, repr("\ud800"), "UTF-8"):
        TraceContext(**fields)


@pytest.mark.parametrize("traceparent", [f"01-{TRACE}-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01-what-comes-later"])
def test_a_later_version_is_read_as_far_as_it_is_known(traceparent: str) -> None:
    context = TraceContext(traceparent)
    assert (context.trace_id, context.parent_id, context.sampled) == (TRACE, PARENT, True)
    assert context.to_headers() == {"traceparent": traceparent}


def test_no_traceparent_is_no_context_whatever_else_is_there() -> None:
    assert TraceContext.from_headers({}) is None
    assert TraceContext.from_headers({"tracestate": "a=1", "baggage": "b=2"}) is None
    assert TraceContext.from_headers({"Traceparent": VALID}) is None


def test_headers_leave_out_what_is_unset() -> None:
    assert TraceContext(VALID).to_headers() == {"traceparent": VALID}
    assert TraceContext(VALID, baggage="b=2").to_headers() == {"traceparent": VALID, "baggage": "b=2"}


def test_a_context_is_immutable_and_compares_by_value() -> None:
    context = TraceContext(VALID)
    field = "traceparent"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(context, field, "other")
    assert context == TraceContext(VALID)
    assert hash(context) == hash(TraceContext(VALID))


def test_a_context_travels_in_a_messages_headers_and_in_publish_options() -> None:
    context = TraceContext(VALID, "a=1", "b=2")
    assert Message("t", headers=context.to_headers()).trace_context == context
    assert TraceContext.from_headers(PublishOptions(metadata=context.to_headers()).metadata) == context


@given(
    trace=st.text("0123456789abcdef", min_size=32, max_size=32),
    parent=st.text("0123456789abcdef", min_size=16, max_size=16),
    flags=st.integers(min_value=0, max_value=255),
    tracestate=st.text(st.characters(codec="utf-8")),
    baggage=st.text(st.characters(codec="utf-8")),
)
def test_what_is_written_to_headers_is_read_from_them_again(
    trace: str, parent: str, flags: int, tracestate: str, baggage: str
) -> None:
    assume(set(trace) != {"0"} and set(parent) != {"0"})
    context = TraceContext(f"00-{trace}-{parent}-{flags:02x}", tracestate, baggage)
    assert TraceContext.from_headers(Headers(context.to_headers())) == context
    assert (context.trace_id, context.parent_id, context.sampled) == (trace, parent, bool(flags & 1))


@given(st.text())
def test_reading_any_text_as_a_traceparent_never_raises(text: str) -> None:
    found = TraceContext.from_headers({"traceparent": text})
    assert found is None or found.traceparent == text
