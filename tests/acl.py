"""Users with fewer rights, on a real server."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from anyio import to_thread
from harness import new_topic
from servers import RunningServer

SECRET = "secret"


@dataclass
class User:
    """A user of the server. ``rules`` changes what he may do, at once, on his open connections too."""

    server: RunningServer
    name: str

    @property
    def url(self) -> str:
        return f"redis://{self.name}:{SECRET}@127.0.0.1:{self.server.port}"

    async def rules(self, *rules: str) -> None:
        await acl(self.server, "SETUSER", self.name, *rules)


async def acl(server: RunningServer, *words: str) -> None:
    def command() -> None:
        with server.client() as client:
            client.execute_command("ACL", *words)

    await to_thread.run_sync(command)


@asynccontextmanager
async def user_with(server: RunningServer, *rules: str) -> AsyncGenerator[User, None]:
    """A user with these rights; to all keys, unless the rules begin with others."""
    user = User(server, new_topic().replace(".", "-"))
    await user.rules("on", f">{SECRET}", "~*", "&*", *rules)
    try:
        yield user
    finally:
        await acl(server, "DELUSER", user.name)
