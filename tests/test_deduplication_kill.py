"""Four processes publish the same messages with keys, and are killed: each key is in the stream exactly once.

The specification: each key is published by two processes, on different event loops, one by one, in batches, and put
off. Processes are killed (kill -9) at random moments and started again, and so is the server, which keeps everything
on its disk. Whoever does not know whether its message was stored publishes it again. In the end each key is in the
stream once, and everybody who was told an id for a key was told the same one.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import SERVER
from harness import new_topic
from processes import BOUND, CHILDREN, wait_until
from servers import RunningServer

from anybus import JsonCodec, retry_stream
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import delayed

LOOPS = ("asyncio", "uvloop", "trio", "asyncio")


class Process:
    """One of the publishers."""

    def __init__(self, folder: Path, number: int, *arguments: str) -> None:
        self._folder = folder
        self._number = number
        self._arguments = ("--loop", LOOPS[number], "--folder", str(folder), "--number", str(number), *arguments)
        self._starts = 0
        self.start()

    def start(self) -> None:
        self._starts += 1
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        command = [sys.executable, str(CHILDREN / "deduplicating.py"), *self._arguments, "--seed", str(self._starts)]
        with (self._folder / f"{self._number}.stderr").open("ab") as errors:
            self.process = subprocess.Popen(command, stderr=errors, env=environment)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(BOUND)

    def notes(self) -> list[list[str]]:
        """Key, id, and whether it was new. (A line that is being written is not one yet.)"""
        path = self._folder / f"{self._number}.published"
        text = path.read_text() if path.exists() else ""
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    def stderr(self) -> str:
        return (self._folder / f"{self._number}.stderr").read_text()


def noted(processes: list[Process]) -> int:
    return sum(len(process.notes()) for process in processes)


async def append_what_is_due(url: str, topic: str, client: Any) -> None:
    async with RedisBackend(url) as backend:
        retries = retry_stream(topic, "g")
        for stream in (topic, retries):
            await backend.create_group(stream, "g", "$")
        while client.zcard(delayed(topic)):
            await backend.redeliver(topic, retries, "g", "c", min_idle=3600, count=1)


@pytest.mark.parametrize(
    ("keys", "kills", "server_kills"),
    [pytest.param(1_000, 6, 1, id="quick"), pytest.param(20_000, 30, 3, id="many", marks=pytest.mark.thorough)],
)
def test_each_key_is_in_the_stream_once(keys: int, kills: int, server_kills: int, tmp_path: Path) -> None:
    topic, chance = new_topic(), random.Random(14)
    with RunningServer(SERVER, "--appendonly", "yes", "--appendfsync", "always") as own:
        arguments = ("--url", own.url, "--topic", topic, "--keys", str(keys))
        processes = [Process(tmp_path, number, *arguments) for number in range(4)]
        try:
            # Spread over the work: whoever is killed has something to do still.
            moments = sorted(chance.sample(range(keys // 20, 2 * keys - keys // 4), kills))
            of_the_server = set(chance.sample(moments, server_kills))
            killed = 0
            for moment in moments:
                wait_until(lambda: noted(processes) >= moment, "progress", growing=lambda: noted(processes))  # noqa: B023
                victim = chance.choice(processes)
                killed += victim.is_running
                victim.kill()
                if moment in of_the_server:
                    own.kill()
                    own.start()
                victim.start()
            wait_until(
                lambda: not any(process.is_running for process in processes),
                "all to be published",
                every=0.05,
                growing=lambda: noted(processes),
            )
            assert [process.process.returncode for process in processes] == [0] * 4, processes[0].stderr()
            assert killed >= kills // 2
        finally:
            for process in processes:
                process.kill()
        with own.client() as client:
            anyio.run(append_what_is_due, own.url, topic, client)
            untyped: Any = client
            stored = {
                entry_id.decode(): JsonCodec().decode(fields[b"message"]).idempotency_key
                for entry_id, fields in untyped.xrange(topic)
            }
    expected = {f"key-{number}" for number in range(keys)}
    counts = Counter(stored.values())
    assert {key: count for key, count in counts.items() if count > 1} == {}
    assert counts.keys() == expected
    told: defaultdict[str, set[str]] = defaultdict(set)
    new: Counter[str] = Counter()
    for process in processes:
        for key, entry_id, how in process.notes():
            told[key].add(entry_id)
            new[key] += how == "new"
    assert told.keys() == expected
    assert {key: ids for key, ids in told.items() if len(ids) > 1} == {}
    assert max(new.values()) == 1
    assert all(stored.get(entry_id, key) == key for key, (entry_id,) in told.items())
    assert noted(processes) == 2 * keys
    again = 2 * keys - sum(new.values())
    assert again >= keys  # more, by those who had not heard the answer
    print(f"{keys} keys, {killed} processes and {server_kills} servers killed, {again} publishes were told 'again'")
