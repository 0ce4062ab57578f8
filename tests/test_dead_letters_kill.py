"""A replay that is killed (kill -9) in its middle loses nothing and doubles nothing: real processes, on a real server.

The specification, on each event loop, proven from the uids on the server itself, before and after:

- Round after round, two processes replay the same dead letters at once: one to the topic, one to the group that gave
  them up. Both are killed at a random moment in the middle of it. Then each dead letter is in exactly one place: among
  the dead letters, in the topic, or in the group's retry stream. So it is after 24 processes (72 in all; after 4 in a
  short run).
- One more process takes what is left, and is not killed: no dead letter remains, none came twice.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from harness import new_topic
from processes import BOUND, CHILDREN, wait_until
from servers import RunningServer
from sweeps import sampled

from anybus import JsonCodec, Message, retry_stream
from anybus._failure.copies import Origin, dead_letter

LETTERS = 3000
"""More in every round."""


@pytest.fixture(params=["asyncio", "uvloop", "trio"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Stage:
    """Dead letters on a server, and the processes that replay them."""

    def __init__(self, server: RunningServer, folder: Path, loop: str) -> None:
        self.topic = new_topic()
        self.retries = retry_stream(self.topic, "billing")
        self.server = server
        self.client: Any = server.client()
        self._folder = folder
        self._loop = loop
        self._processes: list[subprocess.Popen[bytes]] = []
        # The group has subscribed once.
        self.client.xgroup_create(self.retries, "billing", "0", mkstream=True)

    def bury(self, count: int) -> set[str]:
        """So many dead letters of the group; their uids."""
        codec, at = JsonCodec(), datetime.now(timezone.utc)
        uids: set[str] = set()
        pipeline = self.client.pipeline(transaction=False)
        for number in range(count):
            message = Message(self.topic, b"x" * 200)
            uids.add(message.uid)
            origin = Origin(self.topic, f"{number + 1}-0", "billing", "billing-1", attempts=4, deliveries=1)
            letter = dead_letter(
                message, f"{self.topic}.dead", origin, code="retries", reason="no", error_type="ValueError", at=at
            )
            pipeline.xadd(f"{self.topic}.dead", {"message": codec.encode(letter)})
        pipeline.execute()
        return uids

    def count_back(self) -> int:
        return int(self.client.xlen(self.topic)) + int(self.client.xlen(self.retries))

    def where(self) -> tuple[Counter[str], Counter[str]]:
        """The uids among the dead letters, and those that went back, as the server has them."""
        codec = JsonCodec()
        # In one step, so that nothing moves in between.
        streams = (f"{self.topic}.dead", self.topic, self.retries)
        pipeline = self.client.pipeline(transaction=True)
        for stream in streams:
            pipeline.xrange(stream)
        dead, *back = [
            Counter(codec.decode(fields[b"message"]).uid for _, fields in entries) for entries in pipeline.execute()
        ]
        return dead, back[0] + back[1]

    def start(self, label: str, to: str, *options: str) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        command = [sys.executable, str(CHILDREN / "replayer.py"), "--folder", str(self._folder), "--label", label]
        command += ["--loop", self._loop, "--url", self.server.url, "--topic", self.topic, "--to", to, *options]
        with (self._folder / "stderr").open("ab") as errors:
            process = subprocess.Popen(command, stderr=errors, env=environment)
        self._processes.append(process)
        return process

    def state(self, label: str) -> list[str]:
        try:
            return (self._folder / f"{label}.state").read_text().splitlines()
        except FileNotFoundError:
            return []

    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()

    def end(self) -> None:
        self.client.close()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def stage(server: RunningServer, tmp_path: Path, loop: str) -> Iterator[Stage]:
    made = Stage(server, tmp_path, loop)
    try:
        yield made
    finally:
        made.end()


@pytest.mark.timeout(900)  # a machine with little to spare has 25 processes to start
@sampled("rounds", 2, 12)
def test_killed_at_random_moments_replays_lose_and_double_nothing(rounds: int, stage: Stage) -> None:
    everything: Counter[str] = Counter()
    at_work = interrupted = number = 0
    # A round in which the kill came too late (this process was kept waiting) does not count.
    while at_work <= rounds or interrupted < rounds:
        number += 1
        assert number <= 5 * rounds, "the kills come too late"
        everything += Counter(stage.bury(LETTERS))
        labels = [f"{number}-topic", f"{number}-group"]
        before = stage.count_back()
        pair = [stage.start(label, label.partition("-")[2]) for label in labels]
        # Told by what has gone back, so that it is the middle at whatever speed.
        goal = before + random.randrange(1, LETTERS // 2)
        wait_until(lambda goal=goal: stage.count_back() >= goal, "them to be in the middle of it", every=0.001)  # type: ignore[misc]
        for process in random.sample(pair, 2):
            process.send_signal(signal.SIGKILL)
        for process in pair:
            process.wait()
        dead, back = stage.where()
        assert dead + back == everything
        assert sum(back.values()) >= goal
        at_work += sum(stage.state(label) == ["connected"] for label in labels)
        interrupted += bool(dead)

    dead, _ = stage.where()
    last = stage.start("last", "topic")
    assert last.wait(BOUND) == 0, stage.stderr()
    assert stage.state("last") == ["connected", f"done {sum(dead.values())} 0 0"]
    dead, back = stage.where()
    assert not dead
    assert back == everything
