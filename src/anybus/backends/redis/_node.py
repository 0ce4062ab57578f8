"""One server of the backend: publishing, settling, inspecting. (Taking entries is in ``_taking``.)"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

import anyio
from anyio.abc import TaskGroup

from ..._ground.checks import check_start_id, is_entry_id
from ..._ground.errors import BackendError, EventBusError, SerializationError, ValidationError
from ..._messages.message import Message
from ...abc import (
    Codec,
    FetchedEntry,
    Output,
    PendingEntry,
    PublishItem,
    PublishSpec,
    Redelivered,
    TransferItem,
)
from . import _fence_scripts as fence
from . import _scripts as scripts
from ._additions import Addition, Additions
from ._client import Client
from ._completions import RedisCompletions
from ._confirming import Confirmer, xadd
from ._crowds import Crowds
from ._dead_letters import RedisDeadLetters
from ._decoding import MAX_ENCODED, EntryDecoder, span
from ._deduplication import Deduplicator
from ._errors import has_code, is_out_of_reach
from ._keys import RESERVED, leases, losses
from ._leases import RedisLeases
from ._limits import ROOM
from ._parts import PER_SCRIPT
from ._protocol import Command, ServerError
from ._retention import RedisRetention
from ._rights import TRY, arguments, may_not_run_scripts, missing_rights, probes
from ._schedules import Expect
from ._settings import Settings
from ._taking import Memory, Taking
from ._ticks import RedisTicks
from ._transfers import Transfers

_SHIELDED = 1.0


class Node(RedisDeadLetters, RedisLeases, RedisRetention, RedisCompletions, RedisTicks, Additions):
    """One server, with all that a backend does on it. Methods are those of the backend, for streams on this server.

    :param memory: what is remembered of the members that read here; None = nothing yet.
    :param together: streams with the same result may be named in one command.
    :param expect: called when something will be due.
    """

    def __init__(
        self,
        settings: Settings,
        codec: Codec,
        expect: Expect,
        *,
        memory: Memory | None = None,
        together: Callable[[str], Hashable] = lambda stream: None,
    ) -> None:
        self._codec = codec
        self._expect = expect
        self.client = self._client = Client(settings)
        self._decoder = EntryDecoder(codec)
        self.taking = self._taking = Taking(self._client, self._decoder, expect, together, memory)
        self._transfers = Transfers(self._client, self._encode, self._encode_copy)
        self._crowds = Crowds()
        self._once = Deduplicator(self._client, self._encode)
        self._confirmer = Confirmer(self._client)

    def start(self, tasks: TaskGroup, alarm: Callable[[BaseException], None]) -> None:
        """Prepare for work in this task group. See ``Taking.start``."""
        self._taking.start(tasks, alarm)
        self._confirmer.start(tasks, alarm)

    async def connect(self, tasks: TaskGroup, alarm: Callable[[BaseException], None]) -> None:
        """Open the shared connection, and keep it open.

        :raises EventBusError: if the first connection cannot be opened, or the server is not one that is supported.
        """
        link = await self._client.mux.connect()
        tasks.start_soon(self._client.mux.run, link, alarm, tasks)
        await self._client.warn()

    def open(self, tasks: TaskGroup, alarm: Callable[[BaseException], None]) -> None:
        """The same without waiting: calls wait until there is a connection."""
        mux = self._client.mux
        mux.prepare()
        tasks.start_soon(mux.run, None, alarm, tasks)
        tasks.start_soon(self._client.warn)

    @property
    def is_closed(self) -> bool:
        return self._client.mux.closed.is_set()

    async def aclose(self) -> None:
        try:
            with anyio.move_on_after(_SHIELDED, shield=True):
                await self._taking.aclose()
        finally:
            # Even if the line above raises: otherwise the task group would wait forever, shielded.
            self.close()

    def close(self) -> None:
        """Close the connections for commands."""
        self._client.mux.close()
        self._confirmer.close()

    async def publish(self, stream: str, message: Message) -> str:
        [reply] = await self._client.publish((("XADD", stream, "*", "message", self._encode(message)),))
        if isinstance(reply, ServerError):
            raise self._client.refused(reply)
        if isinstance(reply, BackendError):
            raise reply
        if stream.startswith(RESERVED):
            with suppress(BackendError):  # it is appended
                await self._client.note_waiting((stream,))
        return self._client.text(reply)

    async def publish_within(self, stream: str, message: Message, *, timeout: float) -> str:
        client, data = self._client, self._encode(message)
        command = ("XADD", stream, "*", "message", data)
        if len(data) > client.careful_above:
            reply = await client.alone(command, timeout)
        else:
            reply = await client.mux.single(command, timeout)
        if isinstance(reply, ServerError):
            raise self._client.refused(reply)
        return reply.decode() if isinstance(reply, bytes) else self._client.text(reply)

    async def publish_with(self, stream: str, message: Message, spec: PublishSpec) -> str:
        [result] = await self.publish_many(((stream, message, spec),))
        if isinstance(result, EventBusError):
            raise result
        return result

    async def publish_many(self, items: Sequence[PublishItem]) -> list[str | EventBusError]:
        specs = {spec for _, _, spec in items}
        if specs == {None}:
            return await self._publish_plain(items)
        if any(spec is not None and spec.idempotency_key is not None for spec in specs):
            return await self._once.publish_many(items, self._publish_plain)
        results: list[str | EventBusError] = []
        for spec, run in groupby(items, key=lambda item: item[2]):
            part = list(run)
            if spec is None or spec.confirmation == "accepted":
                results += await self._publish_plain(part)
            else:
                results += await self._publish_confirmed(part, spec)
        return results

    async def _publish_confirmed(self, items: Sequence[PublishItem], spec: PublishSpec) -> list[str | EventBusError]:
        results: list[str | EventBusError] = [""] * len(items)
        commands: list[Command] = []
        places: list[int] = []
        for index, (stream, message, _) in enumerate(items):
            try:
                commands.append(xadd(stream, self._encode(message)))
                places.append(index)
            except EventBusError as error:
                results[index] = error
        answers: Sequence[str | EventBusError] = ()
        if commands:
            try:
                answers = await self._confirmer.publish(commands, spec)
            except EventBusError as error:
                answers = [error] * len(commands)
        for index, answer in zip(places, answers, strict=True):
            results[index] = answer
        return results

    async def _publish_plain(self, items: Sequence[PublishItem]) -> list[str | EventBusError]:
        results: list[str | EventBusError] = [""] * len(items)
        commands: list[Command] = []
        places: list[int] = []
        for index, (stream, message, _) in enumerate(items):
            try:
                commands.append(("XADD", stream, "*", "message", self._encode(message)))
                places.append(index)
            except EventBusError as error:
                results[index] = error
            except Exception as error:  # the codec's own: the other messages are published all the same
                results[index] = SerializationError(f"the codec raised {error!r}")
        if not commands:
            return results
        replies: list[Any]
        try:
            replies = await self._client.publish(commands)
        except BackendError as error:
            replies = [error] * len(commands)
        for index, reply in zip(places, replies, strict=True):
            if type(reply) is bytes and reply.isascii():
                results[index] = reply.decode()
            elif isinstance(reply, ServerError):
                results[index] = self._client.refused(reply)
            elif isinstance(reply, EventBusError):
                results[index] = reply
            else:
                try:
                    results[index] = self._client.text(reply)
                except BackendError as error:
                    results[index] = error
        return results

    def _encode(self, message: Message) -> bytes:
        data = self._codec.encode(message)
        if len(data) > MAX_ENCODED:
            raise ValidationError(f"a message must be at most {MAX_ENCODED} bytes when encoded, not {len(data)}")
        if len(data) > self._client.careful_above:
            self._check_limit(data, ROOM)
        return data

    def _encode_copy(self, message: Message) -> bytes:
        """Encode one of the bus's own copies. It is refused only if the server would not accept it."""
        data = self._codec.encode(message)
        self._check_limit(data, 0)
        return data

    def _check_limit(self, data: bytes, room: int) -> None:
        limit = self._client.limit
        if limit is not None and len(data) > limit.size - room:
            raise ValidationError(
                f"a message must be at most {limit.size - room} bytes when encoded, not {len(data)}: "
                f"{self._client.settings.place} does not accept more ({limit.setting})"
            )

    async def check_rights(self, stream: str, retry_stream: str, group: str, *, dead_letter_topic: str | None) -> None:
        asked = list(probes(stream, retry_stream, group, dead_letter_topic))
        try:
            reply = await self._client.run(TRY, stream, group, (), arguments(asked))
        except BackendError as error:
            if is_out_of_reach(error):
                raise may_not_run_scripts() from error
            raise
        with self._client.reading(reply):
            missing = missing_rights(asked, reply)
        if missing is not None:
            raise missing

    async def create_group(self, stream: str, group: str, start_id: str = "$") -> bool:
        start_id = check_start_id("start_id", start_id)
        [reply] = await self._client.mux.pipeline((("XGROUP", "CREATE", stream, group, start_id, "MKSTREAM"),))
        if isinstance(reply, ServerError):
            if has_code(reply, "BUSYGROUP"):
                return False
            # A full server does not say that the group exists. Its members can free memory.
            if has_code(reply, "OOM") and await self.has_group(stream, group):
                return False
            raise self._client.refused(reply)
        return True

    async def read_new(
        self, stream: str, group: str, consumer: str, *, count: int, timeout: float
    ) -> list[FetchedEntry]:
        return await self._taking.read_new(stream, group, consumer, count, timeout)

    async def reclaim_idle(
        self, stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> list[FetchedEntry]:
        return await self._taking.reclaim(stream, group, consumer, min_idle, count)

    async def redeliver(
        self, stream: str, retry_stream: str, group: str, consumer: str, *, min_idle: float, count: int
    ) -> Redelivered:
        return await self._taking.redeliver(stream, retry_stream, group, consumer, min_idle, count)

    async def read_when_new(
        self, stream: str, group: str, consumer: str, *, count: int, block: float, timeout: float
    ) -> list[FetchedEntry]:
        return await self._taking.read_new(stream, group, consumer, count, timeout, block)

    async def until_pass_is_due(
        self, stream: str, retry_stream: str, group: str, consumer: str, *, min_idle: float, interval: float
    ) -> None:
        await self._taking.watch.until_pass_is_due(stream, group, consumer, min_idle=min_idle, interval=interval)

    async def ack(self, stream: str, group: str, message_id: str) -> None:
        await self.ack_many(stream, group, (message_id,))

    async def ack_many(
        self, stream: str, group: str, message_ids: Sequence[str], *, consumer: str | None = None
    ) -> list[str]:
        if consumer is None:
            known = [message_id for message_id in message_ids if is_entry_id(message_id)]
            if known:
                await self._client.ask(stream, group, ("XACK", stream, group, *known))
                if stream.startswith(RESERVED):  # a retry stream, which has only this group
                    try:
                        await self._client.call("XDEL", stream, *known)
                    except BackendError as error:
                        error.may_have_happened = True  # the entries are already acknowledged
                        raise
            return []
        refused: list[str] = []
        for start in range(0, len(message_ids), PER_SCRIPT):
            try:
                part = message_ids[start : start + PER_SCRIPT]
                refused += await self._owned(fence.ACK, stream, group, consumer, part)
            except BackendError as error:
                error.may_have_happened = error.may_have_happened or start > 0  # earlier parts are acknowledged
                raise
        return refused

    async def renew(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> list[str]:
        owned: list[str] = []
        for start in range(0, len(message_ids), PER_SCRIPT):
            part = message_ids[start : start + PER_SCRIPT]
            owned += await self._owned(fence.RENEW, stream, group, consumer, part)
        return owned

    async def _owned(
        self, script: scripts.Script, stream: str, group: str, consumer: str, message_ids: Sequence[str]
    ) -> list[str]:
        key = "" if self._crowds.is_too_large(stream, group, len(message_ids)) else losses(stream, group)
        args = (group, consumer, *span(message_ids), key, *message_ids)
        reply = await self._client.run(script, stream, group, (stream,), args)
        with self._client.reading(reply):
            if reply and isinstance(reply[-1], int):
                self._crowds.saw(stream, group, reply.pop())
            return [raw.decode() for raw in reply]

    async def release(self, stream: str, group: str, consumer: str, message_ids: Sequence[str]) -> None:
        await self._taking.release(stream, group, consumer, message_ids)

    async def forget_consumer(self, stream: str, group: str, consumer: str) -> None:
        self._crowds.forget(stream, group)
        try:
            await self._taking.forget(stream, group, consumer)
            keys, args = (stream, leases(stream, group)), (group, consumer, losses(stream, group))
            await self._client.run(scripts.FORGET, stream, group, keys, args)
        except BackendError:
            return  # the consumer's name stays. A peer removes it later, since it has no pending entries

    async def transfer(
        self, stream: str, group: str, consumer: str, message_id: str, outputs: Sequence[Output]
    ) -> list[str] | None:
        [result] = await self.transfer_many(stream, group, consumer, ((message_id, outputs),))
        if isinstance(result, EventBusError):
            raise result
        return result

    async def transfer_many(
        self, stream: str, group: str, consumer: str, items: Sequence[TransferItem]
    ) -> list[list[str] | EventBusError | None]:
        return await self._transfers.transfer_many(stream, group, consumer, items)

    def prepare(self, outputs: Sequence[Output]) -> list[Addition] | EventBusError:
        return self._transfers.prepare(outputs)

    async def count_entries(self, stream: str) -> int:
        reply = await self._client.call("XLEN", stream)
        with self._client.reading(reply):
            return int(reply)

    async def pending_entries(self, stream: str, group: str, *, limit: int = 1000) -> list[PendingEntry]:
        reply = await self._client.ask(stream, group, ("XPENDING", stream, group, "-", "+", limit))
        with self._client.reading(reply):
            return [
                PendingEntry(raw_id.decode(), owner.decode(), idle / 1000, deliveries)
                for raw_id, owner, idle, deliveries in reply
            ]

    async def consumer_names(self, stream: str, group: str) -> list[str]:
        reply = await self._client.ask(stream, group, ("XINFO", "CONSUMERS", stream, group))
        with self._client.reading(reply):
            return sorted(dict(zip(item[::2], item[1::2], strict=True))[b"name"].decode() for item in reply)
