"""Asks the server whether a subscription has all permissions that it needs."""

from __future__ import annotations

from collections.abc import Sequence

from ..._ground.errors import BackendError
from ._client import Client
from ._errors import is_out_of_reach
from ._protocol import Command
from ._rights import TRY, arguments, may_not_run_scripts, missing_rights


async def check(client: Client, stream: str, group: str, asked: Sequence[Command]) -> None:
    """Try commands on the server of a stream.

    :raises BackendError: if permissions are missing. It names all of them.
    """
    try:
        reply = await client.run(TRY, stream, group, (), arguments(asked))
    except BackendError as error:
        if is_out_of_reach(error):
            raise may_not_run_scripts() from error
        raise
    with client.reading(reply):
        missing = missing_rights(asked, reply)
    if missing is not None:
        raise missing
