"""What the server is and can do: asked on every new connection, by probes rather than by version numbers."""

from __future__ import annotations

from dataclasses import dataclass

from ..._errors import UnsupportedError
from ._errors import has_code
from ._link import Link, exchange
from ._protocol import Protocol, ServerError
from ._settings import Settings

OLDEST = (6, 2)


@dataclass(frozen=True)
class Server:
    """What we know of it.

    :ivar name: ``redis`` or ``valkey``.
    :ivar can_unblock: whether this user may use CLIENT UNBLOCK (``@admin @dangerous`` in ACLs). Without it blocking
        reads are cut into short ones, so that a cancelled read ends within a second.
    """

    name: str = "redis"
    version: str = ""
    can_unblock: bool = True


async def look_at(link: Link, settings: Settings) -> Server:
    """
    :raises UnsupportedError: if the server is too old, or a kind that is not supported yet.
    :raises ServerError: if it refuses us.
    """
    info: dict[str, str] = {}
    try:
        [reply] = await exchange(link, Protocol(), [("INFO", "server")])
        info = dict(line.split(":", 1) for line in reply.decode().splitlines() if ":" in line)
    except ServerError as error:
        if not has_code(error, "NOPERM"):
            raise  # INFO is @dangerous: without the right to it, the probe below has to do
    mode = info.get("redis_mode", "standalone")
    if mode != "standalone":
        raise UnsupportedError(f"{settings.place} is a server in {mode} mode, which is not supported yet")
    [known] = await exchange(link, Protocol(), [("COMMAND", "INFO", "XAUTOCLAIM")])
    version = info.get("redis_version", "unknown")
    if not known or not known[0]:
        raise UnsupportedError(
            f"{settings.place} is Redis {version}: anybus needs {'.'.join(map(str, OLDEST))} or newer (XAUTOCLAIM)"
        )
    can_unblock = True
    try:
        await exchange(link, Protocol(), [("CLIENT", "UNBLOCK", 0)])
    except ServerError as error:
        can_unblock = not has_code(error, "NOPERM")
    name = "valkey" if info.get("server_name") == "valkey" else "redis"
    return Server(name, info.get("valkey_version", version), can_unblock)
