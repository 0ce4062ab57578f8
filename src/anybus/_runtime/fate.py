"""Logs what becomes of a message, on one line each."""

from __future__ import annotations

import logging

from .._failure.settlement import DeadLetter, Outcome, Result, RetryAt
from .._reporting import said
from .context import Context
from .entry import DROPPED, PLAIN, RETRIED, Held, Stage

_TOLD = frozenset({Outcome.FAILED, Outcome.TIMED_OUT, Outcome.GAVE_UP, Outcome.INVALID})
"""Failures that were reported to ``on_error``."""

_UNHANDLED = frozenset({Outcome.WORN_OUT, Outcome.EXPIRED, Outcome.UNEXPECTED, Outcome.TOO_LARGE, Outcome.MALFORMED})


def tell_fate(context: Context, held: Held, ending: Result) -> None:
    """The server has stored a retry or a dead letter.

    :param ending: the result that led to it. (The ledger has cleared it by now.)
    """
    reporter, intent = context.reporter, held.intent
    decision = (held.settlement or PLAIN).decision
    if isinstance(decision, RetryAt) and intent == RETRIED:
        if not (reporter.hears_errors and ending.outcome in _TOLD):
            text, delay = "retry in %.3g s: %s", decision.delay
            reporter.log(logging.WARNING, RETRIED, text, delay, _why(context, held, ending), about=held, delay=delay)
    elif isinstance(decision, DeadLetter):
        code = decision.code
        what = "dropped" if intent == DROPPED else f"dead letter in {context.dead_letter_topic!r}"
        why = decision.reason if ending.outcome in _UNHANDLED else _why(context, held, ending)
        if ending.outcome is Outcome.MALFORMED:
            # Its error was reported when it was taken, and its uid is unknown.
            reporter.log(logging.INFO, intent, "%s (%s): %s", what, code, why, entry_id=held.id, code=code)
        elif not (reporter.hears_errors and reporter.hears_dead_letters):
            text = "%s (%s): %s"
            # A drop that the subscription asked for is no error.
            level = logging.INFO if decision.dropped else logging.ERROR
            reporter.log(level, intent, text, what, code, why, about=held, error=ending.error, code=code)


def tell_lost(context: Context, held: Held, scope: str, why: str) -> None:
    """An entry is no longer ours, or its lease could not be renewed."""
    reporter = context.reporter
    reporter.log(logging.WARNING, "lease-lost", "lease lost: %s", why, about=held)
    reporter.tell("on_lease_lost", scope, message_id=held.id, attempt=held.attempt, detail=why)


def tell_let_go(context: Context, held: Held) -> None:
    """In manual mode, a handler returned and nobody settled its delivery in time."""
    text = "abandoned: its handler returned, and nobody settled it in time; it is redelivered"
    context.reporter.log(logging.WARNING, "let-go", text, about=held)


def tell_suspect(context: Context, held: Held) -> None:
    """An entry that may have killed processes is handled alone."""
    text = "suspect: delivered %d times, this time included, without an outcome; handled alone (max_deliveries=%d)"
    limit = context.policy.max_deliveries
    context.reporter.log(logging.WARNING, "suspect", text, held.deliveries or 0, limit, about=held)


def tell_handled(context: Context, held: Held) -> None:
    """A handling has ended."""
    took = (context.clock() - held.started_at) * 1000
    what = held.intent if held.stage in (Stage.GONE, Stage.OPEN) else f"to be {held.intent}"
    if held.stage is Stage.RETURNED:
        what = "not settled yet"
    text = "handled: attempt %d of %d took %.3g ms: %s"
    maximum = context.reporter.max_attempts
    context.reporter.log(logging.DEBUG, "handled", text, held.attempt, maximum, took, what, about=held)


def tell_unsettled(context: Context, held: Held, ending: Result | None) -> None:
    """The outcome of a handling could not be stored. The entry is redelivered, perhaps to another consumer."""
    reporter = context.reporter
    if ending is None or ending.outcome in _UNHANDLED or (reporter.hears_errors and ending.outcome in _TOLD):
        return
    text = "it could not be %s: %s"
    reporter.log(
        logging.ERROR, "unsettled", text, held.intent, _why(context, held, ending), about=held, error=ending.error
    )


def _why(context: Context, held: Held, ending: Result) -> str:
    attempt = f"attempt {held.attempt} of {context.reporter.max_attempts}"
    if ending.outcome is Outcome.REJECTED:
        return f"rejected on {attempt}: {ending.reason or 'without a reason'}"
    if ending.outcome is Outcome.RETRY:
        return f"a retry was asked for on {attempt}: {ending.reason or 'without a reason'}"
    return f"the handler failed on {attempt}: {said(ending.error) if ending.error is not None else ending.reason}"
