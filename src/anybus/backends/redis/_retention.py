"""Retention on Redis: a hash beside the topic, and scripts that trim."""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio

from ..._ground.errors import BackendError, EventBusError, ValidationError
from ...abc import Interest, Limits, Retention, RetentionKeeper, Trimmed, WorkQueue
from ...abc._retention import DeclareMode
from . import _retention_scripts as scripts
from ._client import Client
from ._keys import meta
from ._keys import retention as retention_key
from ._protocol import ServerError
from ._slots import slot_of

if TYPE_CHECKING:
    from ._node import Node

T = TypeVar("T")

_AT_ONCE: Final = 50
"""How many streams one call looks at."""

_SLOTS_AT_ONCE: Final = 16


class RedisRetention(RetentionKeeper):
    """The Redis backend's part for retention."""

    _client: Client

    async def declare_retention(self, stream: str, retention: Retention, mode: DeclareMode) -> Retention:
        keys = (stream, retention_key(stream))
        reply = await self._client.run(scripts.DECLARE, stream, "", keys, (mode, *_words(retention)))
        with self._client.reading(reply):
            status, *values = (value.decode() for value in reply)
            if status == "stored":
                return _parsed(*values)
        raise ValidationError(
            f"retention must not be {retention} for {stream!r}, which has several groups: {', '.join(values)}"
        )

    async def admit_group(self, stream: str, group: str, *, made: bool) -> str | None:
        keys = (stream, retention_key(stream))
        reply = await self._client.run(scripts.ADMIT, stream, group, keys, (group, int(made)))
        return None if reply is None else self._client.text(reply)

    async def trim(self, streams: Sequence[str], *, trimmer: str) -> list[Trimmed | EventBusError]:
        results: list[Trimmed | EventBusError] = []
        for start in range(0, len(streams), _AT_ONCE):
            part = streams[start : start + _AT_ONCE]
            keys = [key for stream in part for key in (stream, retention_key(stream), meta(stream))]
            try:
                reply = await self._client.run(scripts.TRIM, part[0], "", keys, (trimmer,))
                with self._client.reading(reply):
                    results += [self._trimmed(values) for _, values in zip(part, reply, strict=True)]
            except EventBusError as error:
                results += [error] * len(part)
        return results

    def _trimmed(self, values: list[Any]) -> Trimmed | EventBusError:
        if values[0] == b"error":
            return self._client.refused(ServerError(values[1].decode(errors="replace")), may_have_happened=True)
        policy, length, age = (value.decode() for value in values[:3])
        if not policy:
            return Trimmed(None, values[3])
        entries, removed, more, busy, groups, holder, position, lost, totals = values[3:]
        return Trimmed(
            _parsed(policy, length, age),
            entries,
            removed,
            bool(more),
            bool(busy),
            groups,
            holder and holder.decode(),
            position and position.decode(),
            _counts(lost),
            _counts(totals),
        )


class RetentionEverywhere(RetentionKeeper):
    """The same for a backend that has one server, or a cluster of them."""

    @abc.abstractmethod
    async def _at(self, stream: str, do: Callable[[Node], Awaitable[T]], *, asks: bool = False) -> T:
        """Do something on the server of a stream."""

    @property
    @abc.abstractmethod
    def _is_cluster(self) -> bool:
        """Whether two streams may be on different servers."""

    async def declare_retention(self, stream: str, retention: Retention, mode: DeclareMode) -> Retention:
        return await self._at(stream, lambda node: node.declare_retention(stream, retention, mode))

    async def admit_group(self, stream: str, group: str, *, made: bool) -> str | None:
        return await self._at(stream, lambda node: node.admit_group(stream, group, made=made))

    async def trim(self, streams: Sequence[str], *, trimmer: str) -> list[Trimmed | EventBusError]:
        if not self._is_cluster:
            return await self._at(streams[0], lambda node: node.trim(streams, trimmer=trimmer)) if streams else []
        results: dict[str, Trimmed | EventBusError] = {}
        slots: dict[int, list[str]] = {}
        for stream in streams:
            try:
                slots.setdefault(slot_of(stream), []).append(stream)
            except EventBusError as error:
                results[stream] = error
        limiter = anyio.CapacityLimiter(_SLOTS_AT_ONCE)

        async def trim_slot(part: list[str]) -> None:
            async with limiter:
                found: Sequence[Trimmed | EventBusError]
                try:
                    found = await self._at(part[0], partial(_trim, part, trimmer))
                except EventBusError as error:
                    found = [error] * len(part)
                results.update(zip(part, found, strict=True))

        async with anyio.create_task_group() as tasks:
            for part in slots.values():
                tasks.start_soon(trim_slot, part)
        return [results[stream] for stream in streams]


async def _trim(streams: Sequence[str], trimmer: str, node: Node) -> list[Trimmed | EventBusError]:
    """For the streams of one slot. If the slot is elsewhere, this is raised, so that the caller follows."""
    results = await node.trim(streams, trimmer=trimmer)
    if all(isinstance(result, BackendError) and not result.may_have_happened for result in results):
        for result in results:
            if isinstance(result, BackendError):
                raise result
    return results


def _words(policy: Retention) -> tuple[str, str, str]:
    """The policy's name, its length, and its age in ms, as they are stored."""
    if isinstance(policy, Limits):
        age = "" if policy.age is None else f"{policy.age * 1000:.0f}"
        return "limits", "" if policy.length is None else str(policy.length), age
    return "interest" if isinstance(policy, Interest) else "work-queue", "", ""


def _parsed(policy: str, length: str, age: str) -> Retention:
    if policy == "limits":
        return Limits(length=int(length) if length else None, age=int(age) / 1000 if age else None)
    if policy == "interest":
        return Interest()
    if policy == "work-queue":
        return WorkQueue()
    raise ValueError(policy)


def _counts(pairs: list[Any]) -> dict[str, int]:
    return {name.decode(): count for name, count in zip(pairs[::2], pairs[1::2], strict=True)}
