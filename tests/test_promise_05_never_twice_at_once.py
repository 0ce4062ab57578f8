"""Promise 5: an entry already held here is never handled a second time at once by the same subscription.

An entry is a stream and an id: the retry stream's ids can equal the topic's. One that had returned unsettled and comes
back is let go by that, and handled anew. And: an entry handled here that comes back, by reclaim or from a group made
again, is acked, not handled again.
"""

from __future__ import annotations

import anyio
from harness import QUICK, SOON, Harness, Recorder, StepByStep, nothing_pending, quick, until

from anybus import BackendError, Delivery, Message, StreamBus, SubscriptionConfig
from anybus._failure.copies import retry_stream


async def test_an_entry_in_a_handler_that_our_own_reclaim_brings_back_is_not_handled_again(
    harness: Harness, topic: str
) -> None:
    backend = StepByStep(harness.make_backend())
    started: list[str] = []
    reclaimed = anyio.Event()
    reclaim_idle = backend.reclaim_idle

    async def ignoring_the_lease(stream: str, group: str, consumer: str, *, min_idle: float, count: int) -> object:
        entries = await reclaim_idle(stream, group, consumer, min_idle=0, count=count)
        if entries and stream == topic:
            reclaimed.set()
        return entries

    backend.reclaim_idle = ignoring_the_lease  # type: ignore[assignment,method-assign]

    async def handler(delivery: Delivery) -> None:
        started.append(delivery.id)
        with anyio.fail_after(SOON):
            await reclaimed.wait()

    async with StreamBus(backend, quick(claim_idle_timeout=60)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert len(started) == 1


async def test_a_retry_whose_id_equals_the_id_of_a_held_entry_is_handled(harness: Harness, topic: str) -> None:
    gate = anyio.Event()
    handled: list[tuple[str, str, int]] = []

    async def handler(delivery: Delivery) -> None:
        handled.append((delivery.message.key, delivery.id, delivery.state.attempt))
        if delivery.message.key == "first":
            await gate.wait()
        elif delivery.state.attempt == 1:
            raise RuntimeError("once")

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", retry_backoff=QUICK), handler):
            await bus.publish(Message(topic, key="first"))
            await bus.publish(Message(topic, key="second"))
            # On memory the first retry has the id of the topic's first entry, which is still in its handler.
            await until(lambda: len(handled) == 3)
            gate.set()
            await nothing_pending(harness, topic, "g")
    assert [(key, attempt) for key, _, attempt in handled] == [("first", 1), ("second", 1), ("second", 2)]


async def test_one_that_had_returned_unsettled_and_comes_back_is_handled_anew(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    deliveries: list[Delivery] = []

    async def handler(delivery: Delivery) -> None:
        deliveries.append(delivery)
        if len(deliveries) == 2:
            await delivery.ack()

    async with StreamBus(backend, quick(claim_idle_timeout=60)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", ack_mode="manual"), handler) as subscription:
            entry_id = await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().in_flight == 0 and len(deliveries) == 1)
            # Somebody hands our entry back behind our back; our own reclaim takes it again.
            await backend.release(topic, "g", subscription.consumer, [entry_id])
            await until(lambda: len(deliveries) == 2)
            await until(lambda: subscription.statistics().held == 0)
    assert deliveries[0].id == deliveries[1].id == entry_id


async def test_a_handled_entry_whose_ack_failed_for_a_whole_lease_is_acked_when_it_comes_back(
    harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    ack_many, renew = backend.ack_many, backend.renew
    down = True
    handled: list[str] = []

    async def failing_ack(*args: object, **kwargs: object) -> list[str]:
        if down:
            raise BackendError("down", can_pass=True, may_have_happened=False)
        return await ack_many(*args, **kwargs)  # type: ignore[arg-type]

    async def failing_renew(*args: object) -> list[str]:
        if down:
            raise BackendError("down", can_pass=True)
        return await renew(*args)  # type: ignore[arg-type]

    backend.ack_many = failing_ack  # type: ignore[method-assign]
    backend.renew = failing_renew  # type: ignore[assignment,method-assign]

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=1)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: len(handled) == 1)
            await until(lambda: subscription.statistics().reclaimed >= 1, "our own reclaim")
            down = False
            await nothing_pending(harness, topic, "g")
    assert len(handled) == 1


async def test_a_handled_entry_that_a_group_made_again_brings_back_is_acked_and_not_handled_again(
    harness: Harness, topic: str
) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)
        await harness.delete_group(topic, "g")
        await until(lambda: bool(recorder.of("on_group_made_again")))

    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder, claim_idle_timeout=60)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: len(handled) == 1 and subscription.statistics().held == 0)
            await nothing_pending(harness, topic, "g")
            await anyio.wait_all_tasks_blocked()
    assert len(handled) == 1
    assert not await harness.entries(retry_stream(topic, "g"))
