"""Publishes that leave in one write share one event and one deadline. What a caller is told is its own all the same:
its own reply, its own error, and ``may_have_happened=False`` only if its message never leaves."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint
from fake_server import Command, bulk, fake_server
from trio.testing import MockClock

from anybus import BackendError, Message, StreamBus, StreamBusOptions
from anybus.backends.redis import RedisBackend, _waves
from anybus.backends.redis._link import Link
from anybus.backends.redis._waves import Waves

SOON = 15.0


def id_for(command: Command) -> bytes:
    """An answer that tells which of the messages it is for."""
    return bulk(b"%d-0" % len(command[4]))


async def test_each_of_many_publishes_at_once_gets_its_own_reply() -> None:
    def answer(command: Command) -> bytes:
        if len(command[4]) % 7 == 0:
            return b"-ERR refused %d\r\n" % len(command[4])
        return id_for(command)

    told: dict[int, str] = {}

    async with fake_server(answer) as server, RedisBackend(server.url) as backend:

        async def publish(number: int) -> None:
            message = Message("t", b"x" * number)
            size = len(backend._node._encode(message))
            try:
                entry_id = await backend.publish_within("t", message, timeout=SOON)
                assert entry_id == f"{size}-0"
            except BackendError as error:
                assert f"refused {size}" in str(error)
            told[number] = "told"

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for number in range(200):
                    tasks.start_soon(publish, number)
    assert len(told) == 200


async def test_a_cancelled_publish_leaves_the_others_of_its_wave_alone() -> None:
    async with fake_server(id_for) as server, RedisBackend(server.url) as backend:
        ids: list[str] = []

        async def publish(scope: anyio.CancelScope) -> None:
            with scope:
                ids.append(await backend.publish_within("t", Message("t"), timeout=SOON))

        scopes = [anyio.CancelScope() for _ in range(50)]
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for scope in scopes:
                    tasks.start_soon(publish, scope)
                await checkpoint()
                for scope in scopes[::2]:
                    scope.cancel()
        assert len(ids) >= 25
        assert await backend.publish_within("t", Message("t"), timeout=SOON) == ids[0]


async def test_what_was_told_to_be_unsent_is_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that takes nothing: what waits in the line behind a message expires there, and stays out."""
    async with fake_server(id_for) as server, RedisBackend(server.url) as backend:
        await backend.publish_within("t", Message("t"), timeout=SOON)
        takes_more = anyio.Event()
        send = Link.send

        async def send_later(link: Link, data: bytes) -> None:
            await takes_more.wait()
            await send(link, data)

        def takes_nothing(link: Link, data: bytes) -> int:
            return 0

        monkeypatch.setattr(Link, "send", send_later)
        monkeypatch.setattr(Link, "send_nowait", takes_nothing)
        errors: dict[str, BackendError] = {}

        async def publish(key: str) -> None:
            with pytest.raises(BackendError) as caught:
                await backend.publish_within("t", Message("t", key=key), timeout=0.3)
            errors[key] = caught.value

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as publishes:
                publishes.start_soon(publish, "first")
                await anyio.wait_all_tasks_blocked()
                publishes.start_soon(publish, "second")
            takes_more.set()
            await backend.publish_within("t", Message("t", key="third"), timeout=SOON)
        assert errors["first"].may_have_happened
        assert not errors["second"].may_have_happened
        sent = b" ".join(command[4] for command in server.commands if command[0] == b"XADD")
        assert b'"key":"third"' in sent
        assert b'"key":"second"' not in sent


async def test_without_an_answer_a_publish_ends_at_its_deadline_and_the_connection_stays_in_step() -> None:
    held: list[Command] = []

    def answer(command: Command) -> bytes:
        if not held:
            held.append(command)
            return b""
        late = id_for(held[0]) if len(held) == 1 else b""
        held.append(command)
        return late + id_for(command)

    async with fake_server(answer) as server:
        options = StreamBusOptions(publish_timeout=0.3)
        async with StreamBus(RedisBackend(server.url), options) as bus:
            with anyio.fail_after(SOON), pytest.raises(BackendError, match="publish_timeout") as caught:
                await bus.publish(Message("t", b"x"))
            assert caught.value.may_have_happened
            second = Message("t", b"xx" * 50)
            assert isinstance(bus.backend, RedisBackend)
            with anyio.fail_after(SOON):
                assert await bus.publish(second) == f"{len(bus.backend._node._encode(second))}-0"


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_wave_that_cannot_leave_takes_no_more_members_after_an_eighth_of_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_waves, "_LONGEST_SLEEP", 60.0)
    waves = Waves()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(waves.expire)
        first = waves.join(0.8)
        assert waves.join(0.8).wave is first.wave
        with anyio.fail_after(SOON):
            while waves.join(0.8).wave is first.wave:  # noqa: ASYNC110 - nobody is told when a wave is sealed
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    assert not first.wave.event.is_set()


@pytest.mark.parametrize("anyio_backend", [("trio", {"clock": MockClock(autojump_threshold=0)})])
async def test_a_wave_that_opens_behind_an_answered_one_closes_in_time_all_the_same() -> None:
    waves = Waves()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(waves.expire)
        answered = waves.join(1.0)
        waves.seal()
        await anyio.sleep(0.01)
        answered.done()
        stuck = waves.join(1.0)
        await anyio.sleep(0.12)
        assert waves.join(1.0).wave is stuck.wave
        await anyio.sleep(0.02)
        assert waves.join(1.0).wave is not stuck.wave
        tasks.cancel_scope.cancel()


async def test_a_connection_that_breaks_tells_a_whole_wave() -> None:
    def hang_up(command: Command) -> None:
        return None

    errors: list[BackendError] = []
    async with fake_server(hang_up) as server, RedisBackend(server.url) as backend:

        async def publish() -> None:
            with pytest.raises(BackendError) as caught:
                await backend.publish_within("t", Message("t"), timeout=SOON)
            errors.append(caught.value)

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(publish)
    assert len(errors) == 20
    assert any(error.may_have_happened for error in errors)


async def test_where_a_socket_cannot_be_written_to_directly_publishes_go_the_longer_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Link, "can_send_nowait", False)
    async with fake_server(id_for) as server, RedisBackend(server.url) as backend:
        with anyio.fail_after(SOON):
            assert await backend.publish_within("t", Message("t"), timeout=SOON)
