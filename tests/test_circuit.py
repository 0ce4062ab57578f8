"""The circuit: a handler that only fails pauses its subscription, so that a database that is down does not send a whole
topic to the dead letters.

The specification, on memory and on a server:

- Off by default. ``circuit=CircuitBreaker(failures=N, pause=S)``: after N failures in a row without one success, nothing
  is taken for S seconds; what waits is handed back, uncounted, and others may have it; what is in flight goes on.
- Exceptions, timeouts, ``Retry`` and ``delivery.retry()`` are failures. An acknowledgement is a success. A rejection
  speaks of its message, and a release of nothing: they count neither way.
- After the pause it is on trial: one handling begins at a time, whatever was in flight before, and in every mode. A
  success ends the trial; a failure pauses again at once. A success during the pause makes a trial needless.
- It is of one subscription, in memory. ``pause()`` and ``resume()`` are independent of it. It is told to the observer,
  or else to the log, and counted.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from harness import Harness, Recorder, nothing_pending, quick, until
from refusal import refused

from anybus import (
    CircuitBreaker,
    Delivery,
    MemoryBackend,
    Message,
    Reject,
    Retry,
    StreamBus,
    StreamBusOptions,
    Subscription,
    SubscriptionConfig,
)

NEVER = 3600.0
"""A pause whose end no test waits for."""


class Database:
    """What the handlers of these tests need. It can be down."""

    def __init__(self) -> None:
        self.is_up = False
        self.asked: list[str] = []
        self.done: list[str] = []

    async def handle(self, delivery: Delivery) -> None:
        self.asked.append(delivery.message.key)
        await anyio.lowlevel.checkpoint()
        if not self.is_up:
            raise ConnectionError("the database is down")
        self.done.append(delivery.message.key)


def config(topic: str, failures: int, pause: float, **more: Any) -> SubscriptionConfig:
    options: dict[str, Any] = {"max_in_flight": 1, "max_retry": 100, "retry_backoff": 0.0, "group_start_id": "0"}
    return SubscriptionConfig(topic, "g", circuit=CircuitBreaker(failures=failures, pause=pause), **{**options, **more})


def opened(subscription: Subscription) -> int:
    return subscription.statistics().circuit_opened


def keys(count: int) -> list[str]:
    return [str(number) for number in range(count)]


async def publish(bus: StreamBus, topic: str, count: int) -> None:
    (await bus.publish_batch([Message(topic, key=key) for key in keys(count)])).raise_for_errors()


async def test_failures_in_a_row_pause_the_subscription_and_what_waits_is_handed_back_uncounted(
    harness: Harness, topic: str
) -> None:
    database, recorder = Database(), Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        await publish(bus, topic, 20)
        async with bus.subscribe(config(topic, 3, NEVER), database.handle) as subscription:
            await until(lambda: opened(subscription) == 1)
            await until(lambda: subscription.statistics().held == 0)
            assert len(database.asked) == 3
            assert subscription.statistics().dead_lettered == 0
            assert subscription.is_running
            # Others may have it. Nothing that was only handed back counts as a hand-over without an outcome.
            counts: list[int | None] = []

            async def works(delivery: Delivery) -> None:
                counts.append(delivery.state.deliveries)

            async with bus.subscribe(SubscriptionConfig(topic, "g", max_in_flight=1), works) as other:
                await until(lambda: other.statistics().handled == 20)
            assert counts == [1] * 20
            assert len(database.asked) == 3
    [event] = recorder.of("on_circuit_opened")
    assert (event.topic, event.group, event.consumer) == (topic, "g", subscription.consumer)
    assert event.detail == f"3 failures in a row: nothing is taken for {NEVER} s"
    assert recorder.of("on_circuit_closed") == []


async def test_one_success_in_between_is_enough_to_stay_closed(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        if int(delivery.message.key) % 3 != 2 and delivery.state.attempt == 1:
            raise RuntimeError("x")

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        await publish(bus, topic, 30)
        # The retries wait: a row of theirs would be of successes anyway.
        async with bus.subscribe(config(topic, 3, NEVER, retry_backoff=0.3), handler) as subscription:
            await until(lambda: subscription.statistics().handled == 30)
            assert (subscription.statistics().failed, opened(subscription)) == (20, 0)


async def test_it_is_off_by_default(harness: Harness, topic: str) -> None:
    database = Database()
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        await publish(bus, topic, 50)
        plain = SubscriptionConfig(topic, "g", max_retry=0, group_start_id="0")
        async with bus.subscribe(plain, database.handle) as subscription:
            await until(lambda: subscription.statistics().dead_lettered == 50)
            assert opened(subscription) == 0


async def test_after_the_pause_a_success_lets_everything_through(harness: Harness, topic: str) -> None:
    database, recorder = Database(), Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        await publish(bus, topic, 40)
        async with bus.subscribe(config(topic, 5, 0.2, max_in_flight=8), database.handle) as subscription:
            await until(lambda: opened(subscription) >= 1)
            database.is_up = True
            await until(lambda: subscription.statistics().handled == 40)
            assert subscription.statistics().dead_lettered == 0
            await until(lambda: len(recorder.of("on_circuit_closed")) == 1)
            budget = subscription._context.ledger.budget
            await until(lambda: budget.read_room() + budget.by_read == 12)
            assert budget.reclaim_room() + budget.by_reclaim + budget.by_read == 16, "all of its room again"
    assert sorted(database.done) == sorted(keys(40))


async def test_a_failure_on_trial_pauses_again_at_once(harness: Harness, topic: str) -> None:
    database, recorder = Database(), Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        await publish(bus, topic, 40)
        async with bus.subscribe(config(topic, 5, 0.05, max_in_flight=8), database.handle) as subscription:
            await until(lambda: opened(subscription) == 5)
    # Five in a row, what else was in flight then, and one handling in each trial.
    assert len(database.asked) <= 5 + 7 + 4
    details = [str(event.detail).partition(":")[0] for event in recorder.of("on_circuit_opened")]
    assert details[0].endswith("failures in a row")
    assert details[1:] == ["a failure on trial"] * (len(details) - 1)


@pytest.mark.parametrize("kind", ["raise", "Retry", "retry()", "time out"])
async def test_every_kind_of_failure_counts(harness: Harness, topic: str, kind: str) -> None:
    async def handler(delivery: Delivery) -> None:
        if kind == "raise":
            raise RuntimeError("x")
        if kind == "Retry":
            raise Retry("x")
        if kind == "retry()":
            await delivery.retry("x")
        else:
            await anyio.sleep_forever()

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        await publish(bus, topic, 10)
        timeout = {"handler_timeout": 0.05} if kind == "time out" else {}
        async with bus.subscribe(config(topic, 3, NEVER, **timeout), handler) as subscription:
            await until(lambda: opened(subscription) == 1)
            assert subscription.statistics().failed <= 3


async def test_what_rules_give_up_on_counts_as_a_failure(harness: Harness, topic: str) -> None:
    database = Database()
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        await publish(bus, topic, 10)
        rules = config(topic, 3, NEVER, give_up_on=ConnectionError)
        async with bus.subscribe(rules, database.handle) as subscription:
            await until(lambda: opened(subscription) == 1)
            await until(lambda: subscription.statistics().held == 0)
            assert subscription.statistics().dead_lettered == 3


async def test_rejections_and_releases_count_neither_way(harness: Harness, topic: str) -> None:
    released: set[str] = set()

    async def handler(delivery: Delivery) -> None:
        number = int(delivery.message.key)
        if number in (2, 12, 22):
            raise RuntimeError("x")
        if number % 3 == 0:
            raise Reject("unwanted")
        if number % 3 == 1:
            await delivery.nack("unwanted")
        elif delivery.message.key not in released:
            released.add(delivery.message.key)
            await delivery.release()
        else:
            await delivery.nack("unwanted")

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        await publish(bus, topic, 30)
        async with bus.subscribe(config(topic, 3, NEVER, retry_backoff=NEVER), handler) as subscription:
            await until(lambda: opened(subscription) == 1)
            assert subscription.statistics().retried <= 3
            assert subscription.statistics().dead_lettered > 10, "they did not open it by themselves"


@pytest.mark.parametrize("how", ["in the handler", "later"])
async def test_an_acknowledgement_by_hand_is_a_success(harness: Harness, topic: str, how: str) -> None:
    kept: list[Delivery] = []

    async def handler(delivery: Delivery) -> None:
        if int(delivery.message.key) % 2 == 0 and delivery.state.attempt == 1:
            raise RuntimeError("x")
        if how == "later":
            kept.append(delivery)
        else:
            await delivery.ack()

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        options = config(topic, 2, NEVER, ack_mode="manual", max_pending_acks=2, retry_backoff=NEVER)
        async with bus.subscribe(options, handler) as subscription:
            for number in range(10):
                await bus.publish(Message(topic, key=str(number)))
                await until(lambda number=number: subscription.statistics().failed == number // 2 + 1)  # type: ignore[misc]
                if number % 2:
                    if how == "later":
                        await until(lambda: len(kept) > 0)
                        await kept.pop().ack()
                    await until(lambda number=number: subscription.statistics().handled == number // 2 + 1)  # type: ignore[misc]
            assert opened(subscription) == 0


async def test_what_is_in_flight_goes_on_and_its_success_makes_a_trial_needless(harness: Harness, topic: str) -> None:
    recorder = Recorder()
    go_on = anyio.Event()
    begun = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        if delivery.message.key == "0":
            begun.set()
            await go_on.wait()
        elif not go_on.is_set():
            await begun.wait()
            raise RuntimeError("x")

    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        await publish(bus, topic, 10)
        async with bus.subscribe(config(topic, 3, 0.5, max_in_flight=2), handler) as subscription:
            await until(lambda: opened(subscription) == 1)
            assert subscription.statistics().in_flight == 1
            go_on.set()
            await until(lambda: subscription.statistics().handled == 10)
            assert opened(subscription) == 1
    assert len(recorder.of("on_circuit_closed")) == 1


async def test_pause_and_resume_are_independent_of_it(harness: Harness, topic: str) -> None:
    database, recorder = Database(), Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        await publish(bus, topic, 10)
        async with bus.subscribe(config(topic, 3, 0.3), database.handle) as subscription:
            await until(lambda: opened(subscription) == 1)
            subscription.pause()
            # Its pause ends while the operator's goes on, so nothing is taken: it stays on trial.
            await until(lambda: subscription._intake._shut_by == {"paused"})
            assert len(database.asked) == 3
            database.is_up = True
            subscription.resume()
            await until(lambda: subscription.statistics().handled == 10)


async def test_resume_does_not_end_its_pause(harness: Harness, topic: str) -> None:
    database = Database()
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        await publish(bus, topic, 10)
        async with bus.subscribe(config(topic, 3, NEVER), database.handle) as subscription:
            await until(lambda: opened(subscription) == 1)
            subscription.pause()
            subscription.resume()
            assert subscription._intake._shut_by == {"circuit"}
        # A subscription whose circuit is open ends like any other, and at once.
        assert len(database.asked) == 3


async def test_another_subscription_of_the_bus_goes_on(harness: Harness, topic: str) -> None:
    database = Database()
    handled: list[str] = []

    async def works(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        other = SubscriptionConfig(topic, "other")
        async with bus.subscribe(config(topic, 1, NEVER), database.handle) as subscription, bus.subscribe(other, works):
            await bus.publish(Message(topic, key="first"))
            await until(lambda: opened(subscription) == 1)
            await bus.publish(Message(topic, key="second"))
            await until(lambda: handled == ["first", "second"])
    assert database.asked == ["first"]


async def test_at_most_once_it_keeps_what_has_not_been_received(harness: Harness, topic: str) -> None:
    database = Database()
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        await publish(bus, topic, 20)
        once = SubscriptionConfig(
            topic,
            "g",
            guarantee="at-most-once",
            max_in_flight=1,
            group_start_id="0",
            circuit=CircuitBreaker(failures=3, pause=0.3),
        )
        async with bus.subscribe(once, database.handle) as subscription:
            await until(lambda: opened(subscription) == 1)
            database.is_up = True
            await until(lambda: subscription.statistics().handled == 17)
    assert sorted(database.asked) == sorted(keys(20)), "in whatever order what was handed back came again"


async def test_a_suspect_that_waits_is_handed_back_and_handled_on_trial(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    go_on = anyio.Event()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)
        if delivery.message.key == "neighbour" and delivery.state.attempt == 1:
            await go_on.wait()
            raise RuntimeError("x")

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=30.0)) as bus:
        await backend.create_group(topic, "g", "0")
        entry_id = await bus.publish(Message(topic, key="suspect"))
        await backend.read_new(topic, "g", "crashed", count=1, timeout=0)
        for _ in range(3):
            await backend.reclaim_idle(topic, "g", "crashed", min_idle=0, count=1)
        async with bus.subscribe(config(topic, 1, 0.3, max_in_flight=4), handler) as subscription:
            await bus.publish(Message(topic, key="neighbour"))
            await until(lambda: handled == ["neighbour"])
            await backend.release(topic, "g", "crashed", [entry_id])
            await until(lambda: "suspect" in subscription._intake._shut_by)
            go_on.set()
            await until(lambda: opened(subscription) == 1)
            await until(lambda: subscription.statistics().handled == 2)
            await nothing_pending(harness, topic, "g")
    assert sorted(handled) == ["neighbour", "neighbour", "suspect"]


async def test_without_a_hook_it_goes_to_the_log(
    harness: Harness, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database()
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(config(topic, 1, 0.05), database.handle) as subscription:
            await bus.publish(Message(topic, key="k"))
            await until(lambda: opened(subscription) == 1)
            database.is_up = True
            await until(lambda: subscription.statistics().handled == 1)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    place = f"[topic={topic!r} group='g']"
    assert warnings[0] == f"circuit-opened: 1 failures in a row: nothing is taken for 0.05 s {place}"
    assert warnings[-1] == f"circuit-closed: a handling has succeeded {place}"


@pytest.mark.parametrize(
    ("value", "allowed"), [(0, "at least 1"), (-1, "at least 1"), (1.5, "an int"), (True, "an int"), ("20", "an int")]
)
def test_a_number_of_failures_that_is_none_is_refused(value: Any, allowed: str) -> None:
    with refused("failures", repr(value), allowed):
        CircuitBreaker(failures=value)


@pytest.mark.parametrize("value", [0, -1, float("inf"), True, "30"], ids=repr)
def test_a_pause_that_is_no_duration_is_refused(value: Any) -> None:
    with refused("pause", repr(value), "a positive number of seconds"):
        CircuitBreaker(pause=value)


@pytest.mark.parametrize("value", [True, 20, {"failures": 3}, CircuitBreaker], ids=repr)
def test_a_circuit_that_is_none_is_refused(value: Any) -> None:
    with refused("circuit", repr(value), "an anybus.CircuitBreaker, or None"):
        SubscriptionConfig("t", "g", circuit=value)


def test_a_circuit_breaker_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        CircuitBreaker().failures = 5  # type: ignore[misc]


async def test_deliveries_refuse_it_since_they_have_no_handler(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with refused("circuit", "CircuitBreaker", "unset with deliveries()"):
            bus.deliveries(SubscriptionConfig(topic, "g", circuit=CircuitBreaker()))


class TestOnAVirtualClock:
    @pytest.fixture
    def anyio_backend(self) -> Any:
        return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}

    async def test_an_hour_without_database_costs_a_few_messages_and_not_the_topic(self) -> None:
        database, recorder = Database(), Recorder()
        count = 1000
        options = StreamBusOptions(observer=recorder)
        async with StreamBus(MemoryBackend(), options) as bus:
            await publish(bus, "t", count)
            usual = SubscriptionConfig("t", "g", group_start_id="0", circuit=CircuitBreaker(failures=20, pause=30))
            async with bus.subscribe(usual, database.handle) as subscription:
                await anyio.sleep(3600)
                assert 100 <= opened(subscription) <= 121
                assert len(database.asked) <= 20 + 16 + 121
                database.is_up = True
                with anyio.fail_after(600):
                    settled = subscription.statistics
                    while settled().handled + settled().dead_lettered < count:  # noqa: ASYNC110
                        await anyio.sleep(1)
                dead = subscription.statistics().dead_lettered
        assert dead <= (20 + 16 + 121) // 4
        assert len(recorder.of("on_circuit_closed")) == 1

    async def test_a_pause_lasts_as_long_as_it_says(self) -> None:
        times: list[float] = []

        async def handler(delivery: Delivery) -> None:
            times.append(anyio.current_time())
            raise RuntimeError("x")

        async with StreamBus(MemoryBackend(), StreamBusOptions(observer=Recorder())) as bus:
            await publish(bus, "t", 10)
            async with bus.subscribe(config("t", 1, 100, retry_backoff=NEVER), handler):
                await anyio.sleep(500)
        assert len(times) == 5
        for number, at in enumerate(times):
            assert number * 100 <= at - times[0] <= number * (100 + 0.6)
