"""Recurring schedules in memory. The time is the process's wall time."""

from __future__ import annotations

import abc
from datetime import datetime, timedelta

from anyio.lowlevel import checkpoint

from ..._ground.clock import now
from ..._messages.message import Message
from ...abc import TickClaim, TickResult, TickStore
from ...abc._recurrence import TickStatus
from .store import KeptSchedule, Stream


class MemoryTicks(TickStore):
    """The memory backend's part for recurring schedules."""

    @abc.abstractmethod
    def _stream(self, name: str) -> Stream:
        """The stream of this name."""

    @abc.abstractmethod
    def _append(self, stream: str, message: Message) -> str:
        """Append a message, and return the entry's id."""

    async def claim_schedule(
        self,
        stream: str,
        name: str,
        owner: str,
        *,
        definition: str,
        generation: int | None,
        lease: float,
        grace: float,
    ) -> TickClaim:
        await checkpoint()
        schedules, at = self._stream(stream).schedules, _milliseconds(now())
        kept = schedules.get(name)
        if kept is None:
            kept = schedules[name] = KeptSchedule(definition, generation or 1, at, "", at)
        elif (generation is None and kept.definition != definition) or (generation or 0) > kept.generation:
            kept.definition, kept.generation = definition, generation or kept.generation + 1
            kept.last_tick = max(kept.last_tick, at - timedelta(seconds=grace))
            kept.owner, kept.lease_end = "", at
        end = at + timedelta(seconds=lease)
        if generation in (None, kept.generation) and (kept.owner in ("", owner) or kept.lease_end <= at):
            kept.owner, kept.lease_end = owner, end
        kept.lease_end = min(kept.lease_end, end)
        return TickClaim(kept.owner == owner, kept.generation, kept.last_tick, kept.lease_end, at)

    async def publish_tick(
        self,
        stream: str,
        name: str,
        owner: str,
        message: Message | None,
        *,
        generation: int,
        tick: datetime,
        lease: float,
        grace: float | None,
    ) -> TickResult:
        await checkpoint()
        kept, at = self._stream(stream).schedules.get(name), _milliseconds(now())
        if kept is None or kept.generation != generation or kept.owner != owner:
            return TickResult("not-owner", tick if kept is None else kept.last_tick, at)
        if tick <= kept.last_tick:
            return TickResult("known", kept.last_tick, at)
        if tick > at:
            return TickResult("early", kept.last_tick, at)
        status: TickStatus = "published"
        entry_id: str | None = None
        if grace is not None and at - tick > timedelta(seconds=grace):
            status = "missed"
        elif message is not None:
            entry_id = self._append(stream, message)
        kept.last_tick, kept.lease_end = tick, at + timedelta(seconds=lease)
        return TickResult(status, tick, at, entry_id)

    async def leave_schedule(self, stream: str, name: str, owner: str) -> None:
        await checkpoint()
        kept = self._stream(stream).schedules.get(name)
        if kept is not None and kept.owner == owner:
            kept.owner = ""


def _milliseconds(time: datetime) -> datetime:
    return time.replace(microsecond=time.microsecond // 1000 * 1000)
