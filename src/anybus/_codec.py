"""Codecs: JSON, as the existing Rust and Go buses write it, and MessagePack, which only anybus reads."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import msgspec

from ._ground.errors import SerializationError, ValidationError
from ._messages.decoded import DecodedMessage
from ._messages.message import Headers, Message
from .abc import Codec


class _Body(msgspec.Struct, omit_defaults=True, gc=False):
    """What is encoded. The fields are in the order of the wire: the first eight always, the others only if set."""

    uid: str
    topic: str
    key: str
    kind: str
    source: str
    occurred_at: datetime
    headers: dict[str, str]
    payload: bytes
    content_type: str | None = None
    event_version: str | None = None
    idempotency_key: str | None = None
    expires_at: datetime | None = None
    trace_uid: str | None = None
    correlation_uid: str | None = None


class _Envelope(msgspec.Struct, gc=False):
    message: _Body


class _DecodedEnvelope(msgspec.Struct, gc=False):
    message: DecodedMessage


class _LenientBody(msgspec.Struct):
    """The same fields. Those for which msgspec is stricter than the wire are left as text."""

    uid: str
    topic: str
    key: str
    kind: str
    source: str
    occurred_at: str
    headers: dict[str, str]
    payload: str
    content_type: str | None = None
    event_version: str | None = None
    idempotency_key: str | None = None
    expires_at: str | None = None
    trace_uid: str | None = None
    correlation_uid: str | None = None


class _LenientEnvelope(msgspec.Struct):
    message: _LenientBody


_LAST = datetime.max.replace(tzinfo=timezone.utc)

_TIME = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)[Tt ](?P<time>\d\d:\d\d):(?P<second>\d\d)(?:\.(?P<fraction>\d+))?"
    r"(?P<zone>[Zz]|[+-]\d\d:[0-5]\d)",
    re.ASCII,
)


def _body(message: Message) -> _Body:
    headers = message.headers
    return _Body(
        message.uid,
        message.topic,
        message.key,
        message.kind,
        message.source,
        message.occurred_at,
        headers.plain() if isinstance(headers, Headers) else dict(headers),
        message.payload,
        message.content_type,
        message.event_version,
        message.idempotency_key,
        message.expires_at,
        message.trace_uid,
        message.correlation_uid,
    )


def _time(text: str) -> datetime:
    """A time in any RFC 3339 spelling that the wire allows. Rounded half up to the microsecond, as msgspec rounds."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is not a time with a time zone")
    second = match["second"]
    zone = "+00:00" if match["zone"] in "Zz" else match["zone"]
    digits = match["fraction"] or ""
    if second == "60":
        # A leap second, which Python does not have: use the last microsecond before it.
        second, digits = "59", "999999"
    time = datetime.fromisoformat(f"{match['date']}T{match['time']}:{second}.{digits[:6].ljust(6, '0')}{zone}")
    time = time.astimezone(timezone.utc)
    if digits[6:7] >= "5" and time != _LAST:
        time += timedelta(microseconds=1)
    return time


def _base64(text: str) -> bytes:
    """Decode standard base64. The padding is checked here, because some Python versions accept wrong padding."""
    if len(text) % 4 or text.endswith("==="):
        raise ValueError("the payload is not padded base64")
    return base64.b64decode(text, validate=True)


class JsonCodec(Codec):
    """The default codec: the JSON that the existing Rust and Go buses read and write."""

    name = "json"

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()
        self._decode = msgspec.json.Decoder(_DecodedEnvelope).decode
        self._lenient = msgspec.json.Decoder(_LenientEnvelope)

    def encode(self, message: Message) -> bytes:
        try:
            return self._encoder.encode(_Envelope(_body(message)))
        except (ValueError, TypeError, OverflowError) as error:
            raise SerializationError(f"message {message.uid} cannot be written as JSON: {error}") from error

    def decode(self, data: bytes) -> Message:
        try:
            return self._decode(data).message
        except Exception as error:
            if isinstance(error.__cause__, ValidationError):  # of the message itself, wrapped by msgspec
                raise SerializationError(str(error.__cause__)) from error
            return self._decode_leniently(data)

    def _decode_leniently(self, data: bytes) -> Message:
        try:
            body = self._lenient.decode(data).message
            return Message(
                body.topic,
                _base64(body.payload),
                uid=body.uid,
                key=body.key,
                kind=body.kind,
                source=body.source,
                occurred_at=_time(body.occurred_at),
                headers=body.headers,
                content_type=body.content_type,
                event_version=body.event_version,
                idempotency_key=body.idempotency_key,
                expires_at=None if body.expires_at is None else _time(body.expires_at),
                trace_uid=body.trace_uid,
                correlation_uid=body.correlation_uid,
            )
        except ValidationError as error:
            raise SerializationError(str(error)) from error
        except (ValueError, OverflowError, RecursionError, binascii.Error, msgspec.MsgspecError) as error:
            raise SerializationError(f"not a valid message in JSON: {error}") from error


class MsgpackCodec(Codec):
    """A compact and fast codec. Only anybus can read it."""

    name = "msgpack"

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decode: Callable[[bytes], _DecodedEnvelope] = msgspec.msgpack.Decoder(_DecodedEnvelope).decode

    def encode(self, message: Message) -> bytes:
        try:
            return self._encoder.encode(_Envelope(_body(message)))
        except (ValueError, TypeError, OverflowError) as error:
            raise SerializationError(f"message {message.uid} cannot be written as MessagePack: {error}") from error

    def decode(self, data: bytes) -> Message:
        try:
            return self._decode(data).message
        except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            why = error.__cause__ if isinstance(error.__cause__, ValidationError) else error
            raise SerializationError(f"not a valid message in MessagePack: {why}") from error
