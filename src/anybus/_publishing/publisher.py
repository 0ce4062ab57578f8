"""The publisher: prepares messages, hands them to the backend, and reports what happened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

import anyio

from .._ground.checks import refuse
from .._ground.clock import now
from .._ground.errors import BackendError, EventBusError, UnsupportedError, ValidationError
from .._messages.message import Message, check_outgoing
from .._options import PublishOptions, StreamBusOptions
from .._reporting import Reporter
from ..abc import Duplicate, PublishItem, PublishSpec, StreamBackend, TimedPublisher
from .batch import BatchOutcome
from .deduplication import check_batch, check_deduplication, with_key


class Publisher:
    """Publishes for a bus. Its methods are documented there."""

    def __init__(self, backend: StreamBackend, options: StreamBusOptions, reporter: Reporter) -> None:
        self._backend = backend
        self._timed = backend if isinstance(backend, TimedPublisher) else None
        self._options = options
        self._reporter = reporter

    async def publish(self, message: Message, options: PublishOptions | None) -> str:
        # As in `prepare`, without its call: this is done for every message.
        check_outgoing(message, self._options.max_payload_bytes)
        spec: PublishSpec | None = None
        if options is not None:
            message, spec = self.with_options(message, options)
        topic = message.topic
        try:
            if spec is None and self._timed is not None:
                timeout = self._options.publish_timeout
                entry_id = await self._timed.publish_within(topic, message, timeout=timeout)
            else:
                entry_id = await self._publish_by_deadline(message, spec)
        except Exception as error:
            self._reporter.error(
                "publish", error, detail=f"message {message.uid}", topic=topic, message=message, part="publish"
            )
            raise
        if self._reporter.failing:
            self._reporter.works("publish")
        if self._reporter.hears_published and not isinstance(entry_id, Duplicate):
            self._reporter.tell("on_published", "published", topic=topic, message_id=entry_id)
        return entry_id

    async def _publish_by_deadline(self, message: Message, spec: PublishSpec | None) -> str:
        entry_id = ""
        with anyio.move_on_after(self._options.publish_timeout) as scope:
            if spec is None:
                entry_id = await self._backend.publish(message.topic, message)
            else:
                entry_id = await self._backend.publish_with(message.topic, message, spec)
        if not entry_id and scope.cancelled_caught:
            raise self.timed_out()
        return entry_id

    async def publish_batch(self, messages: Iterable[Message], options: PublishOptions | None) -> BatchOutcome:
        if isinstance(messages, Message) or not isinstance(messages, Iterable):
            refuse("messages", messages, "an iterable of anybus.Message")
        if options is not None:
            self.check_options(options)
            messages = check_batch(messages, options)
        results: list[str | EventBusError] = []
        accepted: list[int] = []
        items: list[PublishItem] = []
        for index, message in enumerate(messages):
            try:
                items.append(self.prepare(message, options))
            except ValidationError as error:
                results.append(error)
            else:
                results.append("")  # the outcome takes its place below
                accepted.append(index)
        for index, outcome in zip(accepted, await self.send(items), strict=True):
            results[index] = outcome
        return BatchOutcome(tuple(results))

    async def send(self, items: Sequence[PublishItem]) -> list[str | EventBusError]:
        """Publish prepared messages, and report what happened to each. Returns each one's id or error."""
        outcomes: list[str | EventBusError] = []
        if items:
            try:
                with anyio.move_on_after(self._options.publish_timeout):
                    outcomes = await self._backend.publish_many(items)
            except Exception as error:
                self._reporter.error("publish", error, detail=f"a batch of {len(items)} messages", part="publish")
                raise
        if len(outcomes) < len(items):
            outcomes = [self.timed_out() for _ in items]
        hears_published = self._reporter.hears_published
        for (topic, message, _), outcome in zip(items, outcomes, strict=True):
            if (type(outcome) is str and not hears_published) or isinstance(outcome, Duplicate):
                continue
            if isinstance(outcome, EventBusError):
                detail = "a message of a batch"
                self._reporter.error("publish", outcome, detail=detail, topic=topic, message=message, part="publish")
            else:
                self._reporter.tell("on_published", "published", topic=topic, message_id=outcome)
        if self._reporter.failing and not isinstance(outcomes[-1] if outcomes else None, EventBusError):
            self._reporter.works("publish")
        return outcomes

    def prepare(self, message: Message, options: PublishOptions | None) -> PublishItem:
        """Check a message, and apply the options."""
        check_outgoing(message, self._options.max_payload_bytes)
        spec: PublishSpec | None = None
        if options is not None:
            message, spec = self.with_options(message, options)
        return message.topic, message, spec

    def check_options(self, options: PublishOptions) -> None:
        if not isinstance(options, PublishOptions):
            refuse("options", options, "an anybus.PublishOptions, or None")

    def with_options(
        self, message: Message, options: PublishOptions, *, later: float = 0.0
    ) -> tuple[Message, PublishSpec | None]:
        """Apply the options to a message that has been checked. Returns it, and what the backend must do beyond it.

        :param later: in how many seconds the message is to be appended.
        """
        self.check_options(options)
        if options.metadata:
            message = message.replace(headers={**message.headers, **options.metadata})
        if options.topic_ttl is not None and message.expires_at is None:
            message = message.replace(expires_at=now() + timedelta(seconds=later + options.topic_ttl))
        check_deduplication(options, self._backend)
        message, key, window = with_key(message, options)
        spec = self._confirmed(options)
        if key is None:
            return message, spec
        if spec is not None:
            raise UnsupportedError(
                f"confirmation={options.confirmation!r} is not possible for a message that is deduplicated: use "
                "confirmation='accepted', or publish it without idempotency_key and deduplication_window"
            )
        return message, PublishSpec(idempotency_key=key, deduplication_window=window)

    def _confirmed(self, options: PublishOptions) -> PublishSpec | None:
        """What the backend must confirm beyond having the message; None = nothing.

        :raises UnsupportedError: if the backend cannot do it.
        """
        if options.confirmation == "accepted":
            return None
        if "confirm" not in self._backend.features:
            raise UnsupportedError(
                f"{type(self._backend).__name__} cannot confirm that a message is {options.confirmation}: use "
                "confirmation='accepted', or a backend with the feature 'confirm'"
            )
        limit = self._options.publish_timeout
        if options.confirmation_timeout >= limit:
            refuse("confirmation_timeout", options.confirmation_timeout, f"less than publish_timeout ({limit} s)")
        replicas = options.replicas
        if replicas is None:
            replicas = 1 if options.confirmation == "replicated" else 0
        return PublishSpec(
            confirmation=options.confirmation,
            replicas=replicas,
            confirmation_timeout=options.confirmation_timeout,
        )

    def timed_out(self) -> BackendError:
        text = f"no answer within publish_timeout ({self._options.publish_timeout} s)"
        return BackendError(text, may_have_happened=True, can_pass=True)
