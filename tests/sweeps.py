"""Sweeps in two sizes: a few of their points in every run of the tests, all of them in the session ``thorough``."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

FAILOVERS = int(os.environ.get("ANYBUS_FAILOVERS", "4"))
"""How many primaries are killed in one test of a cluster, or of sentinels. The session ``failovers`` kills ten."""


def sampled(name: str, few: int, all_of_them: int) -> pytest.MarkDecorator:
    """Give the test a parameter of that name: how many points, rounds or processes it takes."""
    return pytest.mark.parametrize(name, [few, pytest.param(all_of_them, marks=pytest.mark.thorough)])


def first_of(values: Iterable[object]) -> list[object]:
    """For ``parametrize``: the first value in every run, the others in ``thorough``."""
    first, *others = values
    return [first, *(pytest.param(other, marks=pytest.mark.thorough) for other in others)]
