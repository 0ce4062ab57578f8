"""What a server's settings may lose, in words for its operator."""

from __future__ import annotations

from typing import Any

from ._protocol import Command

QUESTIONS: tuple[Command, ...] = (("INFO", "memory"), ("INFO", "persistence"))
SAVE_POINTS: Command = ("CONFIG", "GET", "save")


def fields(reply: Any) -> dict[str, str]:
    """What INFO says; nothing, where it is refused."""
    if not isinstance(reply, bytes):
        return {}
    lines = reply.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def evicts(info: dict[str, str]) -> str | None:
    """A warning, where a full server throws keys away."""
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory", "0") == "0" or policy == "noeviction":
        return None
    which = "keys that have an expiry" if policy.startswith("volatile-") else "any keys"
    return (
        f"evicts {which} when its memory is full (maxmemory-policy {policy}): topics may vanish with all their "
        "messages. Set maxmemory-policy noeviction"
    )


def keeps_no_log(info: dict[str, str]) -> bool:
    """Whether there is no append-only file. Snapshots have to be asked about then, by CONFIG."""
    return info.get("aof_enabled") == "0"


def keeps_nothing(save_points: Any) -> str | None:
    """A warning, where a server without an append-only file takes no snapshots either."""
    if save_points != [b"save", b""]:
        return None  # there are some, or CONFIG is refused
    return "keeps nothing on disk (no appendonly, no save): when it stops, all messages are lost. Set appendonly yes"
