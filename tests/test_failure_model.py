"""Retry, crash, dead letter, replay and purge against a simple model, by Hypothesis, in a :mod:`simulation`.

On memory under a virtual clock, and with fewer examples on a server:

- *One at a time* (``max_in_flight=1``): what becomes of each message, how often it is handled, as which attempt, and
  with which code it is given up on, is exactly what the model predicts. Replays and purges happen in between: a replay
  is a new beginning.
- *Side by side*: every message ends handled or as a dead letter or purged, never two of these and never none. It fails
  at most ``max_retry + 1`` times in a row, its attempts are counted in order, its code fits its last outcome; and a
  message that never kills its process is never given up on because of one other that does. Replays and purges happen while
  the subscription runs, and die with its process.

In both, whatever interrupts a replay or a purge, each letter is then where it was, or where it should go: never both,
never neither. What is handled is what was published: the same uid, payload and headers, none of a former life.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import anyio
import pytest
import trio.testing
from harness import MemoryHarness
from hypothesis import example, given, settings
from hypothesis import strategies as st
from servers import RedisHarness, RunningServer
from simulation import CRASH, FAIL, OK, REJECT, RELEASE, RETRY, Act, Cut, Script, World, predict
from sweeps import sampled

outcomes = st.sampled_from([OK, FAIL, RETRY, REJECT, RELEASE, CRASH])
scripts = st.lists(outcomes, max_size=8).map(tuple)
killers = st.integers(min_value=1, max_value=12).map(lambda times: (CRASH,) * times)
worlds = st.tuples(
    st.lists(scripts | killers, min_size=1, max_size=5),
    st.integers(min_value=0, max_value=3),
    st.integers(min_value=4, max_value=6),
)

small_worlds = st.tuples(
    st.lists(st.lists(outcomes, max_size=4).map(tuple), min_size=1, max_size=3),
    st.integers(min_value=0, max_value=2),
    st.just(4),
)
"""On a server every crash costs a lease, in real time."""

LEASE = 1.5
"""On a server: longer than a busy machine keeps a process waiting, whose deliveries would be counted again then."""

cuts = st.builds(Cut, st.sampled_from(["steps", "cancel", "raise"]), st.integers(min_value=1, max_value=8))
acts = st.builds(
    Act,
    st.sampled_from(["topic", "group", "topic", "group", "purge"]),
    st.none() | st.frozensets(st.sampled_from(["0", "1", "2", "3", "4", "bad0", "bad1"])),
    st.sampled_from([None, None, None, "retries", "rejected", "deliveries", "malformed"]),
    st.none() | cuts,
    st.booleans(),
)
failing = st.lists(st.sampled_from([FAIL, REJECT, REJECT, FAIL, RETRY, CRASH, RELEASE, OK]), max_size=12).map(tuple)
replayed_worlds = st.tuples(
    st.lists(failing | killers, min_size=1, max_size=5),
    st.integers(min_value=0, max_value=2),
    st.just(4),
    st.integers(min_value=0, max_value=2),
    st.lists(acts, min_size=1, max_size=4),
)
REPLAYED = (
    [(REJECT,) * 3, (FAIL, FAIL, OK), (CRASH,) * 5, (FAIL,) * 3, (REJECT, FAIL, REJECT)],
    1,
    4,
    1,
    [
        Act("group", cut=Cut("cancel", 2)),
        Act("topic", frozenset({"0", "bad0"}), twice=True),
        Act("group", code="rejected", cut=Cut("raise", 1)),
        Act("purge", frozenset({"0"})),
    ],
)

Replayed = tuple[list[Script], int, int, int, list[Act]]


async def exactly(world: World) -> None:
    codes = await world.run()
    assert world.wrong == []
    for number, script in enumerate(world.scripts):
        key = str(number)
        fate = predict(script, world.max_retry, world.max_deliveries, world.replays[key])
        gone = fate.code is None or key in world.purged
        assert codes[key] == ((None, 0) if gone else (fate.code, 1)), (script, fate)
        assert tuple(world.outcomes[key]) == fate.outcomes
        assert tuple(world.attempts[key]) == fate.attempts
    for key in world.keys[len(world.scripts) :]:
        assert codes[key] == ((None, 0) if key in world.purged else ("malformed", 1))


async def lawfully(world: World) -> None:
    codes = await world.run()
    assert world.wrong == []
    for number, script in enumerate(world.scripts):
        key = str(number)
        code, letters = codes[key]
        seen, attempts = world.outcomes[key], world.attempts[key]
        assert letters == (0 if code is None else 1)
        # A suspect that waits for the others' end is counted if one of them, which is no suspect yet, kills the process.
        unlucky = code == "deliveries" and world.killers(besides=key) >= 2
        ends = [OK in seen and not unlucky, code is not None, key in world.purged]
        assert sum(ends) == 1, "handled, dead-lettered or purged: never two of these, never none"
        assert attempts[0] == 1
        for one, other in pairwise(attempts):
            assert other in (one, one + 1) or (world.acts and other == 1), "attempts are counted one by one"
        assert max(attempts) <= world.max_retry + 1
        if code == "retries":
            assert (seen[-1] in (FAIL, RETRY), attempts[-1]) == (True, world.max_retry + 1)
        elif code == "rejected":
            assert seen[-1] == REJECT
        elif code == "deliveries":
            # Three times it may have been a neighbour's fault. From then on it was alone.
            assert unlucky or seen.count(CRASH) >= world.max_deliveries - 3
        if CRASH not in script and not unlucky:
            assert code != "deliveries", "a message that kills nobody is never given up on for a crash"
    for key in world.keys[len(world.scripts) :]:
        assert codes[key] == ((None, 0) if key in world.purged else ("malformed", 1))


def virtually(check: Callable[[World], Any], world: World) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0)
    anyio.run(check, world, backend="trio", backend_options={"clock": clock})


def in_worlds(examples: int, world: st.SearchStrategy[Any], first: Sequence[Any], check: Callable[[Any], None]) -> None:
    """Look at these worlds first, and then at as many others as told."""
    decorated: Any = given(world)(check)
    for one in first:
        decorated = example(one)(decorated)
    settings(max_examples=examples)(decorated)()


@sampled("examples", 20, 150)
def test_one_at_a_time_everything_is_as_predicted(examples: int) -> None:
    def check(world: tuple[list[Script], int, int]) -> None:
        made, max_retry, max_deliveries = world
        virtually(exactly, World(MemoryHarness(), made, max_retry, max_deliveries, 1, 60.0))

    first = ([(CRASH,) * 12, (OK,), (FAIL, CRASH, OK)], 1, 4), ([(RELEASE, CRASH) * 4, (FAIL,) * 8], 3, 4)
    in_worlds(examples, worlds, first, check)


@sampled("examples", 20, 150)
def test_side_by_side_nothing_is_lost_and_nobody_is_taken_along(examples: int) -> None:
    def check(world: tuple[list[Script], int, int]) -> None:
        made, max_retry, max_deliveries = world
        virtually(lawfully, World(MemoryHarness(), made, max_retry, max_deliveries, 4, 60.0))

    unlucky = ([(FAIL, FAIL, FAIL, FAIL, RELEASE, CRASH), (CRASH,) * 4, ()], 1, 4)
    in_worlds(examples, worlds, [([(CRASH,) * 12, (OK,), (OK,), (CRASH,) * 12, (OK,)], 1, 4), unlucky], check)


@sampled("examples", 20, 150)
def test_a_replay_is_a_new_beginning_and_loses_and_doubles_nothing_however_it_ends(examples: int) -> None:
    def check(world: Replayed) -> None:
        made, max_retry, max_deliveries, malformed, done = world
        virtually(exactly, World(MemoryHarness(), made, max_retry, max_deliveries, 1, 60.0, malformed, done))

    in_worlds(examples, replayed_worlds, [REPLAYED], check)


@sampled("examples", 20, 100)
def test_replay_and_purge_while_the_messages_are_handled_and_the_processes_die(examples: int) -> None:
    def check(world: Replayed) -> None:
        made, max_retry, max_deliveries, malformed, done = world
        virtually(
            lawfully, World(MemoryHarness(), made, max_retry, max_deliveries, 4, 60.0, malformed, done, live=True)
        )

    in_worlds(examples, replayed_worlds, [REPLAYED], check)


@sampled("examples", 1, 3)
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_the_same_on_a_server(server: RunningServer, loop: str, examples: int) -> None:
    def check(world: tuple[list[Script], int, int]) -> None:
        for law, max_in_flight in ((exactly, 1), (lawfully, 4)):
            anyio.run(law, World(RedisHarness(server), *world, max_in_flight, LEASE), backend=loop)

    first = ([(CRASH,) * 5, (OK,), (FAIL, CRASH, OK), (REJECT,), (RELEASE, RETRY, OK)], 1, 4)
    in_worlds(examples, small_worlds, [first], check)


@sampled("examples", 1, 3)
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_replay_and_purge_on_a_server(server: RunningServer, loop: str, examples: int) -> None:
    def check(world: Replayed) -> None:
        made, max_retry, max_deliveries, malformed, done = world
        for law, max_in_flight, live in ((exactly, 1, False), (lawfully, 4, True)):
            simulated = World(
                RedisHarness(server), made, max_retry, max_deliveries, max_in_flight, LEASE, malformed, done, live
            )
            anyio.run(law, simulated, backend=loop)

    small = st.tuples(small_worlds, st.integers(0, 1), st.lists(acts, min_size=1, max_size=2))
    first = ([(REJECT,) * 3, (FAIL, FAIL, OK), (FAIL, REJECT)], 1, 4, 1, REPLAYED[4])
    in_worlds(examples, small.map(lambda parts: (*parts[0], *parts[1:])), [first], check)
