"""Checks of values at the door: each returns the value, or says which field, which value, and what is allowed."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, NoReturn
from unicodedata import category

from ._errors import ValidationError

MAX_TOPIC_BYTES = 1024
MAX_NAME_BYTES = 256
RESERVED_PREFIX = "anybus:"


def refuse(field: str, value: object, allowed: str) -> NoReturn:
    try:
        shown = repr(value)
    except ValueError:  # an int of more digits than Python will print
        shown = f"<{type(value).__name__}>"
    if len(shown) > 80:
        shown = f"{shown[:60]}... ({len(shown)} characters)"
    raise ValidationError(f"{field} must be {allowed}, not {shown}")


def check_text(field: str, value: Any) -> str:
    """A string that UTF-8 can carry (a lone surrogate cannot be sent to any server)."""
    if not isinstance(value, str):
        refuse(field, value, "a str")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            refuse(field, value, "text that can be encoded as UTF-8")
    return value


def check_name(field: str, value: Any, *, max_bytes: int = MAX_NAME_BYTES) -> str:
    """A group's or consumer's name."""
    if not check_text(field, value).strip():
        refuse(field, value, "a name that is not blank")
    if len(value.encode()) > max_bytes:
        refuse(field, value, f"at most {max_bytes} bytes of UTF-8")
    return str(value)


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
    if not isinstance(value, str):
        refuse(field, value, "a str")
    return _checked_topic(field, value)


def check_int(field: str, value: Any, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        refuse(field, value, "an int")
    if value < least:
        refuse(field, value, f"at least {least}")
    return value


def check_delay(field: str, value: Any, *, positive: bool = False) -> float:
    """A duration in seconds: finite, not negative (and not zero where that makes no sense)."""
    allowed = "a positive number of seconds" if positive else "a number of seconds, zero or more"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(field, value, allowed)
    try:
        seconds = float(value)
    except OverflowError:
        refuse(field, value, allowed)
    if not math.isfinite(seconds) or seconds < 0 or (positive and seconds == 0):
        refuse(field, value, allowed)
    return seconds


def check_time(field: str, value: Any) -> datetime:
    """A point in time, normalised to UTC; naive datetimes are refused, since nobody knows what they mean."""
    if not isinstance(value, datetime):
        refuse(field, value, "a datetime")
    if value.tzinfo is None or value.utcoffset() is None:
        refuse(field, value, "a datetime with a time zone (datetime.now(timezone.utc))")
    try:
        return value.astimezone(timezone.utc)
    except OverflowError:
        refuse(field, value, "a time that UTC can tell, from year 1 to 9999")
