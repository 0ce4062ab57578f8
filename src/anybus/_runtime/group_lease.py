"""One lease for a group: a member agrees on it when it starts, and watches it while it runs."""

from __future__ import annotations

from typing import Final

from .._ground.errors import EventBusError, ValidationError, can_pass
from ..abc import LeaseKeeper
from ..abc._backend import SIGN_INTERVAL
from .context import Context
from .leases import Leases

_DOCS: Final = "docs/promises.md, 'One lease for a group'"


class GroupLease:
    """This member's part in the agreement. If the backend keeps no leases, it does nothing."""

    def __init__(self, context: Context, leases: Leases) -> None:
        self._context = context
        self._leases = leases
        backend = context.backend
        self._keeper = backend if isinstance(backend, LeaseKeeper) else None
        self._before: float | None = None
        self.may_be_member = False
        """Whether the server may know this member already."""

    async def agree(self) -> None:
        """Agree on the lease. Raises ``ValidationError`` if running members have another, unless it may be changed."""
        context = self._context
        if self._keeper is None:
            return
        self.may_be_member = True
        lease, change = context.lease, context.options.change_lease
        running = await self._keeper.agree_lease(context.topic, context.group, context.consumer, lease)
        if running != lease and not change:
            self.may_be_member = False
            raise ValidationError(
                f"claim_idle_timeout must be that of the group's running members, {running:g} s for {context.group!r} "
                f"on {context.topic!r}, not {lease:g} s: stop them first, or change it for all of them with "
                f"StreamBusOptions(change_lease=True) ({_DOCS})"
            )
        if running != lease:
            # Kept here: if a reply is lost, the server no longer tells the previous lease.
            self._before = running
            args = context.topic, context.group, context.consumer, lease
            self._before = max(running, await self._keeper.agree_lease(*args, change=True))
        if self._before is not None:
            self._be_patient(self._before)

    def _be_patient(self, before: float) -> None:
        """Give the others time to notice: they look three times, and renew by the previous lease until then."""
        now = self._context.clock()
        self._context.term.be_patient(before, now, now + min(before, 3 * SIGN_INTERVAL))

    async def run(self) -> None:
        """Tell the others that this member runs, and notice if another member changes the lease of the group."""
        while self._keeper is not None:
            await self._watch(self._keeper)

    async def _watch(self, keeper: LeaseKeeper) -> None:
        context = self._context
        used = context.lease
        try:
            kept = await keeper.until_lease_changes(context.topic, context.group, context.consumer, used)
        except Exception as error:
            if isinstance(error, EventBusError) or can_pass(error):
                return  # reads and reclaim passes meet the same error, and report it
            raise
        if kept == context.lease:
            return
        own = context.options.claim_idle_timeout
        changed = ValidationError(
            f"another member has changed the lease of group {context.group!r} to {kept:g} s; claim_idle_timeout is "
            f"{own:g} s here, and is refused when this member starts again ({_DOCS})"
        )
        context.reporter.error("renew", changed, detail=f"the lease is {kept:g} s from now on, not {context.lease:g} s")
        self._be_patient(context.lease)
        self._leases.adopt(kept)
