"""A program that uses delays, idempotency keys, exactly-once effects and retention at once: a child of
``test_time_and_identity_kill.py``.

It publishes messages with keys, at once or delayed, until each has been confirmed, and handles the same topic in two
groups. ``shop`` inserts a row for each message, in the transaction of its completion. ``movers`` publishes another
message with the acknowledgement. Started again, it goes on with the keys of which it has no note. It runs until
SIGTERM.

Files in its folder, all beginning with its number:

- ``.published``: the key, the id that was returned, and ``new`` or ``again``.
- ``.begun``: the group and the key, when a handling begins.
- ``.lost``: what its observer is told of entries that were removed too early.
- ``.state``: ``ready`` once it has subscribed, ``published`` once it has published all.
"""

from __future__ import annotations

import argparse
import random
import sqlite3
from functools import partial
from pathlib import Path

import anyio
from anyio import to_thread
from notes import Notes, listening, run

import anybus
from anybus import (
    BackendError,
    Delivery,
    Duplicate,
    Interest,
    Message,
    Observer,
    PublishOptions,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
)
from anybus._retention import pace
from anybus.abc import BusEvent
from anybus.idempotency import SqlStore

pace.LOOK = pace.QUIET = 0.05

WINDOW = 3600


class Teller(Observer):
    """Other errors are what the test causes."""

    def __init__(self, lost: Notes) -> None:
        self._lost = lost

    def on_error(self, event: BusEvent) -> None: ...

    def on_entries_lost(self, event: BusEvent) -> None:
        self._lost.add(str(event.group), str(event.count))


def connect(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / "shop.sqlite", timeout=30, check_same_thread=False)


class Program:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._topic: str = arguments.topic
        self._folder: Path = arguments.folder
        self._published = self.notes("published")
        self._begun = self.notes("begun")
        self._connection = connect(self._folder)
        self._chance = random.Random(arguments.seed)

    def notes(self, kind: str) -> Notes:
        return Notes(self._path(kind))

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._arguments.number}.{kind}"

    def _keys(self) -> list[str]:
        """Each key belongs to two processes."""
        number, path = self._arguments.number, self._path("published")
        done = {line.split()[0] for line in path.read_text().splitlines()}
        keys = [f"key-{key}" for key in range(self._arguments.keys) if (key - number) % 4 in (0, 1)]
        left = [key for key in keys if key not in done]
        self._chance.shuffle(left)
        return left

    async def publish_all(self, bus: StreamBus) -> None:
        keys = self._keys()
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(self._publish_from, bus, keys)

    async def _publish_from(self, bus: StreamBus, keys: list[str]) -> None:
        while keys:
            key = keys.pop()
            message = Message(self._topic, b"x" * 100)
            options = PublishOptions(idempotency_key=key, deduplication_window=WINDOW)
            while True:
                try:
                    if self._chance.random() < 0.5:
                        entry_id = await bus.publish(message, options)
                        is_again = isinstance(entry_id, Duplicate)
                    else:
                        delay = self._chance.random()
                        scheduled = await bus.publish_later(message, options, delay=delay)
                        entry_id, is_again = scheduled.id, scheduled.duplicate
                except BackendError:
                    await anyio.sleep(0.01)
                else:
                    break
            self._published.add(key, entry_id, "again" if is_again else "new")
            await anyio.sleep(self._arguments.pause)

    def _insert(self, key: str) -> None:
        self._connection.execute("INSERT INTO effects (key) VALUES (?)", (key,))

    async def shop(self, delivery: Delivery) -> None:
        key = self._key(delivery, "shop")
        await anyio.sleep(random.random() * 0.01)
        async with delivery.transaction(self._connection):
            await to_thread.run_sync(self._insert, key)

    async def move(self, delivery: Delivery) -> None:
        key = self._key(delivery, "movers")
        await anyio.sleep(random.random() * 0.05)
        if key.endswith("7") and delivery.state.attempt == 1:
            raise ValueError("not yet")
        await delivery.ack(publish=[Message(f"{self._topic}.moved", key=key)])

    def _key(self, delivery: Delivery, group: str) -> str:
        key = str(delivery.message.idempotency_key)
        self._begun.add(group, key)
        return key

    async def main(self) -> None:
        observer = Teller(self.notes("lost"))
        options = StreamBusOptions(
            claim_idle_timeout=1.0, reclaim_interval=0.05, group_start_id="0", observer=observer, publish_timeout=5.0
        )
        state = self.notes("state")
        with listening(state) as until_told_to_end:
            async with (
                SqlStore(partial(connect, self._folder)) as store,
                anybus.connect(self._arguments.url, options) as bus,
            ):
                config = partial(
                    SubscriptionConfig, self._topic, guarantee="exactly-once", max_deliveries=1000, retry_backoff=0.05
                )
                await self._declare(bus)
                async with (
                    bus.subscribe(config("shop", idempotency_store=store, max_in_flight=1), self.shop),
                    bus.subscribe(config("movers", max_in_flight=16), self.move),
                ):
                    state.add("ready")
                    await self.publish_all(bus)
                    state.add("published")
                    await until_told_to_end()

    async def _declare(self, bus: StreamBus) -> None:
        while True:
            try:
                await bus.declare_topic(self._topic, Interest())
            except BackendError:
                await anyio.sleep(0.05)
            else:
                return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--keys", type=int, required=True)
    parser.add_argument("--pause", type=float, required=True, help="seconds after each publish")
    parser.add_argument("--seed", type=int, required=True)
    given = parser.parse_args()
    run(Program(given).main, given.loop)
