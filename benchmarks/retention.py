"""What retention costs and what it saves, on a server started for it.

memory     the server's memory after so many messages were handled: the topic undeclared, and with Interest
per message  processor time of this process and of the server for a published and handled message, undeclared and with
           Interest, in turns; the median of the rounds, and the ratio of the two
longest    the server's time for the longest step of trimming, by its slow log: Interest and Limits, for messages of
           several sizes and for several numbers of groups
quiet      commands a second that looking after so many quiet subscriptions adds (INFO commandstats)
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import redis
from _server import Server, own_server

import anybus
from anybus import Delivery, Interest, Limits, Message, Retention, StreamBus, SubscriptionConfig
from anybus._retention import pace
from anybus.backends.redis import RedisBackend

PAYLOAD = b"x" * 197


async def handle(delivery: Delivery) -> None:
    """Nothing: the cost is the bus's own."""


def client_of(server: Server) -> Any:
    return redis.Redis(port=server.port)


def server_seconds(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / 100


def used_memory(client: Any) -> int:
    return int(client.info("memory")["used_memory"])


async def handle_all(server: Server, topic: str, retention: Retention | None, count: int) -> tuple[float, float]:
    """Publish and handle so many messages, in a bus of its own. Microseconds of both processes for each."""
    async with anybus.connect(f"redis://127.0.0.1:{server.port}") as bus:
        if retention is not None:
            await bus.declare_topic(topic, retention)
        config = SubscriptionConfig(topic, "billing", max_in_flight=256)
        async with bus.subscribe(config, handle) as subscription:
            own, theirs = time.process_time(), server_seconds(server.pid)
            for _ in range(count // 1000):
                (await bus.publish_batch([Message(topic, PAYLOAD)] * 1000)).raise_for_errors()
            while subscription.statistics().handled < count:
                await anyio.sleep(0.01)
            own, theirs = time.process_time() - own, server_seconds(server.pid) - theirs
            if retention is not None:
                with client_of(server) as client:
                    while client.xlen(topic):
                        await anyio.sleep(0.05)
    return own / count * 1e6, theirs / count * 1e6


async def memory_and_cost(server: Server, count: int, rounds: int) -> None:
    with client_of(server) as client:
        costs: dict[str, list[tuple[float, float]]] = {"undeclared": [], "Interest": []}
        memory: dict[str, list[int]] = {"undeclared": [], "Interest": []}
        await handle_all(server, "warm", None, 1000)
        for number in range(rounds):
            for name, retention in (("undeclared", None), ("Interest", Interest()))[:: 1 if number % 2 else -1]:
                client.flushall()
                before = used_memory(client)
                costs[name].append(await handle_all(server, "bench", retention, count))
                memory[name].append(used_memory(client) - before)
        for name, values in memory.items():
            print(f"memory, {name}: {statistics.median(values) / 1e6:.3f} MB after {count} handled messages", end="")
            print(f" ({statistics.median(values) / count:.1f} bytes for each)")
        for index, process in enumerate(("this process", "the server")):
            plain, kept = (statistics.median(cost[index] for cost in costs[name]) for name in costs)
            pairs = zip(costs["undeclared"], costs["Interest"], strict=True)
            ratios = [b[index] / a[index] for a, b in pairs if a[index]]  # the server's clock ticks every 10 ms
            ratio = statistics.median(ratios) if ratios else math.nan
            print(f"per message, {process}: {plain:.2f} us undeclared, {kept:.2f} us with Interest, ratio {ratio:.3f}")


async def longest(server: Server, retention: Retention, *, groups: int, size: int, count: int, acked: bool) -> None:
    with client_of(server) as client:
        client.flushall()
        async with RedisBackend(f"redis://127.0.0.1:{server.port}") as backend:
            for number in range(groups):
                await backend.create_group("bench", f"g{number}", "0")
            body = b"x" * size
            for _ in range(count // 10):
                pipeline: Any = client.pipeline(transaction=False)
                for _ in range(10):
                    pipeline.xadd("bench", {"message": body})
                pipeline.execute()
            for number in range(groups):
                for _ in range(count // 1000 if size < 100_000 else 0):
                    ids = [
                        entry.id for entry in await backend.read_new("bench", f"g{number}", "c", count=1000, timeout=0)
                    ]
                    if acked:
                        await backend.ack_many("bench", f"g{number}", ids)
            await backend.declare_retention("bench", retention, "declare")
            client.config_set("slowlog-log-slower-than", 0)
            client.config_set("slowlog-max-len", 100_000)
            steps, removed, more = 0, 0, True
            while more:
                [step] = await backend.trim(["bench"], trimmer="bench")
                assert isinstance(step, anybus.abc.Trimmed)
                steps, removed, more = steps + 1, removed + step.removed, step.more
            times = [one["duration"] for one in client.slowlog_get(100_000) if one["command"].startswith(b"EVALSHA")]
        state = "acknowledged" if acked else "all pending" if size < 100_000 else "unread"
        print(
            f"longest step, {retention}, {groups} groups, {size} bytes, {state}: "
            f"{max(times) / 1000:.2f} ms (then {', '.join(f'{one / 1000:.2f}' for one in sorted(times)[-2:-5:-1])}; "
            f"median {statistics.median(times) / 1000:.2f}) of {steps}, "
            f"{removed} of {count} removed"
        )
        client.config_set("slowlog-log-slower-than", -1)
        client.slowlog_reset()


async def quiet(server: Server, count: int, seconds: float) -> None:
    """The commands of so many quiet subscriptions, with and without looking after their topics."""
    with client_of(server) as client:
        client.flushall()
        found: dict[str, float] = {}
        for name in ("without", "with"):
            for topic in range(count):
                client.hset(
                    f"anybus:{{t{topic}}}:retention",
                    mapping={"version": 1, "policy": "interest", "length": "", "age": ""},
                )
            look, pace.LOOK = pace.LOOK, pace.LOOK if name == "with" else 1e6
            bus = StreamBus(RedisBackend(f"redis://127.0.0.1:{server.port}"))
            async with bus, anyio.create_task_group() as tasks:
                for topic in range(count):
                    await tasks.start(partial(bus.consume, SubscriptionConfig(f"t{topic}", "g"), handle))
                await anyio.sleep(10)
                client.config_resetstat()
                began, theirs, own = time.monotonic(), server_seconds(server.pid), time.process_time()
                await anyio.sleep(seconds)
                took = time.monotonic() - began
                theirs, own = server_seconds(server.pid) - theirs, time.process_time() - own
                stats: dict[str, Any] = client.info("commandstats")
                found[name] = stats["cmdstat_evalsha"]["calls"] / took
                print(
                    f"quiet, {count} subscriptions, {name} retention: {found[name]:.2f} scripts/s, "
                    f"{100 * theirs / took:.2f} % of the server, {100 * own / took:.2f} % of this process"
                )
                tasks.cancel_scope.cancel()
            pace.LOOK = look
        print(f"quiet: retention adds {found['with'] - found['without']:.2f} scripts/s")


async def main(arguments: argparse.Namespace) -> None:
    pace.LOOK = arguments.look
    with own_server() as server:
        if "cost" in arguments.parts:
            await memory_and_cost(server, arguments.count, arguments.rounds)
        if "longest" in arguments.parts:
            for groups, size, acked in ((1, 200, True), (10, 200, True), (100, 200, True), (1, 20_000, True)):
                count = arguments.count if size < 1000 else arguments.count // 10
                if groups == 100:
                    count //= 10
                await longest(server, Interest(), groups=groups, size=size, count=count, acked=acked)
            sizes = ((1, 200, False), (10, 200, False), (0, 200, True), (1, 20_000, False))
            for groups, size, acked in (*sizes, (1, 1_000_000, False), (1, 4_000_000, False)):
                count = arguments.count if size < 1000 else min(arguments.count // 10, 10**9 // size)
                limits = Limits(length=max(1, count // 100))
                await longest(server, limits, groups=groups, size=size, count=count, acked=acked)
        if "quiet" in arguments.parts:
            await quiet(server, arguments.subscriptions, arguments.seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["cost", "longest", "quiet"], help="cost, longest, quiet")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--look", type=float, default=5.0, help="how often topics are looked at")
    parser.add_argument("--subscriptions", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0)
    anyio.run(main, parser.parse_args())
