"""No script leaves half of an item behind unsaid: it is refused before it writes, or takes back what it wrote."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from acl import User, user_with
from anyio import to_thread
from harness import Recorder, quick, until
from proxy import Answer, proxied
from servers import RedisHarness, RunningServer

from anybus import BackendError, Delivery, Message, Reject, ReplayReport, StreamBus, SubscriptionConfig
from anybus._failure.copies import retry_stream
from anybus.abc import ClaimedMessage, MalformedEntry, Move, Output
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import delayed
from anybus.backends.redis._parts import PER_SCRIPT

ALL = ("+@all",)


@pytest.fixture
def harness(server: RunningServer) -> RedisHarness:
    return RedisHarness(server)


@asynccontextmanager
async def limited(server: RunningServer) -> AsyncGenerator[tuple[RedisBackend, User], None]:
    """A backend whose user can do everything, until the test takes something from him."""
    async with user_with(server, *ALL) as user:
        async with RedisBackend(user.url) as backend:
            yield backend, user


async def taken(backend: RedisBackend, stream: str, count: int = 1) -> list[str]:
    """The ids of messages that consumer c of group g has just read."""
    await backend.create_group(stream, "g", "0")
    for _ in range(count):
        await backend.publish(stream, Message("anything"))
    return [entry.id for entry in await backend.read_new(stream, "g", "c", count=count, timeout=0)]


async def owners(backend: RedisBackend, stream: str) -> list[str]:
    return [entry.consumer for entry in await backend.pending_entries(stream, "g")]


# --- transfers


@pytest.mark.parametrize("delay", [0.0, 60.0])
async def test_what_cannot_be_acknowledged_is_not_appended_either(
    server: RunningServer, harness: RedisHarness, topic: str, delay: float
) -> None:
    async with limited(server) as (backend, user):
        ids = await taken(backend, topic, 2)
        await user.rules("-xack")
        items = [(entry_id, [Output(f"{topic}.to", Message(topic), delay)]) for entry_id in ids]
        for result in await backend.transfer_many(topic, "g", "c", items):
            assert isinstance(result, BackendError)
            assert not result.may_have_happened
            assert not result.can_pass
        assert await harness.entries(f"{topic}.to") == []
        assert await to_thread.run_sync(server.client().exists, delayed(f"{topic}.to")) == 0
        assert len(await owners(backend, topic)) == 2


async def test_an_output_that_is_refused_takes_the_others_back(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    await to_thread.run_sync(lambda: server.client().set(f"{topic}.wrong", "no stream"))
    async with limited(server) as (backend, user):
        [entry_id] = await taken(backend, topic)
        await user.rules("-type")  # else it is found beforehand
        outputs = [Output(f"{topic}.to", Message(topic)), Output(f"{topic}.wrong", Message(topic))]
        with pytest.raises(BackendError, match="WRONGTYPE") as caught:
            await backend.transfer(topic, "g", "c", entry_id, outputs)
        assert not caught.value.may_have_happened
        assert await harness.entries(f"{topic}.to") == []


async def test_an_output_out_of_reach_is_its_own_items_error(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with limited(server) as (backend, user):
        ids = await taken(backend, topic, 3)
        await user.rules("resetkeys", f"~{topic}", f"~{topic}.to")
        names = ("to", "forbidden", "to")
        items = [(entry, [Output(f"{topic}.{name}", Message(topic))]) for entry, name in zip(ids, names, strict=True)]
        first, refused, last = await backend.transfer_many(topic, "g", "c", items)
        assert isinstance(refused, BackendError)
        assert not refused.may_have_happened
        assert isinstance(first, list)
        assert isinstance(last, list)
        moves = [Move(entry, f"{topic}.{name}", Message(topic)) for entry, name in zip(ids, names, strict=True)]
        moved = await backend.move_entries(topic, moves)
        assert [type(result) for result in moved] == [str, BackendError, str]
        assert len(await harness.entries(f"{topic}.to")) == 4


async def test_what_cannot_be_taken_back_is_said(server: RunningServer, harness: RedisHarness, topic: str) -> None:
    async with limited(server) as (backend, user):
        [entry_id] = await taken(backend, topic)
        await user.rules("-xack", "-xdel")
        [result] = await backend.transfer_many(topic, "g", "c", [(entry_id, [Output(f"{topic}.to", Message(topic))])])
        assert isinstance(result, BackendError)
        assert result.may_have_happened
        assert len(await harness.entries(f"{topic}.to")) == 1


async def test_one_message_that_cannot_be_acknowledged_makes_one_dead_letter(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    recorder = Recorder()

    async def handler(delivery: Delivery) -> None:
        raise Reject("no")

    async with user_with(server, *ALL) as user:
        async with StreamBus(RedisBackend(user.url), quick(recorder, claim_idle_timeout=30.0)) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g", group_start_id="0"), handler) as subscription:
                await user.rules("-xack")
                await bus.publish(Message(topic))
                await until(lambda: len(recorder.of("on_error", "ack-flush")) >= 3)
                assert await harness.entries(f"{topic}.dead") == []
                await user.rules("+xack")
                await until(lambda: subscription.statistics().dead_lettered == 1)
    assert len(await harness.entries(f"{topic}.dead")) == 1


# --- many fields


async def test_an_entry_of_very_many_fields_becomes_a_dead_letter_and_goes_back(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    fields = {f"field{number}": f"value{number}".encode() for number in range(5000)}

    async def handler(delivery: Delivery) -> None:
        if not delivery.message.key.startswith("fine"):
            raise Reject("no")

    recorder = Recorder()
    config = SubscriptionConfig(topic, "g", group_start_id="0")
    async with StreamBus(RedisBackend(server.url), quick(recorder)) as bus:
        for key in ("fine1", "rejected"):
            await bus.publish(Message(topic, key=key))
        entry_id = await harness.append_raw(topic, fields)
        await bus.publish(Message(topic, key="fine2"))
        async with bus.subscribe(config, handler) as subscription:
            await until(lambda: subscription.statistics().dead_lettered == 2)
            await until(lambda: subscription.statistics().handled == 2)
        assert recorder.of("on_error", "ack-flush") == []
        assert recorder.of("on_lease_lost") == []
        letters = bus.dead_letters(topic, code="malformed")
        [letter] = [letter async for letter in letters]
        assert letter.raw == fields
        assert letter.first_id == entry_id
        assert await letters.replay() == ReplayReport(replayed=1)
        assert [letter.code async for letter in bus.dead_letters(topic)] == ["rejected"]
    assert (await harness.entries(topic))[-1][2] == fields


async def test_many_fields_that_cannot_be_acknowledged_are_not_appended_either(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with limited(server) as (backend, user):
        [entry_id] = await taken(backend, topic)
        outputs = [Output(f"{topic}.to", Message(topic), raw={f"{number}": b"" for number in range(4000)})]
        assert await backend.transfer(topic, "g", "somebody else", entry_id, outputs) is None
        await user.rules("-xack")
        with pytest.raises(BackendError, match=r"can't run this command|no permissions"):
            await backend.transfer(topic, "g", "c", entry_id, outputs)
        assert await harness.entries(f"{topic}.to") == []
        await user.rules("+xack")
        assert await backend.transfer(topic, "g", "c", entry_id, outputs) is not None
        assert await backend.transfer(topic, "g", "c", entry_id, outputs) is None
        [(_, _, raw)] = await harness.entries(f"{topic}.to")
        assert len(raw) == 4000


async def test_moves_beside_an_entry_of_many_fields_are_done_once_each(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with RedisBackend(server.url) as backend:
        ids = []
        for number in range(5):
            fields = {f"raw:{name}": b"" for name in range(4000 if number in (0, 2) else 1)}
            ids.append(await harness.append_raw(topic, fields))
        moves = [Move(entry_id, f"{topic}.to", None) for entry_id in ids]
        results = await backend.move_entries(topic, moves)
        assert all(isinstance(result, str) for result in results)
        assert await backend.move_entries(topic, moves) == [None] * 5
        assert [len(raw) for _, _, raw in await harness.entries(f"{topic}.to")] == [4000, 1, 4000, 1, 1]


async def test_a_move_that_can_delete_nowhere_says_that_it_is_half_done(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    async with limited(server) as (backend, user):
        entry_id = await backend.publish(topic, Message(topic))
        await user.rules("-xdel")
        [refused] = await backend.move_entries(topic, [Move(entry_id, f"{topic}.to", Message(topic))])
        assert isinstance(refused, BackendError)
        assert refused.may_have_happened
        assert len(await harness.entries(f"{topic}.to")) == 1


# --- acknowledgements


async def test_a_retry_that_cannot_be_deleted_is_not_acknowledged(server: RunningServer, topic: str) -> None:
    retries = retry_stream(topic, "g")
    async with limited(server) as (backend, user):
        ids = await taken(backend, retries)
        await user.rules("-xdel")
        with pytest.raises(BackendError) as caught:
            await backend.ack_many(retries, "g", ids, consumer="c")
        assert not caught.value.may_have_happened
        assert await owners(backend, retries) == ["c"]
        with pytest.raises(BackendError) as caught:
            await backend.ack(retries, "g", ids[0])
        assert caught.value.may_have_happened  # two commands: the first one has been carried out


async def test_an_error_in_a_later_part_says_that_earlier_ones_may_be_acknowledged(
    server: RunningServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with limited(server) as (backend, user):
        ids = await taken(backend, topic, PER_SCRIPT + 50)
        owned = backend._node._owned
        parts = 0

        async def count(*args: Any) -> list[str]:
            nonlocal parts
            parts += 1
            if parts == 2:
                await user.rules("-xack")
            return await owned(*args)

        monkeypatch.setattr(backend._node, "_owned", count)
        with pytest.raises(BackendError) as caught:
            await backend.ack_many(topic, "g", ids, consumer="c")
        assert caught.value.may_have_happened
        assert await owners(backend, topic) == ["c"] * 50


# --- what is due, what is idle


async def test_what_nobody_can_read_does_not_keep_others_from_being_due(server: RunningServer, topic: str) -> None:
    async with RedisBackend(server.url) as backend:
        await backend.create_group(topic, "g")
        poison = {b"\xc1": 1, b"\x01": 2, b"\x93\x01\x02\x03": 3}
        await to_thread.run_sync(lambda: server.client().zadd(delayed(topic), poison))
        await backend.publish_later(topic, Message(topic, key="fine"), delay=0.001)
        entries: list[Any] = []

        async def all_there() -> bool:
            entries.extend(await backend.read_new(topic, "g", "c", count=9, timeout=0))
            return len(entries) == 4

        await until(all_there)
        bad = [entry for entry in entries if isinstance(entry, MalformedEntry)]
        assert [entry.raw for entry in bad] == [{"delayed": value} for value in poison]
        assert [entry.message.key for entry in entries if isinstance(entry, ClaimedMessage)] == ["fine"]


async def test_what_is_due_is_not_doubled_where_it_cannot_be_removed(
    server: RunningServer, harness: RedisHarness, topic: str
) -> None:
    retries = retry_stream(topic, "g")
    async with limited(server) as (backend, user):
        await backend.create_group(topic, "g")
        await backend.create_group(retries, "g", "0")
        await backend.publish_later(retries, Message(topic), delay=0)
        await user.rules("-zrem")
        for _ in range(3):
            taken = await backend.redeliver(topic, retries, "g", "c", min_idle=60, count=9)
            assert taken.retries == []
            assert taken.lost is not None
            assert not taken.lost.can_pass
        assert await harness.entries(retries) == []
        await user.rules("+zrem")
        taken = await backend.redeliver(topic, retries, "g", "c", min_idle=60, count=9)
        assert len(taken.retries) == 1
        assert taken.lost is None


async def test_retries_that_are_there_come_although_others_cannot_be_appended(
    server: RunningServer, topic: str
) -> None:
    retries = retry_stream(topic, "g")
    async with limited(server) as (backend, user):
        await backend.create_group(topic, "g")
        await backend.create_group(retries, "g", "0")
        await backend.publish(retries, Message(topic))
        await user.rules("-zrange")
        taken = await backend.redeliver(topic, retries, "g", "c", min_idle=60, count=9)
        assert len(taken.retries) == 1
        assert taken.lost is not None


@pytest.mark.parametrize("right", ["xclaim", "xpending"])
async def test_what_cannot_be_fetched_is_not_taken_over(server: RunningServer, topic: str, right: str) -> None:
    async with limited(server) as (backend, user):
        await taken(backend, topic)
        await user.rules(f"-{right}")
        with pytest.raises(BackendError):
            await backend.reclaim_idle(topic, "g", "d", min_idle=0, count=9)
        await user.rules("+@all")
        assert await owners(backend, topic) == ["c"]


async def test_what_was_taken_over_comes_although_its_parking_place_stays(server: RunningServer, topic: str) -> None:
    async with limited(server) as (backend, user):
        ids = await taken(backend, topic)
        await backend.release(topic, "g", "c", ids)
        await user.rules("-xgroup")
        entries = await backend.reclaim_idle(topic, "g", "d", min_idle=60, count=9)
        assert [entry.id for entry in entries] == ids


# --- errors of scripts


@pytest.mark.parametrize(
    ("script", "text", "may_have_happened"),
    [
        ("transfer", "ERR not enough memory script: 0a, on @user_script:9.", True),
        ("transfer", "NOPERM No permissions to access a key", False),
        ("transfer", "WRONGTYPE Operation against a key script: 0a, on @user_script:2.", False),
        ("transfer", "ERR Error running script (call to f_0a): @user_script:2: @user_script: 2: -OOM command", False),
        ("release", "WRONGTYPE Operation against a key script: 0a, on @user_script:2.", True),
        ("release", "READONLY You can't write against a read only replica.", False),
    ],
)
async def test_an_error_within_a_script_may_have_left_something_done(
    server: RunningServer, topic: str, script: str, text: str, may_have_happened: bool
) -> None:
    async with proxied(server.port) as proxy, RedisBackend(proxy.url) as backend:
        ids = await taken(backend, topic)
        proxy.at(script, Answer(f"-{text}\r\n".encode()))
        outputs = [Output(f"{topic}.to", Message(topic))]
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "transfer": lambda: backend.transfer(topic, "g", "c", ids[0], outputs),
            "release": lambda: backend.release(topic, "g", "c", ids),
        }
        with pytest.raises(BackendError) as caught:
            await calls[script]()
        assert caught.value.may_have_happened == may_have_happened


async def test_what_a_pass_took_before_it_failed_is_found(server: RunningServer, topic: str) -> None:
    retries = retry_stream(topic, "g")
    async with proxied(server.port) as proxy, RedisBackend(proxy.url) as backend:
        await backend.create_group(retries, "g", "0")
        ids = await taken(backend, topic)
        # As if the script had taken it, and failed then.
        proxy.at("pass", Answer(b"-ERR not enough memory script: 0a, on @user_script:9.\r\n"))
        with pytest.raises(BackendError):
            await backend.redeliver(topic, retries, "g", "c", min_idle=60, count=9)
        found = await backend.redeliver(topic, retries, "g", "c", min_idle=60, count=9)
        assert [entry.id for entry in found.reclaimed] == ids
        assert found.searched
