"""A program with one subscription to each of many topics: a child of ``test_shared_crashes.py``.

It appends the uid of each message to a file, as the last step of its handling. One uid in sixteen fails at first, and
one in sixteen is released at first.
"""

from __future__ import annotations

import argparse
import random
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import anyio
from notes import Notes, run

from anybus import Delivery, ExponentialBackoff, Observer, StreamBus, StreamBusOptions, SubscriptionConfig
from anybus.abc import BusEvent
from anybus.backends.redis import RedisBackend


class Quiet(Observer):
    def on_error(self, event: BusEvent) -> None:
        """What fails and passes is what the test does."""


async def main(arguments: argparse.Namespace) -> None:
    notes = Notes(arguments.file)

    async def handle(delivery: Delivery) -> None:
        uid = delivery.message.uid
        await anyio.sleep(random.random() * 0.01)
        if delivery.state.attempt == 1 and uid.endswith("0"):
            raise ValueError("not yet")
        if not delivery.state.redelivered and uid.endswith("1"):
            await delivery.release()
            return
        notes.add(uid)

    options = StreamBusOptions(claim_idle_timeout=2.0, reclaim_interval=0.1, observer=Quiet())
    backoff = ExponentialBackoff(initial=0.05, maximum=0.2)
    async with StreamBus(RedisBackend(arguments.url), options) as bus, AsyncExitStack() as stack:
        for number in range(arguments.topics):
            config = SubscriptionConfig(
                f"{arguments.prefix}.{number}", "g", group_start_id="0", retry_backoff=backoff, max_deliveries=100
            )
            await stack.enter_async_context(bus.subscribe(config, handle))
        await anyio.sleep_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--topics", type=int, required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--loop", required=True)
    arguments = parser.parse_args()
    run(partial(main, arguments), arguments.loop)
