"""The record of runs: a JSON file with the machine, and for each part its figures. It names no host and no path."""

from __future__ import annotations

import json
import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _figures import Figures
from _pinning import usable_cores
from _wire import Wire

LIBRARIES = ("anybus", "anyio", "hiredis", "msgspec", "redis", "trio", "uvloop")

Run = dict[str, Any]
"""The circumstances of one part: messages, rounds, load, whether it was quick, and the server if there is one."""


def machine() -> dict[str, Any]:
    """What the figures depend on, as far as the platform says it."""
    kernel = re.match(r"\d+\.\d+", platform.release())
    libraries: dict[str, str] = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            libraries[name] = version(name)
    return {
        "cpu": _cpu(),
        "cores": usable_cores(),
        "platform": f"{platform.system()} {kernel[0] if kernel else ''} {platform.machine()}".replace("  ", " "),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": libraries,
    }


def server_version(port: int) -> str:
    with Wire(port) as wire:
        facts = wire.info("server")
    if "valkey_version" in facts:
        return f"Valkey {facts['valkey_version']}"
    return f"Redis {facts['redis_version']}"


def load() -> float | None:
    """The load average of the last minute per usable core. Much more than 0 before a run: the machine is busy."""
    if not hasattr(os, "getloadavg"):
        return None
    return round(os.getloadavg()[0] / usable_cores(), 2)


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


class Record:
    """Figures of this run, added to those that the file has already.

    :param path: of the file; None to keep nothing.
    :raises ValueError: if the file comes from another machine, or from other versions.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Any] = {"machine": machine(), "parts": {}}
        if path is not None and path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["machine"] != self._known["machine"]:
                raise ValueError(f"{path} is from another machine or other versions. Remove it, or name another file.")
            self._known = known

    def add(self, part: str, loop: str, run: Run, figures: Figures) -> None:
        """Replace what the file has of this part and loop."""
        if self._path is None or not figures:
            return
        rounded = {
            name: {measure: [float(f"{value:.5g}") for value in values] for measure, values in rounds.items()}
            for name, rounds in figures.items()
        }
        self._known["parts"].setdefault(part, {})[loop] = {"run": run, "figures": rounded}
        self._path.write_text(json.dumps(self._known, indent=1) + "\n", encoding="utf-8")
