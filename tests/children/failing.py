"""A program whose handler fails once: a child of ``test_retry_policy.py``.

``failing.py asyncio|uvloop|trio <url> <topic> <lease>``. It prints ``retried`` when the server has the retry, which is due
two seconds later, and then waits to be killed.
"""

from __future__ import annotations

import sys
from functools import partial

import anyio
from notes import run

import anybus
from anybus import Delivery, Message, Observer, StreamBusOptions, SubscriptionConfig
from anybus.abc import BusEvent


class Teller(Observer):
    def on_error(self, event: BusEvent) -> None:
        """The failure is what the test is about."""

    def on_settled(self, event: BusEvent) -> None:
        print(event.detail, flush=True)


async def main(url: str, topic: str, lease: str) -> None:
    async def handler(delivery: Delivery) -> None:
        raise ValueError("not yet")

    options = StreamBusOptions(observer=Teller(), claim_idle_timeout=float(lease))
    async with anybus.connect(url, options) as bus:
        async with bus.subscribe(SubscriptionConfig(topic, "g", retry_backoff=2.0), handler):
            await bus.publish(Message(topic))
            await anyio.sleep_forever()


if __name__ == "__main__":
    loop, *arguments = sys.argv[1:]
    run(partial(main, *arguments), loop)
