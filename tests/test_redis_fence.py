"""The fence on Redis: a stale acknowledgement touches nothing that somebody else owns, however many ids it has.

Specification: DESIGN.md, section 2 (``ack_many`` with a consumer) and rule "ownership is the server's word". The
argument is in ``_fence_scripts``. What an entry's owner is, each test asks the server. Batches are large enough to be
acknowledged together.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import pytest
from acl import user_with
from anyio import to_thread
from harness import HOUR, SOON
from servers import ALL, RedisHarness, RunningServer

from anybus import Message
from anybus._failure.copies import retry_stream
from anybus.backends.redis import RedisBackend
from anybus.backends.redis import _scripts as scripts
from anybus.backends.redis._fence_scripts import MOST_LOSSES, TOGETHER
from anybus.backends.redis._keys import losses

LOTS = 3 * TOGETHER
"""More than enough ids to be acknowledged together."""


@dataclass
class Group:
    """A group ``g``, its members on backends of their own, and a client that knows nothing of anybus."""

    server: RunningServer
    topic: str
    one: RedisBackend
    other: RedisBackend
    raw: Any

    async def call(self, *command: Any) -> Any:
        return await to_thread.run_sync(partial(self.raw.execute_command, *command))

    async def publish(self, count: int, *, size: int = 1, stream: str | None = None) -> list[str]:
        stream = stream or self.topic
        items = [(stream, Message(self.topic, b"x" * size), None) for _ in range(count)]
        results = await self.one.publish_many(items)
        return [result for result in results if isinstance(result, str)]

    async def read(self, consumer: str, count: int, *, backend: RedisBackend | None = None) -> list[str]:
        """Ids that the consumer now owns."""
        entries = await (backend or self.one).read_new(self.topic, "g", consumer, count=count, timeout=0)
        return [entry.id for entry in entries]

    async def owners(self, stream: str | None = None) -> dict[str, str]:
        found = await to_thread.run_sync(self.raw.xpending_range, stream or self.topic, "g", "-", "+", ALL)
        return {item["message_id"].decode(): item["consumer"].decode() for item in found}

    async def ack(self, ids: Sequence[str], *, consumer: str = "c", stream: str | None = None) -> list[str]:
        """The ids that were refused, in the order of the batch."""
        refused = set(await self.one.ack_many(stream or self.topic, "g", ids, consumer=consumer))
        return [entry_id for entry_id in ids if entry_id in refused]

    async def commands(self, work: Callable[[], Any]) -> list[str]:
        """What the server executes during the work."""
        commands: list[str] = []
        listening = anyio.Event()

        def listen() -> None:
            monitor: Any
            with self.server.client() as client, client.monitor() as monitor:
                anyio.from_thread.run_sync(listening.set)
                while True:
                    command = monitor.next_command()["command"]
                    if command == f"ECHO end-of-{self.topic}":
                        return
                    commands.append(command)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(to_thread.run_sync, listen)
            await listening.wait()
            await work()
            await self.call("ECHO", f"end-of-{self.topic}")
        return commands

    async def looked_up(self, work: Callable[[], Any]) -> bool:
        """Whether the work looked up entries of `c`, that is: did not acknowledge them together."""
        commands = await self.commands(work)
        assert any(command.startswith("XACK") for command in commands)
        return any(command.startswith("XPENDING") and command.endswith(" c") for command in commands)


@asynccontextmanager
async def group_of(server: RunningServer, topic: str) -> AsyncGenerator[Group, None]:
    harness = RedisHarness(server)
    with anyio.fail_after(SOON), server.client() as raw:
        async with harness.make_backend() as one, harness.make_backend() as other:
            await one.create_group(topic, "g", "0")
            await one.create_group(retry_stream(topic, "g"), "g", "0")
            yield Group(server, topic, one, other, raw)


# --- ways of losing entries: each takes all that `c` has, and leaves them with `d`


async def reclaimed(group: Group) -> None:
    await group.other.reclaim_idle(group.topic, "g", "d", min_idle=0, count=LOTS)


async def passed(group: Group) -> None:
    retries = retry_stream(group.topic, "g")
    await group.other.redeliver(group.topic, retries, "g", "d", min_idle=0, count=LOTS)


async def released(group: Group) -> None:
    await group.one.release(group.topic, "g", "c", list(await group.owners()))
    await group.other.reclaim_idle(group.topic, "g", "d", min_idle=HOUR, count=LOTS)


async def group_recreated_by_hand(group: Group) -> None:
    await group.call("XGROUP", "DESTROY", group.topic, "g")
    await group.call("XGROUP", "CREATE", group.topic, "g", "0")
    await group.read("d", LOTS, backend=group.other)


async def group_recreated_by_a_member(group: Group) -> None:
    await group.call("XGROUP", "DESTROY", group.topic, "g")
    await group.other.create_group(group.topic, "g", "0")
    await group.read("d", LOTS, backend=group.other)


async def claimed_by_a_foreign_member(group: Group) -> None:
    await group.call("XAUTOCLAIM", group.topic, "g", "d", 0, "0-0", "COUNT", LOTS)


async def claimed_by_hand(group: Group) -> None:
    """By an operator, for a member that knows nothing of it."""
    await group.call("XCLAIM", group.topic, "g", "d", 0, *await group.owners())


async def claimed_and_its_consumer_was_reaped(group: Group) -> None:
    await passed(group)
    await anyio.sleep(0.01)
    assert await group.call("EVAL", scripts.REAP.source, 1, group.topic, "g", "d", 1) == 1


WAYS = [
    reclaimed,
    passed,
    released,
    group_recreated_by_hand,
    group_recreated_by_a_member,
    claimed_by_a_foreign_member,
    claimed_by_hand,
    claimed_and_its_consumer_was_reaped,
]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def lose(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("fresh", [0, 1, LOTS])
async def test_a_stale_ack_never_touches_what_somebody_else_owns(
    server: RunningServer, topic: str, lose: Any, fresh: int
) -> None:
    """Fresh entries come with the stale ones; `c` has read them since, and as many more, so that it owns enough."""
    async with group_of(server, topic) as group:
        await group.publish(LOTS)
        stale = await group.read("c", LOTS)
        await lose(group)
        assert await group.owners() == dict.fromkeys(stale, "d")
        await group.publish(fresh + 2 * LOTS)
        new = await group.read("c", fresh + 2 * LOTS)
        assert await group.ack([*stale, *new[:fresh]]) == stale
        assert await group.owners() == {**dict.fromkeys(stale, "d"), **dict.fromkeys(new[fresh:], "c")}


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("which", [0, LOTS // 2, LOTS - 1])
async def test_one_stale_id_among_many_is_found_wherever_it_is(
    server: RunningServer, topic: str, which: int, shuffled: bool
) -> None:
    async with group_of(server, topic) as group:
        await group.publish(LOTS)
        ids = await group.read("c", LOTS)
        await group.call("XCLAIM", topic, "g", "d", 0, ids[which])
        await group.publish(LOTS)
        await group.read("c", LOTS)
        batch = list(ids)
        if shuffled:
            random.Random(1).shuffle(batch)
        assert await group.ack(batch) == [ids[which]]
        assert (await group.owners())[ids[which]] == "d"
        assert set(ids) & set(await group.owners()) == {ids[which]}


@pytest.mark.parametrize("block", [1, 2, 7, TOGETHER])
@pytest.mark.parametrize("shuffled", [False, True])
async def test_entries_of_others_in_between_stay_theirs(
    server: RunningServer, topic: str, block: int, shuffled: bool
) -> None:
    """All of one millisecond: numbers of one digit to three, whose order as text is another one."""
    async with group_of(server, topic) as group:
        for number in range(3 * LOTS):
            await group.call("XADD", topic, f"1714982400000-{number}", "message", "x")
        mine: list[str] = []
        while (await group.call("XINFO", "GROUPS", topic))[0][b"last-delivered-id"] != b"1714982400000-143":
            mine += await group.read("c", block)
            await group.read("d", block)
            await group.read("e", block)
        theirs = {entry_id: owner for entry_id, owner in (await group.owners()).items() if owner != "c"}
        if shuffled:
            random.Random(2).shuffle(mine)
        assert await group.ack(mine) == []
        assert await group.owners() == theirs


async def test_what_a_new_owner_has_settled_is_refused(server: RunningServer, topic: str) -> None:
    async with group_of(server, topic) as group:
        for take in (reclaimed, passed, released):
            await group.publish(LOTS)
            stale = await group.read("c", LOTS)
            await take(group)
            assert await group.other.ack_many(topic, "g", stale, consumer="d") == []
            await group.publish(4 * LOTS)
            new = await group.read("c", 4 * LOTS)
            assert await group.ack([*stale, *new[:LOTS]]) == stale
            assert await group.ack(new[LOTS:]) == []
            assert await group.owners() == {}


@pytest.mark.parametrize("highest", ["1000000000003", "999999999999"])
async def test_losses_of_ids_with_fewer_digits_are_refused_too(server: RunningServer, topic: str, highest: str) -> None:
    """As text, 999999999999 is above 1000000000005. Such ids are made by hand only, in one stream with real ones."""
    async with group_of(server, topic) as group:
        for take in (reclaimed, passed, released):
            await group.call("DEL", topic, losses(topic, "g"))
            await group.call("XGROUP", "CREATE", topic, "g", "0", "MKSTREAM")
            stale = ["999999999999-1", f"{highest}-2"]
            new = [f"1000000000005-{number}" for number in range(2 * LOTS)]
            for entry_id in stale:
                await group.call("XADD", topic, entry_id, "message", "x")
            assert await group.read("c", 2) == stale
            await take(group)
            assert await group.other.ack_many(topic, "g", stale, consumer="d") == []
            for entry_id in new:
                await group.call("XADD", topic, entry_id, "message", "x")
            assert await group.read("c", 2 * LOTS) == new
            assert await group.ack([stale[0], *new[:LOTS]]) == stale[:1]
            assert await group.owners() == dict.fromkeys(new[LOTS:], "c")


async def test_a_consumer_that_owns_less_than_it_acknowledges_is_refused_whoever_took_it(
    server: RunningServer, topic: str
) -> None:
    async with group_of(server, topic) as group:
        await group.publish(LOTS)
        stale = await group.read("c", LOTS)
        await claimed_by_a_foreign_member(group)
        await group.call("XACK", topic, "g", *stale)
        await group.publish(LOTS)
        new = await group.read("c", LOTS)
        assert await group.ack([*stale, *new]) == stale
        assert await group.owners() == {}


async def test_what_was_passed_on_for_want_of_bytes_is_refused_to_all_that_had_it(
    server: RunningServer, topic: str
) -> None:
    """A pass of `d` takes what fits into one call. The rest goes to the parking consumer, its own entries too."""
    retries = retry_stream(topic, "g")
    async with group_of(server, topic) as group:
        await group.publish(2 * LOTS, size=30_000)
        had = {name: await group.read(name, LOTS) for name in ("c", "d")}
        while set((await group.owners()).values()) != {"e"}:
            passed_on = await group.other.redeliver(topic, retries, "g", "d", min_idle=0, count=2 * LOTS)
            assert passed_on.more
            assert len(passed_on.reclaimed) < LOTS
            # What `d` could not take belongs to nobody: `e` takes it, and the rest, bit by bit.
            while await group.one.reclaim_idle(topic, "g", "e", min_idle=HOUR, count=2 * LOTS):
                pass
            assert len(set((await group.owners()).values())) == 2
            taken = [entry.id for entry in passed_on.reclaimed]
            await group.call("XCLAIM", topic, "g", "e", 0, *taken)
            had["d"] = [entry_id for entry_id in had["d"] if entry_id not in taken]
        ids = list(await group.owners())
        assert await group.other.ack_many(topic, "g", ids, consumer="e") == []
        await group.publish(4 * LOTS)
        for name in ("c", "d"):
            new = await group.read(name, 2 * LOTS)
            stale = had[name][-TOGETHER:]
            assert await group.ack([*stale, *new[:LOTS]], consumer=name) == stale


@pytest.mark.parametrize("on_retry_stream", [False, True])
async def test_what_a_recreated_group_will_deliver_again_is_refused(
    server: RunningServer, topic: str, on_retry_stream: bool
) -> None:
    stream = retry_stream(topic, "g") if on_retry_stream else topic
    async with group_of(server, topic) as group:
        ids = await group.publish(2 * LOTS, stream=stream)
        await group.one.read_new(stream, "g", "c", count=2 * LOTS, timeout=0)
        await group.call("XGROUP", "DESTROY", stream, "g")
        await group.call("XGROUP", "CREATE", stream, "g", "0")
        await group.one.read_new(stream, "g", "c", count=LOTS, timeout=0)
        assert await group.ack(ids[LOTS:], stream=stream) == ids[LOTS:]
        assert await group.owners(stream) == dict.fromkeys(ids[:LOTS], "c")
        batch = ids[LOTS // 2 : LOTS // 2 + LOTS]
        assert await group.ack(batch, stream=stream) == batch[LOTS // 2 :]
        assert await group.owners(stream) == dict.fromkeys(ids[: LOTS // 2], "c")
        assert await group.call("XLEN", stream) == 2 * LOTS - (LOTS // 2 if on_retry_stream else 0)


async def test_nothing_is_deleted_from_a_retry_stream_if_it_is_not_known_what_was_delivered(
    server: RunningServer, topic: str
) -> None:
    stream = retry_stream(topic, "g")
    async with group_of(server, topic) as group, user_with(server, "+@all", "-xinfo") as user:
        async with RedisBackend(user.url) as backend:
            ids = await group.publish(2 * LOTS, stream=stream)
            await group.one.read_new(stream, "g", "c", count=2 * LOTS, timeout=0)
            await group.call("XGROUP", "DESTROY", stream, "g")
            await group.call("XGROUP", "CREATE", stream, "g", "0")
            await group.one.read_new(stream, "g", "c", count=LOTS, timeout=0)
            await backend.ack_many(stream, "g", ids[LOTS:], consumer="c")
            assert await group.call("XLEN", stream) == 2 * LOTS
            assert await group.owners(stream) == dict.fromkeys(ids[:LOTS], "c")


async def test_what_an_operator_acknowledged_counts_as_acknowledged(server: RunningServer, topic: str) -> None:
    async with group_of(server, topic) as group:
        await group.publish(2 * LOTS)
        ids = await group.read("c", 2 * LOTS)
        await group.call("XACK", topic, "g", *ids[:3])
        assert await group.ack(ids[:LOTS]) == []
        assert await group.owners() == dict.fromkeys(ids[LOTS:], "c")
        assert await group.ack(ids[: LOTS - 1]) == [], "a second try, after a lost reply"


async def test_what_is_no_id_is_refused_and_the_others_are_acknowledged(server: RunningServer, topic: str) -> None:
    async with group_of(server, topic) as group:
        await group.publish(3 * LOTS)
        ids = await group.read("c", 3 * LOTS)
        (unread,) = await group.publish(1)
        bad = [f"{ids[3]}x", f"{ids[4]}-5", f"{ids[5]} "]
        assert await group.ack([*ids[:LOTS], *bad]) == bad
        assert await group.owners() == dict.fromkeys(ids[LOTS:], "c")
        bad = ["1714982400000-x", "", "-", "1-2-3", unread]
        assert await group.ack([*ids[LOTS : 2 * LOTS], *bad]) == bad
        assert await group.owners() == dict.fromkeys(ids[2 * LOTS :], "c")


async def test_what_is_no_id_is_refused_also_while_others_have_entries(server: RunningServer, topic: str) -> None:
    async with group_of(server, topic) as group:
        await group.publish(2 * LOTS)
        ids = await group.read("c", 2 * LOTS - 1)
        theirs = await group.read("d", 1)
        bad = f"{ids[LOTS - 1]}x"
        assert await group.ack([*ids[:LOTS], bad]) == [bad]
        assert await group.owners() == dict.fromkeys(ids[LOTS:], "c") | dict.fromkeys(theirs, "d")


@pytest.mark.parametrize("kind", ["zeros before", "zeros behind", "of fewer digits"])
async def test_ids_that_no_server_makes_do_no_harm(server: RunningServer, topic: str, kind: str) -> None:
    """The server accepts leading zeros. Ids that were made by hand have milliseconds of any length."""
    async with group_of(server, topic) as group:
        await group.call("XADD", topic, "1714982401-12345", "message", "x")
        theirs = ["1714982401-12345"]
        for number in range(LOTS):
            await group.call("XADD", topic, f"1714982400000-{number}", "message", "x")
        await group.call("XADD", topic, "1714982402000-0", "message", "x")
        ids = await group.read("c", LOTS + 2)
        theirs.append(ids[5])
        await group.call("XCLAIM", topic, "g", "d", 0, *theirs)
        mine = [entry_id for entry_id in ids if entry_id not in theirs]
        odd = {
            "zeros before": f"0{theirs[1]}",
            "zeros behind": theirs[1].replace("-", "-0"),
            "of fewer digits": theirs[0],
        }[kind]
        place = mine.index("1714982400000-10") if kind == "zeros behind" else -1
        await group.publish(1)
        await group.read("c", 1)
        assert await group.ack([*mine[:place], odd, *mine[place:]]) == [odd]
        assert {entry_id for entry_id, owner in (await group.owners()).items() if owner == "d"} == set(theirs)


async def test_a_lost_entry_with_few_digits_that_was_settled_is_refused(server: RunningServer, topic: str) -> None:
    """As text it is not below the other ids, as a number it is."""
    async with group_of(server, topic) as group:
        for entry_id in ("1714982401-12345", *(f"1714982400000-{number}" for number in range(2 * LOTS))):
            await group.call("XADD", topic, entry_id, "message", "x")
        odd, *ids = await group.read("c", 2 * LOTS + 1)
        [taken] = await group.other.reclaim_idle(topic, "g", "d", min_idle=0, count=1)
        assert taken.id == odd
        assert await group.other.ack_many(topic, "g", [odd], consumer="d") == []
        assert await group.ack([*ids[:LOTS], odd]) == [odd]


async def test_a_stale_ack_on_a_retry_stream_deletes_nothing(server: RunningServer, topic: str) -> None:
    stream = retry_stream(topic, "g")
    async with group_of(server, topic) as group:
        ids = await group.publish(3 * LOTS, stream=stream)
        await group.one.read_new(stream, "g", "c", count=3 * LOTS, timeout=0)
        await group.call("XCLAIM", stream, "g", "d", 0, *ids[:LOTS:2])
        assert await group.ack(ids[: 2 * LOTS], stream=stream) == ids[:LOTS:2]
        left = [*ids[:LOTS:2], *ids[2 * LOTS :]]
        assert [entry_id.decode() for entry_id, _ in await to_thread.run_sync(group.raw.xrange, stream)] == left
        assert not await group.looked_up(partial(group.ack, ids[2 * LOTS :], stream=stream))
        assert await group.call("XLEN", stream) == LOTS / 2


async def test_without_a_right_to_the_notes_every_entry_is_looked_up(server: RunningServer, topic: str) -> None:
    keys = [f"~{topic}*", f"~anybus:{{{topic}}}:[^l]*", f"~anybus:{{{topic}}}:lease*"]
    async with group_of(server, topic) as group, user_with(server, "resetkeys", *keys, "+@all") as user:
        async with RedisBackend(user.url) as backend:
            await group.publish(2 * LOTS)
            ids = await group.read("c", 2 * LOTS)
            assert await group.looked_up(partial(backend.ack_many, topic, "g", ids[:LOTS], consumer="c")), (
                "it cannot know what it has lost"
            )
            assert await group.owners() == dict.fromkeys(ids[LOTS:], "c")
            await backend.release(topic, "g", "c", ids[LOTS:])
            assert set((await group.owners()).values()) == {"anybus:returned"}
            taken = await backend.reclaim_idle(topic, "g", "d", min_idle=HOUR, count=ALL // 2**40)
            assert [entry.id for entry in taken] == ids[LOTS:]
            await backend.forget_consumer(topic, "g", "c")


@pytest.mark.parametrize("take", [reclaimed, passed, released], ids=lambda way: way.__name__)
async def test_a_loss_that_is_no_longer_noted_by_name_is_still_a_loss(
    server: RunningServer, topic: str, take: Any
) -> None:
    async with group_of(server, topic) as group:
        await group.publish(LOTS)
        stale = await group.read("c", LOTS)
        ahead = 10 * int(stale[-1].partition("-")[0])
        await to_thread.run_sync(group.raw.zadd, losses(topic, "g"), {f"x{n}": ahead + n for n in range(MOST_LOSSES)})
        await take(group)
        assert await group.other.ack_many(topic, "g", stale, consumer="d") == []
        await group.publish(2 * LOTS)
        new = await group.read("c", 2 * LOTS)
        assert await group.ack([*stale, *new[:LOTS]]) == stale
        assert await group.call("ZCARD", losses(topic, "g")) <= MOST_LOSSES + 1


@pytest.mark.parametrize("kept", [{f"x{n}": 1 for n in range(9000)}, "no sorted set"], ids=["too many", "another type"])
async def test_whatever_the_key_of_losses_holds_entries_are_taken_and_released(
    server: RunningServer, topic: str, kept: Any
) -> None:
    async with group_of(server, topic) as group:
        if isinstance(kept, dict):
            await to_thread.run_sync(group.raw.zadd, losses(topic, "g"), kept)
        else:
            await group.call("SET", losses(topic, "g"), kept)
        await group.publish(LOTS)
        ids = await group.read("c", LOTS)
        await group.one.release(topic, "g", "c", ids[:1])
        taken = await group.other.reclaim_idle(topic, "g", "d", min_idle=0, count=LOTS)
        assert [entry.id for entry in taken] == ids
        assert await group.other.ack_many(topic, "g", ids, consumer="d") == []


@pytest.mark.parametrize("name", ["a}b", "{}x", "}", "a{b", "{a}b", "{{}x", "x:{}:y}", "{:retry:}"])
async def test_a_topic_and_its_retry_stream_have_one_key_of_losses(name: str) -> None:
    for group in ("g", "}:{", ":retry:", "a:losses:b"):
        assert losses(retry_stream(name, group), group) == losses(name, group)


# --- the fast way is really taken


async def test_a_pass_does_not_ask_for_all_owners(server: RunningServer, topic: str) -> None:
    """Each member of a large group makes two passes a second, also while there is nothing to take."""
    async with group_of(server, topic) as group:
        await group.publish(1)
        await group.read("c", 1)
        retries = retry_stream(topic, "g")
        done = await group.commands(partial(group.other.redeliver, topic, retries, "g", "d", min_idle=HOUR, count=LOTS))
        assert any(command.startswith("XAUTOCLAIM") for command in done)
        assert f"XPENDING {topic} g" not in done


async def test_where_entries_have_many_owners_an_ack_does_not_ask_for_all_each_time(
    server: RunningServer, topic: str
) -> None:
    async with group_of(server, topic) as group:
        await group.publish(TOGETHER + 3 * LOTS)
        for number in range(TOGETHER):
            await group.read(f"d{number}", 1)
        ids = await group.read("c", 3 * LOTS)
        assert await group.ack(ids[:TOGETHER]) == []
        done = await group.commands(partial(group.ack, ids[TOGETHER : 2 * TOGETHER]))
        assert f"XPENDING {topic} g" not in done
        assert set((await group.owners()).values()) == {"c", *(f"d{number}" for number in range(TOGETHER))}


@pytest.mark.parametrize("count", [TOGETHER, 256, 600])
async def test_a_large_batch_is_acknowledged_without_a_look_at_single_entries(
    server: RunningServer, topic: str, count: int
) -> None:
    async with group_of(server, topic) as group:
        await group.publish(count)
        ids = await group.read("c", count)
        assert not await group.looked_up(partial(group.ack, ids))
        assert await group.owners() == {}


async def test_so_it_is_while_others_have_entries_before_between_and_after(server: RunningServer, topic: str) -> None:
    async with group_of(server, topic) as group:
        await group.publish(7 * TOGETHER)
        mine: list[str] = []
        for turn in range(7):
            ids = await group.read("cd"[turn % 2 == 0], TOGETHER)
            mine += ids if turn % 2 else []
        assert not await group.looked_up(partial(group.ack, mine))
        assert set((await group.owners()).values()) == {"d"}
        assert len(await group.owners()) == 4 * TOGETHER


async def test_a_small_batch_is_looked_up(server: RunningServer, topic: str) -> None:
    async with group_of(server, topic) as group:
        await group.publish(TOGETHER - 1)
        ids = await group.read("c", TOGETHER)
        assert await group.looked_up(partial(group.ack, ids))
        assert await group.owners() == {}


async def test_after_a_loss_batches_above_it_are_acknowledged_together_again(
    server: RunningServer, topic: str, lose: Any
) -> None:
    async with group_of(server, topic) as group:
        await group.publish(LOTS)
        stale = await group.read("c", LOTS)
        await lose(group)
        await anyio.sleep(0.002)  # ids of another millisecond
        await group.publish(LOTS)
        new = await group.read("c", LOTS)
        assert not await group.looked_up(partial(group.ack, new))
        assert await group.owners() == dict.fromkeys(stale, "d")


async def test_losses_are_forgotten_with_the_consumer_and_never_too_many(server: RunningServer, topic: str) -> None:
    key = losses(topic, "g")
    async with group_of(server, topic) as group:
        await to_thread.run_sync(group.raw.zadd, key, {f"old {n}": n for n in range(MOST_LOSSES)})
        await group.publish(2)
        (first, second) = await group.read("c", 2)
        await group.one.release(topic, "g", "c", [first, second])
        assert await group.call("ZCARD", key) == MOST_LOSSES
        assert await group.call("ZSCORE", key, "c") == float(second.partition("-")[0])
        assert await group.call("ZSCORE", key, "old 0") is None
        await group.one.forget_consumer(topic, "g", "c")
        assert await group.call("ZSCORE", key, "c") is None


# --- anything in any order


@dataclass
class Story:
    """Members that do anything. ``known``: all that a member has ever been given; ``lost``: what our scripts took."""

    group: Group
    draw: random.Random
    known: dict[str, list[str]] = field(default_factory=dict)
    lost: set[tuple[str, str]] = field(default_factory=set)
    together: int = 0

    async def step(self) -> None:
        member = self.draw.choice(["c", "d", "e", "f"])
        work = self.draw.choices(
            [self.read, self.ack, self.passes, self.reclaim, self.release, self.foreign, self.reap, self.recreate],
            [10, 16, 2, 2, 1, 1, 1, 0.4],
        )[0]
        await work(member)

    def gained(self, member: str, ids: Sequence[str]) -> None:
        self.known.setdefault(member, []).extend(ids)

    async def taking(self, member: str, work: Any) -> None:
        """Note who loses what to a script of ours."""
        before = await self.group.owners()
        taken = await work
        self.gained(member, [entry.id for entry in taken])
        after = await self.group.owners()
        self.lost |= {(owner, entry_id) for entry_id, owner in before.items() if after.get(entry_id) != owner}

    async def read(self, member: str) -> None:
        await self.group.publish(self.draw.choice([5, 20, 40]))
        self.gained(member, await self.group.read(member, self.draw.choice([3, 20, 40])))

    async def passes(self, member: str) -> None:
        async def work() -> list[Any]:
            topic = self.group.topic
            retries = retry_stream(topic, "g")
            count = self.draw.choice([1, 10, 60])
            return list(
                (await self.group.other.redeliver(topic, retries, "g", member, min_idle=0, count=count)).reclaimed
            )

        await self.taking(member, work())

    async def reclaim(self, member: str) -> None:
        count = self.draw.choice([1, 10, 60])
        await self.taking(member, self.group.one.reclaim_idle(self.group.topic, "g", member, min_idle=0, count=count))

    async def release(self, member: str) -> None:
        async def work() -> list[Any]:
            ids = self.draw.sample(known := self.known.get(member, []), min(len(known), 10))
            if ids:
                await self.group.one.release(self.group.topic, "g", member, ids)
            return []

        await self.taking(member, work())

    async def foreign(self, member: str) -> None:
        """A member of another implementation takes, and sometimes acknowledges for whoever has it."""
        owners = await self.group.owners()
        ids = self.draw.sample(sorted(owners), min(len(owners), 10))
        if ids:
            await self.group.call("XCLAIM", self.group.topic, "g", self.draw.choice(["rust", member]), 0, *ids)
            await self.group.call("XACK", self.group.topic, "g", *ids[:3])

    async def reap(self, member: str) -> None:
        await self.group.call("EVAL", scripts.REAP.source, 1, self.group.topic, "g", member, 0)

    async def recreate(self, member: str) -> None:
        await self.group.call("XGROUP", "DESTROY", self.group.topic, "g")
        await self.group.call("XGROUP", "CREATE", self.group.topic, "g", "0")

    async def ack(self, member: str) -> None:
        before = await self.group.owners()
        known = list(dict.fromkeys(self.known.get(member, [])))
        choices = [known, known[-80:], [entry_id for entry_id in known if before.get(entry_id) == member]]
        chosen = self.draw.choice(choices)
        batch = self.draw.sample(chosen, min(len(chosen), self.draw.choice([4, TOGETHER, 20, 40])))
        if self.draw.random() < 0.7:
            batch.sort(key=lambda entry_id: tuple(map(int, entry_id.split("-"))))
        if not batch:
            return
        refused = set(await self.group.one.ack_many(self.group.topic, "g", batch, consumer=member))
        after = await self.group.owners()
        ours = {entry_id for entry_id in batch if before.get(entry_id) == member}
        assert after == {entry_id: owner for entry_id, owner in before.items() if entry_id not in ours}
        assert not refused & ours
        assert refused >= {entry_id for entry_id in batch if before.get(entry_id, member) != member}
        assert refused >= {entry_id for entry_id in batch if entry_id not in ours and (member, entry_id) in self.lost}
        self.together += len(batch) >= TOGETHER and not refused


@pytest.mark.parametrize("seed", range(6))
async def test_nobodys_entry_ever_vanishes_by_somebody_elses_ack(server: RunningServer, topic: str, seed: int) -> None:
    with anyio.fail_after(2 * SOON):
        async with group_of(server, topic) as group:
            story = Story(group, random.Random(seed))
            for _ in range(200):
                await story.step()
            assert story.together, "no batch was large and undisputed"
