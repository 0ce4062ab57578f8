"""The handlers' pool: as many workers as there is work for, and no more than ``max_in_flight``.

A worker takes what is ready without waiting; before it calls the handler it makes sure that one spare worker exists
if more is waiting; when nothing is ready it ends, a few excepted that wait for more. So handlers that never wait are
called in a plain loop, and handlers that do wait run side by side. A fixed pool would be woken one by one for every
batch, and a task for every message costs more than most handlers.
"""

from __future__ import annotations

import abc
import contextvars
import logging
from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

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
from .context import Context
from .delivery import Delivery
from .fate import tell_handled
from .keeper import EntryKeeper
from .ledger import Held, Ledger, Stage
from .settler import Settler

Handler = Callable[[Delivery], Awaitable[None]]

_WAITING, _OPEN = Stage.WAITING, Stage.OPEN  # read for every message
_STREAK = 64
_PARKED = 4
"""So many workers wait for more; a new task costs more than waking one of them."""


class Place:
    """A worker's place: which pool it works for, and whether it is in a handler now."""

    __slots__ = ("busy", "pool")

    def __init__(self, pool: Taker) -> None:
        self.pool = pool
        self.busy = False


handled_by: contextvars.ContextVar[frozenset[Place]] = contextvars.ContextVar("anybus_handled_by", default=frozenset())
"""The workers in whose handlers the current code runs, or was started."""


def _raise(error: BaseException) -> None:
    raise error


class Taker(abc.ABC):
    """Takes what waits: what pool and pull stream have in common."""

    def __init__(self, context: Context, settler: Settler, keeper: EntryKeeper) -> None:
        self._context = context
        self._ledger: Ledger = context.ledger
        self._budget = context.ledger.budget
        self._waiting = context.ledger.waiting
        self._settler = settler
        self._keeper = keeper
        self._clock = context.clock
        self._stopping = anyio.Event()
        self._stopped = False
        self.scope = anyio.CancelScope(shield=True)
        self.ended = anyio.Event()
        self.running: set[Held] = set()
        self.on_fatal: Callable[[BaseException], None] = _raise

    def next_entry(self) -> Held | None:
        """The next entry that may start; its lease is looked at, since a process can be frozen at any moment."""
        waiting = self._waiting
        trial = self._budget.trial
        while waiting and not self._stopped:
            if trial is not None and not trial.may_begin(self.running):
                return None
            held = waiting.popleft()
            if held.stage is not _WAITING:
                continue
            if not waiting or waiting[0].stage is not _WAITING:
                self._ledger.all_taken()
            held.started_at = now = self._clock()
            if now >= held.lease_until:
                self._settler.handed_back += 1
                self._settler.release(held)
                continue
            held.stage = _OPEN
            self.running.add(held)
            if trial is not None:
                trial.begins(held)
            return held
        return None

    def stop(self) -> None:
        """Take nothing more."""
        self._stopped = True
        self._stopping.set()

    @abc.abstractmethod
    def wake(self) -> None:
        """There is something to take."""

    @abc.abstractmethod
    async def run(self) -> None:
        """Until stopped, and nothing is in flight."""

    def in_flight(self) -> int:
        return len(self.running)

    def oldest(self) -> float | None:
        """For how many seconds the oldest entry has been in flight."""
        started = [held.started_at for held in self.running]
        return self._clock() - min(started) if started else None


class HandlerPool(Taker):
    """Calls the handler."""

    def __init__(self, context: Context, settler: Settler, keeper: EntryKeeper, handler: Handler) -> None:
        super().__init__(context, settler, keeper)
        self._handler = handler
        self._limit = context.max_in_flight
        self._needs_scope = context.handler_timeout is not None or context.on_lease_lost == "cancel"
        self._on_receive = context.policy.ack_mode == "auto-on-receive"
        self._is_plain = not (self._on_receive or self._needs_scope)
        self._workers = 0
        self._spares = 0
        self._parked: list[anyio.Event] = []
        self._tasks: TaskGroup | None = None
        self._home: contextvars.Context | None = None
        if context.circuit is not None:
            context.ledger.on_removed = self.wake  # on trial, the next may begin

    def wake(self) -> None:
        if (
            self._tasks is not None
            and not self._spares
            and self._workers < self._limit
            and not self._stopped
            and self._ledger.has_waiting()
            and (self._budget.trial is None or self._budget.trial.may_begin(self.running))
        ):
            self._add_worker()

    def stop(self) -> None:
        super().stop()
        while self._parked:
            self._parked.pop().set()

    async def run(self) -> None:
        # Workers start from here, whoever wakes them: no handler inherits what another one put in its context.
        self._home = contextvars.copy_context()
        try:
            with self.scope:
                await self._run_workers()
                while not self._stopped:
                    # A stray cancellation that hit a worker at its very end has taken the group along, without a word.
                    await self._run_workers()
        finally:
            self._tasks = None
            self.ended.set()

    async def _run_workers(self) -> None:
        self._workers = self._spares = 0
        self._parked.clear()
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            self.wake()
            await persist(self._stopping.wait)

    def _add_worker(self) -> None:
        assert self._tasks is not None
        assert self._home is not None
        self._workers += 1
        self._spares += 1
        if self._parked:
            self._parked.pop().set()
        else:
            self._home.run(self._tasks.start_soon, self._work)

    async def _work(self) -> None:
        place = Place(self)
        handled_by.set(handled_by.get() | {place})
        clean = contextvars.copy_context()
        goes_on = True
        while goes_on:
            self._spares -= 1
            try:
                goes_on = await self._work_off(place, clean)
            finally:
                self._workers -= 1
            self.wake()
            goes_on = goes_on and await self._called_again()

    async def _called_again(self) -> bool:
        """Wait until there is more to do, if not enough others wait already."""
        if self._stopped or len(self._parked) >= _PARKED:
            return False
        called = anyio.Event()
        self._parked.append(called)
        try:
            await called.wait()
        except BaseException as error:  # noqa: ASYNC103 - a real cancellation goes on
            if called in self._parked:
                self._parked.remove(called)
            elif not self._stopped:
                # Called and cut off in one moment: somebody else has to go.
                self._workers -= 1
                self._spares -= 1
                self.wake()
            if not is_stray(error):
                raise
            return False  # noqa: ASYNC104 - meant for what this worker did before, or for nobody: only it ends
        return not self._stopped

    async def _work_off(self, place: Place, clean: contextvars.Context) -> bool:
        """Handle what is ready. False: this worker must not go on."""
        streak = 0
        debug = logger.isEnabledFor(logging.DEBUG)
        ledger, handler, keeper, conclude = self._ledger, self._handler, self._keeper, self._settler.conclude
        while (held := self.next_entry()) is not None:
            if not self._spares and ledger.waiting and self._workers < self._limit:
                self._add_worker()
            place.busy = True
            try:
                if self._is_plain:
                    # The way of nearly every message, without a coroutine more than the handler's own.
                    try:
                        await handler(Delivery(held, keeper))
                    except BaseException as error:  # noqa: ASYNC103 - raised again in there
                        self._raised(held, error)
                    else:
                        conclude(held, RETURNED)
                elif self._on_receive:
                    await self._handle_acked(held)
                else:
                    await self._handle(held)
                if debug:
                    tell_handled(self._context, held)
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:
                # Ctrl-C, or an exit. Not out of this task: asyncio would let it out of its loop at once.
                self._settler.crashed(held, error)
                self.on_fatal(error)
                return False
            finally:
                place.busy = False
                self.running.discard(held)
            if contextvars.copy_context() != clean:
                # The handler has left something behind in its context, which is not the next message's business.
                return False
            streak += 1
            if streak == _STREAK:
                streak = 0
                debug = logger.isEnabledFor(logging.DEBUG)
                await checkpoint()
        return True

    def _raised(self, held: Held, error: BaseException) -> None:
        try:
            result = self._judge(held, error)
        except anyio.get_cancelled_exc_class():
            self._settler.conclude(held, CANCELLED)
            raise
        self._settler.conclude(held, result)

    async def _handle(self, held: Held) -> None:
        try:
            result = await self._call(held)
        except anyio.get_cancelled_exc_class():
            self._settler.conclude(held, CANCELLED)
            raise
        self._settler.conclude(held, result)

    async def _handle_acked(self, held: Held) -> None:
        if not await self._settler.ack_first(held):
            return
        result = await self._call(held)
        if self._settler.watch is not None:
            self._settler.watch(result.outcome)
        if result is RETURNED:
            self._context.counters.handled += 1
            return
        self._context.counters.failed += 1
        if result.outcome is Outcome.REJECTED:
            await self._settler.publish_rejected(held, result)

    async def _call(self, held: Held) -> Result:
        """Call the handler; return how it ended. Only a real cancellation comes out, and what is no ``Exception``."""
        delivery = Delivery(held, self._keeper)
        try:
            if self._needs_scope:
                return await self._call_scoped(held, delivery)
            await self._handler(delivery)
        except BaseException as error:  # noqa: ASYNC103 - what nobody cancelled is a failure
            return self._judge(held, error)  # noqa: ASYNC104
        return RETURNED

    async def _call_scoped(self, held: Held, delivery: Delivery) -> Result:
        timeout = self._context.handler_timeout
        returned = False
        with anyio.CancelScope() as scope:
            if timeout is not None:
                scope.deadline = self._clock() + timeout
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
        """What an exception of the handler means. A real cancellation, and what is no ``Exception``, comes out."""
        held.scope = None
        rest = without_cancellations(error)
        if rest is not None and not isinstance(rest, Exception):
            if is_crash(rest):
                self._report(held, rest, "raised what ends its subscription")
            raise rest
        cancellation = cancellation_in(error)
        if cancellation is not None and is_cancelled():
            if cancellation is not error:
                self._report(held, error, "failed while it was cancelled")
            raise cancellation
        verdict = sole(error)  # a handler with a task group of its own: its Retry arrives wrapped
        settled = held.stage is not Stage.OPEN and not self._on_receive
        if isinstance(verdict, Retry) and not settled and not self._on_receive:
            return Result(Outcome.RETRY, words(verdict), "Retry", verdict.delay, verdict)
        if isinstance(verdict, Reject) and not settled:
            return Result(Outcome.REJECTED, words(verdict), "Reject", error=verdict)
        what = "raised after it had settled its delivery" if settled else "failed"
        cut_off = is_cancelled()
        self._report(held, error, what, is_retried=not (settled or self._on_receive or cut_off))
        if cut_off:
            return CANCELLED  # its cleanup failed; whatever it would have come to, it was cut off
        error_type = f"{type(verdict).__module__}.{type(verdict).__qualname__}"
        judged = verdict if isinstance(verdict, Exception) else None
        return Result(Outcome.FAILED, words(verdict), error_type, error=judged)

    def _report(self, held: Held, error: BaseException, what: str, *, is_retried: bool = False) -> None:
        """
        :param is_retried: or given up on. Then the log hears of it when that is so, in one line.
        """
        detail = f"the handler {what}"
        if self._on_receive:
            detail += "; its message was acknowledged before, and is not handled again"
        self._context.reporter.error("handler", error, detail=detail, about=held, is_logged_later=is_retried)
