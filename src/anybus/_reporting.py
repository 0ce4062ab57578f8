"""Reports to the observer and to the log. An error in a hook or in a log handler cannot harm the bus."""

from __future__ import annotations

import logging
from typing import Final, Protocol

from ._ground.errors import words
from ._ground.log import say
from ._messages.message import Message
from .abc import BusEvent, Feature, LeaseKeeper, Observer, StreamBackend
from .abc._observer import ErrorScope

_TEXTS = 8
"""How many different error texts of one part are logged at their first occurrence."""


_WITHOUT: Final[dict[Feature, str]] = {
    "atomic_transfer": "cannot append and acknowledge in one step (atomic_transfer): a crash between the two "
    "duplicates a retry or a dead letter",
    "raw": "cannot keep raw fields beside a message: the dead letter of a malformed entry keeps only the bytes of "
    "its field 'message'",
    "delay": "cannot delay messages: retries wait in this process, and a crash loses their backoff",
    "fence": "cannot check who owns an entry: a late ack takes it from its new owner",
    "release": "cannot release entries: they are redelivered only when their lease ends",
    "renew": "cannot renew leases: if a message waits and is handled for longer than claim_idle_timeout ({lease} s) in "
    "all, it is redelivered, perhaps to another consumer",
}
"""What the bus cannot do without a feature of the backend."""


class Subject(Protocol):
    """What a log line is about: a message or an entry."""

    @property
    def id(self) -> str: ...

    @property
    def message(self) -> Message: ...

    @property
    def attempt(self) -> int: ...


class Reporter:
    """Reports for one subscription, or for the bus itself.

    :param max_attempts: how many attempts this subscription makes to handle a message.
    """

    def __init__(
        self,
        observer: Observer | None,
        *,
        topic: str | None = None,
        group: str | None = None,
        consumer: str | None = None,
        max_attempts: int | None = None,
    ) -> None:
        self._observer = observer
        self._topic = topic
        self._group = group
        self._consumer = consumer
        self.max_attempts = max_attempts
        self._streaks: dict[str, tuple[int, frozenset[str]]] = {}
        self.failing = False
        """Whether the last try of some part failed: then its next success is logged."""
        self.hears_errors = self._overridden("on_error")
        self.hears_dead_letters = self._overridden("on_dead_lettered")
        self.hears_received = self._overridden("on_received")
        self.hears_settled = self._overridden("on_settled")
        self.hears_published = self._overridden("on_published")

    def _overridden(self, hook: str) -> bool:
        # These hooks are called for every message, so no event is created unless somebody listens.
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
        message: Message | None = None,
        about: Subject | None = None,
        times: int = 1,
        part: str | None = None,
        is_logged_later: bool = False,
    ) -> None:
        """Report an error: to the observer if it overrides ``on_error``, otherwise to the log.

        :param message: the message that was to be published.
        :param about: the delivery concerned, instead of ``message``, ``message_id`` and ``attempt``.
        :param times: how often it has failed in a row. The failures number 1, 2, 4, 8... are logged.
        :param part: instead of ``times``: the part that failed. Its failures are counted until :meth:`works` is called.
        :param is_logged_later: true if the error is logged later, together with what happens to the message.
        """
        is_new = False
        if part is not None:
            times, is_new = self._failed_again(part, words(error))
        if about is not None:
            message, message_id, attempt = about.message, about.id, about.attempt
        if self.hears_errors:
            self.tell(
                "on_error", scope, error=error, detail=detail, topic=topic, message_id=message_id, attempt=attempt
            )
            return
        if is_logged_later or (times & (times - 1) and not is_new):
            return
        fields = self._place(scope, topic=topic, entry_id=message_id, attempt=attempt) | _identity(message)
        text = f"{scope}: %s: %s" if times == 1 else f"{scope}: %s: %s (failed {times} times in a row)"
        say(logging.ERROR, text, detail, said(error), fields=fields, error=error if scope == "handler" else None)

    def _failed_again(self, part: str, text: str) -> tuple[int, bool]:
        """How often the part has failed in a row, and whether the error text is new."""
        times, texts = self._streaks.get(part, (0, frozenset[str]()))
        is_new = text not in texts and len(texts) < _TEXTS
        self._streaks[part] = times + 1, texts | {text} if is_new else texts
        self.failing = True
        return times + 1, is_new

    def works(self, part: str) -> None:
        """The part has worked. If its last try failed, log that it works again."""
        if self._streaks.pop(part, None) is not None:
            self.failing = bool(self._streaks)
            say(logging.INFO, f"{part}: works again", fields=self._place(part.partition(" ")[0]))

    def log(
        self,
        level: int,
        scope: str,
        text: str,
        *args: object,
        about: Subject | None = None,
        error: BaseException | None = None,
        **known: object,
    ) -> None:
        """Log one line, whether or not the observer is told.

        :param error: the exception whose traceback is logged after the line.
        :param known: more fields of the record.
        """
        if about is not None:
            known = {"entry_id": about.id, "attempt": about.attempt, **_identity(about.message), **known}
        say(level, text, *args, fields=self._place(scope, **known), error=error)

    def _place(self, scope: str, *, topic: object = None, **known: object) -> dict[str, object]:
        max_attempts = None if known.get("attempt") is None else self.max_attempts
        return {
            "scope": scope,
            "topic": topic or self._topic,
            "group": self._group,
            "consumer": self._consumer,
            "max_attempts": max_attempts,
            **known,
        }

    def notice(self, hook: str, scope: str, detail: str, *, count: int | None = None) -> None:
        """Log a warning for the operator, and call the observer's hook as well."""
        fields = {"topic": self._topic, "group": self._group}
        say(logging.WARNING, f"{scope}: %s", detail, fields=fields, hidden=self._place(scope))
        self.tell(hook, scope, detail=detail, count=count)

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
        count: int | None = None,
    ) -> None:
        if self._observer is None:
            return
        place = (topic or self._topic, self._group, self._consumer)
        event = BusEvent(scope, *place, message_id, attempt, error, detail, count)
        try:
            getattr(self._observer, hook)(event)
        except (KeyboardInterrupt, SystemExit):
            raise  # a signal handler can raise these anywhere
        except BaseException as raised:  # noqa: ASYNC103 - a hook awaits nothing, so this is no real cancellation
            say(
                logging.ERROR,
                f"the observer's {hook} raised; the bus continues",
                hidden=self._place(scope, topic=event.topic),
                error=raised,
            )


def _identity(message: Message | None) -> dict[str, object]:
    return {} if message is None else {"uid": message.uid, "key": message.key}


def said(error: BaseException) -> str:
    """An exception's type and text, for a log line."""
    name, text = type(error).__name__, words(error)
    return name if text == name else f"{name}: {text}"


class Notices:
    """Logs each notice once in the life of a bus."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            say(logging.WARNING, "%s", text)

    def mention_limits(self, backend: StreamBackend, lease: float) -> None:
        """Log what the bus cannot do on this backend.

        :param lease: ``claim_idle_timeout``, in seconds.
        """
        name = type(backend).__name__
        for feature, text in _WITHOUT.items():
            if feature not in backend.features:
                self.once(f"{name} {text.format(lease=lease)}")
        lacking = [feature for feature in ("delivery_count", "renew", "release") if feature not in backend.features]
        if lacking:
            self.once(
                f"{name} cannot count deliveries that ended without an outcome (it lacks {', '.join(lacking)}): "
                "max_deliveries has no effect, and a message that kills its process is redelivered forever"
            )
        if not isinstance(backend, LeaseKeeper):
            self.once(
                f"{name} does not keep a group's lease: nobody notices if members of a group have different values of "
                "claim_idle_timeout, and then a message can be handled twice at the same time"
            )
