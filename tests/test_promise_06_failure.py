"""Promise 6: failure has two budgets; when either runs out: dead letter, with the reason, the payload kept.

``max_retry`` counts every failure, a release never; the retry comes by this group's own retry stream.
``max_deliveries`` counts hand-overs that ended without an outcome; after three of them an entry is a suspect,
and is handled alone.
"""

from __future__ import annotations

from datetime import datetime

import anyio
import pytest
from harness import QUICK, SOON, Harness, Recorder, StepByStep, nothing_pending, quick, until

from anybus import (
    DROP,
    Delivery,
    ExponentialBackoff,
    Message,
    Reject,
    Retry,
    StreamBus,
    SubscriptionConfig,
)
from anybus._failure.copies import retry_stream
from anybus.abc import StreamBackend


async def crash_with(backend: StreamBackend, topic: str, group: str, *, times: int, stream: str | None = None) -> None:
    """Consumers that take everything and vanish, so many times: hand-overs without an outcome."""
    stream = stream or topic
    for number in range(times):
        consumer = f"crashed-{number}"
        if number == 0:
            await backend.read_new(stream, group, consumer, count=100, timeout=0)
        else:
            await backend.reclaim_idle(stream, group, consumer, min_idle=0, count=100)


@pytest.mark.parametrize("max_retry", [0, 1, 3])
async def test_max_retry_is_the_number_of_retries_after_the_first_handling(
    harness: Harness, topic: str, max_retry: int
) -> None:
    attempts: list[tuple[int, int]] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append((delivery.state.attempt, delivery.state.max_attempts))
        raise LookupError("no such customer")

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", max_retry=max_retry, retry_backoff=QUICK)
        async with bus.subscribe(config, handler) as subscription:
            message = Message(topic, b"payload", key="42", headers={"tenant": "acme"})
            entry_id = await bus.publish(message)
            await until(lambda: subscription.statistics().dead_lettered == 1)
            await nothing_pending(harness, topic, "g")
            consumer = subscription.consumer
    assert attempts == [(number, max_retry + 1) for number in range(1, max_retry + 2)]
    [(_, dead, _)] = await harness.entries(f"{topic}.dead")
    assert dead is not None
    assert (dead.topic, dead.uid, dead.payload, dead.key) == (f"{topic}.dead", message.uid, b"payload", "42")
    assert dead.headers["tenant"] == "acme"
    assert dead.headers["dead-letter-reason"] == "no such customer"
    assert dead.headers["dead-letter-code"] == "retries"
    assert dead.headers["dead-letter-error-type"] == "builtins.LookupError"
    assert dead.headers["dead-letter-topic"] == topic
    assert dead.headers["dead-letter-id"] == entry_id
    assert dead.headers["dead-letter-group"] == "g"
    assert dead.headers["dead-letter-consumer"] == consumer
    assert dead.headers["dead-letter-attempts"] == str(max_retry + 1)
    assert dead.headers["dead-letter-deliveries"] == "1"
    assert datetime.fromisoformat(dead.headers["dead-letter-at"].replace("Z", "+00:00")).tzinfo is not None


async def test_every_kind_of_failure_counts_and_a_release_never_does(harness: Harness, topic: str) -> None:
    steps: list[tuple[str, int]] = []

    async def handler(delivery: Delivery) -> None:
        names = ["raise", "Retry", "retry()", "release", "release later", "time out"]
        name = names[len(steps)] if len(steps) < len(names) else "return"
        steps.append((name, delivery.state.attempt))
        if name == "raise":
            raise RuntimeError("x")
        if name == "Retry":
            raise Retry("again", delay=0.01)
        if name == "retry()":
            await delivery.retry("by hand", delay=0)
        if name == "release":
            await delivery.release()
        if name == "release later":
            await delivery.release(0.01)
        if name == "time out":
            await anyio.sleep_forever()

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", max_retry=4, retry_backoff=QUICK, handler_timeout=0.3)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: len(steps) == 7)
            await nothing_pending(harness, topic, "g")
            assert subscription.statistics().failed == 4
            assert subscription.statistics().retried == 4
            assert subscription.statistics().released == 2
    assert steps == [
        ("raise", 1),
        ("Retry", 2),
        ("retry()", 3),
        ("release", 4),
        ("release later", 4),
        ("time out", 4),
        ("return", 5),
    ]


async def test_a_retry_reaches_its_own_group_only(harness: Harness, topic: str) -> None:
    handled: dict[str, list[int]] = {"fails": [], "works": []}

    async def fails(delivery: Delivery) -> None:
        handled["fails"].append(delivery.state.attempt)
        if delivery.state.attempt < 3:
            raise RuntimeError("not yet")

    async def works(delivery: Delivery) -> None:
        handled["works"].append(delivery.state.attempt)

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        one = SubscriptionConfig(topic, "fails", retry_backoff=QUICK)
        async with bus.subscribe(one, fails), bus.subscribe(SubscriptionConfig(topic, "works"), works):
            await bus.publish(Message(topic))
            await until(lambda: len(handled["fails"]) == 3)
            await nothing_pending(harness, topic, "fails", "works")
    assert handled == {"fails": [1, 2, 3], "works": [1]}
    assert len(await harness.entries(topic)) == 1


async def test_a_retry_copy_keeps_its_message_and_says_how_often_and_why_it_failed(
    harness: Harness, topic: str
) -> None:
    seen: list[Message] = []

    async def handler(delivery: Delivery) -> None:
        seen.append(delivery.message)
        if delivery.state.attempt == 1:
            raise RuntimeError("x" * 5000)

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", retry_backoff=QUICK), handler):
            await bus.publish(Message(topic, b"p", headers={"retry-attempt": "7", "traceparent": "t"}))
            await until(lambda: len(seen) == 2)
    first, second = seen
    # On a topic the header is somebody else's: it does not count, and this was the first attempt.
    assert first.headers["retry-attempt"] == "7"
    assert second.headers["retry-attempt"] == "1"
    assert second.headers["retry-reason"] == "x" * 1024
    assert second.headers["traceparent"] == "t"
    assert second.replace(headers={}) == first.replace(headers={})


async def test_a_retry_survives_the_consumer_that_failed(harness: Harness, topic: str) -> None:
    attempts: list[int] = []

    async def fails(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        raise RuntimeError("x")

    async def works(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)

    config = SubscriptionConfig(topic, "g", retry_backoff=ExponentialBackoff(initial=0.3, jitter=False))
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(config, fails) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().retried == 1)
        assert await harness.pending(topic, "g") == []
        async with bus.subscribe(config, works):
            await until(lambda: len(attempts) == 2)
    assert attempts == [1, 2]


async def test_the_retry_streams_group_begins_at_the_start_whatever_group_start_id_says(
    harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)

    async with StreamBus(backend, quick()) as bus:
        # A retry that was stored before this subscription, and its group on the retry stream, existed.
        await backend.publish(retry_stream(topic, "g"), Message(topic, headers={"retry-attempt": "2"}))
        async with bus.subscribe(SubscriptionConfig(topic, "g", group_start_id="$"), handler):
            await until(lambda: attempts == [3])


async def test_a_handlers_timeout_is_told_apart_from_a_timeout_error_of_its_own(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        if delivery.message.key == "own":
            raise TimeoutError("mine")
        await anyio.sleep_forever()

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", max_retry=0, handler_timeout=0.2)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="own"))
            await bus.publish(Message(topic, key="slow"))
            await until(lambda: subscription.statistics().dead_lettered == 2)
    dead = {message.key: message.headers for _, message, _ in await harness.entries(f"{topic}.dead") if message}
    assert dead["own"]["dead-letter-reason"] == "mine"
    assert dead["own"]["dead-letter-error-type"] == "builtins.TimeoutError"
    assert dead["slow"]["dead-letter-error-type"] == "HandlerTimeout"
    assert "handler_timeout (0.2 s)" in dead["slow"]["dead-letter-reason"]


async def test_reject_and_nack_give_up_at_once(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        if delivery.message.key == "reject":
            raise Reject("unwanted")
        await delivery.nack("by hand")

    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", dead_letter_topic=f"{topic}.lost"), handler) as sub:
            await bus.publish(Message(topic, key="reject"))
            await bus.publish(Message(topic, key="nack"))
            await until(lambda: sub.statistics().dead_lettered == 2)
            assert sub.statistics().retried == 0
    dead = {m.key: m.headers for _, m, _ in await harness.entries(f"{topic}.lost") if m}
    assert dead["reject"]["dead-letter-reason"] == "unwanted"
    assert dead["nack"]["dead-letter-reason"] == "by hand"
    assert {headers["dead-letter-code"] for headers in dead.values()} == {"rejected"}
    assert {headers["dead-letter-attempts"] for headers in dead.values()} == {"1"}


async def test_a_reject_inside_the_handlers_own_task_group_is_understood(harness: Harness, topic: str) -> None:
    async def fail() -> None:
        raise Reject("from a child task")

    async def handler(delivery: Delivery) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)

    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    [(_, dead, _)] = await harness.entries(f"{topic}.dead")
    assert dead is not None
    assert dead.headers["dead-letter-reason"] == "from a child task"


async def test_drop_acknowledges_what_is_given_up_on(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        raise Reject("unwanted")

    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", dead_letter_topic=DROP), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().dead_lettered == 1)
            await nothing_pending(harness, topic, "g")
    assert await harness.entries(f"{topic}.dead") == []


async def test_an_entry_handed_over_too_often_without_an_outcome_is_dead_lettered_unhandled(
    harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    started: list[str] = []

    async def handler(delivery: Delivery) -> None:
        started.append(delivery.id)

    async with StreamBus(backend, quick(claim_idle_timeout=60)) as bus:
        await backend.create_group(topic, "g", "0")
        await bus.publish(Message(topic, b"poison"))
        await crash_with(backend, topic, "g", times=5)
        await harness.age(topic, "g")
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_deliveries=5), handler) as subscription:
            await until(lambda: subscription.statistics().dead_lettered == 1)
            await nothing_pending(harness, topic, "g")
    assert started == []
    [(_, dead, _)] = await harness.entries(f"{topic}.dead")
    assert dead is not None
    assert dead.headers["dead-letter-code"] == "deliveries"
    assert dead.headers["dead-letter-deliveries"] == "6"
    assert dead.payload == b"poison"


async def test_releases_never_use_up_the_crash_budget(harness: Harness, topic: str) -> None:
    deliveries: list[int | None] = []

    async def handler(delivery: Delivery) -> None:
        deliveries.append(delivery.state.deliveries)
        if len(deliveries) < 12:
            await delivery.release()

    async with StreamBus(harness.make_backend(), quick(claim_idle_timeout=60)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_deliveries=4), handler):
            await bus.publish(Message(topic))
            await until(lambda: len(deliveries) == 12)
            await nothing_pending(harness, topic, "g")
    assert deliveries == [1] * 12


async def test_what_a_handler_releases_is_taken_again_after_the_reclaim_interval_without_spinning(
    harness: Harness, topic: str
) -> None:
    backend = StepByStep(harness.make_backend())
    handled = 0
    passes = 0
    reclaim_idle = backend.reclaim_idle

    async def counting(stream: str, *args: object, **kwargs: object) -> object:
        nonlocal passes
        passes += stream == topic
        return await reclaim_idle(stream, *args, **kwargs)  # type: ignore[arg-type]

    backend.reclaim_idle = counting  # type: ignore[assignment,method-assign]

    async def handler(delivery: Delivery) -> None:
        nonlocal handled
        handled += 1
        if handled < 4:
            await delivery.release()

    async with StreamBus(backend, quick(claim_idle_timeout=60, reclaim_interval=0.2, claim_scan_batch_size=1)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            await bus.publish(Message(topic))
            started = anyio.current_time()
            await until(lambda: handled == 4)
            intervals = (anyio.current_time() - started) / 0.2
    # Each pass that came back full would be followed by the next at once, if it were not for the release: this would
    # be thousands. A pass and its follower per interval is the most.
    assert passes <= 2 * intervals + 4


async def test_a_suspect_is_handled_alone(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    running: set[str] = set()
    beside_the_suspect: list[set[str]] = []
    gate, suspect_in, neighbour_in = anyio.Event(), anyio.Event(), anyio.Event()
    held: list[int] = []

    async def handler(delivery: Delivery) -> None:
        running.add(delivery.message.key)
        if delivery.message.key == "suspect":
            assert delivery.state.deliveries == 4
            suspect_in.set()
            beside_the_suspect.append(set(running))
            # What is published now is not taken, although there is room.
            await bus.publish_batch([Message(topic, key=f"late-{number}") for number in range(5)])
            await anyio.wait_all_tasks_blocked()
            held.append(subscription.statistics().held)
            beside_the_suspect.append(set(running))
        elif delivery.message.key == "neighbour":
            neighbour_in.set()
            await gate.wait()
        running.discard(delivery.message.key)

    async with StreamBus(backend, quick(claim_idle_timeout=60)) as bus:
        await backend.create_group(topic, "g", "0")
        suspect_id = await bus.publish(Message(topic, key="suspect"))
        await crash_with(backend, topic, "g", times=3)
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_in_flight=8), handler) as subscription:
            await bus.publish(Message(topic, key="neighbour"))
            with anyio.fail_after(SOON):
                await neighbour_in.wait()
            await backend.reclaim_idle(topic, "g", "x", min_idle=0, count=0 + 1)
            pending = {entry.id: entry for entry in await harness.pending(topic, "g")}
            await backend.release(topic, "g", pending[suspect_id].consumer, [suspect_id])
            # The suspect has been taken and waits: what is in flight is waited for.
            await until(lambda: subscription.statistics().waiting == 1)
            assert not suspect_in.is_set()
            gate.set()
            with anyio.fail_after(SOON):
                await suspect_in.wait()
            await until(lambda: subscription.statistics().handled == 7)
            await nothing_pending(harness, topic, "g")
    assert beside_the_suspect == [{"suspect"}, {"suspect"}]
    assert held == [1]


async def test_a_bus_holds_one_suspect_at_a_time(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    other = f"{topic}-other"
    running = 0
    peak = 0
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await anyio.wait_all_tasks_blocked()
        running -= 1
        handled.append(delivery.message.key)

    async with StreamBus(backend, quick(claim_idle_timeout=60)) as bus:
        for name in (topic, other):
            await backend.create_group(name, "g", "0")
            await bus.publish_batch([Message(name, key=f"{name}-{number}") for number in range(3)])
            await crash_with(backend, name, "g", times=4)
            await backend.release(name, "g", "crashed-3", [entry.id for entry in await harness.pending(name, "g")])
        one, two = (SubscriptionConfig(name, "g", max_in_flight=8) for name in (topic, other))
        async with bus.subscribe(one, handler), bus.subscribe(two, handler):
            await until(lambda: len(handled) == 6)
            await nothing_pending(harness, topic, "g")
            await nothing_pending(harness, other, "g")
    assert peak == 1
    assert len(set(handled)) == 6


async def test_a_suspect_for_which_room_cannot_be_made_within_a_lease_is_released(harness: Harness, topic: str) -> None:
    backend = StepByStep(harness.make_backend())
    gate, entered = anyio.Event(), anyio.Event()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        if delivery.message.key == "slow":
            entered.set()
            await gate.wait()
        handled.append(delivery.message.key)

    async with StreamBus(backend, quick(claim_idle_timeout=1)) as bus:
        await backend.create_group(topic, "g", "0")
        suspect_id = await bus.publish(Message(topic, key="suspect"))
        await crash_with(backend, topic, "g", times=4)
        await bus.publish(Message(topic, key="slow"))
        reclaim_idle = backend.reclaim_idle

        async def after_the_slow_one(*args: object, **kwargs: object) -> object:
            await entered.wait()
            return await reclaim_idle(*args, **kwargs)  # type: ignore[arg-type]

        backend.reclaim_idle = after_the_slow_one  # type: ignore[assignment,method-assign]
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_deliveries=50), handler) as subscription:

            async def given_back() -> bool:
                pending = {entry.id: entry.consumer for entry in await harness.pending(topic, "g")}
                return pending.get(suspect_id) == "anybus:returned"

            await until(given_back)
            assert handled == []
            # Meanwhile others are handled again: it only takes no suspect for a lease.
            await bus.publish(Message(topic, key="normal"))
            await until(lambda: handled == ["normal"])
            gate.set()
            await until(lambda: sorted(handled) == ["normal", "slow", "suspect"])
            await until(lambda: subscription.statistics().held == 0)


async def test_the_crash_budget_holds_for_retries_too(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    stream = retry_stream(topic, "g")

    async def handler(delivery: Delivery) -> None:
        raise AssertionError("must not be handled")

    async with StreamBus(backend, quick(claim_idle_timeout=60)) as bus:
        await backend.create_group(stream, "g", "0")
        copy = Message(topic, b"p", headers={"retry-attempt": "2", "retry-first-id": "77-0"})
        await backend.publish(stream, copy)
        await crash_with(backend, topic, "g", times=4, stream=stream)
        await harness.age(stream, "g")
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_deliveries=4), handler) as subscription:
            await until(lambda: subscription.statistics().dead_lettered == 1)
    [(_, dead, _)] = await harness.entries(f"{topic}.dead")
    assert dead is not None
    assert dead.headers["dead-letter-id"] == "77-0"
    assert dead.headers["dead-letter-attempts"] == "2"
    assert "retry-first-id" not in dead.headers
