"""The subscription: it wires its parts together, starts them and ends them.

The parts are siblings in one task group that the caller's ``async with`` owns. Only the intake can be cancelled from
outside. The other parts run in shielded scopes that they enter themselves, and a supervisor ends them in order: the
intake stops (waiting entries are released at once), the handlers end or are cancelled, what is left is settled within
``cleanup_timeout``, the consumer is forgotten. A watcher that is not shielded turns a cancellation from outside into an
abort.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

from .._ground.cancellation import as_failure, is_stray, leaves, persist
from .._ground.errors import ClosedError, EventBusError
from .._reporting import said
from .._retention.caretaker import Caretaker, Ward
from ..abc import RightsChecker, StreamInspector
from .circuit import Circuit
from .claims import Claims
from .context import Context
from .entry import Held, Stage
from .group_lease import GroupLease
from .intake import ENDING, PAUSED, Intake
from .keeper import EntryKeeper
from .leases import Leases
from .patience import Patience
from .pool import Handler, HandlerPool, handled_by
from .postponed import Postponed
from .pull import PullTaker
from .settler import Settler
from .statistics import SubscriptionStatistics
from .taker import Taker


class ClosedWhileEnteredError(ClosedError):
    """The subscription was ended before it had started."""


class Subscription:
    """A running subscription, as ``bus.subscribe`` yields it. Only the bus creates subscriptions."""

    def __init__(self, context: Context, handler: Handler | None, caretaker: Caretaker) -> None:
        self._context = context
        self._caretaker = caretaker
        self._patience = Patience(context)
        # From the intake to the handlers. Every batch has an entry, so there are never more batches than the limit.
        send, ready = anyio.create_memory_object_stream[list[Held]](context.ledger.budget.limit)
        postponed = Postponed(context.clock)
        self._settler = Settler(context, postponed)
        self._intake = Intake(context, self._settler, postponed, send, ready.clone())
        self._circuit: Circuit | None = None
        if context.circuit is not None:
            self._circuit = Circuit(context.circuit, context, self._intake, send.clone())
        self._claims = claims = None if context.once is None else Claims(context, self._settler, context.once)
        self._leases = Leases(context, self._settler, claims)
        self._group_lease = GroupLease(context, self._leases)
        keeper = EntryKeeper(context, self._settler, self._leases, self._circuit, claims)
        self._taker: Taker
        if handler is None:
            self._taker = PullTaker(context, self._settler, keeper, claims, ready, send.clone())
        else:
            self._taker = HandlerPool(
                context, self._settler, keeper, self._circuit, claims, ready, send.clone(), handler, self._fail
            )
        self._entering = anyio.CancelScope()
        self._body = anyio.CancelScope()
        background: tuple[Callable[[], Awaitable[None]], ...] = (
            *(lane.run for lane in self._settler.dispatch.lanes),
            self._leases.run,
            self._group_lease.run,
            self._tend,
        )
        if "delay" not in context.backend.features:
            background = (*background, self._intake.keep_bringing_back)
        if claims is not None:
            background = (*background, claims.run, claims.keep_renewing)
        if self._circuit is not None:
            background = (*background, self._circuit.run)
        self._background = {part: anyio.CancelScope(shield=True) for part in background}
        self._forgotten: set[str] = set()
        self._grace = anyio.CancelScope()
        self._ending = anyio.Event()
        self._aborted = False
        self._ended = anyio.Event()
        self._failure: BaseException | None = None

    def __repr__(self) -> str:
        context = self._context
        state = "ended" if self._ended.is_set() else "ending" if self._ending.is_set() else "running"
        return f"<Subscription {state} topic={context.topic!r} group={context.group!r} consumer={context.consumer!r}>"

    @property
    def consumer(self) -> str:
        """The consumer's name on the server: its label and a unique part, new for every subscription."""
        return self._context.consumer

    @property
    def is_running(self) -> bool:
        """Whether the subscription takes messages. Also true while it is paused. False once its end has begun."""
        return not self._ending.is_set()

    def statistics(self) -> SubscriptionStatistics:
        """Counts and gauges as of now, as an immutable value."""
        self._is_at_work()
        held = self._context.ledger.all()
        return SubscriptionStatistics(
            waiting=sum(entry.stage in (Stage.PARKED, Stage.WAITING) for entry in held),
            in_flight=self._taker.in_flight(),
            held=len(held),
            oldest_in_flight=self._taker.oldest(),
            **dataclasses.asdict(self._context.counters),
        )

    def pause(self) -> None:
        """Take nothing more, and release waiting messages. Running handlers go on. Pausing twice is fine."""
        if self._is_at_work():
            self._intake.shut(PAUSED)

    def resume(self) -> None:
        """Take messages again."""
        if self._is_at_work():
            self._intake.open(PAUSED)

    def close(self) -> None:
        """Begin a graceful end: take nothing more, release waiting messages, wait up to ``close_timeout`` for handlers.

        Handlers may call this. The body of ``subscribe`` goes on. Closing twice is fine.
        """
        if self._is_at_work():
            self._begin_end()

    def abort(self) -> None:
        """Begin an immediate end: handlers are cancelled, and their messages are released. Handlers may call this."""
        if self._is_at_work():
            self._abort()

    async def wait_closed(self) -> None:
        """Wait until the subscription has ended: everything is settled or released, and the consumer is forgotten.

        :raises RuntimeError: in a handler of this subscription, which would wait for itself. (Also in a task that a
            handler left behind, while the handler's worker is in the next handler.)
        """
        self._is_at_work()
        self._refuse_in_handlers()
        await self._ended.wait()

    async def aclose(self) -> None:
        """``close()``, then ``wait_closed()``. Raises the same errors as ``wait_closed()``."""
        self._is_at_work()
        self._refuse_in_handlers()
        self.close()
        await self.wait_closed()

    def _is_at_work(self) -> bool:
        """Whether it has not ended yet. Then, in an event loop other than the bus's, this raises ``RuntimeError``."""
        if self._ended.is_set():
            return False
        self._context.home.check("the subscription")
        return True

    def _refuse_in_handlers(self) -> None:
        if any(place.pool is self._taker and place.held is not None for place in handled_by.get()):
            raise RuntimeError(
                "a handler cannot wait for the end of its own subscription: call close() or abort() and return"
            )

    def _abort(self) -> None:
        self._aborted = True
        self._begin_end()
        self._grace.cancel()

    def _begin_end(self) -> None:
        if not self._ending.is_set():
            self._ending.set()
            if self._circuit is not None:
                self._circuit.stop()
            self._intake.shut(ENDING)
            self._entering.cancel()
            self._intake.scope.cancel()
            self._taker.stop()

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        else:
            self._context.reporter.error("close", error, detail="a second failure while the subscription ends")
        self._abort()
        self._body.cancel()

    @asynccontextmanager
    async def _open(self) -> AsyncGenerator[Subscription, None]:
        try:
            try:
                with self._entering:
                    await self._make_groups()
                if self._ending.is_set():
                    raise ClosedWhileEnteredError("the bus was closed while the subscription was being entered")
            except BaseException:
                if self._group_lease.may_be_member:
                    await self._forget_consumer()  # noqa: ASYNC102 - shielded in there
                raise
            async with self._running():
                yield self
        finally:
            self._begin_end()
            self._taker.close()
            for lane in self._settler.dispatch.lanes:
                lane.close()
            if self._claims is not None:
                self._claims.close()
            self._ended.set()

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None, None]:
        body_error: BaseException | None = None
        failed_first = False
        self._context.reporter.log(logging.INFO, "started", "subscription started")
        self._context.reporter.tell("on_started", "started")
        try:
            async with anyio.create_task_group() as tasks:
                self._start_parts(tasks)
                try:
                    with self._body:
                        yield
                except BaseException as error:  # noqa: ASYNC103 - raised below, when the parts have ended
                    failed_first = self._failure is not None
                    self._settle_crashed(error)
                    self._abort()
                    if isinstance(error, anyio.get_cancelled_exc_class()):
                        raise
                    body_error = error  # noqa: ASYNC104
                else:
                    self._leave()
        finally:
            # These errors are raised bare, whatever else happened meanwhile, even a cancellation from outside.
            self._tell_ended()
            failure = self._failure
            if body_error is not None and failure is not None:
                second = body_error if failed_first or not isinstance(failure, Exception) else failure
                self._context.reporter.error("close", second, detail="a second error of a subscription that ended")
                body_error, failure = (None, failure) if second is body_error else (body_error, None)
            if body_error is not None:
                raise body_error
            if failure is not None:
                raise failure

    def _tell_ended(self) -> None:
        reporter, counters = self._context.reporter, self._context.counters
        text = "subscription ended: %d handled, %d retried, %d dead-lettered, %d released"
        counts = (counters.handled, counters.retried, counters.dead_lettered, counters.released)
        if self._failure is None:
            reporter.log(logging.INFO, "ended", text, *counts)
        else:
            # Without a traceback: the caller gets the exception.
            reporter.log(logging.ERROR, "ended", f"{text}; it failed: %s", *counts, said(self._failure))
        reporter.tell("on_ended", "ended", error=self._failure)

    def _settle_crashed(self, error: BaseException) -> None:
        """The block of ``deliveries()`` counts as the handler of the messages that were received in it."""
        # GeneratorExit means that an async generator around the block was closed: nothing has crashed.
        if isinstance(self._taker, PullTaker) and not isinstance(error, GeneratorExit):
            for held in self._taker.running:
                self._settler.crashed(held, error)

    def _start_parts(self, tasks: TaskGroup) -> None:
        tasks.start_soon(self._watch)
        tasks.start_soon(self._supervise)
        tasks.start_soon(self._guard, self._intake.run)
        tasks.start_soon(self._guard, self._taker.run)
        for part, scope in self._background.items():
            tasks.start_soon(self._in_background, part, scope)

    def _leave(self) -> None:
        """The body has ended. Pulled deliveries end with their block; handlers get ``close_timeout``."""
        if isinstance(self._taker, PullTaker):
            self._abort()
        else:
            self._begin_end()

    async def _make_groups(self) -> None:
        context = self._context
        backend = context.backend
        if isinstance(backend, RightsChecker):
            await self._patience.until_done(
                f"the rights on {context.topic!r} are not known yet",
                backend.check_rights,
                *context.streams,
                context.group,
                dead_letter_topic=context.dead_letter_topic,
            )
        if context.once is not None and context.once.keeper is not None:
            await self._patience.until_done(
                f"the rights on the keys of {context.topic!r} are not known yet",
                context.once.keeper.check_key_rights,
                context.topic,
                context.group,
            )
        not_admitted = f"group {context.group!r} is not admitted yet"
        await self._patience.until_done(not_admitted, self._caretaker.admit, context.topic, context.group, made=False)
        for stream, start in ((context.topic, context.group_start_id), (context.retry_stream, "0")):
            made = await self._patience.until_done(
                f"the group of {stream!r} is not created yet", backend.create_group, stream, context.group, start
            )
            if made and stream == context.topic:
                await self._patience.until_done(
                    not_admitted, self._caretaker.admit, context.topic, context.group, made=True
                )
            if made and start == "$" and stream == context.topic:
                await self._mention_backlog()
        await self._patience.until_done(f"the lease of {context.group!r} is not agreed on yet", self._group_lease.agree)

    async def _tend(self) -> None:
        context = self._context
        await self._caretaker.tend(Ward(context.topic, context.group, context.dead_letter_topic, context.counters))

    async def _mention_backlog(self) -> None:
        context = self._context
        if "inspect" in context.backend.features and isinstance(context.backend, StreamInspector):
            count = 0
            with contextlib.suppress(EventBusError):  # only a notice: no reason to fail or to try again
                count = await context.backend.count_entries(context.topic)
            if count:
                context.notices.once(
                    f"group {context.group!r} was created at the end of {context.topic!r} (group_start_id '$'), which "
                    f"already holds {count} entries: the group will not see them ('0' begins at the start)"
                )

    async def _guard(self, part: Callable[[], Awaitable[None]]) -> None:
        """Run a part. An error that it raises ends the subscription, once, and is raised bare."""
        try:
            await part()
        except anyio.get_cancelled_exc_class() as error:  # noqa: ASYNC103 - a stray cancellation is a failure
            if not is_stray(error):
                raise
            self._fail(as_failure(error))
        except BaseException as error:
            # If several errors occur at once, the first one ends the subscription, and the others are reported.
            for failure in leaves(error):
                self._fail(failure)

    async def _in_background(self, part: Callable[[], Awaitable[None]], scope: anyio.CancelScope) -> None:
        """Run a part that works until everything is settled."""
        with scope:
            await self._guard(lambda: persist(part))

    async def _watch(self) -> None:
        """Turn a cancellation from outside into an abort, at any time. (This task is not shielded.)"""
        try:
            await self._ended.wait()
        finally:
            if not self._ended.is_set():
                self._abort()

    async def _supervise(self) -> None:
        """End the parts in order. After a stray cancellation this begins again: every step can be repeated."""
        try:
            with anyio.CancelScope(shield=True):
                await persist(self._end_in_order)
        finally:
            self._settler.dispatch.finish()
            for scope in self._background.values():
                scope.cancel()
            self._ended.set()

    async def _end_in_order(self) -> None:
        context = self._context
        await self._ending.wait()
        with self._until_aborted(), anyio.move_on_after(context.options.close_timeout):
            await self._taker.ended.wait()
        self._release(Stage.RETURNED)
        await self._cancel_handlers()
        await self._intake.ended.wait()
        self._release(Stage.PARKED, Stage.WAITING, Stage.OPEN, Stage.RETURNED)
        with anyio.move_on_after(context.options.cleanup_timeout):
            await self._settler.dispatch.drain()
        left = self._settler.dispatch.finish()
        if left:
            late = TimeoutError(f"{left} entries were not settled within cleanup_timeout")
            context.reporter.error("close", late, detail="they are redelivered when their lease ends")
        for scope in self._background.values():
            scope.cancel()
        await self._forget_consumer()

    def _until_aborted(self) -> anyio.CancelScope:
        self._grace = anyio.CancelScope()
        if self._aborted:
            self._grace.cancel()
        return self._grace

    def _release(self, *stages: Stage) -> None:
        for held in self._context.ledger.all():
            if held.stage in stages:
                self._settler.release(held)

    async def _cancel_handlers(self) -> None:
        context = self._context
        taker = self._taker
        taker.scope.cancel()
        with anyio.move_on_after(context.options.cleanup_timeout):
            await taker.ended.wait()
        if not taker.ended.is_set():
            # For example, a handler in a thread. Its message stays leased. All others have been released by now.
            for held in taker.running:
                late = TimeoutError("the handler still runs although it was cancelled")
                context.reporter.error("close", late, detail="waiting for it", about=held)
            await taker.ended.wait()

    async def _forget_consumer(self) -> None:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                for stream in self._context.streams:
                    tasks.start_soon(self._forget, stream)

    async def _forget(self, stream: str) -> None:
        """Once for every stream used, whatever happens."""
        if stream in self._forgotten:
            return
        self._forgotten.add(stream)
        context = self._context
        try:
            with anyio.move_on_after(context.options.cleanup_timeout):
                await context.backend.forget_consumer(stream, context.group, context.consumer)
        except BaseException as error:  # noqa: ASYNC103 - raised again in there
            context.reporter.error("close", as_failure(error), detail=f"forgetting the consumer of {stream!r}")
