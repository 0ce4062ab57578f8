"""What lies in the channel between the intake and the handlers, or was on its way out of it, is never left there."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from harness import HOUR, SOON, Harness, StepByStep, quick, until

from anybus import Delivery, MemoryBackend, Message, Observer, Reject, Retry, StreamBus, SubscriptionConfig
from anybus.abc import Feature, FetchedEntry


class InSteps(StepByStep):
    """Gives six entries to three reads, at exactly the wrong moments."""

    def __init__(self, topic: str) -> None:
        super().__init__(MemoryBackend())
        self.topic = topic
        self.goes_on = anyio.Event()
        self.first_may_end = anyio.Event()
        self.second_may_end = False
        self._entries: list[FetchedEntry] = []
        self._step = 0

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        if stream != self.topic:
            return await super().read_new(stream, group, consumer, count=count, timeout=timeout)
        while len(self._entries) < 6 and self._step == 0:
            self._entries += await super().read_new(stream, group, consumer, count=6, timeout=HOUR)
        step, self._step = self._step, self._step + 1
        if step == 1:
            await self.goes_on.wait()
            self.first_may_end.set()
            self.second_may_end = True
        elif step == 2:
            await checkpoint()
        elif step > 2:
            await anyio.sleep(timeout)
        return self._entries[2 * step : 2 * step + 2]


async def test_a_worker_that_was_called_comes_even_if_another_takes_the_call_out_of_the_channel(topic: str) -> None:
    backend = InSteps(topic)
    begun: set[str] = set()
    last = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        key = delivery.message.key
        begun.add(key)
        if key == "0":
            await backend.first_may_end.wait()
        elif key == "1":
            while not backend.second_may_end:
                await checkpoint()
            await checkpoint()
        elif key in ("2", "3"):
            await last.wait()
        elif {"4", "5"} <= begun:
            last.set()

    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick()) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g", max_in_flight=8), handler) as subscription:
                await bus.publish_batch([Message(topic, key=str(number)) for number in range(6)])
                await until(lambda: begun == {"0", "1"})
                backend.goes_on.set()
                await until(lambda: subscription.statistics().handled == 6)


async def test_a_receive_that_is_cancelled_passes_on_what_it_had_received(topic: str) -> None:
    received: list[str] = []
    deliveries: list[Delivery] = []
    scopes = [anyio.CancelScope() for _ in range(3)]

    with anyio.fail_after(SOON):
        async with (
            StreamBus(MemoryBackend(), quick()) as bus,
            bus.deliveries(SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=8)) as stream,
            anyio.create_task_group() as tasks,
        ):

            async def receive(scope: anyio.CancelScope) -> None:
                with scope:
                    delivery = await stream.receive()
                    received.append(delivery.message.key)
                    deliveries.append(delivery)

            for scope in scopes:  # they wait in this order
                tasks.start_soon(receive, scope)
                await anyio.wait_all_tasks_blocked()
            await bus.publish(Message(topic, key="first"))
            await until(lambda: received == ["first"])
            # The second one is given this, and must wait with it until the first is settled.
            await bus.publish(Message(topic, key="second"))
            await anyio.wait_all_tasks_blocked()
            scopes[1].cancel()
            await anyio.wait_all_tasks_blocked()
            await deliveries[0].ack()
            await until(lambda: received == ["first", "second"])
            await deliveries[1].ack()


class Silent(Observer):
    """Hears of failures, so that they are not logged: the log of a test keeps what it is given."""

    def on_error(self, event: Any) -> None:
        pass

    def on_dead_lettered(self, event: Any) -> None:
        pass


async def test_no_exception_is_kept_alive_by_a_delivery_that_was_rejected_after_its_ack(topic: str) -> None:
    kept: list[Delivery] = []
    raised: list[weakref.ref[Reject]] = []

    async def handler(delivery: Delivery) -> None:
        kept.append(delivery)
        error = Reject("!")
        raised.append(weakref.ref(error))
        raise error

    with anyio.fail_after(SOON):
        async with StreamBus(MemoryBackend(), quick(Silent())) as bus:
            config = SubscriptionConfig(topic, "g", guarantee="at-most-once")
            async with bus.subscribe(config, handler) as subscription:
                await bus.publish(Message(topic))
                await until(lambda: subscription.statistics().dead_lettered == 1)
                await until(lambda: subscription.statistics().in_flight == 0)
                gc.collect()
                assert raised[0]() is None
                assert kept


class WithoutDelay(StepByStep):
    """Retries wait in the process."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.features: frozenset[Feature] = inner.features - {"delay"}


async def test_a_retry_that_is_due_during_a_graceful_end_is_released_before_the_last_handler_has_ended(
    topic: str,
) -> None:
    may_fail, handled_elsewhere = anyio.Event(), anyio.Event()
    began: set[str] = set()

    async def handler(delivery: Delivery) -> None:
        began.add(delivery.message.key)
        if delivery.message.key == "slow":
            await handled_elsewhere.wait()
        else:
            await may_fail.wait()
            raise Retry(delay=0.01)

    async def elsewhere(delivery: Delivery) -> None:
        handled_elsewhere.set()

    with anyio.fail_after(SOON):
        async with (
            StreamBus(WithoutDelay(MemoryBackend()), quick(close_timeout=HOUR, claim_idle_timeout=HOUR)) as bus,
            contextlib.AsyncExitStack() as stack,
        ):
            ending = await stack.enter_async_context(bus.subscribe(SubscriptionConfig(topic, "g"), handler))
            await bus.publish_batch([Message(topic, key="slow"), Message(topic, key="fails")])
            await until(lambda: began == {"slow", "fails"})
            ending.close()
            may_fail.set()
            async with bus.subscribe(SubscriptionConfig(topic, "g"), elsewhere):
                await handled_elsewhere.wait()
                await ending.wait_closed()


ASYNCIO_LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
@pytest.mark.parametrize("hit", ["while it waits to be alone", "while it is handled"])
async def test_a_stray_cancellation_of_the_intake_neither_forgets_a_suspect_nor_gives_it_company(
    hit: str, harness: Harness, topic: str
) -> None:
    began: list[str] = []
    may_end = {"slow": anyio.Event(), "suspect": anyio.Event()}
    backend = harness.make_backend()

    async def handler(delivery: Delivery) -> None:
        key = delivery.message.key
        began.append(key)
        if key in may_end:
            await may_end[key].wait()

    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(Silent(), claim_idle_timeout=60.0)) as bus:
            await backend.create_group(topic, "g", "0")
            await bus.publish(Message(topic, key="suspect"))
            await backend.read_new(topic, "g", "crashed", count=1, timeout=0)
            for _ in range(2):
                await backend.reclaim_idle(topic, "g", "crashed", min_idle=0, count=1)
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                await bus.publish(Message(topic, key="slow"))
                await until(lambda: began == ["slow"])
                await harness.age(topic, "g")
                await until(lambda: subscription.statistics().held == 2)
                if hit == "while it is handled":
                    may_end["slow"].set()
                    await until(lambda: began == ["slow", "suspect"])
                await anyio.wait_all_tasks_blocked()
                for task in asyncio.all_tasks():
                    if "persist" in repr(task):
                        task.cancel()
                await bus.publish(Message(topic, key="third"))
                await anyio.wait_all_tasks_blocked()
                assert "third" not in began
                may_end["slow"].set()
                await until(lambda: began == ["slow", "suspect"])
                await anyio.wait_all_tasks_blocked()
                assert began == ["slow", "suspect"]
                may_end["suspect"].set()
                await until(lambda: subscription.statistics().handled == 3)
