"""The observer: told of everything that happens, so that metrics need no patching.

Specification (DESIGN.md, section 4; ``anybus.Observer``): a base class of empty methods, never awaited; each hook gets
one frozen event, which says where it happened (topic, group, consumer), to what (message id, attempt) and why (error,
detail). ``on_error`` has the scopes read (malformed and missing entries too), reclaim, ack-flush, renew, publish,
handler and close. What a hook raises is logged, and harms nothing. Without an observer, errors go to the ``anybus``
logger; with one, they are the observer's business alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from unittest import mock

import anyio
import pytest
from harness import QUICK, SOON, Harness, Recorder, StepByStep, nothing_pending, quick, until

from anybus import (
    DROP,
    BackendError,
    BusEvent,
    CircuitBreaker,
    Delivery,
    EventBusError,
    LeaseLostError,
    MemoryBackend,
    Message,
    Observer,
    Reject,
    Retry,
    SerializationError,
    StreamBus,
    StreamBusOptions,
    Subscription,
    SubscriptionConfig,
    ValidationError,
)
from anybus.abc import FetchedEntry, PublishItem, TransferItem

HOOKS = [name for name in vars(Observer) if name.startswith("on_")]


class Faulty(MemoryBackend):
    """Fails in the methods that it is told, so many times, with an error that can pass unless told otherwise."""

    def __init__(self, can_pass: bool = True, **failures: int) -> None:
        super().__init__()
        self.failures = Counter(failures)
        self.can_pass = can_pass

    def check(self, method: str) -> None:
        if self.failures[method] > 0:
            self.failures[method] -= 1
            raise BackendError(f"{method} failed", may_have_happened=False, can_pass=self.can_pass)

    async def publish(self, stream: str, message: Message) -> str:
        self.check("publish")
        return await super().publish(stream, message)

    async def publish_many(self, items: Sequence[PublishItem]) -> list[str | EventBusError]:
        results = await super().publish_many(items[1:] if self.failures["publish_many"] else items)
        try:
            self.check("publish_many")
        except BackendError as error:
            return [error, *results]
        return results

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        if timeout > 0:
            self.check("read_new")
        return await super().read_new(stream, group, consumer, count=count, timeout=timeout)

    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        self.check("reclaim_idle")
        return await super().reclaim_idle(stream, group, consumer, min_idle=min_idle, count=count)

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        self.check("ack_many")
        return await super().ack_many(stream, group, message_ids, consumer=consumer)

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[list[str] | EventBusError | None]:
        self.check("transfer_many")
        return await super().transfer_many(stream, group, consumer, items)

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        self.check("renew")
        return await super().renew(stream, group, consumer, message_ids)

    async def forget_consumer(self, stream: str, group: str, consumer: str) -> None:
        self.check("forget_consumer")
        await super().forget_consumer(stream, group, consumer)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


async def succeed(delivery: Delivery) -> None:
    """A handler to whom everything is fine."""


def logged(caplog: pytest.LogCaptureFixture, level: int = logging.ERROR) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "anybus" and record.levelno >= level]


async def leave_behind(harness: Harness, topic: str, raw: Mapping[str, bytes] | None = None) -> str:
    """What a consumer that died leaves behind: an entry, pending."""
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        if raw is None:
            entry_id = await backend.publish(topic, Message(topic))
        else:
            entry_id = await harness.append_raw(topic, raw)
        await backend.read_new(topic, "g", "dead", count=1, timeout=0)
        await harness.age(topic, "g")
    return entry_id


def where(event: BusEvent) -> tuple[str | None, str | None, str | None]:
    return event.topic, event.group, event.consumer


# --- the class and its events


RETENTION = ("on_entries_lost", "on_group_stalled", "on_topic_grown")
"""Tested in ``test_retention.py``."""


def test_every_hook_of_the_base_class_does_nothing() -> None:
    observer = Observer()
    assert set(HOOKS) == {
        *("on_error", "on_started", "on_ended", "on_published", "on_received", "on_settled", "on_dead_lettered"),
        *("on_lease_lost", "on_group_made_again", "on_circuit_opened", "on_circuit_closed"),
        *RETENTION,
    }
    for hook in HOOKS:
        assert getattr(observer, hook)(BusEvent("test")) is None


def test_an_event_is_frozen_and_what_does_not_apply_is_none() -> None:
    event = BusEvent("read")
    for field in dataclasses.fields(event):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field.name, "changed")
        assert getattr(event, field.name) == ("read" if field.name == "scope" else None)
    assert event == BusEvent("read")


async def test_an_observer_hears_the_hooks_that_it_overrides_and_only_those(harness: Harness, topic: str) -> None:
    class OnlySettled(Observer):
        def __init__(self) -> None:
            self.heard: list[BusEvent] = []

        def on_settled(self, event: BusEvent) -> None:
            self.heard.append(event)

    observer = OnlySettled()
    async with StreamBus(harness.make_backend(), quick(observer)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed):
            entry_id = await bus.publish(Message(topic))
            await until(lambda: bool(observer.heard))
    assert [event.message_id for event in observer.heard] == [entry_id]
    assert all(type(event) is BusEvent for event in observer.heard)


async def test_a_mock_with_the_observers_spec_is_an_observer(harness: Harness, topic: str) -> None:
    observer = mock.Mock(spec=Observer)
    async with StreamBus(harness.make_backend(), quick(observer)) as bus:
        entry_id = await bus.publish(Message(topic))
    (event,) = observer.on_published.call_args.args
    assert event.message_id == entry_id


# --- started and ended


async def test_a_start_is_told_once_the_group_exists(harness: Harness, topic: str, recorder: Recorder) -> None:
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", consumer="me"), succeed) as subscription:
            (event,) = recorder.of("on_started")
            assert (event.scope, *where(event)) == ("started", topic, "g", subscription.consumer)
            assert await harness.pending(topic, "g") == []
            assert recorder.of("on_ended") == []


async def end_by_body(subscription: Subscription, stack: AsyncExitStack) -> None:
    await stack.aclose()


async def end_by_close(subscription: Subscription, stack: AsyncExitStack) -> None:
    await subscription.aclose()
    await stack.aclose()


async def end_by_abort(subscription: Subscription, stack: AsyncExitStack) -> None:
    subscription.abort()
    await subscription.wait_closed()
    await stack.aclose()


@pytest.mark.parametrize("end", [end_by_body, end_by_close, end_by_abort])
async def test_an_end_is_told_once_after_everything_was_settled(
    end: Callable[[Subscription, AsyncExitStack], Awaitable[None]], harness: Harness, topic: str, recorder: Recorder
) -> None:
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        stack = AsyncExitStack()
        subscription = await stack.enter_async_context(bus.subscribe(SubscriptionConfig(topic, "g"), succeed))
        await bus.publish(Message(topic))
        await until(lambda: subscription.statistics().received == 1)
        await end(subscription, stack)
        (event,) = recorder.of("on_ended")
    assert (event.scope, *where(event), event.error) == ("ended", topic, "g", subscription.consumer, None)
    assert [hook for hook, _ in recorder.events][-1] == "on_ended"


async def test_an_end_by_an_exception_in_the_body_is_told_too(harness: Harness, topic: str, recorder: Recorder) -> None:
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        with pytest.raises(ZeroDivisionError):
            async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed):
                raise ZeroDivisionError
        assert len(recorder.of("on_ended")) == 1


async def test_an_end_by_a_cancellation_from_outside_is_told_too(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        with anyio.CancelScope() as scope:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed):
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        assert len(recorder.of("on_ended")) == 1


async def test_an_end_by_a_failure_tells_the_failure(topic: str, recorder: Recorder) -> None:
    backend = Faulty(can_pass=False, read_new=1)
    async with StreamBus(backend, quick(recorder)) as bus:
        with pytest.raises(BackendError, match="read_new failed") as caught:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed):
                await anyio.sleep_forever()
        (event,) = recorder.of("on_ended")
    assert event.error is caught.value


class WithoutGroups(StepByStep):
    """Makes no group."""

    async def create_group(self, stream: str, group: str, start_id: str = "$") -> bool:
        raise BackendError("no right to make groups", may_have_happened=False, can_pass=False)


async def test_a_subscription_that_never_began_tells_neither_start_nor_end(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    async with StreamBus(WithoutGroups(harness.make_backend()), quick(recorder)) as bus:
        with pytest.raises(BackendError, match="no right to make groups"):
            async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed):
                raise AssertionError("the body must not run")
    assert recorder.of("on_started") == recorder.of("on_ended") == []


# --- published


async def test_every_publish_is_told_with_its_topic_and_id(harness: Harness, topic: str, recorder: Recorder) -> None:
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        entry_id = await bus.publish(Message(topic))
    (event,) = recorder.of("on_published")
    assert event == BusEvent("published", topic=topic, message_id=entry_id)


async def test_every_message_of_a_batch_is_told_with_its_topic_and_id(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    other = f"{topic}.other"
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        outcome = await bus.publish_batch([Message(topic), Message(other), Message(topic)])
    told = [(event.topic, event.message_id) for event in recorder.of("on_published")]
    assert told == list(zip([topic, other, topic], outcome.results, strict=True))


async def test_a_publish_that_failed_is_an_error_and_not_published(topic: str, recorder: Recorder) -> None:
    message = Message(topic)
    async with StreamBus(Faulty(publish=1), quick(recorder)) as bus:
        with pytest.raises(BackendError) as caught:
            await bus.publish(message)
    (event,) = recorder.of("on_error")
    assert (event.scope, event.topic, event.error) == ("publish", topic, caught.value)
    assert message.uid in str(event.detail)
    assert recorder.of("on_published") == []


async def test_a_failed_message_of_a_batch_is_an_error_with_its_topic_beside_the_others(
    topic: str, recorder: Recorder
) -> None:
    async with StreamBus(Faulty(publish_many=1), quick(recorder)) as bus:
        outcome = await bus.publish_batch([Message(topic), Message(topic)])
    (event,) = recorder.of("on_error", "publish")
    assert event.error is outcome.results[0]
    assert [told.message_id for told in recorder.of("on_published")] == [outcome.results[1]]
    assert event.topic == topic


async def test_a_refused_message_was_never_a_publish(harness: Harness, topic: str, recorder: Recorder) -> None:
    options = StreamBusOptions(observer=recorder, max_payload_bytes=1)
    async with StreamBus(harness.make_backend(), options) as bus:
        with pytest.raises(ValidationError):
            await bus.publish(Message(topic, b"too large"))
    assert recorder.of("on_published") == []


# --- received and settled


async def test_an_entry_is_told_as_received_when_it_is_taken_and_as_settled_when_the_backend_has_it(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed) as subscription:
            entry_id = await bus.publish(Message(topic))
            await until(lambda: bool(recorder.of("on_settled")))
            assert await harness.pending(topic, "g") == []
            consumer = subscription.consumer
    (received,), (settled,) = recorder.of("on_received"), recorder.of("on_settled")
    assert received == BusEvent("received", topic, "g", consumer, entry_id, attempt=1)
    assert settled == BusEvent("settled", topic, "g", consumer, entry_id, attempt=1, detail="acked")


async def test_an_entry_that_was_taken_over_is_told_as_received_too(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    entry_id = await leave_behind(harness, topic)
    async with StreamBus(harness.make_backend(), quick(recorder, claim_idle_timeout=60)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed):
            await until(lambda: bool(recorder.of("on_settled")))
    assert [event.message_id for event in recorder.of("on_received")] == [entry_id]


async def test_each_attempt_is_told_with_its_number_and_how_it_was_settled(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    async def fail(delivery: Delivery) -> None:
        raise ValueError("always")

    config = SubscriptionConfig(topic, "g", max_retry=2, retry_backoff=QUICK)
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(config, fail):
            await bus.publish(Message(topic))
            await until(lambda: len(recorder.of("on_settled")) == 3)
    assert [event.attempt for event in recorder.of("on_received")] == [1, 2, 3]
    assert [(event.attempt, event.detail) for event in recorder.of("on_settled")] == [
        (1, "retried"),
        (2, "retried"),
        (3, "dead-lettered"),
    ]


@pytest.mark.parametrize(
    ("how", "detail"),
    [
        ("ack", "acked"),
        ("nack", "dead-lettered"),
        ("nack without dead letters", "dropped"),
        ("retry", "retried"),
        ("release", "released"),
        ("release later", "released"),
    ],
)
async def test_a_settlement_by_hand_is_told_by_its_name(
    how: str, detail: str, harness: Harness, topic: str, recorder: Recorder
) -> None:
    dead_letter_topic = DROP if how.endswith("dead letters") else None
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g", dead_letter_topic=dead_letter_topic)) as deliveries:
            entry_id = await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
            if how == "ack":
                await delivery.ack()
            elif how.startswith("nack"):
                await delivery.nack("no")
            elif how == "retry":
                await delivery.retry(delay=3600)
            else:
                await delivery.release(3600 if how == "release later" else 0)
            event = recorder.of("on_settled")[0]
    assert (event.message_id, event.detail) == (entry_id, detail)


async def test_an_ack_on_receipt_is_told_once_before_the_handler_begins(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    told: list[list[str | None]] = []

    async def handler(delivery: Delivery) -> None:
        told.append([event.detail for event in recorder.of("on_settled")])

    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", ack_mode="auto-on-receive"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert told == [["acked"]]
    assert len(recorder.of("on_settled")) == 1


async def test_subscriptions_are_told_apart(harness: Harness, topic: str, recorder: Recorder) -> None:
    other = f"{topic}.other"
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with (
            bus.subscribe(SubscriptionConfig(topic, "g"), succeed) as first,
            bus.subscribe(SubscriptionConfig(topic, "h"), succeed) as second,
            bus.subscribe(SubscriptionConfig(other, "g"), succeed) as third,
        ):
            await bus.publish_batch([Message(topic), Message(other)])
            await until(lambda: len(recorder.of("on_settled")) == 3)
            expected = {
                (topic, "g", first.consumer),
                (topic, "h", second.consumer),
                (other, "g", third.consumer),
            }
    for hook in ("on_started", "on_received", "on_settled", "on_ended"):
        assert {where(event) for event in recorder.of(hook)} == expected


# --- dead letters


@pytest.mark.parametrize("mode", ["auto-on-handler-success", "manual", "auto-on-receive"])
@pytest.mark.parametrize("dead_letter_topic", [None, DROP])
async def test_a_message_given_up_on_is_told_with_the_reason(
    mode: object, dead_letter_topic: object, harness: Harness, topic: str, recorder: Recorder
) -> None:
    async def reject(delivery: Delivery) -> None:
        raise Reject("not for us")

    config = SubscriptionConfig(topic, "g", ack_mode=mode, dead_letter_topic=dead_letter_topic)  # type: ignore[arg-type]
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(config, reject) as subscription:
            entry_id = await bus.publish(Message(topic))
            await nothing_pending(harness, topic, "g")
            await until(lambda: subscription.statistics().failed == 1)
            consumer = subscription.consumer
    (event,) = recorder.of("on_dead_lettered")
    assert (event.scope, *where(event)) == ("dead-lettered", topic, "g", consumer)
    assert (event.message_id, event.attempt, event.error) == (entry_id, 1, None)
    assert event.detail == "rejected: not for us"


async def test_what_could_not_be_given_up_because_it_is_not_ours_is_not_told_as_given_up(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    backend = harness.make_backend()
    async with StreamBus(backend, quick(recorder, claim_idle_timeout=30.0)) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
            assert len(await backend.reclaim_idle(topic, "g", "thief", min_idle=0, count=1)) == 1
            with pytest.raises(LeaseLostError):
                await delivery.nack("no")
    assert await harness.entries(f"{topic}.dead") == []
    assert recorder.of("on_dead_lettered") == []


async def test_what_was_given_up_at_the_second_try_is_told_once(topic: str, recorder: Recorder) -> None:
    backend = Faulty(transfer_many=1)
    async with StreamBus(backend, quick(recorder)) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
            with pytest.raises(BackendError, match="transfer_many failed"):
                await delivery.nack("no")
            assert recorder.of("on_settled") == []
            await delivery.nack("no")
    assert len(backend.entries(f"{topic}.dead")) == 1
    assert len(recorder.of("on_settled")) == 1
    assert len(recorder.of("on_dead_lettered")) == 1


# --- leases and groups


async def test_a_lease_that_was_lost_is_told_once(harness: Harness, topic: str, recorder: Recorder) -> None:
    backend = harness.make_backend()
    async with StreamBus(backend, quick(recorder, claim_idle_timeout=30.0)) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            entry_id = await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
            assert len(await backend.reclaim_idle(topic, "g", "thief", min_idle=0, count=1)) == 1
            for _ in range(2):
                with pytest.raises(LeaseLostError):
                    await delivery.ack()
    (event,) = recorder.of("on_lease_lost")
    assert (event.topic, event.group, event.message_id, event.attempt) == (topic, "g", entry_id, 1)
    assert recorder.of("on_settled") == []


async def test_a_group_that_was_made_again_is_told_with_its_position_and_reported(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed):
            await harness.delete_group(topic, "g")
            await until(lambda: bool(recorder.of("on_group_made_again")))
            event = recorder.of("on_group_made_again")[0]
            assert (event.topic, event.group) == (topic, "g")
            assert str(event.detail).startswith("recreated at ")
            assert [type(error.error).__name__ for error in recorder.of("on_error")] == ["GroupLostError"]


# --- errors, scope by scope


async def test_a_handlers_exception_is_told_with_the_delivery_that_it_failed(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    boom = ValueError("boom")

    async def fail(delivery: Delivery) -> None:
        if delivery.state.attempt == 1:
            raise boom

    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", retry_backoff=QUICK), fail) as subscription:
            entry_id = await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
            consumer = subscription.consumer
    (event,) = recorder.of("on_error")
    assert (event.scope, *where(event)) == ("handler", topic, "g", consumer)
    assert (event.message_id, event.attempt) == (entry_id, 1)
    assert event.error is boom


@pytest.mark.parametrize("word", [Retry("busy"), Reject("no")], ids=["Retry", "Reject"])
async def test_what_a_handler_asks_for_is_no_error(
    word: Exception, harness: Harness, topic: str, recorder: Recorder
) -> None:
    async def ask(delivery: Delivery) -> None:
        if delivery.state.attempt == 1:
            raise word

    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", retry_backoff=QUICK), ask) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().failed == 1)
            await nothing_pending(harness, topic, "g")
    assert recorder.of("on_error") == []


async def test_an_exception_that_cannot_be_put_into_words_is_a_failure_like_any_other(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    class UnspeakableError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    async def fail(delivery: Delivery) -> None:
        if delivery.message.payload == b"bad":
            raise UnspeakableError

    config = SubscriptionConfig(topic, "g", max_retry=0, max_in_flight=1)
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(config, fail) as subscription:
            await bus.publish_batch([Message(topic, b"bad"), Message(topic, b"good")])
            await until(lambda: subscription.statistics().handled == 1)
            await until(lambda: subscription.statistics().dead_lettered == 1)
    assert [type(event.error) for event in recorder.of("on_error", "handler")] == [UnspeakableError]


async def test_a_malformed_entry_is_a_read_error(harness: Harness, topic: str, recorder: Recorder) -> None:
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed):
            entry_id = await harness.append_raw(topic, {"message": b"not json"})
            await until(lambda: bool(recorder.of("on_settled")))
    (event,) = recorder.of("on_error")
    assert (event.scope, event.message_id) == ("read", entry_id)
    assert isinstance(event.error, SerializationError)
    (letter,) = recorder.of("on_dead_lettered")
    assert letter.message_id == entry_id
    assert str(letter.detail).startswith("malformed: ")
    assert [settled.detail for settled in recorder.of("on_settled")] == ["dead-lettered"]


async def test_a_malformed_entry_that_was_taken_over_is_a_reclaim_error(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    entry_id = await leave_behind(harness, topic, {"message": b"not json"})
    async with StreamBus(harness.make_backend(), quick(recorder, claim_idle_timeout=60)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed):
            await until(lambda: bool(recorder.of("on_settled")))
    assert [(event.scope, event.message_id) for event in recorder.of("on_error")] == [("reclaim", entry_id)]


async def test_a_missing_entry_is_reported_and_counted_and_never_silent(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    entry_id = await leave_behind(harness, topic)
    await harness.delete_entry(topic, entry_id)
    async with StreamBus(harness.make_backend(), quick(recorder, claim_idle_timeout=60)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed) as subscription:
            await until(lambda: bool(recorder.of("on_error")))
            await nothing_pending(harness, topic, "g")
            assert subscription.statistics().received == 1
    (event,) = recorder.of("on_error")
    assert (event.scope, event.message_id) == ("reclaim", entry_id)
    assert isinstance(event.error, BackendError)
    assert recorder.of("on_dead_lettered") == []


@pytest.mark.parametrize(
    ("method", "scope"), [("read_new", "read"), ("reclaim_idle", "reclaim"), ("ack_many", "ack-flush")]
)
async def test_an_error_of_the_backend_that_can_pass_is_told_by_its_scope_and_work_goes_on(
    method: str, scope: str, topic: str, recorder: Recorder
) -> None:
    async with StreamBus(Faulty(**{method: 2}), quick(recorder)) as bus:  # type: ignore[arg-type]
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
            await until(lambda: len(recorder.of("on_error")) >= 2)
    events = recorder.of("on_error")
    assert [(event.scope, str(event.error)) for event in events if event.message_id is None] == [
        (scope, f"{method} failed")
    ] * 2
    assert {event.scope for event in events} == {scope}
    assert [event.detail for event in recorder.of("on_settled")] == ["acked"]


async def test_a_dead_letter_that_could_not_be_stored_is_an_ack_flush_error_and_tried_again(
    topic: str, recorder: Recorder
) -> None:
    async def reject(delivery: Delivery) -> None:
        raise Reject("no")

    backend = Faulty(transfer_many=2)
    async with StreamBus(backend, quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), reject):
            await bus.publish(Message(topic))
            await until(lambda: bool(recorder.of("on_settled")))
    assert {event.scope for event in recorder.of("on_error")} == {"ack-flush"}
    assert len(backend.entries(f"{topic}.dead")) == 1
    assert len(recorder.of("on_dead_lettered")) == 1


async def test_a_renewal_that_failed_is_a_renew_error_and_tried_again(topic: str, recorder: Recorder) -> None:
    leave = anyio.Event()

    async def wait(delivery: Delivery) -> None:
        await leave.wait()

    backend = Faulty(renew=1)
    async with StreamBus(backend, quick(recorder, claim_idle_timeout=1.5)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), wait) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: bool(recorder.of("on_error")))
            leave.set()
            await until(lambda: subscription.statistics().handled == 1)
    (event,) = recorder.of("on_error")
    assert (event.scope, event.topic, event.group, str(event.error)) == ("renew", topic, "g", "renew failed")


async def test_what_fails_at_the_end_is_a_close_error(topic: str, recorder: Recorder) -> None:
    async with StreamBus(Faulty(forget_consumer=2), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed) as subscription:
            consumer = subscription.consumer
    events = recorder.of("on_error")
    assert [(event.scope, str(event.error)) for event in events] == [("close", "forget_consumer failed")] * 2
    assert {event.consumer for event in events} == {consumer}
    assert len(recorder.of("on_ended")) == 1


async def test_a_retrys_events_name_the_subscriptions_topic_and_the_id_that_its_delivery_shows(
    harness: Harness, topic: str, recorder: Recorder
) -> None:
    seen: list[str] = []

    async def fail_once(delivery: Delivery) -> None:
        seen.append(delivery.id)
        if delivery.state.attempt == 1:
            raise ValueError("once")

    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", retry_backoff=QUICK), fail_once) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    for hook in ("on_received", "on_settled"):
        assert [(event.topic, event.message_id) for event in recorder.of(hook)] == [(topic, each) for each in seen]
    assert [event.attempt for event in recorder.of("on_settled")] == [1, 2]


# --- an observer that fails


class Raises(Recorder):
    """Fails in one hook, or in all of them."""

    def __init__(self, *hooks: str) -> None:
        super().__init__()
        self._hooks = hooks

    def _keep(self, hook: str, event: BusEvent) -> None:
        super()._keep(hook, event)
        if hook in self._hooks:
            raise RuntimeError(f"{hook} has a bug")


async def test_an_observer_whose_every_hook_raises_harms_nothing_and_is_logged(
    harness: Harness, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    observer = Raises(*HOOKS)

    async def handler(delivery: Delivery) -> None:
        if delivery.message.payload == b"bad":
            raise ValueError("always")

    circuit = CircuitBreaker(failures=1, pause=0.05)
    config = SubscriptionConfig(topic, "g", max_retry=1, retry_backoff=QUICK, circuit=circuit)
    async with StreamBus(harness.make_backend(), quick(observer)) as bus:
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, b"bad"))
            await harness.append_raw(topic, {"message": b"not json"})
            await until(lambda: subscription.statistics().dead_lettered == 2)
            await bus.publish(Message(topic, b"good"))
            await until(lambda: subscription.statistics().handled == 1)
            await until(lambda: bool(observer.of("on_circuit_closed")))
            await harness.delete_group(topic, "g")
            await until(lambda: bool(observer.of("on_group_made_again")))
    assert len(await harness.entries(f"{topic}.dead")) == 2
    assert len(observer.of("on_ended")) == 1
    raised = {hook for hook, _ in observer.events}
    assert raised == set(HOOKS) - {"on_lease_lost", *RETENTION}
    texts = [record.getMessage() for record in logged(caplog)]
    for hook in raised:
        assert any(hook in text for text in texts)
    assert len(texts) == len(observer.events)
    assert all(record.exc_info for record in logged(caplog)), "a traceback, to find the bug by"


@pytest.mark.parametrize("hook", ["on_published", "on_error"])
async def test_a_publish_succeeds_or_fails_as_itself_whatever_its_hook_raises(
    hook: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Faulty(publish=1)
    async with StreamBus(backend, quick(Raises(hook))) as bus:
        with pytest.raises(BackendError, match="publish failed"):
            await bus.publish(Message(topic))
        entry_id = await bus.publish(Message(topic))
    assert [stored_id for stored_id, _, _ in backend.entries(topic)] == [entry_id]
    assert [hook in record.getMessage() for record in logged(caplog)] == [True]


# --- without an observer


async def test_without_an_observer_a_handlers_failure_is_logged_with_its_traceback(
    harness: Harness, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(delivery: Delivery) -> None:
        raise ValueError("boom")

    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_retry=0), fail) as subscription:
            entry_id = await bus.publish(Message(topic, b"secret-payload", headers={"auth": "secret-header"}))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    (record,) = logged(caplog)
    text = record.getMessage()
    assert record.levelno == logging.ERROR
    for part in ("handler", "ValueError", "boom", topic, "'g'", subscription.consumer, entry_id, "attempt 1 of 1"):
        assert part in text
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("failing", "scope"),
    [
        ({"read_new": 1}, "read"),
        ({"reclaim_idle": 1}, "reclaim"),
        ({"ack_many": 1}, "ack-flush"),
        ({"forget_consumer": 1}, "close"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_without_an_observer_errors_of_the_backend_are_logged_by_their_scope(
    failing: dict[str, int], scope: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with StreamBus(Faulty(**failing), quick()) as bus:  # type: ignore[arg-type]
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
            if scope != "close":
                await until(lambda: bool(logged(caplog)))
    texts = [record.getMessage() for record in logged(caplog)]
    assert texts
    assert all(text.startswith(f"{scope}: ") for text in texts)
    assert any(f"{next(iter(failing))} failed" in text for text in texts)
    assert all(topic in text for text in texts)


async def test_without_an_observer_a_failed_publish_is_logged_and_raised(
    topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with StreamBus(Faulty(publish=1), quick()) as bus:
        with pytest.raises(BackendError):
            await bus.publish(Message(topic, b"secret-payload"))
    (record,) = logged(caplog)
    assert record.getMessage().startswith("publish: ")
    assert topic in record.getMessage()
    assert "secret" not in caplog.text


async def test_without_an_observer_malformed_entries_are_logged_too(
    harness: Harness, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed) as subscription:
            entry_id = await harness.append_raw(topic, {"message": b"not json"})
            await until(lambda: subscription.statistics().dead_lettered == 1)
    (record,) = logged(caplog)
    assert record.getMessage().startswith("read: ")
    assert entry_id in record.getMessage()


async def test_where_nothing_fails_nothing_is_logged(
    harness: Harness, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), succeed) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert logged(caplog, logging.DEBUG) == []


async def test_an_observer_that_does_not_hear_errors_leaves_them_to_the_log(
    harness: Harness, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Deaf(Observer):
        def on_settled(self, event: BusEvent) -> None:
            """Something else is what it is for."""

    async def fail(delivery: Delivery) -> None:
        raise ValueError("boom")

    async with StreamBus(harness.make_backend(), quick(Deaf())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_retry=0), fail) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    (record,) = logged(caplog)
    assert "boom" in record.getMessage()


async def test_with_an_observer_errors_are_the_observers_business_alone(
    harness: Harness, topic: str, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(delivery: Delivery) -> None:
        raise ValueError("boom")

    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_retry=0), fail) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    assert len(recorder.of("on_error")) == 1
    assert logged(caplog) == []
