"""The intake: reads new entries, reclaims idle ones, and takes retries that are due."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Final

import anyio
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from .._ground.cancellation import persist
from ..abc import FetchedEntry, PassSource, SharedWaiting
from .admission import Admission
from .context import Context
from .entry import Held, Stage
from .ledger import Taking
from .postponed import Postponed
from .recovery import Recovery
from .settler import Settler

_LONGEST_READ: Final = 20.0
"""A read that brings nothing ends after at most so many seconds. Only then it is known that reads work (again)."""

SUSPECT, PAUSED, CIRCUIT, ENDING = "suspect", "paused", "circuit", "ending"


class Intake:
    """The read task and the reclaim task, and the gate that stops both.

    :param ready: the channel to the handlers, for batches of entries that may start. It is closed at the end.
    :param unread: the other end of that channel. Released entries are removed from it.
    """

    def __init__(
        self,
        context: Context,
        settler: Settler,
        postponed: Postponed,
        ready: MemoryObjectSendStream[list[Held]],
        unread: MemoryObjectReceiveStream[list[Held]],
    ) -> None:
        self._context = context
        self._settler = settler
        self._admission = Admission(context, settler)
        self._postponed = postponed
        self._ready = ready
        self._unread = unread
        self._ledger = context.ledger
        self._clock = context.clock
        self._budget = context.ledger.budget
        self._shut_by: set[str] = set()
        self._opened = anyio.Event()
        self._reading: anyio.CancelScope | None = None
        self._step = 0
        self._shared = context.backend if isinstance(context.backend, SharedWaiting) else None
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()

    def shut(self, reason: str) -> None:
        """Take nothing more. Waiting entries are released, and so are entries that a call under way still brings."""
        self._shut_by.add(reason)
        for held in self._ledger.all():
            if held.stage is Stage.WAITING or (held.stage is Stage.PARKED and not _stays_parked(held, reason)):
                self._settler.release(held)
        self._ledger.none_wait()
        if self._reading is not None:
            self._reading.cancel()
        if reason == ENDING:
            self._ready.close()
            self._unread.close()
        elif ENDING not in self._shut_by:
            self._empty_channel()

    def _empty_channel(self) -> None:
        """All entries in the channel have been released. If they stayed, repeated pauses would fill the channel."""
        if self._unread.statistics().current_buffer_used:
            with contextlib.suppress(anyio.WouldBlock):
                while True:
                    self._unread.receive_nowait()
            self._ready.send_nowait([])  # one of the batches may have been meant to wake a worker

    def open(self, reason: str) -> None:
        self._shut_by.discard(reason)
        if not self._shut_by:
            self._opened.set()
            self._opened = anyio.Event()

    async def run(self) -> None:
        try:
            with self.scope:
                async with anyio.create_task_group() as tasks:
                    if self._budget.takes_turns:
                        tasks.start_soon(persist, self._take_turns)
                    else:
                        tasks.start_soon(persist, self._keep_reading)
                        tasks.start_soon(persist, self._keep_reclaiming)
        finally:
            self.ended.set()

    @property
    def _block(self) -> float:
        """For how many seconds a read may wait. It depends on the lease, which another member may change."""
        # The lease of an entry counts from when its read was sent, since the server may have delivered it then. So at
        # least two thirds of the lease are left, and the next renewal is at most one third away.
        return min(self._context.options.block_timeout, self._context.lease / 3)

    async def _until_open(self) -> None:
        while self._shut_by:
            await self._opened.wait()

    async def _keep_reading(self) -> None:
        look, wait = Recovery(self._context, "read"), Recovery(self._context, "read")
        nothing_there = False
        while True:
            await self._until_open()
            await self._ledger.wait_for_read_room()
            if not nothing_there:
                nothing_there = not await look.attempt(self._read, 0.0) and not look.failed
            if nothing_there:
                # A blocking read reserves only one place, so that reclaims can use the rest. (Its first entry ends it.)
                came = await wait.attempt(self._read_when_new)
                nothing_there = not came and not wait.failed
                if came:
                    await checkpoint()  # its handler begins before the next read is prepared (on trio: perhaps)

    async def _keep_reclaiming(self) -> None:
        recovery = Recovery(self._context, "reclaim")
        releases = self._settler.given_back
        while True:
            await self._until_open()
            full = await recovery.attempt(self._pass)
            before, releases = releases, self._settler.given_back
            if full and before == releases:
                await self._ledger.wait_for_reclaim_room()
            else:
                # No spinning: an entry that a handler has just released would be taken again at once, over and over.
                await self._until_next_pass(quiet=not full and not recovery.failed)

    async def _until_next_pass(self, *, quiet: bool) -> None:
        context = self._context
        interval = context.options.reclaim_interval
        with context.retry_times.nap(interval):
            if self._shared is None or not quiet:
                await anyio.sleep(interval)
            else:
                await self._shared.until_pass_is_due(
                    *context.streams, context.group, context.consumer, min_idle=context.min_idle, interval=interval
                )

    async def _take_turns(self) -> None:
        """See ``Budget.takes_turns``: a reclaim pass after each read, which blocks for at most ``reclaim_interval``."""
        read, reclaim = Recovery(self._context, "read"), Recovery(self._context, "reclaim")
        releases = self._settler.given_back
        left_behind = False
        while True:
            await self._until_open()
            await self._ledger.wait_for_read_room()
            pause = 0.0 if left_behind else min(self._block, self._context.options.reclaim_interval)
            await read.attempt(self._read, pause)
            await self._until_open()
            await self._ledger.wait_for_reclaim_room()
            full = await reclaim.attempt(self._pass)
            before, releases = releases, self._settler.given_back
            left_behind = full and before == releases

    async def _read_when_new(self) -> bool:
        if self._shared is None:
            return await self._read(self._block, 1)
        return await self._read(min(self._context.lease / 3, _LONGEST_READ), 1, repeat=self._shared)

    async def _read(self, timeout: float, at_most: float = math.inf, repeat: SharedWaiting | None = None) -> bool:
        """Read once. True if anything came.

        :param repeat: where to repeat the read for this time.
        """
        context = self._context
        room = int(min(self._budget.read_room(), self._budget.read_at_once, at_most))
        if room <= 0 or self._shut_by:
            return False
        member = (context.topic, context.group, context.consumer)
        entries: list[FetchedEntry] = []
        with Taking(self._ledger, self._clock(), room, by_reclaim=False) as taking:
            try:
                with anyio.CancelScope() as self._reading:
                    if repeat is None:
                        entries = await context.backend.read_new(*member, count=room, timeout=timeout)
                    else:
                        entries = await repeat.read_when_new(*member, count=room, block=self._block, timeout=timeout)
            finally:
                self._reading = None
        # Searched: after a broken connection, a read looks for entries whose reply was lost. It may find held ones.
        await self._accept(taking, (context.topic, entries), by_reclaim=False, searched=True)
        return bool(entries)

    async def _pass(self) -> bool:
        """Take idle entries and due retries once. True: some may be left for lack of room."""
        backend = self._context.backend
        self._context.retry_times.pass_begins()
        if isinstance(backend, PassSource):
            return await self._pass_at_once(backend)
        full = False
        topic, retries = self._context.streams
        steps = ((topic, True), (retries, False), (retries, True))
        self._step += 1
        for offset in range(len(steps)):
            if self._shut_by:
                break
            room = self._budget.reclaim_room()
            if room <= 0:
                return True
            # Each pass begins with another step, so that no step starves if there is room for only one entry.
            stream, idle = steps[(self._step + offset) % len(steps)]
            full = await self._take(stream, room, idle=idle) or full
        return full

    async def _pass_at_once(self, source: PassSource) -> bool:
        context = self._context
        room = min(self._budget.reclaim_room(), context.options.claim_scan_batch_size)
        if room <= 0 or self._shut_by:
            return room <= 0
        topic, retries = context.streams
        with Taking(self._ledger, self._clock(), room, by_reclaim=True) as taking:
            taken = await source.redeliver(
                topic, retries, context.group, context.consumer, min_idle=context.min_idle, count=room
            )
        context.counters.reclaimed += len(taken.reclaimed) + len(taken.reclaimed_retries)
        brought = ((topic, taken.reclaimed), (retries, taken.retries), (retries, taken.reclaimed_retries))
        await self._accept(taking, *brought, by_reclaim=True, searched=taken.searched)
        if taken.lost is not None:
            raise taken.lost
        return taken.more or len(taken.reclaimed) + len(taken.retries) + len(taken.reclaimed_retries) >= room

    async def _take(self, stream: str, room: int, *, idle: bool) -> bool:
        """One step of a pass, on a backend without ``PassSource``: take idle entries, or new ones."""
        context = self._context
        backend, group, consumer = context.backend, context.group, context.consumer
        room = min(room, context.options.claim_scan_batch_size)
        with Taking(self._ledger, self._clock(), room, by_reclaim=True) as taking:
            if idle:
                entries = await backend.reclaim_idle(stream, group, consumer, min_idle=context.min_idle, count=room)
                context.counters.reclaimed += len(entries)
            else:
                entries = await backend.read_new(stream, group, consumer, count=room, timeout=0)
        await self._accept(taking, (stream, entries), by_reclaim=True)
        return len(entries) >= room

    async def _accept(
        self, taking: Taking, *brought: tuple[str, Sequence[FetchedEntry]], by_reclaim: bool, searched: bool = False
    ) -> None:
        """Enter everything that a call brought into the ledger, and only then pass on what may start."""
        batch: list[Held] = []
        alone: Held | None = None
        for stream, entries in brought:
            if not entries:
                continue
            shut = bool(self._shut_by)
            startable, suspect = self._admission.enter(
                taking, stream, entries, by_reclaim=by_reclaim, searched=searched, shut=shut
            )
            batch += startable
            if suspect is not None:
                alone = suspect
                self.shut(SUSPECT)
        if batch and not self._shut_by:  # otherwise it has been released by now
            await self._send(batch)
        if alone is not None:
            await self._handle_alone(alone)

    async def _send(self, batch: list[Held]) -> None:
        """Send a batch to the handlers. The channel is full only while it contains entries that were released."""
        self._ledger.some_wait()
        try:
            try:
                self._ready.send_nowait(batch)
            except anyio.WouldBlock:
                await self._ready.send(batch)
        except BaseException:
            for held in batch:
                if held.stage is Stage.WAITING:
                    self._settler.release(held)
            raise

    async def keep_bringing_back(self) -> None:
        """Start the retries that wait in this process, when they are due. During the end they are released then."""
        context = self._context
        while True:
            held = await self._postponed.next_due()
            if held.stage is not Stage.PARKED:
                continue
            held.stage = Stage.WAITING
            if "renew" not in context.backend.features:
                # Without renewal, our clock cannot tell whose it is. It is handled, and its settlement asks the server.
                held.lease_until = context.clock() + context.lease
            if self._shut_by:
                self._settler.release(held)
            elif not self._settler.expire(held):
                with contextlib.suppress(anyio.ClosedResourceError):  # the end came meanwhile, and has released it
                    await self._send([held])

    async def _handle_alone(self, suspect: Held) -> None:
        """Handle a message that may have killed three processes while this subscription holds nothing else."""
        try:
            # A stray cancellation must not reopen the intake, nor leave the suspect parked.
            await persist(partial(self._see_through, suspect))
        finally:
            self.open(SUSPECT)

    async def _see_through(self, suspect: Held) -> None:
        context = self._context
        assert suspect.gone is not None
        with anyio.move_on_after(context.lease):
            while len(self._ledger) > 1 and suspect.stage is Stage.PARKED:
                await self._ledger.wait_for_change()
        if suspect.stage is Stage.PARKED:
            if len(self._ledger) > 1:
                self._admission.no_suspect_for(context.lease)
                self._settler.give_back(suspect)
            else:
                suspect.stage = Stage.WAITING
                await self._send([suspect])
        await suspect.gone.wait()


def _stays_parked(held: Held, reason: str) -> bool:
    if held.gone is not None:
        return reason == SUSPECT
    # A retry that waits here would lose its backoff. It is released when it is due, if the pause still lasts.
    return reason in (PAUSED, CIRCUIT)
