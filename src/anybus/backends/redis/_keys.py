"""Names of keys. The topic is the key itself, as in the Rust implementation; everything else lies in its slot."""

from __future__ import annotations

from typing import Final

from ..._failure.copies import stream_base

LAYOUT: Final = 1
"""The version of the layout of keys, and of the scripts that work on them."""

RESERVED: Final = "anybus:"
"""What the names of retry streams, and of everything else that is kept beside a topic, begin with."""

RETURNED: Final = "anybus:returned"
"""The parking consumer of released entries. Whoever empties it removes it."""


def _split(stream: str) -> tuple[str, str]:
    """A stream's base and, of a retry stream, its ``:group``."""
    if not stream.startswith(RESERVED):
        return stream_base(stream), ""
    rest = stream.removeprefix(RESERVED)
    if rest.startswith("{"):
        end = rest.index("}") + 1
    else:
        length, _, named = rest.partition(":")
        end = len(length) + 1 + int(length) + (0 if _has_tag(named[: int(length)]) else 2)
    return f"anybus:{rest[:end]}", rest[end:].removeprefix(":retry")


def _has_tag(topic: str) -> bool:
    inner = topic.partition("{")[2]
    return "}" in inner and not inner.startswith("}")


def delayed(stream: str) -> str:
    """Where what is to be appended to a stream later waits: a sorted set by due time."""
    base, group = _split(stream)
    return f"{base}:delayed{group}"


def meta(stream: str) -> str:
    """Where the safe floors of a stream's groups are kept."""
    base, group = _split(stream)
    return f"{base}:meta{group}"


def leases(stream: str, group: str) -> str:
    """Where the lease of a topic's group is kept, and who of its members is alive: a sorted set."""
    base, _ = _split(stream)
    return f"{base}:lease:{group}"
