"""The map of a cluster: which node serves which slot.

Any node is asked for it: when the bus is entered, when the map turns out to be wrong, and now and then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Final

import anyio

from ..._ground.cancellation import persist, sole
from ..._ground.errors import BackendError, EventBusError
from ._ask_cluster import ask_around, ask_link, ask_node
from ._client import Client
from ._errors import duplicate
from ._settings import Settings
from ._slots import SLOTS, Address, SlotMap

_EVERY: Final = 60.0
"""The interval at which the map is asked for while the bus is used, in seconds."""

_AGAIN: Final = 0.3
"""The interval while a node with slots cannot be reached."""


class ClusterMap:
    """
    :param settings: of the cluster, with its seeds: the nodes that are asked first.
    :param nodes: tells which nodes are in use.
    :param changed: called after each answer.
    :ivar owners: the primary of each slot; None = there is none. A redirection may correct it.
    """

    def __init__(
        self, settings: Settings, nodes: Callable[[], Mapping[Address, Client]], changed: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._nodes = nodes
        self._changed = changed
        self.owners: list[Address | None] = [None] * SLOTS
        self._known: tuple[Address, ...] = ()
        self._epoch = 0
        self._unreachable: set[Address] = set()
        self._is_used = False

    def open(self) -> None:
        """To be called before anything else, on the event loop."""
        self._wanted = anyio.Event()
        self._asking = anyio.Lock()
        self._rounds = 0
        self._found: SlotMap | EventBusError | None = None
        self._scope = anyio.CancelScope(shield=True)

    def close(self) -> None:
        self._scope.cancel()

    def of(self, slot: int) -> Address | None:
        self._is_used = True
        return self.owners[slot]

    def want(self) -> None:
        """The map may be wrong: ask for it soon."""
        self._wanted.set()

    def suspect(self, address: Address) -> None:
        """A node cannot be reached: ask for the map again and again, until it can or is not needed."""
        self._unreachable.add(address)
        self.want()

    async def keep_up(self, alarm: Callable[[BaseException], None]) -> None:
        """Ask for the map when it is wanted, and now and then. Runs until closed.

        :param alarm: called with an error that must end the bus.
        """
        try:
            with self._scope:
                await persist(self._refresh_again)
        except BaseException as error:  # noqa: ASYNC103 - a real cancellation is raised again
            if isinstance(error, anyio.get_cancelled_exc_class()):
                raise
            alarm(sole(error))

    async def _refresh_again(self) -> None:
        while True:
            with anyio.move_on_after(_AGAIN if self._unreachable else _EVERY):
                await self._wanted.wait()
            if not (self._is_used or self._unreachable or self._wanted.is_set()):
                continue
            self._is_used = False
            self._wanted = anyio.Event()
            try:
                await self.refresh()
            except EventBusError:
                self.want()  # calls meet the same error, and report it
            nodes = self._nodes()
            self._unreachable = {one for one in self._unreachable if one in nodes and not nodes[one].mux.is_connected}
            await anyio.sleep(_AGAIN)

    async def refresh(self, *, entering: bool = False) -> None:
        """Ask for the map. Whoever wants it at the same time shares one answer.

        :raises EventBusError: if no node tells it.
        """
        rounds = self._rounds
        async with self._asking:
            if rounds == self._rounds:
                self._found = await ask_around(
                    list(self._sources(entering=entering)), self._epoch, self._settings.place, entering=entering
                )
                self._rounds += 1
                if isinstance(self._found, SlotMap):
                    self._epoch = self._found.epoch
                    self.owners = list(self._found.owners)
                    self._known = self._found.addresses
                    self._changed()
            found = self._found
        if isinstance(found, BackendError):
            raise duplicate(found)
        if isinstance(found, EventBusError):
            raise found

    def _sources(self, *, entering: bool) -> Iterable[Callable[[], Awaitable[SlotMap]]]:
        """Whom to ask: nodes with a connection first, then the others that are known."""
        asked: set[Address] = set()
        for address, client in sorted(self._nodes().items(), key=lambda item: item[0] in self._unreachable):
            if client.mux.is_connected:
                asked.add(address)
                yield partial(ask_node, client, address)
        addresses = {address: self._settings.at(*address) for address in self._known}
        seeds = {Address(seed.host, seed.port): seed for seed in self._settings.seeds}
        for address, settings in {**addresses, **seeds}.items():
            if address not in asked:
                yield partial(ask_link, settings, address, entering=entering)
