"""Puts the figures of a run into docs/performance.md, and its chart into docs/performance.svg.

``python benchmarks/page.py`` reads docs/performance.json, which both scripts write with ``--json``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from _figures import BUS, CLIENT, FLOOR, LOOPS, RATE, SERVER
from _results import Results, Row
from chart import draw

DOCS = Path(__file__).parent.parent / "docs"
BEGIN = "<!-- figures: written by benchmarks/page.py, do not edit -->"
END = "<!-- end of figures -->"

ENOUGH_ROUNDS = 5
BUSY = 0.1
"""If other processes used more than this share of the machine, rates mean little."""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---", *["--:" for _ in heads[1:]]], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def costs(rows: Iterable[Row], reference: str) -> str:
    """One contestant per line. The columns with ratios have those to the reference."""

    def times(row: Row, measure: str) -> str:
        low, high = row.span(measure)
        return f"{row.times(measure):.2f} ({low:.2f} to {high:.2f})"

    heads = ["", "messages/s", f"of {reference}", "client, µs", f"of {reference}", "server, µs", f"of {reference}"]
    return table(
        heads,
        [
            [
                row.label,
                f"{row.median(RATE):,.0f}",
                times(row, RATE),
                f"{row.median(CLIENT):.2f}",
                f"{row.times(CLIENT):.2f}",
                f"{row.median(SERVER):.2f}",
                f"{row.times(SERVER):.2f}",
            ]
            for row in rows
        ],
    )


def about(results: Results) -> str:
    """The machine, and what speaks against the run."""
    machine = results.machine
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    server = ", ".join(sorted(results.circumstances("server")))
    rounds = results.circumstances("rounds")
    others = results.circumstances("others")
    cores = f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''}"
    lines = [
        f"- Machine: {machine['cpu']}, {cores}, {machine['platform']}.",
        f"- Versions: {machine['python']}, {server}, {libraries}.",
        f"- Rounds: at least {min(rounds)}. "
        + ("" if not others else f"Other processes used {min(others):.0%} to {max(others):.0%} of the machine."),
    ]
    against: list[str] = []
    if min(rounds) < ENOUGH_ROUNDS:
        against.append("it has too few rounds")
    if others and max(others) > BUSY:
        against.append("the machine was busy, so only its CPU times mean something")
    if against:
        lines += ["", f"**This run is a placeholder**: {', and '.join(against)}."]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def others(results: Results) -> str:
    """Latency, idleness, slow handlers and the path in memory, with one line per loop."""

    def against(part: str, loop: str, measure: str, peer: str, unit: str, factor: float = 1.0) -> str:
        if loop not in results.loops(part):
            return ""
        figures = results.figures(part, loop)
        bus, other = (statistics.median(figures[name][measure]) * factor for name in (BUS, peer))
        return f"{bus:.3g} {unit} ({other:.3g} {unit})"

    def line(loop: str) -> list[str]:
        memory = [row for row in results.rows("memory", FLOOR) if row.label == f"{BUS} on {loop}"]
        slow = statistics.median(results.figures("f", loop)[BUS]["seconds"]) if loop in results.loops("f") else None
        return [
            loop,
            against("e", loop, "handled_p50_ms", "redis-py loop", "ms"),
            against("e", loop, "handled_p99_ms", "redis-py loop", "ms"),
            against("g", loop, "core_share", "redis-py loop", "%", 100),
            "" if slow is None else f"{slow:.2f} s",
            *(f"{row.times(RATE):.2f}" for row in memory),
            *(f"{row.median(CLIENT):.2f} µs ({row.times(CLIENT):.2f})" for row in memory),
        ]

    heads = ["", "latency p50", "latency p99", "idle", "slow handlers", "in memory", "CPU time in memory"]
    loops = [loop for loop in LOOPS if any(loop in results.loops(part) for part in ("e", "f", "g", "memory"))]
    return table(heads, [cells + [""] * (len(heads) - len(cells)) for cells in map(line, loops)])


def section(results: Results) -> str:
    """Everything between the two marks of the page."""
    cores = results.machine["cores"]
    parts: list[tuple[str, str, str, str]] = [
        (f"Drain on {cores} cores" if cores > 1 else "Drain on the only core", "a", FLOOR, "floor"),
        ("Drain, all on one core", "h", FLOOR, "floor"),
        ("Publish from 100 tasks", "b", "", "redis-py"),
        ("Publish one by one", "c", "", "redis-py"),
        ("Publish one by one, all on one core", "i", "", "redis-py"),
        ("Publish in batches of 200", "d", FLOOR, "floor"),
    ]
    made = [about(results)]
    for title, part, reference, name in parts:
        if results.loops(part):
            made.append(f"### {title}\n\n{costs(results.rows(part, reference or results.fastest_peer(part)), name)}")
    made.append(f"### The rest\n\n{others(results)}")
    return "\n".join(made)


def fill(page: str, results: Results) -> str:
    """The page with the figures of this run."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, "the page lacks its marks"
    return f"{before}{BEGIN}\n\n{section(results)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder with performance.json and performance.md")
    docs = parser.parse_args().docs
    results = Results(docs / "performance.json")
    page = docs / "performance.md"
    page.write_text(fill(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    (docs / "performance.svg").write_text(draw(results), encoding="utf-8")


if __name__ == "__main__":
    main()
