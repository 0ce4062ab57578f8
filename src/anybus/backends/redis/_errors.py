"""What the server's errors mean to the bus."""

from __future__ import annotations

from copy import copy

import redis.exceptions

from ..._ground.errors import BackendError
from ._protocol import ServerError

_PERMANENT_CODES = ("CROSSSLOT", "NOPERM", "WRONGTYPE")
"""With these errors the same command will fail until somebody changes something. The list is closed: any other error
counts as transient, since nobody knows all that servers, their managed variants and proxies may say."""

_PERMANENT_TEXTS = (
    "unknown command",
    "unsupported command",
    "unknown redis command",  # from a script
    "unknown subcommand",
    "syntax error",
    "wrong number of arg",
    "invalid stream id",
    "value is not an integer",
    "value is not a valid float",
    "timeout is negative",
    "timeout is not an integer",
    "db index is out of range",
    "invalid db index",
    "select is not allowed",
)

_CREDENTIALS = (
    "NOAUTH",
    "WRONGPASS",
    "ERR AUTH <password> called without any password configured",
    "ERR Client sent AUTH, but no password is set",
    "ERR invalid password",
)

_NOTHING_DONE = (
    *_PERMANENT_CODES,
    "ASK",
    "BUSY",
    "CLUSTERDOWN",
    "DENIED",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "MOVED",
    "NOGROUP",
    "NOREPLICAS",
    "NOSCRIPT",
    "OOM",
    "READONLY",
    "TRYAGAIN",
    "UNBLOCKED",
)
_NOTHING_DONE_TEXTS = ("max number of clients reached", "max requests limit exceeded", "no upstream host")

_CLASSES: dict[str, type[redis.exceptions.RedisError]] = {
    "LOADING": redis.exceptions.BusyLoadingError,
    "NOPERM": redis.exceptions.NoPermissionError,
    "NOSCRIPT": redis.exceptions.NoScriptError,
    "OOM": redis.exceptions.OutOfMemoryError,
    "READONLY": redis.exceptions.ReadOnlyError,
}

_NOPERM_IN_SCRIPTS = ("The user executing the script can't", "ACL failure in script")
"""What a script is told, on Redis up to 7.0 and from then on, where the user lacks a right."""


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
    return within and (partly or not any(has_code(error, code) for code in _NOTHING_DONE))


def is_out_of_reach(error: BackendError) -> bool:
    """Whether the server refused a command before it began, since the user may not run it or touch one of its keys."""
    refusal = error.__cause__
    return isinstance(refusal, redis.exceptions.NoPermissionError) and "user_script" not in str(refusal)


def is_permanent(error: ServerError) -> bool:
    """Whether this error is known to come again, however often the same is tried."""
    text = str(error).lower()
    return any(has_code(error, code) for code in _PERMANENT_CODES) or any(part in text for part in _PERMANENT_TEXTS)


def is_about_credentials(error: ServerError) -> bool:
    """Whether the server wants other credentials, or any."""
    return str(error).startswith(_CREDENTIALS)


def leads_elsewhere(error: ServerError) -> bool:
    """Whether the connection has to be opened again: its server is no primary (any more), or has forgotten who we are.

    The address may lead to another server by then (a failover behind a virtual IP, a DNS name or a balancer).
    """
    return any(
        has_code(error, code) for code in ("MASTERDOWN", "MOVED", "NOAUTH", "READONLY")
    ) or "instance state changed" in str(error)


def translate(error: ServerError, *, entering: bool = False, may_have_happened: bool = False) -> BackendError:
    """The error of a server, or of a proxy in front of it, in the bus's words.

    :param entering: whether the bus is just being entered. Wrong credentials are permanent only then: they are a
        mistake in the configuration. Later they are a rotation that one side has heard of before the other.
    :param may_have_happened: whether a part of the work may have been done whatever the error says (in a script).
    """
    text = str(error)
    code = text.partition(" ")[0]
    credentials = is_about_credentials(error)
    permanent = is_permanent(error)
    surely_not = (
        permanent
        or credentials
        or any(has_code(error, name) for name in _NOTHING_DONE)
        or any(part in text for part in _NOTHING_DONE_TEXTS)
    )
    translated = BackendError(
        f"the server refused: {text}" if surely_not else f"the server answered: {text}",
        # A proxy may have passed the command on before something went wrong.
        may_have_happened=may_have_happened or not surely_not,
        can_pass=not permanent and not (entering and credentials),
    )
    cause = redis.exceptions.AuthenticationError if credentials else _CLASSES.get(code, redis.exceptions.ResponseError)
    translated.__cause__ = cause(text)
    return translated


SENSELESS = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What taking a reply apart raises when it is of another kind than any server's."""


def senseless(place: str, reply: object) -> BackendError:
    """The server answered with what makes no sense: nobody knows what it did."""
    return BackendError(
        f"{place} answered with what makes no sense here: {reply!r:.80}", may_have_happened=True, can_pass=True
    )


def again(error: BackendError) -> BackendError:
    """The same error for one more caller, who may note in it what else he knows: that is not true for the others."""
    same = copy(error)
    same.__cause__ = error.__cause__
    return same


def broken(detail: str, *, may_have_happened: bool) -> BackendError:
    return BackendError(detail, may_have_happened=may_have_happened, can_pass=True)
