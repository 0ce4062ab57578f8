"""Many subscriptions in one process, on a server started for it: what they cost while they wait, and how late they are.

All topics are subscribed by one bus at once. The figures, for each event loop:

entered       seconds until all subscriptions run
connections   of this process on the server
client, server CPU  of waiting subscriptions, in percent of one core
calls         commands a second that the server executes, including those in scripts (INFO commandstats)
commands      commands a second that clients send (MONITOR, in a short window of its own)
quiet         the time from publishing a message until its handler starts: one at a time, to random topics
beside load   the same, while a process of its own publishes to one more topic as fast as it is handled
left          seconds until all subscriptions have ended

The server's figures contain nothing of the measuring itself but a few commands. Beside each figure is the target, if
there is one for such a run.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from _costs import IdleMeter, server_time
from _figures import LOOPS, Measured, percentile
from _record import Others, machine, server_version
from _server import own_server
from _wire import AT_ONCE, Wire, clear

import anybus
from anybus import Delivery, JsonCodec, Message, StreamBus, SubscriptionConfig

LOADED, LOADED_GROUP = "scale.loaded", "group-0"
MOST_WAITING = 20_000
"""How many entries the publisher of the load is ahead of the handlers."""

UNITS = {
    "entered_s": "s",
    "connections": "",
    "client_percent": "%",
    "server_percent": "%",
    "calls_per_s": "/s",
    "commands_per_s": "/s",
    "quiet_p50_ms": "ms",
    "quiet_p99_ms": "ms",
    "loaded_p50_ms": "ms",
    "loaded_p99_ms": "ms",
    "load_per_s": "/s",
    "left_s": "s",
}
MANY: Measured = {
    "entered_s": 3,
    "connections": 20,
    "client_percent": 5,
    "server_percent": 5,
    "calls_per_s": 2500,
    "quiet_p50_ms": 2,
    "loaded_p99_ms": 20,
}
"""At most, for 1,000 subscriptions of one group."""

ONE: Measured = {"client_percent": 0.1, "commands_per_s": 3}
"""At most, for one subscription."""


@dataclass(frozen=True)
class Plan:
    port: int
    subscriptions: int
    groups: int
    seconds: float
    messages: int

    def targets(self) -> Measured:
        if self.subscriptions == 1:
            return ONE
        return MANY if self.groups == 1 and self.subscriptions == 1000 else {}

    def members(self) -> list[tuple[str, str]]:
        """The topics and their groups."""
        return [(f"scale.{number}", f"group-{number % self.groups}") for number in range(self.subscriptions)]


@dataclass
class Handled:
    """What the handlers saw."""

    waits: list[float] = field(default_factory=list[float])
    seen: anyio.Event = field(default_factory=anyio.Event)
    published: float = 0.0
    load: int = 0

    async def one(self, _: Delivery) -> None:
        self.waits.append((time.perf_counter() - self.published) * 1000)
        self.seen.set()

    async def of_load(self, _: Delivery) -> None:
        self.load += 1


@asynccontextmanager
async def entered(bus: StreamBus, plan: Plan, handled: Handled, measured: Measured) -> AsyncGenerator[None, None]:
    """All subscriptions, entered at the same time."""
    left, all_in, end = plan.subscriptions, anyio.Event(), anyio.Event()
    began = time.perf_counter()

    async def stay(topic: str, group: str) -> None:
        nonlocal left
        async with bus.subscribe(SubscriptionConfig(topic, group), handled.one):
            left -= 1
            if not left:
                all_in.set()
            await end.wait()

    async with anyio.create_task_group() as tasks:
        for topic, group in plan.members():
            tasks.start_soon(stay, topic, group)
        await all_in.wait()
        measured["entered_s"] = time.perf_counter() - began
        yield
        end.set()
        began = time.perf_counter()
    measured["left_s"] = time.perf_counter() - began


def calls(wire: Wire) -> int:
    """How many commands the server has executed, including those in scripts."""
    return sum(int(text.split("calls=", 1)[1].split(",", 1)[0]) for text in wire.info("commandstats").values())


def client_time() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def idle(plan: Plan, measured: Measured) -> None:
    with Wire(plan.port) as wire:
        measured["connections"] = int(wire.info("clients")["connected_clients"]) - 1
        began, client, server, executed = time.perf_counter(), client_time(), server_time(wire), calls(wire)
        await anyio.sleep(plan.seconds)
        client, server, executed = client_time() - client, server_time(wire) - server, calls(wire) - executed
        seconds = time.perf_counter() - began
    measured["client_percent"] = client / seconds * 100
    measured["server_percent"] = server / seconds * 100
    measured["calls_per_s"] = executed / seconds
    meter = IdleMeter(plan.port)
    await anyio.sleep(min(plan.seconds, 3 if plan.subscriptions > 1 else plan.seconds))
    measured["commands_per_s"] = meter.read()["sent_per_s"]


async def latency(bus: StreamBus, plan: Plan, handled: Handled, measured: Measured, name: str) -> None:
    """One message at a time, with pauses, so that every reader waits when the next one comes."""
    chance = random.Random(1)
    topics = [topic for topic, _ in plan.members()]
    handled.waits.clear()
    for number in range(plan.messages):
        await anyio.sleep(chance.uniform(0.002, 0.012))
        message = Message(chance.choice(topics), b"x" * 300, key=str(number))
        handled.seen = anyio.Event()
        handled.published = time.perf_counter()
        await bus.publish(message)
        with anyio.fail_after(30):
            await handled.seen.wait()
    measured[f"{name}_p50_ms"] = percentile(handled.waits, 0.5)
    measured[f"{name}_p99_ms"] = percentile(handled.waits, 0.99)


@contextmanager
def publisher(port: int) -> Generator[None, None, None]:
    """A process that publishes to the loaded topic until the block is left."""
    process = subprocess.Popen([sys.executable, __file__, "--publish-load", str(port)])
    try:
        yield
        assert process.poll() is None, "the publisher of the load has ended"
    finally:
        process.kill()
        process.wait(10)


def publish_load(port: int) -> None:
    """Keep the loaded topic filled. It holds what was handled too, up to about 100,000 entries."""
    body = JsonCodec().encode(Message(LOADED, b"x" * 300, key="1"))
    batch = [("XADD", LOADED, "*", "message", body)] * AT_ONCE
    with Wire(port) as wire:
        while True:
            wire.pipeline(batch)
            [group] = wire.call("XINFO", "GROUPS", LOADED)
            facts = dict(zip(group[::2], group[1::2], strict=True))
            if facts.get(b"lag", 0) > MOST_WAITING:
                time.sleep(0.01)
            elif wire.call("XLEN", LOADED) > 5 * MOST_WAITING:
                wire.call("XTRIM", LOADED, "MAXLEN", "~", 4 * MOST_WAITING)


async def beside_load(bus: StreamBus, plan: Plan, handled: Handled, measured: Measured) -> None:
    config = SubscriptionConfig(LOADED, LOADED_GROUP, max_in_flight=256)
    async with bus.subscribe(config, handled.of_load):
        with publisher(plan.port):
            with anyio.fail_after(30):
                while handled.load < 1000:
                    await anyio.sleep(0.01)
            began, load = time.perf_counter(), handled.load
            await latency(bus, plan, handled, measured, "loaded")
            measured["load_per_s"] = (handled.load - load) / (time.perf_counter() - began)


async def measure(plan: Plan) -> Measured:
    clear(plan.port)
    gc.collect()
    measured: Measured = {}
    handled = Handled()
    async with anybus.connect(f"redis://127.0.0.1:{plan.port}") as bus, entered(bus, plan, handled, measured):
        await anyio.sleep(2)  # what entering leaves to do
        await idle(plan, measured)
        await latency(bus, plan, handled, measured, "quiet")
        await beside_load(bus, plan, handled, measured)
    return {name: measured[name] for name in UNITS}


def table(figures: dict[str, Measured], targets: Measured) -> str:
    lines = [f"{'':20}" + "".join(f"{loop:>14}" for loop in figures) + f"{'target':>14}"]
    for name, unit in UNITS.items():
        values = "".join(f"{measured[name]:>14,.3f}" for measured in figures.values())
        target = f"<= {targets[name]:,g}" if name in targets else "-"
        lines.append(f"{name.removesuffix('_s').removesuffix('_ms'):15}{unit:>5}{values}{target:>14}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subscriptions", type=int, default=1000)
    parser.add_argument("--groups", type=int, default=1, help="over how many groups the subscriptions are spread")
    parser.add_argument("--loop", choices=LOOPS, action="append", help="the event loops to use (default: all)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for how long waiting is measured")
    parser.add_argument("--messages", type=int, default=500, help="how many latencies are measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--publish-load", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.publish_load:
        publish_load(arguments.publish_load)
    if not 1 <= arguments.groups <= arguments.subscriptions:
        parser.error("--groups must be between 1 and the number of subscriptions")
    _allow_many_connections()
    figures: dict[str, Measured] = {}
    with own_server() as server:
        plan = Plan(server.port, arguments.subscriptions, arguments.groups, arguments.seconds, arguments.messages)
        version = server_version(server.port)
        print(f"{version}: {plan.subscriptions:,} subscriptions of {plan.groups} group(s)", flush=True)
        others: dict[str, float | None] = {}
        for loop in arguments.loop or LOOPS:
            meter = Others(server.port)
            figures[loop] = anyio.run(partial(measure, plan), **LOOPS[loop])
            others[loop] = meter.share()
        print(table(figures, plan.targets()))
        print("other processes used, of the machine: " + _shares(others), flush=True)
    if arguments.json:
        run: dict[str, Any] = {"machine": machine(), "server": version, "others": others, "figures": figures}
        run |= {"subscriptions": plan.subscriptions, "groups": plan.groups, "targets": plan.targets()}
        arguments.json.write_text(json.dumps(run, indent=2) + "\n")


def _shares(others: dict[str, float | None]) -> str:
    return ", ".join(f"{loop} {'?' if share is None else format(share, '.0%')}" for loop, share in others.items())


def _allow_many_connections() -> None:
    """One connection per subscription may be needed. The server inherits the limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main()
