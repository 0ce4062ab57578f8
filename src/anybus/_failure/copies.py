"""The copies that the bus makes of a message, for a retry and for the dead letters. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from .._ground.checks import plain_text
from .._messages.message import Headers, Message

MAX_REASON_BYTES: Final = 1024
MAX_COPY_BYTES: Final = 8 * 1024 * 1024

RETRY_ATTEMPT: Final = "retry-attempt"
RETRY_REASON: Final = "retry-reason"
RETRY_FIRST_ID: Final = "retry-first-id"
"""The id of the original entry on the topic. A dead letter must name it, however often the message was retried."""
RETRY_PUBLISHED_AT: Final = "retry-published-at"
"""When the original entry was stored, by the server's clock. (A copy's own id tells when the copy was stored.)"""

DEAD_LETTER_REASON: Final = "dead-letter-reason"
"""The header that every dead letter has, whichever implementation wrote it."""

_BUS_PREFIXES: Final = ("dead-letter-", "retry-")
"""The prefixes of the headers that the bus writes on copies."""

_MAX_ATTEMPTS: Final = 2**32 - 1


def stream_base(topic: str) -> str:
    """The prefix of the names of all keys that are kept beside a topic. In a cluster, they hash to the topic's slot.

    If the topic's name has braces, the prefix includes the length of the name, so that no two topics share a prefix.
    """
    topic = plain_text(topic)
    if "{" not in topic and "}" not in topic:
        return f"anybus:{{{topic}}}"
    rest = topic.partition("{")[2]
    has_tag = "}" in rest and not rest.startswith("}")
    return f"anybus:{len(topic)}:{topic if has_tag else '{' + topic + '}'}"


def retry_stream(topic: str, group: str) -> str:
    """The name of a group's own retry stream, the same on every backend."""
    return f"{stream_base(topic)}:retry:{plain_text(group)}"


def failed_attempts(headers: Mapping[str, str]) -> int:
    """The number of failed handlings in a retry copy's header: ASCII digits that fit 32 bits, else 0 (as in Rust)."""
    text = headers.get(RETRY_ATTEMPT, "")
    digits = text.removeprefix("+")
    significant = digits.lstrip("0")
    if not (digits.isascii() and digits.isdigit()) or len(significant) > 10:
        return 0
    count = int(significant or "0")
    return count if count <= _MAX_ATTEMPTS else 0


def cut(text: str, limit: int = MAX_REASON_BYTES) -> str:
    """The text, cut to ``limit`` bytes of UTF-8, but not within a character. What UTF-8 cannot encode is replaced."""
    encoded = text.encode(errors="replace")
    return encoded[:limit].decode(errors="ignore")


def wire_time(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


def original_id(message: Message, stream: str, entry_id: str) -> str:
    """The id of the original entry on the topic. (On an entry of the topic, the header is the application's own.)"""
    return message.headers.get(RETRY_FIRST_ID, entry_id) if stream.startswith("anybus:") else entry_id


def first_published(headers: Mapping[str, str]) -> datetime | None:
    """When the original entry of a retry copy was stored; None if the copy does not say, or the value is invalid."""
    try:
        at = datetime.fromisoformat(headers.get(RETRY_PUBLISHED_AT, "").replace("Z", "+00:00"))
    except ValueError:
        return None
    return at if at.tzinfo is not None else None


def retry_copy(
    message: Message, *, failures: int, reason: str | None, first_id: str, published_at: datetime | None = None
) -> Message:
    """The copy of a message for the retry stream. It keeps its topic.

    :param failures: how often the message has failed so far.
    :param reason: why it failed; None = keep the reason of an earlier retry (a release is not a failure).
    :param first_id: the id of the original entry.
    :param published_at: when the original entry was stored; None = the backend does not say.
    """
    headers = {**message.headers, RETRY_ATTEMPT: str(failures), RETRY_FIRST_ID: first_id}
    if reason is not None:
        headers[RETRY_REASON] = cut(reason)
    headers.pop(RETRY_PUBLISHED_AT, None)  # on an entry of the topic, this header is the application's own
    if published_at is not None:
        headers[RETRY_PUBLISHED_AT] = wire_time(published_at)
    return message.replace(headers=Headers(headers))


@dataclass(frozen=True)
class Origin:
    """Where a dead letter comes from: the place of the original entry, and how often it was tried."""

    topic: str
    id: str
    group: str
    consumer: str
    attempts: int
    deliveries: int | None


def dead_letter(
    message: Message, topic: str, origin: Origin, *, code: str, reason: str, error_type: str, at: datetime
) -> Message:
    """The copy of a message for the dead-letter topic. The payload and the other headers stay unchanged."""
    # Optional headers of an earlier dead letter are dropped: a dead letter may itself be handled, and fail again.
    headers = {
        name: value
        for name, value in message.headers.items()
        if name not in (RETRY_FIRST_ID, RETRY_PUBLISHED_AT, "dead-letter-error-type", "dead-letter-deliveries")
    }
    headers.update(
        {
            DEAD_LETTER_REASON: cut(reason),
            "dead-letter-code": code,
            "dead-letter-topic": origin.topic,
            "dead-letter-id": origin.id,
            "dead-letter-group": origin.group,
            "dead-letter-consumer": origin.consumer,
            "dead-letter-attempts": str(origin.attempts),
            "dead-letter-at": wire_time(at),
        }
    )
    if error_type:
        headers["dead-letter-error-type"] = cut(error_type)
    if origin.deliveries is not None:
        headers["dead-letter-deliveries"] = str(origin.deliveries)
    return message.replace(topic=topic, headers=Headers(headers))


def restored(message: Message, topic: str, *, first_id: str | None = None) -> Message:
    """A dead letter's message as it was before the bus added headers.

    :param first_id: the id of the original entry. It is needed on the retry stream, so that the next dead letter also
        names it.
    """
    headers = {name: value for name, value in message.headers.items() if not name.startswith(_BUS_PREFIXES)}
    if first_id is not None:
        headers[RETRY_FIRST_ID] = first_id
    return message.replace(topic=topic, headers=Headers(headers))


def undecodable(topic: str, raw: Mapping[str, bytes], *, keep_bytes: bool) -> Message:
    """A message that represents an entry that could not be decoded.

    :param keep_bytes: keep the bytes of the ``message`` field as payload, for a backend that cannot store raw fields.
        They are cut to 8 MiB, and a header says so.
    """
    if not keep_bytes:
        return Message(topic)
    payload = bytes(raw.get("message", b""))
    if len(payload) <= MAX_COPY_BYTES:
        return Message(topic, payload)
    return Message(topic, payload[:MAX_COPY_BYTES], headers={"dead-letter-payload-cut-from": str(len(payload))})
