"""The budget: how many entries a subscription may hold, shared by reads and reclaims (promises 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet

from .entry import Held, Stage

_WORTH_A_READ = 64


class Budget:
    """``max_pending_acks`` places, shared by reads and reclaims.

    A quarter of the places is reserved for reclaims, at least 1, but at most ``max_pending_acks - max_in_flight``.
    Reclaims use other places only while no read waits for room.
    """

    def __init__(self, max_in_flight: int, max_pending_acks: int) -> None:
        self.limit = max_pending_acks
        self.reclaim_part = min(max(max_pending_acks // 4, 1), max_pending_acks - max_in_flight)
        self.read_part = max_pending_acks - self.reclaim_part
        # Half: while it is handled, the other half is acknowledged and read again.
        self.read_at_once = max(_WORTH_A_READ, -(-self.read_part // 2))
        self.by_read = 0
        self.by_reclaim = 0
        self.trial: Trial | None = None
        self.read_waits = False

    @property
    def takes_turns(self) -> bool:
        """Whether no place is reserved (``max_pending_acks`` equals ``max_in_flight``): read and reclaim take turns."""
        return self.reclaim_part == 0

    def use(self, count: int, *, by_reclaim: bool) -> None:
        """Occupy so many places. A negative count frees them."""
        if by_reclaim:
            self.by_reclaim += count
        else:
            self.by_read += count

    def let_reads_wait(self, waits: bool) -> None:
        """Tell whether a read waits for room. While it does, reclaims use only the reserved places."""
        self.read_waits = waits

    def set_trial(self, trial: Trial | None) -> None:
        self.trial = trial

    def read_room(self) -> int:
        room = min(self.read_part - self.by_read, self.limit - self.by_read - self.by_reclaim)
        return room if self.trial is None else min(room, self._trial_room(self.trial, by_reclaim=False))

    def reclaim_room(self) -> int:
        free = self.limit - self.by_read - self.by_reclaim
        if self.trial is not None:
            return min(free, self._trial_room(self.trial, by_reclaim=True))
        if self.takes_turns or not self.read_waits:
            return free
        return min(free, self.reclaim_part - self.by_reclaim)

    def _trial_room(self, trial: Trial, *, by_reclaim: bool) -> int:
        """The room during a trial: for one entry of each side, or for one in all if they take turns."""
        apart = trial.apart()
        if self.takes_turns:
            return 1 - (self.by_read + self.by_reclaim - len(apart))
        return 1 - ((self.by_reclaim if by_reclaim else self.by_read) - apart.count(by_reclaim))


class Trial:
    """The limits while a circuit is on trial: one handling begins at a time, and few entries are taken.

    At most one entry is read and one reclaimed in advance, so that neither side starves. Entries that were held before
    the trial do not count, and settling them makes no room.

    :param held: returns the entries that are held now.
    :param look_again: called when the next handling may begin.
    """

    def __init__(self, held: Callable[[], list[Held]], look_again: Callable[[], None]) -> None:
        self._held = held
        self._older = frozenset(held())
        self._begun: Held | None = None
        self.look_again = look_again

    def may_begin(self, running: AbstractSet[Held]) -> bool:
        """Whether the next handling may begin: the handler of the last one has ended, and its entry is settled."""
        begun = self._begun
        return begun is None or (begun.stage is Stage.GONE and begun not in running)

    def begins(self, held: Held) -> None:
        self._begun = held

    def apart(self) -> list[bool]:
        """For each entry that does not count (held before the trial, or parked): whether it was reclaimed."""
        return [held.by_reclaim for held in self._held() if held in self._older or held.stage is Stage.PARKED]
