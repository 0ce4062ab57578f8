"""A program with a bus that ends on signals: gracefully on the first, at once on the second.

Run it, and press Ctrl-C once or twice (or send SIGTERM):

    python examples/signals.py [asyncio|trio] [memory://|redis://localhost]

The first signal closes the subscription, and its handlers may finish. The second signal aborts the subscription: its
handlers are cancelled, and their messages are released. Every error is raised as itself and not inside an exception
group, including an error of the program's own work.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio

import anybus
from anybus import Delivery, Message, StreamBus, Subscription, SubscriptionConfig


async def work_until_signalled(
    signals: AsyncIterator[signal.Signals], subscription: Subscription, work: Callable[[], Awaitable[None]]
) -> None:
    """Do the program's own work until the first signal. Then close the subscription; abort it on the second signal."""
    failure: Exception | None = None
    working = anyio.CancelScope()

    async def listen() -> None:
        print(f"received {(await anext(signals)).name}", flush=True)
        working.cancel()
        subscription.close()
        print(f"received {(await anext(signals)).name}", flush=True)
        subscription.abort()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        try:
            with working:
                await work()
            subscription.close()
            await subscription.wait_closed()
        except Exception as error:
            failure = error  # raised below: the task group would wrap it
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def handle(delivery: Delivery) -> None:
    number = delivery.message.json(int)
    print(f"{number} begins", flush=True)
    try:
        await anyio.sleep(1)
    except anyio.get_cancelled_exc_class():
        print(f"{number} cancelled: the message is released, and will be redelivered", flush=True)
        raise
    print(f"{number} handled", flush=True)


async def publish_numbers(bus: StreamBus) -> None:
    for number in range(1_000_000):
        await bus.publish(Message.from_json("numbers", number))
        await anyio.sleep(0.2)


async def main(url: str) -> None:
    config = SubscriptionConfig("numbers", "workers", max_in_flight=4)
    async with anybus.connect(url) as bus:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with bus.subscribe(config, handle) as subscription:
                await work_until_signalled(signals, subscription, lambda: publish_numbers(bus))
    print("the bus has ended", flush=True)


if __name__ == "__main__":
    backend = sys.argv[1] if len(sys.argv) > 1 else "asyncio"
    anyio.run(main, sys.argv[2] if len(sys.argv) > 2 else "memory://", backend=backend)
