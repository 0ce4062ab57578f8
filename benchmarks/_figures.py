"""Rounds that alternate between contestants, and their figures: median, lowest and highest."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

FLOOR, BUS = "floor", "anybus"

LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}
"""The arguments of ``anyio.run`` for each event loop."""

RATE, CLIENT, SERVER = "rate", "client_us", "server_us"
"""Messages per second; microseconds of processor time a message, of the client (this process) and of the server."""

Measured = dict[str, float]
"""The figures of one run of one contestant."""

Rounds = dict[str, list[float]]
"""What one contestant measured: for each name, one figure per round."""

Figures = dict[str, Rounds]
"""For each contestant."""


def interleave(contestants: Mapping[str, Callable[[], Measured]], rounds: int) -> Figures:
    """Run each contestant once per round, one after another, so that a noisy moment affects all of them.

    Every second round has the reverse order, so that no contestant always runs right after the heaviest one.
    """
    figures: Figures = {name: {} for name in contestants}
    for number in range(rounds):
        for name in contestants if number % 2 == 0 else reversed(list(contestants)):
            gc.collect()
            for measure, value in contestants[name]().items():
                figures[name].setdefault(measure, []).append(value)
    return figures


def ratio(figures: Sequence[float], to: Sequence[float]) -> str:
    """The ratio of the medians, and the lowest and highest ratio of single rounds."""
    rounds = [one / other for one, other in zip(figures, to, strict=True)]
    middle = statistics.median(figures) / statistics.median(to)
    return f"{middle:.2f} ({min(rounds):.2f} to {max(rounds):.2f})"


def rate(figures: Sequence[float]) -> str:
    return f"{statistics.median(figures):>9,.0f}/s ({min(figures):,.0f} to {max(figures):,.0f})"


def microseconds(figures: Sequence[float]) -> str:
    return f"{statistics.median(figures):5.2f} us ({min(figures):.2f} to {max(figures):.2f})"


def best(figures: Figures, *names: str) -> str:
    """The contestant with the highest median rate."""
    return max(names, key=lambda name: statistics.median(figures[name][RATE]))


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def show(part: str, loop: str, text: str) -> None:
    """Print one line of the report immediately."""
    print(f"{part}  {loop:8} {text}", flush=True)


def show_costs(part: str, loop: str, figures: Figures, reference: str) -> None:
    """Rates, then the processor time of client and server a message, with its ratio to the reference."""
    for name, rounds in figures.items():
        show(part, loop, f"    {name:34} {rate(rounds[RATE])}")
    for measure, whose in ((CLIENT, "client"), (SERVER, "server")):
        to = figures[reference].get(measure)
        if to is None:
            continue
        show(part, loop, f"  CPU time of the {whose} a message, and its ratio to {reference}")
        for name, rounds in figures.items():
            show(part, loop, f"    {name:34} {microseconds(rounds[measure])}, {ratio(rounds[measure], to)}")


def show_others(part: str, loop: str, share: float | None) -> None:
    if share is not None:
        show(part, loop, f"  meanwhile, other processes used {share:.0%} of the machine")
