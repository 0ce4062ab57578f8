"""At most once is never twice: not after a lost group, and not after an acknowledgement whose reply was lost.

Specification (DESIGN.md, sections 4 and 5, ``guarantee="at-most-once"``): a message is acknowledged before its handler
starts, and is handled by at most one handler, once. A lost group is made again at the end of its stream, and that is
said. An acknowledgement that comes back as not ours after a try whose reply was lost may have been ours or a peer's:
no handling follows it.
"""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import to_thread
from harness import SOON, Harness, Recorder, nothing_pending, quick, until
from servers import RunningServer

from anybus import BackendError, Delivery, Message, Reject, StreamBus, SubscriptionConfig
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._fence_scripts import TOGETHER

LOTS = 2 * TOGETHER
"""More than enough entries to be acknowledged together."""

BROKEN = BackendError("the connection broke", may_have_happened=True)


@pytest.mark.parametrize("lost", ["group", "stream"])
async def test_a_lost_group_is_made_again_where_nothing_comes_twice(harness: Harness, topic: str, lost: str) -> None:
    backend = harness.make_backend()
    handled: list[str] = []
    recorder = Recorder()

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)
        if delivery.message.key == "rejected":
            raise Reject("no")

    async with StreamBus(backend, quick(recorder, claim_idle_timeout=60)) as bus:
        # A peer that died with the first entry keeps the group's floor below all the others.
        await backend.create_group(topic, "g", "0")
        await backend.publish(topic, Message(topic, key="of-another-member"))
        await backend.read_new(topic, "g", "another", count=1, timeout=0)
        config = SubscriptionConfig(topic, "g", guarantee="at-most-once")
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish_batch([Message(topic, key=key) for key in ("one", "rejected", "two")])
            await until(lambda: len(handled) == 3 and subscription.statistics().dead_lettered == 1)
            if lost == "group":
                await harness.delete_group(topic, "g")
            else:
                await harness.delete_stream(topic)
            await until(lambda: any(event.topic == topic for event in recorder.of("on_group_made_again")))
            await bus.publish(Message(topic, key="after"))
            await until(lambda: "after" in handled)
            await until(lambda: subscription.statistics().held == 0)
            await nothing_pending(harness, topic, "g")
    assert sorted(handled) == ["after", "one", "rejected", "two"]
    assert len(await harness.entries(f"{topic}.dead")) == 1
    [event] = [event for event in recorder.of("on_group_made_again") if event.topic == topic]
    assert event.detail is not None
    assert event.detail.startswith("recreated at $, the end")


async def test_what_waits_when_the_group_is_lost_is_not_handled_since_a_peer_may_have_it(
    harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    handled: list[str] = []
    recorder = Recorder()

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)
        if delivery.message.key == "first":
            await harness.delete_group(topic, "g")
            await until(lambda: any(event.topic == topic for event in recorder.of("on_group_made_again")))

    async with StreamBus(backend, quick(recorder, claim_idle_timeout=60)) as bus:
        await bus.publish_batch([Message(topic, key="first"), Message(topic, key="second")])
        config = SubscriptionConfig(
            topic, "g", guarantee="at-most-once", max_in_flight=1, max_pending_acks=8, group_start_id="0"
        )
        async with bus.subscribe(config, handler) as subscription:
            await until(lambda: subscription.statistics().leases_lost == 1)
            await bus.publish(Message(topic, key="third"))
            await until(lambda: "third" in handled)
    assert handled == ["first", "third"]


@pytest.mark.parametrize("by", ["the first try", "a peer"])
async def test_an_ack_first_that_is_refused_after_a_try_whose_reply_was_lost_is_not_followed_by_a_handling(
    harness: Harness, topic: str, by: str
) -> None:
    backend = harness.make_backend()
    real: Any = backend
    transfer_many = real.transfer_many
    handled: list[str] = []
    recorder = Recorder()

    async def reply_lost(*args: Any) -> Any:
        real.transfer_many = transfer_many
        if by == "the first try":
            await transfer_many(*args)
        else:
            [taken] = await backend.reclaim_idle(topic, "g", "peer", min_idle=0, count=1)
            await backend.ack_many(topic, "g", [taken.id], consumer="peer")
        raise BROKEN

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(recorder, claim_idle_timeout=60)) as bus:
            config = SubscriptionConfig(topic, "g", guarantee="at-most-once", group_start_id="0")
            real.transfer_many = reply_lost
            async with bus.subscribe(config, handler) as subscription:
                await bus.publish(Message(topic, key="one"))
                await until(lambda: subscription.statistics().leases_lost == 1)
                await bus.publish(Message(topic, key="two"))
                await until(lambda: "two" in handled)
                assert subscription.statistics().held == 0
    assert handled == ["two"]
    assert [event.detail for event in recorder.of("on_error", "ack-flush")] == [
        "settling 1 entries",
        "the reply to its acknowledgement was lost: it is not handled",
    ]


async def test_an_ack_first_that_never_arrived_is_repeated_and_its_message_handled_once(
    harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    real: Any = backend
    transfer_many = real.transfer_many
    handled: list[str] = []
    tries = 0

    async def never_arrived(*args: Any) -> Any:
        nonlocal tries
        tries += 1
        real.transfer_many = transfer_many
        raise BROKEN

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)
        assert await harness.pending(topic, "g") == []

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=60)) as bus:
        config = SubscriptionConfig(topic, "g", guarantee="at-most-once", group_start_id="0")
        real.transfer_many = never_arrived
        async with bus.subscribe(config, handler) as subscription:
            await bus.publish(Message(topic, key="one"))
            await until(lambda: subscription.statistics().handled == 1)
    assert handled == ["one"]
    assert tries == 1


async def test_an_accepted_message_that_a_group_made_again_by_a_peer_brings_back_is_not_handled_again(
    harness: Harness, topic: str
) -> None:
    """The peer knows of no guarantee but its own, and begins at the floor."""
    backend = harness.make_backend()
    handled: list[str] = []
    recorder = Recorder()

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    async def by_a_peer(stream: str, group: str, start_id: str = "$") -> bool:
        await create_group(stream, group, "0")
        return False

    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(recorder, claim_idle_timeout=60)) as bus:
            config = SubscriptionConfig(topic, "g", guarantee="at-most-once", group_start_id="0")
            async with bus.subscribe(config, handler) as subscription:
                create_group: Any = backend.create_group
                backend.create_group = by_a_peer  # type: ignore[method-assign]
                await bus.publish_batch([Message(topic, key="one"), Message(topic, key="two")])
                await until(lambda: len(handled) == 2)
                await harness.delete_group(topic, "g")
                await until(lambda: subscription.statistics().received == 4)
                await nothing_pending(harness, topic, "g")
                await until(lambda: subscription.statistics().held == 0)
    assert sorted(handled) == ["one", "two"]


async def test_of_many_that_somebody_else_took_and_settled_unseen_none_is_handled(
    server: RunningServer, topic: str
) -> None:
    """By XCLAIM, which leaves no note. A batch of acknowledgements would not notice that."""
    backend = RedisBackend(server.url)
    real: Any = backend
    transfer_many = real.transfer_many
    handled: list[str] = []

    def take_all() -> None:
        client: Any
        with server.client() as client:
            ids = [item["message_id"] for item in client.xpending_range(topic, "g", "-", "+", 100)]
            client.xclaim(topic, "g", "somebody-else", 0, ids[:LOTS])
            assert client.xack(topic, "g", *ids[:LOTS]) == LOTS

    async def after_somebody_else(*args: Any) -> Any:
        real.transfer_many = transfer_many
        await to_thread.run_sync(take_all)
        return await transfer_many(*args)

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=600)) as bus:
        await bus.publish_batch([Message(topic, key=str(number)) for number in range(LOTS + 1)])
        config = SubscriptionConfig(topic, "g", guarantee="at-most-once", group_start_id="0", max_in_flight=2 * LOTS)
        real.transfer_many = after_somebody_else
        async with bus.subscribe(config, handler) as subscription:
            await until(lambda: subscription.statistics().leases_lost == LOTS)
            await until(lambda: subscription.statistics().held == 0)
    assert handled == [str(LOTS)]
