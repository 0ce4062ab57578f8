"""One message that is too large for the server fails alone.

A server closes the connection of whoever sends it more than ``proto-max-bulk-len`` or ``client-query-buffer-limit``.
The limit is asked for when connecting, and what is larger is refused at the door. Where it cannot be asked for, what
may be too large goes by a connection of its own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import pytest
from anyio import to_thread
from conftest import SERVER
from fake_server import Command, fake_server
from harness import SOON, new_topic, quick, until
from servers import RunningServer

from anybus import (
    BackendError,
    Delivery,
    Message,
    Reject,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
    ValidationError,
)
from anybus.abc import ClaimedMessage, Output
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._appetite import Appetite
from anybus.backends.redis._limits import ROOM
from anybus.backends.redis._link import Link
from anybus.backends.redis._protocol import pack

LIMITS = ["proto-max-bulk-len", "client-query-buffer-limit"]
MEGABYTE = 1024 * 1024
LARGE = b"x" * 2_000_000
PATIENT = StreamBusOptions(publish_timeout=2 * SOON)


@pytest.fixture(scope="module", params=LIMITS)
def strict_server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """A server that takes 1 MiB, and has a user who may not ask for that."""
    with RunningServer(SERVER, f"--{request.param}", "1mb") as running:
        with running.client() as client:
            client.execute_command("ACL", "SETUSER", "unaware", "on", ">secret", "~*", "+@all", "-config")
        yield running


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["strict_server"])


def unaware_of(server: RunningServer) -> str:
    return f"redis://unaware:secret@127.0.0.1:{server.port}"


def payloads(server: RunningServer, topic: str) -> list[int]:
    with server.client() as client:
        entries: Any = client.xrange(topic)
    return [len(fields[b"message"]) for _, fields in entries]


@asynccontextmanager
async def entered(url: str) -> AsyncGenerator[tuple[StreamBus, RedisBackend], None]:
    backend = RedisBackend(url)
    with anyio.fail_after(3 * SOON):
        async with StreamBus(backend, PATIENT) as bus:
            yield bus, backend


async def test_what_the_server_would_not_take_is_refused_at_the_door(
    strict_server: RunningServer, setting: str
) -> None:
    topic = new_topic()
    async with entered(strict_server.url) as (bus, backend):
        limit = backend._client.limit
        assert limit is not None
        with pytest.raises(ValidationError) as caught:
            await bus.publish(Message(topic, LARGE))
        assert setting in str(caught.value)
        assert str(limit.size - ROOM) in str(caught.value)
        assert str(len(backend._codec.encode(Message(topic, LARGE)))) in str(caught.value)
        outcome = await bus.publish_batch([Message(topic), Message(topic, LARGE), Message(topic)])
        assert [isinstance(result, ValidationError) for result in outcome.results] == [False, True, False]
        with pytest.raises(ValidationError):
            await backend.publish_later(topic, Message(topic, LARGE), delay=1)
        assert backend._client.mux.connections == 1
    assert len(payloads(strict_server, topic)) == 2


@pytest.mark.parametrize("aware", ["aware", "unaware"])
async def test_180_small_publishes_beside_a_large_one_succeed(strict_server: RunningServer, aware: str) -> None:
    topic = new_topic()
    large_failed: list[Exception] = []
    async with entered(strict_server.url if aware == "aware" else unaware_of(strict_server)) as (bus, backend):

        async def publish_large() -> None:
            try:
                await bus.publish(Message(topic, LARGE))
            except (BackendError, ValidationError) as error:
                large_failed.append(error)

        async with anyio.create_task_group() as tasks:
            for number in range(180):
                if number == 90:
                    tasks.start_soon(publish_large)
                tasks.start_soon(bus.publish, Message(topic))
        assert backend._client.mux.connections == 1
    assert len(large_failed) == 1
    assert len(await to_thread.run_sync(payloads, strict_server, topic)) == 180


async def test_the_largest_message_that_is_taken_can_be_retried_and_dead_lettered(strict_server: RunningServer) -> None:
    topic = new_topic()
    async with entered(strict_server.url) as (bus, backend):
        assert backend._client.limit is not None
        most = backend._client.limit.size - ROOM
        rest = len(backend._codec.encode(Message(topic)))
        payload = b"x" * (3 * ((most - rest) // 4))
        with pytest.raises(ValidationError):
            await bus.publish(Message(topic, payload + b"xxx"))

        async def handler(delivery: Delivery) -> None:
            if delivery.state.attempt == 1:
                raise ValueError("once more " + "and more " * 200)
            raise Reject("no " * 2000)

        options = quick(publish_timeout=2 * SOON, claim_idle_timeout=60)
        async with StreamBus(RedisBackend(strict_server.url), options) as other:
            async with other.subscribe(SubscriptionConfig(topic, "g", retry_backoff=[0.01]), handler):
                await bus.publish(Message(topic, payload))
                await until(lambda: len(payloads(strict_server, f"{topic}.dead")) == 1)
        assert backend._client.mux.connections == 1


async def test_without_knowing_the_limit_a_batch_keeps_its_order_and_loses_only_what_is_too_large(
    strict_server: RunningServer,
) -> None:
    topic = new_topic()
    async with entered(unaware_of(strict_server)) as (bus, backend):
        messages = [Message(topic, b"x" * size) for size in (1, 20, 300, len(LARGE), 4000, 50000)]
        outcome = await bus.publish_batch(messages)
        assert [isinstance(result, BackendError) for result in outcome.results] == [False] * 3 + [True] + [False] * 2
        assert backend._client.mux.connections == 1
    sizes = await to_thread.run_sync(payloads, strict_server, topic)
    assert sizes == sorted(sizes)
    assert len(sizes) == 5


async def test_without_knowing_the_limit_a_transfer_that_is_too_large_fails_alone(strict_server: RunningServer) -> None:
    topic = new_topic()
    async with entered(unaware_of(strict_server)) as (_, backend):
        await backend.create_group(topic, "g")
        ids = [await backend.publish(topic, Message(topic)) for _ in range(3)]
        await backend.read_new(topic, "g", "c", count=3, timeout=0)
        items = [
            (ids[0], [Output(f"{topic}.out", Message(topic))]),
            (ids[1], [Output(f"{topic}.out", Message(topic, LARGE))]),
            (ids[2], [Output(f"{topic}.out", Message(topic))]),
        ]
        results = await backend.transfer_many(topic, "g", "c", items)
        assert [isinstance(result, BackendError) for result in results] == [False, True, False]
        assert [entry.id for entry in await backend.pending_entries(topic, "g")] == [ids[1]]
        with pytest.raises(BackendError):
            await backend.publish_later(topic, Message(topic, LARGE), delay=1)
        assert backend._client.mux.connections == 1


@pytest.fixture
def unaware_url(server: RunningServer) -> str:
    """A server that takes much, and a user who does not know."""
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "unaware", "on", ">secret", "~*", "+@all", "-config")
    return unaware_of(server)


async def test_without_knowing_the_limit_what_is_large_and_not_too_large_goes_through(unaware_url: str) -> None:
    topic = new_topic()
    async with entered(unaware_url) as (bus, backend):
        assert backend._client.limit is None
        await backend.create_group(topic, "g")
        first = await bus.publish(Message(topic, LARGE))
        (await bus.publish_batch([Message(topic), Message(topic, LARGE + b"2")])).raise_for_errors()
        entries = await backend.read_new(topic, "g", "c", count=3, timeout=0)
        assert [len(entry.message.payload) for entry in entries if isinstance(entry, ClaimedMessage)] == [
            len(LARGE),
            0,
            len(LARGE) + 1,
        ]
        output = Output(f"{topic}.out", Message(topic, LARGE))
        assert await backend.transfer(topic, "g", "c", first, [output]) is not None
        assert await backend.transfer(topic, "g", "c", first, [output]) is None, "no longer ours"
        assert await backend.cancel_later(topic, await backend.publish_later(topic, Message(topic, LARGE), delay=60))
        assert backend._client.mux.connections == 1


async def test_a_large_message_that_nobody_answers_ends_at_its_deadline_and_may_have_happened() -> None:
    def silent(command: Command) -> bytes:
        return b""

    async with fake_server(silent) as server:
        async with StreamBus(RedisBackend(server.url), StreamBusOptions(publish_timeout=1.0)) as bus:
            with anyio.fail_after(SOON), pytest.raises(BackendError, match="publish_timeout") as caught:
                await bus.publish(Message("t", LARGE))
            assert caught.value.may_have_happened


@pytest.mark.parametrize("whole", [True, False])
async def test_a_large_message_that_left_before_it_was_noticed_may_have_happened(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while a transport that has taken everything has not said so yet."""
    send, link, left = Link.send, None, 0

    async def send_and_hang(self: Link, data: bytes, *, silence: float | None = None) -> None:
        nonlocal link, left
        await send(self, data, silence=silence)
        if len(data) > MEGABYTE:
            link = self
        left += len(data) if self is link else 0
        if self is link and (not whole or left == size):
            await anyio.sleep_forever()

    async with fake_server(lambda _: b"") as server:
        async with StreamBus(RedisBackend(server.url), StreamBusOptions(publish_timeout=0.5)) as bus:
            backend = bus.backend
            assert isinstance(backend, RedisBackend)
            message = Message("t", LARGE)
            size = len(pack([("XADD", "t", "*", "message", backend._node._encode(message))]))
            monkeypatch.setattr(Link, "send", send_and_hang)
            with pytest.raises(BackendError) as caught:
                await bus.publish(message)
            arrived = any(command[0] == b"XADD" for command in server.commands)
            assert arrived or not whole
            assert caught.value.may_have_happened == arrived


async def test_a_large_message_for_a_server_that_says_nothing_any_more_is_given_up() -> None:
    def silent(command: Command) -> bytes:
        return b""

    async with fake_server(silent) as server, RedisBackend(server.url, command_timeout=0.3) as backend:
        with anyio.fail_after(SOON), pytest.raises(BackendError) as caught:
            await backend.publish("t", Message("t", LARGE))
        assert caught.value.may_have_happened
        assert caught.value.can_pass


@pytest.mark.parametrize(
    "answer", [b"*0\r\n", b"*2\r\n+proto-max-bulk-len\r\n+much\r\n", b":5\r\n", b"-ERR unknown command\r\n"]
)
async def test_whatever_the_server_says_when_it_is_asked_for_its_limit_it_can_be_used(answer: bytes) -> None:
    async with fake_server(lambda _: b"$3\r\n1-1\r\n") as server:
        greet = server.greet
        server.greet = lambda command: answer if command[0] == b"CONFIG" else greet(command)
        async with RedisBackend(server.url) as backend:
            assert backend._client.limit is None
            assert await backend.publish("t", Message("t")) == "1-1"


@contextmanager
def small_replies(limit: str) -> Generator[RunningServer, None, None]:
    with RunningServer(SERVER) as running:
        with running.client() as client:
            client.config_set("client-output-buffer-limit", f"normal {limit} 0 0")
        yield running


async def test_what_could_never_be_read_again_is_refused_at_the_door() -> None:
    topic = new_topic()
    with small_replies("2mb") as running:
        async with entered(running.url) as (bus, backend):
            await bus.publish(Message(topic, b"x" * MEGABYTE))
            with pytest.raises(ValidationError, match="client-output-buffer-limit"):
                await bus.publish(Message(topic, LARGE))
            assert backend._client.mux.connections == 1


@pytest.mark.parametrize("mode", ["subscribe", "blocking reads"])
async def test_entries_that_are_too_large_together_are_read_a_few_at_a_time(mode: str) -> None:
    topic = new_topic()
    payload = b"x" * 600_000
    handled: list[int | None] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.state.deliveries)

    with small_replies("3mb") as running:
        async with entered(running.url) as (bus, backend):
            await backend.create_group(topic, "g", "0")
            for _ in range(24):
                await bus.publish(Message(topic, payload))
            if mode == "subscribe":
                options = quick(publish_timeout=2 * SOON, claim_idle_timeout=60)
                async with StreamBus(RedisBackend(running.url), options) as other:
                    async with other.subscribe(SubscriptionConfig(topic, "g", max_in_flight=24), handler):
                        await until(lambda: len(handled) == 24)
                assert handled == [1] * 24
            else:
                ids: set[str] = set()
                with anyio.fail_after(SOON):
                    while len(ids) < 24:
                        try:
                            ids |= {entry.id for entry in await backend.read_new(topic, "g", "c", count=24, timeout=5)}
                        except BackendError as error:
                            assert error.can_pass


async def test_what_is_taken_over_a_few_at_a_time_is_not_taken_over_slowly(server: RunningServer) -> None:
    topic = new_topic()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.id)

    backend = RedisBackend(server.url)
    options = quick(claim_idle_timeout=60, reclaim_interval=60)
    with anyio.fail_after(2 * SOON):
        async with StreamBus(backend, options) as bus:
            await backend.create_group(topic, "g")
            for _ in range(12):
                await bus.publish(Message(topic, b"x" * 300_000))
            taken = await backend.read_new(topic, "g", "dead", count=12, timeout=0)
            await backend.release(topic, "g", "dead", [entry.id for entry in taken])
            for connection in range(9):  # as if as many replies had been too large for the server
                backend._taking._calls.appetite.broke(connection)
            backend._taking._calls.appetite.of(12)
            backend._taking._calls.appetite.broke("and again")
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
                await until(lambda: len(handled) == 12)


def entries_of(size: int, count: int) -> list[ClaimedMessage]:
    return [ClaimedMessage(f"{number}-0", Message("t", b"x" * size)) for number in range(count)]


def test_one_break_changes_nothing_and_every_further_one_halves_what_is_asked_for() -> None:
    appetite = Appetite()
    asked = []
    for connection in range(8):
        asked.append(appetite.of(64))
        appetite.broke(connection)
        appetite.broke(connection)  # a pass and a read that broke together
    assert asked == [64, 64, 32, 16, 8, 4, 2, 1]
    appetite.broke("another")
    assert appetite.of(64) == 1


def test_more_is_asked_for_again_as_far_as_such_replies_have_come_through() -> None:
    appetite = Appetite()
    for connection in range(5):
        appetite.of(64)
        appetite.broke(connection)
    assert appetite.of(64) == 4
    for _ in range(10):
        appetite.came(entries_of(600_000, 4))
        assert appetite.of(64) == 4, "eight have never come through"
    for more in (8, 16, 32, 64):
        appetite.came(entries_of(100, 4))
        assert appetite.of(64) == more
    appetite.broke("by chance")
    assert appetite.of(64) == 64
