"""Transfers on Redis: outputs are appended and the original entry is acknowledged in one step."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Union

from ..._ground.errors import BackendError, EventBusError, SerializationError, ValidationError
from ..._messages.message import Message
from ...abc import KeyedTransfer, Output, TransferItem
from . import _scripts as scripts
from ._additions import Addition
from ._client import Client
from ._completion_scripts import SETTLE
from ._errors import is_out_of_reach
from ._keys import RESERVED, delayed, waiting_beside
from ._parts import fitting, size
from ._protocol import Argument, ServerError

_MOST_FIELDS: Final = (scripts.MOST_VALUES - 10) // 2

Transferred = Union[list[str], EventBusError, None]


@dataclass(frozen=True)
class _Item:
    """A transfer that is ready to be sent. For each output: its key, its delay in ms (-1 = none), its fields.

    :ivar keyed: the idempotency key of its message, and what to do with it.
    """

    id: str
    outputs: Sequence[tuple[str, int, list[Argument]]]
    keyed: tuple[str, str] | None = None

    @property
    def size(self) -> int:
        return sum(size(fields) for _, _, fields in self.outputs)

    @property
    def is_large(self) -> bool:
        return any(len(fields) > 2 * _MOST_FIELDS for _, _, fields in self.outputs)


@dataclass(frozen=True)
class _Keys:
    """Where idempotency keys are, and for how many ms completed ones are remembered."""

    places: tuple[str, str]
    window: int


class Transfers:
    """The Redis backend's part for transfers.

    :param encode: encodes a message that the application publishes, or refuses it for its size.
    :param encode_copy: the same for the bus's own copies.
    """

    def __init__(
        self, client: Client, encode: Callable[[Message], bytes], encode_copy: Callable[[Message], bytes]
    ) -> None:
        self._client = client
        self._encode = encode
        self._encode_copy = encode_copy

    def prepare(self, outputs: Sequence[Output]) -> list[Addition] | EventBusError:
        """Encode outputs that are not appended in one step with something else."""
        encoded = self._encoded(outputs)
        if isinstance(encoded, EventBusError):
            return encoded
        return [
            Addition(output.stream, delay, fields) for output, (_, delay, fields) in zip(outputs, encoded, strict=True)
        ]

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[Transferred]:
        prepared = [self._prepare(message_id, outputs) for message_id, outputs in items]
        return await self._transfer(stream, group, consumer, prepared, None)

    async def settle_keyed(
        self,
        stream: str,
        group: str,
        consumer: str,
        items: Sequence[KeyedTransfer],
        places: tuple[str, str],
        window: float,
    ) -> list[Transferred]:
        """Transfers that also complete idempotency keys, or give up their claims.

        :param places: the sorted set and the hash of the keys.
        """
        prepared = [self._prepare(item.id, item.outputs, (item.key, item.step)) for item in items]
        return await self._transfer(stream, group, consumer, prepared, _Keys(places, round(window * 1000)))

    async def _transfer(
        self, stream: str, group: str, consumer: str, items: Sequence[_Item | EventBusError], idempotency: _Keys | None
    ) -> list[Transferred]:
        results: list[Transferred] = [None] * len(items)
        ready: list[tuple[int, _Item]] = []
        for index, item in enumerate(items):
            if isinstance(item, EventBusError):
                results[index] = item
            elif item.is_large:
                results[index] = await self._transfer_large(stream, group, consumer, item)
            else:
                ready.append((index, item))
        start = 0
        for count in fitting([item.size for _, item in ready]):
            part = ready[start : start + count]
            start += count
            answers: Sequence[Transferred]
            try:
                answers = await self._send(stream, group, consumer, [item for _, item in part], idempotency)
            except BackendError as error:
                if len(items) == 1:
                    raise
                if is_out_of_reach(error):
                    # A script is refused as a whole if the user may not access one of its keys. Only the item with that
                    # key must fail.
                    answers = [
                        await self._send_alone(stream, group, consumer, item, idempotency)  # noqa: ASYNC120
                        for _, item in part
                    ]
                elif len(part) == len(items):
                    raise
                else:
                    answers = [error] * len(part)  # not raised, because other parts are or will be done
            for (index, _), answer in zip(part, answers, strict=True):
                results[index] = answer
        return results

    def _prepare(
        self, message_id: str, outputs: Sequence[Output], keyed: tuple[str, str] | None = None
    ) -> _Item | EventBusError:
        """Encode an item. If it cannot be encoded, or is too large, the error concerns only this item."""
        prepared = self._encoded(outputs)
        if isinstance(prepared, EventBusError):
            return prepared
        item = _Item(message_id, prepared, keyed)
        if item.is_large and (len(prepared) > 1 or prepared[0][1] >= 0):
            return ValidationError(
                f"an output with more than {_MOST_FIELDS} raw fields must be its transfer's only one, without a delay"
            )
        return item

    def _encoded(self, outputs: Sequence[Output]) -> list[tuple[str, int, list[Argument]]] | EventBusError:
        """For each output: its key, its delay in ms (-1 = none), its fields."""
        prepared: list[tuple[str, int, list[Argument]]] = []
        try:
            for output in outputs:
                encode = self._encode if output.limited else self._encode_copy
                fields: list[Argument] = ["message", encode(output.message)]
                for name, value in (output.raw or {}).items():
                    fields += (f"raw:{name}", value)
                if output.delay > 0:
                    prepared.append((delayed(output.stream), round(output.delay * 1000), fields))
                else:
                    prepared.append((output.stream, -1, fields))
        except EventBusError as error:
            return error
        except (KeyboardInterrupt, SystemExit):
            raise  # a signal handler can raise these anywhere
        except BaseException as error:  # noqa: ASYNC103 - a codec awaits nothing, so this is no real cancellation
            return SerializationError(f"the codec raised {error!r}")  # noqa: ASYNC104
        return prepared

    async def _send_alone(
        self, stream: str, group: str, consumer: str, item: _Item, idempotency: _Keys | None
    ) -> Transferred:
        try:
            [result] = await self._send(stream, group, consumer, [item], idempotency)
        except BackendError as error:
            return error
        return result

    async def _send(
        self, stream: str, group: str, consumer: str, items: Sequence[_Item], idempotency: _Keys | None
    ) -> list[list[str] | BackendError | None]:
        keys: list[str] = [stream]
        args: list[Argument] = [group, consumer]
        if idempotency is not None:
            keys += idempotency.places
            args.append(idempotency.window)
        args.append(len(items))
        for item in items:
            args += (item.id, *(item.keyed or ()), len(item.outputs))
            for key, delay, fields in item.outputs:
                if key not in keys:
                    keys.append(key)
                beside = secrets.token_hex(8) if delay >= 0 else waiting_beside(key) if key.startswith(RESERVED) else ""
                args += (keys.index(key) + 1, delay, beside, len(fields), *fields)
        script = scripts.TRANSFER if idempotency is None else SETTLE
        reply = await self._client.run(script, stream, group, keys, args)
        results: list[list[str] | BackendError | None] = []
        with self._client.reading(reply):
            for _, (status, *values) in zip(items, reply, strict=True):
                if status == b"done":
                    results.append([raw.decode() for raw in values[0]])
                elif status == b"not ours":
                    results.append(None)
                else:
                    results.append(self._refused(status, values[0]))
        return results

    def _refused(self, status: bytes, text: bytes) -> BackendError:
        error = ServerError(text.decode(errors="replace"))
        return self._client.refused(error, may_have_happened=status == b"half")

    async def _transfer_large(self, stream: str, group: str, consumer: str, item: _Item) -> Transferred:
        """A transfer of more fields than a script can append, in two steps.

        If it is interrupted between the two, the output is appended, but the original is not acknowledged.
        """
        [(key, _, fields)] = item.outputs
        try:
            pending: Any = await self._client.ask(
                stream, group, ("XPENDING", stream, group, item.id, item.id, 1, consumer)
            )
            if not pending:
                return None
            appended = self._client.text(await self._client.call("XADD", key, "*", *fields))
            await self._client.note_waiting((key,))
        except BackendError as error:
            return error
        try:
            args = (group, consumer, item.id, appended)
            reply = await self._client.run(scripts.SETTLE_APPENDED, stream, group, (stream, key), args)
            with self._client.reading(reply):
                status, *values = reply
                if status == b"done":
                    return [appended]
                return None if status == b"not ours" else self._refused(status, values[0])
        except BackendError as error:
            error.may_have_happened = True
            return error
