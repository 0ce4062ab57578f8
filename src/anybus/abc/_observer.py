"""The contract of an observer: it is told of everything that happens, for metrics for example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ErrorScope = Literal["read", "reclaim", "claim", "ack-flush", "renew", "publish", "handler", "close"]


@dataclass(frozen=True)
class BusEvent:
    """What happened, and where. The same frozen type for every hook. A field is None if it does not apply.

    :ivar scope: for errors, the part of the bus that failed: ``read``, ``reclaim``, ``claim``, ``ack-flush``,
        ``renew``, ``publish``, ``handler`` or ``close``. For all other events, the hook's own name (``settled``).
    :ivar message_id: the entry's id on the backend.
    :ivar attempt: the number of the handling, from 1.
    :ivar error: the exception.
    :ivar detail: more, as text: how a delivery was settled, or at which position a group was recreated.
    :ivar count: how many entries the event is about, where it is about several.
    """

    scope: str
    topic: str | None = None
    group: str | None = None
    consumer: str | None = None
    message_id: str | None = None
    attempt: int | None = None
    error: BaseException | None = None
    detail: str | None = None
    count: int | None = None


class Observer:
    """A base class of empty hooks: override those that you need. Hooks are plain functions, and must not block.

    If a hook raises, the error is logged by the ``anybus`` logger, and has no other effect.
    """

    def on_error(self, event: BusEvent) -> None:
        """Something failed: a read, a handler, an acknowledgement... ``event.error`` is the exception.

        If this hook is overridden, these errors are not logged. Otherwise the ``anybus`` logger logs them, as it does
        without an observer. No other hook affects the log.
        """

    def on_started(self, event: BusEvent) -> None:
        """A subscription started: its group exists, and its consumer has its name."""

    def on_ended(self, event: BusEvent) -> None:
        """A subscription ended. If it failed, ``event.error`` tells why."""

    def on_published(self, event: BusEvent) -> None:
        """The backend accepted a message."""

    def on_received(self, event: BusEvent) -> None:
        """An entry was taken, by reading or by reclaiming."""

    def on_settled(self, event: BusEvent) -> None:
        """The backend accepted a settlement; ``event.detail`` is ``acked``, ``retried``, ``dead-lettered``,
        ``dropped``, ``released``, or ``duplicate``: acknowledged unhandled, because its key was handled before."""

    def on_dead_lettered(self, event: BusEvent) -> None:
        """A message was given up on, and the backend has stored the dead letter, or acknowledged what is dropped.
        ``event.detail`` is the code and the reason.
        """

    def on_lease_lost(self, event: BusEvent) -> None:
        """An entry that is held here no longer belongs to this consumer, or it is no longer certain that it does."""

    def on_circuit_opened(self, event: BusEvent) -> None:
        """A handler kept failing, and its subscription is paused. ``event.detail`` tells after how many failures, and
        for how long. This is also logged.
        """

    def on_circuit_closed(self, event: BusEvent) -> None:
        """A handling succeeded, and the subscription works as before. This is also logged."""

    def on_group_made_again(self, event: BusEvent) -> None:
        """A lost group was recreated. ``event.detail`` is the position. :meth:`on_error` is told of the loss, too."""

    def on_entries_lost(self, event: BusEvent) -> None:
        """Limits removed ``event.count`` entries of ``event.topic`` that ``event.group`` had not acknowledged. The
        process that removed them is told, whichever groups it has. This is also logged.
        """

    def on_group_stalled(self, event: BusEvent) -> None:
        """``event.group`` does not go on, and so ``event.count`` entries of ``event.topic`` cannot be removed. This is
        also logged.
        """

    def on_topic_grown(self, event: BusEvent) -> None:
        """``event.topic`` has no retention, and has grown to ``event.count`` entries. Told once per topic and bus. This
        is also logged.
        """
