"""``delivery.ack(publish=[...])``: what a handler has produced is published with its acknowledgement.

The specification, on memory and on a server:

- The messages are appended, in order, in the same step as the acknowledgement: either all of it has happened or
  nothing. So a message that is handled again has published nothing, and one whose acknowledgement was accepted is
  not handled again.
- If the entry is no longer ours, nothing is published, and ``LeaseLostError`` says so. The message is handled anew then.
- Messages are checked at the door, as by ``bus.publish``. If a message is refused, or the server fails, the delivery is
  unsettled again.
- It is a settlement by hand, in every ack mode but ``auto-on-receive``, where the message is acknowledged already.
- Where the backend cannot do it in one step, the messages are published first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from harness import SOON, Harness, MemoryHarness, Recorder, StepByStep, nothing_pending, quick, uids, until
from servers import RunningServer

import anybus
from anybus import (
    AlreadySettledError,
    BackendError,
    Delivery,
    EventBusError,
    JsonCodec,
    LeaseLostError,
    Message,
    StreamBus,
    SubscriptionConfig,
    ValidationError,
)
from anybus.abc import StreamBackend, TransferItem


def products(topic: str, count: int = 3) -> list[Message]:
    """Messages for two topics in turn."""
    return [Message(f"{topic}.{'even' if number % 2 == 0 else 'odd'}", str(number).encode()) for number in range(count)]


async def published(harness: Harness, topic: str) -> list[list[bytes]]:
    """The payloads of those two topics."""
    return [
        [message.payload for _, message, _ in await harness.entries(f"{topic}.{name}") if message is not None]
        for name in ("even", "odd")
    ]


ALL = [[b"0", b"2"], [b"1"]]
NOTHING: list[list[bytes]] = [[], []]


class Failing(StepByStep):
    """Fails at transfers, before or after they are done.

    :ivar before: so many fail before anything is done,
    :ivar after: so many after it was done: the reply is lost.
    """

    def __init__(self, inner: Any, *, before: int = 0, after: int = 0) -> None:
        super().__init__(inner)
        self.before = before
        self.after = after

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[list[str] | EventBusError | None]:
        if self.before > 0:
            self.before -= 1
            raise BackendError("down", may_have_happened=False, can_pass=True)
        results = await super().transfer_many(stream, group, consumer, items)
        if self.after > 0:
            self.after -= 1
            raise BackendError("the link broke", may_have_happened=True, can_pass=True)
        return results


@pytest.mark.parametrize("mode", ["auto-on-handler-success", "manual"])
async def test_what_a_handler_produced_is_published_with_its_acknowledgement(
    harness: Harness, topic: str, mode: Any
) -> None:
    recorder = Recorder()

    async def handler(delivery: Delivery) -> None:
        await delivery.ack(publish=products(topic))
        # It has returned: the server has all of it.
        assert await harness.pending(topic, "g") == []
        assert await published(harness, topic) == ALL

    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", ack_mode=mode), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
            await until(lambda: subscription.statistics().in_flight == 0)
            assert subscription.statistics().failed == 0
    assert recorder.of("on_error") == []
    assert [event.detail for event in recorder.of("on_settled")] == ["acked"]
    told = [(event.topic, event.message_id) for event in recorder.of("on_published")[1:]]
    stored = {name: [entry_id for entry_id, _, _ in await harness.entries(name)] for name in {t for t, _ in told if t}}
    assert told == [
        (f"{topic}.even", stored[f"{topic}.even"][0]),
        (f"{topic}.odd", stored[f"{topic}.odd"][0]),
        (f"{topic}.even", stored[f"{topic}.even"][1]),
    ]


async def test_a_pulled_delivery_publishes_with_its_acknowledgement(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
                await delivery.ack(publish=iter(products(topic)))
            await nothing_pending(harness, topic, "g")
    assert await published(harness, topic) == ALL


async def test_nothing_to_publish_is_a_plain_acknowledgement(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                await (await deliveries.receive()).ack(publish=[])
            await nothing_pending(harness, topic, "g")


async def test_a_message_keeps_all_that_it_was_made_with(harness: Harness, topic: str) -> None:
    message = Message(f"{topic}.made", b"payload", key="42", kind="Made", headers={"traceparent": "t", "x": "y"})

    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                await (await deliveries.receive()).ack(publish=[message])
    [(_, stored, _)] = await harness.entries(f"{topic}.made")
    assert stored == message.replace(occurred_at=stored.occurred_at if stored else None)


async def test_a_message_that_is_handled_again_publishes_nothing_twice(harness: Harness, topic: str) -> None:
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        await delivery.ack(publish=products(topic))

    async with StreamBus(Failing(harness.make_backend(), before=1), quick(Recorder())) as bus:
        # The error comes out of the handler, so this attempt has failed. (Its own transfer, the retry, works.)
        config = SubscriptionConfig(topic, "g", retry_backoff=0.0)
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert attempts == [1, 2]
    assert await published(harness, topic) == ALL


async def test_after_an_error_the_delivery_is_unsettled_and_a_second_try_publishes_once(
    harness: Harness, topic: str
) -> None:
    async def handler(delivery: Delivery) -> None:
        with pytest.raises(BackendError):
            await delivery.ack(publish=products(topic))
        assert await published(harness, topic) == NOTHING
        await delivery.ack(publish=products(topic))

    async with StreamBus(Failing(harness.make_backend(), before=1), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
            assert subscription.statistics().failed == 0
    assert await published(harness, topic) == ALL


async def test_a_second_try_after_a_lost_reply_publishes_nothing_twice(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        with pytest.raises(BackendError) as caught:
            await delivery.ack(publish=products(topic))
        assert caught.value.may_have_happened
        await delivery.ack(publish=products(topic))

    async with StreamBus(Failing(harness.make_backend(), after=1), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert await published(harness, topic) == ALL


@pytest.mark.parametrize("failures", [0, 1, 2])
async def test_cancelled_while_the_server_is_asked_it_is_seen_through(
    harness: Harness, topic: str, failures: int
) -> None:
    """Also where the first try fails in the very moment of the cancellation, and the handler returns as if nothing was."""
    backend = Failing(harness.make_backend(), before=failures)

    async def handler(delivery: Delivery) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await delivery.ack(publish=products(topic))

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=30.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert backend.before == 0
    assert await published(harness, topic) == ALL


class Refusing(Failing):
    """Takes nothing of a handler's, for good."""

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[list[str] | EventBusError | None]:
        if any(output.stream.endswith((".even", ".odd")) for _, outputs in items for output in outputs):
            await anyio.lowlevel.checkpoint()
            return [BackendError("no stream", may_have_happened=False, can_pass=False) for _ in items]
        return await super().transfer_many(stream, group, consumer, items)


async def test_cancelled_and_then_refused_for_good_its_handling_has_failed(harness: Harness, topic: str) -> None:
    """Nobody is there any more who could hear of it, and trying it again for ever would hold the message for ever."""

    async def handler(delivery: Delivery) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await delivery.ack(publish=products(topic))

    config = SubscriptionConfig(topic, "g", max_retry=1, retry_backoff=0.0)
    async with StreamBus(Refusing(harness.make_backend()), quick(Recorder(), claim_idle_timeout=30.0)) as bus:
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().dead_lettered == 1)
            assert subscription.statistics().retried == 1
            assert subscription.statistics().handled == 0
    [(_, letter, _)] = await harness.entries(f"{topic}.dead")
    assert letter is not None
    assert letter.headers["dead-letter-code"] == "retries"
    assert "no stream" in letter.headers["dead-letter-reason"]
    assert await published(harness, topic) == NOTHING


async def steal(backend: StreamBackend, topic: str) -> str:
    """Another consumer takes what is pending."""
    [taken] = await backend.reclaim_idle(topic, "g", "thief", min_idle=0, count=10)
    return taken.id


async def test_what_is_no_longer_ours_publishes_nothing_and_is_handled_anew(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.id)
        if len(handled) == 1:
            await steal(backend, topic)
            with pytest.raises(LeaseLostError):
                await delivery.ack(publish=products(topic))
            assert await published(harness, topic) == NOTHING
            await backend.release(topic, "g", "thief", [delivery.id])
        else:
            await delivery.ack(publish=products(topic))

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=30.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
            assert subscription.statistics().leases_lost == 1
    assert len(handled) == 2
    assert await published(harness, topic) == ALL


async def test_raising_afterwards_is_only_reported(harness: Harness, topic: str) -> None:
    recorder = Recorder()

    async def handler(delivery: Delivery) -> None:
        await delivery.ack(publish=products(topic))
        with pytest.raises(AlreadySettledError):
            await delivery.ack(publish=products(topic))
        raise RuntimeError("late")

    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: len(recorder.of("on_error", "handler")) == 1)
            assert (subscription.statistics().handled, subscription.statistics().failed) == (1, 0)
    assert await published(harness, topic) == ALL


async def test_where_the_message_is_acknowledged_on_receipt_it_is_refused(harness: Harness, topic: str) -> None:
    raised: list[AlreadySettledError] = []

    async def handler(delivery: Delivery) -> None:
        with pytest.raises(AlreadySettledError) as caught:
            await delivery.ack(publish=products(topic))
        raised.append(caught.value)

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", guarantee="at-most-once"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().handled == 1)
    assert "auto-on-receive" in str(raised[0])
    assert "bus.publish" in str(raised[0])
    assert await published(harness, topic) == NOTHING


@pytest.mark.parametrize(
    ("publish", "error", "text"),
    [
        (Message("t"), ValidationError, "publish must be an iterable of anybus.Message"),
        (5, ValidationError, "publish must be an iterable of anybus.Message"),
        (None, ValidationError, "publish must be an iterable of anybus.Message"),
        ([Message("t"), b"payload"], ValidationError, "message must be an anybus.Message"),
        ([Message("t"), Message("t", b"x" * 101)], ValidationError, "at most 100 bytes (max_payload_bytes), not 101"),
    ],
    ids=["a message", "a number", "None", "no message", "too large"],
)
async def test_what_cannot_be_published_is_refused_at_the_door_and_the_delivery_is_unsettled(
    harness: Harness, topic: str, publish: Any, error: type[Exception], text: str
) -> None:
    async with StreamBus(harness.make_backend(), quick(Recorder(), max_payload_bytes=100)) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            await bus.publish(Message(topic))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
                with pytest.raises(error) as caught:
                    await delivery.ack(publish=publish)
                assert text in str(caught.value)
                assert len(await harness.pending(topic, "g")) == 1
                await delivery.ack(publish=products(topic))
    assert await published(harness, topic) == ALL


async def test_many_at_once_come_out_each_with_its_own(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        await delivery.ack(publish=[Message(f"{topic}.even", delivery.message.payload)])

    async with StreamBus(harness.make_backend(), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_in_flight=32), handler) as subscription:
            await bus.publish_batch([Message(topic, str(number).encode()) for number in range(300)])
            await until(lambda: subscription.statistics().handled == 300)
    [even, _] = await published(harness, topic)
    assert sorted(even) == sorted(str(number).encode() for number in range(300))


# --- on a server only


async def test_a_topic_that_is_no_stream_refuses_all_of_it(server: RunningServer, topic: str) -> None:
    client: Any = server.client()
    with client:
        client.set(f"{topic}.odd", "a string")
        async with anybus.connect(server.url, quick(Recorder())) as bus:
            async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
                await bus.publish(Message(topic))
                with anyio.fail_after(SOON):
                    delivery = await deliveries.receive()
                    with pytest.raises(BackendError, match="WRONGTYPE") as caught:
                        await delivery.ack(publish=products(topic))
                    assert not caught.value.may_have_happened
                    assert client.xlen(f"{topic}.even") == 0, "nothing of it was appended"
                    client.delete(f"{topic}.odd")
                    await delivery.ack(publish=products(topic))
        assert (client.xlen(f"{topic}.even"), client.xlen(f"{topic}.odd")) == (2, 1)


async def test_what_is_too_large_once_encoded_is_refused_alone(server: RunningServer, topic: str) -> None:
    errors: list[ValidationError] = []

    async def handler(delivery: Delivery) -> None:
        size = 7 * 1024 * 1024 if delivery.message.key == "large" else 1
        try:
            await delivery.ack(publish=[Message(f"{topic}.even", b"x" * size)])
        except ValidationError as error:
            errors.append(error)
            await delivery.ack()

    async with anybus.connect(server.url, quick(Recorder(), max_payload_bytes=0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish_batch([Message(topic, key=key) for key in ("a", "large", "b")])
            await until(lambda: subscription.statistics().handled == 3)
            assert subscription.statistics().failed == 0
    assert [str(error)[:50] for error in errors] == ["a message must be at most 8388608 bytes when encod"]


class Picky(JsonCodec):
    """Refuses one message in the wrong way."""

    def encode(self, message: Message) -> bytes:
        if message.key == "bad":
            raise TypeError("not mine")
        return super().encode(message)


async def test_what_a_codec_refuses_disturbs_no_neighbour(server: RunningServer, topic: str) -> None:
    failed: list[str] = []
    together = anyio.Event()
    begun: list[str] = []

    async def handler(delivery: Delivery) -> None:
        begun.append(delivery.message.kind)
        if len(begun) == 3:
            together.set()
        await together.wait()
        try:
            await delivery.ack(publish=[Message(f"{topic}.even", key=delivery.message.kind)])
        except EventBusError as error:
            failed.append(str(error))
            await delivery.ack()

    async with anybus.connect(server.url, quick(Recorder()), codec=Picky()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish_batch([Message(topic, kind=kind) for kind in ("good", "bad", "fine")])
            await until(lambda: subscription.statistics().handled == 3)
    assert failed == ["the codec raised TypeError('not mine')"]
    client: Any = server.client()
    with client:
        assert client.xlen(f"{topic}.even") == 2


# --- a backend that cannot do it in one step


class InSteps(StepByStep):
    """Publishes, then acknowledges, as the provided ``transfer`` does."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.features = inner.features - {"atomic_transfer"}
        self.steps: list[str] = []
        self.failing = False
        self.transfer = super(StepByStep, self).transfer  # type: ignore[method-assign]
        self.transfer_many = super(StepByStep, self).transfer_many  # type: ignore[method-assign]

    async def publish(self, stream: str, message: Message) -> str:
        if self.failing:
            raise BackendError("down", may_have_happened=False, can_pass=True)
        entry_id = await super().publish(stream, message)
        self.steps.append(f"published {message.payload.decode()}")
        return entry_id

    async def ack(self, stream: str, group: str, message_id: str) -> None:
        await super().ack(stream, group, message_id)
        self.steps.append("acked")


async def test_where_it_is_not_one_step_the_messages_are_published_first(topic: str) -> None:
    harness = MemoryHarness()
    backend = InSteps(harness.make_backend())
    async with StreamBus(backend, quick(Recorder())) as bus:
        async with bus.deliveries(SubscriptionConfig(topic, "g")) as deliveries:
            await bus.publish(Message(topic, b"first"))
            with anyio.fail_after(SOON):
                delivery = await deliveries.receive()
                backend.failing = True
                with pytest.raises(BackendError, match="down"):
                    await delivery.ack(publish=products(topic))
                assert len(await harness.pending(topic, "g")) == 1
                backend.failing = False
                await delivery.ack(publish=products(topic))
    assert backend.steps == ["published first", "published 0", "published 1", "published 2", "acked"]
    assert uids(await harness.entries(f"{topic}.odd")) != []


@pytest.mark.parametrize("failures", [1, 2])
async def test_a_nack_that_fails_in_the_moment_of_its_cancellation_is_seen_through_too(
    harness: Harness, topic: str, failures: int
) -> None:
    backend = Failing(harness.make_backend(), before=failures)

    async def handler(delivery: Delivery) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await delivery.nack("unwanted")

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=30.0)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: subscription.statistics().dead_lettered == 1)
            assert subscription.statistics().handled == 0
