"""Checks every change of an entry's stage, in every test, against the table of transitions."""

from __future__ import annotations

from typing import Any

from anybus._runtime.entry import TRANSITIONS, Held, Stage

changes: set[tuple[Stage, Stage]] = set()
"""All that have been seen since the tests of this process began."""

refused: list[str] = []
"""Changes that the table does not know. Whoever reads them clears them."""


def watch() -> None:
    stored: Any = Held.__dict__["stage"]

    def change(held: Held, stage: Stage) -> None:
        before = stored.__get__(held, Held)
        changes.add((before, stage))
        if stage not in TRANSITIONS[before]:
            refused.append(f"{before.name} -> {stage.name} of entry {held.id}")
        stored.__set__(held, stage)

    Held.stage = property(stored.__get__, change)  # type: ignore[assignment]
