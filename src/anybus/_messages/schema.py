"""The description of a payload."""

from __future__ import annotations

from dataclasses import dataclass

from .._ground.checks import check_text


@dataclass(frozen=True)
class Schema:
    """The description of a payload, as its message carries it.

    :ivar kind: the type of the event (``OrderCreated``); empty if unset.
    :ivar content_type: the media type, or None.
    :ivar version: the version of the payload's schema (``event_version`` on the wire), or None.
    :raises ValidationError: if a value is not text.
    """

    kind: str = ""
    content_type: str | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        for field in ("kind", "content_type", "version"):
            value = getattr(self, field)
            if value is not None or field == "kind":
                object.__setattr__(self, field, check_text(field, value))
