"""The pages on failure, dead letters and promises: their examples run as they stand, and print what the pages say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio.testing

ROOT = Path(__file__).parent.parent
PAGES = ("failure.md", "dead-letters.md", "promises.md", "expiry.md", "expectations.md")
EXAMPLE = (ROOT / "examples" / "dead_letters.py").read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """Each program of a page, and the output that follows it at once, or after one line of text."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(
        r"^```python\n(.*?)^```\n(?:\n[^\n]+\n)?(?:\n```text\n(.*?)^```$)?", text, re.DOTALL | re.MULTILINE
    )
    return [(code, output) for code, output in found if code not in EXAMPLE]


CASES = [pytest.param(*block, id=f"{page}-{number}") for page in PAGES for number, block in enumerate(blocks(page))]


@pytest.mark.parametrize(("code", "output"), CASES)
def test_each_example_runs(
    code: str, output: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = anyio.run

    def run_at_once(main: Any) -> None:
        run(main, backend="trio", backend_options={"clock": trio.testing.MockClock(autojump_threshold=0)})

    monkeypatch.setattr(anyio, "run", run_at_once)
    program = compile(code.replace("redis://localhost", "memory://"), "example.py", "exec", dont_inherit=True)
    exec(program, {"__name__": "example"})
    if output:
        assert capsys.readouterr().out == output


def test_the_pages_have_the_programs_that_are_meant() -> None:
    assert any("attempt 4 of 4" in output for _, output in blocks("failure.md"))
    page = (ROOT / "docs" / "dead-letters.md").read_text(encoding="utf-8")
    assert any(code in EXAMPLE for code in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
