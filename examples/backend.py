"""A backend in its five methods: streams in a dict. It keeps every promise that needs no more than these five.

The bus says in its log, once, what it cannot do on such a backend. ``docs/backends.md`` goes on from here.

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
class Group:
    """Where a group stands, and what it was handed and has not acknowledged: id -> when."""

    position: int
    pending: dict[str, float] = field(default_factory=dict[str, float])


class DictBackend(StreamBackend):
    """An entry's id is its place in its stream, from 1."""

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
        # The checkpoint comes first. From taking entries to returning them nothing awaits, so a cancellation can
        # never come between, and there is nothing to hand back.
        await checkpoint()
        with anyio.move_on_after(timeout):
            while len(self._streams.get(stream, ())) <= self._group(stream, group).position:
                await self._appended.wait()
        members = self._group(stream, group)
        first = members.position
        members.position = min(first + count, len(self._streams[stream]))
        return [self._hand_over(stream, members, str(number + 1)) for number in range(first, members.position)]

    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        await checkpoint()
        members = self._group(stream, group)
        before = anyio.current_time() - min_idle
        # The scan is always a whole round, so it needs no memory of where the last one stopped.
        idle = [entry_id for entry_id, since in members.pending.items() if since <= before]
        return [self._hand_over(stream, members, entry_id) for entry_id in idle[:count]]

    async def ack(self, stream: str, group: str, message_id: str) -> None:
        await checkpoint()
        members = self._groups.get((stream, group))
        if members is not None:
            members.pending.pop(message_id, None)

    def _group(self, stream: str, group: str) -> Group:
        try:
            return self._groups[stream, group]
        except KeyError:
            raise GroupLostError(stream, group) from None

    def _hand_over(self, stream: str, members: Group, entry_id: str) -> FetchedEntry:
        members.pending[entry_id] = anyio.current_time()
        return ClaimedMessage(entry_id, self._streams[stream][int(entry_id) - 1])


async def main() -> None:
    handled: list[str] = []
    all_handled = anyio.Event()

    async def handle(delivery: Delivery) -> None:
        await anyio.sleep(0.01)
        word = delivery.message.payload.decode()
        if word == "twice" and delivery.state.attempt == 1:
            raise Retry("not yet", delay=0.1)
        handled.append(word)
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
    print(handled)


if __name__ == "__main__":
    anyio.run(main, backend=sys.argv[1] if len(sys.argv) > 1 else "asyncio")
