"""The programs of the README, the guide and the deployment page: each is run as it stands, on both event loops.

Only the server's address and the name of the event loop are filled in. The testing page and the signals page have
tests of their own.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import RunningServer

ROOT = Path(__file__).parent.parent
LOOPS = ("asyncio", "trio")
SOON = 60.0
TOPIC = "orders.created"
GROUP = "billing"
CHARGED = "charged 20 for order 1\ncharged 40 for order 2\ncharged 60 for order 3\n"


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def named(page: str, name: str) -> str:
    (program,) = [block for block in blocks(page) if block.startswith(f"# {name}\n")]
    return program


@contextmanager
def start(program: str, loop: str, url: str = "") -> Iterator[subprocess.Popen[str]]:
    """Run a program until the block is left, whatever it does by then."""
    program = program.replace("redis://localhost", url or "redis://localhost")
    program = program.replace("anyio.run(main)", f"anyio.run(main, backend={loop!r})", 1)
    # A shell's background job ignores Ctrl-C, and so would what it starts.
    heeds = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", heeds + program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def run(program: str, loop: str, url: str = "") -> tuple[str, str]:
    with start(program, loop, url) as started:
        out, err = started.communicate(timeout=SOON)
        assert started.returncode == 0, err
    return out, err


@pytest.fixture
def client(server: RunningServer) -> Iterator[Any]:
    """Of a server on which the pages' topic is the test's alone."""
    with server.client() as client:
        forget(client)
        yield client
        forget(client)


def forget(client: Any) -> None:
    client.delete(TOPIC, *client.keys(f"anybus:{{{TOPIC}}}:*"))


@pytest.mark.parametrize("loop", LOOPS)
def test_the_readmes_program_prints_what_the_readme_says(loop: str) -> None:
    (program,) = blocks("README.md")
    out, err = run(program, loop)
    assert err == ""
    assert f"It prints `{out.strip()}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("loop", LOOPS)
def test_the_guides_publisher_and_worker_print_what_the_guide_says(
    loop: str, server: RunningServer, client: Any
) -> None:
    with start(named("docs/guide.md", "worker.py"), loop, server.url) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "waiting for orders\n"
        published, err = run(named("docs/guide.md", "publisher.py"), loop, server.url)
        handled = [worker.stdout.readline() for _ in range(3)]
        worker.send_signal(signal.SIGINT)
        _, worker_err = worker.communicate(timeout=SOON)
    assert err == ""
    assert sorted(handled) == CHARGED.splitlines(keepends=True)
    shown = blocks("docs/guide.md", "text")
    assert re.sub(r"\d+-\d+", "ID", f"$ python publisher.py\n{published}") == re.sub(r"\d+-\d+", "ID", shown[1])
    assert shown[2] == f"waiting for orders\n{CHARGED}"
    assert worker_err.splitlines()[-1] in ("KeyboardInterrupt", "asyncio.exceptions.CancelledError")
    assert client.xpending(TOPIC, GROUP)["pending"] == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_the_retention_pages_program_leaves_nothing_on_the_server(
    loop: str, server: RunningServer, client: Any
) -> None:
    soon = "from anybus._retention import pace\n\npace.LOOK = 0.1\n"
    program = named("docs/retention.md", "worker.py").replace("sleep(7)", "sleep(2)")
    out, err = run(soon + program, loop, server.url)
    assert (out, err) == ("charged order-1\n", "")
    assert client.exists(TOPIC)
    assert client.xlen(TOPIC) == 0


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("client")
def test_a_worker_that_comes_after_the_publisher_says_what_it_will_not_see(loop: str, server: RunningServer) -> None:
    run(named("docs/guide.md", "publisher.py"), loop, server.url)
    with start(named("docs/guide.md", "worker.py"), loop, server.url) as worker:
        assert worker.stderr is not None
        assert "3 entries" in worker.stderr.readline()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("client")
def test_a_group_that_starts_at_the_beginning_handles_what_was_published_before(
    loop: str, server: RunningServer
) -> None:
    run(named("docs/guide.md", "publisher.py"), loop, server.url)
    (config,) = [block for block in blocks("docs/guide.md") if block.startswith("config = ")]
    worker = re.sub(r"config = .*\n", config, named("docs/guide.md", "worker.py"))
    with start(worker, loop, server.url) as started:
        assert started.stdout is not None
        said = {started.stdout.readline() for _ in range(4)}
    assert said == {"waiting for orders\n", *CHARGED.splitlines(keepends=True)}


@pytest.mark.parametrize("loop", LOOPS)
def test_the_guides_handler_that_fails_is_retried_as_the_guide_shows(loop: str) -> None:
    failing = [block for block in blocks("docs/guide.md") if "the bank is down" in block]
    both = named("docs/guide.md", "both.py")
    out, err = run(both, loop)
    assert (sorted(out.splitlines()), err) == (CHARGED.splitlines(), "")
    program = re.sub(r"async def charge.*?\n\n", failing[0] + "\n", both, flags=re.DOTALL).replace(
        "sleep(1)", "sleep(4)"
    )
    out, err = run(program, loop)
    assert sorted(out.splitlines()) == CHARGED.splitlines()
    assert out.endswith("charged 40 for order 2\n")
    (shown,) = [line for block in blocks("docs/guide.md", "text") for line in block.splitlines() if "retry in" in line]
    pattern = re.escape(shown.partition(" [uid")[0]).replace(re.escape("0.808"), r"[\d.e-]+")
    assert re.match(pattern, err), err


@pytest.mark.parametrize("loop", LOOPS)
def test_the_program_with_a_schedule_handles_its_ticks(loop: str, server: RunningServer) -> None:
    with start(named("docs/recurring.md", "reports.py"), loop, server.url) as reports:
        assert reports.stdout is not None
        assert re.match(r"the first one is wanted at \d+-\d\d-\d\d .*\+00:00\n", reports.stdout.readline())
        for _ in range(2):
            assert re.match(r"report for \d+-\d\d-\d\dT.*\.000Z\n", reports.stdout.readline())


@pytest.mark.parametrize("loop", LOOPS)
def test_the_deployment_pages_worker_shows_its_health_and_ends_gracefully(
    loop: str, server: RunningServer, client: Any, tmp_path: Path
) -> None:
    healthy = tmp_path / "healthy"
    program = named("docs/deployment.md", "worker.py").replace("/tmp/healthy", str(healthy))
    with start(program, loop, server.url) as worker:
        deadline = time.monotonic() + SOON
        while not healthy.exists():
            assert time.monotonic() < deadline
            assert worker.poll() is None
            time.sleep(0.01)
        run(named("docs/guide.md", "publisher.py"), loop, server.url)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "charged \n"
        worker.send_signal(signal.SIGTERM)
        _, err = worker.communicate(timeout=SOON)
        assert (worker.returncode, err) == (0, "")
    assert not healthy.exists()
    assert client.xinfo_groups(TOPIC)[0]["name"] == GROUP.encode()
