"""The program of the page on delayed messages: run as it stands, on both event loops."""

from __future__ import annotations

import pytest
from servers import RunningServer
from test_docs_programs import LOOPS, blocks, run


@pytest.mark.parametrize("loop", LOOPS)
def test_the_program_prints_what_the_page_says(loop: str, server: RunningServer) -> None:
    program, *_ = blocks("docs/delayed.md")
    (shown,) = blocks("docs/delayed.md", "text")
    assert run(program, loop, server.url) == (shown, "")
