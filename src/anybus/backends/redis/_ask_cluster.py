"""Asks a node of a cluster for the map of the slots."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import anyio

from ..._ground.errors import BackendError, EventBusError, UnsupportedError, words
from ._client import Client
from ._errors import UNEXPECTED, broken, translate
from ._link import BROKEN, ask, open_link
from ._protocol import Command, ServerError
from ._server import look_at
from ._settings import Settings
from ._slots import Address, SlotMap, slot_map

_QUESTIONS: Final[list[Command]] = [("CLUSTER", "SLOTS"), ("CLUSTER", "INFO")]
_LONGEST: Final = 1.0

_PATIENCE: Final = 0.3
"""If a node has not answered after so many seconds, the next one is asked as well."""


async def ask_around(
    sources: Sequence[Callable[[], Awaitable[SlotMap]]], epoch: int, place: str, *, entering: bool
) -> SlotMap | EventBusError:
    """Ask one node after another, until one answers that knows the cluster as it is.

    :param epoch: the number of the newest configuration that was known.
    :param place: the cluster, for texts.
    """
    found: list[SlotMap] = []
    refusals: list[EventBusError] = []
    async with anyio.create_task_group() as tasks:

        async def question(ask: Callable[[], Awaitable[SlotMap]], answered: anyio.Event) -> None:
            try:
                answer = await ask()
            except EventBusError as refusal:
                refusals.append(refusal)
            else:
                found.append(answer)
                if answer.is_well and answer.epoch >= epoch:
                    tasks.cancel_scope.cancel()
            answered.set()

        for ask in sources:
            answered = anyio.Event()
            tasks.start_soon(question, ask, answered)
            with anyio.move_on_after(_PATIENCE):
                await answered.wait()
    if found:
        best = max(found, key=lambda answer: (answer.is_well, answer.epoch))
        if best.epoch >= epoch or len(found) > len(refusals):
            return best
        text = f"the nodes that answer have an older configuration of {place} than is known"
        return broken(text, may_have_happened=False)
    for refusal in refusals:
        if isinstance(refusal, UnsupportedError):
            return refusal
    told = "; ".join(dict.fromkeys(str(refusal) for refusal in refusals))
    can_pass = not entering or any(isinstance(one, BackendError) and one.can_pass for one in refusals)
    text = f"no node told the slots of {place}: {told}"
    return BackendError(text, may_have_happened=False, can_pass=can_pass)


async def ask_node(client: Client, address: Address) -> SlotMap:
    """Ask on the shared connection to a node.

    :raises BackendError: if it does not tell.
    """
    with anyio.move_on_after(_LONGEST):
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
        replies = await ask(link, _QUESTIONS)
    except ServerError as error:
        raise translate(error, entering=entering) from error
    except BROKEN as error:
        raise broken(f"the connection to {settings.place} broke: {words(error)}", may_have_happened=False) from error
    except UNEXPECTED as error:
        text = f"unexpected replies from {settings.place}: is it a Redis or Valkey server?"
        raise broken(text, may_have_happened=False) from error
    finally:
        await link.aclose()  # noqa: ASYNC102 - shielded inside
    return _read(replies, address, settings)


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
