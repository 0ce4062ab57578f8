"""A program that replays the dead letters of a topic once: a child of ``test_dead_letters_kill.py``.

It notes ``connected`` in its ``.state`` before it begins, and ``done`` with the counts when it has ended.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from notes import Notes, run

import anybus


async def main(arguments: argparse.Namespace) -> None:
    state = Notes(Path(f"{arguments.folder / arguments.label}.state"))
    async with anybus.connect(arguments.url) as bus:
        state.add("connected")
        report = await bus.dead_letters(arguments.topic).replay(to=arguments.to, rate=arguments.rate)
        state.add("done", str(report.replayed), str(report.gone), str(report.failed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--label", required=True)
    parser.add_argument("--to", choices=("topic", "group"), default="topic")
    parser.add_argument("--rate", type=float, default=None)
    given = parser.parse_args()
    run(partial(main, given), given.loop)
