"""Dead letters on Redis: reading a stream without a group, and removing entries from it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from ..._ground.checks import is_entry_id
from ..._ground.errors import BackendError, EventBusError, ValidationError
from ...abc import ClaimedMessage, Codec, DeadLetterStore, MalformedEntry, Move, StoredEntry
from ...abc._dead_letters import RAW_PREFIX
from . import _dead_letter_scripts as scripts
from ._client import Client
from ._decoding import EntryDecoder
from ._errors import has_code, is_out_of_reach
from ._parts import fitting, size
from ._protocol import Argument, ServerError

_IDS_AT_ONCE: Final = 500
_MOVES_AT_ONCE: Final = 250
RAW: Final = RAW_PREFIX.encode()


class RedisDeadLetters(DeadLetterStore):
    """The Redis backend's part for dead letters."""

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
        waiting: list[tuple[int, Move, tuple[Argument, ...]]] = []
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
            waiting.append((index, move, fields))
        done = 0
        while waiting:
            # If they have too many bytes for one call, the script ends early.
            part = waiting[: next(fitting([size(fields) for _, _, fields in waiting], _MOVES_AT_ONCE))]
            try:
                moved = await self._move(stream, part)
            except BackendError as failure:
                if len(moves) > 1 and is_out_of_reach(failure):
                    # A script is refused as a whole if the user may not access one of its keys.
                    moved = [await self._move_alone(stream, one) for one in part]  # noqa: ASYNC120
                elif not done:
                    raise
                else:
                    moved = [failure] * len(waiting)  # not raised, because the results of earlier moves are known
            for (index, _, _), result in zip(waiting, moved, strict=False):
                results[index] = result
            done += len(moved)
            waiting = waiting[len(moved) :]
        with suppress(BackendError):  # they are noticed some seconds later
            await self._client.note_waiting(move.stream for move in moves)
        return results

    async def _move_alone(self, stream: str, one: tuple[int, Move, tuple[Argument, ...]]) -> str | BackendError | None:
        try:
            [result] = await self._move(stream, [one])
        except BackendError as error:
            return error
        return result

    async def _move(
        self, stream: str, part: Sequence[tuple[int, Move, tuple[Argument, ...]]]
    ) -> list[str | BackendError | None]:
        """The results of the first of these moves, at least one."""
        keys: list[str] = [stream]
        args: list[Argument] = [len(part)]
        for _, move, fields in part:
            if move.stream not in keys[1:]:
                keys.append(move.stream)
            args += (move.id, keys.index(move.stream, 1) + 1, len(fields), *fields)
        reply = await self._client.run(scripts.MOVE, stream, "", keys, args)
        results: list[str | BackendError | None] = []
        with self._client.reading(reply):
            if not 0 < len(reply) <= len(part):
                raise ValueError
            for (_, move, _), answer in zip(part, reply, strict=False):
                if answer[0] == b"many":
                    if not results:
                        results.append(await self._move_large(stream, move))
                    break  # the moves that follow are sent again
                results.append(self._moved(answer))
        return results

    def _moved(self, answer: Sequence[bytes]) -> str | BackendError | None:
        status, *values = answer
        if status == b"done":
            return values[0].decode()
        if status == b"gone":
            return None
        error = ServerError(values[0].decode(errors="replace"))
        return self._client.refused(error, may_have_happened=status == b"half")

    async def _move_large(self, stream: str, move: Move) -> str | BackendError | None:
        """Move an entry with more raw fields than a script can append, in two steps.

        If it is interrupted between the two, the entry is in both streams.
        """
        try:
            found = await self._client.call("XRANGE", stream, move.id, move.id)
            with self._client.reading(found):
                if not found:
                    return None
                fields: list[Argument] = []
                for name, value in zip(found[0][1][::2], found[0][1][1::2], strict=True):
                    if name.startswith(RAW):
                        fields += (name[len(RAW) :], value)
            appended = self._client.text(await self._client.call("XADD", move.stream, "*", *fields))
        except BackendError as error:
            return error
        keys, args = (stream, move.stream), (move.id, appended)
        try:
            answer = await self._client.run(scripts.REMOVE_MOVED, stream, "", keys, args)
            with self._client.reading(answer):
                return self._moved(answer)
        except BackendError as error:
            error.may_have_happened = True
            return error

    async def remove_entries(self, stream: str, entry_ids: Sequence[str]) -> int:
        known = [entry_id for entry_id in entry_ids if is_entry_id(entry_id)]
        removed = 0
        for start in range(0, len(known), _IDS_AT_ONCE):
            reply = await self._client.call("XDEL", stream, *known[start : start + _IDS_AT_ONCE])
            with self._client.reading(reply):
                removed += int(reply)
        return removed
