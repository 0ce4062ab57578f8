"""A failover in which the connections survive: each of them has to leave the demoted server by itself.

That is how it looks behind a virtual IP, a DNS name or a balancer: new connections go to the new primary, while the old
ones stay with a server that has become a replica. It answers READONLY, and ends blocking reads with UNBLOCKED.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from anyio import to_thread
from conftest import SERVER
from fake_server import Command
from harness import SOON, Recorder, quick, until
from proxy import Answer, Proxy, name_of, proxied
from servers import RunningServer

from anybus import BackendError, Delivery, Message, StreamBus, SubscriptionConfig
from anybus.abc import ClaimedMessage
from anybus.backends.redis import RedisBackend

DEMOTED = [
    "READONLY You can't write against a read only replica.",
    "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "MOVED 1234 127.0.0.1:1",
    "NOAUTH Authentication required.",
]


@dataclass
class Pair:
    """A primary and its replica."""

    primary: RunningServer
    replica: RunningServer

    def fail_over(self) -> None:
        """The replica becomes the primary; the old one becomes its replica and keeps its connections."""
        with self.replica.client() as new, self.primary.client() as old:
            new.replicaof("NO", "ONE")
            old.replicaof("127.0.0.1", self.replica.port)

    def left_by(self, name: str) -> bool:
        """Whether no client of that name is connected to the old primary any more."""
        with self.primary.client() as client:
            return all(item["name"] != name for item in client.client_list())

    def is_replicated(self, topic: str) -> bool:
        with self.replica.client() as client:
            return bool(client.exists(topic))


@pytest.fixture
def pair() -> Iterator[Pair]:
    at_once = ("--repl-diskless-sync-delay", "0")
    with RunningServer(SERVER, *at_once) as primary, RunningServer(SERVER, *at_once) as replica:
        with replica.client() as client:
            client.replicaof("127.0.0.1", primary.port)
        yield Pair(primary, replica)


async def publish_patiently(bus: StreamBus, message: Message) -> None:
    while True:
        with suppress(BackendError):
            await bus.publish(message)
            return
        await anyio.sleep(0.01)


@pytest.mark.parametrize("paused", [False, True], ids=["while the reader blocks", "while the reader rests"])
async def test_after_a_failover_every_connection_leaves_the_demoted_server_by_itself(
    pair: Pair, topic: str, paused: bool
) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    async def handles(message: Message) -> None:
        await until(lambda: message.uid in handled, "the message to be handled")

    recorder = Recorder()
    async with proxied(pair.primary.port) as proxy:
        backend = RedisBackend(f"{proxy.url}?client_name=work")
        # A read blocks for as long as the test may take: nothing but its server's word ends it.
        async with StreamBus(backend, quick(recorder, block_timeout=SOON, claim_idle_timeout=60)) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                first = Message(topic)
                await bus.publish(first)
                await handles(first)
                await until(lambda: to_thread.run_sync(pair.is_replicated, topic), "the replica to follow")
                if paused:
                    subscription.pause()
                proxy.switch_to(pair.replica.port)
                await to_thread.run_sync(pair.fail_over)
                if paused:
                    subscription.resume()
                second = Message(topic)
                await publish_patiently(bus, second)
                await handles(second)
                await until(lambda: to_thread.run_sync(pair.left_by, "work"), "the old primary to be left")
                # From here on nothing is refused any more, and everything is handled as before.
                so_far = len(recorder.of("on_error"))
                for _ in range(20):
                    message = Message(topic)
                    await bus.publish(message)
                    await handles(message)
                assert recorder.of("on_error")[so_far:] == []
                assert subscription.is_running


@pytest.mark.parametrize("words", DEMOTED, ids=lambda words: words.partition(" ")[0])
async def test_a_reader_gives_up_its_own_connection_and_no_other(server: RunningServer, topic: str, words: str) -> None:
    async with proxied(server.port) as proxy:
        async with RedisBackend(proxy.url) as backend:
            await backend.create_group(topic, "g")

            async def reads_with(connections: int) -> bool:
                """Read until there are so many connections: a read that is late for its time does not block."""
                assert await backend.read_new(topic, "g", "c", count=1, timeout=0.05) == []
                return proxy.connections == connections

            await until(lambda: reads_with(2), "the reader's connection")
            answer_once(proxy, words, lambda command: b"BLOCK" in command)
            with pytest.raises(BackendError, match=words.partition(" ")[0]) as caught:
                await backend.read_new(topic, "g", "c", count=1, timeout=SOON)
            assert (caught.value.can_pass, caught.value.may_have_happened) == (True, False)
            await backend.publish(topic, Message(topic, b"after"))
            (entry,) = await backend.read_new(topic, "g", "c", count=1, timeout=SOON)
            assert isinstance(entry, ClaimedMessage)
            await until(lambda: reads_with(3), "the reader's second connection")
            assert backend._client.mux.connections == 1


Operation = Callable[[RedisBackend, str], Awaitable[object]]

OPERATIONS: dict[str, Operation] = {
    "XADD": lambda backend, topic: backend.publish(topic, Message(topic)),
    "XGROUP": lambda backend, topic: backend.create_group(topic, "h"),
    "reclaim": lambda backend, topic: backend.reclaim_idle(topic, "g", "c", min_idle=1, count=1),
    "ack": lambda backend, topic: backend.ack_many(topic, "g", ["1-1"], consumer="c"),
    "XACK": lambda backend, topic: backend.ack_many(topic, "g", ["1-1"]),
    "renew": lambda backend, topic: backend.renew(topic, "g", "c", ["1-1"]),
    "release": lambda backend, topic: backend.release(topic, "g", "c", ["1-1"]),
    "XREADGROUP": lambda backend, topic: backend.read_new(topic, "g", "c", count=1, timeout=0),
    "schedule": lambda backend, topic: backend.publish_later(topic, Message(topic), delay=60),
}


@pytest.mark.parametrize(
    ("name", "words"),
    [(name, DEMOTED[0]) for name in OPERATIONS] + [("XADD", words) for words in DEMOTED[1:]],
    ids=lambda value: value.partition(" ")[0],
)
async def test_the_shared_connection_is_opened_again_whatever_was_refused(
    server: RunningServer, topic: str, name: str, words: str
) -> None:
    async with proxied(server.port) as proxy:
        async with RedisBackend(proxy.url) as backend:
            await backend.create_group(topic, "g")
            answer_once(proxy, words, lambda command: name_of(command) == name)
            with pytest.raises(BackendError, match=words.partition(" ")[0]) as caught:
                await OPERATIONS[name](backend, topic)
            assert (caught.value.can_pass, caught.value.may_have_happened) == (True, False)
            with anyio.fail_after(SOON):
                await OPERATIONS[name](backend, topic)
            assert backend._client.mux.connections == 2


def answer_once(proxy: Proxy, words: str, wanted: Callable[[Command], bool]) -> None:
    answered = False

    def rule(command: Any) -> Answer | None:
        nonlocal answered
        if answered or not wanted(command):
            return None
        answered = True
        return Answer(f"-{words}\r\n".encode())

    proxy.rule = rule
