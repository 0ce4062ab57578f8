"""What the server's errors mean to the bus."""

from __future__ import annotations

import redis.exceptions

from ..._errors import BackendError
from ._protocol import ServerError

_PASSING = (
    "BUSY",
    "CLUSTERDOWN",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "OOM",
    "READONLY",
    "TRYAGAIN",
    "UNBLOCKED",
    "UNKILLABLE",
)

_CLASSES: dict[str, type[redis.exceptions.RedisError]] = {
    "LOADING": redis.exceptions.BusyLoadingError,
    "NOAUTH": redis.exceptions.AuthenticationError,
    "NOPERM": redis.exceptions.NoPermissionError,
    "NOSCRIPT": redis.exceptions.NoScriptError,
    "OOM": redis.exceptions.OutOfMemoryError,
    "READONLY": redis.exceptions.ReadOnlyError,
    "WRONGPASS": redis.exceptions.AuthenticationError,
}


def has_code(error: Exception, code: str) -> bool:
    """Whether this is that error. On 6.2 a script's error hides the code in the middle of its text."""
    text = str(error)
    return isinstance(error, ServerError) and (text.startswith(code) or f" {code} " in text or f" -{code} " in text)


def translate(error: ServerError) -> BackendError:
    """The server refused: surely nothing was done, and the text says why."""
    text = str(error)
    code = text.partition(" ")[0]
    passing = any(has_code(error, name) for name in _PASSING)
    translated = BackendError(f"the server refused: {text}", may_have_happened=False, can_pass=passing)
    translated.__cause__ = _CLASSES.get(code, redis.exceptions.ResponseError)(text)
    return translated


SENSELESS = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What taking a reply apart raises when it is of another kind than any server's."""


def senseless(place: str, reply: object) -> BackendError:
    """The server answered with what makes no sense: nobody knows what it did."""
    return BackendError(
        f"{place} answered with what makes no sense here: {reply!r:.80}", may_have_happened=True, can_pass=True
    )


def broken(detail: str, *, may_have_happened: bool) -> BackendError:
    return BackendError(detail, may_have_happened=may_have_happened, can_pass=True)
