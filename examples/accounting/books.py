"""The books: files that the handlers append to, one line for each handling begun and one for each message handled.

They are written by whoever did the work, at the moment it was done, and they know nothing of the bus. That is what
makes them worth something as evidence.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


class Book:
    """A file that only grows, by whole lines of fields that hold no tabs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Line buffering: every line reaches the file in one write, so that a reader never sees half of one.
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def append(self, *fields: str) -> None:
        """Synchronous on purpose: no cancellation can come between the work and its line."""
        self._file.write("\t".join(fields) + "\n")

    def rows(self) -> list[tuple[str, ...]]:
        """What stands in the file."""
        return [tuple(line.split("\t")) for line in self._path.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        self._file.close()


class Books:
    """The two books of a consumer group.

    :ivar begun: a row for every handling at its start: the message's uid, the attempt, the consumer.
    :ivar handled: a row for every handling that succeeded, at its very end: the message's uid.
    """

    def __init__(self, folder: Path, group: str) -> None:
        self.begun = Book(folder / f"{group}.begun.tsv")
        self.handled = Book(folder / f"{group}.handled.tsv")

    def handled_uids(self) -> set[str]:
        return {uid for uid, *_ in self.handled.rows()}


@contextmanager
def open_books(folder: Path, groups: list[str]) -> Generator[dict[str, Books], None, None]:
    """Books for every group, closed at the end."""
    books = {group: Books(folder, group) for group in groups}
    try:
        yield books
    finally:
        for pair in books.values():
            pair.begun.close()
            pair.handled.close()
