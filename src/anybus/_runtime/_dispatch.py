"""The dispatch: takes settlements to the server by lanes, and enters its answers into the books."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence

import anyio

from .._cancellation import as_failure
from .._errors import ClosedError, GroupLostError, LeaseLostError, can_pass, may_have_happened, words
from .._settlement import Outcome, Result
from ..abc import Output
from ..abc._observer import ErrorScope
from ._context import Context
from ._lane import Lane
from ._ledger import Held, Stage

_AT_ONCE = 128
"""So many settlements make a part of a batch."""

ACKED, ACKED_WITH, ACCEPTED, RETRIED, DEAD_LETTERED, DROPPED, RELEASED, MISSING = (
    "acked",
    "acked with what it publishes",
    "accepted",
    "retried",
    "dead-lettered",
    "dropped",
    "released",
    "missing",
)
_HANDLED = (ACKED, ACKED_WITH)


class Dispatch:
    """One lane for acknowledgements, one for transfers, one for releases.

    :param on_unsettled: a settlement by hand has failed, and nobody waits for it any more: its handling ended
        with this result.
    """

    def __init__(self, context: Context, on_unsettled: Callable[[Held, Result], None]) -> None:
        self._context = context
        clock = context.clock
        options = context.options
        # A batch that the budget cannot hold would always wait for the interval, and the reads with it.
        threshold = min(options.ack_batch_size, max(1, context.ledger.budget.limit // 2))
        self.acks = Lane(self._flush_acks, clock, threshold=threshold, interval=options.ack_flush_interval)
        self._transfers = Lane(self._flush_transfers, clock)
        self._releases = Lane(self._flush_releases, clock)
        self._on_unsettled = on_unsettled
        self.is_over = False
        self._ending = False
        features = context.backend.features
        self._fence = context.consumer if "fence" in features else None
        self._can_release = "release" in features
        name = type(context.backend).__name__
        if self._fence is None:
            context.notices.once(f"{name} cannot check who owns an entry: a late ack takes it from its new owner")
        if not self._can_release:
            context.notices.once(f"{name} cannot release entries: what is handed back waits for its lease to end")

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return self.acks, self._transfers, self._releases

    async def drain(self) -> None:
        """Settle what is left. From now on what fails by hand is released, since nobody can settle it any more."""
        self._ending = True
        for lane in self.lanes:
            lane.begin_drain()
        for lane in self.lanes:
            await lane.drained()

    def finish(self) -> int:
        """Nothing is sent any more. Whoever waits is told; what is left comes back when its lease is over."""
        self.is_over = True
        left = self._context.ledger.all()
        for held in left:
            self._answer(held, ClosedError("the subscription ended before the server answered"))
            self._context.ledger.remove(held)
        return len(left)

    def ack(self, held: Held, intent: str = ACKED) -> None:
        """Acknowledge, until the server has it or the lease is over."""
        held.stage = Stage.SETTLING
        held.intent = intent
        self.acks.put(held)

    def release(self, held: Held) -> None:
        """Hand back, uncounted."""
        held.stage = Stage.SETTLING
        held.intent = RELEASED
        held.parked = False
        if self._can_release:
            self._releases.put(held)
        else:
            self.done(held)

    def transfer(self, held: Held, intent: str, *outputs: Output) -> None:
        """Append these, and acknowledge, in one step where the backend can."""
        held.stage = Stage.SETTLING
        held.intent = intent
        held.outputs = outputs
        self._transfers.put(held)

    async def _flush_acks(self, batch: list[Held]) -> None:
        async def send(stream: str, entries: list[Held]) -> None:
            context = self._context
            ids = [held.id for held in entries]
            refused = await context.backend.ack_many(stream, context.group, ids, consumer=self._fence)
            if not refused:
                self._all_done(stream, entries)
                return
            not_ours = set(refused)
            for held in entries:
                if held.id in not_ours:
                    self._refused(held)
                else:
                    self.done(held)

        await self._flush(batch, send, self.acks)

    async def _flush_transfers(self, batch: list[Held]) -> None:
        async def send(stream: str, entries: list[Held]) -> None:
            context = self._context
            items = [(held.id, held.outputs) for held in entries]
            results = await context.backend.transfer_many(stream, context.group, context.consumer, items)
            for held, result in zip(entries, results, strict=True):
                if isinstance(result, Exception):
                    self._failed(held, result, self._transfers)
                elif result is None:
                    self._refused(held)
                else:
                    self.done(held)
                    if held.intent == ACKED_WITH and context.reporter.hears_published:
                        self._tell_published(held, result)

        await self._flush(batch, send, self._transfers)

    async def _flush_releases(self, batch: list[Held]) -> None:
        async def send(stream: str, entries: list[Held]) -> None:
            context = self._context
            with contextlib.suppress(GroupLostError):  # then nothing is ours any more: there is nothing to hand back
                await context.backend.release(stream, context.group, context.consumer, [held.id for held in entries])
            for held in entries:
                if held.retaken:
                    # Taken again between the server's release and its reply: it is ours once more.
                    held.retaken = False
                    self._releases.put(held)
                else:
                    self.done(held)

        await self._flush(batch, send, self._releases)

    async def _flush(self, batch: list[Held], send: Callable[[str, list[Held]], Awaitable[None]], lane: Lane) -> None:
        by_stream: defaultdict[str, list[Held]] = defaultdict(list)
        for held in batch:
            by_stream[held.stream].append(held)
        for stream, entries in by_stream.items():
            if len(entries) <= _AT_ONCE:
                await self._try(send, stream, entries, lane)
                continue
            # Side by side: the first answer makes room for a read while the server is busy with the next part.
            async with anyio.create_task_group() as tasks:
                for start in range(0, len(entries), _AT_ONCE):
                    tasks.start_soon(self._try, send, stream, entries[start : start + _AT_ONCE], lane)

    async def _try(
        self, send: Callable[[str, list[Held]], Awaitable[None]], stream: str, entries: list[Held], lane: Lane
    ) -> None:
        try:
            await send(stream, entries)
        except BaseException as error:  # noqa: ASYNC103 - raised again in there
            self._all_failed(entries, as_failure(error), lane)

    def _all_failed(self, entries: Sequence[Held], error: Exception, lane: Lane) -> None:
        self._context.reporter.error("ack-flush", error, detail=f"settling {len(entries)} entries")
        for held in entries:
            if held.stage is Stage.SETTLING:
                self._failed(held, error, lane, reported=True)

    def _all_done(self, stream: str, entries: Sequence[Held]) -> None:
        """``_done`` for each; with what is nearly every message (handled, acked, nobody waits) kept short."""
        context = self._context
        if context.reporter.hears_settled:
            for held in entries:
                self.done(held)
            return
        plain: list[Held] = []
        for held in entries:
            if held.intent is ACKED and held.waiter is None and not (held.failed or held.lost):
                plain.append(held)
            else:
                self.done(held)
        context.counters.handled += len(plain)
        context.ledger.remove_acked(stream, plain)

    def done(self, held: Held) -> None:
        context = self._context
        counters = context.counters
        intent = held.intent
        held.lost = False
        if held.failed:
            counters.failed += 1
        if intent in _HANDLED:
            counters.handled += 1
            context.ledger.remember_acked(held)
        elif intent == RETRIED:
            counters.retried += 1
        elif intent == RELEASED:
            counters.released += 1
        elif intent in (DEAD_LETTERED, DROPPED):
            counters.dead_lettered += 1
        if intent != RELEASED:
            context.ledger.note_settled(held)
        context.ledger.remove(held)
        self._answer(held, None)
        if context.reporter.hears_settled:
            detail = ACKED if intent in (ACKED_WITH, ACCEPTED, MISSING) else intent
            context.reporter.tell("on_settled", "settled", message_id=held.id, attempt=held.attempt, detail=detail)
        if intent in (DEAD_LETTERED, DROPPED):
            self.tell_dead_lettered(held)

    def _tell_published(self, held: Held, ids: Sequence[str]) -> None:
        for output, entry_id in zip(held.outputs, ids, strict=True):
            self._context.reporter.tell("on_published", "published", topic=output.stream, message_id=entry_id)

    def tell_dead_lettered(self, held: Held) -> None:
        self._context.reporter.tell(
            "on_dead_lettered", "dead-lettered", message_id=held.id, attempt=held.attempt, detail=held.reason
        )

    def _refused(self, held: Held) -> None:
        """The server says that it is not ours."""
        if held.uncertain or held.intent == MISSING:
            # A try whose reply was lost has settled it; an entry without a body leaves the pending list by itself.
            self.done(held)
            return
        context = self._context
        if held.intent == ACKED:
            context.ledger.remember_handled(held)
        context.ledger.remove(held)
        self._answer(held, LeaseLostError(f"entry {held.id} of {held.stream!r} is no longer ours"))
        self._tell_lost(held, f"not ours when it was to be {held.intent}")

    def _tell_lost(self, held: Held, why: str) -> None:
        if not held.lost:
            held.lost = True
            self._context.counters.leases_lost += 1
            self._context.reporter.tell(
                "on_lease_lost", "settled", message_id=held.id, attempt=held.attempt, detail=why
            )

    def _failed(self, held: Held, error: Exception, lane: Lane, *, reported: bool = False) -> None:
        context = self._context
        held.uncertain = held.uncertain or may_have_happened(error)
        if held.waiter is not None:
            held.stage = held.unsettled
            held.failed = False
            self._answer(held, error)
            crashed = held.result is not None and held.result.outcome is Outcome.CRASHED
            if self._ending and not crashed:
                self.release(held)
            elif held.result is not None:
                self._on_unsettled(held, held.result)
            return
        if not reported:
            self.report("ack-flush", error, held, f"the entry could not be {held.intent}")
        if held.intent == ACKED_WITH and not can_pass(error):
            # Whoever asked for it was cancelled, and hears nothing of it; again it would be refused again.
            error_type = f"{type(error).__module__}.{type(error).__qualname__}"
            self._on_unsettled(held, Result(Outcome.FAILED, words(error), error_type, error=error))
            return
        if context.clock() < held.lease_until:
            lane.again(held)
            return
        if held.intent == ACKED:
            context.ledger.remember_handled(held)
        context.ledger.remove(held)
        self.report("ack-flush", error, held, f"given up: the lease ended before the entry could be {held.intent}")
        self._tell_lost(held, f"the lease ended before it could be {held.intent}")

    def _answer(self, held: Held, error: Exception | None) -> None:
        waiter, held.waiter = held.waiter, None
        if waiter is not None:
            waiter.error = error
            waiter.done.set()

    def report(self, scope: ErrorScope, error: BaseException, held: Held, detail: str) -> None:
        self._context.reporter.error(scope, error, detail=detail, message_id=held.id, attempt=held.attempt)
