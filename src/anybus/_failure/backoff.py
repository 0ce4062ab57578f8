"""How long to wait between tries."""

from __future__ import annotations

from dataclasses import dataclass

from .._ground.checks import check_delay, refuse


@dataclass(frozen=True, kw_only=True)
class ExponentialBackoff:
    """A delay with full jitter, whose upper bound grows by a factor with every failure, up to a cap.

    Full jitter draws the delay evenly between zero and the bound. So messages that failed together are not all retried
    together (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    :param initial: the bound after the first failure, in seconds.
    :param factor: the factor by which the bound grows with each failure, from 1 to 1,000,000.
    :param maximum: the cap, in seconds, at least ``initial``.
    :param jitter: False = always wait for the whole bound.
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
        """Seconds to wait after this many failures (from 1).

        :param draw: a random number from [0, 1). The caller draws it, so that this stays a pure function.
        """
        # The exponent is bounded, because a float would overflow. The cap is reached long before.
        bound = min(self.maximum, self.initial * self.factor ** min(failures - 1, 50))
        return bound * draw if self.jitter else bound


@dataclass(frozen=True)
class DelayList:
    """A delay in seconds for each failure, one after the other. The last one repeats."""

    delays: tuple[float, ...]

    def delay(self, failures: int, draw: float) -> float:
        """Like :meth:`ExponentialBackoff.delay`; ``draw`` is not used."""
        return self.delays[min(failures, len(self.delays)) - 1]


RECOVERY = ExponentialBackoff(initial=0.1, maximum=5.0)
"""The backoff between tries after a transient error of the backend."""


def recovery_delay(failures: int, draw: float) -> float:
    """Half of the delay is fixed, which prevents a busy loop. The other half is random, which spreads the clients."""
    return RECOVERY.delay(failures, 0.5 + draw / 2)
