"""The subscriptions of a bus: what they share, and how they end with it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

import anyio

from .._ground.cancellation import persist
from .._ground.checks import refuse
from .._ground.errors import UnsupportedError
from .._ground.home import Home
from .._options import StreamBusOptions, SubscriptionConfig, dead_letter_topic_of
from .._reporting import Notices
from .._retention.caretaker import Caretaker
from ..abc import CompletionKeeper, StreamBackend
from .assembly import make_context
from .context import SuspectSlot
from .naming import ConsumerNames
from .pool import Handler
from .subscription import Subscription


class Members:
    """The subscriptions of a bus."""

    def __init__(
        self, backend: StreamBackend, options: StreamBusOptions, caretaker: Caretaker, notices: Notices
    ) -> None:
        self._backend = backend
        self._options = options
        self._caretaker = caretaker
        self._notices = notices
        self._suspects = SuspectSlot()
        self._names = ConsumerNames()
        self._running: set[Subscription] = set()
        self._dead_letter_topics: set[str] = set()

    def __len__(self) -> int:
        return len(self._running)

    def check(self, config: SubscriptionConfig) -> SubscriptionConfig:
        """Refuse a configuration that cannot be used on this bus."""
        if not isinstance(config, SubscriptionConfig):
            refuse("config", config, "an anybus.SubscriptionConfig")
        if config.dead_letter_topic is None and (
            config.topic.endswith(".dead") or config.topic in self._dead_letter_topics
        ):
            refuse("dead_letter_topic", None, "set (a topic or anybus.DROP) for a subscription on a dead-letter topic")
        own_store = config.guarantee == "exactly-once" and config.idempotency_store is None
        if own_store and not isinstance(self._backend, CompletionKeeper):
            name = type(self._backend).__name__
            raise UnsupportedError(
                f"{name} has no idempotency store of its own: guarantee='exactly-once' needs an idempotency_store"
            )
        return config

    @asynccontextmanager
    async def open(
        self, config: SubscriptionConfig, handler: Handler | None, home: Home
    ) -> AsyncGenerator[Subscription, None]:
        """Run a subscription while the body runs.

        :param handler: None for ``deliveries()``, where messages are settled by hand.
        """
        topic = dead_letter_topic_of(config)
        if topic is not None:
            self._dead_letter_topics.add(topic)
        context = make_context(
            config,
            backend=self._backend,
            options=self._options,
            notices=self._notices,
            suspects=self._suspects,
            home=home,
            names=self._names,
            pulled=handler is None,
        )
        subscription = Subscription(context, handler, self._caretaker)
        self._running.add(subscription)
        try:
            async with subscription._open():
                yield subscription
        finally:
            self._running.discard(subscription)

    async def end(self, *, gracefully: bool) -> None:
        """End all subscriptions, and wait until they have ended."""
        live = list(self._running)
        for subscription in live:
            subscription._begin_end() if gracefully else subscription._abort()

        async def wait() -> None:
            # A child task, because a native asyncio cancellation pierces a shield in the task that it hits. The wait
            # has no timeout: each subscription's end has its own, and needs the backend until then.
            with anyio.CancelScope(shield=True):
                for subscription in live:
                    await persist(subscription._ended.wait)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            try:
                await _all_ended(live)
            finally:
                for subscription in live:
                    if not subscription._ended.is_set():
                        subscription._abort()


async def _all_ended(subscriptions: Iterable[Subscription]) -> None:
    for subscription in subscriptions:
        await subscription._ended.wait()
