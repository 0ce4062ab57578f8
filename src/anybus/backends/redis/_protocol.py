"""RESP, without any I/O: turns commands into bytes and bytes into replies, and assigns replies to callers in order."""

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
    """Encode one command."""
    return _pack(tuple(command))


class ServerError(Exception):
    """An error reply, with the server's text."""


class BrokenProtocolError(Exception):
    """The server sent data that is not RESP, or a reply without a command. The connection cannot be used any more."""


class Replies:
    """The place of one caller in the queue, for the number of replies that it expects."""

    __slots__ = ("done", "error", "expected", "replies")

    def __init__(self, expected: int, done: Callable[[], None]) -> None:
        self.expected = expected
        self.replies: list[Any] = []
        self.error: Exception | None = None
        self.done = done

    @property
    def complete(self) -> bool:
        return len(self.replies) == self.expected

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done()


class Protocol:
    """The state of one connection. Feed it the bytes that arrive: each reply goes to the caller that asked first."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(
            protocolError=BrokenProtocolError, replyError=ServerError, notEnoughData=_NOT_ENOUGH
        )
        self._line: deque[Replies] = deque()

    @property
    def is_waiting(self) -> bool:
        """Whether a reply is still expected."""
        return bool(self._line)

    @property
    def oldest(self) -> Replies | None:
        """The caller that has waited for the longest time."""
        return self._line[0] if self._line else None

    def expect(self, replies: Replies) -> None:
        """To be called when this caller's commands are sent next."""
        self._line.append(replies)

    def feed(self, data: bytes) -> None:
        """Process the bytes that arrived.

        :raises BrokenProtocolError: if they are invalid. Then :meth:`fail` must be called.
        """
        reader, line = self._reader, self._line
        reader.feed(data)
        while (reply := reader.gets()) is not _NOT_ENOUGH:
            if not line:
                raise BrokenProtocolError(f"received a reply that nobody waits for: {str(reply)[:80]}")
            first = line[0]
            first.replies.append(reply)
            if len(first.replies) == first.expected:
                line.popleft()
                first.done()

    def fail(self, error: Exception) -> None:
        """The connection is gone: fail all callers that still wait for replies."""
        while self._line:
            self._line.popleft().fail(error)


def asking(commands: Sequence[Command]) -> list[Command]:
    """With ``ASKING`` before each command: it concerns the next command of the connection only."""
    return [part for command in commands for part in (("ASKING",), command)]


def pack(commands: Sequence[Command]) -> bytes:
    """Encode commands.

    :raises TypeError: if an argument is not bytes, str, int or float.
    """
    if len(commands) == 1:
        return _pack(tuple(commands[0]))
    return b"".join([_pack(tuple(command)) for command in commands])
