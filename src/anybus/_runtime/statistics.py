"""The statistics of a subscription."""

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
    expired: int = 0
    released: int = 0
    reclaimed: int = 0
    leases_lost: int = 0
    circuit_opened: int = 0
    lost: int = 0
    duplicates: int = 0


@dataclass(frozen=True, kw_only=True)
class SubscriptionStatistics:
    """Gauges as of now, and counts since the subscription started.

    :ivar waiting: entries that were taken and wait for a handler.
    :ivar in_flight: entries in a handler now (with ``deliveries()``: received and not settled).
    :ivar held: all pending entries of this subscription: waiting, in flight, returned unsettled, or being settled.
    :ivar oldest_in_flight: for how many seconds the oldest entry has been in flight; None if there is none.
    :ivar received: entries taken, by reading or reclaiming.
    :ivar handled: messages acknowledged (with ``auto-on-receive``: messages whose handler returned).
    :ivar failed: handlings that failed, including retries and rejections that a handler asked for.
    :ivar retried: retries that were stored.
    :ivar dead_lettered: messages given up on, including dropped ones.
    :ivar expired: those of them that were given up on because they were too old.
    :ivar released: entries that were released, uncounted.
    :ivar reclaimed: entries taken over because their lease had ended, or because they had been released.
    :ivar leases_lost: entries that this subscription held and that no longer belong to it.
    :ivar circuit_opened: how often the circuit has paused the subscription.
    :ivar lost: how many entries of the topic were removed by its :class:`Limits` before the group had acknowledged
        them: in all, not only since the subscription started. The server counts them, and this lags by some seconds.
    :ivar duplicates: messages acknowledged unhandled, because their key was handled before (exactly-once).
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
    expired: int
    released: int
    reclaimed: int
    leases_lost: int
    circuit_opened: int
    lost: int
    duplicates: int
