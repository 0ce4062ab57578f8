"""All of time and identity at once, in four processes that are killed, on a server that is killed.

The specification: four processes, on different event loops, publish the same messages with idempotency keys, at once
or delayed. They handle them with ``guarantee="exactly-once"``: in one group with a row in a database, in another one
with a message that is published with the acknowledgement. The topic has the retention ``Interest``. Processes are
killed (kill -9) at random moments and started again, and so is the server, which keeps everything on its disk. In the
end:

- each key has exactly one row and exactly one moved message, so that nothing was trimmed before both groups had
  acknowledged it,
- everybody who was told an id for a key was told the same one,
- nothing is pending or waits, and the topic is empty.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from conftest import SERVER
from harness import new_topic
from processes import BOUND, CHILDREN, wait_until
from servers import RunningServer

from anybus import JsonCodec, retry_stream
from anybus.backends.redis._keys import delayed
from anybus.idempotency import SqlStore

LOOPS = ("asyncio", "uvloop", "trio", "asyncio")
GROUPS = ("shop", "movers")


class Process:
    """One of the four. It is started again with the same number."""

    def __init__(self, folder: Path, number: int, *arguments: str) -> None:
        self._folder = folder
        self._number = number
        self._arguments = ("--loop", LOOPS[number], "--folder", str(folder), "--number", str(number), *arguments)
        self._starts = 0
        self.start()

    def start(self) -> None:
        self._starts += 1
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        command = [sys.executable, str(CHILDREN / "combining.py"), *self._arguments, "--seed", str(self._starts)]
        with (self._folder / f"{self._number}.stderr").open("ab") as errors:
            self.process = subprocess.Popen(command, stderr=errors, env=environment)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(BOUND)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(BOUND)

    def lines(self, kind: str) -> list[list[str]]:
        """The lines of one of its files. (One that is being written is not a line yet.)"""
        path = self._folder / f"{self._number}.{kind}"
        text = path.read_text() if path.exists() else ""
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    @property
    def has_published(self) -> bool:
        return self.lines("state")[-1:] == [["published"]]


class Site:
    """The topic on the server, and the database."""

    def __init__(self, server: RunningServer, folder: Path) -> None:
        self.topic = new_topic()
        self._server = server
        self._database = folder / "shop.sqlite"
        with sqlite3.connect(self._database) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("CREATE TABLE effects (key TEXT)")
            SqlStore.create_table(connection)

    def rows(self) -> list[str]:
        with sqlite3.connect(self._database, timeout=30) as connection:
            return [row[0] for row in connection.execute("SELECT key FROM effects")]

    def moved(self) -> list[str]:
        with self._server.client() as client:
            entries: Any = client.xrange(f"{self.topic}.moved")
        return [str(JsonCodec().decode(fields[b"message"]).key) for _, fields in entries]

    def dead(self) -> int:
        with self._server.client() as client:
            return int(client.exists(f"{self.topic}.dead"))

    def left(self) -> dict[str, int]:
        """What is not done yet."""
        with self._server.client() as client:
            untyped: Any = client
            left = {"topic": untyped.xlen(self.topic), "delayed": untyped.zcard(delayed(self.topic))}
            for group in GROUPS:
                retries = retry_stream(self.topic, group)
                left[f"pending in {group}"] = untyped.xpending(self.topic, group)["pending"]
                left[f"retries of {group}"] = untyped.xlen(retries) + untyped.zcard(delayed(retries))
        return {what: count for what, count in left.items() if count}


@pytest.mark.thorough
@pytest.mark.parametrize(("keys", "kills"), [(2_000, 20)])
def test_everything_at_once_is_exactly_once(keys: int, kills: int, tmp_path: Path) -> None:
    chance = random.Random(14)
    with RunningServer(SERVER, "--appendonly", "yes", "--appendfsync", "always") as own:
        site = Site(own, tmp_path)
        arguments = ("--url", own.url, "--topic", site.topic, "--keys", str(keys), "--pause", "0.005")
        processes = [Process(tmp_path, number, *arguments) for number in range(4)]

        def progress() -> int:
            return sum(len(process.lines("published")) for process in processes) + len(site.rows())

        try:
            # The last ones are killed while there is nothing left but to handle.
            moments = sorted(chance.sample(range(keys // 20, 3 * keys - keys // 10), kills))
            for number, moment in enumerate(moments):
                wait_until(lambda: progress() >= moment, "progress", growing=progress, every=0.02)  # noqa: B023
                victim = chance.choice(processes)
                victim.kill()
                if number == kills // 2:
                    own.kill()
                    own.start()
                victim.start()
            wait_until(
                lambda: all(process.has_published for process in processes),
                "all to be published",
                every=0.05,
                growing=progress,
            )
            wait_until(lambda: len(site.rows()) >= keys, "all rows", every=0.05, growing=progress)
            wait_until(lambda: len(site.moved()) >= keys, "all moves", every=0.2, growing=lambda: len(site.moved()))
            wait_until(
                lambda: not site.left(), "an empty topic", every=0.05, growing=lambda: -sum(site.left().values())
            )
            assert [process.end() for process in processes] == [0] * 4
        finally:
            for process in processes:
                process.kill()
        rows, moved = Counter(site.rows()), Counter(site.moved())
        assert not site.left()
        assert not site.dead()
    expected = {f"key-{number}" for number in range(keys)}
    assert rows.keys() == moved.keys() == expected
    assert {key: times for key, times in rows.items() if times > 1} == {}
    assert {key: times for key, times in moved.items() if times > 1} == {}
    assert [process.lines("lost") for process in processes] == [[]] * 4
    told: defaultdict[str, set[str]] = defaultdict(set)
    for process in processes:
        for key, entry_id, _ in process.lines("published"):
            told[key].add(entry_id)
    assert told.keys() == expected
    assert {key: ids for key, ids in told.items() if len(ids) > 1} == {}
    # The kills hit something: handlings were repeated, in both groups.
    begun = Counter(tuple(line) for process in processes for line in process.lines("begun"))
    repeated = {group: sum(begun[group, key] - 1 for key in expected) for group in GROUPS}
    assert repeated["shop"] > 0
    assert repeated["movers"] > sum(key.endswith("7") for key in expected)
    print(f"{keys} keys, {kills} processes killed; handlings repeated: {repeated}")
