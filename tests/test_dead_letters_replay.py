"""``replay``: dead letters go back to where they came from.

Specification: docs/dead-letters.md. To the topic, where every group sees them, or to the group that gave them up, by
its own retry stream. What goes back is what it was before it died: uid, key, payload, headers, without the bus's own. Each is
appended and taken out of the dead letters in one step, so that a replay that ends in its middle (cancelled, failed,
raised out of by ``on_progress``), and two at once, lose and double nothing. What dies again meanwhile is not replayed
again. What cannot go back stays, and is told with its error. A dry run changes nothing.

(Killed processes: ``test_dead_letters_kill.py``. The rate: ``test_dead_letters_rate.py``.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from harness import QUICK, SOON, Harness, Recorder, nothing_pending, quick, uids, until
from letters import AT, bury, give_up_malformed, left, minutes, take
from servers import RunningServer

from anybus import (
    BackendError,
    ClosedError,
    DeadLetters,
    Delivery,
    EventBusError,
    GroupLostError,
    LeaseLostError,
    Message,
    Reject,
    ReplayProgress,
    ReplayReport,
    StreamBus,
    SubscriptionConfig,
    ValidationError,
    retry_stream,
)
from anybus._dead_letters.pages import ENTRY_BYTES
from anybus.abc import DeadLetterStore, Move
from anybus.backends.redis import RedisBackend

MANY = 230
"""More than two pages of them."""


@pytest.fixture
async def bus(harness: Harness) -> AsyncGenerator[StreamBus, None]:
    async with StreamBus(harness.make_backend(), quick()) as made:
        yield made


async def make_group(bus: StreamBus, topic: str, group: str) -> None:
    """As its first subscription does."""
    async with bus.deliveries(SubscriptionConfig(topic, group, group_start_id="0")):
        pass


# --- where they go, and as what


async def test_to_the_topic_every_group_gets_the_message_as_it_was(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    async def reject(delivery: Delivery) -> None:
        raise Reject("no such customer")

    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tenant": "acme"}
    message = Message(topic, b"\x00\xff", key="42", kind="K", source="shop", headers=trace, correlation_uid="c")
    async with bus.subscribe(SubscriptionConfig(topic, "billing"), reject) as subscription:
        await bus.publish(message)
        await until(lambda: subscription.statistics().dead_lettered == 1)
    await take(bus, topic, "mail", 1)

    letters = bus.dead_letters(topic)
    assert await letters.replay() == ReplayReport(replayed=1)
    assert await left(letters) == []
    for group in ("billing", "mail"):
        [delivery] = await take(bus, topic, group, 1)
        assert delivery.message == message
        assert (delivery.state.attempt, delivery.state.deliveries) == (1, 1)
    await nothing_pending(harness, topic, "billing", "mail")


async def test_to_the_group_only_the_group_that_gave_it_up_gets_it(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    async def fail(delivery: Delivery) -> None:
        raise ValueError("no")

    config = SubscriptionConfig(topic, "billing", max_retry=1, retry_backoff=QUICK)
    message = Message(topic, b"x", headers={"tenant": "acme"})
    async with bus.subscribe(config, fail) as subscription:
        first_id = await bus.publish(message)
        await until(lambda: subscription.statistics().dead_lettered == 1)
    await take(bus, topic, "mail", 1)

    letters = bus.dead_letters(topic)
    assert await letters.replay(to="group") == ReplayReport(replayed=1)
    assert await left(letters) == []
    assert len(await harness.entries(topic)) == 1

    attempts: list[int] = []

    async def fail_again(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        assert delivery.message.replace(headers={"tenant": "acme"}) == message
        raise ValueError("no")

    async with bus.subscribe(config, fail_again) as subscription:
        await until(lambda: subscription.statistics().dead_lettered == 1)
    assert attempts == [1, 2]
    # Its next dead letter names the topic's entry again.
    [letter] = [letter async for letter in letters]
    assert (letter.first_id, letter.topic, letter.group, letter.message) == (first_id, topic, "billing", message)


async def test_to_a_group_that_does_not_run_it_waits_for_its_next_member(bus: StreamBus, topic: str) -> None:
    await make_group(bus, topic, "billing")
    await bury(bus.backend, topic, "a", "b")
    assert await bus.dead_letters(topic).replay(to="group") == ReplayReport(replayed=2)
    assert {delivery.message.uid for delivery in await take(bus, topic, "billing", 2)} == {"a", "b"}


async def test_the_headers_of_the_bus_are_taken_off_and_no_others(harness: Harness, bus: StreamBus, topic: str) -> None:
    await make_group(bus, topic, "billing")
    await bury(bus.backend, topic, "a", "b")
    letters = [letter async for letter in bus.dead_letters(topic)]
    await bus.dead_letters(topic).replay(letters[:1])
    await bus.dead_letters(topic).replay(letters[1:], to="group")
    [(_, to_topic, _)] = await harness.entries(topic)
    [(_, to_group, _)] = await harness.entries(retry_stream(topic, "billing"))
    assert to_topic is not None
    assert to_group is not None
    assert to_topic.headers == {"tenant": "acme"}
    # The group's own stream has to know which entry of the topic this was.
    assert to_group.headers == {"tenant": "acme", "retry-first-id": "2-0"}
    assert to_topic.topic == to_group.topic == topic


async def test_they_go_back_in_the_order_in_which_they_died(harness: Harness, bus: StreamBus, topic: str) -> None:
    names = [f"m{number}" for number in range(MANY)]
    await bury(bus.backend, topic, *names)
    assert await bus.dead_letters(topic).replay() == ReplayReport(replayed=MANY)
    assert uids(await harness.entries(topic)) == names
    assert await harness.entries(f"{topic}.dead") == []


async def test_what_dies_again_meanwhile_is_not_replayed_again(harness: Harness, bus: StreamBus, topic: str) -> None:
    async def reject(delivery: Delivery) -> None:
        raise Reject("still not")

    await bury(bus.backend, topic, *(f"m{number}" for number in range(MANY)))
    letters = bus.dead_letters(topic)
    async with bus.subscribe(SubscriptionConfig(topic, "billing", max_in_flight=64), reject) as subscription:
        with anyio.fail_after(SOON):
            report = await letters.replay(rate=2000)
        assert report == ReplayReport(replayed=MANY)
        await until(lambda: subscription.statistics().dead_lettered == MANY)
    assert len(await left(letters)) == MANY
    assert len(await harness.entries(topic)) == MANY


async def test_from_a_shared_dead_letter_topic_everything_goes_to_its_own(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    shared, other = f"{topic}.all", f"{topic}.other"
    await bury(bus.backend, topic, "a", dead_letter_topic=shared)
    await bury(bus.backend, other, "b", dead_letter_topic=shared)
    await bus.dead_letters(topic, dead_letter_topic=shared).replay()
    assert uids(await harness.entries(topic)) == ["a"]
    assert uids(await harness.entries(shared)) == ["b"]
    await bus.dead_letters(other, dead_letter_topic=shared).replay()
    assert uids(await harness.entries(other)) == ["b"]


# --- which of them


async def test_only_those_that_the_filter_names(harness: Harness, bus: StreamBus, topic: str) -> None:
    await bury(bus.backend, topic, "a", "b", group="billing")
    await bury(bus.backend, topic, "a2", group="mail", at=AT + minutes(1))
    await bury(bus.backend, topic, "c", code="rejected", at=AT + minutes(2))
    assert await bus.dead_letters(topic, group="mail").replay() == ReplayReport(replayed=1)
    assert await bus.dead_letters(topic, key="b").replay() == ReplayReport(replayed=1)
    assert await bus.dead_letters(topic, since=AT + minutes(2)).replay() == ReplayReport(replayed=1)
    assert uids(await harness.entries(topic)) == ["a2", "b", "c"]
    assert await left(bus.dead_letters(topic)) == ["a"]


async def test_only_the_chosen_ones_in_the_order_in_which_they_were_chosen(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    names = [f"m{number}" for number in range(MANY)]
    ids = await bury(bus.backend, topic, *names)
    letters = bus.dead_letters(topic)
    third = (await letters.page(limit=3)).letters[2]
    report = await letters.replay([ids[200], third, ids[0], ids[200]])
    assert report == ReplayReport(replayed=3)
    assert uids(await harness.entries(topic)) == ["m200", "m2", "m0"]
    most = [entry_id for entry_id in reversed(ids) if entry_id not in (ids[200], ids[2])]
    assert await letters.replay(iter(most)) == ReplayReport(replayed=MANY - 3, gone=1)
    assert await left(letters) == []


async def test_none_chosen_are_none(bus: StreamBus, topic: str) -> None:
    await bury(bus.backend, topic, "a")
    assert await bus.dead_letters(topic).replay([]) == ReplayReport()
    assert await left(bus.dead_letters(topic)) == ["a"]


async def test_chosen_ones_that_are_gone_or_not_meant_are_left_alone(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    [first] = await bury(bus.backend, topic, "a", group="mail")
    [second] = await bury(bus.backend, topic, "b", group="billing")
    await harness.delete_entry(f"{topic}.dead", second)
    report = await bus.dead_letters(topic, group="billing").replay([first, second, "999-0", "never", "", "9" * 5000])
    assert report == ReplayReport(gone=6)
    assert await left(bus.dead_letters(topic)) == ["a"]
    assert await harness.entries(topic) == []


# --- what cannot go back


async def test_from_a_group_that_is_gone_nothing_goes_to_it_and_the_others_do(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    await make_group(bus, topic, "billing")
    await bury(bus.backend, topic, "a", group="gone")
    await bury(bus.backend, topic, "b", group="billing")
    await bus.publish(Message(f"{topic}.dead", uid="c"))
    told: list[ReplayProgress] = []
    report = await bus.dead_letters(topic).replay(to="group", on_progress=told.append)
    assert report == ReplayReport(replayed=1, failed=2)
    gone, replayed, unknown = told
    assert isinstance(gone.error, GroupLostError)
    assert "'gone'" in str(gone.error)
    assert (replayed.outcome, replayed.error) == ("replayed", None)
    assert "does not say which group" in str(unknown.error)
    assert await left(bus.dead_letters(topic)) == ["a", "c"]
    assert await harness.entries(retry_stream(topic, "gone")) == []
    # The topic takes both.
    assert await bus.dead_letters(topic).replay() == ReplayReport(replayed=2)
    assert uids(await harness.entries(topic)) == ["a", "c"]


async def test_a_letter_with_an_empty_group_says_none_and_holds_up_no_other(bus: StreamBus, topic: str) -> None:
    await make_group(bus, topic, "billing")
    await bury(bus.backend, topic, "a", group="")
    await bury(bus.backend, topic, "b", group="billing")
    told: list[ReplayProgress] = []
    report = await bus.dead_letters(topic).replay(to="group", on_progress=told.append)
    assert report == ReplayReport(replayed=1, failed=1)
    assert "does not say which group" in str(told[0].error)
    assert await left(bus.dead_letters(topic)) == ["a"]


async def test_what_cannot_be_decoded_stays(harness: Harness, bus: StreamBus, topic: str) -> None:
    await harness.append_raw(f"{topic}.dead", {"message": b"{not json", "raw:x": b"1"})
    await bury(bus.backend, topic, "a")
    told: list[ReplayProgress] = []
    assert await bus.dead_letters(topic).replay(on_progress=told.append) == ReplayReport(replayed=1, failed=1)
    assert isinstance(told[0].error, ValidationError)
    assert "cannot be decoded" in str(told[0].error)
    assert len(await harness.entries(f"{topic}.dead")) == 1
    assert uids(await harness.entries(topic)) == ["a"]


async def test_what_was_malformed_goes_back_with_its_raw_fields_as_they_were(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    fields = {"message": b"{not json", "extra": b"\x00\xff", "raw:x": b""}
    await give_up_malformed(harness, topic, fields)
    before = await harness.entries(topic)
    assert await bus.dead_letters(topic).replay() == ReplayReport(replayed=1)
    after = await harness.entries(topic)
    assert [(message, raw) for _, message, raw in after] == [(message, raw) for _, message, raw in before * 2]
    assert await harness.entries(f"{topic}.dead") == []


async def test_what_was_malformed_goes_back_to_its_group_too_and_dies_again(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    fields = {"message": b"{not json", "extra": b"\x00\xff"}
    await give_up_malformed(harness, topic, fields)
    assert await bus.dead_letters(topic).replay(to="group") == ReplayReport(replayed=1)
    [(_, message, raw)] = await harness.entries(retry_stream(topic, "billing"))
    assert (message, raw) == (None, fields)
    await give_up_malformed(harness, topic)
    async with bus.deliveries(SubscriptionConfig(topic, "billing")):
        await until(lambda: _count(harness, f"{topic}.dead", 1))
    [letter] = [letter async for letter in bus.dead_letters(topic)]
    assert (letter.raw, letter.code) == (fields, "malformed")


async def _count(harness: Harness, stream: str, count: int) -> bool:
    return len(await harness.entries(stream)) == count


async def test_raw_fields_too_large_to_be_listed_go_back_all_the_same(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    fields = {"message": b"\x00" * (ENTRY_BYTES + 1), "x": b"1"}
    await give_up_malformed(harness, topic, fields)
    assert await bus.dead_letters(topic).replay() == ReplayReport(replayed=1)
    _, (_, _, raw) = await harness.entries(topic)
    assert raw == fields


async def test_of_what_was_malformed_without_its_raw_fields_there_is_nothing_to_send_back(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    await bury(bus.backend, topic, "a", code="malformed")
    assert await bus.dead_letters(topic).replay() == ReplayReport(failed=1)
    assert await harness.entries(topic) == []
    assert len(await harness.entries(f"{topic}.dead")) == 1


async def test_a_topic_that_takes_nothing_leaves_them_where_they_are(server: RunningServer, topic: str) -> None:
    def set_key() -> None:
        with server.client() as client:
            client.set(topic, "no stream")

    async with StreamBus(RedisBackend(server.url)) as bus:
        await bury(bus.backend, topic, "a", "b")
        await anyio.to_thread.run_sync(set_key)
        told: list[ReplayProgress] = []
        assert await bus.dead_letters(topic).replay(on_progress=told.append) == ReplayReport(failed=2)
        assert all("WRONGTYPE" in str(progress.error) for progress in told)
        assert await left(bus.dead_letters(topic)) == ["a", "b"]


async def test_a_retry_stream_that_is_no_stream_holds_up_no_other_group(server: RunningServer, topic: str) -> None:
    def set_key() -> None:
        with server.client() as client:
            client.set(retry_stream(topic, "mail"), "no stream")

    async with StreamBus(RedisBackend(server.url)) as bus:
        await make_group(bus, topic, "billing")
        await bury(bus.backend, topic, "a", group="mail")
        await bury(bus.backend, topic, "b", group="billing")
        await anyio.to_thread.run_sync(set_key)
        told: list[ReplayProgress] = []
        report = await bus.dead_letters(topic).replay(to="group", on_progress=told.append)
        assert report == ReplayReport(replayed=1, failed=1)
        assert "WRONGTYPE" in str(told[0].error)
        assert await left(bus.dead_letters(topic)) == ["a"]


async def test_a_server_that_has_forgotten_the_scripts_is_told_them_again(server: RunningServer, topic: str) -> None:
    def forget() -> None:
        with server.client() as client:
            client.script_flush()

    async with StreamBus(RedisBackend(server.url)) as bus:
        await bury(bus.backend, topic, "a")
        await anyio.to_thread.run_sync(forget)
        assert await bus.dead_letters(topic).replay() == ReplayReport(replayed=1)


# --- a dry run, and progress


async def test_a_dry_run_counts_and_changes_nothing(harness: Harness, bus: StreamBus, topic: str) -> None:
    await make_group(bus, topic, "billing")
    await bury(bus.backend, topic, "a", "b")
    ids = await bury(bus.backend, topic, "c", group="gone")
    streams = (topic, f"{topic}.dead", retry_stream(topic, "billing"), retry_stream(topic, "gone"))
    before = [await harness.entries(stream) for stream in streams]
    told: list[ReplayProgress] = []
    letters = bus.dead_letters(topic)
    with anyio.fail_after(SOON):
        report = await letters.replay(to="group", dry_run=True, rate=0.001, on_progress=told.append)
    assert report == ReplayReport(replayed=2, failed=1, dry_run=True)
    assert await letters.replay([*ids, "999-0"], dry_run=True) == ReplayReport(replayed=1, gone=1, dry_run=True)
    assert [(progress.outcome, progress.new_id) for progress in told] == [
        ("replayed", None),
        ("replayed", None),
        ("failed", None),
    ]
    assert isinstance(told[2].error, GroupLostError)
    assert [await harness.entries(stream) for stream in streams] == before


async def test_progress_is_told_of_every_one_with_the_counts_so_far(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    ids = await bury(bus.backend, topic, "a", "b")
    told: list[ReplayProgress] = []
    await bus.dead_letters(topic).replay([*ids, "999-0"], on_progress=told.append)
    entries = await harness.entries(topic)
    assert [progress.id for progress in told] == [*ids, "999-0"]
    assert [progress.outcome for progress in told] == ["replayed", "replayed", "gone"]
    assert [progress.stream for progress in told] == [topic, topic, None]
    assert [progress.new_id for progress in told] == [entries[0][0], entries[1][0], None]
    assert [progress.letter.message.uid for progress in told if progress.letter and progress.letter.message] == [
        "a",
        "b",
    ]
    assert [progress.so_far for progress in told] == [
        ReplayReport(replayed=1),
        ReplayReport(replayed=2),
        ReplayReport(replayed=2, gone=1),
    ]


async def test_what_progress_raises_ends_the_replay_and_comes_out(harness: Harness, bus: StreamBus, topic: str) -> None:
    names = [f"m{number}" for number in range(MANY)]
    await bury(bus.backend, topic, *names)

    def stop(progress: ReplayProgress) -> None:
        if progress.so_far.replayed == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        await bus.dead_letters(topic).replay(on_progress=stop)
    back = uids(await harness.entries(topic))
    assert 3 <= len(back) < MANY
    assert back + await left(bus.dead_letters(topic)) == names


async def test_the_observer_is_told_of_what_was_published(harness: Harness, topic: str) -> None:
    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        await bury(bus.backend, topic, "a")
        await bus.dead_letters(topic).replay(dry_run=True)
        assert recorder.of("on_published") == []
        await bus.dead_letters(topic).replay()
    [(entry_id, _, _)] = await harness.entries(topic)
    [event] = recorder.of("on_published")
    assert (event.topic, event.message_id) == (topic, entry_id)
    assert "replayed" in str(event.detail)


# --- interrupted, and twice at once


async def test_two_replays_at_once_double_nothing(harness: Harness, bus: StreamBus, topic: str) -> None:
    names = [f"m{number}" for number in range(MANY)]
    await make_group(bus, topic, "billing")
    await bury(bus.backend, topic, *names)
    reports: list[ReplayReport] = []

    async def replay(one: StreamBus, to: Any) -> None:
        reports.append(await one.dead_letters(topic).replay(to=to, rate=4000))

    async with StreamBus(harness.make_backend()) as other, anyio.create_task_group() as tasks:
        tasks.start_soon(replay, bus, "topic")
        tasks.start_soon(replay, bus, "group")
        tasks.start_soon(replay, other, "topic")
    back = uids(await harness.entries(topic)) + uids(await harness.entries(retry_stream(topic, "billing")))
    assert Counter(back) == Counter(names)
    assert sum(report.replayed for report in reports) == MANY
    assert sum(report.failed for report in reports) == 0
    assert await left(bus.dead_letters(topic)) == []


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 50])
async def test_cancelled_at_any_moment_it_loses_and_doubles_nothing_and_another_one_goes_on(
    turns: int, harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    assert isinstance(backend, DeadLetterStore)
    move_entries = backend.move_entries
    moving = anyio.Event()
    steps_left = 0

    async def watched(stream: str, moves: Sequence[Move]) -> list[str | EventBusError | None]:
        nonlocal steps_left
        steps_left -= 1
        if not steps_left:
            moving.set()
        return await move_entries(stream, moves)

    backend.move_entries = watched  # type: ignore[method-assign]
    names: list[str] = []
    interrupted = 0
    async with StreamBus(backend) as bus:
        letters = bus.dead_letters(topic)
        for number in range(6):
            steps_left = number % 3 + 1  # in each of a replay's three steps, twice
            more = [f"m{number}" for number in range(len(names), len(names) + MANY)]
            await bury(backend, topic, *more)
            names.extend(more)
            moving = anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(letters.replay)
                await moving.wait()
                for _ in range(turns):
                    await checkpoint()
                tasks.cancel_scope.cancel()
            # On a server the step that was under way may still come to its end; half of it is never seen.
            await until(partial(_all_there, harness, topic, names), "all of them to be somewhere, once")
            interrupted += bool(await left(letters))
        await letters.replay()
        assert await left(letters) == []
        assert uids(await harness.entries(topic)) == names
    if not turns:
        assert interrupted == 6


async def _all_there(harness: Harness, topic: str, names: Sequence[str]) -> bool:
    # What moves meanwhile goes from here to there: seen in this order it may be counted twice, and is never missed.
    dead = uids(await harness.entries(f"{topic}.dead"))
    back = uids(await harness.entries(topic))
    return Counter(dead + back) == Counter(names)


async def test_an_error_of_the_backend_comes_out_and_the_rest_stays(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    assert isinstance(backend, DeadLetterStore)
    move_entries = backend.move_entries
    calls = 0

    async def failing(stream: str, moves: Sequence[Move]) -> list[str | EventBusError | None]:
        nonlocal calls
        calls += 1
        results = await move_entries(stream, moves)
        if calls == 2:
            # What it did is done; nobody knows.
            raise BackendError("the connection broke", may_have_happened=True, can_pass=True)
        return results

    backend.move_entries = failing  # type: ignore[method-assign]
    names = [f"m{number}" for number in range(MANY)]
    async with StreamBus(backend) as bus:
        await bury(backend, topic, *names)
        with pytest.raises(BackendError, match="broke"):
            await bus.dead_letters(topic).replay()
        assert 0 < len(await left(bus.dead_letters(topic))) < MANY
        await bus.dead_letters(topic).replay()
        assert uids(await harness.entries(topic)) == names
        assert await left(bus.dead_letters(topic)) == []


async def test_a_replay_ends_with_its_bus(harness: Harness, topic: str) -> None:
    names = [f"m{number}" for number in range(MANY)]
    started = anyio.Event()
    closed: list[Exception] = []

    async def replay(letters: DeadLetters) -> None:
        with pytest.raises(ClosedError) as caught:
            await letters.replay(rate=100, on_progress=lambda _: started.set())
        closed.append(caught.value)

    async with anyio.create_task_group() as tasks:
        async with StreamBus(harness.make_backend()) as bus:
            await bury(bus.backend, topic, *names)
            tasks.start_soon(replay, bus.dead_letters(topic))
            await started.wait()
    assert len(closed) == 1
    async with StreamBus(harness.make_backend()) as bus:
        rest = await left(bus.dead_letters(topic))
    assert 0 < len(rest) < MANY
    assert uids(await harness.entries(topic)) + rest == names


async def test_what_a_group_has_pending_on_the_dead_letter_topic_can_be_replayed_and_harms_it_not(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    dead = f"{topic}.dead"
    await bury(bus.backend, topic, "a")
    config = SubscriptionConfig(dead, "clerk", dead_letter_topic=f"{dead}.dead", group_start_id="0")
    with anyio.fail_after(SOON):
        async with bus.deliveries(config) as deliveries:
            delivery = await deliveries.receive()
            assert await bus.dead_letters(topic).replay() == ReplayReport(replayed=1)
            with suppress(LeaseLostError):
                # From Redis 7.0 on, a reclaim pass in between takes what has no body off the pending list.
                await delivery.ack()
    assert await harness.pending(dead, "clerk") == []
    assert uids(await harness.entries(topic)) == ["a"]


# --- what is refused


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"letters": "1-0"}, "letters"),
        ({"letters": [1]}, "letters"),
        ({"letters": 5}, "letters"),
        ({"to": "nowhere"}, "to"),
        ({"rate": 0}, "rate"),
        ({"rate": -1.0}, "rate"),
        ({"rate": float("inf")}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": 10**400}, "rate"),
        ({"rate": 5e-324}, "rate"),
        ({"rate": True}, "rate"),
        ({"rate": "10"}, "rate"),
        ({"on_progress": 3}, "on_progress"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(
    bus: StreamBus, topic: str, given: dict[str, Any], named: str
) -> None:
    await bury(bus.backend, topic, "a")
    with pytest.raises(ValidationError, match=f"^{named} must be"):
        await bus.dead_letters(topic).replay(**given)
    assert await left(bus.dead_letters(topic)) == ["a"]


async def test_an_async_progress_is_refused_since_nobody_would_await_it(bus: StreamBus, topic: str) -> None:
    async def progress(_: ReplayProgress) -> None: ...

    with pytest.raises(ValidationError, match="on_progress must be a plain function"):
        await bus.dead_letters(topic).replay(on_progress=progress)  # type: ignore[arg-type]

    class Told:
        async def __call__(self, _: ReplayProgress) -> None: ...

    with pytest.raises(ValidationError, match="on_progress must be a plain function"):
        await bus.dead_letters(topic).replay(on_progress=Told())  # type: ignore[arg-type]
