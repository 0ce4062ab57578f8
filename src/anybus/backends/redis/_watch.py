"""Watches the groups of all subscriptions of a bus together, so that a quiet one costs little.

A group is *busy* while entries of it are pending, or retries of it are unread. Its subscriptions make a pass at each
interval. For all others, one script a time asks whether entries were released, or are due. A second script asks every
few seconds, group by group, which groups are busy, and marks the members as running.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from ..._failure.copies import retry_stream
from ..._ground.cancellation import is_stray, sole
from ..._ground.errors import BackendError
from ...abc._backend import SIGN_INTERVAL
from ._client import Client
from ._errors import has_code
from ._keys import delayed, leases, waiting
from ._lease_scripts import LONGEST
from ._protocol import Argument, Command, ServerError
from ._schedules import Expect
from ._upkeep import Upkeep
from ._watch_scripts import CHECK, LOOK

_LOOKED_AT: Final = 400
_CHECKED: Final = 25
"""How many groups one call looks at, or checks: about a millisecond of the server's time."""

_SOON: Final = 1000
"""Within how many ms a message must become due to be expected."""

_CHECKED_AT_ONCE: Final = 100
_TICK: Final = 0.5

Member = tuple[str, str, str]


class Post:
    """A member that is watched.

    :ivar due: the member waits for a pass; set when one is due.
    :ivar differs: set when the group's lease may be another one than the member's.
    """

    __slots__ = (
        "busy",
        "checked_at",
        "consumer",
        "differs",
        "due",
        "group",
        "interval",
        "keys",
        "lease",
        "min_idle",
        "retry_stream",
        "since",
        "state",
        "stream",
        "woken_at",
    )

    def __init__(self, stream: str, group: str, consumer: str) -> None:
        self.stream = stream
        self.group = group
        self.consumer = consumer
        self.retry_stream = retry_stream(stream, group)
        self.keys = (delayed(stream), delayed(self.retry_stream), waiting(stream, group))
        self.lease: float | None = None
        self.min_idle = math.inf
        self.interval = _TICK
        self.busy = True
        self.checked_at = -math.inf
        self.due: anyio.Event | None = None
        self.since = 0.0
        self.woken_at = -math.inf
        self.differs = anyio.Event()
        self.state: Sequence[Any] = ()

    @property
    def pause(self) -> float:
        """For how many seconds at most the member is not checked: three checks in the time for which it is marked, and
        two before the lease of an entry expires."""
        return min(SIGN_INTERVAL, self.min_idle / 3, math.inf if self.lease is None else self.lease / 3)


class Watch:
    """Wakes members when a pass would find something.

    :param expect: called when something will soon be due on a topic.
    :param together: streams with the same result may be named in one command.
    """

    def __init__(self, client: Client, upkeep: Upkeep, expect: Expect, together: Callable[[str], Hashable]) -> None:
        self._client = client
        self._upkeep = upkeep
        self._expect = expect
        self._together = together
        self._looked_at = -math.inf
        self._posts: dict[Member, Post] = {}
        self._scope: anyio.CancelScope | None = None
        self._tasks: TaskGroup | None = None
        self._alarm: Callable[[BaseException], None] = _ignore
        self._tick = _TICK
        self._nap: anyio.CancelScope | None = None

    def start(self, tasks: TaskGroup, alarm: Callable[[BaseException], None]) -> None:
        """
        :param tasks: while there is a member, the watch runs in this task group.
        :param alarm: called with an error that must end the bus.
        """
        self._tasks = tasks
        self._alarm = alarm

    def close(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
        self.dismiss()

    def forget(self, member: Member) -> None:
        self._posts.pop(member, None)

    def dismiss(self, which: Callable[[Member], bool] = lambda member: True) -> None:
        """Forget members, and wake them: from now on, they are watched elsewhere."""
        for member in [member for member in self._posts if which(member)]:
            post = self._posts.pop(member)
            _wake((post,))
            post.differs.set()

    def covers(self, member: Member, interval: float) -> bool:
        """Whether entries of the member's topic that become due are noticed within this time."""
        post = self._posts.get(member)
        if post is None or post.interval > interval:
            return False
        return post.due is not None or anyio.current_time() - post.woken_at <= interval

    async def until_pass_is_due(
        self, stream: str, group: str, consumer: str, *, min_idle: float, interval: float
    ) -> None:
        if self._client.mux.closed.is_set():
            return  # the pass that follows is told so
        post = self._man(stream, group, consumer)
        post.min_idle = min_idle
        post.interval = interval
        post.since = anyio.current_time()
        due = post.due = anyio.Event()
        self._keep_up_with(post)
        try:
            await due.wait()
        finally:
            post.due = None
            post.woken_at = anyio.current_time()

    async def until_lease_may_differ(self, stream: str, group: str, consumer: str, lease: float) -> None:
        """Mark a member as running, until its group's lease may be another one."""
        if self._client.mux.closed.is_set():
            return
        post = self._man(stream, group, consumer)
        post.lease = lease
        post.differs = anyio.Event()
        self._keep_up_with(post)
        await post.differs.wait()

    def _keep_up_with(self, post: Post) -> None:
        if self._nap is not None and min(post.interval, post.pause) < self._tick:
            self._nap.cancel()

    def _man(self, stream: str, group: str, consumer: str) -> Post:
        member = (stream, group, consumer)
        post = self._posts.get(member)
        if post is None:
            post = self._posts[member] = Post(stream, group, consumer)
        if self._scope is None:
            assert self._tasks is not None
            self._scope = anyio.CancelScope(shield=True)
            self._tasks.start_soon(self._run, self._scope)
        return post

    async def _run(self, scope: anyio.CancelScope) -> None:
        """Shielded: if everything is cancelled, members are still marked as running until they have ended."""
        try:
            with scope:
                while self._posts and not self._client.mux.closed.is_set():
                    try:
                        await self._watch()
                    except BaseException as error:  # noqa: ASYNC103 - a real cancellation is raised again
                        if not is_stray(error):
                            if isinstance(error, anyio.get_cancelled_exc_class()):
                                raise
                            self._alarm(sole(error))
        finally:
            self._scope = None

    async def _watch(self) -> None:
        closed = self._client.mux.closed
        while self._posts:
            tick = self._tick = min(_TICK, *(min(post.interval, post.pause) for post in self._posts.values()))
            with anyio.move_on_after(tick) as self._nap:
                await closed.wait()
            if closed.is_set() or not self._posts:
                return
            try:
                await self._round(tick)
            except BackendError:
                # Passes meet the same error, and report it.
                _wake(post for post in self._posts.values() if post.due is not None)

    async def _round(self, tick: float) -> None:
        now = anyio.current_time()
        # Those whose wait has just begun have just made a pass, which left what it could not take.
        asleep = [
            post for post in self._posts.values() if post.due is not None and now - post.since >= post.interval / 2
        ]
        quiet = {post for post in asleep if not post.busy}
        looked_at = list(self._parts(self._looks(quiet, now), _LOOKED_AT))
        checked = list(self._parts(self._take_turns(now, tick), _CHECKED))
        commands = [self._look(part) for part in looked_at] + [self._check(part) for part in checked]
        call = await self._client.mux.start(commands) if commands else None
        _wake(post for post in asleep if post.busy)
        if call is None:
            return
        await call.event.wait()
        if call.error is not None:
            raise call.error
        await self._react(looked_at, quiet, checked, call.replies)

    def _looks(self, quiet: Collection[Post], now: float) -> Iterable[Post]:
        """Those that are quiet, for a pass. And, twice a second, all others: messages become due there, too."""
        if len(quiet) == len(self._posts):
            self._looked_at = now
        if now - self._looked_at < _TICK * 0.9:
            return (post for post in self._posts.values() if post in quiet)
        self._looked_at = now
        return self._posts.values()

    def _take_turns(self, now: float, tick: float) -> list[Post]:
        """Those that are to be checked now. If there are many, a part of them."""
        taken: list[Post] = []
        pause = min(post.pause for post in self._posts.values())
        most = max(_CHECKED_AT_ONCE, math.ceil(2 * len(self._posts) * tick / pause))
        for member, post in list(self._posts.items()):
            if len(taken) == most:
                break
            if now - post.checked_at >= post.pause - tick / 2:
                post.checked_at = now
                taken.append(post)
                self._posts[member] = self._posts.pop(member)  # to the end of the line
        return taken

    def _parts(self, posts: Iterable[Post], most: int) -> Iterator[list[Post]]:
        """Parts that fit into one command each."""
        for _, group in groupby(posts, lambda post: self._together(post.stream)):
            part = list(group)
            for start in range(0, len(part), most):
                yield part[start : start + most]

    def _look(self, posts: Sequence[Post]) -> Command:
        return self._client.unwatched(LOOK, [key for post in posts for key in post.keys], (_SOON,))

    def _check(self, posts: Sequence[Post]) -> Command:
        keys: list[str] = []
        args: list[Argument] = []
        for post in posts:
            keys += (leases(post.stream, post.group), post.stream, post.retry_stream)
            lease, alive = "", 0
            if post.lease is not None:
                lease, alive = repr(post.lease), running_for(post.lease)
            args += (post.group, post.consumer, lease, alive)
        return self._client.unwatched(CHECK, keys, args)

    async def _react(
        self, looked_at: list[list[Post]], quiet: Collection[Post], checked: list[list[Post]], replies: list[Any]
    ) -> None:
        forgotten = [reply for reply in replies if isinstance(reply, ServerError) and has_code(reply, "NOSCRIPT")]
        if forgotten:
            await self._client.load_scripts()
        for part, reply in zip(looked_at, replies, strict=False):
            if isinstance(reply, ServerError):
                self._client.refused(reply)  # it may be the wrong server, now
                _wake(post for post in part if post in quiet)
            else:
                with self._client.reading(reply):
                    found: list[int] = reply[0]
                    soon: list[tuple[int, int]] = reply[1]
                    _wake(post for index in found if (post := part[index - 1]) in quiet)
                    for index, wait in soon:
                        self._expect(part[index - 1].stream, wait / 1000, False)
        for part, reply in zip(checked, replies[len(looked_at) :], strict=True):
            if isinstance(reply, ServerError):
                self._client.refused(reply)
                for post in part:
                    post.busy = True
            else:
                with self._client.reading(reply):
                    for post, result in zip(part, reply, strict=True):
                        await self._note(post, result)

    async def _note(self, post: Post, result: list[Any]) -> None:
        if len(result) == 1:
            # The member asks by itself, and gets the same error.
            post.busy = True
            post.differs.set()
            return
        kept, *state = result
        if post.lease is not None and kept and float(kept) != post.lease:
            post.differs.set()
        pending, _, retrying, _, unread = state
        post.busy = bool(pending or retrying or unread)
        if post.min_idle < math.inf:
            floors = post.busy or state != post.state
            post.state = state
            maintain = self._upkeep.commands(
                post.stream, post.retry_stream, post.group, post.consumer, post.min_idle, floors=floors
            )
            await self._client.mux.start(maintain)


def _ignore(error: BaseException) -> None:
    """Until the watch is started, nothing runs that could fail."""


def running_for(lease: float) -> int:
    """For how many ms a member with this lease counts as running after each mark."""
    return max(1, min(int(lease * 1000), LONGEST))


def _wake(posts: Iterable[Post]) -> None:
    for post in posts:
        if post.due is not None:
            post.due.set()
