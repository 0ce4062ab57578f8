"""Telling the observer; errors that no hook hears go to the log. Nothing that a hook does can harm the bus."""

from __future__ import annotations

import logging
from typing import Final

from ._errors import words
from .abc import BusEvent, Observer
from .abc._observer import ErrorScope

logger: Final = logging.getLogger("anybus")


class Reporter:
    """Speaks for one subscription, or for the bus itself."""

    def __init__(
        self,
        observer: Observer | None,
        *,
        topic: str | None = None,
        group: str | None = None,
        consumer: str | None = None,
    ) -> None:
        self._observer = observer
        self._topic = topic
        self._group = group
        self._consumer = consumer
        self._hears_errors = self._overridden("on_error")
        self.hears_received = self._overridden("on_received")
        self.hears_settled = self._overridden("on_settled")
        self.hears_published = self._overridden("on_published")

    def _overridden(self, hook: str) -> bool:
        # Events that nobody listens to are not made: these hooks are called for every message.
        if self._observer is None:
            return False
        return getattr(getattr(self._observer, hook), "__func__", None) is not getattr(Observer, hook)

    def error(
        self,
        scope: ErrorScope,
        error: BaseException,
        *,
        detail: str,
        topic: str | None = None,
        message_id: str | None = None,
        attempt: int | None = None,
    ) -> None:
        if self._hears_errors:
            self.tell(
                "on_error", scope, error=error, detail=detail, topic=topic, message_id=message_id, attempt=attempt
            )
            return
        place = " ".join(
            f"{name}={value!r}"
            for name, value in (
                ("topic", topic or self._topic),
                ("group", self._group),
                ("consumer", self._consumer),
                ("id", message_id),
                ("attempt", attempt),
            )
            if value is not None
        )
        trace = error if scope == "handler" else None
        logger.error("%s: %s: %s: %s [%s]", scope, detail, type(error).__name__, words(error), place, exc_info=trace)

    def notice(self, hook: str, scope: str, detail: str) -> None:
        """What an operator should hear of: told to the observer's hook, or else to the log."""
        if self._overridden(hook):
            self.tell(hook, scope, detail=detail)
        else:
            logger.warning("%s: %s [topic=%r group=%r]", scope, detail, self._topic, self._group)

    def tell(
        self,
        hook: str,
        scope: str,
        *,
        topic: str | None = None,
        message_id: str | None = None,
        attempt: int | None = None,
        error: BaseException | None = None,
        detail: str | None = None,
    ) -> None:
        if self._observer is None:
            return
        event = BusEvent(scope, topic or self._topic, self._group, self._consumer, message_id, attempt, error, detail)
        try:
            getattr(self._observer, hook)(event)
        except (KeyboardInterrupt, SystemExit):
            raise  # perhaps from a signal handler, which can strike anywhere
        except BaseException:  # noqa: ASYNC103 - it awaits nothing: no real cancellation
            logger.exception("the observer's %s raised; the bus goes on", hook)


class Notices:
    """Says each thing once in a bus's life."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text)
