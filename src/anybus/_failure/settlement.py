"""Settlement: what the outcome of a delivery leads to. A pure table: no I/O, no clock, no random numbers.

When an entry is taken, :func:`on_taken` judges it: handle it, handle it alone (a suspect), or give up on it without
handling it. A handling ends with a :class:`Result`. :func:`decide` turns the result, the attempt, the policy, the time
and one random number into one decision: acknowledge, retry at a time, dead-letter, release, leave (in manual mode, if
the handler returned without settling), abandon (if the handler crashed), or only report.

Settling by hand uses the same table, so that ``delivery.retry()`` and ``raise Retry`` cannot differ.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final, Literal, Union, get_args

from .backoff import DelayList, ExponentialBackoff

SUSPECT_AFTER = 3
"""After this many deliveries without an outcome, an entry is a suspect."""


AckMode = Literal["auto-on-handler-success", "manual", "auto-on-receive"]

DeadLetterCode = Literal[
    "rejected", "retries", "gave-up", "expired", "deliveries", "malformed", "invalid", "unexpected", "too-large"
]
CODES: Final[tuple[DeadLetterCode, ...]] = get_args(DeadLetterCode)
"""The codes that this version writes to say why a message was given up on."""


@dataclass(frozen=True)
class Policy:
    """What the table needs to know about a subscription.

    :ivar counts_crashes: whether there is a crash budget: the backend must count deliveries, renew leases and release
        entries. Otherwise the subscription's own reclaims would also count entries that it holds, or that it never
        started to handle.
    :ivar drops_expired: messages that are too old are dropped. Otherwise they become dead letters.
    """

    ack_mode: AckMode = "auto-on-handler-success"
    max_retry: int = 3
    max_deliveries: int = 10
    backoff: ExponentialBackoff | DelayList = field(default_factory=ExponentialBackoff)
    counts_crashes: bool = True
    drops_expired: bool = False

    @property
    def max_attempts(self) -> int:
        return self.max_retry + 1


class Outcome(enum.Enum):
    RETURNED = "returned"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    RETRY = "retry requested"
    GAVE_UP = "not to be retried"
    INVALID = "its payload cannot be read"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    CRASHED = "raised something that is not an Exception"
    RELEASED = "released"
    MALFORMED = "malformed"
    MISSING = "missing"
    WORN_OUT = "delivered too often"
    EXPIRED = "too old to be handled"
    UNEXPECTED = "not what the subscription expects"
    TOO_LARGE = "too large to be handled"


@dataclass(frozen=True)
class Result:
    """How a handling ended, or why there was none.

    :ivar delay: the delay that a retry or a release asked for, in seconds; None = the policy's.
    :ivar error: the exception with which the handler ended.
    :ivar dropped: for a message that is not expected: drop it, without a dead letter.
    """

    outcome: Outcome
    reason: str = ""
    error_type: str = ""
    delay: float | None = None
    error: Exception | None = field(default=None, compare=False)
    dropped: bool = False


@dataclass(frozen=True)
class Ack:
    """Acknowledge."""


@dataclass(frozen=True)
class RetryAt:
    """Handle it again after ``delay`` seconds, that is at ``due``, as handling number ``attempt``."""

    due: float
    delay: float
    attempt: int
    reason: str


@dataclass(frozen=True)
class DeadLetter:
    """Give up on it: write a dead letter.

    :ivar dropped: only acknowledge it, because the subscription says so.
    """

    code: DeadLetterCode
    reason: str
    error_type: str = ""
    dropped: bool = False


@dataclass(frozen=True)
class Release:
    """Release it at once, uncounted."""


@dataclass(frozen=True)
class Leave:
    """Keep holding it, without renewal, until somebody settles it or its lease ends."""


@dataclass(frozen=True)
class LetGo:
    """Abandon it without telling the server: it stays pending, and counted, until its lease ends."""


@dataclass(frozen=True)
class Report:
    """Tell the observer if it failed. Nothing else can be done: it was acknowledged before the handler started."""


Decision = Union[Ack, RetryAt, DeadLetter, Release, Leave, LetGo, Report]

RETURNED = Result(Outcome.RETURNED)
CANCELLED = Result(Outcome.CANCELLED)
CRASHED = Result(Outcome.CRASHED)


_NOT_RETRIED: Final[dict[Outcome, DeadLetterCode]] = {Outcome.GAVE_UP: "gave-up", Outcome.INVALID: "invalid"}


class Verdict(enum.Enum):
    HANDLE = "handle"
    SUSPECT = "suspect"
    GIVE_UP = "give up"


def on_taken(deliveries: int | None, policy: Policy) -> Verdict:
    """What to do with an entry that was taken.

    :param deliveries: the server's count of its deliveries, including this one; None = the backend does not count.
    """
    if deliveries is None or not policy.counts_crashes or policy.ack_mode == "auto-on-receive":
        return Verdict.HANDLE
    if deliveries > policy.max_deliveries:
        return Verdict.GIVE_UP
    return Verdict.SUSPECT if deliveries > SUSPECT_AFTER else Verdict.HANDLE


def decide(
    result: Result,
    *,
    attempt: int,
    deliveries: int | None,
    policy: Policy,
    now: float,
    draw: float,
    expires_in: float | None = None,
) -> Decision:
    """What the result of a handling leads to.

    :param attempt: which handling it was, from 1.
    :param deliveries: the server's count of deliveries, for the reason of an entry that was delivered too often.
    :param now: the time in seconds. ``RetryAt.due`` is on the same clock.
    :param draw: a random number from [0, 1), for jitter.
    :param expires_in: seconds until the message is too old to be handled; None = it never is.
    """
    outcome = result.outcome
    unhandled = _decide_unhandled(result, deliveries, policy)
    if unhandled is not None:
        return unhandled
    if outcome is Outcome.REJECTED:
        # Also with auto-on-receive: there the entry is already acknowledged, and the copy is a plain publish.
        return DeadLetter("rejected", result.reason, result.error_type)
    if policy.ack_mode == "auto-on-receive":
        return Report()
    if outcome is Outcome.RETURNED:
        return Leave() if policy.ack_mode == "manual" else Ack()
    if outcome is Outcome.CANCELLED:
        return Release()
    if outcome is Outcome.CRASHED:
        return LetGo()
    if outcome is Outcome.RELEASED:
        return Release() if not result.delay else RetryAt(now + result.delay, result.delay, attempt, result.reason)
    if outcome in _NOT_RETRIED:
        return DeadLetter(_NOT_RETRIED[outcome], result.reason, result.error_type)
    if attempt >= policy.max_attempts:
        return DeadLetter("retries", result.reason, result.error_type)
    delay = policy.backoff.delay(attempt, draw) if result.delay is None else result.delay
    if expires_in is not None and delay >= expires_in:
        # A retry would be too old to be handled. Give up now, with the reason of this failure.
        return DeadLetter("expired", result.reason, result.error_type, dropped=policy.drops_expired)
    return RetryAt(now + delay, delay, attempt + 1, result.reason)


def _decide_unhandled(result: Result, deliveries: int | None, policy: Policy) -> Decision | None:
    """The decision about an entry that must not be handled. None = it was handled, or may be."""
    outcome = result.outcome
    if outcome is Outcome.MISSING:
        return Ack()
    if outcome is Outcome.MALFORMED:
        return DeadLetter("malformed", result.reason, result.error_type)
    if outcome is Outcome.WORN_OUT:
        before = (deliveries or 1) - 1  # the count includes this delivery, which has only begun
        reason = f"delivered {before} times without an outcome (max_deliveries={policy.max_deliveries})"
        return DeadLetter("deliveries", reason)
    if outcome is Outcome.EXPIRED:
        return DeadLetter("expired", result.reason, dropped=policy.drops_expired)
    if outcome is Outcome.UNEXPECTED:
        return DeadLetter("unexpected", result.reason, dropped=result.dropped)
    return DeadLetter("too-large", result.reason) if outcome is Outcome.TOO_LARGE else None
