"""The circuit: a handler that fails again and again without one success pauses its subscription for a while.

Closed, failures in a row are counted. Enough of them open it: nothing is taken for a while, and what waits is handed
back. After that it is on trial: one handling begins at a time, until one succeeds, which closes it, or fails, which
opens it again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

import anyio

from .._failure.policies import CircuitBreaker
from .._failure.settlement import RETURNED, Outcome, Result
from ..abc import Output
from .context import Context
from .ledger import Held, Stage, Trial
from .settler import Settler

_FAILURES = frozenset({Outcome.FAILED, Outcome.TIMED_OUT, Outcome.RETRY})


class State(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    ON_TRIAL = "on trial"


class Circuit:
    """Counts, and says when to pause. Of one subscription, in memory.

    :param shut: take nothing more, and hand back what waits.
    :param reopen: take messages again.
    :param wake: what waits may begin again.
    """

    def __init__(
        self,
        breaker: CircuitBreaker,
        context: Context,
        shut: Callable[[], None],
        reopen: Callable[[], None],
        wake: Callable[[], None],
    ) -> None:
        self._breaker = breaker
        self._context = context
        self._state = State.CLOSED
        self._in_a_row = 0
        self._recovered = False
        self._stopped = False
        self._opened_at = 0.0
        self._tripped = anyio.Event()
        self._shut = shut
        self._reopen = reopen
        self._wake = wake

    def saw(self, outcome: Outcome) -> None:
        """A handling has ended. A rejection speaks of its message, a release or a cancellation of nothing."""
        if outcome is Outcome.RETURNED:
            self._succeeded()
        elif outcome in _FAILURES:
            self._failed()

    def stop(self) -> None:
        """The subscription ends: nothing is to be paused any more."""
        self._stopped = True

    def _succeeded(self) -> None:
        self._in_a_row = 0
        self._recovered = True
        if self._state is State.ON_TRIAL:
            self._context.ledger.budget.trial = None
            self._context.ledger.changed()
            self._wake()
            self._close()

    def _failed(self) -> None:
        self._in_a_row += 1
        self._recovered = False
        if self._stopped or self._state is State.OPEN:
            return
        if self._state is State.ON_TRIAL:
            self._context.ledger.budget.trial = None
            self._trip("a failure on trial")
        elif self._in_a_row >= self._breaker.failures:
            self._trip(f"{self._in_a_row} failures in a row")

    def _trip(self, why: str) -> None:
        context = self._context
        self._state = State.OPEN
        self._opened_at = context.clock()
        context.counters.circuit_opened += 1
        self._shut()
        self._tripped.set()
        detail = f"{why}: nothing is taken for {self._breaker.pause} s"
        context.reporter.notice("on_circuit_opened", "circuit-opened", detail)

    def _close(self) -> None:
        self._state = State.CLOSED
        self._context.reporter.notice("on_circuit_closed", "circuit-closed", "a handling has succeeded")

    async def run(self) -> None:
        """End the pauses."""
        context = self._context
        while True:
            if self._state is not State.OPEN:
                self._tripped = anyio.Event()
                await self._tripped.wait()
            await anyio.sleep(max(0.0, self._opened_at + self._breaker.pause - context.clock()))
            if self._recovered:
                self._in_a_row = 0
                self._close()
            else:
                self._state = State.ON_TRIAL
                context.ledger.budget.trial = Trial(context.ledger)
            self._reopen()


class WatchedSettler(Settler):
    """A settler that tells the circuit how handlings end."""

    def __init__(self, context: Context, circuit: Circuit) -> None:
        super().__init__(context)
        self._circuit = circuit
        self.watch = circuit.saw

    def conclude(self, held: Held, result: Result) -> None:
        unsettled = held.stage is Stage.OPEN
        super().conclude(held, result)
        if unsettled and (result is not RETURNED or self._acks_returned):
            self._circuit.saw(result.outcome)

    async def settle(self, held: Held, result: Result | None, outputs: Sequence[Output] = ()) -> None:
        await super().settle(held, result, outputs)
        self._circuit.saw(Outcome.RETURNED if result is None else result.outcome)
