"""What a subscription's user must be allowed to do, asked by commands that change nothing.

A server checks the user's rights before it checks a command's arguments. So a command with an impossible id, number or
name (``0-0``, ``x``, an empty one) does nothing: it fails with NOPERM without the right, and in another way with it.
``ACL DRYRUN`` would tell the same, but needs 7.0 and a right of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import redis.exceptions

from ..._errors import BackendError
from ._errors import has_code
from ._keys import delayed, leases, meta
from ._protocol import Argument, Command, ServerError


def probes(stream: str, retry_stream: str, group: str, dead_letter_topic: str | None) -> Iterator[tuple[str, Command]]:
    """Pairs: a command and its key in words, and what is sent."""

    def probe(name: str, key: str, *arguments: Argument) -> tuple[str, Command]:
        return f"{name} on {key!r}", (*name.split(), key, *arguments)

    yield "EVALSHA", ("EVALSHA", "0" * 40, 0)
    yield "EVAL", ("EVAL", "return 0", 0)
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
    for kept in ("ZADD", "ZREM", "ZRANGEBYSCORE"):
        yield probe(kept, leases(stream, group), *("x", "x")[: 1 if kept == "ZREM" else 2])
    for appended in (retry_stream, dead_letter_topic):
        if appended is not None:
            yield probe("XADD", appended, "0-0", "x", "x")


def missing_rights(asked: Sequence[tuple[str, Command]], replies: Sequence[Any]) -> BackendError | None:
    """One error that names what this user may not do; None = he may do all of it."""
    missing = [
        name
        for (name, _), reply in zip(asked, replies, strict=True)
        if isinstance(reply, ServerError) and (has_code(reply, "NOPERM") or "unknown command" in str(reply))
    ]
    if not missing:
        return None
    text = f"the server does not allow what a subscription needs: {', '.join(missing)} (NOPERM; docs/redis.md, Rights)"
    error = BackendError(text, may_have_happened=False, can_pass=False)
    error.__cause__ = redis.exceptions.NoPermissionError(text)
    return error
