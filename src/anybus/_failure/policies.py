"""What becomes of failures: policies of a subscription, frozen and checked when made. Nothing here runs them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union, cast

from .._ground.callables import check_function
from .._ground.checks import check_delay, check_int, refuse
from .._messages.message import Message
from .backoff import DelayList, ExponentialBackoff
from .verdicts import Reject, Retry


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A handling that failed, as a backoff function sees it.

    :ivar message: the message that was handled.
    :ivar attempt: which handling failed, from 1.
    :ivar max_attempts: the last one before the message becomes a dead letter.
    :ivar reason: what the exception said, or ``Retry`` or ``delivery.retry()`` gave as reason.
    :ivar error: the exception (:class:`~anybus.HandlerTimeoutError` after ``handler_timeout``); None after
        ``delivery.retry()``, and for a cancellation that nobody asked for.
    """

    message: Message
    attempt: int
    max_attempts: int
    reason: str
    error: Exception | None


BackoffFunction = Callable[[Failure], float]
Backoff = Union[ExponentialBackoff, float, Sequence[float], BackoffFunction]
Rule = Union[type[Exception], Callable[[Exception], bool]]
Rules = Union[Rule, Sequence[Rule]]

_BACKOFFS = "an anybus.ExponentialBackoff, a number of seconds, a list of them, or a function of an anybus.Failure"
_RULES = "an exception type, a function of an exception, or a list of these"


@dataclass(frozen=True, kw_only=True)
class CircuitBreaker:
    """Pauses a subscription whose handler only fails, so that a database that is down does not send a whole topic to
    the dead letters.

    After ``failures`` failures in a row, without one success, nothing is taken for ``pause`` seconds, and what waits is
    handed back, uncounted. Then it is on trial: one handling begins at a time, until one succeeds; a failure before
    that pauses again. What was in flight when it opened goes on, and does not count as one that begins.

    :param failures: so many in a row.
    :param pause: seconds.
    :raises ValidationError: if a value is refused.
    """

    failures: int = 20
    pause: float = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "failures", check_int("failures", self.failures, least=1))
        object.__setattr__(self, "pause", check_delay("pause", self.pause, positive=True))


@dataclass(frozen=True)
class FailurePolicy:
    """The parts of a retry policy that the application's own code decides, or the clock."""

    retry_on: tuple[Rule, ...] | None = None
    give_up_on: tuple[Rule, ...] | None = None
    backoff: BackoffFunction | None = None
    max_age: float | None = None


def check_backoff(value: Any) -> Backoff:
    """The value, a list of delays as a tuple."""
    if isinstance(value, ExponentialBackoff):
        return value
    if isinstance(value, (int, float)):
        return check_delay("retry_backoff", value)
    listed = _listed(value)
    if listed is not None:
        if not listed:
            refuse("retry_backoff", value, "at least one delay, where a list is given")
        return tuple(check_delay("retry_backoff", delay) for delay in listed)
    if not callable(value) or inspect.isclass(value):
        refuse("retry_backoff", value, _BACKOFFS)
    check_function("retry_backoff", value, "a plain function of an anybus.Failure")
    return cast("BackoffFunction", value)


def backoff_table(backoff: Backoff) -> ExponentialBackoff | DelayList:
    """What the settlement table asks for delays. For a function: what stands in for it where it fails."""
    if isinstance(backoff, ExponentialBackoff):
        return backoff
    if isinstance(backoff, (int, float)):
        return DelayList((backoff,))
    return ExponentialBackoff() if callable(backoff) else DelayList(tuple(backoff))


def check_rules(field: str, value: Any) -> tuple[Rule, ...] | None:
    """The rules as a tuple; None = none were given."""
    if value is None:
        return None
    listed = _listed(value)
    rules = (value,) if listed is None else listed
    if not rules:
        refuse(field, value, f"{_RULES}; None = no rule, and max_retry=0 = no retries")
    for rule in rules:
        _check_rule(field, rule)
    return rules


def _check_rule(field: str, rule: Any) -> None:
    if inspect.isclass(rule):
        if not issubclass(rule, Exception):
            refuse(field, rule, "a subclass of Exception, where a type is given")
        if issubclass(rule, (Retry, Reject)):
            refuse(field, rule, "another type than Retry and Reject, which always mean what they say")
    elif callable(rule):
        check_function(field, rule, "a plain function of an exception")
    else:
        refuse(field, rule, _RULES)


def _listed(value: Any) -> tuple[Any, ...] | None:
    """The members of a list or tuple; None = it is none."""
    return tuple(value) if _is_list(value) else None


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def check_no_contradiction(retry_on: tuple[Rule, ...] | None, give_up_on: tuple[Rule, ...] | None) -> None:
    """``give_up_on`` wins, so a type that it covers wholly would be named in ``retry_on`` in vain."""
    for wanted in retry_on or ():
        for unwanted in give_up_on or ():
            if wanted is unwanted or _covers(unwanted, wanted):
                refuse("retry_on", wanted, f"without what give_up_on ({unwanted!r}) always gives up on")


def _covers(rule: Rule, other: Rule) -> bool:
    return isinstance(rule, type) and isinstance(other, type) and issubclass(other, rule)
