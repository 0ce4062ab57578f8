"""The retry policy of a subscription: how long a failed message waits, which failures are retried, and for how long.

The specification, on memory and on a server:

- ``retry_backoff`` is an ``ExponentialBackoff``, a number of seconds, a list of them of which the last one repeats, or a
  function of a ``Failure``. A function that raises, or returns what is no delay, is reported; the default backoff is
  used then, and nothing is lost. A delay that the handler asks for itself is the delay.
- ``give_up_on`` names failures that are not retried: dead letters at once, with the code ``gave-up``. ``retry_on``
  names those that are; others are given up on. Each is an exception type, a function of the exception, or a list of
  these; ``give_up_on`` wins. What a handler says itself (``Retry``, ``Reject``) always holds. A rule that fails is
  reported, and the message is retried.
- ``max_age``: a message whose first entry the server stored longer ago becomes a dead letter (``expired``): unhandled
  when it is taken, with its failure's reason when its retry would come too late. Retries do not make it younger.
- The backoff survives the process that failed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from harness import SOON, Harness, Recorder, StepByStep, nothing_pending, quick, until
from refusal import refused
from servers import RunningServer
from wallclock import WallClock

import anybus
from anybus import (
    Delivery,
    EventBusError,
    ExponentialBackoff,
    Failure,
    HandlerTimeoutError,
    MemoryBackend,
    Message,
    Reject,
    Retry,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
)
from anybus._failure.copies import retry_stream
from anybus.abc import ClaimedMessage, FetchedEntry, TransferItem

CHILD = Path(__file__).with_name("children") / "failing.py"


class Delays(StepByStep):
    """Keeps the delays of everything that is transferred, and stores it without."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.seen: list[float] = []

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[list[str] | EventBusError | None]:
        quickly: list[TransferItem] = []
        for message_id, outputs in items:
            self.seen += [output.delay for output in outputs if output.stream.startswith("anybus:")]
            now = [type(output)(output.stream, output.message, 0.0, output.raw) for output in outputs]
            quickly.append((message_id, now))
        return await super().transfer_many(stream, group, consumer, quickly)


async def dead_headers(harness: Harness, topic: str) -> dict[str, dict[str, str]]:
    """The headers of the dead letters, by key."""
    return {m.key: dict(m.headers) for _, m, _ in await harness.entries(f"{topic}.dead") if m is not None}


async def delays_of(
    harness: Harness, topic: str, recorder: Recorder, failing: Callable[[Delivery], Exception], **policy: Any
) -> list[float]:
    """With which delays a message that fails four times is stored for its retries."""
    backend = Delays(harness.make_backend())

    async def handler(delivery: Delivery) -> None:
        raise failing(delivery)

    async with StreamBus(backend, quick(recorder)) as bus:
        config = SubscriptionConfig(topic, "g", max_retry=3, **policy)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="k"))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    return backend.seen


def shown(value: object) -> str:
    """For the names of test cases: the ``repr`` of a function differs from run to run."""
    return getattr(value, "__name__", repr(value))


# --- backoff


def tenfold(failure: Failure) -> float:
    return failure.attempt * 10


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [
        (7, [7, 7, 7]),
        (0.0, [0, 0, 0]),
        ([1.5, 20], [1.5, 20, 20]),
        ((3, 2, 1, 99), [3, 2, 1]),
        (ExponentialBackoff(initial=2, factor=3, jitter=False), [2, 6, 18]),
        (tenfold, [10, 20, 30]),
    ],
    ids=["fixed", "none", "list whose last repeats", "longer list", "exponential", "function"],
)
async def test_a_failed_message_waits_for_as_long_as_its_policy_says(
    harness: Harness, topic: str, backoff: Any, delays: list[float]
) -> None:
    def failing(delivery: Delivery) -> Exception:
        return RuntimeError("x")

    assert await delays_of(harness, topic, Recorder(), failing, retry_backoff=backoff) == delays


async def test_a_delay_that_the_handler_asks_for_is_the_delay(harness: Harness, topic: str) -> None:
    def failing(delivery: Delivery) -> Exception:
        return Retry("later", delay=5) if delivery.state.attempt == 2 else Retry("whenever")

    assert await delays_of(harness, topic, Recorder(), failing, retry_backoff=[1, 2, 3]) == [1, 5, 3]


async def test_a_backoff_function_is_told_what_failed_and_how_often(harness: Harness, topic: str) -> None:
    seen: list[Failure] = []

    def ask(failure: Failure) -> float:
        seen.append(failure)
        return 0

    async def handler(delivery: Delivery) -> None:
        if delivery.state.attempt == 1:
            raise LookupError("no such order")
        if delivery.state.attempt == 2:
            raise Retry("asked for")
        if delivery.state.attempt == 3:
            await delivery.retry("by hand")
        if delivery.state.attempt == 4:
            await anyio.sleep_forever()

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", max_retry=4, retry_backoff=ask, handler_timeout=0.3)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, b"payload", key="k"))
            await until(lambda: subscription.statistics().handled == 1)
    assert [(failure.attempt, failure.max_attempts) for failure in seen] == [(n, 5) for n in (1, 2, 3, 4)]
    assert [failure.reason for failure in seen[:3]] == ["no such order", "asked for", "by hand"]
    assert "handler_timeout (0.3 s)" in seen[3].reason
    assert [type(failure.error) for failure in seen] == [LookupError, Retry, type(None), HandlerTimeoutError]
    assert {(failure.message.key, failure.message.payload) for failure in seen} == {("k", b"payload")}


def _raises(failure: Failure) -> float:
    raise ZeroDivisionError("in the backoff")


BAD_BACKOFFS: dict[str, Callable[[Failure], Any]] = {
    "raises": _raises,
    "negative": lambda failure: -1,
    "not a number": lambda failure: float("nan"),
    "infinite": lambda failure: float("inf"),
    "None": lambda failure: None,
    "text": lambda failure: "1",
    "coroutine": lambda failure: anyio.sleep(1),
}


@pytest.mark.parametrize("ask", BAD_BACKOFFS.values(), ids=BAD_BACKOFFS)
async def test_a_backoff_function_that_fails_is_reported_and_the_default_backoff_used(
    harness: Harness, topic: str, ask: Callable[[Failure], Any]
) -> None:
    recorder = Recorder()

    def failing(delivery: Delivery) -> Exception:
        return RuntimeError("x")

    delays = await delays_of(harness, topic, recorder, failing, retry_backoff=ask)
    assert len(delays) == 3
    assert all(0 <= delay <= bound for delay, bound in zip(delays, (1, 2, 4), strict=True))
    reports = [event for event in recorder.of("on_error", "handler") if "retry_backoff" in (event.detail or "")]
    assert [event.attempt for event in reports] == [1, 2, 3]


async def test_a_backoff_function_is_not_asked_when_there_is_nothing_to_wait_for(harness: Harness, topic: str) -> None:
    asked: list[int] = []

    def ask(failure: Failure) -> float:
        asked.append(failure.attempt)
        return 0

    def failing(delivery: Delivery) -> Exception:
        return Retry(delay=0) if delivery.state.attempt == 1 else RuntimeError("x")

    await delays_of(harness, topic, Recorder(), failing, retry_backoff=ask)
    assert asked == [2, 3], "neither where the handler gave the delay, nor after the last attempt"


@pytest.mark.parametrize(
    ("value", "shown", "allowed"),
    [
        (-1, "-1", "zero or more"),
        (True, "True", "a number of seconds"),
        (float("inf"), "inf", "a number of seconds"),
        ([], "[]", "at least one delay"),
        ([1, -1], "-1", "zero or more"),
        (["1"], "'1'", "a number of seconds"),
        ("1", "'1'", "a function that takes one anybus.Failure"),
        (float, "<class 'float'>", "a function that takes one anybus.Failure"),
        (anyio.sleep, "<function sleep", "an async one is not accepted"),
    ],
    ids=shown,
)
def test_a_backoff_that_is_none_is_refused_where_it_is_given(value: Any, shown: str, allowed: str) -> None:
    with refused("retry_backoff", shown, allowed):
        SubscriptionConfig("t", "g", retry_backoff=value)


def test_a_list_of_delays_cannot_be_changed_behind_the_configurations_back() -> None:
    delays = [1.0, 2.0]
    config = SubscriptionConfig("t", "g", retry_backoff=delays)
    delays.clear()
    assert config.retry_backoff == (1.0, 2.0)


# --- rules


class ShopError(Exception):
    pass


class SoldOutError(ShopError):
    pass


FAILURES: dict[str, Exception] = {
    "shop": ShopError("shop"),
    "sold out": SoldOutError("sold out"),
    "key": KeyError("key"),
    "value": ValueError("value"),
    "asked": Retry("asked", delay=0),
    "rejected": Reject("rejected"),
}


async def fates(harness: Harness, topic: str, recorder: Recorder, **rules: Any) -> dict[str, str]:
    """By the code of its dead letter, what becomes of a message that always fails in that way."""

    async def handler(delivery: Delivery) -> None:
        raise FAILURES[delivery.message.key]

    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        config = SubscriptionConfig(topic, "g", max_retry=1, retry_backoff=0.0, **rules)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish_batch([Message(topic, key=key) for key in FAILURES])
            await until(lambda: subscription.statistics().dead_lettered == len(FAILURES))
            await nothing_pending(harness, topic, "g")
    dead = await dead_headers(harness, topic)
    for headers in dead.values():
        assert headers["dead-letter-attempts"] == ("2" if headers["dead-letter-code"] == "retries" else "1")
    return {key: headers["dead-letter-code"] for key, headers in dead.items()}


ALWAYS = {"asked": "retries", "rejected": "rejected"}
"""What a handler says itself holds whatever the rules say."""


def is_key_error(error: Exception) -> bool:
    return isinstance(error, KeyError)


@pytest.mark.parametrize(
    ("rules", "given_up"),
    [
        ({}, set[str]()),
        ({"give_up_on": ShopError}, {"shop", "sold out"}),
        ({"give_up_on": SoldOutError}, {"sold out"}),
        ({"give_up_on": (SoldOutError, LookupError)}, {"sold out", "key"}),
        ({"give_up_on": is_key_error}, {"key"}),
        ({"give_up_on": [is_key_error, ValueError]}, {"key", "value"}),
        ({"retry_on": ShopError}, {"key", "value"}),
        ({"retry_on": [ShopError, is_key_error]}, {"value"}),
        ({"retry_on": ShopError, "give_up_on": SoldOutError}, {"sold out", "key", "value"}),
        ({"retry_on": LookupError, "give_up_on": is_key_error}, {"shop", "sold out", "key", "value"}),
    ],
    ids=[
        "no rules",
        "a type and what derives from it",
        "a derived type only",
        "types",
        "a function",
        "a function or a type",
        "only a type",
        "only a type or what a function says",
        "an exception to what is retried",
        "give_up_on wins",
    ],
)
async def test_rules_say_which_failures_are_retried(
    harness: Harness, topic: str, rules: dict[str, Any], given_up: set[str]
) -> None:
    codes = await fates(harness, topic, Recorder(), **rules)
    expected = {key: "gave-up" if key in given_up else "retries" for key in FAILURES}
    assert codes == {**expected, **ALWAYS}


async def test_what_is_given_up_on_keeps_the_reason_and_the_type_of_its_failure(harness: Harness, topic: str) -> None:
    await fates(harness, topic, Recorder(), give_up_on=SoldOutError)
    headers = (await dead_headers(harness, topic))["sold out"]
    assert headers["dead-letter-reason"] == "sold out"
    assert headers["dead-letter-error-type"] == f"{__name__}.SoldOutError"


def _fails(error: Exception) -> bool:
    raise ZeroDivisionError("in the rule")


BAD_RULES: dict[str, Callable[[Exception], Any]] = {
    "raises": _fails,
    "None": lambda error: None,
    "coroutine": lambda error: anyio.sleep(1),
}


@pytest.mark.parametrize("field", ["retry_on", "give_up_on"])
@pytest.mark.parametrize("rule", BAD_RULES.values(), ids=BAD_RULES)
async def test_a_rule_that_fails_is_reported_and_the_message_retried(
    harness: Harness, topic: str, field: str, rule: Any
) -> None:
    recorder = Recorder()
    codes = await fates(harness, topic, recorder, **{field: rule})
    assert codes == {**dict.fromkeys(FAILURES, "retries"), **ALWAYS}
    reports = [event for event in recorder.of("on_error", "handler") if f"a rule of {field}" in (event.detail or "")]
    assert len(reports) == 2 * 4, "each handling of the four that raise"


async def test_a_handlers_timeout_is_a_failure_of_its_own_type_for_rules(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        if delivery.message.key == "own":
            raise TimeoutError("mine")
        await anyio.sleep_forever()

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(
            topic, "g", max_retry=1, retry_backoff=0.0, handler_timeout=0.3, give_up_on=HandlerTimeoutError
        )
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="own"))
            await bus.publish(Message(topic, key="slow"))
            await until(lambda: subscription.statistics().dead_lettered == 2)
    codes = {key: headers["dead-letter-code"] for key, headers in (await dead_headers(harness, topic)).items()}
    assert codes == {"own": "retries", "slow": "gave-up"}


async def test_rules_see_what_a_task_group_of_the_handler_has_wrapped(harness: Harness, topic: str) -> None:
    async def fail() -> None:
        raise SoldOutError("from a child task")

    async def handler(delivery: Delivery) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", give_up_on=SoldOutError)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="k"))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    headers = (await dead_headers(harness, topic))["k"]
    assert (headers["dead-letter-code"], headers["dead-letter-reason"]) == ("gave-up", "from a child task")


@pytest.mark.parametrize("field", ["retry_on", "give_up_on"])
@pytest.mark.parametrize(
    ("value", "shown", "allowed"),
    [
        ("ValueError", "'ValueError'", "an exception type"),
        (5, "5", "an exception type"),
        ([], "[]", "for no rule use None"),
        ([ValueError, "x"], "'x'", "an exception type"),
        (KeyboardInterrupt, "KeyboardInterrupt", "a subclass of Exception"),
        (int, "int", "a subclass of Exception"),
        (Retry, "Retry", "always obeyed"),
        ((ValueError, Reject), "Reject", "always obeyed"),
        (anyio.sleep, "<function sleep", "an async one is not accepted"),
    ],
    ids=shown,
)
def test_a_rule_that_is_none_is_refused_where_it_is_given(field: Any, value: Any, shown: str, allowed: str) -> None:
    with refused(field, shown, allowed):
        SubscriptionConfig("t", "g", **{field: value})


@pytest.mark.parametrize(
    ("retry_on", "give_up_on"),
    [(ShopError, ShopError), (SoldOutError, ShopError), ([KeyError, ValueError], [ShopError, Exception])],
)
def test_rules_that_contradict_each_other_are_refused_where_they_are_given(retry_on: Any, give_up_on: Any) -> None:
    with refused("retry_on", "Error'>", "does not cover completely"):
        SubscriptionConfig("t", "g", retry_on=retry_on, give_up_on=give_up_on)


async def test_deliveries_refuse_rules_since_they_have_no_handler(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        for field in ("retry_on", "give_up_on"):
            with refused(field, "ValueError", "unset with deliveries()"):
                rules: dict[str, Any] = {field: ValueError}
                bus.deliveries(SubscriptionConfig(topic, "g", **rules))


# --- max_age


async def test_a_message_that_is_too_old_when_it_is_taken_is_a_dead_letter_unhandled(
    harness: Harness, topic: str, wall_clock: WallClock
) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        entry_id = await bus.publish(Message(topic, b"payload", key="old"))
        wall_clock.put_forward()
        config = SubscriptionConfig(topic, "g", group_start_id="0", max_age=3600)
        async with bus.subscribe(config, handler) as subscription:
            await until(lambda: subscription.statistics().dead_lettered == 1)
            assert subscription.statistics().failed == 0
        async with bus.subscribe(SubscriptionConfig(topic, "h", group_start_id="0", max_age=3 * 3600), handler):
            await until(lambda: handled == ["old"])
    headers = (await dead_headers(harness, topic))["old"]
    assert headers["dead-letter-code"] == "expired"
    assert "max_age (3600 s)" in headers["dead-letter-reason"]
    assert (headers["dead-letter-id"], headers["dead-letter-attempts"]) == (entry_id, "0")


@pytest.mark.parametrize("options", [{"guarantee": "at-most-once"}, {"ack_mode": "manual"}], ids=repr)
async def test_what_is_too_old_is_a_dead_letter_in_every_ack_mode(
    harness: Harness, topic: str, wall_clock: WallClock, options: dict[str, Any]
) -> None:
    async def handler(delivery: Delivery) -> None:
        raise AssertionError("it must not be handled")

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        await bus.publish(Message(topic, key="old"))
        wall_clock.put_forward()
        config = SubscriptionConfig(topic, "g", group_start_id="0", max_age=3600, **options)
        async with bus.subscribe(config, handler) as subscription:
            await until(lambda: subscription.statistics().dead_lettered == 1)
            await nothing_pending(harness, topic, "g")
    assert (await dead_headers(harness, topic))["old"]["dead-letter-code"] == "expired"


async def test_a_message_that_fails_when_it_is_too_old_is_a_dead_letter_with_the_reason_of_its_failure(
    harness: Harness, topic: str, wall_clock: WallClock
) -> None:
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        wall_clock.put_forward()
        raise LookupError("no answer")

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", max_age=3600, retry_backoff=0.0)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="k"))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    headers = (await dead_headers(harness, topic))["k"]
    assert (headers["dead-letter-code"], headers["dead-letter-reason"]) == ("expired", "no answer")
    assert (headers["dead-letter-error-type"], headers["dead-letter-attempts"]) == ("builtins.LookupError", "1")
    assert attempts == [1]


async def test_a_retry_that_would_come_too_late_is_given_up_on_at_once(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        raise LookupError("no answer")

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", max_age=3600, retry_backoff=[0.0, 3600])
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="k"))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    headers = (await dead_headers(harness, topic))["k"]
    assert (headers["dead-letter-code"], headers["dead-letter-attempts"]) == ("expired", "2")


async def test_retries_do_not_make_a_message_younger(harness: Harness, topic: str, wall_clock: WallClock) -> None:
    states: list[tuple[int, datetime | None, str | None]] = []

    async def handler(delivery: Delivery) -> None:
        state = delivery.state
        states.append((state.attempt, state.published_at, delivery.message.headers.get("retry-published-at")))
        if state.attempt == 3:
            wall_clock.put_forward()
        raise Retry("again", delay=0)

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", max_age=3600, max_retry=100)
        async with bus.subscribe(config, handler) as subscription:
            # On a topic the header is somebody else's, and says nothing.
            await bus.publish(Message(topic, key="k", headers={"retry-published-at": "2001-01-01T00:00:00Z"}))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    headers = (await dead_headers(harness, topic))["k"]
    assert (headers["dead-letter-code"], headers["dead-letter-attempts"]) == ("expired", "3")
    assert "retry-published-at" not in headers
    first = states[0][1]
    assert first is not None
    for _, _, told in states[1:]:
        assert datetime.fromisoformat(str(told).replace("Z", "+00:00")) == first


async def test_a_retry_is_too_old_when_it_is_taken_after_its_time(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    async with StreamBus(backend, quick(Recorder())) as bus:
        stream = retry_stream(topic, "g")
        old = {"retry-attempt": "1", "retry-first-id": "7-0", "retry-published-at": "2001-01-01T00:00:00Z"}
        await backend.publish(stream, Message(topic, key="old", headers=old))
        await backend.publish(stream, Message(topic, key="young", headers={**old, "retry-published-at": "nonsense"}))
        config = SubscriptionConfig(topic, "g", max_age=3600)
        async with bus.subscribe(config, handler) as subscription:
            await until(lambda: subscription.statistics().dead_lettered == 1 and handled == ["young"])
    dead = await dead_headers(harness, topic)
    assert dead["old"]["dead-letter-code"] == "expired"
    assert (dead["old"]["dead-letter-id"], dead["old"]["dead-letter-attempts"]) == ("7-0", "1")


class WithoutTimes(StepByStep):
    """A backend that does not say when it stored an entry."""

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        entries = await super().read_new(stream, group, consumer, count=count, timeout=timeout)
        return [ClaimedMessage(e.id, e.message, e.deliveries) if isinstance(e, ClaimedMessage) else e for e in entries]


async def test_where_no_time_is_known_max_age_has_no_effect_and_the_log_says_so(
    harness: Harness, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    async with StreamBus(WithoutTimes(harness.make_backend()), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_age=1e-9), handler):
            await bus.publish(Message(topic, key="a"))
            await bus.publish(Message(topic, key="b"))
            await until(lambda: len(handled) == 2)
    assert [record.message for record in caplog.records if "max_age has no effect" in record.message] == [
        "WithoutTimes does not say when it stored an entry: max_age has no effect"
    ]


@pytest.mark.parametrize("value", [0, -1, True, "1", float("nan")], ids=repr)
def test_a_max_age_that_is_no_duration_is_refused(value: Any) -> None:
    with refused("max_age", repr(value), "a positive number of seconds"):
        SubscriptionConfig("t", "g", max_age=value)


# --- due times


class TestOnAVirtualClock:
    @pytest.fixture
    def anyio_backend(self) -> Any:
        return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}

    async def test_a_retry_comes_back_after_its_delay_and_not_before(self) -> None:
        handled: list[float] = []

        async def handler(delivery: Delivery) -> None:
            handled.append(anyio.current_time())
            raise RuntimeError("x")

        options = StreamBusOptions(observer=Recorder(), reclaim_interval=0.5)
        async with StreamBus(MemoryBackend(), options) as bus:
            config = SubscriptionConfig("t", "g", max_retry=3, retry_backoff=[10, 100])
            async with bus.subscribe(config, handler) as subscription:
                await bus.publish(Message("t"))
                while subscription.statistics().dead_lettered == 0:  # noqa: ASYNC110 - the clock is virtual
                    await anyio.sleep(1)
        waits = [later - earlier for earlier, later in pairwise(handled)]
        assert len(waits) == 3
        for waited, delay in zip(waits, [10, 100, 100], strict=True):
            assert delay <= waited <= delay + 0.6


# --- a process that is killed


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_the_backoff_survives_the_process_that_failed(
    server: RunningServer, tmp_path: Path, topic: str, loop: str
) -> None:
    """One process: it fails, and is killed (kill -9) as soon as the server has the retry."""
    command = [sys.executable, str(CHILD), loop, server.url, topic, str(quick().claim_idle_timeout)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "retried\n"
        child.send_signal(signal.SIGKILL)
    client: Any = server.client()
    with client:
        [(_, due)] = client.zrange(f"anybus:{{{topic}}}:delayed:g", 0, -1, withscores=True)
    came: list[tuple[int, str, float]] = []

    async def main() -> None:
        done = anyio.Event()

        async def handler(delivery: Delivery) -> None:
            stored = delivery.state.published_at
            assert stored is not None
            came.append((delivery.state.attempt, delivery.message.headers["retry-reason"], stored.timestamp() * 1000))
            done.set()

        async with anybus.connect(server.url, quick()) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
                with anyio.fail_after(SOON):
                    await done.wait()

    anyio.run(main)
    [(attempt, reason, stored)] = came
    assert (attempt, reason) == (2, "not yet")
    assert stored >= due, "appended by the server, by its own clock, when it was due"
