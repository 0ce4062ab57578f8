"""A program that consumes a topic in one group, and trims it: a child of ``test_retention_crashes.py``.

Files in its folder, all beginning with its label:

- ``.state``: ``ready`` once it handles messages.
- ``.handled``: uids, each as the last step of its handling.
- ``.lost``: ``<group> <count>``, as its observer is told of losses.
- ``.missing``: what its observer is told of entries that are gone although they were pending.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path

import anyio
from notes import Notes, run

import anybus
from anybus import Delivery, Observer, StreamBusOptions, SubscriptionConfig
from anybus._retention import pace
from anybus.abc import BusEvent

pace.LOOK = pace.QUIET = 0.05


class Teller(Observer):
    def __init__(self, stem: Path) -> None:
        self._lost = Notes(Path(f"{stem}.lost"))
        self._missing = Notes(Path(f"{stem}.missing"))

    def on_error(self, event: BusEvent) -> None:
        if event.message_id is not None:
            self._missing.add(str(event.message_id), str(event.error))

    def on_entries_lost(self, event: BusEvent) -> None:
        self._lost.add(str(event.group), str(event.count))


async def main(arguments: argparse.Namespace) -> None:
    stem = arguments.folder / arguments.label
    handled = Notes(Path(f"{stem}.handled"))
    count = 0

    async def handle(delivery: Delivery) -> None:
        nonlocal count
        if count == arguments.stop_after:
            await anyio.sleep_forever()
        count += 1
        await anyio.sleep(random.random() * arguments.work)
        handled.add(delivery.message.uid)

    options = StreamBusOptions(claim_idle_timeout=1.0, reclaim_interval=0.05, group_start_id="0", observer=Teller(stem))
    config = SubscriptionConfig(arguments.topic, arguments.group, consumer=arguments.label, max_in_flight=8)
    async with anybus.connect(arguments.url, options) as bus, bus.subscribe(config, handle):
        Notes(Path(f"{stem}.state")).add("ready")
        await anyio.sleep_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--label", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--work", type=float, default=0.0, help="handlings take up to so many seconds")
    parser.add_argument("--stop-after", type=int, default=-1, help="handle so many, and then hold what comes")
    given = parser.parse_args()
    run(partial(main, given), given.loop)
