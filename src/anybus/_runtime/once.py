"""Exactly-once effects on the way to the server: what each settlement does to the key of its message.

If the store is the backend's own, completion and acknowledgement are one step. Otherwise a key is completed before its
entry is acknowledged: a crash in between redelivers the entry, which is then acknowledged unhandled. Messages that are
published with the acknowledgement are the exception. There the key is completed afterwards, because a crash in between
must not lose them. A claim is given up before the retry or the dead letter is stored: its handling has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio

from .._failure.copies import original_id
from .._failure.settlement import Result
from .._ground.cancellation import as_failure
from .._ground.errors import BackendError, EventBusError, can_pass, words
from ..abc import KeyedTransfer
from ..abc._idempotency import KeyStep
from .context import Context, ExactlyOnce
from .dispatch import Dispatch
from .entry import ACKED, ACKED_WITH, PLAIN, Held, KeyState
from .lane import Lane


def key_of(held: Held) -> str:
    """The key by which a message is recognised.

    Without key and uid, it is the id of the original entry. The id of a retry copy may be another entry's in the topic.
    """
    message = held.message
    return message.idempotency_key or message.uid or original_id(message, held.stream, held.id)


def _step(held: Held) -> KeyStep:
    if held.intent in (ACKED, ACKED_WITH):
        return "none" if held.key is KeyState.COMPLETED else "complete"
    return "release" if held.key is KeyState.CLAIMED else "none"


def dispatch_for(context: Context, on_unsettled: Callable[[Held, Result], None]) -> Dispatch:
    if context.once is None:
        return Dispatch(context, on_unsettled)
    return KeyedDispatch(context, on_unsettled, context.once)


class KeyedDispatch(Dispatch):
    """A dispatch that also completes keys and gives up claims."""

    def __init__(self, context: Context, on_unsettled: Callable[[Held, Result], None], once: ExactlyOnce) -> None:
        self._once = once
        super().__init__(context, on_unsettled)

    async def _send_acks(self, stream: str, entries: list[Held]) -> None:
        if self._once.keeper is not None:
            await self._settle_keyed(stream, entries, self.acks)
            return
        noted = await self._note(entries, self.acks)
        if noted:
            await super()._send_acks(stream, noted)

    async def _send_transfers(self, stream: str, entries: list[Held]) -> None:
        if self._once.keeper is not None:
            await self._settle_keyed(stream, entries, self._transfers)
            return
        context = self._context
        await self._note([held for held in entries if _step(held) == "release"], self._transfers)
        items = [(held.id, (held.settlement or PLAIN).outputs) for held in entries]
        results = await context.backend.transfer_many(stream, context.group, context.consumer, items)
        published = [held for held, ids in zip(entries, results, strict=True) if isinstance(ids, list)]
        await self._note([held for held in published if _step(held) == "complete"], None)
        self._transferred(entries, results, self._transfers)

    async def _send_releases(self, stream: str, entries: list[Held]) -> None:
        # The handling has ended, or never began. So the next one must not find the claim.
        await self._note([held for held in entries if _step(held) == "release"], None)
        await super()._send_releases(stream, entries)

    async def _settle_keyed(self, stream: str, entries: list[Held], lane: Lane) -> None:
        context, keeper = self._context, self._once.keeper
        assert keeper is not None
        items = [
            KeyedTransfer(held.id, (held.settlement or PLAIN).outputs, key_of(held), _step(held)) for held in entries
        ]
        results: Sequence[list[str] | EventBusError | None] = await keeper.settle_keyed(
            context.topic, stream, context.group, context.consumer, items, window=self._once.window
        )
        self._transferred(entries, results, lane)

    async def _note(self, entries: Sequence[Held], lane: Lane | None) -> list[Held]:
        """Tell a store that is not the backend's own. Returns the entries that can be settled now.

        :param lane: where an entry goes whose key could not be completed; None = it is only reported.
        """
        failures: dict[Held, Exception] = {}
        steps = [held for held in entries if _step(held) != "none"]
        if len(steps) == 1:
            await self._note_one(steps[0], failures)
        elif steps:
            async with anyio.create_task_group() as tasks:
                for held in steps:
                    tasks.start_soon(self._note_one, held, failures)
        for held, failure in failures.items():
            completing = _step(held) == "complete"
            if completing and lane is not None:
                self._failed(held, failure, lane)
            else:
                what = "its key could not be completed" if completing else "its claim ends with its lease"
                self.report("ack-flush", failure, held, what)
        return [held for held in entries if held not in failures or _step(held) == "release"]

    async def _note_one(self, held: Held, failures: dict[Held, Exception]) -> None:
        step = _step(held)
        try:
            await self._tell_store(key_of(held), step)
        except BackendError as error:
            failures[held] = error
        else:
            held.key = KeyState.COMPLETED if step == "complete" else KeyState.UNKNOWN

    async def _tell_store(self, key: str, step: KeyStep) -> None:
        context, store = self._context, self._once.store
        try:
            if step == "complete":
                await store.complete(context.topic, context.group, key, context.consumer, window=self._once.window)
            else:
                await store.release(context.topic, context.group, key, context.consumer)
        except BaseException as raised:  # noqa: ASYNC103 - raised again in there
            error = as_failure(raised)
            raise BackendError(  # noqa: ASYNC104
                f"the idempotency store failed: {words(error)}", may_have_happened=False, can_pass=can_pass(error)
            ) from error
