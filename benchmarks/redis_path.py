"""The Redis path compared with its floors and peers, in the same run, on a server started for it.

Payloads have 300 bytes, and all contestants encode envelopes with the JSON codec. Each measurement ends with a check on
the server (nothing pending, or the length of the stream). Contestants alternate round by round. A ratio is the ratio of
the medians, followed by the lowest and highest ratio of single rounds in brackets. Peers use redis-py, which is written
for asyncio, so they run on plain asyncio. Floors use blocking sockets and no event loop.

a  drain of prepared messages: the bus, a redis-py batch loop, and the floor (a hiredis loop)
b  publish from 100 tasks, which also create and encode the messages: against redis-py's bare XADDs of prepared bytes
c  publish one by one: against redis-py's client with the same messages and envelopes
d  publish_batch of 200: against a pipelined hiredis loop (floor) and redis-py's pipeline
e  200 messages per second to a blocked reader: time from publish to handled, and from publish to acked
f  2,000 handlers of 50 ms at concurrency 100: seconds
g  an idle consumer: CPU and commands; and the most that a drain holds, for a small and a large backlog
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import _contender as contender
import _floors as floors
import _peers as peers
import anyio
from _figures import LOOPS, best, interleave, percentile, ratio, show, show_rates
from _server import own_server

from anybus import JsonCodec

T = TypeVar("T")

TASKS = 100
INTERVAL = 1 / 200


@dataclass(frozen=True)
class Plan:
    """The size of a run."""

    port: int
    messages: int
    rounds: int
    seconds: float
    """The duration of part e. An idle consumer (part g) is measured for twice as long."""


def run(loop: str, function: Callable[..., Awaitable[T]], *args: Any) -> T:
    return anyio.run(partial(function, *args), **LOOPS[loop])


def part_a(plan: Plan, loop: str) -> None:
    port, count = plan.port, plan.messages
    floors.fill(port, floors.prepare(count))
    figures = interleave(
        {
            "floor: hiredis, blocking": lambda: floors.drain(port, count),
            "redis-py batch loop": lambda: run("asyncio", peers.drain, port, count),
            "anybus": lambda: run(loop, contender.drain, port, count),
        },
        plan.rounds,
    )
    floor, peer, bus = figures.values()
    show("a", loop, f"drain: {ratio(bus, floor)} of the floor; redis-py's loop {ratio(peer, floor)} of it")
    show_rates("a", loop, figures)


def part_b(plan: Plan, loop: str) -> None:
    port, count = plan.port, max(TASKS, plan.messages // 2)
    encode = JsonCodec().encode
    bodies = [encode(message) for message in floors.prepare(count)]
    pool, shared = "redis-py, its pool", "redis-py, one connection"
    figures = interleave(
        {
            pool: lambda: run("asyncio", peers.publish_bare, port, bodies, TASKS, False),
            shared: lambda: run("asyncio", peers.publish_bare, port, bodies, TASKS, True),
            "anybus": lambda: run(loop, contender.publish_from_tasks, port, count, TASKS),
        },
        plan.rounds,
    )
    better = best(figures, pool, shared)
    show("b", loop, f"publish from {TASKS} tasks: {ratio(figures['anybus'], figures[better])} times {better}")
    show_rates("b", loop, figures)


def part_c(plan: Plan, loop: str) -> None:
    port, count = plan.port, max(100, plan.messages // 10)
    figures = interleave(
        {
            "redis-py": lambda: run("asyncio", peers.publish_one_by_one, port, count),
            "anybus": lambda: run(loop, contender.publish_one_by_one, port, count),
        },
        plan.rounds,
    )
    show("c", loop, f"publish one by one: {ratio(figures['anybus'], figures['redis-py'])} times redis-py")
    show_rates("c", loop, figures)


def part_d(plan: Plan, loop: str) -> None:
    port, messages = plan.port, floors.prepare(plan.messages)
    figures = interleave(
        {
            "floor: hiredis, pipelined": lambda: floors.publish_pipelined(port, messages),
            "redis-py's pipeline": lambda: run("asyncio", peers.publish_pipelined, port, messages),
            "anybus": lambda: run(loop, contender.publish_batches, port, messages),
        },
        plan.rounds,
    )
    floor, peer, bus = figures.values()
    show("d", loop, f"publish_batch: {ratio(bus, floor)} of the floor; redis-py's pipeline {ratio(peer, floor)} of it")
    show_rates("d", loop, figures)


def part_e(plan: Plan, loop: str) -> None:
    port, count = plan.port, int(plan.seconds / INTERVAL)
    seen: dict[str, list[peers.Latencies]] = {"redis-py": [], "anybus": []}

    def measure(name: str, on: str, function: Callable[..., Awaitable[peers.Latencies]]) -> float:
        seen[name].append(run(on, function, port, count, INTERVAL))
        return percentile(seen[name][-1].to_handled, 0.5)

    interleave(
        {
            "redis-py": lambda: measure("redis-py", "asyncio", peers.latencies),
            "anybus": lambda: measure("anybus", loop, contender.latencies),
        },
        min(plan.rounds, 3),
    )

    def milliseconds(name: str, share: float, *, acked: bool) -> float:
        runs = [percentile(run.to_acked if acked else run.to_handled, share) for run in seen[name]]
        return statistics.median(runs) * 1000

    texts: list[str] = []
    for share, label in ((0.5, "p50"), (0.99, "p99")):
        bus, peer = (milliseconds(name, share, acked=False) for name in ("anybus", "redis-py"))
        texts.append(f"{label} {bus:.2f} ms, {bus / peer:.2f} times redis-py's {peer:.2f}")
    show("e", loop, f"publish to handled: {'; '.join(texts)}")
    bus, peer = (milliseconds(name, 0.5, acked=True) for name in ("anybus", "redis-py"))
    show("e", loop, f"publish to acked: p50 {bus:.2f} ms, {bus - peer:+.2f} ms to redis-py's {peer:.2f}")


def part_f(plan: Plan, loop: str) -> None:
    port, count = plan.port, 2000
    floors.fill(port, floors.prepare(count))
    seconds = [run(loop, contender.slow_handlers, port, count, 0.05, 100) for _ in range(plan.rounds)]
    text = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
    show("f", loop, f"{count:,} handlers of 50 ms at concurrency 100: {text}")


def part_g(plan: Plan, loop: str) -> None:
    port = plan.port
    floors.clear(port)
    found = run(loop, contender.idle, port, plan.seconds * 2)
    floors.clear(port)
    with floors.Wire(port) as wire:
        wire.call("XGROUP", "CREATE", floors.TOPIC, floors.GROUP, "0", "MKSTREAM")
    meter = contender.Meter(port)
    run("asyncio", peers.idle, port, plan.seconds * 2)
    peer = meter.read()
    show(
        "g",
        loop,
        f"idle: {found.share:.3%} of a core (a redis-py loop, including its start: {peer.share:.3%}), "
        f"{found.sent:.1f} commands/s sent, {found.executed:.1f}/s executed, including those in scripts",
    )
    for limit in (512, 2048):
        for count in (plan.messages // 10, plan.messages):
            floors.fill(port, floors.prepare(count))
            memory = run(loop, contender.drain_measured, port, count, limit)
            show(
                "g",
                loop,
                f"drain of {count:,} with max_pending_acks={limit}: at most {memory.held} held, "
                f"{memory.traced / 2**20:.1f} MiB",
            )


PARTS: dict[str, Callable[[Plan, str], None]] = {
    "a": part_a,
    "b": part_b,
    "c": part_c,
    "d": part_d,
    "e": part_e,
    "f": part_f,
    "g": part_g,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="the parts to run, for example a,b,e")
    parser.add_argument("--loop", choices=LOOPS, action="append", help="the event loops to use (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--python-quick", action="store_true", help="a tenth of everything, to check that it works")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    with own_server() as port:
        plan = Plan(port, arguments.messages, arguments.rounds, 5.0)
        if arguments.python_quick:
            plan = Plan(port, max(1000, plan.messages // 10), 1, 0.5)
        for part in parts:
            for loop in arguments.loop or LOOPS:
                PARTS[part](plan, loop)


if __name__ == "__main__":
    main()
