"""Commands and scripts on the multiplexed connection. Their errors become the bus's errors."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Final

import anyio

from ..._ground.errors import BackendError, GroupLostError
from ..._ground.log import say
from . import (
    _completion_scripts,
    _dead_letter_scripts,
    _deduplication_scripts,
    _fence_scripts,
    _lease_scripts,
    _retention_scripts,
    _rights,
    _schedule_scripts,
    _scripts,
    _taking_scripts,
    _tick_scripts,
    _watch_scripts,
)
from ._alone import Loner
from ._asking import AskingMultiplexer
from ._decoding import predecessor
from ._durability import QUESTIONS, SAVE_POINTS, evicts, fields, keeps_no_log, keeps_nothing
from ._errors import (
    UNEXPECTED,
    has_code,
    is_permanent,
    leads_elsewhere,
    may_be_partly_done,
    translate,
    unexpected_reply,
)
from ._keys import RESERVED, RETURNED, meta, waiting_beside
from ._limits import LARGE, ROOM, Limit, ask_limit
from ._link import Link, ask, tolerate
from ._multiplexer import Multiplexer
from ._protocol import Argument, Command, ServerError
from ._scripts import Script
from ._sentinel import SentinelLocator
from ._server import Server, look_at
from ._session import Call
from ._settings import Settings

_ALL: Final = (
    *_scripts.ALL,
    *_fence_scripts.ALL,
    *_taking_scripts.ALL,
    *_lease_scripts.ALL,
    *_watch_scripts.ALL,
    *_rights.ALL,
    *_dead_letter_scripts.ALL,
    *_deduplication_scripts.ALL,
    *_retention_scripts.ALL,
    *_completion_scripts.ALL,
    *_schedule_scripts.ALL,
    *_tick_scripts.ALL,
)


class Client:
    """One server, over the multiplexed connection."""

    def __init__(self, settings: Settings) -> None:
        if settings.sentinels:
            settings = replace(settings, locator=SentinelLocator(settings))
        self.settings = settings
        self.server = Server()
        self.limit: Limit | None = None
        self.careful_above = LARGE
        """Messages larger than this must be checked: the server may not accept them."""
        self.mux = (AskingMultiplexer if settings.asking else Multiplexer)(settings, self._greet)
        self._loner = Loner(settings, self.mux)

    async def _greet(self, link: Link) -> None:
        """Called for every new connection: check that the server is supported, and load the scripts."""
        server = await look_at(link, self.settings)
        self.limit = await ask_limit(link)
        self.careful_above = LARGE if self.limit is None else self.limit.size - ROOM
        loaded = await ask(link, [("SCRIPT", "LOAD", script.source) for script in _ALL])
        await tolerate(link, loaded)
        self.server = replace(server, can_load=not any(isinstance(reply, ServerError) for reply in loaded))

    async def warn(self) -> None:
        """Log a warning if the server's settings may lose messages. If it refuses the questions, nothing is logged."""
        with suppress(BackendError), anyio.move_on_after(self.settings.command_timeout):
            memory, persistence = await self.mux.pipeline(QUESTIONS)
            warnings = [evicts(fields(memory))]
            if keeps_no_log(fields(persistence)):
                [save_points] = await self.mux.pipeline((SAVE_POINTS,))
                warnings.append(keeps_nothing(save_points))
            for warning in filter(None, warnings):
                text = "the server at %s %s"
                say(logging.WARNING, text, self.settings.place, warning, hidden={"scope": "connection"})

    async def call(self, *command: Argument) -> Any:
        """Send one command, and return its reply.

        :raises BackendError: if the server refuses, or the connection breaks.
        """
        [reply] = await self.mux.pipeline((command,))
        if isinstance(reply, ServerError):
            raise self.refused(reply)
        return reply

    def goes_alone(self, size: int) -> bool:
        """Whether the server may close the connection because of an argument of this many bytes."""
        return size > LARGE and self.limit is None

    async def alone(self, command: Command, timeout: float) -> Any:
        """Send a command on a connection of its own, and return its reply. Raises as ``Multiplexer.single`` does."""
        [reply] = await self._loner.pipeline((command,), timeout, patient=True)
        return reply

    async def publish(self, commands: Sequence[Command]) -> list[Any]:
        """Like ``Multiplexer.pipeline`` with ``patient=True``, but very large commands use a connection of their own.

        The commands after a large one wait for it, to keep the order. An error concerns only the commands that were
        sent together.
        """
        if self.limit is not None or not any(self.goes_alone(_size(command[-1])) for command in commands):
            return await self.mux.pipeline(commands, patient=True)
        replies: list[Any] = []
        together: list[Command] = []

        async def send(part: Sequence[Command], alone: bool) -> None:
            try:
                replies.extend(await (self._loner if alone else self.mux).pipeline(part, patient=True))
            except BackendError as error:
                replies.extend([error] * len(part))

        for command in commands:
            if not self.goes_alone(_size(command[-1])):
                together.append(command)
                continue
            await send(together, False)
            together = []
            await send((command,), True)
        await send(together, False)
        return replies

    async def ask(self, stream: str, group: str, command: Command) -> Any:
        """Send a command about a group, and return its reply.

        :raises GroupLostError: if the group no longer exists.
        :raises BackendError: as :meth:`call` does.
        """
        [reply] = await self.mux.pipeline((command,))
        if isinstance(reply, ServerError):
            raise await self.refused_in(stream, group, reply)
        return reply

    async def run(self, script: Script, stream: str, group: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run a script about a group. Raises as :meth:`ask` does."""
        # The limit is known nearly always. Then the arguments are not looked at: an acknowledgement has many.
        if self.limit is None and any(self.goes_alone(_size(argument)) for argument in args):
            [reply] = await self._loner.pipeline((("EVAL", script.source, len(keys), *keys, *args),))
        else:
            call = await self.mux.start((evalsha(script, keys, args),))
            await call.event.wait()
            reply = await self.finish(call, script, keys, args)
        if isinstance(reply, ServerError):
            partly = may_be_partly_done(reply, partly=script.partly)
            raise await self.refused_in(stream, group, reply, may_have_happened=partly)
        return reply

    async def finish(self, call: Call, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """The reply to a script's call that has ended. If the server has forgotten the script, it is sent again."""
        if call.error is not None:
            raise call.error
        reply = call.replies[-1]
        if isinstance(reply, ServerError) and has_code(reply, "NOSCRIPT"):
            await self.load_scripts()
            [reply] = await self.mux.pipeline((("EVAL", script.source, len(keys), *keys, *args),))
        return reply

    async def load_scripts(self) -> None:
        """Load all scripts again on a server that has forgotten them (SCRIPT FLUSH). The replies are not awaited."""
        if not self.server.can_load:
            return  # the EVAL that follows sends the script that is needed
        await self.mux.start([("SCRIPT", "LOAD", script.source) for script in _ALL])

    async def note_waiting(self, streams: Iterable[str]) -> None:
        """For retry streams to which something was appended: tell those who watch their groups. Not awaited."""
        marks = {waiting_beside(stream) for stream in streams if stream.startswith(RESERVED)}
        # A node that is asked would set a mark of its own, while the stream's may still be where it was.
        if marks and not self.settings.asking:
            await self.mux.start([("ZADD", mark, 0, RETURNED) for mark in marks])

    def unwatched(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Command:
        """A call of a script whose reply is ignored. So a forgotten script would not be noticed."""
        if self.server.can_load:
            return evalsha(script, keys, args)
        return ("EVAL", script.source, len(keys), *keys, *args)

    @contextmanager
    def reading(self, reply: Any) -> Generator[None, None, None]:
        """For a block that parses a reply.

        :raises BackendError: if the reply has an unexpected form. The connection may be out of step, so it is closed.
        """
        try:
            yield
        except UNEXPECTED as error:
            self.mux.reset()
            raise unexpected_reply(self.settings.place, reply) from error

    def text(self, reply: Any) -> str:
        """A reply that must be text, an entry's id for example. Raises as :meth:`reading` does."""
        with self.reading(reply):
            return str(reply.decode())

    def refused(self, error: ServerError, *, may_have_happened: bool = False) -> BackendError:
        """The bus's error for an error reply on the shared connection."""
        # On a cluster, another node is the right one for the key, and this one for others.
        if leads_elsewhere(error) and not (self.settings.cluster and has_code(error, "MOVED")):
            self.mux.reset()
        return translate(error, may_have_happened=may_have_happened)

    async def refused_in(
        self, stream: str, group: str, error: ServerError, *, may_have_happened: bool = False
    ) -> BackendError:
        """The bus's error for an error reply about a group. If the group is gone, it has the group's kept floor."""
        lost = has_code(error, "NOGROUP") or "no such key" in str(error)
        unblocked = has_code(error, "UNBLOCKED") and "instance state changed" not in str(error)
        if not lost and not unblocked:
            return self.refused(error, may_have_happened=may_have_happened)
        floor: str | None = None
        with anyio.move_on_after(self.settings.command_timeout):
            [reply] = await self.mux.pipeline((("HGET", meta(stream), group),))
            if isinstance(reply, ServerError) and self.settings.cluster and not is_permanent(reply):
                return self.refused(reply)  # the stream is not lost, but somewhere else
            floor = reply.decode() if isinstance(reply, bytes) else None
        if floor is not None and floor.startswith("before "):
            floor = predecessor(floor.removeprefix("before "))
        return GroupLostError(stream, group, floor)


def evalsha(script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Command:
    return ("EVALSHA", script.digest, len(keys), *keys, *args)


def _size(argument: Argument) -> int:
    return len(argument) if isinstance(argument, (bytes, str)) else 0
