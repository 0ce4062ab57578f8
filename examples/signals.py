"""How a program with a bus ends on a signal: gracefully on the first, at once on the second.

Run it, and press Ctrl-C once or twice (or send SIGTERM):

    python examples/signals.py [asyncio|trio]

Which scope a signal cancels decides how the bus ends. The first cancels a scope *inside* the body of ``subscribe``: the
body then ends as if it were done, and handlers may finish. The second cancels everything: handlers are cancelled, and
what they had is handed back.
"""

from __future__ import annotations

import signal
import sys

import anyio
from anyio.abc import TaskStatus

import anybus
from anybus import Delivery, Message, SubscriptionConfig


async def cancel_on_signals(*scopes: anyio.CancelScope, task_status: TaskStatus[None]) -> None:
    """Cancel one scope per signal, in order."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        for scope in scopes:
            number = await anext(signals)
            print(f"received {signal.Signals(number).name}", flush=True)
            scope.cancel()


async def work(delivery: Delivery) -> None:
    number = delivery.message.json(int)
    try:
        await anyio.sleep(1)
    except anyio.get_cancelled_exc_class():
        print(f"{number} cancelled: it is handed back, and comes again", flush=True)
        raise
    print(f"{number} handled", flush=True)


async def main() -> None:
    body = anyio.CancelScope()
    async with anyio.create_task_group() as tasks:
        await tasks.start(cancel_on_signals, body, tasks.cancel_scope)
        config = SubscriptionConfig("numbers", "workers", max_in_flight=4)
        async with anybus.connect("memory://") as bus, bus.subscribe(config, work):
            with body:
                for number in range(1_000_000):
                    await bus.publish(Message.from_json("numbers", number))
                    await anyio.sleep(0.2)
        print("the bus has ended", flush=True)
        # Nothing is left to interrupt: stop listening.
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(main, backend=sys.argv[1] if len(sys.argv) > 1 else "asyncio")
