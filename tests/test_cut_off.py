"""A task of the library that asyncio cancels at the wrong moment leaves nothing behind that is held without end.

What it was about to start is released, and comes back, also to the same subscription.
"""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from harness import HOUR, SOON, MemoryHarness, Recorder, StepByStep, quick, until

from anybus import BackendError, Delivery, Message, StreamBus, Subscription, SubscriptionConfig
from anybus._runtime.entry import Stage

pytestmark = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ],
    indirect=True,
)


def cancel(*names: str) -> None:
    hit = [task for task in asyncio.all_tasks() if any(name in repr(task) for name in names)]
    assert hit
    for task in hit:
        task.cancel()


def holds(subscription: Subscription, stage: Stage) -> bool:
    return any(held.stage is stage for held in subscription._context.ledger.all())


async def test_a_suspect_that_waits_to_be_alone_is_handled_in_the_end() -> None:
    harness = MemoryHarness()
    backend = harness.make_backend()
    handled: list[str] = []
    entered, go_on = anyio.Event(), anyio.Event()

    async def handler(delivery: Delivery) -> None:
        if delivery.message.key == "slow":
            entered.set()
            await go_on.wait()
        handled.append(delivery.message.key)

    with anyio.fail_after(SOON + 5):
        async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=600)) as bus:
            await backend.create_group("t", "g", "0")
            await bus.publish(Message("t", key="suspect"))
            await backend.read_new("t", "g", "dead", count=1, timeout=0)
            async with bus.subscribe(SubscriptionConfig("t", "g", max_in_flight=4), handler) as subscription:
                await bus.publish(Message("t", key="slow"))
                await entered.wait()
                for pending in backend._find("t", "g")[1].pending.values():
                    if pending.consumer == "dead":  # three times by now, and an hour ago
                        pending.deliveries = 3
                        pending.since -= HOUR
                await until(lambda: holds(subscription, Stage.PARKED), "the suspect")
                cancel("_keep_reclaiming", "persist")
                await anyio.wait_all_tasks_blocked()
                go_on.set()
                await until(lambda: handled == ["slow", "suspect"], "the suspect's handling")


async def test_a_worker_that_is_cut_off_before_it_may_start_leaves_room_for_the_next_message() -> None:
    backend = StepByStep(MemoryHarness().make_backend())
    transfer_many = backend.transfer_many
    asked, go_on = anyio.Event(), anyio.Event()
    handled: list[str] = []

    async def fails_at_first(*args: Any) -> Any:
        if not asked.is_set():
            asked.set()
            await go_on.wait()
            raise BackendError("the connection broke", may_have_happened=False)
        return await transfer_many(*args)

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    backend.transfer_many = fails_at_first  # type: ignore[assignment, method-assign]
    config = SubscriptionConfig("t", "g", guarantee="at-most-once", max_in_flight=1, max_pending_acks=1)
    with anyio.fail_after(SOON + 5):
        async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=600)) as bus, bus.subscribe(config, handler):
            await bus.publish(Message("t", key="1"))
            await asked.wait()
            cancel("_work")
            await anyio.wait_all_tasks_blocked()
            go_on.set()
            await bus.publish(Message("t", key="2"))
            await until(lambda: sorted(handled) == ["1", "2"], "both: the first had not been acknowledged")
