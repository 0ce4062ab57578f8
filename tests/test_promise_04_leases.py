"""Promise 4: a handler that outlives the lease keeps its message (renewal).

If the lease is lost all the same, what has not started does not start and is handed back if still ours;
``delivery.lease_lost`` warns what has; settling asks the server all the same, succeeds where nobody has taken the
entry, and never takes it away from a new owner. (Exact renewal times: test_virtual_clock.)
"""

from __future__ import annotations

import anyio
import pytest
from harness import SOON, Harness, Recorder, nothing_pending, quick, until

from anybus import BackendError, Delivery, LeaseLostError, Message, StreamBus, SubscriptionConfig
from anybus.abc import StreamBackend


class DeadLink:
    """Makes a backend's ``renew`` fail, as a dead link does."""

    def __init__(self, backend: StreamBackend) -> None:
        self.renewals = 0
        self._backend = backend

    async def renew(self, *args: object) -> list[str]:
        self.renewals += 1
        raise BackendError("no route to host", can_pass=True)

    def cut(self) -> None:
        self._backend.renew = self.renew  # type: ignore[assignment,method-assign]


async def test_a_handler_that_outlives_the_lease_keeps_its_message(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    started: list[str] = []
    renewed = 0
    renew = backend.renew

    async def counting(stream: str, group: str, consumer: str, message_ids: list[str]) -> list[str]:
        nonlocal renewed
        renewed += 1
        return await renew(stream, group, consumer, message_ids)

    backend.renew = counting  # type: ignore[assignment,method-assign]

    async def handler(delivery: Delivery) -> None:
        started.append(delivery.message.uid)
        # Longer than two leases, by the count of renewals: every third of a lease.
        await until(lambda: renewed >= 7)
        assert not delivery.lease_lost

    async with StreamBus(backend, quick(claim_idle_timeout=1.5)) as bus:
        config = SubscriptionConfig(topic, "g")
        async with bus.subscribe(config, handler) as one, bus.subscribe(config, handler) as two:
            await bus.publish(Message(topic))
            await until(lambda: one.statistics().handled + two.statistics().handled == 1)
            assert one.statistics().leases_lost == two.statistics().leases_lost == 0
    assert len(started) == 1


async def test_what_waits_is_renewed_too(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    gate = anyio.Event()
    renewed: set[str] = set()
    renew = backend.renew

    async def noting(stream: str, group: str, consumer: str, message_ids: list[str]) -> list[str]:
        owned = await renew(stream, group, consumer, message_ids)
        renewed.update(owned)
        return owned

    backend.renew = noting  # type: ignore[assignment,method-assign]

    async def handler(delivery: Delivery) -> None:
        await gate.wait()

    async with StreamBus(backend, quick(claim_idle_timeout=1.5)) as bus:
        config = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=8)
        async with bus.subscribe(config, handler) as subscription:
            ids = (await bus.publish_batch([Message(topic) for _ in range(4)])).results
            await until(lambda: renewed == set(ids))
            gate.set()
            await nothing_pending(harness, topic, "g")
            assert subscription.statistics().reclaimed == 0


async def test_a_lost_lease_is_noticed_by_our_clock_and_settling_succeeds_where_nobody_took_the_entry(
    harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    link = DeadLink(backend)
    seen: list[bool] = []

    async def handler(delivery: Delivery) -> None:
        seen.append(delivery.lease_lost)
        link.cut()
        await until(lambda: len(recorder.of("on_lease_lost")) == 1)
        seen.append(delivery.lease_lost)
        await delivery.ack()

    recorder = Recorder()
    # Nobody reclaims: the only other member does not look for ten minutes.
    async with StreamBus(backend, quick(recorder, claim_idle_timeout=1, reclaim_interval=600)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
            assert await harness.pending(topic, "g") == []
    assert seen == [False, True]
    assert recorder.of("on_error", "renew")


async def test_settling_never_takes_an_entry_away_from_its_new_owner(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    raised: list[str] = []

    async def handler(delivery: Delivery) -> None:
        await backend.reclaim_idle(topic, "g", "new-owner", min_idle=0, count=10)
        for settle in (delivery.ack, delivery.nack, delivery.retry, delivery.extend):
            try:
                await settle()
            except LeaseLostError:
                raised.append(settle.__name__)
        assert delivery.lease_lost

    async with StreamBus(backend, quick(claim_idle_timeout=60)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            entry_id = await bus.publish(Message(topic))
            await until(lambda: len(raised) == 4)
            await until(lambda: subscription.statistics().held == 0)
            assert subscription.statistics().leases_lost == 1
        pending = await harness.pending(topic, "g")
    # The late settlements, and the end, have changed nothing.
    assert [(entry.id, entry.consumer) for entry in pending] == [(entry_id, "new-owner")]
    assert not await harness.entries(f"{topic}.dead")


async def test_the_servers_answer_to_a_renewal_warns_the_handler_and_drops_what_has_not_started(
    harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    started: list[str] = []

    async def handler(delivery: Delivery) -> None:
        started.append(delivery.id)
        await until(lambda: subscription.statistics().waiting == 2)
        await backend.reclaim_idle(topic, "g", "thief", min_idle=0, count=10)
        await until(lambda: delivery.lease_lost)

    async with StreamBus(backend, quick(claim_idle_timeout=1.5, reclaim_interval=600)) as bus:
        ids = (await bus.publish_batch([Message(topic) for _ in range(3)])).results
        config = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=8, group_start_id="0")
        async with bus.subscribe(config, handler) as subscription:
            await until(lambda: subscription.statistics().leases_lost == 3)
            await until(lambda: subscription.statistics().held == 0)
        pending = await harness.pending(topic, "g")
    assert started == [ids[0]]
    assert [(entry.id, entry.consumer) for entry in pending] == [(entry_id, "thief") for entry_id in ids]


async def test_on_lease_lost_cancel_cancels_the_handler_and_touches_nobody_elses_entry(
    harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    cancelled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        await backend.reclaim_idle(topic, "g", "new-owner", min_idle=0, count=10)
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(delivery.id)

    async with StreamBus(backend, quick(claim_idle_timeout=1, reclaim_interval=600)) as bus:
        config = SubscriptionConfig(topic, "g", on_lease_lost="cancel")
        async with bus.subscribe(config, handler) as subscription:
            entry_id = await bus.publish(Message(topic))
            await until(lambda: cancelled == [entry_id])
            await until(lambda: subscription.statistics().held == 0)
            assert subscription.is_running
        pending = await harness.pending(topic, "g")
    assert [(entry.id, entry.consumer) for entry in pending] == [(entry_id, "new-owner")]


async def test_what_waited_through_a_freeze_is_handed_back_instead_of_started(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    link = DeadLink(backend)
    first_in = anyio.Event()
    started: list[str] = []

    async def frozen(delivery: Delivery) -> None:
        started.append(delivery.message.key)
        first_in.set()
        link.cut()
        await until(lambda: subscription.statistics().waiting == 0)

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=1, reclaim_interval=600)) as bus:
        await bus.publish_batch([Message(topic, key=str(number)) for number in range(4)])
        config = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=8, group_start_id="0")
        async with bus.subscribe(config, frozen) as subscription:
            with anyio.fail_after(SOON):
                await first_in.wait()
            await until(lambda: subscription.statistics().released == 3)
    assert started == ["0"]
    assert {entry.consumer for entry in await harness.pending(topic, "g")} == {"anybus:returned"}


async def test_extending_by_hand_renews_now(harness: Harness, topic: str) -> None:
    idle: list[float] = []

    async def handler(delivery: Delivery) -> None:
        async def has_aged() -> bool:
            return (await harness.pending(topic, "g"))[0].idle >= 0.03

        await until(has_aged)
        idle.append((await harness.pending(topic, "g"))[0].idle)
        await delivery.extend()
        idle.append((await harness.pending(topic, "g"))[0].idle)

    async with StreamBus(harness.make_backend(), quick(claim_idle_timeout=60)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert idle[0] > idle[1]


@pytest.mark.parametrize("mode", ["waiting", "in flight"])
async def test_no_lease_is_lost_by_a_renewal_that_fails_once(harness: Harness, topic: str, mode: str) -> None:
    backend = harness.make_backend()
    renew = backend.renew
    calls = 0

    async def failing_once(*args: object) -> list[str]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise BackendError("a hiccup", can_pass=True)
        return await renew(*args)  # type: ignore[arg-type]

    backend.renew = failing_once  # type: ignore[assignment,method-assign]

    async def handler(delivery: Delivery) -> None:
        await until(lambda: calls >= 4)

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=3)) as bus:
        config = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=4)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish_batch([Message(topic) for _ in range(2 if mode == "waiting" else 1)])
            await until(lambda: calls >= 4)
            await nothing_pending(harness, topic, "g")
            assert subscription.statistics().leases_lost == 0
            assert subscription.statistics().reclaimed == 0
