"""Leases: renews the leases of held entries every third of a lease, and notices leases that were lost even so.

A lease counts from when the call was sent that took or renewed the entry. After a freeze or a late reply, it may be
over already. Then an entry that has not started is released, if it is still ours.
"""

from __future__ import annotations

import random

import anyio

from .._failure.backoff import recovery_delay
from .._ground.cancellation import as_failure
from .._ground.errors import GroupLostError, LeaseLostError, UnsupportedError, can_pass
from .claims import Claims
from .context import Context
from .entry import Held, Stage
from .fate import tell_let_go, tell_lost
from .settler import Settler

_UNSTARTED = (Stage.PARKED, Stage.WAITING)
_RENEWED = (*_UNSTARTED, Stage.OPEN, Stage.SETTLING)


class Leases:
    """The renewal task.

    :param claims: with exactly-once effects, extended with a lease.
    """

    def __init__(self, context: Context, settler: Settler, claims: Claims | None) -> None:
        self._context = context
        self._settler = settler
        self._claims = claims
        self._can_renew = "renew" in context.backend.features

    def adopt(self, lease: float) -> None:
        """The lease of the group was changed: use the new one, and renew all held entries at once."""
        context = self._context
        context.term.adopt(lease)
        until = context.clock() + lease
        for entry in context.ledger.all():
            entry.lease_until = min(entry.lease_until, until)

    async def run(self) -> None:
        failures = 0
        while True:
            pause = self._context.lease / 3
            changed = self._context.term.changed
            with anyio.move_on_after(pause if not failures else min(pause, recovery_delay(failures, random.random()))):
                await changed.wait()
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
            if isinstance(error, GroupLostError):
                context.ledger.group_was_lost(stream)
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
            elif entry.stage is Stage.OPEN or entry.stage in _UNSTARTED:
                # An entry that is being settled may rightly be missing. Its settlement gets the server's own answer.
                context.ledger.note_vanished(entry, context.clock())
                self._lose(entry, "the server says that it is no longer ours")
        return True

    def _lose(self, entry: Held, why: str) -> None:
        context = self._context
        if not entry.lost:
            entry.lost = True
            context.counters.leases_lost += 1
            tell_lost(context, entry, "renew", why)
        if entry.stage in _UNSTARTED:
            context.ledger.note_doubt(entry.stream, (entry.id,))
            context.ledger.remove(entry)
        elif entry.scope is not None and context.on_lease_lost == "cancel":
            entry.scope.cancel()

    def _look_for_expired(self) -> None:
        now = self._context.clock()
        for entry in self._context.ledger.all():
            if entry.lease_until > now:
                continue
            if entry.stage is Stage.RETURNED:
                # Nobody settled it in time. It is abandoned without an outcome, and the server counts the delivery.
                entry.lost = True
                tell_let_go(self._context, entry)
                self._context.ledger.remove(entry)
            elif entry.stage is Stage.WAITING or (entry.stage is Stage.PARKED and self._can_renew):
                self._settler.release(entry)
            elif entry.stage is Stage.OPEN and not entry.lost:
                self._lose(entry, "it could not be renewed for a whole lease")

    async def extend(self, entry: Held) -> None:
        """Renew one entry now. Raises ``LeaseLostError`` or ``UnsupportedError``, as ``Delivery.extend`` says."""
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
        if self._claims is not None:
            await self._claims.extend(entry)
