"""Many subscriptions in one process: what they cost while nothing happens, and how fast a message is handled.

Each subscription has a topic of its own, on a server started for the run. Measured are, for each event loop:

entered      seconds until all subscriptions have been entered, at the same time
connections  of the process to the server
client       CPU time of the process while nothing happens, in percent of a core
server       the same of the server
calls        server calls a second, those inside scripts included
commands     commands a second that the process sends
quiet        from publish to handled, one message at a time to random topics: p50 and p99 in ms
beside       the same while another process floods one more topic of the same bus
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import redis
from _figures import LOOPS
from _record import server_version
from _server import Server, own_server
from anyio import to_thread

from anybus import Delivery, Message, StreamBus, SubscriptionConfig
from anybus.backends.redis import RedisBackend

BUSY = "busy"
TARGETS = {
    "entered": 3.0,
    "connections": 20,
    "client": 5.0,
    "server": 5.0,
    "calls": 2500,
    "quiet p50": 2.0,
    "beside p99": 20.0,
}
"""For 1,000 subscriptions of one group."""

FLOOD = """
import sys
import anyio
import anybus

async def flood():
    async with anybus.connect(sys.argv[1]) as bus:
        messages = [anybus.Message(sys.argv[2], b"x" * 300) for _ in range(200)]
        while True:
            await bus.publish_batch(messages)

anyio.run(flood)
"""


class Latency:
    """Publishes one message at a time, and waits until it is handled."""

    def __init__(self, bus: StreamBus, topics: list[str]) -> None:
        self._bus = bus
        self._topics = topics
        self._handled = anyio.Event()
        self._at = 0.0
        self.flooded = 0

    async def handle(self, delivery: Delivery) -> None:
        if delivery.message.topic == BUSY:
            self.flooded += 1
        else:
            self._at = time.perf_counter()
            self._handled.set()

    async def measure(self, times: int) -> tuple[float, float]:
        """The median, and the 99th percentile, in milliseconds."""
        found: list[float] = []
        for _ in range(times):
            self._handled = anyio.Event()
            began = time.perf_counter()
            await self._bus.publish(Message(random.choice(self._topics), b"x" * 300))
            await self._handled.wait()
            found.append(1000 * (self._at - began))
            await anyio.sleep(0.005)
        found.sort()
        return found[len(found) // 2], found[len(found) * 99 // 100]


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Counts:
    """What the server has counted so far."""

    def __init__(self, client: Any) -> None:
        info = client.info("cpu")
        calls = {name: values["calls"] for name, values in client.info("commandstats").items()}
        self.cpu = info["used_cpu_user"] + info["used_cpu_sys"]
        self.calls = sum(calls.values())
        self.at = time.perf_counter()


def commands_a_second(port: int, seconds: float) -> float:
    """What clients send. In the lines of MONITOR, `lua` marks the commands that a script runs."""
    count = 0
    with socket.create_connection(("127.0.0.1", port)) as monitor:
        monitor.settimeout(0.1)
        monitor.sendall(b"MONITOR\r\n")
        ends = time.perf_counter() + seconds
        while time.perf_counter() < ends:
            with suppress(TimeoutError):
                lines = monitor.recv(1 << 20).splitlines()
                count += sum(line.startswith(b"+") and b" lua]" not in line for line in lines)
    return (count - 1) / seconds  # the first line is the answer


async def measure(server: Server, subscriptions: int, groups: int, seconds: float) -> dict[str, float]:
    url = f"redis://127.0.0.1:{server.port}"
    client: Any = redis.Redis(port=server.port)
    await to_thread.run_sync(client.flushall)
    topics = [f"topic.{number}" for number in range(subscriptions)]
    figures: dict[str, float] = {}
    async with StreamBus(RedisBackend(url)) as bus, anyio.create_task_group() as tasks:
        latency = Latency(bus, topics)

        async def enter(topic: str, group: str) -> None:
            await tasks.start(bus.consume, SubscriptionConfig(topic, group, max_in_flight=256), latency.handle)

        began = time.perf_counter()
        async with anyio.create_task_group() as entering:
            for number, topic in enumerate(topics):
                entering.start_soon(enter, topic, f"group.{number % groups}")
        figures["entered"] = time.perf_counter() - began
        await enter(BUSY, "group.0")
        await anyio.sleep(12)  # twice the time after which the bus knows that a group is quiet
        clients: Any = await to_thread.run_sync(client.client_list)
        figures["connections"] = len(clients) - 1
        before, used = await to_thread.run_sync(Counts, client), cpu()
        await anyio.sleep(seconds)
        idle, after = cpu() - used, await to_thread.run_sync(Counts, client)
        took = after.at - before.at
        figures["client"] = 100 * idle / took
        figures["server"] = 100 * (after.cpu - before.cpu) / took
        figures["calls"] = (after.calls - before.calls) / took
        figures["commands"] = await to_thread.run_sync(commands_a_second, server.port, seconds)
        figures["quiet p50"], figures["quiet p99"] = await latency.measure(500)
        async with await anyio.open_process([sys.executable, "-c", FLOOD, url, BUSY]) as flood:
            while latency.flooded < 1000:
                await anyio.sleep(0.05)
            figures["beside p50"], figures["beside p99"] = await latency.measure(500)
            flood.kill()
        tasks.cancel_scope.cancel()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subscriptions", type=int, default=1000)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="for how long the idle process is measured")
    parser.add_argument("--loop", choices=[*LOOPS], action="append", help="default: all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with own_server() as server:
        print(f"{arguments.subscriptions} subscriptions, {arguments.groups} group(s), {server_version(server.port)}")
        for loop in arguments.loop or LOOPS:
            asked = (server, arguments.subscriptions, arguments.groups, arguments.seconds)
            results[loop] = anyio.run(measure, *asked, **LOOPS[loop])
            print(loop)
            for name, value in results[loop].items():
                target = TARGETS.get(name) if (arguments.subscriptions, arguments.groups) == (1000, 1) else None
                print(f"  {name:<12} {value:>10.3f}" + (f"   (at most {target:g})" if target else ""))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
