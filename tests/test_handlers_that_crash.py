"""A handler that raises what is no ``Exception``: its hand-over has ended without an outcome, and counts.

The specification, on memory and on a server:

- ``SystemExit``, ``GeneratorExit``, a ``BaseException`` of somebody's own (PyO3's panics are one), or a group that holds
  one, however deep: the subscription ends with it. The entry stays pending with its consumer, whose name stays too, and
  the hand-over stays counted. Neighbours, in flight or waiting, are handed back uncounted.
- So the message becomes a suspect, is handled alone, and is given up on after ``max_deliveries``; every neighbour is
  handled meanwhile.
- ``KeyboardInterrupt`` is a wish of whoever sits at the terminal. It strikes whatever code runs at that moment (on trio,
  and on asyncio without its own handler of SIGINT), a handler's too, and says nothing of the message: uncounted.
- In whatever mode, with whatever option; for the block of ``deliveries()`` too, except for ``GeneratorExit``, by which
  an async generator around such a block is closed.
- What had been settled before is settled; at most once the message is lost, by choice.
- What the application's other functions raise (hooks, rules, backoffs, codecs) is contained, whatever it is;
  ``SystemExit`` and ``KeyboardInterrupt``, which can come from a signal handler, end the subscription.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import anyio
import pytest
from harness import SOON, Harness, Recorder, StepByStep, quick, until

from anybus import (
    BackendError,
    Delivery,
    JsonCodec,
    Message,
    StreamBus,
    SubscriptionConfig,
    retry_stream,
)
from anybus.abc import BusEvent, ClaimedMessage, FetchedEntry
from anybus.backends.redis import RedisBackend

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

RETURNED = "anybus:returned"

ASYNCIO_LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]
LEASE = 60.0


class Panic(BaseException):
    """As PyO3's PanicException."""


CRASHES: dict[str, Callable[[], BaseException]] = {
    "SystemExit": lambda: SystemExit(2),
    "GeneratorExit": GeneratorExit,
    "a BaseException of one's own": lambda: Panic("!"),
    "a group": lambda: BaseExceptionGroup("of the handler's tasks", [ValueError("x"), Panic("!")]),
    "a group in a group": lambda: BaseExceptionGroup(
        "outer", [BaseExceptionGroup("inner", [KeyboardInterrupt(), SystemExit(2)])]
    ),
}
INTERRUPTS: dict[str, Callable[[], BaseException]] = {
    "bare": KeyboardInterrupt,
    "in a group": lambda: BaseExceptionGroup("of the handler's tasks", [ValueError("x"), KeyboardInterrupt()]),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "manual": {"ack_mode": "manual"},
    "with a timeout": {"handler_timeout": 600.0},
    "cancelled when the lease is lost": {"on_lease_lost": "cancel"},
}


async def fate(harness: Harness, topic: str, group: str = "g") -> dict[str, tuple[str, int]]:
    """By key: with which consumer an entry is pending, and how often it has been handed over."""
    keys = {entry_id: message.key for entry_id, message, _ in await harness.entries(topic) if message is not None}
    return {keys[entry.id]: (entry.consumer, entry.deliveries) for entry in await harness.pending(topic, group)}


async def run_until_it_ends(
    bus: StreamBus, config: SubscriptionConfig, handler: Callable[[Delivery], Awaitable[None]]
) -> tuple[BaseException | None, str]:
    """What came out of a subscription, and its consumer's name."""
    consumer = ""
    try:
        with anyio.fail_after(SOON):
            async with bus.subscribe(config, handler) as subscription:
                consumer = subscription.consumer
                await anyio.sleep_forever()
    except TimeoutError:
        raise
    except BaseException as error:
        return error, consumer
    return None, consumer


class Crowd:
    """Handlers that wait until all who have room are in flight; then the culprit raises."""

    def __init__(self, at_once: int, error: Callable[[], BaseException]) -> None:
        self._at_once = at_once
        self._error = error
        self._all_here = anyio.Event()
        self._here = 0

    async def handle(self, delivery: Delivery) -> None:
        self._here += 1
        if self._here == self._at_once:
            self._all_here.set()
        await self._all_here.wait()
        if delivery.message.key == "culprit":
            raise self._error()
        await anyio.sleep_forever()


async def crash_in_a_crowd(
    harness: Harness, topic: str, error: Callable[[], BaseException], **options: Any
) -> tuple[BaseException | None, str]:
    """Four in flight, one of them the culprit, and four that wait."""
    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=LEASE)) as bus:
        keys = ["neighbour 0", "culprit", *(f"neighbour {number}" for number in range(1, 7))]
        (await bus.publish_batch([Message(topic, key=key) for key in keys])).raise_for_errors()
        config = SubscriptionConfig(topic, "g", group_start_id="0", max_in_flight=4, **options)
        return await run_until_it_ends(bus, config, Crowd(4, error).handle)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("crash", CRASHES)
async def test_the_culprit_stays_pending_and_counted_and_its_neighbours_go_back_uncounted(
    harness: Harness, topic: str, crash: str, way: str
) -> None:
    came_out, consumer = await crash_in_a_crowd(harness, topic, CRASHES[crash], **WAYS[way])
    assert type(came_out) is type(CRASHES[crash]())
    pending = await fate(harness, topic)
    assert pending.pop("culprit") == (consumer, 1)
    assert set(pending.values()) <= {(RETURNED, 0)}
    assert {"neighbour 0", "neighbour 1", "neighbour 2"} <= pending.keys()
    assert consumer in await harness.consumers(topic, "g"), "its name stays with what is pending there"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("interrupt", INTERRUPTS)
async def test_an_interrupt_that_strikes_in_a_handler_counts_against_no_message(
    harness: Harness, topic: str, interrupt: str, way: str
) -> None:
    came_out, consumer = await crash_in_a_crowd(harness, topic, INTERRUPTS[interrupt], **WAYS[way])
    assert type(came_out) is type(INTERRUPTS[interrupt]())
    pending = await fate(harness, topic)
    assert "culprit" in pending
    assert set(pending.values()) == {(RETURNED, 0)}
    assert consumer not in await harness.consumers(topic, "g")


async def test_the_report_names_the_message_that_ended_the_subscription(harness: Harness, topic: str) -> None:
    error = Panic("!")
    recorder = Recorder()

    async def handler(delivery: Delivery) -> None:
        raise error

    async with StreamBus(harness.make_backend(), quick(recorder, claim_idle_timeout=LEASE)) as bus:
        entry_id = await bus.publish(Message(topic))
        came_out, _ = await run_until_it_ends(bus, SubscriptionConfig(topic, "g", group_start_id="0"), handler)
    assert came_out is error
    [event] = recorder.of("on_error")
    assert (event.scope, event.message_id, event.error) == ("handler", entry_id, error)
    assert [event.error for event in recorder.of("on_ended")] == [error]


@pytest.mark.parametrize("crash", ["SystemExit", "a group in a group"])
async def test_a_message_that_crashes_every_life_is_given_up_on_and_every_neighbour_is_handled(
    harness: Harness, topic: str, crash: str
) -> None:
    """A supervisor in small: the subscription is begun again whenever it has ended."""
    handled: set[str] = set()
    in_flight: set[str] = set()
    beside: list[set[str]] = []
    counts: list[int | None] = []
    lives = 0

    async def handler(delivery: Delivery) -> None:
        key = delivery.message.key
        in_flight.add(key)
        try:
            if key == "culprit":
                counts.append(delivery.state.deliveries)
                beside.append(in_flight - {key})
                error = CRASHES[crash]()
                raise error
            await anyio.sleep(0.005)
            handled.add(key)
        finally:
            in_flight.discard(key)

    neighbours = {f"neighbour {number}" for number in range(15)}
    config = SubscriptionConfig(topic, "g", max_in_flight=16, max_deliveries=4, group_start_id="0")
    dead: list[Message] = []
    with anyio.fail_after(4 * SOON):
        while not dead:
            lives += 1
            async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=0.3)) as bus:
                if lives == 1:
                    keys = ["culprit", *sorted(neighbours)]
                    (await bus.publish_batch([Message(topic, key=key) for key in keys])).raise_for_errors()
                try:
                    async with bus.subscribe(config, handler) as subscription:
                        await until(lambda: subscription.statistics().dead_lettered == 1)
                except (SystemExit, BaseExceptionGroup):
                    continue
                await until(lambda: handled == neighbours)
            dead = [message for _, message, _ in await harness.entries(f"{topic}.dead") if message is not None]
    assert [(letter.key, letter.headers["dead-letter-code"]) for letter in dead] == [("culprit", "deliveries")]
    assert counts == [1, 2, 3, 4]
    assert beside[3] == set(), "a suspect is handled alone"
    assert lives == 5
    assert handled == neighbours
    assert await harness.pending(topic, "g") == []


async def test_a_retry_that_crashes_stays_counted_in_the_retry_stream(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        if delivery.state.attempt == 1:
            raise ValueError("x")
        raise Panic("!")

    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=LEASE)) as bus:
        await bus.publish(Message(topic))
        config = SubscriptionConfig(topic, "g", group_start_id="0", retry_backoff=0.0)
        came_out, consumer = await run_until_it_ends(bus, config, handler)
    assert isinstance(came_out, Panic)
    [entry] = await harness.pending(retry_stream(topic, "g"), "g")
    assert (entry.consumer, entry.deliveries) == (consumer, 1)


async def test_a_crash_after_the_acknowledgement_leaves_nothing_behind(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        await delivery.ack()
        raise Panic("!")

    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=LEASE)) as bus:
        await bus.publish(Message(topic))
        came_out, consumer = await run_until_it_ends(bus, SubscriptionConfig(topic, "g", group_start_id="0"), handler)
    assert isinstance(came_out, Panic)
    assert await harness.pending(topic, "g") == []
    assert consumer not in await harness.consumers(topic, "g")


async def test_a_crash_while_an_acknowledgement_fails_is_a_crash(harness: Harness, topic: str) -> None:
    backend = StepByStep(harness.make_backend())
    asked = anyio.Event()

    async def refuse(*args: Any, **kwargs: Any) -> list[str]:
        asked.set()
        await until(lambda: not subscription.is_running)
        raise BackendError("not now", can_pass=True)

    backend.ack_many = refuse  # type: ignore[method-assign]
    deliveries: list[Delivery] = []

    async def handler(delivery: Delivery) -> None:
        deliveries.append(delivery)
        await asked.wait()
        raise Panic("!")

    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=LEASE)) as bus:
            async with anyio.create_task_group() as tasks:

                async def ack() -> None:
                    with pytest.raises(BackendError):
                        await deliveries[0].ack()

                with pytest.raises(Panic):  # noqa: PT012
                    async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                        consumer = subscription.consumer
                        await bus.publish(Message(topic, key="culprit"))
                        await until(lambda: len(deliveries) == 1)
                        tasks.start_soon(ack)
                        await anyio.sleep_forever()
    assert await fate(harness, topic) == {"culprit": (consumer, 1)}


async def test_what_a_read_under_way_says_of_the_culprit_does_not_hand_it_back(harness: Harness, topic: str) -> None:
    backend = StepByStep(harness.make_backend())
    culprit: list[ClaimedMessage] = []
    here, crashing = anyio.Event(), anyio.Event()

    async def read_new(stream: str, *args: Any, **kwargs: Any) -> list[FetchedEntry]:
        # As after a broken connection: a read looks for what it was given unseen, and finds what is held.
        if culprit and not crashing.is_set() and stream == topic:
            here.set()
            await crashing.wait()
            return list(culprit)
        return await inner(stream, *args, **kwargs)

    inner, backend.read_new = backend.read_new, read_new  # type: ignore[method-assign]

    async def handler(delivery: Delivery) -> None:
        culprit.append(ClaimedMessage(delivery.id, delivery.message, 1))
        await here.wait()
        crashing.set()
        raise Panic("!")

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=LEASE)) as bus:
        await bus.publish(Message(topic, key="culprit"))
        config = SubscriptionConfig(topic, "g", group_start_id="0", max_in_flight=4)
        error, consumer = await run_until_it_ends(bus, config, handler)
    assert isinstance(error, Panic)
    assert await fate(harness, topic) == {"culprit": (consumer, 1)}


async def test_at_most_once_the_message_of_a_crash_is_lost_by_choice(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        raise Panic("!")

    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=LEASE)) as bus:
        await bus.publish(Message(topic))
        config = SubscriptionConfig(topic, "g", group_start_id="0", guarantee="at-most-once")
        came_out, _ = await run_until_it_ends(bus, config, handler)
    assert isinstance(came_out, Panic)
    assert await harness.pending(topic, "g") == []


# The block of deliveries()


@pytest.mark.parametrize("crash", [*CRASHES, "KeyboardInterrupt", "ValueError"])
async def test_what_is_out_unsettled_when_a_block_of_deliveries_crashes_stays_counted(
    harness: Harness, topic: str, crash: str
) -> None:
    other = {"KeyboardInterrupt": KeyboardInterrupt, "ValueError": ValueError}
    counts = crash in CRASHES and crash != "GeneratorExit"
    error = {**CRASHES, **other}[crash]()
    came_out: BaseException | None = None
    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=LEASE)) as bus:
        await bus.publish_batch([Message(topic, key=key) for key in ("settled", "culprit", "waiting")])
        config = SubscriptionConfig(topic, "g", group_start_id="0", max_in_flight=1, max_pending_acks=4)
        try:
            with anyio.fail_after(SOON):
                async with bus.deliveries(config) as stream:
                    async for delivery in stream:
                        if delivery.message.key == "culprit":
                            raise error
                        await delivery.ack()
        except BaseException as caught:
            came_out = caught
    assert came_out is error
    pending = await fate(harness, topic)
    consumer, deliveries = pending["culprit"]
    assert (consumer != RETURNED, deliveries) == ((True, 1) if counts else (False, 0))
    assert pending.get("waiting", (RETURNED, 0)) == (RETURNED, 0)


async def test_closing_an_async_generator_around_deliveries_hands_back_uncounted(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=LEASE)) as bus:

        async def messages() -> AsyncGenerator[Delivery, None]:
            async with bus.deliveries(SubscriptionConfig(topic, "g", group_start_id="0")) as stream:
                yield await stream.receive()

        await bus.publish(Message(topic, key="first"))
        with anyio.fail_after(SOON):
            async with aclosing(messages()) as generator:
                delivery = await anext(generator)
                assert delivery.message.key == "first"
    assert await fate(harness, topic) == {"first": (RETURNED, 0)}


# While the handler is being cancelled


@pytest.mark.parametrize("how", ["of its own", "of a child task"])
@pytest.mark.parametrize("error", [Panic("!"), GeneratorExit()], ids=["Panic", "GeneratorExit"])
async def test_what_a_cancelled_handler_raises_that_is_no_exception_comes_out(
    harness: Harness, topic: str, error: BaseException, how: str
) -> None:
    """trio's task groups put the cancellation of the other tasks beside it."""
    entered = anyio.Event()

    async def fail_when_cancelled() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise error

    async def handler(delivery: Delivery) -> None:
        if how == "of its own":
            entered.set()
            await fail_when_cancelled()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail_when_cancelled)
            tasks.start_soon(anyio.sleep_forever)
            entered.set()
            await anyio.sleep_forever()

    came_out: BaseException | None = None
    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=LEASE)) as bus:
        await bus.publish(Message(topic, key="culprit"))
        try:
            with anyio.fail_after(SOON):
                async with bus.subscribe(SubscriptionConfig(topic, "g", group_start_id="0"), handler) as subscription:
                    consumer = subscription.consumer
                    await entered.wait()
                    await anyio.wait_all_tasks_blocked()
                    subscription.abort()
                    await anyio.sleep_forever()
        except BaseException as caught:
            came_out = caught
    if how == "of its own":
        assert came_out is error
    else:
        assert isinstance(came_out, BaseExceptionGroup)
        assert came_out.exceptions == (error,), "without the cancellations beside it"
    assert await fate(harness, topic) == {"culprit": (consumer, 1)}


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_stray_cancellation_beside_it_changes_nothing(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        raise BaseExceptionGroup("of futures", [asyncio.CancelledError(), Panic("!")])

    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=LEASE)) as bus:
        await bus.publish(Message(topic, key="culprit"))
        came_out, consumer = await run_until_it_ends(bus, SubscriptionConfig(topic, "g", group_start_id="0"), handler)
    assert isinstance(came_out, BaseExceptionGroup)
    assert [type(member) for member in came_out.exceptions] == [Panic]
    assert await fate(harness, topic) == {"culprit": (consumer, 1)}


# The application's other functions


def panics(*args: object) -> Any:
    raise Panic("!")


def exits(*args: object) -> Any:
    raise SystemExit(2)


@pytest.mark.parametrize("option", ["retry_on", "give_up_on", "retry_backoff"])
async def test_a_panic_of_a_rule_or_a_backoff_is_reported_and_the_message_is_retried(
    harness: Harness, topic: str, option: str
) -> None:
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        if delivery.state.attempt == 1:
            raise ValueError("x")

    recorder = Recorder()
    options: dict[str, Any] = {"retry_backoff": 0.0, option: panics}
    async with StreamBus(harness.make_backend(), quick(recorder, claim_idle_timeout=LEASE)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", **options), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert attempts == [1, 2]
    assert [type(event.error) for event in recorder.of("on_error")].count(Panic) == 1


@pytest.mark.parametrize("option", ["retry_on", "give_up_on", "retry_backoff"])
async def test_an_exit_of_a_rule_or_a_backoff_ends_the_subscription_and_counts(
    harness: Harness, topic: str, option: str
) -> None:
    async def handler(delivery: Delivery) -> None:
        raise ValueError("x")

    async with StreamBus(harness.make_backend(), quick(Recorder(), claim_idle_timeout=LEASE)) as bus:
        await bus.publish(Message(topic, key="culprit"))
        options: dict[str, Any] = {option: exits}
        config = SubscriptionConfig(topic, "g", group_start_id="0", **options)
        came_out, consumer = await run_until_it_ends(bus, config, handler)
    assert isinstance(came_out, SystemExit)
    assert await fate(harness, topic) == {"culprit": (consumer, 1)}


HOOKS = ["on_error", "on_received", "on_settled", "on_started", "on_published"]


@pytest.mark.parametrize("hook", HOOKS)
async def test_a_panic_of_a_hook_is_logged_and_harms_nothing(
    harness: Harness, topic: str, hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(delivery: Delivery) -> None:
        if delivery.state.attempt == 1:
            raise ValueError("x")

    observer = type("Observer", (Recorder,), {hook: panics})()
    async with StreamBus(harness.make_backend(), quick(observer, claim_idle_timeout=LEASE)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", retry_backoff=0.0), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert f"{hook} raised" in caplog.text


@pytest.mark.parametrize("hook", ["on_error", "on_received"])
async def test_an_exit_of_a_hook_ends_the_subscription_and_counts(
    harness: Harness, topic: str, hook: str, anyio_backend_name: str
) -> None:
    if hook == "on_received" and anyio_backend_name == "asyncio":
        pytest.skip("asyncio lets an exit out of its loop, and so out of the tests, if it comes out of any task")

    class Exiting(Recorder):
        def told(self, event: BusEvent) -> None:
            if event.message_id == culprit:
                raise SystemExit(2)

        on_received = told
        on_error = told

    async def handler(delivery: Delivery) -> None:
        if delivery.message.key == "culprit":
            raise ValueError("x")
        await anyio.sleep_forever()

    observer = Exiting()
    if hook == "on_error":
        observer.on_received = lambda event: None  # type: ignore[method-assign]
    async with StreamBus(harness.make_backend(), quick(observer, claim_idle_timeout=LEASE)) as bus:
        await bus.publish(Message(topic, key="neighbour"))
        culprit = await bus.publish(Message(topic, key="culprit"))
        config = SubscriptionConfig(topic, "g", group_start_id="0")
        came_out, consumer = await run_until_it_ends(bus, config, handler)
    assert isinstance(came_out, SystemExit)
    assert await fate(harness, topic) == {"culprit": (consumer, 1), "neighbour": (RETURNED, 0)}


class PanickyCodec(JsonCodec):
    def decode(self, data: bytes) -> Message:
        message = super().decode(data)
        if message.key == "culprit":
            raise Panic("!")
        return message


@pytest.mark.parametrize("again", [False, True], ids=["read", "reclaimed"])
async def test_what_a_codec_panics_on_is_malformed_and_its_neighbours_are_handled(
    server: Any, topic: str, again: bool
) -> None:
    handled: set[str] = set()

    async def handler(delivery: Delivery) -> None:
        handled.add(delivery.message.key)

    backend = RedisBackend(server.url, codec=PanickyCodec())
    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=0.2 if again else LEASE)) as bus:
        for key in ("before", "culprit", "after"):
            await bus.publish(Message(topic, key=key))
        if again:
            await backend.create_group(topic, "g", "0")
            await backend.read_new(topic, "g", "crashed", count=10, timeout=0)
        async with bus.subscribe(SubscriptionConfig(topic, "g", group_start_id="0"), handler) as subscription:
            await until(lambda: subscription.statistics().dead_lettered == 1)
            await until(lambda: handled == {"before", "after"})
