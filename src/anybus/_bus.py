"""The bus: publishing, subscribing, and the end of a bus."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, cast

import anyio
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from ._dead_letters.letter import LetterFilter
from ._dead_letters.view import DeadLetters, open_dead_letters
from ._ground.callables import check_async_function
from ._ground.checks import refuse
from ._ground.errors import ClosedError
from ._ground.home import Entered, Home
from ._messages.message import Message
from ._options import PublishOptions, StreamBusOptions, SubscriptionConfig
from ._publishing.batch import BatchOutcome
from ._publishing.outbox import Outbox
from ._publishing.publisher import Publisher
from ._reporting import Notices, Reporter
from ._retention.caretaker import Caretaker
from ._runtime.members import Members
from ._runtime.pool import Handler
from ._runtime.pull import DeliveryStream, PullTaker
from ._runtime.subscription import ClosedWhileEnteredError, Subscription
from ._scheduling.definition import Given, MessageFactory, Missed
from ._scheduling.delayed import DelayedPublishing, Scheduled, ScheduledMessages
from ._scheduling.recurring import Schedule, Schedules
from .abc import Retention, StreamBackend

if TYPE_CHECKING:
    from typing_extensions import Self


class StreamBus(AbstractAsyncContextManager["StreamBus", "bool | None"]):
    """An event bus on a backend. An async context manager, which also enters and leaves the backend.

    Leaving the bus first ends its subscriptions. After that, every call raises :class:`ClosedError`.

    A bus belongs to the event loop in which it was entered. In any other loop or thread, the bus raises
    ``RuntimeError``, and so do the objects that it returned.

    :param backend: the backend that holds the streams.
    :param options: durations, sizes and the observer.
    :raises ValidationError: if one of them has the wrong type.
    :raises UnsupportedError: if the options have a retention, and the backend cannot keep one.
    """

    def __init__(self, backend: StreamBackend, options: StreamBusOptions | None = None) -> None:
        if not isinstance(backend, StreamBackend):
            refuse("backend", backend, "an anybus.abc.StreamBackend (for a URL use anybus.connect)")
        if options is not None and not isinstance(options, StreamBusOptions):
            refuse("options", options, "an anybus.StreamBusOptions, or None")
        self._backend = backend
        self._options = options or StreamBusOptions()
        self._reporter = Reporter(self._options.observer)
        self._publisher = Publisher(backend, self._options, self._reporter)
        self._outbox = Outbox(self._publisher, self._options, self._reporter)
        notices = Notices()
        self._caretaker = Caretaker(backend, self._options, notices)
        self._members = Members(backend, self._options, self._caretaker, notices)
        self._delayed = DelayedPublishing(backend, self._publisher, self._options, self._reporter, self._check_open)
        self._schedules = Schedules(backend, self._options)
        self._state = "not entered"
        self._home: Home | None = None
        self._entered: Entered[None] | None = None

    def __repr__(self) -> str:
        return f"<StreamBus {self._state} backend={self._backend!r} subscriptions={len(self._members)}>"

    @property
    def backend(self) -> StreamBackend:
        return self._backend

    @property
    def options(self) -> StreamBusOptions:
        return self._options

    async def __aenter__(self) -> Self:
        """Enter the backend and open the bus.

        :raises ClosedError: if the bus has been entered before, even if that failed.
        :raises EventBusError: if the backend cannot be entered.
        """
        if self._state != "not entered":
            raise ClosedError(
                "this bus has already been entered, and a bus can be entered only once: create another bus"
            )
        self._state = "being entered"
        self._entered = Entered("the bus", self._opened())
        try:
            await self._entered.__aenter__()
        except BaseException:
            self._state = "closed"
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """End the subscriptions, then leave the backend.

        :raises RuntimeError: in a task or an event loop other than the one in which the bus was entered.
        :raises ClosedError: if the bus is not open.
        """
        if self._home is None or self._entered is None:
            raise ClosedError(f"the bus is {self._state}: only an open bus can be left")
        return await self._entered.__aexit__(exc_type, exc_value, traceback)  # noqa: ASYNC102 - shielded where needed

    @asynccontextmanager
    async def _opened(self) -> AsyncGenerator[None, None]:
        async with self._backend, self._outbox.running():
            self._home = Home()
            self._state = "open"
            self._reporter.log(logging.INFO, "opened", "bus opened on %s", type(self._backend).__name__)
            gracefully = False
            try:
                yield
                gracefully = True
            finally:
                self._state = "closing"
                await self._end(gracefully=gracefully)  # noqa: ASYNC102 - shielded inside

    async def _end(self, *, gracefully: bool) -> None:
        """End everything that runs. A native asyncio cancellation interrupts any of these steps, but skips none."""
        try:
            try:
                await self._schedules.end()
            except BaseException:
                gracefully = False
                raise
            finally:
                await self._members.end(gracefully=gracefully)  # noqa: ASYNC102 - shielded inside
        finally:
            self._home = None
            self._state = "closed"
            await self._outbox.aclose()  # noqa: ASYNC102 - shielded inside
            self._reporter.log(logging.INFO, "closed", "bus closed")

    def _check_open(self, *also: str) -> None:
        if self._home is not None:
            self._home.check("the bus")
        if self._state != "open" and self._state not in also:
            raise ClosedError(f"the bus is {self._state}: use it inside its 'async with' block")

    async def publish(self, message: Message, options: PublishOptions | None = None) -> str:
        """Publish a message to its topic. The bus never repeats a publish by itself.

        :return: the entry's id. A :class:`Duplicate` if the options have an idempotency key that was published before:
            nothing was appended.
        :raises ValidationError: if the message is refused. Nothing was sent.
        :raises UnsupportedError: if the backend cannot do what the options ask for. Nothing was sent.
        :raises SerializationError: if the codec cannot encode the message. Nothing was sent.
        :raises BackendError: if the backend failed, or ``publish_timeout`` passed. ``may_have_happened`` tells whether
            the message may have been stored.
        :raises ClosedError: if the bus is not open.
        """
        self._check_open("closing")  # handlers that still run may publish their results
        return await self._publisher.publish(message, options)

    async def publish_batch(self, messages: Iterable[Message], options: PublishOptions | None = None) -> BatchOutcome:
        """Publish many messages. Those of one topic are appended in order.

        If a message is refused, or the backend fails to store it, the others are still published. Its error is in the
        outcome, and is not raised.

        :return: one result per message, in order.
        :raises ValidationError: if ``messages`` or ``options`` has the wrong type, or if the options have an
            ``idempotency_key`` and there are several messages.
        :raises UnsupportedError: if the backend cannot do what the options ask for. Nothing was sent.
        :raises ClosedError: if the bus is not open.
        """
        self._check_open("closing")
        return await self._publisher.publish_batch(messages, options)

    def publish_nowait(self, message: Message, options: PublishOptions | None = None) -> None:
        """Publish a message without waiting for the server. It is put into a buffer, from which the bus sends it soon.

        The bus has such a buffer if its options have a ``publish_buffer_size``.

        If it cannot be published, nobody is told but the observer (``on_error``) or the log. If the process dies, what
        is in the buffer is lost. Leaving the bus sends it first, for as long as ``publish_timeout`` and
        ``cleanup_timeout`` allow. The messages of one topic that are published in this way are appended in order.

        :raises WouldBlock: (AnyIO's) if the buffer holds ``publish_buffer_size`` messages. Nothing was put into it.
        :raises ValidationError: if the message is refused.
        :raises UnsupportedError: if the bus has no buffer, or the backend cannot do what the options ask for.
        :raises ClosedError: if the bus is not open.
        """
        self._check_open("closing")
        self._outbox.put(message, options)

    async def declare_topic(self, topic: str, retention: Retention | None = None, *, change: bool = False) -> None:
        """Declare how long a topic keeps its entries. This is stored on the server, and holds for all processes.

        Any subscription of the topic, in any process, trims it. A topic without a declaration is never trimmed.
        Declaring again what is declared changes nothing.

        :param retention: :class:`Limits`, :class:`Interest` or :class:`WorkQueue`; for a topic that ends in ``.dead``
            only :class:`Limits`. None = the default of the bus's options.
        :param change: replace another retention that is declared. (A default is replaced without this.)
        :raises ValidationError: if a parameter is refused, if the topic is declared with another retention, or if it is
            to be a :class:`WorkQueue` and has several groups. Nothing was stored.
        :raises UnsupportedError: if the backend is not an :class:`anybus.abc.RetentionKeeper`.
        :raises BackendError: if the backend failed. Declaring again does no harm.
        :raises ClosedError: if the bus is not open.
        """
        self._check_open()
        await self._caretaker.declare(topic, retention, change=change)

    async def publish_later(
        self,
        message: Message,
        options: PublishOptions | None = None,
        *,
        delay: float | None = None,
        at: datetime | None = None,
    ) -> Scheduled:
        """Store a message now. It is appended to its topic when it is due, even if this process has ended by then.

        Give exactly one of ``delay`` and ``at``. The server's clock decides when the message is due. It is appended
        exactly once. A time in the past means at once.

        :param delay: seconds from now, at most ten years.
        :param at: the time, with a time zone, at most ten years from now.
        :return: what was stored: its id, when it is due, and how to cancel it.
        :raises ValidationError: if the message, the options or the time is refused. Nothing was stored.
        :raises SerializationError: if the codec cannot encode the message. Nothing was stored.
        :raises UnsupportedError: if the backend is not an :class:`anybus.abc.ScheduleStore`.
        :raises BackendError: if the backend failed, or ``publish_timeout`` passed. ``may_have_happened`` tells whether
            the message may have been stored.
        :raises ClosedError: if the bus is not open.
        """
        self._check_open("closing")
        return await self._delayed.publish(message, options, delay, at)

    def scheduled(self, topic: str) -> ScheduledMessages:
        """The messages that wait for a topic: to list and to cancel them. This call itself reads nothing.

        :raises ValidationError: if the topic is refused.
        :raises UnsupportedError: if the backend is not an :class:`anybus.abc.ScheduleStore`.
        :raises ClosedError: if the bus is not open.
        """
        self._check_open("closing")
        return self._delayed.view(topic)

    def schedule(
        self,
        name: str,
        message: Message | MessageFactory,
        *,
        every: float | None = None,
        cron: str | None = None,
        timezone: str = "UTC",
        missed: Missed = "skip",
        topic: str | None = None,
        version: str = "",
    ) -> AbstractAsyncContextManager[Schedule]:
        """Publish a message at each tick of a schedule, while the body of the ``async with`` runs.

        Each tick is published once, however many processes run the schedule. If the one that publishes dies, another
        one takes over within 7 seconds. Give exactly one of ``every`` and ``cron``. If a schedule is entered with
        another ``every``, ``cron``, ``timezone``, ``missed`` or ``version`` than before, the new definition takes over,
        and the schedule ends in the processes that have the old one.

        :param name: the schedule's name, unique for its topic.
        :param message: a message, which gets a new uid for each tick, and the tick as ``occurred_at``. Or a function
            that takes the tick (a datetime, UTC) and returns a message, or None to publish nothing. It may be async. It
            is called only in the process that publishes. If it raises, it is called again until the tick is missed.
        :param every: seconds between ticks, from 0.1 to ten years, in whole milliseconds. Ticks are the multiples
            since 1970-01-01T00:00Z.
        :param cron: a cron expression with five fields. Needs the extra ``anybus[cron]``.
        :param timezone: the time zone of ``cron``, by its IANA name (``Europe/Berlin``).
        :param missed: what happens to ticks that no process could publish within 10 seconds. ``skip``: they are not
            published. ``catch-up``: one is published for all of them, the latest.
        :param topic: the topic to which a function's messages are published.
        :param version: any text. A new one makes the definition a new one.
        :raises ValidationError: if a value is refused. Nothing was stored.
        :raises UnsupportedError: when entered, if the backend is not an :class:`anybus.abc.TickStore`, or if ``cron``
            is given and cronsim is not installed.
        :raises BackendError: when entered or from the body, if the backend failed, and trying again will not help.
        :raises ClosedError: if the bus is not open.
        """
        self._check_open()
        given = Given(name, message, every, cron, timezone, missed, topic, version).checked()
        return Entered("the schedule", self._schedule(given))

    @asynccontextmanager
    async def _schedule(self, given: Given) -> AsyncGenerator[Schedule, None]:
        self._check_open()
        assert self._home is not None
        async with self._schedules.open(given, self._home) as schedule:
            yield schedule

    def dead_letters(
        self,
        topic: str,
        *,
        dead_letter_topic: str | None = None,
        group: str | None = None,
        code: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        key: str | None = None,
    ) -> DeadLetters:
        """The dead letters of a topic, for operators: to list, to replay, to purge. This call itself reads nothing.

        A dead letter matches if it passes every filter that is given. Without filters, all dead letters of the topic
        match. A dead letter that does not name its topic counts as this topic's.

        :param topic: the application's topic. The dead letters came from it, and a replay sends them back to it.
        :param dead_letter_topic: the topic that holds the dead letters; None = ``<topic>.dead``.
        :param group: only those that this group gave up on.
        :param code: only those with this code: ``rejected``, ``retries``, ``gave-up``, ``invalid``, ``expired``,
            ``deliveries``, ``malformed``, ``unexpected`` or ``too-large``. Other implementations may write other codes:
            list those dead letters without this filter.
        :param since: only those that were given up on at this time or later.
        :param until: only those that were given up on before this time.
        :param key: only those whose message has this key.
        :raises ValidationError: if a parameter is refused.
        :raises UnsupportedError: if the backend is not an :class:`anybus.abc.DeadLetterStore`.
        :raises ClosedError: if the bus is not open.
        """
        self._check_open()
        only = LetterFilter(topic=topic, group=group, code=code, since=since, until=until, key=key)
        return open_dead_letters(
            self._backend, dead_letter_topic, only, check_open=self._check_open, reporter=self._reporter
        )

    def subscribe(self, config: SubscriptionConfig, handler: Handler) -> AbstractAsyncContextManager[Subscription]:
        """Handle the messages of a topic, as a member of a group, while the body of the ``async with`` runs.

        Entering returns once the group exists. If the body returns, the subscription ends gracefully. If the body
        raises or is cancelled, the handlers are cancelled at once, and their messages are released.

        :param handler: an async function that takes one :class:`Delivery`.
        :raises ValidationError: if the configuration or the handler is refused.
        :raises ClosedError: if the bus is not open.
        """
        check_async_function("handler", handler, "an async function that takes one Delivery")
        return Entered("the subscription", self._subscription(self._checked(config), handler))

    async def consume(
        self,
        config: SubscriptionConfig,
        handler: Handler,
        *,
        task_status: TaskStatus[Subscription] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """:meth:`subscribe` as one call, for task groups.

        ``await tg.start(bus.consume, config, handler)`` returns the :class:`Subscription`. The call itself returns when
        the subscription is closed. Raises the same errors as :meth:`subscribe`.
        """
        if self._home is not None:
            self._home.check("the bus")
        await checkpoint()  # a task that is cancelled before it began must not raise ClosedError
        if self._state == "closing":
            return  # the bus would close the subscription at once, which is no error
        try:
            async with self.subscribe(config, handler) as subscription:
                task_status.started(subscription)
                await subscription.wait_closed()
        except ClosedWhileEnteredError:
            return

    def deliveries(self, config: SubscriptionConfig) -> AbstractAsyncContextManager[DeliveryStream]:
        """The pull form of :meth:`subscribe`: a stream of deliveries that the caller settles.

        The lease of a delivery is renewed until it is settled. Leaving the block releases all unsettled deliveries.

        :raises ValidationError: if the configuration is refused. ``ack_mode`` must be ``manual`` or unset.
        :raises ClosedError: if the bus is not open.
        """
        config = self._checked(config)
        if config.ack_mode not in (None, "manual"):
            refuse("ack_mode", config.ack_mode, "'manual' or unset with deliveries(), where the caller settles")
        if config.guarantee == "at-most-once":
            allowed = "'at-least-once' or unset with deliveries(), where the caller settles"
            refuse("guarantee", config.guarantee, allowed)
        if config.handler_timeout is not None:
            refuse("handler_timeout", config.handler_timeout, "unset with deliveries(), which has no handler")
        if config.circuit is not None:
            refuse("circuit", config.circuit, "unset with deliveries(), which has no handler that can fail")
        for field in ("retry_on", "give_up_on"):
            if getattr(config, field) is not None:
                refuse(field, getattr(config, field), "unset with deliveries(), which has no handler that can raise")
        if config.on_lease_lost != "continue":
            refuse("on_lease_lost", config.on_lease_lost, "'continue' with deliveries(), which has no handler")
        return Entered("the stream of deliveries", self._delivery_stream(config))

    @asynccontextmanager
    async def _delivery_stream(self, config: SubscriptionConfig) -> AsyncGenerator[DeliveryStream, None]:
        async with self._subscription(config, None) as subscription:
            taker = cast("PullTaker", subscription._taker)
            yield DeliveryStream(taker, subscription.close, subscription._context.home)

    @asynccontextmanager
    async def _subscription(
        self, config: SubscriptionConfig, handler: Handler | None
    ) -> AsyncGenerator[Subscription, None]:
        self._check_open()
        assert self._home is not None
        async with self._members.open(config, handler, self._home) as subscription:
            yield subscription

    def _checked(self, config: SubscriptionConfig) -> SubscriptionConfig:
        self._check_open()
        return self._members.check(config)
