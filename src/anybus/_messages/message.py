"""The message: what applications publish and handle. Immutable, its headers too."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any, TypeVar, overload

import msgspec

from .._ground.checks import PLAIN_TIMES, check_bytes, check_name, check_text, check_time, check_topic, refuse
from .._ground.clock import now
from .._ground.errors import ValidationError
from . import json as _json
from .schema import Schema
from .trace import TraceContext

T = TypeVar("T")


class Headers(Mapping[str, str]):
    """An immutable mapping of header names to values. Names are case-sensitive, as on the wire."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, str] | None = None) -> None:
        self._items: dict[str, str] = {} if items is None else _plain_headers(dict(items))

    @classmethod
    def trusted(cls, items: dict[str, str]) -> Headers:
        """Headers from a dict that a decoder has already checked, and to which nobody else refers. For codecs."""
        if not items:
            return NO_HEADERS
        headers = cls.__new__(cls)
        headers._items = items
        return headers

    def plain(self) -> dict[str, str]:
        """The dict inside, which must not be changed. For codecs."""
        return self._items

    def __getitem__(self, name: str) -> str:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return f"Headers({self._items!r})"

    def __or__(self, other: Mapping[str, str]) -> Headers:
        """A copy with the other's headers added. For a name that is in both, the other's value is used."""
        return Headers({**self._items, **other})


def _plain_headers(given: dict[str, str]) -> dict[str, str]:
    for name, value in given.items():
        if not (type(name) is type(value) is str and name.isascii() and value.isascii()):
            break
    else:
        return given
    headers = {check_text("header name", name): check_text(f"header {name!r}", value) for name, value in given.items()}
    if len(headers) != len(given):
        refuse("headers", given, "a mapping that holds no name twice")
    return headers


NO_HEADERS = Headers()


def new_uid() -> str:
    """A time-ordered UUID (version 7, RFC 9562 section 5.7): 48 bits of Unix milliseconds, 74 random bits."""
    global _uid_time  # noqa: PLW0603 - only a cache
    milliseconds = time.time_ns() // 1_000_000
    known, prefix = _uid_time
    if known != milliseconds:
        # Cached, because many messages are created in the same millisecond.
        if milliseconds // 1000 != known // 1000:
            # A virtual machine may have been restored from a snapshot, and others from the same one.
            _tails.clear()
        text = f"{milliseconds:012x}"
        prefix = f"{text[:8]}-{text[8:]}-7"
        _uid_time = (milliseconds, prefix)
    try:
        tail = _tails.pop()
    except IndexError:
        digits = os.urandom(10 * _AT_ONCE).hex()
        _tails.extend([digits[start : start + 20] for start in range(20, len(digits), 20)])
        tail = digits[:20]
    return f"{prefix}{tail[:3]}-{_VARIANT[tail[3]]}{tail[4:7]}-{tail[7:19]}"


_uid_time = (-1, "")

_AT_ONCE = 64
"""For how many uids random digits are read at once. Reading them costs as much as the rest of a uid."""

_tails: list[str] = []
if hasattr(os, "register_at_fork"):
    # Two processes forked from one parent must not generate the same ids.
    os.register_at_fork(after_in_child=_tails.clear)

_VARIANT = {digit: "89ab"[index % 4] for index, digit in enumerate("0123456789abcdef")}


set_field: Callable[[Any, str, Any], None] = msgspec.structs.force_setattr
"""Sets a field of a message while it is created."""


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    uid: str = msgspec.field(default_factory=new_uid)
    key: str = ""
    kind: str = ""
    source: str = ""
    occurred_at: datetime = msgspec.field(default_factory=now)
    headers: Mapping[str, str] = NO_HEADERS
    content_type: str | None = None
    event_version: str | None = None
    idempotency_key: str | None = None
    expires_at: datetime | None = None
    trace_uid: str | None = None
    correlation_uid: str | None = None


class Message(_Envelope, frozen=True, eq=False, gc=False):
    """One message. ``Message(topic, payload, key=...)`` is enough to create one.

    :param topic: the topic to which it is published.
    :param payload: the application's bytes.
    :param uid: identifies the message wherever it goes; default: a new time-ordered UUID.
    :param key: what the message is about (an order's number, for example), for ordering and filters.
    :param kind: the type of the event (``OrderCreated``).
    :param source: what created the message (a service's name, for example).
    :param occurred_at: when the event happened, with a time zone, converted to UTC; default: now.
    :param headers: a mapping of names to text. An immutable copy is kept.
    :param content_type: the payload's media type.
    :param event_version: the version of the payload's schema.
    :param idempotency_key: messages with the same key count as the same message to their receiver. Not blank, at most
        256 bytes.
    :param expires_at: when the message loses its meaning, with a time zone, converted to UTC. From then on it is not
        handled any more: see ``on_expired`` of :class:`~anybus.SubscriptionConfig`.
    :param trace_uid: the trace to which the message belongs.
    :param correlation_uid: the conversation to which the message belongs.
    :raises ValidationError: if a value is refused. The text names the field, the value and what is allowed.
    """

    topic: str
    payload: bytes = b""

    def __post_init__(self) -> None:
        topic = check_topic("topic", self.topic)
        if type(self.topic) is not str:
            set_field(self, "topic", topic)
        if type(self.payload) is not bytes:
            set_field(self, "payload", check_bytes("payload", self.payload, "bytes (for JSON use Message.from_json)"))
        uid, key, kind, source = self.uid, self.key, self.kind, self.source
        # A fast path for nearly every message: plain strings, and ASCII needs no further check.
        if not (
            type(uid) is type(key) is type(kind) is type(source) is str
            and uid.isascii()
            and key.isascii()
            and kind.isascii()
            and source.isascii()
        ):
            for field in ("uid", "key", "kind", "source"):
                set_field(self, field, check_text(field, getattr(self, field)))
        if type(self.headers) is not Headers:
            if not isinstance(self.headers, Mapping):
                refuse("headers", self.headers, "a mapping of str to str")
            set_field(self, "headers", Headers(self.headers))
        if type(self.occurred_at) not in PLAIN_TIMES or self.occurred_at.tzinfo is not timezone.utc:
            set_field(self, "occurred_at", check_time("occurred_at", self.occurred_at))
        if self.expires_at is not None:
            set_field(self, "expires_at", check_time("expires_at", self.expires_at))
        if not (self.content_type is self.event_version is self.trace_uid is self.correlation_uid is None):
            for field in ("content_type", "event_version", "trace_uid", "correlation_uid"):
                value = getattr(self, field)
                if value is not None and not (type(value) is str and value.isascii()):
                    set_field(self, field, check_text(field, value))
        if self.idempotency_key is not None:
            given = check_text("idempotency_key", self.idempotency_key)
            set_field(self, "idempotency_key", check_name("idempotency_key", given) if given else given)

    @classmethod
    def from_json(cls, topic: str, obj: Any, **fields: Any) -> Message:
        """Create a message whose payload is ``obj`` as JSON. Its content type is ``application/json`` unless given.

        :param obj: anything that msgspec can encode (builtins, dataclasses, Structs, datetimes, UUIDs...), or a model
            with ``model_dump_json`` (a Pydantic model, for example). Models may also be nested in the other types.
        :param fields: the other fields of the message.
        :raises SerializationError: if ``obj`` cannot be encoded as JSON. JSON has no NaN and no infinity.
        :raises ValidationError: if the value of another field is refused.
        """
        payload = _json.write(obj)
        fields.setdefault("content_type", "application/json")
        return cls(topic, payload, **fields)

    @overload
    def json(self) -> Any: ...

    @overload
    def json(self, type: type[T]) -> T: ...

    def json(self, type: Any = None) -> Any:
        """The payload, decoded from JSON. With ``type``, it is also checked: ``message.json(Order)``.

        :param type: a type that msgspec can check against (a dataclass, a Struct, ``list[int]``...), or a class with
            ``model_validate_json`` (a Pydantic model, for example). Models may also be nested in the other types
            (``list[Order]``). None = any JSON.
        :raises SerializationError: if the payload is not JSON or not of that type, or if the type cannot be used. If a
            handler lets this error out for its own message, the message is given up on at once, with the code
            ``invalid``: trying again would not help.
        """
        return _json.read(self.payload, type, self.uid)

    def replace(self, **changes: Any) -> Message:
        """A copy with some fields changed.

        :raises ValidationError: if a new value is refused, or a field does not exist.
        """
        try:
            # Not by `msgspec.structs.replace`, which checks nothing before msgspec 0.21.
            return type(self)(**{**msgspec.structs.asdict(self), **changes})
        except TypeError as error:
            raise ValidationError(f"Message.replace: {error}") from None

    def __replace__(self, **changes: Any) -> Message:
        return self.replace(**changes)

    @property
    def trace_context(self) -> TraceContext | None:
        """The W3C trace context in the headers; None if there is none, or if it is invalid."""
        return TraceContext.from_headers(self.headers)

    @property
    def schema(self) -> Schema:
        """The description of the payload: kind, content type and version."""
        return Schema(self.kind, self.content_type, self.event_version)

    def __eq__(self, other: object) -> bool:
        # A decoded message has a class of its own, and equals an application's message with the same fields.
        if not isinstance(other, Message):
            return NotImplemented
        return msgspec.structs.astuple(self) == msgspec.structs.astuple(other)

    def __hash__(self) -> int:
        return hash(msgspec.structs.astuple(self))

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("uid", self.uid), ("topic", self.topic), ("key", self.key), ("payload_bytes", len(self.payload))]

    def __repr__(self) -> str:
        # Payload and headers may be large or secret. They must not reach a log by accident.
        return f"<Message {self.uid} topic={self.topic!r} key={self.key!r} payload={len(self.payload)} bytes>"


def check_outgoing(message: Any, max_payload_bytes: int) -> Message:
    """Check a message that an application publishes.

    :param max_payload_bytes: 0 = no limit.
    """
    if not isinstance(message, Message):
        refuse("message", message, "an anybus.Message")
    if max_payload_bytes and len(message.payload) > max_payload_bytes:
        raise ValidationError(
            f"payload must be at most {max_payload_bytes} bytes (max_payload_bytes), not {len(message.payload)}"
        )
    return message


_LIFTED = {"content-type": "content_type", "event-version": "event_version", "idempotency-key": "idempotency_key"}


def lift_headers(message: Message) -> Message:
    """Copy headers to the unset fields that mean the same. A field that is set stays, even if it is empty."""
    if message.headers is NO_HEADERS or not message.headers:
        return message
    changes = {
        field: message.headers[header]
        for header, field in _LIFTED.items()
        if header in message.headers and getattr(message, field) is None
    }
    return message.replace(**changes) if changes else message
