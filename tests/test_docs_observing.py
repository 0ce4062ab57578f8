"""The page on observing: its programs run as they stand, and print and log what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from servers import RunningServer

PAGE = (Path(__file__).parent.parent / "docs" / "observing.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
PRINTED = re.findall(r"^```python\n([^`]*?)^```\n\nIt prints:\n\n```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def run(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    (folder / "billing.py").write_text(program)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    command = [sys.executable, "billing.py"]
    ended = subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended


def test_each_program_but_the_one_that_logs_says_what_it_prints() -> None:
    assert [program for program, _ in PRINTED] == PROGRAMS[1:]


@pytest.mark.parametrize(("program", "printed"), PRINTED)
def test_the_programs_print_what_the_page_says(program: str, printed: str, tmp_path: Path) -> None:
    assert run(tmp_path, program).stdout == printed


def lines(log: str) -> list[str]:
    """One for each record, without tracebacks, and without what is different in every run."""
    found = re.findall(r"^(?:DEBUG|INFO|WARNING|ERROR) .*$", log, re.MULTILINE)
    return [re.sub(r"(uid|consumer|entry_id)='[^']*'", r"\1=''", line) for line in found]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_log_on_a_server_is_the_one_on_the_page(server: RunningServer, topic: str, tmp_path: Path) -> None:
    [logged] = re.findall(r"^```text\n(INFO connected.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    program = PROGRAMS[0].replace("redis://localhost:6379", server.url).replace('"orders"', f'"{topic}"')
    with anyio.fail_after(100):
        ended = await to_thread.run_sync(run, tmp_path, program)
    found = [
        line.replace(topic, "orders").replace(f"127.0.0.1:{server.port}", "localhost:6379")
        for line in lines(ended.stderr)
    ]
    assert found == lines(logged)
