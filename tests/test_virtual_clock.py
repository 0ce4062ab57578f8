"""Everything that needs time to pass, on a virtual clock: trio's, which jumps when every task waits for it.

Specification (DESIGN.md, sections 2 to 4): a message that is put off is appended when due, not before; a retry comes
back after its backoff, within a reclaim interval; a read waits for ``block_timeout`` and not busily; what is held is
renewed every third of a lease, for hours if need be; a graceful end waits for ``close_timeout``, cleaning up for
``cleanup_timeout``; a publish ends after ``publish_timeout``, a handler after ``handler_timeout``; a backend that fails
is asked again after 0.1 s, doubling up to 5 s, jittered down to a half.

The clock is virtual, so times are exact: a test either measures them to the microsecond or by the interval in which the
design lets them fall. Every test gets a clock of its own, which begins at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from harness import Recorder

from anybus import (
    BackendError,
    Delivery,
    ExponentialBackoff,
    MemoryBackend,
    Message,
    Retry,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
)
from anybus.abc import FetchedEntry, Output, TransferItem

HOUR = 3600.0
STEADY = ExponentialBackoff(initial=1.0, factor=2.0, maximum=60.0, jitter=False)
now = anyio.current_time


@pytest.fixture
def anyio_backend() -> Any:
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


class Steps(trio.abc.Instrument):
    """Counts how often any task runs."""

    def __init__(self) -> None:
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1


async def read(
    backend: MemoryBackend, stream: str, consumer: str = "c", timeout: float = 0.0, count: int = 100
) -> list[FetchedEntry]:
    return await backend.read_new(stream, "g", consumer, count=count, timeout=timeout)


async def nobody(delivery: Delivery) -> None:
    raise AssertionError("nothing was published")


# --- the clock itself


@pytest.mark.parametrize("turn", [1, 2])
async def test_every_test_has_a_clock_of_its_own_that_jumps(turn: int) -> None:
    assert now() == 0.0
    await anyio.sleep(24 * HOUR)
    assert now() == 24 * HOUR


# --- the memory backend


@pytest.mark.parametrize("delay", [0.001, 1.0, 86_400.0])
async def test_a_blocked_reader_gets_a_message_in_the_very_moment_in_which_it_is_due(
    delay: float, backend: MemoryBackend, topic: str
) -> None:
    await backend.create_group(topic, "g", "0")
    await backend.publish_later(topic, Message(topic), delay=delay)
    assert len(await read(backend, topic, timeout=30 * 24 * HOUR)) == 1
    assert now() == pytest.approx(delay, abs=1e-6)


async def test_a_message_is_not_there_a_moment_before_it_is_due(backend: MemoryBackend, topic: str) -> None:
    await backend.create_group(topic, "g", "0")
    await backend.publish_later(topic, Message(topic), delay=10.0)
    await anyio.sleep(9.999)
    assert await read(backend, topic) == []
    await anyio.sleep(0.002)
    assert len(await read(backend, topic)) == 1


async def test_a_message_put_off_while_a_reader_waits_for_another_is_not_overslept(
    backend: MemoryBackend, topic: str
) -> None:
    await backend.create_group(topic, "g", "0")
    await backend.publish_later(topic, Message(topic, b"later"), delay=100.0)
    woken_at: list[float] = []

    async def reader() -> None:
        for _ in range(2):
            assert len(await read(backend, topic, timeout=HOUR)) == 1
            woken_at.append(now())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader)
        await anyio.sleep(5.0)
        await backend.publish_later(topic, Message(topic, b"sooner"), delay=10.0)
    assert woken_at == pytest.approx([15.0, 100.0])


async def test_a_delayed_output_is_due_by_the_same_clock(backend: MemoryBackend, topic: str) -> None:
    other = f"{topic}.other"
    for stream in (topic, other):
        await backend.create_group(stream, "g", "0")
    await backend.publish(topic, Message(topic))
    (entry,) = await read(backend, topic)
    await anyio.sleep(3.0)
    await backend.transfer(topic, "g", "c", entry.id, [Output(other, Message(other), delay=60.0)])
    assert len(await read(backend, other, timeout=HOUR)) == 1
    assert now() == pytest.approx(63.0)


async def test_a_read_ends_exactly_when_its_time_is_over(backend: MemoryBackend, topic: str) -> None:
    await backend.create_group(topic, "g", "0")
    assert await read(backend, topic, timeout=0.0) == []
    assert now() == 0.0, "a read that may not wait does not"
    assert await read(backend, topic, timeout=7.5) == []
    assert now() == pytest.approx(7.5)


async def test_a_blocked_read_does_not_wait_busily(backend: MemoryBackend, topic: str) -> None:
    await backend.create_group(topic, "g", "0")
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    assert await read(backend, topic, timeout=24 * HOUR) == []
    trio.lowlevel.remove_instrument(steps)
    assert now() == pytest.approx(24 * HOUR)
    assert steps.count < 20


async def test_an_entry_is_idle_for_exactly_as_long_as_nobody_touched_it(backend: MemoryBackend, topic: str) -> None:
    await backend.create_group(topic, "g", "0")
    await backend.publish(topic, Message(topic))
    (entry,) = await read(backend, topic)
    await anyio.sleep(40.0)
    assert await backend.renew(topic, "g", "c", [entry.id]) == [entry.id]
    await anyio.sleep(59.999)
    assert await backend.reclaim_idle(topic, "g", "d", min_idle=60.0, count=1) == []
    await anyio.sleep(0.002)
    assert [taken.id for taken in await backend.reclaim_idle(topic, "g", "d", min_idle=60.0, count=1)] == [entry.id]


# --- retries


async def test_retries_come_back_after_their_backoff_within_a_reclaim_interval(
    backend: MemoryBackend, topic: str
) -> None:
    interval = 0.25
    handled_at: list[float] = []
    config = SubscriptionConfig(topic, "g", max_retry=5, retry_backoff=STEADY)

    async def fail(delivery: Delivery) -> None:
        assert delivery.state.attempt == len(handled_at) + 1
        handled_at.append(now())
        raise ValueError("always")

    async with StreamBus(backend, StreamBusOptions(reclaim_interval=interval, observer=Recorder())) as bus:
        async with bus.subscribe(config, fail) as subscription:
            await bus.publish(Message(topic))
            await anyio.sleep(HOUR)
            assert subscription.statistics().dead_lettered == 1
    assert len(handled_at) == 6
    for failures, (earlier, later) in enumerate(pairwise(handled_at), start=1):
        bound = 2.0 ** (failures - 1)
        assert bound - 1e-6 <= later - earlier <= bound + interval + 0.01


async def test_a_retry_that_names_its_delay_waits_that_long(backend: MemoryBackend, topic: str) -> None:
    handled_at: list[float] = []

    async def later(delivery: Delivery) -> None:
        handled_at.append(now())
        if len(handled_at) == 1:
            raise Retry("busy", delay=1000.0)

    async with StreamBus(backend, StreamBusOptions(reclaim_interval=0.5)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), later):
            await bus.publish(Message(topic))
            await anyio.sleep(1500.0)
    assert len(handled_at) == 2
    assert 1000.0 <= handled_at[1] - handled_at[0] <= 1000.51


async def test_full_jitter_spreads_retries_between_zero_and_the_bound(backend: MemoryBackend, topic: str) -> None:
    failed_at: dict[str, float] = {}
    waits: list[float] = []
    backoff = ExponentialBackoff(initial=100.0, maximum=100.0)

    async def fail_once(delivery: Delivery) -> None:
        uid = delivery.message.uid
        if uid not in failed_at:
            failed_at[uid] = now()
            raise ValueError("once")
        waits.append(now() - failed_at[uid])

    config = SubscriptionConfig(topic, "g", retry_backoff=backoff)
    async with StreamBus(backend, StreamBusOptions(reclaim_interval=0.1, observer=Recorder())) as bus:
        async with bus.subscribe(config, fail_once):
            await bus.publish_batch([Message(topic) for _ in range(200)])
            await anyio.sleep(150.0)
    assert len(waits) == 200
    assert max(waits) <= 100.2
    assert min(waits) < 20.0, "full jitter begins at zero"
    assert max(waits) > 80.0, "full jitter goes up to the bound"


async def test_a_release_with_a_delay_comes_back_when_it_is_due_uncounted(backend: MemoryBackend, topic: str) -> None:
    seen: list[tuple[float, int]] = []

    async def not_now(delivery: Delivery) -> None:
        seen.append((now(), delivery.state.attempt))
        await (delivery.release(60.0) if len(seen) <= 10 else delivery.ack())

    async with StreamBus(backend, StreamBusOptions(reclaim_interval=0.5)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", ack_mode="manual"), not_now) as subscription:
            await bus.publish(Message(topic))
            await anyio.sleep(HOUR)
            assert (subscription.statistics().released, subscription.statistics().handled) == (10, 1)
    assert [attempt for _, attempt in seen] == [1] * 11, "a release is never counted, beyond max_retry neither"
    for (earlier, _), (later, _) in pairwise(seen):
        assert 60.0 - 1e-6 <= later - earlier <= 60.51


class ForgetsDelays(MemoryBackend):
    features = MemoryBackend.features - {"delay"}


async def test_where_the_backend_cannot_delay_the_bus_holds_a_retry_until_it_is_due(topic: str) -> None:
    backend = ForgetsDelays()
    handled_at: list[float] = []
    config = SubscriptionConfig(topic, "g", max_retry=3, retry_backoff=STEADY)

    async def fail(delivery: Delivery) -> None:
        assert delivery.state.attempt == len(handled_at) + 1
        handled_at.append(now())
        raise ValueError("always")

    async with StreamBus(backend, StreamBusOptions(claim_idle_timeout=2.0, observer=Recorder())) as bus:
        async with bus.subscribe(config, fail) as subscription:
            await bus.publish(Message(topic))
            await anyio.sleep(0.5)
            assert subscription.statistics().held == 1, "it is leased, and counts in max_pending_acks"
            await anyio.sleep(HOUR)
            assert subscription.statistics().dead_lettered == 1
            assert subscription.statistics().leases_lost == 0
    waits = [later - earlier for earlier, later in pairwise(handled_at)]
    assert waits == pytest.approx([1.0, 2.0, 4.0], abs=0.01), "nothing has to be looked for: it is exact"


# --- reading and reclaiming


class Watched(MemoryBackend):
    """Notes when the bus asks for what."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[float, str, float]] = []
        self.reclaims: list[tuple[float, str]] = []
        self.renewals: list[tuple[float, tuple[str, ...]]] = []

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        self.reads.append((now(), stream, timeout))
        return await super().read_new(stream, group, consumer, count=count, timeout=timeout)

    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        self.reclaims.append((now(), stream))
        return await super().reclaim_idle(stream, group, consumer, min_idle=min_idle, count=count)

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        self.renewals.append((now(), tuple(message_ids)))
        return await super().renew(stream, group, consumer, message_ids)


async def test_an_idle_subscription_blocks_in_one_read_for_every_block_timeout(topic: str) -> None:
    backend = Watched()
    async with StreamBus(backend, StreamBusOptions(block_timeout=4.0, reclaim_interval=10.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), nobody):
            await anyio.sleep(39.0)
            reads = [(at, timeout) for at, stream, timeout in backend.reads if stream == topic]
    blocking = [at for at, timeout in reads if timeout > 0]
    assert blocking == pytest.approx([0, 4, 8, 12, 16, 20, 24, 28, 32, 36])
    assert {timeout for _, timeout in reads} <= {4.0, 0.0}
    assert len(reads) <= 2 * len(blocking), "nothing is asked busily"


async def test_an_idle_subscription_looks_for_idle_and_due_entries_once_in_every_reclaim_interval(topic: str) -> None:
    backend = Watched()
    async with StreamBus(backend, StreamBusOptions(reclaim_interval=10.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), nobody):
            await anyio.sleep(49.0)
            reclaims = list(backend.reclaims)
            retry_reads = [(at, timeout) for at, stream, timeout in backend.reads if stream != topic]
    for stream in {stream for _, stream in reclaims}:
        assert [at for at, name in reclaims if name == stream] == pytest.approx([0, 10, 20, 30, 40])
    assert len({stream for _, stream in reclaims}) == 2, "the topic, and the group's own retry stream"
    assert [at for at, _ in retry_reads] == pytest.approx([0, 10, 20, 30, 40])
    assert {timeout for _, timeout in retry_reads} == {0}, "the retry stream is read without blocking"


async def test_where_nothing_lies_beyond_max_in_flight_a_read_blocks_for_a_reclaim_interval_at_most(topic: str) -> None:
    backend = Watched()
    config = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=1)
    async with StreamBus(backend, StreamBusOptions(block_timeout=60.0, reclaim_interval=2.0)) as bus:
        async with bus.subscribe(config, nobody):
            await anyio.sleep(9.0)
    assert {timeout for _, stream, timeout in backend.reads if stream == topic} == {2.0}
    assert [at for at, stream in backend.reclaims if stream == topic] == pytest.approx([2, 4, 6, 8])


async def test_a_dead_consumers_entry_is_taken_over_when_its_lease_is_over(backend: MemoryBackend, topic: str) -> None:
    handled_at: list[float] = []

    async def handler(delivery: Delivery) -> None:
        assert delivery.state.redelivered
        assert delivery.state.deliveries == 2
        handled_at.append(now())

    await backend.create_group(topic, "g", "0")
    await backend.publish(topic, Message(topic))
    assert len(await read(backend, topic, "dead")) == 1
    async with StreamBus(backend, StreamBusOptions(claim_idle_timeout=60.0, reclaim_interval=0.5)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            await anyio.sleep(HOUR)
    assert len(handled_at) == 1
    assert 60.0 <= handled_at[0] <= 60.51


# --- leases


async def test_a_handler_that_takes_hours_keeps_its_message_by_a_renewal_every_third_of_a_lease(topic: str) -> None:
    backend = Watched()
    handled: list[str] = []

    async def slow(delivery: Delivery) -> None:
        handled.append(delivery.id)
        await anyio.sleep(6 * HOUR)
        assert not delivery.lease_lost

    options = StreamBusOptions(claim_idle_timeout=60.0, block_timeout=60.0, reclaim_interval=7.0)
    async with StreamBus(backend, options) as bus, StreamBus(backend, options) as rival:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), slow) as first:
            async with rival.subscribe(SubscriptionConfig(topic, "g"), slow) as second:
                entry_id = await bus.publish(Message(topic))
                await anyio.sleep(7 * HOUR)
                statistics = first.statistics(), second.statistics()
    assert handled == [entry_id]
    assert sum(each.handled for each in statistics) == 1
    assert sum(each.leases_lost + each.reclaimed for each in statistics) == 0
    renewals = [at for at, message_ids in backend.renewals if message_ids]
    assert len(renewals) in range(6 * 180 - 2, 6 * 180 + 2)
    assert all(later - earlier == pytest.approx(20.0) for earlier, later in pairwise(renewals))


async def test_what_waits_for_a_handler_is_renewed_too(backend: MemoryBackend, topic: str) -> None:
    handled: list[bytes] = []

    async def slow(delivery: Delivery) -> None:
        await anyio.sleep(100.0)
        handled.append(delivery.message.payload)

    config = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=10)
    async with StreamBus(backend, StreamBusOptions(claim_idle_timeout=30.0)) as bus:
        async with bus.subscribe(config, slow) as subscription:
            await bus.publish_batch([Message(topic, str(number).encode()) for number in range(5)])
            await anyio.sleep(HOUR)
            statistics = subscription.statistics()
    assert handled == [b"0", b"1", b"2", b"3", b"4"]
    assert (statistics.leases_lost, statistics.reclaimed, statistics.released) == (0, 0, 0)


async def test_what_returned_unsettled_in_manual_mode_is_let_go_when_its_lease_is_over(
    backend: MemoryBackend, topic: str
) -> None:
    handled_at: list[float] = []

    async def forgets(delivery: Delivery) -> None:
        handled_at.append(now())
        if len(handled_at) == 3:
            await delivery.ack()

    config = SubscriptionConfig(topic, "g", ack_mode="manual")
    async with StreamBus(backend, StreamBusOptions(claim_idle_timeout=60.0, reclaim_interval=0.5)) as bus:
        async with bus.subscribe(config, forgets) as subscription:
            await bus.publish(Message(topic))
            await anyio.sleep(59.0)
            assert subscription.statistics().held == 1
            assert subscription.statistics().in_flight == 0
            await anyio.sleep(HOUR)
            assert subscription.statistics().held == 0
    waits = [later - earlier for earlier, later in pairwise(handled_at)]
    assert len(waits) == 2
    assert all(60.0 <= wait <= 60.51 for wait in waits)


async def test_a_pulled_delivery_is_renewed_until_it_is_settled(backend: MemoryBackend, topic: str) -> None:
    options = StreamBusOptions(claim_idle_timeout=60.0, block_timeout=60.0, reclaim_interval=7.0)
    async with StreamBus(backend, options) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            await bus.publish(Message(topic))
            delivery = await deliveries.receive()
            await anyio.sleep(5 * HOUR)
            assert not delivery.lease_lost
            await delivery.ack()
    assert await backend.pending_entries(topic, "g") == []


# --- timeouts of handlers and publishes


async def test_a_handler_is_cancelled_exactly_after_its_timeout_and_its_message_is_tried_again(
    backend: MemoryBackend, topic: str
) -> None:
    spans: list[tuple[float, float]] = []
    config = SubscriptionConfig(topic, "g", handler_timeout=5.0, max_retry=1, retry_backoff=STEADY)

    async def hang(delivery: Delivery) -> None:
        started = now()
        try:
            await anyio.sleep_forever()
        finally:
            spans.append((started, now()))

    async with StreamBus(backend, StreamBusOptions(reclaim_interval=0.1, observer=Recorder())) as bus:
        async with bus.subscribe(config, hang) as subscription:
            await bus.publish(Message(topic))
            await anyio.sleep(60.0)
            assert (subscription.statistics().failed, subscription.statistics().dead_lettered) == (2, 1)
    assert [ended - started for started, ended in spans] == pytest.approx([5.0, 5.0])
    ((_, message, _),) = backend.entries(f"{topic}.dead")
    assert message is not None
    assert message.headers["dead-letter-code"] == "retries"
    assert "handler_timeout" in message.headers["dead-letter-reason"]


class Hangs(MemoryBackend):
    """Never answers the methods that it is told."""

    def __init__(self, *methods: str) -> None:
        super().__init__()
        self._methods = methods
        self.asked: list[tuple[str, float]] = []

    async def _hang(self, method: str) -> None:
        if method in self._methods:
            self.asked.append((method, now()))
            await anyio.sleep_forever()

    async def publish(self, stream: str, message: Message) -> str:
        await self._hang("publish")
        return await super().publish(stream, message)

    async def publish_many(self, items: Sequence[Any]) -> list[Any]:
        await self._hang("publish_many")
        return await super().publish_many(items)

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        await self._hang("ack_many")
        return await super().ack_many(stream, group, message_ids, consumer=consumer)

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        await self._hang("release")
        await super().release(stream, group, consumer, message_ids)

    async def transfer_many(self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]) -> list[Any]:
        await self._hang("transfer_many")
        return await super().transfer_many(stream, group, consumer, items)

    async def forget_consumer(self, stream: str, group: str, consumer: str) -> None:
        await self._hang("forget_consumer")
        await super().forget_consumer(stream, group, consumer)


async def test_a_publish_without_an_answer_ends_after_publish_timeout_and_may_have_happened(topic: str) -> None:
    async with StreamBus(Hangs("publish"), StreamBusOptions(publish_timeout=3.0)) as bus:
        with pytest.raises(BackendError, match="publish_timeout") as caught:
            await bus.publish(Message(topic))
        assert now() == pytest.approx(3.0)
    assert caught.value.may_have_happened


async def test_a_batch_without_an_answer_ends_after_publish_timeout_with_an_error_per_message(topic: str) -> None:
    options = StreamBusOptions(publish_timeout=3.0, max_payload_bytes=1)
    async with StreamBus(Hangs("publish_many"), options) as bus:
        outcome = await bus.publish_batch([Message(topic), Message(topic, b"refused"), Message(topic)])
        assert now() == pytest.approx(3.0)
    assert [getattr(result, "may_have_happened", None) for result in outcome.results] == [True, None, True]


# --- the end


async def test_a_graceful_end_waits_for_handlers_for_close_timeout_and_then_cancels_and_releases(
    backend: MemoryBackend, topic: str
) -> None:
    cancelled_at: list[float] = []

    async def hang(delivery: Delivery) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled_at.append(now())

    async with StreamBus(backend, StreamBusOptions(close_timeout=30.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), hang) as subscription:
            entry_id = await bus.publish(Message(topic))
            await anyio.sleep(100.0)
            subscription.close()
            assert not subscription.is_running
            await subscription.wait_closed()
            assert now() == pytest.approx(130.0)
            assert subscription.statistics().released == 1
    assert cancelled_at == pytest.approx([130.0])
    (taken,) = await backend.reclaim_idle(topic, "g", "next", min_idle=HOUR, count=10)
    assert taken.id == entry_id, "it was handed back before its lease was over"


async def test_a_graceful_end_is_over_as_soon_as_the_last_handler_is(backend: MemoryBackend, topic: str) -> None:
    async def slow(delivery: Delivery) -> None:
        await anyio.sleep(10.0)

    async with StreamBus(backend, StreamBusOptions(close_timeout=30.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), slow) as subscription:
            await bus.publish(Message(topic))
            await anyio.sleep(4.0)
        assert now() == pytest.approx(10.0)
        assert subscription.statistics().handled == 1
    assert await backend.pending_entries(topic, "g") == []


@pytest.mark.parametrize("how", ["abort", "close_timeout=0"])
async def test_an_end_without_grace_cancels_handlers_at_once(how: str, backend: MemoryBackend, topic: str) -> None:
    async def hang(delivery: Delivery) -> None:
        await anyio.sleep_forever()

    async with StreamBus(backend, StreamBusOptions(close_timeout=0 if how != "abort" else 30.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), hang) as subscription:
            await bus.publish(Message(topic))
            await anyio.sleep(100.0)
            (subscription.abort if how == "abort" else subscription.close)()
            await subscription.wait_closed()
            assert now() == pytest.approx(100.0)
            assert subscription.statistics().released == 1


async def test_an_abort_cuts_a_graceful_end_short(backend: MemoryBackend, topic: str) -> None:
    async def hang(delivery: Delivery) -> None:
        await anyio.sleep_forever()

    async with StreamBus(backend, StreamBusOptions(close_timeout=HOUR)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), hang) as subscription:
            await bus.publish(Message(topic))
            await anyio.sleep(1.0)
            subscription.close()
            await anyio.sleep(5.0)
            subscription.abort()
            await subscription.wait_closed()
            assert now() == pytest.approx(6.0)


@pytest.mark.parametrize("method", ["ack_many", "transfer_many", "release"])
async def test_an_end_gives_up_settling_after_cleanup_timeout_and_says_so(method: str, topic: str) -> None:
    backend, recorder = Hangs(method), Recorder()

    async def handler(delivery: Delivery) -> None:
        if method == "transfer_many":
            raise ValueError("so that a retry has to be stored")
        if method == "release":
            await anyio.sleep_forever()

    options = StreamBusOptions(close_timeout=1.0, cleanup_timeout=7.0, observer=recorder)
    async with StreamBus(backend, options) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            await bus.publish(Message(topic))
            await anyio.sleep(10.0)
        grace = 1.0 if method == "release" else 0.0
        assert now() == pytest.approx(10.0 + grace + 7.0)
    assert len(backend.asked) == 1
    assert "cleanup_timeout" in str(recorder.of("on_error", "close")[0].error)
    assert len(await backend.pending_entries(topic, "g")) == 1, "it comes back when its lease is over"


async def test_forgetting_a_consumer_is_bounded_by_cleanup_timeout_too(topic: str) -> None:
    backend = Hangs("forget_consumer")
    async with StreamBus(backend, StreamBusOptions(cleanup_timeout=7.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), nobody):
            await anyio.sleep(10.0)
        assert now() == pytest.approx(17.0)
    assert backend.asked[0][1] == pytest.approx(10.0)


async def test_a_handler_that_refuses_to_end_is_reported_waited_for_and_leased_all_the_while(
    backend: MemoryBackend, topic: str
) -> None:
    recorder = Recorder()

    async def stubborn(delivery: Delivery) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(HOUR)

    options = StreamBusOptions(close_timeout=1.0, cleanup_timeout=7.0, claim_idle_timeout=30.0, observer=recorder)
    async with StreamBus(backend, options) as bus, StreamBus(backend, options) as rival:
        async with rival.subscribe(SubscriptionConfig(topic, "g"), nobody) as waiting:
            waiting.pause()
            async with bus.subscribe(SubscriptionConfig(topic, "g"), stubborn) as subscription:
                await bus.publish(Message(topic))
                await anyio.sleep(10.0)
                waiting.resume()
            assert now() == pytest.approx(HOUR, abs=1.0)
            assert subscription.statistics().handled + subscription.statistics().released == 1
            late = [event for event in recorder.of("on_error", "close") if event.message_id is not None]
            assert len(late) == 1
            assert waiting.statistics().received == 0, "nobody else may have it while its handler goes on"
            waiting.pause()


# --- a backend that fails


class Fails(Watched):
    """Fails to read a topic so many times: at all, or only where a read may block (on a connection of its own)."""

    def __init__(self, times: int, *, only_blocking: bool) -> None:
        super().__init__()
        self.failures_left = times
        self.only_blocking = only_blocking
        self.tried_at: list[float] = []

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        if not stream.startswith("anybus:") and (timeout > 0 or not self.only_blocking):
            self.tried_at.append(now())
            if self.failures_left:
                self.failures_left -= 1
                raise BackendError("the link is down", can_pass=True)
        return await super().read_new(stream, group, consumer, count=count, timeout=timeout)


@pytest.mark.parametrize("only_blocking", [False, True], ids=["every read", "blocking reads only"])
async def test_what_can_pass_is_tried_again_from_a_tenth_of_a_second_doubling_to_five(
    only_blocking: bool, topic: str
) -> None:
    backend, recorder = Fails(10, only_blocking=only_blocking), Recorder()

    async def handler(delivery: Delivery) -> None:
        """It works when the link is up again."""

    async with StreamBus(backend, StreamBusOptions(observer=recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await anyio.sleep(60.0)
            await bus.publish(Message(topic))
            await anyio.sleep(60.0)
            assert subscription.statistics().handled == 1
    assert len(recorder.of("on_error", "read")) == 10
    for number, (earlier, later) in enumerate(pairwise(backend.tried_at[:11])):
        bound = min(0.1 * 2**number, 5.0)
        assert bound / 2 <= later - earlier <= bound + 1e-6


@pytest.mark.parametrize("hours", [0.9, 1, 1.1])
async def test_acknowledgements_are_flushed_at_any_hour_of_the_clock(
    backend: MemoryBackend, topic: str, hours: float
) -> None:
    """A difference of two late times can be a little less than the interval, and the rest too short to sleep for."""

    async def handler(delivery: Delivery) -> None:
        """Succeeds."""

    async with StreamBus(backend, StreamBusOptions(observer=Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_in_flight=4), handler) as subscription:
            await anyio.sleep(hours * HOUR)
            for number in range(1, 200):
                await bus.publish_batch([Message(topic) for _ in range(3)])
                await anyio.sleep(0.1)
                assert subscription.statistics().handled == 3 * number


# --- exactly-once effects


async def test_a_claim_lasts_as_long_as_its_handling_and_a_completion_as_long_as_the_window(
    backend: MemoryBackend, topic: str
) -> None:
    handled: list[tuple[str, float]] = []

    async def handler(delivery: Delivery) -> None:
        handled.append((delivery.message.key, now()))
        await anyio.sleep(HOUR / 4)

    def message(key: str) -> Message:
        return Message(topic, key=key, idempotency_key="k")

    config = SubscriptionConfig(topic, "g", guarantee="exactly-once", idempotency_window=HOUR / 4)
    async with StreamBus(backend, StreamBusOptions(claim_idle_timeout=60.0)) as bus:
        async with bus.subscribe(config, handler) as one, bus.subscribe(config, handler) as two:
            await bus.publish(message("first"))
            await anyio.sleep(1)
            await bus.publish(message("meanwhile"))
            await anyio.sleep(HOUR / 2 - 60)
            counted = [one.statistics(), two.statistics()]
            assert [key for key, _ in handled] == ["first"]
            assert [sum(each) for each in zip(*((c.handled, c.duplicates) for c in counted), strict=True)] == [1, 1]
            await bus.publish(message("in the window"))
            await anyio.sleep(120)
            await bus.publish(message("after the window"))
            await anyio.sleep(1)
            assert [key for key, _ in handled] == ["first", "after the window"]
            assert one.statistics().duplicates + two.statistics().duplicates == 2
