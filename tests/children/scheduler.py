"""A program that schedules messages, and subscribes to their topic: a child of ``test_delayed_processes.py``.

Files in its folder, all beginning with its label:

- ``.state``: ``ready`` once it has subscribed, ``scheduled`` once it has scheduled all, ``listens`` once SIGTERM ends it.
- ``.attempted``: the uid of each message, before it is scheduled.
- ``.acknowledged``: its uid and when it is due (in ms since 1970), once the server has said that it has it.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path

import anyio
from notes import Notes, listening, run

import anybus
from anybus import BackendError, Delivery, Message, SubscriptionConfig


async def nothing(delivery: Delivery) -> None:
    """The test reads the topic itself."""


async def main(arguments: argparse.Namespace) -> None:
    stem = arguments.folder / arguments.label
    state = Notes(Path(f"{stem}.state"))
    attempted, acknowledged = Notes(Path(f"{stem}.attempted")), Notes(Path(f"{stem}.acknowledged"))
    left = arguments.count
    async with anybus.connect(arguments.url) as bus, bus.subscribe(SubscriptionConfig(arguments.topic, "g"), nothing):
        state.add("ready")

        async def schedule() -> None:
            nonlocal left
            while left:
                left -= 1
                message = Message(arguments.topic, b"x" * 100)
                attempted.add(message.uid)
                try:
                    delay = arguments.least + random.random() * (arguments.most - arguments.least)
                    scheduled = await bus.publish_later(message, delay=delay)
                except BackendError:
                    continue  # nobody knows; the test counts on the acknowledged ones only
                acknowledged.add(message.uid, f"{scheduled.due.timestamp() * 1000:.0f}")
                await anyio.sleep(arguments.pause)

        with listening(state) as until_told_to_end:
            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(schedule)
            state.add("scheduled")
            await until_told_to_end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--label", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--least", type=float, required=True, help="the shortest delay, in seconds")
    parser.add_argument("--most", type=float, required=True, help="the longest delay, in seconds")
    parser.add_argument("--pause", type=float, default=0.0)
    given = parser.parse_args()
    run(partial(main, given), given.loop)
