"""Delayed messages outlive the processes that stored them: real processes, killed with SIGKILL, on a real server.

Four processes schedule messages on one topic, and subscribe to it, so that each appends what is due, whoever stored it.
Two of them are killed. From the uids that they wrote to files, and from the topic itself:

- Every message that was acknowledged is appended exactly once. One whose process was killed before the answer came is
  appended once or never.
- None is appended before it is due.
- How late they were is recorded: of those that became due while two processes were dead, too.
"""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness import new_topic
from processes import wait_until
from servers import RunningServer
from test_redis_crashes import Child

from anybus import JsonCodec
from anybus.backends.redis._keys import delayed

LOOPS = ("asyncio", "uvloop", "trio")


def entries(client: Any, topic: str) -> list[tuple[int, str]]:
    """The time of each entry in ms, and its message's uid."""
    found: list[tuple[int, str]] = []
    start = "-"
    while page := client.xrange(topic, start, "+", count=5000):
        for entry_id, fields in page:
            found.append((int(entry_id.partition(b"-")[0]), JsonCodec().decode(fields[b"message"]).uid))
        start = f"({page[-1][0].decode()}"
    return found


def percentile(values: list[int], part: float) -> int:
    return sorted(values)[int(part * (len(values) - 1))]


def run(
    server: RunningServer, folder: Path, loops: tuple[str, ...], *, count: int, most: float, pause: float
) -> dict[str, Any]:
    """Returns how late messages were."""
    topic = new_topic()
    children: list[Child] = []
    try:
        for number, loop in enumerate(loops):
            label = f"scheduler-{number}"
            options = ("--loop", loop, "--url", server.url, "--topic", topic, "--label", label, "--count", str(count))
            delays = ("--least", "0.2", "--most", str(most), "--pause", str(pause))
            children.append(Child(folder, "scheduler.py", label, *options, *delays))
        wait_until(lambda: all(["ready"] in child.lines("state") for child in children), "the processes to be ready")
        doomed, rest = children[:2], children[2:]
        # One in the middle of its work, one when it has stored everything.
        wait_until(lambda: len(doomed[0].lines("acknowledged")) > count // 3, "a process to have stored something")
        doomed[0].signal(signal.SIGKILL)
        wait_until(
            lambda: all(["scheduled"] in child.lines("state") for child in children[1:]),
            "the processes to have stored everything",
            growing=lambda: sum(len(child.lines("acknowledged")) for child in children),
        )
        doomed[1].signal(signal.SIGKILL)
        for child in doomed:
            child.process.wait()
        due = {uid: int(at) for child in children for uid, at in child.lines("acknowledged")}
        attempted = {uid for child in children for uid in child.uids("attempted")}
        with server.client() as client:
            killed_at = int(client.time()[0] * 1000)
            # More may be appended than was acknowledged: the length of the topic does not tell when all are.
            wait_until(
                lambda: not client.exists(delayed(topic)),
                "every message to be appended",
                every=0.1,
                growing=lambda: client.xlen(topic),
            )
            for child in rest:
                child.end()
            appended = entries(client, topic)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
    times = Counter(uid for _, uid in appended)
    assert [uid for uid in due if times[uid] != 1] == []
    assert [uid for uid in attempted if times[uid] > 1] == []
    assert set(times) <= attempted
    late = {uid: at - due[uid] for at, uid in appended if uid in due}
    assert min(late.values()) >= 0
    of_the_dead = {uid for child in doomed for uid in child.uids("acknowledged")}
    after = [late[uid] for uid in of_the_dead if due[uid] >= killed_at]
    return {
        "messages": len(due),
        "median": percentile(list(late.values()), 0.5),
        "p99": percentile(list(late.values()), 0.99),
        "last": max(late.values()),
        "of dead processes": len(after),
        "last of dead processes": max(after, default=None),
    }


@pytest.mark.parametrize("loop", LOOPS)
def test_every_message_is_appended_once_although_processes_are_killed(
    server: RunningServer, tmp_path: Path, loop: str, record_property: Any
) -> None:
    late = run(server, tmp_path, (loop,) * 4, count=150, most=2.0, pause=0.005)
    record_property("ms late", late)
    print(f"ms late on {loop}: {late}")


@pytest.mark.thorough
def test_twenty_thousand_messages_of_four_processes(
    server: RunningServer, tmp_path: Path, record_property: Any
) -> None:
    late = run(server, tmp_path, ("asyncio", "trio", "uvloop", "asyncio"), count=6200, most=30.0, pause=0.0)
    assert late["messages"] > 20_000
    assert late["of dead processes"] > 100
    record_property("ms late", late)
    print(f"ms late: {late}")
