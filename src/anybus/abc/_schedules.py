"""What a backend needs for delayed publishing: when a message is due, and to list what waits."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from .._messages.message import Message


@dataclass(frozen=True)
class DelayedEntry:
    """A message that waits until it is due.

    :ivar id: its schedule id.
    :ivar due: when it is due, UTC.
    :ivar message: the message; None = it cannot be decoded.
    :ivar error: why there is no message.
    :ivar size: about how many bytes it has.
    """

    id: str
    due: datetime
    message: Message | None
    error: str | None = None
    size: int = 0


@dataclass(frozen=True)
class DelayedPage:
    """Some of the messages that wait for a stream, in the order in which they will be appended.

    :ivar next: where the next page starts; None = there are no more.
    """

    entries: Sequence[DelayedEntry]
    next: str | None


class ScheduleStore(abc.ABC):
    """What a backend with the feature ``delay`` offers beside :class:`StreamBackend`, for delayed publishing.

    Such a backend appends what is due by itself, as long as it is entered: within 50 ms for a stream on which it has
    stored something, and within about a second for a stream that it reads. Messages with the same due time are appended
    in the order in which they were stored.
    """

    @abc.abstractmethod
    def due_of(self, schedule_id: str) -> datetime:
        """When a message is due, UTC, by the id that :meth:`StreamBackend.publish_later` returned."""

    @abc.abstractmethod
    async def delayed_page(self, stream: str, *, after: str | None, count: int, max_bytes: int) -> DelayedPage:
        """What waits for a stream, in the order of the due times.

        A page has at most ``count`` entries, and at most ``max_bytes`` in all, but at least one entry if there is one.

        :param after: the ``next`` of the page before; None = the first page.
        :raises ValidationError: if ``after`` is no such position.
        """
