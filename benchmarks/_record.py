"""The record of runs: a JSON file with the machine, and for each part its figures. It names no host and no path."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _costs import server_time
from _figures import Figures
from _pinning import usable_cores
from _wire import Wire

LIBRARIES = ("anybus", "anyio", "hiredis", "msgspec", "redis", "trio", "uvloop")

Run = dict[str, Any]
"""The circumstances of one part: messages, rounds, the server if there is one, and the share of others."""


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


class Others:
    """The work of other processes on this machine, since its creation. Only Linux tells it, in steps of 10 ms.

    :param port: of our own server, which is not another process; None if there is none.
    """

    def __init__(self, port: int | None) -> None:
        self._port = port
        self._before = self._times()

    def share(self) -> float | None:
        """The share of the time of all cores."""
        if self._before is None or (now := self._times()) is None:
            return None
        own, busy, passed = (after - before for after, before in zip(now, self._before, strict=True))
        return round(max(0.0, busy - own) / passed, 3) if passed else None

    def _times(self) -> tuple[float, float, float] | None:
        """Seconds of our two processes, of all processes, and of all cores."""
        try:
            with Path("/proc/stat").open(encoding="ascii") as file:
                ticks = [int(value) for value in file.readline().split()[1:9]]
        except OSError:
            return None
        second = os.sysconf("SC_CLK_TCK")
        waiting = ticks[3] + ticks[4]  # idle, and idle because of a disk
        own = time.process_time()
        if self._port is not None:
            with Wire(self._port) as wire:
                own += server_time(wire)
        return own, (sum(ticks) - waiting) / second, sum(ticks) / second


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
