"""What the bus makes of the sentinels' answers. The sentinels are played; the server behind is a real one.

Specification:

- The sentinels are asked in order, the next one also if one is silent. The one that led to the primary is asked first
  the next time, and one that led nowhere last. Many connections that are opened at once share one answer.
- Before anything is written on a connection, its server has said that it is a primary.
- When a sentinel names another primary in a newer configuration, every connection to the old one is closed at once,
  also one on which a read waits. Nothing is sent to the old one any more.
- A sentinel with an older configuration is not believed, unless a majority has one: then they were set up anew. Two
  names of one server, in the same configuration, do not matter.
- Each failure is told in words: which sentinels were asked, and why each of them did not help. When the bus is entered,
  what cannot pass by itself is permanent.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme
from anyio.streams.tls import TLSStream
from fake_server import Command, FakeServer, bulk, fake_server, greeting, listening
from harness import SOON, until
from proxy import Answer, Hold, Proxy, proxied
from servers import RunningServer, free_port

from anybus import BackendError, Message
from anybus.backends.redis import RedisBackend
from anybus.backends.redis import _multiplexer as multiplexer_module
from anybus.backends.redis import _sentinel as sentinel_module
from anybus.backends.redis._sentinel import SentinelLocator

QUESTION = b"GET-MASTER-ADDR-BY-NAME"


def array(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join(parts)


class PlayedSentinel:
    """Answers as it is told to.

    :ivar primary: the port that it names.
    :ivar services: what it knows.
    """

    def __init__(self, primary: int = 0, *, epoch: int = 1) -> None:
        self.primary = primary
        self.host = "127.0.0.1"
        self.epoch = epoch
        self.services = ["shop"]
        self.tells_epoch = True
        self.is_silent = False
        self.refusal: bytes | None = None
        self.server = FakeServer(self.answer)
        self.server.greet = self.greet

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def questions(self) -> int:
        return sum(command[1:2] == [QUESTION] for command in self.server.commands)

    @property
    def times_opened(self) -> int:
        return self.server.connections

    def fails_over_to(self, port: int) -> None:
        self.primary = port
        self.epoch += 1

    def greet(self, command: Command) -> bytes | None:
        return self.refusal or greeting(command)

    def answer(self, command: Command) -> bytes | None:
        if self.is_silent:
            return b""
        if command[0] == b"ECHO":  # it has refused something before
            return bulk(command[1])
        assert command[0] == b"SENTINEL"
        if command[1] == b"MASTERS":
            return array(*(array(bulk(b"name"), bulk(name.encode())) for name in self.services))
        known = command[2].decode() in self.services
        if command[1] == QUESTION:
            return array(bulk(self.host.encode()), bulk(b"%d" % self.primary)) if known else b"*-1\r\n"
        if not known:
            return b"-ERR No such master with that name\r\n"
        if not self.tells_epoch:
            return b"-NOPERM this user has no permissions to run the 'sentinel|master' command\r\n"
        return array(bulk(b"name"), bulk(command[2]), bulk(b"config-epoch"), bulk(b"%d" % self.epoch))


@asynccontextmanager
async def playing(*sentinels: PlayedSentinel) -> AsyncGenerator[str, None]:
    """A URL of these sentinels."""
    async with AsyncExitStack() as stack:
        for sentinel in sentinels:
            sentinel.server.port = await stack.enter_async_context(listening(sentinel.server.talk))
        yield f"redis+sentinel://{','.join(f'127.0.0.1:{sentinel.port}' for sentinel in sentinels)}/shop"


def locator_of(backend: RedisBackend) -> SentinelLocator:
    locator = backend._client.settings.locator
    assert isinstance(locator, SentinelLocator)
    return locator


async def lose_connection(proxy: Proxy, backend: RedisBackend) -> None:
    await proxy.cut_all()
    await until(lambda: not backend._client.mux.is_connected, "the connection to break")


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentinels are asked only when a connection is opened."""

    async def watch(_: SentinelLocator) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(SentinelLocator, "watch", watch)


@pytest.fixture(autouse=True)
def watched_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentinel_module, "_EVERY", 0.02)


# --- whom to ask


@pytest.mark.usefixtures("unwatched")
async def test_the_first_sentinel_that_answers_is_asked_first_the_next_time(server: RunningServer) -> None:
    one, two = PlayedSentinel(server.port), PlayedSentinel(server.port)
    async with playing(one, two) as url:
        one.refusal = b"-LOADING Redis is loading the dataset in memory\r\n"
        backend = RedisBackend(url)
        async with backend:
            one.refusal = None
            asked = one.times_opened
            await (await locator_of(backend).open(entering=False)).aclose()
            assert one.times_opened == asked
            assert (one.questions, two.questions) == (0, 2)


@pytest.mark.usefixtures("unwatched")
async def test_a_dead_and_a_silent_sentinel_delay_nothing_for_long(server: RunningServer) -> None:
    silent, good = PlayedSentinel(), PlayedSentinel(server.port)
    silent.is_silent = True
    async with playing(silent, good) as url:
        with_dead = url.replace("//", f"//127.0.0.1:{free_port()},")
        backend = RedisBackend(with_dead, connect_timeout=10 * SOON)
        with anyio.fail_after(SOON):
            async with backend:
                assert (silent.questions, good.questions) == (1, 1)


@pytest.mark.usefixtures("unwatched")
async def test_connections_that_are_opened_at_once_share_one_answer(server: RunningServer) -> None:
    sentinel = PlayedSentinel(server.port)
    async with playing(sentinel) as url:
        async with RedisBackend(url) as backend:
            assert sentinel.questions == 1
            locator = locator_of(backend)
            links: list[Any] = []

            async def connect() -> None:
                links.append(await locator.open(entering=False))

            async with anyio.create_task_group() as tasks:
                for _ in range(50):
                    tasks.start_soon(connect)
            assert len(links) == 50
            assert sentinel.questions == 2
            for link in links:
                await link.aclose()


@pytest.mark.usefixtures("unwatched")
async def test_who_waits_for_a_question_that_is_cancelled_asks_by_itself(server: RunningServer) -> None:
    sentinel = PlayedSentinel(server.port)
    async with playing(sentinel) as url:
        async with RedisBackend(url) as backend:
            locator = locator_of(backend)
            sentinel.is_silent = True
            links: list[Any] = []

            async def connect() -> None:
                links.append(await locator.open(entering=False))

            async with anyio.create_task_group() as tasks, anyio.create_task_group() as cancelled:
                cancelled.start_soon(connect)
                await until(lambda: sentinel.questions == 2, "it to ask")
                tasks.start_soon(connect)
                await anyio.wait_all_tasks_blocked()
                sentinel.is_silent = False
                cancelled.cancel_scope.cancel()
            assert len(links) == 1
            await links[0].aclose()


# --- who the server is


def saying(role: bytes | None, hello: bytes | None) -> Any:
    """A rule for a proxy: what the server says about its role; None = the user lacks the right."""
    denied = b"-NOPERM this user has no permissions to run the command\r\n"

    def rule(command: Command) -> Answer | None:
        if command[0] == b"ROLE":
            return Answer(denied if role is None else array(bulk(role), b":0\r\n"))
        if command[0] == b"HELLO":
            return Answer(denied if hello is None else array(bulk(b"proto"), b":2\r\n", bulk(b"role"), bulk(hello)))
        return None

    return rule


READ_ONLY = {"CLIENT", "ROLE", "HELLO", "ECHO"}


@pytest.mark.parametrize(("role", "hello"), [(b"slave", b"replica"), (b"slave", None), (None, b"replica")])
async def test_nothing_is_written_to_a_server_that_says_that_it_is_no_primary(
    server: RunningServer, topic: str, role: bytes | None, hello: bytes | None
) -> None:
    async with proxied(server.port) as proxy:
        proxy.rule = saying(role, hello)
        async with playing(PlayedSentinel(proxy.port)) as url:
            with pytest.raises(BackendError, match="although a sentinel named it as the primary") as caught:
                async with RedisBackend(url):
                    pass
            assert (caught.value.can_pass, caught.value.may_have_happened) == (True, False)
            assert set(proxy.seen) <= READ_ONLY
            # And while it runs: a publish waits until the sentinels know better.
            proxy.rule = lambda command: None
            async with RedisBackend(url) as backend:
                proxy.rule = saying(role, hello)
                proxy.seen.clear()
                await lose_connection(proxy, backend)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(partial(backend.publish_within, topic, Message(topic), timeout=SOON))
                    await until(lambda: proxy.seen.count("ROLE") >= 3, "it to be asked again and again")
                    assert set(proxy.seen) <= READ_ONLY
                    proxy.rule = lambda command: None
                assert await backend.count_entries(topic) == 1


@pytest.mark.parametrize(("role", "hello"), [(b"master", None), (None, b"master"), (None, None)])
async def test_a_user_who_may_not_ask_for_the_role_is_let_in(
    server: RunningServer, topic: str, role: bytes | None, hello: bytes | None
) -> None:
    async with proxied(server.port) as proxy:
        proxy.rule = saying(role, hello)
        async with playing(PlayedSentinel(proxy.port)) as url, RedisBackend(url) as backend:
            assert await backend.publish(topic, Message(topic))


# --- another primary


@asynccontextmanager
async def two_addresses(server: RunningServer) -> AsyncGenerator[tuple[Proxy, Proxy], None]:
    """One server at two addresses: what is handled where shows in ``seen``, and nothing is lost between them."""
    async with proxied(server.port) as one, proxied(server.port) as other:
        yield one, other


async def test_every_connection_leaves_a_server_that_the_sentinels_have_replaced(
    server: RunningServer, topic: str
) -> None:
    async with two_addresses(server) as (old, new):
        sentinels = [PlayedSentinel(old.port) for _ in range(3)]
        async with playing(*sentinels) as url, RedisBackend(url) as backend:
            await backend.create_group(topic, "g")
            errors: list[BackendError] = []

            async def read() -> None:
                while True:
                    try:
                        await backend.read_new(topic, "g", "c", count=1, timeout=SOON)
                    except BackendError as error:
                        errors.append(error)

            async with anyio.create_task_group() as tasks:
                waits_at_old, waits_at_new = waiting_read(old), waiting_read(new)
                tasks.start_soon(read)
                await waits_at_old.wait()
                # A partition: the old one goes on answering, and says that it is a primary. One sentinel knows better.
                sentinels[2].fails_over_to(new.port)
                await waits_at_new.wait()
                so_far = len(old.seen)
                assert await backend.publish(topic, Message(topic))
                assert len(old.seen) == so_far
                assert "XADD" in new.seen
                tasks.cancel_scope.cancel()
            assert len(errors) == 1
            assert "the sentinels name another primary" in str(errors[0])
            assert errors[0].can_pass


def waiting_read(proxy: Proxy) -> anyio.Event:
    """An event that is set when a read has come that waits."""
    come = anyio.Event()

    def rule(command: Command) -> None:
        if b"BLOCK" in command:
            come.set()

    proxy.rule = rule
    return come


async def test_the_new_primary_is_connected_to_as_soon_as_it_is_known(
    server: RunningServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_addresses(server) as (old, new):
        sentinel = PlayedSentinel(old.port)
        async with playing(sentinel) as url, RedisBackend(url) as backend:
            refused = anyio.Event()

            def delay(*_: object) -> float:
                refused.set()
                return 10 * SOON

            monkeypatch.setattr(multiplexer_module, "recovery_delay", delay)
            old.rule = saying(b"slave", b"replica")
            await lose_connection(old, backend)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(backend.publish_within, topic, Message(topic), timeout=SOON))
                await refused.wait()
                sentinel.fails_over_to(new.port)
            assert new.seen.count("XADD") == 1


async def test_a_sentinel_with_an_older_configuration_is_not_believed(server: RunningServer, topic: str) -> None:
    async with two_addresses(server) as (old, new):
        stale, good = PlayedSentinel(old.port), PlayedSentinel(new.port, epoch=2)
        async with playing(stale, good) as url, RedisBackend(url) as backend:
            await until(lambda: min(stale.questions, good.questions) > 3, "both to be asked")
            assert await backend.publish(topic, Message(topic))
            opened = old.connections, backend._client.mux.connections
            asked = stale.questions
            await until(lambda: stale.questions > asked + 5, "the stale one to be asked again")
            # A new connection too goes to the new one, although the stale sentinel is the first of the URL.
            await (await locator_of(backend).open(entering=False)).aclose()
            assert await backend.publish(topic, Message(topic))
            assert (old.connections, backend._client.mux.connections) == opened
            assert new.seen.count("XADD") == 2


async def test_an_older_configuration_alone_does_not_lead_back_to_a_replaced_server(
    server: RunningServer, topic: str
) -> None:
    """The bus is cut off from all but the old primary and one sentinel that was cut off with it."""
    async with two_addresses(server) as (old, new):
        stale, good = PlayedSentinel(old.port), PlayedSentinel(new.port, epoch=2)
        async with playing(stale, good) as url, RedisBackend(url, connect_timeout=0.5) as backend:
            await until(lambda: min(stale.questions, good.questions) > 3, "both to be asked")
            await backend.publish(topic, Message(topic))
            good.is_silent = True
            opened = old.connections
            await lose_connection(new, backend)
            with pytest.raises(BackendError, match="its configuration is older than one that was known") as caught:
                await locator_of(backend).open(entering=False)
            assert caught.value.can_pass
            assert old.connections == opened
            good.is_silent = False
            await backend.publish(topic, Message(topic))
            assert new.seen.count("XADD") == 2


async def test_sentinels_that_were_set_up_anew_are_believed(server: RunningServer, topic: str) -> None:
    async with two_addresses(server) as (old, new):
        sentinel = PlayedSentinel(old.port, epoch=7)
        async with playing(sentinel) as url, RedisBackend(url) as backend:
            await backend.publish(topic, Message(topic))
            sentinel.primary, sentinel.epoch = new.port, 0
            await lose_connection(old, backend)
            await backend.publish(topic, Message(topic))
            assert new.seen.count("XADD") == 1


@pytest.mark.parametrize("tells_epoch", [True, False])
async def test_two_names_of_one_server_do_not_matter(server: RunningServer, topic: str, tells_epoch: bool) -> None:
    one, other = PlayedSentinel(server.port), PlayedSentinel(server.port)
    other.host = "localhost"
    one.tells_epoch = other.tells_epoch = tells_epoch
    async with playing(one, other) as url, RedisBackend(url) as backend:
        await until(lambda: min(one.questions, other.questions) > 5, "both to be asked")
        assert await backend.publish(topic, Message(topic))
        assert backend._client.mux.connections == 1


async def test_without_an_epoch_a_sentinel_that_changes_its_mind_is_believed(server: RunningServer, topic: str) -> None:
    async with two_addresses(server) as (old, new):
        sentinel = PlayedSentinel(old.port)
        sentinel.tells_epoch = False
        async with playing(sentinel) as url, RedisBackend(url) as backend:
            await backend.publish(topic, Message(topic))
            asked = sentinel.questions
            await until(lambda: sentinel.questions > asked, "it to be asked")
            sentinel.primary = new.port
            await until(lambda: not backend._client.mux.is_connected, "the old one to be left")
            await backend.publish(topic, Message(topic))
            assert new.seen.count("XADD") == 1


async def test_a_connection_that_is_opened_while_the_primary_changes_is_not_used(
    server: RunningServer, topic: str
) -> None:
    async with two_addresses(server) as (old, new):
        one, other = PlayedSentinel(old.port), PlayedSentinel(old.port)
        async with playing(one, other) as url, RedisBackend(url) as backend:
            await until(lambda: other.questions > 1, "both to be asked")

            held = Hold()
            old.at("ROLE", held)
            async with anyio.create_task_group() as tasks:

                async def fails() -> None:
                    with pytest.raises(BackendError, match="not the primary any more") as caught:
                        await locator_of(backend).open(entering=False)
                    assert caught.value.can_pass

                tasks.start_soon(fails)
                await held.held.wait()
                other.fails_over_to(new.port)
                await until(lambda: not backend._client.mux.is_connected, "the news to arrive")
                held.let_go.set()
            link = await locator_of(backend).open(entering=False)
            assert link.settings.port == new.port
            await link.aclose()


async def test_a_sentinel_that_is_gone_is_said_once_and_asked_again(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "anybus")
    one, other = PlayedSentinel(server.port), PlayedSentinel(server.port)
    async with playing(one, other) as url, RedisBackend(url):
        await until(lambda: other.questions > 2, "both to be asked")
        other.refusal = b"-ERR no\r\n"
        other.services = []
        opened = other.times_opened
        await until(lambda: other.times_opened > opened + 5, "it to be asked again")
        said = [record.getMessage() for record in caplog.records if "sentinel" in record.getMessage()]
        assert len(said) == 1
        assert str(other.port) in said[0]
        other.refusal, other.services = None, ["shop"]
        asked = other.questions
        await until(lambda: other.questions > asked + 20, "it to answer again")


# --- what goes wrong


async def entering_fails(url: str, connect_timeout: float = 5.0) -> BackendError:
    with anyio.fail_after(SOON), pytest.raises(BackendError) as caught:
        async with RedisBackend(url, connect_timeout=connect_timeout):
            pass
    assert not caught.value.may_have_happened
    return caught.value


async def test_an_unknown_service_says_who_was_asked_and_what_they_know() -> None:
    one, two, three = PlayedSentinel(), PlayedSentinel(), PlayedSentinel()
    one.services, two.services, three.services = ["toys", "books"], [], [f"s{number}" for number in range(8)]
    async with playing(one, two, three) as url:
        error = await entering_fails(url)
    assert str(error) == (
        f"no sentinel named a primary of service 'shop': 127.0.0.1:{one.port} knows only 'books', 'toys'; "
        f"127.0.0.1:{two.port} knows no service; "
        f"127.0.0.1:{three.port} knows only 's0', 's1', 's2', 's3', 's4' and 3 more"
    )
    assert not error.can_pass


async def test_a_service_that_is_unknown_for_a_moment_is_waited_for(server: RunningServer, topic: str) -> None:
    sentinel = PlayedSentinel(server.port)
    async with proxied(server.port) as proxy:
        sentinel.primary = proxy.port
        async with playing(sentinel) as url, RedisBackend(url) as backend:
            sentinel.services = []
            await lose_connection(proxy, backend)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(backend.publish_within, topic, Message(topic), timeout=SOON))
                await until(lambda: sentinel.questions > 5, "it to be asked again and again")
                sentinel.services = ["shop"]
            assert await backend.count_entries(topic) == 1


async def test_no_sentinel_that_answers_says_whom_it_asked_and_why_each_did_not_help() -> None:
    silent = PlayedSentinel()
    silent.is_silent = True
    dead = free_port()
    async with playing(silent) as url:
        error = await entering_fails(url.replace("//", f"//127.0.0.1:{dead},"), connect_timeout=0.3)
    assert f"127.0.0.1:{dead}: connection refused" in str(error)
    assert f"the connection to 127.0.0.1:{silent.port} broke: no answer for 0.3 s" in str(error)
    assert error.can_pass


async def test_an_ordinary_server_is_told_from_a_sentinel(server: RunningServer) -> None:
    error = await entering_fails(f"redis+sentinel://127.0.0.1:{server.port}/shop")
    assert f"127.0.0.1:{server.port} is not a sentinel" in str(error)
    assert "26379" in str(error)
    assert not error.can_pass


@pytest.mark.parametrize(
    "refusal",
    [b"-NOAUTH Authentication required.\r\n", b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"],
    ids=["none", "wrong ones"],
)
async def test_wrong_credentials_for_a_sentinel_say_where_they_belong(refusal: bytes) -> None:
    sentinel = PlayedSentinel()
    sentinel.refusal = refusal
    async with playing(sentinel) as url:
        error = await entering_fails(f"{url}?sentinel_password=hunter2")
    text = str(error)
    assert f"127.0.0.1:{sentinel.port}" in text
    assert refusal.decode().split()[0][1:] in text
    assert "sentinel_password" in text
    assert "hunter2" not in text
    assert not error.can_pass


async def test_a_primary_that_cannot_be_reached_is_named(server: RunningServer) -> None:
    sentinel = PlayedSentinel(free_port())
    async with playing(sentinel) as url:
        error = await entering_fails(url)
    assert f"127.0.0.1:{sentinel.primary} (service 'shop'): connection refused" in str(error)
    assert error.can_pass


@pytest.mark.parametrize("reply", [b"+OK\r\n", b"*1\r\n$1\r\nx\r\n", b":1\r\n", b"*2\r\n$1\r\nx\r\n$1\r\ny\r\n"])
async def test_replies_that_no_sentinel_gives(reply: bytes) -> None:
    async with fake_server(lambda _: reply) as fake:
        error = await entering_fails(f"redis+sentinel://127.0.0.1:{fake.port}/shop")
    assert f"unexpected reply from 127.0.0.1:{fake.port}: is it a sentinel?" in str(error)


# --- TLS


async def test_tls_goes_to_the_sentinels_and_to_the_server(server: RunningServer, tmp_path: Path, topic: str) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    def within_tls(talk: Any) -> Any:
        async def handle(stream: Any) -> None:
            await talk(await TLSStream.wrap(stream, server_side=True, ssl_context=context, standard_compatible=False))

        return handle

    sentinel, proxy = PlayedSentinel(), Proxy(server.port)
    async with (
        listening(within_tls(proxy.talk)) as sentinel.primary,
        listening(within_tls(sentinel.server.talk)) as port,
    ):
        url = f"rediss+sentinel://127.0.0.1:{port}/shop?ssl_ca_certs={tmp_path / 'ca.pem'}"
        async with RedisBackend(url) as backend:
            assert await backend.publish(topic, Message(topic))
            # A connection within TLS too is given up.
            sentinel.fails_over_to(free_port())
            await until(lambda: not backend._client.mux.is_connected, "the server to be left")
