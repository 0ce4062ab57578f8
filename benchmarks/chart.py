"""Draws a run's figures as an SVG bar chart: ``python benchmarks/chart.py RUN.json CHART.svg``.

Three panels: the drain relative to the floor, the CPU time a message of client and server in a drain, and publishing
relative to redis-py. The file needs nothing but itself. It has a background of its own, and dark colours where the
reader prefers them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from _figures import BUS, CLIENT, FLOOR, RATE, SERVER
from _results import Results, Row

WIDTH, LEFT, RIGHT = 800, 190, 170
BAR, BETWEEN_BARS, BETWEEN_ROWS = 13, 2, 9

STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 12px; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 }
.quiet { fill: #59636e }
.back { fill: #ffffff }
.grid { stroke: #d1d9e0; stroke-width: 1 }
.mark { stroke: #1f2328; stroke-width: 1.5; stroke-dasharray: 4 3 }
.one { fill: #2f7fc1 }
.two { fill: #e08a00 }
.three { fill: #2a9d6f }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc }
.quiet { fill: #9198a1 }
.back { fill: #0d1117 }
.grid { stroke: #3d444d }
.mark { stroke: #f0f6fc }
.one { fill: #4a9fe0 }
.two { fill: #f0a030 }
.three { fill: #3fb883 }
}
"""


@dataclass(frozen=True)
class Bar:
    """Segments, each with its colour and length, and what is written behind them."""

    segments: Sequence[tuple[str, float]]
    text: str

    @property
    def end(self) -> float:
        return sum(length for _, length in self.segments)


@dataclass(frozen=True)
class Panel:
    title: str
    axis: str
    legend: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, Sequence[Bar]]]
    mark: float | None = None
    """A line to compare with."""


def ratio_bar(colour: str, value: float) -> Bar:
    return Bar([(colour, value)], f"{value:.2f}")


def drains(results: Results) -> Panel:
    cores = results.machine["cores"]
    parts = {"one": ("a", f"on {cores} cores" if cores > 1 else "on the only core"), "two": ("h", "all on one core")}
    rows: dict[str, list[Bar]] = {}
    for colour, (part, _) in parts.items():
        for row in results.rows(part, FLOOR):
            if row.label != FLOOR:
                rows.setdefault(row.label, []).append(ratio_bar(colour, row.times(RATE)))
    legend = [(colour, text) for colour, (part, text) in parts.items() if results.loops(part)]
    axis = "messages per second, relative to the floor (dashed) in the same rounds"
    return Panel("Drain: longer is faster", axis, legend, list(rows.items()), 1.0)


def processor_times(results: Results) -> Panel:
    def bar(row: Row) -> Bar:
        client, server = round(row.median(CLIENT), 2), round(row.median(SERVER), 2)
        return Bar([("one", client), ("two", server)], f"{client:.2f} + {server:.2f} = {client + server:.2f} µs")

    rows = [(row.label, [bar(row)]) for row in results.rows("a", FLOOR)]
    legend = [("one", "client"), ("two", "server")]
    return Panel("CPU time of a drain: shorter is cheaper", "microseconds of CPU time a message", legend, rows)


def publishing(results: Results) -> Panel:
    colours = {"asyncio": "one", "uvloop": "two", "trio": "three"}
    parts = {"b": "from 100 tasks", "c": "one by one", "d": "batches of 200"}
    rows: list[tuple[str, list[Bar]]] = []
    for part, label in parts.items():
        if not results.loops(part):
            continue
        found = {row.label: row for row in results.rows(part, results.fastest_peer(part))}
        bars = [ratio_bar(colours[loop], found[f"{BUS} on {loop}"].times(RATE)) for loop in results.loops(part)]
        rows.append((label, bars))
    loops = {loop for part in parts for loop in results.loops(part)}
    legend = [(colour, f"{BUS} on {loop}") for loop, colour in colours.items() if loop in loops]
    axis = "messages per second, relative to redis-py on asyncio (dashed) in the same rounds"
    return Panel("Publishing: longer is faster", axis, legend, rows, 1.0)


def ticks(highest: float) -> list[float]:
    """Round numbers from zero to the highest or a little more, at most eight."""
    rough = highest / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [round(step * number, 10) for number in range(math.ceil(highest / step - 1e-9) + 1)]


def draw_panel(panel: Panel, top: float) -> tuple[list[str], float]:
    """The panel's elements, and where it ends."""
    marks = ticks(max([bar.end for _, bars in panel.rows for bar in bars] + [panel.mark or 0]))
    scale = (WIDTH - LEFT - RIGHT) / marks[-1]
    made = [_text(16, top + 18, panel.title, "title")]
    x = float(LEFT)
    for colour, label in panel.legend:
        made += [_box(x, top + 30, 11, 11, colour), _text(x + 16, top + 40, label)]
        x += 36 + 7 * len(label)
    first = y = top + 56
    bars_made: list[str] = []
    for label, bars in panel.rows:
        height = len(bars) * (BAR + BETWEEN_BARS) - BETWEEN_BARS
        bars_made.append(_text(LEFT - 8, y + height / 2 + 4, label, anchor="end"))
        for bar in bars:
            x = float(LEFT)
            for colour, length in bar.segments:
                bars_made.append(_box(x, y, length * scale, BAR, colour))
                x += length * scale
            # The text has its own background, because the line to compare with may be there.
            bars_made += [_box(x + 3, y, 6 + 7 * len(bar.text), BAR, "back"), _text(x + 6, y + BAR - 2.5, bar.text)]
            y += BAR + BETWEEN_BARS
        y += BETWEEN_ROWS - BETWEEN_BARS
    for value in marks:
        at = LEFT + value * scale
        made += [_line(at, first - 4, y, "grid"), _text(at, y + 15, f"{value:g}", "quiet", anchor="middle")]
    if panel.mark is not None:
        made.append(_line(LEFT + panel.mark * scale, first - 4, y, "mark"))
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    made.append(_text(middle, y + 33, panel.axis, "quiet", anchor="middle"))
    return made + bars_made, y + 52


def draw(results: Results) -> str:
    panels = [panel for panel in (drains(results), processor_times(results), publishing(results)) if panel.rows]
    elements: list[str] = []
    end = 8.0
    for panel in panels:
        made, end = draw_panel(panel, end)
        elements += made
    title = f"anybus compared with its floor and with redis-py, on {results.machine['cpu']}"
    size = f'viewBox="0 0 {WIDTH} {end:g}" width="{WIDTH}" height="{end:g}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{WIDTH}" height="{end:g}"/>',
        *elements,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{named} text-anchor="{anchor}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect class="{colour}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:g}"/>'


def _line(x: float, top: float, end: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{end:.1f}"/>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="what `redis_path.py --json` has written")
    parser.add_argument("chart", type=Path, help="the SVG to write")
    arguments = parser.parse_args()
    arguments.chart.write_text(draw(Results(arguments.run)), encoding="utf-8")


if __name__ == "__main__":
    main()
