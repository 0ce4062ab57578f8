"""Warnings for the operator: settings of the server by which messages may be lost."""

from __future__ import annotations

from typing import Any

from ._protocol import Command

QUESTIONS: tuple[Command, ...] = (("INFO", "memory"), ("INFO", "persistence"))
SAVE_POINTS: Command = ("CONFIG", "GET", "save")


def fields(reply: Any) -> dict[str, str]:
    """The fields of an INFO reply; empty if it was refused."""
    if not isinstance(reply, bytes):
        return {}
    lines = reply.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def evicts(info: dict[str, str]) -> str | None:
    """A warning if the server evicts keys when its memory is full."""
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory", "0") == "0" or policy == "noeviction":
        return None
    which = "keys that have an expiry" if policy.startswith("volatile-") else "any keys"
    return (
        f"evicts {which} when its memory is full (maxmemory-policy {policy}): topics may vanish with all their "
        "messages. Set maxmemory-policy noeviction"
    )


def keeps_no_log(info: dict[str, str]) -> bool:
    """Whether there is no append-only file. Then CONFIG must be asked whether there are snapshots."""
    return info.get("aof_enabled") == "0"


def keeps_nothing(save_points: Any) -> str | None:
    """A warning if a server without an append-only file does not take snapshots either."""
    if save_points != [b"save", b""]:
        return None  # there are snapshots, or CONFIG was refused
    return "keeps nothing on disk (no appendonly, no save): when it stops, all messages are lost. Set appendonly yes"
