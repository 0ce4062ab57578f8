"""All members of a group have one lease: who comes with another one is refused, or changes it for all of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import to_thread
from harness import SOON, Harness, MemoryHarness, Recorder, StepByStep, quick, until
from proxy import CutAfter, proxied
from refusal import refused
from servers import RedisHarness, RunningServer

import anybus
from anybus import Delivery, MemoryBackend, StreamBus, StreamBusOptions, Subscription, SubscriptionConfig
from anybus.abc import LeaseKeeper, StreamBackend
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import leases


async def handle(delivery: Delivery) -> None:
    return


@asynccontextmanager
async def member(
    backend: StreamBackend, topic: str, lease: float, observer: Recorder | None = None, **options: Any
) -> AsyncGenerator[Subscription, None]:
    """A member of group g, in a bus of its own."""
    async with StreamBus(backend, quick(observer, claim_idle_timeout=lease, **options)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", group_start_id="0"), handle) as subscription:
            yield subscription


async def comes_in(backend: StreamBackend, topic: str, lease: float) -> None:
    async with member(backend, topic, lease):
        pass


async def forget_leases(harness: Harness, topic: str) -> None:
    if isinstance(harness, MemoryHarness):
        harness.make_backend()._streams[topic].leases.clear()
    else:
        assert isinstance(harness, RedisHarness)
        assert await to_thread.run_sync(harness.server.client().delete, leases(topic, "g")) == 1


async def test_a_newcomer_with_another_lease_is_refused(harness: Harness, topic: str) -> None:
    async with member(harness.make_backend(), topic, 30.0) as first:
        with refused("claim_idle_timeout", "10 s", "30 s"):
            await comes_in(harness.make_backend(), topic, 10.0)
        with refused("claim_idle_timeout", "10 s", "change_lease=True"):
            await comes_in(harness.make_backend(), topic, 10.0)
        await comes_in(harness.make_backend(), topic, 30.0)
        await comes_in(harness.make_backend(), topic + ".other", 10.0)
        assert first.is_running


async def test_when_nobody_runs_the_newcomers_lease_is_kept(harness: Harness, topic: str) -> None:
    await comes_in(harness.make_backend(), topic, 30.0)
    async with member(harness.make_backend(), topic, 10.0):
        with refused("claim_idle_timeout", "30 s", "10 s"):
            await comes_in(harness.make_backend(), topic, 30.0)


async def test_a_group_made_again_has_the_same_lease(harness: Harness, topic: str) -> None:
    recorder = Recorder()
    async with member(harness.make_backend(), topic, 30.0, recorder):
        await harness.delete_group(topic, "g")
        await until(lambda: bool(recorder.of("on_group_made_again")))
        with refused("claim_idle_timeout", "10 s", "30 s"):
            await comes_in(harness.make_backend(), topic, 10.0)


async def test_a_lease_that_was_deleted_is_kept_again_by_those_who_run(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    assert isinstance(backend, LeaseKeeper)
    async with member(backend, topic, 0.6) as first:
        await forget_leases(harness, topic)

        async def there_again() -> bool:
            if isinstance(harness, MemoryHarness):
                return bool(harness.make_backend()._streams[topic].leases["g"].seconds)
            assert isinstance(harness, RedisHarness)
            return bool(await to_thread.run_sync(harness.server.client().exists, leases(topic, "g")))

        await until(there_again)
        with refused("claim_idle_timeout", "10 s", "0.6 s"):
            await comes_in(harness.make_backend(), topic, 10.0)
        assert first.is_running


@pytest.mark.parametrize(("before", "after"), [(0.6, 30.0), (0.9, 0.3)])
async def test_a_changed_lease_is_reported_by_those_who_run_and_they_go_by_it(
    harness: Harness, topic: str, before: float, after: float
) -> None:
    recorder = Recorder()
    async with member(harness.make_backend(), topic, before, recorder) as first:
        async with member(harness.make_backend(), topic, after, change_lease=True):
            await until(lambda: bool(recorder.of("on_error", "renew")))
            [event] = recorder.of("on_error", "renew")
            assert f"changed the lease of group 'g' to {after:g} s" in str(event.error)
            assert f"claim_idle_timeout is {before:g} s here" in str(event.error)
            assert first._context.lease == after
            # By now it is everybody's.
            with refused("claim_idle_timeout", f"{before:g} s", f"{after:g} s"):
                await comes_in(harness.make_backend(), topic, before)
            await comes_in(harness.make_backend(), topic, after)


async def test_of_two_newcomers_at_once_with_two_leases_exactly_one_comes_in(harness: Harness, topic: str) -> None:
    for number in range(5):
        inside: list[float] = []
        outside: list[float] = []
        over = anyio.Event()

        async def come(stream: str, lease: float) -> None:
            try:
                async with member(harness.make_backend(), stream, lease):
                    inside.append(lease)  # noqa: B023
                    await over.wait()  # noqa: B023
            except anybus.ValidationError:
                outside.append(lease)  # noqa: B023

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(come, f"{topic}.{number}", 10.0)
                tasks.start_soon(come, f"{topic}.{number}", 30.0)
                await until(lambda: len(inside) + len(outside) == 2)  # noqa: B023
                over.set()
        assert len(inside) == 1


async def test_a_member_that_was_killed_counts_for_no_longer_than_its_lease(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    assert isinstance(backend, LeaseKeeper)
    async with backend:
        assert await backend.agree_lease(topic, "g", "killed", 0.2) == 0.2
        assert await backend.agree_lease(topic, "g", "newcomer", 5.0) == 0.2

        async def agreed() -> bool:
            return await backend.agree_lease(topic, "g", "newcomer", 5.0) == 5.0

        await until(agreed)
        assert await backend.kept_lease(topic, "g", "newcomer", 5.0) == 5.0
        # It was only frozen: it is told.
        assert await backend.kept_lease(topic, "g", "killed", 0.2) == 5.0


async def test_members_of_one_named_memory_share_their_lease(topic: str) -> None:
    config = SubscriptionConfig(topic, "g")
    async with AsyncExitStack() as stack:
        buses = [
            await stack.enter_async_context(
                anybus.connect(f"memory://{topic}", StreamBusOptions(claim_idle_timeout=lease))
            )
            for lease in (30.0, 10.0)
        ]
        await stack.enter_async_context(buses[0].subscribe(config, handle))
        with refused("claim_idle_timeout", "10 s", "30 s"):
            async with buses[1].subscribe(config, handle):
                pass


async def test_a_lost_reply_of_the_agreement_is_asked_for_again(server: RunningServer, topic: str) -> None:
    recorder = Recorder()
    async with proxied(server.port) as proxy:
        met = proxy.at("agree", CutAfter())
        async with member(RedisBackend(proxy.url), topic, 30.0, recorder):
            assert met.is_set()
            assert "not agreed on yet" in str(recorder.of("on_error", "read")[0].detail)
            with refused("claim_idle_timeout", "10 s", "30 s"):
                await comes_in(RedisBackend(server.url), topic, 10.0)


async def test_what_others_wrote_in_the_leases_key_is_no_lease(server: RunningServer, topic: str) -> None:
    def write() -> None:
        with server.client() as client:
            client.zadd(leases(topic, "g"), {"lease:soon": "inf", "anything": "inf", "old": 1})

    await to_thread.run_sync(write)
    await comes_in(RedisBackend(server.url), topic, 10.0)
    left: Any = await to_thread.run_sync(server.client().zrange, leases(topic, "g"), 0, -1)
    assert left == [b"lease:10.0"]


async def test_a_killed_member_does_not_count_for_longer_because_the_servers_clock_was_set_back(
    server: RunningServer, topic: str
) -> None:
    key = leases(topic, "g")

    def score_of_killed(tomorrow: bool) -> float:
        with server.client() as client:
            reply: Any = client.time()
            seconds = int(reply[0])
            if tomorrow:
                client.zadd(key, {"lease:10.0": "inf", "member:killed": (seconds + 24 * 3600) * 1000})
            score: Any = client.zscore(key, "member:killed")
            return float(score) - seconds * 1000

    await to_thread.run_sync(score_of_killed, True)
    with refused("claim_idle_timeout", "10 s", "30 s"):
        await comes_in(RedisBackend(server.url), topic, 30.0)
    assert await to_thread.run_sync(score_of_killed, False) < 17_000


async def test_a_backend_that_keeps_no_lease_says_so_once(topic: str, caplog: pytest.LogCaptureFixture) -> None:
    async with StreamBus(StepByStep(MemoryBackend())) as bus:
        for _ in range(2):
            async with bus.subscribe(SubscriptionConfig(topic, "g"), handle):
                pass
    said = [record.message for record in caplog.records if "does not keep a group's lease" in record.message]
    assert len(said) == 1
    assert said[0].startswith("StepByStep does not keep a group's lease: nobody notices")


def test_change_lease_is_a_bool() -> None:
    with refused("change_lease", "'yes'", "True or False"):
        StreamBusOptions(change_lease="yes")  # type: ignore[arg-type]
