"""What a server, or a proxy in front of it, refuses: only what is known to be permanent ends a subscription.

Specification: DESIGN.md, promise 8. Permanent are a wrong type, a missing right, an unknown command, a bad option, and
wrong credentials when the bus is entered. All else is reported, with backoff, and the subscription stays.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import redis
import redis.exceptions
from anyio import to_thread
from conftest import SERVER
from harness import SOON, Recorder, quick, until
from proxy import Answer, name_of, proxied
from redis.credentials import CredentialProvider
from servers import RunningServer

from anybus import (
    BackendError,
    BatchOutcome,
    Delivery,
    EventBusError,
    Message,
    StreamBus,
    Subscription,
    SubscriptionConfig,
    ValidationError,
    connect,
)
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._errors import translate
from anybus.backends.redis._protocol import ServerError

SECRET, ROTATED = "hunter2", "hunter3"

PASSING = [
    "ERR max number of clients reached",
    "ERR no upstream host",
    "ERR max requests limit exceeded",
    "LOADING Redis is loading the dataset in memory",
    "MISCONF Redis is configured to save RDB snapshots, but it is currently not able to persist on disk.",
    "OOM command not allowed when used memory > 'maxmemory'.",
    "READONLY You can't write against a read only replica.",
    "ERR Error running script (call to f_1): @user_script:1: -READONLY You can't write against a read only replica.",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "BUSY Redis is busy running a script.",
    "CLUSTERDOWN The cluster is down",
    "MOVED 1234 10.0.0.1:6379",
    "NOREPLICAS Not enough good replicas to write.",
    "DENIED Redis is running in protected mode because protected mode is enabled.",
    "WRONGPASS invalid username-password pair or user is disabled.",
    "NOAUTH Authentication required.",
    "ERR invalid password",
]
"""The command was surely not carried out."""

UNCERTAIN = [
    "upstream failure",
    "ERR upstream failure",
    "ERR Connection timed out",
    "ERR backend is not available, please retry",
    "ERR internal error",
    "SOMETHING nobody has heard of",
    "",
]
"""A proxy's words, or nobody knows whose: the command may have reached a server."""

PERMANENT = [
    "WRONGTYPE Operation against a key holding the wrong kind of value",
    "ERR Error running script (call to f_1): @user_script:1: WRONGTYPE Operation against a key holding the wrong kind",
    "NOPERM this user has no permissions to run the 'xadd' command or its subcommand",
    "ERR unknown command `XADD`, with args beginning with: `t`, ",
    "ERR unsupported command 'xautoclaim'",
    "ERR unknown subcommand 'CREATE'. Try XGROUP HELP.",
    "ERR Unknown subcommand or wrong number of arguments for 'CREATE'. Try XGROUP HELP.",
    "ERR syntax error",
    "ERR wrong number of arguments for 'xadd' command",
    "ERR Invalid stream ID specified as stream command argument",
    "ERR value is not an integer or out of range",
    "ERR DB index is out of range",
    "CROSSSLOT Keys in request don't hash to the same slot",
]


@pytest.fixture
def own_server() -> Iterator[RunningServer]:
    """A server whose settings a test may change."""
    with RunningServer(SERVER) as running:
        yield running


# --- what each error means


@pytest.mark.parametrize("text", PASSING)
def test_what_may_pass_is_transient_and_surely_was_not_done(text: str) -> None:
    error = translate(ServerError(text))
    assert (error.can_pass, error.may_have_happened) == (True, False)
    assert text in str(error)


@pytest.mark.parametrize("text", UNCERTAIN)
def test_what_nobody_knows_is_transient_and_may_have_been_done(text: str) -> None:
    error = translate(ServerError(text))
    assert (error.can_pass, error.may_have_happened) == (True, True)


@pytest.mark.parametrize("text", PERMANENT)
def test_what_is_known_to_come_again_is_permanent_and_surely_was_not_done(text: str) -> None:
    error = translate(ServerError(text))
    assert (error.can_pass, error.may_have_happened) == (False, False)


@pytest.mark.parametrize(
    "text",
    [
        "WRONGPASS invalid username-password pair or user is disabled.",
        "NOAUTH Authentication required.",
        "ERR invalid password",
        "ERR AUTH <password> called without any password configured for the default user. Are you sure your ...",
    ],
)
def test_wrong_credentials_are_permanent_when_the_bus_is_entered_and_only_then(text: str) -> None:
    assert not translate(ServerError(text), entering=True).can_pass
    assert translate(ServerError(text)).can_pass
    assert isinstance(translate(ServerError(text)).__cause__, redis.exceptions.AuthenticationError)


SCRIPTS = {
    "a command that is not allowed": "return redis.call('XLEN', KEYS[1])",
    "the same, guarded": "return redis.pcall('XLEN', KEYS[1])",
    "a key that is not allowed": "return redis.call('XADD', 'elsewhere', '*', 'f', 'v')",
    "an unknown command": "return redis.call('XNOSUCH', KEYS[1])",
    "too few arguments": "return redis.call('XADD', KEYS[1], '*')",
    "a value that is missing": "return redis.call('XADD', KEYS[1], '*', 'f', 'v', 'g')",
    "a wrong id": "return redis.call('XADD', KEYS[1], 'x', 'f', 'v')",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
async def test_permanent_errors_inside_scripts_are_known_on_this_server(own_server: RunningServer, script: str) -> None:
    """Scripts hide the code of an error, each server in its own way."""

    def ask() -> str:
        with own_server.client() as admin:
            admin.execute_command("ACL", "SETUSER", "u", "on", f">{SECRET}", "~t", "-@all", "+eval", "+xadd")
            with redis.Redis(port=own_server.port, username="u", password=SECRET) as client:
                try:
                    return str(client.execute_command("EVAL", script, 1, "t"))
                except redis.exceptions.NoPermissionError as error:
                    return f"NOPERM {error}"
                except redis.exceptions.ResponseError as error:
                    return f"ERR {error}"

    error = translate(ServerError(await to_thread.run_sync(ask)))
    assert not error.can_pass, error


@pytest.mark.parametrize(
    ("errors", "can_pass"),
    [
        ((BackendError("OOM", can_pass=True), BackendError("LOADING", can_pass=True)), True),
        ((BackendError("OOM", can_pass=True), BackendError("WRONGTYPE", can_pass=False)), False),
        ((BackendError("OOM", can_pass=True), ValidationError("too large")), False),
    ],
)
def test_the_error_of_a_batch_is_transient_if_all_its_errors_are(
    errors: tuple[EventBusError, ...], can_pass: bool
) -> None:
    with pytest.raises(BackendError) as caught:
        BatchOutcome(errors).raise_for_errors()
    assert caught.value.can_pass == can_pass


# --- a subscription that runs


class Work:
    """A subscription under way, what it has handled, and what was reported of it."""

    def __init__(self, bus: StreamBus, subscription: Subscription, recorder: Recorder, topic: str) -> None:
        self.bus = bus
        self.subscription = subscription
        self.recorder = recorder
        self.topic = topic
        self.handled: list[str] = []

    def reported(self, words: str) -> bool:
        return any(words in str(event.error) for event in self.recorder.of("on_error"))

    async def goes_on(self) -> None:
        """A message that is published now is handled."""
        message = Message(self.topic)
        await self.bus.publish(message)
        await until(lambda: message.uid in self.handled, "the message to be handled")
        assert self.subscription.is_running


@asynccontextmanager
async def working(backend: RedisBackend, topic: str) -> AsyncGenerator[Work, None]:
    recorder = Recorder()
    works: list[Work] = []

    async def handler(delivery: Delivery) -> None:
        works[0].handled.append(delivery.message.uid)

    async with StreamBus(backend, quick(recorder, publish_timeout=SOON)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            works.append(Work(bus, subscription, recorder, topic))
            await works[0].goes_on()
            yield works[0]
            await works[0].goes_on()


PROXY_WORDS = [
    "ERR no upstream host",
    "upstream failure",
    "ERR Connection timed out",
    "ERR max requests limit exceeded",
    "ERR max number of clients reached",
]


def refusing(words: str, times: int, *names: str) -> tuple[Callable[[Any], Answer | None], Callable[[], bool]]:
    """A rule that answers so many commands of these names (all, if none is given) with an error; is it used up?"""
    left = times

    def rule(command: Any) -> Answer | None:
        nonlocal left
        if left and (not names or name_of(command) in names):
            left -= 1
            return Answer(f"-{words}\r\n".encode())
        return None

    return rule, lambda: left == 0


@pytest.mark.parametrize("words", PROXY_WORDS)
async def test_a_proxys_own_words_end_no_subscription(server: RunningServer, topic: str, words: str) -> None:
    async with proxied(server.port) as proxy:
        async with working(RedisBackend(proxy.url), topic) as work:
            proxy.rule, used_up = refusing(words, 6)
            await until(used_up, "the proxy to refuse")
            await until(lambda: work.reported(words), "the refusal to be reported")


@pytest.mark.parametrize("words", PROXY_WORDS)
async def test_a_proxys_own_words_on_connecting_again_end_no_subscription(
    server: RunningServer, topic: str, words: str
) -> None:
    """Every connection breaks; the first commands on the new ones are refused."""
    async with proxied(server.port) as proxy:
        async with working(RedisBackend(proxy.url), topic) as work:
            proxy.rule, used_up = refusing(words, 4)
            await proxy.cut_all()
            await until(used_up, "the proxy to refuse")
            assert work.subscription.is_running


async def test_a_subscription_begins_when_the_proxy_has_found_its_server(server: RunningServer, topic: str) -> None:
    async with proxied(server.port) as proxy:
        recorder = Recorder()
        async with StreamBus(RedisBackend(proxy.url), quick(recorder)) as bus:
            proxy.rule, used_up = refusing("ERR no upstream host", 2, "XGROUP")

            async def handler(delivery: Delivery) -> None: ...

            with anyio.fail_after(SOON):
                async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                    assert used_up()
                    assert subscription.is_running
        assert [str(event.error) for event in recorder.of("on_error")] == [
            "the server refused: ERR no upstream host"
        ] * 2


async def test_a_publish_that_a_proxy_refused_says_whether_it_may_have_happened(
    server: RunningServer, topic: str
) -> None:
    said: dict[str, bool] = {}
    async with proxied(server.port) as proxy:
        async with StreamBus(RedisBackend(proxy.url), quick(Recorder())) as bus:
            for words in PROXY_WORDS:
                proxy.rule, _ = refusing(words, 1, "XADD")
                with pytest.raises(BackendError) as caught:
                    await bus.publish(Message(topic))
                said[words] = caught.value.may_have_happened
                (outcome,) = (await bus.publish_batch([Message(topic)])).results
                assert isinstance(outcome, str)
    assert said == dict(zip(PROXY_WORDS, (False, True, True, False, False), strict=True))


async def test_a_server_that_is_full_while_connections_break_ends_no_subscription(
    own_server: RunningServer, topic: str
) -> None:
    admin: Any = own_server.client()

    def fill() -> None:
        admin.config_set("maxclients", 1)
        for item in admin.client_list():
            if item["name"] == "work":
                admin.client_kill_filter(_id=item["id"])

    def turned_away() -> bool:
        return bool(admin.info("stats")["rejected_connections"] >= 3)

    with admin:
        async with working(RedisBackend(f"{own_server.url}?client_name=work"), topic) as work:
            await to_thread.run_sync(fill)
            await until(lambda: to_thread.run_sync(turned_away), "some tries to be turned away")
            assert work.subscription.is_running
            await to_thread.run_sync(admin.config_set, "maxclients", 100)


class Late(CredentialProvider):
    """Hears of a new password after the server."""

    def __init__(self) -> None:
        self.password: str | None = None
        self.asked = 0

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        self.asked += 1
        return ("worker", self.password or "")

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def errors_logged(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    return [text for text in texts if words in text]


async def test_a_rotated_password_that_the_credentials_lag_behind_is_waited_out_loudly(
    own_server: RunningServer, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    provider = Late()
    provider.password = SECRET
    admin: Any = own_server.client()

    def rotate() -> None:
        admin.execute_command("ACL", "SETUSER", "worker", f"<{SECRET}", f">{ROTATED}")
        for item in admin.client_list():
            if item["user"] == "worker":
                admin.client_kill_filter(_id=item["id"])

    with admin:
        rules = ("on", f">{SECRET}", "~*", "&*", "+@all")
        await to_thread.run_sync(lambda: admin.execute_command("ACL", "SETUSER", "worker", *rules))
        client = redis.Redis(port=own_server.port, credential_provider=provider)
        async with working(RedisBackend.from_client_settings(client), topic) as work:
            await to_thread.run_sync(rotate)
            before = provider.asked
            await until(lambda: provider.asked > before + 2, "some tries with the old password")
            await until(lambda: bool(errors_logged(caplog, "credentials")), "the refusal to be logged")
            assert work.subscription.is_running
            provider.password = ROTATED
    (said,) = errors_logged(caplog, "does not accept the credentials")
    assert "WRONGPASS" in said
    assert f"localhost:{own_server.port}" in said
    assert SECRET not in caplog.text
    # Whoever comes with the old password is told at once.
    with pytest.raises(BackendError, match="WRONGPASS") as caught:
        async with connect(f"redis://worker:{SECRET}@127.0.0.1:{own_server.port}"):
            pass
    assert not caught.value.can_pass


async def test_a_password_that_is_asked_for_all_at_once_is_waited_out(
    own_server: RunningServer, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """``requirepass`` is set while connections break, and taken back."""
    admin: Any = own_server.client()

    def lock() -> None:
        admin.config_set("requirepass", SECRET)
        for item in admin.client_list():
            if item["name"] == "work":
                admin.client_kill_filter(_id=item["id"])

    with admin:
        async with working(RedisBackend(f"{own_server.url}?client_name=work"), topic) as work:
            await to_thread.run_sync(lock)
            await until(lambda: bool(errors_logged(caplog, "NOAUTH")), "the refusal to be logged")
            assert work.subscription.is_running
            await to_thread.run_sync(admin.config_set, "requirepass", "")


@pytest.mark.parametrize("words", ["WRONGTYPE no stream", "NOPERM no", "ERR unknown command 'XREADGROUP'"])
async def test_what_is_known_to_be_permanent_ends_a_subscription_at_once(
    server: RunningServer, topic: str, words: str
) -> None:
    async with proxied(server.port) as proxy:
        with anyio.fail_after(SOON), pytest.raises(BackendError, match=words):  # noqa: PT012
            async with working(RedisBackend(proxy.url), topic):
                proxy.rule, _ = refusing(words, 1000, "XREADGROUP")
                await anyio.sleep_forever()
