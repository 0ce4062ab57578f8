"""What a subscription says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """The counts of :class:`SubscriptionStatistics` while they grow."""

    received: int = 0
    handled: int = 0
    failed: int = 0
    retried: int = 0
    dead_lettered: int = 0
    released: int = 0
    reclaimed: int = 0
    leases_lost: int = 0
    circuit_opened: int = 0


@dataclass(frozen=True, kw_only=True)
class SubscriptionStatistics:
    """Gauges as of now, and counts since the subscription began.

    :ivar waiting: entries taken and not yet with a handler.
    :ivar in_flight: entries in a handler now (of ``deliveries``: delivered and not settled).
    :ivar held: entries pending and ours: waiting, in flight, returned unsettled, or being settled.
    :ivar oldest_in_flight: for how many seconds the oldest entry has been in flight; None if there is none.
    :ivar received: entries taken, by reading or reclaiming.
    :ivar handled: messages acknowledged (with ``auto-on-receive``: whose handler returned).
    :ivar failed: handlings that failed; a retry or a rejection that was asked for counts too.
    :ivar retried: retries stored.
    :ivar dead_lettered: messages given up on, dropped ones included.
    :ivar released: entries released, uncounted.
    :ivar reclaimed: entries taken over because their lease had ended, or because they had been released.
    :ivar leases_lost: entries that were held here and are no longer ours.
    :ivar circuit_opened: how often the circuit has paused the subscription.
    """

    waiting: int
    in_flight: int
    held: int
    oldest_in_flight: float | None
    received: int
    handled: int
    failed: int
    retried: int
    dead_lettered: int
    released: int
    reclaimed: int
    leases_lost: int
    circuit_opened: int
