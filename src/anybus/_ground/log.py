"""The log: the logger ``anybus``. One line per event, and the same fields on every record."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

logger: Final = logging.getLogger("anybus")

FIELDS: Final = (
    "scope",
    "uid",
    "key",
    "topic",
    "group",
    "consumer",
    "entry_id",
    "attempt",
    "max_attempts",
    "delay",
    "code",
)
"""Extra attributes of every record; None if they do not apply. ``logging`` itself uses none of these names."""

_SHOWN: Final = ("uid", "key", "topic", "group", "consumer", "entry_id")
_LONGEST: Final = 500
_NOTHING: Final[Mapping[str, Any]] = {}
_UNKNOWN: Final = dict.fromkeys(FIELDS)


def one_line(text: str) -> str:
    """The text on one line, shortened to at most 500 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def say(
    level: int,
    text: str,
    *args: object,
    fields: Mapping[str, Any] = _NOTHING,
    hidden: Mapping[str, Any] = _NOTHING,
    error: BaseException | None = None,
) -> None:
    """Log one line: the text, then the known fields that identify the place and the message.

    Errors in the application's log handlers, filters and record factories cannot harm the bus.

    :param text: a format string for ``logging``, so that lines that differ only in their arguments can be grouped.
    :param fields: fields of the record that are also shown in its text.
    :param hidden: fields of the record that are not shown in its text.
    :param error: the exception whose traceback is logged after the line.
    """
    if not logger.isEnabledFor(level):
        return
    args = tuple(one_line(arg) if isinstance(arg, str) else arg for arg in args)
    place = " ".join(f"{name}={fields[name]!r}" for name in _SHOWN if fields.get(name) is not None)
    if place:
        text, args = f"{text} [%s]", (*args, place)
    try:
        logger.log(level, text, *args, extra={**_UNKNOWN, **hidden, **fields}, exc_info=error)
    except Exception:
        # A record factory of the application may have set one of these names. `extra` must not overwrite it.
        with suppress(Exception):
            logger.log(level, text, *args, exc_info=error)
