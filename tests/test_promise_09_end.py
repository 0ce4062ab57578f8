"""Promise 9 and the ``Subscription`` of section 3: how a subscription ends, and what can be done with it until then.

Body ended or ``close()``: graceful: take nothing more, release what waits, wait up to ``close_timeout`` for what is in
flight, then cancel it. Body raised, cancelled from outside (during a graceful end too), or ``abort()``: handlers are
cancelled at once. Then acks are flushed, the rest is released, ``forget_consumer`` is called last, in a shield of
``cleanup_timeout``. A handler that refuses to end (a thread) is reported and waited for, leased all the while, without
holding up the release of the rest; what it came to is settled in a shield of its own. ``close()`` and ``abort()`` leave
the body running; ``consume`` returns, the stream of ``deliveries`` ends. ``wait_closed()`` and ``aclose()`` raise in
one of its own handlers. Closing twice is fine. ``pause()``: no new take, waiting entries are released, what is in
flight goes on. Leaving the bus ends its subscriptions first; afterwards every call raises ``ClosedError``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import to_thread
from harness import SOON, Harness, Recorder, StepByStep, nothing_pending, quick, uids, until
from sweeps import first_of

from anybus import (
    BackendError,
    ClosedError,
    Delivery,
    ExponentialBackoff,
    Message,
    Reject,
    StreamBus,
    Subscription,
    SubscriptionConfig,
)
from anybus._failure.copies import retry_stream
from anybus.abc import StreamBackend

GROUP = "g"
RETURNED = "anybus:returned"
LONG = 60.0
"""Seconds: longer than any test waits. What would take so long has not been waited for."""

ASYNCIO_LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]


class BodyError(Exception):
    """What a body raises here."""


class Stuck:
    """A handler that says when it has begun, and goes on until it is let go."""

    def __init__(self) -> None:
        self.begun: list[Delivery] = []
        self.cancelled: list[str] = []
        self.ended: list[str] = []
        self.gate = anyio.Event()

    async def __call__(self, delivery: Delivery) -> None:
        self.begun.append(delivery)
        try:
            await self.gate.wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled.append(delivery.id)
            raise
        self.ended.append(delivery.id)

    async def has_begun(self, times: int = 1) -> None:
        await until(lambda: len(self.begun) >= times, f"{times} handlers to begin")


async def publish(bus: StreamBus, topic: str, count: int) -> list[str]:
    return [await bus.publish(Message(topic, key=str(number))) for number in range(count)]


async def owners(harness: Harness, topic: str) -> dict[str, str]:
    return {entry.id: entry.consumer for entry in await harness.pending(topic, GROUP)}


async def released(harness: Harness, topic: str, ids: Sequence[str]) -> bool:
    """Whether these, of all that is pending, have been handed back, uncounted."""
    pending = {entry.id: entry for entry in await harness.pending(topic, GROUP)}
    return all(
        entry_id in pending and pending[entry_id].consumer == RETURNED and pending[entry_id].deliveries == 0
        for entry_id in ids
    )


async def is_held(harness: Harness, topic: str, ids: Sequence[str]) -> bool:
    return list(await owners(harness, topic)) == list(ids)


async def body_raised(subscription: Subscription, scope: anyio.CancelScope) -> None:
    raise BodyError


async def body_cancelled(subscription: Subscription, scope: anyio.CancelScope) -> None:
    scope.cancel()
    await anyio.sleep_forever()


async def aborted(subscription: Subscription, scope: anyio.CancelScope) -> None:
    subscription.abort()
    await subscription.wait_closed()


async def closed_then_cancelled(subscription: Subscription, scope: anyio.CancelScope) -> None:
    subscription.close()
    scope.cancel()
    await anyio.sleep_forever()


async def closed_then_aborted(subscription: Subscription, scope: anyio.CancelScope) -> None:
    subscription.close()
    await anyio.wait_all_tasks_blocked()
    subscription.abort()


async def closed_then_raised(subscription: Subscription, scope: anyio.CancelScope) -> None:
    subscription.close()
    raise BodyError


async def body_ended(subscription: Subscription, scope: anyio.CancelScope) -> None:
    """The body just ends."""


async def closed(subscription: Subscription, scope: anyio.CancelScope) -> None:
    subscription.close()
    await subscription.wait_closed()


async def closed_and_waited(subscription: Subscription, scope: anyio.CancelScope) -> None:
    await subscription.aclose()


Cause = Callable[[Subscription, anyio.CancelScope], Awaitable[None]]
GRACEFUL: list[Cause] = [body_ended, closed, closed_and_waited]
AT_ONCE: list[Cause] = [
    body_raised,
    body_cancelled,
    aborted,
    closed_then_cancelled,
    closed_then_aborted,
    closed_then_raised,
]


def named(cause: Cause) -> str:
    return getattr(cause, "__name__", "cause").replace("_", "-")


@asynccontextmanager
async def subscribed(
    bus: StreamBus, config: SubscriptionConfig, handler: Any, cause: Cause
) -> AsyncGenerator[Subscription, None]:
    """A subscription that ends by this cause when the block is left; and soon, or the test has failed."""
    with anyio.fail_after(SOON), anyio.CancelScope() as scope:
        try:
            async with bus.subscribe(config, handler) as subscription:
                yield subscription
                await cause(subscription, scope)
        except BodyError:
            pass


class Ordered(StepByStep):
    """Remembers which methods were called, in order."""

    def __init__(self, inner: StreamBackend) -> None:
        super().__init__(inner)
        self.calls: list[tuple[str, str]] = []

    async def __aexit__(self, *error: object) -> bool | None:
        self.calls.append(("left", ""))
        return await super().__aexit__(*error)

    async def read_new(self, stream: str, group: str, consumer: str, *, count: int, timeout: float) -> Any:
        self.calls.append(("read_new", stream))
        return await super().read_new(stream, group, consumer, count=count, timeout=timeout)

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        self.calls.append(("ack_many", stream))
        return await super().ack_many(stream, group, message_ids, consumer=consumer)

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        self.calls.append(("release", stream))
        await super().release(stream, group, consumer, message_ids)

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        self.calls.append(("renew", stream))
        return await super().renew(stream, group, consumer, message_ids)

    async def forget_consumer(self, stream: str, group: str, consumer: str) -> None:
        self.calls.append(("forget_consumer", stream))
        await super().forget_consumer(stream, group, consumer)

    def count(self, method: str) -> int:
        return sum(name == method for name, _ in self.calls)


# A graceful end


@pytest.mark.parametrize("cause", GRACEFUL, ids=named)
async def test_a_graceful_end_waits_for_what_is_in_flight_and_acks_it(
    harness: Harness, topic: str, cause: Cause
) -> None:
    handler = Stuck()
    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder, close_timeout=LONG)) as bus:
        async with anyio.create_task_group() as tasks:
            async with subscribed(bus, SubscriptionConfig(topic, GROUP), handler, cause) as subscription:
                await publish(bus, topic, 3)
                await handler.has_begun(3)

                async def let_go() -> None:
                    await until(lambda: not subscription.is_running)
                    await anyio.wait_all_tasks_blocked()
                    assert len(await owners(harness, topic)) == 3
                    assert not handler.cancelled
                    handler.gate.set()

                tasks.start_soon(let_go)
    assert len(handler.ended) == 3
    assert not handler.cancelled
    assert await owners(harness, topic) == {}
    assert not recorder.of("on_error")


async def test_a_graceful_end_takes_nothing_more(harness: Harness, topic: str) -> None:
    handler = Stuck()
    backend = Ordered(harness.make_backend())
    async with StreamBus(backend, quick(close_timeout=LONG)) as bus:
        async with subscribed(bus, SubscriptionConfig(topic, GROUP), handler, body_ended) as subscription:
            await publish(bus, topic, 1)
            await handler.has_begun()
            subscription.close()
            assert not subscription.is_running
            await anyio.wait_all_tasks_blocked()
            reads = backend.count("read_new")
            late = await publish(bus, topic, 2)
            await anyio.wait_all_tasks_blocked()
            handler.gate.set()
            await subscription.wait_closed()
            assert backend.count("read_new") == reads
        assert len(handler.begun) == 1
        async with harness.make_backend() as peer:
            entries = await peer.read_new(topic, GROUP, "peer", count=10, timeout=0)
    assert [entry.id for entry in entries] == late


@pytest.mark.parametrize("cause", GRACEFUL, ids=named)
async def test_what_waits_is_released_at_once_while_handlers_are_waited_for(
    harness: Harness, topic: str, cause: Cause
) -> None:
    handler, peer = Stuck(), Stuck()
    config = SubscriptionConfig(topic, GROUP, max_in_flight=1, max_pending_acks=4)
    peer.gate.set()
    async with StreamBus(harness.make_backend(), quick(close_timeout=LONG)) as bus:
        async with anyio.create_task_group() as tasks:
            async with subscribed(bus, config, handler, cause) as subscription:
                ids = await publish(bus, topic, 3)
                await handler.has_begun()
                await until(lambda: subscription.statistics().waiting == 2)

                async def look() -> None:
                    await until(lambda: released(harness, topic, ids[1:]), "the release of what waits")
                    assert (await owners(harness, topic))[ids[0]] == subscription.consumer
                    # Nobody has to wait for the slow handler, or for a lease, to get at the others.
                    async with bus.subscribe(SubscriptionConfig(topic, GROUP), peer):
                        await until(lambda: sorted(peer.ended) == sorted(ids[1:]))
                    assert not handler.ended
                    handler.gate.set()

                tasks.start_soon(look)
        assert handler.ended == [ids[0]]
        await nothing_pending(harness, topic, GROUP)


@pytest.mark.parametrize("close_timeout", [0, 0.1])
@pytest.mark.parametrize("cause", GRACEFUL, ids=named)
async def test_after_close_timeout_handlers_are_cancelled_and_what_they_had_is_released_uncounted(
    harness: Harness, topic: str, cause: Cause, close_timeout: float
) -> None:
    handler = Stuck()
    async with StreamBus(harness.make_backend(), quick(close_timeout=close_timeout)) as bus:
        async with subscribed(bus, SubscriptionConfig(topic, GROUP), handler, cause) as subscription:
            ids = await publish(bus, topic, 3)
            await handler.has_begun(3)
            begun = anyio.current_time()
        assert anyio.current_time() - begun > close_timeout - 0.002  # uvloop counts in milliseconds
        assert sorted(handler.cancelled) == sorted(ids)
        assert await released(harness, topic, ids)
        assert subscription.statistics().released == 3
        again = Stuck()
        again.gate.set()
        async with bus.subscribe(SubscriptionConfig(topic, GROUP), again):
            await until(lambda: len(again.ended) == 3)
        assert {delivery.state.attempt for delivery in again.begun} == {1}


async def test_pulled_deliveries_end_with_their_block_however_long_close_timeout_is(
    harness: Harness, topic: str
) -> None:
    async with StreamBus(harness.make_backend(), quick(close_timeout=LONG)) as bus:
        with anyio.fail_after(SOON):
            async with bus.deliveries(SubscriptionConfig(topic, GROUP)) as stream:
                ids = await publish(bus, topic, 3)
                first = await stream.receive()
                await stream.receive()
                await until(lambda: is_held(harness, topic, ids), "all of them to be read")
                await first.ack()
        assert await released(harness, topic, ids[1:])
        assert list(await owners(harness, topic)) == ids[1:]


# An end at once


@pytest.mark.parametrize("cause", AT_ONCE, ids=named)
async def test_handlers_are_cancelled_at_once_and_what_they_had_is_released_uncounted(
    harness: Harness, topic: str, cause: Cause
) -> None:
    handler = Stuck()
    config = SubscriptionConfig(topic, GROUP, max_in_flight=2, max_pending_acks=8)
    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder, close_timeout=LONG, claim_idle_timeout=LONG)) as bus:
        async with subscribed(bus, config, handler, cause) as subscription:
            ids = await publish(bus, topic, 4)
            await handler.has_begun(2)
            await until(lambda: subscription.statistics().waiting == 2)
        assert sorted(handler.cancelled) == ids[:2]
        assert await released(harness, topic, ids)
        statistics = subscription.statistics()
        assert (statistics.held, statistics.released, statistics.failed) == (0, 4, 0)
    assert not recorder.of("on_error")


@pytest.mark.parametrize("cause", [body_cancelled, aborted], ids=named)
async def test_during_a_graceful_end_after_the_body_a_cancellation_or_an_abort_ends_it_at_once(
    harness: Harness, topic: str, cause: Cause
) -> None:
    handler = Stuck()
    async with StreamBus(harness.make_backend(), quick(close_timeout=LONG)) as bus:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                with anyio.CancelScope() as scope:
                    async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler) as subscription:
                        ids = await publish(bus, topic, 1)
                        await handler.has_begun()

                        async def lose_patience() -> None:
                            await until(lambda: not subscription.is_running)
                            await anyio.wait_all_tasks_blocked()
                            assert not handler.cancelled
                            if cause is aborted:
                                subscription.abort()
                            else:
                                scope.cancel()

                        tasks.start_soon(lose_patience)
                assert scope.cancelled_caught == (cause is body_cancelled)
        assert handler.cancelled == ids
        assert await released(harness, topic, ids)


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
@pytest.mark.parametrize("graceful", [False, True], ids=["in-the-body", "during-a-graceful-end"])
async def test_asyncios_own_cancellation_of_the_host_is_one_from_outside(
    harness: Harness, topic: str, graceful: bool
) -> None:
    handler = Stuck()
    async with StreamBus(harness.make_backend(), quick(close_timeout=LONG)) as bus:
        subscriptions: list[Subscription] = []

        async def host() -> None:
            async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler) as subscription:
                subscriptions.append(subscription)
                if graceful:
                    await handler.has_begun()
                else:
                    await anyio.sleep_forever()

        task = asyncio.ensure_future(host())
        await until(lambda: len(subscriptions) == 1)
        ids = await publish(bus, topic, 1)
        await handler.has_begun()
        await until(lambda: subscriptions[0].is_running is not graceful)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=SOON)
        assert done
        assert task.cancelled()
        assert handler.cancelled == ids
        assert await released(harness, topic, ids)


# What every end comes to


@pytest.mark.parametrize("cause", [*GRACEFUL, *AT_ONCE], ids=named)
async def test_acks_that_wait_for_their_batch_are_flushed(harness: Harness, topic: str, cause: Cause) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.id)

    async with StreamBus(harness.make_backend(), quick(ack_flush_interval=LONG, claim_idle_timeout=LONG)) as bus:
        async with subscribed(bus, SubscriptionConfig(topic, GROUP), handler, cause):
            await publish(bus, topic, 1)  # the first ack after a pause goes at once
            await until(lambda: len(handled) == 1)
            await nothing_pending(harness, topic, GROUP)
            ids = await publish(bus, topic, 3)
            await until(lambda: len(handled) == 4)
            assert list(await owners(harness, topic)) == ids
        assert await owners(harness, topic) == {}


@pytest.mark.parametrize("cause", [*GRACEFUL, *AT_ONCE], ids=named)
async def test_the_consumer_is_forgotten_last_and_once_for_each_stream(
    harness: Harness, topic: str, cause: Cause
) -> None:
    handler = Stuck()
    backend = Ordered(harness.make_backend())
    async with StreamBus(backend, quick(close_timeout=0.05)) as bus:
        async with subscribed(bus, SubscriptionConfig(topic, GROUP), handler, cause) as subscription:
            await publish(bus, topic, 3)
            await handler.has_begun(3)
        calls = list(backend.calls)
    assert set(calls[-2:]) == {("forget_consumer", topic), ("forget_consumer", retry_stream(topic, GROUP))}
    assert backend.count("forget_consumer") == 2
    assert backend.calls[len(calls) :] == [("left", "")]
    assert subscription.consumer not in await harness.consumers(topic, GROUP)


async def test_what_cannot_be_settled_within_cleanup_timeout_is_reported_and_does_not_hold_up_the_end(
    harness: Harness, topic: str
) -> None:
    backend = Ordered(harness.make_backend())
    handler = Stuck()
    recorder = Recorder()

    async def hang(*_: object, **__: object) -> None:
        await anyio.sleep_forever()

    async with StreamBus(backend, quick(recorder, cleanup_timeout=0.1, claim_idle_timeout=LONG)) as bus:
        async with subscribed(bus, SubscriptionConfig(topic, GROUP), handler, aborted) as subscription:
            ids = await publish(bus, topic, 1)
            await handler.has_begun()
            backend.release = hang  # type: ignore[method-assign]
        [event] = recorder.of("on_error")
        assert event.scope == "close"
        assert isinstance(event.error, TimeoutError)
        assert "cleanup_timeout" in str(event.error)
        # It comes back by its lease, which is still this consumer's; but here it is no longer held.
        assert await owners(harness, topic) == {ids[0]: subscription.consumer}
        assert subscription.statistics().held == 0
    assert backend.count("forget_consumer") == 2


@pytest.mark.parametrize("failure", ["hangs", "raises"])
async def test_forgetting_the_consumer_may_fail_or_hang_and_the_end_ends(
    harness: Harness, topic: str, failure: str
) -> None:
    backend = Ordered(harness.make_backend())
    recorder = Recorder()
    forgotten: list[str] = []

    async def forget(stream: str, group: str, consumer: str) -> None:
        forgotten.append(stream)
        if failure == "hangs":
            await anyio.sleep_forever()
        raise BackendError("broken")

    async with StreamBus(backend, quick(recorder, cleanup_timeout=0.1)) as bus:
        backend.forget_consumer = forget  # type: ignore[method-assign]
        async with subscribed(bus, SubscriptionConfig(topic, GROUP), Stuck(), body_ended):
            pass
    assert sorted(forgotten) == sorted([topic, retry_stream(topic, GROUP)])
    if failure == "raises":
        assert [str(event.error) for event in recorder.of("on_error", "close")] == ["broken", "broken"]


async def test_a_settlement_by_hand_that_fails_while_the_end_settles_the_rest_leaves_nothing_behind(
    harness: Harness, topic: str
) -> None:
    backend = Ordered(harness.make_backend())
    asked, fail = anyio.Event(), anyio.Event()

    async def ack_many(*_: object, **__: object) -> list[str]:
        asked.set()
        await fail.wait()
        raise BackendError("broken", may_have_happened=False, can_pass=True)

    async def ack_elsewhere(delivery: Delivery) -> None:
        with pytest.raises(BackendError, match="broken"):
            await delivery.ack()

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=LONG)) as bus:
        async with anyio.create_task_group() as elsewhere:

            async def handler(delivery: Delivery) -> None:
                elsewhere.start_soon(ack_elsewhere, delivery)
                await anyio.sleep_forever()

            async with subscribed(bus, SubscriptionConfig(topic, GROUP), handler, body_ended) as subscription:
                backend.ack_many = ack_many  # type: ignore[method-assign]
                ids = await publish(bus, topic, 1)
                with anyio.fail_after(SOON):
                    await asked.wait()
                subscription.abort()
                await anyio.wait_all_tasks_blocked()
                fail.set()
        assert await released(harness, topic, ids)
        assert subscription.statistics().held == 0


async def test_what_was_to_be_acked_on_receipt_and_could_not_be_when_the_end_came_is_released(
    harness: Harness, topic: str
) -> None:
    backend = Ordered(harness.make_backend())
    asked, fail = anyio.Event(), anyio.Event()
    begun: list[str] = []

    async def transfer_many(*_: object) -> Any:
        asked.set()
        await fail.wait()
        raise BackendError("broken", may_have_happened=False, can_pass=True)

    async def handler(delivery: Delivery) -> None:
        begun.append(delivery.id)

    config = SubscriptionConfig(topic, GROUP, ack_mode="auto-on-receive")
    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=LONG)) as bus:
        async with subscribed(bus, config, handler, body_ended) as subscription:
            real = backend.transfer_many
            backend.transfer_many = transfer_many  # type: ignore[assignment, method-assign]
            ids = await publish(bus, topic, 1)
            with anyio.fail_after(SOON):
                await asked.wait()
            subscription.abort()
            await anyio.wait_all_tasks_blocked()
            backend.transfer_many = real  # type: ignore[method-assign]
            fail.set()
        # By choice it may count as accepted (and is lost then); but nothing of it is left behind.
        assert await owners(harness, topic) == {} or await released(harness, topic, ids)
        assert subscription.statistics().held == 0
    assert not begun


@pytest.mark.parametrize("cause", [*GRACEFUL, *AT_ONCE], ids=named)
async def test_what_manual_mode_holds_unsettled_is_released(harness: Harness, topic: str, cause: Cause) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.id)

    config = SubscriptionConfig(topic, GROUP, ack_mode="manual")
    async with StreamBus(harness.make_backend(), quick(claim_idle_timeout=LONG)) as bus:
        async with subscribed(bus, config, handler, cause) as subscription:
            ids = await publish(bus, topic, 3)
            await until(lambda: len(handled) == 3)
            assert set((await owners(harness, topic)).values()) == {subscription.consumer}
        assert await released(harness, topic, ids)


# A handler that refuses to end


class InThread(Stuck):
    """One message's handler works in a thread, which no cancellation reaches; the others' only wait."""

    def __init__(self, outcome: Exception | None = None) -> None:
        super().__init__()
        self.let_thread_end = threading.Event()
        self.outcome = outcome

    async def __call__(self, delivery: Delivery) -> None:
        if delivery.message.key != "0":
            await super().__call__(delivery)
            return
        self.begun.append(delivery)
        await to_thread.run_sync(self.let_thread_end.wait, SOON)
        self.ended.append(delivery.id)
        if self.outcome is not None:
            raise self.outcome


@pytest.mark.parametrize("cause", [body_ended, *first_of(AT_ONCE)], ids=named)
async def test_a_handler_in_a_thread_is_reported_and_waited_for_leased_all_the_while_and_its_message_acked(
    harness: Harness, topic: str, cause: Cause
) -> None:
    handler = InThread()
    recorder = Recorder()
    backend = Ordered(harness.make_backend())
    options = quick(recorder, close_timeout=0.05, cleanup_timeout=0.5, claim_idle_timeout=1)
    config = SubscriptionConfig(topic, GROUP, max_in_flight=2, max_pending_acks=8)
    async with StreamBus(backend, options) as bus:
        async with anyio.create_task_group() as tasks:
            async with subscribed(bus, config, handler, cause) as subscription:
                ids = await publish(bus, topic, 4)
                await handler.has_begun(2)
                await until(lambda: subscription.statistics().waiting == 2)

                async def look() -> None:
                    try:
                        await until(lambda: not subscription.is_running)
                        # The rest does not wait for it: neither what waited nor what other handlers had.
                        await until(lambda: released(harness, topic, ids[1:]), "the release of the rest")
                        await until(lambda: bool(recorder.of("on_error", "close")), "the report")
                        [event] = recorder.of("on_error")
                        assert event.message_id == ids[0]
                        assert event.attempt == 1
                        assert isinstance(event.error, TimeoutError)
                        # For more than a lease nobody can take it over.
                        renewals = backend.count("renew")
                        await until(lambda: backend.count("renew") >= renewals + 5, "renewals")
                        async with harness.make_backend() as peer:
                            taken = await peer.reclaim_idle(topic, GROUP, "peer", min_idle=1, count=10)
                            await peer.release(topic, GROUP, "peer", [entry.id for entry in taken])
                        assert ids[0] not in [entry.id for entry in taken]
                        assert (await owners(harness, topic))[ids[0]] == subscription.consumer
                    finally:
                        handler.let_thread_end.set()

                tasks.start_soon(look)
        assert handler.ended == [ids[0]]
        assert sorted(await owners(harness, topic)) == sorted(ids[1:])
        assert subscription.statistics().handled == 1
    assert backend.count("forget_consumer") == 2


@pytest.mark.parametrize("outcome", [ValueError("in the end"), Reject("in the end")], ids=["failed", "rejected"])
@pytest.mark.parametrize("cause", [body_ended, body_cancelled, aborted], ids=named)
async def test_what_a_handler_in_a_thread_came_to_is_settled_if_it_did_not_succeed_too(
    harness: Harness, topic: str, cause: Cause, outcome: Exception
) -> None:
    handler = InThread(outcome)
    recorder = Recorder()
    config = SubscriptionConfig(topic, GROUP, retry_backoff=ExponentialBackoff(initial=0, maximum=0))
    message = Message(topic, key="0")
    async with StreamBus(harness.make_backend(), quick(recorder, close_timeout=0.05, cleanup_timeout=0.1)) as bus:
        async with anyio.create_task_group() as tasks:
            async with subscribed(bus, config, handler, cause):
                entry_id = await bus.publish(message)
                await handler.has_begun()

                async def let_it_end() -> None:
                    await until(lambda: bool(recorder.of("on_error", "close")), "the report")
                    handler.let_thread_end.set()

                tasks.start_soon(let_it_end)
        assert len(handler.ended) == 1
        dead = uids(await harness.entries(f"{topic}.dead"))
        if isinstance(outcome, Reject):
            assert dead == [message.uid]
            assert await owners(harness, topic) == {}
        else:
            # It failed, but it was also cut off: a retry is as good as a release. There is one of the two.
            retries = uids(await harness.entries(retry_stream(topic, GROUP)))
            assert not dead
            assert [message.uid] * (not await released(harness, topic, [entry_id])) == retries


# close(), abort(), wait_closed(), aclose()


@pytest.mark.parametrize("ending", ["close", "abort"])
async def test_the_body_goes_on_after_close_and_abort_and_can_wait_for_the_end(
    harness: Harness, topic: str, ending: str
) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with anyio.fail_after(SOON):
            async with bus.subscribe(SubscriptionConfig(topic, GROUP), Stuck()) as subscription:
                getattr(subscription, ending)()
                assert not subscription.is_running
                await anyio.wait_all_tasks_blocked()
                await bus.publish(Message(topic))
                await subscription.wait_closed()
                await subscription.wait_closed()
                await bus.publish(Message(topic))
                went_on = True
    assert went_on


@pytest.mark.parametrize("ending", ["close", "abort"])
async def test_consume_gives_its_subscription_and_returns_when_that_is_closed(
    harness: Harness, topic: str, ending: str
) -> None:
    handled: list[str] = []
    returned = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.id)

    async with StreamBus(harness.make_backend(), quick()) as bus:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:

                async def consume(*, task_status: Any) -> None:
                    await bus.consume(SubscriptionConfig(topic, GROUP), handler, task_status=task_status)
                    returned.set()

                subscription = await tasks.start(consume)
                assert isinstance(subscription, Subscription)
                assert subscription.is_running
                [entry_id] = await publish(bus, topic, 1)
                await until(lambda: handled == [entry_id])
                assert not returned.is_set()
                getattr(subscription, ending)()
                await returned.wait()
                assert repr(subscription).startswith("<Subscription ended")


@pytest.mark.parametrize("ending", ["close", "abort"])
async def test_a_handler_may_begin_the_end_of_its_own_subscription(harness: Harness, topic: str, ending: str) -> None:
    subscriptions: list[Subscription] = []
    outcomes: list[str] = []

    async def handler(delivery: Delivery) -> None:
        getattr(subscriptions[0], ending)()
        try:
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
        except anyio.get_cancelled_exc_class():
            outcomes.append("cancelled")
            raise
        outcomes.append("went on")

    async with StreamBus(harness.make_backend(), quick(close_timeout=LONG)) as bus:
        with anyio.fail_after(SOON):
            async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler) as subscription:
                subscriptions.append(subscription)
                ids = await publish(bus, topic, 1)
                await subscription.wait_closed()
    if ending == "close":
        assert outcomes == ["went on"]
        assert await owners(harness, topic) == {}
    else:
        assert outcomes == ["cancelled"]
        assert await released(harness, topic, ids)


@pytest.mark.parametrize("method", ["wait_closed", "aclose"])
@pytest.mark.parametrize("where", ["in the handler", "in a task of the handler"])
async def test_waiting_for_the_end_raises_in_one_of_its_own_handlers(
    harness: Harness, topic: str, method: str, where: str
) -> None:
    subscriptions: list[Subscription] = []
    raised: list[str] = []

    async def wait() -> None:
        with pytest.raises(RuntimeError, match=r"call close\(\) or abort\(\)") as caught:
            await getattr(subscriptions[0], method)()
        raised.append(str(caught.value))

    async def handler(delivery: Delivery) -> None:
        if where == "in the handler":
            await wait()
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)

    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler) as subscription:
            subscriptions.append(subscription)
            await publish(bus, topic, 2)
            await until(lambda: len(raised) == 2)
            # It has raised, and done nothing else.
            assert subscription.is_running
            await until(lambda: subscription.statistics().handled == 2)


async def test_a_handler_may_wait_for_the_end_of_another_subscription(harness: Harness, topic: str) -> None:
    other_topic = f"{topic}.other"
    ended: list[str] = []
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(other_topic, GROUP), Stuck()) as other:

            async def handler(delivery: Delivery) -> None:
                await other.aclose()
                ended.append(delivery.id)

            async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler):
                ids = await publish(bus, topic, 1)
                await until(lambda: ended == ids)


async def test_a_task_that_a_handler_left_behind_may_wait_for_the_end(harness: Harness, topic: str) -> None:
    """It is no handler: nothing waits for it. This is how a message can end the subscription that it came by."""
    ended = anyio.Event()
    subscriptions: list[Subscription] = []

    async def end() -> None:
        await until(lambda: subscriptions[0].statistics().handled == 1)
        await subscriptions[0].aclose()
        ended.set()

    config = SubscriptionConfig(topic, GROUP, max_in_flight=1, max_pending_acks=8, group_start_id="0")
    async with StreamBus(harness.make_backend(), quick(close_timeout=LONG)) as bus:
        await publish(bus, topic, 1)
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as application, anyio.create_task_group() as tasks:

                async def handler(delivery: Delivery) -> None:
                    application.start_soon(end)

                subscriptions.append(await tasks.start(bus.consume, config, handler))
            assert ended.is_set()


async def test_closing_twice_is_fine_in_every_order(harness: Harness, topic: str) -> None:
    endings = ("close", "abort", "aclose")
    async with StreamBus(harness.make_backend(), quick()) as bus:
        for first in endings:
            for second in endings:
                with anyio.fail_after(SOON):
                    async with bus.subscribe(SubscriptionConfig(topic, GROUP), Stuck()) as subscription:
                        for ending in (first, second, first):
                            result = getattr(subscription, ending)()
                            if ending == "aclose":
                                await result
                        await subscription.wait_closed()
                for ending in endings:
                    result = getattr(subscription, ending)()
                    if ending == "aclose":
                        await result
                await subscription.wait_closed()
                assert not subscription.is_running


async def test_a_close_after_an_abort_does_not_make_it_graceful(harness: Harness, topic: str) -> None:
    handler = Stuck()
    async with StreamBus(harness.make_backend(), quick(close_timeout=LONG)) as bus:
        async with subscribed(bus, SubscriptionConfig(topic, GROUP), handler, body_ended) as subscription:
            ids = await publish(bus, topic, 1)
            await handler.has_begun()
            subscription.abort()
            subscription.close()
        assert handler.cancelled == ids


async def test_everybody_who_waits_for_the_end_is_woken_when_it_is_over(harness: Harness, topic: str) -> None:
    handler = Stuck()
    backend = Ordered(harness.make_backend())
    woken: list[int] = []
    async with StreamBus(backend, quick(close_timeout=LONG)) as bus:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                async with bus.subscribe(SubscriptionConfig(topic, GROUP), handler) as subscription:

                    async def wait(method: Callable[[], Awaitable[None]]) -> None:
                        await method()
                        woken.append(backend.count("forget_consumer"))

                    await publish(bus, topic, 1)
                    await handler.has_begun()
                    for method in (subscription.wait_closed, subscription.aclose, subscription.wait_closed):
                        tasks.start_soon(wait, method)
                    await anyio.wait_all_tasks_blocked()
                    assert not woken
                    handler.gate.set()
    assert woken == [2, 2, 2]


# The stream of deliveries


async def test_the_stream_of_deliveries_ends_when_it_is_closed(harness: Harness, topic: str) -> None:
    received: list[str] = []
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with anyio.fail_after(SOON):
            async with bus.deliveries(SubscriptionConfig(topic, GROUP)) as stream:
                ids = await publish(bus, topic, 3)
                first = await stream.receive()
                await first.ack()
                async with anyio.create_task_group() as tasks:

                    async def receive_all() -> None:
                        async for delivery in stream:
                            received.append(delivery.id)
                            await delivery.ack()

                    tasks.start_soon(receive_all)
                    await until(lambda: len(received) == 2)
                    await nothing_pending(harness, topic, GROUP)
                    await anyio.wait_all_tasks_blocked()
                    await stream.aclose()
                with pytest.raises(anyio.ClosedResourceError):
                    await stream.receive()
                await stream.aclose()
        assert [first.id, *received] == ids
        assert await owners(harness, topic) == {}


async def test_leaving_the_bus_ends_the_stream_of_deliveries_and_waits_for_those_that_are_out(
    harness: Harness, topic: str
) -> None:
    out, ended = anyio.Event(), anyio.Event()
    backend = Ordered(harness.make_backend())
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with StreamBus(backend, quick(close_timeout=LONG)) as bus:

                async def pull() -> None:
                    async with bus.deliveries(SubscriptionConfig(topic, GROUP)) as stream:
                        delivery = await stream.receive()
                        out.set()
                        with pytest.raises(anyio.EndOfStream):
                            await stream.receive()
                        ended.set()
                        assert ("left", "") not in backend.calls
                        await delivery.ack()

                tasks.start_soon(pull)
                await until(lambda: bool(backend.count("read_new")))
                await publish(bus, topic, 1)
                await out.wait()
            assert ended.is_set()
    assert await owners(harness, topic) == {}


async def test_a_delivery_that_was_pulled_is_renewed_until_its_block_is_left_and_then_released(
    harness: Harness, topic: str
) -> None:
    backend = Ordered(harness.make_backend())
    async with StreamBus(backend, quick(claim_idle_timeout=1)) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, GROUP)) as stream:
            ids = await publish(bus, topic, 1)
            with anyio.fail_after(SOON):
                delivery = await stream.receive()
            renewals = backend.count("renew")
            await until(lambda: backend.count("renew") >= renewals + 5, "renewals for more than a lease")
            assert not delivery.lease_lost
            async with harness.make_backend() as peer:
                assert await peer.reclaim_idle(topic, GROUP, "peer", min_idle=1, count=10) == []
        assert await released(harness, topic, ids)


# pause() and resume()


async def test_paused_it_takes_nothing_and_hands_back_what_waits_while_what_is_in_flight_goes_on(
    harness: Harness, topic: str
) -> None:
    handler = Stuck()
    config = SubscriptionConfig(topic, GROUP, max_in_flight=1, max_pending_acks=4)
    async with StreamBus(harness.make_backend(), quick(claim_idle_timeout=LONG)) as bus:
        async with subscribed(bus, config, handler, body_ended) as subscription:
            ids = await publish(bus, topic, 3)
            await handler.has_begun()
            await until(lambda: subscription.statistics().waiting == 2)
            subscription.pause()
            subscription.pause()
            assert subscription.is_running
            await until(lambda: released(harness, topic, ids[1:]), "the release of what waits")
            ids += await publish(bus, topic, 1)
            handler.gate.set()
            await until(lambda: handler.ended == [ids[0]], "what is in flight to go on")
            await until(lambda: subscription.statistics().handled == 1)
            statistics = subscription.statistics()
            assert (statistics.held, statistics.received, statistics.released) == (0, 3, 2)
            subscription.resume()
            subscription.resume()
            await until(lambda: sorted(handler.ended) == sorted(ids), "the rest to be handled after all")
    assert {delivery.state.attempt for delivery in handler.begun} == {1}


async def test_a_paused_subscription_ends_like_any_other(harness: Harness, topic: str) -> None:
    backend = Ordered(harness.make_backend())
    async with StreamBus(backend, quick()) as bus:
        async with subscribed(bus, SubscriptionConfig(topic, GROUP), Stuck(), body_ended) as subscription:
            subscription.pause()
            await publish(bus, topic, 1)
    assert backend.count("forget_consumer") == 2


async def test_a_handler_may_pause_and_resume_its_own_subscription(harness: Harness, topic: str) -> None:
    subscriptions: list[Subscription] = []
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        subscriptions[0].pause()
        await anyio.lowlevel.checkpoint()
        subscriptions[0].resume()
        handled.append(delivery.id)

    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, GROUP, max_in_flight=1), handler) as subscription:
            subscriptions.append(subscription)
            ids = await publish(bus, topic, 5)
            await until(lambda: sorted(handled) == sorted(ids))


async def test_resume_after_close_takes_nothing(harness: Harness, topic: str) -> None:
    handler = Stuck()
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with subscribed(bus, SubscriptionConfig(topic, GROUP), handler, body_ended) as subscription:
            subscription.pause()
            subscription.close()
            subscription.resume()
            await publish(bus, topic, 1)
            await subscription.wait_closed()
    assert not handler.begun
    assert subscription.statistics().received == 0


# Leaving the bus


async def test_leaving_the_bus_ends_its_subscriptions_gracefully_before_it_leaves_the_backend(
    harness: Harness, topic: str
) -> None:
    handler = Stuck()
    backend = Ordered(harness.make_backend())
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with StreamBus(backend, quick(close_timeout=LONG)) as bus:
                subscription = await tasks.start(bus.consume, SubscriptionConfig(topic, GROUP), handler)
                ids = await publish(bus, topic, 1)
                await handler.has_begun()

                async def let_go() -> None:
                    await until(lambda: not subscription.is_running)
                    await anyio.wait_all_tasks_blocked()
                    assert ("left", "") not in backend.calls
                    handler.gate.set()

                tasks.start_soon(let_go)
    assert handler.ended == ids
    assert backend.calls[-1] == ("left", "")
    assert backend.count("forget_consumer") == 2
    assert await owners(harness, topic) == {}


@pytest.mark.parametrize("cause", ["raises", "cancelled"])
async def test_leaving_the_bus_by_an_exception_ends_its_subscriptions_at_once(
    harness: Harness, topic: str, cause: str
) -> None:
    handler = Stuck()
    backend = Ordered(harness.make_backend())
    ids: list[str] = []
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            bus = StreamBus(backend, quick(close_timeout=LONG))

            async def leave() -> None:
                with anyio.CancelScope() as scope:
                    async with bus:
                        entered.set()
                        await handler.has_begun()
                        if cause == "raises":
                            raise BodyError
                        scope.cancel()
                        await anyio.sleep_forever()

            async def leave_and_catch() -> None:
                try:
                    await leave()
                except BodyError:
                    ids.append("raised")

            entered = anyio.Event()
            tasks.start_soon(leave_and_catch)
            await entered.wait()
            await tasks.start(bus.consume, SubscriptionConfig(topic, GROUP), handler)
            [entry_id] = await publish(bus, topic, 1)
    assert handler.cancelled == [entry_id]
    assert await released(harness, topic, [entry_id])
    assert backend.calls[-1] == ("left", "")
    assert ids == (["raised"] if cause == "raises" else [])


async def test_leaving_the_bus_ends_all_subscriptions_side_by_side(harness: Harness, topic: str) -> None:
    handlers = [Stuck() for _ in range(3)]
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with StreamBus(harness.make_backend(), quick(close_timeout=LONG)) as bus:
                subscriptions: list[Subscription] = []
                for number, handler in enumerate(handlers):
                    config = SubscriptionConfig(f"{topic}.{number}", GROUP)
                    subscriptions.append(await tasks.start(bus.consume, config, handler))
                    await publish(bus, f"{topic}.{number}", 1)
                    await handler.has_begun()

                async def let_go() -> None:
                    # None of them waits for another's handlers.
                    await until(lambda: not any(subscription.is_running for subscription in subscriptions))
                    for handler in reversed(handlers):
                        handler.gate.set()
                        await until(lambda handler=handler: len(handler.ended) == 1)  # type: ignore[misc]

                tasks.start_soon(let_go)


async def test_after_the_bus_was_left_every_call_raises(harness: Harness, topic: str) -> None:
    config = SubscriptionConfig(topic, GROUP)
    async with StreamBus(harness.make_backend(), quick()) as bus:
        pass
    with pytest.raises(ClosedError):
        await bus.publish(Message(topic))
    with pytest.raises(ClosedError):
        await bus.publish_batch([Message(topic)])
    with pytest.raises(ClosedError):
        bus.subscribe(config, Stuck())
    with pytest.raises(ClosedError):
        await bus.consume(config, Stuck())
    with pytest.raises(ClosedError):
        bus.deliveries(config)


async def test_consume_returns_if_the_bus_is_left_while_it_is_still_beginning(harness: Harness, topic: str) -> None:
    """Whoever leaves the bus need not know how far a sibling has got: a moment later it would have returned too."""
    backend = Ordered(harness.make_backend())
    asked = anyio.Event()

    async def create_group(*_: object, **__: object) -> bool:
        asked.set()
        await anyio.sleep_forever()
        return True

    returned = anyio.Event()
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with StreamBus(backend, quick(close_timeout=LONG)) as bus:
                backend.create_group = create_group  # type: ignore[method-assign]

                async def consume() -> None:
                    await bus.consume(SubscriptionConfig(topic, GROUP), Stuck())
                    returned.set()

                tasks.start_soon(consume)
                await asked.wait()
    assert returned.is_set()


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_asyncio_cancelling_the_bus_twice_does_not_take_the_backend_away_from_a_subscription(
    harness: Harness, topic: str
) -> None:
    handler = InThread()
    backend = Ordered(harness.make_backend())
    bus = StreamBus(backend, quick(Recorder(), close_timeout=LONG, cleanup_timeout=0.05))
    entered = anyio.Event()

    async def host() -> None:
        async with bus:
            entered.set()
            await anyio.sleep_forever()

    task = asyncio.ensure_future(host())
    with anyio.fail_after(SOON):
        await entered.wait()
        async with anyio.create_task_group() as tasks:
            subscription = await tasks.start(bus.consume, SubscriptionConfig(topic, GROUP), handler)
            ids = await publish(bus, topic, 1)
            await handler.has_begun()
            for _ in range(3):
                task.cancel()
                await anyio.wait_all_tasks_blocked()
            assert not subscription.is_running
            assert not task.done()
            handler.let_thread_end.set()
    await asyncio.wait([task], timeout=SOON)
    assert task.cancelled()
    assert handler.ended == ids
    assert await owners(harness, topic) == {}
    assert backend.calls[-1] == ("left", "")
