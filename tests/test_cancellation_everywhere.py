"""Cancellation at any await loses nothing.

A subscription is cancelled at every point at which it can be: a scenario, in which everything that can become of a
message becomes of some message, is run again and again, and cancelled at the end of the n-th step that any task of
the loop takes, for every n until it ends by itself (``steps.py`` says how that is exact). It is cancelled by AnyIO's
scopes, and on asyncio's loops also by asyncio's own ``Task.cancel()`` on the task that hosts the subscription, once
and twice. The scenario is run in every form of a subscription and in every mode; among its points are all of a
graceful end's, and of entering and leaving the bus.

After each of them the backend is asked, whose word counts. Every message is unread still, or settled as the outcome of
its handling demands (acked if its handler had returned; in the retry stream, or a dead letter), or pending and handed
back: owned by ``anybus:returned``, its deliveries not counted up, and there for whoever reclaims although the lease,
of a minute, is not over. No message was in two handlers at once, or handled with success twice. ``forget_consumer``
was called once for each stream that was used, last. No task is left, the ledger is empty, the bus holds no
subscription, and nothing was reported as an error but what handlers raised.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import anyio
import pytest
from anyio import to_thread
from anyio.lowlevel import checkpoint
from harness import SOON, Harness, MemoryHarness, Recorder, StepByStep, new_topic
from servers import RedisHarness
from steps import Steps, living_tasks, watched
from sweeps import first_of

from anybus import (
    Delivery,
    DeliveryStream,
    EventBusError,
    MemoryBackend,
    Message,
    Reject,
    Retry,
    StreamBus,
    StreamBusOptions,
    Subscription,
    SubscriptionConfig,
)
from anybus._failure.copies import RETRY_ATTEMPT, retry_stream
from anybus._failure.settlement import AckMode
from anybus.abc import FetchedEntry, PassSource, Redelivered, StreamBackend, TransferItem
from anybus.backends.redis import RedisBackend

GROUP = "g"
LEASE = 60.0
SEED = int(os.environ.get("ANYBUS_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
"""Of the points that are looked at where all would take too long."""

RETURNED = "anybus:returned"
DEAD = "dead"

ASYNCIO_LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]

Form = Literal["subscribe", "consume", "consume outside", "deliveries"]


@dataclass(frozen=True)
class Variant:
    """How the scenario is run.

    :ivar form: by which method; ``consume outside`` in a task group around the bus, which then ends it first.
    :ivar graceful: the body ends while handlers still run, and the points are counted from there.
    :ivar suspect: one of the dead consumer's entries has been handed over three times.
    """

    name: str
    form: Form = "subscribe"
    ack_mode: AckMode | None = None
    max_in_flight: int = 5
    max_pending_acks: int | None = None
    graceful: bool = False
    suspect: bool = False

    @property
    def by_hand(self) -> bool:
        return self.form == "deliveries" or self.ack_mode == "manual"


MAIN = Variant("auto")
VARIANTS = [
    MAIN,
    Variant("manual", ack_mode="manual"),
    Variant("deliveries", form="deliveries"),
    Variant("auto-on-receive", ack_mode="auto-on-receive"),
    Variant("turns", max_pending_acks=5),
    Variant("graceful", graceful=True),
    Variant("graceful-manual", ack_mode="manual", graceful=True),
    Variant("suspect", suspect=True),
    Variant("consume", form="consume"),
    Variant("consume-outside", form="consume outside"),
]
VARIANTS_BY_NAME = {variant.name: variant for variant in VARIANTS}


class Witness(StepByStep):
    """Passes everything on, and remembers who asked for what."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.calls: list[tuple[str, str, str]] = []

    async def __aexit__(self, *error: object) -> bool | None:
        self.calls.append(("left", "", ""))
        return await super().__aexit__(*error)

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        self.calls.append(("read_new", stream, consumer))
        return await super().read_new(stream, group, consumer, count=count, timeout=timeout)

    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        self.calls.append(("reclaim_idle", stream, consumer))
        return await super().reclaim_idle(stream, group, consumer, min_idle=min_idle, count=count)

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        self.calls.append(("ack_many", stream, consumer or ""))
        return await super().ack_many(stream, group, message_ids, consumer=consumer)

    async def forget_consumer(self, stream: str, group: str, consumer: str) -> None:
        self.calls.append(("forget_consumer", stream, consumer))
        await super().forget_consumer(stream, group, consumer)

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        self.calls.append(("renew", stream, consumer))
        return await super().renew(stream, group, consumer, message_ids)

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        self.calls.append(("release", stream, consumer))
        await super().release(stream, group, consumer, message_ids)

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[list[str] | EventBusError | None]:
        self.calls.append(("transfer_many", stream, consumer))
        return await super().transfer_many(stream, group, consumer, items)


class WitnessOfPasses(Witness, PassSource):
    """For a backend that makes whole passes: these go on, too."""

    async def redeliver(
        self, stream: str, retry_stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> Redelivered:
        self.calls += (("redeliver", stream, consumer), ("redeliver", retry_stream, consumer))
        taken: Redelivered = await self.inner.redeliver(
            stream, retry_stream, group, consumer, min_idle=min_idle, count=count
        )
        return taken


async def make_old(harness: Harness, stream: str, entry_id: str) -> None:
    """Its consumer died long ago: the lease is over, although nobody here has a minute to wait for that."""
    if isinstance(harness, RedisHarness):
        claim = partial(harness._client.xclaim, stream, GROUP, DEAD, 0, [entry_id], idle=3_600_000, justid=True)
        await to_thread.run_sync(claim)
    else:
        backend = harness.make_backend()
        assert isinstance(backend, MemoryBackend)
        backend._streams[stream].groups[GROUP].pending[entry_id].since = -math.inf


class Remembering(set[Subscription]):
    """The bus's set of subscriptions, and all that were ever in it."""

    def __init__(self) -> None:
        super().__init__()
        self.ever: list[Subscription] = []

    def add(self, element: Subscription, /) -> None:
        self.ever.append(element)
        super().add(element)


DEAD_KINDS = ("quick", "walk", "fail", "ack")
WAITING_KINDS = ("quick", "walk", "fail", "reject", "ack", "retry", "release", "nack")
PUBLISHED_KINDS = (
    *("walk", "fail", "slow", "quick", "ack", "quick", "reject", "retry", "walk", "quick", "leave", "slow"),
    *("walk", "ack", "slow", "walk"),
)
LATE_KINDS = ("walk", "ack", "fail", "quick", "reject")

FINAL = frozenset({"returned", "acked", "rejected", "nacked", "left"})
"""Outcomes after which a message is not handled again."""


class Scenario:
    """One run: what is in the topic, what handlers make of it, and what must be true of it afterwards."""

    def __init__(self, harness: Harness, operator: StreamBackend, variant: Variant, steps: Steps, library: str) -> None:
        self.topic = new_topic()
        self.retries = retry_stream(self.topic, GROUP)
        self.variant = variant
        self.harness = harness
        self.operator = operator
        backend = harness.make_backend()
        self.backend = WitnessOfPasses(backend) if isinstance(backend, PassSource) else Witness(backend)
        self.steps = steps
        self.library = library
        self.recorder = Recorder()
        self.config = SubscriptionConfig(
            self.topic,
            GROUP,
            ack_mode=None if variant.form == "deliveries" else variant.ack_mode,
            max_in_flight=variant.max_in_flight,
            max_pending_acks=variant.max_pending_acks,
        )
        if variant.ack_mode != "auto-on-receive":
            self.config = replace(self.config, retry_backoff=0.0)
        self.bus = StreamBus(
            self.backend,
            StreamBusOptions(
                block_timeout=0.05,
                claim_idle_timeout=LEASE,
                reclaim_interval=0.0005,
                ack_flush_interval=0.0002,
                group_start_id="0",
                observer=self.recorder,
            ),
        )
        self.subscriptions = self.bus._members._running = Remembering()
        self.body_ended = False
        self.begun: Counter[str] = Counter()
        self.running: dict[str, Delivery] = {}
        self.at_once: list[str] = []
        self.outcomes: dict[tuple[str, int], str] = {}
        self.successes: Counter[str] = Counter()
        self.uids: set[str] = set()
        self.retried_before = ""
        self.unfinished: set[str] = set()
        self.progress = anyio.Event()
        self.baseline: dict[tuple[str, str], int] = defaultdict(int)
        self.of_the_dead: set[tuple[str, str]] = set()

    def message(self, kind: str) -> Message:
        message = Message(self.topic, kind=kind)
        self.uids.add(message.uid)
        self.unfinished.add(message.uid)
        return message

    async def prepare(self) -> None:
        """A topic with a past: messages that wait, some of them taken by a consumer that died, or handed back."""
        backend = self.operator
        for stream in (self.topic, self.retries):
            await backend.create_group(stream, GROUP, "0")
        await backend.publish_many([(self.topic, self.message(kind), None) for kind in DEAD_KINDS + WAITING_KINDS])
        taken = await backend.read_new(self.topic, GROUP, DEAD, count=len(DEAD_KINDS), timeout=0)
        await backend.release(self.topic, GROUP, DEAD, [entry.id for entry in taken[::2]])
        left = [entry.id for entry in taken[1::2]]
        if self.variant.suspect:
            # Hand-overs that ended without an outcome: three deaths.
            for _ in range(2):
                await backend.reclaim_idle(self.topic, GROUP, DEAD, min_idle=0, count=1)
            left = [entry.id for entry in taken]
        message = self.message("quick").replace(headers={RETRY_ATTEMPT: "1"})
        self.retried_before = message.uid
        await backend.publish(self.retries, message)
        [retried] = await backend.read_new(self.retries, GROUP, DEAD, count=1, timeout=0)
        self.of_the_dead = {(self.topic, entry_id) for entry_id in left} | {(self.retries, retried.id)}
        for stream, entry_id in self.of_the_dead:
            await make_old(self.harness, stream, entry_id)
        for stream in (self.topic, self.retries):
            for entry in await self.harness.pending(stream, GROUP):
                self.baseline[stream, entry.id] = entry.deliveries

    async def run(self) -> None:
        """What is cancelled: a program with a bus, from the first step to the last."""
        form = self.variant.form
        self.steps.counting = not self.variant.graceful
        if form == "consume outside":
            async with anyio.create_task_group() as tasks, self.bus as bus:
                tasks.start_soon(bus.consume, self.config, self.handle)
                await self.body(bus)
        else:
            async with self.bus as bus:
                if form == "subscribe":
                    async with bus.subscribe(self.config, self.handle):
                        await self.body(bus)
                elif form == "consume":
                    async with anyio.create_task_group() as tasks:
                        subscription = await tasks.start(bus.consume, self.config, self.handle)
                        await self.body(bus)
                        subscription.close()
                else:
                    async with bus.deliveries(self.config) as stream, anyio.create_task_group() as tasks:
                        tasks.start_soon(self.body, bus, stream)
                        async for delivery in stream:
                            tasks.start_soon(self.handle, delivery)
        self.steps.counting = False

    async def body(self, bus: StreamBus, stream: DeliveryStream | None = None) -> None:
        await self.publish(bus, PUBLISHED_KINDS)
        if self.variant.graceful:
            await self.until(lambda: sum(self.begun.values()) >= 9)
        else:
            await self.until(lambda: not self.unfinished)
            # Now a read waits for these: they come to it, not it to them.
            await self.publish(bus, LATE_KINDS)
            await self.until(lambda: not self.unfinished)
        self.body_ended = True
        self.steps.counting = True
        if stream is not None:
            await stream.aclose()

    async def publish(self, bus: StreamBus, kinds: Sequence[str]) -> None:
        messages = [self.message(kind) for kind in kinds]
        await bus.publish(messages[0])
        await bus.publish_batch(messages[1:])

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.progress = anyio.Event()
            await self.progress.wait()

    async def handle(self, delivery: Delivery) -> None:
        uid, attempt = delivery.message.uid, delivery.state.attempt
        if uid in self.running:
            self.at_once.append(uid)
        self.running[uid] = delivery
        self.begun[uid] += 1
        self.outcomes.pop((uid, attempt), None)
        self.progress.set()

        def note(outcome: str) -> None:
            self.outcomes[uid, attempt] = outcome
            self.successes[uid] += outcome in ("returned", "acked")
            if outcome in ("released", "retried"):
                stop_running()  # from here on it is not its any more: whoever takes it next may handle it
            if outcome in FINAL:
                self.unfinished.discard(uid)
            self.progress.set()

        def stop_running() -> None:
            if self.running.get(uid) is delivery:
                del self.running[uid]

        try:
            await self.work(delivery, note)
        finally:
            stop_running()

    async def work(self, delivery: Delivery, note: Callable[[str], None]) -> None:
        """What is noted stands for what the bus has to do from there on. Nothing is awaited between the two."""
        kind, state = delivery.message.kind, delivery.state
        receive = self.variant.ack_mode == "auto-on-receive"
        for _ in range(40 if self.variant.graceful else 20 if kind == "slow" else 8 if kind in ("walk", "fail") else 0):
            await checkpoint()
        if kind == "fail" and state.attempt == 1:
            if self.variant.form == "deliveries":
                note("retried")
                await delivery.retry("not yet")
            else:
                note("returned" if receive else "retried")
                raise ValueError("not yet")
        elif kind == "reject" and self.variant.form != "deliveries":
            note("rejected")
            raise Reject("never")
        elif kind in ("nack", "reject") and not receive:
            note("nacked")
            await delivery.nack("never")
            await checkpoint()
        elif kind == "retry" and state.attempt == 1 and not receive:
            note("retried")
            if state.redelivered:
                raise Retry("in another way", delay=0)
            await delivery.retry("later", delay=0)
            await checkpoint()
        elif kind == "release" and not state.redelivered and not receive:
            note("released")
            await delivery.release()
            await checkpoint()
        elif kind == "leave" and self.variant.by_hand:
            note("left")
        elif kind == "ack" and not receive:
            note("acked")
            await delivery.ack()
            await checkpoint()
        elif self.variant.by_hand:
            note("acked")
            await delivery.ack()
        else:
            note("returned")

    async def ends_soon(self, wait: Callable[[], Awaitable[object]]) -> None:
        with anyio.move_on_after(SOON):
            await wait()
            return
        # It hangs in a shield; without this the test would hang too, instead of telling.
        for subscription in self.subscriptions.ever:
            subscription._ended.set()
        if isinstance(self.backend.inner, RedisBackend):
            self.backend.inner._client.mux.close()
        with anyio.CancelScope(shield=True):
            await wait()
        raise AssertionError("the program does not end")

    async def verify(self, tasks_before: int) -> None:
        """Ask the backend what became of everything."""
        assert living_tasks(self.library) == tasks_before
        self.verify_the_end()
        # Before anybody takes anything: whose the pending entries are, and how often they were handed over.
        for stream in (self.topic, self.retries):
            pending = await self.harness.pending(stream, GROUP)
            for entry in pending:
                untouched = entry.consumer == DEAD and (stream, entry.id) in self.of_the_dead
                assert entry.consumer == RETURNED or untouched, entry
                assert entry.deliveries == self.baseline[stream, entry.id], entry
            assert set(await self.harness.consumers(stream, GROUP)) <= {RETURNED, DEAD}
        topic, retries = await self.states(self.topic), await self.states(self.retries)
        dead = Counter(
            message.uid for _, message, _ in await self.harness.entries(f"{self.topic}.dead") if message is not None
        )
        assert not self.at_once
        assert topic.keys() | retries.keys() | dead.keys() <= self.uids
        for uid in self.uids:
            assert len(topic[uid]) <= 1
            assert len(retries[uid]) <= 1
            self.verify_message(uid, "".join(topic[uid]), "".join(retries[uid]), dead[uid])

    def verify_the_end(self) -> None:
        assert not self.subscriptions
        started = {event.consumer for event in self.recorder.of("on_started")}
        for subscription in self.subscriptions.ever:
            # One that was cancelled while it was being entered was never anybody's.
            assert not (subscription.is_running and subscription.consumer in started)
            statistics = subscription.statistics()
            assert (statistics.held, statistics.waiting, statistics.in_flight) == (0, 0, 0)
            budget = subscription._context.ledger.budget
            assert (budget.by_read, budget.by_reclaim) == (0, 0)
        for event in self.recorder.of("on_error"):
            assert event.scope == "handler", event
            assert isinstance(event.error, ValueError), event
        calls = self.backend.calls
        assert not calls or calls[-1][0] == "left"
        for stream, consumer in {call[1:] for call in calls} - {("", "")}:
            methods = [method for method, *where in calls if where == [stream, consumer]]
            assert methods.count("forget_consumer") == 1, methods
            assert methods[-1] == "forget_consumer", methods

    async def states(self, stream: str) -> defaultdict[str, list[str]]:
        """By uid, how each of its entries stands: unread, pending or acked. Takes all that can be taken."""
        # First of all, for a publish that was cancelled may still be on its way to a server.
        entries = await self.harness.entries(stream)
        pending = {entry.id for entry in await self.harness.pending(stream, GROUP)}
        heir = await self.operator.reclaim_idle(stream, GROUP, "heir", min_idle=LEASE, count=1000)
        assert {entry.id for entry in heir} == pending, "not all of what is pending could be reclaimed at once"
        unread = {entry.id for entry in await self.operator.read_new(stream, GROUP, "heir", count=1000, timeout=0)}
        states = defaultdict[str, list[str]](list)
        for entry_id, message, _ in entries:
            assert message is not None
            state = "unread" if entry_id in unread else "pending" if entry_id in pending else "acked"
            states[message.uid].append(state)
        return states

    def verify_message(self, uid: str, topic: str, retry: str, dead: int) -> None:
        """
        :param topic: how its entry in the topic stands; empty if there is none, since it was not published.
        :param retry: how its copy in the retry stream stands; empty if there is none, or none any more.
        :param dead: how many dead letters there are of it.
        """
        first, second = self.outcomes.get((uid, 1)), self.outcomes.get((uid, 2))
        whole = (uid, first, second, topic, retry, dead)
        if self.variant.ack_mode == "auto-on-receive":
            # Accepted before the start, and lost if it is cancelled then: by choice.
            assert topic in ("", "acked") or not self.begun[uid], whole
            assert retry in ("", "acked") or uid == self.retried_before, whole
            assert dead <= (first == "rejected"), whole
            return
        assert self.successes[uid] <= 1, whole
        if topic:
            settled = first in ("returned", "acked", "rejected", "nacked", "retried")
            assert (topic == "acked") == settled, whole
        if first == "retried" or uid == self.retried_before:
            # Acked, it may be gone: only this group reads its retry stream.
            assert (retry in ("", "acked")) == (second in ("returned", "acked")), whole
        else:
            assert retry == "", whole
        assert dead == (first in ("rejected", "nacked")), whole


Mean = Literal["scope", "native"]
Means = tuple[Mean, ...]


class Execution:
    """Runs the scenario of one variant again and again on one server, cancelled at one point after the other.

    :ivar means: by what it is cancelled: an AnyIO scope around it, or the ``Task.cancel()`` of its host, or both.
    """

    def __init__(self, harness: Harness, variant: Variant, library: str, means: Means = ("scope",)) -> None:
        self.harness = harness
        self.variant = variant
        self.library = library
        self.means = means

    async def at_every_point(self, *, at_most: float = math.inf) -> None:
        """Cancel at every step; or at every second, third... if there are more than ``at_most``.

        Then the first is drawn by lot: run after run, they cover the whole range.
        """
        async with self.harness.make_backend() as operator:
            _, steps = await self.run_to(math.inf, operator)
            stride = max(1, math.ceil(steps / at_most))
            dice = random.Random(f"{SEED} {self.library} {self.variant.name} {self.means}")
            points, needed = 0, min(at_most, 150) / 3
            while True:
                number, missed = dice.randint(1, stride), 0
                # Runs differ in length, for timers fire when they do: three in a row have ended before that point.
                while missed < 3:
                    reached, _ = await self.run_to(number, operator, apart=1 + number % 40)
                    points += reached
                    missed = 0 if reached else missed + 1
                    number += stride
                if points >= needed or stride == 1:
                    break
                stride = max(1, stride // 4)  # the first run was far longer than the others, on a busy machine
        print(f"{points} points of {steps} steps, ANYBUS_SEED={SEED}")
        assert points >= needed, "this would be no test"

    async def at_some_points(self, count: int) -> None:
        """Cancel at so many steps, evenly spread, always the same ones."""
        async with self.harness.make_backend() as operator:
            _, steps = await self.run_to(math.inf, operator)
            for point in range(count):
                number = max(1, steps * (2 * point + 1) // (2 * count))
                await self.run_to(number, operator, apart=1 + number % 40)

    async def run_to(self, number: float, operator: StreamBackend, apart: int = 1) -> tuple[bool, int]:
        """Run it, cancel it at that step, and look at everything.

        :param apart: so many steps lie between the first cancellation and the second, if there are two.
        :return: whether it got as far as that step, and the number of steps it took.
        """
        steps = Steps()
        scenario = Scenario(self.harness, operator, self.variant, steps, self.library)
        await scenario.prepare()
        cancelled: list[Mean] = []
        tasks_before = living_tasks(self.library)
        over = anyio.Event()

        def plan(by: Mean, cancel: Callable[[], object]) -> None:
            def act() -> None:
                cancelled.append(by)
                cancel()

            for position, mean in enumerate(self.means):
                if mean == by and number < math.inf:
                    steps.at(int(number) + position * apart, act)

        async def host_in_scope() -> None:
            with anyio.CancelScope() as scope:
                plan("scope", scope.cancel)
                await scenario.run()
            over.set()

        with watched(steps, self.library):
            if "native" in self.means:
                host = asyncio.ensure_future(host_in_scope())
                plan("native", host.cancel)
                await scenario.ends_soon(lambda: asyncio.wait([host]))
                if not host.cancelled():
                    host.result()
                    # What was asked for comes out (unless it was folded into one with a scope's, and caught with that).
                    assert "native" not in cancelled or "scope" in cancelled, "the cancellation was swallowed"
            else:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(host_in_scope)
                    await scenario.ends_soon(over.wait)
        steps.counting = False
        await checkpoint()  # the host's own task is gone now, on every loop
        try:
            await scenario.verify(tasks_before)
        except AssertionError as error:
            raise AssertionError(f"cancelled at step {number} of {self.variant.name}: {error}") from error
        if not cancelled:
            assert scenario.body_ended
            assert self.variant.graceful or not scenario.unfinished
        return bool(cancelled), steps.taken


async def sweep(execution: Execution, size: str, on_memory: float, on_server: float) -> None:
    """At some points in a short run; in a thorough one at all, or at as many as there is time for."""
    if size == "all":
        await execution.at_every_point(at_most=at_most(execution.harness, execution.variant, on_memory, on_server))
    else:
        on_this = on_memory if isinstance(execution.harness, MemoryHarness) else on_server
        await execution.at_some_points(max(2, math.ceil(min(on_this, 150) / 6)))


SIZES = pytest.mark.parametrize("size", first_of(["some", "all"]))


def at_most(harness: Harness, variant: Variant, on_memory: float, on_server: float) -> float:
    """All points of the main variant in memory; where more would take too long, so many, evenly spread."""
    if isinstance(harness, MemoryHarness):
        return math.inf if variant is MAIN else on_memory
    return 2 * on_server if variant is MAIN else on_server


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@SIZES
async def test_a_cancelled_scope_loses_nothing_at_any_point(
    harness: Harness, variant: Variant, size: str, anyio_backend_name: str
) -> None:
    await sweep(Execution(harness, variant, anyio_backend_name), size, math.inf, 24)


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@SIZES
async def test_a_native_cancellation_loses_nothing_at_any_point(
    harness: Harness, variant: Variant, size: str, anyio_backend_name: str
) -> None:
    await sweep(Execution(harness, variant, anyio_backend_name, ("native",)), size, 150, 16)


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
@pytest.mark.parametrize("means", [("native", "native"), ("scope", "native"), ("native", "scope")], ids="-".join)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@SIZES
async def test_a_second_cancellation_on_top_of_the_first_loses_nothing_at_any_point(
    harness: Harness, variant: Variant, means: Means, size: str, anyio_backend_name: str
) -> None:
    await sweep(Execution(harness, variant, anyio_backend_name, means), size, 40, 6)
