"""What the handlers of the two groups do, and how they fail.

The rules imitate real handlers. Most handlings succeed. Some fail and succeed later, some ask for a retry, some reject
the message, and some fail every time. The rules depend only on the event and the attempt, so every run is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import anyio
from books import Books

from anybus import Delivery, Reject, Retry

MAX_COLUMNS: Final = 8


@dataclass(frozen=True)
class Function:
    """The payload of an event."""

    module: str
    function: str
    line: int
    arguments: list[str]
    is_async: bool
    has_docstring: bool

    @property
    def is_private(self) -> bool:
        name = self.function.rpartition(".")[2]
        return name.startswith("_") and not name.startswith("__")

    @property
    def is_nested(self) -> bool:
        return "<locals>" in self.function


Rule = Callable[[Function, str, int], None]
"""Takes the function, the uid of the message and the attempt. Raises if the handling fails."""


def enter_in_catalogue(function: Function, uid: str, attempt: int) -> None:
    """The catalogue accepts functions that can be looked up and fit into a row."""
    if attempt <= _digit(uid) - 12:
        raise ConnectionError("the catalogue is busy")
    if function.is_async and attempt == 1:
        raise Retry("the index of asynchronous functions is not open yet", delay=0.1)
    if function.is_nested and function.is_private:
        raise Reject("nobody looks up a private function inside another one")
    if len(function.arguments) > MAX_COLUMNS:
        raise ValueError(f"{len(function.arguments)} arguments do not fit {MAX_COLUMNS} columns")


def check_docstring(function: Function, uid: str, attempt: int) -> None:
    """The group ``docstrings`` checks functions that appear in the documentation."""
    if attempt == 1 and _digit(uid) == 0:
        raise TimeoutError("the page could not be read")
    if function.is_private and not function.has_docstring:
        raise Reject("a private function without a docstring")
    if function.is_nested:
        raise LookupError("a function inside another one cannot be looked up by its name")


def _digit(uid: str) -> int:
    """A number from 0 to 15, evenly distributed over the uids."""
    return int(uid[0], 16)


class Worker:
    """The handler of one consumer. It writes to the books of its group.

    :ivar midway: set during the handling with the number ``midway_at``, so that a handler runs when the consumer is
        cancelled.
    """

    def __init__(self, name: str, books: Books, rule: Rule, *, midway_at: int) -> None:
        self._name = name
        self._books = books
        self._rule = rule
        self._midway_at = midway_at
        self._begun = 0
        self.midway = anyio.Event()

    async def handle(self, delivery: Delivery) -> None:
        message, attempt = delivery.message, delivery.state.attempt
        self._books.begun.append(message.uid, str(attempt), self._name)
        self._begun += 1
        if self._begun == self._midway_at:
            self.midway.set()
        # The work: waiting for 10 to 40 ms. It can be cancelled meanwhile.
        await anyio.sleep(0.010 + 0.002 * int(message.uid[-1], 16))
        self._rule(message.json(Function), message.uid, attempt)
        # This is the last step. Nothing is awaited after it, so a handling that was recorded as a success cannot be
        # cancelled any more.
        self._books.handled.append(message.uid)
