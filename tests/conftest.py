"""Every test of behaviour runs on asyncio, on asyncio with uvloop, and on trio; the backend comes from a fixture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import stages
from blockbuster import blockbuster_ctx
from clusters import RunningCluster
from harness import Harness, MemoryHarness, new_topic
from hypothesis import HealthCheck, settings
from sentinels import SentinelSet
from servers import RedisHarness, RunningServer
from wallclock import WallClock

NO_OPTIONS: dict[str, object] = {}

# A busy machine may take any time for an example, or for making one.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

stages.watch()

LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", NO_OPTIONS), id="trio"),
]

_SEVERAL = ("cluster", "sentinel")
_CHOSEN = os.environ.get("ANYBUS_SERVER", "valkey")
_FIRST, _, _REST = _CHOSEN.partition(":")
SETUP = _FIRST if _FIRST in _SEVERAL else "server"
SERVER = (_REST if _FIRST in _SEVERAL else _CHOSEN) or "valkey"
"""The server that tests run on: valkey, redis62, redis70, redis82, or a path. ``cluster`` is a cluster of valkey, and
``cluster:redis70`` one of another server, for all tests that take a harness. ``sentinel`` and ``sentinel:redis70`` are
a primary with two replicas behind three sentinels.
"""

NEEDS_SERVER = {"server", "own_server", "cluster", "sentinel"}
"""Fixtures that start one."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a server is found by ``-k server``, whatever it is called. Some of what is slow is thorough."""
    for item in items:
        assert isinstance(item, pytest.Function)
        if item.path.name.startswith(THOROUGH_ON_UVLOOP) and "uvloop" in item.name:
            item.add_marker(pytest.mark.thorough)
        on_server = hasattr(item, "callspec") and item.callspec.params.get("harness") == "server"
        if on_server or NEEDS_SERVER & set(item.fixturenames) or item.path.name in REAL_SERVER_MODULES:
            item.extra_keyword_matches.add("server")


THOROUGH_ON_UVLOOP = (
    "test_cluster",
    "test_confirmation",
    "test_deduplication",
    "test_delayed",
    "test_exactly_once",
    "test_expectations",
    "test_expiry",
    "test_idempotency",
    "test_recurring",
    "test_redis_deduplication",
    "test_retention",
    "test_sentinel",
    "test_time_and_identity",
)
"""How the names of modules begin in which uvloop is left to the session ``thorough``: quick runs have the other two."""

REAL_SERVER_MODULES = {
    "test_benchmarks.py",
    "test_cluster.py",
    "test_cluster_edges.py",
    "test_cluster_failovers.py",
    "test_cluster_letters.py",
    "test_cluster_moves.py",
    "test_cluster_publishing.py",
    "test_cluster_tls.py",
    "test_crash_budget.py",
    "test_redis_connection.py",
    "test_redis_crashes.py",
    "test_redis_entering.py",
    "test_redis_log.py",
    "test_redis_reads.py",
    "test_sentinel_failovers.py",
}


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
def stages_follow_the_table() -> Iterator[None]:
    yield
    refused, stages.refused[:] = list(stages.refused), []
    assert not refused


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """A blocking call in the library, made on an event loop, fails the test."""
    with blockbuster_ctx("anybus"):
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """A real server, started for this run of the tests. Tests use topics of their own on it."""
    with RunningServer(SERVER) as running:
        yield running


@pytest.fixture(scope="session")
def cluster() -> Iterator[RunningCluster]:
    """A real cluster, started for this run of the tests."""
    with RunningCluster(SERVER) as running:
        yield running


@pytest.fixture(scope="session")
def sentinel() -> Iterator[SentinelSet]:
    """A real set of sentinels and their servers, started for this run of the tests."""
    with SentinelSet(SERVER) as running:
        yield running


@pytest.fixture(params=["memory", "server"])
def harness(request: pytest.FixtureRequest) -> Harness:
    if request.param == "memory":
        return MemoryHarness()
    return RedisHarness(request.getfixturevalue(SETUP))


@pytest.fixture
def topic() -> str:
    return new_topic()


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    """The wall clock of the whole library: one replacement reaches every use of it."""
    clock = WallClock()
    monkeypatch.setattr("anybus._ground.clock.datetime", clock)
    return clock
