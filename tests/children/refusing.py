"""A program whose handler rejects every second message: a child of ``test_cluster_letters.py``.

``.ready`` in its folder, after its label, has one line once it consumes; ``.handled`` and ``.refused`` have the uids.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import anyio
from notes import Notes, run

import anybus
from anybus import Delivery, Reject, StreamBusOptions, SubscriptionConfig


async def main(arguments: argparse.Namespace) -> None:
    stem = arguments.folder / arguments.label
    ready, handled, refused = (Notes(Path(f"{stem}.{kind}")) for kind in ("ready", "handled", "refused"))

    async def handler(delivery: Delivery) -> None:
        uid = delivery.message.uid
        if int(uid[-1], 16) % 2:
            refused.add(uid)
            raise Reject("every second one")
        handled.add(uid)

    options = StreamBusOptions(claim_idle_timeout=1.0, reclaim_interval=0.05, group_start_id="0")
    async with anybus.connect(arguments.url, options) as bus:
        config = SubscriptionConfig(arguments.topic, "g", consumer=arguments.label, max_in_flight=8)
        async with bus.subscribe(config, handler):
            ready.add("ready")
            await anyio.sleep_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--label", required=True)
    given = parser.parse_args()
    run(partial(main, given), given.loop)
