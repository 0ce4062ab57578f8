"""Five methods are enough: a backend that writes only what is required works with the whole bus.

Specification (DESIGN.md, section 2): create_group, publish, read_new, reclaim_idle and ack are to be written, the rest
is provided. ``features`` is empty by default; the bus looks there, falls back or refuses, and says once, in the
``anybus`` logger, what is lost. Retries are held in the process, a malformed entry's ``message`` field is kept as
payload, what is handed back waits for its lease. The provided methods keep contracts of their own: ``publish_many``
keeps the order within a stream, hides no failure and works on at most 32 streams at once; ``transfer`` refuses delays
and raw fields, and otherwise publishes before it acks; ``ack_many`` is a loop; the rest is ``UnsupportedError``.

Also here, since it is about which backend one gets: ``memory://`` is private, ``memory://name`` shared in a loop.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import checkpoint
from harness import HOUR, QUICK, SOON, Recorder, new_topic, quick, until
from servers import RunningServer

from anybus import (
    DROP,
    BackendError,
    Delivery,
    EventBusError,
    GroupLostError,
    LeaseLostError,
    MemoryBackend,
    Message,
    Observer,
    Reject,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
    UnsupportedError,
    connect,
)
from anybus.abc import ClaimedMessage, Feature, FetchedEntry, MalformedEntry, Output, PublishSpec, StreamBackend

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class Group:
    position: int
    pending: dict[int, tuple[str, float]] = field(default_factory=dict[int, tuple[str, float]])
    """By index in the stream: whose it is, and since when."""


class ListBackend(StreamBackend):
    """A list per stream; an entry's id is its index. The five methods, and nothing else."""

    def __init__(self) -> None:
        self.streams: dict[str, list[Message | Mapping[str, bytes]]] = {}
        self.groups: dict[tuple[str, str], Group] = {}
        self.changed = anyio.Event()

    async def create_group(self, stream: str, group: str, start_id: str = "$") -> bool:
        await checkpoint()
        entries = self.streams.setdefault(stream, [])
        if (stream, group) in self.groups:
            return False
        self.groups[stream, group] = Group(len(entries) if start_id == "$" else int(start_id))
        return True

    async def publish(self, stream: str, message: Message) -> str:
        await checkpoint()
        return self.append(stream, message)

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        await checkpoint()
        with anyio.move_on_after(timeout):
            while self.find(stream, group).position >= len(self.streams[stream]):
                if timeout <= 0:
                    return []
                await self.changed.wait()
        state = self.find(stream, group)
        indexes = range(state.position, len(self.streams[stream]))[:count]
        state.position += len(indexes)
        return [self.hand_over(stream, state, index, consumer) for index in indexes]

    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        await checkpoint()
        state = self.find(stream, group)
        now = anyio.current_time()
        idle = [index for index, (_, since) in sorted(state.pending.items()) if now - since >= min_idle]
        return [self.hand_over(stream, state, index, consumer) for index in idle[:count]]

    async def ack(self, stream: str, group: str, message_id: str) -> None:
        await checkpoint()
        self.groups[stream, group].pending.pop(int(message_id), None)

    def append(self, stream: str, entry: Message | Mapping[str, bytes]) -> str:
        entries = self.streams.setdefault(stream, [])
        entries.append(entry)
        self.changed.set()
        self.changed = anyio.Event()
        return str(len(entries) - 1)

    def find(self, stream: str, group: str) -> Group:
        if (stream, group) not in self.groups:
            raise GroupLostError(stream, group)
        return self.groups[stream, group]

    def hand_over(self, stream: str, state: Group, index: int, consumer: str) -> FetchedEntry:
        state.pending[index] = consumer, anyio.current_time()
        entry = self.streams[stream][index]
        if isinstance(entry, Message):
            return ClaimedMessage(str(index), entry)
        return MalformedEntry(str(index), entry, "no message")

    def messages(self, stream: str) -> list[Message]:
        return [entry for entry in self.streams.get(stream, []) if isinstance(entry, Message)]

    def pending(self, stream: str, group: str) -> list[str]:
        return [str(index) for index in self.groups[stream, group].pending]

    def age(self, stream: str, group: str) -> None:
        """Everything that is pending has been so for an hour."""
        pending = self.groups[stream, group].pending
        pending.update({index: (consumer, since - HOUR) for index, (consumer, since) in pending.items()})


def calm(observer: Observer | None = None, **changes: float) -> StreamBusOptions:
    """Quick options, but a lease that a slow machine does not outlast: this backend cannot renew it."""
    return quick(observer, **{"claim_idle_timeout": 30.0, **changes})


@pytest.fixture
def backend() -> ListBackend:
    return ListBackend()


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the bus itself said, errors apart."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "anybus" and record.levelno == logging.WARNING
    ]


# --- the whole bus on five methods


async def test_what_is_published_is_handled_and_acknowledged(backend: ListBackend, topic: str) -> None:
    handled: list[bytes] = []

    async def handler(delivery: Delivery) -> None:
        assert delivery.state.deliveries is None
        assert delivery.state.published_at is None
        handled.append(delivery.message.payload)

    async with StreamBus(backend, calm()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            assert await bus.publish(Message(topic, b"0")) == "0"
            outcome = await bus.publish_batch([Message(topic, str(number).encode()) for number in range(1, 40)])
            assert outcome.results == tuple(str(number) for number in range(1, 40))
            await until(lambda: subscription.statistics().handled == 40)
    assert sorted(handled, key=int) == [str(number).encode() for number in range(40)]
    assert backend.pending(topic, "g") == []


async def test_two_consumers_share_the_work_of_a_group(backend: ListBackend, topic: str) -> None:
    handled: list[bytes] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.payload)
        await checkpoint()

    config = SubscriptionConfig(topic, "g", max_in_flight=2)
    async with StreamBus(backend, calm()) as bus, StreamBus(backend, calm()) as other:
        async with bus.subscribe(config, handler), other.subscribe(config, handler):
            await bus.publish_batch([Message(topic, str(number).encode()) for number in range(50)])
            await until(lambda: not backend.pending(topic, "g") and len(handled) >= 50)
    assert sorted(handled, key=int) == [str(number).encode() for number in range(50)]


async def test_a_message_that_keeps_failing_is_held_for_its_retries_and_then_becomes_a_dead_letter(
    backend: ListBackend, topic: str
) -> None:
    attempts: list[int] = []

    async def fail(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        raise ValueError("no such customer")

    config = SubscriptionConfig(topic, "g", max_retry=2, retry_backoff=QUICK)
    async with StreamBus(backend, calm(Recorder())) as bus:
        async with bus.subscribe(config, fail) as subscription:
            message = Message(topic, b"payload", key="k", headers={"x": "y"})
            entry_id = await bus.publish(message)
            await until(lambda: bool(backend.messages(f"{topic}.dead")))
            await until(lambda: subscription.statistics().held == 0)
            statistics = subscription.statistics()
            assert (statistics.failed, statistics.retried, statistics.dead_lettered) == (3, 2, 1)
            consumer = subscription.consumer
    assert attempts == [1, 2, 3]
    (letter,) = backend.messages(f"{topic}.dead")
    assert (letter.uid, letter.payload, letter.key, letter.headers["x"]) == (message.uid, b"payload", "k", "y")
    assert letter.headers["dead-letter-reason"] == "no such customer"
    assert letter.headers["dead-letter-code"] == "retries"
    assert letter.headers["dead-letter-error-type"] == "builtins.ValueError"
    assert letter.headers["dead-letter-attempts"] == "3"
    assert (letter.headers["dead-letter-topic"], letter.headers["dead-letter-id"]) == (topic, entry_id)
    assert (letter.headers["dead-letter-group"], letter.headers["dead-letter-consumer"]) == ("g", consumer)
    assert backend.pending(topic, "g") == []


async def test_a_retry_that_is_held_does_not_reach_other_groups(backend: ListBackend, topic: str) -> None:
    seen: dict[str, int] = {"fails": 0, "works": 0}

    async def fails_once(delivery: Delivery) -> None:
        seen["fails"] += 1
        if seen["fails"] == 1:
            raise ValueError("once")

    async def works(delivery: Delivery) -> None:
        seen["works"] += 1

    async with StreamBus(backend, calm(Recorder())) as bus:
        async with (
            bus.subscribe(SubscriptionConfig(topic, "fails", retry_backoff=QUICK), fails_once) as first,
            bus.subscribe(SubscriptionConfig(topic, "works"), works),
        ):
            await bus.publish(Message(topic))
            await until(lambda: first.statistics().handled == 1)
    assert seen == {"fails": 2, "works": 1}
    assert len(backend.messages(topic)) == 1


async def test_a_rejected_message_becomes_a_dead_letter_at_once(backend: ListBackend, topic: str) -> None:
    async def reject(delivery: Delivery) -> None:
        raise Reject("not for us")

    async with StreamBus(backend, calm()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), reject):
            await bus.publish(Message(topic))
            await until(lambda: bool(backend.messages(f"{topic}.dead")))
            await until(lambda: not backend.pending(topic, "g"))
    (letter,) = backend.messages(f"{topic}.dead")
    assert (letter.headers["dead-letter-code"], letter.headers["dead-letter-reason"]) == ("rejected", "not for us")


async def test_what_would_become_a_dead_letter_can_be_dropped(backend: ListBackend, topic: str) -> None:
    async def reject(delivery: Delivery) -> None:
        raise Reject("not for us")

    async with StreamBus(backend, calm()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", dead_letter_topic=DROP), reject) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    assert backend.pending(topic, "g") == []
    assert set(backend.streams) == {topic, *(stream for stream in backend.streams if stream.startswith("anybus:"))}


async def test_a_malformed_entry_becomes_a_dead_letter_with_its_bytes_as_payload(
    backend: ListBackend, topic: str
) -> None:
    recorder = Recorder()
    handled: list[bytes] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.payload)

    async with StreamBus(backend, calm(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            await bus.publish(Message(topic, b"before"))
            entry_id = backend.append(topic, {"message": b"not json", "other": b"x"})
            await bus.publish(Message(topic, b"after"))
            await until(lambda: bool(backend.messages(f"{topic}.dead")))
            await until(lambda: not backend.pending(topic, "g") and len(handled) == 2)
    assert sorted(handled) == [b"after", b"before"]
    (letter,) = backend.messages(f"{topic}.dead")
    assert letter.payload == b"not json"
    assert (letter.headers["dead-letter-code"], letter.headers["dead-letter-id"]) == ("malformed", entry_id)
    assert [event.message_id for event in recorder.of("on_error", "read")] == [entry_id]


async def test_a_malformed_entry_whose_dead_letter_cannot_be_published_stays_pending(topic: str) -> None:
    class NoDeadLetters(ListBackend):
        tried = 0

        async def publish(self, stream: str, message: Message) -> str:
            if stream.endswith(".dead"):
                self.tried += 1
                raise BackendError("the disk is full", may_have_happened=False, can_pass=True)
            return await super().publish(stream, message)

    async def handler(delivery: Delivery) -> None: ...

    backend = NoDeadLetters()
    async with StreamBus(backend, calm(Recorder(), cleanup_timeout=0.1)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            entry_id = backend.append(topic, {"message": b"not json"})
            await until(lambda: backend.tried >= 2)
            assert backend.pending(topic, "g") == [entry_id]
    assert backend.pending(topic, "g") == [entry_id]


MANUAL: dict[str, Callable[[Delivery], Awaitable[None]]] = {
    "ack": lambda delivery: delivery.ack(),
    "nack": lambda delivery: delivery.nack("no"),
    "retry": lambda delivery: delivery.retry("again", delay=0.01),
    "release": lambda delivery: delivery.release(),
    "release later": lambda delivery: delivery.release(0.01),
}


@pytest.mark.parametrize("how", MANUAL)
async def test_every_settlement_by_hand_does_what_it_says(how: str, backend: ListBackend, topic: str) -> None:
    seen: list[tuple[str, int]] = []

    async def handler(delivery: Delivery) -> None:
        seen.append((delivery.id, delivery.state.attempt))
        await (MANUAL[how](delivery) if len(seen) == 1 else delivery.ack())

    async with StreamBus(backend, calm(claim_idle_timeout=1)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", ack_mode="manual"), handler) as subscription:
            entry_id = await bus.publish(Message(topic))
            await until(lambda: bool(seen) and not backend.pending(topic, "g"))
            assert subscription.statistics().failed == (1 if how in ("nack", "retry") else 0)
    assert (
        seen
        == {
            "ack": [(entry_id, 1)],
            "nack": [(entry_id, 1)],
            "retry": [(entry_id, 1), (entry_id, 2)],
            "release": [(entry_id, 1), (entry_id, 1)],
            "release later": [(entry_id, 1), (entry_id, 1)],
        }[how]
    )
    assert len(backend.messages(f"{topic}.dead")) == (1 if how == "nack" else 0)


async def test_extending_a_lease_is_refused_where_the_backend_cannot_renew(backend: ListBackend, topic: str) -> None:
    async with StreamBus(backend, calm()) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
            with pytest.raises(UnsupportedError, match="ListBackend cannot renew"):
                await delivery.extend()
            await delivery.ack()
    assert backend.pending(topic, "g") == []


async def test_deliveries_can_be_pulled_and_settled_by_hand(backend: ListBackend, topic: str) -> None:
    async with StreamBus(backend, calm()) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g", max_in_flight=2)) as deliveries:
            await bus.publish_batch([Message(topic, str(number).encode()) for number in range(5)])
            received: list[bytes] = []
            with anyio.fail_after(SOON):
                async for delivery in deliveries:
                    received.append(delivery.message.payload)
                    await delivery.ack()
                    if len(received) == 5:
                        break
    assert received == [b"0", b"1", b"2", b"3", b"4"]
    assert backend.pending(topic, "g") == []


async def test_what_was_pulled_and_not_settled_is_pending_after_the_block_and_comes_back_by_its_lease(
    backend: ListBackend, topic: str
) -> None:
    async with StreamBus(backend, calm(claim_idle_timeout=0.1)) as bus:
        entries: list[str] = []
        for _ in range(2):
            async with bus.deliveries(SubscriptionConfig(topic, "g", group_start_id="0")) as deliveries:
                if not entries:
                    await bus.publish(Message(topic))
                with anyio.fail_after(SOON):
                    entries.append((await deliveries.receive()).id)
            assert backend.pending(topic, "g") == ["0"]
    assert entries == ["0", "0"]


async def test_messages_can_be_acknowledged_on_receipt(backend: ListBackend, topic: str) -> None:
    pending: list[list[str]] = []

    async def handler(delivery: Delivery) -> None:
        pending.append(backend.pending(topic, "g"))
        if delivery.message.payload == b"bad":
            raise Reject("bad")

    async with StreamBus(backend, calm()) as bus:
        config = SubscriptionConfig(topic, "g", ack_mode="auto-on-receive", max_in_flight=1)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, b"good"))
            await until(lambda: subscription.statistics().handled == 1)
            await bus.publish(Message(topic, b"bad"))
            await until(lambda: bool(backend.messages(f"{topic}.dead")))
    assert pending == [[], []]


async def test_a_graceful_end_waits_for_what_is_in_flight_and_leaves_the_rest_pending(
    backend: ListBackend, topic: str
) -> None:
    entered, leave = anyio.Event(), anyio.Event()
    handled: list[bytes] = []

    async def handler(delivery: Delivery) -> None:
        entered.set()
        await leave.wait()
        handled.append(delivery.message.payload)

    config = SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=4)
    async with StreamBus(backend, calm()) as bus:
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish_batch([Message(topic, str(number).encode()) for number in range(3)])
            with anyio.fail_after(SOON):
                await entered.wait()
            await until(lambda: subscription.statistics().waiting == 2)
            subscription.close()
            leave.set()
            with anyio.fail_after(SOON):
                await subscription.wait_closed()
            assert (subscription.statistics().handled, subscription.statistics().held) == (1, 0)
    assert handled == [b"0"]
    assert backend.pending(topic, "g") == ["1", "2"]


async def test_an_entry_of_a_dead_consumer_is_taken_over(backend: ListBackend, topic: str) -> None:
    handled: list[bool] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.state.redelivered)

    await backend.create_group(topic, "g", "0")
    await backend.publish(topic, Message(topic))
    assert len(await backend.read_new(topic, "g", "dead", count=1, timeout=0)) == 1
    backend.age(topic, "g")
    async with StreamBus(backend, calm()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await until(lambda: subscription.statistics().handled == 1)
            assert subscription.statistics().reclaimed == 1
    assert handled == [True]
    assert backend.pending(topic, "g") == []


async def test_a_lost_group_is_made_again_at_the_start_since_this_backend_knows_no_better(
    backend: ListBackend, topic: str
) -> None:
    recorder = Recorder()
    handled: set[bytes] = set()

    async def handler(delivery: Delivery) -> None:
        handled.add(delivery.message.payload)

    async with StreamBus(backend, calm(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            del backend.groups[topic, "g"]
            await bus.publish(Message(topic, b"meanwhile"))
            await until(lambda: handled == {b"meanwhile"})
    assert "recreated at 0" in [event.detail for event in recorder.of("on_group_made_again")]


# --- what is lost is said once

LOST_WITHOUT: dict[Feature, str] = {
    "renew": "cannot renew",
    "release": "cannot release",
    "fence": "cannot check who owns",
    "delivery_count": "cannot count deliveries",
    "atomic_transfer": "atomic",
    "raw": "raw",
    "delay": "cannot delay",
}


async def nobody(delivery: Delivery) -> None:
    """A handler that is never called."""


@pytest.mark.parametrize(("feature", "words"), LOST_WITHOUT.items())
async def test_what_is_lost_without_a_feature_is_said_once_per_bus(
    feature: Feature, words: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Lacking(MemoryBackend):
        features = MemoryBackend.features - {feature}

    for buses in (1, 2):
        async with StreamBus(Lacking(), calm()) as bus:
            for group in ("g", "h"):
                async with bus.subscribe(SubscriptionConfig(topic, group), nobody):
                    pass
        said = [text for text in notices(caplog) if words in text]
        assert len(said) == buses
        assert all("Lacking" in text for text in said)


async def test_a_backend_of_five_methods_hears_each_loss_once_however_many_subscriptions(
    backend: ListBackend, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with StreamBus(backend, calm()) as bus:
        for group in ("g", "h", "i"):
            async with bus.subscribe(SubscriptionConfig(topic, group), nobody):
                pass
    said = notices(caplog)
    assert said
    assert len(said) == len(set(said))
    assert all("ListBackend" in text for text in said)
    for feature in ("renew", "release", "fence", "delivery_count", "delay"):
        assert any(LOST_WITHOUT[feature] in text for text in said)


async def test_where_nothing_is_lost_nothing_is_said(topic: str, caplog: pytest.LogCaptureFixture) -> None:
    async with StreamBus(MemoryBackend(), calm()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), nobody):
            pass
    assert notices(caplog) == []


async def test_without_a_count_there_is_no_crash_budget(backend: ListBackend, topic: str) -> None:
    """An entry that was handed over far too often, by a backend that cannot tell: it is handled all the same."""
    handled = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        handled.set()

    await backend.create_group(topic, "g", "0")
    await backend.publish(topic, Message(topic))
    await backend.read_new(topic, "g", "dead", count=1, timeout=0)
    for _ in range(20):
        await backend.reclaim_idle(topic, "g", "dead", min_idle=0, count=1)
    backend.age(topic, "g")
    async with StreamBus(backend, calm()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_deliveries=4), handler):
            with anyio.fail_after(SOON):
                await handled.wait()


# --- the provided methods


async def test_a_backend_that_lacks_one_of_the_five_cannot_be_made() -> None:
    assert StreamBackend.__abstractmethods__ == {"create_group", "publish", "read_new", "reclaim_idle", "ack"}
    assert ListBackend.features == frozenset()


async def test_publish_many_keeps_the_order_within_each_stream(backend: ListBackend) -> None:
    streams = [new_topic() for _ in range(3)]
    items = [(streams[number % 3], Message(streams[number % 3], str(number).encode()), None) for number in range(30)]
    results = await backend.publish_many(items)
    assert results == [str(number // 3) for number in range(30)]
    for offset, stream in enumerate(streams):
        assert [message.payload for message in backend.messages(stream)] == [
            str(number).encode() for number in range(offset, 30, 3)
        ]


class Picky(ListBackend):
    """Fails on some payloads, each in its own way."""

    async def publish(self, stream: str, message: Message) -> str:
        if message.payload == b"bus":
            raise BackendError("no", may_have_happened=False, can_pass=True)
        if message.payload == b"bug":
            raise KeyError("a bug of the backend")
        return await super().publish(stream, message)


async def test_in_publish_many_one_failure_never_hides_the_others(topic: str) -> None:
    backend, other = Picky(), new_topic()
    bodies = [(topic, b"a"), (topic, b"bus"), (other, b"bug"), (topic, b"b"), (other, b"c")]
    results = await backend.publish_many([(stream, Message(stream, body), None) for stream, body in bodies])
    assert [results[index] for index in (0, 3, 4)] == ["0", "1", "0"]
    assert [message.payload for message in backend.messages(topic)] == [b"a", b"b"]
    assert [message.payload for message in backend.messages(other)] == [b"c"]
    known, bug = results[1], results[2]
    assert isinstance(known, BackendError)
    assert (known.may_have_happened, known.can_pass) == (False, True)
    assert isinstance(bug, EventBusError)
    assert "KeyError" in str(bug)
    assert isinstance(bug.__cause__, KeyError)


async def test_a_batch_through_the_bus_hides_no_failure_either(topic: str) -> None:
    backend = Picky()
    async with StreamBus(backend, calm(Recorder())) as bus:
        outcome = await bus.publish_batch([Message(topic, body) for body in (b"a", b"bug", b"b")])
    assert (outcome.results[0], outcome.results[2]) == ("0", "1")
    assert isinstance(outcome.results[1], BackendError)
    assert outcome.results[1].may_have_happened, "nobody knows how far a bug got"


async def test_publish_many_works_on_thirty_two_streams_at_once_and_no_more() -> None:
    class Slow(ListBackend):
        running: frozenset[str] = frozenset()
        most = 0

        def __init__(self) -> None:
            super().__init__()
            self.gate = anyio.Event()

        async def publish(self, stream: str, message: Message) -> str:
            assert stream not in self.running, "within a stream one follows the other"
            self.running |= {stream}
            self.most = max(self.most, len(self.running))
            await self.gate.wait()
            self.running -= {stream}
            return await super().publish(stream, message)

    backend = Slow()
    streams = [new_topic() for _ in range(50)]
    items = [(stream, Message(stream), None) for stream in streams for _ in range(2)]
    results: list[str | EventBusError] = []

    async def publish() -> None:
        results.extend(await backend.publish_many(items))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        await until(lambda: len(backend.running) == 32)
        await anyio.wait_all_tasks_blocked()
        assert backend.most == 32
        backend.gate.set()
    assert results == ["0", "1"] * 50
    assert backend.most == 32


async def test_publish_many_with_a_spec_goes_by_publish_with_which_is_unsupported(
    backend: ListBackend, topic: str
) -> None:
    results = await backend.publish_many([(topic, Message(topic), PublishSpec()), (topic, Message(topic), None)])
    assert isinstance(results[0], UnsupportedError)
    assert results[1] == "0"


async def test_a_cancelled_publish_many_is_cancelled(topic: str) -> None:
    class Hangs(ListBackend):
        async def publish(self, stream: str, message: Message) -> str:
            await anyio.sleep_forever()
            raise AssertionError

    with anyio.move_on_after(0.01) as scope:
        await Hangs().publish_many([(topic, Message(topic), None)])
    assert scope.cancelled_caught


async def test_ack_many_acknowledges_one_by_one_and_returns_nothing(topic: str) -> None:
    class Counts(ListBackend):
        acked: tuple[str, ...] = ()

        async def ack(self, stream: str, group: str, message_id: str) -> None:
            self.acked += (message_id,)
            await super().ack(stream, group, message_id)

    backend = Counts()
    await backend.create_group(topic, "g", "0")
    for _ in range(3):
        await backend.publish(topic, Message(topic))
    await backend.read_new(topic, "g", "c", count=3, timeout=0)
    assert await backend.ack_many(topic, "g", ["0", "2", "99"], consumer="somebody else") == []
    assert backend.acked == ("0", "2", "99")
    assert backend.pending(topic, "g") == ["1"]


async def test_transfer_publishes_every_output_and_then_acks(topic: str) -> None:
    class Ordered(ListBackend):
        done: tuple[str, ...] = ()

        async def publish(self, stream: str, message: Message) -> str:
            self.done += (f"publish {message.payload.decode()}",)
            return await super().publish(stream, message)

        async def ack(self, stream: str, group: str, message_id: str) -> None:
            self.done += (f"ack {message_id}",)

    backend, other = Ordered(), new_topic()
    outputs = [Output(other, Message(other, b"1")), Output(other, Message(other, b"2"))]
    assert await backend.transfer(topic, "g", "c", "7", outputs) == ["0", "1"]
    assert backend.done == ("publish 1", "publish 2", "ack 7")


async def test_a_transfer_whose_publish_fails_acks_nothing(topic: str) -> None:
    backend = Picky()
    await backend.create_group(topic, "g", "0")
    await backend.publish(topic, Message(topic))
    await backend.read_new(topic, "g", "c", count=1, timeout=0)
    with pytest.raises(BackendError):
        await backend.transfer(topic, "g", "c", "0", [Output(topic, Message(topic, b"bus"))])
    assert backend.pending(topic, "g") == ["0"]


@pytest.mark.parametrize(
    ("delay", "raw"), [(0.5, None), (0.0, {"a": b"b"}), (0.0, {})], ids=["delay", "raw", "raw without fields"]
)
async def test_transfer_refuses_delays_and_raw_fields_before_it_does_anything(
    delay: float, raw: Mapping[str, bytes] | None, backend: ListBackend, topic: str
) -> None:
    await backend.create_group(topic, "g", "0")
    await backend.publish(topic, Message(topic))
    await backend.read_new(topic, "g", "c", count=1, timeout=0)
    outputs = [Output(topic, Message(topic)), Output(topic, Message(topic), delay=delay, raw=raw)]
    with pytest.raises(UnsupportedError, match="ListBackend cannot transfer with a delay or raw fields"):
        await backend.transfer(topic, "g", "c", "0", outputs)
    assert backend.pending(topic, "g") == ["0"]
    assert len(backend.messages(topic)) == 1


async def test_transfer_many_gives_one_result_or_error_per_item(topic: str) -> None:
    backend, other = Picky(), new_topic()
    await backend.create_group(topic, "g", "0")
    for _ in range(3):
        await backend.publish(topic, Message(topic))
    await backend.read_new(topic, "g", "c", count=3, timeout=0)
    items = [(str(index), [Output(other, Message(other, body))]) for index, body in enumerate((b"a", b"bug", b"b"))]
    results = await backend.transfer_many(topic, "g", "c", items)
    assert (results[0], results[2]) == (["0"], ["1"])
    assert isinstance(results[1], BackendError)
    assert backend.pending(topic, "g") == ["1"]


async def test_forgetting_a_consumer_is_nothing(backend: ListBackend, topic: str) -> None:
    await backend.forget_consumer(topic, "no group", "nobody")
    assert backend.streams == {}


UNSUPPORTED: dict[str, Callable[[StreamBackend, str], Awaitable[object]]] = {
    "publish with": lambda backend, topic: backend.publish_with(topic, Message(topic), PublishSpec()),
    "renew": lambda backend, topic: backend.renew(topic, "g", "c", ["0"]),
    "release": lambda backend, topic: backend.release(topic, "g", "c", ["0"]),
    "delay": lambda backend, topic: backend.publish_later(topic, Message(topic), delay=1.0),
    "delay messages": lambda backend, topic: backend.publish_later(
        topic, Message(topic), at=datetime.now(timezone.utc)
    ),
    "cannot delay": lambda backend, topic: backend.cancel_later(topic, "1"),
}


@pytest.mark.parametrize(("words", "call"), UNSUPPORTED.items(), ids=UNSUPPORTED.keys())
async def test_the_rest_is_unsupported_and_says_who_cannot_do_what(
    words: str, call: Callable[[StreamBackend, str], Awaitable[object]], backend: ListBackend, topic: str
) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        await call(backend, topic)
    assert "ListBackend" in str(caught.value)
    assert backend.streams == {}


async def test_a_backend_is_entered_and_left_by_its_bus() -> None:
    class Entered(ListBackend):
        state = "new"

        async def __aenter__(self) -> Self:
            self.state = "entered"
            return self

        async def __aexit__(self, *_: object) -> None:
            self.state = "left"

    backend = Entered()
    async with StreamBus(backend, calm()) as bus:
        assert backend.state == "entered"
        assert bus.backend is backend
    assert backend.state == "left"


class WrongOwner(ListBackend):
    """Says what a fence says, although it has none to offer but this."""

    features = frozenset[Feature]({"fence"})

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        await checkpoint()
        return [message_id for message_id in message_ids if consumer is not None]


async def test_a_feature_that_is_named_is_used_and_the_backends_word_is_taken(topic: str) -> None:
    async with StreamBus(WrongOwner(), calm()) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
            with pytest.raises(LeaseLostError):
                await delivery.ack()


# --- memory:// and memory://name


async def entries_seen(url: str, other_url: str) -> int:
    """How many of one bus's messages another one sees."""
    topic = new_topic()
    async with connect(url) as bus, connect(other_url) as other:
        await bus.publish(Message(topic))
        assert isinstance(other.backend, MemoryBackend)
        return await other.backend.count_entries(topic)


@pytest.mark.parametrize(
    ("one", "other", "seen"),
    [
        ("memory://", "memory://", 0),
        ("memory://name", "memory://name", 1),
        ("memory://name", "memory://other", 0),
        ("memory://name", "memory://", 0),
        ("memory://name", "memory://NAME", 0),
    ],
)
async def test_memory_without_a_name_is_private_and_with_a_name_is_shared(one: str, other: str, seen: int) -> None:
    assert await entries_seen(one, other) == seen


async def test_a_shared_memory_outlives_the_bus_that_used_it_first(topic: str) -> None:
    async with connect("memory://lasting") as bus:
        await bus.publish(Message(topic, b"kept"))
    async with connect("memory://lasting") as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g", group_start_id="0")) as deliveries:
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
            assert delivery.message.payload == b"kept"
            await delivery.ack()


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_shared_memory_ends_with_its_event_loop(loop: str) -> None:
    async def count_and_publish() -> int:
        async with connect("memory://name") as bus:
            assert isinstance(bus.backend, MemoryBackend)
            before = await bus.backend.count_entries("test.shared")
            await bus.publish(Message("test.shared"))
            return before

    assert [anyio.run(count_and_publish, backend=loop) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("url", ["memory://", "memory://name", "redis://"])
def test_a_bus_can_be_made_before_the_event_loop_runs(url: str, request: pytest.FixtureRequest) -> None:
    if url == "redis://":
        server: RunningServer = request.getfixturevalue("server")
        url = server.url
    bus = connect(url)

    async def main() -> str:
        async with bus:
            return await bus.publish(Message("test.early"))

    assert anyio.run(main)
