"""A link: one open connection to the server, authenticated and named. Bytes in, bytes out."""

from __future__ import annotations

import os
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

import anyio
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSStream

from ._diagnosis import Stage, why
from ._errors import broken, has_code, is_about_credentials, is_permanent, translate
from ._protocol import BrokenProtocolError, Command, Protocol, Replies, ServerError, pack
from ._settings import Settings

if sys.platform != "win32":
    import fcntl
    import termios

MAX_RECEIVE = 65536 * 4

_CHUNK = 65536

BROKEN = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, OSError, BrokenProtocolError)
"""The exceptions that mean that a connection cannot be used any more."""

PAUSE = 5.0
"""After this many seconds without a reply, a PING is sent before a connection is used again."""

_SHORTEST_PROBE = 0.5

_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPALIVE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
"""Options for TCP's own probes. Platforms have different names for the first one."""

PING: Command = ("PING",)


class Link:
    """An open connection.

    Writes bypass the event loop's transport, and go directly to the socket, so that no task switch is needed. The
    descriptor is not duplicated for this, because the transport tells when it has closed it (``fileno`` is -1). Bytes
    that the kernel does not accept at once are sent by the transport. So are all bytes after them, until the server has
    answered everything: otherwise they would overtake the bytes in the transport's buffer.

    :ivar client_id: the server's number for this connection.
    :ivar latency: how many seconds the server took to answer the greeting.
    """

    def __init__(self, stream: ByteStream, settings: Settings) -> None:
        self._stream = stream
        self.settings = settings
        self.client_id = 0
        self.latency = 0.0
        self._raw = _raw_socket(stream)
        self._direct = self._raw is not None and settings.tls is None and sys.platform != "win32"
        self._in_order = True
        self._sent = 0
        self._left = 0
        self._revoked: str | None = None
        if self._raw is not None:
            _keep_alive(self._raw)

    @property
    def can_send_nowait(self) -> bool:
        return self._direct and self._in_order

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Send as many bytes as the kernel accepts at once, and return their number.

        No other send may be under way. If the connection is broken, :meth:`receive` will raise.
        """
        if self._raw is None or not self.can_send_nowait:
            return 0
        try:
            count = os.write(self._raw.fileno(), data)
        except OSError:
            return 0
        self._sent += count
        return count

    async def send(self, data: bytes, *, silence: float | None = None) -> None:
        """Send all bytes.

        :param silence: give up if the other side accepts nothing more for this many seconds; None = never.
        :raises TimeoutError: if it gave up.
        """
        left = memoryview(data)[self.send_nowait(data) :]
        try:
            while left:
                self._in_order = False
                self._left = len(left)
                with anyio.fail_after(silence):
                    await self._stream.send(bytes(left[:_CHUNK]))
                self._sent += min(_CHUNK, len(left))
                left = left[_CHUNK:]
        finally:
            self._left = 0

    def all_answered(self) -> None:
        """To be called when the server has answered everything: then the transport's buffer is empty."""
        self._in_order = True

    @property
    def offered(self) -> int:
        """How many bytes have been sent, or are being sent."""
        return self._sent + self._left

    def arrived(self) -> int:
        """How many bytes the other side's kernel has confirmed; 0 if the platform does not tell."""
        if self._raw is None or sys.platform == "win32":
            return 0
        try:
            (waiting,) = struct.unpack("i", fcntl.ioctl(self._raw.fileno(), termios.TIOCOUTQ, b"\0" * 4))
        except (OSError, ValueError):
            return 0
        return self._sent - int(waiting)

    async def receive(self) -> bytes:
        try:
            return await self._stream.receive(MAX_RECEIVE)
        except BROKEN as error:
            if self._revoked is not None:
                raise anyio.BrokenResourceError(self._revoked) from error
            raise

    async def receive_within(self, silence: float) -> bytes:
        """
        :raises TimeoutError: if for this many seconds nothing was received, and no sent bytes were confirmed.
        """
        arrived = self.arrived()
        while True:
            with anyio.move_on_after(silence):
                return await self.receive()
            before, arrived = arrived, self.arrived()
            if arrived <= before:
                raise TimeoutError(f"no answer for {silence:.3g} s")

    @property
    def probe_timeout(self) -> float:
        """Within how many seconds the server must answer a PING after a pause. The time is short, because opening
        another connection costs less than waiting for a dead one.
        """
        return min(self.settings.command_timeout, max(_SHORTEST_PROBE, 4 * self.latency))

    async def answers(self) -> bool:
        """Whether the server answers a PING. If not, or if this is cancelled, the link cannot be used any more.

        No other command may be under way.
        """
        with anyio.move_on_after(self.probe_timeout), suppress(*BROKEN):
            await ask(self, [PING])  # an error reply is also an answer
            return True
        return False

    async def aclose(self) -> None:
        """Close at once, without a TLS shutdown: the server notices by itself."""
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(self._stream)

    async def revoke(self, reason: str) -> None:
        """Close while it is in use: nothing more is sent. Whoever uses it is told the reason."""
        self._revoked = reason
        self._direct = False
        await self.aclose()


def _keep_alive(raw: Any) -> None:
    """Let the kernel probe a silent connection, so that firewalls and NATs on the way do not drop it."""
    if raw.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with suppress(OSError):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        option = getattr(socket, name, None)
        if option is not None:
            with suppress(OSError):
                raw.setsockopt(socket.IPPROTO_TCP, option, value)


def _raw_socket(stream: ByteStream) -> Any:
    """
    :raises BrokenResourceError: if the connection has been reset: uvloop's transport has no socket then.
    """
    try:
        return stream.extra(SocketAttribute.raw_socket, None)
    except AttributeError as error:
        raise anyio.BrokenResourceError from error


async def open_link(settings: Settings, *, entering: bool = False) -> Link:
    """Connect to where the server is now, authenticate, select the database, set the connection's name.

    :param entering: whether the bus is just being entered. If so, wrong credentials are a permanent error.
    :raises BackendError: if any of these fails. ``can_pass`` tells whether trying again may help.
    """
    if settings.locator is not None:
        return await settings.locator.open(entering=entering)
    stage: Stage = "connecting"
    try:
        with anyio.fail_after(settings.connect_timeout):
            stream = await _open_stream(settings)
            if settings.tls is not None and settings.path is None:
                stage = "securing"
                stream = await _secured(stream, settings)
        stage = "greeting"
        try:
            link = Link(stream, settings)
        except BaseException:
            await anyio.aclose_forcefully(stream)  # noqa: ASYNC102, ASYNC120 - closes without waiting
            raise
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
        await anyio.aclose_forcefully(stream)  # noqa: ASYNC102, ASYNC120 - closes without waiting
        raise


async def _introduce(link: Link, settings: Settings) -> None:
    required: list[Command] = []
    if settings.credentials is not None:
        try:
            with anyio.fail_after(settings.connect_timeout):
                credentials = await settings.credentials.get_credentials_async()
        except Exception as error:
            # The application's own code. Whatever it raises, the error is transient: the next call may succeed.
            raise broken(f"no credentials for {settings.place}: {error!r}", may_have_happened=False) from error
        required.append(("AUTH", *credentials))
    if settings.db:
        required.append(("SELECT", settings.db))
    optional: list[Command] = [("CLIENT", "SETNAME", settings.client_name)] if settings.client_name else []
    optional.append(("CLIENT", "ID"))
    began = anyio.current_time()
    replies = await ask(link, [*required, *optional])
    link.latency = anyio.current_time() - began
    for command, reply in zip(required, replies, strict=False):
        if isinstance(reply, ServerError):
            if command[0] == "SELECT" and has_code(reply, "ERR"):  # not NOPERM, LOADING...
                raise ServerError(f"{reply} (database {settings.db}; a cluster has only database 0)")
            raise reply
    await tolerate(link, replies[len(required) :])
    client_id = replies[-1]
    if not isinstance(client_id, (int, ServerError)):
        raise BrokenProtocolError(f"unexpected reply to CLIENT ID: {client_id!r:.80}")
    link.client_id = client_id if isinstance(client_id, int) else 0


async def tolerate(link: Link, replies: list[Any]) -> None:
    """Ignore error replies to optional commands, whatever their text.

    :raises ServerError: if the server refuses every command now: it demands credentials, is full, is loading...
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


async def ask(link: Link, commands: list[Command], *, silence: float | None = None) -> list[Any]:
    """Send commands on a link that nobody else uses. Returns all replies, error replies included.

    :param silence: give up after this many seconds without a sign of life; None = ``connect_timeout``.
    :raises ServerError: if the connection breaks after the server has told the reason.
    :raises TimeoutError: if the server is silent for too long.
    """
    patience = link.settings.connect_timeout if silence is None else silence
    protocol = Protocol()
    finished = False

    def done() -> None:
        nonlocal finished
        finished = True

    replies = Replies(len(commands), done)
    protocol.expect(replies)
    try:
        await link.send(pack(commands), silence=patience)
        while not finished:
            protocol.feed(await link.receive_within(patience))
    except BROKEN:
        # A server with too many connections sends one error reply, and closes the connection.
        for reply in replies.replies:
            if isinstance(reply, ServerError):
                raise reply from None
        raise
    link.all_answered()
    return replies.replies
