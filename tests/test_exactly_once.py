"""``guarantee="exactly-once"``: a message is not handled if one with the same key was handled before.

The specification, on memory and on a server:

- The key is ``idempotency_key``, or else the uid. Topic and group are independent of others.
- A message whose key was handled within ``idempotency_window`` is acknowledged unhandled. It is counted as a duplicate,
  and the observer is told.
- A message whose key is being handled by somebody else comes back later, uncounted.
- A failure gives the claim up: the retry is handled. So do a release, a dead letter and the end of the subscription.
- The completion is stored in the step of the acknowledgement, if the store is the backend's own. Messages that are
  published with it are published once for a key.
- With a store of another kind, the key is completed before the entry is acknowledged.
- A claim lasts as long as the handling: it is renewed with the entry's lease. A new owner of the entry takes it over.
- It works for handlers, in manual mode and for pulled deliveries.
- With a ``SqlStore``, the handler's own transaction and the completion are committed together.
- What contradicts the guarantee is refused where it is given.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from acl import user_with
from anyio import to_thread
from harness import QUICK, SOON, Harness, MemoryHarness, Recorder, StepByStep, nothing_pending, quick, until
from refusal import refused
from servers import RunningServer

import anybus
from anybus import (
    AlreadySettledError,
    BackendError,
    Delivery,
    EventBusError,
    LeaseLostError,
    MemoryBackend,
    Message,
    Reject,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
    UnsupportedError,
    ValidationError,
    retry_stream,
)
from anybus.abc import Claim, CompletionKeeper, IdempotencyStore, KeyedTransfer, StreamBackend
from anybus.idempotency import MemoryStore, SqlStore

REDIS_PAGE = Path(__file__).parents[1] / "docs" / "redis.md"


@pytest.fixture
def make_store(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[str], AbstractAsyncContextManager[IdempotencyStore | None]]:
    def make(kind: str) -> AbstractAsyncContextManager[IdempotencyStore | None]:
        if kind == "own":
            return nullcontext(None)
        # To save time: a database with streams in memory, and keys in memory with streams on a server.
        on_server = request.node.callspec.params["harness"] == "server"
        return nullcontext(MemoryStore()) if on_server else SqlStore.sqlite(tmp_path / "keys.sqlite")

    return make


@pytest.fixture(params=["own", "another"])
def store(request: pytest.FixtureRequest, make_store: Any) -> AbstractAsyncContextManager[IdempotencyStore | None]:
    made: AbstractAsyncContextManager[IdempotencyStore | None] = make_store(request.param)
    return made


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message whose key is claimed comes back soon."""
    monkeypatch.setattr("anybus._runtime.claims._LONGEST", 0.1)


def once(topic: str, group: str = "g", **options: Any) -> SubscriptionConfig:
    options.setdefault("retry_backoff", QUICK)
    return SubscriptionConfig(topic, group, guarantee="exactly-once", **options)


def twin(message: Message) -> Message:
    """Another message with the same key."""
    return Message(message.topic, idempotency_key=message.idempotency_key or message.uid)


async def test_a_key_is_handled_once(harness: Harness, topic: str, store: Any) -> None:
    recorder = Recorder()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.idempotency_key or delivery.message.uid)

    first, second = Message(topic, idempotency_key="one"), Message(topic)
    async with store as given, StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(once(topic, idempotency_store=given), handler) as subscription:
            await bus.publish_batch([first, second])
            await until(lambda: subscription.statistics().handled == 2)
            again = [twin(first), twin(second), second, Message(topic, idempotency_key="new")]
            await bus.publish_batch(again)
            await until(lambda: subscription.statistics().handled == 3)
            await until(lambda: subscription.statistics().duplicates == 3)
            await nothing_pending(harness, topic, "g")
    assert sorted(handled) == sorted(["one", second.uid, "new"])
    assert sorted(event.detail or "" for event in recorder.of("on_settled")) == ["acked"] * 3 + ["duplicate"] * 3
    assert recorder.of("on_error") == []


def is_longer(found: Sequence[str], count: int) -> bool:
    return len(found) > count


async def test_the_retry_of_a_message_without_key_and_uid_is_not_taken_for_another_entry(topic: str) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(f"{delivery.message.key} {delivery.state.attempt}")
        if handled == ["1 1", "2 1"]:
            raise LookupError("not yet")

    async with StreamBus(MemoryBackend(), quick()) as bus:
        async with bus.subscribe(once(topic), handler) as subscription:
            for key in ("1", "2"):  # in memory, the retry of the second has the id of the first
                count = len(handled)
                await bus.publish(Message(topic, key=key, uid=""))
                await until(partial(is_longer, handled, count))
            await until(lambda: subscription.statistics().handled + subscription.statistics().duplicates == 2)
    assert handled == ["1 1", "2 1", "2 2"]


async def test_groups_and_topics_are_independent(harness: Harness, topic: str, store: Any) -> None:
    handled: list[tuple[str, str]] = []
    other = f"{topic}.other"

    def handler(group: str) -> Callable[[Delivery], Any]:
        async def handle(delivery: Delivery) -> None:
            handled.append((delivery.message.topic, group))

        return handle

    async with store as given, StreamBus(harness.make_backend(), quick()) as bus:
        async with (
            bus.subscribe(once(topic, "a", idempotency_store=given), handler("a")),
            bus.subscribe(once(topic, "b", idempotency_store=given), handler("b")),
            bus.subscribe(once(other, "a", idempotency_store=given), handler("a")),
        ):
            await bus.publish_batch([Message(name, idempotency_key="k") for name in (topic, other)])
            await until(lambda: len(handled) == 3)
            await nothing_pending(harness, topic, "a", "b")
    assert sorted(handled) == [(topic, "a"), (topic, "b"), (other, "a")]


async def test_a_failure_gives_its_claim_up(harness: Harness, topic: str, store: Any) -> None:
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        if len(attempts) < 3:
            raise LookupError("not yet")

    message = Message(topic)
    async with store as given, StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(once(topic, idempotency_store=given), handler) as subscription:
            await bus.publish(message)
            await until(lambda: subscription.statistics().handled == 1)
            await bus.publish(twin(message))
            await until(lambda: subscription.statistics().duplicates == 1)
            await nothing_pending(harness, topic, "g")
    assert attempts == [1, 2, 3]


async def test_a_message_that_was_given_up_on_is_not_completed(harness: Harness, topic: str, store: Any) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)
        if len(handled) == 1:
            raise Reject("no")

    message = Message(topic)
    async with store as given, StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(once(topic, idempotency_store=given), handler) as subscription:
            await bus.publish(message)
            await until(lambda: subscription.statistics().dead_lettered == 1)
            await bus.publish(message)  # as a replay does
            await until(lambda: subscription.statistics().handled == 1)
    assert handled == [message.uid] * 2


async def test_a_release_gives_its_claim_up(harness: Harness, topic: str, store: Any) -> None:
    handled: list[int] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.state.attempt)
        if len(handled) == 1:
            await delivery.release()
        elif len(handled) == 2:
            await delivery.release(0.01)

    async with store as given, StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(once(topic, idempotency_store=given), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert handled == [1, 1, 1]


async def test_the_end_of_a_subscription_gives_claims_up(harness: Harness, topic: str, store: Any) -> None:
    started = anyio.Event()
    handled: list[str] = []

    async def hangs(delivery: Delivery) -> None:
        started.set()
        await anyio.sleep_forever()

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    message = Message(topic)
    async with store as given, StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(once(topic, idempotency_store=given), hangs) as subscription:
            entry_id = await bus.publish(message)
            with anyio.fail_after(SOON):
                await started.wait()
            subscription.abort()
            await subscription.wait_closed()
        # The same entry would take its claim over anyway. Another message needs a free key.
        await bus.backend.ack(topic, "g", entry_id)
        other = twin(message)
        async with bus.subscribe(once(topic, idempotency_store=given), handler) as subscription:
            await bus.publish(other)
            await until(lambda: subscription.statistics().handled == 1)
            assert subscription.statistics().released == 0
    assert handled == [other.uid]


async def test_a_key_that_is_being_handled_comes_back_later(harness: Harness, topic: str, store: Any) -> None:
    recorder = Recorder()
    started, finish = anyio.Event(), anyio.Event()
    handled: list[str] = []

    async def slow(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)
        started.set()
        await finish.wait()

    message = Message(topic)
    async with store as given, StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(once(topic, idempotency_store=given), slow) as subscription:
            await bus.publish(message)
            with anyio.fail_after(SOON):
                await started.wait()
            await bus.publish(twin(message))
            await until(lambda: subscription.statistics().released >= 2)
            assert handled == [message.uid]
            finish.set()
            await until(lambda: subscription.statistics().duplicates == 1)
            await nothing_pending(harness, topic, "g")
            statistics = subscription.statistics()
    assert handled == [message.uid]
    assert (statistics.handled, statistics.failed, statistics.dead_lettered) == (1, 0, 0)


async def test_where_the_backend_cannot_delay_such_a_message_waits_here(topic: str) -> None:
    backend = StepByStep(MemoryBackend())
    backend.features -= {"delay"}
    finish = anyio.Event()
    handled: list[str] = []

    async def slow(delivery: Delivery) -> None:
        handled.append(delivery.message.key)
        if len(handled) == 1:
            await finish.wait()
            raise LookupError("not yet")

    first = Message(topic, key="first")
    async with StreamBus(backend, quick(Recorder())) as bus:
        async with bus.subscribe(once(topic, idempotency_store=MemoryStore()), slow) as subscription:
            await bus.publish(first)
            await until(lambda: len(handled) == 1)
            await bus.publish(twin(first).replace(key="twin"))
            await until(lambda: subscription.statistics().released >= 1)
            finish.set()
            # The claim is kept while the retry waits here, so the other one is not handled in between.
            await until(lambda: subscription.statistics().duplicates == 1)
            assert subscription.statistics().handled == 1
    assert handled == ["first", "first"]


@pytest.mark.parametrize("kind", ["own", "another"])
async def test_a_new_owner_of_the_entry_takes_the_claim_over(
    harness: Harness, topic: str, kind: str, make_store: Any
) -> None:
    """As after a crash: nobody waits for the claim's lease, and the crash budget counts on."""
    deliveries: list[int | None] = []

    async def handler(delivery: Delivery) -> None:
        deliveries.append(delivery.state.deliveries)

    async with make_store(kind) as given, StreamBus(harness.make_backend(), quick()) as bus:
        store = given
        if store is None:
            assert isinstance(bus.backend, CompletionKeeper)
            store = bus.backend.idempotency_store
        await bus.backend.create_group(topic, "g", "0")
        entry_id = await bus.publish(Message(topic, idempotency_key="k"))
        await bus.backend.read_new(topic, "g", "dead", count=1, timeout=0)
        assert (await store.claim(topic, "g", "k", "dead", entry=entry_id, lease=3600)).state == "claimed"
        await harness.age(topic, "g")
        async with bus.subscribe(once(topic, idempotency_store=given), handler) as subscription:
            await until(lambda: subscription.statistics().handled == 1)
    assert deliveries == [2]


@pytest.mark.parametrize("mode", ["auto-on-handler-success", "manual"])
async def test_it_is_completed_when_it_is_settled_by_hand(harness: Harness, topic: str, mode: Any, store: Any) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)
        await delivery.ack()

    message = Message(topic)
    async with store as given, StreamBus(harness.make_backend(), quick()) as bus:
        config = once(topic, ack_mode=mode, idempotency_store=given)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(message)
            await until(lambda: subscription.statistics().handled == 1)
            await bus.publish(twin(message))
            await until(lambda: subscription.statistics().duplicates == 1)
    assert handled == [message.uid]


async def test_pulled_deliveries(harness: Harness, topic: str, store: Any) -> None:
    first = Message(topic)
    messages = [first, twin(first), Message(topic, key="last")]
    async with store as given, StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.deliveries(once(topic, max_in_flight=1, idempotency_store=given)) as deliveries:
            await bus.publish_batch(messages)
            with anyio.fail_after(SOON):
                one = await deliveries.receive()
                assert one.message.uid == first.uid
                await one.ack()
                two = await deliveries.receive()
                assert two.message.key == "last"
                await two.ack()
            await nothing_pending(harness, topic, "g")


async def test_a_receive_that_is_cancelled_while_it_claims_loses_nothing(topic: str) -> None:
    class Slow(MemoryStore):
        claiming = anyio.Event()

        async def claim(self, *args: Any, **more: Any) -> Claim:
            if not self.claiming.is_set():
                self.claiming.set()
                await anyio.sleep_forever()
            return await super().claim(*args, **more)

    slow = Slow()
    async with StreamBus(MemoryBackend(), quick()) as bus:
        async with bus.deliveries(once(topic, idempotency_store=slow)) as deliveries:
            await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(deliveries.receive)
                    await slow.claiming.wait()
                    tasks.cancel_scope.cancel()
                await (await deliveries.receive()).ack()


class Settling(StepByStep, CompletionKeeper):
    """Passes its backend's own store on, and loses replies.

    :ivar lost: so many replies are lost after the settlement was done.
    """

    def __init__(self, inner: Any, lost: int = 0) -> None:
        super().__init__(inner)
        self.lost = lost

    @property
    def idempotency_store(self) -> IdempotencyStore:
        store: IdempotencyStore = self.inner.idempotency_store
        return store

    async def claim_keys(
        self, topic: str, group: str, consumer: str, items: Sequence[tuple[str, str]], *, lease: float
    ) -> list[Claim]:
        claims: list[Claim] = await self.inner.claim_keys(topic, group, consumer, items, lease=lease)
        return claims

    async def check_key_rights(self, topic: str, group: str) -> None:
        await self.inner.check_key_rights(topic, group)

    async def settle_keyed(
        self, topic: str, stream: str, group: str, consumer: str, items: Sequence[KeyedTransfer], *, window: float
    ) -> list[list[str] | EventBusError | None]:
        results: list[list[str] | EventBusError | None] = await self.inner.settle_keyed(
            topic, stream, group, consumer, items, window=window
        )
        if self.lost:
            self.lost -= 1
            raise BackendError("the link broke", may_have_happened=True, can_pass=True)
        return results


async def test_completion_and_acknowledgement_are_one_step(harness: Harness, topic: str) -> None:
    """The reply to the settlement is lost: the key is completed all the same."""
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    message = Message(topic)
    async with StreamBus(Settling(harness.make_backend(), lost=1), quick(Recorder())) as bus:
        async with bus.subscribe(once(topic), handler) as subscription:
            await bus.publish(message)
            await until(lambda: subscription.statistics().handled == 1)
            await bus.publish(twin(message))
            await until(lambda: subscription.statistics().duplicates == 1)
            await nothing_pending(harness, topic, "g")
    assert handled == [message.uid]


async def test_what_is_published_with_the_acknowledgement_is_published_once(harness: Harness, topic: str) -> None:
    """Two messages with one key, handled at the same time because the claim of the first was lost."""
    first = Message(topic, idempotency_key="k", key="first")
    outputs = f"{{{topic}}}.out"
    both = anyio.Event()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)
        if len(handled) == 2:
            both.set()
        await both.wait()
        await delivery.ack(publish=[Message(outputs, key=delivery.message.key)])

    async with StreamBus(harness.make_backend(), quick()) as bus:
        assert isinstance(bus.backend, CompletionKeeper)
        async with bus.subscribe(once(topic), handler) as subscription:
            await bus.publish(first)
            await until(lambda: len(handled) == 1)
            await bus.backend.idempotency_store.release(topic, "g", "k", subscription.consumer)
            await bus.publish(first.replace(key="second"))
            await until(lambda: subscription.statistics().handled == 2)
            await nothing_pending(harness, topic, "g")
    stored = [message.key for _, message, _ in await harness.entries(outputs) if message is not None]
    if "{" in topic or len(stored) == 1:
        assert len(stored) == 1
    else:  # on a cluster, the output is in another slot: it is appended before
        assert sorted(stored) == ["first", "second"]
    assert sorted(handled) == ["first", "second"]


async def test_with_another_store_a_key_is_completed_before_its_entry_is_acknowledged(
    harness: Harness, topic: str
) -> None:
    """The acknowledgement fails for good, as if the process had died before it: the key is completed."""

    class NoAcks(StepByStep):
        async def ack_many(self, *args: Any, **more: Any) -> list[str]:
            raise BackendError("down", may_have_happened=False, can_pass=True)

    handled: list[str] = []
    keys = MemoryStore()
    message = Message(topic)

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    options = quick(Recorder(), cleanup_timeout=0.1)
    async with StreamBus(NoAcks(harness.make_backend()), options) as bus:
        async with bus.subscribe(once(topic, idempotency_store=keys), handler):
            await bus.publish(message)
            await until(lambda: len(handled) == 1)
    await harness.age(topic, "g")
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(once(topic, idempotency_store=keys), handler) as subscription:
            await until(lambda: subscription.statistics().duplicates == 1)
            await nothing_pending(harness, topic, "g")
    assert handled == [message.uid]


class Failing(MemoryStore):
    """Fails so many times at each method."""

    def __init__(self, times: int, error: Exception) -> None:
        super().__init__()
        self.left: dict[str, int] = dict.fromkeys(("claim", "renew", "complete", "release"), times)
        self.error = error

    def _fail(self, name: str) -> None:
        if self.left[name]:
            self.left[name] -= 1
            raise self.error

    async def claim(self, *args: Any, **more: Any) -> Claim:
        self._fail("claim")
        return await super().claim(*args, **more)

    async def complete(self, *args: Any, **more: Any) -> None:
        self._fail("complete")
        await super().complete(*args, **more)

    async def release(self, *args: Any, **more: Any) -> None:
        self._fail("release")
        await super().release(*args, **more)


async def test_a_store_that_fails_is_asked_again(topic: str) -> None:
    recorder = Recorder()
    handled: list[int] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.state.attempt)
        if delivery.state.attempt == 1:
            raise LookupError("not yet")

    keys = Failing(1, OSError("no route"))
    message = Message(topic)
    async with StreamBus(MemoryBackend(), quick(recorder, claim_idle_timeout=0.9)) as bus:
        async with bus.subscribe(once(topic, idempotency_store=keys), handler) as subscription:
            await bus.publish(message)
            # The claim of the failure could not be given up: the retry waits for its end.
            await until(lambda: subscription.statistics().handled == 1)
            await bus.publish(twin(message))
            await until(lambda: subscription.statistics().duplicates == 1)
    assert handled == [1, 2]
    scopes = [event.scope for event in recorder.of("on_error") if event.scope != "handler"]
    assert sorted(scopes) == ["ack-flush", "ack-flush", "claim"]


async def test_an_error_of_the_store_that_cannot_pass_ends_the_subscription(topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        raise AssertionError("not reached")

    keys = Failing(1, BackendError("no permission", can_pass=False))
    backend = MemoryBackend()

    async def use() -> None:
        async with StreamBus(backend, quick(Recorder())) as bus:
            async with bus.subscribe(once(topic, idempotency_store=keys), handler):
                await bus.publish(Message(topic))
                await anyio.sleep_forever()

    with pytest.raises(BackendError, match="no permission"), anyio.fail_after(SOON):
        await use()
    [pending] = await backend.pending_entries(topic, "g")
    assert pending.deliveries == 0


async def test_an_error_of_the_store_that_cannot_pass_comes_out_of_receive_and_the_message_is_free(topic: str) -> None:
    keys = Failing(1, BackendError("no permission", can_pass=False))
    with anyio.fail_after(SOON):
        async with StreamBus(MemoryBackend(), quick(Recorder())) as bus:
            config = once(topic, idempotency_store=keys, max_in_flight=1)
            async with bus.deliveries(config) as deliveries:
                await bus.publish(Message(topic))
                with pytest.raises(BackendError, match="no permission"):
                    await deliveries.receive()
                delivery = await deliveries.receive()
                assert delivery.message.topic == topic


class Stuck(MemoryStore):
    """A store that blocks a thread, as a database does while somebody else has its lock."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self.is_stuck = anyio.Event()

    async def renew(self, *args: Any, **more: Any) -> None:
        self.is_stuck.set()
        await to_thread.run_sync(self.may_go_on.wait)
        await super().renew(*args, **more)


async def test_leases_are_renewed_while_the_store_is_stuck(topic: str) -> None:
    keys, lease = Stuck(), 0.6

    async def handler(delivery: Delivery) -> None:
        await keys.is_stuck.wait()
        await anyio.sleep(3 * lease)
        keys.may_go_on.set()

    with anyio.fail_after(SOON):
        async with StreamBus(MemoryBackend(), quick(Recorder(), claim_idle_timeout=lease)) as bus:
            async with bus.subscribe(once(topic, idempotency_store=keys), handler) as subscription:
                await bus.publish(Message(topic))
                await until(lambda: subscription.statistics().handled == 1)
                assert subscription.statistics().leases_lost == 0
                assert subscription.statistics().reclaimed == 0


# --- the handler's own transaction


class Shop:
    """A database with a table of effects."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.connect() as connection:
            connection.execute("CREATE TABLE effects (uid TEXT)")
            SqlStore.create_table(connection)

    def connect(self, *, check_same_thread: bool = False) -> sqlite3.Connection:
        return sqlite3.connect(self.path, check_same_thread=check_same_thread, timeout=SOON)

    def effects(self) -> list[str]:
        with self.connect() as connection:
            return [row[0] for row in connection.execute("SELECT uid FROM effects")]

    def store(self) -> SqlStore:
        return SqlStore(self.connect)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "shop.sqlite")


def write(connection: sqlite3.Connection, uid: str) -> None:
    connection.execute("INSERT INTO effects (uid) VALUES (?)", (uid,))


async def test_effect_and_completion_are_committed_together(harness: Harness, topic: str, shop: Shop) -> None:
    attempts: list[str] = []
    connection = shop.connect()
    message = Message(topic)

    async def handler(delivery: Delivery) -> None:
        async with delivery.transaction(connection):
            attempts.append(delivery.message.uid)
            await to_thread.run_sync(write, connection, delivery.message.uid)
            if len(attempts) == 1:
                raise LookupError("rolled back")

    async with shop.store() as keys, StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(once(topic, idempotency_store=keys), handler) as subscription:
            await bus.publish(message)
            await until(lambda: subscription.statistics().handled == 1)
            await bus.publish(twin(message))
            await until(lambda: subscription.statistics().duplicates == 1)
            await nothing_pending(harness, topic, "g")
    connection.close()
    assert len(attempts) == 2
    assert shop.effects() == [message.uid]


async def test_a_handler_that_fails_after_its_transaction_has_succeeded(
    harness: Harness, topic: str, shop: Shop
) -> None:
    recorder = Recorder()
    connection = shop.connect()

    async def handler(delivery: Delivery) -> None:
        async with delivery.transaction(connection):
            await to_thread.run_sync(write, connection, delivery.message.uid)
        with pytest.raises(AlreadySettledError, match="committed"):
            await delivery.retry()
        with pytest.raises(ValidationError, match="publish must be empty"):
            await delivery.ack(publish=[Message(topic)])
        raise LookupError("too late")

    message = Message(topic)
    async with shop.store() as keys, StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(once(topic, idempotency_store=keys), handler) as subscription:
            await bus.publish(message)
            await until(lambda: subscription.statistics().handled == 1)
            await nothing_pending(harness, topic, "g")
            assert subscription.statistics().failed == 0
    connection.close()
    assert shop.effects() == [message.uid]
    assert [event.detail for event in recorder.of("on_error")] == [
        "the handler raised after it had settled its delivery"
    ]


async def test_a_transaction_whose_claim_was_taken_over_changes_nothing(topic: str, shop: Shop) -> None:
    connection = shop.connect()
    seen: list[Exception] = []

    async def handler(delivery: Delivery) -> None:
        if not seen:
            taken = await keys.claim(topic, "g", delivery.message.uid, "other", entry=delivery.id, lease=3600)
            assert taken.state == "claimed"
        try:
            async with delivery.transaction(connection):
                await to_thread.run_sync(write, connection, "never")
        except LeaseLostError as error:
            seen.append(error)
            raise

    async with shop.store() as keys, StreamBus(MemoryBackend(), quick(Recorder())) as bus:
        config = once(topic, idempotency_store=keys, max_retry=0)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().dead_lettered == 1)
    assert not connection.in_transaction
    connection.close()
    assert len(seen) == 1
    assert shop.effects() == []


async def test_a_transaction_is_rolled_back_if_it_is_cancelled(topic: str, shop: Shop) -> None:
    connection = shop.connect()
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        async with delivery.transaction(connection):
            await to_thread.run_sync(write, connection, delivery.message.uid)
            if len(attempts) == 1:
                await anyio.sleep_forever()

    message = Message(topic)
    async with shop.store() as keys, StreamBus(MemoryBackend(), quick(Recorder())) as bus:
        config = once(topic, idempotency_store=keys, handler_timeout=0.2)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(message)
            await until(lambda: subscription.statistics().handled == 1)
    connection.close()
    assert attempts == [1, 2]
    assert shop.effects() == [message.uid]


async def test_connections_that_cannot_be_used_are_refused(topic: str, shop: Shop) -> None:
    errors: list[Exception] = []
    bound, busy, fine = shop.connect(check_same_thread=True), shop.connect(), shop.connect()
    busy.execute("CREATE TEMP TABLE mine (x)")
    busy.execute("INSERT INTO mine VALUES (1)")
    fine.isolation_level = None  # autocommit: the transaction is begun all the same

    async def handler(delivery: Delivery) -> None:
        for connection in (bound, busy, object()):
            try:
                async with delivery.transaction(connection):
                    raise AssertionError("not reached")
            except ValidationError as error:
                errors.append(error)
        async with delivery.transaction(fine):
            await to_thread.run_sync(write, fine, delivery.message.uid)
            with pytest.raises(RuntimeError, match="after its transaction"):
                await delivery.ack()
            with pytest.raises(EventBusError, match="one transaction"):
                async with delivery.transaction(shop.connect()):
                    raise AssertionError("not reached")

    message = Message(topic)
    async with shop.store() as keys, StreamBus(MemoryBackend(), quick()) as bus:
        async with bus.subscribe(once(topic, idempotency_store=keys), handler) as subscription:
            await bus.publish(message)
            await until(lambda: subscription.statistics().handled == 1)
    for connection in (bound, busy, fine):
        connection.close()
    assert ["thread" in str(errors[0]), "open transaction" in str(errors[1]), "DB-API" in str(errors[2])] == [True] * 3
    assert shop.effects() == [message.uid]


async def test_only_a_sql_store_has_transactions(topic: str, shop: Shop) -> None:
    refusals: list[str] = []

    async def handler(delivery: Delivery) -> None:
        try:
            async with delivery.transaction(shop.connect()):
                raise AssertionError("not reached")
        except UnsupportedError as error:
            refusals.append(str(error))

    async with StreamBus(MemoryBackend(), quick()) as bus:
        async with (
            bus.subscribe(once(topic, "a"), handler),
            bus.subscribe(SubscriptionConfig(topic, "b"), handler),
        ):
            await bus.publish(Message(topic))
            await until(lambda: len(refusals) == 2)
    assert any("MemoryStore cannot take part" in text for text in refusals)
    assert any("exactly-once" in text for text in refusals)


# --- at the door


def test_what_contradicts_the_guarantee_is_refused() -> None:
    with refused("ack_mode", "'auto-on-receive'", "unset, 'manual' or 'auto-on-handler-success'"):
        SubscriptionConfig("t", "g", guarantee="exactly-once", ack_mode="auto-on-receive")
    with refused("idempotency_store", "MemoryStore", "unset without guarantee='exactly-once'"):
        SubscriptionConfig("t", "g", idempotency_store=MemoryStore())
    with refused("idempotency_window", "60", "unset without guarantee='exactly-once'"):
        SubscriptionConfig("t", "g", guarantee="at-most-once", idempotency_window=60)
    with refused("idempotency_store", "'redis'", "an anybus.idempotency.IdempotencyStore"):
        once("t", idempotency_store="redis")
    for window in (0, -1, float("nan"), float("inf"), "1 day", True):
        with refused("idempotency_window", repr(window), "a positive number of seconds"):
            once("t", idempotency_window=window)
    with refused("idempotency_window", "7776001", "at most 7776000 seconds (90 days)"):
        once("t", idempotency_window=90 * 86400 + 1)


async def test_a_backend_without_a_store_of_its_own_needs_one(topic: str) -> None:
    backend: StreamBackend = StepByStep(MemoryHarness().make_backend())
    async with StreamBus(backend, StreamBusOptions()) as bus:
        with pytest.raises(UnsupportedError, match="StepByStep has no idempotency store of its own"):
            bus.deliveries(once(topic))
        async with bus.deliveries(once(topic, idempotency_store=MemoryStore())):
            pass


def test_the_retry_stream_has_the_keys_of_its_topic() -> None:
    from anybus.backends.redis._keys import claims, completions  # noqa: PLC0415

    for topic in ("orders", "{orders}.eu", "odd}name"):
        assert completions(retry_stream(topic, "g"), "g") == completions(topic, "g")
        assert claims(retry_stream(topic, "g"), "g") == claims(topic, "g")
    assert completions("orders", "g") == "anybus:{orders}:keys:g"


def documented_rights() -> list[str]:
    """Those of a consumer."""
    blocks = re.findall(r"^```text\n(ACL SETUSER worker.*?)^```", REDIS_PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [word for block in blocks for word in block.split() if word[0] in "+-"]


async def test_the_rights_that_the_docs_name_are_enough(server: RunningServer, topic: str) -> None:
    handled: list[int] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.state.attempt)
        if len(handled) == 1:
            raise LookupError("not yet")

    message = Message(topic)
    async with user_with(server, *documented_rights(), "+zscore", "+hdel") as user:
        config = once(topic, max_retry=3)
        async with anybus.connect(user.url, quick(Recorder())) as bus, bus.subscribe(config, handler) as subscription:
            await bus.publish(message)
            await until(lambda: subscription.statistics().handled == 1)
            await bus.publish(message)
            await until(lambda: subscription.statistics().duplicates == 1)
    assert handled == [1, 2]


@pytest.mark.parametrize(
    ("rights", "missing"),
    [
        ((), "ZSCORE on 'anybus:{TOPIC}:keys:g', HDEL on 'anybus:{TOPIC}:claims:g'"),
        (("+zscore",), "HDEL on 'anybus:{TOPIC}:claims:g'"),
        (("+hdel",), "ZSCORE on 'anybus:{TOPIC}:keys:g'"),
    ],
)
async def test_missing_rights_are_named_when_the_subscription_starts(
    rights: tuple[str, ...], missing: str, server: RunningServer, topic: str
) -> None:
    async def handler(delivery: Delivery) -> None: ...

    expected = f"a subscription needs: {re.escape(missing.replace('TOPIC', topic))} \\(see"
    async with user_with(server, *documented_rights(), *rights) as user, anybus.connect(user.url, quick()) as bus:
        with pytest.raises(BackendError, match=expected) as raised, anyio.fail_after(SOON):
            async with bus.subscribe(once(topic), handler):
                await anyio.sleep_forever()
    assert not raised.value.can_pass
    assert not await to_thread.run_sync(server.client().exists, topic)
    # With another store, the server's rights do not matter.
    async with user_with(server, *documented_rights()) as user, anybus.connect(user.url, quick()) as bus:
        async with bus.subscribe(once(topic, idempotency_store=MemoryStore()), handler):
            pass
