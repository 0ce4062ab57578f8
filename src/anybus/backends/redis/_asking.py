"""The connection to a node that a slot is being moved to: it serves a stream of that slot only if it is asked to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._multiplexer import Multiplexer
from ._protocol import Command, asking
from ._session import Call


class AskingMultiplexer(Multiplexer):
    """Sends ``ASKING`` before each command."""

    async def start(self, commands: Sequence[Command], *, patient: bool = False) -> Call:
        call = await super().start(asking(commands), patient=patient)
        wake = call.done

        def done() -> None:
            call.replies = call.replies[1::2]
            wake()

        call.done = done
        return call

    async def single(self, command: Command, timeout: float) -> Any:
        return await self._single_when_connected(command, timeout)  # the waves do not send ASKING
