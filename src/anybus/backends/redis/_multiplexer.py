"""One connection for all commands that do not block: opens it, opens it again, and lets callers wait for it."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
from anyio.abc import TaskGroup

from ..._failure.backoff import recovery_delay
from ..._ground.cancellation import is_abandoned, is_stray, persist, sole
from ..._ground.clock import loop_clock
from ..._ground.errors import BackendError, EventBusError
from ..._ground.log import say
from ._deadlines import last_moment
from ._errors import UNEXPECTED, broken, duplicate, is_about_credentials, translate
from ._link import BROKEN, Link, open_link
from ._protocol import Command, ServerError
from ._session import POSTPONED, Call, Session, Unsent, fail_all
from ._settings import Locator, Settings

_SCOPE = {"scope": "connection"}

_LOOK = 0.1
_LAST_SECONDS = 2.0
"""An abandoned connection stays open for at most this many seconds while it is in use."""


class Multiplexer:
    """Shares one connection among all callers. If it breaks, it is reopened as soon as somebody needs it.

    If a caller is cancelled, its reply is still received, in order, and dropped.

    :param watches: whether this one runs the locator's watch over all of its connections.
    """

    def __init__(
        self, settings: Settings, on_connect: Callable[[Link], Awaitable[None]], *, watches: bool = True
    ) -> None:
        self._settings = settings
        self._locator = settings.locator if watches else None
        self._on_connect = on_connect
        self._scope: anyio.CancelScope | None = None  # created when the loop runs: the bus may be created before that
        self._session: Session | None = None
        self._postponed: Unsent = []
        self._demand = anyio.Event()
        self._ready = anyio.Event()
        self._last_error: BackendError | None = None
        self._clock = anyio.current_time
        self._closed = False
        self.closed = anyio.Event()
        self._owner_watch: anyio.CancelScope | None = None
        self._location_watch: anyio.CancelScope | None = None
        self.connections = 0

    @property
    def is_connected(self) -> bool:
        return self._session is not None

    def close(self) -> None:
        self._closed = True
        self.closed.set()
        self._wake_waiters()
        for scope in (self._scope, self._owner_watch, self._location_watch):
            if scope is not None:
                scope.cancel()

    async def connect(self) -> Link:
        """Open the first connection, for :meth:`run`. If it fails, the bus cannot be entered.

        It is not opened in :meth:`run`: a cancellation must reach the caller that waits for it, and the shield in there
        would block it.
        """
        self.prepare()
        return await self._connect(entering=True)

    def prepare(self) -> None:
        """To be called before :meth:`run` if there is no first connection yet."""
        self._scope = anyio.CancelScope(shield=True)
        self._clock = loop_clock()
        self._closed = False
        self.closed = anyio.Event()
        self._owner_watch = None
        self._location_watch = anyio.CancelScope(shield=True)

    async def run(self, link: Link | None, alarm: Callable[[BaseException], None], tasks: TaskGroup) -> None:
        """Serve until closed, on the first connection (None = it is opened when it is needed) and then on new ones.

        This is shielded: if everything is cancelled, subscriptions still need the connection to release their entries.

        :param alarm: called with an error that must end the bus.
        :param tasks: the task group in which this runs.
        """
        assert self._scope is not None
        connected = link
        if self._locator is not None:
            tasks.start_soon(self._watch_location, self._locator, alarm)
        try:
            with self._scope:
                while True:
                    try:
                        if connected is None:
                            connected = await self._reconnect()
                        link, connected = connected, None
                        await self._serve(link)
                    except BaseException as error:  # noqa: ASYNC103 - a real cancellation is raised again
                        if isinstance(error, anyio.get_cancelled_exc_class()):
                            if not is_stray(error):
                                raise
                            if self._owner_watch is None:
                                self._owner_watch = anyio.CancelScope(shield=True)
                                tasks.start_soon(self._watch_owner, self._owner_watch)
                        else:
                            # On trio, a KeyboardInterrupt may be raised in here. It ends the program, but this loop
                            # continues: subscriptions still need the connection to release their entries.
                            alarm(sole(error))
        finally:
            self._closed = True
            self._fail_postponed(self._closed_error())

    async def _watch_location(self, locator: Locator, alarm: Callable[[BaseException], None]) -> None:
        """Shielded like :meth:`run`: subscriptions must not release entries to a server that has been replaced."""
        assert self._location_watch is not None
        try:
            with self._location_watch:
                await persist(locator.watch)
        except BaseException as error:  # noqa: ASYNC103 - a real cancellation is raised again
            if isinstance(error, anyio.get_cancelled_exc_class()):
                raise
            alarm(sole(error))

    async def _watch_owner(self, scope: anyio.CancelScope) -> None:
        """Close when the task that entered the bus has ended without leaving it.

        This runs only after a stray cancellation. That may have been the event loop's final one, which also hits the
        owner, perhaps later than this task. An owner that has ended cannot close the connection any more, and there is
        no second cancellation.
        """
        with scope:
            await persist(self._until_abandoned)
            self.close()

    async def _until_abandoned(self) -> None:
        while not is_abandoned():  # noqa: ASYNC110 - there is no event for the end of a task
            await anyio.sleep(_LOOK)
        # Subscriptions that were cancelled at the same moment still release their entries.
        last = self._clock() + _LAST_SECONDS
        quiet = 0
        while quiet < 2 and self._clock() < last:
            await anyio.sleep(_LOOK)
            session = self._session
            in_use = self._postponed if session is None else session.is_in_use
            quiet = 0 if in_use else quiet + 1

    async def _connect(self, *, entering: bool = False) -> Link:
        link = await open_link(self._settings, entering=entering)
        try:
            await self._on_connect(link)
        except ServerError as error:
            await link.aclose()
            raise translate(error, entering=entering) from error
        except BROKEN as error:
            await link.aclose()
            raise broken(f"the connection to {self._settings.place} broke", may_have_happened=False) from error
        except UNEXPECTED as error:
            await link.aclose()
            text = f"unexpected replies from {self._settings.place}: is it a Redis or Valkey server?"
            raise broken(text, may_have_happened=False) from error
        except BaseException:
            await link.aclose()
            raise
        return link

    async def _reconnect(self) -> Link:
        failures = 0
        said = False
        while True:
            await self._demand.wait()
            locator = self._settings.locator
            news = None if locator is None else locator.news
            try:
                link = await self._connect()
            except EventBusError as error:
                if not isinstance(error, BackendError):  # an unsupported server: too old, or a cluster
                    error = BackendError(str(error), may_have_happened=False, can_pass=False)
                self._last_error = error
                failures += 1
                self._fail_postponed(error)
                if not said and isinstance(error.__cause__, ServerError) and is_about_credentials(error.__cause__):
                    said = True
                    text = "%s does not accept the credentials (%s): not connected; trying again until it does"
                    say(logging.ERROR, text, self._settings.place, error, hidden=_SCOPE)
                if not error.can_pass:
                    # Do not let callers wait for a connection that will not come. The next use tries again.
                    self._wake_waiters()
                    self._demand = anyio.Event()
                with anyio.move_on_after(recovery_delay(failures, random.random())):
                    # Not until then, if the server turns up at another address.
                    await (anyio.sleep_forever() if news is None else news.wait())
            else:
                self._last_error = None
                return link

    def _wake_waiters(self) -> None:
        self._ready.set()
        self._ready = anyio.Event()

    async def _serve(self, link: Link) -> None:
        session = self._session = Session(link, link.settings, self._clock, self._postponed)
        self._postponed = []
        self._demand = anyio.Event()
        self.connections += 1
        self._wake_waiters()
        connected = "reconnected" if self.connections > 1 else "connected"
        say(logging.INFO, f"{connected} to %s", link.settings.place, hidden=_SCOPE)
        try:
            await session.run()
        finally:
            self._session = None
            if not self._closed:
                say(logging.WARNING, "%s; it is reopened when it is needed", session.why_ended, hidden=_SCOPE)
            self._postponed = session.end()
            if self._postponed:
                self._demand.set()  # they are sent on the next connection, which is opened at once
            await link.aclose()

    def _fail_postponed(self, error: BackendError) -> None:
        postponed, self._postponed = self._postponed, []
        fail_all(postponed, error)

    async def single(self, command: Command, timeout: float) -> Any:
        """Send one command, together with others that are sent now, and return its reply.

        :raises BackendError: if the connection broke, or there was no answer in time. ``may_have_happened`` tells
            whether the command had been sent.
        """
        if self._session is None:
            return await self._single_when_connected(command, timeout)
        call = self._session.single(command, timeout)
        await call.wave.event.wait()
        if call.error is not None:
            if call.error is POSTPONED:
                return await self._single_when_connected(command, call.wave.deadline - self._clock())
            raise call.error
        return call.replies[0]

    async def _single_when_connected(self, command: Command, timeout: float) -> Any:
        call: Call | None = None
        with anyio.move_on_after(timeout):
            while call is None or call.error is POSTPONED:
                call = None
                call = await self.start((command,), patient=True)
                await call.event.wait()
        if call is None or not call.event.is_set():
            error = broken("no answer within publish_timeout", may_have_happened=call is not None and call.sent)
            if call is not None:
                call.fail(error)  # it stays in the queue, but will not be sent
            raise error
        if call.error is not None:
            raise call.error
        return call.replies[0]

    def reset(self) -> None:
        """Abandon this connection: its server is the wrong one (a replica, now), or its replies are out of step."""
        # At once, so that the next callers wait for a new connection, and do not fail with this one.
        session, self._session = self._session, None
        if session is not None:
            session.abandon()

    def _closed_error(self) -> BackendError:
        return broken(f"the connection to {self._settings.place} is closed", may_have_happened=False)

    async def until_connected(self, *, patient: bool = False) -> Session:
        """Wait for a connection.

        :param patient: wait until the caller's own deadline, if it has one.
        :raises BackendError: if there is no connection in time. Nothing was sent.
        """
        now = anyio.current_time()
        deadline = last_moment()  # so that the caller learns that nothing was sent
        if not patient or deadline == math.inf:
            deadline = min(deadline, now + self._settings.connect_timeout + self._settings.command_timeout)
        with anyio.CancelScope(deadline=deadline) as scope:
            while self._session is None:
                if self._closed:
                    raise self._closed_error()
                self._demand.set()
                await self._ready.wait()
                error = self._last_error
                if error is not None and not error.can_pass:
                    raise duplicate(error)
        if self._session is None or scope.cancelled_caught:
            # The last error tells the place and the reason.
            text = f"not connected to {self._settings.place}" if self._last_error is None else str(self._last_error)
            raise broken(text, may_have_happened=False)
        return self._session

    async def start(self, commands: Sequence[Command], *, patient: bool = False) -> Call:
        """Add commands to the queue; the next write sends them. This waits only while there is no connection."""
        session = self._session or await self.until_connected(patient=patient)
        return session.start(commands, patient=patient)

    async def pipeline(self, commands: Sequence[Command], *, patient: bool = False) -> list[Any]:
        """Send commands together. Returns their replies, error replies included, in order.

        :param patient: if there is no connection, wait for one until the caller's own deadline, if it has one.
        :raises BackendError: if the connection broke. ``may_have_happened`` tells whether they had been sent.
        """
        while True:
            call = await self.start(commands, patient=patient)
            await call.event.wait()
            if call.error is None:
                return call.replies
            if call.error is not POSTPONED:
                raise call.error

    async def call(self, *command: Any) -> Any:
        """Send a command, and return its reply.

        :raises ServerError: if it is an error reply.
        :raises BackendError: if the connection broke.
        """
        [reply] = await self.pipeline((command,))
        if isinstance(reply, ServerError):
            raise reply
        return reply
