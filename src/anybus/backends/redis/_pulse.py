"""The pulse of the shared connection: checks whether the other side still answers."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from ._link import PAUSE, PING, Link
from ._protocol import Protocol, Replies, pack_one

LOOKS = 4
"""How many times within ``command_timeout`` the silence is measured."""

LOOKS_WHEN_IDLE = 2
"""The same, while no reply is expected. Each look wakes the process."""

PING_EVERY = 10.0
"""After this many idle seconds, a PING is sent, so that firewalls and NATs on the way do not drop the connection."""


class Pulse:
    """Sends a PING if there has been no sign of life for too long.

    :param send: called with the bytes of a PING.
    :param on_answer: called when a PING has been answered.
    :ivar last_reply: when bytes were last received.
    :ivar probing: a PING is under way. Nothing else may be sent until it is answered, so that no command is sent on a
        dead connection.
    """

    def __init__(
        self,
        link: Link,
        protocol: Protocol,
        clock: Callable[[], float],
        send: Callable[[bytes], None],
        on_answer: Callable[[], None],
    ) -> None:
        self._link = link
        self._protocol = protocol
        self._clock = clock
        self._send = send
        self._on_answer = on_answer
        self._answered: anyio.Event | None = None
        self._begun = anyio.Event()
        self.probing = False
        self.last_reply = clock()

    def received(self) -> None:
        """To be called when bytes were received."""
        self.last_reply = self._clock()

    def has_paused(self) -> bool:
        """Whether the silence is so long that a PING must be sent first. Called for most publishes."""
        return self._clock() - self.last_reply > PAUSE

    def probe(self) -> None:
        """Send a PING. No other command may be under way."""
        answered = self._answered = anyio.Event()
        self.probing = True

        def done() -> None:
            self.probing = False
            answered.set()
            self._on_answer()

        self._protocol.expect(Replies(1, done))
        self._send(pack_one(PING))
        self._begun.set()

    async def until_unanswered(self) -> None:
        """Return when a PING is not answered in time. While the connection is idle, send one at intervals."""
        while True:
            answered = self._answered
            if answered is None or answered.is_set():
                await self._probe_when_idle()
                continue
            with anyio.move_on_after(self._link.probe_timeout):
                await answered.wait()
            if not answered.is_set():
                return

    async def _probe_when_idle(self) -> None:
        self._begun = anyio.Event()
        idle_for = self._clock() - self.last_reply
        with anyio.move_on_after(max(PING_EVERY - idle_for, PING_EVERY / 10)):
            await self._begun.wait()
        idle_for = self._clock() - self.last_reply
        if not self._protocol.is_waiting and idle_for >= PING_EVERY:
            self.probe()

    async def until_silent(self, timeout: float, unsent: Callable[[], int]) -> None:
        """Return when a reply is expected, and the server has been silent for too long (because it is frozen, perhaps).

        There is no silence while parts of a reply arrive, or while the other side still confirms bytes of the commands.

        :param timeout: how many seconds of silence are too long.
        :param unsent: returns how many bytes of commands that count as sent are still here.
        """
        oldest: Replies | None = None
        since, arrived, owed = 0.0, 0, 0
        while True:
            await anyio.sleep(timeout / (LOOKS_WHEN_IDLE if self._protocol.oldest is None else LOOKS))
            now = self._clock()
            if self._protocol.oldest is not oldest:
                oldest, since, owed = self._protocol.oldest, now, self._link.offered + unsent()
            if oldest is None:
                continue
            before, arrived = arrived, self._link.arrived()
            if before < min(arrived, owed):
                since = now
            if now - max(since, self.last_reply) >= timeout:
                return
