"""The pattern for signals that the documentation recommends, as ``examples/signals.py`` has it.

Specification (docs/signals.md; DESIGN.md, section 4, promise 10): the first signal ends the program gracefully, the
second at once; an error at the start, of the subscription and of the program's own work comes out bare.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import RunningServer, free_port

from anybus import JsonCodec, Message, retry_stream

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "signals.py"
RETRIES = retry_stream("orders", "billing")
LOOPS = ("asyncio", "trio")
"""Those of the example's command line."""
SOON = 60.0

FAILS = """
import sys, anyio
sys.path.insert(0, sys.argv[1])
import signals

async def fail(bus):
    await anyio.sleep(0.01)
    raise ZeroDivisionError("the program's own work")

signals.publish_numbers = fail
anyio.run(signals.main, "memory://", backend=sys.argv[2])
"""


WORKER = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "signals.md").read_text(), re.DOTALL | re.MULTILINE)[0]
"""The page's program without work of its own, which only handles messages."""


class Program:
    """A program of its own, read line by line."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._reader = ThreadPoolExecutor(1)
        self.said: list[str] = []

    def until(self, line: str) -> None:
        """Read until it says so."""
        assert self.process.stdout is not None
        while line not in self.said:
            said = self._reader.submit(self.process.stdout.readline).result(SOON)
            assert said, f"it ended without saying {line!r}: {self.said}"
            self.said.append(said.rstrip("\n"))

    def end(self) -> str:
        """Its standard error. The rest of what it says is kept."""
        out, err = self.process.communicate(timeout=SOON)
        self.said += out.splitlines()
        return err


@contextmanager
def program(*command: str) -> Iterator[Program]:
    started = Program(*command)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        started._reader.shutdown()
        for pipe in (started.process.stdout, started.process.stderr):
            assert pipe is not None
            pipe.close()


def check_bare(err: str, last_line: str) -> None:
    assert "Group" not in err, err
    assert re.match(last_line, err.splitlines()[-1]), err


def worker(loop: str, url: str) -> tuple[str, str]:
    options = "'asyncio', backend_options={'use_uvloop': True}" if loop == "uvloop" else repr(loop)
    program = WORKER.replace("anyio.run(main)", f"anyio.run(main, backend={options})")
    return "-c", program.replace("redis://localhost", url)


@contextmanager
def orders(server: RunningServer) -> Iterator[Any]:
    """A topic that is the test's alone while it runs."""
    with server.client() as client:
        client.delete("orders", RETRIES)
        try:
            yield client
        finally:
            client.delete("orders", RETRIES)


def become_a_string(client: Any, topic: str) -> None:
    """In one step: the topic never seems to be gone."""
    client.pipeline(transaction=True).delete(topic).set(topic, "a string").execute()


def begin_to_handle(client: Any, started: Program) -> None:
    """Wait until the program has its groups, publish a message, and wait until it is handled."""
    deadline = time.monotonic() + SOON
    while not client.exists(RETRIES):  # which is made last
        assert time.monotonic() < deadline
        assert started.process.poll() is None
        time.sleep(0.01)
    client.xadd("orders", {"message": JsonCodec().encode(Message("orders", key="42"))})
    started.until("42")


@pytest.mark.parametrize("loop", [*LOOPS, "uvloop"])
def test_the_pages_worker_ends_gracefully_on_a_signal(loop: str, server: RunningServer) -> None:
    with orders(server) as client, program(*worker(loop, server.url)) as started:
        begin_to_handle(client, started)
        started.process.send_signal(signal.SIGTERM)
        assert started.end() == ""
        assert started.process.returncode == 0
        assert client.xpending("orders", "billing")["pending"] == 0


@pytest.mark.parametrize("loop", [*LOOPS, "uvloop"])
def test_the_pages_workers_error_at_the_start_comes_out_bare(loop: str) -> None:
    with program(*worker(loop, f"redis://127.0.0.1:{free_port()}")) as started:
        err = started.end()
    assert started.process.returncode == 1
    check_bare(err, r"anybus\.BackendError: no connection to ")


@pytest.mark.parametrize("loop", [*LOOPS, "uvloop"])
def test_the_pages_workers_failing_subscription_comes_out_bare(loop: str, server: RunningServer) -> None:
    with orders(server) as client, program(*worker(loop, server.url)) as started:
        begin_to_handle(client, started)
        become_a_string(client, "orders")
        err = started.end()
    assert started.process.returncode == 1
    check_bare(err, r"anybus\.BackendError: the server refused: WRONGTYPE ")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_first_signal_ends_it_gracefully(loop: str, how: signal.Signals) -> None:
    with program(str(EXAMPLE), loop) as started:
        started.until("0 begins")
        started.process.send_signal(how)
        assert started.end() == ""
        assert started.process.returncode == 0
    assert f"received {how.name}" in started.said
    assert "0 handled" in started.said
    assert started.said[-1] == "the bus has ended"
    begun = {line.partition(" ")[0] for line in started.said if line.endswith("begins")}
    handled = {line.partition(" ")[0] for line in started.said if line.endswith("handled")}
    assert begun == handled


@pytest.mark.parametrize("loop", LOOPS)
def test_the_second_signal_ends_it_at_once(loop: str) -> None:
    with program(str(EXAMPLE), loop) as started:
        started.until("0 begins")
        started.process.send_signal(signal.SIGTERM)
        started.until("received SIGTERM")
        started.process.send_signal(signal.SIGINT)
        assert started.end() == ""
        assert started.process.returncode == 0
    assert "received SIGINT" in started.said
    assert "0 cancelled: the message is released, and will be redelivered" in started.said
    assert started.said[-1] == "the bus has ended"


@pytest.mark.parametrize("loop", LOOPS)
def test_an_error_at_the_start_comes_out_bare(loop: str) -> None:
    with program(str(EXAMPLE), loop, f"redis://127.0.0.1:{free_port()}") as started:
        err = started.end()
    assert started.process.returncode == 1
    check_bare(err, r"anybus\.BackendError: no connection to ")


@pytest.mark.parametrize("loop", LOOPS)
def test_a_subscription_that_cannot_begin_comes_out_bare(loop: str, server: RunningServer) -> None:
    with server.client() as client:
        client.set("numbers", "a string")
        try:
            with program(str(EXAMPLE), loop, server.url) as started:
                err = started.end()
        finally:
            client.delete("numbers")
    assert started.process.returncode == 1
    check_bare(err, r"anybus\.BackendError: the server refused: WRONGTYPE ")


@pytest.mark.parametrize("loop", LOOPS)
def test_a_subscription_that_fails_while_it_works_comes_out_bare(loop: str, server: RunningServer) -> None:
    with server.client() as client:
        client.delete("numbers")
        try:
            with program(str(EXAMPLE), loop, server.url) as started:
                started.until("0 begins")
                become_a_string(client, "numbers")
                err = started.end()
        finally:
            client.delete("numbers")
    assert started.process.returncode == 1
    check_bare(err, r"anybus\.BackendError: the server refused: WRONGTYPE ")


@pytest.mark.parametrize("loop", LOOPS)
def test_an_error_of_the_programs_own_work_comes_out_bare(loop: str) -> None:
    with program("-c", FAILS, str(EXAMPLE.parent), loop) as started:
        err = started.end()
    assert started.process.returncode == 1
    check_bare(err, r"ZeroDivisionError: the program's own work$")
