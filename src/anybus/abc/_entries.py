"""What a backend hands out, and what it is given to append."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Union

import msgspec

from .._ground.errors import BackendError
from .._messages.message import Message


class ClaimedMessage(msgspec.Struct, frozen=True, gc=False):
    """An entry that was read and decoded.

    :ivar id: the entry's id in its stream.
    :ivar deliveries: how often the backend has handed the entry over, this time included; None = it does not count.
    :ivar published_at: when the backend stored it, UTC; None = it does not say.
    """

    id: str
    message: Message
    deliveries: int | None = None
    published_at: datetime | None = None


class MalformedEntry(msgspec.Struct, frozen=True):
    """An entry that could not be decoded: its raw fields, and why."""

    id: str
    raw: Mapping[str, bytes]
    error: str
    deliveries: int | None = None


class MissingEntry(msgspec.Struct, frozen=True):
    """An entry that is pending, but whose body is gone: somebody trimmed it."""

    id: str


FetchedEntry = Union[ClaimedMessage, MalformedEntry, MissingEntry]


@dataclass(frozen=True)
class Output:
    """A message to append in the step that acknowledges another.

    :ivar delay: seconds after which it is appended (feature ``delay``).
    :ivar raw: fields kept unchanged beside the message, as ``raw:<name>`` (feature ``raw``).
    :ivar limited: true for what an application publishes: a backend's limit on sizes holds. The bus's own copies are
        never refused for their size.
    """

    stream: str
    message: Message
    delay: float = 0.0
    raw: Mapping[str, bytes] | None = None
    limited: bool = False


@dataclass(frozen=True)
class PublishSpec:
    """What a publish needs beyond its message. Its fields come with the features that read them."""


@dataclass(frozen=True)
class Redelivered:
    """What one pass over a topic and its retry stream took.

    :ivar lost: the error of a step that failed (a group that is gone, say); the others' entries are here all the same.
    :ivar searched: they were looked for, since an earlier reply was lost; what this consumer holds anyway may be among
        them, not handed over again.
    :ivar more: something was left because it was too much for one call: the bus calls again as soon as it has room.
    """

    reclaimed: list[FetchedEntry]
    retries: list[FetchedEntry]
    reclaimed_retries: list[FetchedEntry]
    lost: BackendError | None = None
    searched: bool = False
    more: bool = False


@dataclass(frozen=True)
class PendingEntry:
    """An entry delivered and not yet acknowledged, as the backend sees it.

    :ivar idle: seconds since it was last handed over or renewed; released entries are idle for ever.
    :ivar deliveries: how often it was handed over without an outcome.
    """

    id: str
    consumer: str
    idle: float
    deliveries: int
