"""Delayed publishing: stores a message for later, lists what waits, and cancels it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import anyio

from .._ground.checks import check_delay, check_int, check_name, check_text, check_time, check_topic, refuse
from .._ground.clock import now
from .._ground.errors import UnsupportedError
from .._messages.message import Message, check_outgoing
from .._options import PublishOptions, StreamBusOptions
from .._publishing.publisher import Publisher
from .._reporting import Reporter
from ..abc import DelayedEntry, Duplicate, PublishSpec, ScheduleStore, StreamBackend

LONGEST_DELAY: Final = 3653 * 86400.0
"""Ten years, in seconds."""

_PAGE_COUNT: Final = 100
_PAGE_BYTES: Final = 1024 * 1024


class Scheduled:
    """A message that waits until it is due. It belongs to the server, not to this object: dropping it changes nothing.

    :ivar id: its id, for :meth:`ScheduledMessages.cancel`.
    :ivar topic: the topic to which it will be appended.
    :ivar due: when it is due, UTC, by the server's clock.
    :ivar message: the message; None = what is stored cannot be decoded, and ``error`` says why.
    :ivar error: why there is no message.
    :ivar duplicate: whether an earlier publish had the same idempotency key. Then nothing was stored, and the id is
        what that publish returned.
    """

    __slots__ = ("_cancel", "due", "duplicate", "error", "id", "message", "topic")

    def __init__(self, entry: DelayedEntry, topic: str, cancel: Callable[[str, str], Any]) -> None:
        self.id = entry.id
        self.topic = topic
        self.due = entry.due
        self.message = entry.message
        self.error = entry.error
        self.duplicate = isinstance(entry.id, Duplicate)
        self._cancel = cancel

    def __repr__(self) -> str:
        return f"<Scheduled {self.id} for {self.topic!r}, due {self.due.isoformat()}>"

    async def cancel(self) -> bool:
        """Cancel the message.

        :return: true if it will not be appended. False if it was already appended or cancelled.
        :raises BackendError: if the backend failed. If ``may_have_happened`` is true, the message may be cancelled.
        :raises ClosedError: if the bus is not open.
        """
        return bool(await self._cancel(self.topic, self.id))


@dataclass(frozen=True)
class ScheduledPage:
    """A page of messages that wait.

    :ivar scheduled: the messages, the earliest first.
    :ivar next: pass it to :meth:`ScheduledMessages.page` as ``after`` to get the next page; None = there are no more.
    """

    scheduled: tuple[Scheduled, ...]
    next: str | None


class ScheduledMessages:
    """The messages that wait for a topic. Created by :meth:`anybus.StreamBus.scheduled`.

    ``async for one in bus.scheduled(topic)`` iterates over them, the earliest first. It can be left at any time: it
    holds no task and no lock, and at most one page of about 1 MiB (or one larger message) in memory. A message that
    becomes due meanwhile is not in later pages.

    Every method raises :class:`BackendError` if the backend fails, and :class:`ClosedError` if the bus is not open.
    """

    def __init__(self, delayed: DelayedPublishing, topic: str) -> None:
        self._delayed = delayed
        self._topic = topic

    def __repr__(self) -> str:
        return f"<ScheduledMessages for {self._topic!r}>"

    @property
    def topic(self) -> str:
        return self._topic

    def __aiter__(self) -> AsyncIterator[Scheduled]:
        return _Iterator(self)

    async def page(self, after: str | None = None, *, limit: int = 50) -> ScheduledPage:
        """One page, the earliest first: at most ``limit`` messages, fewer if they are large.

        :param after: the ``next`` of the page before; None = the page starts with the earliest.
        :raises ValidationError: if ``after`` is no such text, or ``limit`` is less than 1.
        """
        limit = check_int("limit", limit, least=1)
        if after is not None:
            after = check_name("after", after)
        return await self._delayed.page(self._topic, after, limit)

    async def cancel(self, scheduled: Scheduled | str) -> bool:
        """Cancel one message, by itself or by its id.

        :return: true if it will not be appended. False if it was already appended or cancelled, or the id is unknown.
        :raises ValidationError: if it is neither.
        """
        if isinstance(scheduled, Scheduled):
            scheduled = scheduled.id
        if not isinstance(scheduled, str):
            refuse("scheduled", scheduled, "an anybus.Scheduled or its id")
        return await self._delayed.cancel(self._topic, check_text("scheduled", scheduled))


class _Iterator(AsyncIterator[Scheduled]):
    """Iterates over single messages. Not an async generator, which somebody would have to close."""

    def __init__(self, view: ScheduledMessages) -> None:
        self._view = view
        self._found: list[Scheduled] = []
        self._after: str | None = None
        self._is_over = False

    async def __anext__(self) -> Scheduled:
        if not self._found:
            if self._is_over:
                raise StopAsyncIteration
            page = await self._view.page(self._after, limit=_PAGE_COUNT)
            self._found = list(reversed(page.scheduled))
            self._after = page.next
            self._is_over = page.next is None
            if not self._found:
                raise StopAsyncIteration
        return self._found.pop()


class DelayedPublishing:
    """Implements ``publish_later`` and ``scheduled`` of a bus. The parameters and errors are documented there."""

    def __init__(
        self,
        backend: StreamBackend,
        publisher: Publisher,
        options: StreamBusOptions,
        reporter: Reporter,
        check_open: Callable[[str], None],
    ) -> None:
        self._backend = backend
        self._publisher = publisher
        self._options = options
        self._reporter = reporter
        self._check_open = check_open

    def view(self, topic: str) -> ScheduledMessages:
        topic = check_topic("topic", topic)
        self._store()
        return ScheduledMessages(self, topic)

    def _store(self) -> ScheduleStore:
        if not isinstance(self._backend, ScheduleStore) or "delay" not in self._backend.features:
            raise UnsupportedError(
                f"{type(self._backend).__name__} cannot delay messages: it does not implement "
                "anybus.abc.ScheduleStore, or does not have the feature 'delay'"
            )
        return self._backend

    async def publish(
        self, message: Message, options: PublishOptions | None, delay: float | None, at: datetime | None
    ) -> Scheduled:
        store = self._store()
        check_outgoing(message, self._options.max_payload_bytes)
        delay, at = check_due(delay, at)
        spec: PublishSpec | None = None
        if options is not None:
            later = delay if at is None else (at - now()).total_seconds()
            message, spec = self._publisher.with_options(message, options, later=max(0.0, later or 0.0))
        schedule_id = ""
        try:
            with anyio.move_on_after(self._options.publish_timeout) as scope:
                schedule_id = await self._backend.publish_later(message.topic, message, delay=delay, at=at, spec=spec)
            if not schedule_id and scope.cancelled_caught:
                raise self._publisher.timed_out()
        except Exception as error:
            detail = f"message {message.uid}, for later"
            self._reporter.error("publish", error, detail=detail, topic=message.topic, message=message, part="publish")
            raise
        if self._reporter.failing:
            self._reporter.works("publish")
        entry = DelayedEntry(schedule_id, store.due_of(schedule_id), message)
        return Scheduled(entry, message.topic, self.cancel)

    async def page(self, topic: str, after: str | None, limit: int) -> ScheduledPage:
        self._check_open("closing")
        page = await self._store().delayed_page(topic, after=after, count=limit, max_bytes=_PAGE_BYTES)
        return ScheduledPage(tuple(Scheduled(entry, topic, self.cancel) for entry in page.entries), page.next)

    async def cancel(self, topic: str, schedule_id: str) -> bool:
        self._check_open("closing")
        return await self._backend.cancel_later(topic, schedule_id)


def check_due(delay: object, at: object) -> tuple[float | None, datetime | None]:
    """Exactly one of the two, and not too far away."""
    if delay is not None and at is not None:
        refuse("delay", delay, f"unset together with at={at!s:.60}")
    if delay is not None:
        seconds = check_delay("delay", delay)
        if seconds > LONGEST_DELAY:
            refuse("delay", delay, f"at most {LONGEST_DELAY:.0f} seconds (ten years)")
        return seconds, None
    if at is None:
        refuse("delay", None, "a number of seconds, or at a datetime with a time zone: one of the two must be given")
    time = check_time("at", at)
    if time - now() > timedelta(seconds=LONGEST_DELAY):
        refuse("at", at, "at most ten years from now")
    return None, time
