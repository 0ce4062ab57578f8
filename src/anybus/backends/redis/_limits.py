"""How large a command may be. A server closes a connection on which it receives more than it accepts."""

from __future__ import annotations

from typing import Any, NamedTuple

from ._link import Link, ask

_SETTINGS = (("proto-max-bulk-len", 0), ("client-query-buffer-limit", 65536), ("client-output-buffer-limit", 65536))
"""The settings that limit an argument, or an entry that is read, and how many bytes to reserve for the rest."""

LARGE = 1024 * 1024
"""No server can be configured to accept less than this. If the server's limit is not known, a larger command uses a
connection of its own: if it is too large, the server closes that connection, and not the shared one.
"""

ROOM = 65536
"""Bytes that are reserved for the headers that a retry or a dead letter adds to a message."""


class Limit(NamedTuple):
    """How many bytes an argument may have, and the name of the server's setting that limits it."""

    size: int
    setting: str


async def ask_limit(link: Link) -> Limit | None:
    """The server's limit; None if there is none, or the server does not tell."""
    found: list[Limit] = []
    replies = await ask(link, [("CONFIG", "GET", setting) for setting, _ in _SETTINGS])
    for (setting, needed), reply in zip(_SETTINGS, replies, strict=True):
        size = _value(reply)
        if size is None:  # no permission, or a managed server: the bus works without this
            return None
        if size:  # 0 = no limit
            found.append(Limit(size - needed, setting))
    return min(found) if found else None


def _value(reply: Any) -> int | None:
    try:
        _, value = reply
        # One setting has several parts: take the hard limit of "normal 0 0 0 slave 268435456 67108864 60 ...".
        return int(value.split()[1] if value.startswith(b"normal ") else value)
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
