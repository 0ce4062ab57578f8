"""The contract of an idempotency store, on each that comes with the library.

- A key is claimed for an entry, and then busy for every other entry, of the same consumer too.
- The same entry takes its claim over: the backend says who holds it.
- A claim ends with its lease, by the store's clock, unless its consumer renews it.
- A completed key is completed for every entry, for as long as the window, whoever claimed it.
- A claim that is given up is free at once. Nobody gives up or renews what belongs to another consumer.
- Topics and groups are independent.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from harness import Harness, MemoryHarness, until
from servers import RedisHarness

from anybus import LeaseLostError, ValidationError
from anybus.abc import CompletionKeeper
from anybus.idempotency import Claim, IdempotencyStore, MemoryStore, SqlStore

Opened = Callable[[], AbstractAsyncContextManager[IdempotencyStore]]
CLAIMED, COMPLETED = Claim("claimed"), Claim("completed")


POSTGRESQL = os.environ.get("ANYBUS_POSTGRESQL", "")
"""Where a PostgreSQL server is, in the words of psycopg (``host=… dbname=… user=…``): then it is tested, too."""


@pytest.fixture(params=["memory", "backend", "server", "sqlite", *(["postgresql"] if POSTGRESQL else [])])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    @asynccontextmanager
    async def open_store() -> AsyncGenerator[IdempotencyStore, None]:
        if kind == "memory":
            yield MemoryStore()
        elif kind == "sqlite":
            async with SqlStore.sqlite(tmp_path / "keys.sqlite") as store:
                yield store
        elif kind == "postgresql":
            async with SqlStore(
                connect_postgresql, paramstyle="pyformat", now=POSTGRESQL_NOW, table=POSTGRESQL_TABLE
            ) as store:
                yield store
        else:
            harness: Harness = MemoryHarness() if kind == "backend" else request.getfixturevalue("server_harness")
            async with harness.make_backend() as backend:
                assert isinstance(backend, CompletionKeeper)
                yield backend.idempotency_store

    return open_store


POSTGRESQL_NOW = "extract(epoch from clock_timestamp())::double precision"
POSTGRESQL_TABLE = f"anybus_keys_{os.getpid()}"  # the names of topics are those of the last run


def connect_postgresql() -> Any:
    import psycopg  # type: ignore[import-not-found]  # noqa: PLC0415

    connection = psycopg.connect(POSTGRESQL)
    SqlStore.create_table(connection, table=POSTGRESQL_TABLE)
    return connection


@pytest.fixture
def server_harness(request: pytest.FixtureRequest) -> Harness:
    from conftest import SETUP  # noqa: PLC0415

    return RedisHarness(request.getfixturevalue(SETUP))


async def claim(
    store: IdempotencyStore, topic: str, key: str = "k", consumer: str = "a", entry: str = "1-0", lease: float = 60.0
) -> Claim:
    return await store.claim(topic, "g", key, consumer, entry=entry, lease=lease)


async def test_a_claimed_key_is_busy_for_other_entries(opened: Opened, topic: str) -> None:
    async with opened() as store:
        assert await claim(store, topic) == CLAIMED
        for consumer in ("a", "b"):
            other = await claim(store, topic, consumer=consumer, entry="2-0")
            assert other.state == "busy"
            assert 50 < other.wait <= 60
        assert await claim(store, topic, "other") == CLAIMED


async def test_the_same_entry_takes_its_claim_over(opened: Opened, topic: str) -> None:
    async with opened() as store:
        assert await claim(store, topic, consumer="a") == CLAIMED
        assert await claim(store, topic, consumer="b") == CLAIMED
        await store.release(topic, "g", "k", "a")  # it is not a's any more
        assert (await claim(store, topic, entry="2-0")).state == "busy"


async def test_a_claim_ends_with_its_lease(opened: Opened, topic: str) -> None:
    async with opened() as store:
        assert await claim(store, topic, lease=0.05) == CLAIMED

        async def is_free() -> bool:
            return await claim(store, topic, consumer="b", entry="2-0") == CLAIMED

        await until(is_free, "the end of the lease")


async def test_a_renewed_claim_lasts_longer(opened: Opened, topic: str) -> None:
    async with opened() as store:
        assert await claim(store, topic, lease=30) == CLAIMED
        await store.renew(topic, "g", ["k", "unknown"], "b", lease=900)
        assert (await claim(store, topic, entry="2-0")).wait <= 30
        await store.renew(topic, "g", ["unknown", "k"], "a", lease=900)
        assert (await claim(store, topic, entry="2-0")).wait > 800
        assert await claim(store, topic, "unknown", consumer="b") == CLAIMED


async def test_a_completed_key_is_completed_for_every_entry(opened: Opened, topic: str) -> None:
    async with opened() as store:
        assert await claim(store, topic) == CLAIMED
        await store.complete(topic, "g", "k", "a", window=900)
        await store.release(topic, "g", "k", "a")
        await store.renew(topic, "g", ["k"], "a", lease=0.001)
        for entry in ("1-0", "2-0"):
            assert await claim(store, topic, entry=entry) == COMPLETED
        await store.complete(topic, "g", "never claimed", "a", window=900)
        assert await claim(store, topic, "never claimed") == COMPLETED
        # Whoever has the claim meanwhile: the effect has happened.
        assert await claim(store, topic, "taken over", consumer="b") == CLAIMED
        await store.complete(topic, "g", "taken over", "a", window=900)
        assert await claim(store, topic, "taken over", consumer="b") == COMPLETED


async def test_a_completion_is_forgotten_after_the_window(opened: Opened, topic: str) -> None:
    async with opened() as store:
        await store.complete(topic, "g", "k", "a", window=0.05)

        async def is_forgotten() -> bool:
            return await claim(store, topic) == CLAIMED

        await until(is_forgotten, "the end of the window")


async def test_a_claim_that_is_given_up_is_free(opened: Opened, topic: str) -> None:
    async with opened() as store:
        assert await claim(store, topic) == CLAIMED
        await store.release(topic, "g", "k", "a")
        await store.release(topic, "g", "k", "a")
        assert await claim(store, topic, consumer="b", entry="2-0") == CLAIMED


async def test_topics_and_groups_are_independent(opened: Opened, topic: str) -> None:
    async with opened() as store:
        await store.complete(topic, "g", "k", "a", window=900)
        assert await store.claim(topic, "other", "k", "a", entry="1-0", lease=60) == CLAIMED
        assert await store.claim(f"{topic}.other", "g", "k", "a", entry="1-0", lease=60) == CLAIMED
        assert await claim(store, topic) == COMPLETED


async def test_of_many_claims_at_once_one_is_granted(opened: Opened, topic: str) -> None:
    async with opened() as store:
        answers: list[str] = []

        async def try_it(number: int) -> None:
            answers.append((await claim(store, topic, consumer=f"c{number}", entry=f"{number}-0")).state)

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(try_it, number)
        assert sorted(answers) == ["busy"] * 19 + ["claimed"]


async def test_any_text_can_be_a_key(opened: Opened, topic: str) -> None:
    async with opened() as store:
        for key in ("ä\n€", "completed", "' OR 1=1 --", "%s ?", "x" * 256):
            assert await claim(store, topic, key, consumer="name\nwith a line end") == CLAIMED
            await store.release(topic, "g", key, "name\nwith a line end")
            assert await claim(store, topic, key, entry="2-0") == CLAIMED
            await store.complete(topic, "g", key, "a", window=900)
            assert await claim(store, topic, key) == COMPLETED


async def test_rows_whose_time_is_over_are_deleted(tmp_path: Path) -> None:
    async with SqlStore.sqlite(tmp_path / "keys.sqlite") as store:
        for number in range(30):
            await store.complete("t", "g", str(number), "a", window=0.000001 if number < 20 else 900)

        def rows() -> int:
            with sqlite3.connect(tmp_path / "keys.sqlite") as connection:
                return int(connection.execute("SELECT count(*) FROM anybus_keys").fetchone()[0])

        assert rows() == 30
        assert await store.clean(15) == 15
        assert await store.clean() == 5
        assert await store.clean() == 0
        assert rows() == 10
        for number in range(60):
            await store.complete("t", "g", "passing", "a", window=0.000001)
            await store.claim("t", "g", f"new {number}", "a", entry="1-0", lease=900)
        assert await store.claim("t", "g", "passing", "a", entry="1-0", lease=900) == CLAIMED


@pytest.mark.parametrize("style", ["qmark", "format", "pyformat", "numeric", "named"])
def test_statements_in_every_parameter_style(style: str) -> None:
    from anybus._idempotency.connections import with_parameters  # noqa: PLC0415

    expected = {
        "qmark": ("a = ? AND b = ?", (1, 2)),
        "format": ("a = %s AND b = %s", (1, 2)),
        "pyformat": ("a = %s AND b = %s", (1, 2)),
        "numeric": ("a = :1 AND b = :2", (1, 2)),
        "named": ("a = :p1 AND b = :p2", {"p1": 1, "p2": 2}),
    }
    assert with_parameters("a = ? AND b = ?", [1, 2], style) == expected[style]


@pytest.mark.parametrize("style", ["numeric", "named"])
async def test_a_store_with_another_parameter_style(tmp_path: Path, style: str) -> None:
    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(tmp_path / "keys.sqlite", check_same_thread=False)
        SqlStore.create_table(connection, table="their_keys")
        return connection

    async with SqlStore(connect, paramstyle=style, table="their_keys") as store:  # type: ignore[arg-type]
        assert await claim(store, "t") == CLAIMED
        await store.complete("t", "g", "k", "a", window=900)
        assert await claim(store, "t") == COMPLETED


async def test_after_an_error_the_connection_is_opened_again(tmp_path: Path) -> None:
    opened: list[sqlite3.Connection] = []

    def connect() -> sqlite3.Connection:
        opened.append(sqlite3.connect(tmp_path / "keys.sqlite", check_same_thread=False))
        if len(opened) > 1:
            SqlStore.create_table(opened[-1])
        return opened[-1]

    async with SqlStore(connect) as store:
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            await claim(store, "t")
        assert await claim(store, "t") == CLAIMED
    assert len(opened) == 2
    for connection in opened:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValidationError, match="connect must be a plain function"):
        SqlStore("file.sqlite")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="table must be a name of letters"):
        SqlStore.sqlite("x", table="a; DROP TABLE b")
    with pytest.raises(ValidationError, match="paramstyle must be one of qmark"):
        SqlStore(lambda: sqlite3.connect("x"), paramstyle="dollar")  # type: ignore[arg-type]


@pytest.mark.skipif(not POSTGRESQL, reason="ANYBUS_POSTGRESQL is not set")
async def test_an_open_transaction_keeps_its_claim_on_postgresql(topic: str) -> None:
    """Whoever would take the entry over waits for the end of the transaction, and finds the key completed."""
    mine = await to_thread.run_sync(connect_postgresql)
    async with (
        SqlStore(connect_postgresql, paramstyle="pyformat", now=POSTGRESQL_NOW, table=POSTGRESQL_TABLE) as one,
        SqlStore(connect_postgresql, paramstyle="pyformat", now=POSTGRESQL_NOW, table=POSTGRESQL_TABLE) as two,
    ):
        assert await claim(one, topic, consumer="a") == CLAIMED
        answers: list[Claim] = []

        async def take_over() -> None:
            answers.append(await claim(two, topic, consumer="b"))

        async with anyio.create_task_group() as tasks:
            async with one.transaction(topic, "g", "k", "a", entry="1-0", window=900, connection=mine):
                tasks.start_soon(take_over)
                await anyio.sleep(0.2)
                assert answers == []
        assert answers == [COMPLETED]
        # A transaction that is rolled back leaves the claim as it was.
        assert await claim(one, topic, "other", consumer="a") == CLAIMED
        with pytest.raises(LookupError):
            async with one.transaction(topic, "g", "other", "a", entry="1-0", window=900, connection=mine):
                raise LookupError
        assert (await claim(two, topic, "other", consumer="b", entry="2-0")).state == "busy"
        with pytest.raises(LeaseLostError):
            async with one.transaction(topic, "g", "other", "b", entry="2-0", window=900, connection=mine):
                raise AssertionError("not reached")
    await to_thread.run_sync(mine.close)
