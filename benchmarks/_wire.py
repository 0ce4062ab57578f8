"""A blocking connection (a socket and hiredis), and what is done with it before and after each measurement."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import hiredis

from anybus import JsonCodec, Message

AT_ONCE = 200
GROUP, TOPIC = "bench", "bench.redis"

_hiredis: Any = hiredis  # its stubs do not know tuples of any length


class Wire:
    """One blocking connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()

    def __enter__(self) -> Wire:  # noqa: PYI034
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def call(self, *command: Any) -> Any:
        """Send one command and return its reply. An error reply is raised."""
        self._socket.sendall(_hiredis.pack_command(command))
        return self._reply()

    def pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send many commands in one write, and return all replies."""
        self._socket.sendall(b"".join([_hiredis.pack_command(command) for command in commands]))
        return [self._reply() for _ in commands]

    def info(self, section: str) -> dict[str, str]:
        """What the server says about itself."""
        lines = self.call("INFO", section).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def waiting_lines(self) -> list[bytes]:
        """All lines that arrived without a command. Closes the connection."""
        data = b""
        self._socket.settimeout(0.1)
        with suppress(TimeoutError, socket.timeout):
            while more := self._socket.recv(262_144):
                data += more
        self._socket.close()
        return data.splitlines()

    def _reply(self) -> Any:
        reader = self._reader
        while True:
            reply: Any = reader.gets()
            if reply is not False:
                if isinstance(reply, Exception):
                    raise reply
                return reply
            reader.feed(self._socket.recv(262_144))


def prepare(count: int) -> list[Message]:
    return [Message(TOPIC, b"x" * 300, key=str(number)) for number in range(count)]


def fill(port: int, messages: Sequence[Message]) -> None:
    """Create a stream that holds these messages and has no group."""
    encode = JsonCodec().encode
    with Wire(port) as wire:
        wire.call("FLUSHALL", "SYNC")
        for start in range(0, len(messages), AT_ONCE):
            part = messages[start : start + AT_ONCE]
            wire.pipeline([("XADD", TOPIC, "*", "message", encode(message)) for message in part])


def forget_group(port: int) -> None:
    """Delete the group, so that the next contestant starts with the same stream."""
    with Wire(port) as wire:
        for key in wire.call("KEYS", "anybus:*"):
            wire.call("DEL", key)
        wire.call("XGROUP", "DESTROY", TOPIC, GROUP)


def check_drained(port: int, count: int) -> None:
    """
    :raises AssertionError: if an entry is pending or unread on the server.
    """
    with Wire(port) as wire:
        pending = wire.call("XPENDING", TOPIC, GROUP)[0]
        [group] = wire.call("XINFO", "GROUPS", TOPIC)
        facts = dict(zip(group[::2], group[1::2], strict=True))
        unread = wire.call("XRANGE", TOPIC, b"(" + facts[b"last-delivered-id"], "+", "COUNT", 1)
        assert pending == 0, f"{pending} entries are pending"
        assert not unread, "some entries were not read"
        assert wire.call("XLEN", TOPIC) == count


def check_length(port: int, count: int) -> None:
    """
    :raises AssertionError: if the stream does not hold ``count`` entries.
    """
    with Wire(port) as wire:
        length = wire.call("XLEN", TOPIC)
        assert length == count, f"the stream holds {length} entries, not {count}"


def clear(port: int) -> None:
    """Delete everything at once. Otherwise the server would do it in a thread, during the next measurement."""
    with Wire(port) as wire:
        wire.call("FLUSHALL", "SYNC")
