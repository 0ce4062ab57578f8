"""The contract of an idempotency store, and what a backend may offer for exactly-once effects."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal

from .._ground.errors import EventBusError
from ._entries import Output

KeyStep = Literal["complete", "release", "none"]
"""What a settlement does with the key of its message: note that it was handled, give the claim up, or nothing."""


@dataclass(frozen=True)
class Claim:
    """The answer of a store to a claim.

    :ivar state: ``claimed``: the message may be handled. ``busy``: another message with this key is being handled.
        ``completed``: a message with this key was handled within the window.
    :ivar wait: if ``busy``: after how many seconds the other claim ends, unless it is renewed.
    """

    state: Literal["claimed", "busy", "completed"]
    wait: float = 0.0


class IdempotencyStore(abc.ABC):
    """Remembers which keys were handled, and who is handling one now.

    Keys of different topics or groups are independent. A claim has a lease, which ends by the store's clock. It belongs
    to an entry and to the consumer that holds the entry. Durations are seconds, as floats.

    A store may raise anything. An error counts as transient unless it is known to be permanent, as for a backend. Then
    the bus tries again for as long as it has the entry's lease.
    """

    @abc.abstractmethod
    async def claim(self, topic: str, group: str, key: str, consumer: str, *, entry: str, lease: float) -> Claim:
        """Claim a key before its message is handled. Atomic: of two claims for different entries, one is granted.

        A claim of the same entry is always taken over: the backend has given the entry to ``consumer``, so the earlier
        one has lost it. A claim whose lease has ended is taken over, too.

        :param entry: names the entry within the topic and the group.
        :param lease: for how many seconds the claim holds, unless it is renewed.
        """

    @abc.abstractmethod
    async def renew(self, topic: str, group: str, keys: Sequence[str], consumer: str, *, lease: float) -> None:
        """Extend claims that still belong to the consumer. Others are ignored."""

    @abc.abstractmethod
    async def complete(self, topic: str, group: str, key: str, consumer: str, *, window: float) -> None:
        """Note that a message with this key was handled, whoever has the claim. Its claim ends.

        :param window: for how many seconds this is remembered.
        """

    @abc.abstractmethod
    async def release(self, topic: str, group: str, key: str, consumer: str) -> None:
        """Give a claim up, if it still belongs to the consumer. A completed key stays completed."""


class TransactionalStore(IdempotencyStore):
    """An idempotency store whose completions can be part of a handler's own transaction."""

    @abc.abstractmethod
    def transaction(
        self, topic: str, group: str, key: str, consumer: str, *, entry: str, window: float, connection: object
    ) -> AbstractAsyncContextManager[None]:
        """A transaction on the handler's connection, to which the completion of the key belongs.

        It is committed if the body returns, and rolled back if the body raises.

        :raises ValidationError: if the connection cannot be used.
        :raises LeaseLostError: if the claim does not belong to this entry and consumer any more.
        """


@dataclass(frozen=True)
class KeyedTransfer:
    """A settlement together with what it does to a key.

    :ivar id: the entry to acknowledge.
    :ivar outputs: messages to append in the same step.
    :ivar key: the key of its message.
    :ivar step: with ``complete``, nothing is appended if the key was completed before: the entry is only acknowledged.
    """

    id: str
    outputs: Sequence[Output]
    key: str
    step: KeyStep


class CompletionKeeper(abc.ABC):
    """What a backend may offer beside :class:`StreamBackend`: an idempotency store of its own.

    So a completion is stored in the same step as the acknowledgement.
    """

    @property
    @abc.abstractmethod
    def idempotency_store(self) -> IdempotencyStore:
        """The store, in the same server as the streams."""

    @abc.abstractmethod
    async def claim_keys(
        self, topic: str, group: str, consumer: str, items: Sequence[tuple[str, str]], *, lease: float
    ) -> list[Claim]:
        """:meth:`IdempotencyStore.claim` for many keys, one after the other, in one call.

        :param items: pairs of a key and its entry.
        """

    @abc.abstractmethod
    async def settle_keyed(
        self, topic: str, stream: str, group: str, consumer: str, items: Sequence[KeyedTransfer], *, window: float
    ) -> list[list[str] | EventBusError | None]:
        """For each item in one step: append its outputs, do what it says to its key, acknowledge its entry.

        :param topic: the topic to which the keys belong.
        :param stream: the stream of the entries: the topic, or the group's retry stream.
        :param window: for how many seconds completions are remembered.
        :return: for each item the ids of its outputs (an empty list if its key was completed before), its error, or
            None: the entry is no longer the consumer's, and nothing was done.
        """

    async def check_key_rights(self, topic: str, group: str) -> None:  # noqa: B027 - nothing to check is fine
        """Called once for a subscription that uses the store, before anything is created or taken. Changes nothing.

        :raises BackendError: if permissions are missing. It is permanent, and names all of them.
        """
