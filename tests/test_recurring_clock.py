"""Recurring publishing on a virtual clock: what needs hours and days to pass (docs/recurring.md).

- Every tick comes in its very moment, for days, also on a day on which the clock on the wall changes.
- Between ticks that are far apart a process asks for the schedule every 30 seconds, and more often near a tick.
- If the owner dies, another process takes over when its lease is over. A tick that fell into that time is published
  late, by ``skip`` too. Ticks that are older than ten seconds are missed: none is published with ``skip``, and exactly
  one, the latest, with ``catch-up``.
- A function that fails is called until the tick is missed. One that does not return counts as failed.
- A new definition publishes nothing for the time before it was entered, but for the last ten seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from typing import Any, Literal

import anyio
import pytest
import trio.testing
from harness import Recorder

from anybus import MemoryBackend, Message, StreamBus, StreamBusOptions
from anybus._ground import clock
from anybus._scheduling.definition import Given
from anybus.abc import TickClaim, TickResult
from anybus.scheduling import Missed

START = datetime(2026, 3, 27, 0, 0, 30, tzinfo=timezone.utc)
MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0
LEASE = 5.0


@pytest.fixture
def anyio_backend() -> Any:
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


@pytest.fixture(autouse=True)
def wall_clock() -> Iterator[None]:
    """The wall time follows the virtual clock."""
    clock.replace_now(lambda: START + timedelta(seconds=anyio.current_time()))
    yield
    clock.replace_now(None)


def seconds(time: datetime | None) -> float:
    assert time is not None
    return (time - START).total_seconds()


class Watched(MemoryBackend):
    """Notes when each tick is published, and how often the schedule is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.published: list[tuple[float, float]] = []
        self.claims = 0

    async def claim_schedule(self, *args: Any, **more: Any) -> TickClaim:
        self.claims += 1
        return await super().claim_schedule(*args, **more)

    async def publish_tick(self, *args: Any, **more: Any) -> TickResult:
        result = await super().publish_tick(*args, **more)
        if result.entry_id is not None:
            self.published.append((seconds(more["tick"]), seconds(result.now)))
        return result

    @property
    def ticks(self) -> list[float]:
        return [tick for tick, _ in self.published]


@pytest.fixture
def backend() -> Watched:
    return Watched()


async def spec_of(topic: str, every: float, missed: Missed = "skip") -> str:
    given = Given("clock", Message(topic), every, None, "UTC", missed, None, "")
    return (await given.checked().load()).spec


async def dead_owner(backend: MemoryBackend, topic: str, every: float, missed: Missed = "skip") -> None:
    """A process that owns the schedule, and is killed at once."""
    claim = await backend.claim_schedule(
        *(topic, "clock", "dead"),
        definition=await spec_of(topic, every, missed),
        generation=None,
        lease=LEASE,
        grace=10.0,
    )
    assert claim.is_owner


async def test_a_daily_schedule_follows_the_wall_over_a_change_of_the_clock(backend: Watched, topic: str) -> None:
    async with StreamBus(backend) as bus:
        given = Message(topic)
        async with bus.schedule("clock", given, cron="30 2 * * *", timezone="Europe/Berlin") as schedule:
            assert seconds(schedule.next_tick) == 1.5 * HOUR - 30
            await anyio.sleep(5 * DAY)
    # 27 and 28 March at 02:30+01, 29 March at the change (03:00+02), then at 02:30+02.
    expected = [1.5 * HOUR, 1.5 * HOUR + DAY, HOUR + 2 * DAY, 0.5 * HOUR + 3 * DAY, 0.5 * HOUR + 4 * DAY]
    assert backend.ticks == [tick - 30 for tick in expected]
    assert all(at - tick < 0.002 for tick, at in backend.published)
    assert backend.claims < 5 * DAY / 30 + 50


@pytest.mark.parametrize("every", [0.1, 1.0, 7.5, MINUTE, 13 * MINUTE])
async def test_every_tick_comes_in_its_moment(every: float, backend: Watched, topic: str) -> None:
    async with StreamBus(backend) as bus, StreamBus(backend) as other:
        async with (
            bus.schedule("clock", Message(topic), every=every),
            other.schedule("clock", Message(topic), every=every),
        ):
            await anyio.sleep(50 * every + every / 2)
    assert len(backend.ticks) in (50, 51)
    assert all(later - earlier == pytest.approx(every) for earlier, later in pairwise(backend.ticks))
    assert all(0 <= at - tick < 0.002 for tick, at in backend.published)


async def test_a_tick_of_the_time_of_a_takeover_is_published_late(backend: Watched, topic: str) -> None:
    await anyio.sleep(27.0)
    await dead_owner(backend, topic, MINUTE)
    async with StreamBus(backend) as bus, bus.schedule("clock", Message(topic), every=MINUTE):
        await anyio.sleep(4.9)
        assert backend.ticks == [], "it is due since two seconds, and another process has the lease"
        await anyio.sleep(0.2)
        assert backend.ticks == [30.0]
        await anyio.sleep(MINUTE)
    assert backend.ticks == [30.0, 90.0]
    assert backend.published[0][1] == pytest.approx(27.0 + LEASE, abs=0.02)


async def test_no_tick_is_lost_with_skip_if_the_owner_of_a_fast_schedule_dies(backend: Watched, topic: str) -> None:
    await dead_owner(backend, topic, 1.0)
    async with StreamBus(backend) as bus, bus.schedule("clock", Message(topic), every=1.0):
        await anyio.sleep(20.5)
    assert backend.ticks == [float(number) for number in range(1, 21)]


@pytest.mark.parametrize("missed", ["skip", "catch-up"])
async def test_after_an_hour_without_any_process(
    missed: Literal["skip", "catch-up"], backend: Watched, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with StreamBus(backend) as bus:
        async with bus.schedule("clock", Message(topic), every=MINUTE, missed=missed):
            await anyio.sleep(2 * MINUTE)
        assert backend.ticks == [30.0, 90.0]
        await anyio.sleep(HOUR - 1)
        back = anyio.current_time()
        with caplog.at_level(logging.WARNING, "anybus"):
            async with bus.schedule("clock", Message(topic), every=MINUTE, missed=missed):
                await anyio.sleep(2 * MINUTE)
    latest = 60.0 * ((back - 30) // 60) + 30
    assert back - latest > 10
    caught_up = [latest] if missed == "catch-up" else []
    assert backend.ticks[2:] == [*caught_up, latest + MINUTE, latest + 2 * MINUTE]
    said = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(said) == (missed == "skip"), "it is said once"


async def test_catching_up_many_ticks_of_a_cron_schedule_publishes_one(backend: Watched, topic: str) -> None:
    async with StreamBus(backend) as bus:
        async with bus.schedule("clock", Message(topic), cron="*/5 * * * *", missed="catch-up"):
            await anyio.sleep(MINUTE)
        await anyio.sleep(3 * DAY)
        async with bus.schedule("clock", Message(topic), cron="*/5 * * * *", missed="catch-up"):
            await anyio.sleep(MINUTE)
    assert len(backend.ticks) == 1
    assert 0 <= anyio.current_time() - MINUTE - backend.ticks[0] < 5 * MINUTE


async def test_a_process_that_sleeps_wakes_up_to_missed_ticks(backend: Watched, topic: str) -> None:
    """A laptop's lid: the wall time is later, and the loop's clock has stood still."""
    async with StreamBus(backend) as bus, bus.schedule("clock", Message(topic), every=MINUTE):
        await anyio.sleep(31.0)
        clock.replace_now(lambda: START + timedelta(seconds=anyio.current_time() + HOUR))
        await anyio.sleep(3 * MINUTE)
    assert backend.ticks[0] == 30.0
    assert all(tick > HOUR for tick in backend.ticks[1:])
    assert all(at - tick <= 10 for tick, at in backend.published)


async def test_a_function_that_fails_is_called_until_the_tick_is_missed(backend: Watched, topic: str) -> None:
    called: list[float] = []

    def make(tick: datetime) -> Message:
        called.append(seconds(tick))
        if seconds(tick) == 30.0:
            raise LookupError("never this one")
        return Message(topic)

    recorder = Recorder()
    async with StreamBus(backend, StreamBusOptions(observer=recorder)) as bus:
        async with bus.schedule("clock", make, every=MINUTE, topic=topic):
            await anyio.sleep(2 * MINUTE)
    assert backend.ticks == [90.0]
    assert 4 <= called.count(30.0) <= 12
    assert len(recorder.of("on_error", "publish")) == called.count(30.0)


async def test_a_function_that_does_not_return_counts_as_failed(backend: Watched, topic: str) -> None:
    async def make(tick: datetime) -> Message:
        if seconds(tick) == 30.0:
            await anyio.sleep_forever()
        return Message(topic)

    recorder = Recorder()
    async with StreamBus(backend, StreamBusOptions(observer=recorder)) as bus:
        async with bus.schedule("clock", make, every=MINUTE, topic=topic):
            await anyio.sleep(2 * MINUTE)
    assert backend.ticks == [90.0]
    assert [type(event.error) for event in recorder.of("on_error", "publish")] == [TimeoutError]


@pytest.mark.parametrize("missed", ["skip", "catch-up"])
async def test_a_new_definition_begins_when_it_is_entered(
    missed: Literal["skip", "catch-up"], backend: Watched, topic: str
) -> None:
    async with StreamBus(backend) as bus:
        async with bus.schedule("clock", Message(topic), every=HOUR, missed=missed):
            await anyio.sleep(DAY)
        before = len(backend.ticks)
        assert before == 24
        entered = anyio.current_time()
        async with bus.schedule("clock", Message(topic), every=2.0, missed=missed):
            await anyio.sleep(4.1)
    assert all(tick > entered - 10.0 for tick in backend.ticks[before:])
    assert len(backend.ticks) - before == 7
