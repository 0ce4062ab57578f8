"""The pull form: a stream of deliveries, settled by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import anyio
from anyio.abc import ObjectReceiveStream
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from .._ground.cancellation import persist
from .._ground.home import Home
from .context import Context
from .delivery import Delivery
from .entry import Held, Stage
from .keeper import EntryKeeper
from .settler import Settler
from .taker import Taker


class PullTaker(Taker):
    """Gives deliveries to whoever asks; at most ``max_in_flight`` are out unsettled.

    :param again: leads to the same place: an empty batch in it wakes the next who waits.
    """

    def __init__(
        self,
        context: Context,
        settler: Settler,
        keeper: EntryKeeper,
        ready: MemoryObjectReceiveStream[list[Held]],
        again: MemoryObjectSendStream[list[Held]],
    ) -> None:
        super().__init__(context, settler, ready)
        self._keeper = keeper
        self._again = again
        self._limit = context.max_in_flight
        self._idle = 0

    def stop(self) -> None:
        super().stop()
        self._again.close()
        self._ledger.changed()

    def _forget_settled(self) -> None:
        self.running = {held for held in self.running if held.stage in (Stage.OPEN, Stage.SETTLING)}

    async def take(self) -> Delivery | None:
        """The next delivery; None when there will be none. Between taking and returning nothing is awaited."""
        await checkpoint()
        while not self._stopped:
            if len(self.running) >= self._limit:
                self._forget_settled()
            if len(self.running) >= self._limit:
                await self._ledger.wait_for_change()
            elif (held := self.next_entry()) is not None:
                self._wake_next()
                return Delivery(held, self._keeper)
            else:
                await self._receive()
        return None

    async def _receive(self) -> None:
        self._idle += 1
        try:
            batch = await self._ready.receive()
        except anyio.EndOfStream:
            return
        except BaseException:
            self._look_up_waiting()
            raise
        finally:
            self._idle -= 1
            self._wake_next()
        self._backlog += batch

    def _took_a_call(self) -> None:
        """Nothing to do: whoever takes an entry wakes the next."""

    def _wake_next(self) -> None:
        """Somebody else may wait for what is left of a batch."""
        if self._backlog and self._idle:
            with contextlib.suppress(anyio.WouldBlock, anyio.ClosedResourceError):
                self._again.send_nowait([])

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
        while self.running:
            await self._ledger.wait_for_change()
            self._forget_settled()


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
