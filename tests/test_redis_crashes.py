"""What survives the death of processes: real ones, killed, frozen and interrupted, on a real server.

The specification, on each event loop, proven from the uids that the processes wrote to files (``children/``):

- The server is killed (kill -9) while one process publishes and another consumes, and comes back after two seconds with
  what it had synchronized to its disk (``appendonly yes``, ``appendfsync always``). Every subscription goes on by
  itself. What was acknowledged as published is in the stream, and is handled at least once by every group.
- A consumer is frozen (SIGSTOP) for longer than its lease. Its messages go to another one. When it wakes up, its late
  settlements change nothing: what it held stays with its new owner, who settles it. And it goes on working.
- A consumer is killed. What it held comes to another one when its lease is over, and its name is removed.
- Consumers that know nothing of signals are interrupted (SIGINT) at random moments, again and again. Each ends by
  itself within its cleanup's bounds. At the end one more consumer finds everything that they had left behind: every
  message was handled at least once, nothing is pending, nothing waits for its retry, and nothing was given up on.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import new_topic
from processes import BOUND, CHILDREN, wait_until
from servers import ALL, RunningServer
from sweeps import sampled

from anybus import JsonCodec, retry_stream
from anybus.backends.redis._keys import delayed

LEASE = 3.0
"""Longer than a busy machine keeps a process waiting: what it holds is not to be lost before it is frozen or killed."""

AT_ONCE = 3
"""So many interrupted consumers side by side."""


class Child:
    """A child program at work."""

    def __init__(self, folder: Path, program: str, label: str, *arguments: str) -> None:
        self.folder = folder
        self.label = label
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        command = [sys.executable, str(CHILDREN / program), "--folder", str(folder), *arguments]
        with (folder / f"{label}.stderr").open("ab") as errors:
            self.process = subprocess.Popen(command, stderr=errors, env=environment)

    def lines(self, kind: str) -> list[list[str]]:
        """What it has noted so far. (A line that is being written is not one yet.)"""
        try:
            text = (self.folder / f"{self.label}.{kind}").read_text()
        except FileNotFoundError:
            return []
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    def uids(self, kind: str) -> set[str]:
        return {uid for uid, *_ in self.lines(kind)}

    @property
    def is_connected(self) -> bool:
        return ["connected"] in self.lines("state")

    @property
    def is_listening(self) -> bool:
        """Whether SIGTERM ends it gracefully by now. Before that it would kill it."""
        return ["listens"] in self.lines("state")

    @property
    def consumers(self) -> list[str]:
        """Its names on the server; none until it is ready."""
        return next((words for first, *words in self.lines("state") if first == "ready"), list[str]())

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.consumers or self.process.poll() is not None, f"{self.label} to be ready")
        assert self.process.poll() is None, self.stderr()

    def stderr(self) -> str:
        return (self.folder / f"{self.label}.stderr").read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        """End gracefully."""
        wait_until(lambda: self.is_listening or self.process.poll() is not None, f"{self.label} to listen")
        self.signal(signal.SIGTERM)
        assert self.process.wait(BOUND) == 0, self.stderr()


class Stage:
    """A topic on a server, and the processes that work on it."""

    def __init__(self, server: RunningServer, folder: Path, loop: str) -> None:
        self.server = server
        self.folder = folder
        self.topic = new_topic()
        self._common = ("--loop", loop, "--url", server.url, "--topic", self.topic)
        self._children: list[Child] = []
        self._client: Any = server.client()

    def _start(self, program: str, label: str, *arguments: str) -> Child:
        child = Child(self.folder, program, label, *self._common, *arguments)
        self._children.append(child)
        return child

    def publisher(self, *, pause: float = 0.01, count: int | None = None) -> Child:
        more = () if count is None else ("--count", str(count))
        return self._start("publisher.py", "publisher", "--pause", str(pause), *more)

    def consumer(self, label: str, *options: str, groups: tuple[str, ...] = ("g",)) -> Child:
        named = [word for group in groups for word in ("--group", group)]
        return self._start("consumer.py", label, "--label", label, "--lease", str(LEASE), *named, *options)

    def attempted(self) -> set[str]:
        return self._published("attempted")

    def acknowledged(self) -> set[str]:
        return self._published("acknowledged")

    def _published(self, kind: str) -> set[str]:
        path = self.folder / kind
        return set(path.read_text().split("\n")[:-1]) if path.exists() else set()

    def handled(self, group: str = "g") -> set[str]:
        """By whoever it was, dead or alive."""
        return {uid for child in self._children for uid in child.uids(f"handled.{group}")}

    def wait_until_all_is_handled(self, group: str = "g") -> None:
        """All that was acknowledged; the publisher has ended."""
        wait_until(
            lambda: self.acknowledged() <= self.handled(group),
            f"every message to be handled in group {group!r}",
            every=0.2,
            growing=lambda: len(self.handled(group)),
        )

    def stored(self) -> set[str]:
        """The uids in the topic, as the server has them."""
        codec = JsonCodec()
        return {codec.decode(fields[b"message"]).uid for _, fields in self._client.xrange(self.topic)}

    def pending(self, consumer: str | None = None) -> dict[str, str]:
        """The topic's pending entries and their owners: all, or one consumer's."""
        more = {} if consumer is None else {"consumername": consumer}
        found = self._client.xpending_range(self.topic, "g", "-", "+", ALL, **more)
        return {item["message_id"].decode(): item["consumer"].decode() for item in found}

    def consumers(self) -> set[str]:
        return {item["name"].decode() for item in self._client.xinfo_consumers(self.topic, "g")}

    def is_empty(self, group: str) -> bool:
        """Whether nothing is unread, pending, or waiting for its retry."""
        retries = retry_stream(self.topic, group)
        for stream in (self.topic, retries):
            info = self._client.xinfo_stream(stream)
            [own] = [item for item in self._client.xinfo_groups(stream) if item["name"] == group.encode()]
            if own["pending"] or own["last-delivered-id"] != info["last-generated-id"]:
                return False
        return not self._client.exists(delayed(retries))

    def dead_letters(self) -> int:
        return int(self._client.xlen(f"{self.topic}.dead"))

    def end(self) -> None:
        self._client.close()
        for child in self._children:
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()


@pytest.fixture(params=["asyncio", "uvloop", "trio"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stage(server: RunningServer, tmp_path: Path, loop: str) -> Iterator[Stage]:
    made = Stage(server, tmp_path, loop)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def durable(server: RunningServer, tmp_path: Path, loop: str) -> Iterator[Stage]:
    """On a server of its own that has on disk whatever it has acknowledged."""
    with RunningServer(server.name, "--appendonly", "yes", "--appendfsync", "always") as own:
        made = Stage(own, tmp_path, loop)
        try:
            yield made
        finally:
            made.end()


def test_a_server_that_is_killed_and_comes_back_loses_nothing_and_every_subscription_goes_on(durable: Stage) -> None:
    groups = ("g", "h")
    consumer = durable.consumer("consumer", groups=groups)
    consumer.wait_until_ready()
    publisher = durable.publisher(pause=0.002)
    wait_until(
        lambda: min(len(durable.acknowledged()), *(len(durable.handled(group)) for group in groups)) > 200,
        "both processes to be in the middle of their work",
    )

    durable.server.kill()
    before = durable.acknowledged()
    time.sleep(2)  # the length of the outage; nothing depends on it
    durable.server.start()

    wait_until(lambda: len(durable.acknowledged() - before) > 200, "the publisher to go on")
    for group in groups:
        wait_until(
            lambda group=group: len(durable.handled(group) & (durable.acknowledged() - before)) > 200,  # type: ignore[misc]
            f"the subscription of group {group!r} to go on",
        )
    publisher.end()
    acknowledged = durable.acknowledged()
    for group in groups:
        durable.wait_until_all_is_handled(group)
        wait_until(lambda group=group: durable.is_empty(group), "nothing to be left")  # type: ignore[misc]
    stored = durable.stored()
    assert acknowledged <= stored <= durable.attempted()
    for group in groups:
        # Nothing that the server has is handled zero times, and nothing was made up.
        assert durable.handled(group) == stored
    assert durable.dead_letters() == 0
    consumer.end()


def test_late_settlements_of_a_frozen_consumer_change_nothing_and_it_goes_on(stage: Stage) -> None:
    gates = {label: stage.folder / f"{label}.gate" for label in ("frozen", "other")}
    frozen = stage.consumer("frozen", "--gate", str(gates["frozen"]))
    frozen.wait_until_ready()
    publisher = stage.publisher(pause=0.0, count=40)
    wait_until(lambda: len(frozen.lines("begun.g")) == 8, "its handlers to be at work")
    [name] = frozen.consumers

    frozen.signal(signal.SIGSTOP)
    held = stage.pending(name)
    assert len(held) >= 8
    other = stage.consumer("other", "--gate", str(gates["other"]))
    other.wait_until_ready()
    [heir] = other.consumers
    # It is let in on a first part only: it may hold 16 at once, and handles none before its gate opens.
    in_hand = frozen.uids("begun.g")
    wait_until(lambda: len(stage.pending(heir)) == 16, "another to take over what it can")
    theirs = set(stage.pending(heir))
    taken = theirs & set(held)
    assert taken

    gates["frozen"].touch()
    frozen.signal(signal.SIGCONT)
    # It handles what it had begun, and hears from the server that this was somebody else's by now.
    wait_until(lambda: {uid for uid in in_hand if not uid.endswith("0")} <= stage.handled(), "the late handlings")
    wait_until(lambda: taken <= {entry for what, entry, *_ in frozen.lines("events.g") if what == "lost"}, "the news")
    wait_until(lambda: frozen.uids("handled.g") - in_hand, "it to go on with other messages")
    wait_until(lambda: any(what == "settled" for what, *_ in frozen.lines("events.g")), "it to settle those")
    assert theirs <= set(stage.pending(heir))
    settled_late = {entry for what, entry, *_ in frozen.lines("events.g") if what == "settled"}
    assert not settled_late & taken

    gates["other"].touch()
    wait_until(lambda: publisher.process.poll() is not None, "everything to be published")
    stage.wait_until_all_is_handled()
    wait_until(lambda: stage.is_empty("g"), "nothing to be left")
    # The new owner's settlements were accepted, so nobody had settled those entries before.
    accepted = {entry for what, entry, *_ in other.lines("events.g") if what == "settled"}
    assert taken <= accepted
    assert stage.handled() == stage.acknowledged() == stage.attempted()
    assert stage.dead_letters() == 0
    frozen.end()
    other.end()


def test_what_a_killed_consumer_held_comes_to_another_when_its_lease_is_over(stage: Stage) -> None:
    gate = stage.folder / "gate"
    killed = stage.consumer("killed", "--gate", str(gate))
    killed.wait_until_ready()
    publisher = stage.publisher()
    wait_until(lambda: len(killed.lines("begun.g")) == 8, "its handlers to be at work")
    [name] = killed.consumers
    other = stage.consumer("other")
    other.wait_until_ready()
    wait_until(lambda: len(stage.handled()) > 50, "the other one to be in the middle of its work")

    killed.signal(signal.SIGKILL)
    killed.process.wait()
    in_hand = killed.uids("begun.g")
    held = set(stage.pending(name))
    assert held
    assert not in_hand & stage.handled()

    wait_until(lambda: in_hand <= stage.handled(), "what was begun to be handled by the other one")
    wait_until(lambda: name not in stage.consumers(), "the dead one's name to be removed")
    publisher.end()
    stage.wait_until_all_is_handled()
    wait_until(lambda: stage.is_empty("g"), "nothing to be left")
    accepted = {entry for what, entry, *_ in other.lines("events.g") if what == "settled"}
    assert held <= accepted
    assert killed.uids("handled.g") == set()
    assert stage.handled() == stage.acknowledged() == stage.attempted()
    assert stage.dead_letters() == 0
    other.end()


@pytest.mark.timeout(900)  # a machine with little to spare has 67 processes to start
@sampled("interrupts", 6, 67)
def test_consumers_interrupted_at_random_moments_lose_nothing(stage: Stage, interrupts: int) -> None:
    publisher = stage.publisher()

    def interrupt(number: int) -> Child:
        consumer = stage.consumer(f"interrupted-{number}", "--bare")
        # Some are hit while they subscribe, most while they work: every second one for sure, on however busy a machine.
        if number % 2:
            wait_until(lambda: consumer.uids("handled.g"), "a consumer to work")
        else:
            wait_until(lambda: consumer.is_connected, "a consumer to connect")
        time.sleep(random.random() * 0.4)
        consumer.signal(signal.SIGINT)
        try:
            consumer.process.wait(BOUND)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"interrupted, it goes on: {consumer.stderr()}") from None
        return consumer

    with ThreadPoolExecutor(AT_ONCE) as threads:
        interrupted = list(threads.map(interrupt, range(interrupts)))
    assert all(consumer.process.returncode != 0 for consumer in interrupted)
    assert sum(bool(consumer.uids("handled.g")) for consumer in interrupted) > interrupts / 3
    publisher.end()

    last = stage.consumer("last")
    stage.wait_until_all_is_handled()
    wait_until(lambda: stage.is_empty("g"), "nothing to be left")
    assert stage.handled() == stage.acknowledged() == stage.attempted()
    assert stage.dead_letters() == 0
    last.end()
    assert "anybus:returned" not in stage.consumers()
