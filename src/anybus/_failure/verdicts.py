"""The exceptions that a handler raises to decide what happens to its message."""

from __future__ import annotations

from .._ground.checks import check_delay, check_text


class Retry(Exception):  # noqa: N818 - a handler's decision, not an error of the library
    """Raised by a handler to have its message handled again later. Counts as a failure (``max_retry``).

    :param reason: kept in the ``retry-reason`` header.
    :param delay: seconds until the next handling; None = the subscription's ``retry_backoff``.
    :raises ValidationError: if the delay is negative or not a number.
    """

    def __init__(self, reason: str = "", *, delay: float | None = None) -> None:
        self.reason = check_text("reason", reason)
        self.delay = None if delay is None else check_delay("delay", delay)
        super().__init__(self.reason or "the handler asked for a retry")


class Reject(Exception):  # noqa: N818 - a handler's decision, not an error of the library
    """Raised by a handler to give up on its message now, even if retries are left. It becomes a dead letter.

    :param reason: kept in the ``dead-letter-reason`` header.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = check_text("reason", reason)
        super().__init__(self.reason or "rejected by the handler")
