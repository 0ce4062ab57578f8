"""Promise 7: a malformed entry is reported, dead-lettered with its raw fields, and only then acked.

If the dead-letter publish fails, the entry stays pending. An entry whose body is gone is reported, counted, acked. A
subscription on a dead-letter topic must name its own dead-letter topic, or ``DROP``.
"""

from __future__ import annotations

import pytest
from harness import Harness, Recorder, nothing_pending, quick, until

from anybus import DROP, BackendError, Delivery, Message, StreamBus, SubscriptionConfig, ValidationError


async def test_a_malformed_entry_becomes_a_dead_letter_with_its_raw_fields_and_harms_no_neighbour(
    harness: Harness, topic: str
) -> None:
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        await bus.publish(Message(topic, key="before"))
        bad_id = await harness.append_raw(topic, {"message": b"{not json", "extra": b"\x00\xff"})
        await bus.publish(Message(topic, key="after"))
        async with bus.subscribe(SubscriptionConfig(topic, "g", group_start_id="0"), handler) as subscription:
            await until(lambda: subscription.statistics().dead_lettered == 1 and len(handled) == 2)
            await nothing_pending(harness, topic, "g")
    assert handled == ["before", "after"]
    [(_, dead, raw)] = await harness.entries(f"{topic}.dead")
    assert dead is not None
    assert dead.headers["dead-letter-code"] == "malformed"
    assert dead.headers["dead-letter-id"] == bad_id
    assert dead.headers["dead-letter-attempts"] == "0"
    assert dead.headers["dead-letter-reason"]
    assert raw == {"raw:message": b"{not json", "raw:extra": b"\x00\xff"}
    [error] = recorder.of("on_error", "read")
    assert error.message_id == bad_id


async def test_if_the_dead_letter_cannot_be_published_the_entry_stays_pending(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()
    transfer_many = backend.transfer_many
    tries = 0
    pending: list[list[str]] = []

    async def failing(*args: object) -> list[object]:
        nonlocal tries
        tries += 1
        if tries <= 2:
            pending.append([entry.id for entry in await harness.pending(topic, "g")])
            return [BackendError("WRONGTYPE", may_have_happened=False)]
        return await transfer_many(*args)  # type: ignore[arg-type,return-value]

    backend.transfer_many = failing  # type: ignore[assignment,method-assign]

    async def handler(delivery: Delivery) -> None:
        raise AssertionError("a malformed entry is never handled")

    async with StreamBus(backend, quick(Recorder(), claim_idle_timeout=30)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            bad_id = await harness.append_raw(topic, {"nothing": b""})
            await until(lambda: subscription.statistics().dead_lettered == 1)
            assert await harness.pending(topic, "g") == []
    assert pending == [[bad_id], [bad_id]]
    assert len(await harness.entries(f"{topic}.dead")) == 1


async def test_an_entry_whose_body_is_gone_is_reported_counted_and_acked(harness: Harness, topic: str) -> None:
    backend = harness.make_backend()

    async def handler(delivery: Delivery) -> None:
        raise AssertionError("there is nothing to handle")

    recorder = Recorder()
    async with StreamBus(backend, quick(recorder, claim_idle_timeout=60)) as bus:
        await backend.create_group(topic, "g", "0")
        entry_id = await bus.publish(Message(topic))
        await backend.read_new(topic, "g", "dead", count=1, timeout=0)
        await harness.age(topic, "g")
        await harness.delete_entry(topic, entry_id)
        async with bus.subscribe(SubscriptionConfig(topic, "g"), handler) as subscription:
            await nothing_pending(harness, topic, "g")
            await until(lambda: subscription.statistics().held == 0)
            assert subscription.statistics().received == 1
            assert subscription.statistics().handled == 0
    [error] = recorder.of("on_error", "reclaim")
    assert error.message_id == entry_id
    assert "body is gone" in str(error.error)


async def test_with_drop_a_malformed_entry_is_reported_and_acked(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None:
        raise AssertionError("a malformed entry is never handled")

    recorder = Recorder()
    async with StreamBus(harness.make_backend(), quick(recorder)) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", dead_letter_topic=DROP), handler) as subscription:
            await harness.append_raw(topic, {"nothing": b""})
            await until(lambda: subscription.statistics().dead_lettered == 1)
            await nothing_pending(harness, topic, "g")
    assert len(recorder.of("on_error", "read")) == 1
    assert await harness.entries(f"{topic}.dead") == []


async def test_a_subscription_on_dead_letters_must_say_where_its_own_go(harness: Harness, topic: str) -> None:
    async def handler(delivery: Delivery) -> None: ...

    async with StreamBus(harness.make_backend(), quick()) as bus:
        with pytest.raises(ValidationError, match="dead_letter_topic"):
            bus.subscribe(SubscriptionConfig(f"{topic}.dead", "g"), handler)
        own = f"{topic}-given-up"
        async with bus.subscribe(SubscriptionConfig(topic, "g", dead_letter_topic=own), handler):
            with pytest.raises(ValidationError, match="dead_letter_topic"):
                bus.subscribe(SubscriptionConfig(own, "g"), handler)
            async with bus.subscribe(SubscriptionConfig(own, "g", dead_letter_topic=DROP), handler) as subscription:
                assert subscription.is_running
