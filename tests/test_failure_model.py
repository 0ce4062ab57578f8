"""Retry, crash and dead letter against a simple model, by Hypothesis.

Every message has a script: how its handlings end, one after the other; when the script is over, or one has succeeded, they succeed. A handling
may return, raise, ask for a retry, reject, release, or kill its process. A killed process is simulated without mercy:
from that moment on none of its calls reaches the backend, and it has settled nothing; another one is started.

Two properties, on memory under a virtual clock, and with fewer examples on a server:

- *One at a time* (``max_in_flight=1``): what becomes of each message, how often it is handled, and with which code it is
  given up on, is exactly what the model predicts.
- *Side by side*: every message ends handled or as a dead letter, never both and never neither. It fails at most
  ``max_retry + 1`` times, its attempts are counted in order, its code fits its last outcome; and a message that never kills
  its process is never given up on because of others that do.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
import trio.testing
from harness import Harness, MemoryHarness, StepByStep, new_topic
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from servers import RedisHarness, RunningServer

from anybus import (
    BackendError,
    Delivery,
    EventBusError,
    Message,
    Observer,
    Reject,
    Retry,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
)
from anybus.abc import BusEvent, FetchedEntry, TransferItem

OK, FAIL, RETRY, REJECT, RELEASE, CRASH = "ok", "fail", "retry", "reject", "release", "crash"
Script = tuple[str, ...]


@dataclass(frozen=True)
class Fate:
    """What becomes of a message: the code of its dead letter (None = it is handled), and the outcomes until then."""

    code: str | None
    outcomes: Script


def predict(script: Script, max_retry: int, max_deliveries: int) -> Fate:
    """The model."""
    failures = deliveries = 0
    outcomes: list[str] = []
    for outcome in itertools.chain(script, itertools.repeat(OK)):
        deliveries += 1
        if deliveries > max_deliveries:
            return Fate("deliveries", tuple(outcomes))
        outcomes.append(outcome)
        if outcome == OK:
            break
        if outcome == REJECT:
            return Fate("rejected", tuple(outcomes))
        if outcome == RELEASE:
            deliveries -= 1
        elif outcome in (FAIL, RETRY):
            failures += 1
            deliveries = 0  # its retry is another entry
            if failures > max_retry:
                return Fate("retries", tuple(outcomes))
    return Fate(None, tuple(outcomes))


class Mortal(StepByStep):
    """What a process has of a backend: when the process is dead, nothing of it gets through."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.is_dead = False

    async def __aenter__(self) -> Mortal:  # noqa: PYI034 - the one backend inside outlives every process
        return self

    async def __aexit__(self, *error: object) -> bool | None:
        return None

    def _check(self) -> None:
        if self.is_dead:
            raise BackendError("the process is dead", may_have_happened=False, can_pass=True)

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        self._check()
        return await super().read_new(stream, group, consumer, count=count, timeout=timeout)

    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        self._check()
        return await super().reclaim_idle(stream, group, consumer, min_idle=min_idle, count=count)

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        self._check()
        return await super().ack_many(stream, group, message_ids, consumer=consumer)

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[list[str] | EventBusError | None]:
        self._check()
        return await super().transfer_many(stream, group, consumer, items)

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        self._check()
        return await super().renew(stream, group, consumer, message_ids)

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        self._check()
        await super().release(stream, group, consumer, message_ids)

    async def forget_consumer(self, stream: str, group: str, consumer: str) -> None:
        if not self.is_dead:
            await super().forget_consumer(stream, group, consumer)


class Silent(Observer):
    def on_error(self, event: BusEvent) -> None:
        """What fails here is what the test does."""


@dataclass
class World:
    """Messages with their scripts, and processes that handle them one after the other."""

    harness: Harness
    scripts: Sequence[Script]
    max_retry: int
    max_deliveries: int
    max_in_flight: int
    lease: float
    outcomes: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    attempts: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    topic: str = field(default_factory=new_topic)

    async def run(self) -> dict[str, tuple[str | None, int]]:
        """Until every message is settled; of each, by key: the code of its dead letter and the number of those."""
        backend = self.harness.make_backend()
        async with backend:
            await backend.create_group(self.topic, "g", "0")
            for number, _ in enumerate(self.scripts):
                await backend.publish(self.topic, Message(self.topic, key=str(number)))
            while not await self._life(Mortal(backend)):
                pass
        dead = [m for _, m, _ in await self.harness.entries(f"{self.topic}.dead") if m is not None]
        codes: dict[str, tuple[str | None, int]] = {str(number): (None, 0) for number, _ in enumerate(self.scripts)}
        for letter in dead:
            codes[letter.key] = (letter.headers["dead-letter-code"], codes[letter.key][1] + 1)
        return codes

    async def _life(self, mine: Mortal) -> bool:
        """One process, until it is killed (false), or nothing is left to do."""
        options = StreamBusOptions(
            block_timeout=self.lease / 4,
            claim_idle_timeout=self.lease,
            reclaim_interval=self.lease / 10,
            ack_flush_interval=0,
            cleanup_timeout=self.lease / 4,
            observer=Silent(),
        )
        config = SubscriptionConfig(
            self.topic,
            "g",
            max_in_flight=self.max_in_flight,
            max_pending_acks=self.max_in_flight,
            max_retry=self.max_retry,
            max_deliveries=self.max_deliveries,
            retry_backoff=0.0,
            dead_letter_topic=f"{self.topic}.dead",
        )
        killed = anyio.Event()

        def kill() -> None:
            mine.is_dead = True
            killed.set()

        async def handler(delivery: Delivery) -> None:
            await self._handle(delivery, kill)

        with anyio.CancelScope() as scope:
            async with StreamBus(mine, options) as bus, bus.subscribe(config, handler) as subscription:
                async with anyio.create_task_group() as tasks:

                    async def watch() -> None:
                        await killed.wait()
                        scope.cancel()

                    tasks.start_soon(watch)
                    while not await self._is_settled() or subscription.statistics().held:  # noqa: ASYNC110
                        await anyio.sleep(self.lease / 10)
                    tasks.cancel_scope.cancel()
        return not killed.is_set()

    async def _handle(self, delivery: Delivery, kill: Callable[[], None]) -> None:
        key = delivery.message.key
        script = self.scripts[int(key)]
        done = self.outcomes[key]
        # Whoever handled it once, and was killed before the server had the acknowledgement, can do it again.
        outcome = script[len(done)] if len(done) < len(script) and OK not in done else OK
        done.append(outcome)
        self.attempts[key].append(delivery.state.attempt)
        await anyio.lowlevel.checkpoint()
        if outcome == FAIL:
            raise RuntimeError("x")
        if outcome == RETRY:
            raise Retry("x")
        if outcome == REJECT:
            raise Reject("x")
        if outcome == RELEASE:
            await delivery.release()
        if outcome == CRASH:
            kill()
            await anyio.sleep_forever()

    async def _is_settled(self) -> bool:
        """Every message has had its last outcome, and nothing is left anywhere."""
        settled = await self.harness.entries(f"{self.topic}.dead")
        ended = {message.key for _, message, _ in settled if message is not None}
        ended |= {key for key, outcomes in self.outcomes.items() if outcomes[-1] == OK}
        if len(ended) < len(self.scripts):
            return False
        retries = f"anybus:{{{self.topic}}}:retry:g"
        return not await self.harness.pending(self.topic, "g") and not await self.harness.pending(retries, "g")


outcomes = st.sampled_from([OK, FAIL, RETRY, REJECT, RELEASE, CRASH])
scripts = st.lists(outcomes, max_size=8).map(tuple)
killers = st.integers(min_value=1, max_value=12).map(lambda times: (CRASH,) * times)
worlds = st.tuples(
    st.lists(scripts | killers, min_size=1, max_size=5),
    st.integers(min_value=0, max_value=3),
    st.integers(min_value=4, max_value=6),
)

small_worlds = st.tuples(
    st.lists(st.lists(outcomes, max_size=4).map(tuple), min_size=1, max_size=3),
    st.integers(min_value=0, max_value=2),
    st.just(4),
)
"""On a server every crash costs a lease, in real time."""


async def exactly(world: World) -> None:
    codes = await world.run()
    for number, script in enumerate(world.scripts):
        fate = predict(script, world.max_retry, world.max_deliveries)
        key = str(number)
        assert codes[key] == (fate.code, 0 if fate.code is None else 1), (script, fate)
        assert tuple(world.outcomes[key]) == fate.outcomes


async def lawfully(world: World) -> None:
    codes = await world.run()
    for number, script in enumerate(world.scripts):
        key = str(number)
        code, letters = codes[key]
        seen, attempts = world.outcomes[key], world.attempts[key]
        assert letters == (0 if code is None else 1)
        handled = OK in seen
        assert handled != (code is not None), "handled or dead-lettered: never both, never neither"
        assert attempts == sorted(attempts)
        assert set(attempts) == set(range(1, attempts[-1] + 1)), "attempts are counted one by one"
        assert attempts[-1] <= world.max_retry + 1
        if code == "retries":
            assert (seen[-1] in (FAIL, RETRY), attempts[-1]) == (True, world.max_retry + 1)
        elif code == "rejected":
            assert seen[-1] == REJECT
        elif code == "deliveries":
            # Three times it may have been a neighbour's fault. From then on it was alone.
            assert seen.count(CRASH) >= world.max_deliveries - 3
        if CRASH not in script:
            assert code != "deliveries", "a message that kills nobody is never given up on for a crash"


def virtually(check: Callable[[World], Any], world: World) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)
    anyio.run(check, world, backend="trio", backend_options={"clock": clock})


@settings(max_examples=150, deadline=None)
@given(worlds)
@example(([(CRASH,) * 12, (OK,), (FAIL, CRASH, OK)], 1, 4))
@example(([(RELEASE, CRASH) * 4, (FAIL,) * 8], 3, 4))
def test_one_at_a_time_everything_is_as_predicted(world: tuple[list[Script], int, int]) -> None:
    made, max_retry, max_deliveries = world
    virtually(exactly, World(MemoryHarness(), made, max_retry, max_deliveries, 1, 60.0))


@settings(max_examples=150, deadline=None)
@given(worlds)
@example(([(CRASH,) * 12, (OK,), (OK,), (CRASH,) * 12, (OK,)], 1, 4))
def test_side_by_side_nothing_is_lost_and_nobody_is_taken_along(world: tuple[list[Script], int, int]) -> None:
    made, max_retry, max_deliveries = world
    virtually(lawfully, World(MemoryHarness(), made, max_retry, max_deliveries, 4, 60.0))


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world=small_worlds)
@example(world=([(CRASH,) * 5, (OK,), (FAIL, CRASH, OK), (REJECT,), (RELEASE, RETRY, OK)], 1, 4))
def test_the_same_on_a_server(server: RunningServer, loop: str, world: tuple[list[Script], int, int]) -> None:
    made, max_retry, max_deliveries = world
    for check, max_in_flight in ((exactly, 1), (lawfully, 4)):
        simulated = World(RedisHarness(server), made, max_retry, max_deliveries, max_in_flight, 0.6)
        anyio.run(check, simulated, backend=loop)
