"""The contract of a backend: what every ``StreamBackend`` must do, run against the harness's backend.

Specification: DESIGN.md, section 2, and the docstrings of ``anybus.abc.StreamBackend``. Nothing here knows which
backend it is: it speaks to it by the contract's methods, and to its server by the harness. Two backends of one harness
stand for two processes. Ids are compared by their parts, ``<number>-<number>``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone

import anyio
import pytest
from anyio.lowlevel import checkpoint
from harness import SOON, Harness, new_topic, uids, until

from anybus import EventBusError, GroupLostError, Message, ValidationError
from anybus.abc import (
    ClaimedMessage,
    FetchedEntry,
    MalformedEntry,
    MissingEntry,
    Output,
    PassSource,
    PendingEntry,
    PublishSpec,
    StreamBackend,
    StreamInspector,
)

LONG = 3600.0
"""Seconds that no test waits for: a lease that does not run out, a message that is not due."""

SHORT = 0.05
"""Seconds that a test does wait for."""


def place(entry_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in entry_id.split("-"))


def ids(entries: Sequence[FetchedEntry]) -> list[str]:
    return [entry.id for entry in entries]


def claimed(entries: Sequence[FetchedEntry]) -> list[ClaimedMessage]:
    """The entries, of which all are whole."""
    whole = [entry for entry in entries if isinstance(entry, ClaimedMessage)]
    assert len(whole) == len(entries)
    return whole


def payloads(entries: Sequence[FetchedEntry]) -> list[bytes]:
    return [entry.message.payload for entry in claimed(entries)]


async def publish(backend: StreamBackend, stream: str, *bodies: str) -> list[str]:
    return [await backend.publish(stream, Message(stream, body.encode())) for body in bodies]


async def take(backend: StreamBackend, stream: str, group: str, consumer: str, count: int = 100) -> list[FetchedEntry]:
    return await backend.read_new(stream, group, consumer, count=count, timeout=0)


async def take_over(
    backend: StreamBackend, stream: str, group: str, consumer: str, *, min_idle: float = 0.0, count: int = 100
) -> list[FetchedEntry]:
    return await backend.reclaim_idle(stream, group, consumer, min_idle=min_idle, count=count)


async def pending_of(harness: Harness, stream: str, group: str) -> dict[str, PendingEntry]:
    return {entry.id: entry for entry in await harness.pending(stream, group)}


@asynccontextmanager
async def grouped(harness: Harness, stream: str, *groups: str) -> AsyncGenerator[StreamBackend, None]:
    """A backend, entered, with groups that begin at the start."""
    async with harness.make_backend() as backend:
        for group in groups or ("g",):
            await backend.create_group(stream, group, "0")
        yield backend


# --- create_group


async def test_a_group_made_at_the_end_sees_only_what_comes_after(harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        await publish(backend, topic, "before")
        assert await backend.create_group(topic, "g", "$") is True
        await publish(backend, topic, "after")
        assert payloads(await take(backend, topic, "g", "c")) == [b"after"]


async def test_a_group_is_made_at_the_end_unless_told_otherwise(harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        await publish(backend, topic, "before")
        await backend.create_group(topic, "g")
        assert await take(backend, topic, "g", "c") == []


async def test_a_group_made_at_the_start_sees_everything(harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        await publish(backend, topic, "a", "b")
        await backend.create_group(topic, "g", "0")
        assert payloads(await take(backend, topic, "g", "c")) == [b"a", b"b"]


async def test_a_group_made_at_an_id_sees_what_comes_after_that_entry(harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        entries = await publish(backend, topic, "a", "b", "c")
        await backend.create_group(topic, "g", entries[1])
        assert payloads(await take(backend, topic, "g", "c")) == [b"c"]


@pytest.mark.parametrize("start_id", ["$", "0"])
async def test_a_group_can_be_made_before_its_stream(start_id: str, harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        assert await backend.create_group(topic, "g", start_id) is True
        assert await take(backend, topic, "g", "c") == []
        await publish(backend, topic, "a")
        assert payloads(await take(backend, topic, "g", "c")) == [b"a"]


async def test_making_a_group_that_exists_says_so_and_leaves_it_alone(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await publish(backend, topic, "a")
        assert payloads(await take(backend, topic, "g", "c")) == [b"a"]
        for start_id in ("0", "$"):
            assert await backend.create_group(topic, "g", start_id) is False
        assert await take(backend, topic, "g", "c") == []
        assert len(await harness.pending(topic, "g")) == 1


# --- publish


async def test_ids_are_different_and_grow_in_the_order_published(harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        entries = await publish(backend, topic, *(str(number) for number in range(50)))
        stored = [entry_id for entry_id, _, _ in await harness.entries(topic)]
    assert stored == entries
    places = [place(entry_id) for entry_id in entries]
    assert places == sorted(set(places))


async def test_an_id_is_not_used_again_after_its_entry_is_gone(harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        first, second = await publish(backend, topic, "a", "b")
        await harness.delete_entry(topic, second)
        await harness.delete_entry(topic, first)
        (third,) = await publish(backend, topic, "c")
    assert place(first) < place(second) < place(third)


async def test_a_message_is_stored_whole(harness: Harness, topic: str) -> None:
    message = Message(
        topic,
        bytes(range(256)),
        uid="u",
        key="é",
        kind="k",
        source="s",
        occurred_at=datetime(2026, 5, 6, 7, 8, 9, 123456, tzinfo=timezone.utc),
        headers={"x": "\N{SNOWMAN}", "empty": "", "line": "a\nb"},
        content_type="text/plain",
        event_version="2",
        idempotency_key="i",
        expires_at=datetime(2027, 1, 1, tzinfo=timezone.utc),
        trace_uid="t",
        correlation_uid="c",
    )
    async with grouped(harness, topic) as backend:
        await backend.publish(topic, message)
        (entry,) = claimed(await take(backend, topic, "g", "c"))
    assert entry.message == message


async def test_headers_that_double_a_field_fill_it_where_it_is_unset(harness: Harness, topic: str) -> None:
    headers = {"content-type": "text/plain", "event-version": "2", "idempotency-key": "i", "Content-Type": "other"}
    async with grouped(harness, topic) as backend:
        await backend.publish(topic, Message(topic, headers=headers))
        await backend.publish(topic, Message(topic, headers=headers, content_type="", event_version="3"))
        unset, partly_set = (entry.message for entry in claimed(await take(backend, topic, "g", "c")))
    assert (unset.content_type, unset.event_version, unset.idempotency_key) == ("text/plain", "2", "i")
    assert (partly_set.content_type, partly_set.event_version, partly_set.idempotency_key) == ("", "3", "i")
    assert unset.headers == partly_set.headers == headers


async def test_publish_many_gives_one_id_per_item_in_order(harness: Harness, topic: str) -> None:
    other = new_topic()
    streams = [topic, other, topic, other, topic]
    items = [(stream, Message(stream, str(number).encode()), None) for number, stream in enumerate(streams)]
    async with harness.make_backend() as backend:
        results = await backend.publish_many(items)
        stored = {stream: [entry_id for entry_id, _, _ in await harness.entries(stream)] for stream in (topic, other)}
    assert stored[topic] == [results[0], results[2], results[4]]
    assert stored[other] == [results[1], results[3]]


async def test_publish_many_of_what_cannot_be_done_fails_that_item_only(harness: Harness, topic: str) -> None:
    messages = [Message(topic, str(number).encode()) for number in range(3)]
    async with harness.make_backend() as backend:
        if {"dedup", "confirm"} & backend.features:
            pytest.skip("this backend can publish with a spec")
        results = await backend.publish_many(
            [(topic, messages[0], None), (topic, messages[1], PublishSpec()), (topic, messages[2], None)]
        )
        assert isinstance(results[1], EventBusError)
        assert uids(await harness.entries(topic)) == [messages[0].uid, messages[2].uid]


async def test_publish_many_of_nothing_is_nothing(harness: Harness) -> None:
    async with harness.make_backend() as backend:
        assert await backend.publish_many([]) == []


# --- read_new


async def test_entries_are_read_in_order_and_never_more_than_asked_for(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await publish(backend, topic, "a", "b", "c", "d", "e")
        assert payloads(await take(backend, topic, "g", "c", 2)) == [b"a", b"b"]
        assert payloads(await take(backend, topic, "g", "c", 2)) == [b"c", b"d"]
        assert payloads(await take(backend, topic, "g", "c", 2)) == [b"e"]
        assert await take(backend, topic, "g", "c", 2) == []


async def test_an_entry_is_counted_and_dated_when_it_is_read(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await publish(backend, topic, "a")
        (entry,) = claimed(await take(backend, topic, "g", "c"))
        assert entry.deliveries == (1 if "delivery_count" in backend.features else None)
        if entry.published_at is not None:
            assert entry.published_at.utcoffset() == timedelta(0)
            assert abs(entry.published_at - datetime.now(timezone.utc)) < timedelta(minutes=5)


async def test_what_was_read_is_pending_and_its_readers(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        first, second = await publish(backend, topic, "a", "b")
        await take(backend, topic, "g", "one", 1)
        await take(backend, topic, "g", "two", 1)
        pending = await pending_of(harness, topic, "g")
        assert {entry_id: entry.consumer for entry_id, entry in pending.items()} == {first: "one", second: "two"}


async def test_a_read_of_an_empty_stream_ends_without_an_error_when_its_time_is_over(
    harness: Harness, topic: str
) -> None:
    async with grouped(harness, topic) as backend:
        started = anyio.current_time()
        with anyio.fail_after(SOON):
            assert await backend.read_new(topic, "g", "c", count=1, timeout=SHORT) == []
        assert anyio.current_time() - started >= SHORT * 0.9


async def test_a_read_with_something_to_read_does_not_wait_for_more(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await publish(backend, topic, "a")
        with anyio.fail_after(SOON):
            assert payloads(await backend.read_new(topic, "g", "c", count=100, timeout=LONG)) == [b"a"]


async def test_a_blocked_reader_wakes_when_an_entry_arrives(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        found: list[FetchedEntry] = []

        async def read() -> None:
            found.extend(await backend.read_new(topic, "g", "c", count=10, timeout=LONG))

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                async with harness.make_backend() as other:
                    await publish(other, topic, "a")
    assert payloads(found) == [b"a"]


async def test_of_two_blocked_readers_each_entry_goes_to_exactly_one(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        found: dict[str, list[bytes]] = {"one": [], "two": []}

        async def read(consumer: str) -> None:
            entries = await backend.read_new(topic, "g", consumer, count=1, timeout=LONG)
            found[consumer] += payloads(entries)

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for consumer in found:
                    tasks.start_soon(read, consumer)
                await anyio.wait_all_tasks_blocked()
                await publish(backend, topic, "a", "b")
    assert sorted(found["one"] + found["two"]) == [b"a", b"b"]
    assert all(len(bodies) == 1 for bodies in found.values())


async def test_many_readers_of_one_group_share_a_burst_without_doubles_or_gaps(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        found: list[bytes] = []
        async with anyio.create_task_group() as tasks:

            async def read(consumer: str) -> None:
                while len(found) < 60:
                    entries = await backend.read_new(topic, "g", consumer, count=3, timeout=SHORT)
                    found.extend(payloads(entries))

            for number in range(5):
                tasks.start_soon(read, f"c{number}")
            for number in range(60):
                await publish(backend, topic, str(number))
    assert sorted(found) == sorted(str(number).encode() for number in range(60))


async def test_a_blocked_read_holds_up_neither_publish_nor_ack(harness: Harness, topic: str) -> None:
    other = new_topic()
    async with grouped(harness, topic) as backend:
        await publish(backend, topic, "a")
        (entry,) = await take(backend, topic, "g", "c")
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: backend.read_new(topic, "g", "c", count=1, timeout=LONG))
                await anyio.wait_all_tasks_blocked()
                await publish(backend, other, "b")
                await backend.ack(topic, "g", entry.id)
                assert await harness.pending(topic, "g") == []
                tasks.cancel_scope.cancel()


async def test_groups_are_independent(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic, "one", "two") as backend:
        first, second = await publish(backend, topic, "a", "b")
        assert ids(await take(backend, topic, "one", "c")) == [first, second]
        await backend.ack_many(topic, "one", [first, second])
        assert ids(await take(backend, topic, "two", "c")) == [first, second]
        assert await harness.pending(topic, "one") == []
        assert set(await pending_of(harness, topic, "two")) == {first, second}


async def test_a_cancelled_read_takes_nothing(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: backend.read_new(topic, "g", "gone", count=1, timeout=LONG))
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        await publish(backend, topic, "a")
        assert payloads(await take(backend, topic, "g", "next")) == [b"a"]


async def test_what_a_cancelled_reader_cannot_take_any_more_another_one_gets(harness: Harness, topic: str) -> None:
    """Either the entry never was the cancelled reader's, or that one hands it back, for reclaim at once."""
    async with grouped(harness, topic) as backend:
        found: list[FetchedEntry] = []
        scopes = anyio.CancelScope(), anyio.CancelScope()

        async def read(number: int) -> None:
            with scopes[number]:
                found.extend(await backend.read_new(topic, "g", f"c{number}", count=1, timeout=LONG))

        async def somebody_has_it() -> bool:
            if not found:
                found.extend(await take_over(backend, topic, "g", "c2", min_idle=LONG))
            return bool(found)

        async with anyio.create_task_group() as tasks:
            for number in range(2):
                tasks.start_soon(read, number)
            await anyio.wait_all_tasks_blocked()
            scopes[0].cancel()
            await publish(backend, topic, "a")
            await until(somebody_has_it, "the entry")
            tasks.cancel_scope.cancel()
        assert payloads(found) == [b"a"]
        assert [entry.deliveries for entry in claimed(found)] in ([1], [None])


async def test_nothing_is_lost_when_an_entry_arrives_in_the_moment_of_the_cancellation(harness: Harness) -> None:
    """Whatever the reader was cancelled in the middle of: the entry is in its hands, unread, or handed back."""
    streams = [new_topic() for _ in range(60)]
    scopes = {stream: anyio.CancelScope() for stream in streams}
    found: dict[str, list[FetchedEntry]] = {stream: [] for stream in streams}
    published: dict[str, list[str]] = {}
    async with harness.make_backend() as backend:

        async def read(stream: str) -> None:
            with scopes[stream]:
                found[stream] += await backend.read_new(stream, "g", "reader", count=1, timeout=LONG)

        async with anyio.create_task_group() as tasks:
            for stream in streams:
                await backend.create_group(stream, "g", "0")
                tasks.start_soon(read, stream)
            await anyio.wait_all_tasks_blocked()
            for number, stream in enumerate(streams):
                published[stream] = await publish(backend, stream, "a")
                for _ in range(number % 5):
                    await checkpoint()
                scopes[stream].cancel()
        for stream in streams:
            found[stream] += await take(backend, stream, "g", "next")
            found[stream] += await take_over(backend, stream, "g", "next", min_idle=LONG)
            assert ids(found[stream]) == published[stream]
            assert claimed(found[stream])[0].deliveries in (1, None), "what was handed back must not count"


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})])
async def test_what_arrives_in_the_moment_of_asyncios_own_cancellation_is_not_lost_either(harness: Harness) -> None:
    """It hits a reader that has been woken already. The entry then is another blocked reader's, or handed back."""
    streams = [new_topic() for _ in range(20)]
    found: dict[str, list[FetchedEntry]] = {stream: [] for stream in streams}
    async with harness.make_backend() as backend:

        async def read(stream: str, consumer: str) -> None:
            found[stream] += await backend.read_new(stream, "g", consumer, count=1, timeout=LONG)

        async def somebody_has_each() -> bool:
            for stream in streams:
                if not found[stream]:
                    found[stream] += await take_over(backend, stream, "g", "next", min_idle=LONG)
            return all(found.values())

        readers: list[asyncio.Task[None]] = []
        published: dict[str, list[str]] = {}
        for stream in streams:
            await backend.create_group(stream, "g", "0")
            readers += [asyncio.create_task(read(stream, consumer)) for consumer in ("cancelled", "other")]
        await anyio.wait_all_tasks_blocked()
        for number, stream in enumerate(streams):
            published[stream] = await publish(backend, stream, "a")
            for _ in range(number % 5):
                await checkpoint()
            readers[2 * number].cancel()
        await until(somebody_has_each, "every entry")
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        assert {stream: ids(entries) for stream, entries in found.items()} == published


# --- reclaim_idle


async def test_an_entry_is_taken_over_once_it_has_been_idle_for_long_enough(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        entry_id, _ = await publish(backend, topic, "a", "b")
        await take(backend, topic, "g", "dead", 1)
        assert await take_over(backend, topic, "g", "alive", min_idle=LONG) == []
        found: list[FetchedEntry] = []

        async def taken() -> bool:
            found.extend(await take_over(backend, topic, "g", "alive", min_idle=SHORT))
            return bool(found)

        await until(taken, "the idle entry")
        assert ids(found) == [entry_id]
        assert payloads(found) == [b"a"]
        assert (await pending_of(harness, topic, "g"))[entry_id].consumer == "alive"


async def test_taking_over_makes_an_entry_fresh_again(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await publish(backend, topic, "a")
        (entry,) = await take(backend, topic, "g", "c")
        await backend.release(topic, "g", "c", [entry.id])
        assert ids(await take_over(backend, topic, "g", "other", min_idle=LONG)) == [entry.id]
        assert await take_over(backend, topic, "g", "third", min_idle=LONG) == []


async def test_a_consumer_takes_over_its_own_entries_too(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await publish(backend, topic, "a")
        (entry,) = await take(backend, topic, "g", "c")
        assert ids(await take_over(backend, topic, "g", "c")) == [entry.id]


async def test_every_take_over_counts_a_delivery(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        if "delivery_count" not in backend.features:
            pytest.skip("this backend does not count deliveries")
        await publish(backend, topic, "a")
        counts = [entry.deliveries for entry in claimed(await take(backend, topic, "g", "c"))]
        for consumer in ("c", "d", "c"):
            counts += [entry.deliveries for entry in claimed(await take_over(backend, topic, "g", consumer))]
        assert counts == [1, 2, 3, 4]
        assert [entry.deliveries for entry in await harness.pending(topic, "g")] == [4]


async def test_a_scan_goes_on_where_the_last_one_stopped_and_wraps_around(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        entries = await publish(backend, topic, "a", "b", "c", "d", "e")
        await take(backend, topic, "g", "dead")
        scans = [ids(await take_over(backend, topic, "g", "alive", count=2)) for _ in range(4)]
    assert all(len(scan) == 2 for scan in scans)
    found = [entry_id for scan in scans for entry_id in scan]
    assert found == [*entries, *entries[:3]]


async def test_every_consumer_has_a_scan_of_its_own(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        entries = await publish(backend, topic, "a", "b", "c")
        await take(backend, topic, "g", "dead")
        assert ids(await take_over(backend, topic, "g", "one", count=1)) == entries[:1]
        assert ids(await take_over(backend, topic, "g", "two", count=1)) == entries[:1]
        assert ids(await take_over(backend, topic, "g", "one", count=1)) == entries[1:2]


async def test_every_stream_and_group_has_a_scan_of_its_own(harness: Harness, topic: str) -> None:
    other = new_topic()
    async with grouped(harness, topic, "g", "h") as backend:
        await backend.create_group(other, "g", "0")
        entries = await publish(backend, topic, "a", "b")
        others = await publish(backend, other, "c", "d")
        for stream, group in ((topic, "g"), (topic, "h"), (other, "g")):
            await take(backend, stream, group, "dead")
        assert ids(await take_over(backend, topic, "g", "c", count=1)) == entries[:1]
        assert ids(await take_over(backend, topic, "h", "c", count=1)) == entries[:1]
        assert ids(await take_over(backend, other, "g", "c", count=1)) == others[:1]


async def test_a_scan_takes_each_entry_once_and_looks_past_fresh_ones(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        entries = await publish(backend, topic, *(str(number) for number in range(40)))
        await take(backend, topic, "g", "c")
        idle = [entries[0], entries[20], entries[39]]
        await backend.release(topic, "g", "c", idle)
        found: list[str] = []

        async def all_found() -> bool:
            found.extend(ids(await take_over(backend, topic, "g", "alive", min_idle=LONG, count=10)))
            return len(found) >= len(idle)

        await until(all_found, "the three idle entries")
        assert sorted(found, key=place) == idle


async def test_an_empty_scan_is_no_error(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        assert await take_over(backend, topic, "g", "c") == []
        await publish(backend, topic, "never read")
        assert await take_over(backend, topic, "g", "c") == []


# --- ack and ack_many


async def test_an_acknowledged_entry_is_no_longer_pending_and_never_comes_back(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await publish(backend, topic, "a", "b")
        first, second = ids(await take(backend, topic, "g", "c"))
        await backend.ack(topic, "g", first)
        assert set(await pending_of(harness, topic, "g")) == {second}
        assert ids(await take_over(backend, topic, "g", "d")) == [second]
        assert await take(backend, topic, "g", "c") == []


async def test_unknown_ids_are_ignored(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        await backend.ack(topic, "g", "999999999-0")
        await backend.ack(topic, "g", entry_id)
        await backend.ack(topic, "g", entry_id)
        assert await backend.ack_many(topic, "g", ["999999999-0", entry_id]) == []


async def test_without_a_consumer_the_whole_batch_is_acknowledged_whoever_owns_it(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        entries = await publish(backend, topic, "a", "b", "c")
        await take(backend, topic, "g", "one", 2)
        await take(backend, topic, "g", "two", 1)
        assert await backend.ack_many(topic, "g", entries) == []
        assert await harness.pending(topic, "g") == []


async def test_with_a_consumer_only_its_own_entries_are_acknowledged_and_the_others_come_back(
    harness: Harness, topic: str
) -> None:
    async with grouped(harness, topic) as backend:
        if "fence" not in backend.features:
            pytest.skip("this backend cannot check who owns an entry")
        settled, mine, lost, unread = await publish(backend, topic, "a", "b", "c", "d")
        await take(backend, topic, "g", "me", 3)
        await backend.ack(topic, "g", settled)
        await backend.release(topic, "g", "me", [lost])
        await take_over(backend, topic, "g", "you", min_idle=LONG)
        refused = await backend.ack_many(topic, "g", [settled, mine, lost, unread, "999999999-0"], consumer="me")
        assert sorted(refused, key=place) == sorted([settled, lost, unread, "999999999-0"], key=place)
        assert {entry.id: entry.consumer for entry in await harness.pending(topic, "g")} == {lost: "you"}


async def test_what_was_released_is_no_longer_its_former_owners_to_acknowledge(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "me")
        await backend.release(topic, "g", "me", [entry_id])
        assert await backend.ack_many(topic, "g", [entry_id], consumer="me") == [entry_id]
        assert set(await pending_of(harness, topic, "g")) == {entry_id}


async def test_an_empty_batch_of_acks_is_fine(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        assert await backend.ack_many(topic, "g", []) == []
        assert await backend.ack_many(topic, "g", [], consumer="c") == []


async def test_a_batch_of_a_thousand_acks_is_one_call(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        items = [(topic, Message(topic), None) for _ in range(1000)]
        entries = [result for result in await backend.publish_many(items) if isinstance(result, str)]
        await take(backend, topic, "g", "c", 1000)
        assert await backend.ack_many(topic, "g", entries, consumer="c") == []
        assert await harness.pending(topic, "g") == []


# --- renew


async def test_renewing_makes_an_entry_fresh_without_counting(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")

        async def idle() -> float:
            return (await pending_of(harness, topic, "g"))[entry_id].idle

        async def old() -> bool:
            return await idle() >= 0.2

        async def fresh() -> bool:
            assert await backend.renew(topic, "g", "c", [entry_id]) == [entry_id]
            return await idle() < 0.2

        await until(old, "an old entry")
        await until(fresh, "a fresh entry")
        assert [entry.deliveries for entry in await harness.pending(topic, "g")] == [1]
        assert [entry.consumer for entry in await harness.pending(topic, "g")] == ["c"]


async def test_renewing_tells_what_is_still_ours_and_takes_nothing_from_others(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        mine, yours, released, settled, unread = await publish(backend, topic, "a", "b", "c", "d", "e")
        await take(backend, topic, "g", "me", 1)
        await take(backend, topic, "g", "you", 1)
        await take(backend, topic, "g", "me", 2)
        await backend.release(topic, "g", "me", [released])
        await backend.ack(topic, "g", settled)
        asked = [unread, settled, released, yours, mine, "999999999-0"]
        assert await backend.renew(topic, "g", "me", asked) == [mine]
        pending = await pending_of(harness, topic, "g")
        assert set(pending) == {mine, yours, released}
        assert pending[yours].consumer == "you"
        assert ids(await take_over(backend, topic, "g", "third", min_idle=LONG)) == [released]


async def test_renewing_nothing_and_renewing_much_is_fine(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        assert await backend.renew(topic, "g", "c", []) == []
        items = [(topic, Message(topic), None) for _ in range(600)]
        entries = [result for result in await backend.publish_many(items) if isinstance(result, str)]
        await take(backend, topic, "g", "c", 600)
        assert sorted(await backend.renew(topic, "g", "c", entries), key=place) == entries


# --- release


async def test_what_is_released_is_taken_over_at_once_and_was_never_counted(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        for _ in range(5):
            await backend.release(topic, "g", "c", [entry_id])
            (entry,) = claimed(await take_over(backend, topic, "g", "c", min_idle=LONG))
            assert (entry.id, entry.message.payload) == (entry_id, b"a")
            assert entry.deliveries in (1, None)


async def test_a_release_leaves_earlier_counts_as_they_were(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        if "delivery_count" not in backend.features:
            pytest.skip("this backend does not count deliveries")
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "dead")
        await take_over(backend, topic, "g", "dead too")
        await take_over(backend, topic, "g", "polite")
        await backend.release(topic, "g", "polite", [entry_id])
        (entry,) = claimed(await take_over(backend, topic, "g", "next", min_idle=LONG))
        assert entry.deliveries == 3


async def test_only_its_owner_can_release_an_entry(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        mine, yours, unread = await publish(backend, topic, "a", "b", "c")
        await take(backend, topic, "g", "me", 1)
        await take(backend, topic, "g", "you", 1)
        await backend.release(topic, "g", "me", [yours, unread, mine, "999999999-0"])
        assert (await pending_of(harness, topic, "g"))[yours].consumer == "you"
        assert ids(await take_over(backend, topic, "g", "third", min_idle=LONG)) == [mine]
        assert payloads(await take(backend, topic, "g", "third")) == [b"c"]


async def test_releasing_twice_counts_once(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        await backend.release(topic, "g", "c", [entry_id])
        await backend.release(topic, "g", "c", [entry_id])
        (entry,) = claimed(await take_over(backend, topic, "g", "c", min_idle=LONG))
        assert entry.deliveries in (1, None)


async def test_released_entries_leave_no_consumer_behind_once_they_are_taken(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        entries = await publish(backend, topic, "a", "b")
        await take(backend, topic, "g", "c")
        await backend.release(topic, "g", "c", entries)
        assert "c" not in {entry.consumer for entry in await harness.pending(topic, "g")}
        await take_over(backend, topic, "g", "next", min_idle=LONG)
        await backend.forget_consumer(topic, "g", "c")
        assert await harness.consumers(topic, "g") == ["next"]


# --- transfer and transfer_many


async def test_a_transfer_appends_its_outputs_and_acknowledges_the_original(harness: Harness, topic: str) -> None:
    first, second = new_topic(), new_topic()
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        outputs = [
            Output(first, Message(first, b"1")),
            Output(second, Message(second, b"2")),
            Output(first, Message(first)),
        ]
        new_ids = await backend.transfer(topic, "g", "c", entry_id, outputs)
        assert new_ids is not None
        assert len(new_ids) == 3
        assert await harness.pending(topic, "g") == []
        stored = [*await harness.entries(first), *await harness.entries(second)]
        assert [new_ids[0], new_ids[2], new_ids[1]] == [stored_id for stored_id, _, _ in stored]
        assert uids(stored) == [outputs[index].message.uid for index in (0, 2, 1)]


async def test_a_transfer_wakes_who_waits_for_its_outputs(harness: Harness, topic: str) -> None:
    other = new_topic()
    async with grouped(harness, topic) as backend:
        await backend.create_group(other, "g", "0")
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        found: list[FetchedEntry] = []

        async def read() -> None:
            found.extend(await backend.read_new(other, "g", "c", count=1, timeout=LONG))

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                await backend.transfer(topic, "g", "c", entry_id, [Output(other, Message(other, b"out"))])
        assert payloads(found) == [b"out"]


@pytest.mark.parametrize("why", ["somebody else's", "released", "settled", "never read", "unknown"])
async def test_a_transfer_of_what_is_not_ours_does_nothing(why: str, harness: Harness, topic: str) -> None:
    other = new_topic()
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        if why != "never read":
            await take(backend, topic, "g", "you" if why == "somebody else's" else "me")
        if why == "released":
            await backend.release(topic, "g", "me", [entry_id])
        elif why == "settled":
            await backend.ack(topic, "g", entry_id)
        elif why == "unknown":
            entry_id = "999999999-0"
        before = await pending_of(harness, topic, "g")
        assert await backend.transfer(topic, "g", "me", entry_id, [Output(other, Message(other))]) is None
        assert await harness.entries(other) == []
        after = await pending_of(harness, topic, "g")
        assert {item.id: item.consumer for item in after.values()} == {
            item.id: item.consumer for item in before.values()
        }


async def test_a_transfer_done_twice_happens_once(harness: Harness, topic: str) -> None:
    other = new_topic()
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        outputs = [Output(other, Message(other))]
        results = [await backend.transfer(topic, "g", "c", entry_id, outputs) for _ in range(2)]
        assert results[1] is None
        assert len(await harness.entries(other)) == 1


async def test_a_transfer_without_outputs_is_an_ack_with_a_fence(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        assert await backend.transfer(topic, "g", "d", entry_id, []) is None
        assert await backend.transfer(topic, "g", "c", entry_id, []) == []
        assert await harness.pending(topic, "g") == []


async def test_raw_fields_are_kept_unchanged_beside_the_message(harness: Harness, topic: str) -> None:
    other = new_topic()
    raw = {"message": b"not json \xff", "": b"", "other": bytes(range(256))}
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        message = Message(other, b"stands for it")
        await backend.transfer(topic, "g", "c", entry_id, [Output(other, message, raw=raw)])
        ((_, stored, fields),) = await harness.entries(other)
    assert stored == message
    assert {name: value for name, value in fields.items() if name.startswith("raw:")} == {
        f"raw:{name}": value for name, value in raw.items()
    }


async def test_a_delayed_output_is_stored_at_once_and_appended_when_it_is_due(harness: Harness, topic: str) -> None:
    other = new_topic()
    async with grouped(harness, topic) as backend:
        await backend.create_group(other, "g", "0")
        late, soon = await publish(backend, topic, "late", "soon")
        await take(backend, topic, "g", "c")
        later_ids = await backend.transfer(topic, "g", "c", late, [Output(other, Message(other, b"late"), delay=LONG)])
        await backend.transfer(topic, "g", "c", soon, [Output(other, Message(other, b"soon"), delay=SHORT)])
        assert await harness.pending(topic, "g") == []
        with anyio.fail_after(SOON):
            assert payloads(await backend.read_new(other, "g", "c", count=10, timeout=LONG)) == [b"soon"]
        assert await take(backend, other, "g", "c") == []
        assert later_ids is not None
        assert await backend.cancel_later(other, later_ids[0]) is True


async def test_a_delayed_transfer_of_what_is_not_ours_schedules_nothing(harness: Harness, topic: str) -> None:
    other = new_topic()
    async with grouped(harness, topic) as backend:
        await backend.create_group(other, "g", "0")
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "you")
        outputs = [Output(other, Message(other, b"stolen"), delay=SHORT)]
        assert await backend.transfer(topic, "g", "me", entry_id, outputs) is None
        await backend.publish_later(other, Message(other, b"marker"), delay=2 * SHORT)
        with anyio.fail_after(SOON):
            assert payloads(await backend.read_new(other, "g", "c", count=10, timeout=LONG)) == [b"marker"]


async def test_transfer_many_gives_one_result_per_item_in_order(harness: Harness, topic: str) -> None:
    other = new_topic()
    async with grouped(harness, topic) as backend:
        first, lost, third = await publish(backend, topic, "a", "b", "c")
        await take(backend, topic, "g", "me")
        await backend.release(topic, "g", "me", [lost])
        items = [(entry_id, [Output(other, Message(other, entry_id.encode()))]) for entry_id in (first, lost, third)]
        results = await backend.transfer_many(topic, "g", "me", items)
        stored = await harness.entries(other)
        assert results == [[stored[0][0]], None, [stored[1][0]]]
        assert [message.payload for _, message, _ in stored if message is not None] == [first.encode(), third.encode()]
        assert set(await pending_of(harness, topic, "g")) == {lost}


# --- publish_later and cancel_later


async def test_a_message_for_later_is_not_there_before_it_is_due(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await backend.publish_later(topic, Message(topic, b"late"), delay=LONG)
        await publish(backend, topic, "now")
        assert payloads(await take(backend, topic, "g", "c")) == [b"now"]
        assert len(await harness.entries(topic)) == 1


async def test_a_blocked_reader_gets_a_message_when_it_becomes_due(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        started = anyio.current_time()
        await backend.publish_later(topic, Message(topic, b"late"), delay=SHORT)
        with anyio.fail_after(SOON):
            assert payloads(await backend.read_new(topic, "g", "c", count=1, timeout=LONG)) == [b"late"]
        assert anyio.current_time() - started >= SHORT * 0.9


async def test_a_message_put_off_while_a_reader_is_blocked_reaches_it_when_due(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        found: list[FetchedEntry] = []

        async def read() -> None:
            while not found:
                found.extend(await backend.read_new(topic, "g", "c", count=1, timeout=1.0))

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                await backend.publish_later(topic, Message(topic, b"late"), delay=SHORT)
        assert payloads(found) == [b"late"]


async def test_messages_for_later_come_in_the_order_in_which_they_are_due(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await backend.publish_later(topic, Message(topic, b"second"), delay=2 * SHORT)
        await backend.publish_later(topic, Message(topic, b"first"), delay=SHORT)
        await backend.publish_later(topic, Message(topic, b"third"), delay=3 * SHORT)
        found: list[bytes] = []

        async def three() -> bool:
            found.extend(payloads(await take(backend, topic, "g", "c")))
            return len(found) == 3

        await until(three, "three messages")
        assert found == [b"first", b"second", b"third"]


async def test_a_message_for_later_can_be_given_a_point_in_time(harness: Harness, topic: str) -> None:
    zone = timezone(timedelta(hours=5))
    async with grouped(harness, topic) as backend:
        await backend.publish_later(topic, Message(topic, b"future"), at=datetime.now(zone) + timedelta(hours=1))
        await backend.publish_later(topic, Message(topic, b"past"), at=datetime.now(zone) - timedelta(hours=1))
        with anyio.fail_after(SOON):
            assert payloads(await backend.read_new(topic, "g", "c", count=10, timeout=LONG)) == [b"past"]
        assert await take(backend, topic, "g", "c") == []


async def test_a_message_for_later_outlives_the_backend_that_stored_it(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await backend.publish_later(topic, Message(topic, b"late"), delay=SHORT)
    async with harness.make_backend() as other:
        with anyio.fail_after(SOON):
            assert payloads(await other.read_new(topic, "g", "c", count=1, timeout=LONG)) == [b"late"]


async def test_a_message_for_later_can_be_taken_back_once(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        kept = await backend.publish_later(topic, Message(topic, b"kept"), delay=SHORT)
        taken_back = await backend.publish_later(topic, Message(topic, b"taken back"), delay=SHORT)
        assert kept != taken_back
        assert await backend.cancel_later(topic, taken_back) is True
        assert await backend.cancel_later(topic, taken_back) is False
        await backend.publish_later(topic, Message(topic, b"marker"), delay=2 * SHORT)
        found: list[bytes] = []

        async def two() -> bool:
            found.extend(payloads(await take(backend, topic, "g", "c")))
            return len(found) >= 2

        await until(two, "two messages")
        assert found == [b"kept", b"marker"]
        assert await backend.cancel_later(topic, kept) is False, "it is appended already"


async def test_taking_back_what_is_unknown_is_false(harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        assert await backend.cancel_later(topic, "nothing") is False
        schedule_id = await backend.publish_later(topic, Message(topic), delay=LONG)
        assert await backend.cancel_later(new_topic(), schedule_id) is False
        assert await backend.cancel_later(topic, schedule_id) is True


@pytest.mark.parametrize(
    ("delay", "at"),
    [(None, None), (1.0, datetime.now(timezone.utc)), (-1.0, None), (float("nan"), None), (None, datetime(2026, 5, 6))],
    ids=["neither", "both", "negative", "no number", "naive"],
)
async def test_a_message_for_later_at_no_clear_time_is_refused_and_not_stored(
    delay: float | None, at: datetime | None, harness: Harness, topic: str
) -> None:
    async with grouped(harness, topic) as backend:
        with pytest.raises(ValidationError, match=r"delay|at "):
            await backend.publish_later(topic, Message(topic), delay=delay, at=at)
        await backend.publish_later(topic, Message(topic, b"marker"), delay=SHORT)
        with anyio.fail_after(SOON):
            assert payloads(await backend.read_new(topic, "g", "c", count=10, timeout=LONG)) == [b"marker"]


# --- forget_consumer


async def test_a_consumer_with_nothing_pending_is_forgotten(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        assert await harness.consumers(topic, "g") == ["c"]
        await backend.ack(topic, "g", entry_id)
        await backend.forget_consumer(topic, "g", "c")
        assert await harness.consumers(topic, "g") == []


async def test_a_consumer_with_something_pending_keeps_its_name_and_loses_nothing(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        await backend.forget_consumer(topic, "g", "c")
        assert await harness.consumers(topic, "g") == ["c"]
        assert ids(await take_over(backend, topic, "g", "next")) == [entry_id]


async def test_a_forgotten_consumers_scan_begins_anew(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        entries = await publish(backend, topic, "a", "b", "c")
        await take(backend, topic, "g", "dead")
        assert ids(await take_over(backend, topic, "g", "c", count=1)) == entries[:1]
        await backend.forget_consumer(topic, "g", "c")
        assert ids(await take_over(backend, topic, "g", "c", count=1)) == entries[:1]


async def test_forgetting_touches_nobody_else(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        entries = await publish(backend, topic, "a", "b")
        await take(backend, topic, "g", "one", 1)
        await take(backend, topic, "g", "two", 1)
        await backend.ack_many(topic, "g", entries)
        await backend.forget_consumer(topic, "g", "one")
        assert await harness.consumers(topic, "g") == ["two"]


async def test_forgetting_never_raises(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await backend.forget_consumer(topic, "g", "nobody")
        await backend.forget_consumer(topic, "no group", "nobody")
        await backend.forget_consumer(new_topic(), "g", "nobody")
        await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        await harness.delete_group(topic, "g")
        await backend.forget_consumer(topic, "g", "c")
        await harness.delete_stream(topic)
        await backend.forget_consumer(topic, "g", "c")


# --- missing and malformed entries


async def test_a_pending_entry_without_a_body_is_reported_as_missing_beside_its_neighbours(
    harness: Harness, topic: str
) -> None:
    async with grouped(harness, topic) as backend:
        before, gone, after = await publish(backend, topic, "a", "b", "c")
        await take(backend, topic, "g", "dead")
        await harness.delete_entry(topic, gone)
        found: list[FetchedEntry] = []

        async def three() -> bool:
            found.extend(await take_over(backend, topic, "g", "alive"))
            return len({entry.id for entry in found}) == 3

        await until(three, "all three entries")
        by_id = {entry.id: entry for entry in found}
        assert isinstance(by_id[gone], MissingEntry)
        assert payloads([by_id[before], by_id[after]]) == [b"a", b"c"]
        await backend.ack_many(topic, "g", [before, gone, after])
        assert await harness.pending(topic, "g") == []


async def test_an_entry_deleted_before_it_was_read_is_nobodys(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        entries = await publish(backend, topic, "a", "b", "c", "d")
        for index in (0, 2, 3):
            await harness.delete_entry(topic, entries[index])
        assert ids(await take(backend, topic, "g", "c")) == [entries[1]]
        assert await take(backend, topic, "g", "c") == []
        await publish(backend, topic, "e")
        assert payloads(await take(backend, topic, "g", "c")) == [b"e"]


async def test_a_malformed_entry_comes_with_its_raw_fields_beside_its_neighbours(harness: Harness, topic: str) -> None:
    fields = {"message": b"not json \xff", "other": b"\x00"}
    async with grouped(harness, topic) as backend:
        (before,) = await publish(backend, topic, "a")
        malformed = await harness.append_raw(topic, fields)
        (after,) = await publish(backend, topic, "b")
        entries = await take(backend, topic, "g", "c")
        assert ids(entries) == [before, malformed, after]
        broken = entries[1]
        assert isinstance(broken, MalformedEntry)
        assert dict(broken.raw) == fields
        assert broken.error
        assert broken.deliveries == (1 if "delivery_count" in backend.features else None)
        assert payloads([entries[0], entries[2]]) == [b"a", b"b"]


async def test_an_entry_without_a_message_field_is_malformed(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await harness.append_raw(topic, {"something": b"else"})
        (entry,) = await take(backend, topic, "g", "c")
        assert isinstance(entry, MalformedEntry)
        assert dict(entry.raw) == {"something": b"else"}


async def test_a_malformed_entry_stays_pending_until_it_is_acknowledged(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        malformed = await harness.append_raw(topic, {"message": b"not json"})
        await take(backend, topic, "g", "dead")
        (entry,) = await take_over(backend, topic, "g", "alive")
        assert isinstance(entry, MalformedEntry)
        assert entry.id == malformed
        assert entry.deliveries == (2 if "delivery_count" in backend.features else None)
        await backend.ack(topic, "g", malformed)
        assert await take_over(backend, topic, "g", "alive") == []


# --- a lost group


@pytest.mark.parametrize("loss", ["group", "stream"])
@pytest.mark.parametrize("call", ["read_new", "blocking read_new", "reclaim_idle"])
async def test_whoever_takes_from_a_lost_group_is_told_so(loss: str, call: str, harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await publish(backend, topic, "a")
        if loss == "group":
            await harness.delete_group(topic, "g")
        else:
            await harness.delete_stream(topic)
        calls = {
            "read_new": lambda: backend.read_new(topic, "g", "c", count=1, timeout=0),
            "blocking read_new": lambda: backend.read_new(topic, "g", "c", count=1, timeout=SOON),
            "reclaim_idle": lambda: backend.reclaim_idle(topic, "g", "c", min_idle=0, count=1),
        }
        with pytest.raises(GroupLostError) as caught:
            await calls[call]()
        assert (caught.value.stream, caught.value.group) == (topic, "g")
        assert caught.value.can_pass
        assert not caught.value.may_have_happened


async def test_a_group_that_never_was_is_told_as_lost(harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        with pytest.raises(GroupLostError):
            await take(backend, topic, "g", "c")


async def test_a_blocked_reader_is_told_when_its_group_is_lost(harness: Harness, topic: str) -> None:
    told: list[GroupLostError] = []
    async with grouped(harness, topic) as backend:

        async def read() -> None:
            try:
                await backend.read_new(topic, "g", "c", count=1, timeout=LONG)
            except GroupLostError as error:
                told.append(error)

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                await harness.delete_group(topic, "g")
    assert [(error.stream, error.group) for error in told] == [(topic, "g")]


async def test_acks_to_a_lost_group_do_no_harm_and_are_never_taken_for_done(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        (entry_id,) = await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        await harness.delete_group(topic, "g")
        await backend.ack(topic, "g", entry_id)
        try:
            refused = await backend.ack_many(topic, "g", [entry_id], consumer="c")
        except GroupLostError:
            refused = [entry_id]
        assert refused == [entry_id]


@pytest.mark.parametrize("settled", [(), (0,), (0, 1), (0, 2), (1, 2), (0, 1, 2), (0, 1, 2, 3)], ids=str)
async def test_a_group_made_again_at_its_safe_id_sees_everything_that_was_not_settled(
    settled: tuple[int, ...], harness: Harness, topic: str
) -> None:
    """Four of five entries were read, some of them settled. There may be duplicates after the loss, but no gap."""
    async with grouped(harness, topic) as backend:
        entries = await publish(backend, topic, "0", "1", "2", "3", "4")
        await take(backend, topic, "g", "c", 4)
        await backend.ack_many(topic, "g", [entries[index] for index in settled])
        await harness.delete_group(topic, "g")
        with pytest.raises(GroupLostError) as caught:
            await take(backend, topic, "g", "c")
        safe_id = caught.value.safe_id
        unsettled = [entry_id for index, entry_id in enumerate(entries) if index not in settled]
        if safe_id is not None:
            assert place(safe_id) < place(unsettled[0])
        assert await backend.create_group(topic, "g", safe_id or "0") is True
        again = ids(await take(backend, topic, "g", "c"))
        assert set(unsettled) <= set(again)
        assert again == sorted(again, key=place)


async def test_a_stream_that_vanished_with_its_groups_has_no_safe_id(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        await publish(backend, topic, "a")
        await take(backend, topic, "g", "c")
        await harness.delete_stream(topic)
        (entry_id,) = await publish(backend, topic, "b")
        with pytest.raises(GroupLostError) as caught:
            await take(backend, topic, "g", "c")
        if caught.value.safe_id is not None:
            assert place(caught.value.safe_id) < place(entry_id)
        await backend.create_group(topic, "g", caught.value.safe_id or "0")
        assert ids(await take(backend, topic, "g", "c")) == [entry_id]


# --- a whole pass in one go


WITH_PASSES = pytest.mark.parametrize("harness", ["server"], indirect=True)
"""The memory backend offers no whole passes."""


def pass_source(backend: StreamBackend) -> PassSource:
    assert isinstance(backend, PassSource)
    return backend


@asynccontextmanager
async def with_retries(harness: Harness, topic: str, retries: str) -> AsyncGenerator[StreamBackend, None]:
    """A topic and its retry stream, each with a group; of both, two entries are idle, and two were never read."""
    async with grouped(harness, topic) as backend:
        await backend.create_group(retries, "g", "0")
        for stream in (topic, retries):
            await publish(backend, stream, "idle", "idle too")
            await take(backend, stream, "g", "dead")
            await publish(backend, stream, "new", "new too")
        yield backend


@WITH_PASSES
async def test_a_pass_takes_what_is_idle_in_both_streams_and_what_is_new_among_the_retries(
    harness: Harness, topic: str
) -> None:
    retries = f"{{{topic}}}.retries"  # on a cluster, both are in one slot
    async with with_retries(harness, topic, retries) as backend:
        taken = await pass_source(backend).redeliver(topic, retries, "g", "c", min_idle=0, count=100)
        assert payloads(taken.reclaimed) == [b"idle", b"idle too"]
        assert payloads(taken.retries) == [b"new", b"new too"]
        assert payloads(taken.reclaimed_retries)[:2] == [b"idle", b"idle too"]
        assert taken.lost is None
        assert payloads(await take(backend, topic, "g", "c")) == [b"new", b"new too"], "a topic's news are read_new's"


@WITH_PASSES
async def test_a_pass_never_takes_more_than_it_was_asked_for_and_starves_no_step(harness: Harness, topic: str) -> None:
    retries = f"{{{topic}}}.retries"  # on a cluster, both are in one slot
    async with with_retries(harness, topic, retries) as backend:
        source = pass_source(backend)
        found: dict[str, list[str]] = {"topic": [], "retries": []}

        async def everything() -> bool:
            taken = await source.redeliver(topic, retries, "g", "c", min_idle=LONG, count=1)
            assert len(taken.reclaimed) + len(taken.retries) + len(taken.reclaimed_retries) <= 1
            found["topic"] += ids(taken.reclaimed)
            found["retries"] += ids([*taken.retries, *taken.reclaimed_retries])
            return (len(found["topic"]), len(found["retries"])) == (2, 4)

        for stream in (topic, retries):
            await backend.release(stream, "g", "dead", list(await pending_of(harness, stream, "g")))
        await until(everything, "two of the topic and four retries, one by one")
        assert len(set(found["topic"])) == 2
        assert len(set(found["retries"])) == 4


@WITH_PASSES
async def test_a_pass_keeps_what_it_took_where_one_of_its_groups_is_lost(harness: Harness, topic: str) -> None:
    retries = f"{{{topic}}}.retries"  # on a cluster, both are in one slot
    async with with_retries(harness, topic, retries) as backend:
        source = pass_source(backend)
        await harness.delete_group(retries, "g")
        taken = await source.redeliver(topic, retries, "g", "c", min_idle=0, count=100)
        assert payloads(taken.reclaimed) == [b"idle", b"idle too"]
        assert isinstance(taken.lost, GroupLostError)
        assert (taken.lost.stream, taken.lost.group) == (retries, "g")


# --- inspection


async def test_inspection_counts_what_a_stream_holds(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        assert isinstance(backend, StreamInspector) == ("inspect" in backend.features)
        if not isinstance(backend, StreamInspector):
            pytest.skip("this backend cannot inspect")
        assert await backend.count_entries(new_topic()) == 0
        entries = await publish(backend, topic, "a", "b", "c")
        assert await backend.count_entries(topic) == 3
        await take(backend, topic, "g", "c")
        await backend.ack_many(topic, "g", entries)
        assert await backend.count_entries(topic) == 3, "a stream keeps what was acknowledged"
        await harness.delete_entry(topic, entries[0])
        assert await backend.count_entries(topic) == 2


async def test_inspection_lists_pending_entries_lowest_first_and_changes_nothing(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        if not isinstance(backend, StreamInspector):
            pytest.skip("this backend cannot inspect")
        entries = await publish(backend, topic, "a", "b", "c")
        await take(backend, topic, "g", "one", 2)
        await take(backend, topic, "g", "two", 1)
        await backend.release(topic, "g", "one", entries[:1])
        for _ in range(2):
            pending = await backend.pending_entries(topic, "g")
            assert [entry.id for entry in pending] == entries
            assert [entry.deliveries for entry in pending] == [0, 1, 1]
            assert [entry.consumer for entry in pending[1:]] == ["one", "two"]
            assert all(entry.idle >= 0 for entry in pending)
        assert [entry.id for entry in await backend.pending_entries(topic, "g", limit=2)] == entries[:2]


async def test_inspection_lists_consumers_sorted(harness: Harness, topic: str) -> None:
    async with grouped(harness, topic) as backend:
        if not isinstance(backend, StreamInspector):
            pytest.skip("this backend cannot inspect")
        await publish(backend, topic, "a", "b", "c")
        for consumer in ("b", "c", "a"):
            await take(backend, topic, "g", consumer, 1)
        assert await backend.consumer_names(topic, "g") == ["a", "b", "c"]


async def test_inspecting_a_group_that_is_not_there_says_so(harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        if not isinstance(backend, StreamInspector):
            pytest.skip("this backend cannot inspect")
        await publish(backend, topic, "a")
        with pytest.raises(GroupLostError):
            await backend.pending_entries(topic, "g")
        with pytest.raises(GroupLostError):
            await backend.consumer_names(topic, "g")
