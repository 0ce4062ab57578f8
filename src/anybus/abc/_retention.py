"""How long a topic keeps its entries: the policies, and what a backend needs to apply them."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Union

from .._ground.checks import check_delay, check_int, refuse
from .._ground.errors import EventBusError, ValidationError

LONGEST_AGE: Final = 10 * 366 * 24 * 3600.0
MOST_ENTRIES: Final = 2**53

RETENTION: Final = "an anybus.Limits, anybus.Interest or anybus.WorkQueue"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Keep the newest entries. Older ones are removed, whether or not every group has acknowledged them.

    If a group had not acknowledged a removed entry, this is a loss: it is counted and reported.

    :param length: how many entries the topic keeps; None = any number.
    :param age: for how many seconds an entry is kept, by the server's clock; None = for any time.
    :raises ValidationError: if a value is refused, or neither is given.
    """

    length: int | None = None
    age: float | None = None

    def __post_init__(self) -> None:
        if self.length is None and self.age is None:
            raise ValidationError("Limits needs a length or an age: without either it would remove nothing")
        if self.length is not None:
            length = check_int("length", self.length, least=1)
            if length > MOST_ENTRIES:
                refuse("length", self.length, f"at most {MOST_ENTRIES}")
            object.__setattr__(self, "length", length)
        if self.age is not None:
            age = check_delay("age", self.age, positive=True)
            if not 0.001 <= age <= LONGEST_AGE:
                refuse("age", self.age, "a number of seconds from 0.001 to 10 years")
            object.__setattr__(self, "age", round(age * 1000) / 1000)

    def __repr__(self) -> str:
        parts = [f"length={self.length}"] if self.length is not None else []
        parts += [f"age={self.age:g}"] if self.age is not None else []
        return f"Limits({', '.join(parts)})"


@dataclass(frozen=True)
class Interest:
    """Remove an entry when every group of the topic has acknowledged it. Without a group, nothing is removed."""


@dataclass(frozen=True)
class WorkQueue:
    """Remove an entry when the topic's only group has acknowledged it. A second group is refused."""


Retention = Union[Limits, Interest, WorkQueue]

DeclareMode = Literal["declare", "change", "default"]


def check_retention(field: str, value: Any) -> Retention:
    if isinstance(value, type) or not isinstance(value, (Limits, Interest, WorkQueue)):
        refuse(field, value, RETENTION)
    return value


@dataclass(frozen=True)
class Trimmed:
    """What one step of trimming found and did.

    :ivar retention: the topic's retention; None = none is declared, and nothing was removed.
    :ivar length: how many entries the topic has now.
    :ivar removed: how many were removed.
    :ivar more: true if entries are left that can be removed.
    :ivar busy: true if another process trims this topic just now. Nothing was done.
    :ivar groups: how many groups the topic has.
    :ivar holder: the group because of which the first entry is kept; None = there is none.
    :ivar position: the first id that the holder may not have acknowledged.
    :ivar lost: for each group, how many of the removed entries it had not acknowledged.
    :ivar lost_in_all: for each group, the sum since the retention was declared, by all processes.
    """

    retention: Retention | None
    length: int
    removed: int = 0
    more: bool = False
    busy: bool = False
    groups: int = 0
    holder: str | None = None
    position: str | None = None
    lost: Mapping[str, int] = field(default_factory=dict[str, int])
    lost_in_all: Mapping[str, int] = field(default_factory=dict[str, int])


class RetentionKeeper(abc.ABC):
    """What a backend with the feature ``trim`` offers beside :class:`StreamBackend`: it keeps a topic's retention.

    The retention is stored with the topic. It stays if the topic is deleted.
    """

    @abc.abstractmethod
    async def declare_retention(self, stream: str, retention: Retention, mode: DeclareMode) -> Retention:
        """Store a topic's retention, unless another one is declared. Atomic.

        :param mode: ``declare`` replaces a default only, ``change`` replaces anything. ``default`` stores it if there
            is none, and as a default.
        :return: the retention that is stored now. If it is another one, nothing was stored.
        :raises ValidationError: if it is a :class:`WorkQueue`, and the topic has several groups. Nothing was stored.
        """

    @abc.abstractmethod
    async def admit_group(self, stream: str, group: str, *, made: bool) -> str | None:
        """Called when a subscription starts, after its group exists. Atomic.

        :param made: true if the group was created just now. If it is refused, it is deleted.
        :return: the name of another group if the topic is a :class:`WorkQueue` that belongs to that group; otherwise
            None.
        """

    @abc.abstractmethod
    async def trim(self, streams: Sequence[str], *, trimmer: str) -> list[Trimmed | EventBusError]:
        """One step of trimming, for some streams. A step blocks the server for a few milliseconds at most.

        Entries that a group has not acknowledged are removed by :class:`Limits` only. By the other policies, nothing
        is removed from a stream without a group. A group that has vanished a short time ago still counts if its floor
        is known, because it may be recreated there.

        :param trimmer: who trims. While a trimmer has something to remove from a stream, others leave it alone.
        :return: one result per stream, in order.
        """
