"""What operators need of a backend: to read a stream without a group, and to take entries out of it."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from .._ground.errors import EventBusError
from .._messages.message import Message

RAW_PREFIX = "raw:"
"""The raw fields of a malformed entry stand beside the message of its dead letter under names that begin so."""


@dataclass(frozen=True)
class StoredEntry:
    """An entry as it lies in its stream.

    :ivar message: None = the field ``message`` is missing, cannot be decoded, or was too large to be read.
    :ivar fields: the other fields that were read; all of them where there is no message.
    :ivar sizes: bytes of each field that ``fields`` holds or, for its size, lacks.
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
        """Bytes that it has, about, whether they were read or not."""
        return sum(self.sizes.values()) + (0 if self.message is None else len(self.message.payload))


@dataclass(frozen=True)
class Move:
    """An entry to be taken out of its stream in the step that appends what takes its place.

    :ivar message: what is appended to ``stream``; None = the entry's own raw fields, as they were before it died.
    """

    id: str
    stream: str
    message: Message | None


class DeadLetterStore(abc.ABC):
    """What a backend may offer beside :class:`StreamBackend`, for :meth:`anybus.StreamBus.dead_letters`.

    Errors are those of :class:`StreamBackend`. Ids that no entry can have are ids of entries that are gone.
    """

    @abc.abstractmethod
    async def last_entry_id(self, stream: str) -> str | None:
        """The id of the stream's last entry; None = it holds none."""

    @abc.abstractmethod
    async def read_page(
        self, stream: str, *, after: str | None, until: str, count: int, max_bytes: int, max_entry_bytes: int
    ) -> list[StoredEntry]:
        """Entries in their order, from behind ``after`` (None = the first) to ``until``; an empty list = no more.

        At most ``count``, and no larger than ``max_bytes`` together, but always one if there is one. Of an entry that
        is larger than ``max_entry_bytes`` only the field ``message`` is read, if that is not; of the rest the sizes.

        :raises ValidationError: if ``after`` or ``until`` is no entry's id.
        """

    @abc.abstractmethod
    async def read_entry(self, stream: str, entry_id: str, *, max_entry_bytes: int) -> StoredEntry | None:
        """One entry, read as by :meth:`read_page`; None = it is gone."""

    @abc.abstractmethod
    async def has_group(self, stream: str, group: str) -> bool:
        """Whether the stream has that group."""

    @abc.abstractmethod
    async def move_entries(self, stream: str, moves: Sequence[Move]) -> list[str | EventBusError | None]:
        """For each: append, and delete the entry, in one step. One result per move, in order.

        A backend that cannot do both in one step appends first: interrupted it doubles, and never loses.

        :return: the new id; None = the entry is gone, nothing was done; an error = nothing was done, the entry is
            still there. One failure hides no other.
        :raises BackendError: if nobody knows which were done. Those that were are gone: trying again does no harm.
        """

    @abc.abstractmethod
    async def remove_entries(self, stream: str, entry_ids: Sequence[str]) -> int:
        """Delete entries, pending somewhere or not; how many were still there."""
