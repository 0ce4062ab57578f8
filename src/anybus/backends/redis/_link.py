"""A link: one open connection to the server, authenticated and named. Bytes in, bytes out."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from typing import Any

import anyio
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSStream

from ._diagnosis import Stage, why
from ._errors import broken, is_about_credentials, is_permanent, translate
from ._protocol import BrokenProtocolError, Command, Protocol, Replies, ServerError, pack
from ._settings import Settings

MAX_RECEIVE = 65536 * 4

BROKEN = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, OSError, BrokenProtocolError)
"""What tells that a connection is of no use any more."""


class Link:
    """An open connection. ``client_id`` is the server's number for it."""

    def __init__(self, stream: ByteStream, settings: Settings) -> None:
        self._stream = stream
        self._settings = settings
        self.client_id = 0
        self._socket: socket.socket | None = None
        raw = stream.extra(SocketAttribute.raw_socket, None)
        if raw is not None and settings.tls is None and sys.platform != "win32":
            with suppress(OSError):  # no file descriptor left: everything goes by ``send``
                self._socket = socket.fromfd(raw.fileno(), raw.family, raw.type)
                self._socket.setblocking(False)

    @property
    def can_send_nowait(self) -> bool:
        return self._socket is not None

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Hand over what the kernel takes at once; how many bytes that was.

        Nothing else may be in the middle of being sent. If the connection is broken, :meth:`receive` will tell.
        """
        if self._socket is None:
            return 0
        try:
            return self._socket.send(data)
        except OSError:
            return 0

    async def send(self, data: bytes) -> None:
        """Send all of it. A plain socket is written to here and not by the loop's transport, in whose buffer what
        :meth:`send_nowait` sends would overtake the rest.
        """
        if self._socket is None:
            await self._stream.send(data)
            return
        left = memoryview(data)
        while left:
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                await anyio.wait_writable(self._socket)

    async def receive(self) -> bytes:
        return await self._stream.receive(MAX_RECEIVE)

    async def aclose(self) -> None:
        """Close without ceremony: the server notices by itself, and nobody waits for TLS's goodbye."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(self._stream)


async def open_link(settings: Settings, *, entering: bool = False) -> Link:
    """Connect, authenticate, choose the database, set the name.

    :param entering: whether the bus is just being entered: wrong credentials are permanent then.
    :raises BackendError: if any of it fails; ``can_pass`` tells whether trying again may help.
    """
    stage: Stage = "connecting"
    try:
        with anyio.fail_after(settings.connect_timeout):
            stream = await _open_stream(settings)
            if settings.tls is not None and settings.path is None:
                stage = "securing"
                stream = await _secured(stream, settings)
            stage = "greeting"
            link = Link(stream, settings)
            try:
                await _introduce(link, settings)
            except BaseException:
                await link.aclose()
                raise
    except ServerError as error:
        raise translate(error, entering=entering) from error
    except BROKEN as error:
        text = f"no connection to {settings.place}: {why(error, settings, stage)}"
        raise broken(text, may_have_happened=False) from error
    return link


async def _open_stream(settings: Settings) -> ByteStream:
    if settings.path is not None:
        return await anyio.connect_unix(settings.path)
    return await anyio.connect_tcp(settings.host, settings.port)


async def _secured(stream: ByteStream, settings: Settings) -> ByteStream:
    try:
        return await TLSStream.wrap(
            stream,
            server_side=False,
            hostname=settings.tls_hostname or settings.host,
            ssl_context=settings.tls,
            standard_compatible=False,
        )
    except BaseException:
        await anyio.aclose_forcefully(stream)  # noqa: ASYNC102, ASYNC120 - it closes without waiting
        raise


async def _introduce(link: Link, settings: Settings) -> None:
    required: list[Command] = []
    if settings.credentials is not None:
        try:
            credentials = await settings.credentials.get_credentials_async()
        except Exception as error:
            # The application's own code: whatever it raises, it may have credentials again next time.
            raise broken(f"no credentials for {settings.place}: {error!r}", may_have_happened=False) from error
        required.append(("AUTH", *credentials))
    if settings.db:
        required.append(("SELECT", settings.db))
    optional: list[Command] = [("CLIENT", "SETNAME", settings.client_name)] if settings.client_name else []
    optional.append(("CLIENT", "ID"))
    replies = await ask(link, [*required, *optional])
    for reply in replies[: len(required)]:
        if isinstance(reply, ServerError):
            raise reply
    await tolerate(link, replies[len(required) :])
    client_id = replies[-1]
    if not isinstance(client_id, (int, ServerError)):
        raise BrokenProtocolError(f"CLIENT ID was answered with {client_id!r:.80}")
    link.client_id = client_id if isinstance(client_id, int) else 0


async def tolerate(link: Link, replies: list[Any]) -> None:
    """Let pass that the server refuses what was asked for information only, in whatever words.

    :raises ServerError: if it refuses everything now: it wants credentials, is full, is loading...
    """
    refusals = [reply for reply in replies if isinstance(reply, ServerError) and not is_permanent(reply)]
    if not refusals:
        return
    if not is_about_credentials(refusals[0]):
        with suppress(*BROKEN):
            [reply] = await ask(link, [("ECHO", "anybus")])
            if not isinstance(reply, ServerError) or is_permanent(reply):
                return
    raise refusals[0]


async def ask(link: Link, commands: list[Command]) -> list[Any]:
    """Send commands on a link that nobody else uses; all replies, error replies included.

    :raises ServerError: if the connection breaks after the server has said why.
    """
    protocol = Protocol()
    finished = False

    def done() -> None:
        nonlocal finished
        finished = True

    replies = Replies(len(commands), done)
    protocol.expect(replies)
    await link.send(pack(commands))
    try:
        while not finished:
            protocol.feed(await link.receive())
    except BROKEN:
        # A server that is full says so, once, and closes the connection.
        for reply in replies.replies:
            if isinstance(reply, ServerError):
                raise reply from None
        raise
    return replies.replies
