"""Every point at which a connection can break between a call, the server and its reply, and what comes of it.

The specification is the table: ``cut before`` = the connection breaks before the command reaches the server, ``cut
after`` = the server carries it out and the reply is lost. The bus cannot tell the two apart. For each point the table
says how often the message is handled in each case (its attempts), how it is counted as settled, and where the break is
reported. In every case nothing stays pending, nothing is written twice, and the subscription goes on: a message that is
published afterwards is handled.

At least once, only a message whose retry or release was its handler's own wish is handled a second time. At most once,
a lost reply to the acknowledgement loses the message.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from fake_server import Command
from harness import QUICK, SOON, Recorder, StepByStep, nothing_pending, quick, until
from proxy import Act, CutAfter, CutBefore, Proxy, name_of, proxied
from servers import RedisHarness, RunningServer

from anybus import (
    DROP,
    BackendError,
    Delivery,
    Message,
    Reject,
    Retry,
    StreamBus,
    Subscription,
    SubscriptionConfig,
)
from anybus._failure.copies import retry_stream
from anybus.abc import StreamBackend
from anybus.backends.redis import RedisBackend

LEASE = 60.0
"""Longer than any test: what is found again is found because somebody looks for it."""


class Case:
    """One subscription behind a proxy that cuts once, and what its handler does."""

    def __init__(self, point: Point, server: RunningServer, topic: str, proxy: Proxy, peer: StreamBackend) -> None:
        self.point = point
        self.server = server
        self.topic = topic
        self.proxy = proxy
        self.peer = peer
        self.attempts: list[int] = []
        self.others: list[str] = []
        self.cut = anyio.Event()
        self.recorder = Recorder()

    def arm(self, act: Act) -> None:
        """Cut at the next command of this point."""
        first = True

        def rule(command: Command) -> Act | None:
            nonlocal first
            if first and name_of(command) == self.point.command and self.point.matches(self.topic, command):
                first = False
                self.cut.set()
                return act
            return None

        self.proxy.rule = rule

    async def handler(self, delivery: Delivery) -> None:
        if delivery.message.payload != b"it":
            self.others.append(delivery.message.uid)
            return
        self.attempts.append(delivery.state.attempt)
        assert delivery.state.deliveries == self.point.deliveries
        await self.point.handle(self, delivery)

    @asynccontextmanager
    async def subscribed(self) -> AsyncGenerator[Subscription, None]:
        inner = RedisBackend(self.proxy.url)
        backend = StepByStep(inner) if self.point.steps else inner
        async with StreamBus(backend, quick(self.recorder, claim_idle_timeout=self.point.lease)) as bus:
            async with bus.subscribe(self.point.config(self.topic), self.handler) as subscription:
                yield subscription

    async def publish(self, stream: str | None = None) -> None:
        await self.peer.publish(stream or self.topic, Message(self.topic, b"it"))


# --- what a handler does


async def returns(case: Case, delivery: Delivery) -> None: ...


async def waits_for_renewal(case: Case, delivery: Delivery) -> None:
    await case.cut.wait()
    seen = len(case.proxy.seen)
    await until(lambda: "renew" in case.proxy.seen[seen:])
    assert not delivery.lease_lost


async def fails_once(case: Case, delivery: Delivery) -> None:
    if len(case.attempts) == 1:
        raise Retry


async def rejects(case: Case, delivery: Delivery) -> None:
    raise Reject("no")


async def tried_twice(settle: Callable[[], Awaitable[None]]) -> None:
    """The error comes out, and the delivery is unsettled again."""
    with pytest.raises(BackendError) as caught:
        await settle()
    assert caught.value.may_have_happened
    await settle()


async def acks(case: Case, delivery: Delivery) -> None:
    await tried_twice(delivery.ack)


async def acks_and_publishes(case: Case, delivery: Delivery) -> None:
    await tried_twice(lambda: delivery.ack(publish=[Message(f"{case.topic}.out")]))


async def releases(case: Case, delivery: Delivery) -> None:
    if len(case.attempts) == 1:
        await tried_twice(delivery.release)


async def releases_later(case: Case, delivery: Delivery) -> None:
    if len(case.attempts) == 1:
        await tried_twice(lambda: delivery.release(delay=0.01))


# --- how the message gets there


async def is_there_before(case: Case) -> None:
    await case.peer.create_group(case.topic, "g", "0")
    await case.publish()


async def comes_while_the_read_blocks(case: Case) -> None:
    await case.peer.create_group(case.topic, "g", "0")


async def is_a_retry(case: Case) -> None:
    await case.publish(retry_stream(case.topic, "g"))


async def is_due(case: Case) -> None:
    await case.peer.create_group(case.topic, "g", "0")
    await case.peer.publish_later(case.topic, Message(case.topic, b"it"), delay=0.0)


async def was_a_dead_consumers(case: Case) -> None:
    await is_there_before(case)
    await case.peer.read_new(case.topic, "g", "dead", count=1, timeout=0)
    await case.peer.release(case.topic, "g", "dead", [(await case.peer.pending_entries(case.topic, "g"))[0].id])  # type: ignore[attr-defined]


def always(topic: str, command: Command) -> bool:
    return True


def of_topic(topic: str, command: Command) -> bool:
    return topic.encode() in command


def not_waiting(topic: str, command: Command) -> bool:
    return topic.encode() in command and b"BLOCK" not in command


def blocking(topic: str, command: Command) -> bool:
    return topic.encode() in command and b"BLOCK" in command


def of_retries(topic: str, command: Command) -> bool:
    return retry_stream(topic, "g").encode() in command


Handled = tuple[int, ...]
ONCE: Handled = (1,)


@dataclass(frozen=True)
class Point:
    """A row of the table.

    :ivar command: where the connection breaks...
    :ivar matches: ...of the commands of that name, at which.
    :ivar before: the attempts that are handled if it breaks before the server hears of it...
    :ivar after: ...and if only the reply is lost.
    :ivar counted: the counters that are not zero then, besides ``received``, ``handled`` and ``reclaimed``.
    :ivar scope: where the break is reported; None = nowhere, since nobody waits for the reply, or it was the caller's.
    """

    name: str
    command: str
    matches: Callable[[str, Command], bool] = of_topic
    setup: Callable[[Case], Awaitable[None]] = is_there_before
    handle: Callable[[Case, Delivery], Awaitable[None]] = returns
    before: Handled = ONCE
    after: Handled = ONCE
    counted: dict[str, int] = field(default_factory=dict)
    counted_after: dict[str, int] | None = None
    scope: str | None = None
    deliveries: int = 1
    dead_letters: int = 0
    published: int = 0
    steps: bool = False
    lease: float = LEASE
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, topic: str) -> SubscriptionConfig:
        options: dict[str, Any] = {"group_start_id": "0", **self.options}
        if "guarantee" not in options:
            options["retry_backoff"] = QUICK
        return SubscriptionConfig(topic, "g", **options)


TAKEN = [
    Point("a read that does not wait", "XREADGROUP", not_waiting, scope="read"),
    Point("a read that blocks", "XREADGROUP", blocking, comes_while_the_read_blocks, scope="read"),
    Point("a read that first appends what is due", "move due", setup=is_due, scope="read"),
    Point("a pass that takes a retry", "pass", setup=is_a_retry, scope="reclaim"),
    Point("a pass that takes over", "pass", setup=was_a_dead_consumers, scope="reclaim"),
    Point("a take-over, step by step", "reclaim", setup=was_a_dead_consumers, steps=True, scope="reclaim"),
    Point("a retry's read, step by step", "XREADGROUP", of_retries, is_a_retry, steps=True, scope="reclaim"),
]
HELD = [Point("a renewal", "renew", handle=waits_for_renewal, lease=2.4, scope="renew")]
SETTLED = [
    Point("an automatic ack", "ack", scope="ack-flush"),
    Point("an ack by hand", "ack", handle=acks, scope="ack-flush"),
    Point("an ack that drops", "ack", handle=rejects, counted={"failed": 1, "dead_lettered": 1}, scope="ack-flush",
          options={"dead_letter_topic": DROP}),
    Point("a retry", "transfer", handle=fails_once, before=(1, 2), after=(1, 2), counted={"failed": 1, "retried": 1},
          scope="ack-flush"),
    Point("a dead letter", "transfer", handle=rejects, counted={"failed": 1, "dead_lettered": 1}, dead_letters=1,
          scope="ack-flush"),
    Point("an ack that publishes", "transfer", handle=acks_and_publishes, published=1, scope="ack-flush"),
    Point("a release", "release", handle=releases, before=(1, 1), after=(1, 1), counted={"released": 1},
          scope="ack-flush"),
    Point("a release for later", "transfer", handle=releases_later, before=(1, 1), after=(1, 1),
          counted={"released": 1}, scope="ack-flush"),
    Point("an ack first", "transfer", after=(), counted_after={"leases_lost": 1}, scope="ack-flush",
          options={"guarantee": "at-most-once"}),
]  # fmt: skip
TABLE = [*TAKEN, *HELD, *SETTLED]

CUTS = [pytest.param(CutBefore(), id="cut-before"), pytest.param(CutAfter(), id="cut-after")]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("point", TABLE, ids=lambda point: point.name.replace(" ", "-"))
async def test_what_a_broken_connection_does_at_each_point(
    server: RunningServer, topic: str, point: Point, cut: Act
) -> None:
    harness = RedisHarness(server)
    is_after = isinstance(cut, CutAfter)
    expected = point.after if is_after else point.before
    counted = point.counted_after if is_after and point.counted_after is not None else point.counted
    async with harness.make_backend() as peer, proxied(server.port) as proxy:
        case = Case(point, server, topic, proxy, peer)
        with anyio.fail_after(SOON):
            await point.setup(case)
            case.arm(cut)
            async with case.subscribed() as subscription:
                await case.cut.wait()
                if point.setup is comes_while_the_read_blocks:
                    await case.publish()
                await peer.publish(topic, Message(topic, b"another"))
                await until(lambda: len(case.others) == 1 and len(case.attempts) >= len(expected))
                await nothing_pending(harness, topic, "g")
                await until(lambda: subscription.statistics().held == 0)
                statistics = subscription.statistics()
        assert tuple(case.attempts) == expected
        assert len(case.others) == 1
        names = ("failed", "retried", "dead_lettered", "released", "leases_lost")
        found = {name: getattr(statistics, name) for name in names if getattr(statistics, name)}
        if "released" in counted:
            # A pass that was under way while the entry was released may bring it, in doubt: it is handed back once more.
            found["released"] = min(found.get("released", 0), counted["released"])
        assert found == counted
        assert len(await harness.entries(f"{topic}.dead")) == point.dead_letters
        assert len(await harness.entries(f"{topic}.out")) == point.published
        assert not await harness.entries(retry_stream(topic, "g"))
        assert {event.scope for event in case.recorder.of("on_error")} >= ({point.scope} if point.scope else set())


# --- what is around it: the beginning, the search itself, a pause, the end


@pytest.mark.parametrize("cut", CUTS)
async def test_a_group_whose_making_breaks_is_made_by_the_next_try(server: RunningServer, topic: str, cut: Act) -> None:
    async with RedisHarness(server).make_backend() as peer, proxied(server.port) as proxy:
        case = Case(Point("the group", "XGROUP"), server, topic, proxy, peer)
        case.arm(cut)
        with anyio.fail_after(SOON):
            async with case.subscribed():
                await case.publish()
                await until(lambda: case.attempts == [1])
    assert [event.scope for event in case.recorder.of("on_error")] == ["read"]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("lost", ["a read that blocks", "a pass that takes over"])
async def test_the_search_for_what_a_lost_reply_brought_is_repeated_when_it_breaks_itself(
    server: RunningServer, topic: str, lost: str, cut: Act
) -> None:
    [point] = [point for point in TAKEN if point.name == lost]
    harness = RedisHarness(server)
    async with harness.make_backend() as peer, proxied(server.port) as proxy:
        case = Case(point, server, topic, proxy, peer)
        with anyio.fail_after(SOON):
            await point.setup(case)
            case.arm(CutAfter())
            inner_rule = proxy.rule
            searches = anyio.Event()

            def rule(command: Command) -> Act | None:
                if case.cut.is_set() and not searches.is_set() and name_of(command) == "unseen":
                    searches.set()
                    return cut
                return inner_rule(command)

            proxy.rule = rule
            async with case.subscribed() as subscription:
                await case.cut.wait()
                if point.setup is comes_while_the_read_blocks:
                    await case.publish()
                await searches.wait()
                await until(lambda: bool(case.attempts))
                await nothing_pending(harness, topic, "g")
                await until(lambda: subscription.statistics().held == 0)
    assert case.attempts == [1]


@pytest.mark.parametrize("cut", CUTS)
async def test_what_waits_is_handed_back_by_a_pause_whose_release_breaks_and_comes_again_uncounted(
    server: RunningServer, topic: str, cut: Act
) -> None:
    harness = RedisHarness(server)
    gate = anyio.Event()

    async def waits(case: Case, delivery: Delivery) -> None:
        await gate.wait()

    options = {"max_in_flight": 1, "max_pending_acks": 8}
    async with harness.make_backend() as peer, proxied(server.port) as proxy:
        point = Point("a pause", "release", handle=waits, options=options)
        case = Case(point, server, topic, proxy, peer)
        case.arm(cut)
        with anyio.fail_after(SOON):
            await is_there_before(case)
            await case.publish()
            async with case.subscribed() as subscription:
                await until(lambda: subscription.statistics().waiting == 1)
                subscription.pause()
                await case.cut.wait()
                await until(lambda: subscription.statistics().released == 1)
                subscription.resume()
                gate.set()
                await until(lambda: len(case.attempts) == 2)
                await nothing_pending(harness, topic, "g")
    assert case.attempts == [1, 1]
    assert {event.scope for event in case.recorder.of("on_error")} >= {"ack-flush"}


@pytest.mark.parametrize("cut", CUTS)
async def test_a_consumer_whose_forgetting_breaks_ends_quietly_with_nothing_pending(
    server: RunningServer, topic: str, cut: Act
) -> None:
    harness = RedisHarness(server)
    async with harness.make_backend() as peer, proxied(server.port) as proxy:
        case = Case(Point("the end", "forget"), server, topic, proxy, peer)
        with anyio.fail_after(SOON):
            await is_there_before(case)
            async with case.subscribed() as subscription:
                await until(lambda: case.attempts == [1])
                case.arm(cut)
        assert case.cut.is_set()
        assert await harness.pending(topic, "g") == []
        # A name that stays has nothing pending; a peer removes it.
        expected = {subscription.consumer} if isinstance(cut, CutBefore) else set[str]()
        assert set(await harness.consumers(topic, "g")) <= expected
    assert not case.recorder.of("on_error")
