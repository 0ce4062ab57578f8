"""Relays of bytes to a server, which forget connections, or are slow. They know nothing of commands."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

import anyio
from anyio.abc import ByteStream
from fake_server import GONE, listening


@dataclass
class Pace:
    """So many bytes, and then a pause of so many seconds."""

    size: int
    pause: float


@dataclass
class Relayed:
    """One connection through the relay.

    :ivar forgotten: bytes are swallowed, both ways, and nobody is told.
    :ivar cut_at_next: closed when the client next sends something, which the server does not get.
    """

    client: ByteStream
    forgotten: bool = False
    cut_at_next: bool = False


class Relay:
    """What stands between.

    :ivar down: the pace of what the server sends; None = as fast as it goes.
    :ivar forgets_new: new connections are accepted, and forgotten at once.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self.port = 0
        self.all: list[Relayed] = []
        self.down: Pace | None = None
        self.forgets_new = False

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def forget(self) -> None:
        """Do as a balancer does with connections that were idle for too long."""
        for relayed in self.all:
            relayed.forgotten = True

    def cut_at_next(self) -> None:
        """Do as a balancer does that says so, but only when it is asked."""
        for relayed in self.all:
            relayed.cut_at_next = True

    async def talk(self, client: ByteStream) -> None:
        relayed = Relayed(client, forgotten=self.forgets_new)
        self.all.append(relayed)
        with suppress(*GONE):
            async with client, await anyio.connect_tcp("127.0.0.1", self._server_port) as server:
                async with anyio.create_task_group() as tasks:

                    async def up() -> None:
                        with suppress(*GONE):
                            while True:
                                data = await client.receive()
                                if relayed.cut_at_next:
                                    break
                                if not relayed.forgotten:
                                    await server.send(data)
                        tasks.cancel_scope.cancel()

                    async def down() -> None:
                        with suppress(*GONE):
                            while True:
                                pace = self.down
                                data = await server.receive(pace.size if pace else 65536)
                                if not relayed.forgotten:
                                    await client.send(data)
                                if pace:
                                    await anyio.sleep(pace.pause)
                        tasks.cancel_scope.cancel()

                    tasks.start_soon(up)
                    tasks.start_soon(down)


@asynccontextmanager
async def relayed_to(server_port: int) -> AsyncGenerator[Relay, None]:
    """A relay to the server on that port, until the block is left."""
    relay = Relay(server_port)
    async with listening(relay.talk) as port:
        relay.port = port
        yield relay


@contextmanager
def slow_upload_to(server_port: int, pace: Pace) -> Generator[int, None, None]:
    """A relay, on the port that comes out, that takes what clients send at this pace, and nothing in advance.

    In threads: asyncio's streams read ahead.
    """

    def pump(source: socket.socket, target: socket.socket, pace: Pace | None) -> None:
        with suppress(OSError), source, target:
            while data := source.recv(pace.size if pace else 65536):
                target.sendall(data)
                if pace:
                    time.sleep(pace.pause)
            target.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", server_port))
                for source, target, limit in ((client, server, pace), (server, client, None)):
                    pumps.append(threading.Thread(target=pump, args=(source, target, limit)))
                    pumps[-1].start()

    pumps: list[threading.Thread] = []
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for thread in pumps:
                thread.join()
