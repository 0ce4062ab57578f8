"""What describes a payload."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schema:
    """A payload's description, as its message carries it.

    :ivar kind: the event's type (``OrderCreated``); empty if unset.
    :ivar content_type: the media type, or None.
    :ivar version: the version of the payload's schema (``event_version`` on the wire), or None.
    """

    kind: str = ""
    content_type: str | None = None
    version: str | None = None
