"""``purge``: dead letters are deleted for good.

Specification: docs/dead-letters.md. All that are meant, or the chosen ones among them, up to the last one that was there
at the beginning. It returns how many this very call deleted, and touches nothing else. A dry run only counts.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import anyio
import pytest
from harness import SOON, Harness, nothing_pending, quick, uids, until
from letters import AT, bury, give_up_malformed, left, minutes

from anybus import Delivery, Message, ReplayReport, StreamBus, SubscriptionConfig, ValidationError
from anybus._dead_letters.pages import ENTRY_BYTES

MANY = 620
"""More than several pages of them."""


@pytest.fixture
async def bus(harness: Harness) -> AsyncGenerator[StreamBus, None]:
    async with StreamBus(harness.make_backend(), quick()) as made:
        yield made


async def test_all_of_them(harness: Harness, bus: StreamBus, topic: str) -> None:
    await bus.publish(Message(topic, uid="alive"))
    await bury(bus.backend, topic, *(f"m{number}" for number in range(MANY)))
    letters = bus.dead_letters(topic)
    assert await letters.purge() == MANY
    assert await harness.entries(f"{topic}.dead") == []
    assert uids(await harness.entries(topic)) == ["alive"]
    assert await letters.purge() == 0
    await bury(bus.backend, topic, "next")
    assert await left(letters) == ["next"]


async def test_only_those_that_the_filter_names(bus: StreamBus, topic: str) -> None:
    await bury(bus.backend, topic, "a", "b", group="billing")
    await bury(bus.backend, topic, "c", group="mail")
    await bury(bus.backend, topic, "d", code="rejected", at=AT + minutes(1))
    assert await bus.dead_letters(topic, group="mail").purge() == 1
    assert await bus.dead_letters(topic, key="b").purge() == 1
    assert await bus.dead_letters(topic, until=AT + minutes(1), code="retries").purge() == 1
    assert await left(bus.dead_letters(topic)) == ["d"]


async def test_only_the_chosen_ones_among_those_that_are_meant(bus: StreamBus, topic: str) -> None:
    ids = await bury(bus.backend, topic, "a", "b", "c", group="billing")
    ids += await bury(bus.backend, topic, "d", group="mail")
    letters = bus.dead_letters(topic, group="billing")
    [first] = (await letters.page(limit=1)).letters
    assert await letters.purge([first, ids[1], ids[1], ids[3], "999-0", "never"]) == 2
    assert await letters.purge([]) == 0
    assert await left(bus.dead_letters(topic)) == ["c", "d"]


async def test_of_a_shared_dead_letter_topic_only_the_topics_own(bus: StreamBus, topic: str) -> None:
    shared, other = f"{topic}.all", f"{topic}.other"
    await bury(bus.backend, topic, "a", dead_letter_topic=shared)
    await bury(bus.backend, other, "b", dead_letter_topic=shared)
    assert await bus.dead_letters(topic, dead_letter_topic=shared).purge() == 1
    assert await left(bus.dead_letters(other, dead_letter_topic=shared)) == ["b"]


async def test_a_dry_run_counts_and_changes_nothing(harness: Harness, bus: StreamBus, topic: str) -> None:
    ids = await bury(bus.backend, topic, "a", "b", "c")
    before = await harness.entries(f"{topic}.dead")
    assert await bus.dead_letters(topic).purge(dry_run=True) == 3
    assert await bus.dead_letters(topic).purge([ids[0], "999-0"], dry_run=True) == 1
    assert await harness.entries(f"{topic}.dead") == before


async def test_what_cannot_be_decoded_or_is_too_large_goes_like_the_others(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    await give_up_malformed(harness, topic, {"message": bytes(ENTRY_BYTES + 1)}, {"x": b"1"})
    await harness.append_raw(f"{topic}.dead", {"message": bytes(ENTRY_BYTES + 1)})
    await harness.append_raw(f"{topic}.dead", {"y": b""})
    await bury(bus.backend, topic, "a", payload=bytes(5 * 1024 * 1024))
    assert await bus.dead_letters(topic, code="malformed").purge() == 2
    assert await bus.dead_letters(topic).purge() == 3
    assert await harness.entries(f"{topic}.dead") == []


async def test_two_at_once_and_a_replay_count_each_one_once(harness: Harness, bus: StreamBus, topic: str) -> None:
    await bury(bus.backend, topic, *(f"m{number}" for number in range(MANY)))
    counts: list[int] = []
    reports: list[ReplayReport] = []

    async def purge(one: StreamBus) -> None:
        counts.append(await one.dead_letters(topic).purge())

    async def replay(one: StreamBus) -> None:
        reports.append(await one.dead_letters(topic).replay())

    async with StreamBus(harness.make_backend()) as other, anyio.create_task_group() as tasks:
        tasks.start_soon(purge, bus)
        tasks.start_soon(replay, other)
        tasks.start_soon(purge, other)
    assert await harness.entries(f"{topic}.dead") == []
    assert sum(counts) + reports[0].replayed == MANY
    assert len(await harness.entries(topic)) == reports[0].replayed


async def test_what_comes_meanwhile_is_left(harness: Harness, bus: StreamBus, topic: str) -> None:
    await bury(bus.backend, topic, *(f"m{number}" for number in range(MANY)))
    letters = bus.dead_letters(topic)
    chosen = [letter async for letter in letters]
    await bury(bus.backend, topic, "later")
    assert await letters.purge(chosen) == MANY
    assert await left(letters) == ["later"]


async def test_a_group_that_has_it_pending_learns_that_it_is_gone(harness: Harness, bus: StreamBus, topic: str) -> None:
    dead = f"{topic}.dead"
    await bury(bus.backend, topic, "a")
    await bus.backend.create_group(dead, "clerk", "0")
    await bus.backend.read_new(dead, "clerk", "crashed", count=1, timeout=0)
    await harness.age(dead, "clerk")
    assert await bus.dead_letters(topic).purge() == 1

    async def handler(delivery: Delivery) -> None:
        raise AssertionError("there is nothing to handle")

    config = SubscriptionConfig(dead, "clerk", dead_letter_topic=f"{dead}.dead")
    with anyio.fail_after(SOON):
        async with bus.subscribe(config, handler) as subscription:
            await nothing_pending(harness, dead, "clerk")
            await until(lambda: subscription.statistics().held == 0)


@pytest.mark.parametrize("letters", ["1-0", [None], 1])
async def test_what_makes_no_sense_is_refused_by_name(bus: StreamBus, topic: str, letters: object) -> None:
    await bury(bus.backend, topic, "a")
    with pytest.raises(ValidationError, match=r"^letters must be"):
        await bus.dead_letters(topic).purge(letters)  # type: ignore[arg-type]
    assert await left(bus.dead_letters(topic)) == ["a"]
