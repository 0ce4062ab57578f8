"""One connection, while all commands share it: its queue, its writer, and what watches over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio

from ..._ground.errors import BackendError
from ._errors import broken, duplicate
from ._link import BROKEN, Link
from ._protocol import BrokenProtocolError, Command, Protocol, Replies, pack, pack_one
from ._pulse import Pulse
from ._settings import Settings
from ._waves import Single, Waves

_WORTH_A_WRITE = 32768

POSTPONED = broken("not sent yet", may_have_happened=False)
"""The error of a caller that waits for the next connection by itself."""


class Call(Replies):
    """A caller's place in the queue, and the event that wakes it."""

    __slots__ = ("event", "patient", "sent")

    def __init__(self, expected: int, *, patient: bool = False) -> None:
        self.event = anyio.Event()
        self.patient = patient
        self.sent = False
        super().__init__(expected, self.event.set)


Unsent = list[tuple[bytes, Call | Single]]


def fail_all(unsent: Unsent, error: BackendError) -> None:
    for _, call in unsent:
        call.fail(duplicate(error))


class Session:
    """Sends the commands of concurrent callers in one write, and assigns the replies, until the connection breaks.

    :param unsent: the commands that the last session left, to be sent first.
    """

    def __init__(self, link: Link, settings: Settings, clock: Callable[[], float], unsent: Unsent) -> None:
        self._link = link
        self._settings = settings
        self._clock = clock
        self._protocol = Protocol()
        self._pulse = Pulse(link, self._protocol, clock, self._send_first, self._wake_up)
        self._waves = Waves()
        self._unsent = unsent
        self._unsent_size = sum(len(packed) for packed, _ in unsent)
        self._sending = False
        self._rest = b""
        self._wake_writer = anyio.Event()
        self._scope: anyio.CancelScope | None = None
        self._reason: BaseException | None = None

    @property
    def is_in_use(self) -> bool:
        return bool(self._unsent) or self._protocol.is_waiting

    async def run(self) -> None:
        """Serve until the connection breaks. Afterwards, :meth:`end` must be called."""
        link, pulse, protocol = self._link, self._pulse, self._protocol
        async with anyio.create_task_group() as tasks:
            self._scope = tasks.cancel_scope

            async def write() -> None:
                try:
                    await self._write()
                except BROKEN as error:
                    self._reason = error
                tasks.cancel_scope.cancel()

            async def watch() -> None:
                await pulse.until_silent(self._settings.command_timeout, lambda: len(self._rest))
                self._reason = TimeoutError(f"no reply within command_timeout ({self._settings.command_timeout} s)")
                tasks.cancel_scope.cancel()

            async def probe() -> None:
                await pulse.until_unanswered()
                self._reason = TimeoutError("no answer to a PING after a pause")
                tasks.cancel_scope.cancel()

            tasks.start_soon(write)
            tasks.start_soon(watch)
            tasks.start_soon(probe)
            tasks.start_soon(self._waves.expire)
            try:
                while True:
                    data = await link.receive()
                    pulse.received()
                    protocol.feed(data)
                    if not protocol.is_waiting:
                        link.all_answered()
            except BROKEN as error:
                self._reason = error
            tasks.cancel_scope.cancel()

    def abandon(self) -> None:
        """End :meth:`run`, although the connection has not broken."""
        if self._scope is not None:
            self._scope.cancel()

    @property
    def why_ended(self) -> str:
        text = f"the connection to {self._settings.place}"
        reason = self._reason
        if reason is None:
            return f"{text} was abandoned"
        text += f" broke: {str(reason) or type(reason).__name__}"
        if isinstance(reason, BrokenProtocolError):
            text += " (the data received is not valid in the Redis protocol)"
        return text

    def end(self) -> Unsent:
        """Fail the callers that wait for replies. Returns the commands for the next session; they have not been sent.

        That is none, unless the connection broke while it was probed. Otherwise the unsent commands fail, too.
        """
        was_probing = self._pulse.probing  # the PING is one of the commands that fail now
        self._protocol.fail(broken(self.why_ended, may_have_happened=True))
        unsent, self._unsent = self._unsent, []
        self._unsent_size = 0
        if not was_probing:
            fail_all(unsent, broken(self.why_ended, may_have_happened=False))
            return []
        postponed: Unsent = []
        for packed, call in unsent:
            if isinstance(call, Single) or call.patient:
                # The caller waits by itself: a wave's deadline ends with this connection, and the next may take time.
                call.fail(POSTPONED)
            else:
                postponed.append((packed, call))
        return postponed

    def _send_first(self, data: bytes) -> None:
        """Send while no other send is under way."""
        self._rest = data[self._link.send_nowait(data) :]
        if self._rest:
            self._wake_writer.set()

    def _wake_up(self) -> None:
        self._wake_writer.set()

    async def _write(self) -> None:
        link, pulse = self._link, self._pulse
        while True:
            while not (self._rest or (self._unsent and not pulse.probing)):
                self._wake_writer = anyio.Event()
                await self._wake_writer.wait()
            if pulse.probing:
                data, self._rest = self._rest, b""
            else:
                data = self._empty_line()
            self._sending = True
            try:
                await link.send(data)
            finally:
                self._sending = False

    def _empty_line(self) -> bytes:
        """Empty the queue, and return its bytes, which must be sent now."""
        line, self._unsent = self._unsent, []
        parts, self._rest = [self._rest], b""
        self._unsent_size = 0
        self._waves.seal()
        expect = self._protocol.expect
        for packed, call in line:
            if call.error is None:  # otherwise its deadline passed in the queue, and its caller knows it was not sent
                call.sent = True
                expect(call)
                parts.append(packed)
        return b"".join(parts)

    def start(self, commands: Sequence[Command], *, patient: bool) -> Call:
        """Add commands to the queue."""
        call = Call(len(commands), patient=patient)
        if not commands:
            call.done()
            return call
        self._put(pack(commands), call)
        return call

    def single(self, command: Command, timeout: float) -> Single:
        """Add a command to the queue, in the wave that is sent next."""
        packed = pack_one(command)
        call = self._waves.join(timeout)
        self._put(packed, call)
        return call

    def _put(self, packed: bytes, call: Call | Single) -> None:
        """Add to the queue. The writer sends the queue a moment later, so that commands leave together.

        They are sent at once if no reply is expected, or if they are enough for a write of their own: then the server
        already works on them while more commands are added.
        """
        self._unsent.append((packed, call))
        self._unsent_size += len(packed)
        link, pulse = self._link, self._pulse
        if pulse.probing:
            return
        idle = not self._protocol.is_waiting
        if idle and pulse.has_paused():
            pulse.probe()
        elif (
            (idle or self._unsent_size >= _WORTH_A_WRITE) and not (self._sending or self._rest) and link.can_send_nowait
        ):
            self._send_first(self._empty_line())
        elif len(self._unsent) == 1:
            self._wake_writer.set()
