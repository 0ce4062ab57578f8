"""The outcome of publishing a batch."""

from __future__ import annotations

from dataclasses import dataclass

from .._ground.errors import BackendError, EventBusError, can_pass
from ..abc import Duplicate


@dataclass(frozen=True)
class BatchOutcome:
    """What happened to the messages of a batch.

    :ivar results: one per message, in order: the entry's id (a :class:`Duplicate` if the message had been published
        before), or the error.
    """

    results: tuple[str | EventBusError, ...]

    @property
    def all_ok(self) -> bool:
        """Whether every message was published, now or before."""
        return not self.errors

    @property
    def ok_count(self) -> int:
        """How many messages were published, now or before."""
        return len(self.results) - len(self.errors)

    @property
    def duplicates(self) -> tuple[Duplicate, ...]:
        """The results of the messages that had been published before, in order."""
        return tuple(result for result in self.results if isinstance(result, Duplicate))

    @property
    def errors(self) -> tuple[EventBusError, ...]:
        """The errors among the results, in order."""
        return tuple(result for result in self.results if isinstance(result, EventBusError))

    def raise_for_errors(self) -> None:
        """Raise if any message was not published.

        :raises EventBusError: the error, if there is only one.
        :raises BackendError: if there are several. Its text has their number and the first error, which is also its
            cause. It is transient if all of them are, and ``may_have_happened`` is true if it is for any of them.
        """
        errors = self.errors
        if not errors:
            return
        if len(errors) == 1:
            raise errors[0]
        may_have_happened = any(isinstance(error, BackendError) and error.may_have_happened for error in errors)
        text = f"{len(errors)} of {len(self.results)} messages were not published; the first error: {errors[0]}"
        passing = all(can_pass(error) for error in errors)
        raise BackendError(text, may_have_happened=may_have_happened, can_pass=passing) from errors[0]
