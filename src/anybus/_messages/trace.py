"""The trace context in headers, as the W3C defines it (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .._ground.checks import check_text, refuse
from .._ground.errors import ValidationError

# Version ff is invalid, and so are a trace id or a parent id of zeros only. Versions after 00 may append fields.
_TRACEPARENT = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<parent>[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)


@dataclass(frozen=True)
class TraceContext:
    """A W3C trace context: the position in a trace at which a message was created.

    :param traceparent: ``00-<trace id>-<parent id>-<flags>``, lower-case hexadecimal.
    :param tracestate: vendors' own data; empty if unset.
    :param baggage: the application's own data; empty if unset.
    :raises ValidationError: if ``traceparent`` is not valid.
    """

    traceparent: str
    tracestate: str = ""
    baggage: str = ""

    def __post_init__(self) -> None:
        for field in ("traceparent", "tracestate", "baggage"):
            object.__setattr__(self, field, check_text(field, getattr(self, field)))
        match = _TRACEPARENT.fullmatch(self.traceparent)
        if match is None or (match["version"] == "00" and match["more"]):
            refuse("traceparent", self.traceparent, "00-<32 hex digits>-<16 hex digits>-<2 hex digits>, ids not zero")

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return self.traceparent[3:35]

    @property
    def parent_id(self) -> str:
        """16 hexadecimal digits."""
        return self.traceparent[36:52]

    @property
    def sampled(self) -> bool:
        """Whether the flags say that the caller may have recorded the trace."""
        return bool(int(self.traceparent[53:55], 16) & 1)

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> TraceContext | None:
        """The context in the headers; None if there is none, or if it is invalid (as the W3C demands)."""
        traceparent = headers.get("traceparent")
        if traceparent is None:
            return None
        try:
            return cls(traceparent, headers.get("tracestate", ""), headers.get("baggage", ""))
        except ValidationError:
            return None

    def to_headers(self) -> dict[str, str]:
        """The context as headers, for a message's ``headers`` or for ``PublishOptions.metadata``."""
        given = {"traceparent": self.traceparent, "tracestate": self.tracestate, "baggage": self.baggage}
        return {name: value for name, value in given.items() if value}
