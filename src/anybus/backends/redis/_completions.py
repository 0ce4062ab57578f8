"""Exactly-once effects on Redis: the keys of a group are kept beside its topic, in the topic's slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from ..._ground.errors import EventBusError
from ...abc import Claim, IdempotencyStore, KeyedTransfer
from ._client import Client
from ._completion_scripts import CLAIM, END
from ._keys import claims, completions
from ._parts import PER_SCRIPT
from ._permissions import check
from ._protocol import Argument
from ._rights import probes_of_keys
from ._transfers import Transfers


class RedisCompletions:
    """The part of a server for exactly-once effects."""

    _client: Client
    _transfers: Transfers

    async def claim_keys(
        self, topic: str, group: str, consumer: str, items: Sequence[tuple[str, str]], *, lease: float
    ) -> list[Claim]:
        places = completions(topic, group), claims(topic, group)
        answers: list[Claim] = []
        for start in range(0, len(items), PER_SCRIPT):
            args: list[Argument] = [consumer, round(lease * 1000)]
            for item in items[start : start + PER_SCRIPT]:
                args += item
            reply = await self._client.run(CLAIM, topic, group, places, args)
            with self._client.reading(reply):
                for _, (state, wait) in zip(items[start : start + PER_SCRIPT], reply, strict=True):
                    answers.append(_CLAIMED if state == b"claimed" else Claim(_STATES[state], int(wait) / 1000))
        return answers

    async def check_key_rights(self, topic: str, group: str) -> None:
        await check(self._client, topic, group, list(probes_of_keys(completions(topic, group), claims(topic, group))))

    async def renew_keys(self, topic: str, group: str, keys: Sequence[str], consumer: str, *, lease: float) -> None:
        await self._end(topic, group, keys, consumer, "renew", lease)

    async def end_keys(
        self, topic: str, group: str, keys: Sequence[str], consumer: str, *, window: float | None
    ) -> None:
        await self._end(topic, group, keys, consumer, "release" if window is None else "complete", window or 0.0)

    async def _end(self, topic: str, group: str, keys: Sequence[str], consumer: str, what: str, seconds: float) -> None:
        places = completions(topic, group), claims(topic, group)
        for start in range(0, len(keys), PER_SCRIPT):
            args: tuple[Argument, ...] = (consumer, what, round(seconds * 1000), *keys[start : start + PER_SCRIPT])
            await self._client.run(END, topic, group, places, args)

    async def settle_keyed(
        self, topic: str, stream: str, group: str, consumer: str, items: Sequence[KeyedTransfer], *, window: float
    ) -> list[list[str] | EventBusError | None]:
        places = completions(topic, group), claims(topic, group)
        return await self._transfers.settle_keyed(stream, group, consumer, items, places, window)


_STATES: dict[bytes, Literal["claimed", "busy", "completed"]] = {
    b"claimed": "claimed",
    b"busy": "busy",
    b"completed": "completed",
}
_CLAIMED = Claim("claimed")


class KeyServer(Protocol):
    """The backend, as far as its store needs it."""

    async def claim_keys(
        self, topic: str, group: str, consumer: str, items: Sequence[tuple[str, str]], *, lease: float
    ) -> list[Claim]: ...

    async def renew_keys(self, topic: str, group: str, keys: Sequence[str], consumer: str, *, lease: float) -> None: ...

    async def end_keys(
        self, topic: str, group: str, keys: Sequence[str], consumer: str, *, window: float | None
    ) -> None: ...


class RedisStore(IdempotencyStore):
    """The store of a Redis backend."""

    def __init__(self, server: KeyServer) -> None:
        self._server = server

    async def claim(self, topic: str, group: str, key: str, consumer: str, *, entry: str, lease: float) -> Claim:
        [answer] = await self._server.claim_keys(topic, group, consumer, ((key, entry),), lease=lease)
        return answer

    async def renew(self, topic: str, group: str, keys: Sequence[str], consumer: str, *, lease: float) -> None:
        await self._server.renew_keys(topic, group, keys, consumer, lease=lease)

    async def complete(self, topic: str, group: str, key: str, consumer: str, *, window: float) -> None:
        await self._server.end_keys(topic, group, (key,), consumer, window=window)

    async def release(self, topic: str, group: str, key: str, consumer: str) -> None:
        await self._server.end_keys(topic, group, (key,), consumer, window=None)
