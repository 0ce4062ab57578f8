"""The names of keys. A topic's key is its name, as in the Rust implementation. All other keys are in its slot."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from ..._failure.copies import stream_base

LAYOUT: Final = 1
"""The version of the key layout, and of the scripts that use it."""

RESERVED: Final = "anybus:"
"""The prefix of all keys that are kept beside a topic, retry streams included."""

RETURNED: Final = "anybus:returned"
"""The parking consumer: released entries belong to it. The script that takes its last entry removes it."""


def _split(stream: str) -> tuple[str, str]:
    """The base of a stream's keys and, for a retry stream, ``:group``."""
    if not stream.startswith(RESERVED):
        return stream_base(stream), ""
    rest = stream.removeprefix(RESERVED)
    if rest.startswith("{"):
        end = rest.index("}") + 1
    else:
        length, _, named = rest.partition(":")
        # A topic without a hash tag of its own is in braces. Otherwise ":retry" comes after it.
        in_braces = named[int(length) + 1 : int(length) + 2] == "}"
        end = len(length) + 1 + int(length) + (2 if in_braces else 0)
    return f"anybus:{rest[:end]}", rest[end:].removeprefix(":retry")


@lru_cache(1024)  # used for every read and pass
def delayed(stream: str) -> str:
    """The sorted set of entries that are to be appended to a stream later, by due time."""
    base, group = _split(stream)
    return f"{base}:delayed{group}"


def meta(stream: str) -> str:
    """The hash of the safe floors of a stream's groups."""
    base, group = _split(stream)
    return f"{base}:meta{group}"


def leases(stream: str, group: str) -> str:
    """The sorted set of the lease of a topic's group, and of the members that are alive."""
    base, _ = _split(stream)
    return f"{base}:lease:{group}"


def losses(stream: str, group: str) -> str:
    """The sorted set of the consumers of a topic's group that lost entries, of the topic or of its retry stream."""
    base, _ = _split(stream)
    return f"{base}:losses:{group}"


def completions(stream: str, group: str) -> str:
    """The sorted set of the idempotency keys of a topic's group, by the time at which each is forgotten."""
    base, _ = _split(stream)
    return f"{base}:keys:{group}"


def claims(stream: str, group: str) -> str:
    """The hash of those among these keys that are claimed, not completed."""
    base, _ = _split(stream)
    return f"{base}:claims:{group}"


def schedule(stream: str, name: str) -> str:
    """The hash of a recurring schedule: its definition, last tick and owner."""
    base, _ = _split(stream)
    return f"{base}:schedule:{name}"


def waiting(stream: str, group: str) -> str:
    """The set that exists while entries of a topic's group, or of its retry stream, wait for a pass."""
    base, _ = _split(stream)
    return f"{base}:waiting:{group}"


@lru_cache(1024)
def dedup_ids(stream: str) -> str:
    """The hash of the idempotency keys that were published to a topic: the end of the window, and the first id."""
    return f"{_split(stream)[0]}:dedup:ids"


@lru_cache(1024)
def dedup_ends(stream: str) -> str:
    """The sorted set of the same keys, by the end of their windows."""
    return f"{_split(stream)[0]}:dedup:ends"


def waiting_beside(retry_stream: str) -> str:
    """The same, for the group of a retry stream."""
    base, group = _split(retry_stream)
    return f"{base}:waiting{group}"


def retention(stream: str) -> str:
    """The hash with the retention of a topic, and with what trimming notes."""
    base, _ = _split(stream)
    return f"{base}:retention"
