"""Entering a bus on a server can be cancelled.

The specification, on each event loop: wherever the cancellation hits, while the connection is opened, while the server
is looked at, and right after, the block ends by it, soon, and leaves no connection behind.
"""

from __future__ import annotations

from typing import Any

import anyio
from anyio.lowlevel import checkpoint
from harness import SOON, until
from servers import RunningServer

import anybus

STEPS = 60
"""More than it takes to connect."""


async def test_entering_ends_wherever_it_is_cancelled(server: RunningServer) -> None:
    entered = 0
    url = f"{server.url}?client_name=entering"
    for steps in range(STEPS):
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:

                async def enter() -> None:
                    nonlocal entered
                    async with anybus.connect(url):
                        entered += 1
                        await anyio.sleep_forever()

                tasks.start_soon(enter)
                for _ in range(steps):
                    await checkpoint()
                tasks.cancel_scope.cancel()
    # At its own pace, it is hit while it connects.
    for share in range(20):
        with anyio.fail_after(SOON), anyio.move_on_after(share * 0.001):
            async with anybus.connect(url):
                entered += 1
                await anyio.sleep_forever()
    client: Any = server.client()

    def none_left() -> bool:
        return not [item for item in client.client_list() if item["name"] == "entering"]

    await until(none_left, "every connection to be closed")
    client.close()
