"""Calls that take entries. If one is cancelled, it releases the entries that it took."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import anyio
from anyio.abc import TaskGroup

from ..._ground.cancellation import persist
from ..._ground.errors import BackendError
from ..._ground.log import say
from ...abc import FetchedEntry, MissingEntry
from . import _fence_scripts as fence
from ._appetite import Appetite
from ._client import Client, evalsha
from ._decoding import span
from ._errors import UNEXPECTED, has_code, may_be_partly_done
from ._keys import losses, waiting
from ._parts import PER_SCRIPT
from ._protocol import Argument, Command, ServerError
from ._scripts import Script

_SHIELDED = 1.0

Taken = dict[str, list[FetchedEntry]]
"""The entries that a call brought, by stream."""


class TakingCalls:
    """Sends commands that take entries, on the shared connection."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._tasks: TaskGroup | None = None
        self._under_way: set[anyio.Event] = set()
        self.appetite = Appetite()

    def start(self, tasks: TaskGroup) -> None:
        """Releases run in this task group from now on."""
        self._tasks = tasks

    def start_soon(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a release in the background."""
        assert self._tasks is not None
        self._tasks.start_soon(work)

    async def aclose(self) -> None:
        while self._under_way:
            await next(iter(self._under_way)).wait()

    async def by_script(
        self,
        script: Script,
        keys: Sequence[str],
        args: Sequence[Argument],
        group: str,
        consumer: str,
        parse: Callable[[list[Any]], Taken],
        lost: Callable[[], None] | None = None,
    ) -> Taken:
        try:
            return await self.take([evalsha(script, keys, args)], group, consumer, parse, keys[0], lost)
        except _ScriptForgottenError:
            await self._client.load_scripts()
            evaluate: Command = ("EVAL", script.source, len(keys), *keys, *args)
            return await self.take([evaluate], group, consumer, parse, keys[0], lost)

    async def take(
        self,
        commands: list[Command],
        group: str,
        consumer: str,
        parse: Callable[[list[Any]], Taken],
        stream: str | None = None,
        lost: Callable[[], None] | None = None,
    ) -> Taken:
        """Send commands, of which the last one takes entries. If this is cancelled, these entries are released.

        :param lost: called if the commands may have been carried out, but their reply is lost.
        """

        def look_for_loss() -> None:
            if lost is not None and call.error is not None:
                lost()

        call = await self._client.mux.start(commands)
        connection = self._client.mux.connections
        try:
            await call.event.wait()
        except BaseException:

            async def later() -> None:
                await call.event.wait()
                look_for_loss()
                await self.hand_back_reply(call.replies, parse, group, consumer)

            await self.within_a_second(later)  # noqa: ASYNC102 - shielded inside
            raise
        if call.error is not None:
            look_for_loss()
            if call.sent:
                self.appetite.broke(connection)
            raise call.error
        reply = call.replies[-1]
        if isinstance(reply, ServerError):
            if has_code(reply, "NOSCRIPT") and commands[-1][0] == "EVALSHA":
                raise _ScriptForgottenError
            partly = may_be_partly_done(reply, partly=False)
            if partly and lost is not None:
                lost()  # a later call searches for the entries that it took before the error
            where = stream or str(commands[-1][-2])
            raise await self._client.refused_in(where, group, reply, may_have_happened=partly)
        with self._client.reading(reply):
            taken = parse(call.replies)
        self.appetite.came([entry for entries in taken.values() for entry in entries])
        return taken

    async def within_a_second(self, hand_back: Callable[[], Awaitable[None]]) -> None:
        """Release entries, and wait for that, shielded, for at most a second.

        The release runs in a task of the backend. So only the waiting ends early if the second is over (because the
        server or this process was frozen), or if a native asyncio cancellation pierces the shield.
        """
        done = anyio.Event()

        async def outlive() -> None:
            try:
                with anyio.CancelScope(shield=True):  # the multiplexer lets nobody wait forever
                    await persist(hand_back)
            finally:
                self._under_way.discard(done)
                done.set()

        assert self._tasks is not None
        self._under_way.add(done)
        self._tasks.start_soon(outlive)
        with anyio.move_on_after(_SHIELDED, shield=True):
            await done.wait()

    async def hand_back_reply(
        self, replies: list[Any], parse: Callable[[list[Any]], Taken], group: str, consumer: str
    ) -> None:
        if not replies or isinstance(replies[-1], ServerError):
            return
        with suppress(*UNEXPECTED):
            await self.hand_back(parse(replies), group, consumer)

    async def hand_back(self, taken: Taken, group: str, consumer: str) -> None:
        """Release entries. Errors are not raised, because they would replace a cancellation: the leases then expire."""
        for stream, entries in taken.items():
            missing = [entry.id for entry in entries if isinstance(entry, MissingEntry)]
            if missing:
                # Since Redis 7.0, the server has dropped them from the pending list, so nobody else can report them.
                text = "entries were pending in group %r, but are gone from stream %r: %s"
                hidden = {"scope": "missing", "topic": stream, "group": group, "consumer": consumer}
                say(logging.WARNING, text, group, stream, ", ".join(missing), hidden=hidden)
            if entries:
                with suppress(BackendError):
                    await self.release(stream, group, consumer, [entry.id for entry in entries])

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        for start in range(0, len(message_ids), PER_SCRIPT):
            part = message_ids[start : start + PER_SCRIPT]
            args = (group, consumer, *span(part), losses(stream, group), *part)
            await self._client.run(fence.RELEASE, stream, group, (stream, waiting(stream, group)), args)


class _ScriptForgottenError(Exception):
    """The server does not know the script any more; nothing was done."""
