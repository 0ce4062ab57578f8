"""The contract of a ``DeadLetterStore``, run against the harness's backend.

Specification: the docstrings of ``anybus.abc.DeadLetterStore``. Pages begin behind one id and end at another, hold so
many entries and so many bytes, but always one. Moving appends and deletes in one step, tells for each what became of
it, and does nothing where the entry is gone. Removing counts what was still there. Nothing needs a group.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import anyio
import pytest
from harness import SOON, Harness, uids
from letters import bury, give_up_malformed
from servers import RunningServer

from anybus import (
    BackendError,
    EventBusError,
    MemoryBackend,
    Message,
    ReplayReport,
    StreamBus,
    SubscriptionConfig,
    ValidationError,
)
from anybus.abc import ClaimedMessage, DeadLetterStore, MalformedEntry, Move, StoredEntry, StreamBackend
from anybus.backends.redis import RedisBackend

MIB = 1024 * 1024


@pytest.fixture
async def store(harness: Harness) -> AsyncGenerator[MemoryBackend | RedisBackend, None]:
    backend = harness.make_backend()
    assert isinstance(backend, (MemoryBackend, RedisBackend))
    async with backend:
        yield backend


async def fill(store: StreamBackend, stream: str, *names: str, payload: bytes = b"") -> list[str]:
    return [await store.publish(stream, Message(stream, payload, uid=name)) for name in names]


async def read(
    store: DeadLetterStore, stream: str, after: str | None, until: str, count: int = 100, max_bytes: int = MIB
) -> list[StoredEntry]:
    return await store.read_page(
        stream, after=after, until=until, count=count, max_bytes=max_bytes, max_entry_bytes=8 * MIB
    )


def names(entries: Sequence[StoredEntry]) -> list[str]:
    return [entry.message.uid for entry in entries if entry.message is not None]


# --- reading


async def test_a_page_begins_behind_one_id_and_ends_at_another(store: MemoryBackend | RedisBackend, topic: str) -> None:
    ids = await fill(store, topic, *"abcde")
    assert await store.last_entry_id(topic) == ids[4]
    assert names(await read(store, topic, None, ids[4])) == list("abcde")
    assert names(await read(store, topic, ids[0], ids[3])) == list("bcd")
    assert names(await read(store, topic, ids[3], ids[3])) == []
    assert names(await read(store, topic, None, ids[4], count=2)) == list("ab")
    assert [entry.id for entry in await read(store, topic, None, ids[4])] == ids


async def test_an_empty_stream_and_none_have_no_last_entry(store: MemoryBackend | RedisBackend, topic: str) -> None:
    assert await store.last_entry_id(topic) is None
    assert await read(store, topic, None, "5-0") == []
    ids = await fill(store, topic, "a", "b")
    assert await store.remove_entries(topic, ids[1:]) == 1
    assert await store.last_entry_id(topic) == ids[0]
    assert await store.remove_entries(topic, ids) == 1
    assert await store.last_entry_id(topic) is None
    assert await read(store, topic, None, ids[1]) == []


async def test_a_page_is_no_larger_than_its_bytes_but_holds_one(
    store: MemoryBackend | RedisBackend, topic: str
) -> None:
    ids = await fill(store, topic, *"abcd", payload=bytes(1000))
    assert len(await read(store, topic, None, ids[3], max_bytes=3500)) in (2, 3)
    assert len(await read(store, topic, None, ids[3], max_bytes=1)) == 1


async def test_an_entry_is_read_with_its_time_and_without_being_taken(
    store: MemoryBackend | RedisBackend, topic: str
) -> None:
    await store.create_group(topic, "g", "0")
    [entry_id] = await fill(store, topic, "a")
    entry = await store.read_entry(topic, entry_id, max_entry_bytes=MIB)
    assert entry is not None
    assert entry.message is not None
    assert (entry.id, entry.message.uid, entry.fields, entry.error) == (entry_id, "a", {}, None)
    assert entry.published_at is not None
    [taken] = await store.read_new(topic, "g", "c", count=1, timeout=0)
    assert isinstance(taken, ClaimedMessage)
    assert taken.published_at == entry.published_at
    # Pending or not, it can be read.
    assert await store.read_entry(topic, entry_id, max_entry_bytes=MIB) == entry


@pytest.mark.parametrize("entry_id", ["999999-0", "never", "", "1-", "-", "$", "9" * 5000])
async def test_an_id_that_no_entry_has_is_that_of_one_that_is_gone(
    store: MemoryBackend | RedisBackend, topic: str, entry_id: str
) -> None:
    await fill(store, topic, "a")
    assert await store.read_entry(topic, entry_id, max_entry_bytes=MIB) is None
    assert await store.move_entries(topic, [Move(entry_id, f"{topic}.to", Message(topic))]) == [None]
    assert await store.remove_entries(topic, [entry_id]) == 0


@pytest.mark.parametrize("place", ["never", "", "1-", "$", "9" * 5000])
async def test_a_page_from_or_to_no_place_is_refused(
    store: MemoryBackend | RedisBackend, topic: str, place: str
) -> None:
    with pytest.raises(ValidationError, match=r"^after must be"):
        await read(store, topic, place, "5-0")
    with pytest.raises(ValidationError, match=r"^until must be"):
        await read(store, topic, None, place)


async def test_it_knows_which_groups_a_stream_has(store: MemoryBackend | RedisBackend, topic: str) -> None:
    assert not await store.has_group(topic, "g")
    await store.create_group(topic, "g", "0")
    assert await store.has_group(topic, "g")
    assert not await store.has_group(topic, "h")


# --- moving


async def test_a_move_appends_and_deletes_and_tells_the_new_id(
    harness: Harness, store: MemoryBackend | RedisBackend, topic: str
) -> None:
    ids = await fill(store, topic, *"abcd")
    moves = [Move(ids[2], f"{topic}.x", Message(topic, uid="C")), Move(ids[0], f"{topic}.y", Message(topic, uid="A"))]
    results = await store.move_entries(topic, moves)
    assert uids(await harness.entries(topic)) == ["b", "d"]
    [(to_x, moved_c, _)], [(to_y, moved_a, _)] = (
        await harness.entries(f"{topic}.x"),
        await harness.entries(f"{topic}.y"),
    )
    assert moved_c is not None
    assert moved_a is not None
    assert (moved_c.uid, moved_a.uid) == ("C", "A")
    assert results == [to_x, to_y]


async def test_what_is_gone_is_not_moved_however_often_it_is_asked_for(
    harness: Harness, store: MemoryBackend | RedisBackend, topic: str
) -> None:
    [entry_id] = await fill(store, topic, "a")
    move = Move(entry_id, f"{topic}.to", Message(topic))
    first, second = await store.move_entries(topic, [move, move])
    assert isinstance(first, str)
    assert second is None
    assert await store.move_entries(topic, [move]) == [None]
    assert len(await harness.entries(f"{topic}.to")) == 1


async def test_within_a_stream_a_move_brings_to_the_end(
    harness: Harness, store: MemoryBackend | RedisBackend, topic: str
) -> None:
    ids = await fill(store, topic, "a", "b")
    [moved] = await store.move_entries(topic, [Move(ids[0], topic, Message(topic, uid="A"))])
    assert uids(await harness.entries(topic)) == ["b", "A"]
    assert moved not in ids


async def test_a_move_wakes_a_reader_that_waits(store: MemoryBackend | RedisBackend, topic: str) -> None:
    await store.create_group(f"{topic}.to", "g", "0")
    [entry_id] = await fill(store, topic, "a")
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                [taken] = await store.read_new(f"{topic}.to", "g", "c", count=1, timeout=SOON)
                assert isinstance(taken, ClaimedMessage)
                assert taken.message.uid == "moved"

            tasks.start_soon(wait)
            await anyio.sleep(0.05)
            await store.move_entries(topic, [Move(entry_id, f"{topic}.to", Message(topic, uid="moved"))])


async def test_raw_fields_go_back_as_they_were(
    harness: Harness, store: MemoryBackend | RedisBackend, topic: str
) -> None:
    fields = {"message": b"{", "x": b"\x00\xff", "raw:y": b""}
    await store.create_group(f"{topic}.to", "g", "0")
    await give_up_malformed(harness, topic, fields)
    entry_id = await store.last_entry_id(f"{topic}.dead")
    assert entry_id is not None
    await store.move_entries(f"{topic}.dead", [Move(entry_id, f"{topic}.to", None)])
    [taken] = await store.read_new(f"{topic}.to", "g", "c", count=1, timeout=0)
    assert isinstance(taken, MalformedEntry)
    assert taken.raw == fields


async def test_an_entry_without_raw_fields_has_none_to_move_and_stays(
    harness: Harness, store: MemoryBackend | RedisBackend, topic: str
) -> None:
    ids = await fill(store, topic, "a", "b")
    refused, moved = await store.move_entries(
        topic, [Move(ids[0], f"{topic}.to", None), Move(ids[1], f"{topic}.to", Message(topic))]
    )
    assert isinstance(refused, EventBusError)
    assert "no raw fields" in str(refused)
    assert isinstance(moved, str)
    assert uids(await harness.entries(topic)) == ["a"]


async def test_a_stream_that_refuses_hides_no_other_and_keeps_the_entry(server: RunningServer, topic: str) -> None:
    def set_key() -> None:
        with server.client() as client:
            client.set(f"{topic}.wrong", "no stream")

    await anyio.to_thread.run_sync(set_key)
    async with RedisBackend(server.url) as store:
        ids = await fill(store, topic, *"abc")
        streams = (f"{topic}.x", f"{topic}.wrong", f"{topic}.x")
        moves = [Move(entry_id, to, Message(topic)) for entry_id, to in zip(ids, streams, strict=True)]
        done, refused, also_done = await store.move_entries(topic, moves)
        assert isinstance(done, str)
        assert isinstance(also_done, str)
        assert isinstance(refused, BackendError)
        assert not refused.may_have_happened
        assert names(await read(store, topic, None, ids[2])) == ["b"]


async def test_what_is_no_stream_fails_as_a_whole(server: RunningServer, topic: str) -> None:
    def set_key() -> None:
        with server.client() as client:
            client.set(topic, "no stream")

    await anyio.to_thread.run_sync(set_key)
    async with RedisBackend(server.url) as store:
        for call in (
            store.last_entry_id(topic),
            store.read_entry(topic, "1-0", max_entry_bytes=MIB),
            store.move_entries(topic, [Move("1-0", f"{topic}.to", Message(topic))]),
            store.remove_entries(topic, ["1-0"]),
            store.has_group(topic, "g"),
        ):
            with pytest.raises(BackendError, match="WRONGTYPE") as caught:
                await call
            assert not caught.value.can_pass


async def test_an_entry_of_very_many_fields_is_moved(server: RunningServer, topic: str) -> None:
    def fill_it() -> None:
        with server.client() as client:
            client.xadd(topic, {f"raw:{number}": b"" for number in range(4000)})

    await anyio.to_thread.run_sync(fill_it)
    async with RedisBackend(server.url) as store:
        entry_id = await store.last_entry_id(topic)
        assert entry_id is not None
        [moved] = await store.move_entries(topic, [Move(entry_id, f"{topic}.to", None)])
        assert isinstance(moved, str)
        assert await store.last_entry_id(topic) is None
        assert await store.last_entry_id(f"{topic}.to") == moved


# --- rights

OPERATOR = """
  +auth +select +client|id +client|setname +command|info +script|load +eval +evalsha +time
  +xadd +xlen +xreadgroup +xack +xdel +xclaim +xautoclaim +xpending
  +xgroup|create +xgroup|delconsumer +xinfo|groups +xinfo|consumers
  +zadd +zrem +zrange +zrangebyscore +zscan +hget +hset +exists
  +client|unblock +info +xrange +xrevrange
"""
"""What docs/redis.md says that a user needs."""


async def test_the_documented_rights_are_enough(server: RunningServer, topic: str) -> None:
    name, password = topic.replace(".", "-"), "secret"

    def command(*words: str) -> None:
        with server.client() as client:
            client.execute_command("ACL", *words)

    rules = ("on", f">{password}", f"~{topic}*", f"~anybus:{{{topic}*", "-@all", *OPERATOR.split())
    await anyio.to_thread.run_sync(command, "SETUSER", name, *rules)
    try:
        url = f"redis://{name}:{password}@127.0.0.1:{server.port}"
        async with StreamBus(RedisBackend(url)) as bus:
            async with bus.deliveries(SubscriptionConfig(topic, "billing")):
                pass
            await bury(bus.backend, topic, *"abcd")
            letters = bus.dead_letters(topic)
            ids = [letter.id async for letter in letters]
            assert await letters.replay(ids[:1]) == ReplayReport(replayed=1)
            assert await letters.replay(ids[1:2], to="group") == ReplayReport(replayed=1)
            assert await letters.purge() == 2
    finally:
        await anyio.to_thread.run_sync(command, "DELUSER", name)


# --- removing


async def test_removing_counts_what_was_still_there(
    harness: Harness, store: MemoryBackend | RedisBackend, topic: str
) -> None:
    ids = await fill(store, topic, *(str(number) for number in range(1200)))
    assert await store.remove_entries(topic, [*ids[:1100], *ids[:5], "999999-0"]) == 1100
    assert await store.remove_entries(topic, ids[:1101]) == 1
    assert await store.remove_entries(topic, []) == 0
    assert len(await harness.entries(topic)) == 99
    assert uids(await harness.entries(topic))[0] == "1101"
