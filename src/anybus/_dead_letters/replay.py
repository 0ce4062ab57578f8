"""Replay: dead letters are sent back to where they came from."""

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
from .._messages.message import Message
from .._reporting import Reporter
from ..abc import DeadLetterStore, Move
from .letter import DeadLetter
from .pages import PAGE_COUNT, Found

STEPS_PER_SECOND: Final = 20
"""How many steps per second a replay with a rate makes at most. The size of a step follows from the rate."""

_MOST: Final = sys.float_info.max

ReplayTarget = Literal["topic", "group"]
REPLAY_TARGETS: Final[tuple[ReplayTarget, ...]] = ("topic", "group")
ReplayOutcome = Literal["replayed", "gone", "failed"]


@dataclass(frozen=True)
class ReplayReport:
    """What a replay did. For a dry run: what a replay would do.

    :ivar replayed: how many dead letters were sent back.
    :ivar gone: how many dead letters no longer existed, or do not match the filters.
    :ivar failed: how many dead letters could not be sent back. They stay where they are.
    :ivar dry_run: true = nothing was changed.
    """

    replayed: int = 0
    gone: int = 0
    failed: int = 0
    dry_run: bool = False


@dataclass(frozen=True)
class ReplayProgress:
    """What happened to one dead letter.

    :ivar id: the entry's id in the dead-letter topic.
    :ivar outcome: ``replayed`` (in a dry run: would be replayed), ``gone`` or ``failed``.
    :ivar letter: the dead letter; None = it was gone before it could be read, or does not match the filters.
    :ivar stream: the stream to which it was sent; None = it was not sent.
    :ivar new_id: its id in that stream; None in a dry run.
    :ivar error: why it failed.
    :ivar so_far: the counts so far, including this dead letter.
    """

    id: str
    outcome: ReplayOutcome
    letter: DeadLetter | None
    stream: str | None
    new_id: str | None
    error: EventBusError | None
    so_far: ReplayReport


def _lasting(message: Message) -> Message:
    """The message without ``expires_at``: who sends a dead letter back wants it to be handled."""
    return message if message.expires_at is None else message.replace(expires_at=None)


def check_progress(function: Any) -> None:
    if function is not None:
        check_function("on_progress", function, "a plain function that takes one ReplayProgress", otherwise=", or None")


class Pace:
    """Limits a replay to a number of messages per second, in steps. After a delay it does not go faster to catch up."""

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
        """Wait until this many more messages may be sent."""
        if (wait := self._due - anyio.current_time()) > 0:
            await anyio.sleep(wait)
        self._due = max(self._due, anyio.current_time()) + count * self._interval


class Replay:
    """Sends dead letters back, and counts them."""

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
        """Move those that can be moved, each in one step. Report all of them, in order."""
        groups: dict[str, EventBusError | None] = {}
        if self._to == "group":
            for group in {one.letter.group for one in found if one.letter is not None and one.letter.group}:
                groups[group] = await self._obstacle(group)
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

    async def _obstacle(self, group: str) -> EventBusError | None:
        try:
            there = await self._store.has_group(retry_stream(self._topic, group), group)
        except EventBusError as error:
            if can_pass(error):
                raise
            return error  # concerns this group only: a key of another type, or no permission for it
        return None if there else GroupLostError(self._topic, group)

    def _plan(self, one: Found, groups: dict[str, EventBusError | None]) -> Move | EventBusError | None:
        letter = one.letter
        if letter is None:
            return None
        if letter.error is not None:
            return ValidationError(f"dead letter {one.id} cannot be decoded: {letter.error}")
        if letter.code == "malformed" and not letter.raw_sizes:
            return ValidationError(f"dead letter {one.id} was malformed, and its raw fields were not kept")
        message = letter.message and _lasting(letter.message)
        if self._to == "topic":
            return Move(one.id, self._topic, message)
        if not letter.group:
            return ValidationError(f"dead letter {one.id} does not say which group gave up on it: use to='topic'")
        if (error := groups[letter.group]) is not None:
            return error
        message = message and restored(message, self._topic, first_id=letter.first_id)
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
