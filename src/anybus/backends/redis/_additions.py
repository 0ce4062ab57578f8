"""The steps of work on two nodes of a cluster: appending on one, and looking and deleting on the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..._ground.errors import BackendError, EventBusError
from ._client import Client
from ._dead_letters import RAW
from ._errors import duplicate
from ._keys import RESERVED
from ._protocol import Argument, ServerError
from ._schedules import RedisSchedules


@dataclass(frozen=True)
class Addition:
    """Something to be appended.

    :ivar delay: in ms; -1 = it is appended now.
    """

    stream: str
    delay: int
    fields: Sequence[Argument]


class Additions(RedisSchedules):
    """The part of a server for work that concerns other servers, too."""

    _client: Client

    async def append(self, additions: Sequence[Addition]) -> list[str | EventBusError]:
        """Append, in order within each stream. Returns the id of each (if delayed: its schedule id), or its error."""
        client = self._client
        results: list[str | EventBusError] = [""] * len(additions)
        now = [index for index, addition in enumerate(additions) if addition.delay < 0]
        commands = [("XADD", additions[index].stream, "*", *additions[index].fields) for index in now]
        replies: list[Any] = []
        try:
            if commands:
                replies = await client.publish(commands)
        except BackendError as error:
            replies = [error] * len(commands)
        for index, reply in zip(now, replies, strict=True):
            results[index] = self._id_or_error(reply)
        for index, addition in enumerate(additions):
            if addition.delay >= 0:
                results[index] = await self._schedule(addition)
        with suppress(BackendError):  # they are noticed some seconds later
            await client.note_waiting(
                addition.stream
                for addition, result in zip(additions, results, strict=True)
                if isinstance(result, str) and addition.stream.startswith(RESERVED)
            )
        return results

    def _id_or_error(self, reply: Any) -> str | BackendError:
        if isinstance(reply, ServerError):
            return self._client.refused(reply)
        if isinstance(reply, BackendError):
            return duplicate(reply)
        try:
            return self._client.text(reply)
        except BackendError as error:
            return error

    async def _schedule(self, addition: Addition) -> str | BackendError:
        try:
            return await self.schedule(addition.stream, f"+{addition.delay}", addition.fields)
        except BackendError as error:
            return error

    async def find_entries(self, stream: str, entry_ids: Sequence[str]) -> list[list[Argument] | None]:
        """The raw fields of these entries, as they were before they became dead letters; None = it is gone."""
        found: list[list[Argument] | None] = []
        for reply in await self._client.mux.pipeline([("XRANGE", stream, one, one) for one in entry_ids]):
            if isinstance(reply, ServerError):
                raise self._client.refused(reply)
            with self._client.reading(reply):
                found.append(_raw(reply[0][1]) if reply else None)
        return found

    async def delete_entries(self, stream: str, entry_ids: Sequence[str]) -> list[int | BackendError]:
        """For each entry, how many were deleted: one, or none if it was gone. Or the error."""
        replies = await self._client.mux.pipeline([("XDEL", stream, one) for one in entry_ids])
        if all(isinstance(reply, ServerError) for reply in replies):
            raise self._client.refused(replies[0])
        return [self._client.refused(reply) if isinstance(reply, ServerError) else int(reply) for reply in replies]


def _raw(fields: Sequence[bytes]) -> list[Argument]:
    raw: list[Argument] = []
    for name, value in zip(fields[::2], fields[1::2], strict=True):
        if name.startswith(RAW):
            raw += (name[len(RAW) :], value)
    return raw
