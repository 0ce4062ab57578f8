"""A program that consumes while a message may kill it: a child of ``test_crash_budget.py``.

``poisoned.py <loop> <url> <folder> <label> <topic> [<healthy topic>]``. A message whose key is ``poison`` ends the
process at once (``os._exit``), when all 63 others are in its handlers beside it the first time. A message whose key is
``gated`` waits for the file ``gate``. With a healthy topic, a second subscription of the same bus handles that.

Files in its folder, all beginning with its label: ``.state`` with ``listens`` once SIGTERM ends it gracefully, and
``.begun`` and ``.handled`` with the uids.
"""

from __future__ import annotations

import os
import sys
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import anyio
from notes import Notes, listening, run

import anybus
from anybus import Delivery, Observer, StreamBusOptions, SubscriptionConfig
from anybus.abc import BusEvent

NEIGHBOURS = 63
LEASE = 1.0


class Silent(Observer):
    def on_error(self, event: BusEvent) -> None:
        """What fails here is what the test does."""


class Worker:
    def __init__(self, folder: Path, label: str) -> None:
        self._folder = folder
        self._begun = Notes(folder / f"{label}.begun")
        self._handled = Notes(folder / f"{label}.handled")
        self._at_work = 0
        self._all_at_work = anyio.Event()

    async def handle(self, delivery: Delivery) -> None:
        message = delivery.message
        self._begun.add(message.uid)
        if message.key == "poison":
            if delivery.state.deliveries == 1:
                # Its neighbours are in the middle of their handling, and go down with it.
                await self._all_at_work.wait()
            os._exit(1)
        self._at_work += message.key == "neighbour"
        if self._at_work == NEIGHBOURS:
            self._all_at_work.set()
        while message.key == "gated" and not (self._folder / "gate").exists():
            await anyio.sleep(0.02)
        if message.key == "neighbour" and delivery.state.deliveries == 1:
            await anyio.sleep_forever()
        await anyio.sleep(0.05)
        self._handled.add(message.uid)


async def main(url: str, folder: str, label: str, *topics: str) -> None:
    options = StreamBusOptions(claim_idle_timeout=LEASE, reclaim_interval=0.05, group_start_id="0", observer=Silent())
    worker = Worker(Path(folder), label)
    with listening(Notes(Path(folder) / f"{label}.state")) as until_told_to_end:
        async with anybus.connect(url, options) as bus, AsyncExitStack() as stack:
            for topic in topics:
                config = SubscriptionConfig(topic, "g", consumer=label, max_in_flight=64, max_pending_acks=64)
                await stack.enter_async_context(bus.subscribe(config, worker.handle))
            await until_told_to_end()


if __name__ == "__main__":
    loop, *arguments = sys.argv[1:]
    run(partial(main, *arguments), loop)
