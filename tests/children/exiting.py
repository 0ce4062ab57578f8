"""A program whose handler raises what ends programs: a child of ``test_promise_10_errors_come_out_bare.py``.

``exiting.py asyncio|uvloop|trio SystemExit|KeyboardInterrupt``. It catches that around its subscription and prints, as
one line of JSON, whether it came out as itself, and what became of the message.
"""

from __future__ import annotations

import json
import sys

import anyio

from anybus import Delivery, MemoryBackend, Message, StreamBus, StreamBusOptions, SubscriptionConfig

ERRORS: dict[str, BaseException] = {"SystemExit": SystemExit(3), "KeyboardInterrupt": KeyboardInterrupt()}


async def main(error: BaseException) -> None:
    backend = MemoryBackend()
    came_out: BaseException | None = None
    body_was = ""

    async def handler(delivery: Delivery) -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    async with StreamBus(backend, StreamBusOptions(claim_idle_timeout=60)) as bus:
        try:
            async with bus.subscribe(SubscriptionConfig("work", "g"), handler) as subscription:
                await bus.publish(Message("work"))
                try:
                    await anyio.sleep_forever()
                except anyio.get_cancelled_exc_class():
                    body_was = "cancelled"
                    raise
        except BaseException as caught:
            came_out = caught
        names = {subscription.consumer: "its own"}
        entries = await backend.pending_entries("work", "g")
        pending = [[names.get(entry.consumer, entry.consumer), entry.deliveries] for entry in entries]
    print(json.dumps({"as_itself": came_out is error, "body_was": body_was, "pending": pending}))


if __name__ == "__main__":
    loop, name = sys.argv[1:]
    if loop == "trio":
        anyio.run(main, ERRORS[name], backend="trio")
    else:
        anyio.run(main, ERRORS[name], backend="asyncio", backend_options={"use_uvloop": loop == "uvloop"})
