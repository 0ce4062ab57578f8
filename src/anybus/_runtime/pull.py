"""The pull form: a stream of deliveries, settled by hand."""

from __future__ import annotations

from collections.abc import Callable

import anyio
from anyio.abc import ObjectReceiveStream
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from .._ground.cancellation import persist
from .._ground.home import Home
from .claims import Claims
from .context import Context
from .delivery import Delivery
from .entry import Held, Stage
from .keeper import EntryKeeper
from .settler import Settler
from .taker import Taker


class PullTaker(Taker):
    """Gives deliveries to callers. At most ``max_in_flight`` of them are unsettled at any time."""

    def __init__(
        self,
        context: Context,
        settler: Settler,
        keeper: EntryKeeper,
        claims: Claims | None,
        ready: MemoryObjectReceiveStream[list[Held]],
        again: MemoryObjectSendStream[list[Held]],
    ) -> None:
        super().__init__(context, settler, ready, again)
        self._keeper = keeper
        self._claims = claims
        self._limit = context.max_in_flight
        self._given: set[Held] = set()

    @property
    def running(self) -> set[Held]:
        return self._given

    def stop(self) -> None:
        super().stop()
        self._ledger.changed()

    def _forget_settled(self) -> None:
        self._given = {held for held in self._given if held.stage in (Stage.OPEN, Stage.SETTLING)}

    async def take(self) -> Delivery | None:
        """The next delivery; None when there are no more. Once it is open for its handler, nothing is awaited."""
        await checkpoint()
        while not self._stopped:
            if len(self._given) >= self._limit:
                self._forget_settled()
            if len(self._given) >= self._limit:
                await self._ledger.wait_for_change()
            elif (held := self.next_entry()) is not None:
                self._given.add(held)
                self._wake_next()
                if self._claims is None or await self._claims.admit(held):
                    return Delivery(held, self._keeper)
            else:
                try:
                    await self._receive()
                finally:
                    self._wake_next()
        return None

    def _wake_next(self) -> None:
        """Wake another caller, who may wait for the rest of a batch."""
        if self._backlog and self._idle:
            self._wake_one()

    def in_flight(self) -> int:
        self._forget_settled()
        return super().in_flight()

    def oldest(self) -> float | None:
        self._forget_settled()
        return super().oldest()

    async def run(self) -> None:
        try:
            with self.scope:
                await persist(self._until_settled)
        finally:
            self.ended.set()

    async def _until_settled(self) -> None:
        await self._stopping.wait()
        self._forget_settled()
        while self._given:
            await self._ledger.wait_for_change()
            self._forget_settled()


class DeliveryStream(ObjectReceiveStream[Delivery]):
    """A stream of deliveries. It ends (``EndOfStream``) when the subscription is closed.

    Settle each delivery by hand. Until then its lease is renewed. Leaving the block releases unsettled deliveries.
    """

    def __init__(self, taker: PullTaker, close: Callable[[], None], home: Home) -> None:
        self._taker = taker
        self._home = home
        self._close = close
        self._closed = False

    async def receive(self) -> Delivery:
        """Wait for the next delivery. While ``max_in_flight`` deliveries are unsettled, it waits for one to be settled.

        :raises anyio.EndOfStream: when the subscription has been closed.
        :raises anyio.ClosedResourceError: when this stream has been closed.
        """
        if self._closed:
            raise anyio.ClosedResourceError
        self._home.check("the stream of deliveries")
        delivery = await self._taker.take()
        if delivery is None:
            raise anyio.EndOfStream
        return delivery

    async def aclose(self) -> None:
        """Close the stream: nothing more is taken."""
        if not self._closed:
            self._home.check("the stream of deliveries")
        self._closed = True
        self._close()
        await checkpoint()
