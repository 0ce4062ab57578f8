"""Words that only some values make sense for are refused where they are given, under the name of their own field.

Specification: a group begins at ``"$"``, ``"0"`` or an entry's id; anything else is refused by the options, and by a
backend's ``create_group``. Dead letters are filtered by the codes that the bus writes; another code, which would find
nothing, is refused with the list of them. A letter with another implementation's code is found without that filter.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness import Harness, quick
from letters import bury
from refusal import refused

from anybus import StreamBus, StreamBusOptions, SubscriptionConfig
from anybus._failure.settlement import CODES

NO_PLACES = ["first", "latest", ">", "-", "+", "$$", "0-", "-0", "1-2-3", "1-x", "1.5", "+1", "\uff11", str(2**64)]
PLACES = ["$", "0", "0-0", "1714982400000-0", "5", f"{2**64 - 1}-{2**64 - 1}"]


@pytest.mark.parametrize("value", NO_PLACES)
def test_a_group_cannot_begin_at_what_is_no_place(value: str) -> None:
    with refused("group_start_id", repr(value), "'$', '0' or an entry's id"):
        StreamBusOptions(group_start_id=value)
    with refused("group_start_id", repr(value), "'$', '0' or an entry's id"):
        SubscriptionConfig("t", "g", group_start_id=value)


@pytest.mark.parametrize("value", NO_PLACES)
async def test_a_backend_makes_no_group_at_what_is_no_place(value: str, harness: Harness, topic: str) -> None:
    async with harness.make_backend() as backend:
        with refused("start_id", repr(value), "'$', '0' or an entry's id"):
            await backend.create_group(topic, "g", value)
        assert await backend.create_group(topic, "g"), "a refusal has made a group"


@pytest.mark.parametrize("value", PLACES)
async def test_a_group_begins_at_every_place_that_makes_sense(value: str, harness: Harness, topic: str) -> None:
    assert StreamBusOptions(group_start_id=value).group_start_id == value
    assert SubscriptionConfig("t", "g", group_start_id=value).group_start_id == value
    async with harness.make_backend() as backend:
        assert await backend.create_group(topic, "g", value)


@pytest.mark.parametrize("value", ["nope", "Rejected", "", "retry", "gave_up", 5])
async def test_dead_letters_of_an_unknown_code_are_refused_with_the_codes_there_are(
    value: Any, harness: Harness, topic: str
) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        with refused("code", repr(value), f"one of {', '.join(CODES)}"):
            bus.dead_letters(topic, code=value)


@pytest.mark.parametrize("code", CODES)
async def test_dead_letters_of_every_code_are_found_by_it(code: str, harness: Harness, topic: str) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        for other in CODES:
            await bury(bus.backend, topic, other, code=other)
        assert [letter.code async for letter in bus.dead_letters(topic, code=code)] == [code]


async def test_a_dead_letter_with_another_implementations_code_is_listed_and_replayed_without_the_filter(
    harness: Harness, topic: str
) -> None:
    async with StreamBus(harness.make_backend(), quick()) as bus:
        await bury(bus.backend, topic, "foreign", code="too-salty")
        letters = bus.dead_letters(topic)
        foreign = [letter async for letter in letters if letter.code == "too-salty"]
        assert (await letters.replay(foreign)).replayed == 1
