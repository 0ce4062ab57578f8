"""A server that may lose messages by its settings says so once, when the bus is entered.

The settings are those that docs/redis.md demands: no eviction, and something on a disk.
"""

from __future__ import annotations

from typing import Any

import pytest
from anyio import to_thread
from conftest import SERVER
from fake_server import Command, fake_server, greeting
from proxy import CutBefore, proxied
from servers import RunningServer

from anybus import Message, connect

EVICTS, KEEPS_NOTHING = "evicts", "keeps nothing on disk"

SNAPSHOTS = ("--save", "3600", "1000000000")
NO_SNAPSHOTS = ("--save", "")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    told = [record.getMessage() for record in caplog.records if record.name == "anybus"]
    return [text for text in told if text.startswith("the server at ")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (SNAPSHOTS, []),
        (("--appendonly", "yes", *NO_SNAPSHOTS), []),
        (NO_SNAPSHOTS, [KEEPS_NOTHING]),
        ((*SNAPSHOTS, "--maxmemory", "100mb"), []),
        ((*SNAPSHOTS, "--maxmemory-policy", "allkeys-lru"), []),
        ((*SNAPSHOTS, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), ["evicts any keys"]),
        (
            (*SNAPSHOTS, "--maxmemory", "100mb", "--maxmemory-policy", "volatile-ttl"),
            ["evicts keys that have an expiry"],
        ),
        (
            (*NO_SNAPSHOTS, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-random"),
            ["allkeys-random", KEEPS_NOTHING],
        ),
    ],
    ids=[
        "snapshots",
        "append-only file",
        "nothing on disk",
        "a limit that refuses",
        "a policy without a limit",
        "evicting any",
        "evicting what expires",
        "both",
    ],
)
async def test_what_a_servers_settings_may_lose_is_said_once(
    options: tuple[str, ...], expected: list[str], topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    running = RunningServer(SERVER, *options)
    await to_thread.run_sync(running.start)
    try:
        async with connect(running.url) as bus:
            said = warnings(caplog)
            assert len(said) == len(expected)
            for words, text in zip(expected, said, strict=True):
                assert words in text
                assert f"127.0.0.1:{running.port}" in text
            # Not again, on another connection.
            bus.backend._client.mux.reset()  # type: ignore[attr-defined]
            await bus.publish(Message(topic))
            assert warnings(caplog) == said
    finally:
        await to_thread.run_sync(running.stop)


@pytest.mark.parametrize("name", ["INFO", "CONFIG"])
async def test_where_the_question_is_refused_nothing_is_said_and_nothing_fails(
    name: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    def user() -> None:
        with running.client() as admin:
            admin.execute_command("ACL", "SETUSER", "u", "on", ">p", "~*", "&*", "+@all", f"-{name.lower()}")

    running = RunningServer(SERVER, *NO_SNAPSHOTS)
    await to_thread.run_sync(running.start)
    try:
        await to_thread.run_sync(user)
        async with connect(f"redis://u:p@127.0.0.1:{running.port}") as bus:
            await bus.publish(Message(topic))
    finally:
        await to_thread.run_sync(running.stop)
    assert warnings(caplog) == []


async def test_a_proxy_that_hangs_up_at_the_question_is_entered_all_the_same(
    server: RunningServer, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    def rule(command: Command) -> CutBefore | None:
        return CutBefore() if command[:2] == [b"INFO", b"persistence"] else None

    async with proxied(server.port) as proxy:
        proxy.rule = rule
        async with connect(proxy.url) as bus:
            await bus.publish(Message(topic))
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    "said", [b":1\r\n", b"$-1\r\n", b"*0\r\n", b"*2\r\n+save\r\n:5\r\n", b"$2\r\n\xff:\r\n", b"+\r\n"]
)
async def test_a_senseless_answer_is_no_reason_to_fail(said: bytes, caplog: pytest.LogCaptureFixture) -> None:
    def greet(command: Command) -> bytes | None:
        asked: Any = command[:2]
        if asked in ([b"INFO", b"memory"], [b"CONFIG", b"GET"]):
            return said
        if asked == [b"INFO", b"persistence"]:
            return b"$13\r\naof_enabled:0\r\n"
        return greeting(command)

    async with fake_server(lambda _: b"$3\r\n1-1\r\n") as fake:
        fake.greet = greet
        async with connect(fake.url) as bus:
            assert await bus.publish(Message("t")) == "1-1"
    assert warnings(caplog) == []
