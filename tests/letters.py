"""Dead letters for tests, made as the bus makes them."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import anyio
from harness import SOON, Harness, quick, until

from anybus import DeadLetters, Delivery, ExponentialBackoff, Message, StreamBus, SubscriptionConfig
from anybus._failure.copies import Origin, dead_letter
from anybus.abc import StreamBackend

AT = datetime(2026, 5, 6, 7, 8, 9, tzinfo=timezone.utc)


def minutes(number: float) -> timedelta:
    return timedelta(minutes=number)


async def bury(
    backend: StreamBackend,
    topic: str,
    *keys: str,
    group: str = "billing",
    code: str = "retries",
    at: datetime = AT,
    payload: bytes = b"",
    dead_letter_topic: str | None = None,
) -> list[str]:
    """Dead letters of that topic, one per key, which is the uid, too; their ids."""
    stream = dead_letter_topic or f"{topic}.dead"
    ids: list[str] = []
    for number, key in enumerate(keys):
        origin = Origin(topic, f"{number + 1}-0", group, f"{group}-1", attempts=4, deliveries=1)
        headers = {"tenant": "acme", "retry-attempt": "3", "retry-reason": "no", "retry-first-id": origin.id}
        message = Message(topic, payload, uid=key, key=key, headers=headers)
        letter = dead_letter(message, stream, origin, code=code, reason="no", error_type="ValueError", at=at)
        ids.append(await backend.publish(stream, letter))
    return ids


async def give_up_malformed(harness: Harness, topic: str, *entries: dict[str, bytes], group: str = "billing") -> None:
    """Malformed entries of the topic become dead letters, by a subscription that gives them up."""
    backend = harness.make_backend()

    async def handler(delivery: Delivery) -> None:
        raise AssertionError("a malformed entry is never handled")

    async with StreamBus(backend, quick()) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, group, group_start_id="0"), handler) as subscription:
            for fields in entries:
                await harness.append_raw(topic, fields)
            await until(lambda: subscription.statistics().dead_lettered == len(entries))


async def take(bus: StreamBus, topic: str, group: str, count: int) -> list[Delivery]:
    """The next messages of the group, acknowledged."""
    taken: list[Delivery] = []
    config = SubscriptionConfig(topic, group, group_start_id="0", retry_backoff=ExponentialBackoff(initial=0.01))
    with anyio.fail_after(SOON):
        async with bus.deliveries(config) as deliveries:
            while len(taken) < count:
                delivery = await deliveries.receive()
                await delivery.ack()
                taken.append(delivery)
    return taken


async def left(letters: DeadLetters) -> list[str]:
    """The uids of those that are there."""
    return [letter.message.uid async for letter in letters if letter.message is not None]
