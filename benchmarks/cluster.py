"""One topic on a cluster of three primaries, compared with the same topic on a single server, in the same run.

For each piece of work: messages a second, and the CPU time a message of this process and of the server (on the cluster:
of the topic's node). The two alternate round by round. A ratio is that of the medians, followed by the lowest and
highest ratio of single rounds in brackets. Wanted: the cluster's rate is at least 0.9 of the single server's.

publish        from 100 tasks, which also create and encode the messages
publish_batch  in batches of 200
drain          of prepared messages, from subscribing until nothing is pending
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _contender as contender
import anyio
from _figures import CLIENT, LOOPS, RATE, SERVER, Figures, Measured, interleave, rate, ratio
from _record import Others, machine, server_version
from _server import own_cluster, own_server
from _wire import TOPIC, fill, prepare

from anybus.backends.redis._slots import SLOTS, slot_of

SINGLE, CLUSTER = "single", "cluster"
WANTED = 0.9
TASKS = 100


def work(count: int, loop: dict[str, Any]) -> dict[str, tuple[Callable[[int], None], Callable[[int], Measured]]]:
    """For each piece of work, what it needs beforehand on a server, and one measurement there."""
    messages = prepare(count)

    def nothing(port: int) -> None:
        """The work itself clears the server."""

    def publish(port: int) -> Measured:
        return anyio.run(partial(contender.publish_from_tasks, port, count, TASKS), **loop)

    def batches(port: int) -> Measured:
        return anyio.run(contender.publish_batches, port, messages, **loop)

    def drain(port: int) -> Measured:
        return anyio.run(contender.drain, port, count, **loop)

    return {
        "publish": (nothing, publish),
        "publish_batch": (nothing, batches),
        "drain": (lambda port: fill(port, messages), drain),
    }


def show(name: str, figures: Figures) -> None:
    for contestant, rounds in figures.items():
        print(f"{name:13} {contestant:8} {rate(rounds[RATE])}", flush=True)
    of_cluster, of_single = figures[CLUSTER], figures[SINGLE]
    told = ", ".join(
        f"{label} {ratio(of_cluster[measure], of_single[measure])}"
        for measure, label in ((RATE, f"rate (wanted: {WANTED})"), (CLIENT, "client CPU"), (SERVER, "server CPU"))
        if all(of_single[measure])
    )
    print(f"{name:13} cluster / single: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", choices=LOOPS, action="append", help="the event loops to use (default: all)")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Figures]] = {}
    with own_server() as single, own_cluster() as nodes:
        # Of three equal ranges of slots.
        owner = nodes[next(number for number in range(3) if slot_of(TOPIC) < SLOTS * (number + 1) // 3)]
        ports = {SINGLE: single.port, CLUSTER: owner.port}
        version = server_version(single.port)
        for loop in arguments.loop or LOOPS:
            print(f"{version}, {loop}", flush=True)
            meter = Others(None)
            found[loop] = {}
            for name, (before, measured) in work(arguments.messages, LOOPS[loop]).items():
                for port in ports.values():
                    before(port)
                figures = interleave(
                    {contestant: partial(measured, port) for contestant, port in ports.items()}, arguments.rounds
                )
                show(name, figures)
                found[loop][name] = figures
            share = meter.share()
            print(f"other processes, with the servers: {'?' if share is None else f'{share:.0%}'} of the machine")
    if arguments.json:
        run: dict[str, Any] = {"machine": machine(), "server": version, "figures": found}
        arguments.json.write_text(json.dumps(run, indent=2) + "\n")


if __name__ == "__main__":
    main()
