"""Replies that bring entries may be older than what the subscription knows.

Specification (DESIGN.md, section 4): a call that takes entries runs beside others, and its reply may be looked at after
the reply to a settlement that the server carried out later. What was settled meanwhile is not handled again, whichever
call brings it. What was let go meanwhile does not start before the server has said whose it is. What returned
unsettled is not handed over again by a read that looks for what an earlier one lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from harness import SOON, Harness, StepByStep, nothing_pending, quick, until

from anybus import BackendError, Delivery, MemoryBackend, Message, StreamBus, SubscriptionConfig
from anybus._failure.copies import retry_stream
from anybus.abc import ClaimedMessage, FetchedEntry, PassSource, Redelivered, StreamBackend

TAKERS = ["read", "retries", "reclaim", "pass"]


class Stale:
    """Lets one call of a kind bring, beside what it took, an entry as it was some time before.

    :param taker: which call; ``retries`` and ``reclaim`` exist where the bus takes step by step.
    """

    def __init__(self, harness: Harness, taker: str, topic: str) -> None:
        inner = harness.make_backend()
        self.backend: StreamBackend = StepByStep(inner) if taker in ("retries", "reclaim") else inner
        self.stream = retry_stream(topic, "g") if taker == "retries" else topic
        self.brings: ClaimedMessage | None = None
        self.under_way = anyio.Event()
        self.brought = anyio.Event()
        self.until: Callable[[], Awaitable[None]] = anyio.lowlevel.checkpoint
        backend: Any = self.backend
        read_new, reclaim_idle = backend.read_new, backend.reclaim_idle

        async def read(stream: str, *args: Any, **kwargs: Any) -> list[FetchedEntry]:
            fresh: list[FetchedEntry] = await read_new(stream, *args, **kwargs)
            return await self.add_to(fresh) if stream == self.stream else fresh

        async def reclaim(stream: str, *args: Any, **kwargs: Any) -> list[FetchedEntry]:
            fresh: list[FetchedEntry] = await reclaim_idle(stream, *args, **kwargs)
            return await self.add_to(fresh) if stream == self.stream else fresh

        if taker in ("read", "retries"):
            backend.read_new = read
        elif taker == "reclaim" or not isinstance(inner, PassSource):
            backend.reclaim_idle = reclaim
        else:
            redeliver = backend.redeliver

            async def whole_pass(*args: Any, **kwargs: Any) -> Redelivered:
                taken: Redelivered = await redeliver(*args, **kwargs)
                return Redelivered(await self.add_to(taken.reclaimed), taken.retries, taken.reclaimed_retries)

            backend.redeliver = whole_pass

    async def add_to(self, fresh: list[FetchedEntry]) -> list[FetchedEntry]:
        if self.brings is None:
            return fresh
        stale, self.brings = self.brings, None
        self.under_way.set()
        await self.until()
        self.brought.set()
        return [*fresh, stale]

    async def bring(self, delivery: Delivery) -> None:
        """Wait until the call is under way whose reply will bring this delivery's entry once more."""
        self.brings = ClaimedMessage(delivery.id, delivery.message, 1)
        await self.under_way.wait()


async def ack(delivery: Delivery) -> None:
    await delivery.ack()


async def ack_and_publish(delivery: Delivery) -> None:
    await delivery.ack(publish=[Message(f"{delivery.message.topic}.out")])


async def nack(delivery: Delivery) -> None:
    await delivery.nack("no")


async def retry(delivery: Delivery) -> None:
    await delivery.retry("later", delay=3600)


@pytest.mark.parametrize("taker", TAKERS)
async def test_what_is_acked_while_a_reply_is_on_its_way_is_not_handled_again(
    harness: Harness, topic: str, taker: str
) -> None:
    await _settle_while_a_reply_is_on_its_way(harness, topic, taker, None)


@pytest.mark.parametrize("settle", [ack, ack_and_publish, nack, retry])
async def test_nor_is_what_is_settled_in_another_way(
    harness: Harness, topic: str, settle: Callable[[Delivery], Awaitable[None]]
) -> None:
    await _settle_while_a_reply_is_on_its_way(harness, topic, "read", settle)


async def _settle_while_a_reply_is_on_its_way(
    harness: Harness, topic: str, taker: str, settle: Callable[[Delivery], Awaitable[None]] | None
) -> None:
    stale = Stale(harness, taker, topic)
    handled: list[bytes] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.payload)
        if handled == [b"mine"]:
            await stale.bring(delivery)
            if settle is not None:
                await settle(delivery)

    async with StreamBus(stale.backend, quick(claim_idle_timeout=60)) as bus:
        config = SubscriptionConfig(topic, "g", group_start_id="0")
        async with bus.subscribe(config, handler) as subscription:
            stale.until = lambda: until(lambda: subscription.statistics().held == 0)
            await stale.backend.publish(stale.stream, Message(topic, b"mine"))
            with anyio.fail_after(SOON):
                await stale.brought.wait()
            await bus.publish(Message(topic, b"last"))
            await until(lambda: b"last" in handled)
            await nothing_pending(harness, topic, "g")
    assert handled == [b"mine", b"last"]


@pytest.mark.parametrize("taker", TAKERS)
async def test_what_was_released_while_a_reply_was_on_its_way_does_not_start_while_somebody_else_has_it(
    harness: Harness, topic: str, taker: str
) -> None:
    stale = Stale(harness, taker, topic)
    handled: list[bytes] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.payload)
        if handled == [b"mine"]:
            await stale.bring(delivery)
            await delivery.release()
            assert not stale.brought.is_set()
            taken = await stale.backend.reclaim_idle(stale.stream, "g", "peer", min_idle=0, count=1)
            released.set()
            assert [entry.id for entry in taken] == [delivery.id]

    async def peer_has_it() -> None:
        await released.wait()

    released = anyio.Event()
    stale.until = peer_has_it
    # Beside the read there is no pass that could take it before the peer does.
    options = quick(claim_idle_timeout=60, reclaim_interval=600 if taker == "read" else 0.02)
    async with StreamBus(stale.backend, options) as bus:
        config = SubscriptionConfig(topic, "g", group_start_id="0")
        async with bus.subscribe(config, handler) as subscription:
            await stale.backend.publish(stale.stream, Message(topic, b"mine"))
            with anyio.fail_after(SOON):
                await stale.brought.wait()
            await until(lambda: subscription.statistics().held == 0)
            await bus.publish(Message(topic, b"last"))
            await until(lambda: b"last" in handled)
            await until(lambda: subscription.statistics().held == 0)
            assert [entry.consumer for entry in await harness.pending(stale.stream, "g")] == ["peer"]
    assert handled == [b"mine", b"last"]


async def test_what_returned_unsettled_is_not_handed_over_again_by_a_read_that_finds_it(
    harness: Harness, topic: str
) -> None:
    """A read after a broken connection may find what is held; only a take-over lets go what returned unsettled."""
    stale = Stale(harness, "read", topic)
    kept: list[Delivery] = []

    async def handler(delivery: Delivery) -> None:
        kept.append(delivery)
        if len(kept) == 1:
            stale.brings = ClaimedMessage(delivery.id, delivery.message, 1)

    async with StreamBus(stale.backend, quick(claim_idle_timeout=60)) as bus:
        config = SubscriptionConfig(topic, "g", ack_mode="manual", group_start_id="0")
        async with bus.subscribe(config, handler) as subscription:
            stale.until = lambda: until(lambda: subscription.statistics().in_flight == 0)
            await bus.publish(Message(topic, b"mine"))
            with anyio.fail_after(SOON):
                await stale.brought.wait()
            await bus.publish(Message(topic, b"last"))
            await until(lambda: len(kept) > 1)
            for delivery in kept:
                await delivery.ack()
            await nothing_pending(harness, topic, "g")
    assert [delivery.message.payload for delivery in kept] == [b"mine", b"last"]


async def test_what_is_brought_again_while_its_refused_settlement_is_under_way_waits_for_its_retry_once(
    topic: str,
) -> None:
    """A backend that cannot delay: the retry waits in the process, and nobody waits for the settlement any more."""
    backend: Any = MemoryBackend()
    backend.features = backend.features - {"delay"}
    read_new, transfer_many = backend.read_new, backend.transfer_many
    brings: list[ClaimedMessage] = []
    brought = anyio.Event()
    attempts: list[int] = []

    async def read(stream: str, *args: Any, **kwargs: Any) -> list[FetchedEntry]:
        if brings and stream == topic:
            brought.set()
            return [brings.pop()]
        return list(await read_new(stream, *args, **kwargs))

    async def refuse(*args: Any) -> Any:
        if attempts == [1]:
            await brought.wait()
            await anyio.sleep(0.05)
            return [BackendError("too large", may_have_happened=False, can_pass=False)]
        return await transfer_many(*args)

    backend.read_new, backend.transfer_many = read, refuse

    async def handler(delivery: Delivery) -> None:
        attempts.append(delivery.state.attempt)
        if delivery.state.attempt == 1:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_ack_with, delivery)
                    await anyio.wait_all_tasks_blocked()
                    brings.append(ClaimedMessage(delivery.id, delivery.message, 1))
                    scope.cancel()

    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(claim_idle_timeout=30.0)) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g", retry_backoff=0.01), handler) as subscription:
                await bus.publish(Message(topic))
                await until(lambda: subscription.statistics().handled == 1)
                assert attempts == [1, 2]
                assert subscription.statistics().held == 0
                budget = subscription._context.ledger.budget
                # A pass under way reserves its room until it is over, and a read that blocks one place.
                await until(lambda: budget.by_reclaim == 0 and budget.by_read <= 1)


async def _ack_with(delivery: Delivery) -> None:
    await delivery.ack(publish=[Message(f"{delivery.message.topic}.out")])
