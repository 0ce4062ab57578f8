"""The log of a connection: that it broke and why, in one line that says it once, and that it stands again."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from anyio import to_thread
from conftest import SERVER
from harness import quick, until
from servers import RunningServer

from anybus import BackendError, Delivery, Message, StreamBus, SubscriptionConfig
from anybus.backends.redis import RedisBackend

SHORT = 0.3


@pytest.fixture
def own_server() -> Iterator[RunningServer]:
    with RunningServer(SERVER) as running:
        yield running


async def nothing(delivery: Delivery) -> None:
    """Everything is fine."""


async def test_a_server_that_goes_and_comes_back_is_told_in_lines_that_say_each_thing_once(
    own_server: RunningServer, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "anybus")
    place = f"127.0.0.1:{own_server.port}"
    backend = RedisBackend(own_server.url, connect_timeout=SHORT, command_timeout=SHORT)

    def texts(level: int) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == level]

    async with StreamBus(backend, quick(publish_timeout=SHORT)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), nothing):
            await until(lambda: f"connected to {place}" in texts(logging.INFO))
            await to_thread.run_sync(own_server.kill)
            await until(
                lambda: any(text.startswith("reclaim: ") and "no conn" in text for text in texts(logging.ERROR))
            )
            with pytest.raises(BackendError):
                await bus.publish(Message(topic))
            assert not any(f"reconnected to {place}" in text for text in texts(logging.INFO))
            await to_thread.run_sync(own_server.start)
            await until(lambda: f"reconnected to {place}" in texts(logging.INFO))
            await until(lambda: any(text.startswith("reclaim: works again") for text in texts(logging.INFO)))
    (broke,) = texts(logging.WARNING)[:1]
    assert broke.startswith(f"the connection to {place} broke: ")
    for text in texts(logging.ERROR):
        assert text.count("connect") <= 2, text  # "no connection to …: All connection attempts failed", by AnyIO
        assert text.count(place) <= 1, text


async def test_leaving_the_bus_is_no_broken_connection(
    own_server: RunningServer, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "anybus")
    async with StreamBus(RedisBackend(own_server.url), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), nothing):
            await bus.publish(Message(topic))
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
