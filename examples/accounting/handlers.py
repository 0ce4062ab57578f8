"""The work of the two groups: what their handlers do, and how they fail.

The rules below stand for the ways in which real handlers end: most succeed, some fail for a moment, some ask for a
retry, some refuse the message, some fail however often they try. They look at nothing but the event and the number of
the attempt, so that a run can be repeated.
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
"""Returns if the message is handled, else raises. Takes the function, the message's uid and the attempt."""


def enter_in_catalogue(function: Function, uid: str, attempt: int) -> None:
    """The catalogue takes every function that has a name of its own and fits a row."""
    if attempt <= _digit(uid) - 12:
        raise ConnectionError("the catalogue is busy")
    if function.is_async and attempt == 1:
        raise Retry("the index of asynchronous functions is not open yet", delay=0.1)
    if function.is_nested and function.is_private:
        raise Reject("nobody looks up a private function inside another one")
    if len(function.arguments) > MAX_COLUMNS:
        raise ValueError(f"{len(function.arguments)} arguments do not fit {MAX_COLUMNS} columns")


def check_docstring(function: Function, uid: str, attempt: int) -> None:
    """The docstrings' group looks at what a user can read in the documentation."""
    if attempt == 1 and _digit(uid) == 0:
        raise TimeoutError("the page could not be read")
    if function.is_private and not function.has_docstring:
        raise Reject("a private function without a docstring")
    if function.is_nested:
        raise LookupError("a function inside another one cannot be looked up by its name")


def _digit(uid: str) -> int:
    """A number from 0 to 15 that is spread evenly over the uids."""
    return int(uid[0], 16)


class Worker:
    """One consumer's handler, and what it writes down.

    :ivar midway: set while the handling of that number is under way, so that at least one runs when it is seen.
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
        # The work itself: 10 to 40 ms of waiting for something, during which it may be cancelled.
        await anyio.sleep(0.010 + 0.002 * int(message.uid[-1], 16))
        self._rule(message.json(Function), message.uid, attempt)
        # The line is the work's last step. Nothing is awaited after it, so a handling that is written down as a
        # success cannot be cancelled any more.
        self._books.handled.append(message.uid)
