"""A server that answers as a test tells it to, with bytes that no real one would send."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import hiredis
from anyio.abc import ByteStream, SocketAttribute, SocketListener

Command = list[bytes]
Answer = Callable[[Command], "bytes | None"]
"""What to say to a command; None closes the connection."""

GONE = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, OSError)


def bulk(text: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(text), text)


def greeting(command: Command) -> bytes | None:
    """What a decent server says to all that is asked on connecting; None to anything else."""
    name = b" ".join(command[:2]).upper()
    if name == b"CLIENT ID":
        return b":7\r\n"
    if name == b"INFO SERVER":
        return bulk(b"# Server\r\nredis_version:7.0.15\r\nredis_mode:standalone\r\n")
    if name == b"INFO MEMORY":
        return bulk(b"# Memory\r\nmaxmemory:0\r\nmaxmemory_policy:noeviction\r\n")
    if name == b"INFO PERSISTENCE":
        return bulk(b"# Persistence\r\naof_enabled:1\r\n")
    if name == b"CLUSTER INFO":
        return b"-ERR This instance has cluster support disabled\r\n"
    if name == b"COMMAND INFO":
        return b"*1\r\n*1\r\n" + bulk(b"xautoclaim")
    if name == b"CLIENT UNBLOCK":
        return b":0\r\n"
    if name == b"CONFIG GET":
        return b"-NOPERM this user has no permissions to run the 'config|get' command\r\n"
    if name == b"PING":
        return b"+PONG\r\n"
    if name == b"SCRIPT LOAD":
        return bulk(b"0" * 40)
    return None


class FakeServer:
    """Greets decently, unless told otherwise, and answers everything else by ``answer``."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.greet: Answer = greeting
        self.connections = 0
        self.commands: list[Command] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def talk(self, stream: ByteStream) -> None:
        self.connections += 1
        reader: Any = hiredis.Reader()
        with suppress(*GONE):
            async with stream:
                while True:
                    reader.feed(await stream.receive())
                    while (command := reader.gets()) is not False:
                        self.commands.append(command)
                        said = self.greet(command)
                        if said is None:
                            said = self.answer(command)
                        if said is None:
                            return
                        if said:
                            await stream.send(said)


@asynccontextmanager
async def listening(handler: Callable[[ByteStream], Any]) -> AsyncGenerator[int, None]:
    """Serve on a free port, whose number comes out, until the block is left."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    accepted: list[ByteStream] = []

    async def accept() -> None:
        (only,) = listener.listeners
        assert isinstance(only, SocketListener)
        while True:
            stream = await only.accept()
            accepted.append(stream)
            tasks.start_soon(handler, stream)

    async with listener:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(accept)
                yield int(listener.extra(SocketAttribute.local_port))
                tasks.cancel_scope.cancel()
        finally:
            # Not left to the handlers: one that is cancelled before its first step would never close its stream.
            with anyio.CancelScope(shield=True):
                for stream in accepted:
                    await anyio.aclose_forcefully(stream)


@asynccontextmanager
async def fake_server(answer: Answer) -> AsyncGenerator[FakeServer, None]:
    server = FakeServer(answer)
    async with listening(server.talk) as port:
        server.port = port
        yield server
