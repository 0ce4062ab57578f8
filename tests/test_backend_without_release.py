"""A backend that counts deliveries and renews leases, but cannot release: what is handed back waits for its lease.

The specification: the server counts up each time such an entry is taken again, although nobody ever began to handle it.
That count says nothing of crashes, so there is no crash budget: however often a subscription is paused, closed, or held
back by its circuit, no message becomes a dead letter or a suspect for it. The log says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from harness import Harness, Recorder, StepByStep, nothing_pending, quick, until

from anybus import Delivery, Message, StreamBus, SubscriptionConfig
from anybus._runtime.intake import CIRCUIT, ENDING, PAUSED
from anybus.abc import Feature

TIMES = 6
"""More often than ``max_deliveries`` allows."""


class WithoutRelease(StepByStep):
    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.features: frozenset[Feature] = inner.features - {"release"}

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        raise AssertionError("the bus asks only for what a backend offers")


def config(topic: str, **more: Any) -> SubscriptionConfig:
    options: dict[str, Any] = {"max_in_flight": 1, "max_pending_acks": 4, "max_deliveries": 4, "group_start_id": "0"}
    return SubscriptionConfig(topic, "g", **{**options, **more})


@pytest.mark.parametrize("how", [PAUSED, CIRCUIT, ENDING])
async def test_what_never_started_is_handled_however_often_it_was_handed_back(
    harness: Harness, topic: str, how: str
) -> None:
    handled: list[str] = []
    go_on = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        await go_on.wait()
        handled.append(delivery.message.key)

    options = quick(Recorder(), claim_idle_timeout=0.1)
    async with StreamBus(WithoutRelease(harness.make_backend()), options) as bus:
        await bus.publish_batch([Message(topic, key=key) for key in ("first", "second", "third")])
        if how == ENDING:
            for _ in range(TIMES):
                async with bus.subscribe(config(topic), handler) as subscription:
                    await until(lambda: subscription.statistics().held == 3)
                    subscription.abort()
        else:
            async with bus.subscribe(config(topic), handler) as subscription:
                for _ in range(TIMES):
                    await until(lambda: subscription.statistics().waiting == 2)
                    subscription._intake.shut(how)
                    subscription._intake.open(how)
                go_on.set()
                await until(lambda: subscription.statistics().handled == 3)
        go_on.set()
        async with bus.subscribe(config(topic), handler) as subscription:
            await nothing_pending(harness, topic, "g")
    assert sorted(handled) == ["first", "second", "third"]
    assert await harness.entries(f"{topic}.dead") == []


async def test_the_log_says_once_that_there_is_no_crash_budget(
    harness: Harness, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(delivery: Delivery) -> None:
        """Nothing to do."""

    async with StreamBus(WithoutRelease(harness.make_backend()), quick()) as bus:
        for group in ("g", "h"):
            async with bus.subscribe(SubscriptionConfig(topic, group), handler):
                pass
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert (
        said.count(
            "WithoutRelease cannot count deliveries that ended without an outcome (it lacks release): max_deliveries has no "
            "effect, and a message that kills its process is redelivered forever"
        )
        == 1
    )
