"""How large a command may be: a server closes the connection of whoever sends it more than it takes."""

from __future__ import annotations

from typing import Any, NamedTuple

from ._link import Link, exchange
from ._protocol import Command, Protocol, ServerError

_SETTINGS = (("proto-max-bulk-len", 0), ("client-query-buffer-limit", 65536), ("client-output-buffer-limit", 65536))
"""What limits an argument, or an entry that is read, and how much of it is needed for what comes with it."""

LARGE = 1024 * 1024
"""No server can be told to take less than this. What is larger goes by a connection of its own, if nobody knows how
much the server takes: that connection is closed then, and not the one that all share.
"""

ROOM = 65536
"""For the headers that a retry or a dead letter adds to a message."""


class Limit(NamedTuple):
    """How many bytes an argument may have, and which of the server's settings says so."""

    size: int
    setting: str


async def ask_limit(link: Link) -> Limit | None:
    """The server's limit; None if it does not say."""
    commands: list[Command] = [("CONFIG", "GET", setting) for setting, _ in _SETTINGS]
    try:
        replies = await exchange(link, Protocol(), commands)
    except ServerError:  # no right to it, or a managed server: nothing that the bus needs
        return None
    found: list[Limit] = []
    for (setting, needed), reply in zip(_SETTINGS, replies, strict=True):
        size = _value(reply)
        if size is None:
            return None
        if size:  # 0 stands for no limit
            found.append(Limit(size - needed, setting))
    return min(found) if found else None


def _value(reply: Any) -> int | None:
    try:
        _, value = reply
        # Of the one that has parts, the hard limit of clients: "normal 0 0 0 slave 268435456 67108864 60 ...".
        return int(value.split()[1] if value.startswith(b"normal ") else value)
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
