"""How much goes into one call. A script blocks the whole server while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from ._protocol import Argument
from ._taking_scripts import MOST_BYTES

PER_SCRIPT: Final = 256
"""The maximum number of items in one call of a script."""


def size(arguments: Sequence[Argument]) -> int:
    """About how many bytes the arguments have."""
    return sum(len(argument) if isinstance(argument, (bytes, str)) else 8 for argument in arguments)


def fitting(sizes: Sequence[int], most: int = PER_SCRIPT) -> Iterator[int]:
    """Split items of these sizes into parts that fit into one call each. Yields the number of items of each part.

    An item that is too large for one call gets a part of its own.
    """
    count = total = 0
    for item in sizes:
        if count and (count == most or total + item > MOST_BYTES):
            yield count
            count = total = 0
        count += 1
        total += item
    if count:
        yield count
