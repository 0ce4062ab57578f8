"""How long to wait between tries."""

from __future__ import annotations

from dataclasses import dataclass

from .._ground.checks import check_delay, refuse


@dataclass(frozen=True, kw_only=True)
class ExponentialBackoff:
    """A delay that grows by a factor with every failure up to a cap, spread by full jitter.

    Full jitter draws the delay evenly between zero and the bound, which keeps a crowd that failed together from
    coming back together (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    :param initial: seconds, the bound after the first failure.
    :param factor: by what the bound grows each time, at least 1.
    :param maximum: seconds, the cap.
    :param jitter: False waits exactly the bound.
    :raises ValidationError: if a value is refused.
    """

    initial: float = 1.0
    factor: float = 2.0
    maximum: float = 60.0
    jitter: bool = True

    def __post_init__(self) -> None:
        for name in ("initial", "maximum", "factor"):
            object.__setattr__(self, name, check_delay(name, getattr(self, name)))
        if not isinstance(self.jitter, bool):
            refuse("jitter", self.jitter, "a bool")
        if not 1 <= self.factor <= 1e6:
            refuse("factor", self.factor, "a number from 1 to 1,000,000")
        if self.maximum < self.initial:
            refuse("maximum", self.maximum, f"at least initial ({self.initial})")

    def delay(self, failures: int, draw: float) -> float:
        """Seconds to wait after so many failures (from 1).

        :param draw: a random number from [0, 1), given by the caller so that this stays a pure function.
        """
        # The exponent is bounded: beyond this the cap has long been reached, and a float would overflow.
        bound = min(self.maximum, self.initial * self.factor ** min(failures - 1, 50))
        return bound * draw if self.jitter else bound


@dataclass(frozen=True)
class DelayList:
    """Delays in seconds, one after the other; the last one repeats."""

    delays: tuple[float, ...]

    def delay(self, failures: int, draw: float) -> float:
        """As :meth:`ExponentialBackoff.delay`; nothing is drawn here."""
        return self.delays[min(failures, len(self.delays)) - 1]


RECOVERY = ExponentialBackoff(initial=0.1, maximum=5.0)
"""Between tries against a backend that fails with what can pass."""


def recovery_delay(failures: int, draw: float) -> float:
    """Half of the delay is fixed, half is drawn: never a busy loop, never a herd."""
    return RECOVERY.delay(failures, 0.5 + draw / 2)
