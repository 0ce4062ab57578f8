"""Settlement: what a delivery's outcome leads to. A pure table, no I/O, no clock, no dice.

The theory of operation. An entry that was *taken* is first judged by :func:`on_taken`: handle it, handle it alone
(a suspect), or give it up unhandled. A handling ends in a :class:`Result`; :func:`decide` turns that, with the
attempt, the policy, the time and one random draw, into one decision: acknowledge, retry at a time, dead-letter,
release, leave (manual mode: its handler returned without settling), let go (its handler crashed), or only report.
Settling by hand goes through the same table, so that ``delivery.retry()`` and ``raise Retry`` cannot differ.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final, Literal, Union, get_args

from .backoff import DelayList, ExponentialBackoff

SUSPECT_AFTER = 3
"""So many hand-overs without an outcome make an entry a suspect."""


AckMode = Literal["auto-on-handler-success", "manual", "auto-on-receive"]

DeadLetterCode = Literal["rejected", "retries", "gave-up", "expired", "deliveries", "malformed", "invalid"]
CODES: Final[tuple[DeadLetterCode, ...]] = get_args(DeadLetterCode)
"""Why a message was given up: all that this version writes."""


@dataclass(frozen=True)
class Policy:
    """What the table needs to know of a subscription.

    :ivar counts_crashes: whether the backend counts deliveries, renews leases and releases; else our own reclaims
        would count up what we hold or what never started, and there is no crash budget.
    """

    ack_mode: AckMode = "auto-on-handler-success"
    max_retry: int = 3
    max_deliveries: int = 10
    backoff: ExponentialBackoff | DelayList = field(default_factory=ExponentialBackoff)
    counts_crashes: bool = True

    @property
    def max_attempts(self) -> int:
        return self.max_retry + 1


class Outcome(enum.Enum):
    RETURNED = "returned"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    RETRY = "retry asked for"
    GAVE_UP = "not to be retried"
    INVALID = "its payload cannot be read"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    CRASHED = "raised what is no Exception"
    RELEASED = "released"
    MALFORMED = "malformed"
    MISSING = "missing"
    WORN_OUT = "handed over too often"
    EXPIRED = "too old when it was taken"


@dataclass(frozen=True)
class Result:
    """How a handling ended, or why there was none.

    :ivar delay: seconds asked for by a retry or a release; None = the policy's.
    :ivar error: the exception that the handler ended with.
    """

    outcome: Outcome
    reason: str = ""
    error_type: str = ""
    delay: float | None = None
    error: Exception | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Ack:
    """Acknowledge."""


@dataclass(frozen=True)
class RetryAt:
    """Bring it back: after ``delay`` seconds, that is at ``due``, as a handling of number ``attempt``."""

    due: float
    delay: float
    attempt: int
    reason: str


@dataclass(frozen=True)
class DeadLetter:
    """Give it up."""

    code: DeadLetterCode
    reason: str
    error_type: str = ""


@dataclass(frozen=True)
class Release:
    """Hand it back at once, uncounted."""


@dataclass(frozen=True)
class Leave:
    """Keep holding it, without renewal, until somebody settles it or its lease ends."""


@dataclass(frozen=True)
class LetGo:
    """Stop holding it and tell the server nothing: it stays pending and counted until its lease ends."""


@dataclass(frozen=True)
class Report:
    """Nothing can be done any more (it was acknowledged before the start); tell the observer if it failed."""


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
    """What to do with an entry that was taken, by the server's count of its hand-overs (this one included)."""
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
    :param deliveries: the server's count for this entry, named in the reason of an entry that wore it out.
    :param now: the time in seconds, on whatever clock ``RetryAt.due`` shall be read.
    :param draw: a random number from [0, 1), for jitter.
    :param expires_in: seconds until the message is too old to be handled; None = it never is.
    """
    outcome = result.outcome
    if outcome is Outcome.MISSING:
        return Ack()
    if outcome is Outcome.MALFORMED:
        return DeadLetter("malformed", result.reason, result.error_type)
    if outcome is Outcome.WORN_OUT:
        before = (deliveries or 1) - 1  # the count has this hand-over in it, which begins only now
        reason = f"handed over {before} times without an outcome (max_deliveries={policy.max_deliveries})"
        return DeadLetter("deliveries", reason)
    if outcome is Outcome.EXPIRED:
        return DeadLetter("expired", result.reason)
    if outcome is Outcome.REJECTED:
        # In auto-on-receive too: the copy is then a plain publish, since the entry is acknowledged already.
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
        # It would only come back to be given up on unhandled: better now, with the reason of its failure.
        return DeadLetter("expired", result.reason, result.error_type)
    return RetryAt(now + delay, delay, attempt + 1, result.reason)
