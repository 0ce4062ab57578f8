"""A backend with the five methods that a backend must have. It keeps its streams in a dict.

``docs/backends.md`` explains the methods. The bus logs a warning for each feature that this backend lacks.

    python examples/backend.py [asyncio|trio]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import anyio
from anyio.lowlevel import checkpoint

from anybus import Delivery, GroupLostError, Message, Retry, StreamBus, StreamBusOptions, SubscriptionConfig
from anybus.abc import ClaimedMessage, FetchedEntry, StreamBackend


@dataclass
class Pending:
    """An entry that was delivered and is not acknowledged yet: to which consumer it was delivered, and when."""

    consumer: str
    since: float


@dataclass
class Group:
    """How many entries were delivered to the group, and which of them are pending."""

    position: int
    pending: dict[str, Pending] = field(default_factory=dict[str, Pending])


class DictBackend(StreamBackend):
    """An entry's id is its number in the stream, from 1."""

    def __init__(self) -> None:
        self._streams: dict[str, list[Message]] = {}
        self._groups: dict[tuple[str, str], Group] = {}
        self._appended = anyio.Event()

    async def create_group(self, stream: str, group: str, start_id: str = "$") -> bool:
        await checkpoint()
        entries = self._streams.setdefault(stream, [])
        if (stream, group) in self._groups:
            return False
        self._groups[stream, group] = Group(len(entries) if start_id == "$" else int(start_id))
        return True

    async def publish(self, stream: str, message: Message) -> str:
        await checkpoint()
        entries = self._streams.setdefault(stream, [])
        entries.append(message)
        self._appended.set()
        self._appended = anyio.Event()
        return str(len(entries))

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        # The checkpoint comes first. After that, nothing is awaited between taking entries and returning them. So a
        # cancellation cannot lose entries that were taken.
        await checkpoint()
        with anyio.move_on_after(timeout):
            while len(self._streams.get(stream, ())) <= self._group(stream, group).position:
                await self._appended.wait()
        members = self._group(stream, group)
        first = members.position
        members.position = min(first + count, len(self._streams[stream]))
        ids = [str(number + 1) for number in range(first, members.position)]
        return [self._deliver(stream, group, consumer, entry_id) for entry_id in ids]

    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        await checkpoint()
        before = anyio.current_time() - min_idle
        # This looks at all pending entries each time, so it need not remember where the last call stopped.
        ids = [entry_id for entry_id, entry in self._group(stream, group).pending.items() if entry.since <= before]
        return [self._deliver(stream, group, consumer, entry_id) for entry_id in ids[:count]]

    async def ack(self, stream: str, group: str, message_id: str) -> None:
        await checkpoint()
        if (stream, group) in self._groups:
            self._groups[stream, group].pending.pop(message_id, None)

    def _group(self, stream: str, group: str) -> Group:
        if (stream, group) not in self._groups:
            raise GroupLostError(stream, group)
        return self._groups[stream, group]

    def _deliver(self, stream: str, group: str, consumer: str, entry_id: str) -> FetchedEntry:
        self._group(stream, group).pending[entry_id] = Pending(consumer, anyio.current_time())
        return ClaimedMessage(entry_id, self._streams[stream][int(entry_id) - 1])


async def main() -> None:
    handled: list[str] = []
    all_handled = anyio.Event()

    async def handle(delivery: Delivery) -> None:
        word = delivery.message.payload.decode()
        if word == "twice" and delivery.state.attempt == 1:
            raise Retry("not yet", delay=0.1)
        handled.append(f"{word} (attempt {delivery.state.attempt})")
        if len(handled) == 3:
            all_handled.set()

    options = StreamBusOptions(reclaim_interval=0.05)
    async with (
        StreamBus(DictBackend(), options) as bus,
        bus.subscribe(SubscriptionConfig("words", "readers"), handle),
    ):
        for word in ("once", "twice", "also once"):
            await bus.publish(Message("words", word.encode()))
        with anyio.fail_after(5):
            await all_handled.wait()
    print(*sorted(handled), sep=", ")


if __name__ == "__main__":
    anyio.run(main, backend=sys.argv[1] if len(sys.argv) > 1 else "asyncio")
