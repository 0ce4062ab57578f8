"""What a publish returns that appended nothing, because its message had been published before."""

from __future__ import annotations


class Duplicate(str):
    """The id that the first publish with an idempotency key returned. A later one within the window appended nothing.

    It is a ``str`` with that id. ``isinstance(entry_id, Duplicate)`` tells it from the id of a new entry.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Duplicate({str.__repr__(self)})"
