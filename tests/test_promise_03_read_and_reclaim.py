"""Promise 3: read and reclaim draw on one budget, and neither starves, cancels or delays the other.

A part of the budget (a quarter, at least 1, but only of what lies beyond ``max_in_flight``) is always reclaim's;
beyond its part it takes only while no read waits for room; where nothing lies beyond it they take turns, a pass after
each read. A publish or an ack never waits behind a blocking read.
"""

from __future__ import annotations

from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from harness import SOON, Harness, nothing_pending, quick, until

from anybus import Delivery, Message, StreamBus, SubscriptionConfig
from anybus._failure.policies import FailurePolicy
from anybus._runtime.budget import Budget
from anybus._runtime.entry import Held, Stage
from anybus._runtime.ledger import Ledger
from anybus._runtime.pull import PullTaker


@pytest.mark.parametrize(
    ("max_in_flight", "max_pending_acks", "reclaims"),
    [(16, 32, 8), (1, 2, 1), (1, 1, 0), (4, 4, 0), (4, 5, 1), (3, 100, 25), (30, 33, 3)],
)
def test_the_part_that_is_always_reclaims(max_in_flight: int, max_pending_acks: int, reclaims: int) -> None:
    budget = Budget(max_in_flight, max_pending_acks)
    assert budget.reclaim_part == reclaims
    assert budget.takes_turns == (reclaims == 0)
    assert budget.read_room() == max_pending_acks - reclaims


def test_beyond_its_part_reclaim_takes_only_while_no_read_waits() -> None:
    budget = Budget(16, 32)
    assert budget.reclaim_room() == 32
    budget.read_waits = True
    assert budget.reclaim_room() == 8
    budget.by_reclaim = 8
    assert budget.reclaim_room() == 0
    budget.read_waits = False
    assert budget.reclaim_room() == 24
    # What reclaim has taken beyond its part is missing for reads until it is settled.
    budget.by_reclaim = 20
    assert budget.read_room() == 12


@pytest.mark.parametrize(("max_in_flight", "max_pending_acks"), [(1, 1), (2, 2), (2, 8)])
async def test_neither_starves_under_a_backlog_of_both(
    harness: Harness, topic: str, max_in_flight: int, max_pending_acks: int
) -> None:
    backend = harness.make_backend()
    order: list[str] = []

    async def handler(delivery: Delivery) -> None:
        order.append(delivery.message.key)
        await anyio.lowlevel.checkpoint()

    async with StreamBus(backend, quick(block_timeout=30, claim_idle_timeout=60)) as bus:
        await backend.create_group(topic, "g", "0")
        await bus.publish_batch([Message(topic, key="old") for _ in range(100)])
        await backend.read_new(topic, "g", "dead", count=100, timeout=0)
        await backend.release(topic, "g", "dead", [entry.id for entry in await harness.pending(topic, "g")])
        await bus.publish_batch([Message(topic, key="new") for _ in range(100)])
        config = SubscriptionConfig(
            topic, "g", max_in_flight=max_in_flight, max_pending_acks=max_pending_acks, max_deliveries=100
        )
        async with bus.subscribe(config, handler):
            await until(lambda: len(order) == 200, "both backlogs")
            await nothing_pending(harness, topic, "g")
    assert order.count("old") == order.count("new") == 100
    # While both had work, both got on: in the first half neither had it all.
    assert 10 <= order[:100].count("old") <= 90


async def test_a_blocking_read_does_not_delay_reclaim_publish_or_ack(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    # A read blocks for longer than the test may take.
    async with StreamBus(backend, quick(block_timeout=600, claim_idle_timeout=60)) as bus:
        await backend.create_group(topic, "g", "0")
        await bus.publish(Message(topic, key="old"))
        await backend.read_new(topic, "g", "dead", count=1, timeout=0)
        await harness.age(topic, "g")
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler):
            with anyio.fail_after(SOON):
                await until(lambda: handled == ["old"])
                await bus.publish(Message(topic, key="new"))
                await until(lambda: handled == ["old", "new"])
                await nothing_pending(harness, topic, "g")


async def test_where_they_take_turns_a_read_blocks_no_longer_than_a_reclaim_interval(
    harness: Harness, topic: str
) -> None:
    backend = harness.make_backend()
    timeouts: set[float] = set()
    read_new = backend.read_new

    async def noting_read(stream: str, group: str, consumer: str, *, count: int, timeout: float) -> object:
        timeouts.add(timeout)
        return await read_new(stream, group, consumer, count=count, timeout=timeout)

    backend.read_new = noting_read  # type: ignore[assignment,method-assign]
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    async with StreamBus(backend, quick(block_timeout=600, claim_idle_timeout=60)) as bus:
        await backend.create_group(topic, "g", "0")
        await bus.publish(Message(topic, key="old"))
        await backend.read_new(topic, "g", "dead", count=1, timeout=0)
        await harness.age(topic, "g")
        timeouts.clear()
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_in_flight=1, max_pending_acks=1), handler):
            await until(lambda: handled == ["old"])
    # (What does not wait is the look at the retry stream, where the backend makes no whole pass of it.)
    assert timeouts - {0} == {0.02}


async def test_a_backlog_of_a_dead_peer_drains_at_the_handlers_speed(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.uid)

    # The next pass would come after ten minutes: a pass that came back full must be followed by the next at once.
    async with StreamBus(backend, quick(reclaim_interval=600, claim_scan_batch_size=4)) as bus:
        await backend.create_group(topic, "g", "0")
        await bus.publish_batch([Message(topic) for _ in range(101)])
        await backend.read_new(topic, "g", "dead", count=101, timeout=0)
        await backend.release(topic, "g", "dead", [entry.id for entry in await harness.pending(topic, "g")])
        async with bus.subscribe(SubscriptionConfig(topic, "g", max_in_flight=4), handler):
            await until(lambda: len(handled) == 101)


async def test_a_read_that_holds_out_for_room_is_not_kept_waiting_by_what_was_lost_meanwhile() -> None:
    """Entries whose lease is lost while they wait are no work to do: what there is room for is read then."""
    ledger = Ledger(("t",), Budget(4, 16))
    now = datetime.now(timezone.utc)
    held = [Held("t", str(n), Message("t"), 1, 1, now, now, 60.0, False) for n in range(12)]
    for one in held:
        ledger.add(one)
    last, lost = held[-2:]
    for one in held[:-2]:
        one.stage = Stage.OPEN
    ledger.some_wait()
    ledger.remove(lost)
    context: Any = SimpleNamespace(ledger=ledger, clock=lambda: 0.0, max_in_flight=1, failure_policy=FailurePolicy())
    unused: Any = None
    rooms: list[int] = []
    send, ready = anyio.create_memory_object_stream[list[Held]](1)

    async def read() -> None:
        await ledger.wait_for_read_room()
        rooms.append(ledger.budget.read_room())

    async with anyio.create_task_group() as tasks, send, ready:
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        assert rooms == []
        send.send_nowait([last, lost])
        taker = PullTaker(context, unused, unused, None, ready, send)
        await taker._receive()
        assert taker.next_entry() is last
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert rooms == [1]


async def test_a_call_that_a_busy_worker_receives_itself_counts_as_not_made() -> None:
    """Else it would call nobody for the batch that came behind the call, and handle that alone."""
    ledger = Ledger(("t",), Budget(4, 16))
    now = datetime.now(timezone.utc)
    batches = [[Held("t", str(n), Message("t"), 1, 1, now, now, 60.0, False)] for n in range(2)]
    context: Any = SimpleNamespace(ledger=ledger, clock=lambda: 0.0, max_in_flight=2, failure_policy=FailurePolicy())
    unused: Any = None
    send, ready = anyio.create_memory_object_stream[list[Held]](4)
    async with send, ready:
        taker = PullTaker(context, unused, unused, None, ready, send)
        send.send_nowait(batches[0])
        await taker._receive()
        taker._called = True
        send.send_nowait([])
        send.send_nowait(batches[1])
        assert taker.next_entry() is batches[0][0]
        assert not taker._called
        assert taker.next_entry() is batches[1][0]
