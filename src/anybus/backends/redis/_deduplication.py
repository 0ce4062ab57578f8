"""Publishes that append a message only if none with its idempotency key was published within the window."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import anyio

from ..._ground.errors import BackendError, EventBusError
from ..._messages.message import Message
from ...abc import Duplicate, PublishItem, PublishSpec
from . import _deduplication_scripts as scripts
from ._client import Client, evalsha
from ._errors import duplicate, has_code, may_be_partly_done, not_encoded
from ._keys import dedup_ends, dedup_ids, delayed
from ._parts import fitting
from ._protocol import Argument, ServerError
from ._scripts import Script

_LONGEST_FIELD: Final = 64

Result = str | EventBusError
Plain = Callable[[Sequence[PublishItem]], Awaitable[list[Result]]]


@dataclass(frozen=True)
class _Item:
    """A message that is ready to be sent: its place among the results, the field of its record, the window in ms."""

    index: int
    field: str
    window: int
    data: bytes


class Deduplicator:
    """The Redis backend's part for publishing with an idempotency key.

    :param encode: encodes a message that the application publishes, or refuses it.
    """

    def __init__(self, client: Client, encode: Callable[[Message], bytes]) -> None:
        self._client = client
        self._encode = encode

    async def publish(self, stream: str, message: Message, spec: PublishSpec) -> str:
        [result] = await self._send(stream, [self._item(0, message, spec)])
        if isinstance(result, EventBusError):
            raise result
        return result

    async def publish_many(self, items: Sequence[PublishItem], plain: Plain) -> list[Result]:
        """Publish to all streams at once, in order within each of them.

        :param plain: publishes what has no key, to streams for which nothing else has one.
        """
        results: list[Result] = [""] * len(items)
        with_keys = {stream for stream, _, spec in items if _has_key(spec)}
        without: list[int] = []
        streams: dict[str, list[_Item]] = {stream: [] for stream in with_keys}
        for index, (stream, message, spec) in enumerate(items):
            if stream not in with_keys:
                without.append(index)
                continue
            try:
                streams[stream].append(self._item(index, message, spec))
            except Exception as error:
                results[index] = not_encoded(error)
        failures: list[Exception] = []

        async def publish_plain() -> None:
            try:
                answers = await plain([(items[index][0], items[index][1], None) for index in without])
            except Exception as error:
                failures.append(error)  # raised below: not from within a task group, which would wrap it
            else:
                for index, answer in zip(without, answers, strict=True):
                    results[index] = answer

        async with anyio.create_task_group() as tasks:
            if without:
                tasks.start_soon(publish_plain)
            for stream, some in streams.items():
                tasks.start_soon(self._publish_stream, stream, some, results)
        if failures:
            raise failures[0]
        return results

    async def _publish_stream(self, stream: str, items: Sequence[_Item], results: list[Result]) -> None:
        """Publish to one stream, in as many calls as it takes. After an error nothing more is tried, for the order."""
        start = 0
        failure: BackendError | None = None
        for count in fitting([len(item.data) for item in items]):
            part = items[start : start + count]
            start += count
            answers: Sequence[Result]
            if failure is not None:
                answers = [_not_tried(failure) for _ in part]
            else:
                try:
                    answers = await self._send(stream, part)
                except BackendError as error:
                    answers = [duplicate(error) for _ in part]
                last = answers[-1]
                failure = last if isinstance(last, BackendError) else None
            for item, answer in zip(part, answers, strict=True):
                results[item.index] = answer

    async def schedule(
        self, stream: str, due: str, random: str, message: Message, spec: PublishSpec
    ) -> tuple[str, float | None]:
        """Store a message until it is due. See ``SCHEDULE_ONCE``.

        :return: its schedule id, and in how many seconds it is due; for a duplicate: what was returned first, and None.
        """
        item = self._item(0, message, spec)
        keys = (delayed(stream), dedup_ids(stream), dedup_ends(stream))
        reply = await self._run(
            scripts.SCHEDULE_ONCE, keys, (due, random, item.field, item.window, "message", item.data)
        )
        with self._client.reading(reply):
            if len(reply) == 2 and isinstance(reply[1], int):
                return str(reply[0].decode()), reply[1] / 1000
            result = self._result(reply)
        if isinstance(result, EventBusError):
            raise result
        return result, None

    def _item(self, index: int, message: Message, spec: PublishSpec | None) -> _Item:
        data = self._encode(message)
        if spec is None or spec.idempotency_key is None:
            return _Item(index, "", 0, data)
        return _Item(index, field_of(spec.idempotency_key), math.ceil(spec.deduplication_window * 1000), data)

    async def _send(self, stream: str, items: Sequence[_Item]) -> list[Result]:
        args: list[Argument] = [len(items)]
        for item in items:
            args += (item.field, item.window, item.data)
        reply = await self._run(scripts.PUBLISH_ONCE, (stream, dedup_ids(stream), dedup_ends(stream)), args)
        with self._client.reading(reply):
            results = [self._result(answer) for answer in reply]
            last = results[-1]
            if isinstance(last, BackendError):
                results += [_not_tried(last) for _ in range(len(items) - len(results))]
            if len(results) != len(items):
                raise ValueError("not one answer for each message")
        return results

    async def _run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run a script as a publish: it waits for a connection for as long as the caller does."""
        client = self._client
        [reply] = await client.publish((evalsha(script, keys, args),))
        if isinstance(reply, ServerError) and has_code(reply, "NOSCRIPT"):
            await client.load_scripts()
            [reply] = await client.publish((("EVAL", script.source, len(keys), *keys, *args),))
        if isinstance(reply, ServerError):
            raise client.refused(reply, may_have_happened=may_be_partly_done(reply, partly=False))
        if isinstance(reply, BackendError):
            raise reply
        return reply

    def _result(self, answer: Any) -> Result:
        if isinstance(answer, bytes):
            return answer.decode()
        if len(answer) == 1:
            return Duplicate(answer[0].decode())
        status, text = answer
        error = ServerError(text.decode(errors="replace"))
        return self._client.refused(error, may_have_happened=status == b"half")


def _has_key(spec: PublishSpec | None) -> bool:
    return spec is not None and spec.idempotency_key is not None


def _not_tried(error: BackendError) -> BackendError:
    """The same error, for what would have come after."""
    same = duplicate(error)
    same.may_have_happened = False
    return same


def field_of(key: str) -> str:
    """The field of a key's record. A long key is hashed. (``@`` begins the field of a schedule id.)"""
    encoded = key.encode()
    return f"={key}" if len(encoded) < _LONGEST_FIELD else f"#{sha256(encoded).hexdigest()}"
