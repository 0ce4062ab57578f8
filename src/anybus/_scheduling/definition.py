"""The definition of a recurring schedule, as the application gives it: checked, and compared between processes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timezone, tzinfo
from typing import Any, Final, Literal, Union

import anyio.to_thread

from .._ground.callables import check_any_function
from .._ground.checks import check_choice, check_name, check_number, check_text, check_topic, refuse
from .._ground.errors import UnsupportedError
from .._messages.message import Message, lift_headers
from .ticks import CronTicks, IntervalTicks, Ticks, wall_times

MessageFactory = Callable[[datetime], Union["Message | None", Awaitable["Message | None"]]]
"""Makes the message of a tick, a plain or an async function; None = publish nothing for this tick."""

Missed = Literal["skip", "catch-up"]
MISSED: Final[tuple[Missed, ...]] = ("skip", "catch-up")

SHORTEST: Final = 0.1
LONGEST: Final = 3653 * 86400.0
"""Ten years, in seconds."""

_FACTORY: Final = "an anybus.Message, or a function that takes the tick (a datetime) and returns one"
_EVERY: Final = f"from {SHORTEST} seconds to ten years ({LONGEST:.0f})"
_CRON: Final = "a cron expression with five fields that fires on some day ('30 9 * * MON-FRI')"

_zones: Final[dict[str, tzinfo]] = {"UTC": timezone.utc}
"""Time zones that were read. cronsim was loaded before another one than UTC is in here."""


@dataclass(frozen=True)
class Definition:
    """A schedule, checked.

    :ivar message: what is published at each tick, or the function that makes it.
    :ivar spec: the definition as text, the same in all processes that give the same one.
    """

    name: str
    topic: str
    message: Message | MessageFactory
    ticks: Ticks
    missed: Missed
    spec: str


@dataclass(frozen=True)
class Given:
    """A schedule as it was given. What needs no time zone is checked at once."""

    name: str
    message: Message | MessageFactory
    every: float | None
    cron: str | None
    timezone: str
    missed: Missed
    topic: str | None
    version: str

    def checked(self) -> Given:
        """
        :raises ValidationError: if a value is refused, or contradicts another one.
        """
        name = check_name("name", self.name)
        topic = self._topic()
        every, cron, zone = self.every, self.cron, check_text("timezone", self.timezone)
        if (every is None) == (cron is None):
            refuse("every and cron", (every, cron), "given one without the other")
        if every is not None:
            every = _check_every(every)
            if zone != "UTC":
                refuse("timezone", zone, "unset with every, whose ticks are the same in all time zones")
        if cron is not None:
            cron = " ".join(check_text("cron", cron).upper().split())
            if len(cron.split()) != 5:
                refuse("cron", self.cron, _CRON)
        missed = check_choice("missed", self.missed, MISSED)
        return Given(name, self.message, every, cron, zone, missed, topic, check_text("version", self.version))

    def _topic(self) -> str:
        if isinstance(self.message, Message):
            if self.topic is not None and self.topic != self.message.topic:
                refuse("topic", self.topic, f"unset, or the message's own ({self.message.topic!r})")
            lifted = lift_headers(self.message)
            for field, value in (("idempotency_key", lifted.idempotency_key), ("expires_at", lifted.expires_at)):
                if value:
                    # Of all ticks, only the first would be handled (exactly once), or only those before that time.
                    refuse(
                        f"message.{field}", value, "unset, because it would be the same at each tick (give a function)"
                    )
            return self.message.topic
        check_any_function("message", self.message, _FACTORY)
        if self.topic is None:
            refuse("topic", None, "given with a function, because all messages of a schedule have the same topic")
        return check_topic("topic", self.topic)

    async def load(self) -> Definition:
        """The definition, once its time zone has been read.

        :raises ValidationError: if the zone is unknown, or the cron expression is refused, or never fires.
        :raises UnsupportedError: if cronsim is not installed.
        """
        assert self.topic is not None
        if self.every is not None:
            milliseconds = round(self.every * 1000)
            ticks: Ticks = IntervalTicks(milliseconds)
            spec = f"every {milliseconds} ms"
        else:
            assert self.cron is not None
            zone = await _zone(self.timezone)
            check_fires(self.cron)
            ticks, spec = CronTicks(self.cron, zone), f"cron {self.cron} in {self.timezone}"
        spec = f"{spec}, missed: {self.missed}, version {self.version!r}"
        return Definition(self.name, self.topic, self.message, ticks, self.missed, spec)


def _check_every(value: Any) -> float:
    seconds = check_number("every", value, _EVERY)
    if not math.isfinite(seconds) or not SHORTEST <= seconds <= LONGEST:
        refuse("every", value, _EVERY)
    if abs(seconds * 1000 - round(seconds * 1000)) > 1e-3:
        refuse("every", value, "a whole number of milliseconds")
    return seconds


async def _zone(name: str) -> tzinfo:
    # Files are read only once for each zone. So the event loop need not wait for a thread every time.
    if name != "UTC" and name not in _zones:
        _zones[name] = await anyio.to_thread.run_sync(_read_zone, name)
    else:
        _load_cronsim()
    return _zones[name]


def _load_cronsim() -> None:
    try:
        importlib.import_module("cronsim")  # an extra, and not loaded unless it is used
    except ImportError:
        raise UnsupportedError("cron needs the package cronsim: pip install 'anybus[cron]'") from None


def _read_zone(name: str) -> tzinfo:
    from zoneinfo import ZoneInfo  # noqa: PLC0415 - not loaded unless it is used

    _load_cronsim()
    try:
        return ZoneInfo(name)
    except (LookupError, OSError, ValueError):
        refuse("timezone", name, "the name of a time zone that this machine knows ('Europe/Berlin')")


def check_fires(expression: str) -> None:
    """
    :raises ValidationError: if it is no cron expression, or never fires.
    """
    from cronsim import CronSimError  # noqa: PLC0415 - an extra, and not loaded unless it is used

    try:
        # From a fixed day, so that all processes accept the same. The rarest, 29 February on a given day of the week,
        # comes once in 40 years.
        fires = next(iter(wall_times(expression, datetime(2000, 1, 1))), None) is not None
    except (CronSimError, AssertionError, ValueError) as error:
        refuse("cron", expression, f"{_CRON} ({str(error).lower() or 'bad field'})")
    if not fires:
        refuse("cron", expression, _CRON)
