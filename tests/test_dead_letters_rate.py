"""``replay(rate=...)``: at most so many messages per second, on a virtual clock.

Specification: docs/dead-letters.md. A replay goes in steps, at most 20 in a second, each of so many messages that the
rate holds; the first goes at once. What was late is not made up for. A dry run does not wait.
"""

from __future__ import annotations

from typing import Any

import anyio
import pytest
import trio.testing
from letters import bury

from anybus import MemoryBackend, ReplayProgress, ReplayReport, StreamBus

now = anyio.current_time


@pytest.fixture
def anyio_backend() -> Any:
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


async def times_of(topic: str, count: int, rate: float | None, **options: Any) -> list[float]:
    """When each of so many went back, in seconds from the beginning."""
    times: list[float] = []
    async with StreamBus(MemoryBackend()) as bus:
        await bury(bus.backend, topic, *map(str, range(count)))
        began = now()

        def note(_: ReplayProgress) -> None:
            times.append(now() - began)

        report = await bus.dead_letters(topic).replay(rate=rate, on_progress=note, **options)
        assert report.replayed == count
    return times


@pytest.mark.parametrize("rate", [0.001, 0.5, 1, 3.0, 20])
async def test_a_low_rate_sends_one_by_one(topic: str, rate: float) -> None:
    assert await times_of(topic, 5, rate) == pytest.approx([number / rate for number in range(5)])


@pytest.mark.parametrize("rate", [39, 40, 100, 1000, 2345.6, 1_000_000])
async def test_a_high_rate_goes_in_steps_and_holds_over_every_second(topic: str, rate: float) -> None:
    count = 1000
    times = await times_of(topic, count, rate)
    step = times.count(times[0])
    assert step == max(1, min(100, int(rate / 20)))
    for number, time in enumerate(times):
        assert time == pytest.approx(number // step * step / rate)
    for number in range(count - step):
        within = sum(1 for time in times[number:] if time < times[number] + 1 - 1e-9)
        assert within <= rate + step


async def test_the_rate_holds_across_pages(topic: str) -> None:
    times = await times_of(topic, 350, 100)
    assert times[-1] == pytest.approx(345 / 100)


async def test_without_a_rate_nothing_waits(topic: str) -> None:
    assert set(await times_of(topic, 350, None)) == {0.0}


async def test_a_dry_run_does_not_wait(topic: str) -> None:
    assert set(await times_of(topic, 350, 0.1, dry_run=True)) == {0.0}


async def test_chosen_ones_go_at_the_rate_too(topic: str) -> None:
    async with StreamBus(MemoryBackend()) as bus:
        ids = await bury(bus.backend, topic, *"abcde")
        began = now()
        assert await bus.dead_letters(topic).replay(ids, rate=2) == ReplayReport(replayed=5)
        assert now() - began == pytest.approx(2.0)


async def test_what_was_late_is_not_made_up_for(topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MemoryBackend()
    move_entries = backend.move_entries
    times: list[float] = []

    async def slow(*args: Any) -> Any:
        times.append(now())
        if len(times) == 2:
            await anyio.sleep(10)
        return await move_entries(*args)

    monkeypatch.setattr(backend, "move_entries", slow)
    async with StreamBus(backend) as bus:
        await bury(backend, topic, *"abcde")
        await bus.dead_letters(topic).replay(rate=1)
    assert times == pytest.approx([0, 1, 11, 12, 13])


async def test_it_can_be_cancelled_while_it_waits(topic: str) -> None:
    async with StreamBus(MemoryBackend()) as bus:
        await bury(bus.backend, topic, *"abcde")
        with anyio.move_on_after(2.5) as scope:
            await bus.dead_letters(topic).replay(rate=1)
        assert scope.cancelled_caught
        assert now() == pytest.approx(2.5)
        assert [letter.message.uid async for letter in bus.dead_letters(topic) if letter.message] == ["d", "e"]
