"""A program that writes effects to a database, and is killed in between: a child of ``test_exactly_once_kill.py``.

It forks a worker again and again, until the file ``end`` exists. A worker handles messages. For each it inserts a row in
the handler's transaction. A message with the key ``after`` kills its worker (SIGKILL) when the transaction is committed,
and the entry not acknowledged. One with the key ``inside`` kills it before the commit, at its first delivery. Files in
the folder: ``<label>.after`` and ``<label>.inside`` with the uids of the messages that killed.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from functools import partial
from pathlib import Path

import anyio
from anyio import to_thread
from notes import Notes, run

import anybus
from anybus import Delivery, Observer, StreamBusOptions, SubscriptionConfig
from anybus.abc import BusEvent
from anybus.idempotency import SqlStore


class Quiet(Observer):
    """What fails and passes is what the test does."""

    def on_error(self, event: BusEvent) -> None: ...


def connect(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / "shop.sqlite", timeout=30, check_same_thread=False)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def main(url: str, topic: str, folder: Path, label: str) -> None:
    after, inside = (Notes(folder / f"{label}.{kind}") for kind in ("after", "inside"))
    connection = connect(folder)

    def write(uid: str) -> None:
        connection.execute("INSERT INTO effects (uid) VALUES (?)", (uid,))

    async def handler(delivery: Delivery) -> None:
        uid, key = delivery.message.uid, delivery.message.key
        async with delivery.transaction(connection):
            await to_thread.run_sync(write, uid)
            if key == "inside" and delivery.state.deliveries == 1:
                inside.add(uid)
                die()
        if key == "after":
            after.add(uid)
            die()

    options = StreamBusOptions(claim_idle_timeout=1.0, reclaim_interval=0.05, group_start_id="0", observer=Quiet())
    async with SqlStore(partial(connect, folder)) as store, anybus.connect(url, options) as bus:
        config = SubscriptionConfig(
            topic, "shop", guarantee="exactly-once", idempotency_store=store, max_in_flight=1, max_deliveries=1000
        )
        async with bus.subscribe(config, handler):
            while not (folder / "end").exists():
                await anyio.sleep(0.05)


if __name__ == "__main__":
    loop, url, topic, folder_name, label = sys.argv[1:]
    place = Path(folder_name)
    while not (place / "end").exists():
        worker = os.fork()
        if not worker:
            run(partial(main, url, topic, place, label), loop)
            os._exit(0)
        os.waitpid(worker, 0)
