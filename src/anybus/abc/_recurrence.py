"""What a backend needs for recurring publishing: a lease and a fence for each schedule."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from .._messages.message import Message

TickStatus = Literal["published", "known", "early", "missed", "not-owner"]


@dataclass(frozen=True)
class TickClaim:
    """A schedule as the backend keeps it, after one process has asked for it.

    :ivar is_owner: whether the process that asked has the lease.
    :ivar generation: the number of the definition that is in force. A higher one is a later one.
    :ivar last_tick: ticks until here are published or will never be.
    :ivar lease_end: when the lease of the owner ends.
    :ivar now: the time by the backend's clock. All times are UTC.
    """

    is_owner: bool
    generation: int
    last_tick: datetime
    lease_end: datetime
    now: datetime


@dataclass(frozen=True)
class TickResult:
    """What became of one tick.

    :ivar status: ``published`` (or only recorded, if there was no message); ``known`` = this tick or a later one was
        published before; ``early`` = it has not come yet by the backend's clock; ``missed`` = it came longer ago than
        the grace period; ``not-owner`` = the lease or the generation is another's. Only ``published`` and ``missed``
        have changed what is kept.
    :ivar last_tick: as in :class:`TickClaim`.
    :ivar now: the time by the backend's clock.
    :ivar entry_id: the id of the entry that was appended.
    """

    status: TickStatus
    last_tick: datetime
    now: datetime
    entry_id: str | None = None


class TickStore(abc.ABC):
    """What a backend may offer beside :class:`StreamBackend`, for :meth:`anybus.StreamBus.schedule`.

    For each schedule of a stream it keeps a definition with a generation, the last tick, and the owner with the end of
    its lease. Times have milliseconds, and are those of the backend's clock. Every method is atomic.
    """

    @abc.abstractmethod
    async def claim_schedule(
        self,
        stream: str,
        name: str,
        owner: str,
        *,
        definition: str,
        generation: int | None,
        lease: float,
        grace: float,
    ) -> TickClaim:
        """Ask for the lease, or renew it. It is granted if nobody has it.

        A schedule that is not kept begins now. Another definition than the kept one takes over if ``generation`` is
        None: the generation counts up, the lease is free, and ticks older than ``grace`` will not be published.

        :param owner: identifies the process that asks.
        :param definition: its definition.
        :param generation: the generation of its definition; None = it enters, and does not know yet. If the kept
            generation is higher, nothing is changed. If it is lower, what was kept was lost: this definition is kept
            again.
        :param lease: seconds.
        :param grace: seconds.
        """

    @abc.abstractmethod
    async def publish_tick(
        self,
        stream: str,
        name: str,
        owner: str,
        message: Message | None,
        *,
        generation: int,
        tick: datetime,
        lease: float,
        grace: float | None,
    ) -> TickResult:
        """Append the message of a tick, record the tick and renew the lease, all in one step.

        Nothing is appended unless the lease and the generation are still the owner's (the lease may be over, if nobody
        else has it), and the tick has come, and is later than the last tick.

        :param message: None = the tick is only recorded.
        :param grace: after how many seconds a tick is missed: it is recorded and not appended; None = never.
        """

    @abc.abstractmethod
    async def leave_schedule(self, stream: str, name: str, owner: str) -> None:
        """Give the lease up, if it is the owner's."""
