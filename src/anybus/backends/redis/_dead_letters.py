"""Dead letters on Redis: reading a stream without a group, and taking entries out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ..._checks import is_entry_id
from ..._errors import BackendError, EventBusError, ValidationError
from ...abc import ClaimedMessage, Codec, DeadLetterStore, MalformedEntry, Move, StoredEntry
from . import _dead_letter_scripts as scripts
from ._client import Client
from ._decoding import EntryDecoder
from ._errors import has_code
from ._protocol import Argument, ServerError

_IDS_AT_ONCE: Final = 500


class RedisDeadLetters(DeadLetterStore):
    """This part of the Redis backend."""

    _client: Client
    _codec: Codec
    _decoder: EntryDecoder

    async def last_entry_id(self, stream: str) -> str | None:
        reply = await self._client.run(scripts.LAST, stream, "", (stream,), ())
        return None if reply is None else self._client.text(reply)

    async def read_page(
        self, stream: str, *, after: str | None, until: str, count: int, max_bytes: int, max_entry_bytes: int
    ) -> list[StoredEntry]:
        for field, value in (("after", after), ("until", until)):
            if value is not None and not is_entry_id(value):
                raise ValidationError(f"{field} must be an entry's id, not {value!r:.60}")
        start = "-" if after is None else f"({after}"
        return await self._read(stream, start, until, count, max_bytes, max_entry_bytes)

    async def read_entry(self, stream: str, entry_id: str, *, max_entry_bytes: int) -> StoredEntry | None:
        if not is_entry_id(entry_id):
            return None
        entries = await self._read(stream, entry_id, entry_id, 1, max_entry_bytes, max_entry_bytes)
        return entries[0] if entries else None

    async def _read(
        self, stream: str, start: str, end: str, count: int, max_bytes: int, max_entry_bytes: int
    ) -> list[StoredEntry]:
        args = (start, end, count, max_bytes, max_entry_bytes)
        reply = await self._client.run(scripts.PAGE, stream, "", (stream,), args)
        with self._client.reading(reply):
            return [self._stored(raw_id, fields, sizes) for raw_id, fields, sizes in reply]

    def _stored(self, raw_id: bytes, fields: list[bytes | None], sizes: list[int]) -> StoredEntry:
        names = [(name or b"").decode(errors="backslashreplace") for name in fields[::2]]
        read = [value for pair in zip(fields[::2], fields[1::2], strict=True) if pair[1] is not None for value in pair]
        entry = self._decoder.entry(raw_id, [value or b"" for value in read], 1)
        published_at = self._decoder._published_at(raw_id.decode())
        message = entry.message if isinstance(entry, ClaimedMessage) else None
        error = entry.error if isinstance(entry, MalformedEntry) else None
        rest = {
            name: value
            for name, value in zip(names, fields[1::2], strict=True)
            if value is not None and (name != "message" or message is None)
        }
        told = {name: size for name, size in zip(names, sizes, strict=True) if name != "message" or message is None}
        if message is None and "message" in told and "message" not in rest:
            error = f"a message of {told['message']} bytes is too large to be read"
        return StoredEntry(raw_id.decode(), message, rest, told, error, published_at)

    async def has_group(self, stream: str, group: str) -> bool:
        [reply] = await self._client.mux.pipeline((("XPENDING", stream, group),))
        if isinstance(reply, ServerError):
            if has_code(reply, "NOGROUP"):
                return False
            raise self._client.refused(reply)
        return True

    async def move_entries(self, stream: str, moves: Sequence[Move]) -> list[str | EventBusError | None]:
        results: list[str | EventBusError | None] = [None] * len(moves)
        keys: list[str] = [stream]
        args: list[Argument] = []
        places: list[int] = []
        for index, move in enumerate(moves):
            if not is_entry_id(move.id):
                continue
            fields: tuple[Argument, ...] = ()
            if move.message is not None:
                try:
                    fields = ("message", self._codec.encode(move.message))
                except EventBusError as error:
                    results[index] = error
                    continue
            if move.stream not in keys[1:]:
                keys.append(move.stream)
            args += (move.id, keys.index(move.stream, 1) + 1, len(fields), *fields)
            places.append(index)
        if places:
            reply = await self._client.run(scripts.MOVE, stream, "", keys, (len(places), *args))
            for index, result in zip(places, self._moved(reply, len(places)), strict=True):
                results[index] = result
        return results

    def _moved(self, reply: Any, moves: int) -> list[str | BackendError | None]:
        results: list[str | BackendError | None] = []
        with self._client.reading(reply):
            for _, (status, *values) in zip(range(moves), reply, strict=True):
                if status == b"done":
                    results.append(values[0].decode())
                elif status == b"gone":
                    results.append(None)
                else:
                    results.append(self._client.refused(ServerError(values[0].decode(errors="replace"))))
        return results

    async def remove_entries(self, stream: str, entry_ids: Sequence[str]) -> int:
        known = [entry_id for entry_id in entry_ids if is_entry_id(entry_id)]
        removed = 0
        for start in range(0, len(known), _IDS_AT_ONCE):
            reply = await self._client.call("XDEL", stream, *known[start : start + _IDS_AT_ONCE])
            with self._client.reading(reply):
                removed += int(reply)
        return removed
