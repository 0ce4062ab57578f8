"""Recurring schedules on Redis: each is a hash beside its topic."""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Final, TypeVar, get_args

from ..._messages.message import Message
from ...abc import TickClaim, TickResult, TickStore
from ...abc._recurrence import TickStatus
from . import _tick_scripts as scripts
from ._client import Client
from ._keys import schedule
from ._protocol import Argument

if TYPE_CHECKING:
    from ._node import Node

T = TypeVar("T")

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MILLISECOND: Final = timedelta(milliseconds=1)
_STATUSES: Final[dict[bytes, TickStatus]] = {status.encode(): status for status in get_args(TickStatus)}


class RedisTicks(TickStore):
    """The Redis backend's part for recurring schedules."""

    _client: Client

    @abc.abstractmethod
    def _encode(self, message: Message) -> bytes:
        """Encode a message of the application."""

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
        known = "" if generation is None else generation
        args = (owner, definition, known, _duration(lease), _duration(grace))
        reply = await self._client.run(scripts.CLAIM, stream, "", (schedule(stream, name),), args)
        with self._client.reading(reply):
            is_owner, kept, tick, end, now = map(int, reply)
            return TickClaim(bool(is_owner), kept, _time(tick), _time(end), _time(now))

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
        fields: tuple[Argument, ...] = () if message is None else ("message", self._encode(message))
        limit = "" if grace is None else _duration(grace)
        args = (owner, generation, (tick - _EPOCH) // _MILLISECOND, _duration(lease), limit, *fields)
        reply = await self._client.run(scripts.PUBLISH, stream, "", (schedule(stream, name), stream), args)
        with self._client.reading(reply):
            status, last, now, entry_id = reply
            return TickResult(_STATUSES[status], _time(int(last)), _time(int(now)), entry_id.decode() or None)

    async def leave_schedule(self, stream: str, name: str, owner: str) -> None:
        await self._client.run(scripts.LEAVE, stream, "", (schedule(stream, name),), (owner,))


def _duration(seconds: float) -> int:
    return round(seconds * 1000)


def _time(milliseconds: int) -> datetime:
    return _EPOCH + milliseconds * _MILLISECOND


class TicksEverywhere(TickStore):
    """The same for a backend that has one server, or a cluster of them."""

    @abc.abstractmethod
    async def _at(self, stream: str, do: Callable[[Node], Awaitable[T]], *, asks: bool = False) -> T:
        """Do something on the server of a stream."""

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
        return await self._at(
            stream,
            lambda node: node.claim_schedule(
                stream, name, owner, definition=definition, generation=generation, lease=lease, grace=grace
            ),
        )

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
        return await self._at(
            stream,
            lambda node: node.publish_tick(
                stream, name, owner, message, generation=generation, tick=tick, lease=lease, grace=grace
            ),
        )

    async def leave_schedule(self, stream: str, name: str, owner: str) -> None:
        await self._at(stream, lambda node: node.leave_schedule(stream, name, owner))
