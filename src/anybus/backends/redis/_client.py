"""Commands and scripts on the multiplexed connection, their errors in the bus's words."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Final

import anyio

from ..._ground.errors import BackendError, GroupLostError
from ..._ground.log import say
from . import _dead_letter_scripts, _lease_scripts, _rights, _scripts, _taking_scripts
from ._alone import Loner
from ._decoding import predecessor
from ._durability import QUESTIONS, SAVE_POINTS, evicts, fields, keeps_no_log, keeps_nothing
from ._errors import SENSELESS, has_code, leads_elsewhere, may_be_partly_done, senseless, translate
from ._keys import meta
from ._limits import LARGE, ROOM, Limit, ask_limit
from ._link import Link, ask, tolerate
from ._multiplexer import Call, Multiplexer
from ._protocol import Argument, Command, ServerError
from ._scripts import Script
from ._server import Server, look_at
from ._settings import Settings

_ALL: Final = (*_scripts.ALL, *_taking_scripts.ALL, *_lease_scripts.ALL, *_rights.ALL, *_dead_letter_scripts.ALL)


class Client:
    """One server, over the multiplexed connection."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.server = Server()
        self.limit: Limit | None = None
        self.careful_above = LARGE
        """Of larger messages somebody has to look whether the server takes them."""
        self.mux = Multiplexer(settings, self._greet)
        self._loner = Loner(settings, self.mux)

    async def _greet(self, link: Link) -> None:
        """On every new connection: is this a server that we can work with? Load the scripts."""
        server = await look_at(link, self.settings)
        self.limit = await ask_limit(link)
        self.careful_above = LARGE if self.limit is None else self.limit.size - ROOM
        loaded = await ask(link, [("SCRIPT", "LOAD", script.source) for script in _ALL])
        await tolerate(link, loaded)
        self.server = replace(server, can_load=not any(isinstance(reply, ServerError) for reply in loaded))

    async def warn(self) -> None:
        """Log what the server's settings may lose. For information: what is refused is not known, and not required."""
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
        """
        :raises BackendError: if the server refuses, or the connection breaks.
        """
        [reply] = await self.mux.pipeline((command,))
        if isinstance(reply, ServerError):
            raise self.refused(reply)
        return reply

    def goes_alone(self, size: int) -> bool:
        """Whether an argument of so many bytes may cost the connection that it is sent by."""
        return size > LARGE and self.limit is None

    async def alone(self, command: Command, timeout: float) -> Any:
        """Send a command by a connection of its own; its reply. Raises as ``Multiplexer.single`` does."""
        [reply] = await self._loner.pipeline((command,), timeout, patient=True)
        return reply

    async def publish(self, commands: Sequence[Command]) -> list[Any]:
        """As ``Multiplexer.pipeline``, patiently.

        What goes alone breaks with nobody; what follows it waits, to stay in order. An error is that of its part only.
        """
        if not any(self.goes_alone(_size(command[-1])) for command in commands):
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
        """A command about a group.

        :raises GroupLostError: if the group no longer exists.
        :raises BackendError: as of :meth:`call`.
        """
        [reply] = await self.mux.pipeline((command,))
        if isinstance(reply, ServerError):
            raise await self.refused_in(stream, group, reply)
        return reply

    async def run(self, script: Script, stream: str, group: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run a script about a group. Raises as :meth:`ask` does."""
        if any(self.goes_alone(_size(argument)) for argument in args):
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
        """The reply of a script's call that has arrived. A server that has forgotten the script is told it again."""
        if call.error is not None:
            raise call.error
        reply = call.replies[-1]
        if isinstance(reply, ServerError) and has_code(reply, "NOSCRIPT"):
            await self.load_scripts()
            [reply] = await self.mux.pipeline((("EVAL", script.source, len(keys), *keys, *args),))
        return reply

    async def load_scripts(self) -> None:
        """Tell a server that has forgotten them (SCRIPT FLUSH) all scripts again. Nobody waits for the replies."""
        if not self.server.can_load:
            return  # EVAL, which follows, teaches it the one that is needed
        await self.mux.start([("SCRIPT", "LOAD", script.source) for script in _ALL])

    def unwatched(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Command:
        """A script's call whose reply nobody looks at, so that nobody would tell the server the script again."""
        if self.server.can_load:
            return evalsha(script, keys, args)
        return ("EVAL", script.source, len(keys), *keys, *args)

    @contextmanager
    def reading(self, reply: Any) -> Generator[None, None, None]:
        """What stands in the block takes a reply apart.

        :raises BackendError: if no server answers so. The connection may be out of step: it is given up.
        """
        try:
            yield
        except SENSELESS as error:
            self.mux.reset()
            raise senseless(self.settings.place, reply) from error

    def text(self, reply: Any) -> str:
        """A reply that must be text, an entry's id for instance. Raises as :meth:`reading` does."""
        with self.reading(reply):
            return str(reply.decode())

    def refused(self, error: ServerError, *, may_have_happened: bool = False) -> BackendError:
        """What the shared connection was answered."""
        if leads_elsewhere(error):
            self.mux.reset()
        return translate(error, may_have_happened=may_have_happened)

    async def refused_in(
        self, stream: str, group: str, error: ServerError, *, may_have_happened: bool = False
    ) -> BackendError:
        """The error of something asked about a group: if the group is gone, with the floor that was kept of it."""
        lost = has_code(error, "NOGROUP") or "no such key" in str(error)
        unblocked = has_code(error, "UNBLOCKED") and "instance state changed" not in str(error)
        if not lost and not unblocked:
            return self.refused(error, may_have_happened=may_have_happened)
        floor: str | None = None
        with anyio.move_on_after(self.settings.command_timeout):
            [reply] = await self.mux.pipeline((("HGET", meta(stream), group),))
            floor = reply.decode() if isinstance(reply, bytes) else None
        if floor is not None and floor.startswith("before "):
            floor = predecessor(floor.removeprefix("before "))
        return GroupLostError(stream, group, floor)


def evalsha(script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Command:
    return ("EVALSHA", script.digest, len(keys), *keys, *args)


def _size(argument: Argument) -> int:
    return len(argument) if isinstance(argument, (bytes, str)) else 0
