"""Publishes that wait until replicas have the message, or until it is on disk.

WAIT and WAITAOF block the connection that sends them, and concern what was written on it. So there is a connection for
them alone. Callers share it: what several of them publish while a question is under way is sent together, with one
question behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from ..._ground.errors import BackendError, EventBusError, NotConfirmedError, UnsupportedError
from ...abc import PublishSpec
from ._asking import AskingMultiplexer
from ._client import Client
from ._durability import fields
from ._errors import broken, duplicate, has_code, leads_elsewhere
from ._link import Link, ask
from ._multiplexer import Multiplexer
from ._protocol import Argument, Command, ServerError
from ._server import look_at

_MOST_TOGETHER: Final = 1000
_MOST_BYTES: Final = 1024 * 1024

_KNOWN_FOR: Final = 1.0
"""For how many seconds the number of connected replicas is taken for granted."""


@dataclass(eq=False)
class _Flight:
    """Commands that are sent together, with one question behind them.

    :ivar shortfall: what is missing of the confirmation; None = nothing.
    """

    spec: PublishSpec
    commands: list[Command] = field(default_factory=list[Command])
    size: int = 0
    landed: anyio.Event = field(default_factory=anyio.Event)
    replies: Sequence[Any] = ()
    shortfall: str | None = None
    error: EventBusError | None = None

    @property
    def is_full(self) -> bool:
        return len(self.commands) >= _MOST_TOGETHER or self.size >= _MOST_BYTES


class Confirmer:
    """The connection for confirmed publishes to one server. It is opened when it is first needed."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._settings = client.settings
        multiplexer = AskingMultiplexer if self._settings.asking else Multiplexer
        self._mux = multiplexer(self._settings, self._on_connect, watches=False)
        self._boarding: dict[PublishSpec, _Flight] = {}
        self._tasks: TaskGroup | None = None
        self._alarm: Callable[[BaseException], None] | None = None
        self._is_open = False
        self._cannot_persist: str | None = None
        self._replicas = 0
        self._counted_at = 0.0

    def start(self, tasks: TaskGroup, alarm: Callable[[BaseException], None]) -> None:
        """Prepare for work in this task group."""
        self._tasks, self._alarm = tasks, alarm
        self._turn = anyio.Lock()
        self._boarding.clear()
        self._is_open = False
        self._counted_at = -_KNOWN_FOR

    def close(self) -> None:
        self._tasks = None
        if self._is_open:
            self._mux.close()

    async def publish(self, commands: Sequence[Command], spec: PublishSpec) -> list[str | EventBusError]:
        """Send commands that append an entry each, and wait for the confirmation. Returns each one's id or error.

        :raises EventBusError: if nothing is known of any of them.
        """
        flight = self._boarding.get(spec)
        if flight is None or flight.is_full:
            if self._tasks is None:
                raise broken(f"the connection to {self._settings.place} is closed", may_have_happened=False)
            flight = self._boarding[spec] = _Flight(spec)
            self._tasks.start_soon(self._fly, flight)
        first = len(flight.commands)
        flight.commands += commands
        flight.size += sum(len(part) for command in commands for part in command if isinstance(part, bytes))
        await flight.landed.wait()
        if flight.error is not None:
            raise duplicate(flight.error) if isinstance(flight.error, BackendError) else flight.error
        return [self._result(reply, flight) for reply in flight.replies[first : first + len(commands)]]

    def _result(self, reply: Any, flight: _Flight) -> str | EventBusError:
        if isinstance(reply, ServerError):
            return self._refused(reply)
        try:
            entry_id = self._client.text(reply)
        except BackendError as error:
            return error
        if flight.shortfall is None:
            return entry_id
        return NotConfirmedError(f"stored as {entry_id}, but {flight.shortfall}", entry_id=entry_id)

    def _refused(self, error: ServerError) -> BackendError:
        if leads_elsewhere(error) and not (self._settings.cluster and has_code(error, "MOVED")):
            self._mux.reset()
        return self._client.refused(error)

    async def _fly(self, flight: _Flight) -> None:
        """Shielded: if everything is cancelled, what is left is still published. Its callers limit the time."""
        try:
            with anyio.CancelScope(shield=True):
                await self._take_off(flight)
        except EventBusError as error:
            flight.error = error
        finally:
            if not flight.replies and flight.error is None:
                flight.error = broken("interrupted", may_have_happened=True)
            flight.landed.set()

    async def _take_off(self, flight: _Flight) -> None:
        async with self._turn:  # the next flight fills meanwhile
            if self._boarding.get(flight.spec) is flight:
                del self._boarding[flight.spec]
            await self._send(flight)

    async def _send(self, flight: _Flight) -> None:
        mux, spec = self._mux, flight.spec
        if self._tasks is None:
            raise broken(f"the connection to {self._settings.place} is closed", may_have_happened=False)
        self._open()
        await mux.until_connected()
        await self._check(spec)
        connection = mux.connections
        began, left = anyio.current_time(), spec.confirmation_timeout
        *replies, answer = await mux.pipeline((*flight.commands, self._question(spec, left)))
        while (shortfall := self._shortfall(spec, answer)) is not None:
            left = began + spec.confirmation_timeout - anyio.current_time()
            if left <= 0 or isinstance(answer, ServerError):
                break
            try:
                # The server's question is limited, because a connection that is silent for too long counts as dead.
                [answer] = await mux.pipeline((self._question(spec, left),))
            except BackendError as error:
                shortfall = f"no confirmation came: {error}"
                break
            if mux.connections != connection:
                # The answer would be about what was written on the new connection, that is nothing.
                shortfall = f"no confirmation came: the connection to {self._settings.place} broke"
                break
        flight.shortfall = shortfall
        flight.replies = replies

    def _open(self) -> None:
        if not self._is_open and self._tasks is not None and self._alarm is not None:
            self._is_open = True
            self._mux.prepare()
            self._tasks.start_soon(self._mux.run, None, self._alarm, self._tasks)

    async def _on_connect(self, link: Link) -> None:
        await look_at(link, self._settings)
        self._cannot_persist = _refusal(await ask(link, [_persisted(0, 1)]))
        self._counted_at = -_KNOWN_FOR

    async def _check(self, spec: PublishSpec) -> None:
        """Refuse what the server cannot confirm, before anything is published."""
        place = self._settings.place
        if spec.confirmation == "persisted" and self._cannot_persist is not None:
            self._cannot_persist = _refusal(await self._mux.pipeline((_persisted(0, 1),)))
            if self._cannot_persist is not None:
                raise UnsupportedError(
                    f"{place} cannot confirm that a message is on disk ({self._cannot_persist}): this needs "
                    "WAITAOF (Redis 7.2 and newer, Valkey), appendonly, and the right to it. Nothing was published"
                )
        if not spec.replicas:
            return
        now = anyio.current_time()
        if self._replicas < spec.replicas or now - self._counted_at > _KNOWN_FOR:
            [reply] = await self._mux.pipeline((("INFO", "replication"),))
            # If the user may not ask, WAIT finds out.
            known = fields(reply).get("connected_slaves", "") if isinstance(reply, bytes) else ""
            self._replicas = int(known) if known.isdecimal() else spec.replicas
            self._counted_at = now
        if self._replicas < spec.replicas:
            raise broken(
                f"{place} has {self._replicas} connected replicas, and {spec.replicas} must confirm: nothing was "
                "published",
                may_have_happened=False,
            )

    def _question(self, spec: PublishSpec, left: float) -> Command:
        milliseconds = max(1, round(min(left, self._settings.command_timeout / 2) * 1000))  # 0 would mean: forever
        if spec.confirmation == "persisted":
            return _persisted(spec.replicas, milliseconds)
        return ("WAIT", spec.replicas, milliseconds)

    def _shortfall(self, spec: PublishSpec, answer: Any) -> str | None:
        if isinstance(answer, ServerError):
            return f"{self._settings.place} cannot confirm it: {answer}"
        within = f"within {spec.confirmation_timeout:.15g} s"
        with self._client.reading(answer):
            local, replicas = (1, int(answer)) if spec.confirmation == "replicated" else map(int, answer)
        if replicas < spec.replicas:
            return f"only {replicas} of {spec.replicas} replicas confirmed it {within}"
        return None if local else f"it was not on the disk of {self._settings.place} {within}"


def _persisted(replicas: int, milliseconds: int) -> Command:
    return ("WAITAOF", 1, replicas, milliseconds)


def _refusal(replies: Sequence[Any]) -> str | None:
    [reply] = replies
    return str(reply) if isinstance(reply, ServerError) else None


def xadd(stream: str, data: bytes) -> tuple[Argument, ...]:
    return ("XADD", stream, "*", "message", data)
