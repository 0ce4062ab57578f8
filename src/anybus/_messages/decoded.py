"""A message that a codec has decoded: only what the decoder cannot check is checked again."""

# pyright: reportGeneralTypeIssues=false
# (Fields that have defaults in an application's message are required here. msgspec allows that.)

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any, Final

import msgspec

from .._ground.checks import check_name, check_time, check_topic
from .message import NO_HEADERS, Headers, Message, set_field

AwareTime = Annotated[datetime, msgspec.Meta(tz=True)]

_UTC: Final = timezone.utc
_MOST_KNOWN: Final = 1024
_known_topics: set[str] = set()
"""Topics that were checked lately. A look into a set costs less than a cached function, for every message."""


def _check_topic(topic: str) -> None:
    check_topic("topic", topic)
    if len(_known_topics) >= _MOST_KNOWN:
        _known_topics.clear()
    _known_topics.add(topic)


class DecodedMessage(Message, frozen=True, kw_only=True, gc=False):
    """The first eight fields are required, as on the wire. A decoder creates it, and nobody else.

    The decoder guarantees the types, valid Unicode, and a time zone. A copy (:meth:`replace`, :func:`copy.replace`,
    pickle) is an ordinary :class:`Message`.
    """

    uid: str
    topic: str
    key: str
    kind: str
    source: str
    occurred_at: AwareTime
    headers: dict[str, str]  # pyright: ignore[reportIncompatibleVariableOverride]  # until __post_init__ wraps it
    payload: bytes
    content_type: str | None = None
    event_version: str | None = None
    idempotency_key: str | None = None
    expires_at: AwareTime | None = None
    trace_uid: str | None = None
    correlation_uid: str | None = None

    def __post_init__(self) -> None:
        headers = self.headers
        if type(headers) is not dict:  # a copy by `msgspec.structs.replace`: no decoder has checked it
            super().__post_init__()
            return
        if self.topic not in _known_topics:
            _check_topic(self.topic)
        set_field(self, "headers", Headers.trusted(headers) if headers else NO_HEADERS)
        if self.occurred_at.tzinfo is not _UTC:
            set_field(self, "occurred_at", check_time("occurred_at", self.occurred_at))
        if self.expires_at is not None:
            set_field(self, "expires_at", check_time("expires_at", self.expires_at))
        if self.idempotency_key:
            check_name("idempotency_key", self.idempotency_key)

    def replace(self, **changes: Any) -> Message:
        return self._plain().replace(**changes)

    @classmethod
    def from_json(cls, topic: str, obj: Any, **fields: Any) -> Message:
        return Message.from_json(topic, obj, **fields)

    def _plain(self) -> Message:
        return Message(**msgspec.structs.asdict(self))

    def __reduce__(self) -> Any:
        return self._plain().__reduce__()

    def __copy__(self) -> Message:
        return self._plain()
