"""The books: files to which handlers append a line for each handling that begins and for each message handled.

The handlers write them at the moment of the work, without the bus. So the books are independent evidence.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


class Book:
    """A file to which lines of tab-separated fields are appended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Line buffering: each line is written at once, so a reader never sees half a line.
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def append(self, *fields: str) -> None:
        """Append one line. This is synchronous, so that a cancellation cannot come between the work and its line."""
        self._file.write("\t".join(fields) + "\n")

    def rows(self) -> list[tuple[str, ...]]:
        """The fields of each line."""
        return [tuple(line.split("\t")) for line in self._path.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        self._file.close()


class Books:
    """The two books of a consumer group.

    :ivar begun: a row at the start of each handling: the uid of the message, the attempt, the consumer.
    :ivar handled: a row at the end of each successful handling: the uid of the message.
    """

    def __init__(self, folder: Path, group: str) -> None:
        self.begun = Book(folder / f"{group}.begun.tsv")
        self.handled = Book(folder / f"{group}.handled.tsv")

    def handled_uids(self) -> set[str]:
        return {uid for uid, *_ in self.handled.rows()}


@contextmanager
def open_books(folder: Path, groups: list[str]) -> Generator[dict[str, Books], None, None]:
    """Open the books of all groups. Leaving the block closes them."""
    books = {group: Books(folder, group) for group in groups}
    try:
        yield books
    finally:
        for pair in books.values():
            pair.begun.close()
            pair.handled.close()
