"""Real clusters: three primaries with a replica each, started on free ports and stopped by their tests."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import time
from functools import partial
from typing import Any

import redis
import redis.exceptions
from harness import HOUR
from processes import wait_until
from redis.cluster import RedisCluster
from servers import RunningServer

from anybus.backends.redis._slots import SLOTS, slot_of

PRIMARIES = 3


def cluster_port() -> int:
    """A free port of which the one 10,000 above is free as well: the nodes talk there."""
    while True:
        port = random.randrange(15000, 30000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10000))
            return port


class ClusterNode(RunningServer):
    """A server in cluster mode. It keeps its identity on disk."""

    def __init__(self, name: str, *options: str, node_timeout: float = 2.0) -> None:
        super().__init__(
            name,
            *("--cluster-enabled", "yes", "--cluster-node-timeout", f"{node_timeout * 1000:.0f}"),
            *("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1"),
            *("--cluster-migration-barrier", "9"),  # replicas stay with their primary
            *options,
        )

    @staticmethod
    def pick_port() -> int:
        return cluster_port()

    def ask(self, *words: str | int | bytes) -> Any:
        with self.client() as client:
            untyped: Any = client
            # In one argument, so that redis-py has no parser of its own for the reply.
            untyped.response_callbacks.clear()
            return untyped.execute_command(*words)

    @property
    def peer_port(self) -> int:
        """The port that the other nodes know."""
        return self.port

    @property
    def id(self) -> str:
        reply: bytes = self.ask("CLUSTER", "MYID")
        return reply.decode()

    def info(self) -> dict[str, str]:
        reply: bytes = self.ask("CLUSTER", "INFO")
        return dict(line.split(":", 1) for line in reply.decode().splitlines() if ":" in line)

    @property
    def is_primary(self) -> bool:
        return bool(self.ask("ROLE")[0] == b"master")

    @property
    def follows(self) -> int:
        """The port of a replica's primary."""
        return int(self.ask("ROLE")[2])

    @property
    def is_in_step(self) -> bool:
        role = self.ask("ROLE")
        return bool(role[0] == b"slave" and role[3] == b"connected")


class RunningCluster:
    """A cluster of its own.

    :param replicas: of each primary.
    """

    node_type: type[ClusterNode] = ClusterNode

    def __init__(self, name: str, *options: str, replicas: int = 1, node_timeout: float = 2.0) -> None:
        self.name = name
        make = partial(self.node_type, name, *options, node_timeout=node_timeout)
        self.nodes = [make() for _ in range(PRIMARIES * (1 + replicas))]

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}"

    def client(self) -> RedisCluster:
        return RedisCluster(host="127.0.0.1", port=self.alive[0].port, socket_timeout=10)

    @property
    def alive(self) -> list[ClusterNode]:
        return [node for node in self.nodes if node.is_running]

    def __enter__(self) -> RunningCluster:  # noqa: PYI034
        try:
            for node in self.nodes:
                node.__enter__()
            self._join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.stop()

    def _join(self) -> None:
        primaries, replicas = self.nodes[:PRIMARIES], self.nodes[PRIMARIES:]
        for number, node in enumerate(primaries):
            first, last = SLOTS * number // PRIMARIES, SLOTS * (number + 1) // PRIMARIES
            node.ask("CLUSTER", "ADDSLOTS", *range(first, last))
        for number, node in enumerate(self.nodes, 1):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number)
            if node is not self.nodes[0]:
                node.ask("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].peer_port)
        everybody = str(len(self.nodes))
        wait_until(lambda: all(node.info()["cluster_known_nodes"] == everybody for node in self.nodes), "them to meet")
        for number, node in enumerate(replicas):
            self._replicate(node, primaries[number % PRIMARIES])
        wait_until(lambda: self.is_well, "the cluster to work", every=0.05)

    @staticmethod
    def _replicate(node: ClusterNode, primary: ClusterNode) -> None:
        def replicates() -> bool:
            with contextlib.suppress(redis.exceptions.ResponseError):
                return bool(node.ask("CLUSTER", "REPLICATE", primary.id) == b"OK")
            return False

        wait_until(replicates, "a node to know its primary", every=0.05)

    @property
    def is_well(self) -> bool:
        """Whether all nodes agree on who serves which slot, and all replicas are in step."""
        try:
            alive = self.alive
            owners = {str(sorted(self._ranges(node))) for node in alive}
            return (
                len(owners) == 1
                and all(node.info()["cluster_state"] == "ok" for node in alive)
                and all(node.is_primary or node.is_in_step for node in alive)
                and sum(node.is_primary for node in alive) == PRIMARIES
            )
        except (redis.exceptions.RedisError, IndexError):
            return False

    @staticmethod
    def _ranges(node: ClusterNode) -> list[tuple[int, int, int]]:
        return [(first, last, nodes[0][1]) for first, last, *nodes in node.ask("CLUSTER", "SLOTS")]

    def owner(self, slot: int) -> ClusterNode:
        """The primary of a slot, as all nodes that are alive say."""
        ports: set[int] = set()

        def agree() -> bool:
            ports.clear()
            with contextlib.suppress(redis.exceptions.RedisError):
                for node in self.alive:
                    ports.update(port for first, last, port in self._ranges(node) if first <= slot <= last)
                return len(ports) == 1
            return False

        wait_until(agree, f"the nodes to agree on slot {slot}", every=0.02)
        return next(node for node in self.nodes if node.port in ports)

    def owner_of(self, stream: str) -> ClusterNode:
        return self.owner(slot_of(stream))

    def kill_owner(self, stream: str) -> tuple[ClusterNode, float]:
        """Kill the primary of a stream. Returns it, and after how many seconds another one had taken its place."""
        slot = slot_of(stream)
        old = self.owner(slot)
        began = time.monotonic()
        old.kill(signal.SIGKILL)
        wait_until(lambda: self.owner(slot) is not old, "a replica to take its place", every=0.02)
        return old, time.monotonic() - began

    def switch(self, stream: str) -> None:
        """Let the replica of a stream's primary take its place, while both live."""
        slot = slot_of(stream)
        old = self.owner(slot)
        wait_until(lambda: self.is_well, "the replicas to be in step")
        replica = next(node for node in self.alive if not node.is_primary and node.follows == old.port)
        asked = -HOUR

        def is_done() -> bool:
            nonlocal asked
            if time.monotonic() - asked > 6 and not replica.is_primary:  # the servers give up after 5 s
                asked = time.monotonic()
                replica.ask("CLUSTER", "FAILOVER")
            return self.owner(slot) is replica

        wait_until(is_done, "the switch", every=0.02)

    def bring_back(self, node: ClusterNode) -> None:
        node.start()
        wait_until(lambda: self.is_well, "it to be a replica", every=0.05)

    def begin_move(self, stream: str, target: ClusterNode) -> ClusterNode:
        """Begin to move the slot of a stream. Returns the node that has it."""
        slot = slot_of(stream)
        source = self.owner(slot)
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        return source

    def keys(self, node: ClusterNode, stream: str) -> list[bytes]:
        keys: list[bytes] = node.ask("CLUSTER", "GETKEYSINSLOT", slot_of(stream), 1000)
        return keys

    def move_keys(self, source: ClusterNode, target: ClusterNode, keys: list[bytes]) -> None:
        if keys:
            source.ask("MIGRATE", "127.0.0.1", target.port, "", 0, 10000, "KEYS", *keys)

    def end_move(self, stream: str, source: ClusterNode, target: ClusterNode) -> None:
        slot = slot_of(stream)
        while keys := self.keys(source, stream):
            self.move_keys(source, target, keys)
        for node in (target, source, *(node for node in self.alive if node.is_primary)):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", target.id)
        wait_until(lambda: self.owner(slot) is target, "the slot to be there", every=0.02)

    def move_at_once(self, stream: str) -> bool:
        """Move the slot of a stream in one step (Valkey 9 and newer). Returns false if the servers cannot."""
        slot = slot_of(stream)
        source = self.owner(slot)
        target = self.another(source)
        try:
            source.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", target.id)
        except redis.exceptions.ResponseError as error:
            if "unknown subcommand" in str(error).lower():
                return False
            raise
        wait_until(lambda: self.owner(slot) is target, "the slot to be there", every=0.02)
        return True

    def another(self, source: ClusterNode) -> ClusterNode:
        return next(node for node in self.nodes if node is not source and node.is_primary)
