"""What a subscription's user lacks is found when the subscription is entered, and named; nothing has happened by then."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from acl import user_with
from anyio import to_thread
from harness import QUICK, Recorder, quick, until
from servers import RedisHarness, RunningServer

from anybus import BackendError, Delivery, Message, Reject, Retry, StreamBus, SubscriptionConfig
from anybus._failure.copies import retry_stream
from anybus.backends.redis import RedisBackend

DOCUMENTED = re.search(
    r"ACL SETUSER worker on >secret (.*?)```",
    (Path(__file__).parent.parent / "docs" / "redis.md").read_text(),
    re.DOTALL,
)


async def enter(url: str, topic: str, **config: Any) -> None:
    async def handler(delivery: Delivery) -> None:
        raise AssertionError("nothing was published")

    async with StreamBus(RedisBackend(url), quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", **config), handler):
            pass


async def keys(server: RunningServer, topic: str) -> list[bytes]:
    def look() -> list[bytes]:
        with server.client() as client:
            found: Any = client.keys(f"*{topic}*")
            return list(found)

    return await to_thread.run_sync(look)


@pytest.mark.parametrize(
    "command",
    [
        "xack",
        "xadd",
        "xdel",
        "xclaim",
        "xautoclaim",
        "xpending",
        "xreadgroup",
        "evalsha",
        "zadd",
        "zrem",
        "zrange",
        "hset",
    ],
)
async def test_a_missing_right_fails_the_subscription_at_its_beginning_and_is_named(
    server: RunningServer, topic: str, command: str
) -> None:
    async with user_with(server, "+@all", f"-{command}") as user:
        with pytest.raises(BackendError) as caught:
            await enter(user.url, topic)
    assert command.upper() in str(caught.value)
    assert "XINFO" not in str(caught.value)
    assert not caught.value.can_pass
    assert not caught.value.may_have_happened
    assert await keys(server, topic) == []


async def test_keys_that_are_out_of_reach_are_named(server: RunningServer, topic: str) -> None:
    async with user_with(server, "resetkeys", f"~{topic}", f"~anybus:{{{topic}}}:retry:*", "+@all") as user:
        with pytest.raises(BackendError) as caught:
            await enter(user.url, topic)
        assert f"XADD on '{topic}.dead'" in str(caught.value)
        assert f"ZADD on 'anybus:{{{topic}}}:delayed:g'" in str(caught.value)
        assert "XACK" not in str(caught.value)
        await user.rules(f"~anybus:{{{topic}}}:*")
        with pytest.raises(BackendError, match=r"needs: XADD on '[^' ]*\.dead' \("):
            await enter(user.url, topic)
        await user.rules(f"~{topic}.elsewhere")
        await enter(user.url, topic, dead_letter_topic=f"{topic}.elsewhere")


async def test_looking_at_the_rights_changes_nothing(server: RunningServer, topic: str) -> None:
    async with RedisBackend(server.url) as backend:
        retries = retry_stream(topic, "g")
        await backend.check_rights(topic, retries, "g", dead_letter_topic=f"{topic}.dead")
        assert await keys(server, topic) == []
        await backend.create_group(topic, "g")
        await backend.publish(topic, Message(topic))
        await backend.read_new(topic, "g", "c", count=1, timeout=0)
        before = await backend.pending_entries(topic, "g"), await backend.consumer_names(topic, "g")
        await backend.check_rights(topic, retries, "g", dead_letter_topic=f"{topic}.dead")
        after = await backend.pending_entries(topic, "g"), await backend.consumer_names(topic, "g")
        assert [(entry.id, entry.consumer, entry.deliveries) for entry in after[0]] == [
            (entry.id, entry.consumer, entry.deliveries) for entry in before[0]
        ]
        assert after[1] == before[1] == ["c"]
        assert await keys(server, topic) == [topic.encode()]


async def test_the_documented_rights_are_enough_for_all_that_a_subscription_does(
    server: RunningServer, topic: str
) -> None:
    assert DOCUMENTED is not None
    documented = DOCUMENTED[1].replace("orders", topic).split()
    harness = RedisHarness(server)
    seen: list[str] = []

    async def handler(delivery: Delivery) -> None:
        key = delivery.message.key
        seen.append(key)
        if key == "retried" and delivery.state.attempt == 1:
            raise Retry
        if key == "rejected":
            raise Reject("no")

    recorder = Recorder()
    async with user_with(server, "resetkeys", *documented) as user:
        async with StreamBus(RedisBackend(user.url), quick(recorder)) as bus:
            config = SubscriptionConfig(topic, "g", group_start_id="0", retry_backoff=QUICK)
            async with bus.subscribe(config, handler) as subscription:
                for key in ("plain", "retried", "rejected"):
                    await bus.publish(Message(topic, key=key))
                await harness.append_raw(topic, {f"field{number}": b"" for number in range(4000)})
                await until(lambda: subscription.statistics().dead_lettered == 2 and seen.count("retried") == 2)
                await until(lambda: subscription.statistics().held == 0)
    assert [str(event.error) for event in recorder.of("on_error", "ack-flush")] == []
    assert len(await harness.entries(f"{topic}.dead")) == 2
