"""The observer: told of what happens, so that metrics need no patching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ErrorScope = Literal["read", "reclaim", "ack-flush", "renew", "publish", "handler", "close"]


@dataclass(frozen=True)
class BusEvent:
    """What happened, where. One frozen value for every hook; what does not apply is None.

    :ivar scope: which part of the bus speaks: for errors ``read``, ``reclaim``, ``ack-flush``, ``renew``,
        ``publish``, ``handler`` or ``close``; for the rest the hook's own name (``settled``).
    :ivar message_id: the entry's id on the backend.
    :ivar attempt: which handling it is, from 1.
    :ivar detail: in words: how a delivery was settled, where a group was made again.
    """

    scope: str
    topic: str | None = None
    group: str | None = None
    consumer: str | None = None
    message_id: str | None = None
    attempt: int | None = None
    error: BaseException | None = None
    detail: str | None = None


class Observer:
    """Base class of empty hooks: override those you want. Plain functions, never awaited; they must not block.

    What a hook raises is logged to the ``anybus`` logger, and harms nothing.
    """

    def on_error(self, event: BusEvent) -> None:
        """Something failed: a read, a handler, an acknowledgement... ``event.error`` is the exception.

        Overridden, it takes the log's place for what it is told of. Not overridden, errors go to the ``anybus`` logger,
        as they do without an observer. No other hook keeps anything out of the log.
        """

    def on_started(self, event: BusEvent) -> None:
        """A subscription began: its group exists, its consumer has its name."""

    def on_ended(self, event: BusEvent) -> None:
        """A subscription ended; ``event.error`` tells why if it failed."""

    def on_published(self, event: BusEvent) -> None:
        """A message was accepted by the backend."""

    def on_received(self, event: BusEvent) -> None:
        """An entry was taken, by reading or by reclaiming."""

    def on_settled(self, event: BusEvent) -> None:
        """The backend accepted a settlement; ``event.detail`` is ``acked``, ``retried``, ``dead-lettered``,
        ``dropped`` or ``released``."""

    def on_dead_lettered(self, event: BusEvent) -> None:
        """A message was given up on, and the backend has it; ``event.detail`` is the code and the reason."""

    def on_lease_lost(self, event: BusEvent) -> None:
        """An entry that was held here is no longer ours, or can no longer be known to be."""

    def on_circuit_opened(self, event: BusEvent) -> None:
        """A handler has only failed for a while, and its subscription is paused; ``event.detail`` is how often and for
        how long. The log says it, too.
        """

    def on_circuit_closed(self, event: BusEvent) -> None:
        """A handling has succeeded, and the subscription works as before. The log says it, too."""

    def on_group_made_again(self, event: BusEvent) -> None:
        """A group had vanished and was made again; ``event.detail`` is the position."""
