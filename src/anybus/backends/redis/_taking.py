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
from ._readers import Readers
from ._schedules import Expect
from ._shared_reader import Track, Wait
from ._taking_calls import Taken, TakingCalls
from ._upkeep import Upkeep
from ._watch import Watch

_SHORT_BLOCK = 0.4
_STALE = 0.1
_PASSES = 1.0
"""Passes at shorter intervals than this append the entries that are due, also while a read waits."""

_CLOCK_MARGIN = 1.0

Member = tuple[str, str, str]


class Memory:
    """What is remembered of each member, wherever its stream is.

    :ivar lost_passes: when a pass was sent whose reply was lost, and up to which id the entries that it took were
        searched.
    """

    def __init__(self) -> None:
        self.tracks: dict[Member, Track] = {}
        self.cursors: dict[Member, str] = {}
        self.lost_passes: dict[Member, tuple[float, str]] = {}

    def forget(self, member: Member) -> None:
        self.tracks.pop(member, None)
        self.cursors.pop(member, None)
        self.lost_passes.pop(member, None)


class Taking:
    """The part of the backend that takes entries. For each consumer it keeps a connection and cursors.

    :param expect: called when something will be due.
    :param together: streams with the same result may be named in one command.
    :param memory: what is remembered of the members already.
    """

    def __init__(
        self,
        client: Client,
        decoder: EntryDecoder,
        expect: Expect,
        together: Callable[[str], Hashable] = lambda stream: None,
        memory: Memory | None = None,
    ) -> None:
        self._client = client
        self._decoder = decoder
        self._memory = memory = memory or Memory()
        self._tracks = memory.tracks
        self._cursors = memory.cursors
        self._lost_passes = memory.lost_passes
        self._upkeep = Upkeep(client)
        self._passes = 0
        self._calls = TakingCalls(client)
        self._looked: dict[str, tuple[float, float]] = {}
        """When a read without waiting last found the stream empty, and when its next delayed entry is due."""
        self._passed: dict[Member, tuple[float, float]] = {}
        """When the last pass over a topic was made, and how long after the one before."""
        self.watch = Watch(client, self._upkeep, expect, together)
        self._readers = Readers(
            client.settings,
            unblock=self._unblock,
            # Without CLIENT UNBLOCK, nobody could join those who wait already.
            together=lambda stream: together(stream) if client.server.can_unblock else stream,
            release=self._release_unclaimed,
        )
        self.release = self._calls.release

    def start(self, tasks: TaskGroup, alarm: Callable[[BaseException], None]) -> None:
        """
        :param tasks: what outlives a call runs in this task group.
        :param alarm: called with an error that must end the bus.
        """
        self._calls.start(tasks)
        self._readers.start(tasks)
        self.watch.start(tasks, alarm)

    async def aclose(self) -> None:
        self.watch.close()
        await self._readers.aclose()
        await self._calls.aclose()

    async def forget(self, stream: str, group: str, consumer: str) -> None:
        member = (stream, group, consumer)
        self._memory.forget(member)
        self._passed.pop(member, None)
        self._upkeep.forget(stream, group)
        self.watch.forget(member)
        await self._readers.forget(member)

    async def leave(self, member: Member) -> None:
        """The member reads on another server from now on."""
        stream, group, _ = member
        self._passed.pop(member, None)
        self._upkeep.forget(stream, group)
        self.watch.dismiss(lambda other: other == member)
        await self._readers.forget(member)

    async def read_new(
        self, stream: str, group: str, consumer: str, count: int, timeout: float, longest_block: float = math.inf
    ) -> list[FetchedEntry]:
        count = self._calls.appetite.of(count)
        member = (stream, group, consumer)
        track = self._tracks.get(member)
        if track is None:
            track = self._tracks[member] = Track()
        now = anyio.current_time()
        deadline = now + timeout
        while True:
            while track.lost:
                if unseen := await self._find_unseen(track, member, count):
                    return unseen
            if timeout <= 0:
                return await self._look(track, member, count)
            looked_at, next_due = self._looked.pop(stream, (-math.inf, math.inf))
            if now - looked_at > _STALE and not self._is_passed_often(member, now):
                entries = await self._look(track, member, count)
                now = anyio.current_time()
                if entries or now >= deadline:
                    return entries
                _, next_due = self._looked.pop(stream, (now, math.inf))
            wait = Wait(stream, count, min(deadline, next_due), track)
            entries = await self._wait(wait, member, min(longest_block, self._longest_block))
            now = anyio.current_time()
            if entries or now >= deadline:
                return entries

    def _is_passed_often(self, member: Member, now: float) -> bool:
        if self.watch.covers(member, _PASSES):
            return True
        last, interval = self._passed.get(member, (-math.inf, math.inf))
        return max(now - last, interval) <= _PASSES

    async def _look(self, track: Track, member: Member, count: int) -> list[FetchedEntry]:
        """Append the entries that are due, then read without waiting: two commands in one write."""
        stream, group, consumer = member
        move = evalsha(taking.MOVE_DUE, (stream, delayed(stream)), ())
        read: Command = ("XREADGROUP", "GROUP", group, consumer, "COUNT", count, "STREAMS", stream, ">")
        moved: list[Any] = []

        def parse(replies: list[Any]) -> Taken:
            moved.append(replies[0])
            return {stream: self._decoder.read(replies[-1])}

        try:
            entries = (await self._calls.take([move, read], group, consumer, parse, lost=track.lose))[stream]
        except GroupLostError:
            track.last_id = "0-0"  # the recreated group may deliver lower ids
            raise
        if entries:
            track.came(entries[-1].id)
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

    async def _wait(self, wait: Wait, member: Member, longest_block: float) -> list[FetchedEntry]:
        stream, group, consumer = member
        try:
            reader = await self._readers.wait(member, wait, longest_block)
        except BackendError as error:
            if error.may_have_happened:
                self._calls.appetite.broke(wait.request)
            raise
        except BaseException:
            if wait.reply is not None:
                await self._hand_back_reply(stream, group, consumer, wait.reply)  # noqa: ASYNC102 - shielded inside
            raise
        reply, track = wait.reply, wait.track
        if isinstance(reply, ServerError):
            if leads_elsewhere(reply):
                raise translate(reply)
            if not wait.alone:
                # Perhaps it concerns another stream.
                entries = await self._look(track, member, wait.count)
                if not entries and track.is_refused_too_often():
                    text = f"several streams cannot be read together: {reply}"
                    raise BackendError(text, may_have_happened=False, can_pass=True)
                return entries
            refused = await self._client.refused_in(stream, group, reply)
            if isinstance(refused, GroupLostError):
                track.last_id = "0-0"  # the recreated group may deliver lower ids
            raise refused
        try:
            entries = self._decoder.read(reply)
        except UNEXPECTED as error:
            await reader.abandon()  # noqa: ASYNC120 - shielded inside
            track.lose()
            raise unexpected_reply(self._client.settings.place, reply) from error
        if entries:
            track.came(entries[-1].id)
            self._calls.appetite.came(entries)
        return entries

    async def _hand_back_reply(self, stream: str, group: str, consumer: str, reply: Any) -> None:
        def parse(replies: list[Any]) -> Taken:
            return {stream: self._decoder.read(replies[-1])}

        await self._calls.within_a_second(lambda: self._calls.hand_back_reply([reply], parse, group, consumer))

    def _release_unclaimed(self, group: str, consumer: str, reply: Any) -> None:
        """Release what came for a member that was cancelled, and could not wait until it came."""
        stream = reply[0][0].decode()
        self._calls.start_soon(lambda: self._hand_back_reply(stream, group, consumer, reply))

    async def _next_due(self, moved: Any, stream: str) -> float:
        """Seconds until the next delayed entry of the stream is due."""
        if isinstance(moved, ServerError) and has_code(moved, "NOSCRIPT"):
            moved = await self._client.run(taking.MOVE_DUE, stream, "", (stream, delayed(stream)), ())
        return moved / 1000 if isinstance(moved, int) and moved >= 0 else float("inf")

    async def _find_unseen(self, track: Track, member: Member, count: int) -> list[FetchedEntry]:
        """The entries that a read delivered to this consumer, but whose reply was lost: all above the last id seen.

        They may include entries that the consumer claimed from others. The bus knows that it holds those.
        """
        stream, group, consumer = member
        last = ""

        def parse(replies: list[Any]) -> Taken:
            nonlocal last
            last = replies[-1][0].decode()
            return {stream: self._decoder.reclaimed(replies[-1][1])}

        args = (group, consumer, track.last_id, count)
        entries = (await self._calls.by_script(taking.UNSEEN, (stream,), args, group, consumer, parse))[stream]
        if last:
            track.last_id = last
        else:
            track.lost = False
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
