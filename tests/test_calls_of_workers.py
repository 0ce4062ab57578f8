"""Work never waits while a worker is idle: a call that no idle worker can hear yet is not lost.

AnyIO's ``receive()`` begins with a checkpoint. Until that is over, whatever is sent goes into the channel's buffer, and a
busy worker may take it from there. The tests hold an idle worker at that point.
"""

from __future__ import annotations

import contextvars
from typing import Any

import anyio
from harness import SOON, MemoryHarness, StepByStep, quick, until

from anybus import Delivery, Message, StreamBus, SubscriptionConfig
from anybus.abc import FetchedEntry

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="clean")


class HeldUp:
    """The end of a channel at which the first ``receive()`` is held up before it begins to wait."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._holds = True
        self.go_on = anyio.Event()

    async def receive(self) -> Any:
        if self._holds:
            self._holds = False
            await self.go_on.wait()
        return await self._inner.receive()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Portions(StepByStep):
    """New entries come in portions of the sizes that the test sends."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.sizes: list[int] = []

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        if stream != "t":
            return []
        if not self.sizes:
            await anyio.sleep(0.005)
            return []
        # However many were asked for: a read that waits asks for one entry only.
        return await super().read_new(stream, group, consumer, count=self.sizes.pop(0), timeout=0)


class Handlers:
    """Each goes on until it is let go. Some leave something behind in their context."""

    def __init__(self) -> None:
        self.handled: list[str] = []
        self._running: dict[str, anyio.Event] = {}

    async def handle(self, delivery: Delivery) -> None:
        key = delivery.message.key
        self._running[key] = anyio.Event()
        await self._running[key].wait()
        del self._running[key]
        self.handled.append(key)
        if key in "345":
            variable.set(key)

    def let_go(self, *keys: str) -> None:
        for key in keys:
            self._running[key].set()

    async def are(self, *keys: str) -> None:
        await until(lambda: sorted(self._running) == sorted(keys), f"{keys} in handlers")


async def swallow_a_call(bus: StreamBus, backend: Portions, taker: Any, handlers: Handlers) -> None:
    """3, 4 and 5 are with handlers, 6 and 7 are ready, and the call for them is gone."""
    await bus.publish_batch([Message("t", key=key) for key in "1234567"])
    await until(lambda: taker._idle == 1)
    taker._ready = ready = HeldUp(taker._ready)
    backend.sizes.append(3)
    await handlers.are("1", "2", "3")
    await until(lambda: taker._idle == 1)  # a fourth worker, which is held up
    backend.sizes.append(2)
    await until(lambda: ready.statistics().current_buffer_used == 1)
    handlers.let_go("1")  # its worker takes 4, and calls another one for 5
    await handlers.are("2", "3", "4")
    backend.sizes.append(2)
    await until(lambda: ready.statistics().current_buffer_used == 2)
    handlers.let_go("2")  # its worker takes 5, and from the channel the call and the rest
    await handlers.are("3", "4", "5")
    ready.go_on.set()


async def test_what_is_ready_is_handled_beside_what_is_in_flight() -> None:
    backend, handlers = Portions(MemoryHarness().make_backend()), Handlers()
    config = SubscriptionConfig("t", "g", group_start_id="0", max_in_flight=5, max_pending_acks=40)
    with anyio.fail_after(SOON + 5):
        async with StreamBus(backend, quick(claim_idle_timeout=600)) as bus:
            async with bus.subscribe(config, handlers.handle) as subscription:
                await swallow_a_call(bus, backend, subscription._taker, handlers)
                await handlers.are("3", "4", "5", "6", "7")
                handlers.let_go(*"34567")
                await until(lambda: len(handlers.handled) == 7)


async def test_what_is_ready_is_handled_after_workers_that_must_not_go_on() -> None:
    backend, handlers = Portions(MemoryHarness().make_backend()), Handlers()
    config = SubscriptionConfig("t", "g", group_start_id="0", max_in_flight=5, max_pending_acks=40)
    with anyio.fail_after(SOON + 5):
        async with StreamBus(backend, quick(claim_idle_timeout=600)) as bus:
            async with bus.subscribe(config, handlers.handle) as subscription:
                await swallow_a_call(bus, backend, subscription._taker, handlers)
                handlers.let_go(*"345")
                await handlers.are("6", "7")
                handlers.let_go(*"67")
                await until(lambda: len(handlers.handled) == 7)
