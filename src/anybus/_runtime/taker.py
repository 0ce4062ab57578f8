"""Takes what is ready to start: what the handlers' pool and the pull stream have in common."""

from __future__ import annotations

import abc
from collections import deque

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream

from .context import Context
from .entry import Held, Stage
from .settler import Settler

_WAITING, _OPEN = Stage.WAITING, Stage.OPEN  # read for every message


class Taker(abc.ABC):
    """Receives batches, and takes entries from them one by one."""

    def __init__(self, context: Context, settler: Settler, ready: MemoryObjectReceiveStream[list[Held]]) -> None:
        self._context = context
        self._ledger = context.ledger
        self._budget = context.ledger.budget
        self._settler = settler
        self._clock = context.clock
        self._ready = ready
        self._backlog: deque[Held] = deque()
        self._stopping = anyio.Event()
        self._stopped = False
        self.scope = anyio.CancelScope(shield=True)
        self.ended = anyio.Event()
        self.running: set[Held] = set()

    def next_entry(self) -> Held | None:
        """The next entry that may start; its lease is looked at, since a process can be frozen at any moment."""
        backlog = self._backlog
        trial = self._budget.trial
        while backlog and not self._stopped:
            if trial is not None and not trial.may_begin(self.running):
                return None
            held = backlog.popleft()
            if not backlog or backlog[0].stage is not _WAITING:
                self._receive_ready()
            if held.stage is not _WAITING:
                continue
            held.started_at = now = self._clock()
            if now >= held.lease_until:
                self._settler.give_back(held)
                continue
            held.stage = _OPEN
            self.running.add(held)
            if trial is not None:
                trial.begins(held)
            return held
        return None

    def _receive_ready(self) -> None:
        backlog = self._backlog
        while backlog and backlog[0].stage is not _WAITING:
            backlog.popleft()
        try:
            while not backlog:
                batch = self._ready.receive_nowait()
                if not batch:
                    self._took_a_call()
                backlog += batch
        except (anyio.WouldBlock, anyio.EndOfStream):
            self._ledger.none_wait()

    @abc.abstractmethod
    def _took_a_call(self) -> None:
        """An empty batch was taken out by somebody who is busy, before whoever it called could receive it."""

    def _look_up_waiting(self) -> None:
        """A receive was cancelled, which can lose a batch: the ledger knows what waits."""
        self._backlog.clear()
        self._backlog += self._ledger.waiting()

    def stop(self) -> None:
        """Take nothing more."""
        self._stopped = True
        self._stopping.set()

    def close(self) -> None:
        self._ready.close()

    @abc.abstractmethod
    async def run(self) -> None:
        """Until stopped, and nothing is in flight."""

    def in_flight(self) -> int:
        return len(self.running)

    def oldest(self) -> float | None:
        """For how many seconds the oldest entry has been in flight."""
        started = [held.started_at for held in self.running]
        return self._clock() - min(started) if started else None
