"""Reads the record of a run: for each part, one row per contestant, with its figures and those of a reference."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _figures import BUS, FLOOR, LOOPS, RATE, Figures, Rounds

ON_UVLOOP = ", uvloop"


@dataclass
class Row:
    """A contestant on one event loop. Floors and peers have the rounds of the runs of all loops."""

    label: str
    own: Rounds = field(default_factory=dict[str, list[float]])
    reference: Rounds = field(default_factory=dict[str, list[float]])
    """The reference's figures, in the same rounds."""

    def add(self, own: Rounds, reference: Rounds) -> None:
        for known, more in ((self.own, own), (self.reference, reference)):
            for measure, values in more.items():
                known.setdefault(measure, []).extend(values)

    def median(self, measure: str) -> float:
        return statistics.median(self.own[measure])

    def times(self, measure: str) -> float:
        """The ratio of the medians."""
        return self.median(measure) / statistics.median(self.reference[measure])

    def span(self, measure: str) -> tuple[float, float]:
        """The lowest and highest ratio of single rounds."""
        ratios = [own / other for own, other in zip(self.own[measure], self.reference[measure], strict=True)]
        return min(ratios), max(ratios)


class Results:
    """What a run has recorded. Parts and loops that were not run are left out."""

    def __init__(self, path: Path) -> None:
        self._known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.machine: dict[str, Any] = self._known["machine"]

    def loops(self, part: str) -> list[str]:
        return [loop for loop in LOOPS if loop in self._known["parts"].get(part, {})]

    def figures(self, part: str, loop: str) -> Figures:
        figures: Figures = self._known["parts"][part][loop]["figures"]
        return figures

    def circumstances(self, key: str) -> set[Any]:
        """All values that the parts have for this: messages, rounds, server, others."""
        runs: Iterator[dict[str, Any]] = (run["run"] for part in self._known["parts"].values() for run in part.values())
        return {run[key] for run in runs if run.get(key) is not None}

    def rows(self, part: str, reference: str) -> list[Row]:
        """Floors and peers first, then the bus on each loop."""
        found: dict[str, Row] = {}
        for loop in self.loops(part):
            figures = self.figures(part, loop)
            for name, own in figures.items():
                label = _label(name, loop)
                found.setdefault(label, Row(label)).add(own, figures[reference])
        return sorted(found.values(), key=lambda row: (row.label.startswith(BUS), row.label != FLOOR))

    def fastest_peer(self, part: str) -> str:
        """The one on plain asyncio with the highest median rate."""
        rates: dict[str, list[float]] = {}
        for loop in self.loops(part):
            for name, rounds in self.figures(part, loop).items():
                if name not in {FLOOR, BUS} and not name.endswith(ON_UVLOOP):
                    rates.setdefault(name, []).extend(rounds[RATE])
        return max(rates, key=lambda name: statistics.median(rates[name]))


def _label(name: str, loop: str) -> str:
    if name == FLOOR:
        return FLOOR
    if name == BUS:
        return f"{BUS} on {loop}"
    return f"{name.removesuffix(ON_UVLOOP)} on {'uvloop' if name.endswith(ON_UVLOOP) else 'asyncio'}"
