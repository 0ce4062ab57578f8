"""A program with a bus, at work until a signal comes: the child of ``test_signals.py``.

``signalled.py asyncio|uvloop|trio receiver|bare``. It says ``ready`` once messages are being handled. With a receiver
it turns SIGINT and SIGTERM into the cancellation of its scope, and before it exits it looks at the backend and prints,
as one line of JSON, what became of every message. Bare, it does nothing about signals at all.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from typing import Any

import anyio
import trio
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from anybus import (
    Delivery,
    ExponentialBackoff,
    MemoryBackend,
    Message,
    Observer,
    Reject,
    StreamBus,
    StreamBusOptions,
    SubscriptionConfig,
)
from anybus._failure.copies import retry_stream
from anybus.abc import BusEvent

TOPIC, GROUP = "work", "g"
RETRIES = retry_stream(TOPIC, GROUP)
LEASE = 60.0
BACKOFF = 0.004

tried: list[str] = []
published: list[str] = []
returned: list[str] = []
failed: list[str] = []
rejected: list[str] = []
at_once: list[str] = []
running: set[str] = set()


def is_news(record: logging.LogRecord) -> bool:
    """Whether it belongs on standard error: the report accounts for the dead letters."""
    return getattr(record, "scope", None) != "dead-lettered"


logging.getLogger("anybus").addFilter(is_news)


class Quiet(Observer):
    """Keeps what handlers raise off standard error, which is for what ends the program; the rest is reported."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def on_error(self, event: BusEvent) -> None:
        if not (event.scope == "handler" and isinstance(event.error, ValueError)):
            self.errors.append(repr(event))


async def handle(delivery: Delivery) -> None:
    """What is noted is noted last: nothing is awaited between a note and the handler's end."""
    uid, kind = delivery.message.uid, delivery.message.kind
    if uid in running:
        at_once.append(uid)
    running.add(uid)
    try:
        if kind == "walk":
            for _ in range(5):
                await checkpoint()
        elif kind == "hold":
            await anyio.sleep_forever()  # so that something is at stake whenever the signal comes
        elif kind == "slow":
            await anyio.sleep(0.005)
        elif kind == "fail" and delivery.state.attempt == 1:
            await checkpoint()
            failed.append(uid)
            raise ValueError("not yet")
        elif kind == "reject":
            rejected.append(uid)
            raise Reject("never")
        elif kind == "ack":
            returned.append(uid)
            await delivery.ack()
            await checkpoint()
            return
        returned.append(uid)
    finally:
        running.discard(uid)


async def publish_one(bus: StreamBus, kind: str) -> None:
    message = Message(TOPIC, kind=kind)
    tried.append(message.uid)
    await bus.publish(message)
    published.append(message.uid)


async def publish(bus: StreamBus, ready: anyio.Event) -> None:
    kinds = ("quick", "walk", "slow", "fail", "walk", "ack", "slow", "reject", "quick")
    while True:
        for kind in kinds:
            await publish_one(bus, kind)
        if len(returned) > 10:
            ready.set()
        await anyio.sleep(0.002)


async def receive_signals(scope: anyio.CancelScope, *, task_status: TaskStatus[None]) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()


async def work(backend: MemoryBackend, observer: Quiet, scope: anyio.CancelScope | None) -> None:
    options = StreamBusOptions(claim_idle_timeout=LEASE, reclaim_interval=0.002, group_start_id="0", observer=observer)
    backoff = ExponentialBackoff(initial=BACKOFF, maximum=BACKOFF)
    config = SubscriptionConfig(TOPIC, GROUP, max_in_flight=5, retry_backoff=backoff)
    ready = anyio.Event()
    async with anyio.create_task_group() as tasks:
        if scope is not None:
            await tasks.start(receive_signals, scope)
        async with StreamBus(backend, options) as bus, bus.subscribe(config, handle), anyio.create_task_group() as more:
            await publish_one(bus, "hold")
            for _ in range(2):
                more.start_soon(publish, bus, ready)
            await ready.wait()
            print("ready", flush=True)
            await anyio.sleep_forever()


async def look(backend: MemoryBackend) -> dict[str, Any]:
    """What the backend says, before anything is taken; then everything that can be taken is."""
    report: dict[str, Any] = {"streams": {}}
    await anyio.sleep(2 * BACKOFF)  # what waits for its retry is due by now
    for stream in (TOPIC, RETRIES, f"{TOPIC}.dead"):
        where: dict[str, list[Any]]
        report["streams"][stream] = where = {"pending": [], "unread": [], "reclaimed": [], "consumers": []}
        if stream in (TOPIC, RETRIES):
            pending = await backend.pending_entries(stream, GROUP, limit=1_000_000)
            consumers = await backend.consumer_names(stream, GROUP)
            heir = await backend.reclaim_idle(stream, GROUP, "heir", min_idle=LEASE, count=1_000_000)
            unread = await backend.read_new(stream, GROUP, "heir", count=1_000_000, timeout=0)
            where["pending"] = [[entry.id, entry.consumer, entry.deliveries] for entry in pending]
            where["consumers"] = [[name] for name in consumers]
            where["reclaimed"] = [[entry.id] for entry in heir]
            where["unread"] = [[entry.id] for entry in unread]
        where["entries"] = [[entry_id, message.uid] for entry_id, message, _ in backend.entries(stream) if message]
    return report


def living_tasks() -> int:
    if len(sys.argv) > 1 and sys.argv[1] == "trio":
        return trio.lowlevel.current_statistics().tasks_living
    return len(asyncio.all_tasks())


async def main(mode: str) -> None:
    backend, observer = MemoryBackend(), Quiet()
    before = living_tasks()
    if mode == "bare":
        await work(backend, observer, None)
        return
    with anyio.CancelScope() as scope:
        await work(backend, observer, scope)
    left = living_tasks() - before
    report = await look(backend)
    report.update(
        tried=tried,
        published=published,
        returned=returned,
        failed=failed,
        rejected=rejected,
        at_once=at_once,
        tasks_left=left,
        errors=observer.errors,
        cancelled=scope.cancelled_caught,
    )
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    loop = sys.argv[1]
    # As in a terminal's foreground, whatever the parent was started by.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if loop == "trio":
        anyio.run(main, sys.argv[2], backend="trio")
    else:
        anyio.run(main, sys.argv[2], backend="asyncio", backend_options={"use_uvloop": loop == "uvloop"})
