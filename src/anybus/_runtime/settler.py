"""The settler: carries out what the settlement table decides about handled entries and about taken ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial

import anyio

from .._failure.backoff import recovery_delay
from .._failure.copies import Origin, dead_letter, first_published, original_id, retry_copy
from .._failure.judgement import Judgement
from .._failure.settlement import (
    CANCELLED,
    CRASHED,
    RETURNED,
    Ack,
    DeadLetter,
    Decision,
    Leave,
    LetGo,
    Outcome,
    Release,
    Report,
    Result,
    RetryAt,
    decide,
)
from .._ground.cancellation import is_crash
from .._ground.clock import now
from .._ground.errors import AlreadySettledError, ClosedError, LeaseLostError
from ..abc import Output
from .context import Context
from .entry import (
    ACCEPTED,
    ACKED,
    ACKED_WITH,
    DEAD_LETTERED,
    DROPPED,
    MISSING,
    RELEASED,
    RETRIED,
    Held,
    KeyState,
    Settlement,
    Stage,
    Waiter,
)
from .fate import tell_fate, tell_unsettled
from .once import dispatch_for
from .postponed import Postponed

_OPEN, _SETTLING = Stage.OPEN, Stage.SETTLING  # read for every message


class Settler:
    """Takes every entry from its outcome to the dispatch.

    :param postponed: where retries wait if the backend cannot delay them.
    """

    def __init__(self, context: Context, postponed: Postponed) -> None:
        self._context = context
        self._postponed = postponed
        self._judgement = Judgement(context.policy, context.failure_policy)
        self.dispatch = dispatch_for(context, self.apply)
        self._put_ack = self.dispatch.acks.put
        self.given_back = 0
        """How many entries were released that could be taken again at once. Then the next pass waits: no spinning."""
        features = context.backend.features
        self._can_delay = "delay" in features
        self._can_keep_raw = "raw" in features
        # The decision is the same for every message, attempt and time, so the table is asked once.
        success = decide(RETURNED, attempt=1, deliveries=None, policy=context.policy, now=0, draw=0)
        self.acks_returned = isinstance(success, Ack)
        """Whether a handler that returns has succeeded. (In manual mode, that means nothing.)"""

    def conclude(self, held: Held, result: Result) -> None:
        """A handler has ended. If it has not settled its entry, the entry is settled now."""
        if held.stage is _OPEN:
            if result is RETURNED and self.acks_returned and held.settlement is None:
                held.stage = _SETTLING
                self._put_ack(held)
            else:
                self.apply(held, result)
        elif held.stage is _SETTLING:
            waiter = held.waiter
            if waiter is not None:
                waiter.result = result  # needed if the settlement under way fails

    def crashed(self, held: Held, error: BaseException) -> None:
        """The handling raised what is no ``Exception``: it counts as a delivery without an outcome.

        After ``KeyboardInterrupt``, the entry is released with the others when the subscription ends.
        """
        if isinstance(error, Exception) or not is_crash(error):
            return
        if held.stage in (Stage.PARKED, Stage.WAITING):
            self.apply(held, CRASHED)
        else:
            self.conclude(held, CRASHED)

    def ack(self, held: Held, intent: str = ACKED) -> None:
        """Acknowledge, until the server accepts it or the lease ends."""
        self.dispatch.settle(held, intent)

    def release(self, held: Held) -> None:
        """Release the entry to its group, uncounted."""
        self.dispatch.release(held)

    def give_back(self, held: Held) -> None:
        """Release an entry that could be taken again at once."""
        self.given_back += 1
        self.dispatch.release(held)

    async def ack_first(self, held: Held) -> bool:
        """Acknowledge before the handling (auto-on-receive). False: the entry is not ours, or its lease ended first."""
        failures = 0
        try:
            while True:
                held.waiter = waiter = Waiter(Stage.OPEN)
                self.ack(held, ACCEPTED)
                await waiter.done.wait()
                if waiter.error is None:
                    return True
                if isinstance(waiter.error, LeaseLostError) or self._context.clock() >= held.lease_until:
                    self._context.ledger.remove(held)
                    return False
                failures += 1
                await anyio.sleep(recovery_delay(failures, random.random()))
        except anyio.get_cancelled_exc_class():
            # Its handler does not start: it is released, unless the acknowledgement that is under way succeeds.
            if held.waiter is not None:
                held.waiter.result = CANCELLED
            elif held.stage is _OPEN:
                self.release(held)
            raise

    async def settle(self, held: Held, result: Result | None, outputs: Sequence[Output] = ()) -> None:
        """Settle by hand, and wait for the server's answer. No result: acknowledge, and append the outputs with it."""
        if self.dispatch.is_over:
            raise ClosedError("the subscription has ended; messages that were not settled in time have been released")
        if held.stage not in (Stage.OPEN, Stage.RETURNED):
            if held.lost and held.stage is Stage.GONE:
                raise LeaseLostError(f"entry {held.id} of {held.stream!r} is no longer ours")
            raise AlreadySettledError(f"entry {held.id} of {held.stream!r} has been settled already")
        held.waiter = waiter = Waiter(held.stage)
        self._begin(held, result, outputs)
        try:
            await waiter.done.wait()
        except anyio.get_cancelled_exc_class():
            if waiter.error is not None and held.stage is waiter.stage:
                # It failed at the moment of the cancellation, so nobody gets the error. Begin again.
                self._begin(held, result, outputs)
            raise
        finally:
            # If it was cancelled while it waited for the server, the settlement becomes an automatic one.
            if held.waiter is waiter:
                held.waiter = None
        if waiter.error is not None:
            raise waiter.error

    def _begin(self, held: Held, result: Result | None, outputs: Sequence[Output]) -> None:
        if result is None and outputs:
            self.dispatch.settle(held, ACKED_WITH, outputs)
        elif result is None:
            self.ack(held)
        else:
            if result.outcome is Outcome.RELEASED and not result.delay:
                self.given_back += 1
            self.apply(held, result)

    async def publish_rejected(self, held: Held, result: Result) -> None:
        """Publish the dead letter of a message that was rejected after its ack (auto-on-receive)."""
        context = self._context
        decision = self._decide(held, result)
        assert isinstance(decision, DeadLetter)
        topic = context.dead_letter_topic
        held.settlement = Settlement(DROPPED if topic is None else DEAD_LETTERED, decision=decision)
        if topic is None:
            self._rejected_is_kept(held, result)
            return
        output = self._dead_letter(held, decision, topic)
        try:
            # Shielded: the message is acknowledged, so this dead letter is all that is left of it.
            with anyio.fail_after(context.options.publish_timeout, shield=True):
                await context.backend.publish(output.stream, output.message)
        except Exception as error:
            self.dispatch.report("publish", error, held, "the dead letter of a message acknowledged on receipt is lost")
            tell_unsettled(context, held, result)
            return
        self._rejected_is_kept(held, result)

    def _rejected_is_kept(self, held: Held, result: Result) -> None:
        self._context.counters.dead_lettered += 1
        tell_fate(self._context, held, result)
        self.dispatch.tell_dead_lettered(held)

    def _decide(self, held: Held, result: Result) -> Decision:
        return decide(
            result,
            attempt=held.attempt,
            deliveries=held.deliveries,
            policy=self._context.policy,
            now=self._context.clock(),
            draw=random.random(),
            expires_in=self._judgement.expires_in(held.message, self._published_at(held)),
        )

    def apply(self, held: Held, result: Result, *, raw: Mapping[str, bytes] | None = None) -> None:
        """Do what the table decides. ``raw``: the fields of a malformed entry, kept beside its dead letter."""
        if held.key is KeyState.COMPLETED and result.outcome not in (Outcome.RETURNED, Outcome.CRASHED):
            self.ack(held)  # the handler's transaction is committed: whatever came afterwards, it has been handled
            return
        result = self._judgement.weigh(result, held.message, held.attempt, partial(self._complain, held))
        decision = self._decide(held, result)
        if isinstance(decision, Ack):
            self.ack(held, MISSING if result.outcome is Outcome.MISSING else ACKED)
        elif isinstance(decision, Release):
            self.release(held)
        elif isinstance(decision, DeadLetter):
            self._give_up(held, result, decision, raw)
        elif isinstance(decision, RetryAt):
            self._retry(held, result, decision)
        elif isinstance(decision, Leave):
            held.stage = Stage.RETURNED
        elif isinstance(decision, LetGo):
            held.lost = True
            self._context.ledger.note_crashed(held)
            self._context.ledger.remove(held)
        else:
            assert isinstance(decision, Report)

    def expire(self, held: Held) -> bool:
        """Give up on an entry that is too old to be handled. False: it is not."""
        result = self._judgement.expired(held.message, self._published_at(held))
        if result is not None:
            self.apply(held, result)
        return result is not None

    def turn_away(self, held: Held) -> bool:
        """Give up on an entry that is too old, too large, or not what is expected. False: it may be handled."""
        if self.expire(held):
            return True
        result = self._context.expectations.objection(held.message, partial(self._complain, held))
        if result is not None:
            self.apply(held, result)
        return result is not None

    def _give_up(self, held: Held, result: Result, decision: DeadLetter, raw: Mapping[str, bytes] | None) -> None:
        topic = None if decision.dropped else self._context.dead_letter_topic
        if topic is None:
            self.dispatch.settle(held, DROPPED, (), result, decision)
            return
        output = self._dead_letter(held, decision, topic)
        if raw is not None and self._can_keep_raw:
            output = Output(output.stream, output.message, raw=raw)
        self.dispatch.settle(held, DEAD_LETTERED, (output,), result, decision)

    def _retry(self, held: Held, result: Result, decision: RetryAt) -> None:
        counted = result.outcome is not Outcome.RELEASED
        intent = RETRIED if counted else RELEASED
        if not self._can_delay:
            # A new record waits here until it is due: the old delivery is settled.
            again = held.again(decision.attempt, Stage.PARKED)
            again.key = held.key  # the claim is kept while it waits here
            held.settle(intent, (), result, decision)
            self.dispatch.done(held, sure=False)
            self._context.ledger.add(again)
            self._postponed.put(decision.due, again)
            return
        copy = retry_copy(
            held.message,
            failures=decision.attempt - 1,
            reason=decision.reason if counted else None,
            first_id=self._first_id(held),
            published_at=self._published_at(held),
        )
        output = Output(self._context.retry_stream, copy, decision.delay)
        self.dispatch.settle(held, intent, (output,), result, decision)

    def _complain(self, held: Held, error: BaseException, detail: str) -> None:
        self._context.reporter.error("handler", error, detail=detail, about=held)

    def _published_at(self, held: Held) -> datetime | None:
        """When the original entry was stored, by the server's clock."""
        published_at = held.published_at
        if held.stream != self._context.topic:
            published_at = first_published(held.message.headers) or published_at
        if published_at is None and self._context.failure_policy.max_age is not None:
            name = type(self._context.backend).__name__
            self._context.notices.once(f"{name} does not say when it stored an entry: max_age has no effect")
        return published_at

    def _first_id(self, held: Held) -> str:
        return original_id(held.message, held.stream, held.id)

    def _dead_letter(self, held: Held, decision: DeadLetter, topic: str) -> Output:
        context = self._context
        unhandled = held.stage in (Stage.PARKED, Stage.WAITING)
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
            at=now(),
        )
        return Output(topic, message)
