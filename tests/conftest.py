"""Every test of behaviour runs on asyncio, on asyncio with uvloop, and on trio; the backend comes from a fixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from blockbuster import blockbuster_ctx
from harness import Harness, MemoryHarness, new_topic

NO_OPTIONS: dict[str, object] = {}

LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", NO_OPTIONS), id="trio"),
]


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """A blocking call in the library, made on an event loop, fails the test."""
    with blockbuster_ctx("anybus"):
        yield


@pytest.fixture
def harness() -> Harness:
    return MemoryHarness()


@pytest.fixture
def topic() -> str:
    return new_topic()
