"""How much goes into one call: a script holds up the whole server while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from ._protocol import Argument
from ._taking_scripts import MOST_BYTES

PER_SCRIPT: Final = 250
"""At most so many items."""


def size(arguments: Sequence[Argument]) -> int:
    """Their bytes, about."""
    return sum(len(argument) if isinstance(argument, (bytes, str)) else 8 for argument in arguments)


def fitting(sizes: Sequence[int], most: int = PER_SCRIPT) -> Iterator[int]:
    """Cut items of these sizes into parts, each within the bounds of one call: yields the number of items of each.

    An item that is larger than all that may be in one call has one for itself.
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
