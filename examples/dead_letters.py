"""Orders fail while a database is down. An operator sends them back when it is up again.

Run it on asyncio or on trio:

    python examples/dead_letters.py [asyncio|trio]
"""

from __future__ import annotations

import logging
import sys

import anyio

import anybus
from anybus import (
    Delivery,
    ExponentialBackoff,
    Message,
    Observer,
    ReplayProgress,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
)
from anybus.abc import BusEvent

BILLING = SubscriptionConfig("orders", "billing", max_retry=1, retry_backoff=ExponentialBackoff(initial=0.01))


class Billing:
    """The application: a handler, and the database that it needs."""

    def __init__(self) -> None:
        self.database_is_up = False
        self.charged: set[str] = set()

    async def charge(self, delivery: Delivery) -> None:
        if not self.database_is_up:
            raise ConnectionError("the database is down")
        if delivery.message.key == "13":
            raise anybus.Reject("no such customer")
        self.charged.add(delivery.message.key)


class Finish(Observer):
    """Waits until a number of messages are acknowledged or dead-lettered."""

    def __init__(self) -> None:
        self._left = 0
        self._reached = anyio.Event()

    def on_settled(self, event: BusEvent) -> None:
        if event.detail in ("acked", "dead-lettered"):
            self._left -= 1
            self._reached.set()

    async def wait(self, count: int) -> None:
        self._left += count
        while self._left > 0:
            await self._reached.wait()
            self._reached = anyio.Event()


async def operate(bus: StreamBus) -> None:
    # Listing changes nothing.
    letters = bus.dead_letters("orders", group="billing", code="retries")
    async for letter in letters:
        assert letter.message is not None
        print(f"{letter.id}: order {letter.message.key}, after {letter.attempts} attempts: {letter.reason}")

    # First a dry run. Then send them back: only to the group that gave up on them, at most 100 a second.
    print("dry run:", await letters.replay(to="group", dry_run=True))

    def tell(progress: ReplayProgress) -> None:
        print(f"{progress.id}: {progress.outcome}, {progress.so_far.replayed} so far")

    print("replay:", await letters.replay(to="group", rate=100, on_progress=tell))


async def main() -> None:
    application, finish = Billing(), Finish()
    async with anybus.connect("memory://", StreamBusOptions(observer=finish)) as bus:
        async with bus.subscribe(BILLING, application.charge):
            for number in (11, 12, 13):
                await bus.publish(Message("orders", key=str(number)))
            await finish.wait(3)
        application.database_is_up = True
        await operate(bus)
        async with bus.subscribe(BILLING, application.charge):
            await finish.wait(3)
        print("charged:", sorted(application.charged))
        # Order 13 will never succeed: throw its dead letter away.
        print("purged:", await bus.dead_letters("orders", code="rejected").purge())


if __name__ == "__main__":
    logging.disable()  # the handler fails on purpose
    anyio.run(main, backend=sys.argv[1] if len(sys.argv) > 1 else "asyncio")
