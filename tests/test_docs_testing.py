"""The testing page: what it shows is run as it stands.

Its tests for AnyIO's plugin are run by pytest in a process of their own. pytest-asyncio is imitated: each half of a
fixture gets a task of its own.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from harness import SOON, Harness, quick, until

from anybus import Delivery, Message, StreamBus, SubscriptionConfig

PAGE = Path(__file__).parent.parent / "docs" / "testing.md"
BLOCKS = {
    block.split(maxsplit=2)[1]: block
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
}
ASYNCIO = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
]


def run_pytest(folder: Path, name: str) -> str:
    (folder / name).write_text(BLOCKS[name])
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", name]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    ended = subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    return ended.stdout


def test_the_page_has_the_examples_that_are_tested_here() -> None:
    assert list(BLOCKS) == ["test_billing.py", "test_retries.py", "test_inside.py", "test_fixture.py", "test_trio.py"]
    for name, block in BLOCKS.items():
        compile(block, name, "exec")


@pytest.mark.parametrize(("name", "passed"), [("test_billing.py", 4), ("test_retries.py", 1)])
def test_the_pages_tests_pass(name: str, passed: int, tmp_path: Path) -> None:
    assert f"{passed} passed" in run_pytest(tmp_path, name)


def in_a_task() -> Any:
    """The page's helper for pytest-asyncio."""
    helper = BLOCKS["test_fixture.py"].replace("import pytest_asyncio\n", "").partition("@pytest_asyncio.fixture")[0]
    namespace: dict[str, Any] = {}
    exec(compile(helper, "test_fixture.py", "exec"), namespace)
    return namespace["in_a_task"]


async def apart(awaitable: Any) -> Any:
    return await asyncio.ensure_future(awaitable)


@pytest.mark.parametrize("anyio_backend", ASYNCIO)
async def test_a_fixture_that_holds_bus_and_subscription_in_tasks_of_their_own_is_left_from_anywhere(
    harness: Harness, topic: str
) -> None:
    handled: list[str] = []

    async def handle(delivery: Delivery) -> None:
        handled.append(delivery.message.key)

    helper = in_a_task()
    with anyio.fail_after(SOON):
        buses = helper(StreamBus(harness.make_backend(), quick()))
        bus = await apart(buses.__aenter__())
        subscriptions = helper(bus.subscribe(SubscriptionConfig(topic, "g"), handle))
        subscription = await apart(subscriptions.__aenter__())
        await bus.publish(Message(topic, key="42"))
        await until(lambda: subscription.statistics().handled == 1)
        await apart(subscriptions.__aexit__(None, None, None))
        assert not subscription.is_running
        await apart(buses.__aexit__(None, None, None))
    assert handled == ["42"]


@pytest.mark.parametrize("anyio_backend", ASYNCIO)
async def test_what_cannot_be_entered_in_such_a_fixture_raises_its_own_error(topic: str) -> None:
    class Refusing(StreamBus):
        async def __aenter__(self) -> Any:
            raise ValueError("not today")

    with anyio.fail_after(SOON), pytest.raises(ValueError, match="not today"):
        async with in_a_task()(Refusing.__new__(Refusing)):
            raise AssertionError("it was entered")
