"""The programs of the page on exactly-once effects print what the page shows, on both event loops."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_docs_programs import LOOPS, blocks, named, run

from anybus.idempotency import SqlStore

PAGE = "docs/exactly-once.md"


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("number", [0, 1])
def test_the_pages_programs_print_what_it_shows(loop: str, number: int, tmp_path: Path) -> None:
    program = named(PAGE, ("once.py", "shop.py")[number]).replace("shop.sqlite", str(tmp_path / "shop.sqlite"))
    out, err = run(program, loop)
    assert err == ""
    assert out == blocks(PAGE, "text")[number]


def test_the_page_shows_the_statements_that_create_the_table() -> None:
    (shown,) = blocks(PAGE, "sql")
    assert "".join(shown.split()) == "".join("".join(f"{statement};" for statement in SqlStore.ddl()).split())
