"""The slots of a cluster: which slot a stream is in, which node serves it, and what a node's redirections say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, cast

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from ..._ground.errors import BackendError, ValidationError
from ._keys import delayed
from ._protocol import ServerError

SLOTS: Final = REDIS_CLUSTER_HASH_SLOTS


class Address(NamedTuple):
    host: str
    port: int


@lru_cache(4096)  # used for every call
def slot_of(stream: str) -> int:
    """The slot of a stream, and of all keys that are kept beside it.

    :raises ValidationError: if these keys are in different slots.
    """
    slot = int(key_slot(stream.encode()))
    if slot != int(key_slot(delayed(stream).encode())):
        raise ValidationError(
            f"topic must be one whose keys share a slot of the cluster, not {stream!r}: its name has braces, but no "
            "hash tag such as '{orders}'"
        )
    return slot


@dataclass(frozen=True)
class SlotMap:
    """What a node says about the cluster.

    :ivar owners: the primary of each slot; None = there is none.
    :ivar addresses: all nodes, replicas included.
    :ivar epoch: the number of the cluster's configuration, which grows with each failover; 0 if the node does not tell.
    :ivar is_well: whether the cluster works, as far as the node knows.
    """

    owners: Sequence[Address | None]
    addresses: tuple[Address, ...]
    epoch: int
    is_well: bool


def slot_map(slots: Any, info: Any, asked: Address) -> SlotMap:
    """Parse the replies to ``CLUSTER SLOTS`` and ``CLUSTER INFO``.

    :param asked: who replied. (A node may leave out its own host.)
    """
    owners: list[Address | None] = [None] * SLOTS
    addresses: dict[Address, None] = {}
    for first, last, *nodes in slots:
        named = [_address(node[0], node[1], asked) for node in nodes]
        addresses.update(dict.fromkeys(named))
        if named and named[0].port:
            owners[first : last + 1] = [named[0]] * (last + 1 - first)
    state = dict(_state(info))
    epoch = int(state.get("cluster_current_epoch", 0))
    return SlotMap(owners, tuple(addresses), epoch, state.get("cluster_state", "ok") == "ok")


def _state(info: Any) -> Iterator[tuple[str, str]]:
    if isinstance(info, bytes):
        for line in info.decode().splitlines():
            name, colon, value = line.partition(":")
            if colon:
                yield name, value


def _address(host: Any, port: Any, asked: Address) -> Address:
    name = host.decode() if isinstance(host, bytes) else host
    return Address(name if name and name != "?" else asked.host, int(port))


Kind = Literal["MOVED", "ASK", "TRYAGAIN", "GONE", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "LOADING"]

_KINDS: Final = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "LOADING")


class Redirection(NamedTuple):
    """What an error says about where a slot is.

    :ivar kind: the error's code. GONE: a blocking read was ended because the node is no longer a primary.
    :ivar address: where to go (MOVED, ASK).
    """

    kind: Kind
    address: Address | None = None


def redirection(error: BackendError | ServerError, asked: Address) -> Redirection | None:
    """What an error says about where a slot is; None = nothing.

    :param asked: who replied.
    """
    text = str(error if isinstance(error, ServerError) else error.__cause__ or "")
    code, _, rest = text.partition(" ")
    if code == "UNBLOCKED" and "instance state changed" in text:
        return Redirection("GONE")
    if code not in _KINDS:
        return None
    if code not in ("MOVED", "ASK"):
        return Redirection(cast("Kind", code))
    host, colon, port = rest.partition(" ")[2].rpartition(":")
    if not colon or not port.isdigit():
        return None
    return Redirection(cast("Kind", code), _address(host, port, asked))
