"""Declares the retention of topics, and trims those that the subscriptions of a bus use.

One task trims for all subscriptions of a bus. Each subscription has a task that waits for its turn to do this. If the
subscription ends that does it, another one takes over.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from functools import partial
from typing import Protocol

import anyio

from .._ground.checks import check_topic, refuse
from .._ground.errors import EventBusError, UnsupportedError, ValidationError, can_pass
from .._options import StreamBusOptions
from .._reporting import Notices, Reporter
from ..abc import Limits, Retention, RetentionKeeper, StreamBackend, Trimmed, WorkQueue
from ..abc._backend import result_or_error
from ..abc._retention import RETENTION, check_retention
from . import pace

_DEAD = ".dead"
_LONGEST_STEP = 2.0
"""After so many seconds, a call is no longer waited for."""


class Counts(Protocol):
    """Counters of a subscription."""

    received: int
    handled: int
    retried: int
    dead_lettered: int
    lost: int


class Ward:
    """A subscription: its topics are looked after."""

    def __init__(self, topic: str, group: str, dead_letter_topic: str | None, counts: Counts) -> None:
        self.topic = topic
        self.group = group
        self.dead_letter_topic = dead_letter_topic
        self.counts = counts

    @property
    def activity(self) -> int:
        """A number that changes when entries may have become superfluous."""
        counts = self.counts
        return counts.received + counts.handled + counts.retried + counts.dead_lettered


class Topic:
    """What is known of a topic."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.retention: Retention | None = None
        self.looked_at = -math.inf
        self.activity = 0
        self.more = False
        self.held: tuple[str | None, str | None] = (None, None)
        self.held_since = 0.0
        self.stall_told_at = -math.inf
        self.is_grown = False
        self.unlogged: dict[str, int] = {}
        self.logged_at: dict[str, float] = {}

    def is_due(self, now: float, activity: int) -> bool:
        is_active = self.retention is not None and activity != self.activity
        return self.more or now - self.looked_at >= (pace.LOOK if is_active else pace.QUIET) - pace.LOOK / 10


class Caretaker:
    """The retention of the topics of a bus.

    :raises UnsupportedError: if the options have a retention, and the backend cannot keep one.
    """

    def __init__(self, backend: StreamBackend, options: StreamBusOptions, notices: Notices) -> None:
        self._keeper = backend if isinstance(backend, RetentionKeeper) else None
        self._options = options
        self._notices = notices
        self._unsupported = f"{type(backend).__name__} cannot keep a topic's retention"
        if options.retention is not None:
            self._checked_keeper()
        self._trimmer = os.urandom(8).hex()
        self._wards: set[Ward] = set()
        self._topics: dict[str, Topic] = {}
        self._declared: dict[str, Retention] = {}
        self._turn = anyio.Lock()

    def _checked_keeper(self) -> RetentionKeeper:
        if self._keeper is None:
            raise UnsupportedError(self._unsupported)
        return self._keeper

    async def declare(self, topic: str, retention: Retention | None, *, change: bool) -> None:
        """See ``StreamBus.declare_topic``."""
        topic = check_topic("topic", topic)
        if retention is None:
            retention = self._options.retention
            if retention is None:
                refuse("retention", None, f"{RETENTION} (the bus has no default)")
        retention = check_retention("retention", retention)
        if not isinstance(change, bool):
            refuse("change", change, "True or False")
        is_dead = topic.endswith(_DEAD) or any(ward.dead_letter_topic == topic for ward in self._wards)
        if is_dead and not isinstance(retention, Limits):
            refuse("retention", retention, f"an anybus.Limits for the dead-letter topic {topic!r}: nobody handles it")
        stored = await self._checked_keeper().declare_retention(topic, retention, "change" if change else "declare")
        if stored != retention:
            refuse("retention", retention, f"{stored} for {topic!r}, as it is declared, unless change=True")
        self._declared[topic] = retention
        if topic in self._topics:
            del self._topics[topic]  # it is looked at anew

    async def admit(self, topic: str, group: str, *, made: bool) -> None:
        """Called when a subscription starts: before its group is created and, if it was created now, after it, too.

        :raises ValidationError: if the topic is the work queue of another group.
        """
        if self._keeper is None:
            return
        default = self._options.retention
        if default is not None and not made and not topic.endswith(_DEAD):
            await self._keeper.declare_retention(topic, default, "default")
        owner = await self._keeper.admit_group(topic, group, made=made)
        if owner is not None:
            raise ValidationError(
                f"group must be {owner!r} for {topic!r}, a work queue, which has only one group, not {group!r}: use "
                "another retention, or delete the other group first (docs/retention.md)"
            )

    async def tend(self, ward: Ward) -> None:
        """Look after the topics of a subscription, until cancelled."""
        if self._keeper is None:
            return
        self._wards.add(ward)
        try:
            async with self._turn:
                pause = pace.LOOK
                while True:
                    await anyio.sleep(pause)
                    pause = await self._look(self._keeper)
        finally:
            self._wards.discard(ward)

    async def _look(self, keeper: RetentionKeeper) -> float:
        """Look at the topics that are due. Returns how many seconds to wait for the next time."""
        due = self._due()
        if not due:
            return pace.LOOK
        began = anyio.current_time()
        # Shielded: the reply is needed for the report of what was lost.
        with anyio.move_on_after(_LONGEST_STEP, shield=True):
            await self._trim(keeper, due)
        took = anyio.current_time() - began
        return max(pace.REST * took, 0.001) if any(topic.more for topic in due) else pace.LOOK

    def _due(self) -> list[Topic]:
        now = anyio.current_time()
        activities: dict[str, int] = {}
        for ward in self._wards:
            activities[ward.topic] = activities.get(ward.topic, 0) + ward.activity
            if ward.dead_letter_topic is not None:
                activity = activities.get(ward.dead_letter_topic, 0) + ward.counts.dead_lettered
                activities[ward.dead_letter_topic] = activity
        for name in [name for name in self._topics if name not in activities]:
            del self._topics[name]
        due: list[Topic] = []
        for name, activity in activities.items():
            topic = self._topics.get(name)
            if topic is None:
                topic = self._topics[name] = Topic(name)
            if topic.is_due(now, activity):
                topic.looked_at = now
                topic.activity = activity
                due.append(topic)
        return due

    async def _trim(self, keeper: RetentionKeeper, topics: list[Topic]) -> None:
        trim = partial(keeper.trim, trimmer=self._trimmer)
        found = await result_or_error(trim, [topic.name for topic in topics])
        results: Iterable[Trimmed | EventBusError]
        results = [found] * len(topics) if isinstance(found, EventBusError) else found
        for topic, result in zip(topics, results, strict=True):
            topic.more = isinstance(result, Trimmed) and result.more
            if isinstance(result, Trimmed):
                await self._note(keeper, topic, result)
            elif not can_pass(result) and (topic.retention or self._wants(topic.name)) is not None:
                self._notices.once(f"the retention of {topic.name!r} cannot be applied: {result}")

    def _wants(self, name: str) -> Retention | None:
        """The retention that this bus has declared for a topic, or its default."""
        declared = self._declared.get(name)
        return self._options.retention if declared is None and not name.endswith(_DEAD) else declared

    async def _note(self, keeper: RetentionKeeper, topic: Topic, found: Trimmed) -> None:
        topic.retention = found.retention
        if found.retention is None:
            await self._note_undeclared(keeper, topic, found)
            return
        for ward in self._wards:
            if ward.topic == topic.name:
                ward.counts.lost = found.lost_in_all.get(ward.group, 0)
        for group, count in found.lost.items():
            self._tell_lost(topic, group, count, found.retention)
        if isinstance(found.retention, Limits) or found.busy:
            return
        if isinstance(found.retention, WorkQueue) and found.groups > 1:
            self._notices.once(
                f"{topic.name!r} is a work queue, and has {found.groups} groups: entries are kept until all of them "
                "have acknowledged them. Delete those that should not be there"
            )
        self._watch_holder(topic, found)

    async def _note_undeclared(self, keeper: RetentionKeeper, topic: Topic, found: Trimmed) -> None:
        wanted = self._wants(topic.name)
        if wanted is not None:
            # The server has lost it: it was emptied, or a failover came before the declaration was replicated.
            try:
                is_declared = topic.name in self._declared
                await keeper.declare_retention(topic.name, wanted, "declare" if is_declared else "default")
                topic.looked_at = -math.inf
            except EventBusError as error:
                if not can_pass(error):
                    self._notices.once(f"the retention of {topic.name!r} cannot be declared again: {error}")
        elif found.length >= pace.GROWN and not topic.is_grown:
            topic.is_grown = True
            detail = (
                f"{topic.name!r} has grown to {found.length} entries, and nothing removes them: declare its retention "
                "(docs/retention.md)"
            )
            self._reporter(topic).notice("on_topic_grown", "topic-grown", detail, count=found.length)

    def _reporter(self, topic: Topic, group: str | None = None) -> Reporter:
        return Reporter(self._options.observer, topic=topic.name, group=group)

    def _tell_lost(self, topic: Topic, group: str, count: int, retention: Retention) -> None:
        """The observer is told of every step. The log has one line in a while, with the sum."""
        reporter, now = self._reporter(topic, group), anyio.current_time()
        total = topic.unlogged.pop(group, 0) + count
        detail = f"entries of {topic.name!r} that group {group!r} had not acknowledged"
        reporter.tell("on_entries_lost", "entries-lost", detail=f"{retention} removed {count} {detail}", count=count)
        if now - topic.logged_at.get(group, -math.inf) >= pace.REPEAT:
            topic.logged_at[group] = now
            text = "entries-lost: %s removed %d %s"
            reporter.log(logging.WARNING, "entries-lost", text, str(retention), total, detail)
        else:
            topic.unlogged[group] = total

    def _watch_holder(self, topic: Topic, found: Trimmed) -> None:
        now = anyio.current_time()
        held = (found.holder, found.position)
        if held != topic.held:
            topic.held, topic.held_since = held, now
        is_stalled = now - topic.held_since >= pace.STALLED and found.length >= pace.STALLED_ENTRIES
        if found.holder is None or not is_stalled or now - topic.stall_told_at < pace.REPEAT:
            return
        topic.stall_told_at = now
        detail = (
            f"group {found.holder!r} does not go on: for {now - topic.held_since:.0f} s it has not acknowledged entry "
            f"{found.position} of {topic.name!r}, and so {found.length} entries cannot be removed. Start its "
            "consumers, or delete the group if it is not needed any more"
        )
        self._reporter(topic, found.holder).notice("on_group_stalled", "group-stalled", detail, count=found.length)
