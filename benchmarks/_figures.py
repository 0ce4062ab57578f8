"""Rounds that alternate between contestants, and their figures: median, lowest and highest."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}
"""The arguments of ``anyio.run`` for each event loop."""

Figures = dict[str, list[float]]


def interleave(contestants: Mapping[str, Callable[[], float]], rounds: int) -> Figures:
    """Run each contestant once per round, one after another, so that a noisy moment affects all of them.

    Every second round has the reverse order, so that no contestant always runs right after the heaviest one.
    """
    figures: Figures = {name: [] for name in contestants}
    for number in range(rounds):
        for name in contestants if number % 2 == 0 else reversed(list(contestants)):
            gc.collect()
            figures[name].append(contestants[name]())
    return figures


def ratio(figures: Sequence[float], to: Sequence[float]) -> str:
    """The ratio of the medians, and the lowest and highest ratio of single rounds."""
    rounds = [one / other for one, other in zip(figures, to, strict=True)]
    middle = statistics.median(figures) / statistics.median(to)
    return f"{middle:.2f} ({min(rounds):.2f} to {max(rounds):.2f})"


def rate(figures: Sequence[float]) -> str:
    return f"{statistics.median(figures):,.0f}/s ({min(figures):,.0f} to {max(figures):,.0f})"


def best(figures: Figures, *names: str) -> str:
    """The contestant with the highest median."""
    return max(names, key=lambda name: statistics.median(figures[name]))


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def show(part: str, loop: str, text: str) -> None:
    """Print one line of the report immediately."""
    print(f"{part}  {loop:8} {text}", flush=True)


def show_rates(part: str, loop: str, figures: Figures) -> None:
    for name, values in figures.items():
        show(part, loop, f"    {name:34} {rate(values)}")
