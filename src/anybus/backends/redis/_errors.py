"""What the server's errors mean for the bus."""

from __future__ import annotations

from copy import copy

import redis.exceptions

from ..._ground.errors import BackendError, EventBusError, SerializationError, ServerFullError
from ._protocol import ServerError

_PERMANENT_CODES = ("CROSSSLOT", "NOPERM", "WRONGTYPE")
"""With these errors, the same command fails until somebody changes something. The list is closed: any other error
counts as transient, because nobody knows all errors of servers, managed servers and proxies."""

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

NOPERM_IN_SCRIPTS = ("The user executing the script can't", "ACL failure in script")
"""The error in a script if the user lacks a permission, on Redis before 7.0 and from 7.0 on."""


def has_code(error: Exception, code: str) -> bool:
    """Whether the error has this code. On Redis 6.2, an error in a script has its code in the middle of the text."""
    text = str(error)
    if code == "NOPERM" and isinstance(error, ServerError) and any(words in text for words in NOPERM_IN_SCRIPTS):
        return True
    return isinstance(error, ServerError) and (text.startswith(code) or f" {code} " in text or f" -{code} " in text)


def may_be_partly_done(error: ServerError, *, partly: bool) -> bool:
    """Whether a script that ended with this error may have done a part of its work.

    :param partly: whether the script's commands may fail after its first write.
    """
    within = "user_script" in str(error)  # otherwise the server has not started the script
    return within and (partly or not any(has_code(error, code) for code in _NOTHING_DONE))


def is_out_of_reach(error: BackendError) -> bool:
    """Whether the server refused a command before it ran: the user may not run it, or not access one of its keys."""
    refusal = error.__cause__
    return isinstance(refusal, redis.exceptions.NoPermissionError) and "user_script" not in str(refusal)


def is_permanent(error: ServerError) -> bool:
    """Whether it is known that the same command would fail again."""
    text = str(error).lower()
    return any(has_code(error, code) for code in _PERMANENT_CODES) or any(part in text for part in _PERMANENT_TEXTS)


def is_about_credentials(error: ServerError) -> bool:
    """Whether the server demands credentials, or other ones."""
    return str(error).startswith(_CREDENTIALS)


def leads_elsewhere(error: ServerError) -> bool:
    """Whether the connection must be reopened: its server is not a primary (any more), or no longer knows the user.

    A new connection may reach another server (after a failover behind a virtual IP, a DNS name or a load balancer).
    """
    return any(
        has_code(error, code) for code in ("MASTERDOWN", "MOVED", "NOAUTH", "READONLY")
    ) or "instance state changed" in str(error)


def translate(error: ServerError, *, entering: bool = False, may_have_happened: bool = False) -> BackendError:
    """The bus's error for an error reply of a server, or of a proxy in front of it.

    :param entering: whether the bus is just being entered. If so, wrong credentials are permanent: the configuration is
        wrong. Later, they are transient: the credentials were changed, and the two sides do not know it at the same
        time.
    :param may_have_happened: whether a part of the work may have been done, whatever the error says (in a script).
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
    hint = " (see docs/redis.md, Rights)" if has_code(error, "NOPERM") else ""
    translated = (ServerFullError if has_code(error, "OOM") else BackendError)(
        f"the server refused: {text}{hint}" if surely_not else f"the server answered: {text}",
        # A proxy may have forwarded the command before the error occurred.
        may_have_happened=may_have_happened or not surely_not,
        can_pass=not permanent and not (entering and credentials),
    )
    cause = redis.exceptions.AuthenticationError if credentials else _CLASSES.get(code, redis.exceptions.ResponseError)
    translated.__cause__ = cause(text)
    return translated


UNEXPECTED = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""The exceptions that parsing a reply raises if the reply has an unexpected form."""


def unexpected_reply(place: str, reply: object) -> BackendError:
    """The error for a reply of an unexpected form: it is not known what the server did."""
    return BackendError(f"unexpected reply from {place}: {reply!r:.80}", may_have_happened=True, can_pass=True)


def not_encoded(error: Exception) -> EventBusError:
    """The error of a message that was not encoded. (What a codec raises must not fail the other messages.)"""
    return error if isinstance(error, EventBusError) else SerializationError(f"the codec raised {error!r}")


def duplicate(error: BackendError) -> BackendError:
    """A copy of an error, one for each caller: a caller may change its copy, and that must not affect the others."""
    same = copy(error)
    same.__cause__ = error.__cause__
    return same


def broken(detail: str, *, may_have_happened: bool) -> BackendError:
    return BackendError(detail, may_have_happened=may_have_happened, can_pass=True)
