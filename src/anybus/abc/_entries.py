"""The values that a backend returns, and those that it is given to append."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Union

import msgspec

from .._ground.errors import BackendError
from .._messages.message import Message

Confirmation = Literal["accepted", "replicated", "persisted"]


class ClaimedMessage(msgspec.Struct, frozen=True, gc=False):
    """An entry that was read and decoded.

    :ivar id: the entry's id in its stream.
    :ivar message: the message.
    :ivar deliveries: how often the backend has delivered the entry, including this time; None = it does not count.
    :ivar published_at: when the backend stored it, UTC; None = the backend does not say.
    """

    id: str
    message: Message
    deliveries: int | None = None
    published_at: datetime | None = None


class MalformedEntry(msgspec.Struct, frozen=True):
    """An entry that could not be decoded.

    :ivar id: the entry's id in its stream.
    :ivar raw: its fields.
    :ivar error: why it could not be decoded.
    :ivar deliveries: as in :class:`ClaimedMessage`.
    """

    id: str
    raw: Mapping[str, bytes]
    error: str
    deliveries: int | None = None


class MissingEntry(msgspec.Struct, frozen=True):
    """An entry that is pending, but whose body is gone: somebody trimmed the stream, or deleted the entry."""

    id: str


FetchedEntry = Union[ClaimedMessage, MalformedEntry, MissingEntry]


@dataclass(frozen=True)
class Output:
    """A message that is appended in the same step in which another one is acknowledged.

    :ivar stream: the stream to which it is appended.
    :ivar message: the message.
    :ivar delay: it is appended after this many seconds (feature ``delay``).
    :ivar raw: fields that are stored unchanged beside the message, as ``raw:<name>`` (feature ``raw``).
    :ivar limited: true for a message that an application publishes: the backend's size limit applies. The bus's own
        copies are never refused for their size.
    """

    stream: str
    message: Message
    delay: float = 0.0
    raw: Mapping[str, bytes] | None = None
    limited: bool = False


@dataclass(frozen=True)
class PublishSpec:
    """Options of a publish, beyond the message.

    :ivar idempotency_key: the message is appended only if none was published to the stream with the same key within its
        window (feature ``dedup``). Otherwise the call returns a :class:`Duplicate`. None = it is always appended.
    :ivar deduplication_window: for how many seconds from now the key counts as published.
    :ivar confirmation: when the message counts as published (feature ``confirm``). ``accepted`` = the server has it;
        ``replicated`` = replicas have it, too; ``persisted`` = it is on the server's disk.
    :ivar replicas: how many replicas must have it (``persisted``: on their disks), beside the server that took it.
    :ivar confirmation_timeout: for how many seconds to wait for that.
    """

    idempotency_key: str | None = None
    deduplication_window: float = 0.0
    confirmation: Confirmation = "accepted"
    replicas: int = 0
    confirmation_timeout: float = 2.0


@dataclass(frozen=True)
class Redelivered:
    """The entries that one pass over a topic and its retry stream took.

    :ivar reclaimed: entries of the topic that were idle.
    :ivar retries: new entries of the retry stream.
    :ivar reclaimed_retries: entries of the retry stream that were idle.
    :ivar lost: the error of a step that failed (because its group is gone, for example). The entries of the other steps
        are still returned.
    :ivar searched: true if the reply to an earlier pass was lost, and these entries were found by a search for what
        that pass took. They may include entries that this consumer already holds, which were not delivered again.
    :ivar more: true if entries were left because they were too many or too large for one call. The bus calls again as
        soon as it has room.
    """

    reclaimed: list[FetchedEntry]
    retries: list[FetchedEntry]
    reclaimed_retries: list[FetchedEntry]
    lost: BackendError | None = None
    searched: bool = False
    more: bool = False


@dataclass(frozen=True)
class PendingEntry:
    """An entry that was delivered and is not yet acknowledged, as the backend sees it.

    :ivar id: the entry's id.
    :ivar consumer: the consumer to which it belongs.
    :ivar idle: seconds since it was last delivered or renewed. For a released entry: longer than any lease.
    :ivar deliveries: how often it was delivered without an outcome.
    """

    id: str
    consumer: str
    idle: float
    deliveries: int
