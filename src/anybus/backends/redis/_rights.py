"""Checks the permissions that a subscription needs, by commands that change nothing.

A server checks the user's permissions before it checks a command's arguments. So a command with an impossible id,
number or name (``0-0``, ``x``, an empty one) does nothing. If the permission is missing, it fails for that reason,
otherwise for another one. ``ACL DRYRUN`` would tell the same, but needs Redis 7.0 and a permission of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import redis.exceptions

from ..._ground.errors import BackendError
from ._errors import has_code
from ._keys import delayed, leases, meta, waiting
from ._protocol import Argument, Command, ServerError
from ._scripts import Script

# Tries all commands at once. ARGV: for each command, its number of words, and the words. Replies with the error of each
# command, or ''. Their keys are not passed as KEYS, because a script is refused as a whole for one forbidden KEY.
TRY: Final = Script(
    "try",
    """
local errors, at = {}, 1
while at <= #ARGV do
  local command = {}
  for i = 1, tonumber(ARGV[at]) do command[i] = ARGV[at + i] end
  at = at + #command + 1
  local reply = redis.pcall(unpack(command))
  errors[#errors + 1] = type(reply) == 'table' and reply.err or ''
end
return errors
""",
)

ALL: Final = (TRY,)

_UNKNOWN: Final = "unknown redis command"
"""The error in a script for a command that the server does not have, or has under another name."""


def probes(stream: str, retry_stream: str, group: str, dead_letter_topic: str | None) -> Iterator[tuple[str, Command]]:
    """Pairs: the name of a command with its key, and the command that is tried."""

    def probe(name: str, key: str, *arguments: Argument) -> tuple[str, Command]:
        return f"{name} on {key!r}", (*name.split(), key, *arguments)

    yield "TIME", ("TIME",)
    for read in (stream, retry_stream):
        yield probe("XGROUP CREATE", read, group, "x")
        yield probe("XGROUP DELCONSUMER", read, group, "")
        yield f"XREADGROUP on {read!r}", ("XREADGROUP", "GROUP", group, "x", "COUNT", 1, "STREAMS", read, "x")
        yield probe("XPENDING", read, group)
        yield probe("XACK", read, group, "0-0")
        yield probe("XCLAIM", read, group, "x", 0, "x")
        yield probe("XAUTOCLAIM", read, group, "x", "x", "0-0")
        yield probe("XINFO GROUPS", read)
        yield probe("XINFO CONSUMERS", read, group)
        yield probe("ZRANGE", delayed(read), 0, 0)
        yield probe("HSET", meta(read), group, "x", "x")
        yield probe("HGET", meta(read), group)
    yield probe("XDEL", retry_stream, "0-0")
    yield probe("ZADD", delayed(retry_stream), "x", "x")
    yield probe("ZREM", delayed(retry_stream), "")
    yield probe("ZADD", leases(stream, group), "x", "x")
    yield probe("ZREM", leases(stream, group), "")
    yield probe("ZADD", waiting(stream, group), "x", "x")
    yield probe("ZREM", waiting(stream, group), "")
    yield probe("ZRANGE", waiting(stream, group), 0, 0)
    yield probe("EXISTS", waiting(stream, group))
    yield probe("ZRANGEBYSCORE", leases(stream, group), "x", "x")
    for appended in (retry_stream, dead_letter_topic):
        if appended is not None:
            yield probe("XADD", appended, "0-0", "x", "x")


def arguments(asked: Sequence[tuple[str, Command]]) -> list[Argument]:
    """The arguments of :data:`TRY`."""
    return [word for _, command in asked for word in (len(command), *command)]


def missing_rights(asked: Sequence[tuple[str, Command]], reply: Any) -> BackendError | None:
    """One error that names all missing permissions; None = none is missing."""
    missing: list[str] = []
    for (name, _), text in zip(asked, reply, strict=True):
        error = ServerError(text.decode(errors="replace"))
        if has_code(error, "NOPERM") or _UNKNOWN in str(error).lower():
            missing.append(name)
    return _refusal(missing) if missing else None


def may_not_run_scripts() -> BackendError:
    return _refusal(["EVALSHA"])


def _refusal(missing: Sequence[str]) -> BackendError:
    text = (
        f"NOPERM this user lacks permissions that a subscription needs: {', '.join(missing)} "
        "(see docs/redis.md, Rights)"
    )
    error = BackendError(text, may_have_happened=False, can_pass=False)
    error.__cause__ = redis.exceptions.NoPermissionError(text)
    return error
