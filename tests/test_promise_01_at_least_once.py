"""Promise 1: at least once.

A message is acked only after its handler succeeded (or was dead-lettered, or auto-on-receive). Nothing read is ever
dropped: not by cancellation while a read is under way, not by a full channel, not by a reclaim that found more than
there is room for. And the table of outcomes, cell by cell.
"""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest
from harness import QUICK, SOON, Harness, Recorder, nothing_pending, quick, uids, until

from anybus import (
    BackendError,
    Delivery,
    Message,
    Reject,
    Retry,
    StreamBus,
    SubscriptionConfig,
)
from anybus._failure.copies import retry_stream


async def test_a_message_is_acked_only_after_its_handler_has_returned(harness: Harness, topic: str) -> None:
    entered, leave = anyio.Event(), anyio.Event()

    async def handler(delivery: Delivery) -> None:
        entered.set()
        await leave.wait()

    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            entry_id = await bus.publish(Message(topic, b"1"))
            with anyio.fail_after(SOON):
                await entered.wait()
            assert [entry.id for entry in await harness.pending(topic, "g")] == [entry_id]
            leave.set()
            await nothing_pending(harness, topic, "g")
            await until(lambda: subscription.statistics().handled == 1)


async def test_every_group_handles_every_message_and_its_members_share_the_work(harness: Harness, topic: str) -> None:
    handled: dict[str, list[str]] = {"a": [], "b": []}

    async def for_a(delivery: Delivery) -> None:
        handled["a"].append(delivery.message.uid)
        await anyio.lowlevel.checkpoint()

    async def for_b(delivery: Delivery) -> None:
        handled["b"].append(delivery.message.uid)
        await anyio.lowlevel.checkpoint()

    messages = [Message(topic, str(number).encode()) for number in range(200)]
    async with StreamBus(harness.make_backend(), quick()) as bus:
        a, b = (SubscriptionConfig(topic, group, max_in_flight=4) for group in "ab")
        async with bus.subscribe(a, for_a), bus.subscribe(a, for_a), bus.subscribe(b, for_b):
            (await bus.publish_batch(messages)).raise_for_errors()
            await until(lambda: len(handled["a"]) >= 200 and len(handled["b"]) >= 200)
            await nothing_pending(harness, topic, "a", "b")
    assert sorted(handled["a"]) == sorted(handled["b"]) == sorted(message.uid for message in messages)


async def test_with_one_consumer_and_one_in_flight_handlers_start_in_the_order_published(
    harness: Harness, topic: str
) -> None:
    started: list[str] = []

    async def handler(delivery: Delivery) -> None:
        started.append(delivery.message.key)
        await anyio.lowlevel.checkpoint()

    async with StreamBus(harness.make_backend(), quick()) as bus:
        config = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=8)
        async with bus.subscribe(config, handler):
            await bus.publish_batch([Message(topic, key=str(number)) for number in range(100)])
            await until(lambda: len(started) == 100)
    assert started == [str(number) for number in range(100)]


async def test_what_a_reclaim_finds_beyond_the_room_stays_pending_and_is_handled_later(
    harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)
        await anyio.lowlevel.checkpoint()

    async with StreamBus(backend, quick(claim_idle_timeout=60)) as bus:
        await backend.create_group(topic, "g", "0")
        messages = [Message(topic) for _ in range(50)]
        await bus.publish_batch(messages)
        assert len(await backend.read_new(topic, "g", "dead", count=50, timeout=0)) == 50
        await harness.age(topic, "g")
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_in_flight=2, max_pending_acks=3), handler) as sub:
            await nothing_pending(harness, topic, "g")
            assert sub.statistics().reclaimed == 50
    assert sorted(handled) == sorted(message.uid for message in messages)


@pytest.mark.parametrize("error", [Retry("later", delay=0), RuntimeError("no"), Reject("never")])
async def test_auto_on_receive_is_acked_before_the_handler_starts_and_never_tried_again(
    harness: Harness, topic: str, error: Exception
) -> None:
    pending_at_start: list[str] = []
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        pending_at_start.extend(entry.id for entry in await harness.pending(topic, "g") if entry.id == delivery.id)
        handled.append(delivery.message.key)
        if delivery.message.key == "bad":
            raise error

    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        config = SubscriptionConfig(topic, "g", ack_mode="auto-on-receive", max_in_flight=1)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="bad"))
            await bus.publish(Message(topic, key="good"))
            await until(lambda: subscription.statistics().handled == 1)
            assert subscription.statistics().failed == 1
            assert subscription.statistics().retried == 0
    assert handled == ["bad", "good"]
    assert pending_at_start == []
    dead = await harness.entries(f"{topic}.dead")
    if isinstance(error, Reject):
        # "reported / dead letter, by a plain publish"
        assert dead[0][1] is not None
        assert dead[0][1].headers["dead-letter-reason"] == "never"
        assert len(recorder.of("on_dead_lettered")) == 1
    else:
        assert dead == []
        assert not await harness.entries(retry_stream(topic, "g"))


async def test_what_auto_on_receive_cannot_ack_does_not_start_until_it_can(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    real = backend.transfer_many
    failures = 0

    async def failing(*args: Any) -> Any:
        nonlocal failures
        if failures < 2:
            failures += 1
            assert handled == []
            raise BackendError("down", can_pass=True)
        return await real(*args)

    backend.transfer_many = failing  # type: ignore[assignment, method-assign]
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=30)) as bus:
        config = SubscriptionConfig(topic, "g", ack_mode="auto-on-receive")
        async with bus.subscribe(config, handler) as subscription:
            message = Message(topic)
            await bus.publish(message)
            await until(lambda: subscription.statistics().handled == 1)
    assert handled == [message.uid]
    assert failures == 2


async def test_in_manual_mode_a_handler_that_returns_leaves_its_message_held_until_it_is_settled(
    harness: Harness, topic: str
) -> None:
    kept: list[Delivery] = []

    async def handler(delivery: Delivery) -> None:
        kept.append(delivery)

    async with StreamBus(harness.make_backend(), quick(claim_idle_timeout=30)) as bus:
        config = SubscriptionConfig(topic, "g", ack_mode="manual", max_in_flight=1, max_pending_acks=4)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish_batch([Message(topic) for _ in range(3)])
            # The handler's slot is freed, the pending slot is not.
            await until(lambda: len(kept) == 3)
            assert subscription.statistics().held == 3
            assert subscription.statistics().in_flight == 0
            await kept[0].ack()
            await kept[1].extend()
            await kept[1].nack("no use")
            await kept[2].release()
            await until(lambda: len(kept) == 4)
            await kept[3].ack()
            assert await harness.pending(topic, "g") == []
    assert len(await harness.entries(f"{topic}.dead")) == 1


async def test_in_manual_mode_what_nobody_settles_comes_back_when_the_lease_ends(harness: Harness, topic: str) -> None:
    states: list[int | None] = []

    async def handler(delivery: Delivery) -> None:
        states.append(delivery.state.deliveries)
        if len(states) == 2:
            await delivery.ack()

    async with StreamBus(harness.make_backend(), quick(claim_idle_timeout=1)) as bus:
        config = SubscriptionConfig(topic, "g", ack_mode="manual")
        async with bus.subscribe(config, handler):
            await bus.publish(Message(topic))
            await until(lambda: len(states) == 2)
            await nothing_pending(harness, topic, "g")
    # A hand-over without an outcome, and the server's count says so.
    assert states == [1, 2]


async def test_in_manual_mode_a_handler_that_raises_is_retried(harness: Harness, topic: str) -> None:
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        if delivery.state.attempt == 1:
            raise RuntimeError("first")
        await delivery.ack()

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        config = SubscriptionConfig(topic, "g", ack_mode="manual", retry_backoff=QUICK)
        async with bus.subscribe(config, handler):
            await bus.publish(Message(topic))
            await until(lambda: attempts == [1, 2])
            await nothing_pending(harness, topic, "g")


async def test_raising_after_settling_is_only_reported(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        await delivery.ack()
        raise RuntimeError("too late")

    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: len(recorder.of("on_error", "handler")) == 1)
            assert subscription.statistics().retried == 0
    assert not await harness.entries(retry_stream(topic, "g"))
    assert not await harness.entries(f"{topic}.dead")


async def test_an_automatic_ack_that_fails_is_repeated_until_the_server_has_it(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    real = backend.ack_many
    failures = 0

    async def failing(*args: object, **kwargs: object) -> list[str]:
        nonlocal failures
        failures += 1
        if failures < 3:
            raise BackendError("down", can_pass=True)
        return await real(*args, **kwargs)  # type: ignore[arg-type]

    backend.ack_many = failing  # type: ignore[method-assign]
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    recorder = Recorder()
    async with StreamBus(backend, quick(recorder, claim_idle_timeout=30)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            await bus.publish(Message(topic))
            await until(lambda: failures == 3)
            await nothing_pending(harness, topic, "g")
    assert len(handled) == 1
    assert len(recorder.of("on_error", "ack-flush")) == 2


async def test_a_try_whose_reply_was_lost_and_that_settled_all_the_same_counts(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    real = backend.ack_many
    calls = 0

    async def losing_the_reply(*args: object, **kwargs: object) -> list[str]:
        nonlocal calls
        calls += 1
        answer = await real(*args, **kwargs)  # type: ignore[arg-type]
        if calls == 1:
            raise BackendError("connection lost", may_have_happened=True, can_pass=True)
        return answer

    backend.ack_many = losing_the_reply  # type: ignore[method-assign]
    answers: list[str] = []

    async def handler(delivery: Delivery) -> None:
        try:
            await delivery.ack()
        except BackendError as error:
            assert error.may_have_happened
            answers.append("failed")
            # Unsettled again, and the second try finds that the first one did it.
            await delivery.ack()
            answers.append("acked")

    async with StreamBus(backend, quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: answers == ["failed", "acked"])
            await nothing_pending(harness, topic, "g")
            assert subscription.statistics().leases_lost == 0


async def test_a_settlement_by_hand_that_fails_leaves_the_delivery_unsettled_and_the_handler_can_end_as_usual(
    harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    real = backend.transfer_many
    failing = True

    async def transfer_many(*args: object) -> list[object]:
        nonlocal failing
        if failing:
            failing = False
            raise BackendError("down", can_pass=True, may_have_happened=False)
        return await real(*args)  # type: ignore[arg-type,return-value]

    backend.transfer_many = transfer_many  # type: ignore[assignment,method-assign]

    async def handler(delivery: Delivery) -> None:
        with pytest.raises(BackendError, match="down"):
            await delivery.nack("bad")

    async with StreamBus(backend, quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            await bus.publish(Message(topic))
            await until(lambda: not failing)
            await nothing_pending(harness, topic, "g")
    assert not await harness.entries(f"{topic}.dead")


async def test_the_pull_form_hands_out_deliveries_to_be_settled_by_hand(harness: Harness, topic: str) -> None:
    messages = [Message(topic, str(number).encode()) for number in range(10)]
    seen: list[str] = []
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g", max_in_flight=3)) as stream:
            await bus.publish_batch(messages)
            while len(seen) < 10:
                with anyio.fail_after(SOON):
                    delivery = await stream.receive()
                seen.append(delivery.message.uid)
                await delivery.ack()
            assert await harness.pending(topic, "g") == []
    assert seen == [message.uid for message in messages]


async def test_the_pull_form_has_no_more_than_max_in_flight_out_and_releases_the_rest_when_the_block_is_left(
    harness: Harness, topic: str
) -> None:
    async with StreamBus(harness.make_backend(), quick(claim_idle_timeout=60)) as bus:
        await bus.publish_batch([Message(topic) for _ in range(6)])
        async with bus.deliveries(
            SubscriptionConfig(topic, "g", max_in_flight=2, max_pending_acks=6, group_start_id="0")
        ) as stream:
            with anyio.fail_after(SOON):
                out = [await stream.receive(), await stream.receive()]
            await anyio.wait_all_tasks_blocked()
            with anyio.move_on_after(0.05) as third:
                await stream.receive()
            assert third.cancelled_caught
            await out[0].ack()
            with anyio.fail_after(SOON):
                await stream.receive()
        pending = await harness.pending(topic, "g")
    assert {entry.consumer for entry in pending} == {"anybus:returned"}
    assert {entry.deliveries for entry in pending} == {0}
    assert len(uids(await harness.entries(topic))) == 6
    with pytest.raises(anyio.EndOfStream):
        await stream.receive()
