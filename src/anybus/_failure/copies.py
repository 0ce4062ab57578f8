"""Copies that the bus makes of a message: for a retry, and for the dead letters. Pure functions of headers."""

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
"""The id of the topic's entry, which a dead letter has to name however often its copies were retried."""
RETRY_PUBLISHED_AT: Final = "retry-published-at"
"""When the topic's entry was stored, by the server's clock: a copy's own id tells when the copy was."""

_BUS_PREFIXES: Final = ("dead-letter-", "retry-")
"""The headers that the bus writes on copies begin so."""

_MAX_ATTEMPTS: Final = 2**32 - 1


def stream_base(topic: str) -> str:
    """What the names of everything kept beside a topic begin with. It hashes to the topic's own slot in a cluster.

    Of a topic with braces in its name the base tells its length, so that no two topics share one.
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
    """The count of failed handlings that a retry copy carries: ASCII digits that fit 32 bits, else 0 (as in Rust)."""
    text = headers.get(RETRY_ATTEMPT, "")
    digits = text.removeprefix("+")
    significant = digits.lstrip("0")
    if not (digits.isascii() and digits.isdigit()) or len(significant) > 10:
        return 0
    count = int(significant or "0")
    return count if count <= _MAX_ATTEMPTS else 0


def cut(text: str, limit: int = MAX_REASON_BYTES) -> str:
    """The text, cut to so many bytes of UTF-8, never within a character; what UTF-8 cannot carry is replaced."""
    encoded = text.encode(errors="replace")
    return encoded[:limit].decode(errors="ignore")


def wire_time(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


def first_published(headers: Mapping[str, str]) -> datetime | None:
    """When the first entry of a retry copy was stored, as the copy tells; None if it does not, or makes no sense."""
    try:
        at = datetime.fromisoformat(headers.get(RETRY_PUBLISHED_AT, "").replace("Z", "+00:00"))
    except ValueError:
        return None
    return at if at.tzinfo is not None else None


def retry_copy(
    message: Message, *, failures: int, reason: str | None, first_id: str, published_at: datetime | None = None
) -> Message:
    """The message as it goes to the retry stream. It keeps its topic.

    :param failures: how often it has failed so far.
    :param reason: why; None leaves what an earlier retry wrote (a release is no failure).
    :param published_at: when the first entry was stored; None = the backend does not say.
    """
    headers = {**message.headers, RETRY_ATTEMPT: str(failures), RETRY_FIRST_ID: first_id}
    if reason is not None:
        headers[RETRY_REASON] = cut(reason)
    headers.pop(RETRY_PUBLISHED_AT, None)  # on a topic it is somebody else's
    if published_at is not None:
        headers[RETRY_PUBLISHED_AT] = wire_time(published_at)
    return message.replace(headers=Headers(headers))


@dataclass(frozen=True)
class Origin:
    """Where a dead letter comes from: the first entry's place, and how often it was tried."""

    topic: str
    id: str
    group: str
    consumer: str
    attempts: int
    deliveries: int | None


def dead_letter(
    message: Message, topic: str, origin: Origin, *, code: str, reason: str, error_type: str, at: datetime
) -> Message:
    """The message as it goes to the dead-letter topic: payload and other headers untouched."""
    # What an earlier death (of a dead letter that was handled, and failed) left there is not this one's.
    headers = {
        name: value
        for name, value in message.headers.items()
        if name not in (RETRY_FIRST_ID, RETRY_PUBLISHED_AT, "dead-letter-error-type", "dead-letter-deliveries")
    }
    headers.update(
        {
            "dead-letter-reason": cut(reason),
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
    """A dead letter's message as it was before the bus wrote in its headers.

    :param first_id: for the retry stream: its next dead letter has to name the topic's entry, too.
    """
    headers = {name: value for name, value in message.headers.items() if not name.startswith(_BUS_PREFIXES)}
    if first_id is not None:
        headers[RETRY_FIRST_ID] = first_id
    return message.replace(topic=topic, headers=Headers(headers))


def undecodable(topic: str, raw: Mapping[str, bytes], *, keep_bytes: bool) -> Message:
    """A message that stands for an entry nobody could decode.

    :param keep_bytes: keep what the ``message`` field held as payload, for a backend that cannot carry raw fields;
        what exceeds 8 MiB is cut, and a header says so.
    """
    if not keep_bytes:
        return Message(topic)
    payload = bytes(raw.get("message", b""))
    if len(payload) <= MAX_COPY_BYTES:
        return Message(topic, payload)
    return Message(topic, payload[:MAX_COPY_BYTES], headers={"dead-letter-payload-cut-from": str(len(payload))})
