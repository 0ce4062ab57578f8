"""What the server is and can do: asked on every new connection, by probes rather than by version numbers."""

from __future__ import annotations

from dataclasses import dataclass

from ..._ground.errors import UnsupportedError
from ._link import Link, ask, tolerate
from ._protocol import ServerError
from ._settings import Settings

OLDEST = (6, 2)


@dataclass(frozen=True)
class Server:
    """What we know of it.

    :ivar name: ``redis`` or ``valkey``.
    :ivar can_unblock: whether this user may use CLIENT ID and CLIENT UNBLOCK (``@admin @dangerous`` in ACLs). Without
        them blocking reads are cut into short ones, so that a cancelled read ends within a second.
    :ivar can_load: whether this user may use SCRIPT LOAD. Without it the server learns each script when it is first
        run, by EVAL.
    """

    name: str = "redis"
    version: str = ""
    can_unblock: bool = True
    can_load: bool = True


async def look_at(link: Link, settings: Settings) -> Server:
    """Ask for information. Nothing of it is required: a user, a managed server or a proxy may not allow the question.

    :raises UnsupportedError: if the server is too old, or a kind that is not supported yet.
    :raises ServerError: if it refuses everything.
    """
    replies = await ask(link, [("INFO", "server"), ("COMMAND", "INFO", "XAUTOCLAIM"), ("CLIENT", "UNBLOCK", 0)])
    await tolerate(link, replies)
    told, known, unblocked = replies
    info: dict[str, str] = {}
    if not isinstance(told, ServerError):
        info = dict(line.split(":", 1) for line in told.decode().splitlines() if ":" in line)
    mode = info.get("redis_mode") or info.get("server_mode")  # the second is Valkey's word, from 9 on
    if mode is None:
        mode = "cluster" if await _is_cluster(link) else "standalone"
    if mode != "standalone":
        raise UnsupportedError(f"{settings.place} is a server in {mode} mode, which is not supported yet")
    version = info.get("redis_version", "unknown")
    has_command = await _has(link, "XAUTOCLAIM") if isinstance(known, ServerError) else bool(known and known[0])
    if not has_command:
        raise UnsupportedError(
            f"{settings.place} is Redis {version}: anybus needs {'.'.join(map(str, OLDEST))} or newer (XAUTOCLAIM)"
        )
    can_unblock = link.client_id != 0 and not isinstance(unblocked, ServerError)
    name = "valkey" if info.get("server_name") == "valkey" else "redis"
    return Server(name, info.get("valkey_version", version), can_unblock)


async def _is_cluster(link: Link) -> bool:
    """Where INFO does not say: all others refuse this question."""
    [reply] = await ask(link, [("CLUSTER", "INFO")])
    return isinstance(reply, bytes) and reply.startswith(b"cluster_")


async def _has(link: Link, command: str) -> bool:
    """Whether the server has a command, by trying it without arguments: nobody has to be allowed to use it for that."""
    [reply] = await ask(link, [(command,)])
    return "unknown command" not in str(reply)
