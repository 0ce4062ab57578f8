"""The page on backends shows the programs of ``examples/`` as they are, and they do what the page says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import anyio
import pytest
import trio.testing

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
PRINTED = {
    "backend.py": "also once (attempt 1), once (attempt 1), twice (attempt 2)\n",
    "backend_with_features.py": "handling one\nhandling two\n",
}


def without_docstring(name: str) -> str:
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    return text[text.index("from __future__") :]


def test_the_page_shows_the_programs_as_they_are() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert blocks == [without_docstring(name) for name in PRINTED]


@pytest.mark.parametrize("name", PRINTED)
def test_the_programs_do_what_the_page_says(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    main = runpy.run_path(str(ROOT / "examples" / name))["main"]
    anyio.run(main, backend="trio", backend_options={"clock": trio.testing.MockClock(autojump_threshold=0)})
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(PRINTED[name].splitlines())
