"""A program that publishes the messages of many keys until each has been confirmed: a child of
``test_deduplication_kill.py``.

A part of them one by one, a part in batches, a part put off. It notes in ``<number>.published`` what it was told:
the key, the id, and ``new`` or ``again``. Started again, it goes on with the keys of which it has no note. It tries
again what failed, as an application does that cannot know whether its message was stored.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path

import anyio
from notes import Notes, run

import anybus
from anybus import BackendError, Duplicate, Message, PublishOptions, StreamBus
from anybus.abc import PublishSpec

WINDOW = 24 * 3600
OPTIONS = PublishOptions(deduplication_window=WINDOW)
TOGETHER = 20


class Publisher:
    def __init__(self, bus: StreamBus, topic: str, number: int, notes: Notes) -> None:
        self._bus = bus
        self._topic = topic
        self._source = f"process {number}"
        self._notes = notes

    def _message(self, key: str) -> Message:
        return Message(self._topic, b"x" * 100, idempotency_key=key, source=self._source)

    def _note(self, key: str, entry_id: str) -> None:
        self._notes.add(key, entry_id, "again" if isinstance(entry_id, Duplicate) else "new")

    async def one_by_one(self, keys: list[str]) -> None:
        async with anyio.create_task_group() as tasks:
            for key in keys:
                tasks.start_soon(self._publish, key)

    async def _publish(self, key: str) -> None:
        while True:
            try:
                entry_id = await self._bus.publish(self._message(key), OPTIONS)
            except BackendError:
                await anyio.sleep(0.01)
            else:
                self._note(key, entry_id)
                return

    async def in_a_batch(self, keys: list[str]) -> None:
        while keys:
            outcome = await self._bus.publish_batch([self._message(key) for key in keys], OPTIONS)
            left: list[str] = []
            for key, result in zip(keys, outcome.results, strict=True):
                if isinstance(result, str):
                    self._note(key, result)
                else:
                    left.append(key)
            keys = left

    async def later(self, keys: list[str]) -> None:
        while keys:
            spec = PublishSpec(idempotency_key=keys[-1], deduplication_window=WINDOW)
            try:
                schedule_id = await self._bus.backend.publish_later(
                    self._topic, self._message(keys[-1]), delay=0.001, spec=spec
                )
            except BackendError:
                await anyio.sleep(0.01)
            else:
                self._note(keys.pop(), schedule_id)


async def main(arguments: argparse.Namespace) -> None:
    path = arguments.folder / f"{arguments.number}.published"
    done = {line.split()[0] for line in path.read_text().splitlines()} if path.exists() else set[str]()
    keys = [f"key-{number}" for number in range(arguments.keys) if (number - arguments.number) % 4 in (0, 1)]
    left = [key for key in keys if key not in done]
    chance = random.Random(arguments.seed)
    chance.shuffle(left)
    async with anybus.connect(arguments.url) as bus:
        publisher = Publisher(bus, arguments.topic, arguments.number, Notes(path))
        ways = [publisher.one_by_one, publisher.in_a_batch, publisher.in_a_batch, publisher.later]
        for start in range(0, len(left), TOGETHER):
            await chance.choice(ways)(left[start : start + TOGETHER])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--keys", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    given = parser.parse_args()
    run(partial(main, given), given.loop)
