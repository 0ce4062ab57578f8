"""The protocol part, without a loop: bytes in, replies to whoever asked first, in order.

Specification: DESIGN.md, section 6, and issue 4: "the protocol part has no I/O in it and is tested without a loop";
hostile bytes end in a clear error, never in a reply given to the wrong caller. However the bytes are cut on their way,
the answers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anybus.backends.redis._protocol import BrokenProtocolError, Protocol, Replies, ServerError, pack


class Caller(Replies):
    """A caller who remembers how often it was woken."""

    __slots__ = ("woken",)

    def __init__(self, expected: int = 1) -> None:
        self.woken = 0
        super().__init__(expected, self.wake)

    def wake(self) -> None:
        self.woken += 1


def line_of(*expected: int) -> tuple[Protocol, list[Caller]]:
    """A conversation in which callers wait for so many replies each."""
    protocol = Protocol()
    callers = [Caller(number) for number in expected]
    for caller in callers:
        protocol.expect(caller)
    return protocol, callers


def feed(protocol: Protocol, data: bytes, cuts: Sequence[int] = ()) -> None:
    start = 0
    for cut in [*sorted(cuts), len(data)]:
        protocol.feed(data[start:cut])
        start = cut


def shown(reply: Any) -> Any:
    """A reply that can be compared."""
    if isinstance(reply, ServerError):
        return ("error", str(reply))
    if isinstance(reply, list):
        return [shown(item) for item in reply]  # pyright: ignore[reportUnknownVariableType]
    return reply


def resp(reply: Any) -> bytes:
    """How a server says it."""
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%s\r\n" % (len(reply), reply)
    if isinstance(reply, tuple):
        return f"-{reply[1]}\r\n".encode()
    return b"*%d\r\n" % len(reply) + b"".join(map(resp, reply))


single = (
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.binary(max_size=12)
    | st.sampled_from([("error", "ERR no"), ("error", "NOGROUP No such key 'a'"), ("error", "WRONGTYPE x")])
)
reply_values = st.recursive(single, lambda inner: st.lists(inner, max_size=3), max_leaves=6)


def test_replies_go_to_whoever_asked_first() -> None:
    protocol, (first, second, third) = line_of(1, 2, 1)
    protocol.feed(b"+a\r\n+b\r\n")
    assert (first.replies, first.woken) == ([b"a"], 1)
    assert (second.replies, second.woken) == ([b"b"], 0), "one of its two replies is still to come"
    protocol.feed(b"+c\r\n+d\r\n")
    assert (second.replies, second.woken) == ([b"b", b"c"], 1)
    assert (third.replies, third.woken) == ([b"d"], 1)
    assert not protocol.is_waiting


@given(data=st.data(), replies=st.lists(st.lists(reply_values, min_size=1, max_size=3), min_size=1, max_size=5))
def test_replies_are_the_same_however_the_bytes_are_cut(data: st.DataObject, replies: list[list[Any]]) -> None:
    protocol, callers = line_of(*map(len, replies))
    stream = b"".join(resp(reply) for part in replies for reply in part)
    feed(protocol, stream, data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    assert [[shown(reply) for reply in caller.replies] for caller in callers] == replies
    assert [caller.woken for caller in callers] == [1] * len(callers)
    assert not protocol.is_waiting


def test_replies_are_the_same_cut_at_every_byte() -> None:
    replies: list[list[Any]] = [[b"text\r\nwith a line"], [("error", "ERR no"), 7], [[None, [b"", -1]]], [None], [[]]]
    stream = b"".join(resp(reply) for part in replies for reply in part)
    for cuts in [range(len(stream)), *([cut] for cut in range(len(stream)))]:
        protocol, callers = line_of(*map(len, replies))
        feed(protocol, stream, cuts)
        assert [[shown(reply) for reply in caller.replies] for caller in callers] == replies
        assert [caller.woken for caller in callers] == [1] * len(callers)


def test_an_error_in_the_middle_of_a_pipeline_is_one_reply_among_others() -> None:
    protocol, (caller, next_one) = line_of(3, 1)
    protocol.feed(b"+OK\r\n-WRONGTYPE no stream\r\n:1\r\n+next\r\n")
    ok, error, one = caller.replies
    assert (ok, one) == (b"OK", 1)
    assert isinstance(error, ServerError)
    assert str(error) == "WRONGTYPE no stream"
    assert caller.error is None
    assert next_one.replies == [b"next"]


def test_an_error_inside_of_an_array_stays_there() -> None:
    protocol, (caller, next_one) = line_of(1, 1)
    protocol.feed(b"*2\r\n:1\r\n-ERR inner\r\n+next\r\n")
    assert shown(caller.replies) == [[1, ("error", "ERR inner")]]
    assert next_one.replies == [b"next"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\r\n",
        b"$abc\r\n",
        b"$-5\r\n",
        b"*-7\r\n",
        b":12x\r\n",
        b":99999999999999999999999\r\n",
    ],
)
def test_what_is_not_the_protocol_is_an_error_whoever_waits(garbage: bytes) -> None:
    for lines in [(), (1,), (2, 1)]:
        protocol, callers = line_of(*lines)
        with pytest.raises(BrokenProtocolError):
            protocol.feed(garbage + b"+OK\r\n+OK\r\n+OK\r\n")
        assert [caller.woken for caller in callers] == [0] * len(callers), "nobody takes garbage for an answer"
        protocol.fail(OSError("gone"))
        assert [caller.woken for caller in callers] == [1] * len(callers)


def test_what_came_before_the_garbage_still_reaches_its_callers() -> None:
    protocol, (first, second) = line_of(1, 1)
    with pytest.raises(BrokenProtocolError):
        protocol.feed(b"+a\r\n?what\r\n")
    assert first.replies == [b"a"]
    assert (second.replies, second.woken) == ([], 0)


@given(data=st.binary(max_size=60), waiting=st.integers(0, 3))
def test_any_bytes_are_replies_or_an_error_and_nothing_else(data: bytes, waiting: int) -> None:
    protocol, callers = line_of(*[1] * waiting)
    try:
        protocol.feed(data)
    except BrokenProtocolError as error:
        assert str(error)
    protocol.fail(OSError("gone"))
    assert [caller.woken for caller in callers] == [1] * waiting


@given(data=st.data(), replies=st.lists(reply_values, min_size=1, max_size=4))
def test_a_reply_that_is_cut_short_is_not_given_to_anybody(data: st.DataObject, replies: list[Any]) -> None:
    protocol, callers = line_of(*[1] * len(replies))
    stream = b"".join(map(resp, replies))
    end = data.draw(st.integers(0, len(stream) - 1))
    protocol.feed(stream[:end])
    whole = 0
    while len(b"".join(map(resp, replies[: whole + 1]))) <= end:
        whole += 1
    assert [caller.woken for caller in callers] == [1] * whole + [0] * (len(replies) - whole)
    assert protocol.is_waiting
    protocol.fail(OSError("gone"))
    for caller in callers[whole:]:
        assert caller.replies == []
        assert isinstance(caller.error, OSError)


def test_a_reply_that_nobody_waits_for_is_an_error() -> None:
    protocol, (caller,) = line_of(1)
    with pytest.raises(BrokenProtocolError, match="nobody waits"):
        protocol.feed(b"+mine\r\n+whose?\r\n")
    assert caller.replies == [b"mine"]
    with pytest.raises(BrokenProtocolError, match="nobody waits"):
        Protocol().feed(b":1\r\n")


def test_an_unexpected_reply_is_shown_cut() -> None:
    with pytest.raises(BrokenProtocolError) as caught:
        Protocol().feed(resp(b"x" * 100_000))
    assert len(str(caught.value)) < 200


def test_failing_wakes_everybody_once_with_the_error_and_leaves_nobody_waiting() -> None:
    protocol, callers = line_of(1, 2, 1)
    protocol.feed(b"+a\r\n+b\r\n")
    error = OSError("gone")
    protocol.fail(error)
    assert [caller.woken for caller in callers] == [1, 1, 1]
    assert [caller.error for caller in callers] == [None, error, error]
    assert not protocol.is_waiting
    protocol.fail(error)
    assert [caller.woken for caller in callers] == [1, 1, 1]


def test_deep_nesting_is_a_reply_or_an_error() -> None:
    protocol, (caller,) = line_of(1)
    try:
        protocol.feed(b"*1\r\n" * 100_000 + b":1\r\n")
    except BrokenProtocolError:
        protocol.fail(OSError("gone"))
    assert caller.woken == 1


encodable = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@given(st.lists(st.lists(st.binary(max_size=20) | encodable | st.integers(), min_size=1, max_size=4)))
def test_commands_are_packed_as_arrays_of_bulk_strings_one_after_another(commands: list[list[Any]]) -> None:
    reader = hiredis.Reader()
    reader.feed(pack(commands))
    for command in commands:
        wanted = [part if isinstance(part, bytes) else str(part).encode() for part in command]
        assert reader.gets() == wanted
    assert reader.gets() is False


@pytest.mark.parametrize("argument", [None, object(), ["a"], ("a",)], ids=["none", "object", "list", "tuple"])
def test_an_argument_of_another_type_is_refused(argument: Any) -> None:
    with pytest.raises(TypeError):
        pack([("SET", "a", argument)])
