"""What a process does for a schedule: it asks for the lease, and publishes the ticks while it has it.

The server decides everything that matters: who owns the schedule, whether a tick has come, and whether it was
published. This process only waits, and asks.
"""

from __future__ import annotations

import inspect
import logging
import os
import random
from collections.abc import Awaitable
from datetime import datetime, timedelta
from typing import Final, TypeVar

import anyio

from .._failure.backoff import recovery_delay
from .._ground.cancellation import as_failure
from .._ground.checks import refuse
from .._ground.clock import now
from .._ground.errors import BackendError, ClosedError, SerializationError, ValidationError, can_pass
from .._messages.message import Message, check_outgoing, new_uid
from .._options import StreamBusOptions
from .._reporting import Reporter
from ..abc import TickClaim, TickResult, TickStore
from .definition import Definition

T = TypeVar("T")

LEASE: Final = 5.0
"""For how many seconds a process owns a schedule, unless it renews the lease."""

GRACE: Final = 10.0
"""After how many seconds a tick is missed. Longer than a takeover, which lasts for a lease and a third."""

LONGEST_PAUSE: Final = 30.0
"""A process asks for the state at least every so many seconds."""

NAME_HEADER: Final = "schedule-name"
TICK_HEADER: Final = "schedule-tick"

_LEAVING: Final = 1.0


class Ticking:
    """Publishes the ticks of a schedule whenever this process owns it.

    :ivar is_superseded: another definition has taken over, so nothing is published here any more.
    """

    def __init__(self, definition: Definition, store: TickStore, options: StreamBusOptions, reporter: Reporter) -> None:
        self._definition = definition
        self._store = store
        self._options = options
        self._reporter = reporter
        self._part = f"publish schedule {definition.name}"
        self._owner = os.urandom(8).hex()
        self._generation: int | None = None
        self._known = (now(), anyio.current_time())
        self._failures = 0
        self._upcoming: tuple[datetime, datetime | None] | None = None
        self._mentioned: datetime | None = None
        self.is_superseded = False

    def now(self) -> datetime:
        """About the time by the server's clock, never later."""
        at, since = self._known
        return at + timedelta(seconds=anyio.current_time() - since)

    async def enter(self) -> None:
        """Make the definition known, and take over from another one. Repeated after transient errors."""
        while True:
            try:
                await self._claim()
            except Exception as error:
                if not can_pass(error):
                    raise
                await anyio.sleep(self._failed(error, "the schedule is not entered yet"))
            else:
                self._worked()
                return

    async def run(self) -> None:
        """Publish until another definition takes over."""
        while not self.is_superseded:
            try:
                pause = await self._step()
            except Exception as error:
                if not can_pass(error):
                    raise
                pause = self._failed(error, "a tick may be late")
            await anyio.sleep(pause)

    async def leave(self) -> None:
        """Give the lease up, so that another process need not wait for its end. Never raises an ``Exception``."""
        if self.is_superseded:
            return
        with anyio.move_on_after(_LEAVING, shield=True):
            try:
                await self._store.leave_schedule(self._definition.topic, self._definition.name, self._owner)
            except Exception as error:
                self._reporter.error("close", error, detail=f"the lease of schedule {self._definition.name!r} stays")

    async def _step(self) -> float:
        """Ask for the lease, and publish what is due.

        :return: after how many seconds to ask again.
        """
        claim = await self._claim()
        if self._generation is not None and claim.generation > self._generation:
            self._give_way(claim.generation)
            return 0
        self._generation = claim.generation
        if not claim.is_owner:
            self._worked()
            return self._pause(claim.last_tick, until=claim.lease_end)
        return await self._publish_due(claim.last_tick)

    async def _publish_due(self, last: datetime) -> float:
        while True:
            tick = self._next(last)
            wait = None if tick is None else (tick - self.now()).total_seconds()
            if tick is None or wait is None or wait > LEASE / 3:
                self._worked()
                return self._pause(last)
            if wait > 0:
                await anyio.sleep(wait)  # some event loops wake up a little early
                continue
            # If its message fails, the tick stays due until it is missed, here or in another process.
            detail = f"the message for the tick {_text(tick)}"
            try:
                message = await self._make(tick)
            except Exception as error:
                return self._failed(error, detail)
            try:
                result = await self._publish(tick, message)
            except (ValidationError, SerializationError) as error:
                return self._failed(error, detail)
            if result.status == "not-owner":
                return 0
            if result.status == "published":
                self._worked()
                if result.entry_id is not None:
                    topic = self._definition.topic
                    self._reporter.tell("on_published", "published", topic=topic, message_id=result.entry_id)
            elif result.status == "missed":
                self._mention_missed(tick)
            last = result.last_tick

    def _next(self, last: datetime) -> datetime | None:
        """The tick to publish next: one that was missed, or one that is not missed yet."""
        tick, horizon = self._after(last), self._horizon()
        if tick is None or tick >= horizon:
            return tick
        missed = self._definition.ticks.latest(last, horizon) or tick
        if self._definition.missed == "catch-up":
            return missed
        self._mention_missed(missed)
        return self._definition.ticks.after(horizon)

    def _horizon(self) -> datetime:
        """Ticks before this are missed."""
        return self.now() - timedelta(seconds=GRACE)

    def _after(self, last: datetime) -> datetime | None:
        """The first tick after the last one. It is asked for again and again until it comes."""
        if self._upcoming is None or self._upcoming[0] != last:
            self._upcoming = last, self._definition.ticks.after(last)
        return self._upcoming[1]

    def _mention_missed(self, tick: datetime) -> None:
        if self._mentioned is None or self._mentioned < tick:
            self._mentioned = tick
            text = "schedule %s: no process could publish the tick %s within %s s, it is skipped"
            self._reporter.log(logging.WARNING, "publish", text, self._definition.name, _text(tick), GRACE)

    def _pause(self, last: datetime, *, until: datetime | None = None) -> float:
        """How long to wait before the next call: less if a tick is near.

        :param until: the end of the owner's lease.
        """
        here, horizon = self.now(), self._horizon()
        tick = self._after(last)
        if tick is not None and tick < horizon:
            tick = self._definition.ticks.after(horizon)
        far = LONGEST_PAUSE + LEASE if tick is None else (tick - here).total_seconds()
        if until is not None and far <= LEASE:
            return min(LEASE / 3, max((until - here).total_seconds(), 0.01))
        return min(max(LEASE / 3, far - LEASE), LONGEST_PAUSE)

    async def _make(self, tick: datetime) -> Message | None:
        """The message of a tick.

        :raises ValidationError: if a factory returns anything else than a message of the schedule's topic.
        """
        definition, message = self._definition, self._definition.message
        if isinstance(message, Message):
            message = message.replace(uid=new_uid(), occurred_at=tick)
        else:
            made: object = None
            with anyio.move_on_after(GRACE) as scope:
                try:
                    made = message(tick)
                    if inspect.isawaitable(made):
                        made = await made
                except Exception:
                    raise
                except BaseException as error:
                    raise as_failure(error) from None  # noqa: ASYNC104 - a real cancellation is raised again
            if scope.cancelled_caught:
                raise TimeoutError(f"the function did not return within {GRACE} s")
            if made is None:
                return None
            if not isinstance(made, Message) or made.topic != definition.topic:
                refuse("the result", made, f"a Message for the topic {definition.topic!r}, or None")
            message = made
        message = check_outgoing(message, self._options.max_payload_bytes)
        return message.replace(headers={**message.headers, NAME_HEADER: definition.name, TICK_HEADER: _text(tick)})

    async def _claim(self) -> TickClaim:
        definition = self._definition
        claim = await self._in_time(
            self._store.claim_schedule(
                *(definition.topic, definition.name, self._owner),
                definition=definition.spec,
                generation=self._generation,
                lease=LEASE,
                grace=GRACE,
            )
        )
        self._known = (claim.now, anyio.current_time())
        if self._generation is None:
            self._generation = claim.generation
        return claim

    async def _publish(self, tick: datetime, message: Message | None) -> TickResult:
        definition = self._definition
        assert self._generation is not None
        while True:
            result = await self._in_time(
                self._store.publish_tick(
                    *(definition.topic, definition.name, self._owner, message),
                    generation=self._generation,
                    tick=tick,
                    lease=LEASE,
                    grace=None if definition.missed == "catch-up" else GRACE,
                )
            )
            self._known = (result.now, anyio.current_time())
            wait = (tick - result.now).total_seconds()
            if result.status != "early" or wait > LEASE / 3:
                return result
            # The clocks differ a little. The message has been made, and is kept.
            await anyio.sleep(max(wait, 0.001))

    async def _in_time(self, call: Awaitable[T]) -> T:
        with anyio.move_on_after(self._options.publish_timeout):
            return await call
        raise BackendError(f"no answer within publish_timeout ({self._options.publish_timeout} s)")

    def _give_way(self, generation: int) -> None:
        self.is_superseded = True
        text = (
            f"schedule {self._definition.name!r} was entered with another definition (generation {generation}): "
            f"this process publishes it no more ({self._definition.spec})"
        )
        self._reporter.error("publish", ClosedError(text), detail="another definition took over")

    def _failed(self, error: Exception, detail: str) -> float:
        """Report an error.

        :return: the pause before the next try.
        """
        self._failures += 1
        detail = f"schedule {self._definition.name!r}: {detail}"
        self._reporter.error("publish", error, detail=detail, part=self._part)
        return recovery_delay(self._failures, random.random())

    def _worked(self) -> None:
        if self._failures:
            self._failures = 0
            self._reporter.works(self._part)


def _text(tick: datetime) -> str:
    return tick.isoformat(timespec="milliseconds").replace("+00:00", "Z")
