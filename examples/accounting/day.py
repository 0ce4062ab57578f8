"""One run: publish and handle all events, with failing handlers and cancelled consumers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final
from uuid import uuid4

import anyio
from anyio.abc import TaskStatus
from books import Books
from handlers import Rule, Worker, check_docstring, enter_in_catalogue
from report import Account, DeadLetter, close_account

import anybus
from anybus import (
    DROP,
    ExponentialBackoff,
    Message,
    Observer,
    StreamBusOptions,
    SubscriptionConfig,
    retry_stream,
)
from anybus.abc import BusEvent, StreamInspector

AUDITORS: Final = "auditors"
GROUPS: Final[Mapping[str, Rule]] = {"catalogue": enter_in_catalogue, "docstrings": check_docstring}

STAYING_CONSUMERS: Final = 3
"""In each group. One more consumer is cancelled in the middle of the work."""

MIDWAY: Final = 150
"""The leaving consumer is cancelled while it handles the message with this number."""

BATCH: Final = 100
SINGLES: Final = 200
"""The number of messages at the end that are published one by one. The others are published in batches."""

TIME_LIMIT: Final = 30.0
"""Seconds. If a message is lost, waiting for it would never end. The accounting then shows the loss."""


class Surprises(Observer):
    """Keeps every error, except those of handlers, which fail on purpose."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_error(self, event: BusEvent) -> None:
        if event.scope != "handler":
            self.seen.append(f"{event.scope}: {event.detail}: {event.error!r}")


class Day:
    """One run on one event loop, with a new topic, because a server may still have the topics of earlier runs.

    :param url: the URL of the backend.
    :param on_progress: called with the current accounts several times a second.
    """

    def __init__(
        self,
        url: str,
        messages: Sequence[Message],
        books: Mapping[str, Books],
        on_progress: Callable[[Sequence[Account]], None],
    ) -> None:
        self._topic = f"{messages[0].topic}.{uuid4().hex[:12]}"
        self._dead_letters = f"{self._topic}.dead"
        self._messages = [message.replace(topic=self._topic) for message in messages]
        self._published = frozenset(message.uid for message in messages)
        self._books = books
        self._on_progress = on_progress
        self._letters: list[DeadLetter] = []
        self.surprises = Surprises()
        options = StreamBusOptions(claim_idle_timeout=10.0, reclaim_interval=0.05, observer=self.surprises)
        self._bus = anybus.connect(url, options)
        # Both backends that have a URL can be inspected, so the checks below ask the server itself.
        assert isinstance(self._bus.backend, StreamInspector)
        self._server: StreamInspector = self._bus.backend

    async def run(self) -> list[Account]:
        # Leaving the bus closes its subscriptions, which ends the tasks that run them.
        async with anyio.create_task_group() as tasks, self._bus:
            await tasks.start(self._read_dead_letters)
            leavers: list[tuple[Worker, anyio.CancelScope]] = []
            for group, rule in GROUPS.items():
                for number in range(STAYING_CONSUMERS):
                    worker = self._worker(f"stays-{number}", group, rule)
                    await tasks.start(self._bus.consume, self._config(group, "stays"), worker.handle)
                leaver = self._worker("leaves", group, rule)
                leavers.append((leaver, await tasks.start(self._consume_until_cancelled, group, leaver)))
            with anyio.move_on_after(TIME_LIMIT):
                tasks.start_soon(self._publish)
                for leaver, scope in leavers:
                    await leaver.midway.wait()
                    scope.cancel()
                await self._until_done()
        return self._accounts()

    def _worker(self, name: str, group: str, rule: Rule) -> Worker:
        return Worker(name, self._books[group], rule, midway_at=MIDWAY)

    def _config(self, group: str, label: str) -> SubscriptionConfig:
        backoff = ExponentialBackoff(initial=0.05, maximum=0.2)
        return SubscriptionConfig(self._topic, group, consumer=label, max_in_flight=8, retry_backoff=backoff)

    async def _consume_until_cancelled(
        self, group: str, worker: Worker, *, task_status: TaskStatus[anyio.CancelScope]
    ) -> None:
        with anyio.CancelScope() as scope:
            async with self._bus.subscribe(self._config(group, "leaves"), worker.handle):
                task_status.started(scope)
                await anyio.sleep_forever()

    async def _publish(self) -> None:
        in_batches = self._messages[:-SINGLES]
        for start in range(0, len(in_batches), BATCH):
            outcome = await self._bus.publish_batch(in_batches[start : start + BATCH])
            outcome.raise_for_errors()
        for message in self._messages[-SINGLES:]:
            await self._bus.publish(message)

    async def _read_dead_letters(self, *, task_status: TaskStatus[None]) -> None:
        # A subscription on dead letters must say what happens to those that it gives up on itself.
        config = SubscriptionConfig(self._dead_letters, AUDITORS, dead_letter_topic=DROP, group_start_id="0")
        async with self._bus.deliveries(config) as letters:
            task_status.started()
            async for letter in letters:
                headers = letter.message.headers
                group, code = headers["dead-letter-group"], headers["dead-letter-code"]
                self._letters.append(DeadLetter(letter.message.uid, group, code))
                await letter.ack()

    async def _until_done(self) -> None:
        """Wait until every uid is accounted for, and the server has nothing pending."""
        while True:
            accounts = self._accounts()
            self._on_progress(accounts)
            everywhere = all(account.handled | account.dead >= account.published for account in accounts)
            if everywhere and await self._nothing_left():
                return
            await anyio.sleep(0.1)

    async def _nothing_left(self) -> bool:
        streams = [(self._dead_letters, AUDITORS)]
        for group in GROUPS:
            streams += [(self._topic, group), (retry_stream(self._topic, group), group)]
        for stream, group in streams:
            if await self._server.pending_entries(stream, group, limit=1):
                return False
        return await self._server.count_entries(self._dead_letters) == len(self._letters)

    def _accounts(self) -> list[Account]:
        return [close_account(group, self._published, self._books[group], self._letters) for group in GROUPS]
