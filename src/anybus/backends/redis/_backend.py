"""The backend on Redis Streams: finds the server of a stream. (What is done there is in ``_node``.)"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any, Final, TypeVar

import anyio
from anyio.abc import TaskGroup

from ..._codec import JsonCodec
from ..._ground.errors import EventBusError
from ..._messages.message import Message
from ...abc import (
    Claim,
    Codec,
    CompletionKeeper,
    DeadLetterStore,
    DelayedPage,
    Feature,
    FetchedEntry,
    IdempotencyStore,
    KeyedTransfer,
    LeaseKeeper,
    Move,
    Output,
    PendingEntry,
    PublishItem,
    PublishSpec,
    Redelivered,
    RightsChecker,
    SharedWaiting,
    StoredEntry,
    StreamBackend,
    StreamInspector,
    TimedPublisher,
    TransferItem,
)
from ._client import Client
from ._completions import RedisStore
from ._mover import DueMover
from ._node import Node
from ._retention import RetentionEverywhere
from ._scatter import Scatter
from ._schedules import Expect, RedisScheduleStore
from ._server import ClusterModeError
from ._settings import Settings, from_client, from_url
from ._slots import slot_of
from ._taking import Taking
from ._ticks import TicksEverywhere
from ._topology import Topology

T = TypeVar("T")


class Cluster:
    """What a backend has on a cluster, instead of one server."""

    def __init__(self, settings: Settings, codec: Codec, expect: Expect) -> None:
        self.topology = Topology(settings, codec, expect)
        self.scatter = Scatter(self.topology, codec)


class RedisBackend(
    anyio.AsyncContextManagerMixin,
    StreamBackend,
    StreamInspector,
    SharedWaiting,
    RightsChecker,
    TimedPublisher,
    DeadLetterStore,
    LeaseKeeper,
    RetentionEverywhere,
    CompletionKeeper,
    RedisScheduleStore,
    TicksEverywhere,
):
    """Streams on Redis 6.2 and newer, and on Valkey.

    One multiplexed connection carries all commands that do not block. Blocking reads have connections of their own.

    :param url: ``redis://``, ``rediss://`` (TLS, verified) or ``unix://``, with user, password, database and redis-py's
        ``ssl_…`` options in its query. ``valkey://`` means ``redis://``, ``valkeys://`` means ``rediss://``.
        ``redis+sentinel://host,host/service`` means the primary that these sentinels name.
        ``redis+cluster://host,host`` means the cluster to which these nodes belong; so does a plain URL of one node.
    :param codec: how messages are encoded; None = JSON, compatible with the existing Rust and Go buses.
    :param connect_timeout: the time limit in seconds for TCP and TLS to connect. After that, while a connection is set
        up: how many seconds the server may be silent.
    :param command_timeout: a connection counts as dead after this many seconds of silence while a reply is expected.
    :raises ValidationError: if the URL is invalid.
    """

    features: frozenset[Feature] = frozenset(
        {
            "renew",
            "release",
            "fence",
            "delivery_count",
            "atomic_transfer",
            "raw",
            "delay",
            "dedup",
            "confirm",
            "inspect",
            "trim",
        }
    )

    def __init__(
        self,
        url: str = "redis://localhost",
        *,
        codec: Codec | None = None,
        connect_timeout: float = 5.0,
        command_timeout: float = 5.0,
    ) -> None:
        self._configure(from_url(url, connect_timeout=connect_timeout, command_timeout=command_timeout), codec)

    @classmethod
    def from_client_settings(
        cls, client: Any, *, codec: Codec | None = None, connect_timeout: float = 5.0, command_timeout: float = 5.0
    ) -> RedisBackend:
        """Create a backend with the host, TLS settings, credentials and database of a configured redis-py client.

        For a client behind sentinels (``Sentinel.master_for``), the sentinels are asked instead. For a
        ``RedisCluster``, its startup nodes are asked for the others.

        The backend opens its own connections. It does not use the client, its pool or its timeouts.

        :raises ValidationError: if it is not a redis-py client.
        :raises UnsupportedError: if it is a client for replicas, if it checks certificates by OCSP, if its sentinels
            have ``min_other_sentinels`` or ``force_master_ip``, or if it is for a cluster and has ``address_remap``.
        """
        backend = cls.__new__(cls)
        settings = from_client(client, connect_timeout=connect_timeout, command_timeout=command_timeout)
        backend._configure(settings, codec)
        return backend

    def _configure(self, settings: Settings, codec: Codec | None) -> None:
        self._is_entered = False
        self._direct: set[str] = set()
        self._settings = settings
        self._codec = codec or JsonCodec()
        self._mover = DueMover(self._append_due, self._due_within, self._kept_together)
        self._single = None if settings.seeds else Node(settings, self._codec, self._mover.expect)
        self._cluster = Cluster(settings, self._codec, self._mover.expect) if settings.seeds else None

    @property
    def _node(self) -> Node:
        """The only server."""
        assert self._single is not None
        return self._single

    @property
    def _client(self) -> Client:
        return self._node.client

    @property
    def _taking(self) -> Taking:
        return self._node.taking

    def __repr__(self) -> str:
        place = self._client.mux if self._cluster is None else self._cluster.topology
        return f"<RedisBackend {self._settings.place} {'connected' if place.is_connected else 'not connected'}>"

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[RedisBackend, None]:
        if self._is_entered:
            raise RuntimeError("this RedisBackend has already been entered: create one for each bus")
        self._is_entered = True
        failure: BaseException | None = None
        alarmed: BaseException | None = None
        cancelled = False
        try:
            async with anyio.create_task_group() as tasks:

                def alarm(error: BaseException) -> None:
                    nonlocal alarmed
                    alarmed = alarmed or error
                    tasks.cancel_scope.cancel()

                try:
                    await self._open(tasks, alarm)
                    yield self
                except anyio.get_cancelled_exc_class():
                    cancelled = True
                    raise
                except BaseException as error:
                    failure = error
                finally:
                    await self._close()  # noqa: ASYNC102 - shielded inside
        finally:
            self._is_entered = False
            if alarmed is not None:
                raise alarmed from failure
        if failure is not None:
            raise failure
        if cancelled:
            # A native asyncio cancellation can coincide with an internal one, used for opening a connection. The task
            # group then takes it for its own, and swallows it. It must not get lost, so a new one is raised.
            raise anyio.get_cancelled_exc_class()

    async def _open(self, tasks: TaskGroup, alarm: Callable[[BaseException], None]) -> None:
        self._mover.start(tasks, alarm)
        if self._single is not None:
            self._single.start(tasks, alarm)
            try:
                await self._single.connect(tasks, alarm)
            except ClusterModeError:
                await self._single.aclose()
                self._call_no_longer_directly()
                self._settings = self._settings.as_cluster(self._settings)
                self._cluster = Cluster(self._settings, self._codec, self._mover.expect)
                self._single = None
            else:
                self._call_directly(self._single, _METHODS)
        if self._cluster is not None:
            await self._cluster.topology.open(tasks, alarm)
            self._call_directly(self._cluster.topology, ("publish_within",))

    async def _close(self) -> None:
        self._mover.close()
        if self._single is not None:
            await self._single.aclose()
        if self._cluster is not None:
            await self._cluster.topology.aclose()

    def _call_directly(self, part: object, names: Iterable[str]) -> None:
        """Methods of a part become this object's own, except where a subclass or a caller has others."""
        for name in names:
            if name not in vars(self) and getattr(type(self), name) is getattr(RedisBackend, name):
                setattr(self, name, getattr(part, name))
                self._direct.add(name)

    def _call_no_longer_directly(self) -> None:
        """The server was a single one when this was entered before."""
        for name in self._direct:
            delattr(self, name)
        self._direct.clear()

    async def _at(self, stream: str, do: Callable[[Node], Awaitable[T]], *, asks: bool = False) -> T:
        """Do something on the server of a stream.

        :param asks: as in ``Topology.at``.
        """
        if self._cluster is None:
            return await do(self._node)
        return await self._cluster.topology.at(stream, do, asks=asks)

    @property
    def _is_cluster(self) -> bool:
        return self._cluster is not None

    async def _reading(self, stream: str, group: str, consumer: str, do: Callable[[Node], Awaitable[T]]) -> T:
        """The same for a blocking read."""
        if self._cluster is None:
            return await do(self._node)
        return await self._cluster.topology.reading((stream, group, consumer), do)

    async def publish(self, stream: str, message: Message) -> str:
        return await self._at(stream, lambda node: node.publish(stream, message), asks=True)

    async def publish_with(self, stream: str, message: Message, spec: PublishSpec) -> str:
        return await self._at(stream, lambda node: node.publish_with(stream, message, spec), asks=True)

    async def publish_within(self, stream: str, message: Message, *, timeout: float) -> str:
        where = self._node if self._cluster is None else self._cluster.topology
        return await where.publish_within(stream, message, timeout=timeout)

    async def publish_many(self, items: Sequence[PublishItem]) -> list[str | EventBusError]:
        return await (self._node if self._cluster is None else self._cluster.scatter).publish_many(items)

    async def publish_later(
        self,
        stream: str,
        message: Message,
        *,
        delay: float | None = None,
        at: datetime | None = None,
        spec: PublishSpec | None = None,
    ) -> str:
        return await self._at(stream, lambda node: node.publish_later(stream, message, delay=delay, at=at, spec=spec))

    async def cancel_later(self, stream: str, schedule_id: str) -> bool:
        return await self._at(stream, lambda node: node.cancel_later(stream, schedule_id))

    async def delayed_page(self, stream: str, *, after: str | None, count: int, max_bytes: int) -> DelayedPage:
        return await self._at(
            stream, lambda node: node.delayed_page(stream, after=after, count=count, max_bytes=max_bytes)
        )

    async def _append_due(self, stream: str) -> float | None:
        return await self._at(stream, lambda node: node.append_due(stream))

    async def _due_within(self, streams: Sequence[str], seconds: float) -> list[float | None]:
        return await self._at(streams[0], lambda node: node.due_within(streams, seconds))

    def _kept_together(self, stream: str) -> Hashable:
        return None if self._cluster is None else slot_of(stream)

    async def check_rights(self, stream: str, retry_stream: str, group: str, *, dead_letter_topic: str | None) -> None:
        if self._cluster is not None and dead_letter_topic is not None:
            slot_of(dead_letter_topic)  # otherwise every dead letter would be refused
        await self._at(
            stream, lambda node: node.check_rights(stream, retry_stream, group, dead_letter_topic=dead_letter_topic)
        )

    async def create_group(self, stream: str, group: str, start_id: str = "$") -> bool:
        return await self._at(stream, lambda node: node.create_group(stream, group, start_id))

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        return await self._reading(
            *(stream, group, consumer),
            lambda node: node.read_new(stream, group, consumer, count=count, timeout=timeout),
        )

    async def read_when_new(
        self, stream: str, group: str, consumer: str, *, count: int, block: float, timeout: float
    ) -> list[FetchedEntry]:
        return await self._reading(
            *(stream, group, consumer),
            lambda node: node.read_when_new(stream, group, consumer, count=count, block=block, timeout=timeout),
        )

    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        return await self._at(
            stream, lambda node: node.reclaim_idle(stream, group, consumer, min_idle=min_idle, count=count)
        )

    async def redeliver(
        self, stream: str, retry_stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> Redelivered:
        return await self._at(
            stream,
            lambda node: node.redeliver(stream, retry_stream, group, consumer, min_idle=min_idle, count=count),
        )

    async def until_pass_is_due(
        self, stream: str, retry_stream: str, group: str, consumer: str, *, min_idle: float, interval: float
    ) -> None:
        def wait(node: Node) -> Awaitable[None]:
            return node.until_pass_is_due(stream, retry_stream, group, consumer, min_idle=min_idle, interval=interval)

        try:
            await self._at(stream, wait)
        except EventBusError:
            await anyio.sleep(interval)  # the pass that follows meets the same error, and raises it

    async def ack(self, stream: str, group: str, message_id: str) -> None:
        await self._at(stream, lambda node: node.ack(stream, group, message_id))

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        return await self._at(stream, lambda node: node.ack_many(stream, group, message_ids, consumer=consumer))

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        return await self._at(stream, lambda node: node.renew(stream, group, consumer, message_ids))

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        await self._at(stream, lambda node: node.release(stream, group, consumer, message_ids))

    async def forget_consumer(self, stream: str, group: str, consumer: str) -> None:
        try:
            with suppress(EventBusError):
                await self._at(stream, lambda node: node.forget_consumer(stream, group, consumer))
        finally:
            if self._cluster is not None:
                await self._cluster.topology.forget((stream, group, consumer))  # noqa: ASYNC102 - shielded inside

    async def transfer(
        self, stream: str, group: str, consumer: str, message_id: str, outputs: Sequence[Output]
    ) -> list[str] | None:
        [result] = await self.transfer_many(stream, group, consumer, ((message_id, outputs),))
        if isinstance(result, EventBusError):
            raise result
        return result

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[list[str] | EventBusError | None]:
        where = self._node if self._cluster is None else self._cluster.scatter
        return await where.transfer_many(stream, group, consumer, items)

    async def count_entries(self, stream: str) -> int:
        return await self._at(stream, lambda node: node.count_entries(stream))

    async def pending_entries(self, stream: str, group: str, *, limit: int = 1000) -> list[PendingEntry]:
        return await self._at(stream, lambda node: node.pending_entries(stream, group, limit=limit))

    async def consumer_names(self, stream: str, group: str) -> list[str]:
        return await self._at(stream, lambda node: node.consumer_names(stream, group))

    async def agree_lease(self, stream: str, group: str, consumer: str, lease: float, *, change: bool = False) -> float:
        return await self._at(stream, lambda node: node.agree_lease(stream, group, consumer, lease, change=change))

    async def kept_lease(self, stream: str, group: str, consumer: str, lease: float) -> float:
        return await self._at(stream, lambda node: node.kept_lease(stream, group, consumer, lease))

    async def until_lease_changes(self, stream: str, group: str, consumer: str, lease: float) -> float:
        return await self._at(stream, lambda node: node.until_lease_changes(stream, group, consumer, lease))

    @property
    def idempotency_store(self) -> IdempotencyStore:
        """Keys are kept beside their topic, on the same server."""
        return RedisStore(self)

    async def settle_keyed(
        self, topic: str, stream: str, group: str, consumer: str, items: Sequence[KeyedTransfer], *, window: float
    ) -> list[list[str] | EventBusError | None]:
        where = self._node if self._cluster is None else self._cluster.scatter
        return await where.settle_keyed(topic, stream, group, consumer, items, window=window)

    async def claim_keys(
        self, topic: str, group: str, consumer: str, items: Sequence[tuple[str, str]], *, lease: float
    ) -> list[Claim]:
        return await self._at(topic, lambda node: node.claim_keys(topic, group, consumer, items, lease=lease))

    async def check_key_rights(self, topic: str, group: str) -> None:
        await self._at(topic, lambda node: node.check_key_rights(topic, group))

    async def renew_keys(self, topic: str, group: str, keys: Sequence[str], consumer: str, *, lease: float) -> None:
        """For the backend's own store, as its ``renew``."""
        await self._at(topic, lambda node: node.renew_keys(topic, group, keys, consumer, lease=lease))

    async def end_keys(
        self, topic: str, group: str, keys: Sequence[str], consumer: str, *, window: float | None
    ) -> None:
        """For the backend's own store: its ``complete`` or, without a window, its ``release``."""
        await self._at(topic, lambda node: node.end_keys(topic, group, keys, consumer, window=window))

    async def last_entry_id(self, stream: str) -> str | None:
        return await self._at(stream, lambda node: node.last_entry_id(stream))

    async def read_page(
        self, stream: str, *, after: str | None, until: str, count: int, max_bytes: int, max_entry_bytes: int
    ) -> list[StoredEntry]:
        return await self._at(
            stream,
            lambda node: node.read_page(
                stream, after=after, until=until, count=count, max_bytes=max_bytes, max_entry_bytes=max_entry_bytes
            ),
        )

    async def read_entry(self, stream: str, entry_id: str, *, max_entry_bytes: int) -> StoredEntry | None:
        return await self._at(stream, lambda node: node.read_entry(stream, entry_id, max_entry_bytes=max_entry_bytes))

    async def has_group(self, stream: str, group: str) -> bool:
        return await self._at(stream, lambda node: node.has_group(stream, group))

    async def move_entries(self, stream: str, moves: Sequence[Move]) -> list[str | EventBusError | None]:
        return await (self._node if self._cluster is None else self._cluster.scatter).move_entries(stream, moves)

    async def remove_entries(self, stream: str, entry_ids: Sequence[str]) -> int:
        return await self._at(stream, lambda node: node.remove_entries(stream, entry_ids))


_METHODS: Final = tuple(name for name in vars(RedisBackend) if not name.startswith("_") and hasattr(Node, name))
"""What a server does by itself."""
