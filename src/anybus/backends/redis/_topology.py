"""The nodes of a cluster: which one serves a slot now, and where a call goes on when its slot has moved.

A node is connected to when a slot of it is first used, and left when it has no slots any more. Redirections correct the
map of the slots (``_cluster_map``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

import anyio
import redis.exceptions
from anyio.abc import TaskGroup

from ..._ground.clock import loop_clock
from ..._ground.errors import BackendError, EventBusError
from ..._messages.message import Message
from ...abc import Codec
from ._cluster_map import ClusterMap
from ._errors import broken
from ._link import Link, open_link
from ._node import Node
from ._schedules import Expect
from ._settings import Locator, Settings
from ._slots import Address, redirection, slot_of
from ._taking import Member, Memory

_TRIES: Final = 12
_AT_FULL_SPEED: Final = 2
_SHORTEST_WAIT: Final = 0.02
_LONGEST_WAIT: Final = 0.25

_GRACE: Final = 5.0
"""A node without slots may answer for so many seconds what has been sent to it."""

_UNUSED: Final = 10.0
"""A connection on which a node is asked for slots that are being moved to it is kept for so many seconds."""

_SHIELDED: Final = 1.0
_REMEMBERED: Final = 4096

T = TypeVar("T")


class _NodeLocator(Locator):
    """Opens the connections to a node. The topology learns if that fails."""

    def __init__(self, settings: Settings, failed: Callable[[], None]) -> None:
        self._settings = settings
        self._failed = failed
        self.news = anyio.Event()

    async def open(self, *, entering: bool) -> Link:
        try:
            return await open_link(self._settings, entering=entering)
        except BackendError:
            self._failed()
            raise

    async def watch(self) -> None:
        await anyio.sleep_forever()


class Topology:
    """
    :param settings: of the cluster, with its seeds: the nodes that are asked first.
    :param expect: called when something will be due.
    """

    def __init__(self, settings: Settings, codec: Codec, expect: Expect) -> None:
        self._settings = settings
        self._codec = codec
        self._expect = expect
        self._memory = Memory()
        self._clear()

    def _clear(self) -> None:
        self.map = ClusterMap(
            self._settings, lambda: {address: node.client for address, node in self._nodes.items()}, self._tidy
        )
        self._nodes: dict[Address, Node] = {}
        self._askers: dict[Address, Node] = {}
        self._asked_at: dict[Address, float] = {}
        self._addresses: dict[Node, Address] = {}
        """The nodes that are in use, or are being left."""
        self._placed: dict[Member, Node] = {}
        """Where each member reads."""
        self._direct: dict[str, Node] = {}
        """The nodes of the streams to which something was published last, until the map is asked for again."""
        self._tasks: TaskGroup | None = None
        self._clock = anyio.current_time

    @property
    def is_connected(self) -> bool:
        return any(node.client.mux.is_connected for node in self._nodes.values())

    async def open(self, tasks: TaskGroup, alarm: Callable[[BaseException], None]) -> None:
        """Ask for the map, and connect to one primary.

        :raises EventBusError: if no seed knows the cluster, or none of its primaries can be used.
        """
        self._clear()
        self._tasks = tasks
        self._alarm = alarm
        self._clock = loop_clock()
        self.map.open()
        await self.map.refresh(entering=True)
        error: EventBusError | None = None
        for address in dict.fromkeys(owner for owner in self.map.owners if owner is not None):
            node = self._make(address)
            try:
                await node.connect(tasks, alarm)
            except EventBusError as failure:
                del self._addresses[node]
                node.close()
                error = error or failure
            else:
                self._nodes[address] = node
                break
        else:
            raise error or broken(f"no node of {self._settings.place} serves any slot", may_have_happened=False)
        tasks.start_soon(self.map.keep_up, alarm)

    async def aclose(self) -> None:
        if self._tasks is None:
            return
        self._tasks = None
        self.map.close()
        nodes = list(self._addresses)
        try:
            with anyio.move_on_after(1.0, shield=True):
                async with anyio.create_task_group() as tasks:
                    for node in nodes:
                        tasks.start_soon(node.taking.aclose)
        finally:
            # Even if the lines above raise: otherwise the task group would wait forever, shielded.
            for node in nodes:
                node.close()

    # --- calls

    async def at(self, stream: str, do: Callable[[Node], Awaitable[T]], *, asks: bool = False) -> T:
        """Do something on the node of a stream. If the node redirects it, and nothing was done, go on elsewhere.

        :param asks: whether the work concerns one key only, so that it can be done where the slot is being moved to.
        :raises ValidationError: if the stream's keys cannot share a slot.
        """
        slot = slot_of(stream)
        node = await self.node(slot)
        tries = 0
        while True:
            try:
                return await do(node)
            except BackendError as error:
                tries += 1
                node = await self.follow(error, node, slot, tries, asks=asks)

    async def publish_within(self, stream: str, message: Message, *, timeout: float) -> str:
        """What :meth:`at` would do. Most publishes come here, so this does not need a function for each."""
        began, left, tries = self._clock(), timeout, 0
        node = self._direct.get(stream)
        if node is None:
            with anyio.move_on_after(timeout):
                node = await self.node(slot_of(stream))
            if node is None:
                raise broken(f"{self._settings.place} did not tell the slots in time", may_have_happened=False)
            if len(self._direct) == _REMEMBERED:
                self._direct.clear()
            self._direct[stream] = node
        while True:
            try:
                return await node.publish_within(stream, message, timeout=left)
            except BackendError as error:
                tries += 1
                self._direct.pop(stream, None)
                elsewhere: Node | None = None
                with anyio.move_on_after(began + timeout - self._clock()):
                    elsewhere = await self.follow(error, node, slot_of(stream), tries, asks=True)  # noqa: ASYNC120
                left = began + timeout - self._clock()
                if elsewhere is None or left <= 0:
                    raise
                node = elsewhere

    async def reading(self, member: Member, do: Callable[[Node], Awaitable[T]]) -> T:
        """The same for a blocking read of a member. It gives up its place where it has read before."""

        async def there(node: Node) -> T:
            before = self._placed.get(member)
            if before is not node:
                self._placed[member] = node
                if before is not None:
                    await before.taking.leave(member)
            return await do(node)

        return await self.at(member[0], there)

    async def forget(self, member: Member) -> None:
        """The member has ended. It may have read last on a node that does not have its slot any more."""
        self._memory.forget(member)
        node = self._placed.pop(member, None)
        if node is not None:
            await node.taking.leave(member)

    async def node(self, slot: int) -> Node:
        """The node of a slot.

        :raises BackendError: if there is none.
        """
        address = self.map.of(slot)
        if address is None:
            self._check_open()
            await self.map.refresh()
            address = self.map.of(slot)
            if address is None:
                text = f"no node of {self._settings.place} serves slot {slot} now"
                raise broken(text, may_have_happened=False)
        return self._nodes.get(address) or self._enter(address)

    async def follow(self, error: BackendError, node: Node, slot: int, tries: int, *, asks: bool) -> Node:
        """Where a call goes on that failed at a node. This may wait for a moment.

        :param asks: as in :meth:`at`. All keys of a stream are used together, but moved one after another. A node that
            is asked would create what is still on the other one. So most work waits until the slot has been moved.
        :raises BackendError: the same error, if the call must not or cannot be repeated.
        """
        settings = node.client.settings
        address = Address(settings.host, settings.port)
        found = redirection(error, address)
        if found is not None or not isinstance(error.__cause__, redis.exceptions.RedisError):
            self.map.want()
        if error.may_have_happened or tries > _TRIES or self._tasks is None:
            raise error
        if found is None:
            if node.is_closed or self.map.owners[slot] != address:
                return await self.node(slot)
            raise error
        if found.kind == "GONE":
            await self.map.refresh()
        elif (
            found.kind == "TRYAGAIN"
            or (found.kind == "ASK" and not asks)
            or (settings.asking and found.kind in ("MOVED", "ASK"))  # it does not know yet that it is to get the slot
        ):
            await anyio.sleep(min(_SHORTEST_WAIT * 2**tries, _LONGEST_WAIT))
        elif found.address is None:
            raise error
        elif found.kind == "ASK":
            return self._asker(found.address)
        else:
            self.map.owners[slot] = found.address
            if tries > _AT_FULL_SPEED:  # nodes lead back and forth for a moment, until both know who has the slot
                await anyio.sleep(min(_SHORTEST_WAIT * 2**tries, _LONGEST_WAIT))
        return await self.node(slot)

    async def to_the_end(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do work of several steps. If the caller is cancelled, the work goes on, and the caller waits for a second."""
        done = anyio.Event()
        results: list[T] = []
        errors: list[Exception] = []

        async def run() -> None:
            try:
                with anyio.CancelScope(shield=True):  # the nodes' connections let nobody wait forever
                    results.append(await work())
            except Exception as error:
                errors.append(error)
            finally:
                done.set()

        self._check_open().start_soon(run)
        try:
            await done.wait()
        except BaseException:
            with anyio.move_on_after(_SHIELDED, shield=True):
                await done.wait()
            raise
        if results:
            return results[0]
        raise errors[0] if errors else broken("interrupted", may_have_happened=True)

    # --- nodes

    def _enter(self, address: Address) -> Node:
        node = self._nodes[address] = self._make(address)
        node.open(self._check_open(), self._alarm)
        return node

    def _asker(self, address: Address) -> Node:
        """A node to which slots are being moved. It is asked to serve streams that it does not have as a whole."""
        self._asked_at[address] = anyio.current_time()
        node = self._askers.get(address)
        if node is None:
            node = self._askers[address] = self._make(address, asking=True)
            node.open(self._check_open(), self._alarm)
        return node

    def _check_open(self) -> TaskGroup:
        if self._tasks is None:
            raise broken(f"the connection to {self._settings.place} is closed", may_have_happened=False)
        return self._tasks

    def _make(self, address: Address, *, asking: bool = False) -> Node:
        tasks = self._check_open()
        settings = replace(self._settings.at(*address), asking=asking)
        locator = _NodeLocator(settings, partial(self.map.suspect, address))
        node = Node(
            replace(settings, locator=locator), self._codec, self._expect, memory=self._memory, together=slot_of
        )
        node.start(tasks, self._alarm)
        self._addresses[node] = address
        return node

    def _tidy(self) -> None:
        """Leave nodes that have no slots any more, and wake members whose slot has moved."""
        self._direct.clear()
        if self._tasks is None:
            return
        primaries = {owner for owner in self.map.owners if owner is not None}
        for address, node in list(self._nodes.items()):
            if address not in primaries:
                del self._nodes[address]
                self._tasks.start_soon(self._leave, node)
            else:
                node.taking.watch.dismiss(partial(self._is_elsewhere, address))
        now = anyio.current_time()
        for address, node in list(self._askers.items()):
            if now - self._asked_at[address] > _UNUSED:
                del self._askers[address]
                self._tasks.start_soon(self._leave, node)

    def _is_elsewhere(self, address: Address, member: Member) -> bool:
        return self.map.owners[slot_of(member[0])] != address

    async def _leave(self, node: Node) -> None:
        mux = node.client.mux
        with anyio.CancelScope(shield=True):
            node.taking.watch.dismiss()
            if mux.is_connected:
                with anyio.move_on_after(_GRACE):
                    await mux.closed.wait()
            else:
                mux.close()  # at once: whoever waits for a connection goes on elsewhere
            await node.aclose()
            self._addresses.pop(node, None)
