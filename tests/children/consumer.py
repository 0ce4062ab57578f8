"""A program that consumes a topic in one or more groups: a child of ``test_redis_crashes.py``.

Files in its folder, all beginning with its label:

- ``.state``: ``listens`` once SIGTERM ends it gracefully, ``connected`` before it subscribes, ``ready <consumer> ...``
  with its names on the server once it has.
- ``.begun.<group>``, ``.handled.<group>``: uids, at the start of a handling, and as the last step of one that succeeds;
  then as ``<uid> <id> <began> <ended> <attempt>``, by the clock that all processes of the machine share.
- ``.events.<group>``: ``settled <id> <how> <when> <attempt>`` and ``lost <id>``, as its observer is told.

One uid in sixteen fails at first and comes back as a retry. SIGTERM ends it gracefully, and SIGINT is left alone; with
``--bare`` it knows nothing of signals at all.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, nullcontext
from functools import partial
from pathlib import Path

import anyio
from notes import Notes, listening, run

import anybus
from anybus import Delivery, ExponentialBackoff, Observer, StreamBusOptions, SubscriptionConfig
from anybus.abc import BusEvent


def now() -> str:
    return f"{time.monotonic():.6f}"


class Teller(Observer):
    """Writes down what became of the entries."""

    def __init__(self, stem: Path, groups: list[str]) -> None:
        self._notes = {group: Notes(Path(f"{stem}.events.{group}")) for group in groups}

    def on_error(self, event: BusEvent) -> None:
        """What fails and passes is what the test does: nothing to say."""

    def on_settled(self, event: BusEvent) -> None:
        self._notes[str(event.group)].add(
            "settled", str(event.message_id), str(event.detail), now(), str(event.attempt)
        )

    def on_lease_lost(self, event: BusEvent) -> None:
        self._notes[str(event.group)].add("lost", str(event.message_id))


class Worker:
    """The handler of one group.

    :param gate: a file without which no handling goes on; None = there is no gate.
    """

    def __init__(self, stem: Path, group: str, work: float, gate: Path | None) -> None:
        self._begun = Notes(Path(f"{stem}.begun.{group}"))
        self._handled = Notes(Path(f"{stem}.handled.{group}"))
        self._work = work
        self._gate = gate

    async def handle(self, delivery: Delivery) -> None:
        uid, began = delivery.message.uid, now()
        self._begun.add(uid)
        while self._gate is not None and not self._gate.exists():
            await anyio.sleep(0.02)
        await anyio.sleep(random.random() * self._work)
        if uid.endswith("0") and delivery.state.attempt == 1:
            raise ValueError("not yet")
        self._handled.add(uid, delivery.id, began, now(), str(delivery.state.attempt))


async def main(arguments: argparse.Namespace) -> None:
    stem = arguments.folder / arguments.label
    state = Notes(Path(f"{stem}.state"))
    options = StreamBusOptions(
        claim_idle_timeout=arguments.lease,
        reclaim_interval=0.05,
        group_start_id="0",
        observer=Teller(stem, arguments.group),
    )
    with nullcontext(anyio.sleep_forever) if arguments.bare else listening(state) as until_told_to_end:
        await consume(arguments, options, state, until_told_to_end)


async def consume(
    arguments: argparse.Namespace,
    options: StreamBusOptions,
    state: Notes,
    until_told_to_end: Callable[[], Awaitable[None]],
) -> None:
    stem = arguments.folder / arguments.label
    backoff = ExponentialBackoff(initial=0.05, maximum=0.05)
    async with anybus.connect(arguments.url, options) as bus, AsyncExitStack() as stack:
        state.add("connected")
        names: list[str] = []
        for group in arguments.group:
            config = SubscriptionConfig(
                arguments.topic, group, consumer=arguments.label, max_in_flight=8, retry_backoff=backoff
            )
            worker = Worker(stem, group, arguments.work, arguments.gate)
            subscription = await stack.enter_async_context(bus.subscribe(config, worker.handle))
            names.append(subscription.consumer)
        state.add("ready", *names)
        await until_told_to_end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--label", required=True)
    parser.add_argument("--group", action="append", required=True)
    parser.add_argument("--lease", type=float, default=1.0)
    parser.add_argument("--work", type=float, default=0.02, help="handlings take up to so many seconds")
    parser.add_argument("--gate", type=Path)
    parser.add_argument("--bare", action="store_true")
    given = parser.parse_args()
    run(partial(main, given), given.loop)
