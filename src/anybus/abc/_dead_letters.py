"""What a backend needs for dead letters: to read a stream without a group, and to remove entries from it."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from .._ground.errors import EventBusError
from .._messages.message import Message

RAW_PREFIX = "raw:"
"""A malformed entry's raw fields are stored beside the message of its dead letter, under names with this prefix."""


@dataclass(frozen=True)
class StoredEntry:
    """An entry as it is stored in its stream.

    :ivar id: the entry's id.
    :ivar message: the message; None = the field ``message`` is missing, cannot be decoded, or was too large to be read.
    :ivar fields: the other fields that were read. If there is no message, all fields that were read.
    :ivar sizes: the size in bytes of each field in ``fields``, and of each field that was too large to be read.
    :ivar error: why there is no message.
    :ivar published_at: when the backend stored it, UTC; None = it does not say.
    """

    id: str
    message: Message | None
    fields: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    error: str | None = None
    published_at: datetime | None = None

    @property
    def size(self) -> int:
        """About how many bytes the entry has, whether they were read or not."""
        return sum(self.sizes.values()) + (0 if self.message is None else len(self.message.payload))


@dataclass(frozen=True)
class Move:
    """An entry that is removed from its stream in the same step in which its replacement is appended to another stream.

    :ivar id: the id of the entry that is removed.
    :ivar stream: the stream to which the replacement is appended.
    :ivar message: the replacement; None = the entry's own raw fields, as they were before it became a dead letter.
    """

    id: str
    stream: str
    message: Message | None


class DeadLetterStore(abc.ABC):
    """What a backend may offer beside :class:`StreamBackend`, for :meth:`anybus.StreamBus.dead_letters`.

    Errors are those of :class:`StreamBackend`. An id that no entry can have counts as the id of an entry that is gone.
    """

    @abc.abstractmethod
    async def last_entry_id(self, stream: str) -> str | None:
        """The id of the stream's last entry; None = the stream is empty or does not exist."""

    @abc.abstractmethod
    async def read_page(
        self, stream: str, *, after: str | None, until: str, count: int, max_bytes: int, max_entry_bytes: int
    ) -> list[StoredEntry]:
        """Entries in order, from after ``after`` (None = from the first) up to and including ``until``.

        A page has at most ``count`` entries, and at most ``max_bytes`` in all, but at least one entry if there is one.
        If an entry is larger than ``max_entry_bytes``, only its field ``message`` is read, unless that field alone is
        too large. Of the other fields only the sizes are returned.

        :return: the entries; an empty list = there are no more.
        :raises ValidationError: if ``after`` or ``until`` is not an entry's id.
        """

    @abc.abstractmethod
    async def read_entry(self, stream: str, entry_id: str, *, max_entry_bytes: int) -> StoredEntry | None:
        """One entry, with the size limit of :meth:`read_page`; None = it is gone."""

    @abc.abstractmethod
    async def has_group(self, stream: str, group: str) -> bool:
        """Whether the stream has this group."""

    @abc.abstractmethod
    async def move_entries(self, stream: str, moves: Sequence[Move]) -> list[str | EventBusError | None]:
        """For each move, append the replacement and delete the entry, in one step.

        A backend that cannot do both in one step appends first. If it is interrupted in between, entries are
        duplicated, never lost.

        :return: one result per move, in order. The new id; or None = the entry is gone, and nothing was done; or an
            error = nothing was done, and the entry still exists. A failure does not affect other moves.
        :raises BackendError: if it is not known which moves were done. Trying again does no harm, because the entries
            of those moves are gone.
        """

    @abc.abstractmethod
    async def remove_entries(self, stream: str, entry_ids: Sequence[str]) -> int:
        """Delete entries, whether they are pending or not.

        :return: how many of them still existed.
        """
