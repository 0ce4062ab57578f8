"""The handlers' pool: as many workers as there is work for, and no more than ``max_in_flight``.

A worker takes ready entries without waiting. Before it calls the handler, it makes sure that another worker comes for
the other ready entries, or waits for the next batch. When no entry is ready, a few workers wait for more, and the
others end. So handlers that never wait are called in a plain loop, and handlers that wait run concurrently. The workers
of a fixed pool would be woken one by one for every batch. A task for every message costs more than most handlers.
"""

from __future__ import annotations

import contextvars
import logging
import math
from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from .._failure.settlement import CANCELLED, RETURNED, Outcome, Result
from .._failure.verdicts import Reject, Retry
from .._ground.cancellation import (
    cancellation_in,
    is_cancelled,
    is_crash,
    is_stray,
    persist,
    sole,
    without_cancellations,
)
from .._ground.errors import HandlerTimeoutError, words
from .._ground.log import logger
from .circuit import Circuit
from .claims import Claims
from .context import Context
from .delivery import Delivery
from .entry import Held, KeyState, Stage
from .fate import tell_handled
from .keeper import EntryKeeper
from .settler import Settler
from .taker import Taker

Handler = Callable[[Delivery], Awaitable[None]]

_STREAK = 64
_IDLE = 4
"""How many workers may wait for more. A new task costs more than waking one of them."""


class Place:
    """A worker's pool, and the entry whose handler the worker runs now."""

    __slots__ = ("held", "pool")

    def __init__(self, pool: Taker) -> None:
        self.pool = pool
        self.held: Held | None = None


handled_by: contextvars.ContextVar[frozenset[Place]] = contextvars.ContextVar("anybus_handled_by", default=frozenset())
"""The workers whose handlers run the current code, or started its task."""


class HandlerPool(Taker):
    """Calls the handler.

    :param fail: ends the subscription with an exception that is no ``Exception``.
    """

    def __init__(
        self,
        context: Context,
        settler: Settler,
        keeper: EntryKeeper,
        circuit: Circuit | None,
        claims: Claims | None,
        ready: MemoryObjectReceiveStream[list[Held]],
        again: MemoryObjectSendStream[list[Held]],
        handler: Handler,
        fail: Callable[[BaseException], None],
    ) -> None:
        super().__init__(context, settler, ready, again)
        self._keeper = keeper
        self._circuit = circuit
        self._claims = claims
        self._handler = handler
        self._fail = fail
        self._conclude = settler.conclude if circuit is None else self._conclude_watched
        self._limit = context.max_in_flight
        self._needs_scope = context.handler_timeout is not None or context.on_lease_lost == "cancel"
        self._on_receive = context.policy.ack_mode == "auto-on-receive"
        self._is_plain = not (self._on_receive or self._needs_scope or claims is not None)
        self._workers = 0
        self._pausing = 0
        self._places: set[Place] = set()
        self._tasks: TaskGroup | None = None
        self._home: contextvars.Context | None = None

    @property
    def running(self) -> set[Held]:
        return {place.held for place in self._places if place.held is not None}

    async def run(self) -> None:
        # Every worker starts in this context, whoever calls it: no handler inherits another handler's variables.
        self._home = contextvars.copy_context()
        try:
            with self.scope:
                while not self._stopped:
                    # Again, if a stray cancellation at the very end of a worker has silently ended the task group.
                    self._look_up_waiting()
                    await self._run_workers()
        finally:
            self._tasks = None
            self.ended.set()

    async def _run_workers(self) -> None:
        self._workers = self._idle = self._pausing = 0
        self._called = False
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            self._call()
            await persist(self._stopping.wait)

    def _call(self) -> None:
        """Call a worker for the ready entries: wake an idle one, or start a new one."""
        if self._called or self._stopped or self._workers >= self._limit:
            return
        if self._idle:
            self._called = True
            self._wake_one()
        elif self._tasks is not None and self._home is not None:
            self._called = True
            self._home.run(self._tasks.start_soon, self._work)

    async def _work(self) -> None:
        place = Place(self)
        handled_by.set(handled_by.get() | {place})
        clean = contextvars.copy_context()
        goes_on = True
        self._places.add(place)
        try:
            while goes_on and not self._stopped:
                self._called = False
                if self._workers < self._limit:
                    self._workers += 1
                    try:
                        goes_on = await self._work_off(place, clean)
                    finally:
                        self._workers -= 1
                goes_on = goes_on and await self._is_called_again()
        finally:
            self._places.discard(place)
        if self._backlog or not self._idle:
            self._call()

    async def _is_called_again(self) -> bool:
        """Wait for more entries, unless enough other workers already do."""
        if self._stopped or self._idle >= _IDLE:
            return False
        try:
            return await self._receive()
        except BaseException as error:  # noqa: ASYNC103 - a real cancellation goes on
            self._called = False
            if not is_stray(error):
                raise
            return False  # noqa: ASYNC104 - a stray cancellation ends only this worker

    async def _work_off(self, place: Place, clean: contextvars.Context) -> bool:
        """Handle the ready entries. False: this worker must end."""
        streak = 0
        debug = logger.isEnabledFor(logging.DEBUG)
        handler, keeper, is_plain = self._handler, self._keeper, self._is_plain
        next_entry, conclude, copy_context = self.next_entry, self._conclude, contextvars.copy_context
        while (held := next_entry()) is not None:
            place.held = held
            if not (self._called or self._pausing) and (self._backlog or not self._idle):
                self._call()
            try:
                if is_plain:
                    # The path of nearly every message, without any coroutine but the handler's own.
                    try:
                        await handler(Delivery(held, keeper))
                    except BaseException as error:  # noqa: ASYNC103 - raised again in there
                        conclude(held, self._judge(held, error))
                    else:
                        conclude(held, RETURNED)
                elif self._on_receive:
                    await self._handle_acked(held)
                elif self._claims is None or await self._claims.admit(held):
                    await self._handle(held)
                else:
                    continue
                if debug:
                    tell_handled(self._context, held)
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:
                # Ctrl-C, or an exit. It must not leave this task: asyncio would raise it out of the event loop at once.
                self._settler.crashed(held, error)
                self._fail(error)
                return False
            finally:
                place.held = None
            if copy_context() != clean:
                # The handler changed its context variables. The next message must not see that: it gets a new worker.
                return False
            streak += 1
            if streak == _STREAK:
                streak = 0
                debug = logger.isEnabledFor(logging.DEBUG)
                self._pausing += 1  # comes back for what is ready: nobody else has to be called
                try:
                    await checkpoint()
                finally:
                    self._pausing -= 1
        return True

    def _conclude_watched(self, held: Held, result: Result) -> None:
        """Settle, and tell the circuit how the handling ended."""
        assert self._circuit is not None
        was_open = held.stage is Stage.OPEN
        self._settler.conclude(held, result)
        if was_open and (result is not RETURNED or self._settler.acks_returned):
            self._circuit.saw(result.outcome)

    async def _handle(self, held: Held) -> None:
        self._conclude(held, await self._call_handler(held))

    async def _handle_acked(self, held: Held) -> None:
        if not await self._settler.ack_first(held):
            return
        result = await self._call_handler(held)
        if self._circuit is not None:
            self._circuit.saw(result.outcome)
        if result is RETURNED:
            self._context.counters.handled += 1
            return
        self._context.counters.failed += 1
        if result.outcome is Outcome.REJECTED:
            await self._settler.publish_rejected(held, result)

    async def _call_handler(self, held: Held) -> Result:
        """Call the handler; return how it ended. Raises only real cancellations, and what is no ``Exception``."""
        delivery = Delivery(held, self._keeper)
        try:
            if self._needs_scope:
                return await self._call_scoped(held, delivery)
            await self._handler(delivery)
        except BaseException as error:  # noqa: ASYNC103 - a stray cancellation is a failure
            return self._judge(held, error)  # noqa: ASYNC104
        return RETURNED

    async def _call_scoped(self, held: Held, delivery: Delivery) -> Result:
        timeout = self._context.handler_timeout
        returned = False
        with anyio.CancelScope(deadline=math.inf if timeout is None else self._clock() + timeout) as scope:
            held.scope = scope
            await self._handler(delivery)
            returned = True
        held.scope = None
        if returned or not scope.cancelled_caught:
            return RETURNED
        if held.lost and self._context.on_lease_lost == "cancel":
            return CANCELLED
        late = HandlerTimeoutError(f"the handler was cancelled after handler_timeout ({timeout} s)")
        self._report(held, late, "timed out", is_retried=not self._on_receive)
        return Result(Outcome.TIMED_OUT, str(late), "HandlerTimeout", error=late)

    def _judge(self, held: Held, error: BaseException) -> Result:
        """What an exception means. Raises a real cancellation (the entry is released first) and a non-``Exception``."""
        held.scope = None
        rest = without_cancellations(error)
        if rest is not None and not isinstance(rest, Exception):
            if is_crash(rest):
                self._report(held, rest, "raised an exception that ends its subscription")
            raise rest
        cancellation = cancellation_in(error)
        if cancellation is not None and is_cancelled():
            if cancellation is not error:
                self._report(held, error, "failed while it was cancelled")
            self._settler.conclude(held, CANCELLED)
            raise cancellation
        verdict = sole(error)  # a Retry from the handler's own task group is wrapped
        settled = (held.stage is not Stage.OPEN or held.key is KeyState.COMPLETED) and not self._on_receive
        if isinstance(verdict, Retry) and not settled and not self._on_receive:
            return Result(Outcome.RETRY, words(verdict), "Retry", verdict.delay, verdict)
        if isinstance(verdict, Reject) and not settled:
            return Result(Outcome.REJECTED, words(verdict), "Reject", error=verdict)
        what = "raised after it had settled its delivery" if settled else "failed"
        cut_off = is_cancelled()
        self._report(held, error, what, is_retried=not (settled or self._on_receive or cut_off))
        if cut_off:
            return CANCELLED  # its cleanup failed: the handling itself was cut off
        error_type = f"{type(verdict).__module__}.{type(verdict).__qualname__}"
        judged = verdict if isinstance(verdict, Exception) else None
        return Result(Outcome.FAILED, words(verdict), error_type, error=judged)

    def _report(self, held: Held, error: BaseException, what: str, *, is_retried: bool = False) -> None:
        """Report an error. If it leads to a retry or a dead letter (``is_retried``), only their line logs it."""
        detail = f"the handler {what}"
        if self._on_receive:
            detail += "; its message was acknowledged on receipt, and is not handled again"
        self._context.reporter.error("handler", error, detail=detail, about=held, is_logged_later=is_retried)
