"""The programs of the page on confirmation: run as they stand, on both event loops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import SERVER
from servers import RunningServer
from test_docs_programs import LOOPS, blocks, named, run

PAGE = "docs/confirmation.md"


@pytest.fixture
def own_server() -> Iterator[RunningServer]:
    with RunningServer(SERVER) as running:
        yield running


@pytest.mark.parametrize("loop", LOOPS)
def test_the_program_prints_what_the_page_says(loop: str, own_server: RunningServer) -> None:
    (shown,) = blocks(PAGE, "text")
    out, err = run(named(PAGE, "confirmed.py"), loop, own_server.url)
    assert out.replace(f"127.0.0.1:{own_server.port}", "localhost:6379") == shown
    assert "nothing was published" in err
    with own_server.client() as client:
        assert client.exists("orders.created") == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_what_is_published_without_waiting_is_stored_when_the_program_ends(
    loop: str, own_server: RunningServer
) -> None:
    assert run(named(PAGE, "nowait.py"), loop, own_server.url) == ("", "")
    with own_server.client() as client:
        assert client.xlen("orders.created") == 3
