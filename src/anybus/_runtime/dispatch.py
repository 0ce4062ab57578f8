"""The dispatch: sends settlements to the server in lanes, and enters the answers into the ledger."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence

import anyio

from .._failure.settlement import CANCELLED, DeadLetter, Decision, Outcome, Result
from .._ground.cancellation import as_failure
from .._ground.errors import (
    ClosedError,
    EventBusError,
    GroupLostError,
    LeaseLostError,
    can_pass,
    may_have_happened,
    words,
)
from ..abc import Output
from ..abc._observer import ErrorScope
from .context import Context
from .entry import (
    ACCEPTED,
    ACKED,
    ACKED_WITH,
    DEAD_LETTERED,
    DROPPED,
    DUPLICATE,
    MISSING,
    PLAIN,
    RELEASED,
    RETRIED,
    SETTLED_BEFORE,
    Held,
    Settlement,
    Stage,
)
from .fate import tell_fate, tell_lost, tell_unsettled
from .lane import Lane

_AT_ONCE = 256
"""How many settlements are sent in one part of a batch."""

_HANDLED = (ACKED, ACKED_WITH)
_FAILURES = frozenset(
    {Outcome.FAILED, Outcome.TIMED_OUT, Outcome.RETRY, Outcome.GAVE_UP, Outcome.INVALID, Outcome.REJECTED}
)


class Dispatch:
    """One lane for acknowledgements, one for transfers, one for releases.

    :param on_unsettled: called with the result of the handling, if a settlement by hand failed and nobody waits for it.
    """

    def __init__(self, context: Context, on_unsettled: Callable[[Held, Result], None]) -> None:
        self._context = context
        clock = context.clock
        options = context.options
        # A batch larger than the budget would never fill: it would always wait for the interval, and reads with it.
        threshold = min(options.ack_batch_size, max(1, context.ledger.budget.limit // 2))
        self.acks = Lane(self._flush_acks, clock, threshold=threshold, interval=options.ack_flush_interval)
        self._transfers = Lane(self._flush_transfers, clock)
        self._releases = Lane(self._flush_releases, clock)
        self._on_unsettled = on_unsettled
        self.is_over = False
        self._ending = False
        features = context.backend.features
        self._fence = context.consumer if "fence" in features else None
        # Before an entry is handled at most once, the answer has to be exact. Of a batch of acknowledgements, a backend
        # may accept what somebody else has settled meanwhile.
        self._acceptances = self._transfers if "atomic_transfer" in features else self.acks
        self._can_release = "release" in features

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return self.acks, self._transfers, self._releases

    async def drain(self) -> None:
        """Settle what is left. A settlement by hand that fails from now on becomes a release: nobody can repeat it."""
        self._ending = True
        for lane in self.lanes:
            lane.begin_drain()
        while not all(lane.is_empty for lane in self.lanes):  # an answer in one lane can add work to another
            for lane in self.lanes:
                await lane.drained()

    def finish(self) -> int:
        """Send nothing more, and tell waiting callers. The entries that are left are redelivered after their lease."""
        self.is_over = True
        left = self._context.ledger.all()
        for held in left:
            self._answer(held, ClosedError("the subscription ended before the server answered"))
            tell_unsettled(self._context, held, self._remove(held))
        return len(left)

    def settle(
        self,
        held: Held,
        intent: str,
        outputs: Sequence[Output] = (),
        result: Result | None = None,
        decision: Decision | None = None,
    ) -> None:
        """Acknowledge, until the server accepts it or the lease ends. Outputs are appended before, or in one step."""
        held.settle(intent, outputs, result, decision)
        lane = self._transfers if outputs else self._acceptances if intent == ACCEPTED else self.acks
        lane.put(held)

    def release(self, held: Held) -> None:
        """Release the entry to its group, uncounted."""
        held.settle(RELEASED)
        if self._can_release:
            self._releases.put(held)
        else:
            self.done(held)

    async def _flush_acks(self, batch: list[Held]) -> None:
        await self._flush(batch, self._send_acks, self.acks)

    async def _send_acks(self, stream: str, entries: list[Held]) -> None:
        context = self._context
        ids = [held.id for held in entries]
        refused = await context.backend.ack_many(stream, context.group, ids, consumer=self._fence)
        if not refused:
            self._all_done(stream, entries, ids)
            return
        not_ours = set(refused)
        for held in entries:
            if held.id in not_ours:
                self._refused(held, self.acks)
            else:
                self.done(held)

    async def _flush_transfers(self, batch: list[Held]) -> None:
        await self._flush(batch, self._send_transfers, self._transfers)

    async def _send_transfers(self, stream: str, entries: list[Held]) -> None:
        context = self._context
        items = [(held.id, (held.settlement or PLAIN).outputs) for held in entries]
        results = await context.backend.transfer_many(stream, context.group, context.consumer, items)
        self._transferred(entries, results, self._transfers)

    def _transferred(
        self, entries: list[Held], results: Sequence[list[str] | EventBusError | None], lane: Lane
    ) -> None:
        for held, result in zip(entries, results, strict=True):
            if isinstance(result, Exception):
                self._failed(held, result, lane)
            elif result is None:
                self._refused(held, lane)
            else:
                for output in (held.settlement or PLAIN).outputs:
                    if output.delay:
                        self._context.retry_times.expect(output.delay)
                self.done(held)
                if held.intent == ACKED_WITH and self._context.reporter.hears_published:
                    self._tell_published(held, result)

    async def _flush_releases(self, batch: list[Held]) -> None:
        await self._flush(batch, self._send_releases, self._releases)

    async def _send_releases(self, stream: str, entries: list[Held]) -> None:
        context = self._context
        ids = [held.id for held in entries]
        # A call under way may bring these. Only the server knows whether they were delivered before or after this.
        context.ledger.note_doubt(stream, ids)
        try:
            await context.backend.release(stream, context.group, context.consumer, ids)
        except GroupLostError:  # then nothing is ours any more: nothing to release
            context.ledger.group_was_lost(stream)
        for held in entries:
            if held.retaken:
                # Delivered to us again between the release and its reply: it is ours once more.
                held.retaken = False
                self._releases.put(held)
            else:
                self.done(held)

    async def _flush(self, batch: list[Held], send: Callable[[str, list[Held]], Awaitable[None]], lane: Lane) -> None:
        by_stream: defaultdict[str, list[Held]] = defaultdict(list)
        for held in batch:
            by_stream[held.stream].append(held)
        for stream, entries in by_stream.items():
            if len(entries) <= _AT_ONCE:
                await self._try(send, stream, entries, lane)
                continue
            parts = [entries[start : start + _AT_ONCE] for start in range(0, len(entries), _AT_ONCE)]
            under_way = list(parts)
            try:
                # Concurrently: the first answer makes room for a read while the server is busy with the next part.
                async with anyio.create_task_group() as tasks:
                    for part in parts:
                        tasks.start_soon(self._try, send, stream, part, lane, under_way.remove)
            except BaseException as error:  # noqa: ASYNC103 - raised again in there
                failure = as_failure(error)
                for part in under_way:
                    self._all_failed(part, failure, lane)

    async def _try(
        self,
        send: Callable[[str, list[Held]], Awaitable[None]],
        stream: str,
        entries: list[Held],
        lane: Lane,
        over: Callable[[list[Held]], None] | None = None,
    ) -> None:
        try:
            await send(stream, entries)
        except BaseException as error:  # noqa: ASYNC103 - raised again in there
            self._all_failed(entries, as_failure(error), lane)
        else:
            if self._context.reporter.failing:
                self._context.reporter.works(self._part(lane))
        if over is not None:
            over(entries)

    def _all_failed(self, entries: Sequence[Held], error: Exception, lane: Lane) -> None:
        if isinstance(error, GroupLostError):
            self._context.ledger.group_was_lost(entries[0].stream)
        detail = f"settling {len(entries)} entries"
        self._context.reporter.error("ack-flush", error, detail=detail, part=self._part(lane))
        for held in entries:
            if held.stage is Stage.SETTLING:
                self._failed(held, error, lane, reported=True)

    def _part(self, lane: Lane) -> str:
        """A lane's name in the log."""
        return f"ack-flush of {('acks', 'transfers', 'releases')[self.lanes.index(lane)]}"

    def _all_done(self, stream: str, entries: Sequence[Held], ids: Sequence[str]) -> None:
        """:meth:`done` for each, with a shortcut for nearly every message (handled, acked, nobody waits)."""
        context = self._context
        if context.reporter.hears_settled:
            unusual: Sequence[Held] = entries
        else:
            unusual = context.ledger.remove_acked(stream, entries, ids)
            context.counters.handled += len(entries) - len(unusual)
        for held in unusual:
            self.done(held)

    def done(self, held: Held, *, sure: bool = True) -> None:
        """Enter the server's answer into the ledger and the counters.

        :param sure: false if the entry may still be pending: its retry waits here, or another consumer has it.
        """
        context = self._context
        counters = context.counters
        settlement = held.settlement or PLAIN
        intent, result = settlement.intent, settlement.result
        handed_back = intent == RELEASED and not settlement.outputs  # with a delay, its copy is elsewhere
        retaken, held.retaken = held.retaken, False
        held.lost = False
        if result is not None and result.outcome in _FAILURES:
            counters.failed += 1
        if intent in _HANDLED:
            counters.handled += 1
        elif intent == RETRIED:
            counters.retried += 1
        elif intent == RELEASED:
            counters.released += 1
        elif intent in (DEAD_LETTERED, DROPPED):
            counters.dead_lettered += 1
            if isinstance(settlement.decision, DeadLetter) and settlement.decision.code == "expired":
                counters.expired += 1
        elif intent == DUPLICATE:
            counters.duplicates += 1
        if sure and not handed_back:
            context.ledger.note_settled(held.stream, (held.id,), (held.message.uid,))
        elif not sure:
            context.ledger.note_doubt(held.stream, (held.id,))
        ending = self._remove(held)
        self._answer(held, None)
        if ending is not None:
            tell_fate(context, held, ending)
        if context.reporter.hears_settled:
            detail = ACKED if intent in (ACKED_WITH, ACCEPTED, MISSING, SETTLED_BEFORE) else intent
            context.reporter.tell("on_settled", "settled", message_id=held.id, attempt=held.attempt, detail=detail)
        if intent in (DEAD_LETTERED, DROPPED):
            self.tell_dead_lettered(held)
        if retaken and not handed_back:
            # Delivered again before this answer arrived, perhaps by a recreated group. It is settled: only ack it.
            again = held.again(held.attempt, Stage.WAITING)
            context.ledger.add(again)
            self.settle(again, SETTLED_BEFORE)

    def _tell_published(self, held: Held, ids: Sequence[str]) -> None:
        # There are no ids if nothing was published, because the key of the message was completed before.
        for output, entry_id in zip((held.settlement or PLAIN).outputs, ids, strict=False):
            self._context.reporter.tell("on_published", "published", topic=output.stream, message_id=entry_id)

    def tell_dead_lettered(self, held: Held) -> None:
        decision = (held.settlement or PLAIN).decision
        if isinstance(decision, DeadLetter):
            detail = f"{decision.code}: {decision.reason}"
            self._context.reporter.tell(
                "on_dead_lettered", "dead-lettered", message_id=held.id, attempt=held.attempt, detail=detail
            )

    def _refused(self, held: Held, lane: Lane) -> None:
        """The server says that the entry is not ours."""
        context, intent = self._context, held.intent
        uncertain = (held.settlement or PLAIN).uncertain
        if held.retaken:
            held.retaken = False  # it has become ours since
            lane.put(held)
            return
        if intent in (MISSING, SETTLED_BEFORE):
            # An entry without a body, or one that was settled before, leaves the pending list by itself.
            self.done(held)
            return
        if uncertain and intent != ACCEPTED:
            # An earlier try, whose reply was lost, has settled it, or somebody else has it. If it is redelivered even
            # so, that try had no effect. A handled entry is only acked then, one with outputs is handled again.
            self.done(held, sure=False)
            if intent == ACKED:
                # If it has to be acked again, exactly-once has to complete its key, too.
                context.ledger.remember_handled(held, SETTLED_BEFORE if context.once is None else ACKED)
            return
        context.ledger.note_vanished(held, context.clock())
        if intent == ACKED:
            context.ledger.remember_handled(held, ACKED)
        context.ledger.note_doubt(held.stream, (held.id,))
        ending = self._remove(held)
        error = LeaseLostError(f"entry {held.id} of {held.stream!r} is no longer ours")
        if uncertain:
            # At most once: that try has acked it, or somebody else has it and may have handled it.
            self.report("ack-flush", error, held, "the reply to its acknowledgement was lost: it is not handled")
        self._answer(held, error)
        self._tell_lost(held, f"no longer ours when it was to be {intent}", ending)

    def _tell_lost(self, held: Held, why: str, ending: Result | None) -> None:
        if not held.lost:
            held.lost = True
            self._context.counters.leases_lost += 1
            tell_lost(self._context, held, "settled", why)
        tell_unsettled(self._context, held, ending)

    def _failed(self, held: Held, error: Exception, lane: Lane, *, reported: bool = False) -> None:
        context, intent, waiter = self._context, held.intent, held.waiter
        settlement = held.settlement
        if settlement is None:
            held.settlement = settlement = Settlement(ACKED)
        settlement.uncertain = settlement.uncertain or may_have_happened(error)
        if waiter is not None:
            held.stage = waiter.stage
            held.retaken = False
            settlement.result = None  # it belongs to the settlement that failed
            self._answer(held, error)
            crashed = waiter.result is not None and waiter.result.outcome is Outcome.CRASHED
            unstarted = intent == ACCEPTED and waiter.result is CANCELLED
            if unstarted or (self._ending and not crashed):
                self.release(held)
            elif waiter.result is not None:
                self._on_unsettled(held, waiter.result)
            return
        if not reported:
            self.report("ack-flush", error, held, f"the entry could not be {intent}", times=settlement.tries + 1)
        if intent == ACKED_WITH and not can_pass(error):
            # The caller was cancelled, so nobody gets this error. It is permanent: every other try would fail, too.
            held.retaken = False
            error_type = f"{type(error).__module__}.{type(error).__qualname__}"
            self._on_unsettled(held, Result(Outcome.FAILED, words(error), error_type, error=error))
            return
        if context.clock() < held.lease_until:
            lane.again(held)
            return
        if intent in (ACKED, SETTLED_BEFORE):
            context.ledger.remember_handled(held, intent)
        context.ledger.note_doubt(held.stream, (held.id,))
        ending = self._remove(held)
        self.report("ack-flush", error, held, f"abandoned: the lease ended before the entry could be {intent}")
        self._tell_lost(held, f"the lease ended before it could be {intent}", ending)

    def _remove(self, held: Held) -> Result | None:
        """Remove it from the ledger, which clears the result of its settlement. Returns that result."""
        result = (held.settlement or PLAIN).result
        self._context.ledger.remove(held)
        return result

    def _answer(self, held: Held, error: Exception | None) -> None:
        waiter, held.waiter = held.waiter, None
        if waiter is not None:
            waiter.error = error
            waiter.done.set()

    def report(self, scope: ErrorScope, error: BaseException, held: Held, detail: str, *, times: int = 1) -> None:
        self._context.reporter.error(scope, error, detail=detail, about=held, times=times)
