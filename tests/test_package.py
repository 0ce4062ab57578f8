"""The package as it is installed: from its wheel, without extras.

- ``import anybus`` works with the core's dependencies alone, loads neither a server's client nor an event loop that
  nobody uses, and a bus in memory works.
- ``anybus.__version__`` is the installed version.
- ``redis://`` says which extra it needs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

import anybus

ROOT = Path(__file__).parents[1]

Run = Callable[[str], str]


def test_the_version_is_that_of_the_installed_package() -> None:
    assert anybus.__version__ == version("anybus")


def test_an_attribute_that_does_not_exist_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="module 'anybus' has no attribute 'Nothing'"):
        anybus.Nothing  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


@pytest.mark.parametrize(
    "name", ["redis", "hiredis", "asyncio", "trio", "importlib.metadata", "ssl", "hashlib", "cronsim", "zoneinfo"]
)
def test_importing_the_package_loads_only_what_it_uses(name: str) -> None:
    loaded = f"import sys, anybus; print({name!r} in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout == "False\n"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a program where only the wheel is installed, with what the core depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    python = folder / "venv" / "bin" / "python"

    def call(*command: str | Path) -> str:
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.glob("anybus-*.whl")
    call(sys.executable, "-m", "venv", folder / "venv")
    call(python, "-m", "pip", "install", "-q", wheel)
    return lambda program: call(python, "-c", program)


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_the_description_on_the_package_index_has_no_link_that_leads_nowhere(run: Run) -> None:
    description = run("import importlib.metadata as m; print(m.metadata('anybus').get_payload())")
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        if target.startswith("https://"):
            assert f"[{text}]({target})" in description
        else:
            assert (ROOT / target).exists()
            assert f"{text} (`{target}`)" in description
    assert not re.findall(r"\]\((?!https://)", description)


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_the_wheel_works_without_extras(run: Run) -> None:
    handled = """
import anyio, anybus

async def main():
    done = anyio.Event()

    async def handle(delivery):
        print(delivery.message.json())
        done.set()

    async with anybus.connect("memory://") as bus:
        async with bus.subscribe(anybus.SubscriptionConfig("t", "g"), handle):
            await bus.publish(anybus.Message.from_json("t", 42))
            await done.wait()
    print(anybus.__version__)

anyio.run(main)
"""
    assert run(handled) == f"42\n{anybus.__version__}\n"
    refused = """
import anybus
try:
    anybus.connect("redis://localhost")
except anybus.UnsupportedError as error:
    print(error)
"""
    assert run(refused) == "redis:// needs the extra 'redis': pip install 'anybus[redis]'\n"
