"""The operator's view of dead letters: list, replay and purge them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from .._ground.checks import check_choice, check_int, check_name, check_text, check_topic, refuse
from .._ground.errors import UnsupportedError
from .._reporting import Reporter
from ..abc import DeadLetterStore, StreamBackend
from .letter import DeadLetter, LetterFilter
from .pages import PAGE_BYTES, AllMatching, Chosen, LetterIterator
from .replay import REPLAY_TARGETS, Pace, Replay, ReplayProgress, ReplayReport, ReplayTarget, check_progress


@dataclass(frozen=True)
class DeadLetterPage:
    """A page of dead letters.

    :ivar letters: the dead letters, oldest first.
    :ivar next: pass it to :meth:`DeadLetters.page` as ``after`` to get the next page; None = there are no more.
    """

    letters: tuple[DeadLetter, ...]
    next: str | None


class DeadLetters:
    """The dead letters of a topic that match the filters. Created by :meth:`anybus.StreamBus.dead_letters`.

    ``async for letter in letters`` iterates over them, oldest first, up to the last one that existed at the start. It
    changes nothing, and can be left at any time: it holds no task and no lock, and at most one page of about 1 MiB (or
    one larger letter) in memory.

    Every method raises :class:`BackendError` if the backend fails, and :class:`ClosedError` if the bus is not open.
    """

    def __init__(
        self,
        store: DeadLetterStore,
        stream: str,
        only: LetterFilter,
        *,
        check_open: Callable[[], None],
        reporter: Reporter,
    ) -> None:
        self._store = store
        self._stream = stream
        self._only = only
        self._check_open = check_open
        self._reporter = reporter

    def __repr__(self) -> str:
        return f"<DeadLetters in {self._stream!r}: {self._only}>"

    @property
    def dead_letter_topic(self) -> str:
        """The topic that holds the dead letters."""
        return self._stream

    def __aiter__(self) -> AsyncIterator[DeadLetter]:
        return LetterIterator(self._source(None))

    def _source(self, chosen: Sequence[str] | None) -> AllMatching | Chosen:
        if chosen is None:
            return AllMatching(self._store, self._stream, self._only, self._check_open)
        return Chosen(self._store, self._stream, self._only, self._check_open, chosen)

    async def page(self, after: str | None = None, *, limit: int = 50) -> DeadLetterPage:
        """One page, oldest first: at most ``limit`` dead letters, fewer if they are large.

        A page is empty only if there are no more.

        :param after: a dead letter's id: the page starts after it; None = the page starts with the oldest.
        :raises ValidationError: if ``after`` is not an entry's id, or ``limit`` is less than 1.
        """
        limit = check_int("limit", limit, least=1)
        if after is not None:
            after = check_name("after", after)
        source = AllMatching(self._store, self._stream, self._only, self._check_open, after=after, count=limit)
        letters: list[DeadLetter] = []
        left = PAGE_BYTES
        while found := await source.next():
            for one in found:
                assert one.letter is not None
                left -= one.size
                if letters and (left < 0 or len(letters) == limit):
                    return DeadLetterPage(tuple(letters), letters[-1].id)
                letters.append(one.letter)
        return DeadLetterPage(tuple(letters), None)

    async def replay(
        self,
        letters: Iterable[DeadLetter | str] | None = None,
        *,
        to: ReplayTarget = "topic",
        rate: float | None = None,
        dry_run: bool = False,
        on_progress: Callable[[ReplayProgress], None] | None = None,
    ) -> ReplayReport:
        """Send back the dead letters that exist at the start, oldest first.

        Each one is appended to its target and removed from the dead-letter topic in one step. So a replay loses and
        duplicates nothing, even if it is interrupted, or if two replays run at the same time. To continue an
        interrupted replay, call it again.

        :param letters: the chosen dead letters or their ids, in the order in which they are sent; None = all that
            match.
        :param to: ``topic``: all groups of the topic see the messages. ``group``: only the group that gave up on a
            message sees it, through the group's own retry stream; if the group no longer exists, the letter fails.
        :param rate: the maximum number of messages per second; None = no limit.
        :param dry_run: change nothing, and report what would be done.
        :param on_progress: a plain function that is called with one :class:`ReplayProgress` for every dead letter. If
            it raises, the replay ends with that error.
        :raises ValidationError: if a parameter is refused.
        """
        chosen = _chosen(letters)
        to = check_choice("to", to, REPLAY_TARGETS, allowed="'topic' or 'group'")
        pace = Pace(rate)
        check_progress(on_progress)
        replay = Replay(self._store, self._stream, self._only.topic, to, dry_run, on_progress, self._reporter)
        source = self._source(chosen)
        while found := await source.next():
            for start in range(0, len(found), pace.step):
                part = found[start : start + pace.step]
                if not dry_run:
                    await pace.wait(len(part))
                self._check_open()
                await replay.send(part)
        return replay.report

    async def purge(self, letters: Iterable[DeadLetter | str] | None = None, *, dry_run: bool = False) -> int:
        """Permanently delete the dead letters that exist at the start.

        :param letters: the chosen dead letters or their ids; None = all that match.
        :param dry_run: delete nothing, only count.
        :return: how many this call deleted. For a dry run: how many it would delete.
        :raises ValidationError: if ``letters`` is refused.
        """
        removed = 0
        source = self._source(_chosen(letters))
        while found := await source.next():
            ids = [one.id for one in found if one.letter is not None]
            self._check_open()
            removed += len(ids) if dry_run else await self._store.remove_entries(self._stream, ids)
        return removed


def _chosen(letters: Any) -> list[str] | None:
    """The ids, without duplicates."""
    if letters is None:
        return None
    if isinstance(letters, (str, DeadLetter)) or not isinstance(letters, Iterable):
        refuse("letters", letters, "an iterable of dead letters or their ids, or None")
    ids: dict[str, None] = {}
    for letter in cast("Iterable[object]", letters):
        if not isinstance(letter, (str, DeadLetter)):
            refuse("letters", letter, "an iterable of dead letters or their ids, or None")
        ids[check_text("letters", letter if isinstance(letter, str) else letter.id)] = None
    return list(ids)


def open_dead_letters(
    backend: StreamBackend,
    stream: str | None,
    only: LetterFilter,
    *,
    check_open: Callable[[], None],
    reporter: Reporter,
) -> DeadLetters:
    """Implements :meth:`anybus.StreamBus.dead_letters`, and raises its errors."""
    if stream is None:
        stream = f"{only.topic}.dead"
    stream = check_topic("dead_letter_topic", stream)
    if stream == only.topic:
        refuse("dead_letter_topic", stream, "a topic other than the one from which the dead letters come")
    if not isinstance(backend, DeadLetterStore):
        raise UnsupportedError(
            f"{type(backend).__name__} cannot list dead letters: it does not implement anybus.abc.DeadLetterStore"
        )
    return DeadLetters(backend, stream, only, check_open=check_open, reporter=reporter)
