"""A pass whose reply was lost: the next one looks for what it took, and comes across what is held here anyway.

Specification: DESIGN.md, section 4: what is held is never handled a second time at once (promise 5), what returned
unsettled may be settled until its lease ends, and what was handled here and comes back is not handled again.
"""

from __future__ import annotations

from contextlib import suppress

import anyio
from anyio.abc import ByteStream
from fake_server import GONE, listening
from harness import SOON, quick, until
from servers import RedisHarness, RunningServer

from anybus import Delivery, Message, StreamBus, SubscriptionConfig
from anybus._failure.copies import retry_stream
from anybus.backends.redis import RedisBackend

_AN_ENTRY = b"$7\r\nmessage\r\n"


class LosesOnce:
    """Stands between a backend and its server. Told to lose, it breaks the connection at the next reply that carries
    entries.

    :param holds: the next such reply after that comes in one piece with whatever follows it.
    """

    def __init__(self, server: RunningServer, *, holds: bool = False) -> None:
        self.server = server
        self.holds = holds
        self.losing = False
        self.holding = False
        self.held_one = anyio.Event()

    async def pass_on(self, outside: ByteStream) -> None:
        async with await anyio.connect_tcp("127.0.0.1", self.server.port) as inside:
            async with anyio.create_task_group() as tasks:

                async def answers() -> None:
                    held = b""
                    with suppress(*GONE):
                        while True:
                            data = await inside.receive()
                            if _AN_ENTRY in data and self.losing:
                                self.losing, self.holding = False, self.holds
                                break
                            if _AN_ENTRY in data and self.holding:
                                self.holding, held = False, data
                                self.held_one.set()
                                continue
                            await outside.send(held + data)
                            held = b""
                    tasks.cancel_scope.cancel()

                tasks.start_soon(answers)
                with suppress(*GONE):
                    while True:
                        await inside.send(await outside.receive())
                tasks.cancel_scope.cancel()
        await anyio.aclose_forcefully(outside)


async def test_what_is_acked_while_its_pass_is_on_the_way_is_not_handled_again(
    server: RunningServer, topic: str
) -> None:
    """The reply says that it is ours, the ack's reply comes with it, and trio runs their tasks in any order."""
    for turn in range(6):
        name, handled, entered = f"{topic}.{turn}", list[bytes](), anyio.Event()
        loses = LosesOnce(server, holds=True)

        async def handler(
            delivery: Delivery, handled: list[bytes] = handled, entered: anyio.Event = entered, loses: LosesOnce = loses
        ) -> None:
            handled.append(delivery.message.payload)
            entered.set()
            if len(handled) == 1:
                await loses.held_one.wait()

        with anyio.fail_after(SOON):
            async with listening(loses.pass_on) as port, RedisHarness(server).make_backend() as other:
                async with StreamBus(RedisBackend(f"redis://127.0.0.1:{port}"), quick(claim_idle_timeout=60)) as bus:
                    config = SubscriptionConfig(name, "g", group_start_id="0")
                    async with bus.subscribe(config, handler):
                        await other.publish(name, Message(name, b"mine"))
                        await entered.wait()
                        loses.losing = True
                        await other.publish(retry_stream(name, "g"), Message(name, b"retry"))
                        await until(lambda handled=handled: b"retry" in handled)  # type: ignore[misc]
        assert handled == [b"mine", b"retry"]


async def test_what_returned_unsettled_is_not_handed_over_again_within_its_lease(
    server: RunningServer, topic: str
) -> None:
    loses = LosesOnce(server)
    kept: list[Delivery] = []

    async def handler(delivery: Delivery) -> None:
        kept.append(delivery)

    with anyio.fail_after(SOON):
        async with listening(loses.pass_on) as port, RedisHarness(server).make_backend() as other:
            async with StreamBus(RedisBackend(f"redis://127.0.0.1:{port}"), quick(claim_idle_timeout=60)) as bus:
                config = SubscriptionConfig(topic, "g", ack_mode="manual", group_start_id="0")
                async with bus.subscribe(config, handler) as subscription:
                    await other.publish(topic, Message(topic, b"mine"))
                    await until(lambda: len(kept) == 1 and subscription.statistics().in_flight == 0)
                    loses.losing = True
                    await other.publish(retry_stream(topic, "g"), Message(topic, b"retry"))
                    await until(lambda: not loses.losing)
                    await other.publish(topic, Message(topic, b"last"))
                    await until(lambda: b"retry" in [delivery.message.payload for delivery in kept])
                    await until(lambda: b"last" in [delivery.message.payload for delivery in kept])
                    assert sorted(delivery.message.payload for delivery in kept) == [b"last", b"mine", b"retry"]
                    for delivery in kept:
                        await delivery.ack()
