"""The judge of repeated handlings, which the tests of failovers rely on: it must find the ones without a cause."""

from __future__ import annotations

import pytest
from repeats import REPLICATION, Handling, Outage, cause

OUTAGES = [Outage(100.0, 103.0), Outage(200.0, 203.0)]


def handling(ended: float, settled: float | None = None) -> Handling:
    return Handling("uid", ended - 0.01, ended, settled)


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        (handling(99.98, 99.99), handling(103.5), "confirmed"),
        (handling(99.99), handling(103.5), "under way"),
        (handling(199.99), handling(203.5), "under way"),
        (handling(101), handling(103.5), "under way"),
        (handling(101, settled=104), handling(103.5), "under way"),
        (handling(100.1, settled=103), handling(103.5), "under way"),  # a try whose reply was lost
        (handling(101, settled=103), handling(103.5), None),  # the new primary had its acknowledgement
        (handling(100 - REPLICATION - 0.1, 100 - REPLICATION - 0.09), handling(103.5), None),
        (handling(100 - REPLICATION - 0.1), handling(103.5), None),
        (handling(150), handling(151), None),
        (handling(150, 150.01), handling(203.5), None),
        (handling(99.8, 99.81), handling(99.9), None),  # both before the kill
        (handling(104), handling(105), None),
    ],
)
def test_a_repeat_has_a_cause_only_around_a_kill(first: Handling, second: Handling, word: str | None) -> None:
    found = cause(first, second, OUTAGES)
    assert found is None if word is None else word in (found or "")
