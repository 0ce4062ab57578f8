"""A schedule that four real processes run, some of which are killed and frozen: each tick once, proven from the stream.

- Four processes run a schedule with a tick every 0.2 seconds. Again and again, the one that publishes is killed (kill
  -9) or frozen for longer than its lease, and another one takes its place. Every tick from the first to the last is in
  the stream, exactly once, in order, and nothing else: a takeover is shorter than the ten seconds after which a tick is
  missed. Each entry is a message that a process noted in its file before it was published.
- If all are killed, and some come back after the ten seconds: ``skip`` leaves out what is older than these ten seconds,
  and nothing else; ``catch-up`` publishes one for all of that, the latest.
- In a rolling deployment, old processes and new ones side by side: nothing old follows the first new tick, and a killed
  new one is followed by a new one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from harness import new_topic
from processes import BOUND, CHILDREN, wait_until
from servers import RunningServer

from anybus import JsonCodec, Message

LOOPS = ("asyncio", "uvloop", "trio")


class Child:
    """A process that takes part."""

    def __init__(self, folder: Path, label: str, *arguments: str) -> None:
        self.folder = folder
        self.label = label
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        command = [sys.executable, str(CHILDREN / "ticking.py"), "--folder", str(folder), "--label", label, *arguments]
        with (folder / f"{label}.stderr").open("ab") as errors:
            self.process = subprocess.Popen(command, stderr=errors, env=environment)

    def noted(self, kind: str) -> list[list[str]]:
        try:
            text = (self.folder / f"{self.label}.{kind}").read_text()
        except FileNotFoundError:
            return []
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    def wait_until_ready(self) -> None:
        wait_until(lambda: ["ready"] in self.noted("state") or self.process.poll() is not None, f"{self.label}")
        assert self.process.poll() is None, (self.folder / f"{self.label}.stderr").read_text()

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(BOUND) == 0, (self.folder / f"{self.label}.stderr").read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(BOUND)


class Stage:
    """The processes of one test, and what is in their stream."""

    def __init__(self, server: RunningServer, folder: Path, loop: str) -> None:
        self.topic = new_topic()
        self.folder = folder
        self.children: list[Child] = []
        self.client: Any = server.client()
        self._arguments = ("--url", server.url, "--topic", self.topic, "--loop", loop)

    def start(self, *arguments: str) -> Child:
        child = Child(self.folder, f"process-{len(self.children)}", *self._arguments, *arguments)
        self.children.append(child)
        return child

    def entries(self) -> list[Message]:
        return [JsonCodec().decode(fields[b"message"]) for _, fields in self.client.xrange(self.topic)]

    def count(self) -> int:
        return int(self.client.xlen(self.topic))

    def last_publisher(self) -> Child:
        [(_, fields)] = self.client.xrevrange(self.topic, count=1)
        label = JsonCodec().decode(fields[b"message"]).payload.decode()
        return next(child for child in self.children if child.label == label)

    def wait_for(self, more: int) -> None:
        wanted = self.count() + more
        wait_until(lambda: self.count() >= wanted, f"{more} more ticks", every=0.05)

    def check_uids(self, messages: list[Message]) -> None:
        """Each entry was made by the process that it names, for the tick that it names."""
        made = {(child.label, uid): tick for child in self.children for tick, uid in child.noted("made")}
        for message in messages:
            tick = datetime.fromisoformat(made[message.payload.decode(), message.uid])
            assert tick == tick_of(message)
        assert len({message.uid for message in messages}) == len(messages)


@pytest.fixture(params=LOOPS)
def stage(request: pytest.FixtureRequest, server: RunningServer, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(server, tmp_path, request.param)
    try:
        yield stage
    finally:
        for child in stage.children:
            child.kill()
        stage.client.close()


def tick_of(message: Message) -> datetime:
    return datetime.fromisoformat(message.headers["schedule-tick"].replace("Z", "+00:00"))


def steps(messages: list[Message], every: float) -> list[int]:
    """How many intervals lie between each tick and the next one: 1 = none is missing, 0 = one came twice."""
    ticks = [tick_of(message) for message in messages]
    return [round((later - earlier) / timedelta(seconds=every)) for earlier, later in pairwise(ticks)]


@pytest.mark.thorough
def test_each_tick_is_published_once_whatever_happens_to_the_processes(stage: Stage) -> None:
    running = [stage.start("--every", "0.2") for _ in range(4)]
    for child in running:
        child.wait_until_ready()
    frozen: list[Child] = []
    for turn in range(6):
        stage.wait_for(5)
        victim = stage.last_publisher()
        if turn in (1, 3):
            victim.process.send_signal(signal.SIGSTOP)
            frozen.append(victim)
        else:
            victim.kill()
            running.append(stage.start("--every", "0.2"))
        running.remove(victim)
        stage.wait_for(25)
        assert stage.last_publisher() is not victim
        if turn in (1, 3):
            victim.process.send_signal(signal.SIGCONT)
            running.append(victim)
    stage.wait_for(max(200 - stage.count(), 20))
    for child in running:
        child.end()
    messages = stage.entries()
    assert len(messages) >= 200
    assert set(steps(messages, 0.2)) == {1}
    stage.check_uids(messages)
    publishers = {message.payload for message in messages}
    assert len(publishers) >= 4
    assert all(child.noted("made") for child in frozen)


@pytest.mark.thorough
@pytest.mark.parametrize("missed", ["skip", "catch-up"])
def test_after_a_time_in_which_no_process_ran(stage: Stage, missed: str) -> None:
    options = ("--every", "0.5", "--missed", missed)
    first = [stage.start(*options) for _ in range(4)]
    for child in first:
        child.wait_until_ready()
    stage.wait_for(10)
    for child in first:
        child.kill()
    before = stage.count()
    time.sleep(14)  # longer than the ten seconds: what is tested
    second = [stage.start(*options) for _ in range(4)]
    stage.wait_for(40)
    for child in second:
        child.wait_until_ready()
        child.end()
    messages = stage.entries()
    found = steps(messages, 0.5)
    gap, *others = [step for step in found if step != 1]
    assert others == []
    assert found.index(gap) == before - 1
    assert 7 <= gap < 200, "3.5 seconds at least"
    if missed == "catch-up":
        # The latest of the missed ones was late by more than ten seconds; those after it are not missed.
        caught_up, appended = messages[before], stage.client.xrange(stage.topic)[before][0]
        late = int(appended.split(b"-")[0]) / 1000 - tick_of(caught_up).timestamp()
        assert 10 <= late < 10.5 + 0.2
    stage.check_uids(messages)


@pytest.mark.thorough
def test_a_rolling_deployment(stage: Stage) -> None:
    old = [stage.start("--every", "0.2", "--version", "1") for _ in range(4)]
    for child in old:
        child.wait_until_ready()
    stage.wait_for(10)
    new: list[Child] = []
    for child in old:
        new.append(stage.start("--every", "0.2", "--version", "2"))
        new[-1].wait_until_ready()
        stage.wait_for(5)
        assert stage.last_publisher() in new
        if child is old[0]:
            wait_until(lambda: all(["superseded"] in child.noted("state") for child in old), "the old ones to be told")
        child.end()
    victim = stage.last_publisher()
    victim.kill()
    stage.wait_for(35)
    messages = stage.entries()
    labels = [message.payload.decode() for message in messages]
    first_new = next(index for index, label in enumerate(labels) if label in {child.label for child in new})
    assert not {child.label for child in old} & set(labels[first_new:])
    assert set(steps(messages, 0.2)) == {1}
    stage.check_uids(messages)
