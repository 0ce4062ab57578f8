"""RESP, without any I/O: commands become bytes, bytes become replies, and replies find their callers in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import hiredis

Argument = bytes | str | int | float
Command = Sequence[Argument]

_NOT_ENOUGH = object()

_pack: Callable[[tuple[Argument, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType, reportUnknownMemberType]


def pack_one(command: Command) -> bytes:
    """One command as bytes."""
    return _pack(tuple(command))


class ServerError(Exception):
    """An error reply, as the server worded it."""


class BrokenProtocolError(Exception):
    """The server sent what is not RESP, or a reply that nobody asked for. The connection cannot be used any more."""


class Replies:
    """The place of one caller in the line: so many replies belong to it."""

    __slots__ = ("done", "error", "expected", "replies")

    def __init__(self, expected: int, done: Callable[[], None]) -> None:
        self.expected = expected
        self.replies: list[Any] = []
        self.error: Exception | None = None
        self.done = done

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done()


class Protocol:
    """One connection's conversation. Feed it what arrives; it hands each reply to whoever asked first."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(
            protocolError=BrokenProtocolError, replyError=ServerError, notEnoughData=_NOT_ENOUGH
        )
        self._line: deque[Replies] = deque()

    @property
    def is_waiting(self) -> bool:
        """Whether anybody still waits for a reply."""
        return bool(self._line)

    @property
    def oldest(self) -> Replies | None:
        """Whoever has waited for the longest."""
        return self._line[0] if self._line else None

    def expect(self, replies: Replies) -> None:
        """The commands of this caller are sent next."""
        self._line.append(replies)

    def feed(self, data: bytes) -> None:
        """Take what arrived.

        :raises BrokenProtocolError: if it makes no sense; everything still waiting has to be failed.
        """
        reader, line = self._reader, self._line
        reader.feed(data)
        while (reply := reader.gets()) is not _NOT_ENOUGH:
            if not line:
                raise BrokenProtocolError(f"a reply that nobody waits for: {str(reply)[:80]}")
            first = line[0]
            first.replies.append(reply)
            if len(first.replies) == first.expected:
                line.popleft()
                first.done()

    def fail(self, error: Exception) -> None:
        """The connection is gone: nobody who waits will get a reply."""
        while self._line:
            self._line.popleft().fail(error)


def pack(commands: Sequence[Command]) -> bytes:
    """The commands as bytes.

    :raises TypeError: if an argument is not bytes, str, int or float.
    """
    if len(commands) == 1:
        return _pack(tuple(commands[0]))
    return b"".join([_pack(tuple(command)) for command in commands])
