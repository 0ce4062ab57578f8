"""A program that publishes so many messages, or until SIGTERM comes: a child of ``test_redis_crashes.py``.

It notes ``listens`` in ``publisher.state`` once SIGTERM ends it gracefully, and every uid twice, in files of its folder: in ``attempted`` before it publishes, in ``acknowledged`` once the
server has said that it has the message. A publish that fails is never repeated: its uid stays in the first file only.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import anyio
from notes import Notes, listening, run

import anybus
from anybus import BackendError, Message, StreamBus


class Publisher:
    def __init__(self, bus: StreamBus, topic: str, folder: Path, pause: float, count: int) -> None:
        self._bus = bus
        self._topic = topic
        self._pause = pause
        self._left = count
        self._attempted = Notes(folder / "attempted")
        self._acknowledged = Notes(folder / "acknowledged")
        self.is_ending = False

    async def run(self, tasks: int) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(self._publish)

    async def _publish(self) -> None:
        while self._left and not self.is_ending:
            self._left -= 1
            message = Message(self._topic, b"x" * 100)
            self._attempted.add(message.uid)
            try:
                await self._bus.publish(message)
            except BackendError:
                continue  # nobody knows; the test counts on the acknowledged ones only
            self._acknowledged.add(message.uid)
            await anyio.sleep(self._pause)


async def main(arguments: argparse.Namespace) -> None:
    with listening(Notes(arguments.folder / "publisher.state")) as until_told_to_end:
        async with anybus.connect(arguments.url) as bus, anyio.create_task_group() as tasks:
            publisher = Publisher(bus, arguments.topic, arguments.folder, arguments.pause, arguments.count)

            async def end() -> None:
                await until_told_to_end()
                publisher.is_ending = True

            tasks.start_soon(end)
            await publisher.run(arguments.tasks)
            tasks.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.01)
    parser.add_argument("--count", type=int, default=-1, help="so many, then end; unset = until SIGTERM")
    given = parser.parse_args()
    run(partial(main, given), given.loop)
