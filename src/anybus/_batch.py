"""What a publish of many messages comes to."""

from __future__ import annotations

from dataclasses import dataclass

from ._ground.errors import BackendError, EventBusError, can_pass


@dataclass(frozen=True)
class BatchOutcome:
    """What became of a batch.

    :ivar results: one per message, in order: the entry's id, or the error.
    """

    results: tuple[str | EventBusError, ...]

    @property
    def all_ok(self) -> bool:
        return not self.errors

    @property
    def ok_count(self) -> int:
        return len(self.results) - len(self.errors)

    @property
    def errors(self) -> tuple[EventBusError, ...]:
        return tuple(result for result in self.results if isinstance(result, EventBusError))

    def raise_for_errors(self) -> None:
        """
        :raises EventBusError: the only error, or the first of several with their number in a note of its text.
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
