"""A dead letter as an operator sees it, and the filter for dead letters. Values, without any I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from .._failure.copies import restored
from .._failure.settlement import CODES
from .._ground.checks import check_choice, check_name, check_text, check_time, check_topic, refuse
from .._messages.message import Message
from ..abc import StoredEntry
from ..abc._dead_letters import RAW_PREFIX

T = TypeVar("T")


@dataclass(frozen=True)
class DeadLetter:
    """A message that was given up on. A field is None if the dead letter's headers do not contain its value.

    :ivar id: the entry's id in the dead-letter topic.
    :ivar message: the message as it was before it was given up on, and as a replay publishes it: with its original
        topic, and without the bus's headers. (A replay also removes ``expires_at``.) None = it cannot be decoded. Then
        either the entry was malformed when it was given up on, and ``code`` says so. Or the dead letter itself cannot
        be decoded (or is too large to be read), and ``error`` says so.
    :ivar raw: the fields of a malformed entry; empty if they are too large to be listed.
    :ivar raw_sizes: the size of each of those fields in bytes, whether the field is listed or not.
    :ivar reason: the reason, as text.
    :ivar code: the reason, as a code: ``rejected``, ``retries``, ``gave-up``, ``invalid``, ``expired``,
        ``deliveries``, ``malformed``, ``unexpected`` or ``too-large``. Other implementations and later versions may
        write other codes.
    :ivar error_type: the type of the exception.
    :ivar topic: the topic of the original entry.
    :ivar first_id: the id of the original entry.
    :ivar group: the group that gave up on it.
    :ivar consumer: the member of the group that gave up on it.
    :ivar attempts: how often it was handled.
    :ivar deliveries: how often the last entry was delivered, by the backend's count.
    :ivar at: when it was given up on, UTC; if the headers do not say, when the backend stored the dead letter.
    :ivar error: why the dead letter itself cannot be decoded.
    """

    id: str
    message: Message | None = None
    raw: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    raw_sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    reason: str | None = None
    code: str | None = None
    error_type: str | None = None
    topic: str | None = None
    first_id: str | None = None
    group: str | None = None
    consumer: str | None = None
    attempts: int | None = None
    deliveries: int | None = None
    at: datetime | None = None
    error: str | None = None

    def __repr__(self) -> str:
        # Payloads and raw fields may be large or secret. They must not reach a log by accident.
        return f"<DeadLetter {self.id} code={self.code!r} group={self.group!r} topic={self.topic!r} {self.message!r}>"


def read_letter(entry: StoredEntry, topic: str) -> DeadLetter:
    """Turn an entry of the dead-letter topic into a dead letter.

    :param topic: the application's topic, which the restored message gets.
    """
    message = entry.message
    if message is None:
        return DeadLetter(entry.id, None, entry.fields, entry.sizes, at=entry.published_at, error=entry.error)
    headers = message.headers
    raw_sizes = _raw(entry.sizes)
    return DeadLetter(
        id=entry.id,
        message=None if raw_sizes else restored(message, topic),
        raw=_raw(entry.fields),
        raw_sizes=raw_sizes,
        reason=headers.get("dead-letter-reason"),
        code=headers.get("dead-letter-code"),
        error_type=headers.get("dead-letter-error-type"),
        topic=headers.get("dead-letter-topic"),
        first_id=headers.get("dead-letter-id"),
        group=headers.get("dead-letter-group"),
        consumer=headers.get("dead-letter-consumer"),
        attempts=_number(headers.get("dead-letter-attempts", "")),
        deliveries=_number(headers.get("dead-letter-deliveries", "")),
        at=_time(headers.get("dead-letter-at", "")) or entry.published_at,
    )


@dataclass(frozen=True, kw_only=True)
class LetterFilter:
    """A filter for dead letters. A dead letter matches if it passes every condition that is given."""

    topic: str
    group: str | None = None
    code: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "topic", check_topic("topic", self.topic))
        checks = {"group": check_name, "code": _check_code, "key": check_text, "since": check_time, "until": check_time}
        for name, check in checks.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.since is not None and self.until is not None and self.until <= self.since:
            refuse("until", self.until, f"later than since ({self.since})")

    def matches(self, letter: DeadLetter) -> bool:
        return (
            letter.topic in (None, self.topic)
            and self.group in (None, letter.group)
            and self.code in (None, letter.code)
            and (self.since is None or (letter.at is not None and letter.at >= self.since))
            and (self.until is None or (letter.at is not None and letter.at < self.until))
            and (self.key is None or (letter.message is not None and letter.message.key == self.key))
        )


def _check_code(field: str, value: object) -> str:
    # A misspelt code would silently find nothing. Other implementations may write other codes: their dead letters are
    # found without this filter.
    return check_choice(field, value, CODES)


def _raw(fields: Mapping[str, T]) -> dict[str, T]:
    return {name[len(RAW_PREFIX) :]: value for name, value in fields.items() if name.startswith(RAW_PREFIX)}


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _time(text: str) -> datetime | None:
    try:
        return check_time("dead-letter-at", datetime.fromisoformat(text.replace("Z", "+00:00")))
    except ValueError:
        return None
