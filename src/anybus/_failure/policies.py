"""The failure policies of a subscription, frozen and validated when created. Nothing here applies them."""

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
    """A failed handling, as a backoff function receives it.

    :ivar message: the message that was handled.
    :ivar attempt: the number of the failed handling, from 1.
    :ivar max_attempts: the number of the last handling before the message becomes a dead letter.
    :ivar reason: the exception's text, or the reason given to ``Retry`` or to ``delivery.retry()``.
    :ivar error: the exception (:class:`~anybus.HandlerTimeoutError` after ``handler_timeout``); None after
        ``delivery.retry()``, and after a stray cancellation (one that no cancel scope caused).
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

_BACKOFFS = (
    "an anybus.ExponentialBackoff, a number of seconds, a list of seconds, or a function that takes one anybus.Failure"
)
_RULES = "an exception type, a function that takes one exception, or a list of these"


@dataclass(frozen=True, kw_only=True)
class CircuitBreaker:
    """Pauses a subscription whose handler keeps failing. So a database that is down does not turn a whole topic into
    dead letters.

    After ``failures`` failures in a row, without a success in between, the circuit opens: the subscription takes
    nothing for ``pause`` seconds, and releases the waiting messages, uncounted. After the pause, the circuit is on
    trial: only one handling is started at a time. The first success closes the circuit, a failure opens it again.
    Handlings that were in flight when the circuit opened continue, and do not count as started during the trial.

    :param failures: how many failures in a row open the circuit.
    :param pause: how long the subscription takes nothing, in seconds.
    :raises ValidationError: if a value is refused.
    """

    failures: int = 20
    pause: float = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "failures", check_int("failures", self.failures, least=1))
        object.__setattr__(self, "pause", check_delay("pause", self.pause, positive=True))


@dataclass(frozen=True)
class FailurePolicy:
    """The parts of a retry policy that depend on the application's own code, or on the clock."""

    retry_on: tuple[Rule, ...] | None = None
    give_up_on: tuple[Rule, ...] | None = None
    backoff: BackoffFunction | None = None
    max_age: float | None = None


def check_backoff(value: Any) -> Backoff:
    """Check a ``retry_backoff``. A list of delays is returned as a tuple."""
    if isinstance(value, ExponentialBackoff):
        return value
    if isinstance(value, (int, float)):
        return check_delay("retry_backoff", value)
    listed = _listed(value)
    if listed is not None:
        if not listed:
            refuse("retry_backoff", value, "a list of at least one delay")
        return tuple(check_delay("retry_backoff", delay) for delay in listed)
    if not callable(value) or inspect.isclass(value):
        refuse("retry_backoff", value, _BACKOFFS)
    check_function("retry_backoff", value, "a plain function that takes one anybus.Failure")
    return cast("BackoffFunction", value)


def backoff_table(backoff: Backoff) -> ExponentialBackoff | DelayList:
    """The backoff for the settlement table. For a function: the fallback that is used if the function fails."""
    if isinstance(backoff, ExponentialBackoff):
        return backoff
    if isinstance(backoff, (int, float)):
        return DelayList((backoff,))
    return ExponentialBackoff() if callable(backoff) else DelayList(tuple(backoff))


def check_rules(field: str, value: Any) -> tuple[Rule, ...] | None:
    """Check ``retry_on`` or ``give_up_on``. The rules are returned as a tuple; None = there are none."""
    if value is None:
        return None
    listed = _listed(value)
    rules = (value,) if listed is None else listed
    if not rules:
        refuse(field, value, f"{_RULES} (for no rule use None, for no retries max_retry=0)")
    for rule in rules:
        _check_rule(field, rule)
    return rules


def _check_rule(field: str, rule: Any) -> None:
    if inspect.isclass(rule):
        if not issubclass(rule, Exception):
            refuse(field, rule, "a subclass of Exception, if it is a type")
        if issubclass(rule, (Retry, Reject)):
            refuse(field, rule, "a type other than Retry and Reject, which are always obeyed")
    elif callable(rule):
        check_function(field, rule, "a plain function that takes one exception")
    else:
        refuse(field, rule, _RULES)


def _listed(value: Any) -> tuple[Any, ...] | None:
    """The members of a list or tuple; None = the value is not a list or tuple."""
    return tuple(value) if _is_list(value) else None


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def check_no_contradiction(retry_on: tuple[Rule, ...] | None, give_up_on: tuple[Rule, ...] | None) -> None:
    """Refuse a type in ``retry_on`` that ``give_up_on`` covers completely: ``give_up_on`` takes precedence."""
    for wanted in retry_on or ():
        for unwanted in give_up_on or ():
            if wanted is unwanted or _covers(unwanted, wanted):
                refuse("retry_on", wanted, f"a rule that give_up_on ({unwanted!r}) does not cover completely")


def _covers(rule: Rule, other: Rule) -> bool:
    return isinstance(rule, type) and isinstance(other, type) and issubclass(other, rule)
