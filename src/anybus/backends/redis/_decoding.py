"""Decodes the server's replies into entries."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, Final

from ..._ground.checks import is_entry_id
from ..._ground.errors import SerializationError
from ..._messages.message import NO_HEADERS, lift_headers
from ...abc import ClaimedMessage, Codec, FetchedEntry, MalformedEntry, MissingEntry

MAX_ENCODED: Final = 8 * 1024 * 1024
"""The largest message that an application may publish, in bytes, encoded."""

MAX_RECEIVED: Final = MAX_ENCODED + 64 * 1024
"""The largest message that is received: with room for the headers of retries and dead letters."""


class EntryDecoder:
    """Decodes entries. An entry that cannot be decoded is reported by itself, and does not affect other entries."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._second = ("-", datetime.fromtimestamp(0, timezone.utc))

    def entry(self, raw_id: bytes, fields: Sequence[bytes] | None, deliveries: int) -> FetchedEntry:
        entry_id = raw_id.decode()
        if fields is None:
            return MissingEntry(entry_id)
        body: bytes | None = None
        if len(fields) == 2 and fields[0] == b"message":
            body = fields[1]
        else:
            for index in range(0, len(fields) - 1, 2):
                if fields[index] == b"message":
                    body = fields[index + 1]  # if there are several, the last one, as in the other implementations
        if body is None:
            return self._malformed(entry_id, fields, "the entry has no field 'message'", deliveries)
        if len(body) > MAX_RECEIVED:
            text = f"a message must be at most {MAX_RECEIVED} bytes, not {len(body)}"
            return self._malformed(entry_id, fields, text, deliveries)
        try:
            message = self._codec.decode(body)
            if message.headers is not NO_HEADERS:
                message = lift_headers(message)
        except SerializationError as error:
            return self._malformed(entry_id, fields, str(error), deliveries)
        except (KeyboardInterrupt, SystemExit):
            raise  # a signal handler can raise these anywhere
        except BaseException as error:  # noqa: ASYNC103 - a codec awaits nothing, so this is no real cancellation
            # The application's own codec raised an error that it should not: other entries must not be affected.
            return self._malformed(entry_id, fields, f"the codec raised {error!r}", deliveries)  # noqa: ASYNC104
        return ClaimedMessage(entry_id, message, deliveries, self._published_at(entry_id))

    def _malformed(self, entry_id: str, fields: Sequence[bytes], error: str, deliveries: int) -> MalformedEntry:
        raw = {
            fields[index].decode(errors="backslashreplace"): fields[index + 1] for index in range(0, len(fields) - 1, 2)
        }
        return MalformedEntry(entry_id, raw, error, deliveries)

    def _published_at(self, entry_id: str) -> datetime:
        prefix, at = self._second
        if not entry_id.startswith(prefix):
            # Cached by the millisecond, which the entries of one read often share.
            milliseconds = entry_id.partition("-")[0]
            try:
                at = datetime.fromtimestamp(int(milliseconds) / 1000, timezone.utc)
            except (ValueError, OverflowError, OSError):
                at = datetime.max.replace(tzinfo=timezone.utc)  # an id that somebody chose by hand
            self._second = (f"{milliseconds}-", at)
        return at

    def read(self, reply: Any) -> list[FetchedEntry]:
        """Decode the reply to an XREADGROUP of one stream. New entries have been delivered once."""
        if not reply:
            return []
        return self.new(reply[0][1])

    def new(self, entries: Any) -> list[FetchedEntry]:
        """Decode new entries of one stream. Ordinary entries are decoded here, all others by :meth:`entry`."""
        found: list[FetchedEntry] = []
        append, decode = found.append, self._codec.decode
        prefix, at = self._second
        for raw_id, fields in entries:
            try:
                name, body = fields
                if name == b"message" and len(body) <= MAX_RECEIVED:
                    message = decode(body)
                    if message.headers is not NO_HEADERS:
                        message = lift_headers(message)
                    entry_id = raw_id.decode()
                    if not entry_id.startswith(prefix):
                        at = self._published_at(entry_id)
                        prefix = self._second[0]
                    append(ClaimedMessage(entry_id, message, 1, at))
                    continue
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # noqa: ASYNC103 - entry() decodes again, and reports the error
                pass
            append(self.entry(raw_id, fields, 1))
        return found

    def reclaimed(self, entries: Any) -> list[FetchedEntry]:
        """Decode what the reclaim script returns: id, fields (nil = gone), the server's count of deliveries."""
        return [self.entry(raw_id, fields, int(deliveries)) for raw_id, fields, deliveries in entries]


def position(entry_id: str) -> tuple[int, int]:
    """An entry id as two numbers, by which ids are ordered."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)


def predecessor(entry_id: str) -> str:
    """The id right before another one."""
    milliseconds, sequence = position(entry_id)
    if sequence:
        return f"{milliseconds}-{sequence - 1}"
    return f"{milliseconds - 1}-{2**64 - 1}" if milliseconds else "0-0"


def span(message_ids: Sequence[str]) -> tuple[str, str]:
    """A range that most likely contains these ids. They are compared as text, which is right if their lengths agree."""
    low, high = min(message_ids), max(message_ids)
    return (low, high) if is_entry_id(low) and is_entry_id(high) else ("-", "+")
