"""The contract of a backend: five methods to write, the rest provided."""

from __future__ import annotations

import abc
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeVar

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


class StreamBackend(abc.ABC):
    """Streams with consumer groups, as the bus needs them. An async context manager.

    Durations are float seconds. A method that is cancelled while it takes entries hands back what it took, uncounted,
    within a shielded second, before the cancellation comes out. A cancelled publish may or may not have happened.
    Errors are :class:`~anybus.BackendError`, saying whether they can pass and whether the work may have been done.
    Only errors that are known to be permanent end a subscription; a driver's own exceptions count as transient, what a
    mistake in a program raises (``TypeError``, ``AttributeError``...) as permanent.
    """

    features: frozenset[Feature] = frozenset()
    """What this backend really does. The bus looks here when an option is given, and falls back or refuses."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return None

    @abc.abstractmethod
    async def create_group(self, stream: str, group: str, start_id: str = "$") -> bool:
        """Make the stream and the group.

        :param start_id: ``"$"`` = only what comes after, ``"0"`` = from the start, else the id after which it begins.
            An id is a number, or two joined by a dash.
        :return: true if it was made now, false if it existed.
        """

    @abc.abstractmethod
    async def publish(self, stream: str, message: Message) -> str:
        """Append; return the entry's id. Ids are never reused."""

    @abc.abstractmethod
    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        """Up to ``count`` entries never delivered to the group, in order.

        :param timeout: seconds to wait if there is none; 0 does not wait. Nothing came = an empty list, not an error.
            The bus counts leases from when it called: a read must not wait for longer.
        :raises GroupLostError: if the group no longer exists.
        """

    @abc.abstractmethod
    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        """Take over up to ``count`` pending entries of any consumer that have been idle for ``min_idle`` seconds.

        Goes on where the last scan of this (stream, group, consumer) stopped, wraps around, and looks on until it has
        ``count`` entries or has been once round. It may stop after 20 ms, or a megabyte; the next call goes on from
        there.

        :raises GroupLostError: if the group no longer exists.
        """

    @abc.abstractmethod
    async def ack(self, stream: str, group: str, message_id: str) -> None:
        """Acknowledge an entry. Unknown ids are ignored."""

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        """Acknowledge many: returning means that the server accepted the whole batch.

        :param consumer: with the feature ``fence``, only entries that still belong to this consumer are acked.
        :return: the ids that were not, whether somebody else's or no longer pending. The provided loop cannot
            check the owner, and returns none.
        :raises BackendError: nobody knows which were acked; trying again does no harm.
        """
        for message_id in message_ids:
            await self.ack(stream, group, message_id)
        return []

    async def forget_consumer(self, stream: str, group: str, consumer: str) -> None:
        """Drop every state kept for a consumer (and its name, if nothing is pending there). Never raises."""
        return

    async def publish_many(self, items: Sequence[PublishItem]) -> list[str | EventBusError]:
        """Append many, in order within a stream; one result per item, in order. One failure hides no other."""
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
        """``publish`` with what needs more than the message.

        :raises UnsupportedError: if the backend cannot.
        """
        raise UnsupportedError(f"{type(self).__name__} cannot publish with {spec}")

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        """Reset the idle time of entries that still belong to this consumer, without counting a delivery.

        :return: those still owned.
        :raises UnsupportedError: if the backend cannot (feature ``renew``).
        """
        raise UnsupportedError(f"{type(self).__name__} cannot renew leases")

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        """Hand back those entries that still belong to this consumer, for reclaim at once, uncounted.

        :raises UnsupportedError: if the backend cannot (feature ``release``).
        """
        raise UnsupportedError(f"{type(self).__name__} cannot release entries")

    async def transfer(
        self, stream: str, group: str, consumer: str, message_id: str, outputs: Sequence[Output]
    ) -> list[str] | None:
        """Append the outputs and acknowledge the original, in one step where the backend can (``atomic_transfer``).

        The provided one publishes each output, then acks: interrupted between the two it doubles, and never loses.
        It checks no owner.

        :return: the new ids (of a delayed output: its schedule's); None = no longer ours, nothing was done.
        :raises UnsupportedError: if an output asks for a delay or raw fields and the backend cannot.
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
        """``transfer`` for many; one result or error per item, in order."""
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
        """Store now, append when due by the server's clock, even if the publisher is gone.

        :param delay: seconds from now; exactly one of ``delay`` and ``at`` is given.
        :return: a schedule id for :meth:`cancel_later`.
        :raises UnsupportedError: if the backend cannot (feature ``delay``).
        """
        raise UnsupportedError(f"{type(self).__name__} cannot delay messages")

    async def cancel_later(self, stream: str, schedule_id: str) -> bool:
        """Take back what was stored by :meth:`publish_later`. False = already appended, or unknown.

        :raises UnsupportedError: if the backend cannot (feature ``delay``).
        """
        raise UnsupportedError(f"{type(self).__name__} cannot delay messages")


class PassSource(abc.ABC):
    """What a backend may offer beside :class:`StreamBackend`: a whole reclaim pass in one go."""

    @abc.abstractmethod
    async def redeliver(
        self, stream: str, retry_stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> Redelivered:
        """``reclaim_idle`` of the topic, ``read_new`` of its retry stream without waiting, and ``reclaim_idle`` of
        that: at most ``count`` entries in all, the three taking turns at going first.
        """


class RightsChecker(abc.ABC):
    """What a backend may offer beside :class:`StreamBackend`: whether a subscription may do what it will have to."""

    @abc.abstractmethod
    async def check_rights(self, stream: str, retry_stream: str, group: str, *, dead_letter_topic: str | None) -> None:
        """Called once for a subscription, before anything is made or taken. Changes nothing.

        :param dead_letter_topic: None = what is given up on is dropped.
        :raises BackendError: one that cannot pass, and names all rights that are missing.
        """


class LeaseKeeper(abc.ABC):
    """What a backend may offer beside :class:`StreamBackend`: one lease for all members of a group, kept beside it.

    A member counts as running for a lease, at most 15 seconds, after its last call of either method, or until
    ``forget_consumer``. The bus calls :meth:`kept_lease` three times in that time. What is kept does not depend on the
    group: it is there when a lost group is made again.
    """

    @abc.abstractmethod
    async def agree_lease(self, stream: str, group: str, consumer: str, lease: float, *, change: bool = False) -> float:
        """Called when a member begins, after the group exists. In one step: of two newcomers exactly one is first.

        :param lease: seconds. It is kept if none is kept yet, if no other member runs, or with ``change``.
        :return: the lease by which the members that run go. Another one than ``lease`` says: without ``change``, that
            it was not kept and the consumer is no member; with ``change``, that it was kept, and they do not know yet.
        """

    @abc.abstractmethod
    async def kept_lease(self, stream: str, group: str, consumer: str, lease: float) -> float:
        """Called now and then by a member that runs.

        :param lease: by which it goes; kept if none is kept any more.
        :return: the lease that is kept.
        """


class TimedPublisher(abc.ABC):
    """What a backend may offer beside :class:`StreamBackend`: a publish that keeps its own deadline."""

    @abc.abstractmethod
    async def publish_within(self, stream: str, message: Message, *, timeout: float) -> str:
        """``publish``, in so many seconds at most. (A cancel scope for each of many small publishes is dear.)

        :raises BackendError: as ``publish`` does, and if the time is over; ``may_have_happened`` tells whether the
            message may have been stored all the same.
        """


class StreamInspector(abc.ABC):
    """What a backend with the feature ``inspect`` offers beside :class:`StreamBackend`: looking, touching nothing."""

    @abc.abstractmethod
    async def count_entries(self, stream: str) -> int:
        """How many entries the stream holds; 0 if there is no such stream."""

    @abc.abstractmethod
    async def pending_entries(self, stream: str, group: str, *, limit: int = 1000) -> list[PendingEntry]:
        """The group's pending entries, lowest id first, at most ``limit``.

        :raises GroupLostError: if there is no such group.
        """

    @abc.abstractmethod
    async def consumer_names(self, stream: str, group: str) -> list[str]:
        """The names of the group's consumers, sorted.

        :raises GroupLostError: if there is no such group.
        """


async def result_or_error(function: Callable[..., Awaitable[T]], /, *args: object) -> T | EventBusError:
    """What the call returned, or the error that it ended with, as the bus's own kind."""
    try:
        return await function(*args)
    except EventBusError as error:
        return error
    except Exception as error:  # a backend's bug must not hide its neighbours' results
        wrapped = BackendError(
            f"{type(error).__name__}: {error}", may_have_happened=may_have_happened(error), can_pass=can_pass(error)
        )
        wrapped.__cause__ = error
        return wrapped
