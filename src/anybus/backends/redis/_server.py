"""What the server is and what it can do. Asked on every new connection, by probes rather than by version numbers."""

from __future__ import annotations

from dataclasses import dataclass

from ..._ground.errors import UnsupportedError
from ._link import Link, ask, tolerate
from ._protocol import ServerError
from ._settings import Settings

OLDEST = (6, 2)


@dataclass(frozen=True)
class Server:
    """What is known about the server.

    :ivar name: ``redis`` or ``valkey``.
    :ivar can_unblock: whether this user may use CLIENT ID and CLIENT UNBLOCK (``@admin @dangerous`` in ACLs). If not,
        blocking reads are split into short ones, so that a cancelled read ends within a second.
    :ivar can_load: whether this user may use SCRIPT LOAD. If not, each script is sent by EVAL when it is first run.
    """

    name: str = "redis"
    version: str = ""
    can_unblock: bool = True
    can_load: bool = True


class ClusterModeError(UnsupportedError):
    """The server is a node of a cluster, and was taken for a single one."""


async def look_at(link: Link, settings: Settings) -> Server:
    """Ask the server about itself. Refused questions are fine: a user, a managed server or a proxy may not allow them.

    :raises ClusterModeError: if the server is in cluster mode, and the settings are not those of a cluster.
    :raises UnsupportedError: if the server is too old, or of a kind that is not supported.
    :raises ServerError: if it refuses every command.
    """
    replies = await ask(link, [("INFO", "server"), ("COMMAND", "INFO", "XAUTOCLAIM"), ("CLIENT", "UNBLOCK", 0)])
    await tolerate(link, replies)
    told, known, unblocked = replies
    info: dict[str, str] = {}
    if not isinstance(told, ServerError):
        info = dict(line.split(":", 1) for line in told.decode().splitlines() if ":" in line)
    mode = info.get("redis_mode") or info.get("server_mode")  # the second is Valkey's name, from 9 on
    if mode is None:
        mode = "cluster" if await _is_cluster(link) else "standalone"
    if mode == "sentinel":
        raise UnsupportedError(
            f"{settings.place} is a sentinel: redis+sentinel://host:port/service asks it for the server"
        )
    if mode == "cluster" and not settings.cluster:
        raise ClusterModeError(f"{settings.place} is in cluster mode now: enter the bus again")
    if mode not in ("cluster", "standalone"):
        raise UnsupportedError(f"{settings.place} is a server in {mode} mode, which is not supported")
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
    """For a server whose INFO does not tell. All servers outside cluster mode refuse this command."""
    [reply] = await ask(link, [("CLUSTER", "INFO")])
    return isinstance(reply, bytes) and reply.startswith(b"cluster_")


async def _has(link: Link, command: str) -> bool:
    """Whether the server has a command. It is tried without arguments, for which the user needs no permission."""
    [reply] = await ask(link, [(command,)])
    return "unknown command" not in str(reply)
