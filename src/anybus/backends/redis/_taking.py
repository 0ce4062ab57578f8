"""Taking entries: blocking reads, reclaims, whole passes. If one is cancelled, it releases the entries that it took."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import anyio
from anyio.abc import TaskGroup

from ..._ground.errors import BackendError, GroupLostError
from ...abc import FetchedEntry, Redelivered
from . import _taking_scripts as taking
from ._client import Client, evalsha
from ._decoding import EntryDecoder
from ._errors import UNEXPECTED, has_code, leads_elsewhere, translate, unexpected_reply
from ._keys import delayed, losses, waiting
from ._protocol import Command, ServerError
from ._reader import BlockingReader
from ._taking_calls import Taken, TakingCalls
from ._upkeep import Upkeep
from ._watch import Watch

_SHORT_BLOCK = 0.4
_STALE = 0.1
_PASSES = 1.0
"""Passes at shorter intervals than this append the entries that are due, also while a read waits."""

_CLOCK_MARGIN = 1.0

Member = tuple[str, str, str]


class Taking:
    """The part of the backend that takes entries. For each consumer it keeps a connection and cursors.

    :param together: streams with the same result may be named in one command.
    """

    def __init__(
        self, client: Client, decoder: EntryDecoder, together: Callable[[str], Hashable] = lambda stream: None
    ) -> None:
        self._client = client
        self._decoder = decoder
        self._readers: dict[Member, BlockingReader] = {}
        self._cursors: dict[Member, str] = {}
        self._upkeep = Upkeep(client)
        self._passes = 0
        self._calls = TakingCalls(client)
        self._lost_passes: dict[Member, tuple[float, str]] = {}
        """When a pass was sent whose reply was lost, and up to which id the entries that it took were searched."""
        self._looked: dict[str, tuple[float, float]] = {}
        """When a read without waiting last found the stream empty, and when its next delayed entry is due."""
        self._passed: dict[Member, tuple[float, float]] = {}
        """When the last pass over a topic was made, and how long after the one before."""
        self.watch = Watch(client, self._upkeep, together)
        self.release = self._calls.release

    def start(self, tasks: TaskGroup, alarm: Callable[[BaseException], None]) -> None:
        """
        :param tasks: what outlives a call runs in this task group.
        :param alarm: called with an error that must end the bus.
        """
        self._calls.start(tasks)
        self.watch.start(tasks, alarm)

    async def aclose(self) -> None:
        self.watch.close()
        for reader in list(self._readers.values()):
            await reader.aclose()
        await self._calls.aclose()

    async def forget(self, stream: str, group: str, consumer: str) -> None:
        member = (stream, group, consumer)
        self._cursors.pop(member, None)
        self._lost_passes.pop(member, None)
        self._passed.pop(member, None)
        self._upkeep.forget(stream, group)
        self.watch.forget(member)
        reader = self._readers.pop(member, None)
        if reader is not None:
            await reader.aclose()

    async def read_new(
        self, stream: str, group: str, consumer: str, count: int, timeout: float, longest_block: float = math.inf
    ) -> list[FetchedEntry]:
        count = self._calls.appetite.of(count)
        read: Command = ("XREADGROUP", "GROUP", group, consumer, "COUNT", count, "STREAMS", stream, ">")
        move: Command = evalsha(taking.MOVE_DUE, (stream, delayed(stream)), ())
        member = (stream, group, consumer)
        reader = self._readers.setdefault(member, BlockingReader(self._client.settings, self._unblock))
        while reader.lost_track:
            unseen = await self._find_unseen(reader, stream, group, consumer, count)
            if unseen:
                return unseen
        if timeout <= 0:
            return await self._look(reader, stream, group, consumer, move, read)
        now = anyio.current_time()
        deadline = now + timeout
        while True:
            looked_at, next_due = self._looked.pop(stream, (-math.inf, math.inf))
            if now - looked_at > _STALE and not self._is_passed_often(member, now):
                entries = await self._look(reader, stream, group, consumer, move, read)
                now = anyio.current_time()
                if entries or now >= deadline:
                    return entries
                _, next_due = self._looked.pop(stream, (now, math.inf))
            block = max(0.001, min(deadline, next_due) - now)
            block = min(block, longest_block, self._longest_block)
            blocking: Command = (*read[:6], "BLOCK", max(1, int(block * 1000)), *read[6:])
            [reply] = await self._request(reader, [blocking], stream, group, consumer, block)
            entries = await self._read(reader, reply, stream, group)
            now = anyio.current_time()
            if entries or now >= deadline:
                return entries

    def _is_passed_often(self, member: Member, now: float) -> bool:
        if self.watch.covers(member, _PASSES):
            return True
        last, interval = self._passed.get(member, (-math.inf, math.inf))
        return max(now - last, interval) <= _PASSES

    async def _look(
        self, reader: BlockingReader, stream: str, group: str, consumer: str, move: Command, read: Command
    ) -> list[FetchedEntry]:
        """Append the entries that are due, then read without waiting: two commands in one write."""
        moved: list[Any] = []

        def parse(replies: list[Any]) -> Taken:
            moved.append(replies[0])
            return {stream: self._decoder.read(replies[-1])}

        try:
            entries = (await self._calls.take([move, read], group, consumer, parse, lost=reader.lose_track))[stream]
        except GroupLostError:
            reader.last_id = "0-0"  # the recreated group may deliver lower ids
            raise
        if entries:
            reader.last_id = entries[-1].id
        else:
            next_due = await self._next_due(moved[0], stream)
            now = anyio.current_time()
            self._looked[stream] = (now, now + next_due)
        return entries

    @property
    def _longest_block(self) -> float:
        return float("inf") if self._client.server.can_unblock else _SHORT_BLOCK

    async def _unblock(self, client_id: int) -> bool:
        if not (client_id and self._client.server.can_unblock):
            return True  # the blocking read is short, and ends by itself
        return bool(await self._client.call("CLIENT", "UNBLOCK", client_id))

    async def _request(
        self, reader: BlockingReader, commands: list[Command], stream: str, group: str, consumer: str, wait: float
    ) -> list[Any]:
        def parse(replies: list[Any]) -> Taken:
            return {stream: self._decoder.read(replies[-1])}

        async def hand_back(replies: list[Any]) -> None:
            if len(replies) == len(commands):
                await self._calls.hand_back_reply(replies, parse, group, consumer)

        try:
            return await reader.request(commands, wait=wait, hand_back=hand_back)
        except BackendError as error:
            if error.may_have_happened:
                self._calls.appetite.broke(object())
            raise

    async def _read(self, reader: BlockingReader, reply: Any, stream: str, group: str) -> list[FetchedEntry]:
        if isinstance(reply, ServerError):
            if leads_elsewhere(reply):
                # It was this connection's server. The shared connection may already be on the right one.
                await reader.aclose()  # noqa: ASYNC120 - shielded inside
                raise translate(reply)
            error = await self._client.refused_in(stream, group, reply)
            if isinstance(error, GroupLostError):
                reader.last_id = "0-0"  # the recreated group may deliver lower ids
            raise error
        try:
            entries = self._decoder.read(reply)
        except UNEXPECTED as error:
            await reader.abandon()  # noqa: ASYNC120 - shielded inside
            raise unexpected_reply(self._client.settings.place, reply) from error
        if entries:
            reader.last_id = entries[-1].id
            self._calls.appetite.came(entries)
        return entries

    async def _next_due(self, moved: Any, stream: str) -> float:
        """Seconds until the next delayed entry of the stream is due."""
        if isinstance(moved, ServerError) and has_code(moved, "NOSCRIPT"):
            moved = await self._client.run(taking.MOVE_DUE, stream, "", (stream, delayed(stream)), ())
        return moved / 1000 if isinstance(moved, int) and moved >= 0 else float("inf")

    async def _find_unseen(
        self, reader: BlockingReader, stream: str, group: str, consumer: str, count: int
    ) -> list[FetchedEntry]:
        """The entries that a read delivered to this consumer, but whose reply was lost: all above the last id seen.

        They may include entries that the consumer claimed from others. The bus knows that it holds those.
        """
        last = ""

        def parse(replies: list[Any]) -> Taken:
            nonlocal last
            last = replies[-1][0].decode()
            return {stream: self._decoder.reclaimed(replies[-1][1])}

        args = (group, consumer, reader.last_id, count)
        entries = (await self._calls.by_script(taking.UNSEEN, (stream,), args, group, consumer, parse))[stream]
        if last:
            reader.last_id = last
        else:
            reader.lost_track = False
        return entries

    async def _find_lost(self, member: Member, count: int) -> list[FetchedEntry]:
        """The entries that a pass took, but whose reply was lost: those that this consumer got since the pass was sent.

        They may include entries that were renewed since then. The bus knows that it holds those.
        """
        stream, group, consumer = member
        while member in self._lost_passes:
            since, last = self._lost_passes[member]
            looked_up_to = ""

            def parse(replies: list[Any]) -> Taken:
                nonlocal looked_up_to
                looked_up_to = replies[-1][0].decode()
                return {stream: self._decoder.reclaimed(replies[-1][1])}

            longest = int((anyio.current_time() - since + _CLOCK_MARGIN) * 1000)
            args = (group, consumer, last, count, longest)
            taken = await self._calls.by_script(taking.UNSEEN, (stream,), args, group, consumer, parse)
            if looked_up_to:
                self._lost_passes[member] = since, looked_up_to
            else:
                self._lost_passes.pop(member, None)
            if taken[stream]:
                return taken[stream]
        return []

    async def reclaim(self, stream: str, group: str, consumer: str, min_idle: float, count: int) -> list[FetchedEntry]:
        member, count = (stream, group, consumer), self._calls.appetite.of(count)
        if found := await self._find_lost(member, count):
            return found
        keys, cursor = (stream,), self._cursors.get(member, "0-0")
        args = (group, consumer, int(min_idle * 1000), count, cursor, losses(stream, group), waiting(stream, group))

        def parse(replies: list[Any]) -> Taken:
            return {stream: self._reclaimed(member, replies[-1])}

        lost = self._when_lost(member)
        return (await self._calls.by_script(taking.RECLAIM, keys, args, group, consumer, parse, lost))[stream]

    def _when_lost(self, *members: Member) -> Callable[[], None]:
        """A function to call if the reply to a command that is sent now is lost."""
        now = anyio.current_time()

        def lost() -> None:
            for member in members:
                self._lost_passes.setdefault(member, (now, "0-0"))

        return lost

    def _reclaimed(self, member: Member, reply: Any) -> list[FetchedEntry]:
        self._cursors[member] = reply[0].decode()
        return self._decoder.reclaimed(reply[1])

    async def redeliver(
        self, stream: str, retry_stream: str, group: str, consumer: str, min_idle: float, count: int
    ) -> Redelivered:
        self._passes += 1
        room, count = count, self._calls.appetite.of(count)
        topic, retries = (stream, group, consumer), (retry_stream, group, consumer)
        if self._lost_passes:
            if found := await self._find_lost(topic, count):
                return Redelivered(found, [], [], searched=True, more=True)
            if found := await self._find_lost(retries, count):
                return Redelivered([], [], found, searched=True, more=True)
        keys = (stream, delayed(stream), retry_stream, delayed(retry_stream))
        cursors = (self._cursors.get(topic, "0-0"), self._cursors.get(retries, "0-0"))
        marks = (losses(stream, group), waiting(stream, group))
        args = (group, consumer, int(min_idle * 1000), count, *cursors, self._passes % 3, *marks)
        refusals: list[tuple[str, ServerError]] = []
        new_retries: list[FetchedEntry] = []
        reclaimed_retries: list[FetchedEntry] = []
        more = False

        def failed(where: str, part: Any) -> bool:
            if part and part[0] == b"error":
                refusals.append((where, ServerError(part[1].decode(errors="replace"))))
                return True
            return not part

        def parse(replies: list[Any]) -> Taken:
            nonlocal more
            first, second, third, left, *unmoved = replies[-1]
            more = bool(left)
            refusals.extend(
                (where, ServerError(text.decode(errors="replace")))
                for where, text in zip((stream, retry_stream), unmoved, strict=True)
                if text is not None
            )
            taken: Taken = {stream: [], retry_stream: []}
            if not failed(stream, first):
                taken[stream] = self._reclaimed(topic, first)
            if not failed(retry_stream, second):
                new_retries.extend(self._decoder.new(second[1]))
            if not failed(retry_stream, third):
                reclaimed_retries.extend(self._reclaimed(retries, third))
            taken[retry_stream] = new_retries + reclaimed_retries
            return taken

        lost = self._when_lost(topic, retries)
        taken = await self._calls.by_script(taking.PASS, keys, args, group, consumer, parse, lost)
        # Also true if fewer entries were requested than there was room for.
        more = more or (count < room and sum(map(len, taken.values())) >= count)
        error = None
        try:
            for where, refusal in refusals[:1]:
                error = await self._client.refused_in(where, group, refusal)
            if error is None:
                now = anyio.current_time()
                self._passed[topic] = now, now - self._passed.get(topic, (-math.inf, math.inf))[0]
                await self._client.mux.start(self._upkeep.commands(stream, retry_stream, group, consumer, min_idle))
        except BackendError as failure:
            error = failure  # not raised, so that the entries that were taken are not lost
        except BaseException:
            await self._calls.within_a_second(lambda: self._calls.hand_back(taken, group, consumer))  # noqa: ASYNC102 - shielded
            raise
        return Redelivered(taken[stream], new_retries, reclaimed_retries, error, more=more)
