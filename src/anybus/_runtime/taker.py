"""Takes entries that are ready to start: what the handlers' pool and the pull stream have in common."""

from __future__ import annotations

import abc
import contextlib
from collections import deque

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from .context import Context
from .entry import Held, Stage
from .settler import Settler

_WAITING, _OPEN = Stage.WAITING, Stage.OPEN  # read for every message


class Taker(abc.ABC):
    """Receives batches, and takes entries from them one by one.

    :param ready: the channel of entries that may start.
    :param again: its sending end: an empty batch wakes a receiver that waits.
    """

    def __init__(
        self,
        context: Context,
        settler: Settler,
        ready: MemoryObjectReceiveStream[list[Held]],
        again: MemoryObjectSendStream[list[Held]],
    ) -> None:
        self._context = context
        self._ledger = context.ledger
        self._budget = context.ledger.budget
        self._settler = settler
        self._clock = context.clock
        self._ages = context.failure_policy.max_age is not None
        self._ready = ready
        self._again = again
        self._idle = 0
        self._called = False  # somebody was woken for the backlog, and has not come yet
        self._backlog: deque[Held] = deque()
        self._stopping = anyio.Event()
        self._stopped = False
        self.scope = anyio.CancelScope(shield=True)
        self.ended = anyio.Event()

    @property
    @abc.abstractmethod
    def running(self) -> set[Held]:
        """The entries that are in flight."""

    def next_entry(self) -> Held | None:
        """The next entry that may start. This checks its lease, since a process can be frozen at any moment."""
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
            if (self._ages or held.message.expires_at is not None) and self._settler.expire(held):
                continue  # it has become too old while it waited here
            held.stage = _OPEN
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
                backlog += batch
                if not batch:
                    self._called = False  # that was the call, and nobody else will hear it
        except (anyio.WouldBlock, anyio.EndOfStream):
            self._ledger.none_wait()

    async def _receive(self) -> bool:
        """Wait for a batch. False: there are no more."""
        self._idle += 1
        try:
            batch = await self._ready.receive()
        except anyio.EndOfStream:
            return False
        except BaseException:
            self._look_up_waiting()
            raise
        finally:
            self._idle -= 1
        self._backlog += batch
        return True

    def _look_up_waiting(self) -> None:
        """A cancelled receive can lose a batch, but the ledger knows which entries wait."""
        self._backlog.clear()
        self._backlog += self._ledger.waiting()

    def _wake_one(self) -> None:
        """Make a receiver that waits for a batch look at the backlog."""
        with contextlib.suppress(anyio.WouldBlock, anyio.ClosedResourceError):  # full: nobody waits
            self._again.send_nowait([])

    def stop(self) -> None:
        """Take nothing more."""
        self._stopped = True
        self._stopping.set()
        self._again.close()

    def close(self) -> None:
        self._ready.close()

    @abc.abstractmethod
    async def run(self) -> None:
        """Run until it is stopped and nothing is in flight."""

    def in_flight(self) -> int:
        return len(self.running)

    def oldest(self) -> float | None:
        """For how many seconds the oldest entry has been in flight."""
        started = [held.started_at for held in self.running]
        return self._clock() - min(started) if started else None
