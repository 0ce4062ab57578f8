"""Reads are never lost: whatever cancels them or breaks under them, nothing stays delivered but unseen.

Specification: DESIGN.md, sections 2, 4 (promises 1, 7, 8) and 6, and issue 4: a cancelled method hands back what it
took, uncounted, before the cancellation comes out, and leaves the multiplexed connection in step; what had been
delivered to a consumer over a connection that broke is found by its next read; consumers leave no names behind.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import anyio
import pytest
import redis.exceptions
from anyio import to_thread
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint
from fake_server import GONE, listening
from harness import SOON, until
from servers import RedisHarness, RunningServer
from sweeps import sampled

from anybus import BackendError, EventBusError, GroupLostError, JsonCodec, Message, MsgpackCodec
from anybus._failure.copies import retry_stream
from anybus.abc import ClaimedMessage, FetchedEntry, MalformedEntry, MissingEntry, Output, Redelivered
from anybus.backends.redis import RedisBackend, _taking_calls
from anybus.backends.redis import _scripts as scripts
from anybus.backends.redis._decoding import MAX_RECEIVED
from anybus.backends.redis._keys import RETURNED, delayed, meta

T = TypeVar("T")

cancellations = sampled("cancellations", 150, 2000)
"""How often each way of taking entries is cancelled, on each event loop."""

LONG = 3600.0


@pytest.fixture
def harness(server: RunningServer) -> RedisHarness:
    return RedisHarness(server)


@pytest.fixture
def admin(server: RunningServer) -> Iterator[Any]:
    with server.client() as client:
        yield client


def ids(entries: list[FetchedEntry]) -> list[str]:
    return [entry.id for entry in entries]


def payload(entry: FetchedEntry) -> bytes | None:
    return entry.message.payload if isinstance(entry, ClaimedMessage) else None


async def cancelled_after(steps: int, work: Callable[[], Awaitable[T]]) -> tuple[T | None, bool]:
    """What came out of the work, if it was done in time, and whether the cancellation came out of it."""
    result: T | None = None
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                for _ in range(steps):
                    await checkpoint()
                scope.cancel()

            tasks.start_soon(cancel)
            result = await work()
            tasks.cancel_scope.cancel()
    return result, scope.cancelled_caught and result is None


@asynccontextmanager
async def under_load(backend: RedisBackend, *streams: str) -> AsyncGenerator[dict[str, set[str]], None]:
    """Somebody publishes to the streams all the while; what comes out is what has been published so far."""
    published: dict[str, set[str]] = {stream: set() for stream in streams}
    dice = random.Random(1)
    enough = False

    async def publish() -> None:
        while not enough:
            for stream in streams:
                published[stream].add(await backend.publish(stream, Message("t", b"x" * 100)))
            await anyio.sleep(dice.random() * 0.003)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        yield published
        enough = True


async def assert_nothing_is_unseen(
    harness: RedisHarness, backend: RedisBackend, stream: str, held: set[str], published: set[str]
) -> None:
    """Every entry is in somebody's hands, handed back uncounted, or still to be read; nothing else is pending."""
    pending = await harness.pending(stream, "g")
    assert {entry.id for entry in pending if entry.consumer == "c"} == held
    returned = [entry for entry in pending if entry.consumer != "c"]
    assert {(entry.consumer, entry.deliveries) for entry in returned} <= {(RETURNED, 0)}
    unread: set[str] = set()
    while batch := await backend.read_new(stream, "g", "rest", count=1000, timeout=0):
        unread.update(ids(batch))
    parts = (held, {entry.id for entry in returned}, unread)
    assert set().union(*parts) == published
    assert sum(map(len, parts)) == len(published), "nobody has what somebody else has"


def what_is_handed_back(backend: RedisBackend) -> list[str]:
    """Ids that cancelled calls hand back from now on: a test in which there are none shows nothing."""
    taking: Any = backend._taking
    hand_back = taking._calls.hand_back
    handed_back: list[str] = []

    async def noted(taken: dict[str, list[FetchedEntry]], *member: str) -> None:
        for entries in taken.values():
            handed_back.extend(ids(entries))
        await hand_back(taken, *member)

    taking._calls.hand_back = noted
    return handed_back


async def in_step(backend: RedisBackend) -> bool:
    replies = [await backend._client.call("ECHO", str(number)) for number in range(20)]
    return replies == [str(number).encode() for number in range(20)] and backend._client.mux.connections == 1


# --- cancellations, by the thousand


@cancellations
@pytest.mark.parametrize(("timeout", "most_steps"), [(LONG, 60), (0.0, 25)], ids=["blocking", "not waiting"])
async def test_cancelled_reads_leave_nothing_delivered_but_unseen(
    timeout: float, most_steps: int, cancellations: int, harness: RedisHarness, topic: str
) -> None:
    dice = random.Random(2)
    held: set[str] = set()
    cancelled = 0
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        handed_back = what_is_handed_back(backend)
        async with under_load(backend, topic) as published:
            while cancelled < cancellations:
                entries, was_cancelled = await cancelled_after(
                    dice.randrange(most_steps), lambda: backend.read_new(topic, "g", "c", count=3, timeout=timeout)
                )
                cancelled += was_cancelled
                held.update(ids(entries or []))
                if len(held) >= 1000:
                    assert await backend.ack_many(topic, "g", sorted(held), consumer="c") == []
                    published[topic] -= held
                    held.clear()
                if not entries and not was_cancelled:
                    await checkpoint()
        assert handed_back
        await assert_nothing_is_unseen(harness, backend, topic, held, published[topic])
        assert await in_step(backend)


@cancellations
async def test_cancelled_reclaims_leave_nothing_taken_but_unseen(
    cancellations: int, harness: RedisHarness, topic: str
) -> None:
    dice = random.Random(3)
    held: set[str] = set()
    cancelled = 0
    nothing_left = True
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        handed_back = what_is_handed_back(backend)
        async with under_load(backend, topic) as published:
            await until(lambda: len(published[topic]) >= 10)  # something to take over from the first time on
            while cancelled < cancellations:
                if len(held) >= 10 or nothing_left:
                    # Back to where they can be taken over again, with some more.
                    more = ids(await backend.read_new(topic, "g", "other", count=10, timeout=0))
                    await backend.release(topic, "g", "c", sorted(held))
                    await backend.release(topic, "g", "other", more)
                    held.clear()
                entries, was_cancelled = await cancelled_after(
                    dice.randrange(25), lambda: backend.reclaim_idle(topic, "g", "c", min_idle=LONG, count=3)
                )
                cancelled += was_cancelled
                nothing_left = entries == []
                held.update(ids(entries or []))
        assert handed_back
        await assert_nothing_is_unseen(harness, backend, topic, held, published[topic])
        assert await in_step(backend)


@cancellations
async def test_cancelled_passes_leave_nothing_taken_but_unseen(
    cancellations: int, harness: RedisHarness, topic: str
) -> None:
    dice = random.Random(4)
    retries = retry_stream(topic, "g")
    held: dict[str, set[str]] = {topic: set(), retries: set()}
    cancelled = 0
    nothing_left = True
    async with harness.make_backend() as backend:
        for stream in held:
            await backend.create_group(stream, "g", "0")
        handed_back = what_is_handed_back(backend)
        async with under_load(backend, topic, retries) as published:
            await until(lambda: len(published[topic]) >= 10)  # something to take over from the first time on
            while cancelled < cancellations:
                if len(held[topic]) + len(held[retries]) >= 10 or nothing_left:
                    more = ids(await backend.read_new(topic, "g", "other", count=10, timeout=0))
                    await backend.release(topic, "g", "other", more)
                    for stream, taken in held.items():
                        await backend.release(stream, "g", "c", sorted(taken))
                        taken.clear()
                found, was_cancelled = await cancelled_after(
                    dice.randrange(25),
                    lambda: backend.redeliver(topic, retries, "g", "c", min_idle=LONG, count=3),
                )
                cancelled += was_cancelled
                nothing_left = found == Redelivered([], [], [])
                if found is not None:
                    assert found.lost is None
                    held[topic].update(ids(list(found.reclaimed)))
                    held[retries].update(ids([*found.retries, *found.reclaimed_retries]))
        assert handed_back
        for stream, taken in held.items():
            await assert_nothing_is_unseen(harness, backend, stream, taken, published[stream])
        assert await in_step(backend)


def _by_stream(taken: Redelivered, topic: str, retries: str) -> dict[str, list[FetchedEntry]]:
    return {topic: taken.reclaimed, retries: taken.retries + taken.reclaimed_retries}


@pytest.mark.parametrize("way", ["read", "reclaim", "pass"])
async def test_what_a_cancelled_call_took_goes_back_although_the_second_for_it_is_over(
    way: str, harness: RedisHarness, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server, or this whole machine, stood still for so long; and then the backend is left at once."""
    monkeypatch.setattr(_taking_calls, "_SHIELDED", 0.0)
    streams = (topic, retry_stream(topic, "g"))
    async with harness.make_backend() as other:
        for stream in streams:
            await other.create_group(stream, "g", "0")
            for _ in range(3):
                await other.publish(stream, Message("t"))
            if way != "read":
                taken = await other.read_new(stream, "g", "other", count=3, timeout=0)
                await other.release(stream, "g", "other", ids(taken))
        went_back: list[str] = []
        for steps in range(60):
            if went_back and steps >= 12:
                break
            await other.publish(topic, Message("t"))  # something new for a read
            async with harness.make_backend() as backend:
                assert await backend.count_entries(topic) == 4 + steps  # it is connected now
                handed_back = what_is_handed_back(backend)

                async def take(backend: RedisBackend = backend) -> Any:
                    if way == "read":
                        return await backend.read_new(topic, "g", "c", count=1, timeout=0)
                    if way == "reclaim":
                        return await backend.reclaim_idle(topic, "g", "c", min_idle=LONG, count=3)
                    return await backend.redeliver(*streams, "g", "c", min_idle=LONG, count=6)

                result, cancelled = await cancelled_after(steps % 12, take)
                if not cancelled:
                    assert result is not None
                    found = {topic: result} if isinstance(result, list) else _by_stream(result, *streams)
                    for stream, entries in found.items():
                        await backend.release(stream, "g", "c", ids(entries))
            went_back += handed_back
            for stream in streams:
                for entry in await harness.pending(stream, "g"):
                    assert (entry.consumer, entry.deliveries) == (RETURNED, 0), f"cancelled after {steps} steps"
        assert went_back


async def test_the_cancellation_of_a_read_comes_out_even_where_its_entries_cannot_go_back(
    harness: RedisHarness, admin: Any, topic: str
) -> None:
    """The server refuses to take them back; no error may stand in the cancellation's place."""
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        await to_thread.run_sync(admin.delete, topic)
        await to_thread.run_sync(admin.set, topic, "no stream any more")
        for _ in range(20):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await backend._taking._calls.hand_back(
                    {topic: [MissingEntry("1-1")], f"{topic} too": [MissingEntry("1-1")]}, "g", "c"
                )
                await checkpoint()
            assert scope.cancelled_caught
        assert await in_step(backend)


# --- a reader's connection breaks


class Losses:
    """Stands between a backend and its server. While it is losing, replies that carry entries never arrive."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.losing = False
        self.lost = 0

    async def pass_on(self, outside: ByteStream) -> None:
        async with await anyio.connect_tcp("127.0.0.1", self.server.port) as inside:
            async with anyio.create_task_group() as tasks:

                async def answers() -> None:
                    with suppress(*GONE):
                        while True:
                            data = await inside.receive()
                            if self.losing and b"$7\r\nmessage\r\n" in data:
                                self.lost += 1
                                break
                            await outside.send(data)
                    tasks.cancel_scope.cancel()

                tasks.start_soon(answers)
                with suppress(*GONE):
                    while True:
                        await inside.send(await outside.receive())
                tasks.cancel_scope.cancel()
        await anyio.aclose_forcefully(outside)


@asynccontextmanager
async def losing(server: RunningServer) -> AsyncGenerator[tuple[Losses, RedisBackend], None]:
    losses = Losses(server)
    async with listening(losses.pass_on) as port:
        async with RedisBackend(f"redis://127.0.0.1:{port}") as backend:
            yield losses, backend


@pytest.mark.parametrize("timeout", [LONG, 0.0], ids=["blocking", "not waiting"])
async def test_what_a_broken_connection_delivered_unseen_is_found_by_the_next_read(
    timeout: float, server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with harness.make_backend() as other, losing(server) as (losses, backend):
        await backend.create_group(topic, "g", "0")
        seen = [await other.publish(topic, Message(topic, b"seen"))]
        assert ids(await backend.read_new(topic, "g", "c", count=10, timeout=SOON)) == seen
        errors: list[BackendError] = []

        async def read() -> None:
            try:
                await backend.read_new(topic, "g", "c", count=10, timeout=timeout)
            except BackendError as error:
                errors.append(error)

        losses.losing = True
        unseen: list[str] = []
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                if timeout:
                    tasks.start_soon(read)
                    await anyio.wait_all_tasks_blocked()
                unseen.append(await other.publish(topic, Message(topic, b"unseen")))
                if not timeout:
                    tasks.start_soon(read)
        losses.losing = False
        assert losses.lost == 1
        assert [(error.may_have_happened, error.can_pass) for error in errors] == [(True, True)]
        assert [entry.id for entry in await harness.pending(topic, "g")] == seen + unseen
        unseen.append(await other.publish(topic, Message(topic, b"unread")))
        found: list[FetchedEntry] = []
        with anyio.fail_after(SOON):
            while len(found) < 2:
                with suppress(BackendError):
                    found += await backend.read_new(topic, "g", "c", count=10, timeout=timeout)
        assert ids(found) == unseen, "found once, and in order; what had been seen does not come again"
        assert [entry.deliveries for entry in found if isinstance(entry, ClaimedMessage)] == [1, 1]


@pytest.mark.parametrize("takes", ["reclaim", "pass"])
@pytest.mark.parametrize("cancelled", [False, True], ids=["", "cancelled"])
async def test_what_a_pass_took_whose_reply_was_lost_is_found_by_the_next_pass(
    cancelled: bool, takes: str, server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    """Not after a lease: the entries are this consumer's, and nobody holds them."""
    retries = retry_stream(topic, "g")
    async with harness.make_backend() as other, losing(server) as (losses, backend):
        for stream in (topic, retries):
            await backend.create_group(stream, "g", "0")
        mine = await other.publish(topic, Message(topic, b"mine"))
        assert ids(await backend.read_new(topic, "g", "c", count=10, timeout=SOON)) == [mine]
        published = [await other.publish(topic, Message(topic, b"%d" % number)) for number in range(5)]
        await other.read_new(topic, "g", "dead", count=10, timeout=0)
        await other.release(topic, "g", "dead", published)
        expected = published
        if takes == "pass":
            expected = [*published, await other.publish(retries, Message(topic, b"retry"))]

        async def take(min_idle: float) -> list[FetchedEntry]:
            if takes == "reclaim":
                return await backend.reclaim_idle(topic, "g", "c", min_idle=min_idle, count=10)
            taken = await backend.redeliver(topic, retries, "g", "c", min_idle=min_idle, count=10)
            return taken.reclaimed + taken.retries + taken.reclaimed_retries

        losses.losing = True
        with anyio.fail_after(SOON), anyio.CancelScope() as scope, suppress(BackendError):
            if cancelled:
                scope.cancel()
            await take(LONG)
        assert losses.lost == 1
        losses.losing = False
        found: list[FetchedEntry] = []
        with anyio.fail_after(SOON):
            while len(found) < len(expected):
                with suppress(BackendError):
                    # What this consumer holds anyway may come along: the bus knows that. (Told apart by what is in it:
                    # the retry stream's ids can equal the topic's.)
                    found += [entry for entry in await take(LONG) if payload(entry) != b"mine"]
            assert await take(LONG) == []
        assert ids(found) == expected
        counts = [entry.deliveries for entry in found if isinstance(entry, ClaimedMessage)]
        assert counts == [1] * len(expected), "released and taken once, or read once"
        assert ids(await backend.reclaim_idle(topic, "g", "d", min_idle=LONG, count=10)) == []


async def test_a_cancelled_read_whose_reply_is_lost_is_found_by_the_next_read(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with harness.make_backend() as other, losing(server) as (losses, backend):
        await backend.create_group(topic, "g", "0")
        await backend.read_new(topic, "g", "c", count=10, timeout=0.01)

        async def read() -> None:
            with suppress(BackendError):  # if the loss is noticed first
                await backend.read_new(topic, "g", "c", count=10, timeout=LONG)

        losses.losing = True
        published: list[str] = []
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                published.append(await other.publish(topic, Message(topic)))
                tasks.cancel_scope.cancel()
        losses.losing = False
        found: list[FetchedEntry] = []
        with anyio.fail_after(SOON):
            while not found:
                with suppress(BackendError):
                    found += await backend.read_new(topic, "g", "c", count=10, timeout=1)
                    found += await backend.reclaim_idle(topic, "g", "c", min_idle=LONG, count=10)
        assert ids(found) == published


async def test_what_was_delivered_unseen_is_not_taken_back_from_a_new_owner(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with harness.make_backend() as other, losing(server) as (losses, backend):
        await backend.create_group(topic, "g", "0")
        for body in (b"taken over", b"still ours"):
            await other.publish(topic, Message(topic, body))
        losses.losing = True
        with pytest.raises(BackendError):
            await backend.read_new(topic, "g", "c", count=10, timeout=SOON)
        losses.losing = False
        (taken,) = await other.reclaim_idle(topic, "g", "other", min_idle=0, count=1)
        found: list[FetchedEntry] = []
        with anyio.fail_after(SOON):
            while not found:
                with suppress(BackendError):
                    found += await backend.read_new(topic, "g", "c", count=10, timeout=1)
        owners = {entry.id: entry.consumer for entry in await harness.pending(topic, "g")}
        assert owners == {taken.id: "other", found[0].id: "c"}
        assert len(found) == 1


async def test_entries_deleted_meanwhile_are_told_as_missing_or_not_at_all(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with harness.make_backend() as other, losing(server) as (losses, backend):
        await backend.create_group(topic, "g", "0")
        published = [await other.publish(topic, Message(topic)) for _ in range(3)]
        losses.losing = True
        with pytest.raises(BackendError):
            await backend.read_new(topic, "g", "c", count=10, timeout=SOON)
        losses.losing = False
        await harness.delete_entry(topic, published[1])
        found: list[FetchedEntry] = []
        with anyio.fail_after(SOON):
            while not found:
                with suppress(BackendError):
                    found += await backend.read_new(topic, "g", "c", count=10, timeout=1)
        assert ids(found) == published
        assert [isinstance(entry, MissingEntry) for entry in found] == [False, True, False]


async def test_a_missing_entry_whose_taker_was_cancelled_is_logged(
    harness: RedisHarness, admin: Any, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """From 7.0 on it leaves the pending list when it is seen: nobody else will ever hear of it."""
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        lost = await backend.publish(topic, Message(topic))
        await backend.read_new(topic, "g", "dead", count=10, timeout=0)
        await backend.release(topic, "g", "dead", [lost])
        admin.xdel(topic, lost)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await backend.reclaim_idle(topic, "g", "c", min_idle=LONG, count=10)
    assert lost in caplog.text
    assert topic in caplog.text


async def test_killed_readers_lose_nothing_while_entries_arrive(
    server: RunningServer, harness: RedisHarness, admin: Any, topic: str
) -> None:
    found: list[str] = []
    async with harness.make_backend() as backend, harness.make_backend() as other:
        await backend.create_group(topic, "g", "0")
        enough = False
        published: list[str] = []

        async def read() -> None:
            while not enough or len(found) < len(published):
                with suppress(BackendError):
                    found.extend(ids(await backend.read_new(topic, "g", "c", count=3, timeout=0.2)))

        def kill_readers() -> None:
            for client in admin.client_list():
                if client["cmd"] in ("xreadgroup", "client|id", "client"):
                    admin.client_kill_filter(_id=client["id"], skipme=True)

        with anyio.fail_after(3 * SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                for _ in range(50):
                    published += [await other.publish(topic, Message(topic)) for _ in range(5)]
                    await to_thread.run_sync(kill_readers)
                enough = True
    assert sorted(found) == sorted(published), "each of them once"


# --- groups that vanish


@pytest.mark.parametrize("pending", [False, True], ids=["all settled", "some pending"])
async def test_a_lost_group_is_told_with_the_floor_that_was_kept(
    pending: bool, server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        published = [await backend.publish(topic, Message(topic)) for _ in range(4)]
        await backend.read_new(topic, "g", "c", count=4, timeout=0)
        await backend.ack_many(topic, "g", published[:2] if pending else published)
        await harness.delete_group(topic, "g")
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: backend.read_new(topic, "g", "c", count=1, timeout=0),
            lambda: backend.read_new(topic, "g", "c", count=1, timeout=SOON),
            lambda: backend.reclaim_idle(topic, "g", "c", min_idle=1, count=1),
            lambda: backend.renew(topic, "g", "c", published),
            lambda: backend.release(topic, "g", "c", published),
            lambda: backend.transfer(topic, "g", "c", published[0], []),
            lambda: backend.ack_many(topic, "g", published, consumer="c"),
            lambda: backend.pending_entries(topic, "g"),
        ]
        for call in calls:
            with pytest.raises(GroupLostError) as caught:
                await call()
            floor = caught.value.safe_id
            assert floor is not None
            again = await backend.create_group(topic, "g", floor)
            assert again
            left = ids(await backend.read_new(topic, "g", "c", count=10, timeout=0))
            assert left == (published[2:] if pending else [])
            await harness.delete_group(topic, "g") if not pending else await lose_without_floor(harness, topic)


async def lose_without_floor(harness: RedisHarness, topic: str) -> None:
    """The group goes, and the floor stays what it was."""
    await to_thread.run_sync(harness._client.xgroup_destroy, topic, "g")


async def test_the_floor_is_kept_by_passes(admin: Any, harness: RedisHarness, topic: str) -> None:
    retries = retry_stream(topic, "g")
    async with harness.make_backend() as backend:
        for stream in (topic, retries):
            await backend.create_group(stream, "g", "0")
        first = await backend.publish(topic, Message(topic))
        await backend.read_new(topic, "g", "c", count=1, timeout=0)
        await backend.ack(topic, "g", first)
        await backend.redeliver(topic, retries, "g", "c", min_idle=LONG, count=1)
        await backend.count_entries(topic)  # whose reply comes after all that was sent before
        assert await to_thread.run_sync(admin.hget, meta(topic), "g") == first.encode()


# --- names


async def test_the_parking_consumer_is_removed_by_whoever_empties_it(harness: RedisHarness, topic: str) -> None:
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        for _ in range(3):
            await backend.publish(topic, Message(topic))
        taken = ids(await backend.read_new(topic, "g", "leaver", count=3, timeout=0))
        await backend.release(topic, "g", "leaver", taken)
        await backend.forget_consumer(topic, "g", "leaver")
        assert await harness.consumers(topic, "g") == [RETURNED]
        await backend.reclaim_idle(topic, "g", "c", min_idle=LONG, count=2)
        assert await harness.consumers(topic, "g") == [RETURNED, "c"]
        await backend.reclaim_idle(topic, "g", "c", min_idle=LONG, count=2)
        assert await harness.consumers(topic, "g") == ["c"]


async def test_a_forgotten_consumer_leaves_no_name_and_no_connection(
    harness: RedisHarness, admin: Any, topic: str
) -> None:
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        await backend.publish(topic, Message(topic))
        (entry,) = await backend.read_new(topic, "g", "c", count=1, timeout=SOON)
        await backend.read_new(topic, "g", "c", count=1, timeout=0.01)
        [pool] = backend._taking._readers._pools.values()
        client_id = pool.shared[0]._reader.client_id
        assert client_id
        await backend.ack(topic, "g", entry.id)
        await backend.forget_consumer(topic, "g", "c")
        assert await harness.consumers(topic, "g") == []

        def gone() -> bool:
            return str(client_id) not in {client["id"] for client in admin.client_list()}

        await until(lambda: to_thread.run_sync(gone), "the end of the reader's connection")


async def test_dead_consumers_with_nothing_pending_are_removed_and_no_others(
    harness: RedisHarness, admin: Any, topic: str
) -> None:
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        for _ in range(2):
            await backend.publish(topic, Message(topic))
        (first,) = await backend.read_new(topic, "g", "dead", count=1, timeout=0)
        await backend.read_new(topic, "g", "dead with something", count=1, timeout=0)
        await backend.ack(topic, "g", first.id)
        await anyio.sleep(0.02)
        run = [scripts.REAP.source, 1, topic, "g", "myself"]
        assert await to_thread.run_sync(lambda: admin.eval(*run, 3_600_000)) == 0
        assert await to_thread.run_sync(lambda: admin.eval(*run, 10)) == 1
        assert await harness.consumers(topic, "g") == ["dead with something"]
        assert len(await harness.pending(topic, "g")) == 1


# --- retries and delays


async def test_retry_streams_do_not_grow(harness: RedisHarness, topic: str) -> None:
    retries = retry_stream(topic, "g")
    async with harness.make_backend() as backend:
        for stream in (topic, retries):
            await backend.create_group(stream, "g", "0")
        for number in range(10):
            await backend.publish(topic, Message(topic))
            (entry,) = await backend.read_new(topic, "g", "c", count=1, timeout=0)
            source = topic
            for _ in range(3):
                output = Output(retries, Message(topic), delay=0.001 if number % 2 else 0)
                assert await backend.transfer(source, "g", "c", entry.id, [output]) is not None

                async def retried() -> bool:
                    nonlocal entry
                    found = await backend.redeliver(topic, retries, "g", "c", min_idle=LONG, count=1)
                    if found.retries:
                        entry = found.retries[0]
                    return bool(found.retries)

                await until(retried, "the retry")
                source = retries
            if number % 3 == 1:
                await backend.ack_many(retries, "g", [entry.id], consumer="c")
            elif number % 3 == 2:
                await backend.ack(retries, "g", entry.id)
            else:
                assert await backend.transfer(retries, "g", "c", entry.id, []) == []
        assert await backend.count_entries(retries) == 0
        assert await harness.pending(retries, "g") == []
        assert await backend.count_entries(topic) == 10, "the topic itself is everybody's"


async def test_a_message_taken_back_is_gone_and_leaves_its_neighbours(
    harness: RedisHarness, admin: Any, topic: str
) -> None:
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        tokens = [await backend.publish_later(topic, Message(topic, b"%d" % n), delay=LONG) for n in range(600)]
        assert await backend.cancel_later(topic, tokens[300])
        assert not await backend.cancel_later(topic, tokens[300])
        assert not await backend.cancel_later(topic, "unknown")
        assert await to_thread.run_sync(admin.zcard, delayed(topic)) == 599
        assert await backend.count_entries(topic) == 0


async def test_due_messages_are_moved_again_after_the_server_has_forgotten_its_scripts(
    harness: RedisHarness, admin: Any, topic: str
) -> None:
    async with harness.make_backend() as backend:
        for timeout in (0.0, 0.05):
            await backend.create_group(topic, "g", "0")
            await backend.publish_later(topic, Message(topic, b"late"), delay=0.001)
            await to_thread.run_sync(admin.script_flush)

            async def came(timeout: float = timeout) -> bool:
                return bool(await backend.read_new(topic, "g", "c", count=1, timeout=timeout))

            await until(came, "the delayed message")


async def test_every_script_is_told_again_to_a_server_that_has_forgotten_it(
    harness: RedisHarness, admin: Any, topic: str
) -> None:
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")
        for _ in range(4):
            await backend.publish(topic, Message(topic))

        async def forgotten(work: Callable[[], Awaitable[T]]) -> T:
            await to_thread.run_sync(admin.script_flush)
            return await work()

        first, second, third, fourth = ids(await backend.read_new(topic, "g", "c", count=4, timeout=0))
        assert await forgotten(lambda: backend.renew(topic, "g", "c", [first])) == [first]
        assert await forgotten(lambda: backend.ack_many(topic, "g", [first, "9-9"], consumer="c")) == ["9-9"]
        assert await forgotten(lambda: backend.transfer(topic, "g", "c", second, [])) == []
        await forgotten(lambda: backend.release(topic, "g", "c", [third]))
        taken = await forgotten(lambda: backend.reclaim_idle(topic, "g", "c", min_idle=LONG, count=1))
        assert ids(taken) == [third]
        token = await forgotten(lambda: backend.publish_later(topic, Message(topic), delay=LONG))
        assert await forgotten(lambda: backend.cancel_later(topic, token))
        retries = retry_stream(topic, "g")
        await backend.create_group(retries, "g", "0")
        await backend.publish(retries, Message(topic))
        found = await forgotten(lambda: backend.redeliver(topic, retries, "g", "c", min_idle=LONG, count=5))
        assert len(found.retries) == 1
        await backend.ack_many(topic, "g", [third, fourth])
        await forgotten(lambda: backend.forget_consumer(topic, "g", "c"))
        assert await harness.consumers(topic, "g") == []


# --- entries that nobody could decode


async def test_what_cannot_be_decoded_comes_with_its_raw_fields_beside_its_neighbours(
    harness: RedisHarness, admin: Any, topic: str
) -> None:
    good = JsonCodec().encode(Message(topic, b"good"))
    too_long = good.ljust(MAX_RECEIVED + 1)
    bad: list[dict[Any, Any]] = [
        {b"other": b"1"},
        {b"message": too_long},
        {b"message": b"\xff\xfe"},
        {b"\xff\xfe": b"\x00", b"message": b"{}"},
        {b"": b""},
    ]
    async with harness.make_backend() as backend:
        await backend.create_group(topic, "g", "0")

        def append() -> None:
            for fields in bad:
                admin.xadd(topic, fields)
                admin.xadd(topic, {b"message": good, b"\xff": b"more"})

        await to_thread.run_sync(append)
        entries = await backend.read_new(topic, "g", "c", count=100, timeout=SOON)
        assert [type(entry) for entry in entries] == [MalformedEntry, ClaimedMessage] * len(bad)
        malformed = [entry for entry in entries if isinstance(entry, MalformedEntry)]
        assert [dict(entry.raw) for entry in malformed] == [
            {"other": b"1"},
            {"message": too_long},
            {"message": b"\xff\xfe"},
            {"\\xff\\xfe": b"\x00", "message": b"{}"},
            {"": b""},
        ]
        assert all(entry.error and len(entry.error) < 500 for entry in malformed)
        raw = malformed[3]
        output = Output(f"{topic}.dead", Message(f"{topic}.dead"), raw=raw.raw)
        assert await backend.transfer(topic, "g", "c", raw.id, [output])
        await backend.release(topic, "g", "c", ids(entries))
        again: list[FetchedEntry] = []
        while part := await backend.reclaim_idle(topic, "g", "d", min_idle=LONG, count=100):
            again += part  # one call brings some 1 MiB
        assert [type(entry) for entry in again].count(MalformedEntry) == len(bad) - 1


async def test_a_codec_that_raises_what_it_should_not_harms_only_its_own_entry(
    server: RunningServer, topic: str
) -> None:
    class Picky(MsgpackCodec):
        def decode(self, data: bytes) -> Message:
            message = super().decode(data)
            if message.payload == b"bad":
                raise LookupError("no such thing")
            return message

    async with RedisBackend(server.url, codec=Picky()) as backend:
        await backend.create_group(topic, "g", "0")
        for body in (b"good", b"bad", b"good"):
            await backend.publish(topic, Message(topic, body))
        entries = await backend.read_new(topic, "g", "c", count=10, timeout=0)
        assert [type(entry) for entry in entries] == [ClaimedMessage, MalformedEntry, ClaimedMessage]
        assert isinstance(entries[1], MalformedEntry)
        assert "no such thing" in entries[1].error


async def test_a_codec_that_returns_what_is_no_message_harms_only_its_own_entry(
    server: RunningServer, topic: str
) -> None:
    class Odd(JsonCodec):
        def decode(self, data: bytes) -> Message:
            message = super().decode(data)
            return {"not": "a message"} if message.payload == b"bad" else message  # type: ignore[return-value]

    async with RedisBackend(server.url, codec=Odd()) as backend:
        await backend.create_group(topic, "g", "0")
        for body in (b"good", b"bad", b"good"):
            await backend.publish(topic, Message(topic, body))
        entries = await backend.read_new(topic, "g", "c", count=10, timeout=0)
        assert [type(entry) for entry in entries] == [ClaimedMessage, MalformedEntry, ClaimedMessage]
        assert await in_step(backend)


async def test_every_message_is_decoded_once(server: RunningServer, topic: str) -> None:
    decoded: list[bytes] = []

    class Counting(JsonCodec):
        def decode(self, data: bytes) -> Message:
            decoded.append(data)
            return super().decode(data)

    async with RedisBackend(server.url, codec=Counting()) as backend:
        await backend.create_group(topic, "g", "0")
        published = [Message(topic), Message(topic, headers={"traceparent": "x", "content-type": "text/plain"})]
        for message in published:
            await backend.publish(topic, message)
        entries = await backend.read_new(topic, "g", "c", count=10, timeout=0)
        received = [entry.message for entry in entries if isinstance(entry, ClaimedMessage)]
        assert [message.uid for message in received] == [message.uid for message in published]
        assert received[1].content_type == "text/plain"
        assert len(decoded) == len(published)


async def test_a_key_of_another_type_is_a_clear_error_that_cannot_pass(
    admin: Any, harness: RedisHarness, topic: str
) -> None:
    await to_thread.run_sync(admin.set, topic, "a string")
    async with harness.make_backend() as backend:
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: backend.publish(topic, Message(topic)),
            lambda: backend.create_group(topic, "g"),
            lambda: backend.read_new(topic, "g", "c", count=1, timeout=0),
            lambda: backend.read_new(topic, "g", "c", count=1, timeout=SOON),
            lambda: backend.reclaim_idle(topic, "g", "c", min_idle=1, count=1),
            lambda: backend.ack(topic, "g", "1-1"),
            lambda: backend.count_entries(topic),
        ]
        for call in calls:
            with pytest.raises(EventBusError, match="WRONGTYPE") as caught:
                await call()
            assert isinstance(caught.value, BackendError)
            assert not caught.value.can_pass
            assert isinstance(caught.value.__cause__, redis.exceptions.ResponseError)
