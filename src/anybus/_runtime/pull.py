"""The pull form: a stream of deliveries, settled by hand."""

from __future__ import annotations

from collections.abc import Callable

import anyio
from anyio.abc import ObjectReceiveStream
from anyio.lowlevel import checkpoint

from .._ground.cancellation import persist
from .._ground.home import Home
from .context import Context
from .delivery import Delivery
from .keeper import EntryKeeper
from .ledger import Stage
from .pool import Taker
from .settler import Settler


class PullTaker(Taker):
    """Hands out deliveries to whoever asks; at most ``max_in_flight`` are out unsettled."""

    def __init__(self, context: Context, settler: Settler, keeper: EntryKeeper) -> None:
        super().__init__(context, settler, keeper)
        self._limit = context.max_in_flight
        self._changed = anyio.Event()
        context.ledger.on_removed = self.wake

    def wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def stop(self) -> None:
        super().stop()
        self.wake()

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def _forget_settled(self) -> None:
        self.running = {held for held in self.running if held.stage in (Stage.OPEN, Stage.SETTLING)}

    async def take(self) -> Delivery | None:
        """The next delivery; None when there will be none. Between taking and returning nothing is awaited."""
        await checkpoint()
        while not self.is_stopping:
            if len(self.running) >= self._limit:
                self._forget_settled()
            if len(self.running) < self._limit and (held := self.next_entry()) is not None:
                return Delivery(held, self._keeper)
            await self._changed.wait()
        return None

    def in_flight(self) -> int:
        self._forget_settled()
        return super().in_flight()

    def oldest(self) -> float | None:
        self._forget_settled()
        return super().oldest()

    async def run(self) -> None:
        try:
            with self.scope:
                await persist(self._stopping.wait)
                self._forget_settled()
                while self.running:
                    await self._changed.wait()
                    self._forget_settled()
        finally:
            self.ended.set()


class DeliveryStream(ObjectReceiveStream[Delivery]):
    """Deliveries as they come. Ends (``EndOfStream``) when the subscription is closed.

    Each delivery is settled by hand; it is renewed until then, or until the block is left, which releases it.
    """

    def __init__(self, taker: PullTaker, close: Callable[[], None], home: Home) -> None:
        self._taker = taker
        self._home = home
        self._close = close
        self._closed = False

    async def receive(self) -> Delivery:
        """Wait for the next delivery. At most ``max_in_flight`` are out unsettled; beyond that it waits.

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
        """End the stream: nothing more is taken."""
        if not self._closed:
            self._home.check("the stream of deliveries")
        self._closed = True
        self._close()
        await checkpoint()
