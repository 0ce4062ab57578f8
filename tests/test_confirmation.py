"""``PublishOptions(confirmation=…)``: when a message counts as published.

- ``accepted`` (the default): the server has it.
- ``replicated``: replicas have it, too. If they do not confirm in time, ``NotConfirmedError`` tells the entry's id,
  because the message is stored. If fewer replicas are connected than must confirm, nothing is stored.
- ``persisted``: it is on the server's disk. A server that cannot tell is refused, and nothing is stored.
- It blocks one connection, which is its own. Other publishes, reads and acknowledgements do not wait for it.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import anyio
import pytest
from anyio import to_thread
from conftest import SERVER
from harness import SOON, Harness, Recorder, quick
from processes import wait_until
from sentinels import Member
from servers import RunningServer

from anybus import (
    BackendError,
    Message,
    NotConfirmedError,
    PublishOptions,
    StreamBus,
    UnsupportedError,
    ValidationError,
    connect,
)
from anybus.backends.redis import RedisBackend

REPLICATED = PublishOptions(confirmation="replicated")
PERSISTED = PublishOptions(confirmation="persisted")

SINGLE = SERVER if SERVER in ("valkey", "redis62", "redis70", "redis82") else "valkey"


@pytest.fixture(scope="module")
def pair() -> Generator[tuple[RunningServer, Member], None, None]:
    """A primary that writes a log, and its replica."""
    with RunningServer(SINGLE, "--appendonly", "yes", "--appendfsync", "everysec") as primary:
        replica = Member(SINGLE)
        replica.follows = primary.port
        with replica:
            wait_until(lambda: replica.is_in_step, "the replica to be in step")
            yield primary, replica


@contextmanager
def frozen(server: RunningServer) -> Generator[None, None, None]:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def bus_on(server: RunningServer) -> StreamBus:
    return StreamBus(RedisBackend(server.url), quick())


def stored(server: RunningServer, topic: str) -> list[str]:
    with server.client() as client:
        entries: Any = client.xrange(topic)
    return [entry_id.decode() for entry_id, _ in entries]


async def test_a_message_is_replicated_when_publish_returns(pair: tuple[RunningServer, Member], topic: str) -> None:
    primary, replica = pair
    async with bus_on(primary) as bus:
        entry_id = await bus.publish(Message(topic), REPLICATED)
        assert stored(replica, topic) == [entry_id]
        batch = await bus.publish_batch([Message(topic) for _ in range(20)], REPLICATED)
        assert batch.all_ok
        assert len(stored(replica, topic)) == 21


async def test_a_replica_that_is_silent_confirms_nothing_and_holds_up_nothing_else(
    pair: tuple[RunningServer, Member], topic: str
) -> None:
    primary, replica = pair
    options = PublishOptions(confirmation="replicated", confirmation_timeout=0.3)
    async with bus_on(primary) as bus:
        await bus.publish(Message(topic), REPLICATED)
        with frozen(replica):
            errors: list[NotConfirmedError] = []

            async def publish() -> None:
                with pytest.raises(NotConfirmedError) as caught:
                    await bus.publish(Message(topic), options)
                errors.append(caught.value)

            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(publish)
                await anyio.wait_all_tasks_blocked()
                with anyio.fail_after(SOON):
                    await bus.publish(Message(topic))  # does not wait for the others' confirmation
                assert not errors
            batch = await bus.publish_batch([Message(topic), Message(topic)], options)
    ids = stored(primary, topic)
    assert len(ids) == 7
    for error in (*errors, *batch.errors):
        assert isinstance(error, NotConfirmedError)
        assert error.entry_id in ids
        assert (error.may_have_happened, error.can_pass) == (True, True)
        assert str(error) == f"stored as {error.entry_id}, but only 0 of 1 replicas confirmed it within 0.3 s"


async def test_too_few_replicas_are_refused_at_once(pair: tuple[RunningServer, Member], topic: str) -> None:
    primary, _ = pair
    async with bus_on(primary) as bus:
        with pytest.raises(
            BackendError, match="1 connected replicas, and 2 must confirm: nothing was published"
        ) as caught:
            await bus.publish(Message(topic), PublishOptions(confirmation="replicated", replicas=2))
        assert (caught.value.may_have_happened, caught.value.can_pass) == (False, True)
        assert len(stored(primary, topic)) == 0
        await bus.publish(Message(topic), REPLICATED)


async def test_a_message_is_on_disk_when_publish_returns(pair: tuple[RunningServer, Member], topic: str) -> None:
    primary, _ = pair
    async with bus_on(primary) as bus:
        if SINGLE in ("redis62", "redis70"):
            with pytest.raises(UnsupportedError, match="WAITAOF"):
                await bus.publish(Message(topic), PERSISTED)
            assert len(stored(primary, topic)) == 0
            return
        entry_id = await bus.publish(Message(topic), PERSISTED)
        assert len(stored(primary, topic)) == 1
        # Its replica keeps no log, so it never confirms that a message is on its disk.
        options = PublishOptions(confirmation="persisted", replicas=1, confirmation_timeout=0.3)
        with pytest.raises(NotConfirmedError, match="only 0 of 1 replicas confirmed it") as caught:
            await bus.publish(Message(topic), options)
        assert caught.value.entry_id > entry_id


async def test_a_message_that_was_confirmed_survives_the_death_of_its_server(topic: str) -> None:
    if SINGLE in ("redis62", "redis70"):
        pytest.skip("this server has no WAITAOF")
    with RunningServer(SINGLE, "--appendonly", "yes", "--appendfsync", "everysec") as own:
        async with bus_on(own) as bus:
            ids = [await bus.publish(Message(topic), PERSISTED) for _ in range(3)]
            own.kill()
        await to_thread.run_sync(own.start)
        assert stored(own, topic) == ids


async def test_a_server_without_a_log_is_refused_until_it_has_one(topic: str) -> None:
    with RunningServer(SINGLE) as own:
        async with bus_on(own) as bus:
            with pytest.raises(
                UnsupportedError, match=r"cannot confirm that a message is on disk .* Nothing was published"
            ):
                await bus.publish(Message(topic), PERSISTED)
            batch = await bus.publish_batch([Message(topic)], PERSISTED)
            assert [type(error) for error in batch.errors] == [UnsupportedError]
            assert len(stored(own, topic)) == 0
            if SINGLE in ("redis62", "redis70"):
                return
            with own.client() as client:
                client.config_set("appendonly", "yes")
                await to_thread.run_sync(
                    wait_until,
                    lambda: not client.info("persistence")["aof_rewrite_in_progress"],
                    "the log to be written",
                )
            await bus.publish(Message(topic), PERSISTED)


async def test_a_connection_that_breaks_leaves_open_whether_it_happened(
    pair: tuple[RunningServer, Member], topic: str
) -> None:
    primary, replica = pair
    async with bus_on(primary) as bus:
        await bus.publish(Message(topic), REPLICATED)
        with frozen(replica):
            async with anyio.create_task_group() as tasks:

                async def publish() -> None:
                    with pytest.raises(BackendError) as caught:
                        await bus.publish(
                            Message(topic), PublishOptions(confirmation="replicated", confirmation_timeout=4)
                        )
                    assert caught.value.may_have_happened

                tasks.start_soon(publish)

                def kill_waiting() -> bool:
                    if len(stored(primary, topic)) < 2:  # its last command is the WAIT of the message before
                        return False
                    with primary.client() as client:
                        waiting = [one for one in client.client_list() if one["cmd"] == "wait"]
                        return bool([client.client_kill_filter(_id=one["id"]) for one in waiting])

                await to_thread.run_sync(wait_until, kill_waiting, "a connection that waits")
        await bus.publish(Message(topic), REPLICATED)
    assert len(stored(primary, topic)) == 3


@pytest.mark.parametrize("how", ["left", "raised", "cancelled"])
async def test_what_is_left_in_the_buffer_is_confirmed_when_the_bus_is_left(
    pair: tuple[RunningServer, Member], topic: str, how: str
) -> None:
    primary, _ = pair
    recorder = Recorder()
    with anyio.CancelScope() as scope, suppress(LookupError):
        async with StreamBus(RedisBackend(primary.url), quick(recorder, publish_buffer_size=3)) as bus:
            for _ in range(3):
                bus.publish_nowait(Message(topic), REPLICATED)
            if how == "cancelled":
                scope.cancel()
                await anyio.sleep_forever()
            if how == "raised":
                raise LookupError
    assert recorder.of("on_error") == []
    assert len(stored(primary, topic)) == 3


@pytest.mark.parametrize("options", [REPLICATED, PERSISTED])
async def test_what_is_deduplicated_cannot_be_confirmed(
    pair: tuple[RunningServer, Member], topic: str, options: PublishOptions
) -> None:
    primary, _ = pair
    told = "for a message that is deduplicated: use confirmation='accepted', or publish it without idempotency_key and"
    async with bus_on(primary) as bus:
        with pytest.raises(UnsupportedError, match=told):
            await bus.publish(Message(topic), replace(options, idempotency_key="order-1"))
        with pytest.raises(UnsupportedError, match=told):
            await bus.publish(Message(topic, idempotency_key="order-1"), replace(options, deduplication_window=60))
    assert stored(primary, topic) == []


async def test_memory_confirms_nothing_but_that_it_accepted(topic: str) -> None:
    async with connect("memory://") as bus:
        await bus.publish(Message(topic), PublishOptions(confirmation="accepted"))
        for options in (REPLICATED, PERSISTED):
            with pytest.raises(UnsupportedError, match="MemoryBackend cannot confirm that a message is"):
                await bus.publish(Message(topic), options)
        with pytest.raises(UnsupportedError):
            await bus.publish_batch([Message(topic)], REPLICATED)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"confirmation": "written"}, "confirmation must be one of accepted, replicated, persisted, not 'written'"),
        ({"replicas": 1}, "replicas must be unset with confirmation='accepted'"),
        ({"confirmation_timeout": 1}, "confirmation_timeout must be unset with confirmation='accepted'.* not 1"),
        ({"confirmation": "replicated", "replicas": 0}, "replicas must be"),
        ({"confirmation": "replicated", "replicas": 1.5}, "replicas must be"),
        ({"confirmation": "persisted", "replicas": -1}, "replicas must be"),
        ({"confirmation": "persisted", "confirmation_timeout": 0}, "confirmation_timeout must be"),
        ({"confirmation": "persisted", "confirmation_timeout": float("inf")}, "confirmation_timeout must be"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        PublishOptions(**given)


async def test_a_confirmation_must_end_before_the_publish_does(pair: tuple[RunningServer, Member], topic: str) -> None:
    primary, _ = pair
    async with StreamBus(RedisBackend(primary.url), quick(publish_timeout=2.0)) as bus:
        options = PublishOptions(confirmation="replicated", confirmation_timeout=2.0)
        with pytest.raises(ValidationError, match=r"confirmation_timeout must be less than publish_timeout \(2.0 s\)"):
            await bus.publish(Message(topic), options)
        batch = await bus.publish_batch([Message(topic)], options)
        assert [type(error) for error in batch.errors] == [ValidationError]
    assert len(stored(primary, topic)) == 0


def test_the_error_can_be_pickled() -> None:
    error = NotConfirmedError("stored as 1-0, but ...", entry_id="1-0")
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.entry_id, copied.may_have_happened) == (str(error), "1-0", True)


async def test_on_every_server_that_has_no_replica(harness: Harness, topic: str) -> None:
    """On a cluster, on the node of the topic."""
    async with StreamBus(harness.make_backend(), quick()) as bus:
        options = PublishOptions(confirmation="replicated", replicas=9)
        told = "cannot confirm|and 9 must confirm: nothing was published"
        with pytest.raises((UnsupportedError, BackendError), match=told):
            await bus.publish(Message(topic), options)
        assert await harness.entries(topic) == []
