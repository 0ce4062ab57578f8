"""A program that takes part in a schedule until it is killed or SIGTERM comes: a child of ``test_recurring_kill.py``.

It notes in files of its folder: ``ready`` and ``listens`` in ``<label>.state``, each tick for which it made a message, with the message's uid, in ``<label>.made``, and what ended its schedule in
``<label>.state`` (``superseded``).
"""

from __future__ import annotations

import argparse
from datetime import datetime
from functools import partial
from pathlib import Path

import anyio
from notes import Notes, listening, run

import anybus
from anybus import Message
from anybus.scheduling import Missed


async def main(arguments: argparse.Namespace) -> None:
    made = Notes(arguments.folder / f"{arguments.label}.made")
    state = Notes(arguments.folder / f"{arguments.label}.state")
    missed: Missed = arguments.missed

    def make(tick: datetime) -> Message:
        message = Message(arguments.topic, arguments.label.encode())
        made.add(tick.isoformat(timespec="milliseconds"), message.uid)
        return message

    with listening(state) as until_told_to_end:
        async with (
            anybus.connect(arguments.url) as bus,
            bus.schedule(
                *("clock", make),
                every=arguments.every,
                missed=missed,
                topic=arguments.topic,
                version=arguments.version,
            ) as schedule,
            anyio.create_task_group() as tasks,
        ):
            state.add("ready")

            async def watch() -> None:
                await schedule.wait_closed()
                state.add("superseded" if schedule.is_superseded else "closed")

            tasks.start_soon(watch)
            await until_told_to_end()
            tasks.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--label", required=True)
    parser.add_argument("--every", type=float, required=True)
    parser.add_argument("--missed", default="skip")
    parser.add_argument("--version", default="")
    given = parser.parse_args()
    run(partial(main, given), given.loop)
