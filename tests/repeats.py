"""Why a message was handled more than once, from what the consumers wrote to files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from test_redis_crashes import Child

REPLICATION = 1.0
"""For so many seconds before a kill, what the primary has confirmed may be missing on the replica."""

NOTICED = 0.5
"""So many seconds after a kill, no consumer sends anything to the old primary any more."""


@dataclass(frozen=True)
class Outage:
    """Times by the clock that all processes of the machine share.

    :ivar killed: just before the primary was killed.
    :ivar resumed: when messages that were published after it were being handled.
    """

    killed: float
    resumed: float


@dataclass(frozen=True)
class Handling:
    """:ivar settled: when its consumer was told that it is acknowledged; None = it never was."""

    uid: str
    began: float
    ended: float
    settled: float | None


def handlings(consumers: Iterable[Child]) -> dict[str, list[Handling]]:
    """All successful handlings of each message, in their order."""
    found: defaultdict[str, list[Handling]] = defaultdict(list)
    for consumer in consumers:
        acked: defaultdict[tuple[str, str], list[float]] = defaultdict(list)  # a retry may have the id of a message
        for what, entry_id, *rest in consumer.lines("events.g"):
            if what == "settled" and rest[0] == "acked":
                acked[entry_id, rest[2]].append(float(rest[1]))
        for uid, entry_id, began, ended, attempt in consumer.lines("handled.g"):
            later = [when for when in acked[entry_id, attempt] if when >= float(ended)]
            found[uid].append(Handling(uid, float(began), float(ended), min(later, default=None)))
    for each in found.values():
        each.sort(key=lambda one: one.ended)
    return dict(found)


def cause(first: Handling, second: Handling, outages: Sequence[Outage]) -> str | None:
    """What made the second handling of a message necessary. None if nothing that the outages explain."""
    for outage in outages:
        if second.ended <= outage.killed or not outage.killed - REPLICATION <= first.ended <= outage.resumed:
            continue
        if first.settled is not None and first.settled <= outage.killed:
            return "its acknowledgement was confirmed, and not replicated"
        # If the reply to an acknowledgement was lost, and the new primary refuses the next try, the bus cannot know
        # whether the first one had succeeded, and counts it as done.
        is_unknown = first.settled is None or first.ended <= outage.killed + NOTICED
        if is_unknown or second.began < (first.settled or 0.0):
            return "its acknowledgement was under way"
    return None


def causes(consumers: Iterable[Child], outages: Sequence[Outage]) -> tuple[dict[str, int], list[str]]:
    """How often each cause was found, and the repeats that have none."""
    counted: defaultdict[str, int] = defaultdict(int)
    without: list[str] = []
    for each in handlings(consumers).values():
        for first, second in pairwise(each):
            found = cause(first, second, outages)
            if found is None:
                near = min(outages, key=lambda outage: abs(outage.killed - first.ended))
                without.append(f"{first} {second}; the nearest: {near}")
            else:
                counted[found] += 1
    return dict(counted), without
