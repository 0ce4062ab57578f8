"""One lease for all members of a group. It is kept in a sorted set beside the topic, with the running members."""

from __future__ import annotations

from ...abc import LeaseKeeper
from ._client import Client
from ._keys import leases
from ._lease_scripts import AGREE
from ._taking import Taking
from ._watch import running_for


class RedisLeases(LeaseKeeper):
    """The Redis backend's part for leases."""

    _client: Client
    _taking: Taking

    async def agree_lease(self, stream: str, group: str, consumer: str, lease: float, *, change: bool = False) -> float:
        return await self._agree(stream, group, consumer, lease, "change" if change else "join")

    async def kept_lease(self, stream: str, group: str, consumer: str, lease: float) -> float:
        return await self._agree(stream, group, consumer, lease, "stay")

    async def until_lease_changes(self, stream: str, group: str, consumer: str, lease: float) -> float:
        while True:
            await self._taking.watch.until_lease_may_differ(stream, group, consumer, float(lease))
            kept = await self.kept_lease(stream, group, consumer, lease)
            if kept != lease:
                return kept

    async def _agree(self, stream: str, group: str, consumer: str, lease: float, mode: str) -> float:
        args = (consumer, repr(float(lease)), running_for(lease), mode)
        reply = await self._client.run(AGREE, stream, group, (leases(stream, group),), args)
        with self._client.reading(reply):
            return float(reply)
