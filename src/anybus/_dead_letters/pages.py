"""Reading dead letters page by page: all that match, or the chosen ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from .._failure.copies import MAX_COPY_BYTES
from ..abc import DeadLetterStore
from .letter import DeadLetter, LetterFilter, read_letter

PAGE_BYTES: Final = 1024 * 1024
"""The maximum number of bytes that are read at a time, and moved in one step."""

PAGE_COUNT: Final = 100

ENTRY_BYTES: Final = MAX_COPY_BYTES + 128 * 1024
"""Entries up to this size are read whole: the largest message that can be received, and some raw fields."""


@dataclass(frozen=True)
class Found:
    """A dead letter that matches. Without a letter: a chosen id that is gone, or does not match."""

    id: str
    letter: DeadLetter | None
    size: int = 0


class AllMatching:
    """All dead letters that match, up to the last one at the start. Those that are added later come after it."""

    def __init__(
        self,
        store: DeadLetterStore,
        stream: str,
        only: LetterFilter,
        check_open: Callable[[], None],
        *,
        after: str | None = None,
        count: int = PAGE_COUNT,
    ) -> None:
        self._store = store
        self._stream = stream
        self._only = only
        self._check_open = check_open
        self._after = after
        self._count = min(count, PAGE_COUNT)
        self._until: str | None = None

    async def next(self) -> list[Found]:
        """The next ones, at most a page; an empty list = there are no more."""
        self._check_open()
        if self._until is None:
            self._until = await self._store.last_entry_id(self._stream)
        while self._until is not None:
            self._check_open()
            entries = await self._store.read_page(
                self._stream,
                after=self._after,
                until=self._until,
                count=self._count,
                max_bytes=PAGE_BYTES,
                max_entry_bytes=ENTRY_BYTES,
            )
            if not entries:
                break
            self._after = entries[-1].id
            # If few match, larger reads find them sooner.
            self._count = min(self._count * 2, PAGE_COUNT)
            letters = [(read_letter(entry, self._only.topic), entry.size) for entry in entries]
            if found := [Found(letter.id, letter, size) for letter, size in letters if self._only.matches(letter)]:
                return found
        return []


class Chosen:
    """The chosen dead letters, in the given order."""

    def __init__(
        self,
        store: DeadLetterStore,
        stream: str,
        only: LetterFilter,
        check_open: Callable[[], None],
        ids: Sequence[str],
    ) -> None:
        self._store = store
        self._stream = stream
        self._only = only
        self._check_open = check_open
        self._left = list(reversed(ids))

    async def next(self) -> list[Found]:
        """Like :meth:`AllMatching.next`."""
        found: list[Found] = []
        size = 0
        while self._left and size < PAGE_BYTES and len(found) < PAGE_COUNT:
            self._check_open()
            entry_id = self._left.pop()
            entry = await self._store.read_entry(self._stream, entry_id, max_entry_bytes=ENTRY_BYTES)
            letter = None if entry is None else read_letter(entry, self._only.topic)
            if entry is None or letter is None or not self._only.matches(letter):
                found.append(Found(entry_id, None))
            else:
                found.append(Found(entry_id, letter, entry.size))
                size += entry.size
        return found


class LetterIterator(AsyncIterator[DeadLetter]):
    """Iterates over single dead letters. Not an async generator, which somebody would have to close."""

    def __init__(self, source: AllMatching | Chosen) -> None:
        self._source = source
        self._found: list[Found] = []

    async def __anext__(self) -> DeadLetter:
        if not self._found:
            self._found = list(reversed(await self._source.next()))
        if not self._found:
            raise StopAsyncIteration
        letter = self._found.pop().letter
        assert letter is not None
        return letter
