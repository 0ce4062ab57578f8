"""The settler: carries out what the settlement table decides, by lanes to the server."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timezone

import anyio

from .._backoff import recovery_delay
from .._cancellation import as_failure
from .._copies import RETRY_FIRST_ID, Origin, dead_letter, retry_copy
from .._errors import AlreadySettledError, ClosedError, GroupLostError, LeaseLostError, may_have_happened
from .._settlement import (
    RETURNED,
    Ack,
    DeadLetter,
    Decision,
    Leave,
    Outcome,
    Release,
    Report,
    Result,
    RetryAt,
    decide,
)
from ..abc import Output
from ..abc._observer import ErrorScope
from ._context import Context
from ._lane import Lane
from ._ledger import Held, Stage, Waiter

_FAILURES = frozenset({Outcome.FAILED, Outcome.TIMED_OUT, Outcome.RETRY, Outcome.REJECTED})

ACKED, ACCEPTED, RETRIED, DEAD_LETTERED, DROPPED, RELEASED, MISSING = (
    "acked",
    "accepted",
    "retried",
    "dead-lettered",
    "dropped",
    "released",
    "missing",
)


_OPEN, _SETTLING = Stage.OPEN, Stage.SETTLING  # read for every message


class Settler:
    """Owns the way of every entry from its outcome to the server's answer."""

    def __init__(self, context: Context) -> None:
        self._context = context
        clock = context.clock
        options = context.options
        # A batch that the budget cannot hold would always wait for the interval, and the reads with it.
        threshold = min(options.ack_batch_size, max(1, context.ledger.budget.limit // 2))
        self._acks = Lane(self._flush_acks, clock, threshold=threshold, interval=options.ack_flush_interval)
        self._transfers = Lane(self._flush_transfers, clock)
        self._releases = Lane(self._flush_releases, clock)
        self._held_back: list[tuple[float, int, Held]] = []
        self._tickets = itertools.count()
        self._held_back_changed = anyio.Event()
        self.on_due: Callable[[Held], None] = self.release
        self.handed_back = 0
        """Releases by handlers, and of what may not start: taking them again at once would spin."""
        self._ending = False
        self._over = False
        features = context.backend.features
        self._fence = context.consumer if "fence" in features else None
        self._can_delay = "delay" in features
        self._can_release = "release" in features
        self._can_keep_raw = "raw" in features
        # The same for every message, whatever its attempt and the time: asked of the table once.
        self._acks_returned = isinstance(
            decide(RETURNED, attempt=1, deliveries=None, policy=context.policy, now=0, draw=0), Ack
        )
        name = type(context.backend).__name__
        if self._fence is None:
            context.notices.once(f"{name} cannot check who owns an entry: a late ack takes it from its new owner")
        if not self._can_release:
            context.notices.once(f"{name} cannot release entries: what is handed back waits for its lease to end")
        if "atomic_transfer" not in features:
            context.notices.once(
                f"{name} cannot append and acknowledge in one step (atomic_transfer): a crash between the two doubles "
                "a retry or a dead letter"
            )
        if not self._can_keep_raw:
            context.notices.once(
                f"{name} cannot keep raw fields beside a message: of a malformed entry its dead letter keeps only the "
                "bytes of the field 'message'"
            )
        if not self._can_delay:
            context.notices.once(
                f"{name} cannot delay messages: retries wait in this process, and a crash loses their backoff"
            )

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return self._acks, self._transfers, self._releases

    async def drain(self) -> None:
        """Settle what is left. From now on what fails by hand is released, since nobody can settle it any more."""
        self._ending = True
        for lane in self.lanes:
            lane.begin_drain()
        for lane in self.lanes:
            await lane.drained()

    def finish(self) -> int:
        """Nothing is sent any more. Whoever waits is told; what is left comes back when its lease is over."""
        self._over = True
        left = self._context.ledger.all()
        for held in left:
            self._answer(held, ClosedError("the subscription ended before the server answered"))
            self._context.ledger.remove(held)
        return len(left)

    def _answer(self, held: Held, error: Exception | None) -> None:
        waiter, held.waiter = held.waiter, None
        if waiter is not None:
            waiter.error = error
            waiter.done.set()

    async def run_held_back(self) -> None:
        """Bring back what waits here for its retry, for a backend that cannot delay."""
        context = self._context
        while True:
            while self._held_back and self._held_back[0][0] <= context.clock():
                held = heapq.heappop(self._held_back)[2]
                held.parked = False
                if held.stage is Stage.WAITING:
                    if "renew" not in context.backend.features:
                        # No clock of ours knows whose it is: it is tried, and the settlement asks the server.
                        held.lease_until = context.clock() + context.lease
                    self.on_due(held)
            wait = self._held_back[0][0] - context.clock() if self._held_back else None
            self._held_back_changed = anyio.Event()
            if wait is None:
                await self._held_back_changed.wait()
            else:
                with anyio.move_on_after(wait):
                    await self._held_back_changed.wait()

    def conclude(self, held: Held, result: Result) -> None:
        """A handler has ended. What it has not settled is settled now."""
        if held.stage is _OPEN:
            if result is RETURNED and self._acks_returned:
                held.stage = _SETTLING
                held.intent = ACKED
                self._acks.put(held)
            else:
                self.apply(held, result)
        elif held.stage is Stage.SETTLING and held.waiter is not None:
            held.result = result  # for the case that the settlement under way fails

    def ack(self, held: Held, intent: str = ACKED) -> None:
        """Acknowledge, until the server has it or the lease is over."""
        held.stage = Stage.SETTLING
        held.intent = intent
        self._acks.put(held)

    def release(self, held: Held) -> None:
        """Hand back, uncounted."""
        held.stage = Stage.SETTLING
        held.intent = RELEASED
        held.parked = False
        if self._can_release:
            self._releases.put(held)
        else:
            self._done(held)

    async def ack_first(self, held: Held) -> bool:
        """Acknowledge before the start (auto-on-receive). False: not ours, or the lease ended before it worked."""
        failures = 0
        while True:
            held.waiter = waiter = Waiter()
            self.ack(held, ACCEPTED)
            await waiter.done.wait()
            if waiter.error is None:
                return True
            if isinstance(waiter.error, LeaseLostError) or self._context.clock() >= held.lease_until:
                self._context.ledger.remove(held)
                return False
            failures += 1
            await anyio.sleep(recovery_delay(failures, random.random()))

    async def settle(self, held: Held, result: Result | None) -> None:
        """Settle by hand, and wait for the server's answer."""
        if self._over:
            raise ClosedError("the subscription has ended; what was not settled by then has been released")
        if held.stage not in (Stage.OPEN, Stage.RETURNED):
            if held.lost and held.stage is Stage.GONE:
                raise LeaseLostError(f"entry {held.id} of {held.stream!r} is no longer ours")
            raise AlreadySettledError(f"entry {held.id} of {held.stream!r} has been settled already")
        held.unsettled = held.stage
        held.waiter = waiter = Waiter()
        if result is None:
            self.ack(held)
        else:
            if result.outcome is Outcome.RELEASED and not result.delay:
                self.handed_back += 1
            self.apply(held, result)
        try:
            await waiter.done.wait()
        finally:
            # Cancelled while the server was being asked: from here on the settlement is an automatic one.
            if held.waiter is waiter:
                held.waiter = None
        if waiter.error is not None:
            raise waiter.error

    async def publish_rejected(self, held: Held, result: Result) -> None:
        """A message rejected after its ack (auto-on-receive) becomes a dead letter by a plain publish."""
        context = self._context
        decision = self._decide(held, result)
        assert isinstance(decision, DeadLetter)
        held.reason = f"{decision.code}: {decision.reason}"
        if context.dead_letter_topic is None:
            context.counters.dead_lettered += 1
            self._tell_dead_lettered(held)
            return
        output = self._dead_letter(held, decision, context.dead_letter_topic)
        try:
            with anyio.fail_after(context.options.publish_timeout):
                await context.backend.publish(output.stream, output.message)
        except Exception as error:
            self._report("publish", error, held, "the dead letter of a message acknowledged on receipt is lost")
            return
        context.counters.dead_lettered += 1
        self._tell_dead_lettered(held)

    def _decide(self, held: Held, result: Result) -> Decision:
        return decide(
            result,
            attempt=held.attempt,
            deliveries=held.deliveries,
            policy=self._context.policy,
            now=self._context.clock(),
            draw=random.random(),
        )

    def apply(self, held: Held, result: Result, *, raw: Mapping[str, bytes] | None = None) -> None:
        """Do what the table decides.

        :param raw: the fields of a malformed entry, kept beside its dead letter.
        """
        decision = self._decide(held, result)
        held.failed = result.outcome in _FAILURES
        if isinstance(decision, Ack):
            self.ack(held, MISSING if result.outcome is Outcome.MISSING else ACKED)
        elif isinstance(decision, Release):
            self.release(held)
        elif isinstance(decision, DeadLetter):
            self._give_up(held, decision, raw)
        elif isinstance(decision, RetryAt):
            self._retry(held, decision, counted=result.outcome is not Outcome.RELEASED)
        elif isinstance(decision, Leave):
            held.stage = Stage.RETURNED
        else:
            assert isinstance(decision, Report)

    def _give_up(self, held: Held, decision: DeadLetter, raw: Mapping[str, bytes] | None) -> None:
        context = self._context
        held.reason = f"{decision.code}: {decision.reason}"
        if context.dead_letter_topic is None:
            self.ack(held, DROPPED)
            return
        output = self._dead_letter(held, decision, context.dead_letter_topic)
        if raw is not None and self._can_keep_raw:
            output = Output(output.stream, output.message, raw=raw)
        self._transfer(held, DEAD_LETTERED, output)

    def _retry(self, held: Held, decision: RetryAt, *, counted: bool) -> None:
        if not self._can_delay:
            self._hold_back(held, decision, RETRIED if counted else RELEASED)
            return
        copy = retry_copy(
            held.message,
            failures=decision.attempt - 1,
            reason=decision.reason if counted else None,
            first_id=self._first_id(held),
        )
        self._transfer(held, RETRIED if counted else RELEASED, Output(self._context.retry_stream, copy, decision.delay))

    def _transfer(self, held: Held, intent: str, output: Output) -> None:
        held.stage = Stage.SETTLING
        held.intent = intent
        held.outputs = (output,)
        self._transfers.put(held)

    def _hold_back(self, held: Held, decision: RetryAt, intent: str) -> None:
        """Keep the entry here until it is due. A new record: the old delivery is settled for good."""
        again = held.again(decision.attempt)
        held.intent = intent
        self._done(held)
        self._context.ledger.add(again)
        heapq.heappush(self._held_back, (decision.due, next(self._tickets), again))
        self._held_back_changed.set()

    def _first_id(self, held: Held) -> str:
        return held.message.headers.get(RETRY_FIRST_ID, held.id) if held.stream != self._context.topic else held.id

    def _dead_letter(self, held: Held, decision: DeadLetter, topic: str) -> Output:
        context = self._context
        unhandled = decision.code in ("malformed", "deliveries")
        origin = Origin(
            topic=context.topic,
            id=self._first_id(held),
            group=context.group,
            consumer=context.consumer,
            attempts=held.attempt - 1 if unhandled else held.attempt,
            deliveries=held.deliveries,
        )
        message = dead_letter(
            held.message,
            topic,
            origin,
            code=decision.code,
            reason=decision.reason,
            error_type=decision.error_type,
            at=datetime.now(timezone.utc),
        )
        return Output(topic, message)

    async def _flush_acks(self, batch: list[Held]) -> None:
        async def send(stream: str, entries: list[Held]) -> None:
            context = self._context
            ids = [held.id for held in entries]
            refused = await context.backend.ack_many(stream, context.group, ids, consumer=self._fence)
            if not refused:
                self._all_done(entries)
                return
            not_ours = set(refused)
            for held in entries:
                if held.id in not_ours:
                    self._refused(held)
                else:
                    self._done(held)

        await self._flush(batch, send, self._acks)

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
                    self._done(held)

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
                    self._done(held)

        await self._flush(batch, send, self._releases)

    async def _flush(self, batch: list[Held], send: Callable[[str, list[Held]], Awaitable[None]], lane: Lane) -> None:
        by_stream: defaultdict[str, list[Held]] = defaultdict(list)
        for held in batch:
            by_stream[held.stream].append(held)
        for stream, entries in by_stream.items():
            try:
                await send(stream, entries)
            except BaseException as error:  # noqa: ASYNC103 - raised again in there
                self._all_failed(entries, as_failure(error), lane)

    def _all_failed(self, entries: Sequence[Held], error: Exception, lane: Lane) -> None:
        self._context.reporter.error("ack-flush", error, detail=f"settling {len(entries)} entries")
        for held in entries:
            if held.stage is Stage.SETTLING:
                self._failed(held, error, lane, reported=True)

    def _all_done(self, entries: Sequence[Held]) -> None:
        """``_done`` for each; with what is nearly every message (handled, acked, nobody waits) kept short."""
        context = self._context
        if context.reporter.hears_settled:
            for held in entries:
                self._done(held)
            return
        acked: list[Held] = []
        for held in entries:
            if held.intent == ACKED and held.waiter is None and not held.failed:
                held.lost = False
                acked.append(held)
            else:
                self._done(held)
        context.counters.handled += len(acked)
        context.ledger.remove_acked(acked)

    def _done(self, held: Held) -> None:
        context = self._context
        counters = context.counters
        intent = held.intent
        held.lost = False
        if held.failed:
            counters.failed += 1
        if intent == ACKED:
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
            detail = ACKED if intent in (ACCEPTED, MISSING) else intent
            context.reporter.tell("on_settled", "settled", message_id=held.id, attempt=held.attempt, detail=detail)
        if intent in (DEAD_LETTERED, DROPPED):
            self._tell_dead_lettered(held)

    def _tell_dead_lettered(self, held: Held) -> None:
        self._context.reporter.tell(
            "on_dead_lettered", "dead-lettered", message_id=held.id, attempt=held.attempt, detail=held.reason
        )

    def _refused(self, held: Held) -> None:
        """The server says that it is not ours."""
        if held.uncertain or held.intent == MISSING:
            # A try whose reply was lost has settled it; an entry without a body leaves the pending list by itself.
            self._done(held)
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
            if self._ending:
                self.release(held)
            elif held.result is not None:
                self.apply(held, held.result)
            return
        if not reported:
            self._report("ack-flush", error, held, f"the entry could not be {held.intent}")
        if context.clock() < held.lease_until:
            lane.again(held)
            return
        if held.intent == ACKED:
            context.ledger.remember_handled(held)
        context.ledger.remove(held)
        self._report("ack-flush", error, held, f"given up: the lease ended before the entry could be {held.intent}")
        self._tell_lost(held, f"the lease ended before it could be {held.intent}")

    def _report(self, scope: ErrorScope, error: BaseException, held: Held, detail: str) -> None:
        self._context.reporter.error(scope, error, detail=detail, message_id=held.id, attempt=held.attempt)
