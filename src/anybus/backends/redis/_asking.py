"""The connection to a node that a slot is being moved to: it serves a stream of that slot only if it is asked to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import anyio

from ._errors import broken
from ._multiplexer import Multiplexer
from ._protocol import Command
from ._session import Call

_ASKING: Final = ("ASKING",)


class AskingMultiplexer(Multiplexer):
    """Sends ``ASKING`` before each command. It concerns the next command of the connection only."""

    async def start(self, commands: Sequence[Command], *, patient: bool = False) -> Call:
        call = await super().start([part for command in commands for part in (_ASKING, command)], patient=patient)
        wake = call.done

        def done() -> None:
            call.replies = call.replies[1::2]
            wake()

        call.done = done
        return call

    async def single(self, command: Command, timeout: float) -> Any:
        call: Call | None = None
        with anyio.move_on_after(timeout):
            call = await self.start((command,), patient=True)
            await call.event.wait()
        if call is None or not call.event.is_set():
            raise broken("no answer within publish_timeout", may_have_happened=call is not None and call.sent)
        if call.error is not None:
            raise call.error
        return call.replies[0]
