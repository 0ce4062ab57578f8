"""A group's lease beside everything else that a subscription does: beginnings that fail, errors, reads that block.

Specification (DESIGN.md, sections 2 and 4): ``forget_consumer`` is called exactly once for every consumer that was
used, however it ends, so that a member that never began counts as gone at once. Errors that can pass do not end a
subscription, whatever their type. Those who learn that the lease is shorter now take over nothing that a member holds
that has not learnt it yet, and neither does a newcomer that lost a reply. A read blocks for at most a third of the
lease of that moment.
"""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from harness import SOON, quick, until

from anybus import (
    ClosedError,
    Delivery,
    MemoryBackend,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
)


async def handle(delivery: Delivery) -> None:
    return


def count_forgotten(backend: Any) -> list[tuple[str, str]]:
    forgotten: list[tuple[str, str]] = []
    inner = backend.forget_consumer

    async def forget(stream: str, group: str, consumer: str) -> None:
        forgotten.append((stream, consumer))
        await inner(stream, group, consumer)

    backend.forget_consumer = forget
    return forgotten


@pytest.mark.parametrize("how", ["cancelled", "bus closed"])
async def test_a_member_that_never_began_counts_as_gone_at_once(topic: str, how: str) -> None:
    backend: Any = MemoryBackend()
    forgotten = count_forgotten(backend)
    agree = backend.agree_lease
    kept = anyio.Event()

    async def no_reply(*args: Any, **kwargs: Any) -> float:
        await agree(*args, **kwargs)
        kept.set()
        await anyio.sleep_forever()
        raise AssertionError

    backend.agree_lease = no_reply
    config = SubscriptionConfig(topic, "g")

    async def enter(bus: StreamBus) -> None:
        if how == "cancelled":
            async with bus.subscribe(config, handle):
                raise AssertionError("it never begins")
        with pytest.raises(ClosedError):
            async with bus.subscribe(config, handle):
                raise AssertionError("it never begins")

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with StreamBus(backend, quick(claim_idle_timeout=30.0)) as bus:
                tasks.start_soon(enter, bus)
                await kept.wait()
                if how == "cancelled":
                    tasks.cancel_scope.cancel()
        backend.agree_lease = agree
        assert len(forgotten) == len(set(forgotten)) == 2
        # Another lease is no contradiction: nobody runs.
        async with StreamBus(backend, quick(claim_idle_timeout=10.0)) as bus, bus.subscribe(config, handle):
            pass


async def test_who_was_refused_never_was_a_member(topic: str) -> None:
    backend = MemoryBackend()
    forgotten = count_forgotten(backend)
    config = SubscriptionConfig(topic, "g")
    async with StreamBus(backend, quick(claim_idle_timeout=30.0)) as one, one.subscribe(config, handle):
        async with StreamBus(backend, quick(claim_idle_timeout=10.0)) as two:
            with pytest.raises(ValueError, match="claim_idle_timeout"):
                async with two.subscribe(config, handle):
                    raise AssertionError("it never begins")
        assert forgotten == []


async def test_a_drivers_error_while_the_lease_is_looked_after_does_not_end_the_subscription(topic: str) -> None:
    backend: Any = MemoryBackend()
    inner = backend.kept_lease
    failures = 0

    async def kept_lease(*args: Any) -> float:
        nonlocal failures
        failures += 1
        if failures < 3:
            raise OSError("connection reset by peer")
        return float(await inner(*args))

    backend.kept_lease = kept_lease
    with anyio.fail_after(SOON):
        async with StreamBus(backend, quick(claim_idle_timeout=0.3)) as bus:
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handle) as subscription:
                await until(lambda: failures >= 3)
                assert subscription.is_running


async def test_a_read_blocks_for_a_third_of_the_lease_that_the_group_has_now(topic: str) -> None:
    backend: Any = MemoryBackend()
    blocks: list[float] = []
    inner = backend.read_new

    async def read_new(stream: str, group: str, consumer: str, *, count: int, timeout: float) -> Any:
        if consumer.startswith("old") and timeout:
            blocks.append(timeout)
        return await inner(stream, group, consumer, count=count, timeout=timeout)

    backend.read_new = read_new
    old = StreamBusOptions(claim_idle_timeout=0.9, block_timeout=2.0)
    new = StreamBusOptions(claim_idle_timeout=0.3, change_lease=True)
    with anyio.fail_after(SOON):
        async with StreamBus(backend, old) as first, StreamBus(backend, new) as second:
            async with first.subscribe(SubscriptionConfig(topic, "g", consumer="old"), handle) as one:
                await until(lambda: bool(blocks))
                assert blocks[-1] == pytest.approx(0.3)
                async with second.subscribe(SubscriptionConfig(topic, "g"), handle):
                    await until(lambda: one._context.lease == 0.3)
                    blocks.clear()
                    await until(lambda: len(blocks) >= 2)
                    assert blocks[-1] == pytest.approx(0.1)
