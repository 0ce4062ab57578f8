"""Many subscriptions of a bus share connections and passes, and each of them keeps every promise.

- Members of one group wait together on few connections. What comes for one of them ends the wait of no other for long.
- An entry is delivered once, to the member that waits for it, whoever joins, pauses, ends or breaks beside it.
- A quiet group costs no passes. What is released, retried, delayed or left by a dead member is handled all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import anyio
import pytest
from anyio import to_thread
from conftest import SERVER
from harness import HOUR, QUICK, SOON, Recorder, new_topic, quick, until
from servers import RedisHarness, RunningServer

from anybus import BackendError, Delivery, Message, StreamBus, Subscription, SubscriptionConfig
from anybus._failure.copies import retry_stream
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import RETURNED, delayed, waiting
from anybus.backends.redis._readers import FEW
from anybus.backends.redis._taking import Taking
from anybus.backends.redis._watch_scripts import LOOK

MANY = FEW + 14


@pytest.fixture
def own_server() -> Any:
    """Its connections are counted."""
    with RunningServer(SERVER) as running:
        yield running


class Handled:
    """Counts what was handled, by topic and payload, and remembers redeliveries."""

    def __init__(self) -> None:
        self.times: Counter[tuple[str, bytes]] = Counter()
        self.redelivered = 0

    async def __call__(self, delivery: Delivery) -> None:
        self.times[delivery.message.topic, delivery.message.payload] += 1
        self.redelivered += delivery.state.deliveries != 1 or delivery.state.redelivered

    async def handle(self, delivery: Delivery) -> None:
        await self(delivery)


def names(count: int = MANY) -> list[str]:
    topic = new_topic()
    return [f"{topic}.{number}" for number in range(count)]


@asynccontextmanager
async def subscribed(
    bus: StreamBus, topics: list[str], handled: Handled, **options: Any
) -> AsyncGenerator[list[Subscription]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                bus.subscribe(SubscriptionConfig(topic, "g", retry_backoff=QUICK, **options), handled.handle)
            )
            for topic in topics
        ]


def taking(bus: StreamBus) -> Taking:
    assert isinstance(bus.backend, RedisBackend)
    return bus.backend._taking


def waiting_members(bus: StreamBus) -> int:
    pools = taking(bus)._readers._pools.values()
    readers = [reader for pool in pools for reader in (*pool.shared, *pool.own.values())]
    return sum(len(reader._read.waits) for reader in readers if reader._read is not None)


async def all_wait(bus: StreamBus, count: int = MANY) -> None:
    await until(lambda: waiting_members(bus) == count, "all members wait for entries")


async def test_many_members_wait_on_few_connections(own_server: RunningServer) -> None:
    topics, handled = names(4 * FEW), Handled()
    with own_server.client() as admin:
        async with StreamBus(RedisBackend(own_server.url), quick()) as bus, subscribed(bus, topics, handled):
            await all_wait(bus, len(topics))
            connections: Any = await to_thread.run_sync(admin.client_list)
            assert len(connections) <= FEW + 2, "one for commands, and this one, which asks"
            for topic in topics:
                await bus.publish(Message(topic, b"x"))
            await until(lambda: len(handled.times) == len(topics))


async def test_a_member_alone_has_a_connection_of_its_own(own_server: RunningServer) -> None:
    topics, handled = names(3), Handled()
    async with StreamBus(RedisBackend(own_server.url), quick()) as bus, subscribed(bus, topics, handled):
        await all_wait(bus, 3)
        [pool] = taking(bus)._readers._pools.values()
        assert len(pool.shared) == 3


async def test_who_has_its_answer_is_not_asked_for_again_before_it_is_ready(server: RunningServer) -> None:
    """One reply answers several members: those who have not run since must not be named in the next read."""
    topics, handled = names(), Handled()
    async with StreamBus(RedisBackend(server.url), quick()) as bus, subscribed(bus, topics, handled) as subscriptions:
        for number in range(30):
            await all_wait(bus)
            payload = b"%d" % number
            await bus.publish_batch([Message(topic, payload) for topic in topics for _ in range(2)])
            await until(lambda: sum(handled.times.values()) == 2 * len(topics) * (number + 1))  # noqa: B023
        assert set(handled.times.values()) == {2}
        assert handled.redelivered == 0
        assert sum(subscription.statistics().reclaimed for subscription in subscriptions) == 0


async def test_members_that_pause_and_go_on_lose_nothing_and_disturb_nobody(server: RunningServer) -> None:
    topics, handled = names(), Handled()
    async with StreamBus(RedisBackend(server.url), quick()) as bus, subscribed(bus, topics, handled) as subscriptions:
        await all_wait(bus)
        published = 0
        for number in range(40):
            for subscription in subscriptions[number % 3 :: 3]:
                subscription.pause()
            await bus.publish_batch([Message(topic, b"%d" % number) for topic in topics])
            published += len(topics)
            await anyio.sleep(0.002 * (number % 4))
            for subscription in subscriptions:
                subscription.resume()
        await until(lambda: len(handled.times) == published)
        assert set(handled.times.values()) == {1}
        harness = RedisHarness(server)
        for topic in topics:
            await until(lambda: nothing_pending(harness, topic))  # noqa: B023


async def nothing_pending(harness: RedisHarness, topic: str) -> bool:
    return not await harness.pending(topic, "g")


async def test_members_that_end_leave_what_comes_to_others(server: RunningServer) -> None:
    """The ends of some members fall into reads that name them. The other bus gets what they hand back."""
    topics, handled = names(), Handled()
    async with (
        StreamBus(RedisBackend(server.url), quick()) as bus,
        StreamBus(RedisBackend(server.url), quick()) as other,
        subscribed(other, topics, handled),
    ):
        for number in range(6):
            async with subscribed(bus, topics, handled):
                await all_wait(bus)
                await bus.publish_batch([Message(topic, b"%d" % number) for topic in topics])
        await until(lambda: len(handled.times) == 6 * len(topics))
        assert set(handled.times.values()) == {1}


async def test_a_lost_group_and_a_wrong_type_concern_their_own_members_only(server: RunningServer) -> None:
    topics, handled, recorder = names(), Handled(), Recorder()
    harness = RedisHarness(server)
    async with StreamBus(RedisBackend(server.url), quick(recorder)) as bus, subscribed(bus, topics, handled):
        for number in range(4):
            await all_wait(bus)
            lost = topics[number * 5]
            await harness.delete_group(lost, "g")
            await until(lambda: any(event.topic == lost for event in recorder.of("on_group_made_again")))  # noqa: B023
            await bus.publish_batch([Message(topic, b"%d" % number) for topic in topics])
            await until(lambda: len(handled.times) == (number + 1) * len(topics))  # noqa: B023
        assert {event.topic for event in recorder.of("on_error")} <= {
            name for topic in topics[::5] for name in (topic, retry_stream(topic, "g"))
        }


async def test_a_broken_connection_loses_nothing_of_those_who_share_it(own_server: RunningServer) -> None:
    topics, handled = names(), Handled()
    published = 0
    with own_server.client() as admin:

        def kill_readers() -> None:
            for client in admin.client_list():
                if "b" in client["flags"]:  # blocked
                    admin.client_kill_filter(_id=client["id"], skipme=True)

        async with StreamBus(RedisBackend(own_server.url), quick()) as bus, subscribed(bus, topics, handled):
            for number in range(12):
                await bus.publish_batch([Message(topic, b"%d" % number) for topic in topics])
                published += len(topics)
                await to_thread.run_sync(kill_readers)
            await until(lambda: len(handled.times) == published)
            assert set(handled.times.values()) == {1}


async def test_an_entry_for_a_member_that_could_not_wait_is_released(
    server: RunningServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The member was cancelled, and its shielded second was over before the server answered."""
    monkeypatch.setattr("anybus.backends.redis._shared_reader._SHIELDED", 0.0)
    harness = RedisHarness(server)
    streams = [f"{topic}.{number}" for number in range(FEW + 1)]
    async with harness.make_backend() as backend, anyio.create_task_group() as tasks:
        assert isinstance(backend, RedisBackend)
        readers = backend._taking._readers
        for stream in streams:
            await backend.create_group(stream, "g", "0")
        scopes = [anyio.CancelScope() for _ in streams]

        async def read(stream: str, scope: anyio.CancelScope) -> None:
            with scope:
                await backend.read_new(stream, "g", "c", count=1, timeout=SOON)

        for stream, scope in zip(streams, scopes, strict=True):
            tasks.start_soon(read, stream, scope)

        def named() -> int:
            found = [reader for pool in readers._pools.values() for reader in pool.shared]
            return sum(len(reader._read.waits) for reader in found if reader._read is not None)

        await until(lambda: named() == len(streams))
        [shared] = [r for pool in readers._pools.values() for r in pool.shared if len(r.members) == 2]
        assert shared._read is not None
        _, follower = (streams.index(name.decode()) for name in shared._read.waits)
        monkeypatch.setattr(shared, "_end", ignore)  # the server is not asked to answer
        scopes[follower].cancel()
        await until(lambda: len(shared._waits) == 1)
        await backend.publish(streams[follower], Message(streams[follower]))
        await until(lambda: returned(harness, streams[follower]))
        monkeypatch.undo()
        tasks.cancel_scope.cancel()


def ignore(read: object) -> None:
    return


def nobody(now: float, tick: float) -> list[object]:
    return []


async def returned(harness: RedisHarness, stream: str) -> bool:
    return [entry.consumer for entry in await harness.pending(stream, "g")] == [RETURNED]


def counted_passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    passes: Counter[str] = Counter()
    redeliver = Taking.redeliver

    async def counted(self: Taking, stream: str, *args: Any, **more: Any) -> Any:
        passes[stream] += 1
        return await redeliver(self, stream, *args, **more)

    monkeypatch.setattr(Taking, "redeliver", counted)
    return passes


async def is_quiet(bus: StreamBus, topic: str) -> None:
    def quiet() -> bool:
        posts = [post for post in taking(bus).watch._posts.values() if post.stream == topic]
        return bool(posts) and not any(post.busy for post in posts) and posts[0].due is not None

    await until(quiet, "the watch knows that nothing is pending")


async def test_a_quiet_group_costs_no_passes(
    server: RunningServer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, handled = counted_passes(monkeypatch), Handled()
    async with (
        StreamBus(RedisBackend(server.url), quick(claim_idle_timeout=HOUR)) as bus,
        subscribed(bus, [topic], handled),
    ):
        await is_quiet(bus, topic)
        before = passes[topic]
        rounds = 0
        watch = taking(bus).watch
        watched = watch._round

        async def counted(tick: float) -> None:
            nonlocal rounds
            await watched(tick)
            rounds += 1

        monkeypatch.setattr(watch, "_round", counted)
        await until(lambda: rounds >= 20)
        assert passes[topic] == before
        await bus.publish(Message(topic, b"x"))
        await until(lambda: len(handled.times) == 1)


async def test_in_a_quiet_group_what_is_released_is_taken_soon(server: RunningServer, topic: str) -> None:
    """The watch does not know yet that anything is pending: the next check is due in an hour."""
    handled, harness = Handled(), RedisHarness(server)
    options = quick(claim_idle_timeout=HOUR)
    async with (
        harness.make_backend() as peer,
        StreamBus(RedisBackend(server.url), options) as bus,
        subscribed(bus, [topic], handled) as [subscription],
    ):
        await is_quiet(bus, topic)
        subscription.pause()
        await until(lambda: waiting_members(bus) == 0)
        await bus.publish(Message(topic, b"x"))
        (entry,) = await peer.read_new(topic, "g", "peer", count=1, timeout=SOON)
        subscription.resume()
        await peer.release(topic, "g", "peer", [entry.id])
        with anyio.fail_after(SOON):
            await until(lambda: len(handled.times) == 1)
        with server.client() as admin:

            def is_clear() -> bool:
                return not admin.exists(waiting(topic, "g"))

            await until(lambda: to_thread.run_sync(is_clear), "the mark is removed when nothing waits any more")


async def test_in_a_quiet_group_the_entries_of_a_dead_member_are_taken(server: RunningServer, topic: str) -> None:
    handled, harness = Handled(), RedisHarness(server)
    async with (
        harness.make_backend() as dead,
        StreamBus(RedisBackend(server.url), quick(claim_idle_timeout=1.0)) as bus,
        subscribed(bus, [topic], handled) as [subscription],
    ):
        await is_quiet(bus, topic)
        subscription.pause()
        await until(lambda: waiting_members(bus) == 0)
        await bus.publish(Message(topic, b"x"))
        assert await dead.read_new(topic, "g", "dead", count=1, timeout=SOON)
        subscription.resume()
        await until(lambda: len(handled.times) == 1)


async def test_in_a_quiet_group_what_is_delayed_is_handled_when_it_is_due(server: RunningServer, topic: str) -> None:
    handled = Handled()
    async with StreamBus(RedisBackend(server.url), quick(claim_idle_timeout=HOUR)) as bus:
        async with subscribed(bus, [topic], handled):
            await is_quiet(bus, topic)
            await bus.backend.publish_later(topic, Message(topic, b"later"), delay=0.3)
            await until(lambda: len(handled.times) == 1)


async def test_in_a_quiet_group_retries_that_a_peer_could_not_take_are_taken(server: RunningServer, topic: str) -> None:
    """A peer's pass appended them to the retry stream, had room for one, and made no other pass."""
    handled, harness = Handled(), RedisHarness(server)
    retries = retry_stream(topic, "g")
    async with (
        harness.make_backend() as peer,
        StreamBus(RedisBackend(server.url), quick(claim_idle_timeout=HOUR)) as bus,
        subscribed(bus, [topic], handled) as [subscription],
    ):
        await is_quiet(bus, topic)
        subscription.pause()
        for payload in (b"1", b"2", b"3"):
            await peer.publish_later(retries, Message(topic, payload), delay=0)
        assert isinstance(peer, RedisBackend)
        taken = await peer.redeliver(topic, retries, "g", "peer", min_idle=HOUR, count=1)
        assert len(taken.retries) == 1
        subscription.resume()
        await until(lambda: len(handled.times) == 2)


@pytest.mark.parametrize("how", ["retried", "replayed", "published"])
async def test_in_a_quiet_group_what_comes_to_the_retry_stream_at_once_is_handled_soon(
    server: RunningServer, topic: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry without a backoff, a dead letter that goes back to its group, an entry that was appended by hand."""
    handled: list[int] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.state.attempt)
        if len(handled) == 1 and how == "retried":
            await delivery.retry("again", delay=0)
        elif len(handled) == 1 and how == "replayed":
            await delivery.nack("bad")

    async with StreamBus(RedisBackend(server.url), quick(claim_idle_timeout=HOUR)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await is_quiet(bus, topic)
            watch = taking(bus).watch
            monkeypatch.setattr(watch, "_take_turns", nobody)  # no check helps
            if how == "published":
                await bus.backend.publish(retry_stream(topic, "g"), Message(topic))
                await until(lambda: len(handled) == 1)
                return
            await bus.publish(Message(topic))
            if how == "replayed":
                await until(lambda: subscription.statistics().dead_lettered == 1)
                letters = bus.dead_letters(topic, group="g")
                await letters.replay(to="group")
            await until(lambda: len(handled) == 2)


async def test_a_look_finds_the_groups_for_which_a_pass_would_find_something(server: RunningServer) -> None:
    topics = names(37)
    due, later, left = topics[0], topics[17], topics[36]
    keys = [key for topic in topics for key in (delayed(topic), delayed(retry_stream(topic, "g")), waiting(topic, "g"))]
    with server.client() as admin:

        def look() -> Any:
            admin.zadd(delayed(due), {"x": 1})
            admin.zadd(delayed(retry_stream(later, "g")), {"x": 2**50})
            admin.zadd(waiting(left, "g"), {"x": 0})
            return admin.eval(LOOK.source, len(keys), *keys, 1000)

        assert await to_thread.run_sync(look) == [[1, 37], [[1, 0]]]


async def test_many_members_of_a_backend_that_fails_go_on_when_it_works_again(own_server: RunningServer) -> None:
    topics, handled = names(), Handled()
    with own_server.client() as admin:
        async with StreamBus(RedisBackend(own_server.url), quick()) as bus, subscribed(bus, topics, handled):
            await all_wait(bus)

            def break_all() -> None:
                admin.client_kill_filter(_type="normal", skipme=True)

            for number in range(3):
                await to_thread.run_sync(break_all)
                published = False
                while not published:
                    with suppress(BackendError):
                        outcome = await bus.publish_batch([Message(topic, b"%d" % number) for topic in topics])
                        published = outcome.all_ok
                await until(lambda: len(handled.times) == (number + 1) * len(topics))  # noqa: B023
