"""Checks of values that an application passes in.

Each check returns the value to use, or raises an error that names the field, the value and what is allowed.

Callers must keep the returned value, not the given one. The returned value has the plain type (``str``, ``int``,
``float``, ``bytes``, ``datetime``), never a subclass. A subclass may print, compare and hash differently from what it
holds: a ``str`` Enum, for example, prints its member's name.
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
"""The plain datetime type. It is in a tuple so that freezegun does not replace it by a class of its own."""

ChoiceT = TypeVar("ChoiceT", bound=str)


def refuse(field: str, value: object, allowed: str) -> NoReturn:
    """
    :raises ValidationError: always. It says which field, what is allowed, and which value (shortened) was given.
    """
    try:
        shown = repr(value)
    except ValueError:  # an int of more digits than Python will print
        shown = f"<{type(value).__name__}>"
    if len(shown) > 80:
        shown = f"{shown[:60]}... ({len(shown)} characters)"
    raise ValidationError(f"{field} must be {allowed}, not {shown}")


def plain_text(value: str) -> str:
    """The text as a plain ``str``, not a subclass. Any other type raises ``TypeError``."""
    return value if type(value) is str else str.__str__(value)


def check_text(field: str, value: Any) -> str:
    """A string that can be encoded as UTF-8. (A lone surrogate cannot be sent to any server.)"""
    try:
        text = str.__str__(value)  # the base class's method also refuses objects that only pretend to be a str
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
        refuse(field, value, f"a name that does not begin with {RESERVED_PREFIX!r} (reserved for the bus itself)")
    return value


def check_topic(field: str, value: Any) -> str:
    """A topic's name: not blank, at most 1,024 bytes, no control characters, not reserved."""
    # Made plain before the lookup, because the cache uses hash and equality, which a subclass may override.
    return _checked_topic(field, value if type(value) is str else check_text(field, value))


def is_entry_id(text: str) -> bool:
    """Whether this is a possible entry id: a 64-bit number, or two of them joined by a dash."""
    first, dash, second = text.partition("-")
    parts = (first, second) if dash else (first,)
    return all(part.isascii() and part.isdigit() and len(part) <= 20 and int(part) < 2**64 for part in parts)


def check_start_id(field: str, value: Any) -> str:
    """Where a group starts."""
    text = check_name(field, value)
    if text != "$" and not is_entry_id(text):
        refuse(field, value, "'$', '0' or an entry's id ('1714982400000-0')")
    return text


def check_choice(field: str, value: Any, choices: Sequence[ChoiceT], *, allowed: str | None = None) -> ChoiceT:
    """One of a few words.

    :param allowed: the choices as text, for the error; None = a list of them.
    """
    try:
        return choices[choices.index(str.__str__(value))]
    except (TypeError, ValueError):
        refuse(field, value, allowed or f"one of {', '.join(choices)}")


def check_url(value: Any, allowed: str) -> str:
    """A URL as text. Errors do not show the URL, because it may hold a password."""
    try:
        text = str.__str__(value)
        text.encode()
    except TypeError:
        shown = repr(value)
        if "@" in shown or "?" in shown:  # a URL object, which may hold a password
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
    """A duration in seconds: finite and not negative.

    :param positive: also refuse zero.
    """
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
    """The bytes of a bytes-like object. A mutable buffer is copied."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            # Not bytes(value), which would call a subclass's __bytes__.
            if isinstance(value, bytes):
                return bytes.__getitem__(value, slice(None))
            return bytes(memoryview(cast("bytearray", value)))
        except TypeError:  # the object only pretends to be bytes-like
            pass
    refuse(field, cast("object", value), allowed)


def check_time(field: str, value: Any) -> datetime:
    """A point in time, converted to UTC. Naive datetimes are refused, because their meaning is ambiguous."""
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
        refuse(field, value, "a time from year 1 to 9999 in UTC")
