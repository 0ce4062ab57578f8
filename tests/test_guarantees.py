"""Guarantees by name: ``at-least-once``, the default, and ``at-most-once``.

The specification, on memory and on a server:

- ``guarantee="at-most-once"``: a message is acknowledged when it is received, before its handler starts, and never
  handled again, whatever becomes of the handling. It is the same as ``ack_mode="auto-on-receive"``, and either implies
  the other.
- ``guarantee="at-least-once"``: a message is acknowledged when its handler has succeeded, or by hand.
- What contradicts the guarantee is refused where it is given, by field, value and what is allowed; so is what would
  have no effect.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import pytest
from harness import Harness, Recorder, StepByStep, nothing_pending, quick, until
from refusal import refused

from anybus import Delivery, Message, Reject, StreamBus, SubscriptionConfig, retry_stream

AT_MOST_ONCE: list[dict[str, Any]] = [
    {"guarantee": "at-most-once"},
    {"ack_mode": "auto-on-receive"},
    {"guarantee": "at-most-once", "ack_mode": "auto-on-receive"},
]
AT_LEAST_ONCE: list[dict[str, Any]] = [
    {},
    {"guarantee": "at-least-once"},
    {"ack_mode": "auto-on-handler-success"},
    {"guarantee": "at-least-once", "ack_mode": "auto-on-handler-success"},
]


async def handled_while_failing(
    harness: Harness, topic: str, options: dict[str, Any], *, dead_letters: int
) -> tuple[list[str], list[int]]:
    """Which keys are handled, of two of which the first always fails; how many are pending in each handling."""
    handled: list[str] = []
    pending: list[int] = []

    async def handler(delivery: Delivery) -> None:
        pending.append(len(await harness.pending(topic, "g")))
        handled.append(delivery.message.key)
        if delivery.message.key == "fails":
            raise LookupError("x")

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_in_flight=1, **options), handler) as subscription:
            await bus.publish(Message(topic, key="fails"))
            await until(lambda: subscription.statistics().failed > 0)
            await bus.publish(Message(topic, key="works"))
            await until(lambda: subscription.statistics().handled == 1)
            await until(lambda: subscription.statistics().dead_lettered == dead_letters)
            await nothing_pending(harness, topic, "g")
    return handled, pending


@pytest.mark.parametrize("options", AT_MOST_ONCE, ids=repr)
async def test_at_most_once_acknowledges_before_the_start_and_never_retries(
    harness: Harness, topic: str, options: dict[str, Any]
) -> None:
    handled, pending = await handled_while_failing(harness, topic, options, dead_letters=0)
    assert handled == ["fails", "works"]
    assert pending == [0, 0]
    assert await harness.entries(retry_stream(topic, "g")) == []
    assert await harness.entries(f"{topic}.dead") == []


@pytest.mark.parametrize("options", AT_LEAST_ONCE, ids=repr)
async def test_at_least_once_acknowledges_after_success_and_retries(
    harness: Harness, topic: str, options: dict[str, Any]
) -> None:
    retried = {**options, "max_retry": 1, "retry_backoff": 0.0}
    handled, pending = await handled_while_failing(harness, topic, retried, dead_letters=1)
    assert sorted(handled) == ["fails", "fails", "works"]
    assert pending[0] == 1


async def test_at_most_once_loses_what_is_in_a_handler_that_is_cancelled(harness: Harness, topic: str) -> None:
    begun: list[str] = []

    async def handler(delivery: Delivery) -> None:
        begun.append(delivery.message.key)
        await anyio.sleep_forever()

    config = SubscriptionConfig(topic, "g", guarantee="at-most-once")
    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="lost"))
            await until(lambda: begun == ["lost"])
            subscription.abort()
            await subscription.wait_closed()
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="next"))
            await until(lambda: len(begun) == 2)
            subscription.abort()
    assert begun == ["lost", "next"]


class SlowToBury(StepByStep):
    """Publishes to the dead letters only when it is told to."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.begun = anyio.Event()
        self.goes_on = anyio.Event()

    async def publish(self, stream: str, message: Message) -> str:
        if stream.endswith(".dead"):
            self.begun.set()
            await self.goes_on.wait()
        return await super().publish(stream, message)


async def test_at_most_once_a_rejected_message_is_not_lost_by_the_end(harness: Harness, topic: str) -> None:
    """It was acknowledged before: its dead letter is all that is left of it."""
    backend = SlowToBury(harness.make_backend())

    async def handler(delivery: Delivery) -> None:
        raise Reject("unwanted")

    config = SubscriptionConfig(topic, "g", guarantee="at-most-once")
    async with StreamBus(backend, quick(Recorder())) as bus, bus.subscribe(config, handler) as subscription:
        await bus.publish(Message(topic, key="rejected"))
        await backend.begun.wait()
        subscription.abort()
        await anyio.wait_all_tasks_blocked()
        backend.goes_on.set()
        await subscription.wait_closed()
    [(_, letter, _)] = await harness.entries(f"{topic}.dead")
    assert letter is not None
    assert (letter.key, letter.headers["dead-letter-code"]) == ("rejected", "rejected")


async def test_at_most_once_a_dead_letter_that_the_end_cuts_off_is_reported(harness: Harness, topic: str) -> None:
    backend, recorder = SlowToBury(harness.make_backend()), Recorder()

    async def handler(delivery: Delivery) -> None:
        raise Reject("unwanted")

    config = SubscriptionConfig(topic, "g", guarantee="at-most-once")
    options = quick(recorder, publish_timeout=0.05)
    async with StreamBus(backend, options) as bus, bus.subscribe(config, handler) as subscription:
        await bus.publish(Message(topic))
        await backend.begun.wait()
        subscription.abort()
        await subscription.wait_closed()
    assert any("is lost" in (event.detail or "") for event in recorder.of("on_error", "publish"))


async def test_at_least_once_by_hand(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        await delivery.ack()

    config = SubscriptionConfig(topic, "g", guarantee="at-least-once", ack_mode="manual")
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)


@pytest.mark.parametrize("value", ["exactly-twice", "at-least-ones", "", 1, True, ["at-most-once"]], ids=repr)
def test_an_unknown_guarantee_is_refused(value: Any) -> None:
    with refused("guarantee", repr(value), "one of at-least-once, at-most-once, exactly-once, or None"):
        SubscriptionConfig("t", "g", guarantee=value)


@pytest.mark.parametrize(
    ("options", "shown", "allowed"),
    [
        ({"guarantee": "at-most-once", "ack_mode": "manual"}, "'manual'", "unset or 'auto-on-receive'"),
        (
            {"guarantee": "at-most-once", "ack_mode": "auto-on-handler-success"},
            "'auto-on-handler-success'",
            "unset or 'auto-on-receive'",
        ),
        (
            {"guarantee": "at-least-once", "ack_mode": "auto-on-receive"},
            "'auto-on-receive'",
            "unset, 'manual' or 'auto-on-handler-success'",
        ),
    ],
)
def test_an_ack_mode_that_contradicts_the_guarantee_is_refused(
    options: dict[str, Any], shown: str, allowed: str
) -> None:
    with refused("ack_mode", shown, f"{allowed} with guarantee={options['guarantee']!r}"):
        SubscriptionConfig("t", "g", **options)


@pytest.mark.parametrize("at_most_once", AT_MOST_ONCE, ids=repr)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_retry", 0),
        ("max_retry", 3),
        ("max_deliveries", 10),
        ("retry_backoff", 1.0),
        ("retry_on", ValueError),
        ("give_up_on", ValueError),
        ("on_lease_lost", "cancel"),
    ],
)
def test_what_has_no_effect_at_most_once_is_refused(field: str, value: Any, at_most_once: dict[str, Any]) -> None:
    named = "at-most-once" if "guarantee" in at_most_once else "auto-on-receive"
    with refused(field, "", named):
        SubscriptionConfig("t", "g", **at_most_once, **{field: value})
    assert getattr(SubscriptionConfig("t", "g", **{field: value}), field) is not None


def test_a_copy_of_a_configuration_may_change_its_guarantee() -> None:
    config = SubscriptionConfig("t", "g", max_in_flight=4)
    assert replace(replace(config, guarantee="at-most-once"), guarantee="at-least-once", max_retry=1).max_retry == 1


async def test_deliveries_are_never_at_most_once(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with refused("guarantee", "'at-most-once'", "'at-least-once' or unset"):
            bus.deliveries(SubscriptionConfig(topic, "g", guarantee="at-most-once"))
        async with bus.deliveries(SubscriptionConfig(topic, "g", guarantee="at-least-once")) as deliveries:
            await bus.publish(Message(topic))
            await (await deliveries.receive()).ack()
