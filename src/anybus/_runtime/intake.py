"""The intake: reads what is new, reclaims what is idle, takes what is due for a retry."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timezone

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from .._failure.copies import failed_attempts, undecodable
from .._failure.settlement import SUSPECT_AFTER, Outcome, Result, Verdict, on_taken
from .._ground.cancellation import persist
from .._ground.errors import BackendError, SerializationError
from ..abc import ClaimedMessage, FetchedEntry, MalformedEntry, MissingEntry, PassSource
from ..abc._observer import ErrorScope
from .context import Context
from .entry import Held, Stage
from .fate import tell_let_go, tell_suspect
from .ledger import Taking
from .postponed import Postponed
from .recovery import Recovery
from .settler import Settler

SUSPECT, PAUSED, CIRCUIT, ENDING = "suspect", "paused", "circuit", "ending"

_WORN_OUT = Result(Outcome.WORN_OUT)
_MISSING = Result(Outcome.MISSING)
_NOTHING: set[str] = set()


class Intake:
    """The read task and the reclaim task, and the gate that both respect.

    :param ready: what may start goes in here, in batches; closed at the end.
    :param unread: the other end of it, from which is taken back what has been released.
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
        self._postponed = postponed
        self._ready = ready
        self._unread = unread
        self._ledger = context.ledger
        self._clock = context.clock
        self._budget = context.ledger.budget
        self._can_release = "release" in context.backend.features
        self._ages = context.failure_policy.max_age is not None
        self._shut_by: set[str] = set()
        self._opened = anyio.Event()
        self._reading: anyio.CancelScope | None = None
        self._step = 0
        self._suspects_released = 0
        self._no_suspect_before = -math.inf
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()

    def shut(self, reason: str) -> None:
        """Take nothing more; what waits is released, and so is what a call under way still brings."""
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
        """All that lies in it has been released, and would leave no room for more if this came again and again."""
        if self._unread.statistics().current_buffer_used:
            with contextlib.suppress(anyio.WouldBlock):
                while True:
                    self._unread.receive_nowait()
            self._ready.send_nowait([])  # one of them may have called a worker

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
                    if "delay" not in self._context.backend.features:
                        tasks.start_soon(persist, self._keep_bringing_back)
        finally:
            self.ended.set()

    @property
    def _block(self) -> float:
        """For how long a read waits, by the lease of that moment: another member may change it."""
        # A blocking read may have been handed its entries at any moment since it was sent, and there their lease
        # begins: two thirds of it are left at worst, and the next renewal is at most one third away.
        return min(self._context.options.block_timeout, self._context.lease / 3)

    async def _until_open(self) -> None:
        while self._shut_by:
            await self._opened.wait()

    async def _keep_reading(self) -> None:
        look, wait = Recovery(self._context, "read"), Recovery(self._context, "read")
        while True:
            await self._until_open()
            await self._ledger.wait_for_read_room()
            # A read that blocks reserves what it asks for, all the while: that is one place and no more, so that
            # reclaim can use the rest. (A blocked reader is woken by the first entry anyway.)
            if not await look.attempt(self._read, 0.0) and not look.failed:
                await wait.attempt(self._read, self._block, 1)

    async def _keep_reclaiming(self) -> None:
        recovery = Recovery(self._context, "reclaim")
        releases = self._releases()
        while True:
            await self._until_open()
            full = await recovery.attempt(self._pass)
            before, releases = releases, self._releases()
            if full and before == releases:
                await self._ledger.wait_for_reclaim_room()
            else:
                # What a handler has just released would be taken again at once, and again: no spinning.
                await anyio.sleep(self._context.options.reclaim_interval)

    async def _take_turns(self) -> None:
        """Nothing lies beyond ``max_in_flight``: a pass after each read, which blocks no longer than that may wait."""
        read, reclaim = Recovery(self._context, "read"), Recovery(self._context, "reclaim")
        releases = self._releases()
        left_behind = False
        while True:
            await self._until_open()
            await self._ledger.wait_for_read_room()
            pause = 0.0 if left_behind else min(self._block, self._context.options.reclaim_interval)
            await read.attempt(self._read, pause)
            await self._until_open()
            await self._ledger.wait_for_reclaim_room()
            full = await reclaim.attempt(self._pass)
            before, releases = releases, self._releases()
            left_behind = full and before == releases

    def _releases(self) -> int:
        return self._settler.given_back + self._suspects_released

    def _taking(self, room: int, *, by_reclaim: bool) -> Taking:
        """Every call that takes entries is made in here, and what it brought is accepted by what this notes."""
        return Taking(self._ledger, self._clock(), room, by_reclaim)

    async def _read(self, block: float, at_most: float = math.inf) -> bool:
        """Read once; whether anything came."""
        context = self._context
        room = int(min(self._budget.read_room(), self._budget.read_at_once, at_most))
        if room <= 0 or self._shut_by:
            return False
        entries: list[FetchedEntry] = []
        with self._taking(room, by_reclaim=False) as taking:
            try:
                with anyio.CancelScope() as self._reading:
                    entries = await context.backend.read_new(
                        context.topic, context.group, context.consumer, count=room, timeout=block
                    )
            finally:
                self._reading = None
        # Searched: after a broken connection a read looks for what it was given unseen, and may find what is held.
        await self._accept(taking, context.topic, entries, by_reclaim=False, searched=True)
        return bool(entries)

    async def _pass(self) -> bool:
        """Look once at what is idle and what is due. True: some of it was left for want of room."""
        backend = self._context.backend
        if isinstance(backend, PassSource):
            return await self._pass_at_once(backend)
        full = False
        steps = (self._reclaim_topic, self._read_retries, self._reclaim_retries)
        self._step += 1
        for offset in range(len(steps)):
            if self._shut_by:
                break
            room = self._budget.reclaim_room()
            if room <= 0:
                return True
            # The steps take turns at going first: with room for one only, none of them starves.
            full = await self._take(steps[(self._step + offset) % len(steps)], room) or full
        return full

    async def _pass_at_once(self, source: PassSource) -> bool:
        context = self._context
        room = min(self._budget.reclaim_room(), context.options.claim_scan_batch_size)
        if room <= 0 or self._shut_by:
            return room <= 0
        topic, retries = context.streams
        with self._taking(room, by_reclaim=True) as taking:
            taken = await source.redeliver(
                topic, retries, context.group, context.consumer, min_idle=context.min_idle, count=room
            )
        context.counters.reclaimed += len(taken.reclaimed) + len(taken.reclaimed_retries)
        brought = ((topic, taken.reclaimed), (retries, taken.retries), (retries, taken.reclaimed_retries))
        entered = [
            self._enter(taking, stream, entries, by_reclaim=True, searched=taken.searched)
            for stream, entries in brought
        ]
        for batch, suspect in entered:
            await self._pass_on(batch, suspect)
        if taken.lost is not None:
            raise taken.lost
        return taken.more or len(taken.reclaimed) + len(taken.retries) + len(taken.reclaimed_retries) >= room

    async def _take(self, fetch: Callable[[int], Awaitable[tuple[str, list[FetchedEntry]]]], room: int) -> bool:
        room = min(room, self._context.options.claim_scan_batch_size)
        with self._taking(room, by_reclaim=True) as taking:
            stream, entries = await fetch(room)
        await self._accept(taking, stream, entries, by_reclaim=True)
        return len(entries) >= room

    async def _reclaim_topic(self, room: int) -> tuple[str, list[FetchedEntry]]:
        return self._context.topic, await self._reclaim(self._context.topic, room)

    async def _reclaim_retries(self, room: int) -> tuple[str, list[FetchedEntry]]:
        return self._context.retry_stream, await self._reclaim(self._context.retry_stream, room)

    async def _reclaim(self, stream: str, room: int) -> list[FetchedEntry]:
        context = self._context
        entries = await context.backend.reclaim_idle(
            stream, context.group, context.consumer, min_idle=context.min_idle, count=room
        )
        context.counters.reclaimed += len(entries)
        return entries

    async def _read_retries(self, room: int) -> tuple[str, list[FetchedEntry]]:
        context = self._context
        stream = context.retry_stream
        return stream, await context.backend.read_new(stream, context.group, context.consumer, count=room, timeout=0)

    async def _accept(
        self,
        taking: Taking,
        stream: str,
        entries: Sequence[FetchedEntry],
        *,
        by_reclaim: bool,
        searched: bool = False,
    ) -> None:
        batch, suspect = self._enter(taking, stream, entries, by_reclaim=by_reclaim, searched=searched)
        await self._pass_on(batch, suspect)

    async def _pass_on(self, batch: list[Held], suspect: Held | None = None) -> None:
        if batch and not self._shut_by:  # else it has been released by now
            self._ledger.some_wait()
            await self._send(batch)
        if suspect is not None:
            await self._handle_alone(suspect)

    async def _send(self, batch: list[Held]) -> None:
        """To the handlers. The channel is full only while entries lie in it that were released meanwhile."""
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

    def _enter(
        self, taking: Taking, stream: str, entries: Sequence[FetchedEntry], *, by_reclaim: bool, searched: bool
    ) -> tuple[list[Held], Held | None]:
        """Enter what was taken into the ledger.

        :param searched: what is held here already may be among it.
        :returns: what may start; and a suspect that has the bus's one place, not yet started.
        """
        context = self._context
        ledger = self._ledger
        if ledger.vanished and ledger.was_recreated(stream, entries, context.clock()):
            ledger.group_was_lost(stream)
        settled = taking.settled.get(stream)
        if settled:  # by what the server said later: this reply is older (or of a recreated group: then acked anew)
            entries = [entry for entry in entries if entry.id not in settled or ledger.was_handled(stream, entry.id)]
        if not entries:
            return [], None
        table = ledger.tables[stream]
        received_at = datetime.now(timezone.utc)
        lease_until = taking.began + context.lease
        is_retry = stream != context.topic
        suspect: Held | None = None
        taken: list[Held] = []
        batch: list[Held] = []
        refused: list[tuple[Held, MalformedEntry | MissingEntry]] = []
        doubtful = taking.doubtful.get(stream, _NOTHING) if self._can_release else _NOTHING
        quick = not doubtful and self._is_unremarkable(stream)
        quickly = 0
        for entry in entries:
            known = table.get(entry.id)
            if (
                quick
                and known is None
                and isinstance(entry, ClaimedMessage)
                and (entry.deliveries is None or entry.deliveries <= SUSPECT_AFTER)
            ):
                # The same as below for what is nearly every message: first handling, nothing speaks against it.
                table[entry.id] = held = Held(
                    stream,
                    entry.id,
                    entry.message,
                    1,
                    entry.deliveries,
                    entry.published_at,
                    received_at,
                    lease_until,
                    by_reclaim,
                )
                batch.append(held)
                taken.append(held)
                quickly += 1
                continue
            if known is not None:
                if known.stage is Stage.RETURNED:
                    if searched and context.clock() < known.lease_until:
                        continue  # not handed over again: it may still be settled
                else:
                    # Held already, and the server has just said that it is ours: its handling goes on.
                    known.lease_until = max(known.lease_until, lease_until)
                    known.lost = known.lost and context.clock() >= lease_until
                    known.retaken = known.stage is Stage.SETTLING
                    continue
                known.lost = True
                tell_let_go(context, known)
                ledger.remove(known)
            message = (
                entry.message if isinstance(entry, ClaimedMessage) else undecodable(context.topic, {}, keep_bytes=False)
            )
            deliveries = None if isinstance(entry, MissingEntry) else entry.deliveries
            published_at = entry.published_at if isinstance(entry, ClaimedMessage) else None
            attempt = 1 + failed_attempts(message.headers) if is_retry else ledger.recall_attempt(stream, entry.id)
            held = Held(
                stream,
                entry.id,
                message,
                attempt,
                deliveries,
                published_at,
                received_at,
                # What is in doubt does not start: it is handed back, which asks the server whether it is ours.
                lease_until if entry.id not in doubtful else context.clock(),
                by_reclaim,
            )
            ledger.add(held)
            taken.append(held)
            settled_by = ledger.recall_handled(stream, entry.id)
            if settled_by is not None:
                self._settler.ack(held, settled_by)
            elif isinstance(entry, ClaimedMessage):
                if self._admit(held):
                    suspect = held
                elif held.stage is Stage.WAITING:
                    batch.append(held)
            else:
                refused.append((held, entry))
                self._refuse(held, entry)
            quick = not doubtful and self._is_unremarkable(stream)
        context.counters.received += len(taken)
        self._budget.use(quickly, by_reclaim=by_reclaim)
        self._tell(taken, refused)
        return batch, suspect

    def _is_unremarkable(self, stream: str) -> bool:
        """Whether nothing is known that could make an entry other than a first handling."""
        is_retry = stream != self._context.topic
        return not (is_retry or self._ages or self._shut_by or self._ledger.remembers(stream))

    def _tell(self, taken: Sequence[Held], refused: Sequence[tuple[Held, MalformedEntry | MissingEntry]]) -> None:
        """Hooks come last: one that pauses or closes the subscription finds everything in its place."""
        reporter = self._context.reporter
        if reporter.hears_received:
            for held in taken:
                try:
                    reporter.tell("on_received", "received", message_id=held.id, attempt=held.attempt)
                except BaseException as raised:
                    self._settler.crashed(held, raised)
                    raise
        for held, entry in refused:
            scope: ErrorScope = "reclaim" if held.by_reclaim else "read"
            if isinstance(entry, MissingEntry):
                text = "the entry is pending, but its body is gone: somebody has trimmed it"
                error: Exception = BackendError(text, can_pass=False)
                reporter.error(scope, error, detail="acknowledged unhandled", message_id=held.id)
            else:
                error = SerializationError(entry.error)
                reporter.error(scope, error, detail="a malformed entry becomes a dead letter", message_id=held.id)

    async def _keep_bringing_back(self) -> None:
        """What waits in this process for its retry, until it is due."""
        context = self._context
        while True:
            held = await self._postponed.next_due()
            if held.stage is not Stage.PARKED:
                continue
            held.stage = Stage.WAITING
            if "renew" not in context.backend.features:
                # No clock of ours knows whose it is: it is tried, and the settlement asks the server.
                held.lease_until = context.clock() + context.lease
            if self._shut_by:
                self._settler.release(held)
            elif not (self._ages and self._settler.expire(held)):
                await self._pass_on([held])

    def _admit(self, held: Held) -> bool:
        """Whether an entry is the bus's suspect now. If it still waits after this, nothing speaks against a start."""
        context = self._context
        verdict = on_taken(held.deliveries, context.policy)
        if verdict is Verdict.GIVE_UP:
            self._settler.apply(held, _WORN_OUT)
        elif self._shut_by:
            self._settler.release(held)
        elif (self._ages and self._settler.expire(held)) or verdict is Verdict.HANDLE:
            return False
        elif context.clock() >= self._no_suspect_before and context.suspects.take(held):
            held.stage = Stage.PARKED
            held.gone = anyio.Event()
            tell_suspect(context, held)
            self.shut(SUSPECT)
            return True
        else:
            self._suspects_released += 1
            self._settler.release(held)
        return False

    def _refuse(self, held: Held, entry: MalformedEntry | MissingEntry) -> None:
        if isinstance(entry, MissingEntry):
            self._settler.apply(held, _MISSING)
            return
        if "raw" not in self._context.backend.features:
            held.message = undecodable(self._context.topic, entry.raw, keep_bytes=True)
        self._settler.apply(held, Result(Outcome.MALFORMED, entry.error), raw=entry.raw)

    async def _handle_alone(self, suspect: Held) -> None:
        """A message that may have killed three processes is handled while this subscription holds nothing else."""
        context = self._context
        try:
            assert suspect.gone is not None
            with anyio.move_on_after(context.lease):
                while len(self._ledger) > 1 and suspect.stage is Stage.PARKED:
                    await self._ledger.wait_for_change()
            if suspect.stage is Stage.PARKED:
                if len(self._ledger) > 1:
                    self._no_suspect_before = context.clock() + context.lease
                    self._suspects_released += 1
                    self._settler.release(suspect)
                else:
                    suspect.stage = Stage.WAITING
                    await self._send([suspect])
            await suspect.gone.wait()
        finally:
            self.open(SUSPECT)


def _stays_parked(held: Held, reason: str) -> bool:
    if held.gone is not None:
        return reason == SUSPECT
    # A retry that waits here would lose its backoff by a pause: when it is due is early enough.
    return reason in (PAUSED, CIRCUIT)
