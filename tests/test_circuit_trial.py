"""A circuit on trial: one handling begins at a time, until one succeeds (which closes it) or fails (which opens it again).

The specification, on memory and on a server:

- In every mode. At most once a message is acknowledged before its handler starts: there, too, the next is only
  acknowledged when the last handling has ended. In manual mode a handling lasts until its delivery is settled.
- What was in flight when it opened does not count, and makes no room when it ends. Its success closes the circuit, its
  failure opens it again, like any other.
- An outcome that says nothing (``Reject``, ``release``) lets the next one begin.
- New messages and those that come again both get their turn. At most one of each is held for it.
- Retries that waited in the process (a backend without ``delay``) wait for their turn, too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import pytest
from harness import Harness, Recorder, StepByStep, nothing_pending, quick, until

from anybus import CircuitBreaker, Delivery, Message, Reject, StreamBus, Subscription, SubscriptionConfig, retry_stream
from anybus._runtime.circuit import State
from anybus.abc import Feature

AT_ONCE = 8


class Stage:
    """Handlers in two acts: all that are in flight first, of which some fail; then, on trial, those that begin."""

    def __init__(self, fail: int) -> None:
        self._fail = fail
        self._all_here = anyio.Event()
        self.first = 0
        self.go_on = anyio.Event()
        """The others of the first act may end."""
        self.on_trial = 0
        self.began: list[str] = []
        self.most = 0
        self.end_first: Callable[[Delivery], Awaitable[None]] = reject
        self.end_trial: Callable[[Delivery], Awaitable[None]] = reject

    async def handle(self, delivery: Delivery) -> None:
        if self.first < AT_ONCE:
            self.first += 1
            number = self.first
            if self.first == AT_ONCE:
                self._all_here.set()
            await self._all_here.wait()
            if number <= self._fail:
                raise ValueError("x")
            await self.go_on.wait()
            await self.end_first(delivery)
            return
        self.began.append(delivery.message.key)
        self.on_trial += 1
        self.most = max(self.most, self.on_trial)
        try:
            for _ in range(5):
                await anyio.sleep(0.002)
            await self.end_trial(delivery)
        finally:
            self.on_trial -= 1


async def reject(delivery: Delivery) -> None:
    raise Reject("unwanted")


async def fail(delivery: Delivery) -> None:
    raise ValueError("x")


async def release(delivery: Delivery) -> None:
    await delivery.release()


async def succeed(delivery: Delivery) -> None:
    """By returning."""


def config(topic: str, failures: int, **more: Any) -> SubscriptionConfig:
    options: dict[str, Any] = {"max_in_flight": AT_ONCE, "group_start_id": "0"}
    if more.get("guarantee") != "at-most-once":
        options.update(max_retry=100, retry_backoff=600.0)
    circuit = CircuitBreaker(failures=failures, pause=0.1)
    return SubscriptionConfig(topic, "g", circuit=circuit, **{**options, **more})


async def publish(bus: StreamBus, topic: str, count: int) -> None:
    (await bus.publish_batch([Message(topic, key=str(number)) for number in range(count)])).raise_for_errors()


def is_on_trial(subscription: Subscription) -> bool:
    assert subscription._circuit is not None
    return subscription._circuit._state is State.ON_TRIAL


def subscribed(bus: StreamBus, config: SubscriptionConfig, stage: Stage) -> AbstractAsyncContextManager[Subscription]:
    return bus.subscribe(config, stage.handle)


MODES: dict[str, dict[str, Any]] = {
    "at least once": {},
    "at most once": {"guarantee": "at-most-once"},
    "manual": {"ack_mode": "manual"},
    "no room beyond the handlers": {"max_pending_acks": AT_ONCE},
    "much room": {"max_pending_acks": 8 * AT_ONCE},
}


@pytest.mark.parametrize("mode", MODES)
async def test_one_handling_at_a_time_begins_on_trial_after_all_that_were_in_flight_have_failed(
    harness: Harness, topic: str, mode: str
) -> None:
    stage = Stage(fail=AT_ONCE)
    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=60.0)) as bus:
        await publish(bus, topic, 40)
        async with subscribed(bus, config(topic, 1, **MODES[mode]), stage) as subscription:
            await until(lambda: len(stage.began) >= 10)
            assert stage.most == 1
            stage.end_trial = succeed
            if mode == "manual":
                stage.end_trial = lambda delivery: delivery.ack()
            await until(lambda: len(stage.began) == 40 - AT_ONCE)
            await until(lambda: subscription.statistics().waiting == 0)


@pytest.mark.parametrize("mode", MODES)
async def test_what_was_in_flight_makes_no_room_when_it_ends_on_trial(harness: Harness, topic: str, mode: str) -> None:
    stage = Stage(fail=1)
    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=60.0)) as bus:
        await publish(bus, topic, 60)
        async with subscribed(bus, config(topic, 1, **MODES[mode]), stage) as subscription:
            await until(lambda: is_on_trial(subscription))
            stage.go_on.set()
            await until(lambda: subscription.statistics().dead_lettered >= AT_ONCE - 1 + 10)
            assert stage.most == 1
            assert is_on_trial(subscription), "a rejection counts neither way"


@pytest.mark.parametrize("mode", ["at least once", "at most once"])
async def test_while_the_handler_only_fails_one_handling_begins_in_each_trial(
    harness: Harness, topic: str, mode: str
) -> None:
    stage = Stage(fail=1)
    stage.end_first = stage.end_trial = fail
    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=60.0)) as bus:
        await publish(bus, topic, 40)
        async with subscribed(bus, config(topic, 1, **MODES[mode]), stage) as subscription:
            await until(lambda: subscription.statistics().circuit_opened == 2)
            stage.go_on.set()  # during a pause: these failures say nothing new
            await until(lambda: subscription.statistics().circuit_opened == 6)
    assert stage.most == 1
    assert len(stage.began) <= 5


@pytest.mark.parametrize("ends_with", ["a success", "a failure"])
async def test_what_was_in_flight_has_its_say_on_trial(harness: Harness, topic: str, ends_with: str) -> None:
    stage = Stage(fail=AT_ONCE - 1)
    stage.end_first = succeed if ends_with == "a success" else fail
    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder, claim_idle_timeout=60.0)) as bus:
        await publish(bus, topic, AT_ONCE)
        async with subscribed(bus, config(topic, AT_ONCE - 1), stage) as subscription:
            await until(lambda: is_on_trial(subscription))
            stage.go_on.set()
            if ends_with == "a success":
                await until(lambda: len(recorder.of("on_circuit_closed")) == 1)
            else:
                await until(lambda: subscription.statistics().circuit_opened == 2)


async def test_in_manual_mode_a_handling_lasts_until_it_is_settled(harness: Harness, topic: str) -> None:
    kept: list[Delivery] = []
    stage = Stage(fail=AT_ONCE)

    async def keep(delivery: Delivery) -> None:
        kept.append(delivery)

    stage.end_trial = keep
    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=60.0)) as bus:
        await publish(bus, topic, 20)
        async with subscribed(bus, config(topic, 1, ack_mode="manual"), stage) as subscription:
            await until(lambda: len(kept) == 1 and subscription.statistics().in_flight == 0)
            await until(lambda: subscription.statistics().waiting <= 2)
            await kept[0].nack("says nothing of the others")
            await until(lambda: len(kept) == 2)
            assert is_on_trial(subscription)
            await kept[1].ack()
            await until(lambda: len(kept) == 20 - AT_ONCE)
            assert not is_on_trial(subscription)


async def test_new_messages_and_those_that_come_again_take_turns_on_trial(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    stage = Stage(fail=AT_ONCE)
    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=60.0, block_timeout=600.0)) as bus:
        await publish(bus, topic, AT_ONCE)
        async with subscribed(bus, config(topic, 1), stage) as subscription:
            await until(lambda: subscription.statistics().circuit_opened == 1)
            for number in range(10):
                await backend.publish(retry_stream(topic, "g"), Message(topic, key=f"again {number}"))
                await bus.publish(Message(topic, key=f"new {number}"))
            await until(lambda: len(stage.began) == 20)
    assert stage.most == 1
    assert sum(key.startswith("new") for key in stage.began[:10]) in range(3, 8)


async def test_a_release_on_trial_lets_the_next_one_begin(harness: Harness, topic: str) -> None:
    stage = Stage(fail=AT_ONCE)
    stage.end_trial = release
    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=60.0)) as bus:
        await publish(bus, topic, 20)
        async with subscribed(bus, config(topic, 1), stage) as subscription:
            await until(lambda: len(set(stage.began)) >= 3)
            assert stage.most == 1
            stage.end_trial = succeed
            await until(lambda: subscription.statistics().handled == 20 - AT_ONCE)


class WithoutDelay(StepByStep):
    """Retries wait in the process."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.features: frozenset[Feature] = inner.features - {"delay"}


async def test_retries_that_waited_in_the_process_begin_one_at_a_time(harness: Harness, topic: str) -> None:
    stage = Stage(fail=AT_ONCE)
    async with StreamBus(WithoutDelay(harness.make_backend()), quick(Recorder(), claim_idle_timeout=60.0)) as bus:
        await publish(bus, topic, AT_ONCE)
        # They become due in the middle of the trial.
        async with subscribed(bus, config(topic, 1, retry_backoff=0.3), stage) as subscription:
            await until(lambda: len(stage.began) == AT_ONCE)
            await until(lambda: subscription.statistics().dead_lettered == AT_ONCE)
        await nothing_pending(harness, topic, "g")
    assert stage.most == 1
