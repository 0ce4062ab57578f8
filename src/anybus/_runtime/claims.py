"""Exactly-once effects before and during a handling: an entry's key is claimed before its handler starts."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio

from .._failure.backoff import recovery_delay
from .._failure.settlement import Outcome, Result
from .._ground.cancellation import as_failure
from .._ground.errors import AlreadySettledError, EventBusError, LeaseLostError, UnsupportedError, can_pass
from ..abc import Claim, TransactionalStore
from .context import Context, ExactlyOnce
from .entry import DUPLICATE, Held, KeyState, Stage
from .lane import Lane
from .once import key_of
from .settler import Settler

_SHORTEST, _LONGEST = 0.02, 1.0
"""After how many seconds a message whose key is claimed comes back. (The other handling may end long before its claim
does.)
"""


class _Question:
    """A claim that waits for the store's answer."""

    __slots__ = ("answer", "done", "error")

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.answer: Claim | None = None
        self.error: Exception | None = None

    def reply(self, answer: Claim) -> None:
        self.answer = answer


class Claims:
    """Claims keys, renews the claims, and opens the transactions of handlers.

    If the store is the backend's own, claims that are made while others are under way are sent together.
    """

    def __init__(self, context: Context, settler: Settler, once: ExactlyOnce) -> None:
        self._context = context
        self._settler = settler
        self._once = once
        self._questions: dict[Held, _Question] = {}
        self._lane = Lane(self._ask_together, context.clock)

    async def run(self) -> None:
        """Send the claims that workers ask for."""
        await self._lane.run()

    def close(self) -> None:
        self._lane.close()

    async def admit(self, held: Held) -> bool:
        """Claim the key of an open entry. False: its handler must not start, and the entry is being settled."""
        try:
            claim = await self._claim(held)
        except anyio.get_cancelled_exc_class():
            if held.stage is Stage.OPEN:
                held.key = KeyState.CLAIMED  # perhaps
                self._settler.release(held)
            raise
        except Exception:
            # It ends the subscription, or comes out of ``receive()``, whose caller has no delivery to settle.
            if held.stage is Stage.OPEN:
                self._settler.release(held)
            raise
        if held.stage is not Stage.OPEN:
            return False
        if claim is not None and claim.state == "completed":
            self._settler.ack(held, DUPLICATE)
            return False
        if claim is not None and claim.state == "busy":
            wait = min(max(claim.wait, _SHORTEST), _LONGEST)
            reason = "another message with the same idempotency key is being handled"
            self._settler.apply(held, Result(Outcome.RELEASED, reason, delay=wait))
            return False
        held.key = KeyState.CLAIMED
        if claim is None or held.lost or self._context.clock() >= held.lease_until:
            self._settler.give_back(held)
            return False
        held.started_at = self._context.clock()
        return True

    async def _claim(self, held: Held) -> Claim | None:
        """The store's answer. None: there was none for as long as we had the lease."""
        context, failures = self._context, 0
        while True:
            try:
                return await self._ask(held)
            except Exception as error:
                if not can_pass(error):
                    raise
                failures += 1
                context.reporter.error("claim", error, detail="its key is not claimed yet", about=held, times=failures)
            if held.lost or context.clock() >= held.lease_until:
                return None
            await anyio.sleep(recovery_delay(failures, random.random()))

    async def _ask(self, held: Held) -> Claim:
        context = self._context
        if self._once.keeper is None:
            return await self._once.store.claim(
                *(context.topic, context.group, key_of(held), context.consumer),
                entry=self._entry(held),
                lease=context.lease,
            )
        self._questions[held] = question = _Question()
        self._lane.put(held)
        try:
            await question.done.wait()
        finally:
            self._questions.pop(held, None)
        if question.answer is None:
            raise question.error or TimeoutError("the claim was not answered")
        return question.answer

    async def _ask_together(self, batch: list[Held]) -> None:
        context, keeper = self._context, self._once.keeper
        assert keeper is not None
        # Whoever was cancelled meanwhile is not waiting any more.
        asked = [(held, question) for held in batch if (question := self._questions.get(held)) is not None]
        if not asked:
            return
        items = [(key_of(held), self._entry(held)) for held, _ in asked]
        try:
            answers = await keeper.claim_keys(
                context.topic, context.group, context.consumer, items, lease=context.lease
            )
            for (_, question), answer in zip(asked, answers, strict=True):
                question.reply(answer)
        except BaseException as raised:  # noqa: ASYNC103 - raised again in there
            error = as_failure(raised)
            for _, question in asked:
                question.error = error
        finally:
            for _, question in asked:
                question.done.set()

    def _entry(self, held: Held) -> str:
        return held.id if held.stream == self._context.topic else f"retry {held.id}"

    async def keep_renewing(self) -> None:
        """Renew the claims of all entries whose leases are renewed.

        The leases do not wait for this, because a store may block for longer than a lease.
        """
        failures = 0
        while True:
            pause = self._context.lease / 3
            changed = self._context.term.changed
            with anyio.move_on_after(pause if not failures else min(pause, recovery_delay(failures, random.random()))):
                await changed.wait()
            renewed = await self._renew(
                [
                    held
                    for held in self._context.ledger.all()
                    if held.key is KeyState.CLAIMED and held.stage is not Stage.RETURNED
                ]
            )
            failures = 0 if renewed else failures + 1

    async def extend(self, held: Held) -> None:
        if held.key is KeyState.CLAIMED:
            await self._renew([held])

    async def _renew(self, entries: list[Held]) -> bool:
        context, once = self._context, self._once
        if not entries:
            return True
        keys = [key_of(held) for held in entries]
        try:
            with anyio.move_on_after(context.lease / 3) as scope:
                await once.store.renew(context.topic, context.group, keys, context.consumer, lease=context.lease)
            if scope.cancelled_caught:
                raise TimeoutError(f"no answer within a third of the lease ({context.lease / 3:.3g} s)")
        except BaseException as raised:  # noqa: ASYNC103 - raised again in there
            error = as_failure(raised)
            context.reporter.error("renew", error, detail=f"renewing {len(keys)} claims", part="renew of claims")
            return False  # noqa: ASYNC104
        if context.reporter.failing:
            context.reporter.works("renew of claims")
        return True

    @asynccontextmanager
    async def transaction(self, held: Held, connection: object) -> AsyncGenerator[None, None]:
        """See ``Delivery.transaction``."""
        context, store = self._context, self._once.store
        if not isinstance(store, TransactionalStore):
            raise UnsupportedError(f"{type(store).__name__} cannot take part in a transaction: use a SqlStore")
        if held.stage is not Stage.OPEN and held.stage is not Stage.RETURNED:
            error = LeaseLostError if held.lost else AlreadySettledError
            raise error(f"entry {held.id} of {held.stream!r} cannot be handled any more")
        if held.key is not KeyState.CLAIMED:
            state = "has a transaction already" if held.key is not KeyState.UNKNOWN else "is not claimed"
            raise EventBusError(f"the key of entry {held.id} {state}: a delivery has one transaction at a time")
        held.key = KeyState.IN_TRANSACTION
        committed = False
        try:
            async with store.transaction(
                *(context.topic, context.group, key_of(held), context.consumer),
                entry=self._entry(held),
                window=self._once.window,
                connection=connection,
            ):
                yield
            committed = True
        finally:
            held.key = KeyState.COMPLETED if committed else KeyState.CLAIMED
