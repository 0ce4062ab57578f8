"""Names of keys. The topic is the key itself, as in the Rust implementation; everything else lies in its slot."""

from __future__ import annotations

from typing import Final

LAYOUT: Final = 1
"""The version of the layout of keys, and of the scripts that work on them."""

RETURNED: Final = "anybus:returned"
"""The parking consumer of released entries. Whoever empties it removes it."""


def _split(stream: str) -> tuple[str, str]:
    """A stream's base (``anybus:{topic}``, or ``anybus:top{tag}ic``) and, of a retry stream, its ``:group``."""
    if stream.startswith("anybus:"):
        base, found, group = stream.partition(":retry:")
        if found:
            return base, f":{group}"
    rest = stream.partition("{")[2]
    has_tag = "}" in rest and not rest.startswith("}")
    return f"anybus:{stream if has_tag else '{' + stream + '}'}", ""


def delayed(stream: str) -> str:
    """Where what is to be appended to a stream later waits: a sorted set by due time."""
    base, group = _split(stream)
    return f"{base}:delayed{group}"


def meta(stream: str) -> str:
    """Where the safe floors of a stream's groups are kept."""
    base, group = _split(stream)
    return f"{base}:meta{group}"
