"""Processes that share connections and passes among many subscriptions are killed, and everything is handled.

The accounting is by uids: those that were published, and those that the handlers appended to files.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import new_topic
from processes import CHILDREN, wait_until
from servers import RunningServer

from anybus import JsonCodec, Message, retry_stream
from anybus.backends.redis._keys import delayed

TOPICS = 40
MEMBERS = 3
KILLS = 8


def handled(folder: Path) -> set[str]:
    return {line.split()[0] for file in folder.glob("member-*") for line in file.read_text().splitlines() if line}


@pytest.mark.thorough
@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_members_of_many_groups_are_killed_and_all_is_handled(server: RunningServer, tmp_path: Path, loop: str) -> None:
    prefix = new_topic()
    topics = [f"{prefix}.{number}" for number in range(TOPICS)]
    client: Any = server.client()
    codec = JsonCodec()
    numbers = itertools.count()
    published: set[str] = set()

    def start() -> subprocess.Popen[bytes]:
        file = tmp_path / f"member-{next(numbers)}"
        options = ("--url", server.url, "--prefix", prefix, "--topics", str(TOPICS), "--file", str(file))
        return subprocess.Popen([sys.executable, str(CHILDREN / "many.py"), *options, "--loop", loop])

    def publish() -> None:
        with client.pipeline(transaction=False) as pipe:
            for topic in topics:
                message = Message(topic, b"x")
                published.add(message.uid)
                pipe.xadd(topic, {"message": codec.encode(message)})
            pipe.execute()

    def is_settled() -> bool:
        for topic in topics:
            for stream in (topic, retry_stream(topic, "g")):
                if client.exists(delayed(stream)) or client.xpending(stream, "g")["pending"]:
                    return False
                [group] = client.xinfo_groups(stream)
                last = client.xrevrange(stream, count=1)
                if last and last[0][0] != group["last-delivered-id"]:
                    return False
        return True

    publish()
    members = [start() for _ in range(MEMBERS)]
    try:
        for kill in range(KILLS):
            before = len(handled(tmp_path))
            for _ in range(20):
                publish()
            wait_until(lambda: len(handled(tmp_path)) >= before + 5 * TOPICS, "some to be handled")  # noqa: B023
            victim = members[kill % MEMBERS]
            victim.kill()
            victim.wait()
            members[kill % MEMBERS] = start()
        wait_until(
            lambda: published <= handled(tmp_path) and is_settled(),
            "all to be handled and settled",
            every=0.2,
            growing=lambda: len(handled(tmp_path)),
        )
    finally:
        for member in members:
            member.kill()
            member.wait()
    assert handled(tmp_path) == published
