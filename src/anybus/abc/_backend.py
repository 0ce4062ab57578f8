"""The contract of a backend: five methods are required, the others have a default implementation."""

from __future__ import annotations

import abc
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import anyio

from .._ground.errors import BackendError, EventBusError, UnsupportedError, can_pass, may_have_happened
from .._messages.message import Message
from ._entries import FetchedEntry, Output, PendingEntry, PublishSpec, Redelivered

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

Feature = Literal[
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
]

PublishItem = tuple[str, Message, "PublishSpec | None"]
TransferItem = tuple[str, "Sequence[Output]"]

_STREAMS_AT_ONCE = 32

SIGN_INTERVAL: Final = 5.0
"""At least every so many seconds, a member is marked as running."""


class StreamBackend(abc.ABC):
    """Streams with consumer groups, as the bus needs them. An async context manager.

    Durations are seconds, as floats.

    If a method is cancelled while it takes entries, it first releases them, uncounted, within a shielded second, and
    then raises the cancellation. A cancelled publish may or may not have happened.

    Errors are :class:`~anybus.BackendError`. They say whether they are transient, and whether the work may have been
    done. Only an error that is known to be permanent ends a subscription. A driver's own exceptions count as transient.
    The exceptions of programming errors (``TypeError``, ``AttributeError``...) count as permanent.
    """

    features: frozenset[Feature] = frozenset()
    """What this backend can do. The bus checks this when an option is given, and uses a fallback or refuses."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return None

    @abc.abstractmethod
    async def create_group(self, stream: str, group: str, start_id: str = "$") -> bool:
        """Create the stream and the group.

        :param start_id: ``"$"`` = only entries that are appended later, ``"0"`` = from the first entry, an entry's id =
            after that entry. An id is a number, or two numbers joined by a dash.
        :return: true if the group was created now, false if it existed before.
        """

    @abc.abstractmethod
    async def publish(self, stream: str, message: Message) -> str:
        """Append a message.

        :return: the entry's id. Ids are never reused.
        """

    @abc.abstractmethod
    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        """Take up to ``count`` entries that were never delivered to the group, in order.

        :param timeout: how many seconds to wait if there are none; 0 = do not wait. A read must not wait for longer,
            because the bus counts a lease from the moment of the call.
        :return: the entries; an empty list, not an error, if none came.
        :raises GroupLostError: if the group no longer exists.
        """

    @abc.abstractmethod
    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        """Take over up to ``count`` pending entries, of any consumer, that have been idle for ``min_idle`` seconds.

        The scan starts where the last scan of this (stream, group, consumer) stopped, and wraps around at the end. It
        ends when it has ``count`` entries, or has looked at all of them once. It may also stop after 20 ms or after a
        megabyte: the next call continues there.

        :raises GroupLostError: if the group no longer exists.
        """

    @abc.abstractmethod
    async def ack(self, stream: str, group: str, message_id: str) -> None:
        """Acknowledge an entry. An unknown id is ignored."""

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        """Acknowledge many entries. If it returns, the server has accepted the whole batch.

        The default implementation is a loop over :meth:`ack`. It cannot check the owner, and returns an empty list.

        :param consumer: with the feature ``fence``: acknowledge only entries that still belong to this consumer.
        :return: with ``consumer``: the ids that were not acknowledged, because they belong to another consumer or are
            no longer pending. A backend may leave out ids that are no longer pending although no consumer took them.
        :raises BackendError: if it is not known which entries were acknowledged. Trying again does no harm.
        """
        for message_id in message_ids:
            await self.ack(stream, group, message_id)
        return []

    async def forget_consumer(self, stream: str, group: str, consumer: str) -> None:
        """Drop all state of a consumer, and its name if it has no pending entries. Never raises."""
        return

    async def publish_many(self, items: Sequence[PublishItem]) -> list[str | EventBusError]:
        """Append many messages, in order within each stream.

        The default implementation publishes to up to 32 streams at once.

        :return: one result per item, in order: the entry's id, or the error. A failure does not affect other items.
        """
        results: list[str | EventBusError] = [BackendError("not tried", may_have_happened=False)] * len(items)
        by_stream: defaultdict[str, list[int]] = defaultdict(list)
        for index, (stream, _, _) in enumerate(items):
            by_stream[stream].append(index)
        limiter = anyio.CapacityLimiter(_STREAMS_AT_ONCE)

        async def publish_stream(indexes: list[int]) -> None:
            async with limiter:
                for index in indexes:
                    stream, message, spec = items[index]
                    if spec is None:
                        results[index] = await result_or_error(self.publish, stream, message)
                    else:
                        results[index] = await result_or_error(self.publish_with, stream, message, spec)

        async with anyio.create_task_group() as tasks:
            for indexes in by_stream.values():
                tasks.start_soon(publish_stream, indexes)
        return results

    async def publish_with(self, stream: str, message: Message, spec: PublishSpec) -> str:
        """``publish`` with options that go beyond the message.

        With an idempotency key (feature ``dedup``), looking for the key, appending and keeping the key are one step. So
        are they in :meth:`publish_many` and :meth:`publish_later`. The key is kept for the window of the publish that
        appended; later ones do not prolong it. It is never kept without its message having been stored, until that
        is cancelled.

        :return: the entry's id; a :class:`Duplicate` if the key had been published before.
        :raises UnsupportedError: if the backend cannot.
        """
        raise UnsupportedError(f"{type(self).__name__} cannot publish with {spec}")

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        """Reset the idle time of entries that still belong to this consumer, without counting a delivery.

        :return: the ids of those entries.
        :raises UnsupportedError: if the backend cannot (feature ``renew``).
        """
        raise UnsupportedError(f"{type(self).__name__} cannot renew leases")

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        """Release those entries that still belong to this consumer, uncounted. They can be reclaimed at once.

        :raises UnsupportedError: if the backend cannot (feature ``release``).
        """
        raise UnsupportedError(f"{type(self).__name__} cannot release entries")

    async def transfer(
        self, stream: str, group: str, consumer: str, message_id: str, outputs: Sequence[Output]
    ) -> list[str] | None:
        """Append the outputs and acknowledge the original entry, in one step if the backend can (``atomic_transfer``).

        The default implementation publishes each output, then acknowledges. If it is interrupted in between, messages
        are duplicated, never lost. It does not check the owner.

        :return: the new ids (for a delayed output: its schedule id); None = the entry no longer belongs to this
            consumer, and nothing was done.
        :raises UnsupportedError: if an output asks for a delay or raw fields, and the backend cannot do that.
        """
        for output in outputs:
            if output.delay or output.raw is not None:
                raise UnsupportedError(f"{type(self).__name__} cannot transfer with a delay or raw fields")
        ids = [await self.publish(output.stream, output.message) for output in outputs]
        await self.ack(stream, group, message_id)
        return ids

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[list[str] | EventBusError | None]:
        """:meth:`transfer` for many entries.

        :return: one result or error per item, in order.
        """
        return [
            await result_or_error(self.transfer, stream, group, consumer, message_id, outputs)
            for message_id, outputs in items
        ]

    async def publish_later(
        self,
        stream: str,
        message: Message,
        *,
        delay: float | None = None,
        at: datetime | None = None,
        spec: PublishSpec | None = None,
    ) -> str:
        """Store a message now. It is appended when it is due, by the server's clock, even if the publisher is gone.

        Exactly one of ``delay`` and ``at`` is given.

        :param delay: seconds from now.
        :param at: the time, with a time zone.
        :param spec: as in :meth:`publish_with`. The window begins with this call. Cancelling frees the key.
        :return: a schedule id for :meth:`cancel_later`; a :class:`Duplicate` if the key had been published before.
        :raises UnsupportedError: if the backend cannot (feature ``delay``).
        """
        raise UnsupportedError(f"{type(self).__name__} cannot delay messages")

    async def cancel_later(self, stream: str, schedule_id: str) -> bool:
        """Cancel a message that was stored by :meth:`publish_later`.

        :return: false if it was already appended, or is unknown.
        :raises UnsupportedError: if the backend cannot (feature ``delay``).
        """
        raise UnsupportedError(f"{type(self).__name__} cannot delay messages")


class PassSource(abc.ABC):
    """What a backend may offer beside :class:`StreamBackend`: a whole reclaim pass in one call."""

    @abc.abstractmethod
    async def redeliver(
        self, stream: str, retry_stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> Redelivered:
        """Take entries in three steps: ``reclaim_idle`` of the topic, ``read_new`` of its retry stream without waiting,
        and ``reclaim_idle`` of the retry stream.

        They take at most ``count`` entries in all. Each call starts with another of the three steps.
        """


class SharedWaiting(PassSource):
    """What a backend may offer beside :class:`StreamBackend`: waits for many subscriptions together.

    So a subscription of a quiet topic is not woken to find nothing, and a process can have many of them.
    """

    @abc.abstractmethod
    async def read_when_new(
        self, stream: str, group: str, consumer: str, *, count: int, block: float, timeout: float
    ) -> list[FetchedEntry]:
        """:meth:`StreamBackend.read_new`, repeated until entries come or ``timeout`` is over.

        :param block: how many seconds each of these reads waits.
        :param timeout: after how many seconds this returns an empty list. It must not wait for longer, because the bus
            counts a lease from the moment of the call.
        :raises GroupLostError: if the group no longer exists.
        """

    @abc.abstractmethod
    async def until_pass_is_due(
        self, stream: str, retry_stream: str, group: str, consumer: str, *, min_idle: float, interval: float
    ) -> None:
        """Wait until :meth:`PassSource.redeliver` may find something. Called after a pass that left nothing behind.

        Entries that were released, and delayed ones that are due, end this after about ``interval`` seconds. So do
        entries whose lease has expired. It may also return although there is nothing. Never raises.
        """


class RightsChecker(abc.ABC):
    """What a backend may offer beside :class:`StreamBackend`: checks the permissions that a subscription will need."""

    @abc.abstractmethod
    async def check_rights(self, stream: str, retry_stream: str, group: str, *, dead_letter_topic: str | None) -> None:
        """Called once for a subscription, before anything is created or taken. Changes nothing.

        :param dead_letter_topic: None = messages that are given up on are dropped.
        :raises BackendError: if permissions are missing. It is permanent, and names all of them.
        """


class LeaseKeeper(abc.ABC):
    """What a backend may offer beside :class:`StreamBackend`: one lease for all members of a group, kept beside it.

    Each call of either method marks the member as running for the time of one lease, at most 15 seconds, or until
    ``forget_consumer``. The bus calls :meth:`kept_lease` three times in that time. The lease is kept independently of
    the group: it still exists when a lost group is recreated.
    """

    @abc.abstractmethod
    async def agree_lease(self, stream: str, group: str, consumer: str, lease: float, *, change: bool = False) -> float:
        """Called when a member starts, after the group exists. Atomic: of two new members, exactly one is first.

        :param lease: the lease of the new member, in seconds. It is kept if none is kept yet, if no other member runs,
            or with ``change``.
        :return: the lease that the running members use. If it differs from ``lease`` without ``change``: the new lease
            was not kept, and the consumer is not a member. If it differs with ``change``: the new lease was kept, and
            the running members do not know it yet.
        """

    @abc.abstractmethod
    async def kept_lease(self, stream: str, group: str, consumer: str, lease: float) -> float:
        """Called regularly by a running member.

        :param lease: the lease that the member uses, in seconds. It is kept if none is kept any more.
        :return: the lease that is kept, in seconds.
        """

    async def until_lease_changes(self, stream: str, group: str, consumer: str, lease: float) -> float:
        """Mark the member as running, again and again, until another lease is kept than the one that it uses.

        The default implementation calls :meth:`kept_lease` three times in the time for which it marks the member.

        :return: the lease that is kept, in seconds.
        """
        while True:
            await anyio.sleep(min(lease / 3, SIGN_INTERVAL))
            kept = await self.kept_lease(stream, group, consumer, lease)
            if kept != lease:
                return kept


class TimedPublisher(abc.ABC):
    """What a backend may offer beside :class:`StreamBackend`: a publish that keeps its own deadline."""

    @abc.abstractmethod
    async def publish_within(self, stream: str, message: Message, *, timeout: float) -> str:
        """``publish`` with a time limit. (A cancel scope for each of many small publishes would be expensive.)

        :param timeout: the limit in seconds.
        :raises BackendError: as ``publish`` does, and if the time is over. ``may_have_happened`` tells whether the
            message may have been stored.
        """


class StreamInspector(abc.ABC):
    """What a backend with the feature ``inspect`` offers beside :class:`StreamBackend`. Inspecting changes nothing."""

    @abc.abstractmethod
    async def count_entries(self, stream: str) -> int:
        """How many entries the stream holds; 0 if the stream does not exist."""

    @abc.abstractmethod
    async def pending_entries(self, stream: str, group: str, *, limit: int = 1000) -> list[PendingEntry]:
        """The group's pending entries, lowest id first, at most ``limit``.

        :raises GroupLostError: if the group does not exist.
        """

    @abc.abstractmethod
    async def consumer_names(self, stream: str, group: str) -> list[str]:
        """The names of the group's consumers, sorted.

        :raises GroupLostError: if the group does not exist.
        """


async def result_or_error(function: Callable[..., Awaitable[T]], /, *args: object) -> T | EventBusError:
    """The result of the call, or its error as an ``EventBusError``."""
    try:
        return await function(*args)
    except EventBusError as error:
        return error
    except Exception as error:  # a bug in the backend must not hide the results of other items
        wrapped = BackendError(
            f"{type(error).__name__}: {error}", may_have_happened=may_have_happened(error), can_pass=can_pass(error)
        )
        wrapped.__cause__ = error
        return wrapped
