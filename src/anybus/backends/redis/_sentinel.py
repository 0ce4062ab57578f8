"""Finds the primary of a service by asking its sentinels, and leaves a server that is not the primary any more.

The sentinels are asked for each connection that is opened. While the bus runs, each of them is also asked every second:
a primary that was cut off from the sentinels does not know that another one has taken its place, and would still accept
whatever it is sent. The sentinels number their configurations (the *epoch*): of two answers, the one with the higher
number is newer. So a sentinel that was cut off together with the old primary is not believed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import anyio

from ..._ground.cancellation import persist
from ..._ground.errors import BackendError, words
from ..._ground.log import say
from ._errors import UNEXPECTED, broken, is_permanent, translate
from ._link import BROKEN, Link, ask, open_link, tolerate
from ._protocol import ServerError
from ._settings import Locator, Settings

_PATIENCE: Final = 0.3
"""If a sentinel has not answered after so many seconds, the next one is asked as well."""

_EVERY: Final = 1.0
"""The interval at which each sentinel is asked while the bus runs, in seconds."""

_MOST_NAMED: Final = 5


@dataclass(frozen=True)
class Answer:
    """Where the primary is, as one sentinel knows it.

    :ivar epoch: the number of its configuration, which grows with each failover; 0 if it does not tell.
    """

    host: str
    port: int
    epoch: int

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    @property
    def place(self) -> str:
        return f"{self.host}:{self.port}"

    def is_older_than(self, other: Answer | None) -> bool:
        return other is not None and self.epoch < other.epoch


class NotNamedError(Exception):
    """Why a sentinel has not named the primary.

    :ivar can_pass: whether another answer may come without anybody's doing.
    """

    def __init__(self, text: str, *, can_pass: bool) -> None:
        super().__init__(text)
        self.can_pass = can_pass


class SentinelLocator(Locator):
    """Knows what the sentinels have told.

    :param settings: of the service, with its sentinels.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.service is not None
        self._settings = settings
        self._service = settings.service
        self.news = anyio.Event()
        self._sentinels = list(settings.sentinels)
        """The one whose last answer led to a primary comes first."""
        self._asking = anyio.Lock()
        self._rounds = 0
        self._found: tuple[Settings, Answer] | list[NotNamedError] = []
        self._newest: Answer | None = None
        self._links: WeakKeyDictionary[Link, Answer] = WeakKeyDictionary()

    async def open(self, *, entering: bool) -> Link:
        """Connect to the server that a sentinel names, and check that it is a primary. Nothing was written before.

        :raises BackendError: if no sentinel names one, if there is no connection, or if the server is not a primary.
        """
        sentinel, answer = await self._find(entering=entering)
        try:
            link = await self._open_primary(self._settings.at(*answer.address), entering=entering)
        except BackendError:
            self._ask_last(sentinel)
            raise
        newest = self._newest
        if newest is not None and answer.is_older_than(newest) and answer.address != newest.address:
            await link.aclose()
            raise broken(f"{link.settings.place} is not the primary any more", may_have_happened=False)
        self._links[link] = answer
        return link

    async def _open_primary(self, settings: Settings, *, entering: bool) -> Link:
        link = await open_link(settings, entering=entering)
        try:
            role = await _role(link)
            if role not in (None, "master"):
                text = f"{settings.place} is a {role}, although a sentinel named it as the primary"
                raise broken(text, may_have_happened=False)
        except ServerError as error:
            await link.aclose()
            raise translate(error, entering=entering) from error
        except (*BROKEN, *UNEXPECTED) as error:
            await link.aclose()
            text = f"the connection to {settings.place} broke: {words(error)}"
            raise broken(text, may_have_happened=False) from error
        except BaseException:
            await link.aclose()
            raise
        return link

    async def _find(self, *, entering: bool) -> tuple[Settings, Answer]:
        """The primary, and the sentinel that named it. Whoever asks at the same time shares one answer."""
        rounds = self._rounds
        async with self._asking:
            if rounds == self._rounds:
                self._found = await self._ask_sentinels()
                self._rounds += 1
            found = self._found
        if isinstance(found, list):
            raise self._not_found(found, entering=entering)
        return found

    async def _ask_sentinels(self) -> tuple[Settings, Answer] | list[NotNamedError]:
        found: list[tuple[Settings, Answer]] = []
        refusals: list[NotNamedError] = []
        async with anyio.create_task_group() as tasks:

            async def question(sentinel: Settings, answered: anyio.Event) -> None:
                try:
                    answer = await _ask_once(sentinel, self._service)
                except NotNamedError as refusal:
                    refusals.append(refusal)
                else:
                    found.append((sentinel, answer))
                    if not answer.is_older_than(self._newest):
                        tasks.cancel_scope.cancel()
                answered.set()

            for sentinel in list(self._sentinels):
                answered = anyio.Event()
                tasks.start_soon(question, sentinel, answered)
                with anyio.move_on_after(_PATIENCE):
                    await answered.wait()
        if not found:
            return refusals
        sentinel, answer = max(found, key=_epoch_of)
        if answer.is_older_than(self._newest):
            if 2 * len(found) <= len(self._settings.sentinels):
                text = f"{sentinel.place} names {answer.place}, but its configuration is older than one that was known"
                return [*refusals, NotNamedError(text, can_pass=True)]
            # A failover has a majority. So these sentinels were not cut off from one: they were set up anew, and have
            # begun to count again.
            self._newest = None
        outdated = self._learn(answer, None)
        self._sentinels.remove(sentinel)
        self._sentinels.insert(0, sentinel)
        for link in outdated:
            await link.revoke(_reason(answer))
        return sentinel, answer

    def _ask_last(self, sentinel: Settings) -> None:
        self._sentinels.remove(sentinel)
        self._sentinels.append(sentinel)

    def _not_found(self, refusals: list[NotNamedError], *, entering: bool) -> BackendError:
        told = "; ".join(str(refusal) for refusal in refusals)
        return BackendError(
            f"no sentinel named a primary of service {self._service!r}: {told}",
            may_have_happened=False,
            can_pass=not entering or any(refusal.can_pass for refusal in refusals),
        )

    async def watch(self) -> None:
        """Ask each sentinel every second. Close the connections to a server that is not the primary any more."""
        async with anyio.create_task_group() as tasks:
            for sentinel in self._settings.sentinels:
                tasks.start_soon(persist, partial(self._watch, sentinel))

    async def _watch(self, sentinel: Settings) -> None:
        before: Answer | None = None
        said = False
        while True:
            try:
                link = await _open_sentinel(sentinel)
                try:
                    while True:
                        answer = await _primary(link, self._service)
                        said = False
                        for outdated in self._learn(answer, before):
                            await outdated.revoke(_reason(answer))
                        before = answer
                        await anyio.sleep(_EVERY)
                finally:
                    await link.aclose()  # noqa: ASYNC102 - shielded inside
            except NotNamedError as refusal:
                if not said:
                    said = True
                    text = "a sentinel does not help to follow a failover of service %r: %s"
                    say(logging.WARNING, text, self._service, str(refusal), hidden={"scope": "connection"})
            await anyio.sleep(_EVERY)

    def _learn(self, answer: Answer, before: Answer | None) -> list[Link]:
        """Note an answer. Returns the connections to a server that is not the primary any more, which must be closed.

        With the same epoch, sentinels may have different names for one server (a host name and an address). Then only a
        sentinel that has changed its own mind is believed.

        :param before: what the same sentinel said before.
        """
        if answer.is_older_than(self._newest):
            return []
        if self._newest is None or self._newest.is_older_than(answer):
            self._newest = answer
            self.news.set()
            self.news = anyio.Event()
        left = None if before is None else before.address
        return [
            link
            for link, at in list(self._links.items())
            if at.address != answer.address and (at.epoch < answer.epoch or at.address == left)
        ]


def _epoch_of(found: tuple[Settings, Answer]) -> int:
    return found[1].epoch


def _reason(answer: Answer) -> str:
    return f"the sentinels name another primary, {answer.place}"


async def _role(link: Link) -> str | None:
    """What the server says it is; None if it does not tell. (Then it is not known; but a replica refuses to write.)

    A user may lack the right to ROLE, but not to HELLO.
    """
    replies = await ask(link, [("ROLE",), ("HELLO",)])
    role, hello = replies
    if not isinstance(role, ServerError):
        return str(role[0].decode())
    if not isinstance(hello, ServerError):
        return str(dict(zip(hello[::2], hello[1::2], strict=True))[b"role"].decode())
    await tolerate(link, replies)
    return None


async def _ask_once(sentinel: Settings, service: str) -> Answer:
    link = await _open_sentinel(sentinel)
    try:
        return await _primary(link, service)
    finally:
        await link.aclose()  # noqa: ASYNC102 - shielded inside


async def _open_sentinel(sentinel: Settings) -> Link:
    """
    :raises NotNamedError: if there is no connection.
    """
    try:
        return await open_link(sentinel, entering=True)
    except BackendError as error:
        text = str(error)
        if not error.can_pass:
            text += " (a sentinel's own credentials are sentinel_username and sentinel_password)"
        raise NotNamedError(
            text if sentinel.place in text else f"{sentinel.place}: {text}", can_pass=error.can_pass
        ) from error


async def _primary(link: Link, service: str) -> Answer:
    """Ask a sentinel for the primary.

    :raises NotNamedError: if it does not know it, or does not answer.
    """
    place = link.settings.place
    try:
        named, state = await ask(
            link, [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service), ("SENTINEL", "MASTER", service)]
        )
        if isinstance(named, ServerError):
            raise named
        if named is None:
            raise NotNamedError(f"{place} knows {await _known(link)}", can_pass=False)
        return Answer(named[0].decode(), int(named[1]), _epoch(state))
    except ServerError as error:
        if "unknown command" in str(error).lower():
            text = (
                "is not a sentinel: it does not know the command SENTINEL (sentinels listen on port 26379 by default)"
            )
            raise NotNamedError(f"{place} {text}", can_pass=False) from error
        raise NotNamedError(f"{place}: {translate(error)}", can_pass=not is_permanent(error)) from error
    except BROKEN as error:
        raise NotNamedError(f"the connection to {place} broke: {words(error)}", can_pass=True) from error
    except UNEXPECTED as error:
        raise NotNamedError(f"unexpected reply from {place}: is it a sentinel?", can_pass=True) from error


def _epoch(state: Any) -> int:
    """The epoch in a reply to SENTINEL MASTER, which a user may lack the right to."""
    if isinstance(state, ServerError):
        return 0
    return int(dict(zip(state[::2], state[1::2], strict=True))[b"config-epoch"])


async def _known(link: Link) -> str:
    """Which services a sentinel knows."""
    [reply] = await ask(link, [("SENTINEL", "MASTERS")])
    if isinstance(reply, ServerError):
        return "no such service"
    names = sorted(dict(zip(state[::2], state[1::2], strict=True))[b"name"].decode() for state in reply)
    if not names:
        return "no service"
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"only {', '.join(map(repr, names[:_MOST_NAMED]))}{more}"
