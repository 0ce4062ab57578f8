"""A proxy between a client and a real server that knows each command and its reply, and can act at every one of them.

The commands of one connection are passed on one after another, each when the reply to the one before has arrived, so
that every reply belongs to a command. Connections do not wait for each other.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Union

import anyio
import hiredis
from anyio.abc import ByteStream
from fake_server import GONE, Command, listening

from anybus.backends.redis import _client
from anybus.backends.redis._protocol import pack_one

_SCRIPTS = {script.digest.encode(): script.name for script in _client._ALL}


def name_of(command: Command) -> str:
    """What a command is called in tests: ``XADD``, or of a script its own name (``ack``, ``pass``, ``transfer``)."""
    if command[0] == b"EVALSHA":
        return _SCRIPTS[command[1]]
    return command[0].decode()


@dataclass
class CutBefore:
    """The connection breaks before the command reaches the server."""


@dataclass
class CutAfter:
    """The server carries the command out; the connection breaks instead of bringing the reply."""


@dataclass
class Hold:
    """The server carries the command out; the reply arrives when ``let_go`` is set.

    :ivar held: set when the server has answered.
    """

    held: anyio.Event = field(default_factory=anyio.Event)
    let_go: anyio.Event = field(default_factory=anyio.Event)


@dataclass
class Answer:
    """The proxy answers by itself with these bytes; the server hears nothing."""

    data: bytes


Act = Union[CutBefore, CutAfter, Hold, Answer]


class Proxy:
    """What stands between. ``rule`` is asked about every command; None = pass it on.

    :ivar seen: the names of all commands, in the order in which they came.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._streams: set[ByteStream] = set()
        self.port = 0
        self.connections = 0
        self.seen: list[str] = []
        self.rule: Callable[[Command], Act | None] = lambda command: None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def at(self, name: str, act: Act, *, times: int = 1) -> anyio.Event:
        """Act at the next command of that name, and at as many more as told. The event is set at the first."""
        met = anyio.Event()

        def rule(command: Command) -> Act | None:
            nonlocal times
            if times and name_of(command) == name:
                times -= 1
                met.set()
                return act
            return None

        self.rule = rule
        return met

    def switch_to(self, server_port: int) -> None:
        """New connections go to another server, as after a failover behind a virtual IP. Those that are open stay."""
        self._server_port = server_port

    async def cut_all(self) -> None:
        """Break every connection that is open now."""
        for stream in list(self._streams):
            await anyio.aclose_forcefully(stream)

    async def talk(self, client: ByteStream) -> None:
        self.connections += 1
        commands: Any = hiredis.Reader()
        with suppress(*GONE):
            async with client, await anyio.connect_tcp("127.0.0.1", self._server_port) as server:
                self._streams.add(client)
                try:
                    while True:
                        commands.feed(await client.receive())
                        while (command := commands.gets()) is not False:
                            if not await self._pass_on(command, client, server):
                                return
                finally:
                    self._streams.discard(client)

    async def _pass_on(self, command: Command, client: ByteStream, server: ByteStream) -> bool:
        self.seen.append(name_of(command))
        act = self.rule(command)
        if isinstance(act, CutBefore):
            return False
        if isinstance(act, Answer):
            await client.send(act.data)
            return True
        await server.send(pack_one(command))
        reply = await self._reply(server)
        if isinstance(act, CutAfter):
            return False
        if isinstance(act, Hold):
            act.held.set()
            await act.let_go.wait()
        await client.send(reply)
        return True

    async def _reply(self, server: ByteStream) -> bytes:
        replies: Any = hiredis.Reader()
        data = b""
        while replies.gets() is False:
            part = await server.receive()
            replies.feed(part)
            data += part
        return data


@asynccontextmanager
async def proxied(server_port: int) -> AsyncGenerator[Proxy, None]:
    """A proxy to the server on that port, until the block is left."""
    proxy = Proxy(server_port)
    async with listening(proxy.talk) as port:
        proxy.port = port
        yield proxy
