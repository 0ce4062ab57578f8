"""Delayed messages: what it costs to store one, and how late the last of many is that are due within one second.

On a server started for it. Printed for each event loop:

- CPU microseconds a message, of this process and of the server: ``publish`` beside ``publish_later``, in one run.
- N messages that fall due evenly within one second, and the same all at once: how late the median and the last one
  were appended, by the server's clock; the longest call that the server made for it; the longest time for which another
  task of this process had to wait; and the longest PING of another connection.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from functools import partial

import anyio
from _contender import connect
from _costs import Stopwatch
from _figures import CLIENT, LOOPS, RATE, SERVER
from _server import own_server
from _wire import TOPIC, Wire, clear
from anyio import to_thread
from backlog import SlowLog

from anybus import JsonCodec, Message, StreamBus

TASKS = 100


async def in_turns(count: int, call: Callable[[int], Awaitable[object]]) -> None:
    async def some(first: int) -> None:
        for number in range(first, count, TASKS):
            await call(number)

    async with anyio.create_task_group() as tasks:
        for first in range(TASKS):
            tasks.start_soon(some, first)


async def costs(bus: StreamBus, port: int, count: int) -> None:
    def message() -> Message:
        return Message(TOPIC, b"x" * 300, key="1")

    calls: dict[str, Callable[[int], Awaitable[object]]] = {
        "publish": lambda number: bus.publish(message()),
        "publish_later": lambda number: bus.publish_later(message(), delay=3600),
    }
    for name, call in calls.items():
        await in_turns(1000, call)
        watch = Stopwatch(port)
        await in_turns(count, call)
        found = watch.stop(count)
        print(f"  {name:14} {found[RATE]:10,.0f}/s   client {found[CLIENT]:5.1f} us   server {found[SERVER]:5.1f} us")


class Stalls:
    """How long other tasks of this process, and other clients of the server, had to wait."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.loop = 0.0
        self.ping = 0.0

    async def watch_loop(self) -> None:
        while True:
            before = anyio.current_time()
            await anyio.sleep(0.001)
            self.loop = max(self.loop, anyio.current_time() - before - 0.001)

    async def watch_server(self) -> None:
        with Wire(self._port) as wire:
            while True:
                before = anyio.current_time()
                await to_thread.run_sync(wire.call, "PING")
                self.ping = max(self.ping, anyio.current_time() - before)
                await anyio.sleep(0.002)


def lateness(wire: Wire) -> list[int]:
    """Of each entry, in ms. The key of a message is its due time."""
    found: list[int] = []
    start = "-"
    while page := wire.call("XRANGE", TOPIC, start, "+", "COUNT", 5000):
        found += [int(entry[0].split(b"-")[0]) - int(JsonCodec().decode(entry[1][1]).key) for entry in page]
        start = f"({page[-1][0].decode()}"
    return sorted(found)


async def due(bus: StreamBus, port: int, count: int, *, within: float, notice: float) -> None:
    clear(port)
    start = datetime.now(timezone.utc) + timedelta(seconds=notice)

    async def store(number: int) -> None:
        at = start + timedelta(seconds=within * number / count)
        await bus.publish_later(Message(TOPIC, b"x" * 300, key=f"{at.timestamp() * 1000:.0f}"), at=at)

    await in_turns(count, store)
    left = (start - datetime.now(timezone.utc)).total_seconds()
    if left < 0.5:
        print(f"  not measured: it took {notice - left:.1f} s to store {count:,} messages")
        return
    await anyio.sleep(left - 0.3)
    log, stalls = SlowLog(port), Stalls(port)
    with Wire(port) as wire:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stalls.watch_loop)
            tasks.start_soon(stalls.watch_server)
            while wire.call("XLEN", TOPIC) < count:
                await anyio.sleep(0.05)
            tasks.cancel_scope.cancel()
        late = lateness(wire)
    assert len(late) == count
    assert late[0] >= 0
    span = f"within {within:g} s" if within else "at once"
    print(
        f"  {count:,} due {span}: median {late[count // 2]} ms late, last {late[-1]} ms; longest call "
        f"{log.longest():.1f} ms, other tasks waited {stalls.loop * 1000:.0f} ms, PING {stalls.ping * 1000:.0f} ms"
    )


async def main(port: int, count: int) -> None:
    async with connect(port) as bus:
        await costs(bus, port, count)
        for within in (1.0, 0.0):
            await due(bus, port, count, within=within, notice=3 + count / 7000)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--loop", choices=tuple(LOOPS), action="append", help="unset = each of them")
    given = parser.parse_args()
    for loop in given.loop or LOOPS:
        print(loop)
        with own_server() as server:
            anyio.run(partial(main, server.port, given.count), **LOOPS[loop])
