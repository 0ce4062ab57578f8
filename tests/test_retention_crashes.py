"""Retention while processes are killed (kill -9): a fast, a slow and a dead group, real processes, a real server.

The specification, on each event loop, proven from uids in files and from the server:

- ``Interest``: nothing is removed that a group has not acknowledged, whoever is killed while it handles or trims. The
  dead group, which had handled a part and held some, handles all the rest when it is started again. Then the topic is
  empty.
- ``WorkQueue``: the same for one group of several processes.
- ``Limits``: what a group has never handled was counted as its loss: for a group that is dead exactly.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from harness import new_topic
from processes import CHILDREN, wait_until
from servers import RunningServer
from sweeps import first_of, sampled

from anybus import Interest, JsonCodec, Limits, Message, Retention, WorkQueue
from anybus.backends.redis import RedisBackend
from anybus.backends.redis._keys import retention as retention_key


@pytest.fixture(params=first_of(["asyncio", "uvloop", "trio"]))
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Stage:
    """A topic, and the processes that handle it."""

    def __init__(self, server: RunningServer, folder: Path, loop: str) -> None:
        self.topic = new_topic()
        self.client: Any = server.client()
        self.published: list[str] = []
        self._server = server
        self._folder = folder
        self._loop = loop
        self._number = 0
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._codec = JsonCodec()

    def declare(self, retention: Retention) -> None:
        async def declare() -> None:
            async with RedisBackend(self._server.url) as backend:
                assert await backend.declare_retention(self.topic, retention, "declare") == retention

        anyio.run(declare)

    def publish(self, count: int) -> None:
        pipeline = self.client.pipeline(transaction=False)
        for _ in range(count):
            message = Message(self.topic, b"x" * 100)
            self.published.append(message.uid)
            pipeline.xadd(self.topic, {"message": self._codec.encode(message)})
        pipeline.execute()

    def start(self, group: str, *options: str) -> str:
        self._number += 1
        label = f"{group}-{self._number}"
        command = [sys.executable, str(CHILDREN / "retaining.py"), "--folder", str(self._folder), "--label", label]
        command += ["--loop", self._loop, "--url", self._server.url, "--topic", self.topic, "--group", group, *options]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        with (self._folder / "stderr").open("ab") as errors:
            self.running[label] = subprocess.Popen(command, stderr=errors, env=environment)
        return label

    def wait_ready(self, *labels: str) -> None:
        wait_until(lambda: all(self.lines(label, "state") for label in labels), "the processes to be ready")

    def kill(self, label: str) -> None:
        process = self.running.pop(label)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def kill_one_of(self, *groups: str) -> str:
        """Kill any process of these groups; its group."""
        label = random.choice([label for label in self.running if label.rpartition("-")[0] in groups])
        self.kill(label)
        return label.rpartition("-")[0]

    def lines(self, label: str, what: str) -> list[str]:
        try:
            return (self._folder / f"{label}.{what}").read_text().splitlines()
        except FileNotFoundError:
            return []

    def all_lines(self, group: str, what: str) -> list[str]:
        return [line for path in self._folder.glob(f"{group}-*.{what}") for line in path.read_text().splitlines()]

    def count_handled(self, *groups: str) -> int:
        return sum(len(self.all_lines(group, "handled")) for group in groups)

    def has_handled(self, goal: int, *groups: str) -> bool:
        return self.count_handled(*groups) >= goal

    def has_handled_all(self, group: str) -> bool:
        return self.handled(group) == set(self.published)

    def handled(self, group: str) -> set[str]:
        return set(self.all_lines(group, "handled"))

    def length(self) -> int:
        return int(self.client.xlen(self.topic))

    def lost(self, group: str) -> int:
        return int(self.client.hget(retention_key(self.topic), f"lost:{group}") or 0)

    def end(self) -> None:
        self.client.close()
        for process in self.running.values():
            process.kill()
            process.wait()


@pytest.fixture
def stage(server: RunningServer, tmp_path: Path, loop: str) -> Iterator[Stage]:
    made = Stage(server, tmp_path, loop)
    try:
        yield made
    finally:
        made.end()


def grows(stage: Stage) -> Any:
    """What the processes still do."""
    return lambda: len(stage.all_lines("*", "handled"))


def make_a_dead_group(stage: Stage) -> int:
    """A group whose only process handles 40 and is killed while it holds more. Returns how many it has not handled."""
    dead = stage.start("dead", "--stop-after", "40")
    stage.wait_ready(dead)
    stage.publish(100)

    def holds() -> bool:
        groups = {group["name"]: group for group in stage.client.xinfo_groups(stage.topic)}
        group = groups[b"dead"]
        taken = len(stage.client.xrange(stage.topic, "-", group["last-delivered-id"]))
        return len(stage.lines(dead, "handled")) == 40 and group["pending"] == taken - 40 >= 8

    wait_until(holds, "the group to hold what it does not handle")
    stage.kill(dead)
    return len(stage.published) - 40


def run_with_kills(stage: Stage, rounds: int, options: Mapping[str, tuple[str, ...]], count: int) -> None:
    """Publish in parts. In each round, a process is killed and another one started."""
    for _ in range(rounds):
        for _ in range(5):
            goal = stage.count_handled(*options) + random.randrange(1, 50)  # fewer than are published now
            stage.publish(count // 5)
            wait_until(partial(stage.has_handled, goal, *options), "somebody to handle something")
        group = stage.kill_one_of(*options)
        stage.wait_ready(stage.start(group, *options[group]))


@pytest.mark.timeout(900)
@sampled("rounds", 2, 12)
def test_interest_keeps_all_that_a_group_needs_whoever_is_killed(rounds: int, stage: Stage) -> None:
    stage.declare(Interest())
    options = {"fast": (), "slow": ("--work", "0.02")}
    for group in options:
        stage.client.xgroup_create(stage.topic, group, "0", mkstream=True)
    needed = make_a_dead_group(stage)
    stage.wait_ready(*[stage.start(group, *more) for group, more in options.items() for _ in "12"])
    run_with_kills(stage, rounds, options, 500)
    everything = set(stage.published)
    for group in options:
        wait_until(partial(stage.has_handled_all, group), f"{group} to handle all", growing=grows(stage))
    # The dead group alone keeps what is there: all that it has not handled, and nothing else.
    needed += len(stage.published) - 100
    wait_until(lambda: stage.length() == needed, "the rest to be removed")
    stage.start("dead")
    wait_until(lambda: stage.handled("dead") == everything, "the dead group to handle the rest", growing=grows(stage))
    wait_until(lambda: stage.length() == 0, "the topic to be empty")
    assert stage.all_lines("*", "missing") == []
    assert stage.all_lines("*", "lost") == []


@pytest.mark.timeout(900)
@sampled("rounds", 1, 12)
def test_a_work_queue_loses_nothing_whoever_is_killed(rounds: int, stage: Stage) -> None:
    stage.declare(WorkQueue())
    options = {"only": ("--work", "0.005")}
    stage.client.xgroup_create(stage.topic, "only", "0", mkstream=True)
    stage.wait_ready(*[stage.start("only", *options["only"]) for _ in "123"])
    run_with_kills(stage, rounds, options, 500)
    wait_until(lambda: stage.handled("only") == set(stage.published), "all to be handled", growing=grows(stage))
    wait_until(lambda: stage.length() == 0, "the topic to be empty")
    assert stage.all_lines("*", "missing") == []


@pytest.mark.timeout(900)
@sampled("rounds", 1, 12)
def test_losses_by_limits_are_counted_whoever_is_killed(rounds: int, stage: Stage) -> None:
    kept = 300
    stage.declare(Limits(length=kept))
    options = {"fast": (), "slow": ("--work", "0.05")}
    for group in (*options, "never"):
        stage.client.xgroup_create(stage.topic, group, "0", mkstream=True)
    not_handled = make_a_dead_group(stage)
    stage.wait_ready(*[stage.start(group, *more) for group, more in options.items() for _ in "12"])
    run_with_kills(stage, rounds, options, 1000)
    total = len(stage.published)
    wait_until(lambda: stage.length() == kept, "the topic to have its length")
    assert stage.lost("never") == total - kept
    assert stage.lost("dead") == not_handled + (total - 100) - kept
    left = {
        stage_uid
        for _, fields in stage.client.xrange(stage.topic)
        for stage_uid in (JsonCodec().decode(fields[b"message"]).uid,)
    }
    assert left == set(stage.published[-kept:])
    for group in options:
        never_handled = set(stage.published) - left - stage.handled(group)
        # What a handler held when it was removed, and then handled, counts as well.
        held = 16 * (2 + rounds)
        assert len(never_handled) <= stage.lost(group) <= len(never_handled) + held * 5 * rounds
    # A process that is killed between the step and its report tells nobody. All others have told of every loss.
    told = [line.split() for line in stage.all_lines("*", "lost")]
    assert 0 < sum(int(count) for group, count in told if group == "never") <= stage.lost("never")
