"""Exactly-once effects with real processes that are killed (``kill -9``), proven from the uids they wrote to files.

The specification, on a real server:

- Four processes move messages to another topic (``children/mover.py``): the copy is published with the acknowledgement,
  and the completion of the key is part of the same step. One in ten messages is published twice. Processes are killed
  again and again, and others take their place. In the end every key has been moved, and none twice.
- Four processes write a row for each message, in the transaction of the completion (``children/shopkeeper.py``). Workers
  are killed between the commit and the acknowledgement, others before the commit. No row is missing, none is doubled.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import new_topic
from processes import CHILDREN, wait_until
from servers import RunningServer

from anybus import JsonCodec, Message, retry_stream
from anybus.backends.redis._keys import delayed
from anybus.idempotency import SqlStore

LOOPS = ("asyncio", "uvloop", "trio", "asyncio")


class Site:
    """Processes at work on a topic. They use all loops."""

    def __init__(self, server: RunningServer, folder: Path, child: str) -> None:
        self.topic = new_topic()
        self.client = server.client()
        self._url = server.url
        self._folder = folder
        self._child = child
        self._started = 0
        self.running: list[subprocess.Popen[bytes]] = []

    def publish(self, messages: list[Message]) -> None:
        codec = JsonCodec()
        pipeline = self.client.pipeline(transaction=False)
        for message in messages:
            pipeline.xadd(self.topic, {"message": codec.encode(message)})
        pipeline.execute()

    def start(self) -> str:
        label, loop = f"p{self._started}", LOOPS[self._started % len(LOOPS)]
        self._started += 1
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        command = [sys.executable, str(CHILDREN / self._child), loop, self._url, self.topic, str(self._folder), label]
        with (self._folder / f"{label}.stderr").open("wb") as errors:
            self.running.append(subprocess.Popen(command, stderr=errors, env=environment))
        return label

    def kill_one(self) -> None:
        process = self.running.pop(random.randrange(len(self.running)))
        process.send_signal(signal.SIGKILL)
        process.wait()

    def uids(self, kind: str) -> list[str]:
        texts = [path.read_text() for path in self._folder.glob(f"*.{kind}")]
        return [uid for text in texts for uid in text[: text.rfind("\n") + 1].split()]

    def open_work(self, group: str) -> int:
        """How many entries are not acknowledged, retries included. (What a retry stream holds is deleted then.)"""
        retries = retry_stream(self.topic, group)
        pending = self.client.xpending(self.topic, group)["pending"]
        return int(pending + self.client.xlen(retries) + self.client.zcard(delayed(retries)))

    def end(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()


@pytest.fixture
def site(server: RunningServer, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    made = Site(server, tmp_path, request.param)
    try:
        yield made
    finally:
        made.end()


@pytest.mark.parametrize("site", ["mover.py"], indirect=True)
@pytest.mark.parametrize(("count", "kills"), [(600, 4), pytest.param(20_000, 40, marks=pytest.mark.thorough)])
def test_messages_are_moved_exactly_once(site: Site, count: int, kills: int) -> None:
    for _ in range(4):
        site.start()
    keys = [f"key {number}" for number in range(count)]
    moved = f"{site.topic}.moved"
    part = count // kills
    for start in range(0, count, part):
        some = keys[start : start + part]
        messages = [Message(site.topic, key=key, idempotency_key=key) for key in (*some, *some[::10])]
        random.shuffle(messages)
        site.publish(messages)
        wait_until(lambda goal=start + part // 2: site.client.xlen(moved) >= goal, "half of a part", every=0.002)  # type: ignore[misc]
        site.kill_one()
        site.start()
    wait_until(lambda: site.client.xlen(moved) >= count, "all messages", growing=lambda: site.client.xlen(moved))
    wait_until(lambda: site.open_work("movers") == 0, "the acknowledgements")
    codec = JsonCodec()
    entries: Any = site.client.xrange(moved)
    found = Counter(codec.decode(fields[b"message"]).key for _, fields in entries)
    assert set(found) == set(keys)
    assert [key for key, times in found.items() if times > 1] == []
    handled = Counter(site.uids("begun"))
    assert max(handled.values()) > 1, "nothing was handled again: the kills hit nobody"
    assert len(set(site.uids("moved"))) >= count * 0.8
    assert site.client.xlen(f"{site.topic}.dead") == 0


@pytest.mark.parametrize("site", ["shopkeeper.py"], indirect=True)
@pytest.mark.parametrize(("after", "inside"), [(8, 2), pytest.param(200, 40, marks=pytest.mark.thorough)])
def test_effects_in_a_database_are_exactly_once(site: Site, tmp_path: Path, after: int, inside: int) -> None:
    with sqlite3.connect(tmp_path / "shop.sqlite") as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE effects (uid TEXT)")
        SqlStore.create_table(connection)
    keys = ["after"] * after + ["inside"] * inside + ["peaceful"] * after
    random.shuffle(keys)
    messages = [Message(site.topic, key=key) for key in keys]
    site.publish(messages)
    for _ in range(4):
        site.start()

    def rows() -> list[str]:
        with sqlite3.connect(tmp_path / "shop.sqlite", timeout=30) as connection:
            return [row[0] for row in connection.execute("SELECT uid FROM effects")]

    wait_until(lambda: len(rows()) >= len(messages), "all effects", every=0.1, growing=lambda: len(rows()))
    wait_until(lambda: site.open_work("shop") == 0, "the acknowledgements", every=0.05)
    (tmp_path / "end").touch()
    for process in site.running:
        assert process.wait(30) == 0
    written = Counter(rows())
    assert set(written) == {message.uid for message in messages}
    assert [uid for uid, times in written.items() if times > 1] == []
    # Each of these killed its worker between the commit of its effect and its acknowledgement, once.
    assert sorted(site.uids("after")) == sorted(m.uid for m in messages if m.key == "after")
    assert len(site.uids("inside")) >= inside * 0.8
