"""The ticks of a schedule: a pure function of its definition, so all processes agree on them. Times are UTC."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Final

EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MILLISECOND: Final = timedelta(milliseconds=1)
_SECOND: Final = timedelta(seconds=1)
_DAY: Final = timedelta(days=1)
_WINDOWS: Final = tuple(timedelta(minutes=minutes) for minutes in (1, 60, 1440, 44_640, 527_040))


class Ticks(abc.ABC):
    """The times at which a schedule publishes."""

    @abc.abstractmethod
    def after(self, time: datetime) -> datetime | None:
        """The first tick that is later than this time; None = there will be none."""

    @abc.abstractmethod
    def latest(self, after: datetime, until: datetime) -> datetime | None:
        """The last tick that is later than ``after`` and not later than ``until``; None = there is none."""


class IntervalTicks(Ticks):
    """Ticks at the multiples of an interval since the epoch.

    :param milliseconds: the interval.
    """

    def __init__(self, milliseconds: int) -> None:
        self._interval = milliseconds

    def _at(self, number: int) -> datetime:
        return EPOCH + number * self._interval * _MILLISECOND

    def _number(self, time: datetime) -> int:
        return (time - EPOCH) // _MILLISECOND // self._interval

    def after(self, time: datetime) -> datetime | None:
        return self._at(self._number(time) + 1)

    def latest(self, after: datetime, until: datetime) -> datetime | None:
        tick = self._at(self._number(until))
        return tick if tick > after else None


class CronTicks(Ticks):
    """Ticks by a cron expression in a time zone.

    ``cronsim`` finds the wall times that match. What they mean on a day on which the clock changes is decided here, by
    the rule of Debian's cron. If neither minute nor hour begins with ``*``, the schedule has fixed times: one that is
    skipped by the clock comes in the moment of the change, and one that exists twice comes at the first. All other
    schedules follow the clock on the wall: what is skipped does not come, and what exists twice comes twice.

    :param expression: five fields, checked.
    """

    def __init__(self, expression: str, zone: tzinfo) -> None:
        self._expression = expression
        self._zone = zone
        minute, hour, *_ = expression.split()
        self._has_fixed_times = not (minute.startswith("*") or hour.startswith("*"))

    def after(self, time: datetime) -> datetime | None:
        return self._after_at_fixed_times(time) if self._has_fixed_times else self._after_on_the_wall(time)

    def latest(self, after: datetime, until: datetime) -> datetime | None:
        # Windows that grow, so that a schedule with many ticks is not walked through from `after` on.
        for window in (*_WINDOWS, until - after):
            found = None
            tick = self.after(max(after, until - window))
            while tick is not None and tick <= until:
                found, tick = tick, self.after(tick)
            if found is not None or until - window <= after:
                return found
        return None

    def _after_at_fixed_times(self, time: datetime) -> datetime | None:
        for wall in wall_times(self._expression, self._wall(time)):
            tick = self._first_moment(wall)
            if tick > time:
                return tick
        return None

    def _first_moment(self, wall: datetime) -> datetime:
        moment = wall.replace(tzinfo=self._zone).astimezone(timezone.utc)
        if self._wall(moment) == wall:
            return moment
        # The clock skips this wall time. With the offset that comes later, it lies before the change.
        earlier = wall.replace(tzinfo=self._zone, fold=1).astimezone(timezone.utc)
        return self._first_change(earlier, moment) or moment

    def _after_on_the_wall(self, time: datetime) -> datetime | None:
        start = self._wall(time)
        while True:
            # Until the clock changes, wall times and moments differ by a fixed offset.
            offset = self._offset(time)
            wall = next(wall_times(self._expression, start), None)
            if wall is None:
                return None
            tick = (wall - offset).replace(tzinfo=timezone.utc)
            change = self._first_change(time, tick)
            if change is None:
                return tick
            time, start = change, self._wall(change) - _SECOND  # the moment of the change counts

    def _wall(self, time: datetime) -> datetime:
        return time.astimezone(self._zone).replace(tzinfo=None, fold=0)

    def _offset(self, time: datetime) -> timedelta:
        return time.astimezone(self._zone).utcoffset() or timedelta()

    def _first_change(self, after: datetime, until: datetime) -> datetime | None:
        """The first moment with another offset than ``after``, to the second; None = there is none."""
        if self._zone is timezone.utc:
            return None
        low, offset = after.replace(microsecond=0), self._offset(after)
        while low < until:
            high = min(low + _DAY, until)
            if self._offset(high) != offset:
                while high - low > _SECOND:
                    middle = low + (high - low) // _SECOND // 2 * _SECOND
                    low, high = (middle, high) if self._offset(middle) == offset else (low, middle)
                return high
            low = high
        return None


def wall_times(expression: str, after: datetime) -> Iterator[datetime]:
    """The wall times after this one that match a cron expression. They end if none comes within 50 years.

    :raises CronSimError: if the expression is refused.
    """
    from cronsim import CronSim  # noqa: PLC0415 - an extra, and not loaded unless it is used

    return CronSim(expression, after)
