"""A program that moves messages to another topic, exactly once: a child of ``test_exactly_once_kill.py``.

Each message becomes one on ``{topic}.moved``, whose key is its own, published with the acknowledgement. Files in its
folder: ``<label>.begun`` and ``<label>.moved`` with the uids of messages, when their handling began, and when the server
has accepted the move; ``<label>.state`` says ``ready``. It runs until it is killed.
"""

from __future__ import annotations

import random
import sys
from functools import partial
from pathlib import Path

import anyio
from notes import Notes, run

import anybus
from anybus import Delivery, Message, Observer, StreamBusOptions, SubscriptionConfig
from anybus.abc import BusEvent


class Quiet(Observer):
    """What fails and passes is what the test does."""

    def on_error(self, event: BusEvent) -> None: ...


async def main(url: str, topic: str, folder: Path, label: str) -> None:
    begun, moved, state = (Notes(folder / f"{label}.{kind}") for kind in ("begun", "moved", "state"))

    async def handler(delivery: Delivery) -> None:
        message = delivery.message
        begun.add(message.uid)
        await anyio.sleep(random.random() * 0.005)
        if message.uid.endswith("0") and delivery.state.attempt == 1:
            raise ValueError("not yet")
        await delivery.ack(publish=[Message(f"{topic}.moved", key=message.key)])
        moved.add(message.uid)

    options = StreamBusOptions(claim_idle_timeout=1.0, reclaim_interval=0.05, group_start_id="0", observer=Quiet())
    config = SubscriptionConfig(
        topic, "movers", guarantee="exactly-once", max_in_flight=32, retry_backoff=0.05, max_deliveries=1000
    )
    async with anybus.connect(url, options) as bus, bus.subscribe(config, handler):
        state.add("ready")
        await anyio.sleep_forever()


if __name__ == "__main__":
    loop, url, topic, folder, label = sys.argv[1:]
    run(partial(main, url, topic, Path(folder), label), loop)
