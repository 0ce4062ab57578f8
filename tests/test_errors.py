"""Errors: what the library raises can be copied and sent to another process, and says the same there.

Specification: every public exception is pickled and copied with its type, its text, its arguments and its attributes.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import anybus
import anybus.abc
import anybus.backends.memory
import anybus.backends.redis
from anybus import (
    BackendError,
    EventBusError,
    GroupLostError,
    HandlerTimeoutError,
    Message,
    NotConfirmedError,
    Reject,
    Retry,
    SerializationError,
    ServerFullError,
)


def public_exceptions() -> list[type[Any]]:
    modules: list[ModuleType] = [anybus, anybus.abc, anybus.backends.memory, anybus.backends.redis]
    found = [value for module in modules for value in vars(module).values() if inspect.isclass(value)]
    return sorted({kind for kind in found if issubclass(kind, BaseException)}, key=lambda kind: str(kind.__name__))


EXAMPLES: dict[type[Any], list[Exception]] = {
    BackendError: [BackendError("no", may_have_happened=False, can_pass=True), BackendError("no")],
    NotConfirmedError: [NotConfirmedError("stored as 1-0, but ...", entry_id="1-0")],
    GroupLostError: [GroupLostError("orders", "billing", "5-0"), GroupLostError("orders", "billing")],
    ServerFullError: [ServerFullError("full", may_have_happened=False), ServerFullError("full")],
    SerializationError: [SerializationError("no", payload_of="u-1"), SerializationError("no")],
    Retry: [Retry("later", delay=1.5), Retry()],
    Reject: [Reject("never"), Reject()],
}
"""Of exceptions that keep more than their text."""

ALL = [error for kind in public_exceptions() for error in EXAMPLES.get(kind) or [kind("said", "more"), kind("said")]]


def pickled(protocol: int) -> Callable[[Any], Any]:
    return lambda error: pickle.loads(pickle.dumps(error, protocol))


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {protocol}": pickled(protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)},
}


def told(error: Any) -> dict[str, Any]:
    """All that an exception tells."""
    names = [name for name in dir(type(error)) if isinstance(getattr(type(error), name), property)]
    return {"text": str(error), "args": error.args, **vars(error), **{name: getattr(error, name) for name in names}}


def test_there_are_public_exceptions_and_each_has_an_example() -> None:
    kinds = public_exceptions()
    assert {EventBusError, GroupLostError, HandlerTimeoutError, Retry, Reject} <= set(kinds)
    assert {type(error) for error in ALL} == set(kinds)


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_a_copy_of_every_exception_says_the_same(error: Exception, way: Callable[[Any], Any]) -> None:
    found = way(error)
    assert type(found) is type(error)
    assert told(found) == told(error)
    assert found is not error


class FloorLostError(GroupLostError):
    """As a backend may derive one, with more to tell."""

    reason = "unknown"


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES.keys())
def test_a_copy_keeps_what_was_added_to_an_exception(way: Callable[[Any], Any]) -> None:
    error = FloorLostError("orders", "billing", "5-0")
    error.reason = "FLUSHALL"
    error.can_pass = False
    found = way(error)
    assert type(found) is FloorLostError
    assert (found.reason, found.can_pass, found.safe_id, str(found)) == ("FLUSHALL", False, "5-0", str(error))


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES.keys())
def test_what_a_failed_handling_raises_survives_the_way_to_another_process(way: Callable[[Any], Any]) -> None:
    message = Message("t", b"no json")
    with pytest.raises(SerializationError) as caught:
        message.json()
    assert way(caught.value).payload_of == message.uid
