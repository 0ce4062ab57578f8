"""The ticks of a recurring schedule: a pure function of its definition (docs/recurring.md).

- The ticks of ``every`` are the multiples of the interval since the epoch.
- Those of ``cron`` are what the clock on the wall shows, in the schedule's time zone. On the day of a change: a schedule
  at fixed times fires once for what is skipped, in the moment of the change, and once for what exists twice, at the
  first. A schedule that repeats within the day follows the wall: nothing for what is skipped, twice for what exists
  twice.
- From wherever one starts to look, the ticks are the same.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anybus._scheduling.ticks import CronTicks, IntervalTicks, Ticks


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


def between(ticks: Ticks, start: datetime, end: datetime) -> list[datetime]:
    found: list[datetime] = []
    tick = ticks.after(start)
    while tick is not None and tick <= end:
        found.append(tick)
        tick = ticks.after(tick)
    return found


def on(day: str, expression: str, zone: str) -> list[str]:
    """The ticks of a day in that zone, as its clock on the wall shows them, with the offset."""
    start = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone))
    end = (datetime.fromisoformat(day) + timedelta(days=1)).replace(tzinfo=ZoneInfo(zone))
    ticks = CronTicks(expression, ZoneInfo(zone))
    second = timedelta(seconds=1)
    found = between(ticks, start.astimezone(timezone.utc) - second, end.astimezone(timezone.utc) - second)
    return [tick.astimezone(ZoneInfo(zone)).strftime("%H:%M%z") for tick in found]


# --- every


def test_ticks_of_an_interval_are_its_multiples_since_the_epoch() -> None:
    ticks = IntervalTicks(250)
    assert ticks.after(utc("2026-01-01T00:00:00.000")) == utc("2026-01-01T00:00:00.250")
    assert ticks.after(utc("2026-01-01T00:00:00.249999")) == utc("2026-01-01T00:00:00.250")
    assert IntervalTicks(86_400_000).after(utc("2026-01-01T10:00:00")) == utc("2026-01-02T00:00:00")
    assert IntervalTicks(1000).latest(utc("2026-01-01T00:00:00"), utc("2026-01-01T00:00:07.9")) == utc(
        "2026-01-01T00:00:07"
    )
    assert IntervalTicks(1000).latest(utc("2026-01-01T00:00:07"), utc("2026-01-01T00:00:07.9")) is None


# --- the days on which a clock changes


@pytest.mark.parametrize(
    ("day", "zone", "expression", "expected"),
    [
        # Berlin, spring: 02:00+01 to 03:00+02.
        ("2026-03-29", "Europe/Berlin", "30 2 * * *", ["03:00+0200"]),
        ("2026-03-29", "Europe/Berlin", "0 2 * * *", ["03:00+0200"]),
        ("2026-03-29", "Europe/Berlin", "15,45 2 * * *", ["03:00+0200"]),
        ("2026-03-29", "Europe/Berlin", "30 1,2,3 * * *", ["01:30+0100", "03:00+0200", "03:30+0200"]),
        ("2026-03-29", "Europe/Berlin", "0 2,3 * * *", ["03:00+0200"]),
        ("2026-03-29", "Europe/Berlin", "*/30 1-3 * * *", ["01:00+0100", "01:30+0100", "03:00+0200", "03:30+0200"]),
        ("2026-03-29", "Europe/Berlin", "*/30 2 * * *", []),
        ("2026-03-29", "Europe/Berlin", "0 4 * * *", ["04:00+0200"]),
        # Berlin, autumn: 03:00+02 to 02:00+01.
        ("2026-10-25", "Europe/Berlin", "30 2 * * *", ["02:30+0200"]),
        ("2026-10-25", "Europe/Berlin", "0 2,3 * * *", ["02:00+0200", "03:00+0100"]),
        ("2026-10-25", "Europe/Berlin", "*/30 2 * * *", ["02:00+0200", "02:30+0200", "02:00+0100", "02:30+0100"]),
        # New York, spring: 02:00-05 to 03:00-04; autumn: 02:00-04 to 01:00-05.
        ("2026-03-08", "America/New_York", "30 2 * * *", ["03:00-0400"]),
        ("2026-03-08", "America/New_York", "*/30 2 * * *", []),
        ("2026-11-01", "America/New_York", "30 1 * * *", ["01:30-0400"]),
        ("2026-11-01", "America/New_York", "0 0,1,2 * * *", ["00:00-0400", "01:00-0400", "02:00-0500"]),
        ("2026-11-01", "America/New_York", "*/30 1 * * *", ["01:00-0400", "01:30-0400", "01:00-0500", "01:30-0500"]),
        # Lord Howe, by half an hour: spring: 02:00+1030 to 02:30+11; autumn: 02:00+11 to 01:30+1030.
        ("2026-10-04", "Australia/Lord_Howe", "15 2 * * *", ["02:30+1100"]),
        ("2026-10-04", "Australia/Lord_Howe", "45 2 * * *", ["02:45+1100"]),
        ("2026-10-04", "Australia/Lord_Howe", "*/10 2 * * *", ["02:30+1100", "02:40+1100", "02:50+1100"]),
        ("2026-10-04", "Australia/Lord_Howe", "*/20 5 * * *", ["05:00+1100", "05:20+1100", "05:40+1100"]),
        ("2026-04-05", "Australia/Lord_Howe", "45 1 * * *", ["01:45+1100"]),
        ("2026-04-05", "Australia/Lord_Howe", "*/15 1 * * *",
         ["01:00+1100", "01:15+1100", "01:30+1100", "01:45+1100", "01:30+1030", "01:45+1030"]),
        ("2026-04-05", "Australia/Lord_Howe", "*/30 2 * * *", ["02:00+1030", "02:30+1030"]),
        # Havana, at midnight: 01:00 to 00:00 in autumn, 00:00 to 01:00 in spring.
        ("2026-11-01", "America/Havana", "30 0 * * *", ["00:30-0400"]),
        ("2026-11-01", "America/Havana", "*/30 0 * * *", ["00:00-0400", "00:30-0400", "00:00-0500", "00:30-0500"]),
        ("2026-03-08", "America/Havana", "30 0 * * *", ["01:00-0400"]),
    ],
)  # fmt: skip
def test_a_day_on_which_the_clock_changes(day: str, zone: str, expression: str, expected: list[str]) -> None:
    assert on(day, expression, zone) == expected


def test_every_hour_comes_in_every_hour_of_the_day() -> None:
    for day, zone, hours in (
        ("2026-03-29", "Europe/Berlin", 23),
        ("2026-10-25", "Europe/Berlin", 25),
        ("2026-07-01", "Europe/Berlin", 24),
        ("2026-11-01", "America/New_York", 25),
    ):
        assert len(on(day, "0 * * * *", zone)) == hours
        assert len(on(day, "*/15 * * * *", zone)) == 4 * hours


# --- pure


EXPRESSIONS = ["30 2 * * *", "0 2,3 * * *", "*/20 2 * * *", "10 */2 * * *", "*/7 1-3 * * SUN", "0 * * * *", "5 0 1 * *"]
ZONES = ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Havana", "UTC", "Asia/Kathmandu"]
STARTS = [utc(f"2026-{day}T00:00:00") for day in ("03-28", "03-07", "10-24", "10-31", "10-03", "04-04", "06-30")]


@given(
    expression=st.sampled_from(EXPRESSIONS),
    zone=st.sampled_from(ZONES),
    start=st.sampled_from(STARTS),
    offset=st.integers(0, 3 * 86_400_000),
)
def test_from_wherever_one_starts_the_ticks_are_the_same(
    expression: str, zone: str, start: datetime, offset: int
) -> None:
    ticks = CronTicks(expression, ZoneInfo(zone))
    end = start + timedelta(days=3)
    whole = between(ticks, start, end)
    assert whole == sorted(set(whole))
    middle = start + timedelta(milliseconds=offset)
    assert between(ticks, middle, end) == [tick for tick in whole if tick > middle]
    earlier = [tick for tick in whole if tick <= middle]
    assert ticks.latest(start, middle) == (earlier[-1] if earlier else None)


def test_the_latest_tick_of_a_long_time_is_found_without_walking_through_all() -> None:
    every_minute = CronTicks("* * * * *", timezone.utc)
    assert every_minute.latest(utc("1990-01-01T00:00:00"), utc("2026-01-01T10:00:30")) == utc("2026-01-01T10:00:00")
    leap_day = CronTicks("0 12 29 2 *", ZoneInfo("Europe/Berlin"))
    assert leap_day.latest(utc("2001-01-01T00:00:00"), utc("2027-01-01T00:00:00")) == utc("2024-02-29T11:00:00")
    assert leap_day.latest(utc("2024-03-01T00:00:00"), utc("2027-01-01T00:00:00")) is None
