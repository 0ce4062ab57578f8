"""The connection: always in step, never an endless wait, never a reply given to the wrong caller, no password shown.

Specification: DESIGN.md, sections 3 (what a failed publish says) and 6, and issue 4: a cancelled caller's reply is
still taken, in order, and dropped; a connection that breaks fails every waiter with an error that says whether the
command may have reached the server, and the next use connects again; hostile bytes end in a clear error; TLS is
verified unless somebody says otherwise.
"""

from __future__ import annotations

import os
import random
import signal
import ssl
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis
import redis.asyncio
import trustme
from anyio import to_thread
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint
from anyio.streams.tls import TLSStream
from clusters import ClusterNode
from conftest import SERVER
from fake_server import GONE, Answer, FakeServer, bulk, fake_server, greeting, listening
from harness import SOON, new_topic, until
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider
from servers import RunningServer, free_port
from sweeps import sampled

from anybus import (
    BackendError,
    EventBusError,
    Message,
    StreamBus,
    StreamBusOptions,
    UnsupportedError,
    ValidationError,
    connect,
)
from anybus.abc import ClaimedMessage, Output
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._client import Client
from anybus.backends.redis._session import Call, Session
from anybus.backends.redis._settings import Settings, from_client, from_url
from anybus.backends.redis._slots import SLOTS

PATIENCE = 0.3
"""The command_timeout of tests in which a server is silent."""

SECRET = "hunter2"


@asynccontextmanager
async def connected(settings: Settings) -> AsyncGenerator[Client, None]:
    client = Client(settings)
    raised: list[BaseException] = []
    async with anyio.create_task_group() as tasks:
        link = await client.mux.connect()
        tasks.start_soon(client.mux.run, link, raised.append, tasks)
        try:
            yield client
        finally:
            client.mux.close()


async def echo(client: Client, text: str) -> str:
    reply: bytes = await client.call("ECHO", text)
    return reply.decode()


@pytest.fixture
def own_server() -> Iterator[RunningServer]:
    """A server that a test may freeze and kill."""
    with RunningServer(SERVER) as running:
        yield running


@pytest.fixture
def admin(server: RunningServer) -> Iterator[Any]:
    with server.client() as client:
        yield client


# --- cancelled callers


@sampled("cancellations", 300, 2000)
async def test_cancelled_callers_never_leave_the_connection_out_of_step(
    cancellations: int, server: RunningServer
) -> None:
    """Callers are cancelled before their command is sent, while it is under way, and after it was answered."""
    dice = random.Random(4)
    answered: dict[int, str] = {}
    scopes = [anyio.CancelScope() for _ in range(2 * cancellations)]
    async with connected(from_url(server.url)) as client:

        async def call(number: int) -> None:
            with scopes[number]:
                answered[number] = await echo(client, f"value {number}")

        with anyio.fail_after(4 * SOON):
            async with anyio.create_task_group() as tasks:
                for number, scope in enumerate(scopes):
                    tasks.start_soon(call, number)
                    if number % 2:
                        for _ in range(dice.choice((0, 1, 1, 2, 3, 5))):
                            await checkpoint()
                        scope.cancel()
            assert await echo(client, "the last") == "the last"
        assert client.mux.connections == 1
    assert answered == {number: f"value {number}" for number in answered}
    assert set(range(0, len(scopes), 2)) <= answered.keys(), "whoever was not cancelled has its reply"
    assert len(scopes) - len(answered) > cancellations // 20, "some were cancelled in time"


async def test_a_cancelled_pipeline_takes_all_its_replies_along(server: RunningServer) -> None:
    async with connected(from_url(server.url)) as client:
        for size in range(1, 50):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await client.mux.pipeline([("ECHO", f"{size}-{index}") for index in range(size)])
            assert await echo(client, f"after {size}") == f"after {size}"
        assert client.mux.connections == 1


async def test_a_pipeline_of_nothing_is_nothing(server: RunningServer) -> None:
    async with connected(from_url(server.url)) as client:
        with anyio.fail_after(SOON):
            assert await client.mux.pipeline([]) == []
            assert await echo(client, "a") == "a"


# --- a connection that breaks


async def test_a_connection_that_breaks_fails_every_waiter_and_the_next_use_connects_again(
    server: RunningServer, admin: Any, topic: str
) -> None:
    async with connected(from_url(server.url)) as client:
        client_id = await client.call("CLIENT", "ID")
        calls = [await client.mux.start((("BLPOP", topic, "0"),))]
        calls += [await client.mux.start((("ECHO", str(number)),)) for number in range(10)]
        await anyio.wait_all_tasks_blocked()
        assert not any(call.event.is_set() for call in calls), "all of them wait behind the first"
        await to_thread.run_sync(lambda: admin.client_kill_filter(_id=client_id))
        with anyio.fail_after(SOON):
            for call in calls:
                await call.event.wait()
                assert isinstance(call.error, BackendError)
                assert call.error.may_have_happened
                assert call.error.can_pass
                assert f"127.0.0.1:{server.port}" in str(call.error)
            assert await echo(client, "again") == "again"
        assert client.mux.connections == 2


async def test_what_is_said_to_have_surely_not_happened_has_not(server: RunningServer, topic: str) -> None:
    """The connection is given up 100 times, at different moments between calls and their replies."""
    done = maybe = 0
    async with connected(from_url(server.url)) as client:
        for number in range(100):
            calls: list[Call] = []
            for part in range(8):
                calls.append(await client.mux.start((("INCR", topic),)))
                if number % 8 == part:
                    client.mux.reset()
                for _ in range(number % 3):
                    await checkpoint()
            with anyio.fail_after(SOON):
                for call in calls:
                    await call.event.wait()
                    if call.error is None:
                        done += 1
                    else:
                        assert isinstance(call.error, BackendError)
                        assert call.error.can_pass
                        maybe += call.error.may_have_happened
        assert done <= int(await client.call("GET", topic)) <= done + maybe


async def test_a_frozen_server_ends_in_an_error_and_not_in_an_endless_wait(own_server: RunningServer) -> None:
    topic = new_topic()
    async with RedisBackend(own_server.url, connect_timeout=PATIENCE, command_timeout=PATIENCE) as backend:
        await backend.create_group(topic, "g")
        assert await backend.read_new(topic, "g", "c", count=1, timeout=0.01) == []
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            for silent in (
                lambda: backend.publish(topic, Message(topic)),
                lambda: backend.read_new(topic, "g", "c", count=1, timeout=0.1),
                lambda: backend.read_new(topic, "g", "c", count=1, timeout=0),
            ):
                with anyio.fail_after(SOON), pytest.raises(BackendError) as caught:
                    await silent()
                assert caught.value.can_pass
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        with anyio.fail_after(SOON):
            await backend.publish(topic, Message(topic, b"thawed"))
            payloads: list[bytes] = []
            while b"thawed" not in payloads:
                entries = await backend.read_new(topic, "g", "c", count=10, timeout=1)
                payloads += [entry.message.payload for entry in entries if isinstance(entry, ClaimedMessage)]


async def until_a_client_is_blocked(server: RunningServer) -> None:
    def blocked() -> bool:
        with redis.Redis(port=server.port) as client:
            clients: Any = client.info("clients")
            return bool(int(clients["blocked_clients"]))

    await until(lambda: to_thread.run_sync(blocked), "a blocked client")


async def test_a_blocked_read_of_a_frozen_server_is_a_dead_connection_soon(own_server: RunningServer) -> None:
    topic = new_topic()
    errors: list[BackendError] = []
    async with RedisBackend(own_server.url, command_timeout=PATIENCE) as backend:
        await backend.create_group(topic, "g")

        async def read() -> None:
            try:
                await backend.read_new(topic, "g", "c", count=1, timeout=3)
            except BackendError as error:
                errors.append(error)

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await until_a_client_is_blocked(own_server)
                os.kill(own_server.pid, signal.SIGSTOP)
        os.kill(own_server.pid, signal.SIGCONT)
    assert [(error.may_have_happened, error.can_pass) for error in errors] == [(True, True)]


async def test_a_cancelled_read_of_a_frozen_server_ends_soon_all_the_same(own_server: RunningServer) -> None:
    topic = new_topic()
    async with RedisBackend(own_server.url) as backend:
        await backend.create_group(topic, "g")
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:

                async def read() -> None:
                    await backend.read_new(topic, "g", "c", count=1, timeout=3600)

                tasks.start_soon(read)
                await until_a_client_is_blocked(own_server)
                os.kill(own_server.pid, signal.SIGSTOP)
                tasks.cancel_scope.cancel()
        os.kill(own_server.pid, signal.SIGCONT)


async def test_a_publish_while_disconnected_waits_and_then_says_that_it_surely_did_not_happen(
    own_server: RunningServer,
) -> None:
    topic = new_topic()
    async with StreamBus(RedisBackend(own_server.url), StreamBusOptions(publish_timeout=PATIENCE)) as bus:
        await bus.publish(Message(topic))
        own_server.kill()
        with anyio.fail_after(SOON):
            # The first one may find the connection still there.
            with suppress(BackendError):
                await bus.publish(Message(topic))
            before = anyio.current_time()
            with pytest.raises(BackendError) as caught:
                await bus.publish(Message(topic))
        assert not caught.value.may_have_happened
        assert caught.value.can_pass
        assert anyio.current_time() - before > PATIENCE / 2, "it waits for the server to come back"
        await to_thread.run_sync(own_server.start)
        with anyio.fail_after(SOON):
            while True:
                try:
                    await bus.publish(Message(topic))
                except BackendError as error:
                    assert not error.may_have_happened
                else:
                    break


async def test_a_publish_that_waits_goes_out_when_the_server_comes_back(own_server: RunningServer) -> None:
    topic = new_topic()
    async with StreamBus(RedisBackend(own_server.url), StreamBusOptions(publish_timeout=SOON)) as bus:
        own_server.kill()
        with suppress(BackendError):
            await bus.publish(Message(topic))  # finds the connection still there, perhaps
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bus.publish, Message(topic, b"patient"))
            await anyio.wait_all_tasks_blocked()
            await to_thread.run_sync(own_server.start)

        def stored() -> int:
            with own_server.client() as client:
                return int(client.xlen(topic))

        assert await to_thread.run_sync(stored) == 1


async def publish_one(bus: StreamBus, message: Message) -> None:
    await bus.publish(message)


async def publish_batch(bus: StreamBus, message: Message) -> None:
    (await bus.publish_batch([message])).raise_for_errors()


@pytest.mark.parametrize(("publish", "size"), [(publish_one, 0), (publish_batch, 0), (publish_one, 2_000_000)])
async def test_only_publish_timeout_bounds_the_wait_for_a_connection(
    own_server: RunningServer, publish: Callable[[StreamBus, Message], Coroutine[Any, Any, None]], size: int
) -> None:
    topic = new_topic()
    with own_server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-config")  # what is large goes alone, then
    backend = RedisBackend(own_server.url, connect_timeout=PATIENCE, command_timeout=PATIENCE)
    async with StreamBus(backend, StreamBusOptions(publish_timeout=2 * SOON)) as bus:
        own_server.kill()
        await until(lambda: not backend._client.mux.is_connected)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish, bus, Message(topic, b"x" * size))
            await anyio.sleep(3 * PATIENCE)
            await to_thread.run_sync(own_server.start)
        assert await backend.count_entries(topic) == 1


async def test_what_one_caller_notes_in_his_error_is_not_told_to_the_others(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def write_nothing(*_: object) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(Session, "_write", write_nothing)
    async with RedisBackend(server.url) as backend:
        await backend.count_entries("t")
        mux = backend._client.mux
        calls = [await mux.start([("PING",)]) for _ in range(4)]
        mux.reset()
        for call in calls:
            await call.event.wait()
        unsent = [call.error for call in calls if not call.sent]
        assert len(unsent) > 1
        assert len(set(map(id, unsent))) == len(unsent)
        assert all(isinstance(error, BackendError) and not error.may_have_happened for error in unsent)


async def test_a_publish_while_disconnected_surely_did_not_happen_however_late_the_loop_is(
    own_server: RunningServer,
) -> None:
    async with StreamBus(RedisBackend(own_server.url), StreamBusOptions(publish_timeout=PATIENCE)) as bus:
        await bus.publish(Message("t"))
        own_server.kill()
        with suppress(BackendError):
            await bus.publish(Message("t"))  # the break is noticed now
        errors: list[BackendError] = []

        async def publish() -> None:
            try:
                await bus.publish(Message("t"))
            except BackendError as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish)
            await anyio.wait_all_tasks_blocked()
            time.sleep(PATIENCE + 0.05)  # noqa: ASYNC251 - somebody else's blocking call, say
        assert [error.may_have_happened for error in errors] == [False]


async def test_a_publish_that_a_frozen_server_swallowed_may_have_happened(own_server: RunningServer) -> None:
    topic = new_topic()
    async with StreamBus(RedisBackend(own_server.url), StreamBusOptions(publish_timeout=PATIENCE)) as bus:
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            with anyio.fail_after(SOON), pytest.raises(BackendError) as caught:
                await bus.publish(Message(topic))
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        assert caught.value.may_have_happened


async def test_entering_raises_where_nobody_listens() -> None:
    with anyio.fail_after(SOON), pytest.raises(BackendError) as caught:
        async with RedisBackend(f"redis://127.0.0.1:{free_port()}"):
            pass
    assert not caught.value.may_have_happened


async def test_entering_a_server_that_says_nothing_ends_by_connect_timeout() -> None:
    async def say_nothing(stream: ByteStream) -> None:
        async with stream:
            with suppress(*GONE):
                while True:
                    await stream.receive()

    async with listening(say_nothing) as port:
        with anyio.fail_after(SOON), pytest.raises(BackendError) as caught:
            async with RedisBackend(f"redis://127.0.0.1:{port}", connect_timeout=PATIENCE):
                pass
    assert caught.value.can_pass


# --- hostile bytes

Operation = Callable[[RedisBackend], Awaitable[object]]

MESSAGE = Message("t", b"payload")
OPERATIONS: dict[str, Operation] = {
    "publish": lambda backend: backend.publish("t", MESSAGE),
    "publish_many": lambda backend: backend.publish_many([("t", MESSAGE, None)] * 3),
    "create_group": lambda backend: backend.create_group("t", "g"),
    "read_new": lambda backend: backend.read_new("t", "g", "c", count=5, timeout=0),
    "blocking read_new": lambda backend: backend.read_new("t", "g", "c", count=5, timeout=0.01),
    "reclaim_idle": lambda backend: backend.reclaim_idle("t", "g", "c", min_idle=1, count=5),
    "redeliver": lambda backend: backend.redeliver("t", "anybus:{t}:retry:g", "g", "c", min_idle=1, count=5),
    "ack": lambda backend: backend.ack("t", "g", "1-1"),
    "ack_many": lambda backend: backend.ack_many("t", "g", ["1-1"], consumer="c"),
    "renew": lambda backend: backend.renew("t", "g", "c", ["1-1"]),
    "release": lambda backend: backend.release("t", "g", "c", ["1-1"]),
    "transfer": lambda backend: backend.transfer("t", "g", "c", "1-1", [Output("u", MESSAGE)]),
    "publish_later": lambda backend: backend.publish_later("t", MESSAGE, delay=1),
    "cancel_later": lambda backend: backend.cancel_later("t", "a"),
    "count_entries": lambda backend: backend.count_entries("t"),
    "pending_entries": lambda backend: backend.pending_entries("t", "g"),
    "consumer_names": lambda backend: backend.consumer_names("t", "g"),
    "forget_consumer": lambda backend: backend.forget_consumer("t", "g", "c"),
}

SENSELESS: dict[str, bytes | None] = {
    "nothing but an end": None,
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a broken number": b":12x\r\n",
    "a reply cut short": b"$100\r\nabc",
    "too many replies": b"+OK\r\n" * 20,
    "a number": b":7\r\n",
    "a negative number": b":-7\r\n",
    "text": b"+OK\r\n",
    "bytes that are no text": bulk(b"\xff\xfe"),
    "nil": b"$-1\r\n",
    "a nil array": b"*-1\r\n",
    "an empty array": b"*0\r\n",
    "an array of numbers": b"*3\r\n:1\r\n:2\r\n:3\r\n",
    "an array of nils": b"*3\r\n$-1\r\n$-1\r\n$-1\r\n",
    "an array of texts": b"*3\r\n+a\r\n+b\r\n+c\r\n",
    "arrays in arrays": b"*1\r\n*2\r\n+t\r\n*1\r\n*2\r\n+1-1\r\n:5\r\n",
    "an entry of wrong types": b"*1\r\n*2\r\n+t\r\n*1\r\n*2\r\n:1\r\n*2\r\n+message\r\n:5\r\n",
    "an error inside": b"*2\r\n-ERR inner\r\n+0-0\r\n",
    "an error of no known kind": b"-WHAT is this\r\n",
    "an empty error": b"-\r\n",
    "a lost script, again and again": b"-NOSCRIPT No matching script.\r\n",
}


def saying(answer: bytes | None) -> Answer:
    return lambda _: answer


def greeting_but(name: bytes) -> Answer:
    """Decent but for one answer, which is left to the test."""
    return lambda command: None if b" ".join(command[:2]).upper() == name else greeting(command)


async def ends_well(backend: RedisBackend, operation: Operation) -> None:
    """With a result or with an error of ours, soon."""
    with anyio.fail_after(SOON), suppress(EventBusError):
        await operation(backend)


@pytest.mark.parametrize("said", SENSELESS.values(), ids=SENSELESS.keys())
async def test_whatever_a_server_says_the_answer_is_a_result_or_a_clear_error(said: bytes | None) -> None:
    async with fake_server(lambda _: said) as fake:
        for operation in OPERATIONS.values():
            async with RedisBackend(fake.url, command_timeout=PATIENCE / 3) as backend:
                await ends_well(backend, operation)


@pytest.mark.parametrize("name", ["publish", "count_entries", "reclaim_idle", "renew", "pending_entries"])
@pytest.mark.parametrize("said", ["a nil array", "an array of nils", "another protocol", "nothing but an end"])
async def test_an_answer_of_the_wrong_kind_is_never_taken_for_a_result(name: str, said: str) -> None:
    async with fake_server(lambda _: SENSELESS[said]) as fake:
        async with RedisBackend(fake.url, command_timeout=PATIENCE) as backend:
            with anyio.fail_after(SOON), pytest.raises(BackendError) as caught:
                await OPERATIONS[name](backend)
    assert f"127.0.0.1:{fake.port}" in str(caught.value)
    assert caught.value.may_have_happened


async def test_a_server_that_says_nothing_to_a_command_is_a_dead_connection_soon() -> None:
    async with fake_server(lambda _: b"") as fake:
        async with RedisBackend(fake.url, command_timeout=PATIENCE / 3) as backend:
            for name in ("publish", "read_new", "blocking read_new", "reclaim_idle", "forget_consumer"):
                await ends_well(backend, OPERATIONS[name])


@pytest.mark.parametrize("said", SENSELESS.values(), ids=SENSELESS.keys())
async def test_whatever_a_server_says_on_connecting_the_answer_is_a_clear_error(said: bytes | None) -> None:
    """Asked for anything of its greeting: the one answer after the other is replaced."""
    asked = (b"CLIENT ID", b"INFO SERVER", b"COMMAND INFO", b"CLIENT UNBLOCK", b"SCRIPT LOAD")
    for place in asked:
        async with fake_server(lambda _: b"+OK\r\n") as fake:
            # Left to its own answer, this name gets what the test says.
            fake.greet = greeting_but(place)
            fake.answer = saying(said)
            with anyio.fail_after(SOON), suppress(EventBusError):
                async with RedisBackend(fake.url, connect_timeout=PATIENCE, command_timeout=PATIENCE):
                    pass


async def test_a_server_that_turns_into_nonsense_later_harms_nobody_but_its_callers() -> None:
    """The connection is made again and again, and the bus lives on."""
    async with fake_server(lambda _: bulk(b"1-1")) as fake:
        async with RedisBackend(fake.url, connect_timeout=PATIENCE, command_timeout=PATIENCE) as backend:
            assert await backend.publish("t", MESSAGE) == "1-1"
            for nonsense in SENSELESS.values():
                fake.greet, fake.answer = saying(None), saying(nonsense)
                with anyio.move_on_after(PATIENCE / 3), suppress(BackendError):
                    while True:
                        await backend.publish("t", MESSAGE)
                        await checkpoint()
            fake.greet, fake.answer = greeting, saying(bulk(b"2-2"))
            with anyio.fail_after(SOON):
                while True:
                    with suppress(BackendError):
                        if await backend.publish("t", MESSAGE) == "2-2":
                            break


async def test_an_error_in_the_middle_of_a_pipeline_is_that_commands_alone() -> None:
    replies = [bulk(b"1-1"), b"-WRONGTYPE no stream\r\n", bulk(b"1-2"), b"*0\r\n", bulk(b"1-3")]
    said = iter(replies)
    async with fake_server(lambda _: next(said)) as fake:
        async with RedisBackend(fake.url) as backend:
            results = await backend.publish_many([("t", MESSAGE, None)] * len(replies))
    assert [results[0], results[2], results[4]] == ["1-1", "1-2", "1-3"]
    refused, senseless = results[1], results[3]
    assert isinstance(refused, BackendError)
    assert not refused.may_have_happened
    assert "WRONGTYPE" in str(refused)
    assert isinstance(senseless, BackendError)
    assert senseless.may_have_happened


async def test_a_reply_too_many_is_never_given_to_the_next_caller() -> None:
    """It comes with the reply before it, when nobody else waits."""
    first = True

    def say(command: list[bytes]) -> bytes:
        nonlocal first
        surplus, first = (bulk(b"whose?") if first else b""), False
        return bulk(command[1]) + surplus

    async with fake_server(say) as fake:
        async with connected(from_url(fake.url)) as client:
            assert await echo(client, "mine") == "mine"
            for number in range(20):
                with suppress(BackendError):
                    assert await echo(client, str(number)) == str(number)
            assert client.mux.connections == 2


@pytest.mark.parametrize("cut", [b"", b"$5\r\nwro", b"*2\r\n$3\r\none\r\n", b"-ERR"])
async def test_a_reply_cut_short_by_a_broken_connection_is_never_completed_by_the_next_one(cut: bytes) -> None:
    """Ten callers wait: two of them are answered, the third in part, then the connection is gone."""
    count = 0

    def say(command: list[bytes]) -> bytes | None:
        nonlocal count
        count += 1
        if count == 3:
            return cut
        return bulk(command[1]) if count < 3 or count > 4 else None

    async with fake_server(say) as fake:
        async with connected(from_url(fake.url)) as client:
            calls = [await client.mux.start((("ECHO", str(number)),)) for number in range(10)]
            with anyio.fail_after(SOON):
                for call in calls:
                    await call.event.wait()
                assert await echo(client, "again") == "again"
    assert [call.replies for call in calls[:2]] == [[b"0"], [b"1"]]
    for call in calls[2:]:
        assert call.replies == []
        assert isinstance(call.error, BackendError)
        assert call.error.may_have_happened


# --- who the server is


def announcing(info: bytes, known: bytes = b"*1\r\n*1\r\n$10\r\nxautoclaim\r\n") -> Callable[[FakeServer], None]:
    def announce(fake: FakeServer) -> None:
        def greet(command: list[bytes]) -> bytes | None:
            if command[0] == b"INFO":
                return info
            return known if command[0] == b"COMMAND" else greeting(command)

        fake.greet = greet

    return announce


@pytest.mark.parametrize(
    ("announce", "words"),
    [
        (announcing(bulk(b"redis_version:6.0.16\r\nredis_mode:standalone"), b"*1\r\n*-1\r\n"), ("6.0.16", "6.2")),
        (announcing(b"-NOPERM no\r\n", b"*1\r\n$-1\r\n"), ("6.2",)),
        (announcing(bulk(b"redis_version:8.2.0\r\nredis_mode:sentinel")), ("is a sentinel", "redis+sentinel://")),
        (announcing(bulk(b"redis_version:7.2.4\r\nserver_mode:sentinel")), ("is a sentinel", "redis+sentinel://")),
    ],
    ids=["too old", "too old, without INFO", "sentinel", "Valkey's sentinel"],
)
async def test_a_server_that_is_not_supported_is_refused(
    announce: Callable[[FakeServer], None], words: tuple[str, ...]
) -> None:
    async with fake_server(lambda _: b"+OK\r\n") as fake:
        announce(fake)
        with pytest.raises(UnsupportedError) as caught:
            async with RedisBackend(fake.url):
                pass
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("rights", ["+@all", "-info"])
async def test_a_real_server_in_cluster_mode_is_recognized(rights: str) -> None:
    node = ClusterNode(SERVER)
    with node:
        node.ask("ACL", "SETUSER", "default", rights)
        with pytest.raises(BackendError, match="serves any slot") as caught:
            async with RedisBackend(node.url):
                pass
        assert caught.value.can_pass
        node.ask("CLUSTER", "ADDSLOTS", *range(SLOTS))
        await until(lambda: node.info()["cluster_state"] == "ok", "the cluster to work")
        async with RedisBackend(node.url) as backend:
            assert await backend.publish("t", MESSAGE)
        with pytest.raises((BackendError, UnsupportedError)) as refused:
            async with RedisBackend(f"{node.url}/1"):
                pass
        assert not isinstance(refused.value, BackendError) or not refused.value.can_pass


async def test_without_the_right_to_info_the_server_is_taken_as_it_is() -> None:
    async with fake_server(lambda _: bulk(b"1-1")) as fake:
        announcing(b"-NOPERM no\r\n")(fake)
        async with RedisBackend(fake.url) as backend:
            assert await backend.publish("t", MESSAGE) == "1-1"


async def test_a_server_that_becomes_unsupported_fails_its_callers_and_not_the_backend() -> None:
    async with fake_server(lambda _: None) as fake:
        async with RedisBackend(fake.url) as backend:
            announcing(bulk(b"redis_version:8.2.0\r\nredis_mode:cluster"))(fake)
            with suppress(BackendError):
                await backend.publish("t", MESSAGE)  # breaks the connection
            for _ in range(2):
                with anyio.fail_after(SOON), pytest.raises(BackendError, match="cluster") as caught:
                    await backend.publish("t", MESSAGE)
                assert not caught.value.can_pass


# --- settings


def given_credentials(settings: Settings) -> object:
    provider: Any = settings.credentials
    return provider.get_credentials()


def test_a_url_names_host_port_database_user_and_password() -> None:
    settings = from_url("redis://us%40er:p%2Fss@example.org:6380/3?client_name=shop")
    assert (settings.host, settings.port, settings.db, settings.client_name) == ("example.org", 6380, 3, "shop")
    assert isinstance(settings.credentials, UsernamePasswordCredentialProvider)
    assert given_credentials(settings) == ("us@er", "p/ss")
    assert settings.tls is None
    assert settings.place == "example.org:6380"


@pytest.mark.parametrize("url", ["redis://", "redis://localhost", "redis://localhost/", "redis://:6379/0"])
def test_what_a_url_leaves_out_has_the_usual_value(url: str) -> None:
    settings = from_url(url)
    assert (settings.host, settings.port, settings.db, settings.path) == ("localhost", 6379, 0, None)
    assert settings.credentials is None


def test_a_unix_url_names_a_path() -> None:
    settings = from_url("unix:///run/redis.sock?db=2")
    assert (settings.path, settings.db, settings.place) == ("/run/redis.sock", 2, "/run/redis.sock")


def test_a_rediss_url_is_verified_unless_it_says_otherwise() -> None:
    context = from_url("rediss://example.org").tls
    assert context is not None
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)
    context = from_url("rediss://example.org?ssl_check_hostname=false").tls
    assert context is not None
    assert (context.check_hostname, context.verify_mode) == (False, ssl.CERT_REQUIRED)
    context = from_url("rediss://example.org?ssl_cert_reqs=none").tls
    assert context is not None
    assert (context.check_hostname, context.verify_mode) == (False, ssl.CERT_NONE)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{SECRET}/x@host",
        f"redis://:6379/{SECRET}@host",
        f"redis://user:{SECRET}#x@host:6379/0",
        f"redis://user:x?{SECRET}@host:6379/0",
        f"redis://user:{SECRET}@host/zero",
        f"redis://user:{SECRET}@host/1/2",
        f"redis://user:{SECRET}@host?db=zero",
        f"redis://user:{SECRET}@host?nonsense=1",
        f"redis://user:{SECRET}@host?nonsense=",
        f"redis://user:{SECRET}@host?socket_timeout=5",
        f"redis://user:{SECRET}@host?credential_provider=x",
        f"redis://user:{SECRET}@host?host=other",
        f"redis://user:{SECRET}@host?ssl_cert_reqs=none",
        f"rediss://user:{SECRET}@host?ssl_cert_reqs=perhaps",
        f"rediss://user:{SECRET}@host?ssl_ca_certs=/no/such/file",
        f"rediss://user:{SECRET}@host?ssl_min_version=17",
        f"unix://user:{SECRET}@",
        f"unix://{SECRET}/redis.sock",
        f"http://user:{SECRET}@host",
    ],
)
def test_a_url_that_asks_for_what_is_not_there_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RedisBackend(url)
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("name", ["connect_timeout", "command_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), "5", None])
def test_timeouts_are_checked_at_the_door(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        RedisBackend("redis://localhost", **{name: value})


async def test_no_password_is_in_any_error_or_repr(server: RunningServer) -> None:
    settings = from_url(f"redis://user:{SECRET}@127.0.0.1:{server.port}")
    backend = RedisBackend(f"redis://user:{SECRET}@127.0.0.1:{server.port}")
    with pytest.raises(BackendError) as caught:
        async with backend:
            pass
    assert not caught.value.can_pass
    assert "WRONGPASS" in str(caught.value)
    with pytest.raises(BackendError) as broken:
        async with RedisBackend(f"redis://user:{SECRET}@127.0.0.1:{free_port()}"):
            pass
    for shown in (settings, backend, caught.value, broken.value, connect(f"redis://user:{SECRET}@127.0.0.1:1")):
        assert SECRET not in repr(shown)
        assert SECRET not in str(shown)


def test_settings_come_from_a_client_that_is_configured_already() -> None:
    more: dict[str, Any] = {"db": 4, "username": "u", "password": "p", "client_name": "shop"}
    for client in (
        redis.Redis("example.org", 6380, **more),
        redis.asyncio.Redis(host="example.org", port=6380, **more),
    ):
        settings = from_client(client)
        assert (settings.host, settings.port, settings.db) == ("example.org", 6380, 4)
        assert settings.client_name == "shop"
        assert given_credentials(settings) == ("u", "p")
        assert settings.tls is None
    assert from_client(redis.Redis(unix_socket_path="/run/redis.sock")).path == "/run/redis.sock"


def test_a_clients_tls_settings_are_taken_over() -> None:
    for kind in (redis.Redis, redis.asyncio.Redis):
        tls = from_client(kind(host="example.org", ssl=True, ssl_check_hostname=True)).tls
        assert tls is not None
        assert (tls.check_hostname, tls.verify_mode) == (True, ssl.CERT_REQUIRED)
        tls = from_client(kind(ssl=True, ssl_cert_reqs="none", ssl_min_version=ssl.TLSVersion.TLSv1_3)).tls
        assert tls is not None
        assert tls.verify_mode == ssl.CERT_NONE
        assert tls.minimum_version == ssl.TLSVersion.TLSv1_3


def test_a_clients_credential_provider_is_asked_itself() -> None:
    class Provider(CredentialProvider):
        def get_credentials(self) -> tuple[str, str]:
            return "u", "p"

    provider = Provider()
    assert from_client(redis.Redis(credential_provider=provider)).credentials is provider


def test_what_is_no_redis_client_is_refused() -> None:
    for client in (None, "redis://localhost", object()):
        with pytest.raises(ValidationError, match="client"):
            RedisBackend.from_client_settings(client)
    with pytest.raises(UnsupportedError, match="OCSP"):
        RedisBackend.from_client_settings(redis.Redis(ssl=True, ssl_validate_ocsp=True))


@pytest.mark.parametrize("kind", [redis.Redis, redis.asyncio.Redis])
async def test_a_clients_socket_timeout_does_not_end_a_blocking_read(
    kind: Any, server: RunningServer, topic: str
) -> None:
    client = kind(port=server.port, socket_timeout=0.02)
    async with RedisBackend.from_client_settings(client) as backend:
        await backend.create_group(topic, "g")
        assert await backend.read_new(topic, "g", "c", count=1, timeout=0.3) == []


# --- who we are on the server


@asynccontextmanager
async def user(admin: Any, *rules: str) -> AsyncGenerator[str, None]:
    """A user of that name, its password SECRET."""
    name = new_topic().replace(".", "-")
    await to_thread.run_sync(admin.execute_command, "ACL", "SETUSER", name, "on", f">{SECRET}", "~*", "&*", *rules)
    try:
        yield name
    finally:
        await to_thread.run_sync(admin.execute_command, "ACL", "DELUSER", name)


async def test_user_password_database_and_client_name_hold_on_every_connection(
    server: RunningServer, admin: Any, topic: str
) -> None:
    async with user(admin, "+@all") as name:
        url = f"redis://{name}:{SECRET}@127.0.0.1:{server.port}/5?client_name=shop-{name}"
        async with RedisBackend(url) as backend:
            await backend.create_group(topic, "g")
            clients: list[dict[str, str]] = []
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: backend.read_new(topic, "g", "c", count=1, timeout=3600))
                await anyio.wait_all_tasks_blocked()
                with anyio.fail_after(SOON):
                    while len(clients) < 2:
                        found: list[dict[str, str]] = await to_thread.run_sync(admin.client_list)
                        clients = [client for client in found if client.get("name") == f"shop-{name}"]
                tasks.cancel_scope.cancel()
    assert [(client["user"], client["db"]) for client in clients] == [(name, "5")] * 2


async def test_a_password_without_a_user_is_the_default_users(own_server: RunningServer) -> None:
    admin: Any = own_server.client()
    with admin:
        await to_thread.run_sync(admin.config_set, "requirepass", SECRET)
        with pytest.raises(BackendError, match="NOAUTH") as caught:
            async with RedisBackend(own_server.url):
                pass
        assert not caught.value.can_pass
        async with RedisBackend(f"redis://:{SECRET}@127.0.0.1:{own_server.port}") as backend:
            assert await backend.count_entries("t") == 0


async def test_credentials_are_asked_for_on_every_connection(server: RunningServer, admin: Any) -> None:
    asked = 0

    async with user(admin, "+@all") as name:

        class Provider(CredentialProvider):
            def get_credentials(self) -> tuple[str, str]:
                nonlocal asked
                asked += 1
                if asked == 2:
                    raise RuntimeError("the vault is closed")
                return name, SECRET

        client = redis.Redis(port=server.port, credential_provider=Provider())
        async with RedisBackend.from_client_settings(client) as backend:
            await backend.count_entries("t")  # from here on the first connection serves, and can be given up
            backend._client.mux.reset()
            with anyio.fail_after(SOON):
                while asked < 3:
                    with suppress(BackendError):
                        await backend.count_entries("t")


async def test_without_the_right_to_unblock_cancelled_reads_lose_nothing_all_the_same(
    server: RunningServer, admin: Any, topic: str
) -> None:
    # 6.2 knows no removal of a subcommand alone.
    async with user(admin, "+@all", "-client", "+client|id", "+client|setname") as name:
        async with RedisBackend(f"redis://{name}:{SECRET}@127.0.0.1:{server.port}") as backend:
            assert not backend._client.server.can_unblock
            await backend.create_group(topic, "g")
            for number in range(3):
                with anyio.fail_after(SOON):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(lambda: backend.read_new(topic, "g", "c", count=1, timeout=3600))
                        await anyio.wait_all_tasks_blocked()
                        tasks.cancel_scope.cancel()
                await backend.publish(topic, Message(topic, str(number).encode()))
                (entry,) = await backend.read_new(topic, "g", "c", count=10, timeout=SOON)
                assert isinstance(entry, ClaimedMessage)
                assert entry.message.payload == str(number).encode()


async def test_a_unix_socket_serves_as_well(topic: str) -> None:
    def start(path: str) -> RunningServer:
        server = RunningServer(SERVER, "--unixsocket", path)
        server.start()
        return server

    with tempfile.TemporaryDirectory() as folder:
        server = await to_thread.run_sync(start, f"{folder}/s")
        try:
            async with connect(f"unix://{folder}/s?db=1") as bus:
                assert await bus.publish(Message(topic))
            async with RedisBackend.from_client_settings(redis.Redis(unix_socket_path=f"{folder}/s")) as backend:
                assert await backend.count_entries(topic) == 0, "another database"
        finally:
            await to_thread.run_sync(server.stop)


# --- TLS


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two self-signed certificates: of localhost, and of a name that is not ours."""
    folder = tmp_path_factory.mktemp("certificates")
    for name, names in (("localhost", ("localhost", "127.0.0.1")), ("elsewhere", ("elsewhere.example",))):
        authority = trustme.CA()
        issued = authority.issue_cert(*names)
        authority.cert_pem.write_to_path(str(folder / f"{name}-ca.pem"))
        issued.private_key_and_cert_chain_pem.write_to_path(str(folder / f"{name}.pem"))
    return folder


@asynccontextmanager
async def tls_in_front_of(server: RunningServer, certificates: Path, name: str) -> AsyncGenerator[int, None]:
    """The server, seen through TLS: not all of them were built with it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / f"{name}.pem")

    async def pump(source: ByteStream, sink: ByteStream) -> None:
        with suppress(*GONE):
            while True:
                await sink.send(await source.receive())

    async def pass_on(stream: ByteStream) -> None:
        with suppress(*GONE):
            outside = await TLSStream.wrap(stream, server_side=True, ssl_context=context, standard_compatible=False)
            async with await anyio.connect_tcp("127.0.0.1", server.port) as inside:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(pump, inside, outside)
                    await pump(outside, inside)
                    tasks.cancel_scope.cancel()
        await anyio.aclose_forcefully(stream)

    async with listening(pass_on) as port:
        yield port


async def test_tls_carries_everything(server: RunningServer, certificates: Path, topic: str) -> None:
    async with tls_in_front_of(server, certificates, "localhost") as port:
        more: dict[str, Any] = {"port": port, "ssl": True, "ssl_ca_certs": str(certificates / "localhost-ca.pem")}
        for backend in (
            RedisBackend(f"rediss://localhost:{port}?ssl_ca_certs={certificates / 'localhost-ca.pem'}"),
            RedisBackend(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificates / 'localhost-ca.pem'}"),
            RedisBackend.from_client_settings(redis.Redis(**more)),
            RedisBackend.from_client_settings(redis.asyncio.Redis(**more)),
        ):
            async with backend:
                await backend.create_group(topic, "g")
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(partial(backend.read_new, topic, "g", "c", count=1, timeout=3600))
                    await anyio.wait_all_tasks_blocked()
                    tasks.cancel_scope.cancel()
                await backend.publish(topic, Message(topic, b"x" * 300_000))
                (entry,) = await backend.read_new(topic, "g", "c", count=1, timeout=SOON)
                assert isinstance(entry, ClaimedMessage)
                assert len(entry.message.payload) == 300_000


@pytest.mark.parametrize(
    ("name", "options", "accepted"),
    [
        ("localhost", "", False),
        ("localhost", "?ssl_ca_certs={folder}/elsewhere-ca.pem", False),
        ("elsewhere", "?ssl_ca_certs={folder}/elsewhere-ca.pem", False),
        ("elsewhere", "?ssl_ca_certs={folder}/elsewhere-ca.pem&ssl_check_hostname=false", True),
        ("elsewhere", "?ssl_cert_reqs=none", True),
    ],
    ids=["nobody vouches", "another one vouches", "another name", "another name, not checked", "not verified"],
)
async def test_a_certificate_is_refused_unless_it_is_verified_or_that_is_switched_off(
    name: str, options: str, accepted: bool, server: RunningServer, certificates: Path
) -> None:
    async with tls_in_front_of(server, certificates, name) as port:
        backend = RedisBackend(f"rediss://localhost:{port}{options.format(folder=certificates)}")
        if accepted:
            async with backend:
                assert await backend.count_entries("t") == 0
            return
        with anyio.fail_after(SOON), pytest.raises(BackendError, match=r"(?i)certificate") as caught:
            async with backend:
                pass
        assert not caught.value.may_have_happened


async def test_a_server_without_tls_is_a_clear_error_for_who_wants_it(server: RunningServer) -> None:
    with anyio.fail_after(SOON), pytest.raises(BackendError):
        async with RedisBackend(f"rediss://127.0.0.1:{server.port}", connect_timeout=PATIENCE):
            pass
