"""Work of a cluster that concerns several nodes: many messages, outputs and replays in other slots.

An output in another slot cannot be appended in the same step as the original entry is acknowledged. It is appended
first. If the process dies between the two, the output exists, and the entry comes back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import anyio

from ..._ground.checks import is_entry_id
from ..._ground.errors import BackendError, EventBusError
from ...abc import Codec, KeyedTransfer, Move, Output, PublishItem, TransferItem
from ._additions import Addition
from ._deadlines import last_moment
from ._errors import broken, duplicate
from ._node import Node
from ._slots import slot_of
from ._topology import Topology
from ._transfers import Transferred

_AT_ONCE: Final = 100

Result = str | EventBusError
Moved = str | EventBusError | None
Send = Callable[[Node, list[int]], Awaitable[Sequence[Result]]]
Appended = dict[int, tuple[Addition, str]]
"""What was appended for one transfer, and its id, by the output's index."""


class Scatter:
    """Work on several nodes at once."""

    def __init__(self, topology: Topology, codec: Codec) -> None:
        self._topology = topology
        self._codec = codec

    async def publish_many(self, items: Sequence[PublishItem]) -> list[Result]:
        async def send(node: Node, indexes: list[int]) -> Sequence[Result]:
            part = items if len(indexes) == len(items) else [items[index] for index in indexes]
            return await node.publish_many(part)

        streams = [stream for stream, _, _ in items]
        return await self._send(streams, streams, send)

    async def _append(self, additions: Sequence[Addition]) -> list[Result]:
        async def send(node: Node, indexes: list[int]) -> Sequence[Result]:
            return await node.append([additions[index] for index in indexes])

        streams = [addition.stream for addition in additions]
        return await self._send(streams, [(addition.stream, addition.delay < 0) for addition in additions], send)

    async def _send(self, streams: Sequence[str], lines: Sequence[Hashable], send: Send) -> list[Result]:
        """Send something for each stream to all nodes at once.

        What is redirected goes on elsewhere. If the caller's time is over before all nodes have answered, the results
        tell what is known.

        :param lines: what has the same line is kept in order.
        """
        results: list[Result] = [broken("not tried", may_have_happened=False)] * len(streams)
        with anyio.CancelScope(deadline=last_moment()):
            await self._send_all(streams, lines, send, results)
        return results

    async def _send_all(
        self, streams: Sequence[str], lines: Sequence[Hashable], send: Send, results: list[Result]
    ) -> None:
        places: dict[int, Node] = {}
        slots: dict[str, int] = {}
        refused: dict[str, EventBusError] = {}
        for stream in dict.fromkeys(streams):
            try:
                slot = slots[stream] = slot_of(stream)
                if slot not in places:
                    places[slot] = await self._topology.node(slot)
            except EventBusError as error:
                refused[stream] = error
        left = list(range(len(streams)))
        if refused:
            for index, stream in enumerate(streams):
                results[index] = refused.get(stream, results[index])
            left = [index for index in left if streams[index] not in refused]
        tries = 0
        while left:
            tries += 1
            parts: dict[Node, list[int]] = {}
            if len(places) == 1:
                [node] = places.values()
                parts[node] = left
            else:
                for index in left:
                    parts.setdefault(places[slots[streams[index]]], []).append(index)
            await _all([partial(_send_part, send, node, part, results) for node, part in parts.items()])
            overtaken = _overtaken(lines, left, results)
            left = await self._follow(streams, left, overtaken, places, results, tries)

    async def _follow(
        self,
        streams: Sequence[str],
        sent: list[int],
        overtaken: set[int],
        places: dict[int, Node],
        results: list[Result],
        tries: int,
    ) -> list[int]:
        """Which of those that were sent must be sent again. Their slots get other nodes.

        :param overtaken: those that now would be appended after their successors. If they were redirected, they fail.
        """
        again: list[int] = []
        followed: dict[int, bool] = {}
        for index in sent:
            result = results[index]
            if not isinstance(result, BackendError) or result.may_have_happened:
                continue
            slot = slot_of(streams[index])
            if slot not in followed:
                try:
                    places[slot] = await self._topology.follow(result, places[slot], slot, tries, asks=True)
                    followed[slot] = True
                except BackendError:
                    followed[slot] = False
            if followed[slot] and index not in overtaken:
                again.append(index)
        return again

    # --- transfers

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[Transferred]:
        slot = slot_of(stream)
        results: list[Transferred] = [None] * len(items)
        near: list[int] = []
        far: list[int] = []
        for index, (_, outputs) in enumerate(items):
            try:
                here = all(slot_of(output.stream) == slot for output in outputs)
            except EventBusError as error:
                results[index] = error
            else:
                (near if here else far).append(index)
        for part in _parts(near, far):
            some = [items[index] for index in part]
            try:
                if part is near:
                    answers = await self._transfer_near(stream, group, consumer, some)
                else:
                    transfer = partial(self._transfer_far, stream, group, consumer, some)
                    answers = await self._topology.to_the_end(transfer)
            except BackendError as error:
                if len(part) == len(items):
                    raise
                answers = [duplicate(error) for _ in part]  # not raised, because others are or will be done
            for index, answer in zip(part, answers, strict=True):
                results[index] = answer
        return results

    async def settle_keyed(
        self, topic: str, stream: str, group: str, consumer: str, items: Sequence[KeyedTransfer], *, window: float
    ) -> list[Transferred]:
        """Outputs in other slots are appended before. Then the key is completed after its entry is acknowledged."""
        slot = slot_of(stream)
        results: list[Transferred] = [None] * len(items)
        near: list[int] = []
        far: list[int] = []
        for index, item in enumerate(items):
            try:
                here = all(slot_of(output.stream) == slot for output in item.outputs)
            except EventBusError as error:
                results[index] = error
            else:
                (near if here else far).append(index)
        for part, settle in ((near, self._settle_near), (far, self._settle_far)):
            some = [items[index] for index in part]
            answers: Sequence[Transferred] = ()
            try:
                if some:
                    answers = await settle(topic, stream, group, consumer, some, window)
            except BackendError as error:
                if len(part) == len(items):
                    raise
                answers = [duplicate(error) for _ in part]  # not raised, because the results of others are known
            for index, answer in zip(part, answers, strict=True):
                results[index] = answer
        return results

    async def _settle_near(
        self, topic: str, stream: str, group: str, consumer: str, items: Sequence[KeyedTransfer], window: float
    ) -> list[Transferred]:
        return await self._topology.at(
            stream, lambda node: node.settle_keyed(topic, stream, group, consumer, items, window=window)
        )

    async def _settle_far(
        self, topic: str, stream: str, group: str, consumer: str, items: Sequence[KeyedTransfer], window: float
    ) -> list[Transferred]:
        await self._end_keys(topic, group, [item.key for item in items if item.step == "release"], consumer, None)
        results = await self.transfer_many(stream, group, consumer, [(item.id, item.outputs) for item in items])
        done = zip(items, results, strict=True)
        completed = [item.key for item, result in done if item.step == "complete" and isinstance(result, list)]
        with suppress(BackendError):  # they are acknowledged, so their entries are not handled again
            await self._end_keys(topic, group, completed, consumer, window)
        return results

    async def _end_keys(self, topic: str, group: str, keys: Sequence[str], consumer: str, window: float | None) -> None:
        if keys:
            await self._topology.at(topic, lambda node: node.end_keys(topic, group, keys, consumer, window=window))

    async def _transfer_near(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[Transferred]:
        """Transfers whose outputs are in the stream's own slot: each is one step."""
        return await self._topology.at(stream, lambda node: node.transfer_many(stream, group, consumer, items))

    async def _transfer_far(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[Transferred]:
        """Transfers with outputs in other slots: these are appended first, for entries that are still ours."""
        slot = slot_of(stream)
        results: list[Transferred] = [None] * len(items)
        ids = [message_id for message_id, _ in items if is_entry_id(message_id)]
        ours = set(await self._topology.at(stream, lambda node: node.renew(stream, group, consumer, ids)))
        node = await self._topology.node(slot)
        additions: list[Addition] = []
        places: list[tuple[int, int]] = []
        appended: dict[int, Appended] = {}
        for index, (message_id, outputs) in enumerate(items):
            if message_id not in ours:
                continue
            prepared = node.prepare(outputs)
            if isinstance(prepared, EventBusError):
                results[index] = prepared
                continue
            appended[index] = {}
            for place, addition in enumerate(prepared):
                if slot_of(addition.stream) != slot:
                    additions.append(addition)
                    places.append((index, place))
        failures: dict[int, EventBusError] = {}
        for (index, place), addition, answer in zip(places, additions, await self._append(additions), strict=True):
            if isinstance(answer, EventBusError):
                failures.setdefault(index, answer)
            else:
                appended[index][place] = addition, answer
        for index, failure in failures.items():
            results[index] = await self._undone(failure, appended.pop(index))
        rest: list[TransferItem] = []
        for index, done in appended.items():
            message_id, outputs = items[index]
            rest.append((message_id, [output for place, output in enumerate(outputs) if place not in done]))
        settled: Sequence[Transferred] = []
        try:
            if rest:
                settled = await self._transfer_near(stream, group, consumer, rest)
        except BackendError as error:
            settled = [duplicate(error) for _ in rest]
        for (index, done), outcome in zip(appended.items(), settled, strict=True):
            results[index] = await self._outcome(outcome, items[index][1], done)
        return results

    async def _outcome(self, outcome: Transferred, outputs: Sequence[Output], appended: Appended) -> Transferred:
        if isinstance(outcome, list):
            near = iter(outcome)
            return [appended[place][1] if place in appended else next(near) for place in range(len(outputs))]
        if outcome is None:
            await self._take_back(appended)
            return None
        return await self._undone(outcome, appended)

    async def _undone(self, error: EventBusError, appended: Appended) -> EventBusError:
        """The error of a transfer or a move. If it has surely not happened, what was appended is removed again."""
        if not isinstance(error, BackendError):
            await self._take_back(appended)
        elif error.may_have_happened or not await self._take_back(appended):
            error.may_have_happened = True
        return error

    async def _take_back(self, appended: Appended) -> bool:
        """Remove what was appended. Returns whether nothing is left of it."""
        removed = True
        for addition, entry_id in appended.values():
            try:
                removed = await self._topology.at(addition.stream, partial(_remove, addition, entry_id)) and removed
            except BackendError:
                removed = False
        return removed

    # --- dead letters

    async def move_entries(self, stream: str, moves: Sequence[Move]) -> list[Moved]:
        slot = slot_of(stream)
        results: list[Moved] = [None] * len(moves)
        near: list[int] = []
        far: list[int] = []
        for index, move in enumerate(moves):
            try:
                (near if slot_of(move.stream) == slot else far).append(index)
            except EventBusError as error:
                results[index] = error
        for part in _parts(near, far):
            some = [moves[index] for index in part]
            try:
                if part is near:
                    answers = await self._move_near(stream, some)
                else:
                    answers = await self._topology.to_the_end(partial(self._move_far, stream, some))
            except BackendError as error:
                if len(part) == len(moves):
                    raise
                answers = [duplicate(error) for _ in part]  # not raised, because others are or will be done
            for index, answer in zip(part, answers, strict=True):
                results[index] = answer
        return results

    async def _move_near(self, stream: str, moves: Sequence[Move]) -> list[Moved]:
        return await self._topology.at(stream, lambda node: node.move_entries(stream, moves))

    async def _move_far(self, stream: str, moves: Sequence[Move]) -> list[Moved]:
        """Move entries to streams in other slots: they are appended there first, and then removed here."""
        results: list[Moved] = [None] * len(moves)
        known = [index for index, move in enumerate(moves) if is_entry_id(move.id)]
        ids = [moves[index].id for index in known]
        found = await self._topology.at(stream, lambda node: node.find_entries(stream, ids)) if ids else []
        additions: list[Addition] = []
        places: list[int] = []
        for index, raw in zip(known, found, strict=True):
            if raw is None:
                continue
            message, fields = moves[index].message, raw
            try:
                if message is not None:
                    fields = ["message", self._codec.encode(message)]
                elif not raw:
                    raise BackendError("the entry has no raw fields", may_have_happened=False, can_pass=False)
            except EventBusError as error:
                results[index] = error
                continue
            additions.append(Addition(moves[index].stream, -1, fields))
            places.append(index)
        appended: list[tuple[int, Addition, str]] = []
        for index, addition, answer in zip(places, additions, await self._append(additions), strict=True):
            results[index] = answer
            if isinstance(answer, str):
                appended.append((index, addition, answer))
        gone = [moves[index].id for index, _, _ in appended]
        removed: Sequence[int | BackendError] = []
        try:
            if gone:
                removed = await self._topology.at(stream, lambda node: node.delete_entries(stream, gone))
        except BackendError as error:
            removed = [duplicate(error) for _ in gone]
        for (index, addition, entry_id), outcome in zip(appended, removed, strict=True):
            if isinstance(outcome, BackendError):
                results[index] = await self._undone(outcome, {0: (addition, entry_id)})
            elif not outcome:
                await self._take_back({0: (addition, entry_id)})
                results[index] = None  # somebody else has moved it meanwhile
        return results


def _parts(near: list[int], far: list[int]) -> list[list[int]]:
    return ([near] if near else []) + [far[start : start + _AT_ONCE] for start in range(0, len(far), _AT_ONCE)]


def _overtaken(lines: Sequence[Hashable], sent: Sequence[int], results: Sequence[Result]) -> set[int]:
    """Those after which something of the same line was appended, or may have been.

    Usually, there are none: what came after a redirected one was redirected, too. But a node may have got the slot
    meanwhile.
    """
    appended: set[Hashable] = set()
    overtaken: set[int] = set()
    for index in reversed(sent):
        result = results[index]
        if lines[index] in appended:
            overtaken.add(index)
        elif isinstance(result, str) or (isinstance(result, BackendError) and result.may_have_happened):
            appended.add(lines[index])
    return overtaken


async def _remove(addition: Addition, entry_id: str, node: Node) -> bool:
    if addition.delay >= 0:
        return await node.cancel_later(addition.stream, entry_id)
    return bool(await node.remove_entries(addition.stream, (entry_id,)))


async def _send_part(send: Send, node: Node, part: list[int], results: list[Result]) -> None:
    for index in part:
        results[index] = broken("no answer in time", may_have_happened=True)
    answers: Sequence[Result]
    try:
        answers = await send(node, part)
    except BackendError as error:
        answers = [duplicate(error) for _ in part]
    for index, answer in zip(part, answers, strict=True):
        results[index] = answer


async def _all(calls: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    """Call all at once. A single one needs no task."""
    if len(calls) == 1:
        await calls[0]()
        return
    async with anyio.create_task_group() as tasks:
        for call in calls:
            tasks.start_soon(call)
