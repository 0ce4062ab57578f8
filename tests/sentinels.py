"""Real sentinels: a primary, two replicas and three sentinels, each started on a free port and stopped by its test."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import redis
import redis.exceptions
from processes import wait_until
from servers import RunningServer, server_binary

SERVICE = "shop"


class Member(RunningServer):
    """A server of the set.

    :ivar follows: the port of the primary that it is told to follow when it starts; None = it starts as a primary.
    """

    def __init__(self, name: str, *options: str) -> None:
        # Close together: a replica that has to wait for its synchronization cannot be promoted.
        super().__init__(name, "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1", *options)
        self.follows: int | None = None

    def client(self) -> redis.Redis:
        given = dict(zip(self._options, self._options[1:], strict=False))
        return redis.Redis(port=self.port, socket_timeout=10, password=given.get("--requirepass"))

    def command(self) -> list[str]:
        more = [] if self.follows is None else ["--replicaof", "127.0.0.1", str(self.follows)]
        return [*super().command(), *more]

    @property
    def role(self) -> str:
        return str(self._told_role()[0].decode())

    @property
    def is_in_step(self) -> bool:
        """Whether it is a replica that is connected to its primary."""
        role = self._told_role()
        return bool(role[0] == b"slave" and role[3] == b"connected")

    def _told_role(self) -> Any:
        with self.client() as client:
            untyped: Any = client
            return untyped.execute_command("ROLE")


class RunningSentinel(RunningServer):
    """A sentinel of the service.

    :param password: what it asks of its clients.
    :param servers_password: what the servers ask of it.
    """

    def __init__(
        self, name: str, primary: int, *, down_after: float, password: str | None, servers_password: str | None
    ) -> None:
        super().__init__(name)
        self.password = password
        lines = [
            f"port {self.port}",
            f"dir {self.folder}",
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary} 2",
            f"sentinel down-after-milliseconds {SERVICE} {down_after * 1000:.0f}",
            f"sentinel failover-timeout {SERVICE} 3000",
            f"sentinel parallel-syncs {SERVICE} 2",
        ]
        if password is not None:
            lines += [f"requirepass {password}", f"sentinel sentinel-pass {password}"]
        if servers_password is not None:
            lines.append(f"sentinel auth-pass {SERVICE} {servers_password}")
        self._file = self.folder / "sentinel.conf"
        self._file.write_text("\n".join(lines) + "\n")

    def command(self) -> list[str]:
        return [server_binary(self.name), str(self._file), "--sentinel"]

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=10, password=self.password)

    def _is_ours(self, client: redis.Redis) -> bool:
        info: Any = client.info("server")
        return bool(info["process_id"] == self.pid)

    def ask(self, *words: str) -> Any:
        with self.client() as client:
            untyped: Any = client
            # In two words, for which redis-py has no parser of its own: they differ from version to version.
            return untyped.execute_command("SENTINEL", *words)

    def state(self) -> dict[str, str]:
        """What it knows of the service."""
        flat = self.ask("MASTER", SERVICE)
        if not isinstance(flat, dict):  # RESP2
            flat = dict(zip(flat[::2], flat[1::2], strict=True))
        return {name.decode(): value.decode() for name, value in flat.items()}


class SentinelSet:
    """A primary, two replicas and three sentinels.

    :param options: of each server.
    :param down_after: after so many seconds of silence a server counts as down. Long enough for a busy machine, on which a
        server that is well takes its time.
    :param password: of the sentinels.
    :param servers_password: of the servers.
    """

    def __init__(
        self,
        name: str,
        *,
        options: tuple[str, ...] = (),
        down_after: float = 1.5,
        password: str | None = None,
        servers_password: str | None = None,
    ) -> None:
        if servers_password is not None:
            options = (*options, "--requirepass", servers_password, "--masterauth", servers_password)
        self._make_member = partial(Member, name, *options)
        self._make_sentinel = partial(
            RunningSentinel, name, down_after=down_after, password=password, servers_password=servers_password
        )
        self._make()

    def _make(self) -> None:
        self.members = [self._make_member() for _ in range(3)]
        for replica in self.members[1:]:
            replica.follows = self.members[0].port
        self.sentinels = [self._make_sentinel(self.members[0].port) for _ in range(3)]

    @property
    def url(self) -> str:
        return self.url_by(self.sentinels)

    def url_by(self, sentinels: Sequence[RunningSentinel]) -> str:
        addresses = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
        return f"redis+sentinel://{addresses}/{SERVICE}"

    def client(self) -> redis.Redis:
        """A client of the primary."""
        return self.primary.client()

    def __enter__(self) -> SentinelSet:  # noqa: PYI034
        try:
            self._start()
            wait_until(lambda: self.is_complete, "all to know each other", every=0.05)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for _ in range(4):
            try:
                for server in (*self.members, *self.sentinels):
                    server.start()
            except RuntimeError as error:
                if "Address already in use" not in str(error):
                    raise
                # All of them anew: they know each other by their ports.
                self.__exit__()
                self._make()
            else:
                return
        raise RuntimeError("no free ports")

    def __exit__(self, *_: object) -> None:
        for server in (*self.sentinels, *self.members):
            server.stop()

    @property
    def is_complete(self) -> bool:
        """Whether one is the primary for all sentinels, the others follow it, and the sentinels know all of them."""
        ports = {self.primary_by(sentinel) for sentinel in self.sentinels}
        if len(ports) != 1:
            return False
        with contextlib.suppress(redis.exceptions.RedisError):
            for member in self.members:
                if member.port in ports:
                    if member.role != "master":
                        return False
                elif not member.is_in_step:
                    return False
            states = [sentinel.state() for sentinel in self.sentinels]
            return all(
                (state["num-slaves"], state["num-other-sentinels"], state["flags"])
                == (str(len(self.members) - 1), str(len(self.sentinels) - 1), "master")
                for state in states
            )
        return False

    def primary_by(self, sentinel: RunningSentinel) -> int:
        """The port of the primary, as this sentinel knows it."""
        return int(sentinel.ask("GET-MASTER-ADDR-BY-NAME", SERVICE)[1])

    @property
    def primary(self) -> Member:
        """The primary on which all sentinels agree."""
        wait_until(lambda: len({self.primary_by(sentinel) for sentinel in self.sentinels}) == 1, "them to agree")
        port = self.primary_by(self.sentinels[0])
        return next(member for member in self.members if member.port == port)

    def kill_primary(self) -> tuple[Member, Member, float]:
        """Kill the primary. Returns it, its successor, and after how many seconds the sentinels named that one."""
        old = self.primary
        began = time.monotonic()
        old.kill(signal.SIGKILL)
        wait_until(lambda: self.primary_by(self.sentinels[0]) != old.port, "a failover", every=0.02)
        return old, self.primary, time.monotonic() - began

    def switch(self) -> None:
        """Let another one be the primary, and the old one live. Returns when it follows."""
        old = self.primary
        self.sentinels[0].ask("FAILOVER", SERVICE)
        wait_until(lambda: self.primary is not old, "the switch", every=0.02)
        wait_until(lambda: self.is_complete, "all to follow", every=0.05)

    def freeze_primary(self) -> Member:
        old = self.primary
        os.kill(old.pid, signal.SIGSTOP)
        return old

    def wake(self, member: Member) -> None:
        os.kill(member.pid, signal.SIGCONT)

    def reunite(self) -> None:
        """Let every server follow the primary of now, as the sentinels will do some seconds later."""
        primary = self.primary
        for member in self.members:
            if member is not primary and member.role == "master":
                with member.client() as client:
                    client.replicaof("127.0.0.1", primary.port)
        wait_until(lambda: self.is_complete, "all to follow the primary", every=0.05)

    def bring_back(self, member: Member) -> None:
        """Start a killed one. It follows the primary of now."""
        member.follows = self.primary.port
        member.start()
        wait_until(lambda: self.is_complete, "it to follow the new primary", every=0.05)
