"""This process's wall clock, which a test can put forward."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone


class WallClock:
    """Takes the place of ``datetime`` in the one module of the library that reads the wall clock."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def now(self, tz: timezone = timezone.utc) -> datetime:
        return datetime.now(tz) + self.ahead

    def put_forward(self, hours: float = 2) -> None:
        self.ahead += timedelta(hours=hours)
