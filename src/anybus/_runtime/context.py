"""What the parts of a subscription share: names, limits, counters and the ledger."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import anyio

from .._failure.copies import retry_stream
from .._failure.expectations import Expectations
from .._failure.policies import CircuitBreaker, FailurePolicy
from .._failure.settlement import Policy
from .._ground.home import Home
from .._options import OnLeaseLost, StreamBusOptions
from .._reporting import Notices, Reporter
from ..abc import CompletionKeeper, IdempotencyStore, StreamBackend
from .entry import Held, Stage
from .ledger import Ledger
from .retry_times import RetryTimes
from .statistics import Counters


class SuspectSlot:
    """Holds the only suspect of a bus. If there were two, a crash by one of them would count against the other."""

    def __init__(self) -> None:
        self._suspect: Held | None = None

    def take(self, held: Held) -> bool:
        """Make this entry the bus's suspect. False: another suspect is still held."""
        if self._suspect is not None and self._suspect.stage is not Stage.GONE:
            return False
        self._suspect = held
        return True


class LeaseTerm:
    """The lease that a subscription uses: its own option, until another member changes the lease of the group.

    :ivar changed: set when the lease changes, and then replaced by a new event.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.changed = anyio.Event()
        self._patience = seconds
        self._patient_until = -math.inf

    def adopt(self, seconds: float) -> None:
        self.seconds = seconds
        changed, self.changed = self.changed, anyio.Event()
        changed.set()

    def be_patient(self, seconds: float, now: float, until: float) -> None:
        """Until then, take over only entries idle for so many seconds: other members may still use that lease."""
        if now < self._patient_until:  # changed again meanwhile: some members may use an even earlier lease
            seconds = max(seconds, self._patience)
            until = max(until, self._patient_until)
        self._patience = seconds
        self._patient_until = until

    def min_idle(self, now: float) -> float:
        return max(self.seconds, self._patience) if now < self._patient_until else self.seconds


@dataclass(frozen=True)
class ExactlyOnce:
    """What a subscription with exactly-once effects works with.

    :ivar keeper: the backend, if the store is its own: completions are stored in the step of the acknowledgement.
    :ivar window: for how many seconds a completed key is remembered.
    """

    store: IdempotencyStore
    keeper: CompletionKeeper | None
    window: float


@dataclass(frozen=True)
class Context:
    """Fixed for the life of a subscription. ``clock`` is AnyIO's, in seconds."""

    backend: StreamBackend
    topic: str
    group: str
    consumer: str
    policy: Policy
    failure_policy: FailurePolicy
    expectations: Expectations
    circuit: CircuitBreaker | None
    options: StreamBusOptions
    group_start_id: str
    max_in_flight: int
    dead_letter_topic: str | None
    handler_timeout: float | None
    on_lease_lost: OnLeaseLost
    wait_if_full: bool
    reporter: Reporter
    notices: Notices
    suspects: SuspectSlot
    ledger: Ledger
    counters: Counters
    clock: Callable[[], float]
    term: LeaseTerm
    retry_times: RetryTimes
    home: Home
    once: ExactlyOnce | None

    @cached_property
    def retry_stream(self) -> str:
        return retry_stream(self.topic, self.group)

    @property
    def lease(self) -> float:
        return self.term.seconds

    @property
    def min_idle(self) -> float:
        """For how many seconds an entry must have been idle before it is taken over."""
        return self.term.min_idle(self.clock())

    @cached_property
    def streams(self) -> tuple[str, str]:
        return self.topic, self.retry_stream
