"""The settlement table: what the outcome of a handling leads to. Pure: no loop, no clock, no dice.

Specification (DESIGN.md, section 4):

- returned: ack; in manual mode leave it (held, unrenewed); acked on receipt: nothing is left to do.
- raised, timed out: retry after the backoff; a retry asked for: the same, after its own delay if it named one.
- rejected: dead letter, in every mode.
- cancelled: released, uncounted; released by hand with a delay: comes back with the same attempt.
- the budget: ``max_retry`` retries after the first handling, then a dead letter with the reason of the last failure.
- malformed: dead letter; missing: ack; handed over more than ``max_deliveries`` times: dead letter, unhandled;
  after three hand-overs without an outcome a suspect, where the backend counts and renews.

With it: the backoff (full jitter within its bound, recovery between 0.1 and 5 s) and the words a handler may raise.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused

from anybus import ExponentialBackoff, Reject, Retry
from anybus._failure.backoff import RECOVERY, DelayList, recovery_delay
from anybus._failure.settlement import (
    CANCELLED,
    CRASHED,
    RETURNED,
    SUSPECT_AFTER,
    Ack,
    AckMode,
    DeadLetter,
    Decision,
    Leave,
    LetGo,
    Outcome,
    Policy,
    Release,
    Report,
    Result,
    RetryAt,
    Verdict,
    decide,
    on_taken,
)
from anybus._options import ACK_MODES

NOW = 1000.0
MAX_RETRY = 3
BACKOFF = ExponentialBackoff(initial=1.0, factor=2.0, maximum=60.0, jitter=False)
AUTO: AckMode = "auto-on-handler-success"
MANUAL: AckMode = "manual"
ON_RECEIVE: AckMode = "auto-on-receive"
FAILURES = (Outcome.FAILED, Outcome.TIMED_OUT, Outcome.RETRY)
ATTEMPTS = (1, 2, MAX_RETRY, MAX_RETRY + 1, MAX_RETRY + 2, 1000)
DELIVERIES = (None, 1, 3, 4, 10, 11)


def policy(mode: AckMode = AUTO, *, max_retry: int = MAX_RETRY, backoff: ExponentialBackoff = BACKOFF) -> Policy:
    return Policy(ack_mode=mode, max_retry=max_retry, backoff=backoff)


def settle(result: Result, *, mode: AckMode = AUTO, attempt: int = 1, deliveries: int | None = 1) -> Decision:
    return decide(result, attempt=attempt, deliveries=deliveries, policy=policy(mode), now=NOW, draw=0.5)


def expected(outcome: Outcome, mode: AckMode, attempt: int, deliveries: int | None) -> Decision:
    """The design's table, written a second time: by outcome first, then by mode."""
    table: dict[Outcome, Decision] = {
        Outcome.MISSING: Ack(),
        Outcome.MALFORMED: DeadLetter("malformed", "why", "E"),
        Outcome.REJECTED: DeadLetter("rejected", "why", "E"),
        Outcome.EXPIRED: DeadLetter("expired", "why"),
        Outcome.UNEXPECTED: DeadLetter("unexpected", "why"),
        Outcome.TOO_LARGE: DeadLetter("too-large", "why"),
        Outcome.WORN_OUT: DeadLetter(
            "deliveries", f"delivered {(deliveries or 1) - 1} times without an outcome (max_deliveries=10)"
        ),
    }
    if outcome in table:
        return table[outcome]
    if mode == ON_RECEIVE:
        return Report()
    if outcome is Outcome.GAVE_UP:
        return DeadLetter("gave-up", "why", "E")
    if outcome is Outcome.INVALID:
        return DeadLetter("invalid", "why", "E")
    if outcome in FAILURES:
        if attempt > MAX_RETRY:
            return DeadLetter("retries", "why", "E")
        delay = float(2 ** (attempt - 1))
        return RetryAt(NOW + delay, delay, attempt + 1, "why")
    if outcome is Outcome.RETURNED:
        return Leave() if mode == MANUAL else Ack()
    if outcome is Outcome.CRASHED:
        return LetGo()
    assert outcome in (Outcome.CANCELLED, Outcome.RELEASED)
    return Release()


@pytest.mark.parametrize("deliveries", DELIVERIES)
@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize("mode", ACK_MODES)
@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_leads_to_what_the_design_says(
    outcome: Outcome, mode: AckMode, attempt: int, deliveries: int | None
) -> None:
    decision = settle(Result(outcome, "why", "E"), mode=mode, attempt=attempt, deliveries=deliveries)
    assert decision == expected(outcome, mode, attempt, deliveries)


def test_the_modes_of_the_type_are_those_of_the_table() -> None:
    assert get_args(AckMode) == ACK_MODES == (AUTO, MANUAL, ON_RECEIVE)


def test_the_results_kept_ready_are_what_they_are_called() -> None:
    assert Result(Outcome.RETURNED) == RETURNED
    assert Result(Outcome.CANCELLED) == CANCELLED
    assert Result(Outcome.CRASHED) == CRASHED


def test_three_retries_mean_four_handlings() -> None:
    assert policy().max_attempts == 4
    assert [type(settle(Result(Outcome.FAILED), attempt=attempt)) for attempt in (1, 2, 3, 4)] == [
        RetryAt,
        RetryAt,
        RetryAt,
        DeadLetter,
    ]


@pytest.mark.parametrize("outcome", FAILURES)
def test_without_retries_the_first_failure_is_the_last(outcome: Outcome) -> None:
    result = Result(outcome, "why", delay=5.0 if outcome is Outcome.RETRY else None)
    decision = decide(result, attempt=1, deliveries=1, policy=policy(max_retry=0), now=NOW, draw=0.0)
    assert decision == DeadLetter("retries", "why")


@pytest.mark.parametrize("delay", [0.0, 0.25, 3600.0])
def test_a_retry_that_names_its_delay_waits_exactly_that_long(delay: float) -> None:
    decision = settle(Result(Outcome.RETRY, "later", delay=delay), attempt=2)
    assert decision == RetryAt(NOW + delay, delay, 3, "later")


@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize("mode", [AUTO, MANUAL])
def test_a_release_with_a_delay_keeps_the_attempt_and_knows_no_budget(mode: AckMode, attempt: int) -> None:
    decision = settle(Result(Outcome.RELEASED, delay=7.5), mode=mode, attempt=attempt)
    assert decision == RetryAt(NOW + 7.5, 7.5, attempt, "")


@pytest.mark.parametrize("delay", [None, 0.0])
def test_a_release_without_a_delay_hands_back_at_once(delay: float | None) -> None:
    assert settle(Result(Outcome.RELEASED, delay=delay)) == Release()


def test_a_dead_letter_carries_the_last_failures_reason_and_type() -> None:
    decision = settle(Result(Outcome.FAILED, "no such customer", "shop.NoCustomer"), attempt=4)
    assert decision == DeadLetter("retries", "no such customer", "shop.NoCustomer")


@pytest.mark.parametrize(
    ("expires_in", "expired"), [(None, False), (1e9, False), (2.5, False), (2.0, True), (-1, True)]
)
@pytest.mark.parametrize("outcome", FAILURES)
def test_a_retry_that_would_come_too_late_is_given_up_on_now(
    outcome: Outcome, expires_in: float | None, expired: bool
) -> None:
    decision = decide(
        Result(outcome, "why", "E"),
        attempt=2,
        deliveries=1,
        policy=policy(),
        now=NOW,
        draw=0.5,
        expires_in=expires_in,
    )
    assert decision == (DeadLetter("expired", "why", "E") if expired else RetryAt(NOW + 2.0, 2.0, 3, "why"))


def test_what_is_dropped_is_told_by_the_policy_and_by_the_rule() -> None:
    dropping = Policy(drops_expired=True, backoff=BACKOFF)
    expired = decide(Result(Outcome.EXPIRED, "why"), attempt=1, deliveries=1, policy=dropping, now=NOW, draw=0)
    assert expired == DeadLetter("expired", "why", dropped=True)
    failed = decide(
        Result(Outcome.FAILED, "why"), attempt=1, deliveries=1, policy=dropping, now=NOW, draw=0, expires_in=0.5
    )
    assert failed == DeadLetter("expired", "why", dropped=True)
    assert settle(Result(Outcome.UNEXPECTED, "why", dropped=True)) == DeadLetter("unexpected", "why", dropped=True)


@pytest.mark.parametrize("outcome", [Outcome.RETURNED, Outcome.RELEASED, Outcome.CANCELLED, Outcome.MISSING])
def test_what_did_not_fail_is_not_given_up_on_for_its_age(outcome: Outcome) -> None:
    result = Result(outcome, delay=5.0 if outcome is Outcome.RELEASED else None)
    decision = decide(result, attempt=9, deliveries=1, policy=policy(), now=NOW, draw=0.5, expires_in=-1)
    assert not isinstance(decision, DeadLetter)


# --- taken


@pytest.mark.parametrize("mode", ACK_MODES)
@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("deliveries", [None, 0, 1, 2, 3, 4, 5, 9, 10, 11, 1000])
def test_an_entry_is_judged_by_the_servers_count_when_it_is_taken(
    deliveries: int | None, counts: bool, mode: AckMode
) -> None:
    verdict = on_taken(deliveries, Policy(ack_mode=mode, max_deliveries=10, counts_crashes=counts))
    if deliveries is None or not counts or mode == ON_RECEIVE or deliveries <= 3:
        assert verdict is Verdict.HANDLE
    elif deliveries <= 10:
        assert verdict is Verdict.SUSPECT
    else:
        assert verdict is Verdict.GIVE_UP


def test_the_least_budget_still_lets_an_entry_be_handled_alone_once() -> None:
    least = Policy(max_deliveries=4)
    assert [on_taken(count, least) for count in (3, 4, 5)] == [Verdict.HANDLE, Verdict.SUSPECT, Verdict.GIVE_UP]


@given(
    st.integers(min_value=0, max_value=10_000),
    st.integers(min_value=SUSPECT_AFTER + 1, max_value=10_000),
    st.sampled_from(ACK_MODES),
    st.booleans(),
)
def test_a_higher_count_never_leads_to_a_milder_verdict(
    deliveries: int, max_deliveries: int, mode: AckMode, counts: bool
) -> None:
    order = [Verdict.HANDLE, Verdict.SUSPECT, Verdict.GIVE_UP]
    against = Policy(ack_mode=mode, max_deliveries=max_deliveries, counts_crashes=counts)
    now, later = (order.index(on_taken(count, against)) for count in (deliveries, deliveries + 1))
    assert now <= later <= now + 1
    if deliveries <= SUSPECT_AFTER:
        assert now == 0
    assert (now == 2) == (counts and mode != ON_RECEIVE and deliveries > max_deliveries)


# --- properties of the whole table


def some_backoff(initial: float, factor: float, more: float, jitter: bool) -> ExponentialBackoff:
    return ExponentialBackoff(initial=initial, factor=factor, maximum=initial + more, jitter=jitter)


outcomes = st.sampled_from(list(Outcome))
modes = st.sampled_from(ACK_MODES)
attempts = st.integers(min_value=1, max_value=2**32)
draws = st.floats(min_value=0.0, max_value=1.0, exclude_max=True)
delays = st.floats(min_value=0.0, max_value=1e6)
clocks = st.floats(min_value=-1e9, max_value=1e9)
backoffs = st.builds(
    some_backoff,
    st.floats(min_value=0.0, max_value=1e6),
    st.floats(min_value=1.0, max_value=1e6),
    st.floats(min_value=0.0, max_value=1e6),
    st.booleans(),
)
policies = st.builds(
    Policy,
    ack_mode=modes,
    max_retry=st.integers(min_value=0, max_value=1000),
    max_deliveries=st.integers(min_value=4, max_value=1000),
    backoff=backoffs,
    counts_crashes=st.booleans(),
)
results = st.builds(Result, outcomes, st.text(), st.text(), st.none() | delays)


@given(results, attempts, st.none() | st.integers(1, 1000), policies, clocks, draws)
def test_the_table_answers_everything_and_keeps_its_laws(
    result: Result, attempt: int, deliveries: int | None, policy: Policy, now: float, draw: float
) -> None:
    decision = decide(result, attempt=attempt, deliveries=deliveries, policy=policy, now=now, draw=draw)
    released = result.outcome is Outcome.RELEASED
    if isinstance(decision, RetryAt):
        assert decision.due == now + decision.delay
        assert decision.delay >= 0
        assert released or attempt <= policy.max_retry, "it never retries beyond max_retry"
        assert decision.attempt == (attempt if released else attempt + 1), "only a failure counts"
        assert decision.reason == result.reason
    if released:
        assert isinstance(decision, (Release, RetryAt, Report)), "a release never gives up"
    if result.outcome is Outcome.RETURNED:
        assert isinstance(decision, {AUTO: Ack, MANUAL: Leave, ON_RECEIVE: Report}[policy.ack_mode])
    if isinstance(decision, LetGo):
        assert result.outcome is Outcome.CRASHED, "what has an outcome gets it"
    if isinstance(decision, Ack):
        assert result.outcome in (Outcome.RETURNED, Outcome.MISSING), "nothing that failed is acknowledged"
    if policy.ack_mode == ON_RECEIVE:
        assert isinstance(decision, (Ack, DeadLetter, Report)), "what is acknowledged cannot come back"


@given(results, attempts, policies, clocks, draws)
def test_the_same_question_gets_the_same_answer(
    result: Result, attempt: int, policy: Policy, now: float, draw: float
) -> None:
    first, second = (
        decide(result, attempt=attempt, deliveries=None, policy=policy, now=now, draw=draw) for _ in range(2)
    )
    assert first == second


@given(st.integers(min_value=0, max_value=20), st.sampled_from(FAILURES), draws)
def test_a_message_that_always_fails_is_handled_max_retry_plus_one_times(
    max_retry: int, outcome: Outcome, draw: float
) -> None:
    attempt, handlings = 1, 1
    while True:
        decision = decide(
            Result(outcome), attempt=attempt, deliveries=1, policy=policy(max_retry=max_retry), now=NOW, draw=draw
        )
        if isinstance(decision, DeadLetter):
            break
        assert isinstance(decision, RetryAt)
        attempt, handlings = decision.attempt, handlings + 1
    assert (handlings, decision.code) == (max_retry + 1, "retries")


# --- the backoff


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=5), st.integers(min_value=1, max_value=2**32), draws)
def test_a_list_of_delays_is_followed_in_order_and_its_last_repeats(
    delays: list[float], failures: int, draw: float
) -> None:
    assert DelayList(tuple(delays)).delay(failures, draw) == delays[min(failures, len(delays)) - 1]


def test_the_default_backoff_doubles_from_one_second_to_a_minute_with_full_jitter() -> None:
    backoff = ExponentialBackoff()
    assert (backoff.initial, backoff.factor, backoff.maximum, backoff.jitter) == (1.0, 2.0, 60.0, True)
    assert [BACKOFF.delay(failures, 0.0) for failures in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]


@given(backoffs, st.integers(min_value=1, max_value=2**32), draws)
def test_a_delay_lies_between_zero_and_its_bound_whatever_is_drawn(
    backoff: ExponentialBackoff, failures: int, draw: float
) -> None:
    bound = ExponentialBackoff(
        initial=backoff.initial, factor=backoff.factor, maximum=backoff.maximum, jitter=False
    ).delay(failures, draw)
    delay = backoff.delay(failures, draw)
    assert math.isfinite(delay)
    assert 0 <= delay <= bound <= backoff.maximum
    assert delay == (bound * draw if backoff.jitter else bound), "full jitter is even between zero and the bound"


@given(backoffs, st.integers(min_value=1, max_value=200))
def test_the_bound_never_shrinks_with_more_failures(backoff: ExponentialBackoff, failures: int) -> None:
    exact = ExponentialBackoff(initial=backoff.initial, factor=backoff.factor, maximum=backoff.maximum, jitter=False)
    assert exact.delay(failures, 0.0) <= exact.delay(failures + 1, 0.0)
    assert exact.delay(1, 0.0) == backoff.initial


@given(st.integers(min_value=1, max_value=2**32), draws)
def test_recovery_waits_from_half_its_bound_to_its_bound_and_at_most_five_seconds(failures: int, draw: float) -> None:
    bound = min(0.1 * 2 ** min(failures - 1, 50), 5.0)
    assert bound / 2 <= recovery_delay(failures, draw) <= bound


def test_recovery_begins_at_a_tenth_of_a_second_and_is_capped_at_five() -> None:
    assert (RECOVERY.initial, RECOVERY.maximum) == (0.1, 5.0)


@pytest.mark.parametrize("field", ["initial", "factor", "maximum"])
@pytest.mark.parametrize("value", [-1, -0.001, math.nan, math.inf, True, "1", None], ids=repr)
def test_a_backoff_of_no_number_is_refused(field: str, value: Any) -> None:
    with refused(field, repr(value), "zero or more"):
        ExponentialBackoff(**{field: value})


@pytest.mark.parametrize("field", ["initial", "factor", "maximum"])
def test_a_backoff_of_an_enormous_int_is_refused_like_any_other_bad_value(field: str) -> None:
    fields: dict[str, Any] = {field: 10**400}
    with refused(field, "1000000", "number"):
        ExponentialBackoff(**fields)


@pytest.mark.parametrize("value", [0, 0.5, 1_000_001])
def test_a_factor_that_shrinks_or_explodes_is_refused(value: float) -> None:
    with refused("factor", repr(value), "1 to 1,000,000"):
        ExponentialBackoff(factor=value)


def test_a_cap_below_the_beginning_is_refused() -> None:
    with refused("maximum", "1.0", "at least initial (2.0)"):
        ExponentialBackoff(initial=2.0, maximum=1.0)


@pytest.mark.parametrize("value", ["false", "", None], ids=repr)
def test_a_jitter_that_is_no_bool_is_refused(value: Any) -> None:
    with refused("jitter", repr(value), "bool"):
        ExponentialBackoff(jitter=value)


# --- the words a handler may raise


def test_retry_and_reject_keep_what_they_were_given() -> None:
    assert (Retry("busy", delay=2).reason, Retry("busy", delay=2).delay) == ("busy", 2.0)
    assert (Retry().reason, Retry().delay) == ("", None)
    assert (Reject("no such customer").reason, Reject().reason) == ("no such customer", "")


@pytest.mark.parametrize("word", [Retry("why"), Retry(), Reject("why"), Reject()], ids=repr)
def test_retry_and_reject_are_exceptions_with_a_text(word: Exception) -> None:
    assert str(word)


@pytest.mark.parametrize("word", [Retry, Reject])
@pytest.mark.parametrize("value", [None, 5, b"bytes", ValueError("x")], ids=repr)
def test_a_reason_that_is_no_text_is_refused(word: Any, value: Any) -> None:
    with refused("reason", repr(value), "a str"):
        word(value)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, True, "1"], ids=repr)
def test_a_retry_with_a_delay_that_is_no_duration_is_refused(value: Any) -> None:
    with refused("delay", repr(value), "zero or more"):
        Retry(delay=value)


def test_every_combination_of_outcome_and_mode_is_in_the_table_above() -> None:
    modes: tuple[AckMode, ...] = (AUTO, MANUAL, ON_RECEIVE)
    pairs = set(itertools.product(Outcome, modes))
    assert len(pairs) == len(Outcome) * 3 == 48
    for outcome, mode in pairs:
        assert expected(outcome, mode, 1, 1) is not None
