"""The benchmarks: a short run of every part, what it records, and what is made of the record."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import chart
import page
import pytest
import scale
from _costs import Stopwatch
from _pinning import can_pin, one_core, usable_cores
from _record import Record
from _results import Results
from _wire import Wire
from conftest import SERVER
from servers import RunningServer, server_binary

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    environment = {**os.environ, "ANYBUS_SERVER": server_binary(SERVER)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a quick run of everything prints and records. On uvloop, which has the most contestants."""
    record = tmp_path_factory.mktemp("benchmarks") / "run.json"
    printed = run("memory_path.py", "--messages", 500, "--rounds", 2, "--loop", "uvloop", "--json", record)
    printed += run("redis_path.py", "--python-quick", "--messages", 1000, "--loop", "uvloop", "--json", record)
    return printed, record


def test_a_quick_run_measures_every_contestant(quick: tuple[str, Path]) -> None:
    printed, path = quick
    known: dict[str, Any] = json.loads(path.read_text())
    drains = {"floor", "redis-py loop", "redis-py loop, uvloop", "anybus"}
    one_by_one = {"redis-py", "redis-py, uvloop", "anybus"}
    contestants = {
        "a": drains,
        "c": one_by_one,
        "d": {"floor", "redis-py pipeline", "redis-py pipeline, uvloop", "anybus"},
    }
    if can_pin():
        contestants |= {"h": drains, "i": one_by_one}
    for part, names in contestants.items():
        figures = known["parts"][part]["uvloop"]["figures"]
        assert set(figures) == names
        for name, rounds in figures.items():
            assert set(rounds) == {"rate", "client_us", "server_us"}, (part, name)
            assert all(len(values) == 1 and values[0] > 0 for values in rounds.values()), (part, name)
    if not can_pin():
        assert "skipped" in printed
    assert len(known["parts"]["memory"]["uvloop"]["figures"]["anybus"]["client_us"]) == 2
    assert printed.count("CPU time of the client a message") == len(contestants) + 2  # part b, and the path in memory


def test_a_record_names_no_host_and_no_path(quick: tuple[str, Path]) -> None:
    text = quick[1].read_text()
    assert str(ROOT) not in text
    assert platform.node() not in text
    assert set(json.loads(text)["machine"]) == {"cpu", "cores", "platform", "python", "libraries"}


def test_a_later_run_replaces_only_its_own_parts(quick: tuple[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(quick[1].read_text())
    before = json.loads(path.read_text())["parts"]
    Record(path).add("a", "uvloop", {"rounds": 1}, {"anybus": {"rate": [123456.7]}})
    after = json.loads(path.read_text())["parts"]
    assert after.pop("a")["uvloop"]["figures"] == {"anybus": {"rate": [123460.0]}}
    del before["a"]
    assert after == before


def test_a_record_of_another_machine_is_refused(quick: tuple[str, Path], tmp_path: Path) -> None:
    other = json.loads(quick[1].read_text())
    other["machine"]["cores"] += 1
    path = tmp_path / "run.json"
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="another machine"):
        Record(path)


def test_the_page_and_the_chart_are_made_of_a_record(quick: tuple[str, Path], tmp_path: Path) -> None:
    (tmp_path / "performance.md").write_text((DOCS / "performance.md").read_text())
    (tmp_path / "performance.json").write_text(quick[1].read_text())
    run("page.py", "--docs", tmp_path)
    text = (tmp_path / "performance.md").read_text()
    results = Results(quick[1])
    (row,) = [row for row in results.rows("a", "floor") if row.label == "anybus on uvloop"]
    line = f"| anybus on uvloop | {row.median('rate'):,.0f} | {row.times('rate'):.2f} "
    assert line in text
    assert "**This run is a placeholder**: it has too few rounds" in text
    run("chart.py", quick[1], tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text() == (tmp_path / "performance.svg").read_text()
    written = {element.text for element in ElementTree.parse(tmp_path / "chart.svg").iter(f"{SVG}text")}
    assert {"microseconds of CPU time a message", "from 100 tasks", f"{row.times('rate'):.2f}"} <= written


def test_nothing_is_drawn_outside_the_chart(quick: tuple[str, Path]) -> None:
    drawn = ElementTree.fromstring(chart.draw(Results(quick[1])))
    width, height = float(drawn.attrib["width"]), float(drawn.attrib["height"])
    for box in drawn.iter(f"{SVG}rect"):
        assert float(box.get("x", 0)) + float(box.attrib["width"]) <= width
        assert float(box.get("y", 0)) + float(box.attrib["height"]) <= height


def test_the_published_figures_are_those_of_their_record() -> None:
    results = Results(DOCS / "performance.json")
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert page.fill(text, results) == text
    assert chart.draw(results) == (DOCS / "performance.svg").read_text(encoding="utf-8")


def test_a_stopwatch_tells_the_work_of_the_client_from_that_of_the_server(server: RunningServer) -> None:
    watch = Stopwatch(server.port)
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    client = watch.stop(10)
    assert client["client_us"] >= 5_000
    watch = Stopwatch(server.port)
    with Wire(server.port) as wire:
        wire.call("EVAL", "for i = 1, 2e7 do end", 0)
    loaded = watch.stop(10)
    assert loaded["server_us"] > loaded["client_us"]
    assert loaded["server_us"] > client["server_us"]


THREADED = """
import sys, threading
ended = threading.Event()
thread = threading.Thread(target=ended.wait)
thread.start()
print("ready", flush=True)
sys.stdin.readline()
ended.set()
"""


if sys.platform == "linux":

    @pytest.fixture
    def threaded() -> Iterator[int]:
        """A process with two threads."""
        with subprocess.Popen(
            [sys.executable, "-c", THREADED], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
            process.kill()

    def affinities(pid: int) -> list[set[int]]:
        return [os.sched_getaffinity(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")]

    @pytest.mark.skipif(usable_cores() < 2, reason="there is only one core to be on")
    def test_processes_are_on_one_core_until_the_block_is_left(threaded: int) -> None:
        before = os.sched_getaffinity(0)
        with one_core(threaded) as core:
            assert os.sched_getaffinity(0) == {core}
            assert affinities(threaded) == [{core}, {core}]
        assert os.sched_getaffinity(0) == before
        assert affinities(threaded) == [before, before]


def test_a_quick_run_measures_what_many_subscriptions_cost(tmp_path: Path) -> None:
    record = tmp_path / "scale.json"
    sizes = ("--subscriptions", 6, "--groups", 2, "--seconds", 0.5, "--messages", 5)
    printed = run("scale.py", *sizes, "--loop", "trio", "--json", record)
    assert "6 subscriptions of 2 group(s)" in printed
    found = json.loads(record.read_text())
    figures: dict[str, float] = found["figures"]["trio"]
    assert set(figures) == set(scale.UNITS)
    assert all(value >= 0 for value in figures.values())
    # In a quiet half second there may be no call, and no tick of the clock that counts processor time.
    idle = {"client_percent", "server_percent", "calls_per_s", "commands_per_s"}
    assert all(figures[name] > 0 for name in figures.keys() - idle), figures
    assert figures["quiet_p50_ms"] <= figures["quiet_p99_ms"]
    assert found["targets"] == {}, "the targets are those of another size"


def test_one_subscription_and_a_thousand_have_targets() -> None:
    def targets(subscriptions: int, groups: int = 1) -> set[str]:
        return set(scale.Plan(0, subscriptions, groups, 1, 1).targets())

    assert targets(1) == {"client_percent", "commands_per_s"}
    assert {"connections", "entered_s", "calls_per_s"} < targets(1000)
    assert not targets(1000, 10)
    assert targets(1000) | targets(1) < set(scale.UNITS)


def test_a_quick_run_measures_large_backlogs(tmp_path: Path) -> None:
    record = tmp_path / "backlog.json"
    printed = run("backlog.py", "--python-quick", "--loop", "asyncio", "--json", record)
    figures: dict[str, Any] = json.loads(record.read_text())["figures"]["asyncio"]
    assert [name.split()[0] for name in figures] == ["drain"] * 4 + ["beside", "reclaim"] * 3 + ["retries", "letters"]
    for name, measured in figures.items():
        assert name in printed
        assert all(value > 0 for measure in ("rate", "client_us", "server_us") for value in measured[measure])
        assert all(value >= 0 for value in measured["longest_ms"])


def test_a_quick_run_compares_a_cluster_with_a_single_server(tmp_path: Path) -> None:
    record = tmp_path / "cluster.json"
    printed = run("cluster.py", "--messages", 400, "--rounds", 2, "--loop", "trio", "--json", record)
    parts: dict[str, Any] = json.loads(record.read_text())["figures"]["trio"]
    assert list(parts) == ["publish", "publish_batch", "drain"]
    for name, contestants in parts.items():
        assert name in printed
        assert list(contestants) == ["single", "cluster"]
        for measured in contestants.values():
            assert all(len(values) == 2 for values in measured.values())
            assert all(value > 0 for value in measured["rate"])


def test_a_quick_run_compares_the_features() -> None:
    printed = run("features.py", "--messages", 500, "--rounds", 1, "--loop", "trio")
    for name in ("topic_ttl", "idempotency key", "confirmation=persisted", "publish_nowait", "exactly-once"):
        assert printed.count(name) >= 3, printed


def test_a_quick_run_measures_retention() -> None:
    printed = run("retention.py", "cost", "longest", "--count", 1000, "--rounds", 1, "--look", 0.1)
    assert printed.count("memory, ") == printed.count("per message, ") == 2
    assert printed.count("longest step, Interest()") == 4
    assert printed.count("longest step, Limits(") == 6
    assert "990 of 1000 removed" in printed
