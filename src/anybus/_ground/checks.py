"""Checks of values at the door: each returns the value to use, or says which field, which value, and what is allowed.

What is checked is what is used: the returned value is of the plain type (``str``, ``int``, ``float``, ``bytes``,
``datetime``), never of a subclass. A subclass may print, compare and hash as something else than it holds: a ``str``
Enum prints its member's name. So callers keep what a check returns, not what they gave it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, Final, NoReturn, TypeVar, cast
from unicodedata import category

from .errors import ValidationError

MAX_TOPIC_BYTES = 1024
MAX_NAME_BYTES = 256
RESERVED_PREFIX = "anybus:"

PLAIN_TIMES: Final = (datetime,)
"""The type of plain times. In a tuple, where freezegun does not put a class of its own in its place."""

ChoiceT = TypeVar("ChoiceT", bound=str)


def refuse(field: str, value: object, allowed: str) -> NoReturn:
    try:
        shown = repr(value)
    except ValueError:  # an int of more digits than Python will print
        shown = f"<{type(value).__name__}>"
    if len(shown) > 80:
        shown = f"{shown[:60]}... ({len(shown)} characters)"
    raise ValidationError(f"{field} must be {allowed}, not {shown}")


def plain_text(value: str) -> str:
    """The text that it holds, as a plain ``str``; any other type raises ``TypeError``."""
    return value if type(value) is str else str.__str__(value)


def check_text(field: str, value: Any) -> str:
    """A string that UTF-8 can carry (a lone surrogate cannot be sent to any server)."""
    try:
        text = str.__str__(value)  # the base class's method: it also tells a str from what only pretends to be one
    except TypeError:
        refuse(field, value, "a str")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            refuse(field, value, "text that can be encoded as UTF-8")
    return text


def check_name(field: str, value: Any, *, max_bytes: int = MAX_NAME_BYTES) -> str:
    """A group's or consumer's name."""
    text = check_text(field, value)
    if not text.strip():
        refuse(field, value, "a name that is not blank")
    if len(text.encode()) > max_bytes:
        refuse(field, value, f"at most {max_bytes} bytes of UTF-8")
    return text


@lru_cache(maxsize=4096)
def _checked_topic(field: str, value: str) -> str:
    check_name(field, value, max_bytes=MAX_TOPIC_BYTES)
    if any(category(character) == "Cc" for character in value):
        refuse(field, value, "a name without control characters")
    if value.startswith(RESERVED_PREFIX):
        refuse(field, value, f"a name that does not begin with {RESERVED_PREFIX!r} (kept for the bus itself)")
    return value


def check_topic(field: str, value: Any) -> str:
    """A topic's name: not blank, at most 1,024 bytes, no control characters, not reserved."""
    # Plain before it is looked up: the cache goes by hash and equality, which a subclass may define anew.
    return _checked_topic(field, value if type(value) is str else check_text(field, value))


def is_entry_id(text: str) -> bool:
    """Whether an entry can have this id: a number, or two joined by a dash, of 64 bits each."""
    first, dash, second = text.partition("-")
    parts = (first, second) if dash else (first,)
    return all(part.isascii() and part.isdigit() and len(part) <= 20 and int(part) < 2**64 for part in parts)


def check_start_id(field: str, value: Any) -> str:
    """Where a group begins."""
    text = check_name(field, value)
    if text != "$" and not is_entry_id(text):
        refuse(field, value, "'$', '0' or an entry's id ('1714982400000-0')")
    return text


def check_choice(field: str, value: Any, choices: Sequence[ChoiceT], *, allowed: str | None = None) -> ChoiceT:
    """One of a few words.

    :param allowed: the choices in words; None = a list of them.
    """
    try:
        return choices[choices.index(str.__str__(value))]
    except (TypeError, ValueError):
        refuse(field, value, allowed or f"one of {', '.join(choices)}")


def check_url(value: Any, allowed: str) -> str:
    """A URL as text. It may hold a password, so errors do not show it."""
    try:
        text = str.__str__(value)
        text.encode()
    except TypeError:
        shown = repr(value)
        if "@" in shown or "?" in shown:  # a URL of another type, with a password perhaps
            shown = f"of type {type(value).__name__}"
        raise ValidationError(f"url must be {allowed}, as a str, not {shown:.80}") from None
    except UnicodeEncodeError:
        raise ValidationError("url must be text that can be encoded as UTF-8, which the given one is not") from None
    return text


def check_int(field: str, value: Any, *, least: int) -> int:
    if isinstance(value, bool):
        refuse(field, value, "an int")
    try:
        number = int.__int__(value)
    except TypeError:
        refuse(field, value, "an int")
    if number < least:
        refuse(field, value, f"at least {least}")
    return number


def check_delay(field: str, value: Any, *, positive: bool = False) -> float:
    """A duration in seconds: finite, not negative (and not zero where that makes no sense)."""
    allowed = "a positive number of seconds" if positive else "a number of seconds, zero or more"
    seconds = check_number(field, value, allowed)
    if not math.isfinite(seconds) or seconds < 0 or (positive and seconds == 0):
        refuse(field, value, allowed)
    return seconds


def check_number(field: str, value: Any, allowed: str) -> float:
    """An int or a float, as a float."""
    if isinstance(value, bool):
        refuse(field, value, allowed)
    try:
        return float.__float__(value) if isinstance(value, float) else int.__float__(value)
    except (TypeError, OverflowError):
        refuse(field, value, allowed)


def check_bytes(field: str, value: Any, allowed: str) -> bytes:
    """The bytes that it holds; a buffer that can change is copied."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            # Not bytes(value), which asks a subclass for its __bytes__.
            if isinstance(value, bytes):
                return bytes.__getitem__(value, slice(None))
            return bytes(memoryview(cast("bytearray", value)))
        except TypeError:  # it only pretends to be one
            pass
    refuse(field, cast("object", value), allowed)


def check_time(field: str, value: Any) -> datetime:
    """A point in time, normalised to UTC; naive datetimes are refused, since nobody knows what they mean."""
    plain = PLAIN_TIMES[0]
    try:
        time = value if type(value) is plain else plain.combine(plain.date(value), plain.timetz(value))
    except TypeError:
        refuse(field, value, "a datetime")
    if time.tzinfo is None or time.utcoffset() is None:
        refuse(field, value, "a datetime with a time zone (datetime.now(timezone.utc))")
    try:
        return time.astimezone(timezone.utc)
    except OverflowError:
        refuse(field, value, "a time that UTC can tell, from year 1 to 9999")
