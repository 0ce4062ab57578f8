"""A real cluster with its own TLS, certificates of a private authority, and a user with the documented rights.

The specification:

- ``rediss+cluster://``, ``rediss://`` of one node, and redis-py's clients of a cluster lead to all nodes by TLS, as a
  user with the rights that the docs name.
- The certificate must be valid for the addresses that the nodes announce. If it is not, the error says so. Nodes that
  announce host names are connected to by these.
- A node that announces nothing usable is reached at the address at which it was asked.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from acl import SECRET
from anyio import to_thread
from clusters import ClusterNode, RunningCluster, cluster_port
from harness import QUICK, Recorder, new_topic, quick, until
from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster
from redis.cluster import RedisCluster
from test_cluster_edges import ON_A_CLUSTER
from test_redis_rights import DOCUMENTED

from anybus import BackendError, Delivery, Message, StreamBus, SubscriptionConfig
from anybus.backends.redis import RedisBackend

SERVER = "redis70"
"""The only one of the servers that was built with TLS."""


class TlsNode(ClusterNode):
    """It speaks TLS to clients and to the other nodes. The tests look at it through a port without."""

    def __init__(self, name: str, *options: str, node_timeout: float = 2.0) -> None:
        self.tls_port = cluster_port()
        super().__init__(name, "--tls-port", str(self.tls_port), *options, node_timeout=node_timeout)

    @property
    def peer_port(self) -> int:
        return self.tls_port


class TlsCluster(RunningCluster):
    node_type = TlsNode

    @property
    def ports(self) -> list[int]:
        return [node.tls_port for node in self.nodes if isinstance(node, TlsNode)]

    def announce(self, host: str, kind: str) -> None:
        """Let all nodes announce this host name, and clients be told the one kind of address."""
        for node in self.nodes:
            node.ask("CONFIG", "SET", "cluster-announce-hostname", host)
            node.ask("CONFIG", "SET", "cluster-preferred-endpoint-type", kind)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name, names in (("both", ("localhost", "127.0.0.1")), ("name", ("localhost",))):
        authority.issue_cert(*names).private_key_and_cert_chain_pem.write_to_path(str(folder / f"{name}.pem"))
    return folder


def started(certificates: Path, certificate: str) -> Iterator[TlsCluster]:
    files = {"cert": certificates / f"{certificate}.pem", "key": certificates / f"{certificate}.pem"}
    named = {**files, "ca-cert": certificates / "ca.pem"}
    options = [part for key, file in named.items() for part in (f"--tls-{key}-file", str(file))]
    switches = ("--tls-auth-clients", "no", "--tls-replication", "yes", "--tls-cluster", "yes")
    try:
        running = TlsCluster(SERVER, *options, *switches, replicas=0)
        running.__enter__()
    except (LookupError, RuntimeError):
        pytest.skip("no server with TLS is installed")
    try:
        yield running
    finally:
        running.__exit__()


@pytest.fixture(scope="module")
def tls(certificates: Path) -> Iterator[TlsCluster]:
    """Its certificate is valid for the host name and for the address."""
    yield from started(certificates, "both")


@pytest.fixture(scope="module")
def tls_by_name(certificates: Path) -> Iterator[TlsCluster]:
    """Its certificate is valid for the host name only."""
    yield from started(certificates, "name")


@pytest.fixture
async def worker(tls: TlsCluster) -> AsyncGenerator[str, None]:
    """A user with the documented rights, on all nodes."""
    assert DOCUMENTED is not None
    assert ON_A_CLUSTER is not None
    rules = (*DOCUMENTED[1].split(), *ON_A_CLUSTER[1].split())
    for node in tls.nodes:
        await to_thread.run_sync(node.ask, "ACL", "SETUSER", "worker", "on", f">{SECRET}", *rules)
    yield "worker"
    for node in tls.nodes:
        await to_thread.run_sync(node.ask, "ACL", "DELUSER", "worker")


def topic_on(node: ClusterNode, cluster: RunningCluster) -> str:
    while True:
        topic = f"orders.{new_topic()}"
        if cluster.owner_of(topic) is node:
            return topic


async def work_everywhere(backend: RedisBackend, cluster: RunningCluster) -> None:
    """A message, a retry and a dead letter on every node."""
    topics = await to_thread.run_sync(lambda: [topic_on(node, cluster) for node in cluster.nodes])
    handled: list[str] = []

    async def handler(delivery: Delivery) -> None:
        handled.append(delivery.message.topic)
        raise ValueError("a retry, and then a dead letter")

    async with StreamBus(backend, quick(Recorder())) as bus:
        for topic in topics:
            async with bus.subscribe(SubscriptionConfig(topic, "g", max_retry=1, retry_backoff=QUICK), handler) as work:
                await bus.publish(Message(topic))
                await until(lambda work=work: work.statistics().dead_lettered == 1, "the dead letter")  # type: ignore[misc]
    assert handled == [topic for topic in topics for _ in range(2)]


async def test_all_nodes_are_reached_by_tls_as_a_user_with_the_documented_rights(
    tls: TlsCluster, worker: str, certificates: Path
) -> None:
    authority = certificates / "ca.pem"
    options = f"ssl_ca_certs={authority}"
    await work_everywhere(RedisBackend(f"rediss+cluster://{worker}:{SECRET}@localhost:{tls.ports[0]}?{options}"), tls)
    await work_everywhere(RedisBackend(f"rediss://{worker}:{SECRET}@127.0.0.1:{tls.ports[1]}?{options}"), tls)


async def test_clients_of_a_cluster_bring_their_tls_and_user(tls: TlsCluster, worker: str, certificates: Path) -> None:
    more: dict[str, Any] = {
        "host": "localhost",
        "port": tls.ports[0],
        "username": worker,
        "password": SECRET,
        "ssl": True,
        "ssl_ca_certs": str(certificates / "ca.pem"),
    }
    await work_everywhere(RedisBackend.from_client_settings(AsyncRedisCluster(**more)), tls)
    # The synchronous client asks the cluster when it is made, and needs rights of its own for that.
    for node in tls.nodes:
        await to_thread.run_sync(node.ask, "ACL", "SETUSER", worker, "+command", "+cluster", "+readonly")
    client = await to_thread.run_sync(lambda: RedisCluster(**more))
    try:
        await work_everywhere(RedisBackend.from_client_settings(client), tls)
    finally:
        await to_thread.run_sync(client.close)
    url = f"rediss://{worker}:{SECRET}@localhost:{tls.ports[0]}?ssl_ca_certs={certificates / 'ca.pem'}"
    await work_everywhere(RedisBackend.from_client_settings(AsyncRedisCluster.from_url(url)), tls)


async def test_a_certificate_must_be_valid_for_what_the_nodes_announce(
    tls_by_name: TlsCluster, certificates: Path
) -> None:
    url = f"rediss+cluster://localhost:{tls_by_name.ports[0]}?ssl_ca_certs={certificates / 'ca.pem'}"
    with pytest.raises(BackendError, match="certificate is not accepted") as caught:
        async with RedisBackend(url):
            pass
    assert "127.0.0.1" in str(caught.value)
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    await to_thread.run_sync(tls_by_name.announce, "localhost", "hostname")
    try:
        await until_announced(tls_by_name, b"localhost")
        await work_everywhere(RedisBackend(url), tls_by_name)
        await work_everywhere(RedisBackend(url.replace("rediss+cluster", "rediss")), tls_by_name)
    finally:
        await to_thread.run_sync(tls_by_name.announce, "", "ip")


@pytest.mark.parametrize("kind", ["unknown-endpoint", "hostname"])
async def test_a_node_without_a_usable_address_is_at_the_host_that_was_asked(
    tls_by_name: TlsCluster, certificates: Path, kind: str
) -> None:
    """``unknown-endpoint`` announces nothing at all; ``hostname`` without a host name announces a question mark."""
    await to_thread.run_sync(tls_by_name.announce, "", kind)
    try:
        await until_announced(tls_by_name, None if kind == "unknown-endpoint" else b"?")
        url = f"rediss+cluster://localhost:{tls_by_name.ports[0]}?ssl_ca_certs={certificates / 'ca.pem'}"
        async with RedisBackend(url) as backend:
            for node in tls_by_name.nodes:
                topic = await to_thread.run_sync(topic_on, node, tls_by_name)
                assert await backend.publish(topic, Message(topic))
            # A redirection leaves the host out, too.
            assert backend._cluster is not None
            topology: Any = backend._cluster.topology
            topology.map.owners = [topology.map.owners[0]] * len(topology.map.owners)
            topology._direct.clear()
            assert await backend.publish(topic, Message(topic))
    finally:
        await to_thread.run_sync(tls_by_name.announce, "", "ip")


async def until_announced(cluster: RunningCluster, host: bytes | None) -> None:
    def told() -> set[bytes | None]:
        return {slots[2][0] for node in cluster.nodes for slots in node.ask("CLUSTER", "SLOTS")}

    async def all_say() -> bool:
        return await to_thread.run_sync(told) == {host}

    await until(all_say, f"all nodes to announce {host!r}")
