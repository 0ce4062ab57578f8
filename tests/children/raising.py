"""A program whose handler raises what is no ``Exception``: a child of ``test_crash_budget.py``.

``raising.py <loop> <url> <folder> <label> <topic>``. A message whose key is ``SystemExit`` raises that in its handler;
``child`` raises it in a child task of the handler's own task group (asyncio lets that out of its loop at once). The first
time, it raises when it is in the midst of others. What comes out ends the program.

Files in its folder, all beginning with its label: ``.begun`` (the uid and how often it has been handed over),
``.handled`` (the uid) and ``.state`` (that it listens).
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import anyio
from notes import Notes, listening, run

import anybus
from anybus import Delivery, Observer, StreamBusOptions, SubscriptionConfig
from anybus.abc import BusEvent

AT_ONCE = 8
LEASE = 0.5


class Silent(Observer):
    def on_error(self, event: BusEvent) -> None:
        """What fails here is what the test does."""


class Worker:
    def __init__(self, folder: Path, label: str) -> None:
        self._begun = Notes(folder / f"{label}.begun")
        self._handled = Notes(folder / f"{label}.handled")
        self._at_work = 0
        self._all_at_work = anyio.Event()

    async def handle(self, delivery: Delivery) -> None:
        message = delivery.message
        self._begun.add(f"{message.uid}:{delivery.state.deliveries}")
        self._at_work += 1
        if self._at_work == AT_ONCE:
            self._all_at_work.set()
        if message.key == "neighbour":
            with anyio.move_on_after(0.2):  # a later process may be left with fewer than that
                await self._all_at_work.wait()
            await anyio.sleep(0.02)
            self._handled.add(message.uid)
            return
        if delivery.state.deliveries == 1:
            await self._all_at_work.wait()
        if message.key == "SystemExit":
            sys.exit(3)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._exit)
            await anyio.sleep_forever()

    async def _exit(self) -> None:
        sys.exit(3)


async def main(url: str, folder: str, label: str, topic: str) -> None:
    options = StreamBusOptions(claim_idle_timeout=LEASE, reclaim_interval=0.05, group_start_id="0", observer=Silent())
    worker = Worker(Path(folder), label)
    config = SubscriptionConfig(topic, "g", consumer=label, max_in_flight=AT_ONCE, max_deliveries=4)
    with listening(Notes(Path(folder) / f"{label}.state")) as until_told_to_end:
        async with anybus.connect(url, options) as bus, bus.subscribe(config, worker.handle):
            await until_told_to_end()


if __name__ == "__main__":
    loop, *arguments = sys.argv[1:]
    run(partial(main, *arguments), loop)
