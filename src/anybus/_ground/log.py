"""The log: the logger ``anybus``, one line for each thing, the same fields on every record."""

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
"""Attributes of every record of the logger; None where they do not apply. ``logging`` has none of these names."""

_SHOWN: Final = ("uid", "key", "topic", "group", "consumer", "entry_id")
_LONGEST: Final = 500
_NOTHING: Final[Mapping[str, Any]] = {}
_UNKNOWN: Final = dict.fromkeys(FIELDS)


def one_line(text: str) -> str:
    """The text on one line, cut to a length that a line can have."""
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
    """Log one line: the text, then what is known of the place and the message.

    Nothing that handlers, filters or record factories of the application do can harm the bus.

    :param text: a format in the way of ``logging``, so that what differs only in its arguments can be grouped.
    :param hidden: fields of the record that are not shown in its text.
    :param error: whose traceback follows.
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
        # A record factory of the application may have set one of these names, which `extra` may not overwrite.
        with suppress(Exception):
            logger.log(level, text, *args, exc_info=error)
