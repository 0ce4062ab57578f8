"""What was settled here and comes back all the same is acknowledged, and not handled again.

Specification (DESIGN.md, section 4): it comes back because a group was made again below it, or because the reply to its
acknowledgement was lost and a peer gave it back. All that settles counts (acked, retried, dead-lettered, dropped, acked
with what it publishes), and so does what was on its way when the group was lost. What may not have been settled (a
retry whose step the server may never have seen) is handled anew: twice rather than never.
"""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import to_thread
from harness import SOON, Harness, Recorder, nothing_pending, quick, until
from servers import RedisHarness, RunningServer

from anybus import DROP, BackendError, Delivery, LeaseLostError, Message, Reject, Retry, StreamBus, SubscriptionConfig
from anybus._failure.copies import retry_stream
from anybus._runtime.budget import Budget
from anybus._runtime.ledger import Ledger
from anybus.abc import StreamBackend

BROKEN = BackendError("the connection broke", may_have_happened=True)


async def _keep_the_floor_low(backend: StreamBackend, topic: str) -> None:
    """Another member holds the first entry: a group made again begins before it."""
    await backend.create_group(topic, "g", "0")
    await backend.publish(topic, Message(topic, key="of-another-member"))
    await backend.read_new(topic, "g", "another", count=1, timeout=0)


async def _lose_the_group(harness: Harness, topic: str, recorder: Recorder, handled: list[str]) -> None:
    """Until everything that is below the new group's position has come back, and is settled."""
    await harness.delete_group(topic, "g")
    await until(lambda: bool(recorder.of("on_group_made_again")))
    await until(lambda: "of-another-member" in handled)
    await nothing_pending(harness, topic, "g")


# --- a group made again


@pytest.mark.parametrize("to", [None, DROP], ids=["dead letters", "dropped"])
async def test_what_was_settled_in_whatever_way_is_not_handled_again_after_its_group_was_lost(
    harness: Harness, topic: str, to: Any
) -> None:
    backend = harness.make_backend()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        key = delivery.message.key
        handled.append(key)
        if key == "retried":
            raise Retry(delay=3600)
        if key == "released later":
            await delivery.release(delay=3600)
        if key == "rejected":
            raise Reject("no")
        if key == "given up":
            await delivery.nack("never")
        if key == "acked with":
            await delivery.ack(publish=[Message(f"{topic}.out")])

    keys = ["acked", "retried", "released later", "rejected", "given up", "acked with"]
    recorder = Recorder()
    async with StreamBus(backend, quick(recorder, claim_idle_timeout=60)) as bus:
        await _keep_the_floor_low(backend, topic)
        config = SubscriptionConfig(topic, "g", dead_letter_topic=to)
        async with bus.subscribe(config, handler) as subscription:
            await harness.append_raw(topic, {"message": b"malformed"})
            await bus.publish_batch([Message(topic, key=key) for key in keys])
            await until(lambda: len(handled) == len(keys) and subscription.statistics().held == 0)
            before = subscription.statistics()
            await _lose_the_group(harness, topic, recorder, handled)
            after = subscription.statistics()
    assert handled == [*keys, "of-another-member"]
    assert len(await harness.entries(f"{topic}.dead")) == (0 if to is DROP else 3)
    assert len(await harness.entries(f"{topic}.out")) == 1
    # What is acked for the second time is not counted for the second time.
    assert after.handled == before.handled + 1
    assert (after.failed, after.retried, after.dead_lettered) == (before.failed, before.retried, before.dead_lettered)
    assert after.leases_lost == 0


async def test_a_member_that_did_not_see_its_group_made_again_by_another_one_handles_nothing_again(
    harness: Harness, topic: str
) -> None:
    """It was busy meanwhile, with no room to read: what it learns is that nothing of what it holds is its own."""
    backend = harness.make_backend()
    handled: list[str] = []
    go_on = anyio.Event()

    async def handler(delivery: Delivery) -> None:
        key = delivery.message.key
        handled.append(key)
        if key.startswith("busy"):
            await go_on.wait()
        if key == "rejected":
            raise Reject("no")

    recorder = Recorder()
    keys = ["acked", "rejected", "busy 1", "busy 2"]
    # Nothing is asked of the server meanwhile: no pass, no renewal.
    async with StreamBus(backend, quick(recorder, claim_idle_timeout=60, reclaim_interval=60)) as bus:
        config = SubscriptionConfig(topic, "g", max_in_flight=2, group_start_id="0")
        async with bus.subscribe(config, handler) as subscription:
            for key in keys[:2]:
                await bus.publish(Message(topic, key=key))
            await until(lambda: len(handled) == 2 and subscription.statistics().held == 0)
            await bus.publish_batch([Message(topic, key=f"busy {count}") for count in range(1, 4)])
            await until(lambda: subscription.statistics().held == 3)
            await harness.delete_group(topic, "g")
            await backend.create_group(topic, "g", "0")
            go_on.set()
            await until(lambda: "busy 3" in handled)
            await nothing_pending(harness, topic, "g")
            await bus.publish(Message(topic, key="last"))
            await until(lambda: "last" in handled)
    assert sorted(handled) == sorted([*keys, "busy 3", "last"])
    assert len(await harness.entries(f"{topic}.dead")) == 1


async def test_a_group_that_is_moved_back_on_purpose_has_its_messages_handled_again(
    server: RunningServer, topic: str
) -> None:
    harness = RedisHarness(server)
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    async with StreamBus(harness.make_backend(), quick(Recorder())) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic, key="one"))
            await until(lambda: handled == ["one"] and subscription.statistics().held == 0)
            subscription.pause()  # what a read that is under way brings is older than the settlements of meanwhile
            await to_thread.run_sync(server.client().xgroup_setid, topic, "g", "0")
            subscription.resume()
            await bus.publish(Message(topic, key="two"))
            await until(lambda: "two" in handled)
    assert handled == ["one", "one", "two"]


async def test_a_retry_held_in_the_process_is_not_taken_for_settled_when_its_group_is_lost(
    harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    backend.features = backend.features - {"delay"}
    attempts: list[int] = []

    async def handler(delivery: Delivery) -> None:
        if delivery.message.key == "mine":
            attempts.append(delivery.state.attempt)
            if len(attempts) == 1:
                raise Retry(delay=0.5)

    recorder = Recorder()
    async with StreamBus(backend, quick(recorder, claim_idle_timeout=60)) as bus:
        await _keep_the_floor_low(backend, topic)
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic, key="mine"))
            await until(lambda: len(attempts) == 1)
            await harness.delete_group(topic, "g")
            await until(lambda: len(attempts) == 2)
            await until(lambda: subscription.statistics().held == 0)
            await nothing_pending(harness, topic, "g")
    assert attempts == [1, 2]


@pytest.mark.parametrize("reply", ["before it comes back", "after it came back"])
@pytest.mark.parametrize("settles", ["ack", "retry", "dead letter"])
async def test_what_is_on_its_way_when_the_group_is_lost_counts_as_settled(
    harness: Harness, topic: str, settles: str, reply: str
) -> None:
    """The server has it; its answer crosses the loss of the group, which is made again below it meanwhile."""
    backend = harness.make_backend()
    real: Any = backend
    handled: list[str] = []
    recorder = Recorder()
    mine_settled = anyio.Event()
    create_group = backend.create_group
    method = "ack_many" if settles == "ack" else "transfer_many"
    send = getattr(real, method)

    async def crossing(*args: Any, **kwargs: Any) -> Any:
        setattr(real, method, send)
        result = await send(*args, **kwargs)
        await harness.delete_group(topic, "g")
        if reply == "after it came back":

            async def is_back() -> bool:
                if not recorder.of("on_group_made_again"):
                    return False
                return any(entry.id == handled_id for entry in await harness.pending(topic, "g"))

            await until(is_back)
        else:
            await being_made_again.wait()
        mine_settled.set()
        return result

    async def making_again(*args: Any, **kwargs: Any) -> bool:
        if args[0] != topic:
            return await create_group(*args, **kwargs)
        being_made_again.set()
        if reply == "before it comes back":
            await mine_settled.wait()
            await until(lambda: subscription.statistics().held == 0)
        return await create_group(*args, **kwargs)

    being_made_again = anyio.Event()
    handled_id = ""

    async def handler(delivery: Delivery) -> None:
        nonlocal handled_id
        handled.append(delivery.message.key)
        if delivery.message.key == "mine":
            handled_id = delivery.id
            setattr(real, method, crossing)
            if settles == "retry":
                raise Retry(delay=3600)
            if settles == "dead letter":
                raise Reject("no")

    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(recorder, claim_idle_timeout=60)) as bus:
            await _keep_the_floor_low(backend, topic)
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                real.create_group = making_again
                await bus.publish(Message(topic, key="mine"))
                await until(lambda: "of-another-member" in handled)
                await nothing_pending(harness, topic, "g")
                await until(lambda: subscription.statistics().held == 0)
    assert sorted(handled) == ["mine", "of-another-member"]
    assert len(await harness.entries(f"{topic}.dead")) == (settles == "dead letter")


async def test_a_retry_that_the_lost_group_never_saw_is_not_taken_for_written(harness: Harness, topic: str) -> None:
    """Its first try broke before it arrived; the second finds a group made again, in which the entry is not ours."""
    backend = harness.make_backend()
    real: Any = backend
    transfer_many = real.transfer_many
    create_group = backend.create_group
    recorder = Recorder()
    attempts: list[int] = []
    refused = anyio.Event()

    async def broken(*args: Any) -> Any:
        real.transfer_many = asked_of_the_new_group
        await harness.delete_group(topic, "g")
        raise BROKEN

    async def asked_of_the_new_group(*args: Any) -> Any:
        real.transfer_many = transfer_many
        refused.set()
        return [None] * len(args[3])

    async def making_again(*args: Any, **kwargs: Any) -> bool:
        if args[0] == topic:
            await refused.wait()
        return await create_group(*args, **kwargs)

    async def handler(delivery: Delivery) -> None:
        if delivery.message.key == "mine":
            attempts.append(delivery.state.attempt)
            if len(attempts) == 1:
                real.transfer_many = broken
                raise Retry(delay=0)

    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(recorder, claim_idle_timeout=60)) as bus:
            await _keep_the_floor_low(backend, topic)
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
                real.create_group = making_again
                await bus.publish(Message(topic, key="mine"))
                await until(lambda: len(attempts) == 2)
                await nothing_pending(harness, topic, "g")
    assert attempts == [1, 1]


# --- a peer that gives it back


class BreaksOnce:
    """The first settlement breaks before the server hears of it. A peer takes the entry over, and gives it back when
    the second try has been refused."""

    def __init__(self, backend: StreamBackend, topic: str, method: str) -> None:
        self.backend: Any = backend
        self.topic = topic
        self.method = method
        self.send = getattr(backend, method)
        self.gave_back = anyio.Event()

    def arm(self) -> None:
        setattr(self.backend, self.method, self.first)

    async def first(self, *args: Any, **kwargs: Any) -> Any:
        setattr(self.backend, self.method, self.second)
        [taken] = await self.backend.reclaim_idle(self.topic, "g", "peer", min_idle=0, count=1)
        self.taken = taken.id
        raise BROKEN

    async def second(self, *args: Any, **kwargs: Any) -> Any:
        setattr(self.backend, self.method, self.send)
        result = await self.send(*args, **kwargs)
        await self.backend.release(self.topic, "g", "peer", [self.taken])
        self.gave_back.set()
        return result


@pytest.mark.parametrize("by_hand", [False, True])
async def test_what_was_handled_and_given_back_by_a_peer_after_a_broken_ack_is_only_acked(
    harness: Harness, topic: str, by_hand: bool
) -> None:
    backend = harness.make_backend()
    breaks = BreaksOnce(backend, topic, "ack_many")
    handled: list[str] = []
    recorder = Recorder()

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)
        if delivery.message.key == "mine":
            breaks.arm()
            if by_hand:
                with pytest.raises(BackendError):
                    await delivery.ack()
                await delivery.ack()

    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(recorder, claim_idle_timeout=60)) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                await bus.publish(Message(topic, key="mine"))
                await breaks.gave_back.wait()
                await until(lambda: subscription.statistics().reclaimed == 1)
                await nothing_pending(harness, topic, "g")
                await bus.publish(Message(topic, key="last"))
                await until(lambda: "last" in handled)
                await until(lambda: subscription.statistics().held == 0)
                assert subscription.statistics().handled == 2
    assert handled == ["mine", "last"]
    assert not recorder.of("on_lease_lost")


@pytest.mark.parametrize("settles", ["retry", "ack and publish"])
async def test_what_was_to_be_appended_and_was_not_is_handled_anew_when_a_peer_gives_it_back(
    harness: Harness, topic: str, settles: str
) -> None:
    backend = harness.make_backend()
    breaks = BreaksOnce(backend, topic, "transfer_many")
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)
        if len(handled) == 1:
            breaks.arm()
            if settles == "retry":
                raise Retry(delay=0)
            with pytest.raises(BackendError):
                await delivery.ack(publish=[Message(f"{topic}.out")])
        if settles == "ack and publish":
            await delivery.ack(publish=[Message(f"{topic}.out")])

    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=60)) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
                await bus.publish(Message(topic, key="mine"))
                await breaks.gave_back.wait()
                await until(lambda: len(handled) == 2)
                await nothing_pending(harness, topic, "g")
                await until(lambda: subscription.statistics().held == 0)
    assert handled == ["mine", "mine"]
    assert len(await harness.entries(f"{topic}.out")) == (settles == "ack and publish")
    assert not await harness.entries(retry_stream(topic, "g"))


async def test_a_peers_entry_is_never_taken_from_it_by_a_second_try(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    real: Any = backend
    ack_many = real.ack_many
    told: list[type[BaseException]] = []

    async def refused_for_sure(*args: Any, **kwargs: Any) -> Any:
        real.ack_many = ack_many
        await backend.reclaim_idle(topic, "g", "peer", min_idle=0, count=1)
        raise BackendError("not sent", may_have_happened=False)

    async def handler(delivery: Delivery) -> None:
        real.ack_many = refused_for_sure
        for _ in range(2):
            try:
                await delivery.ack()
            except (BackendError, LeaseLostError) as error:
                told.append(type(error))

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=60)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await bus.publish(Message(topic))
            await until(lambda: len(told) == 2)
            await until(lambda: subscription.statistics().held == 0)
            assert [entry.consumer for entry in await harness.pending(topic, "g")] == ["peer"]
    assert told == [BackendError, LeaseLostError]


def test_as_many_entries_are_remembered_of_each_stream() -> None:
    """Both groups are lost at once: those of the retry stream do not push out those of the topic."""
    ledger = Ledger(("t", "retries"), Budget(16, 32))
    for stream in ("t", "retries"):
        ledger.note_settled(stream, [f"{number}-0" for number in range(5000)], [""] * 5000)
    for stream in ("t", "retries"):
        ledger.group_was_lost(stream)
    for stream in ("t", "retries"):
        assert sum(ledger.was_handled(stream, f"{number}-0") for number in range(5000)) == 4096
