"""The circuit: pauses a subscription for a while if its handler fails again and again without one success.

While the circuit is closed, it counts failures in a row. After enough of them it opens: nothing is taken for a while,
and waiting entries are released. Then it is on trial: one handling begins at a time. A success closes the circuit, a
failure opens it again.
"""

from __future__ import annotations

import contextlib
import enum

import anyio
from anyio.streams.memory import MemoryObjectSendStream

from .._failure.policies import CircuitBreaker
from .._failure.settlement import Outcome
from .budget import Trial
from .context import Context
from .entry import Held
from .intake import CIRCUIT, Intake

_FAILURES = frozenset({Outcome.FAILED, Outcome.TIMED_OUT, Outcome.RETRY})


class State(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    ON_TRIAL = "on trial"


class Circuit:
    """The circuit of one subscription, in memory. It counts failures, and pauses the intake.

    :param ready: the channel to the handlers' workers: an empty batch tells them that they may go on.
    """

    def __init__(
        self, breaker: CircuitBreaker, context: Context, intake: Intake, ready: MemoryObjectSendStream[list[Held]]
    ) -> None:
        self._breaker = breaker
        self._context = context
        self._intake = intake
        self._ready = ready
        self._state = State.CLOSED
        self._in_a_row = 0
        self._recovered = False
        self._stopped = False
        self._opened_at = 0.0
        self._tripped = anyio.Event()

    def saw(self, outcome: Outcome) -> None:
        """A handling has ended. Rejections (the message is at fault), releases and cancellations do not count."""
        if outcome is Outcome.RETURNED:
            self._succeeded()
        elif outcome in _FAILURES:
            self._failed()

    def stop(self) -> None:
        """The subscription ends: the circuit pauses nothing from now on."""
        self._stopped = True
        self._ready.close()

    def _wake(self) -> None:
        """Send an empty batch, which makes a worker look at the waiting entries again."""
        with contextlib.suppress(anyio.WouldBlock, anyio.ClosedResourceError):
            self._ready.send_nowait([])

    def _succeeded(self) -> None:
        self._in_a_row = 0
        self._recovered = True
        if self._state is State.ON_TRIAL:
            self._context.ledger.budget.set_trial(None)
            self._context.ledger.changed()
            self._wake()
            self._close()

    def _failed(self) -> None:
        self._in_a_row += 1
        self._recovered = False
        if self._stopped or self._state is State.OPEN:
            return
        if self._state is State.ON_TRIAL:
            self._context.ledger.budget.set_trial(None)
            self._trip("a failure on trial")
        elif self._in_a_row >= self._breaker.failures:
            self._trip(f"{self._in_a_row} failures in a row")

    def _trip(self, why: str) -> None:
        context = self._context
        self._state = State.OPEN
        self._opened_at = context.clock()
        context.counters.circuit_opened += 1
        self._intake.shut(CIRCUIT)
        self._tripped.set()
        detail = f"{why}: nothing is taken for {self._breaker.pause} s"
        context.reporter.notice("on_circuit_opened", "circuit-opened", detail)

    def _close(self) -> None:
        self._state = State.CLOSED
        self._context.reporter.notice("on_circuit_closed", "circuit-closed", "a handling has succeeded")

    async def run(self) -> None:
        """End each pause when its time is over."""
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
                context.ledger.budget.set_trial(Trial(context.ledger.all, self._wake))
            self._intake.open(CIRCUIT)
