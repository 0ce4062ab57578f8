"""Delayed messages on one server: storing, cancelling, listing, and appending what is due."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from ..._ground.checks import check_delay, check_time
from ..._ground.errors import UnsupportedError, ValidationError
from ..._messages.message import Message
from ...abc import ClaimedMessage, DelayedEntry, DelayedPage, MalformedEntry, PublishSpec, ScheduleStore
from . import _schedule_scripts as scripts
from . import _taking_scripts as taking
from ._client import Client
from ._decoding import EntryDecoder
from ._deduplication import Deduplicator
from ._keys import RESERVED, dedup_ends, dedup_ids, delayed
from ._protocol import Argument

Expect = Callable[[str, float, bool], None]
"""Called with a stream, in how many seconds something is due there, and whether this backend has stored it."""

_ID: Final = re.compile(r"(\d{1,20})-([0-9a-f]{1,31})", re.ASCII)
_UNDATED: Final = re.compile(r"[0-9a-f]{16}")
_AFTER: Final = re.compile(r"(\d{1,20})/((?:[0-9a-f]{2}){1,40})", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_LAST: Final = datetime.max.replace(tzinfo=timezone.utc)
_PAGE_COUNT: Final = 500


class RedisSchedules:
    """The Redis backend's part for delayed messages."""

    _client: Client
    _decoder: EntryDecoder
    _expect: Expect
    _encode: Callable[[Message], bytes]
    _once: Deduplicator

    async def publish_later(
        self,
        stream: str,
        message: Message,
        *,
        delay: float | None = None,
        at: datetime | None = None,
        spec: PublishSpec | None = None,
    ) -> str:
        if (delay is None) == (at is None):
            raise ValidationError("publish_later takes exactly one of delay and at")
        if spec is not None and spec.confirmation != "accepted":
            raise UnsupportedError(
                f"publish_later cannot wait until a message is {spec.confirmation}: use confirmation='accepted'"
            )
        if at is not None:
            due = f"{check_time('at', at).timestamp() * 1000:.0f}"
        else:
            due = f"+{check_delay('delay', delay) * 1000:.0f}"
        if spec is None or spec.idempotency_key is None:
            return await self.schedule(stream, due, ("message", self._encode(message)))
        self._expect(stream, math.inf, True)  # it may be stored although the reply is lost
        schedule_id, wait = await self._once.schedule(stream, due, secrets.token_hex(4), message, spec)
        if wait is not None:
            self._expect(stream, wait, True)
        return schedule_id

    async def schedule(self, stream: str, due: str, fields: Sequence[Argument]) -> str:
        """Store fields for later.

        :param due: in ms, since 1970 or, with a leading ``+``, from now.
        :return: the schedule id.
        """
        # A retry stream is not expected: entries that were appended there wait for a pass, which appends them itself.
        expect = _ignore if stream.startswith(RESERVED) else self._expect
        expect(stream, math.inf, True)  # it may be stored although the reply is lost
        args = (due, secrets.token_hex(4), *fields)
        reply = await self._client.run(scripts.SCHEDULE, stream, "", (delayed(stream),), args)
        with self._client.reading(reply):
            schedule_id, wait = str(reply[0].decode()), int(reply[1])
        expect(stream, wait / 1000, True)
        return schedule_id

    async def cancel_later(self, stream: str, schedule_id: str) -> bool:
        if _UNDATED.fullmatch(schedule_id):
            return await self._cancel_undated(stream, schedule_id)
        found = _ID.fullmatch(schedule_id)
        if found is None:
            return False
        looked = 0
        while True:
            args, keys = (found[1], found[2], looked), (delayed(stream), dedup_ids(stream), dedup_ends(stream))
            reply = await self._client.run(scripts.CANCEL, stream, "", keys, args)
            with self._client.reading(reply):
                looked, removed = int(reply[0]), int(reply[1])
            if looked < 0:
                return bool(removed)

    async def _cancel_undated(self, stream: str, schedule_id: str) -> bool:
        cursor = "0"
        while True:
            args = (schedule_id, cursor)
            reply = await self._client.run(scripts.CANCEL_UNDATED, stream, "", (delayed(stream),), args)
            with self._client.reading(reply):
                cursor, removed = reply[0].decode(), int(reply[1])
            if removed or cursor == "0":
                return bool(removed)

    async def delayed_page(self, stream: str, *, after: str | None, count: int, max_bytes: int) -> DelayedPage:
        score, head = "", b""
        if after is not None:
            found = _AFTER.fullmatch(after)
            if found is None:
                raise ValidationError(f"after must be the 'next' of a page, not {after!r:.60}")
            score, head = found[1], bytes.fromhex(found[2])
        args = (score, head, min(count, _PAGE_COUNT), max_bytes)
        reply = await self._client.run(scripts.PAGE, stream, "", (delayed(stream),), args)
        with self._client.reading(reply):
            more, page = reply
            entries = [self._delayed(score, values) for score, _, values in page]
            last = f"{int(float(page[-1][0]))}/{page[-1][1].hex()}" if more and page else None
        return DelayedPage(entries, last)

    def _delayed(self, score: bytes, values: list[bytes]) -> DelayedEntry:
        due = int(float(score))
        size = sum(map(len, values))
        if len(values) < 3:
            return DelayedEntry(f"{due}-", due_at(due), None, "it cannot be read", size)
        token, *fields = values
        entry = self._decoder.entry(b"0-0", fields, 1)
        message = entry.message if isinstance(entry, ClaimedMessage) else None
        error = entry.error if isinstance(entry, MalformedEntry) else None
        return DelayedEntry(f"{due}-{token.decode(errors='backslashreplace')}", due_at(due), message, error, size)

    async def append_due(self, stream: str) -> float | None:
        """Append what is due, not more than one call may.

        :return: in how many seconds more is due (0 = now); None = nothing waits.
        """
        reply = await self._client.run(taking.MOVE_DUE, stream, "", (stream, delayed(stream)), ())
        with self._client.reading(reply):
            return None if int(reply) < 0 else int(reply) / 1000

    async def due_within(self, streams: Sequence[str], seconds: float) -> list[float | None]:
        """In how many seconds something is due on each of these streams; infinity = later, None = nothing waits."""
        keys = [delayed(stream) for stream in streams]
        reply = await self._client.run(scripts.DUE_WITHIN, streams[0], "", keys, (int(seconds * 1000),))
        with self._client.reading(reply):
            return [_seconds(one) for one in reply]


def _ignore(stream: str, seconds: float, own: bool) -> None:
    """Nobody has to append it."""


def _seconds(wait: Any) -> float | None:
    if isinstance(wait, int):
        return wait / 1000
    return None if wait == b"none" else math.inf


def due_at(milliseconds: int) -> datetime:
    try:
        return _EPOCH + timedelta(milliseconds=milliseconds)
    except OverflowError:
        return _LAST


class RedisScheduleStore(ScheduleStore):
    """What needs no server."""

    def due_of(self, schedule_id: str) -> datetime:
        return due_at(int(schedule_id.partition("-")[0]))
