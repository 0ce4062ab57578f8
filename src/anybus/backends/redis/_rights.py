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
from ._errors import NOPERM_IN_SCRIPTS, has_code
from ._keys import delayed, leases, meta, waiting
from ._protocol import Argument, Command, ServerError
from ._scripts import Script

_UNKNOWN: Final = "unknown redis command"
"""The error in a script for a command that the server does not have, or has under another name."""

_WORDS: Final = ", ".join(f'"{words.lower()}"' for words in ("NOPERM", *NOPERM_IN_SCRIPTS, _UNKNOWN))

# Tries all commands at once. ARGV: for each command, its number of words, and the words. Replies with pairs: the index
# of a command, from 1, and its error. Only errors that may matter are sent: a process may start a thousand
# subscriptions. The keys are not passed as KEYS, because a script is refused as a whole for one forbidden KEY.
TRY: Final = Script(
    "try",
    f"local texts = {{{_WORDS}}}"
    """
local errors, at, index = {}, 1, 0
while at <= #ARGV do
  index = index + 1
  local command = {}
  for i = 1, tonumber(ARGV[at]) do command[i] = ARGV[at + i] end
  at = at + #command + 1
  local reply = redis.pcall(unpack(command))
  local err = type(reply) == 'table' and reply.err
  local matters = false
  for _, text in ipairs(texts) do matters = matters or (err and err:lower():find(text, 1, true)) end
  if matters then errors[#errors + 1] = {index, err} end
end
return errors
""",
)

ALL: Final = (TRY,)

_SUBCOMMANDS: Final = ("XGROUP", "XINFO")


def probes(stream: str, retry_stream: str, group: str, dead_letter_topic: str | None) -> Iterator[Command]:
    """The commands that are tried. Their key comes after the command's name (of XREADGROUP: after STREAMS)."""
    yield ("TIME",)
    for read in (stream, retry_stream):
        yield ("XGROUP", "CREATE", read, group, "x")
        yield ("XGROUP", "DELCONSUMER", read, group, "")
        yield ("XREADGROUP", "GROUP", group, "x", "COUNT", 1, "STREAMS", read, "x")
        yield ("XPENDING", read, group)
        yield ("XACK", read, group, "0-0")
        yield ("XCLAIM", read, group, "x", 0, "x")
        yield ("XAUTOCLAIM", read, group, "x", "x", "0-0")
        yield ("XINFO", "GROUPS", read)
        yield ("XINFO", "CONSUMERS", read, group)
        yield ("ZRANGE", delayed(read), 0, 0)
        yield ("HSET", meta(read), group, "x", "x")
        yield ("HGET", meta(read), group)
    yield ("XDEL", retry_stream, "0-0")
    yield ("ZADD", delayed(retry_stream), "x", "x")
    yield ("ZREM", delayed(retry_stream), "")
    yield ("ZADD", leases(stream, group), "x", "x")
    yield ("ZREM", leases(stream, group), "")
    yield ("ZADD", waiting(stream, group), "x", "x")
    yield ("ZREM", waiting(stream, group), "")
    yield ("ZRANGE", waiting(stream, group), 0, 0)
    yield ("EXISTS", waiting(stream, group))
    yield ("ZRANGEBYSCORE", leases(stream, group), "x", "x")
    for appended in (retry_stream, dead_letter_topic):
        if appended is not None:
            yield ("XADD", appended, "0-0", "x", "x")


def probes_of_keys(keys: str, claims: str) -> Iterator[Command]:
    """The commands for exactly-once effects.

    :param keys: the sorted set of idempotency keys.
    :param claims: the hash of those that are claimed.
    """
    yield ("TIME",)
    yield ("ZSCORE", keys, "")
    yield ("ZRANGEBYSCORE", keys, "x", "x")
    yield ("ZADD", keys, "x", "x")
    yield ("ZREM", keys, "")
    yield ("HGET", claims, "")
    yield ("HSET", claims, "", "x", "x")
    yield ("HDEL", claims, "")


def _name(command: Command) -> str:
    """The name of a command with its key."""
    words = 2 if command[0] in _SUBCOMMANDS else 1
    name = " ".join(map(str, command[:words]))
    if len(command) == 1:
        return name
    key = command[-2] if name == "XREADGROUP" else command[words]
    return f"{name} on {key!r}"


def arguments(asked: Sequence[Command]) -> list[Argument]:
    """The arguments of :data:`TRY`."""
    return [word for command in asked for word in (len(command), *command)]


def missing_rights(asked: Sequence[Command], reply: Any) -> BackendError | None:
    """One error that names all missing permissions; None = none is missing."""
    missing: list[str] = []
    found: list[tuple[int, bytes]] = reply
    for index, text in found:
        error = ServerError(text.decode(errors="replace"))
        if has_code(error, "NOPERM") or _UNKNOWN in str(error).lower():
            missing.append(_name(asked[index - 1]))
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
