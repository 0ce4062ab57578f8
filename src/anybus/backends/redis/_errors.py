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


_NOPERM_IN_SCRIPTS = ("The user executing the script can't", "ACL failure in script")
"""What a script is told, on Redis up to 7.0 and from then on, where the user lacks a right."""

_BEFORE_WRITING = (*_PASSING, "NOGROUP", "NOPERM", "WRONGTYPE")


def has_code(error: Exception, code: str) -> bool:
    """Whether this is that error. On 6.2 a script's error hides the code in the middle of its text."""
    text = str(error)
    if code == "NOPERM" and isinstance(error, ServerError) and any(words in text for words in _NOPERM_IN_SCRIPTS):
        return True
    return isinstance(error, ServerError) and (text.startswith(code) or f" {code} " in text or f" -{code} " in text)


def may_be_partly_done(error: ServerError, *, partly: bool) -> bool:
    """Whether a script that ended with this error may have done a part of its work.

    :param partly: whether the errors of its commands may come after its first write.
    """
    within = "user_script" in str(error)  # else the server has not begun to run it
    return within and (partly or not any(has_code(error, code) for code in _BEFORE_WRITING))


def is_out_of_reach(error: BackendError) -> bool:
    """Whether the server refused a command before it began, since the user may not run it or touch one of its keys."""
    refusal = error.__cause__
    return isinstance(refusal, redis.exceptions.NoPermissionError) and "user_script" not in str(refusal)


def translate(error: ServerError, *, may_have_happened: bool = False) -> BackendError:
    """The server refused, and the text says why. Of a single command surely nothing was done."""
    text = str(error)
    code = text.partition(" ")[0]
    passing = any(has_code(error, name) for name in _PASSING)
    translated = BackendError(f"the server refused: {text}", may_have_happened=may_have_happened, can_pass=passing)
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
