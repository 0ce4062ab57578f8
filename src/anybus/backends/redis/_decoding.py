"""From the server's replies to entries."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, Final

from ..._ground.checks import is_entry_id
from ..._ground.errors import SerializationError
from ..._messages.message import NO_HEADERS, lift_headers
from ...abc import ClaimedMessage, Codec, FetchedEntry, MalformedEntry, MissingEntry

MAX_ENCODED: Final = 8 * 1024 * 1024
"""What an application publishes may be so large, encoded."""

MAX_RECEIVED: Final = MAX_ENCODED + 64 * 1024
"""Room for the headers of retries and dead letters."""


class EntryDecoder:
    """Decodes entries; what cannot be decoded is told entry by entry, and never fails its neighbours."""

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
                    body = fields[index + 1]  # the last of two wins, as in the other implementations
        if body is None:
            return self._malformed(entry_id, fields, "there is no field 'message'", deliveries)
        if len(body) > MAX_RECEIVED:
            return self._malformed(entry_id, fields, f"{len(body)} bytes are more than {MAX_RECEIVED}", deliveries)
        try:
            message = self._codec.decode(body)
            if message.headers is not NO_HEADERS:
                message = lift_headers(message)
        except SerializationError as error:
            return self._malformed(entry_id, fields, str(error), deliveries)
        except (KeyboardInterrupt, SystemExit):
            raise  # perhaps from a signal handler, which can strike anywhere
        except BaseException as error:  # noqa: ASYNC103 - it awaits nothing: no real cancellation
            # A codec of the application's own that raises what it should not: its neighbours must not suffer.
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
            # Entries of one read often share their millisecond.
            milliseconds = entry_id.partition("-")[0]
            try:
                at = datetime.fromtimestamp(int(milliseconds) / 1000, timezone.utc)
            except (ValueError, OverflowError, OSError):
                at = datetime.max.replace(tzinfo=timezone.utc)  # an id that somebody chose by hand
            self._second = (f"{milliseconds}-", at)
        return at

    def read(self, reply: Any) -> list[FetchedEntry]:
        """The reply of an XREADGROUP of one stream: what is new has been handed over once."""
        if not reply:
            return []
        return self.new(reply[0][1])

    def new(self, entries: Any) -> list[FetchedEntry]:
        """The entries of one stream, new ones. What is nearly every one is decoded here, the rest in :meth:`entry`."""
        found: list[FetchedEntry] = []
        append, decode = found.append, self._codec.decode
        prefix, at = self._second
        for raw_id, fields in entries:
            if fields is not None and len(fields) == 2 and fields[0] == b"message" and len(fields[1]) <= MAX_RECEIVED:
                try:
                    message = decode(fields[1])
                    if message.headers is not NO_HEADERS:
                        message = lift_headers(message)
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException:  # noqa: ASYNC103 - as in entry(), which says it in words
                    pass
                else:
                    entry_id = raw_id.decode()
                    if not entry_id.startswith(prefix):
                        at = self._published_at(entry_id)
                        prefix = self._second[0]
                    append(ClaimedMessage(entry_id, message, 1, at))
                    continue
            append(self.entry(raw_id, fields, 1))
        return found

    def reclaimed(self, entries: Any) -> list[FetchedEntry]:
        """What the reclaim script returns: id, fields (nil = gone), the server's count."""
        return [self.entry(raw_id, fields, int(deliveries)) for raw_id, fields, deliveries in entries]


def position(entry_id: str) -> tuple[int, int]:
    """An entry id as numbers, which is how they are ordered."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)


def predecessor(entry_id: str) -> str:
    """The id right before another one."""
    milliseconds, sequence = position(entry_id)
    if sequence:
        return f"{milliseconds}-{sequence - 1}"
    return f"{milliseconds - 1}-{2**64 - 1}" if milliseconds else "0-0"


def span(message_ids: Sequence[str]) -> tuple[str, str]:
    """A range that most likely holds these ids: compared as text, which is right for ids of the same length."""
    low, high = min(message_ids), max(message_ids)
    return (low, high) if is_entry_id(low) and is_entry_id(high) else ("-", "+")
