"""The Redis path compared with its floors and peers, in the same run, on a server started for it.

Payloads have 300 bytes, and all contestants encode envelopes with the JSON codec. Each measurement ends with a check on
the server (nothing pending, or the length of the stream). Contestants alternate round by round. A ratio is the ratio of
the medians, followed by the lowest and highest ratio of single rounds in brackets. Drains and publishes also report the
CPU time a message, of this process and of the server. On a busy machine, read those figures and not the rates.

Floors use blocking sockets and no event loop. Peers use redis-py, which is written for asyncio, so they run on plain
asyncio. When the bus runs on uvloop, they run on uvloop as well, as contestants of their own.

a  drain of prepared messages: the bus, a redis-py batch loop, and the floor (a hiredis loop)
b  publish from 100 tasks, which also create and encode the messages: against redis-py's bare XADDs of prepared bytes
c  publish one by one: against redis-py's client with the same messages and envelopes
d  publish_batch of 200: against a pipelined hiredis loop (floor) and redis-py's pipeline
e  200 messages per second to a blocked reader: time from publish to handled, and from publish to acked
f  2,000 handlers of 50 ms at concurrency 100: seconds
g  an idle consumer: CPU and commands; and the most that a drain holds, for a small and a large backlog
h  the drain of part a, with this process and the server on one core (only where the platform can do that)
i  the same for part c, where otherwise much depends on which cores the two processes happen to run on
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import _contender as contender
import _floors as floors
import _peers as peers
import _wire as wire
import anyio
from _figures import BUS, FLOOR, LOOPS, RATE, Figures, Measured, best, interleave, ratio, show, show_costs, show_others
from _pinning import can_pin, one_core, usable_cores
from _record import Others, Record, Run, server_version
from _server import Server, own_server

from anybus import JsonCodec

T = TypeVar("T")

TASKS = 100
INTERVAL = 1 / 200


@dataclass(frozen=True)
class Plan:
    """The size of a run."""

    server: Server
    messages: int
    rounds: int
    seconds: float
    """The duration of part e. An idle consumer (part g) is measured for twice as long."""

    @property
    def port(self) -> int:
        return self.server.port


def run(loop: str, function: Callable[..., Awaitable[T]], *args: Any) -> T:
    return anyio.run(partial(function, *args), **LOOPS[loop])


def of_peer(name: str, loop: str, function: Callable[..., Awaitable[Measured]], *args: Any) -> dict[str, Any]:
    """A peer on plain asyncio. If the bus runs on uvloop, a second one on uvloop."""
    found = {name: lambda: run("asyncio", function, *args)}
    if loop == "uvloop":
        found[f"{name}, uvloop"] = lambda: run("uvloop", function, *args)
    return found


def to(figures: Figures, name: str, reference: str) -> str:
    """The ratio of two rates."""
    return ratio(figures[name][RATE], figures[reference][RATE])


def drain(plan: Plan, loop: str) -> Figures:
    port, count = plan.port, plan.messages
    wire.fill(port, wire.prepare(count))
    return interleave(
        {
            FLOOR: lambda: floors.drain(port, count),
            **of_peer("redis-py loop", loop, peers.drain, port, count),
            BUS: lambda: run(loop, contender.drain, port, count),
        },
        plan.rounds,
    )


def part_a(plan: Plan, loop: str) -> Figures:
    figures = drain(plan, loop)
    peer = to(figures, "redis-py loop", FLOOR)
    show("a", loop, f"drain: {to(figures, BUS, FLOOR)} of the floor; redis-py's loop {peer} of it")
    show_costs("a", loop, figures, FLOOR)
    return figures


def part_b(plan: Plan, loop: str) -> Figures:
    port, count = plan.port, max(TASKS, plan.messages // 2)
    encode = JsonCodec().encode
    bodies = [encode(message) for message in wire.prepare(count)]
    pool, shared = "redis-py, its pool", "redis-py, one connection"
    figures = interleave(
        {
            **of_peer(pool, loop, peers.publish_bare, port, bodies, TASKS, False),
            **of_peer(shared, loop, peers.publish_bare, port, bodies, TASKS, True),
            BUS: lambda: run(loop, contender.publish_from_tasks, port, count, TASKS),
        },
        plan.rounds,
    )
    better = best(figures, pool, shared)
    show("b", loop, f"publish from {TASKS} tasks: {to(figures, BUS, better)} times {better}")
    show_costs("b", loop, figures, better)
    return figures


def publish_one_by_one(plan: Plan, loop: str) -> Figures:
    port, count = plan.port, max(100, plan.messages // 10)
    return interleave(
        {
            **of_peer("redis-py", loop, peers.publish_one_by_one, port, count),
            BUS: lambda: run(loop, contender.publish_one_by_one, port, count),
        },
        plan.rounds,
    )


def part_c(plan: Plan, loop: str) -> Figures:
    figures = publish_one_by_one(plan, loop)
    show("c", loop, f"publish one by one: {to(figures, BUS, 'redis-py')} times redis-py")
    show_costs("c", loop, figures, "redis-py")
    return figures


def part_d(plan: Plan, loop: str) -> Figures:
    port, messages = plan.port, wire.prepare(plan.messages)
    figures = interleave(
        {
            FLOOR: lambda: floors.publish_pipelined(port, messages),
            **of_peer("redis-py pipeline", loop, peers.publish_pipelined, port, messages),
            BUS: lambda: run(loop, contender.publish_batches, port, messages),
        },
        plan.rounds,
    )
    peer = to(figures, "redis-py pipeline", FLOOR)
    show("d", loop, f"publish_batch: {to(figures, BUS, FLOOR)} of the floor; redis-py's pipeline {peer} of it")
    show_costs("d", loop, figures, FLOOR)
    return figures


def part_e(plan: Plan, loop: str) -> Figures:
    port, count = plan.port, int(plan.seconds / INTERVAL)
    figures = interleave(
        {
            "redis-py loop": lambda: run("asyncio", peers.latencies, port, count, INTERVAL).percentiles(),
            BUS: lambda: run(loop, contender.latencies, port, count, INTERVAL).percentiles(),
        },
        plan.rounds,
    )

    def milliseconds(measure: str) -> tuple[float, float]:
        return (
            statistics.median(figures[BUS][measure]),
            statistics.median(figures["redis-py loop"][measure]),
        )

    texts: list[str] = []
    for label in ("p50", "p99"):
        bus, peer = milliseconds(f"handled_{label}_ms")
        texts.append(f"{label} {bus:.2f} ms, {bus / peer:.2f} times redis-py's {peer:.2f}")
    show("e", loop, f"publish to handled: {'; '.join(texts)}")
    bus, peer = milliseconds("acked_p50_ms")
    show("e", loop, f"publish to acked: p50 {bus:.2f} ms, {bus - peer:+.2f} ms to redis-py's {peer:.2f}")
    return figures


def part_f(plan: Plan, loop: str) -> Figures:
    port, count = plan.port, 2000
    wire.fill(port, wire.prepare(count))
    figures = interleave(
        {BUS: lambda: {"seconds": run(loop, contender.slow_handlers, port, count, 0.05, 100)}}, plan.rounds
    )
    seconds = figures[BUS]["seconds"]
    text = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
    show("f", loop, f"{count:,} handlers of 50 ms at concurrency 100: {text}")
    return figures


def part_g(plan: Plan, loop: str) -> Figures:
    port = plan.port
    figures = interleave(
        {
            "redis-py loop": lambda: run("asyncio", peers.idle, port, plan.seconds * 2),
            BUS: lambda: run(loop, contender.idle, port, plan.seconds * 2),
        },
        plan.rounds,
    )
    for name, rounds in figures.items():
        share, sent, executed = (
            statistics.median(rounds[key]) for key in ("core_share", "sent_per_s", "executed_per_s")
        )
        show(
            "g",
            loop,
            f"idle: {name:16} {share:.3%} of a core, {sent:.1f} commands/s sent, "
            f"{executed:.1f}/s executed, including those in scripts",
        )
    for limit in (512, 2048):
        for count in (plan.messages // 10, plan.messages):
            wire.fill(port, wire.prepare(count))
            memory = run(loop, contender.drain_measured, port, count, limit)
            text = f"drain of {count:,} with max_pending_acks={limit}"
            show("g", loop, f"{text}: at most {memory.held} held, {memory.traced / 2**20:.1f} MiB")
            figures[text] = {"held": [memory.held], "traced_mib": [memory.traced / 2**20]}
    return figures


def on_one_core(part: str, plan: Plan, loop: str, measure: Callable[[Plan, str], Figures]) -> Figures:
    """With this process and the server on one core. Empty if the platform cannot do that."""
    if not can_pin():
        show(part, loop, "skipped: this platform cannot keep a process on one core")
        return {}
    with one_core(plan.server.pid):
        return measure(plan, loop)


def part_h(plan: Plan, loop: str) -> Figures:
    figures = on_one_core("h", plan, loop, drain)
    if not figures:
        return {}
    peer = to(figures, "redis-py loop", FLOOR)
    show("h", loop, f"drain, all on one core: {to(figures, BUS, FLOOR)} of the floor; redis-py's loop {peer} of it")
    show_costs("h", loop, figures, FLOOR)
    return figures


def part_i(plan: Plan, loop: str) -> Figures:
    figures = on_one_core("i", plan, loop, publish_one_by_one)
    if figures:
        show("i", loop, f"publish one by one, all on one core: {to(figures, BUS, 'redis-py')} times redis-py")
        show_costs("i", loop, figures, "redis-py")
    return figures


PARTS: dict[str, Callable[[Plan, str], Figures]] = {
    "a": part_a,
    "b": part_b,
    "c": part_c,
    "d": part_d,
    "e": part_e,
    "f": part_f,
    "g": part_g,
    "h": part_h,
    "i": part_i,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="the parts to run, for example a,b,e")
    parser.add_argument("--loop", choices=LOOPS, action="append", help="the event loops to use (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures to this file")
    parser.add_argument("--python-quick", action="store_true", help="a tenth of everything, to check that it works")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    try:
        record = Record(arguments.json)
    except ValueError as error:
        parser.error(str(error))
    with own_server() as server:
        plan = Plan(server, arguments.messages, arguments.rounds, 5.0)
        if arguments.python_quick:
            plan = Plan(server, max(1000, plan.messages // 10), 1, 0.5)
        about: Run = {"messages": plan.messages, "rounds": plan.rounds, "server": server_version(server.port)}
        print(f"{about['server']}, {usable_cores()} cores", flush=True)
        for part in parts:
            for loop in arguments.loop or LOOPS:
                others = Others(server.port)
                figures = PARTS[part](plan, loop)
                share = others.share()
                show_others(part, loop, share)
                record.add(part, loop, {**about, "others": share}, figures)


if __name__ == "__main__":
    main()
