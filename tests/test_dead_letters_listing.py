"""``bus.dead_letters``: an operator looks through what was given up on.

Specification: docs/dead-letters.md. Looking goes from the oldest to the newest, up to the last one that was there at
the beginning, and changes nothing. A dead letter's message is what it was before it died; what the bus wrote in its
headers stands in fields of its own. Filters (group, code, time, key) all have to hold. What is malformed is listed with
its raw fields, what is too large with its sizes, and neither keeps any other from being listed. No page holds more than
about 1 MiB, or one larger letter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Any

import anyio
import pytest
from harness import QUICK, Harness, quick, until
from letters import AT, bury, give_up_malformed, minutes
from test_five_method_backend import ListBackend

from anybus import (
    ClosedError,
    DeadLetter,
    DeadLetters,
    Delivery,
    Message,
    Reject,
    StreamBus,
    SubscriptionConfig,
    UnsupportedError,
    ValidationError,
)
from anybus._dead_letters.pages import ENTRY_BYTES, PAGE_BYTES
from anybus.abc import StoredEntry
from anybus.backends.memory import MemoryBackend


@pytest.fixture
async def bus(harness: Harness) -> AsyncGenerator[StreamBus, None]:
    async with StreamBus(harness.make_backend(), quick()) as made:
        yield made


async def ids(letters: DeadLetters) -> list[str]:
    return [letter.id async for letter in letters]


async def keys(letters: DeadLetters) -> list[str]:
    return [letter.message.key async for letter in letters if letter.message is not None]


# --- what a dead letter says


async def test_a_dead_letter_tells_all_that_is_known_of_it_and_its_message_is_as_it_was(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    async def handler(delivery: Delivery) -> None:
        if delivery.message.key == "rejected":
            raise Reject("no such customer")
        raise LookupError("no stock")

    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tenant": "acme"}
    messages = [Message(topic, b"\x00\xff", key=key, kind="K", headers=trace) for key in ("rejected", "failed")]
    config = SubscriptionConfig(topic, "billing", max_retry=1, retry_backoff=QUICK, consumer="worker")
    async with bus.subscribe(config, handler) as subscription:
        entry_ids = [await bus.publish(message) for message in messages]
        await until(lambda: subscription.statistics().dead_lettered == 2)

    by_reason = {letter.reason: letter async for letter in bus.dead_letters(topic)}
    rejected, failed = by_reason["no such customer"], by_reason["no stock"]
    stored = await harness.entries(f"{topic}.dead")
    assert {rejected.id, failed.id} == {entry_id for entry_id, _, _ in stored}
    assert [rejected.message, failed.message] == messages
    assert [rejected.code, failed.code] == ["rejected", "retries"]
    assert failed.error_type == "builtins.LookupError"
    assert [rejected.attempts, failed.attempts] == [1, 2]
    assert [rejected.deliveries, failed.deliveries] == [1, 1]
    for letter, entry_id in zip((rejected, failed), entry_ids, strict=True):
        assert (letter.topic, letter.first_id, letter.group) == (topic, entry_id, "billing")
        assert str(letter.consumer).startswith("worker-")
        assert letter.at is not None
        assert letter.at.utcoffset() == minutes(0)
        assert (letter.raw, letter.raw_sizes, letter.error) == ({}, {}, None)


async def test_a_dead_letter_is_frozen_and_keeps_its_payload_out_of_its_repr(bus: StreamBus, topic: str) -> None:
    await bury(bus.backend, topic, "a", payload=b"secret")
    [letter] = [letter async for letter in bus.dead_letters(topic)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        letter.code = "other"  # type: ignore[misc]
    assert "secret" not in repr(letter)


async def test_what_another_implementation_gave_up_on_says_less_and_is_listed(bus: StreamBus, topic: str) -> None:
    await bus.publish(
        Message(f"{topic}.dead", b"x", key="k", headers={"dead-letter-reason": "no", "retry-attempt": "2"})
    )
    [letter] = [letter async for letter in bus.dead_letters(topic)]
    assert (letter.reason, letter.code, letter.group, letter.topic, letter.attempts) == ("no", None, None, None, None)
    assert letter.message is not None
    assert (letter.message.topic, letter.message.headers) == (topic, {})
    assert letter.at is not None  # when it was stored


@pytest.mark.parametrize("attempts", ["", "x", "-1", "9" * 5000, "²"])
async def test_numbers_and_times_that_are_none_are_left_out(bus: StreamBus, topic: str, attempts: str) -> None:
    headers = {"dead-letter-attempts": attempts, "dead-letter-deliveries": attempts, "dead-letter-at": "yesterday"}
    await bus.publish(Message(f"{topic}.dead", headers=headers))
    [letter] = [letter async for letter in bus.dead_letters(topic)]
    assert (letter.attempts, letter.deliveries) == (None, None)
    assert letter.at is not None


# --- going through them


async def test_they_come_oldest_first_and_looking_changes_nothing(harness: Harness, bus: StreamBus, topic: str) -> None:
    buried = await bury(bus.backend, topic, *(f"k{number}" for number in range(250)))
    before = await harness.entries(f"{topic}.dead")
    assert await ids(bus.dead_letters(topic)) == buried
    assert await ids(bus.dead_letters(topic)) == buried
    assert await harness.entries(f"{topic}.dead") == before


async def test_where_nothing_was_given_up_there_is_nothing(bus: StreamBus, topic: str) -> None:
    letters = bus.dead_letters(topic)
    assert await ids(letters) == []
    page = await letters.page()
    assert (page.letters, page.next) == ((), None)


async def test_what_comes_while_they_are_gone_through_is_left_for_the_next_time(bus: StreamBus, topic: str) -> None:
    await bury(bus.backend, topic, "a", "b")
    seen: list[DeadLetter] = []
    async for letter in bus.dead_letters(topic):
        seen.append(letter)
        await bury(bus.backend, topic, f"later-{len(seen)}")
        assert len(seen) <= 2
    assert await keys(bus.dead_letters(topic)) == ["a", "b", "later-1", "later-2"]


async def test_an_iteration_may_be_left_in_its_middle(bus: StreamBus, topic: str) -> None:
    await bury(bus.backend, topic, "a", "b")
    with anyio.CancelScope() as scope:
        async for letter in bus.dead_letters(topic):
            assert letter.message is not None
            assert letter.message.key == "a"
            scope.cancel()
            await anyio.sleep_forever()
    async for _ in bus.dead_letters(topic):
        break
    assert await keys(bus.dead_letters(topic)) == ["a", "b"]


async def test_pages_go_on_where_the_last_one_ended(bus: StreamBus, topic: str) -> None:
    buried = await bury(bus.backend, topic, *"abcdefg")
    letters = bus.dead_letters(topic)
    found: list[list[str]] = []
    after: str | None = None
    while True:
        page = await letters.page(after, limit=3)
        found.append([letter.id for letter in page.letters])
        after = page.next
        if after is None:
            break
    assert found == [buried[:3], buried[3:6], buried[6:]]


async def test_a_page_that_is_just_full_is_the_last_one(bus: StreamBus, topic: str) -> None:
    await bury(bus.backend, topic, "a", "b")
    page = await bus.dead_letters(topic).page(limit=2)
    assert (len(page.letters), page.next) == (2, None)


async def test_a_page_is_full_however_few_of_them_match(bus: StreamBus, topic: str) -> None:
    for number in range(60):
        await bury(bus.backend, topic, f"a{number}", group="other")
        await bury(bus.backend, topic, f"b{number}")
    page = await bus.dead_letters(topic, group="billing").page(limit=50)
    assert [letter.message.key for letter in page.letters if letter.message] == [f"b{number}" for number in range(50)]
    rest = await bus.dead_letters(topic, group="billing").page(page.next)
    assert (len(rest.letters), rest.next) == (10, None)


class Counting(MemoryBackend):
    """Counts how often it is asked for a page."""

    asked = 0

    async def read_page(
        self, stream: str, *, after: str | None, until: str, count: int, max_bytes: int, max_entry_bytes: int
    ) -> list[StoredEntry]:
        self.asked += 1
        return await super().read_page(
            stream, after=after, until=until, count=count, max_bytes=max_bytes, max_entry_bytes=max_entry_bytes
        )


async def test_a_small_page_of_few_that_match_is_not_looked_for_one_by_one(topic: str) -> None:
    backend = Counting()
    async with StreamBus(backend) as bus:
        await bury(backend, topic, *map(str, range(500)))
        await bury(backend, topic, "x", code="rejected")
        page = await bus.dead_letters(topic, code="rejected").page(limit=1)
        assert (len(page.letters), page.next) == (1, None)
        assert backend.asked < 20


# --- filters


async def test_filters_by_group_and_code_and_key(bus: StreamBus, topic: str) -> None:
    await bury(bus.backend, topic, "a", "b", group="billing", code="retries")
    await bury(bus.backend, topic, "a", "c", group="billing", code="rejected")
    await bury(bus.backend, topic, "a", "d", group="mail", code="retries")
    assert await keys(bus.dead_letters(topic, group="billing")) == ["a", "b", "a", "c"]
    assert await keys(bus.dead_letters(topic, code="retries")) == ["a", "b", "a", "d"]
    assert await keys(bus.dead_letters(topic, key="a")) == ["a", "a", "a"]
    assert await keys(bus.dead_letters(topic, group="billing", code="rejected", key="c")) == ["c"]
    assert await keys(bus.dead_letters(topic, group="mail", key="b")) == []
    assert await keys(bus.dead_letters(topic, group="nobody")) == []


async def test_filters_by_the_time_at_which_they_were_given_up(bus: StreamBus, topic: str) -> None:
    for number, key in enumerate("abcd"):
        await bury(bus.backend, topic, key, at=AT + minutes(number))
    assert await keys(bus.dead_letters(topic, since=AT + minutes(1))) == ["b", "c", "d"]
    assert await keys(bus.dead_letters(topic, until=AT + minutes(1))) == ["a"]
    assert await keys(bus.dead_letters(topic, since=AT + minutes(1), until=AT + minutes(3))) == ["b", "c"]


async def test_in_a_shared_dead_letter_topic_every_topic_has_its_own(bus: StreamBus, topic: str) -> None:
    shared, other = f"{topic}.all", f"{topic}.other"
    await bury(bus.backend, topic, "a", dead_letter_topic=shared)
    await bury(bus.backend, other, "b", dead_letter_topic=shared)
    await bus.publish(Message(shared, key="unknown"))
    assert await keys(bus.dead_letters(topic, dead_letter_topic=shared)) == ["a", "unknown"]
    assert await keys(bus.dead_letters(other, dead_letter_topic=shared)) == ["b", "unknown"]
    assert await keys(bus.dead_letters(topic)) == []
    assert bus.dead_letters(topic, dead_letter_topic=shared).dead_letter_topic == shared


# --- what cannot be decoded, and what is large


async def test_a_malformed_entry_is_listed_with_its_raw_fields(harness: Harness, bus: StreamBus, topic: str) -> None:
    fields = {"message": b"{not json", "extra": b"\x00\xff"}
    await bury(bus.backend, topic, "before")
    await give_up_malformed(harness, topic, fields)
    await bury(bus.backend, topic, "after")
    before, letter, after = [letter async for letter in bus.dead_letters(topic)]
    assert [before.code, after.code] == ["retries", "retries"]
    assert (letter.message, letter.raw, letter.code) == (None, fields, "malformed")
    assert letter.raw_sizes == {"message": 9, "extra": 2}
    assert (letter.group, letter.topic, letter.attempts, letter.error) == ("billing", topic, 0, None)
    assert letter.reason
    assert await ids(bus.dead_letters(topic, code="malformed", group="billing")) == [letter.id]


async def test_what_nobody_can_decode_in_the_dead_letter_topic_itself_is_listed_and_harms_no_neighbour(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    await bury(bus.backend, topic, "before")
    await harness.append_raw(f"{topic}.dead", {"message": b"{not json", "raw:x": b"1"})
    await bury(bus.backend, topic, "after")
    before, letter, after = [letter async for letter in bus.dead_letters(topic)]
    assert [before.code, after.code] == ["retries", "retries"]
    assert (letter.message, letter.code, letter.group, letter.topic) == (None, None, None, None)
    assert letter.raw == {"message": b"{not json", "raw:x": b"1"}
    assert letter.error
    assert letter.at is not None
    assert await ids(bus.dead_letters(topic, group="billing")) == [before.id, after.id]


async def test_no_page_holds_more_than_its_bytes(bus: StreamBus, topic: str) -> None:
    body = bytes(PAGE_BYTES // 2)
    buried = await bury(bus.backend, topic, *"abcde", payload=body)
    page = await bus.dead_letters(topic).page(limit=5)
    assert 1 <= len(page.letters) <= 2
    assert page.next is not None
    assert await ids(bus.dead_letters(topic)) == buried


async def test_payloads_as_large_as_they_may_be_are_listed_one_by_one(bus: StreamBus, topic: str) -> None:
    buried = await bury(bus.backend, topic, "small", "a")
    buried += await bury(bus.backend, topic, "large", "larger", payload=bytes(5 * 1024 * 1024))
    buried += await bury(bus.backend, topic, "b")
    letters = [letter async for letter in bus.dead_letters(topic)]
    assert [letter.id for letter in letters] == buried
    assert [len(letter.message.payload) for letter in letters if letter.message] == [0, 0, 5 * 1024**2, 5 * 1024**2, 0]
    sizes: list[int] = []
    after: str | None = None
    while True:
        page = await bus.dead_letters(topic).page(after)
        sizes.append(len(page.letters))
        after = page.next
        if after is None:
            break
    assert sizes == [2, 1, 1, 1]


async def test_raw_fields_too_large_to_be_listed_are_told_by_their_sizes(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    size = ENTRY_BYTES + 1
    await give_up_malformed(harness, topic, {"message": bytes(size), "x": b"1"}, {"message": b"", "y": b"22"})
    large, small = [letter async for letter in bus.dead_letters(topic)]
    assert (large.message, large.code, large.group) == (None, "malformed", "billing")
    assert large.raw_sizes == {"message": size, "x": 1}
    assert len(large.raw) in (0, 2)  # in memory there is nothing that a page could be too large for
    assert small.raw == {"message": b"", "y": b"22"}


async def test_a_dead_letter_too_large_to_be_received_is_listed_by_its_size(
    harness: Harness, bus: StreamBus, topic: str
) -> None:
    size = ENTRY_BYTES + 1
    await harness.append_raw(f"{topic}.dead", {"message": bytes(size), "x": b"1"})
    buried = await bury(bus.backend, topic, "after")
    large, after = [letter async for letter in bus.dead_letters(topic)]
    assert (large.message, large.raw_sizes) == (None, {"message": size, "x": 1})
    assert large.error
    assert after.id == buried[0]


# --- what is refused


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"topic": ""}, "topic"),
        ({"topic": "anybus:x"}, "topic"),
        ({"dead_letter_topic": ""}, "dead_letter_topic"),
        ({"dead_letter_topic": "orders"}, "dead_letter_topic"),
        ({"group": " "}, "group"),
        ({"code": ""}, "code"),
        ({"code": 3}, "code"),
        ({"key": b"k"}, "key"),
        ({"since": datetime(2026, 1, 1)}, "since"),
        ({"until": "2026"}, "until"),
        ({"since": AT, "until": AT}, "until"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(bus: StreamBus, given: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {"topic": "orders", **given}
    with pytest.raises(ValidationError, match=f"^{named} must be"):
        bus.dead_letters(**arguments)


async def test_a_page_refuses_what_is_no_place_and_no_number(bus: StreamBus, topic: str) -> None:
    await bury(bus.backend, topic, "a")
    letters = bus.dead_letters(topic)
    for after in ("x", "", "1-x", "$", "("):
        with pytest.raises(ValidationError, match="after"):
            await letters.page(after)
    for limit in (0, -1, True, "5"):
        with pytest.raises(ValidationError, match="limit"):
            await letters.page(limit=limit)  # type: ignore[arg-type]


async def test_a_backend_that_cannot_says_so(topic: str) -> None:
    async with StreamBus(ListBackend()) as bus:
        with pytest.raises(UnsupportedError, match=r"ListBackend cannot list dead letters.*DeadLetterStore"):
            bus.dead_letters(topic)


async def test_a_bus_that_is_closed_shows_nothing(harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend()) as bus:
        letters = bus.dead_letters(topic)
    with pytest.raises(ClosedError):
        bus.dead_letters(topic)
    with pytest.raises(ClosedError):
        await ids(letters)
    with pytest.raises(ClosedError):
        await letters.page()
