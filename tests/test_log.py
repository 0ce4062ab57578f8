"""The log: what an operator reads without an observer, and beside one.

Specification (DESIGN.md, section 8): DEBUG for each handling; INFO for beginnings, ends and reconnections; WARNING, one
line, for a retry; ERROR with traceback for a dead letter; always with uid, key, topic, group, attempt of how many, also
in ``extra=``. Payloads and headers are in no line. An observer that counts things silences nothing; one that overrides
``on_error`` takes over what it is told of.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from harness import QUICK, SOON, Harness, nothing_pending, quick, until

from anybus import (
    DROP,
    BackendError,
    CircuitBreaker,
    Delivery,
    LeaseLostError,
    MemoryBackend,
    Message,
    Observer,
    Reject,
    Retry,
    StreamBus,
    SubscriptionConfig,
)
from anybus._ground.log import FIELDS
from anybus.abc import BusEvent, FetchedEntry

SECRET = b"secret-payload"
HEADERS = {"auth": "secret-header"}


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "anybus")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    return Log(caplog)


class Log:
    """The lines of the logger."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def of(self, level: int, scope: str | None = None) -> list[Any]:
        return [
            record
            for record in self._caplog.records
            if record.name == "anybus" and record.levelno == level and scope in (None, vars(record)["scope"])
        ]

    def all(self) -> list[Any]:
        return [record for record in self._caplog.records if record.name == "anybus"]

    @property
    def text(self) -> str:
        return self._caplog.text


class Boom(Exception):  # noqa: N818
    """What handlers raise here."""


async def fail(delivery: Delivery) -> None:
    raise Boom("the payment service is down\nand this is its second line")


async def succeed(delivery: Delivery) -> None:
    """Everything is fine."""


def message(topic: str, payload: bytes = SECRET) -> Message:
    return Message(topic, payload, key="order-42", headers=HEADERS)


def about(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in FIELDS}


# --- retries and dead letters


async def test_a_retry_is_one_warning_without_traceback_and_a_message_can_be_followed_by_its_uid(
    harness: Harness, topic: str, log: Log
) -> None:
    sent = message(topic)
    config = SubscriptionConfig(topic, "g", max_retry=2, retry_backoff=[0.01, 0.02])
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(config, fail) as subscription:
            entry_id = await bus.publish(sent)
            await until(lambda: subscription.statistics().dead_lettered == 1)
            consumer = subscription.consumer
    first, second = log.of(logging.WARNING)
    for record, attempt, delay in ((first, 1, 0.01), (second, 2, 0.02)):
        text = record.getMessage()
        assert f"attempt {attempt} of 3" in text
        assert f"retry in {delay} s" in text
        assert "Boom: the payment service is down" in text
        assert "\n" not in text
        assert record.exc_info is None
        for part in (f"uid='{sent.uid}'", "key='order-42'", f"topic='{topic}'", "group='g'", consumer):
            assert part in text
        fields = about(record)
        assert fields.pop("entry_id") in text
        assert fields == {
            "scope": "retried",
            "uid": sent.uid,
            "key": "order-42",
            "topic": topic,
            "group": "g",
            "consumer": consumer,
            "attempt": attempt,
            "max_attempts": 3,
            "delay": delay,
            "code": None,
        }
    assert first.entry_id == entry_id
    (letter,) = log.of(logging.ERROR)
    assert "attempt 3 of 3" in letter.getMessage()
    assert (letter.uid, letter.key, letter.attempt, letter.max_attempts) == (sent.uid, "order-42", 3, 3)
    assert (letter.scope, letter.code) == ("dead-lettered", "retries")
    assert f"{topic}.dead" in letter.getMessage()
    assert isinstance(letter.exc_info[1], Boom)
    assert "in fail" in log.text, "the traceback shows the handler"


async def reject(delivery: Delivery) -> None:
    raise Reject("not for us") from Boom("the reason behind it")


async def settle_by_nack(delivery: Delivery) -> None:
    await delivery.nack("not for us")


async def time_out(delivery: Delivery) -> None:
    await anyio.sleep_forever()


async def ask_for_a_retry(delivery: Delivery) -> None:
    raise Retry("busy")


@pytest.mark.parametrize(
    ("handler", "changes", "code", "said", "has_traceback"),
    [
        (reject, {}, "rejected", "rejected on attempt 1 of 4: not for us", True),
        (reject, {"dead_letter_topic": DROP}, "rejected", "dropped (rejected): rejected on attempt 1 of 4", True),
        (reject, {"ack_mode": "auto-on-receive"}, "rejected", "rejected on attempt 1 of 1: not for us", True),
        (settle_by_nack, {}, "rejected", "rejected on attempt 1 of 4: not for us", False),
        (fail, {"give_up_on": Boom}, "gave-up", "the handler failed on attempt 1 of 4: Boom: ", True),
        (fail, {"max_retry": 0}, "retries", "the handler failed on attempt 1 of 1: Boom: ", True),
        (ask_for_a_retry, {"max_retry": 0}, "retries", "a retry was asked for on attempt 1 of 1: busy", True),
        (time_out, {"max_retry": 0, "handler_timeout": 0.01}, "retries", "HandlerTimeoutError: ", True),
        (fail, {"max_age": 3600.0, "retry_backoff": 7200.0}, "expired", "the handler failed on attempt 1 of 4", True),
    ],
)
async def test_a_dead_letter_is_one_error_with_the_traceback_of_the_last_failure(
    handler: Any,
    changes: dict[str, Any],
    code: str,
    said: str,
    has_traceback: bool,
    harness: Harness,
    topic: str,
    log: Log,
) -> None:
    sent = message(topic)
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", **changes), handler) as subscription:
            await bus.publish(sent)
            await until(lambda: subscription.statistics().dead_lettered == 1)
    (record,) = log.of(logging.ERROR)
    assert said in record.getMessage()
    assert (record.uid, record.key, record.topic, record.group, record.code) == (sent.uid, "order-42", topic, "g", code)
    assert bool(record.exc_info) == has_traceback
    assert log.of(logging.WARNING) == []
    assert "secret" not in log.text


async def test_a_message_that_wore_out_its_hand_overs_is_a_suspect_first_and_an_error_in_the_end(
    harness: Harness, topic: str, log: Log
) -> None:
    backend = harness.make_backend()
    gate = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        await gate.wait()

    async with StreamBus(backend, quick(claim_idle_timeout=0.5)) as bus:
        await backend.create_group(topic, "g", "0")
        entry_ids: list[str] = []
        for reclaims in (7, 2):  # both are pending in the last two: handed over ten times and three times
            entry_ids.append(await backend.publish(topic, message(topic)))
            await backend.read_new(topic, "g", "crashed", count=1, timeout=0)
            for _ in range(reclaims):
                await backend.reclaim_idle(topic, "g", "crashed", min_idle=0, count=len(entry_ids))
        worn_out, survivor = entry_ids
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await until(lambda: subscription.statistics().dead_lettered == 1)
            await until(lambda: subscription.statistics().in_flight == 1)
            gate.set()
            await until(lambda: subscription.statistics().handled == 1)
    (suspect,) = log.of(logging.WARNING, "suspect")
    assert (suspect.entry_id, suspect.topic) == (survivor, topic)
    assert "4 times" in suspect.getMessage()
    (letter,) = log.of(logging.ERROR)
    assert (letter.entry_id, letter.code, letter.exc_info) == (worn_out, "deliveries", None)
    assert "10 times" in letter.getMessage()


async def test_a_malformed_entry_is_one_error_and_its_dead_letter_an_info(
    harness: Harness, topic: str, log: Log
) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed) as subscription:
            entry_id = await harness.append_raw(topic, {"message": b"secret-payload"})
            await until(lambda: subscription.statistics().dead_lettered == 1)
    (error,) = log.of(logging.ERROR)
    (stored,) = log.of(logging.INFO, "dead-lettered")
    assert (error.entry_id, stored.entry_id) == (entry_id, entry_id)
    assert (error.uid, stored.uid, stored.code) == (None, None, "malformed"), "nobody knows the uid"
    assert "secret" not in log.text


async def test_a_failure_of_a_message_that_was_acknowledged_before_is_an_error_and_says_that_it_is_lost(
    harness: Harness, topic: str, log: Log
) -> None:
    config = SubscriptionConfig(topic, "g", guarantee="at-most-once")
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(config, fail) as subscription:
            await bus.publish(message(topic))
            await until(lambda: subscription.statistics().failed == 1)
    (record,) = log.of(logging.ERROR)
    assert "not handled again" in record.getMessage()
    assert isinstance(record.exc_info[1], Boom)
    assert (record.key, record.attempt, record.max_attempts) == ("order-42", 1, 1)


async def test_what_a_handling_came_to_is_not_lost_with_the_lease(harness: Harness, topic: str, log: Log) -> None:
    backend = harness.make_backend()

    async def lose_it_and_fail(delivery: Delivery) -> None:
        assert len(await backend.reclaim_idle(topic, "g", "thief", min_idle=0, count=1)) == 1
        raise Boom("and yet it failed")

    async with StreamBus(backend, quick(claim_idle_timeout=30.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), lose_it_and_fail) as subscription:
            await bus.publish(message(topic))
            await until(lambda: subscription.statistics().leases_lost == 1)
    (lost,) = log.of(logging.WARNING)
    assert (lost.scope, lost.key, lost.attempt) == ("lease-lost", "order-42", 1)
    (unsettled,) = log.of(logging.ERROR)
    assert unsettled.scope == "unsettled"
    assert (
        "it could not be retried: the handler failed on attempt 1 of 4: Boom: and yet it failed"
        in unsettled.getMessage()
    )
    assert isinstance(unsettled.exc_info[1], Boom)


async def test_what_on_error_has_heard_of_is_not_told_anew_when_it_could_not_be_stored(topic: str, log: Log) -> None:
    backend = MemoryBackend()

    async def lose_it_and_fail(delivery: Delivery) -> None:
        assert len(await backend.reclaim_idle(topic, "g", "thief", min_idle=0, count=1)) == 1
        delivery.message.json(int)

    async with StreamBus(backend, quick(Errors(), claim_idle_timeout=30.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), lose_it_and_fail) as subscription:
            await bus.publish(message(topic, b"no number"))
            await until(lambda: subscription.statistics().leases_lost == 1)
    assert log.of(logging.ERROR) == []


async def test_a_settlement_that_failed_and_was_replaced_by_another_is_not_told_with_that(topic: str, log: Log) -> None:
    backend: Any = MemoryBackend()

    async def refuse(*args: Any) -> Any:
        raise BackendError("not now", may_have_happened=False)

    backend.transfer_many = refuse

    async def retry_then_ack(delivery: Delivery) -> None:
        with pytest.raises(BackendError):
            await delivery.retry("later")
        assert len(await backend.reclaim_idle(topic, "g", "thief", min_idle=0, count=1)) == 1
        with pytest.raises(LeaseLostError):
            await delivery.ack()

    async with StreamBus(backend, quick(Errors(), claim_idle_timeout=30.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), retry_then_ack) as subscription:
            await bus.publish(message(topic))
            await until(lambda: subscription.statistics().leases_lost == 1)
    assert log.of(logging.ERROR) == []


async def test_no_exception_is_kept_alive_by_a_delivery_that_was_being_settled_when_its_handler_failed(
    topic: str,
) -> None:
    backend: Any = MemoryBackend()
    kept: list[Delivery] = []
    raised: list[weakref.ref[Boom]] = []
    asked, failed = anyio.Event(), anyio.Event()
    ack_many = backend.ack_many

    async def slowly(*args: Any, **kwargs: Any) -> Any:
        asked.set()
        await failed.wait()
        return await ack_many(*args, **kwargs)

    backend.ack_many = slowly

    async def handler(delivery: Delivery) -> None:
        kept.append(delivery)
        tasks.start_soon(delivery.ack)
        await asked.wait()
        error = Boom("!")
        raised.append(weakref.ref(error))
        raise error

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks, StreamBus(backend, quick(Silent())) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                await bus.publish(message(topic))
                await until(lambda: subscription.statistics().in_flight == 0 and bool(raised))
                failed.set()
                await until(lambda: subscription.statistics().handled == 1)
                gc.collect()
                assert raised[0]() is None
                assert kept


@pytest.mark.parametrize("ends", ["dead letter", "retry", "lost lease"])
async def test_no_exception_is_kept_alive_by_a_delivery_once_it_is_settled(
    ends: str, harness: Harness, topic: str
) -> None:
    kept: list[Delivery] = []
    raised: list[weakref.ref[Boom]] = []
    backend = harness.make_backend()

    async def handler(delivery: Delivery) -> None:
        kept.append(delivery)
        if delivery.state.attempt == 1:
            if ends == "lost lease":
                await backend.reclaim_idle(topic, "g", "thief", min_idle=0, count=1)
            error = Boom("!")
            raised.append(weakref.ref(error))
            raise error

    max_retry = 0 if ends == "dead letter" else 1
    async with StreamBus(backend, quick(Silent(), claim_idle_timeout=30.0)) as bus:
        async with bus.subscribe(
            SubscriptionConfig(topic, "g", max_retry=max_retry, retry_backoff=QUICK), handler
        ) as subscription:
            await bus.publish(message(topic))
            await until(
                lambda: any(
                    getattr(subscription.statistics(), name) for name in ("dead_lettered", "retried", "leases_lost")
                )
            )
            gc.collect()
            assert raised[0]() is None
            assert kept


# --- beginnings, ends, handlings


async def test_beginnings_and_ends_are_infos(harness: Harness, topic: str, log: Log) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed) as subscription:
            await bus.publish(message(topic))
            await until(lambda: subscription.statistics().handled == 1)
            consumer = subscription.consumer
    scopes = [record.scope for record in log.of(logging.INFO) if record.scope != "connection"]
    assert scopes == ["opened", "started", "ended", "closed"]
    for scope in ("started", "ended"):
        (record,) = log.of(logging.INFO, scope)
        assert (record.topic, record.group, record.consumer) == (topic, "g", consumer)
    assert "1 handled" in log.of(logging.INFO, "ended")[0].getMessage()


async def test_a_subscription_that_fails_ends_with_an_error(topic: str, log: Log) -> None:
    class Refusing(MemoryBackend):
        async def read_new(self, stream: str, *args: Any, **options: Any) -> list[FetchedEntry]:
            if stream == topic:
                raise BackendError("WRONGTYPE", can_pass=False)
            return await super().read_new(stream, *args, **options)

    async with StreamBus(Refusing(), quick()) as bus:
        with pytest.raises(BackendError):
            async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed):
                await anyio.sleep_forever()
    (record,) = log.of(logging.ERROR)
    assert record.scope == "ended"
    assert "WRONGTYPE" in record.getMessage()


@pytest.mark.parametrize(
    ("mode", "handler", "outcome"),
    [
        ("auto-on-handler-success", succeed, "to be acked"),
        ("auto-on-handler-success", reject, "to be dead-lettered"),
        ("manual", settle_by_nack, "dead-lettered"),
        ("manual", succeed, "not settled yet"),
        ("auto-on-receive", succeed, "accepted"),
    ],
)
async def test_each_handling_is_a_debug_line(
    mode: Any, handler: Any, outcome: str, harness: Harness, topic: str, log: Log
) -> None:
    sent = message(topic)
    config = SubscriptionConfig(topic, "g", ack_mode=mode)
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(config, handler):
            await bus.publish(sent)
            await until(lambda: bool(log.of(logging.DEBUG)))
    (record,) = log.of(logging.DEBUG)
    assert record.getMessage().partition(" [")[0].endswith(f": {outcome}")
    assert (record.scope, record.uid, record.attempt) == ("handled", sent.uid, 1)
    assert "secret" not in log.text


async def test_in_manual_mode_what_nobody_settles_in_time_is_said(harness: Harness, topic: str, log: Log) -> None:
    config = SubscriptionConfig(topic, "g", ack_mode="manual")
    async with StreamBus(harness.make_backend(), quick(claim_idle_timeout=0.1)) as bus:
        async with bus.subscribe(config, succeed):
            await bus.publish(message(topic))
            await until(lambda: bool(log.of(logging.WARNING, "let-go")))
    assert log.of(logging.WARNING, "let-go")[0].key == "order-42"


async def test_in_manual_mode_what_nobody_settles_in_time_is_said_when_this_subscription_takes_it_again(
    harness: Harness, topic: str, log: Log
) -> None:
    """A pass comes more often than a look at the leases, and so is mostly the first to find it."""
    backend = harness.make_backend()
    deliveries: list[Delivery] = []

    async def handler(delivery: Delivery) -> None:
        deliveries.append(delivery)

    async with StreamBus(backend, quick(claim_idle_timeout=60)) as bus:
        config = SubscriptionConfig(topic, "g", ack_mode="manual")
        async with bus.subscribe(config, handler) as subscription:
            entry_id = await bus.publish(message(topic))
            await until(lambda: subscription.statistics().in_flight == 0 and len(deliveries) == 1)
            await backend.release(topic, "g", subscription.consumer, [entry_id])  # as idle as after a whole lease
            await until(lambda: len(deliveries) == 2)
    (record,) = log.of(logging.WARNING, "let-go")
    assert record.key == "order-42"
    assert deliveries[0].lease_lost
    assert not deliveries[1].lease_lost


async def test_every_record_has_every_field_so_that_a_format_can_name_them(
    harness: Harness, topic: str, log: Log
) -> None:
    class Rough(MemoryBackend):
        features = MemoryBackend.features - {"delay"}

    formatter = logging.Formatter(" ".join(f"%({name})s" for name in FIELDS))
    circuit = CircuitBreaker(failures=1, pause=0.01)
    async with StreamBus(Rough(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_retry=0, circuit=circuit), fail) as subscription:
            await bus.publish(message(topic))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    assert {record.levelno for record in log.all()} == {logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR}
    for record in log.all():
        assert formatter.format(record)


# --- beside an observer


class Silent(Observer):
    """Takes over errors and dead letters."""

    def on_error(self, event: BusEvent) -> None: ...

    def on_dead_lettered(self, event: BusEvent) -> None: ...


class Metrics(Observer):
    """Counts everything but errors."""

    def on_started(self, event: BusEvent) -> None: ...

    def on_ended(self, event: BusEvent) -> None: ...

    def on_settled(self, event: BusEvent) -> None: ...

    def on_dead_lettered(self, event: BusEvent) -> None: ...

    def on_lease_lost(self, event: BusEvent) -> None: ...

    def on_circuit_opened(self, event: BusEvent) -> None: ...


class Errors(Observer):
    """Sends errors elsewhere, and knows of nothing else."""

    def on_error(self, event: BusEvent) -> None: ...


@pytest.mark.parametrize(
    ("observer", "handler", "warnings", "errors"),
    [
        (None, fail, ["retried"], ["dead-lettered"]),
        (Metrics(), fail, ["retried"], ["dead-lettered"]),
        (Errors(), fail, [], ["dead-lettered"]),
        (Silent(), fail, [], []),
        (None, ask_for_a_retry, ["retried"], ["dead-lettered"]),
        (Errors(), ask_for_a_retry, ["retried"], ["dead-lettered"]),
        (Errors(), reject, [], ["dead-lettered"]),
        (Silent(), reject, [], []),
    ],
)
async def test_an_observer_silences_what_its_on_error_is_told_of_and_nothing_else(
    observer: Observer | None, handler: Any, warnings: list[str], errors: list[str], topic: str, log: Log
) -> None:
    config = SubscriptionConfig(topic, "g", max_retry=1, retry_backoff=QUICK)
    async with StreamBus(MemoryBackend(), quick(observer)) as bus:
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(message(topic))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    assert [record.scope for record in log.of(logging.WARNING)] == warnings
    assert [record.scope for record in log.of(logging.ERROR)] == errors
    assert [record.scope for record in log.of(logging.INFO)] == ["opened", "started", "ended", "closed"]


async def test_a_lost_lease_is_a_warning_whoever_counts_it(harness: Harness, topic: str, log: Log) -> None:
    backend = harness.make_backend()
    async with StreamBus(backend, quick(Metrics(), claim_idle_timeout=30.0)) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            await bus.publish(message(topic))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
            await backend.reclaim_idle(topic, "g", "thief", min_idle=0, count=1)
            with pytest.raises(LeaseLostError):
                await delivery.ack()
    (record,) = log.of(logging.WARNING)
    assert (record.scope, record.key, record.attempt, record.max_attempts) == ("lease-lost", "order-42", 1, 4)


async def test_a_pause_of_the_circuit_is_a_warning_whoever_counts_it(topic: str, log: Log) -> None:
    circuit = CircuitBreaker(failures=1, pause=0.01)
    config = SubscriptionConfig(topic, "g", max_retry=0, circuit=circuit)
    async with StreamBus(MemoryBackend(), quick(Metrics())) as bus:
        async with bus.subscribe(config, fail) as subscription:
            await bus.publish(message(topic))
            await until(lambda: subscription.statistics().circuit_opened == 1)
            consumer = subscription.consumer
    (record,) = log.of(logging.WARNING, "circuit-opened")
    assert (record.topic, record.group, record.consumer) == (topic, "g", consumer)


# --- volume, and what the application's logging does


def no_delay(failures: int, draw: float) -> float:
    return 0.0


class Down(MemoryBackend):
    """Fails in its reads for so often."""

    def __init__(self, often: int) -> None:
        super().__init__()
        self.left = often

    async def reclaim_idle(self, *args: Any, **options: Any) -> list[FetchedEntry]:
        if self.left:
            self.left -= 1
            raise BackendError("the server is loading", can_pass=True)
        return await super().reclaim_idle(*args, **options)

    async def publish(self, stream: str, message: Message) -> str:
        if self.left:
            self.left -= 1
            raise BackendError("the server is loading", can_pass=True)
        return await super().publish(stream, message)


async def test_an_error_that_comes_again_and_again_is_said_less_and_less_often_and_its_end_is_said(
    topic: str, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anybus._runtime.recovery.recovery_delay", no_delay)
    backend = Down(100)
    async with StreamBus(backend, quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed):
            await until(lambda: bool(log.of(logging.INFO, "reclaim")))
    errors = log.of(logging.ERROR, "reclaim")
    assert len(errors) == 7, "the first, second, fourth, ... 64th"
    assert "failed 64 times in a row" in errors[-1].getMessage()
    assert [record.getMessage().partition(" [")[0] for record in log.of(logging.INFO, "reclaim")] == [
        "reclaim: works again"
    ]


async def test_a_storm_of_failed_publishes_does_not_flood_the_log(topic: str, log: Log) -> None:
    async with StreamBus(Down(100), quick()) as bus:
        for _ in range(100):
            with pytest.raises(BackendError):
                await bus.publish(message(topic))
        await bus.publish(message(topic))
    assert len(log.of(logging.ERROR, "publish")) == 7
    assert len(log.of(logging.INFO, "publish")) == 1
    assert "secret" not in log.text


@contextmanager
def record_factory(**attributes: object) -> Iterator[None]:
    before = logging.getLogRecordFactory()

    def make(*args: Any, **options: Any) -> logging.LogRecord:
        record = before(*args, **options)
        vars(record).update(attributes)
        return record

    logging.setLogRecordFactory(make)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


async def test_a_record_factory_with_fields_of_the_same_name_harms_nothing(
    topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    with record_factory(uid="the application's own", scope=None):
        async with StreamBus(MemoryBackend(), quick()) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g", max_retry=0), fail) as subscription:
                await bus.publish(message(topic))
                await until(lambda: subscription.statistics().dead_lettered == 1)
                assert subscription.is_running
    assert "the handler failed on attempt 1 of 1" in caplog.text


async def test_a_filter_that_raises_harms_nothing(harness: Harness, topic: str) -> None:
    def raise_it(record: logging.LogRecord) -> bool:
        raise Boom("in a filter")

    logger = logging.getLogger("anybus")
    logger.addFilter(raise_it)
    try:
        async with StreamBus(harness.make_backend(), quick()) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g", max_retry=1, retry_backoff=QUICK), fail):
                await bus.publish(message(topic))
                await until(lambda: dead(harness, topic))
                await nothing_pending(harness, topic, "g")
    finally:
        logger.removeFilter(raise_it)


async def dead(harness: Harness, topic: str) -> bool:
    return len(await harness.entries(f"{topic}.dead")) == 1
