"""Large backlogs and long pending lists, on a server started for it: what a message costs then, and the longest call.

For each case: messages a second, the CPU time a message of this process and of the server, and the longest call that
the server has made for the bus (its slow log with everything above 1 ms; what fills the streams does not count).

drain N          a subscription that already runs drains N new messages
beside N of M    the same with 100,000 messages, beside N pending entries of M dead consumers whose leases still last
reclaim N of M   N pending entries of M dead consumers are taken over and handled: their leases have ended
retries N        N delayed retries become due at once
letters N        the listing of N dead letters
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from _contender import connect, nothing_pending
from _costs import Stopwatch
from _figures import CLIENT, LOOPS, RATE, SERVER, Figures, Measured
from _record import Others, machine, server_version
from _server import own_server
from _wire import AT_ONCE, GROUP, TOPIC, Wire, clear
from anyio import to_thread

from anybus import Delivery, JsonCodec, Message, StreamBus, SubscriptionConfig
from anybus._failure.copies import Origin, dead_letter, retry_stream
from anybus.backends.redis._keys import delayed

LONGEST = "longest_ms"
WARM = 1000
HELD = 500
"""How many entries a dead consumer took at once."""


def append(wire: Wire, count: int, *, stream: str = TOPIC, message: Message | None = None) -> None:
    body = JsonCodec().encode(message or Message(TOPIC, b"x" * 300, key="1"))
    for start in range(0, count, AT_ONCE):
        wire.pipeline([("XADD", stream, "*", "message", body)] * min(AT_ONCE, count - start))


def take_and_die(wire: Wire, count: int, consumers: int, *, lease_ended: bool) -> None:
    """Pending entries, which consumers took in turns."""
    append(wire, count)
    at_once = min(HELD, count // consumers)
    for number, _ in enumerate(range(0, count, at_once)):
        name = f"dead-{number % consumers}"
        read = wire.call("XREADGROUP", "GROUP", GROUP, name, "COUNT", at_once, "STREAMS", TOPIC, ">")
        if lease_ended:
            ids = [entry[0] for entry in read[0][1]]
            wire.call("XCLAIM", TOPIC, GROUP, name, 0, *ids, "TIME", 0, "RETRYCOUNT", 1, "JUSTID")


class SlowLog:
    """The longest call since its creation, in ms. Only what took longer than 1 ms is known."""

    def __init__(self, port: int) -> None:
        self._port = port
        with Wire(port) as wire:
            wire.pipeline(
                [
                    ("CONFIG", "SET", "slowlog-log-slower-than", 1000),
                    ("CONFIG", "SET", "slowlog-max-len", 100_000),
                    ("SLOWLOG", "RESET"),
                ]
            )

    def longest(self) -> float:
        with Wire(self._port) as wire:
            calls: Any = wire.call("SLOWLOG", "GET", -1)
        return max((call[2] / 1000 for call in calls), default=0.0)


@dataclass
class Counter:
    """Handlers count, until all have come."""

    left: int = 0
    done: anyio.Event = field(default_factory=anyio.Event)

    def expect(self, count: int) -> anyio.Event:
        self.left, self.done = count, anyio.Event()
        return self.done

    async def handler(self, _: Delivery) -> None:
        self.left -= 1
        if not self.left:
            self.done.set()


@asynccontextmanager
async def running(port: int) -> AsyncGenerator[tuple[StreamBus, Counter, Callable[..., Awaitable[Measured]]], None]:
    """A subscription that has already handled some messages. Yields also what measures one piece of work."""
    clear(port)
    counter = Counter()
    with Wire(port) as wire:
        append(wire, WARM)
    done = counter.expect(WARM)
    config = SubscriptionConfig(TOPIC, GROUP, max_in_flight=256)
    async with connect(port) as bus, bus.subscribe(config, counter.handler) as subscription:
        await done.wait()
        await nothing_pending(bus)

        async def measured(count: int, fill: Callable[[Wire], None], left: int = 0) -> Measured:
            """:param left: the number of entries that are still pending at the end."""
            subscription.pause()
            await anyio.sleep(0.1)
            with Wire(port) as wire:
                await to_thread.run_sync(fill, wire)
                done = counter.expect(count)
                log, watch = SlowLog(port), Stopwatch(port)
                subscription.resume()
                await done.wait()
                while wire.call("XPENDING", TOPIC, GROUP)[0] > left:
                    await anyio.sleep(0.0005)
                return {**watch.stop(count), LONGEST: log.longest()}

        yield bus, counter, measured


async def drain(port: int, count: int) -> list[Measured]:
    async with running(port) as (_, _, measured):
        rounds = min(20, max(1, 50_000 // count))
        return [await measured(count, partial(append, count=count)) for _ in range(rounds)]


async def beside(port: int, pending: int, consumers: int) -> list[Measured]:
    def fill(wire: Wire) -> None:
        take_and_die(wire, pending, consumers, lease_ended=False)
        append(wire, 100_000)

    async with running(port) as (_, _, measured):
        return [await measured(100_000, fill, pending)]


async def reclaim(port: int, pending: int, consumers: int) -> list[Measured]:
    async with running(port) as (_, _, measured):
        fill = partial(take_and_die, count=pending, consumers=consumers, lease_ended=True)
        return [await measured(pending, fill)]


async def retries(port: int, count: int) -> list[Measured]:
    stream = retry_stream(TOPIC, GROUP)
    async with running(port) as (bus, _, measured):

        async def later(numbers: range) -> None:
            for number in numbers:
                await bus.backend.publish_later(stream, Message(TOPIC, b"x" * 300, key=str(number)), delay=3600)

        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(later, range(number, count, 100))

        def all_due(wire: Wire) -> None:
            assert wire.call("ZUNIONSTORE", delayed(stream), 1, delayed(stream), "WEIGHTS", 0) == count

        return [await measured(count, all_due)]


async def letters(port: int, count: int) -> list[Measured]:
    clear(port)
    message = Message(TOPIC, b"x" * 300, key="1")
    origin, now = Origin(TOPIC, "1-1", GROUP, "c", 4, 4), datetime.now(timezone.utc)
    letter = dead_letter(message, f"{TOPIC}.dead", origin, code="retries", reason="no", error_type="ValueError", at=now)
    with Wire(port) as wire:
        append(wire, count, stream=f"{TOPIC}.dead", message=letter)
    async with connect(port) as bus:
        log, watch = SlowLog(port), Stopwatch(port)
        found = 0
        async for _ in bus.dead_letters(TOPIC):
            found += 1
        assert found == count
        return [{**watch.stop(count), LONGEST: log.longest()}]


def cases(scale: int) -> dict[str, Callable[[int], Awaitable[list[Measured]]]]:
    """:param scale: 1, or by how much everything is smaller in a quick run."""
    found: dict[str, Callable[[int], Awaitable[list[Measured]]]] = {}
    for count in (1_000, 10_000, 100_000, 1_000_000):
        found[f"drain {count:,}"] = partial(drain, count=count // scale)
    for consumers in (1, 100, 1000):
        text = f"{100_000:,} of {consumers:,}"
        found[f"beside {text}"] = partial(beside, pending=100_000 // scale, consumers=max(1, consumers // scale))
        found[f"reclaim {text}"] = partial(reclaim, pending=100_000 // scale, consumers=max(1, consumers // scale))
    found[f"retries {100_000:,}"] = partial(retries, count=100_000 // scale)
    found[f"letters {1_000_000:,}"] = partial(letters, count=1_000_000 // scale)
    return found


def line(name: str, rounds: Sequence[Measured]) -> str:
    def median(measure: str) -> float:
        return statistics.median(figures[measure] for figures in rounds)

    longest = max(figures[LONGEST] for figures in rounds)
    costs = f"client {median(CLIENT):6.2f} us, server {median(SERVER):6.2f} us, longest call {longest:5.1f} ms"
    return f"{name:24} {median(RATE):>9,.0f}/s, {costs}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", choices=LOOPS, action="append", help="the event loops to use (default: all)")
    parser.add_argument("--only", default="", help="only the cases whose names contain one of these, for example drain")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--python-quick", action="store_true", help="a hundredth of everything, to see that it works")
    arguments = parser.parse_args()
    found: dict[str, Figures] = {}
    with own_server() as server:
        version = server_version(server.port)
        for loop in arguments.loop or LOOPS:
            print(f"{version}, {loop}", flush=True)
            meter = Others(server.port)
            figures: Figures = {}
            for name, case in cases(100 if arguments.python_quick else 1).items():
                if not any(part in name for part in arguments.only.split(",")):
                    continue
                rounds = anyio.run(case, server.port, **LOOPS[loop])
                print(line(name, rounds), flush=True)
                figures[name] = {measure: [one[measure] for one in rounds] for measure in rounds[0]}
            found[loop] = figures
            share = meter.share()
            print("other processes used, of the machine: " + ("?" if share is None else f"{share:.0%}"), flush=True)
    if arguments.json:
        run: dict[str, Any] = {"machine": machine(), "server": version, "figures": found}
        arguments.json.write_text(json.dumps(run, indent=2) + "\n")


if __name__ == "__main__":
    main()
