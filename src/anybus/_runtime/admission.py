"""Admission: decides whether an entry that was taken may start. If not, it settles the entry, or parks it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import anyio

from .._failure.copies import failed_attempts, undecodable
from .._failure.settlement import SUSPECT_AFTER, Outcome, Result, Verdict, on_taken
from .._ground.clock import now
from .._ground.errors import BackendError, SerializationError
from .._messages.message import Message
from ..abc import ClaimedMessage, FetchedEntry, MalformedEntry, MissingEntry
from ..abc._observer import ErrorScope
from .context import Context
from .entry import Held, Stage
from .fate import tell_let_go, tell_lost, tell_suspect
from .ledger import Taking
from .settler import Settler

_NOTHING: set[str] = set()


def _are_plain(entries: Sequence[FetchedEntry], max_payload_bytes: int) -> bool:
    """Whether all of them are messages that may start without a closer look at each."""
    for entry in entries:
        if type(entry) is not ClaimedMessage or (entry.deliveries or 0) > SUSPECT_AFTER:
            return False
        message = entry.message
        if message.expires_at is not None or len(message.payload) > max_payload_bytes:
            return False
    return True


class Admission:
    """Enters the entries that were taken into the ledger, and decides which of them may start."""

    def __init__(self, context: Context, settler: Settler) -> None:
        self._context = context
        self._settler = settler
        self._ledger = context.ledger
        self._can_release = "release" in context.backend.features
        self._keeps_raw = "raw" in context.backend.features
        self._looks_closer = context.failure_policy.max_age is not None or context.expectations.names_any
        self._max_payload_bytes = context.expectations.max_payload_bytes
        self._no_suspect_before = -math.inf

    def no_suspect_for(self, seconds: float) -> None:
        """Accept no suspect for so long. The last one could not be handled alone, because other entries were held."""
        self._no_suspect_before = self._context.clock() + seconds

    def enter(
        self,
        taking: Taking,
        stream: str,
        entries: Sequence[FetchedEntry],
        *,
        by_reclaim: bool,
        searched: bool,
        shut: bool,
    ) -> tuple[list[Held], Held | None]:
        """Enter what one call brought. Returns the entries that may start, and the suspect to be handled alone, if any.

        :param searched: true if the entries may include some that are held here already.
        :param shut: true if nothing may start.
        """
        context, ledger = self._context, self._ledger
        if ledger.vanished and ledger.was_recreated(stream, entries, context.clock()):
            ledger.group_was_lost(stream)
        settled = taking.settled.get(stream)
        if settled:  # settled after this reply was sent, unless it comes from a recreated group (then acked again)
            entries = [entry for entry in entries if entry.id not in settled or ledger.comes_again(stream, entry)]
        if not entries:
            return [], None
        table = ledger.tables[stream]
        at, until = now(), taking.began + context.lease
        is_retry = stream != context.topic
        doubtful = taking.doubtful.get(stream, _NOTHING) if self._can_release else _NOTHING
        plain = not (doubtful or is_retry or self._looks_closer or shut or ledger.remembers(stream))
        ids = {entry.id for entry in entries}
        plain = plain and len(ids) == len(entries) and table.keys().isdisjoint(ids)
        if plain and _are_plain(entries, self._max_payload_bytes):
            # Nearly every batch: first handlings, nothing unusual. A shortcut that does the same as below.
            batch = [
                Held(stream, entry.id, entry.message, 1, entry.deliveries, entry.published_at, at, until, by_reclaim)
                for entry in cast("Sequence[ClaimedMessage]", entries)
            ]
            ledger.add_new(stream, batch, by_reclaim=by_reclaim)
            context.counters.received += len(batch)
            if context.reporter.hears_received:
                self._tell(batch, ())
            return batch, None
        suspect: Held | None = None
        taken: list[Held] = []
        startable: list[Held] = []
        refused: list[tuple[Held, MalformedEntry | MissingEntry]] = []
        for entry in entries:
            known = table.get(entry.id)
            if known is not None and self._stays(known, entry, until, by_reclaim=by_reclaim, searched=searched):
                continue
            message = self._message_of(entry)
            attempt = 1 + failed_attempts(message.headers) if is_retry else ledger.recall_attempt(stream, entry.id)
            deliveries = None if isinstance(entry, MissingEntry) else entry.deliveries
            published_at = entry.published_at if isinstance(entry, ClaimedMessage) else None
            # A doubtful entry must not start. It gets no lease, so it is released if the server says that it is ours.
            lease = until if entry.id not in doubtful else context.clock()
            held = Held(stream, entry.id, message, attempt, deliveries, published_at, at, lease, by_reclaim)
            ledger.add(held)
            taken.append(held)
            settled_by = ledger.recall_handled(stream, entry)
            if settled_by is not None:
                self._settler.ack(held, settled_by)
            elif not isinstance(entry, ClaimedMessage):
                refused.append((held, entry))
                if isinstance(entry, MissingEntry):
                    self._settler.apply(held, Result(Outcome.MISSING))
                else:
                    self._settler.apply(held, Result(Outcome.MALFORMED, entry.error), raw=entry.raw)
            elif self._may_start(held, shut=shut):
                startable.append(held)
            elif held.stage is Stage.PARKED:
                suspect, shut = held, True
        context.counters.received += len(taken)
        self._tell(taken, refused)
        return startable, suspect

    def _stays(self, known: Held, entry: FetchedEntry, until: float, *, by_reclaim: bool, searched: bool) -> bool:
        """Whether an entry that is already held stays as it is, although it was delivered to us again."""
        if isinstance(entry, ClaimedMessage) and entry.message.uid != known.message.uid:
            self._give_way(known, by_reclaim=by_reclaim)
            return False
        now = self._context.clock()
        if known.stage is not Stage.RETURNED:
            # The server has just said that it is ours: its handling continues.
            known.lease_until = max(known.lease_until, until)
            known.lost = known.lost and now >= until
            known.retaken = known.stage is Stage.SETTLING
            return True
        if searched and now < known.lease_until:
            return True  # found by a search, not redelivered: it may still be settled
        known.lost = True
        tell_let_go(self._context, known)
        self._ledger.remove(known)
        return False

    def _give_way(self, known: Held, *, by_reclaim: bool) -> None:
        """The id of a held entry belongs to another message now: its server was replaced, and it is lost there.

        Its handling goes on, but settles nothing: it would settle the other message.
        """
        context = self._context
        if known.stage is Stage.SETTLING:
            self._ledger.replace(known)
            return
        known.lost = True
        context.counters.leases_lost += 1
        scope: ErrorScope = "reclaim" if by_reclaim else "read"
        tell_lost(context, known, scope, "the server has given its id to another message (after a failover)")
        self._ledger.remove(known)
        if known.scope is not None and context.on_lease_lost == "cancel":
            known.scope.cancel()

    def _message_of(self, entry: FetchedEntry) -> Message:
        if isinstance(entry, ClaimedMessage):
            return entry.message
        if isinstance(entry, MalformedEntry) and not self._keeps_raw:
            return undecodable(self._context.topic, entry.raw, keep_bytes=True)
        return undecodable(self._context.topic, {}, keep_bytes=False)

    def _may_start(self, held: Held, *, shut: bool) -> bool:
        """Whether the entry may start. If not, it is settled now, or it becomes the bus's suspect and is parked."""
        context = self._context
        verdict = on_taken(held.deliveries, context.policy)
        if verdict is Verdict.GIVE_UP:
            self._settler.apply(held, Result(Outcome.WORN_OUT))
        elif shut:
            self._settler.release(held)
        elif self._settler.turn_away(held):
            return False
        elif verdict is Verdict.HANDLE:
            return True
        elif context.clock() >= self._no_suspect_before and context.suspects.take(held):
            held.stage = Stage.PARKED
            held.gone = anyio.Event()
            tell_suspect(context, held)
        else:
            self._settler.give_back(held)
        return False

    def _tell(self, taken: Sequence[Held], refused: Sequence[tuple[Held, MalformedEntry | MissingEntry]]) -> None:
        """Call the hooks last: one that pauses or closes the subscription must find every entry in its place."""
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
                text = "the entry is pending, but its body is gone: somebody trimmed it"
                error: Exception = BackendError(text, can_pass=False)
                reporter.error(scope, error, detail="acknowledged unhandled", message_id=held.id)
            else:
                error = SerializationError(entry.error)
                reporter.error(scope, error, detail="a malformed entry becomes a dead letter", message_id=held.id)
