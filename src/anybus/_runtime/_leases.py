"""Leases: what is held is renewed every third of a lease, and what was lost all the same is noticed."""

from __future__ import annotations

import math
import random

import anyio

from .._backoff import recovery_delay
from .._cancellation import as_failure
from .._errors import LeaseLostError, UnsupportedError, can_pass
from ._context import Context
from ._fate import tell_let_go, tell_lost
from ._ledger import Held, Stage
from ._settler import Settler

_RENEWED = (Stage.WAITING, Stage.OPEN, Stage.SETTLING)


class Leases:
    """The renewal task, and what it knows of the process having been frozen."""

    def __init__(self, context: Context, settler: Settler) -> None:
        self._context = context
        self._settler = settler
        self._can_renew = "renew" in context.backend.features
        self._beat = context.clock()
        self._thawed_at = -math.inf
        if not self._can_renew:
            context.notices.once(
                f"{type(context.backend).__name__} cannot renew leases: a message that waits and is handled for longer "
                f"than claim_idle_timeout ({context.lease} s) in all is delivered again, perhaps elsewhere"
            )

    def lease_from(self, began: float, now: float) -> float:
        """Until when the lease of what was taken just now, by a call that began then, lasts.

        A frozen process (or a link that was dead) may wake with entries in its hands that the server gave it long
        ago. They count as expired then: they are handed back instead of started, if they are still ours.
        """
        frozen = now - self._beat >= self._context.lease or began < self._thawed_at
        return now if frozen else now + self._context.lease

    async def run(self) -> None:
        failures = 0
        self._beat = self._context.clock()
        while True:
            pause = self._context.lease / 3
            await anyio.sleep(pause if not failures else min(pause, recovery_delay(failures, random.random())))
            now = self._context.clock()
            if now - self._beat >= self._context.lease:
                self._thawed_at = now
            self._beat = now
            renewed = True
            if self._can_renew:
                for stream in self._context.streams:
                    renewed = await self._renew(stream) and renewed
            failures = 0 if renewed else failures + 1
            self._look_for_expired()

    async def _renew(self, stream: str) -> bool:
        context = self._context
        held = [entry for entry in context.ledger.tables[stream].values() if entry.stage in _RENEWED]
        if not held:
            return True
        started = context.clock()
        owned: set[str] = set()
        try:
            with anyio.move_on_after(context.lease / 3) as scope:
                owned = set(
                    await context.backend.renew(stream, context.group, context.consumer, [entry.id for entry in held])
                )
            if scope.cancelled_caught:
                raise TimeoutError(f"no answer within a third of the lease ({context.lease / 3:.3g} s)")
        except BaseException as raised:  # noqa: ASYNC103 - raised again in there
            error = as_failure(raised)
            context.reporter.error("renew", error, detail=f"renewing {len(held)} leases of {stream!r}", part="renew")
            if not can_pass(error):
                raise error from None  # noqa: ASYNC104
            return False  # noqa: ASYNC104
        if context.reporter.failing:
            context.reporter.works("renew")
        for entry in held:
            if entry.id in owned:
                entry.lease_until = started + context.lease
                entry.lost = False
            elif entry.stage in (Stage.WAITING, Stage.OPEN):
                # What is being settled meanwhile may rightly be missing; its settlement gets the server's own answer.
                self._lose(entry, "the server says that it is no longer ours")
        return True

    def _lose(self, entry: Held, why: str) -> None:
        context = self._context
        if not entry.lost:
            entry.lost = True
            context.counters.leases_lost += 1
            tell_lost(context, entry, "renew", why)
        if entry.stage is Stage.WAITING:
            context.ledger.remove(entry)
        elif entry.scope is not None and context.on_lease_lost == "cancel":
            entry.scope.cancel()

    def _look_for_expired(self) -> None:
        now = self._context.clock()
        for entry in self._context.ledger.all():
            if entry.lease_until > now:
                continue
            if entry.stage is Stage.RETURNED:
                # Nobody settled it in time: let go without an outcome, and the server's count says so.
                entry.lost = True
                tell_let_go(self._context, entry)
                self._context.ledger.remove(entry)
            elif entry.stage is Stage.WAITING and (self._can_renew or not entry.parked):
                self._settler.release(entry)
            elif entry.stage is Stage.OPEN and not entry.lost:
                self._lose(entry, "it could not be renewed for a whole lease")

    async def extend(self, entry: Held) -> None:
        """Renew one entry now.

        :raises LeaseLostError: if it is no longer ours.
        :raises UnsupportedError: if the backend cannot renew.
        """
        context = self._context
        if not self._can_renew:
            raise UnsupportedError(f"{type(context.backend).__name__} cannot renew leases")
        started = context.clock()
        owned = await context.backend.renew(entry.stream, context.group, context.consumer, [entry.id])
        if entry.id not in owned:
            if entry.stage in (Stage.OPEN, Stage.RETURNED):
                self._lose(entry, "the server says that it is no longer ours")
            raise LeaseLostError(f"entry {entry.id} of {entry.stream!r} is no longer ours")
        entry.lease_until = started + context.lease
        entry.lost = False
