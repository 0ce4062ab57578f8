"""The crash budget in real processes: a message that kills its process is found out, and takes nobody with it.

The specification, on each event loop, on a real server, proven from the uids that the processes wrote to files
(``children/poisoned.py``). A lease is one second; ``max_deliveries`` is 10, its default:

- One message ends its process (``os._exit``), with 63 healthy neighbours in flight beside it. Three processes are started
  again each time they die. In the end there is exactly one dead letter, and 63 messages are handled.
- The same with a second, healthy subscription on the same bus: none of its messages is dead-lettered.
- A healthy process is killed (``kill -9``) nine times in a row, each time in the middle of its work, as by a bad deploy.
  Nothing is dead-lettered, and the tenth process handles everything.
- One message's handler raises what is no ``Exception`` (``children/raising.py``; a lease is half a second there, and
  ``max_deliveries`` 4). One process is started again each time it ends. The fifth gives up on that message; every
  neighbour is handled, and none that was merely cancelled has a hand-over counted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import new_topic
from servers import RunningServer
from sweeps import first_of

from anybus import JsonCodec, Message, retry_stream
from anybus.backends.redis._keys import delayed

CHILDREN = Path(__file__).with_name("children")
BOUND = 90.0
"""Seconds after which what a test waits for has not come. Never a measure of speed."""

PROCESSES = 3
NEIGHBOURS = 63
KILLS = 9


class Site:
    """A topic on a server, and the processes at work on it."""

    def __init__(self, server: RunningServer, folder: Path, loop: str) -> None:
        self.server = server
        self.folder = folder
        self.loop = loop
        self.client: Any = server.client()
        self.running: list[subprocess.Popen[bytes]] = []
        self.started = 0

    def publish(self, topic: str, messages: list[Message]) -> list[str]:
        codec = JsonCodec()
        for message in messages:
            self.client.xadd(topic, {"message": codec.encode(message)})
        return [message.uid for message in messages]

    def start(self, *topics: str, child: str = "poisoned.py") -> subprocess.Popen[bytes]:
        label = f"p{self.started}"
        self.started += 1
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        command = [sys.executable, str(CHILDREN / child), self.loop, self.server.url, str(self.folder), label, *topics]
        with (self.folder / f"{label}.stderr").open("wb") as errors:
            process = subprocess.Popen(command, stderr=errors, env=environment)
        self.running.append(process)
        return process

    def end_gracefully(self, process: subprocess.Popen[bytes]) -> None:
        label = f"p{self.running.index(process)}"
        # A SIGTERM that comes before would kill it.
        self.wait_until(lambda: self.uids("state", label) or process.poll() is not None, f"{label} to listen")
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND) == 0, self.stderr()

    def uids(self, kind: str, label: str = "*") -> set[str]:
        texts = [path.read_text() for path in self.folder.glob(f"{label}.{kind}")]
        return {uid for text in texts for uid in text[: text.rfind("\n") + 1].split()}

    def is_settled(self, topic: str) -> bool:
        """Whether nothing is unread, pending, or waiting for a retry."""
        for stream in (topic, retry_stream(topic, "g")):
            if not self.client.exists(stream):
                return False
            info = self.client.xinfo_stream(stream)
            for group in self.client.xinfo_groups(stream):
                if group["pending"] or group["last-delivered-id"] != info["last-generated-id"]:
                    return False
        return not self.client.zcard(delayed(retry_stream(topic, "g")))

    def dead_letters(self, topic: str) -> list[Message]:
        codec = JsonCodec()
        return [codec.decode(fields[b"message"]) for _, fields in self.client.xrange(f"{topic}.dead")]

    def wait_until(self, condition: Callable[[], object], what: str, step: Callable[[], None] = lambda: None) -> None:
        deadline = time.monotonic() + BOUND
        while not condition():
            step()
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain for {what}")
            time.sleep(0.05)

    def stderr(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.stderr"))

    def end(self) -> None:
        self.client.close()
        for process in self.running:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture(params=first_of(["asyncio", "uvloop", "trio"]))
def site(server: RunningServer, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    made = Site(server, tmp_path, str(request.param))
    try:
        yield made
    finally:
        made.end()


def run_with_poison(site: Site, topic: str, *also: str) -> tuple[str, list[str]]:
    """Three processes, started again each time they die, until the topics are done with; the uids of poison and others."""
    [poison] = site.publish(topic, [Message(topic, key="poison")])
    neighbours = site.publish(topic, [Message(topic, key="neighbour") for _ in range(NEIGHBOURS)])

    first = site.start(topic, *also)
    site.wait_until(lambda: first.poll() is not None, "the first process to be killed with all its neighbours")
    assert site.uids("begun", "p0") >= {poison, *neighbours}, "all 64 were in flight in one process"
    assert site.uids("handled", "p0").isdisjoint(neighbours)

    slots = [site.start(topic, *also) for _ in range(PROCESSES)]

    def keep_running() -> None:
        for number, process in enumerate(slots):
            if process.poll() is not None:
                slots[number] = site.start(topic, *also)

    site.wait_until(
        lambda: all(site.is_settled(name) for name in (topic, *also)),
        f"everything to be settled {site.stderr()}",
        keep_running,
    )
    for process in slots:
        if process.poll() is None:
            site.end_gracefully(process)
    assert site.started > PROCESSES + 1, "it has killed again and again"
    return poison, neighbours


@pytest.mark.timeout(200)
def test_a_message_that_kills_its_process_is_the_only_dead_letter(site: Site) -> None:
    topic = new_topic()
    poison, neighbours = run_with_poison(site, topic)
    [dead] = site.dead_letters(topic)
    assert (dead.uid, dead.headers["dead-letter-code"]) == (poison, "deliveries")
    assert int(dead.headers["dead-letter-deliveries"]) == 11
    assert site.uids("handled") == set(neighbours)


@pytest.mark.timeout(200)
def test_a_healthy_subscription_of_the_same_bus_loses_nothing(site: Site) -> None:
    topic, healthy = new_topic(), new_topic()
    others = site.publish(healthy, [Message(healthy, key="healthy") for _ in range(300)])
    poison, neighbours = run_with_poison(site, topic, healthy)
    assert [letter.uid for letter in site.dead_letters(topic)] == [poison]
    assert site.dead_letters(healthy) == []
    assert site.uids("handled") == {*neighbours, *others}


@pytest.mark.timeout(200)
def test_nine_kills_of_a_healthy_process_dead_letter_nothing(site: Site) -> None:
    topic = new_topic()
    uids = site.publish(topic, [Message(topic, key="gated") for _ in range(8)])
    for number in range(KILLS):
        process = site.start(topic)
        site.wait_until(lambda number=number: site.uids("begun", f"p{number}"), "it to be at work")  # type: ignore[misc]
        process.kill()
        process.wait()
    assert site.uids("handled") == set()
    (site.folder / "gate").touch()
    last = site.start(topic)
    site.wait_until(lambda: site.is_settled(topic), "everything to be settled")
    site.end_gracefully(last)
    assert site.uids("handled") == set(uids)
    assert site.dead_letters(topic) == []


@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", ["SystemExit", pytest.param("child", marks=pytest.mark.thorough)])
def test_a_handler_that_raises_what_is_no_exception_is_given_up_on_and_costs_its_neighbours_nothing(
    site: Site, kind: str
) -> None:
    topic = new_topic()
    neighbours = site.publish(topic, [Message(topic, key="neighbour") for _ in range(4)])
    [poison] = site.publish(topic, [Message(topic, key=kind)])
    neighbours += site.publish(topic, [Message(topic, key="neighbour") for _ in range(27)])
    process = site.start(topic, child="raising.py")

    def keep_running() -> None:
        nonlocal process
        if process.poll() is not None:
            process = site.start(topic, child="raising.py")

    site.wait_until(lambda: site.is_settled(topic), "everything to be settled", keep_running)
    site.end_gracefully(process)
    begun = sorted(word.split(":") for word in site.uids("begun"))
    assert [count for uid, count in begun if uid == poison] == ["1", "2", "3", "4"]
    assert {count for uid, count in begun if uid != poison} == {"1"}
    assert site.uids("handled") == set(neighbours)
    assert [letter.uid for letter in site.dead_letters(topic)] == [poison]
    assert site.started == 5
