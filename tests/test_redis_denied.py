"""What the bus asks for information only is never required, however it is refused.

Managed servers rename or block INFO, COMMAND, CLIENT and SCRIPT; proxies know few commands; ACLs deny what a user does
not need. Whoever publishes needs XADD. Whoever consumes needs the commands that docs/redis.md lists.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import to_thread
from conftest import SERVER
from fake_server import Command, bulk, fake_server, greeting, listening
from harness import QUICK, SOON, Recorder, new_topic, quick, until
from servers import RunningServer

from anybus import BackendError, Delivery, Message, StreamBus, SubscriptionConfig, UnsupportedError, connect
from anybus.abc import ClaimedMessage
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import meta

SECRET = "hunter2"
RENAMED = ("INFO", "COMMAND", "CLIENT", "SCRIPT")


@pytest.fixture(params=[*RENAMED, "all"])
def locked_down(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """A server without one of these commands, or without any of them."""
    names = RENAMED if request.param == "all" else (request.param,)
    options = [option for name in names for option in ("--rename-command", name, "")]
    with RunningServer(SERVER, *options) as running:
        yield running


@pytest.fixture
def admin(server: RunningServer) -> Iterator[Any]:
    with server.client() as client:
        yield client


@asynccontextmanager
async def user(server: RunningServer, admin: Any, *rules: str) -> AsyncGenerator[str, None]:
    """The URL of a user who may do only this."""
    name = new_topic().replace(".", "-")
    rules = ("on", f">{SECRET}", "-@all", *rules)
    await to_thread.run_sync(lambda: admin.execute_command("ACL", "SETUSER", name, *rules))
    try:
        yield f"redis://{name}:{SECRET}@127.0.0.1:{server.port}"
    finally:
        await to_thread.run_sync(lambda: admin.execute_command("ACL", "DELUSER", name))


async def everything_works(url: str, topic: str) -> None:
    """A message is handled, one is retried, one becomes a dead letter, and reads that are cancelled lose nothing."""
    handled: list[bytes] = []
    letters: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.payload)
        if delivery.message.payload == b"again" and delivery.state.attempt == 1:
            raise RuntimeError("once")
        if delivery.message.payload == b"bad":
            await delivery.nack("bad")

    async def bury(delivery: Delivery) -> None:
        letters.append(delivery.message.headers["dead-letter-reason"])

    recorder = Recorder()
    config = SubscriptionConfig(topic, "g", retry_backoff=QUICK)
    buried = SubscriptionConfig(f"{topic}.dead", "g", dead_letter_topic=f"{topic}.dead.dead")
    async with StreamBus(RedisBackend(f"{url}?client_name=shop"), quick(recorder)) as bus:
        async with bus.subscribe(config, handler), bus.subscribe(buried, bury):
            await bus.publish_batch([Message(topic, payload) for payload in (b"fine", b"again", b"bad")])
            await until(lambda: sorted(handled) == [b"again", b"again", b"bad", b"fine"] and letters == ["bad"])
        assert {event.scope for event in recorder.of("on_error")} <= {"handler"}
        await cancelled_reads_lose_nothing(bus.backend, new_topic())


async def cancelled_reads_lose_nothing(backend: Any, topic: str) -> None:
    await backend.create_group(topic, "g")
    for number in range(2):
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: backend.read_new(topic, "g", "c", count=1, timeout=3600))
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
        await backend.publish(topic, Message(topic, str(number).encode()))
        (entry,) = await backend.read_new(topic, "g", "c", count=10, timeout=SOON)
        assert isinstance(entry, ClaimedMessage)
        assert entry.message.payload == str(number).encode()


async def test_a_server_on_which_commands_were_renamed_serves_all_the_same(
    locked_down: RunningServer, topic: str
) -> None:
    await everything_works(locked_down.url, topic)

    def floor() -> Any:
        with locked_down.client() as client:
            return client.hget(meta(topic), "g")

    assert await to_thread.run_sync(floor) is not None, "the group's floor is kept without anybody watching"


async def test_a_producer_needs_the_right_to_append_and_no_other(server: RunningServer, admin: Any, topic: str) -> None:
    async with user(server, admin, "+xadd", f"~{topic}") as url:
        async with connect(url) as bus:
            await bus.publish(Message(topic, b"one"))
            assert (await bus.publish_batch([Message(topic, b"two"), Message(topic, b"three")])).all_ok
            with pytest.raises(BackendError, match="NOPERM") as caught:
                await bus.publish(Message(new_topic()))
            assert not caught.value.can_pass
        async with connect(f"{url}?client_name=shop") as bus:
            await bus.publish(Message(topic, b"four"))
    assert await to_thread.run_sync(admin.xlen, topic) == 4


async def test_a_producer_in_another_database_needs_the_right_to_select_it(
    server: RunningServer, admin: Any, topic: str
) -> None:
    async with user(server, admin, "+xadd", f"~{topic}") as url:
        with pytest.raises(BackendError, match="NOPERM") as caught:
            async with connect(f"{url}/3"):
                pass
        assert not caught.value.can_pass
    async with user(server, admin, "+xadd", "+select", f"~{topic}") as url:
        async with connect(f"{url}/3") as bus:
            await bus.publish(Message(topic))


CONSUMING = [
    "+eval",
    "+evalsha",
    "+time",
    "+xadd",
    "+xlen",
    "+xreadgroup",
    "+xack",
    "+xdel",
    "+xclaim",
    "+xautoclaim",
    "+xpending",
    "+xgroup",
    "+xinfo",
    "+zadd",
    "+zrem",
    "+zrange",
    "+zrangebyscore",
    "+exists",
    "+zscan",
    "+hget",
    "+hset",
    "+type",
]


async def test_a_consumer_needs_none_of_the_commands_that_only_inform(
    server: RunningServer, admin: Any, topic: str
) -> None:
    """Nor SCRIPT LOAD, CLIENT ID, CLIENT SETNAME and CLIENT UNBLOCK."""
    async with user(server, admin, *CONSUMING, "~*") as url:
        async with RedisBackend(url) as backend:
            told = backend._client.server
            assert (told.can_unblock, told.can_load) == (False, False)
        await everything_works(url, topic)


REFUSALS = [
    b"-ERR unknown command 'X'\r\n",
    b"-NOPERM no\r\n",
    b"-ERR command not allowed for this plan\r\n",
    b"-FORBIDDEN ask your provider\r\n",
    b"-\r\n",
]


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize(
    "name", [b"CLIENT ID", b"CLIENT SETNAME", b"INFO SERVER", b"COMMAND INFO", b"CLIENT UNBLOCK", b"SCRIPT LOAD"]
)
async def test_a_refusal_in_any_words_is_tolerated(name: bytes, refusal: bytes) -> None:
    def greet(command: Command) -> bytes | None:
        if b" ".join(command[:2]).upper() == name:
            return refusal
        if command[0] in (b"ECHO", b"XAUTOCLAIM"):
            return b"-ERR wrong number of arguments\r\n" if command[0] == b"XAUTOCLAIM" else bulk(command[1])
        return b"+OK\r\n" if command[0] == b"CLIENT" and command[1] == b"SETNAME" else greeting(command)

    async with fake_server(lambda _: bulk(b"1-1")) as fake:
        fake.greet = greet
        async with RedisBackend(f"{fake.url}?client_name=shop") as backend:
            assert await backend.publish("t", Message("t")) == "1-1"


@pytest.mark.parametrize(
    "refusal",
    [
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-ERR no upstream host\r\n",
        b"-NOAUTH Authentication required.\r\n",
        b"-BUSY Redis is busy running a script.\r\n",
    ],
)
async def test_a_server_that_refuses_everything_is_not_entered(refusal: bytes) -> None:
    async with fake_server(lambda _: refusal) as fake:
        fake.greet = lambda _: refusal
        with anyio.fail_after(SOON), pytest.raises(BackendError) as caught:
            async with RedisBackend(fake.url):
                pass
    assert refusal[1:].decode().strip() in str(caught.value)
    assert not caught.value.may_have_happened


@pytest.mark.parametrize("auth", ["", "user:password@"], ids=["nobody", "somebody"])
async def test_a_server_that_is_full_says_so(auth: str) -> None:
    """It says so once, whatever it is asked, and closes the connection."""

    async def turn_away(stream: Any) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b"-ERR max number of clients reached\r\n")

    async with listening(turn_away) as port:
        with anyio.fail_after(SOON), pytest.raises(BackendError, match="max number of clients reached") as caught:
            async with RedisBackend(f"redis://{auth}127.0.0.1:{port}"):
                pass
    assert caught.value.can_pass


async def test_a_server_that_is_too_old_is_found_out_without_asking_for_information() -> None:
    def greet(command: Command) -> bytes | None:
        if command[0] in (b"INFO", b"COMMAND"):
            return b"-NOPERM no\r\n"
        return b"-ERR unknown command `XAUTOCLAIM`\r\n" if command[0] == b"XAUTOCLAIM" else greeting(command)

    async with fake_server(lambda _: b"+OK\r\n") as fake:
        fake.greet = greet
        with pytest.raises(UnsupportedError, match=r"6\.2"):
            async with RedisBackend(fake.url):
                pass
