"""Applies the application's own policies to failures. Whatever they raise or return, no message is lost."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

from .._ground.checks import check_delay
from .._ground.clock import now
from .._ground.errors import SerializationError
from .._messages.message import Message
from .copies import DEAD_LETTER_REASON, wire_time
from .policies import Failure, FailurePolicy, Rule
from .settlement import Outcome, Policy, Result

_WEIGHED = frozenset({Outcome.FAILED, Outcome.TIMED_OUT, Outcome.RETRY})

Report = Callable[[BaseException, str], None]


class Judgement:
    """Calls rules and backoff functions, catches their errors, and knows how old a message may be."""

    def __init__(self, policy: Policy, failure_policy: FailurePolicy) -> None:
        self._max_attempts = policy.max_attempts
        self._policy = failure_policy

    def weigh(self, result: Result, message: Message, attempt: int, report: Report) -> Result:
        """Apply the policies to a failure: it may be given up on, or get a retry delay of its own.

        :param report: is called if a rule or a function fails.
        """
        if result.outcome not in _WEIGHED:
            return result
        # The rules apply to exceptions. A handler that asks for a retry gets it.
        if result.outcome is not Outcome.RETRY and result.error is not None:
            if isinstance(result.error, SerializationError) and result.error.payload_of == message.uid:
                # The payload would be the same at the next try, so it is retried only if a rule names such errors.
                if not self._is_named(result.error, report):
                    return replace(result, outcome=Outcome.INVALID)
            elif self._gives_up_on(result.error, report):
                return replace(result, outcome=Outcome.GAVE_UP)
        asks = self._policy.backoff is not None and result.delay is None
        if asks and attempt < self._max_attempts:
            return replace(result, delay=self._ask_backoff(result, message, attempt, report))
        return result

    def _is_named(self, error: Exception, report: Report) -> bool:
        """Whether ``retry_on`` matches and ``give_up_on`` does not. Rules that fail do not count."""
        retry_on, give_up_on = self._policy.retry_on or (), self._policy.give_up_on or ()
        return any(self._matches(report, "retry_on", rule, error, False) for rule in retry_on) and not any(
            self._matches(report, "give_up_on", rule, error, False) for rule in give_up_on
        )

    def _gives_up_on(self, error: Exception, report: Report) -> bool:
        retry_on, give_up_on = self._policy.retry_on, self._policy.give_up_on
        # A rule that fails decides nothing: the message is retried, as if there were no rule.
        if give_up_on is not None and any(
            self._matches(report, "give_up_on", rule, error, False) for rule in give_up_on
        ):
            return True
        return retry_on is not None and not any(
            self._matches(report, "retry_on", rule, error, True) for rule in retry_on
        )

    def _matches(self, report: Report, field: str, rule: Rule, error: Exception, otherwise: bool) -> bool:
        if isinstance(rule, type):
            return isinstance(error, rule)
        try:
            answer: Any = rule(error)
            if isinstance(answer, bool):
                return answer
            _discard(answer)
            raise TypeError(f"a rule must return a bool, not {type(answer).__name__}")
        except (KeyboardInterrupt, SystemExit):
            raise  # perhaps from a signal handler, which can strike anywhere
        except BaseException as failure:  # noqa: ASYNC103 - it awaits nothing: no real cancellation
            report(failure, f"a rule of {field} failed: it does not prevent a retry")
            return otherwise  # noqa: ASYNC104

    def _ask_backoff(self, result: Result, message: Message, attempt: int, report: Report) -> float | None:
        ask = self._policy.backoff
        assert ask is not None
        failure = Failure(
            message=message,
            attempt=attempt,
            max_attempts=self._max_attempts,
            reason=result.reason,
            error=result.error,
        )
        try:
            answer: Any = ask(failure)
            _discard(answer)
            return check_delay("what retry_backoff returns", answer)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: ASYNC103 - it awaits nothing: no real cancellation
            report(error, "retry_backoff failed: the default backoff is used")
            return None  # noqa: ASYNC104

    def expires_in(self, message: Message, published_at: datetime | None) -> float | None:
        """Seconds until a message is too old to be handled, by our wall clock; None = it never is.

        :param published_at: when the original entry was stored, by the server's clock; None = unknown.
        """
        expires_at, max_age = _expiry(message), self._policy.max_age
        left: list[float] = []
        if expires_at is not None:
            left.append((expires_at - now()).total_seconds())
        if max_age is not None and published_at is not None:
            left.append(max_age - (now() - published_at).total_seconds())
        return min(left, default=None)

    def expired(self, message: Message, published_at: datetime | None) -> Result | None:
        """The result for an entry that is too old to be handled; None = it is not too old."""
        at = now()
        expires_at, max_age = _expiry(message), self._policy.max_age
        if expires_at is not None and at >= expires_at:
            return Result(Outcome.EXPIRED, f"expired at {wire_time(expires_at)}, before it was handled")
        if max_age is not None and published_at is not None and (at - published_at).total_seconds() >= max_age:
            stored = wire_time(published_at)
            reason = f"older than max_age ({max_age:.15g} s) before it was handled: stored at {stored}"
            return Result(Outcome.EXPIRED, reason)
        return None


def _expiry(message: Message) -> datetime | None:
    """When the message expires. A dead letter does not: otherwise nobody could subscribe to the expired ones."""
    if message.expires_at is None or DEAD_LETTER_REASON in message.headers:
        return None
    return message.expires_at


def _discard(answer: object) -> None:
    """Close a coroutine that nobody will await. Otherwise Python prints a warning."""
    if inspect.iscoroutine(answer):
        answer.close()
