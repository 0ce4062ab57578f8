"""Exactly-once effects in the transactions of SQLAlchemy's connections, plain and asynchronous.

- Effect and completion are committed together on an open ``Connection`` or ``AsyncConnection``, or both are rolled back.
- A connection with an open transaction is refused.
- The store itself can use a connection of SQLAlchemy.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread
from harness import QUICK, Recorder, quick, until

from anybus import Delivery, MemoryBackend, Message, StreamBus, SubscriptionConfig, ValidationError
from anybus.idempotency import SqlStore

sqlalchemy: Any = pytest.importorskip("sqlalchemy")


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio"  # SQLAlchemy's own asyncio part needs it


@asynccontextmanager
async def opened(kind: str, path: Path) -> AsyncGenerator[Any, None]:
    if kind == "async":
        pytest.importorskip("aiosqlite")
        from sqlalchemy.ext.asyncio import create_async_engine  # type: ignore[import-not-found]  # noqa: PLC0415

        engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
        async with engine.connect() as connection:
            yield connection
        await engine.dispose()
    else:
        plain = sqlalchemy.create_engine(f"sqlite:///{path}", connect_args={"check_same_thread": False})
        connection = await to_thread.run_sync(plain.connect)
        yield connection
        await to_thread.run_sync(connection.close)
        plain.dispose()


async def write(connection: Any, uid: str) -> None:
    statement = sqlalchemy.text("INSERT INTO effects (uid) VALUES (:uid)")
    if isinstance(connection, sqlalchemy.engine.Connection):
        await to_thread.run_sync(connection.execute, statement, {"uid": uid})
    else:
        await connection.execute(statement, {"uid": uid})


def make_tables(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE effects (uid TEXT)")
        SqlStore.create_table(connection)


def effects(path: Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        return [row[0] for row in connection.execute("SELECT uid FROM effects")]


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_effect_and_completion_are_committed_together(tmp_path: Path, topic: str, kind: str) -> None:
    path = tmp_path / "shop.sqlite"
    await to_thread.run_sync(make_tables, path)
    attempts: list[int] = []
    message = Message(topic)
    engine = sqlalchemy.create_engine(f"sqlite:///{path}", connect_args={"check_same_thread": False})
    async with opened(kind, path) as connection, SqlStore(engine.connect) as store:

        async def handler(delivery: Delivery) -> None:
            attempts.append(delivery.state.attempt)
            async with delivery.transaction(connection):
                await write(connection, delivery.message.uid)
                if len(attempts) == 1:
                    raise LookupError("rolled back")

        async with StreamBus(MemoryBackend(), quick(Recorder())) as bus:
            config = SubscriptionConfig(
                topic, "g", guarantee="exactly-once", idempotency_store=store, retry_backoff=QUICK
            )
            async with bus.subscribe(config, handler) as subscription:
                await bus.publish(message)
                await until(lambda: subscription.statistics().handled == 1)
                await bus.publish(message)
                await until(lambda: subscription.statistics().duplicates == 1)
    engine.dispose()
    assert attempts == [1, 2]
    assert effects(path) == [message.uid]


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_a_connection_with_an_open_transaction_is_refused(tmp_path: Path, topic: str, kind: str) -> None:
    path = tmp_path / "shop.sqlite"
    await to_thread.run_sync(make_tables, path)
    refusals: list[str] = []
    async with opened(kind, path) as connection, SqlStore.sqlite(path) as store:

        async def handler(delivery: Delivery) -> None:
            statement = sqlalchemy.text("SELECT 1")
            if kind == "plain":
                await to_thread.run_sync(connection.execute, statement)
            else:
                await connection.execute(statement)
            try:
                async with delivery.transaction(connection):
                    raise AssertionError("not reached")
            except ValidationError as error:
                refusals.append(str(error))

        async with StreamBus(MemoryBackend(), quick(Recorder())) as bus:
            config = SubscriptionConfig(topic, "g", guarantee="exactly-once", idempotency_store=store)
            async with bus.subscribe(config, handler) as subscription:
                await bus.publish(Message(topic))
                await until(lambda: subscription.statistics().handled == 1)
    assert refusals == ["connection must have no open transaction (SQLAlchemy: in_transaction() is true)"]
