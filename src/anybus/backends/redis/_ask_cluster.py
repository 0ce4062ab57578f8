"""Asks a node of a cluster for the map of the slots."""

from __future__ import annotations

from typing import Any, Final

import anyio

from ..._ground.errors import UnsupportedError, words
from ._client import Client
from ._errors import UNEXPECTED, broken, translate
from ._link import BROKEN, ask, open_link
from ._protocol import Command, ServerError
from ._server import look_at
from ._settings import Settings
from ._slots import Address, SlotMap, slot_map

_QUESTIONS: Final[list[Command]] = [("CLUSTER", "SLOTS"), ("CLUSTER", "INFO")]
_PATIENCE: Final = 1.0


async def ask_node(client: Client, address: Address) -> SlotMap:
    """Ask on the shared connection to a node.

    :raises BackendError: if it does not tell.
    """
    with anyio.move_on_after(_PATIENCE):
        return _read(await client.mux.pipeline(_QUESTIONS), address, client.settings)
    raise broken(f"{client.settings.place} did not tell the slots in time", may_have_happened=False)


async def ask_link(settings: Settings, address: Address, *, entering: bool) -> SlotMap:
    """Ask on a connection of its own.

    :raises UnsupportedError: if the server is not in cluster mode, or too old.
    :raises BackendError: if it does not tell.
    """
    link = await open_link(settings, entering=entering)
    try:
        if entering:
            await look_at(link, settings)
        return _read(await ask(link, _QUESTIONS), address, settings)
    except ServerError as error:
        raise translate(error, entering=entering) from error
    except BROKEN as error:
        raise broken(f"the connection to {settings.place} broke: {words(error)}", may_have_happened=False) from error
    finally:
        await link.aclose()  # noqa: ASYNC102 - shielded inside


def _read(replies: list[Any], address: Address, settings: Settings) -> SlotMap:
    slots, info = replies
    if isinstance(slots, ServerError):
        if "cluster support disabled" in str(slots):
            raise UnsupportedError(
                f"{settings.place} is not in cluster mode: for a single server use redis://host:port, without +cluster"
            )
        raise translate(slots)
    try:
        return slot_map(slots, info, address)
    except UNEXPECTED as error:
        raise broken(f"unexpected reply from {settings.place} to CLUSTER SLOTS", may_have_happened=False) from error
