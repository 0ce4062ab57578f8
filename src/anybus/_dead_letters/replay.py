"""Replay: dead letters go back to where they came from."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import anyio

from .._failure.copies import restored, retry_stream
from .._ground.callables import check_function
from .._ground.checks import check_number, refuse
from .._ground.errors import EventBusError, GroupLostError, ValidationError, can_pass
from .._reporting import Reporter
from ..abc import DeadLetterStore, Move
from .letter import DeadLetter
from .pages import PAGE_COUNT, Found

STEPS_PER_SECOND: Final = 20
"""A replay with a rate goes in steps of so many messages that there are at most so many steps in a second."""

_MOST: Final = sys.float_info.max

ReplayTarget = Literal["topic", "group"]
REPLAY_TARGETS: Final[tuple[ReplayTarget, ...]] = ("topic", "group")
ReplayOutcome = Literal["replayed", "gone", "failed"]


@dataclass(frozen=True)
class ReplayReport:
    """What a replay did (of a dry run: would do).

    :ivar replayed: dead letters that were sent back.
    :ivar gone: dead letters that were not there any more, or are not among those that are meant.
    :ivar failed: dead letters that could not be sent back, and stay where they are.
    :ivar dry_run: true = nothing was changed.
    """

    replayed: int = 0
    gone: int = 0
    failed: int = 0
    dry_run: bool = False


@dataclass(frozen=True)
class ReplayProgress:
    """What became of one dead letter.

    :ivar id: its entry's id in the dead-letter topic.
    :ivar outcome: ``replayed`` (in a dry run: would be), ``gone`` or ``failed``.
    :ivar letter: the dead letter; None = it was gone before it could be read.
    :ivar stream: where it was sent.
    :ivar new_id: its id there; None in a dry run.
    :ivar error: why it failed.
    :ivar so_far: the counts, this one included.
    """

    id: str
    outcome: ReplayOutcome
    letter: DeadLetter | None
    stream: str | None
    new_id: str | None
    error: EventBusError | None
    so_far: ReplayReport


def check_progress(function: Any) -> None:
    if function is not None:
        check_function("on_progress", function, "a plain function of one ReplayProgress", otherwise=", or None")


class Pace:
    """At most so many messages a second, in steps; what was late is not made up for."""

    def __init__(self, rate: Any) -> None:
        self.step = PAGE_COUNT
        self._interval = 0.0
        self._due = -math.inf
        if rate is None:
            return
        allowed = "a positive, finite number of messages per second, or None"
        rate = check_number("rate", rate, allowed)
        if not 0 < rate < _MOST:
            refuse("rate", rate, allowed)
        self._interval = 1 / rate
        if math.isinf(self._interval):
            refuse("rate", rate, allowed)
        self.step = max(1, min(PAGE_COUNT, int(rate / STEPS_PER_SECOND)))

    async def wait(self, count: int) -> None:
        """Returns when so many more may go."""
        if (wait := self._due - anyio.current_time()) > 0:
            await anyio.sleep(wait)
        self._due = max(self._due, anyio.current_time()) + count * self._interval


class Replay:
    """Sends letters back, and counts."""

    def __init__(
        self,
        store: DeadLetterStore,
        stream: str,
        topic: str,
        to: ReplayTarget,
        dry_run: bool,
        on_progress: Callable[[ReplayProgress], None] | None,
        reporter: Reporter,
    ) -> None:
        self.report = ReplayReport(dry_run=dry_run)
        self._store = store
        self._stream = stream
        self._topic = topic
        self._to = to
        self._on_progress = on_progress
        self._reporter = reporter

    async def send(self, found: Sequence[Found]) -> None:
        """Move those that can be moved, in one step each; tell of all, in their order."""
        groups: dict[str, EventBusError | None] = {}
        if self._to == "group":
            for group in {one.letter.group for one in found if one.letter is not None and one.letter.group}:
                groups[group] = await self._what_keeps_from(group)
        plans = [self._plan(one, groups) for one in found]
        moves = [plan for plan in plans if isinstance(plan, Move)]
        results: list[str | EventBusError | None]
        if self.report.dry_run:
            results = ["" for _ in moves]
        else:
            results = await self._store.move_entries(self._stream, moves) if moves else []
        outcomes = iter(results)
        for one, plan in zip(found, plans, strict=True):
            self._tell(one, plan, next(outcomes) if isinstance(plan, Move) else plan)

    async def _what_keeps_from(self, group: str) -> EventBusError | None:
        try:
            there = await self._store.has_group(retry_stream(self._topic, group), group)
        except EventBusError as error:
            if can_pass(error):
                raise
            return error  # this group's alone: a key of another type, no right to it
        return None if there else GroupLostError(self._topic, group)

    def _plan(self, one: Found, groups: dict[str, EventBusError | None]) -> Move | EventBusError | None:
        letter = one.letter
        if letter is None:
            return None
        if letter.error is not None:
            return ValidationError(f"dead letter {one.id} cannot be decoded: {letter.error}")
        if letter.code == "malformed" and not letter.raw_sizes:
            return ValidationError(f"dead letter {one.id} was malformed, and its raw fields have not been kept")
        if self._to == "topic":
            return Move(one.id, self._topic, letter.message)
        if not letter.group:
            return ValidationError(f"dead letter {one.id} does not say which group gave it up")
        if (error := groups[letter.group]) is not None:
            return error
        message = letter.message and restored(letter.message, self._topic, first_id=letter.first_id)
        return Move(one.id, retry_stream(self._topic, letter.group), message)

    def _tell(self, one: Found, plan: Move | EventBusError | None, result: str | EventBusError | None) -> None:
        stream = plan.stream if isinstance(plan, Move) else None
        new_id = error = None
        outcome: ReplayOutcome = "gone"
        if isinstance(result, EventBusError):
            outcome, error = "failed", result
        elif result is not None:
            outcome, new_id = "replayed", result or None
            if new_id is not None:
                detail = f"replayed from {self._stream!r} to {stream!r}"
                self._reporter.tell("on_published", "published", topic=self._topic, message_id=new_id, detail=detail)
        self.report = replace(self.report, **{outcome: getattr(self.report, outcome) + 1})
        if self._on_progress is not None:
            self._on_progress(ReplayProgress(one.id, outcome, one.letter, stream, new_id, error, self.report))
