"""Exactly-once effects: the contract of an idempotency store, and the stores that come with the library."""

from ._idempotency.memory import MemoryStore
from ._idempotency.sql import SqlStore
from .abc import Claim, IdempotencyStore, TransactionalStore

__all__ = ["Claim", "IdempotencyStore", "MemoryStore", "SqlStore", "TransactionalStore"]
