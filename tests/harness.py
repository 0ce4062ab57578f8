"""What a test may do to a server behind the bus's back, whatever the server is."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import anyio

from anybus import EventBusError, ExponentialBackoff, GroupLostError, MemoryBackend, Message, Observer, StreamBusOptions
from anybus._failure.copies import retry_stream
from anybus.abc import (
    BusEvent,
    FetchedEntry,
    Output,
    PendingEntry,
    PublishItem,
    PublishSpec,
    StreamBackend,
    StreamInspector,
    TransferItem,
)

SOON = 40.0
"""Seconds after which a test that waits for an event has failed. Never a measure of speed."""

HOUR = 3600.0

QUICK = ExponentialBackoff(initial=0.01, maximum=0.02)

_numbers = itertools.count(1)


class Harness(Protocol):
    """One server. Every backend that it makes works on the same streams."""

    def make_backend(self) -> StreamBackend: ...

    async def append_raw(self, stream: str, fields: Mapping[str, bytes]) -> str: ...

    async def delete_entry(self, stream: str, entry_id: str) -> None: ...

    async def delete_group(self, stream: str, group: str) -> None: ...

    async def delete_stream(self, stream: str) -> None: ...

    async def entries(self, stream: str) -> list[tuple[str, Message | None, Mapping[str, bytes]]]: ...

    async def pending(self, stream: str, group: str) -> list[PendingEntry]: ...

    async def consumers(self, stream: str, group: str) -> list[str]: ...

    async def age(self, stream: str, group: str) -> None:
        """Make everything that is pending look as if it had been so for an hour: longer than any lease."""
        ...


class StepByStep(StreamBackend, StreamInspector):
    """A backend that passes everything on to another, but for the offer to make a whole pass at once.

    For tests that put something of their own in the place of one step.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.features = inner.features

    async def __aenter__(self) -> StepByStep:  # noqa: PYI034
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> bool | None:
        result: bool | None = await self.inner.__aexit__(*error)
        return result

    async def create_group(self, stream: str, group: str, start_id: str = "$") -> bool:
        return bool(await self.inner.create_group(stream, group, start_id))

    async def publish(self, stream: str, message: Message) -> str:
        return str(await self.inner.publish(stream, message))

    async def publish_with(self, stream: str, message: Message, spec: PublishSpec) -> str:
        entry_id: str = await self.inner.publish_with(stream, message, spec)
        return entry_id

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        entries: list[FetchedEntry] = await self.inner.read_new(stream, group, consumer, count=count, timeout=timeout)
        return entries

    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        entries: list[FetchedEntry] = await self.inner.reclaim_idle(
            stream, group, consumer, min_idle=min_idle, count=count
        )
        return entries

    async def ack(self, stream: str, group: str, message_id: str) -> None:
        await self.inner.ack(stream, group, message_id)

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        refused: list[str] = await self.inner.ack_many(stream, group, message_ids, consumer=consumer)
        return refused

    async def forget_consumer(self, stream: str, group: str, consumer: str) -> None:
        await self.inner.forget_consumer(stream, group, consumer)

    async def publish_many(self, items: Sequence[PublishItem]) -> list[str | EventBusError]:
        results: list[str | EventBusError] = await self.inner.publish_many(items)
        return results

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        owned: list[str] = await self.inner.renew(stream, group, consumer, message_ids)
        return owned

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        await self.inner.release(stream, group, consumer, message_ids)

    async def transfer(
        self, stream: str, group: str, consumer: str, message_id: str, outputs: Sequence[Output]
    ) -> list[str] | None:
        ids: list[str] | None = await self.inner.transfer(stream, group, consumer, message_id, outputs)
        return ids

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[list[str] | EventBusError | None]:
        results: list[list[str] | EventBusError | None] = await self.inner.transfer_many(stream, group, consumer, items)
        return results

    async def count_entries(self, stream: str) -> int:
        return int(await self.inner.count_entries(stream))

    async def pending_entries(self, stream: str, group: str, *, limit: int = 1000) -> list[PendingEntry]:
        entries: list[PendingEntry] = await self.inner.pending_entries(stream, group, limit=limit)
        return entries

    async def consumer_names(self, stream: str, group: str) -> list[str]:
        names: list[str] = await self.inner.consumer_names(stream, group)
        return names


class MemoryHarness:
    """The memory backend as a server."""

    def __init__(self) -> None:
        self._backend = MemoryBackend()

    def make_backend(self) -> MemoryBackend:
        return self._backend

    async def append_raw(self, stream: str, fields: Mapping[str, bytes]) -> str:
        return self._backend.append_raw(stream, fields)

    async def delete_entry(self, stream: str, entry_id: str) -> None:
        self._backend.delete_entry(stream, entry_id)

    async def delete_group(self, stream: str, group: str) -> None:
        self._backend.delete_group(stream, group)

    async def delete_stream(self, stream: str) -> None:
        self._backend.delete_stream(stream)

    async def entries(self, stream: str) -> list[tuple[str, Message | None, Mapping[str, bytes]]]:
        return self._backend.entries(stream)

    async def pending(self, stream: str, group: str) -> list[PendingEntry]:
        return await self._backend.pending_entries(stream, group, limit=sys.maxsize)

    async def consumers(self, stream: str, group: str) -> list[str]:
        return await self._backend.consumer_names(stream, group)

    async def age(self, stream: str, group: str) -> None:
        for pending in self._backend._find(stream, group)[1].pending.values():
            pending.since -= HOUR


class Recorder(Observer):
    """Keeps every event, and wakes whoever waits for one."""

    def __init__(self) -> None:
        self.events: list[tuple[str, BusEvent]] = []

    def _keep(self, hook: str, event: BusEvent) -> None:
        self.events.append((hook, event))

    def of(self, hook: str, scope: str | None = None) -> list[BusEvent]:
        return [event for name, event in self.events if name == hook and scope in (None, event.scope)]

    def on_error(self, event: BusEvent) -> None:
        self._keep("on_error", event)

    def on_started(self, event: BusEvent) -> None:
        self._keep("on_started", event)

    def on_ended(self, event: BusEvent) -> None:
        self._keep("on_ended", event)

    def on_published(self, event: BusEvent) -> None:
        self._keep("on_published", event)

    def on_received(self, event: BusEvent) -> None:
        self._keep("on_received", event)

    def on_settled(self, event: BusEvent) -> None:
        self._keep("on_settled", event)

    def on_dead_lettered(self, event: BusEvent) -> None:
        self._keep("on_dead_lettered", event)

    def on_lease_lost(self, event: BusEvent) -> None:
        self._keep("on_lease_lost", event)

    def on_circuit_opened(self, event: BusEvent) -> None:
        self._keep("on_circuit_opened", event)

    def on_circuit_closed(self, event: BusEvent) -> None:
        self._keep("on_circuit_closed", event)

    def on_group_made_again(self, event: BusEvent) -> None:
        self._keep("on_group_made_again", event)

    def on_entries_lost(self, event: BusEvent) -> None:
        self._keep("on_entries_lost", event)

    def on_group_stalled(self, event: BusEvent) -> None:
        self._keep("on_group_stalled", event)

    def on_topic_grown(self, event: BusEvent) -> None:
        self._keep("on_topic_grown", event)


def new_topic() -> str:
    """A topic that no other test uses."""
    return f"test.{next(_numbers)}"


def quick(observer: Observer | None = None, **changes: float) -> StreamBusOptions:
    """Options with short intervals, so that nothing has to be waited for long.

    The lease is longer than a busy machine can keep a process waiting: whoever needs its end says so.
    """
    values: dict[str, float] = {
        "block_timeout": 0.2,
        "claim_idle_timeout": 5.0,
        "reclaim_interval": 0.02,
        "close_timeout": 5.0,
        "cleanup_timeout": 2.0,
    }
    values.update(changes)
    return StreamBusOptions(observer=observer, **values)  # type: ignore[arg-type]  # sizes are given as ints


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str = "the condition") -> None:
    """Wait until something is so, looking again and again."""
    with anyio.move_on_after(SOON):
        while True:
            answer = condition()
            if not isinstance(answer, bool):
                answer = await answer
            if answer:
                return
            await anyio.sleep(0.005)
    raise AssertionError(f"waited in vain for {what}")


async def nothing_pending(harness: Harness, topic: str, *groups: str) -> None:
    """Wait until the server says that nothing is pending, retries included."""

    async def empty() -> bool:
        try:
            for group in groups:
                if await harness.pending(topic, group) or await harness.pending(retry_stream(topic, group), group):
                    return False
        except GroupLostError:
            return False  # it is about to be made again
        return True

    await until(empty, f"nothing pending in {groups}")


def uids(entries: list[tuple[str, Message | None, Mapping[str, bytes]]]) -> list[str]:
    return [message.uid for _, message, _ in entries if message is not None]
