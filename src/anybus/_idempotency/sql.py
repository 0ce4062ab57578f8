"""An idempotency store in an SQL database. Its completions can be part of the handler's own transaction."""

from __future__ import annotations

import hashlib
import inspect
import re
import sqlite3
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
import anyio.to_thread

from .._ground.checks import check_int, check_text, refuse
from .._ground.errors import LeaseLostError
from ..abc import Claim, TransactionalStore
from .connections import (
    DBConnection,
    ParamStyle,
    SqlAlchemyAsyncConnection,
    SqlAlchemyConnection,
    Work,
    check_connection,
    check_style,
)

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

_SQLITE_NOW: Final = "((julianday('now') - 2440587.5) * 86400.0)"
_TRIES: Final = 5
_CLEAN_EVERY: Final = 50
_CLEANED: Final = 100
_THREADS: Final = 16


class SqlStore(TransactionalStore, AbstractAsyncContextManager["SqlStore", None]):
    """Keeps keys in a table of an SQL database: ``sqlite3``, or any other with a DB-API driver or SQLAlchemy.

    Its own statements run in a worker thread, one at a time, on a connection of its own. So the event loop never waits
    for the database. The connection is opened at the first statement, and again after an error. Leaving the store's
    ``async with``, or ``await store.aclose()``, closes it.

    :param connect: opens a connection that may be used in other threads, one at a time
        (``sqlite3.connect(path, check_same_thread=False)``).
    :param paramstyle: the ``paramstyle`` of the driver. (Connections of SQLAlchemy know their own.)
    :param now: an SQL expression for the time in seconds as a floating point number, by the database's clock; None =
        the one for SQLite.
    :param table: the name of the table; it may be preceded by a schema's name and a dot.
    :raises ValidationError: if a value is refused.
    """

    def __init__(
        self,
        connect: Callable[[], DBConnection | SqlAlchemyConnection],
        *,
        paramstyle: ParamStyle = "qmark",
        now: str | None = None,
        table: str = "anybus_keys",
    ) -> None:
        given: object = connect
        if not callable(given) or inspect.iscoroutinefunction(given):
            refuse("connect", connect, "a plain function that opens a connection")
        if now is not None and "?" in check_text("now", now):
            refuse("now", now, "an SQL expression without parameters")
        self._connect = connect
        self._style = check_style(paramstyle)
        self._now = _SQLITE_NOW if now is None else f"({now})"
        self._table = _check_table(table)
        self._own: Work | None = None
        self._claimed = 0
        self._alone = anyio.CapacityLimiter(1)
        # Endings have threads of their own. Otherwise, beginnings that wait for the lock of an open transaction could
        # take all threads, and the transaction could not end.
        self._beginnings = anyio.CapacityLimiter(_THREADS)
        self._endings = anyio.CapacityLimiter(_THREADS)

    @classmethod
    def sqlite(cls, path: str | Path, *, table: str = "anybus_keys", timeout: float = 30.0) -> SqlStore:
        """A store in a file of SQLite. The table is created if it does not exist.

        :param timeout: for how many seconds a statement waits while another connection writes.
        """

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(path, timeout=timeout, check_same_thread=False)
            cls.create_table(connection, table=table)
            return connection

        return cls(connect, table=table)

    @staticmethod
    def create_table(connection: DBConnection | SqlAlchemyConnection, *, table: str = "anybus_keys") -> None:
        """Create the table and its index if they do not exist, and commit. This blocks: it is for an application's
        start, or for its migrations.
        """
        table = _check_table(table)
        work = Work(connection, "qmark")
        for statement in SqlStore.ddl(table):
            work.run(statement)
        work.commit()

    @staticmethod
    def ddl(table: str = "anybus_keys") -> tuple[str, str]:
        """The statements that create the table and its index."""
        table = _check_table(table)
        columns = "id CHAR(64) NOT NULL PRIMARY KEY, consumer VARCHAR(256), entry VARCHAR(255), ends_at"
        return (
            f"CREATE TABLE IF NOT EXISTS {table} ({columns} DOUBLE PRECISION NOT NULL)",
            f"CREATE INDEX IF NOT EXISTS {table.rpartition('.')[2]}_ends_at ON {table} (ends_at)",
        )

    @staticmethod
    def row_id(topic: str, group: str, key: str) -> str:
        """The ``id`` of a key's row: SHA-256 of topic, group and key, each preceded by its length in bytes."""
        digest = hashlib.sha256()
        for part in (topic, group, key):
            encoded = part.encode()
            digest.update(b"%d:" % len(encoded) + encoded)
        return digest.hexdigest()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()

    async def aclose(self) -> None:
        """Close the store's own connection."""
        await anyio.to_thread.run_sync(self._close, limiter=self._alone)

    def _close(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            own.close()

    async def _run(self, do: Callable[[Work], T]) -> T:
        """Do something on the store's own connection."""
        return await anyio.to_thread.run_sync(self._run_here, do, limiter=self._alone)

    def _run_here(self, do: Callable[[Work], T]) -> T:
        if self._own is None:
            self._own = Work(self._connect(), self._style)
        try:
            return do(self._own)
        except BaseException:
            # It may be broken. The next statement opens another one.
            with suppress(Exception):
                self._own.rollback()
            with suppress(Exception):
                self._close()
            raise

    async def claim(self, topic: str, group: str, key: str, consumer: str, *, entry: str, lease: float) -> Claim:
        row_id = self.row_id(topic, group, key)
        return await self._run(lambda work: self._claim(work, row_id, consumer, entry, lease))

    def _claim(self, work: Work, row_id: str, consumer: str, entry: str, lease: float) -> Claim:
        table, now = self._table, self._now
        self._claimed += 1
        if self._claimed % _CLEAN_EVERY == 0:
            self._clean(work, _CLEANED)
        for tries in range(_TRIES):
            found = work.rows(f"SELECT consumer, entry, ends_at - {now} FROM {table} WHERE id = ?", row_id)
            work.rollback()
            if not found:
                statement = f"INSERT INTO {table} (id, consumer, entry, ends_at) VALUES (?, ?, ?, {now} + ?)"
                try:
                    changed = work.run(statement, row_id, consumer, entry, lease)
                except Exception:
                    # Drivers have different errors for a row that somebody else has inserted meanwhile.
                    work.rollback()
                    if tries == _TRIES - 1:
                        raise
                    continue
            else:
                owner, owned, left = found[0]
                if left > 0 and owner is None:
                    return Claim("completed")
                if left > 0 and owned != entry:
                    return Claim("busy", float(left))
                statement = (
                    f"UPDATE {table} SET consumer = ?, entry = ?, ends_at = {now} + ? "
                    f"WHERE id = ? AND (ends_at <= {now} OR (consumer IS NOT NULL AND entry = ?))"
                )
                changed = work.run(statement, consumer, entry, lease, row_id, entry)
            work.commit()
            if changed == 1:
                return Claim("claimed")
        return Claim("busy", lease)

    async def renew(self, topic: str, group: str, keys: Sequence[str], consumer: str, *, lease: float) -> None:
        ids = [self.row_id(topic, group, key) for key in keys]
        statement = f"UPDATE {self._table} SET ends_at = {self._now} + ? WHERE id = ? AND consumer = ?"

        def renew(work: Work) -> None:
            for row_id in ids:
                work.run(statement, lease, row_id, consumer)
            work.commit()

        await self._run(renew)

    async def complete(self, topic: str, group: str, key: str, consumer: str, *, window: float) -> None:
        row_id, table, now = self.row_id(topic, group, key), self._table, self._now

        def complete(work: Work) -> None:
            for tries in range(_TRIES):
                statement = f"UPDATE {table} SET consumer = NULL, entry = NULL, ends_at = {now} + ? WHERE id = ?"
                if work.run(statement, window, row_id) != 1:
                    statement = f"INSERT INTO {table} (id, ends_at) VALUES (?, {now} + ?)"
                    try:
                        work.run(statement, row_id, window)
                    except Exception:
                        work.rollback()
                        if tries == _TRIES - 1:
                            raise
                        continue
                work.commit()
                return

        await self._run(complete)

    async def release(self, topic: str, group: str, key: str, consumer: str) -> None:
        row_id = self.row_id(topic, group, key)

        def release(work: Work) -> None:
            work.run(f"DELETE FROM {self._table} WHERE id = ? AND consumer = ?", row_id, consumer)
            work.commit()

        await self._run(release)

    async def clean(self, limit: int = 1000) -> int:
        """Delete rows whose time is over. (Each fiftieth claim deletes up to a hundred.)

        :param limit: how many at most.
        :return: how many were deleted.
        """
        limit = check_int("limit", limit, least=1)
        return await self._run(lambda work: self._clean(work, limit))

    def _clean(self, work: Work, limit: int) -> int:
        # In two steps, because not every database can delete a limited number of rows.
        old = work.rows(f"SELECT id FROM {self._table} WHERE ends_at <= {self._now} ORDER BY ends_at LIMIT {limit}")
        work.rollback()
        statement = f"DELETE FROM {self._table} WHERE id = ? AND ends_at <= {self._now}"
        deleted = sum(work.run(statement, row[0]) for row in old)
        work.commit()
        return deleted

    @asynccontextmanager
    async def transaction(
        self, topic: str, group: str, key: str, consumer: str, *, entry: str, window: float, connection: object
    ) -> AsyncGenerator[None, None]:
        checked = check_connection(connection)
        row_id = self.row_id(topic, group, key)
        # First of all, so that the row is locked while the effects are written: nobody can take the claim over.
        statement = (
            f"UPDATE {self._table} SET consumer = NULL, entry = NULL, ends_at = {self._now} + ? "
            "WHERE id = ? AND consumer = ? AND entry = ?"
        )

        def begin(work: Work) -> bool:
            work.begin()
            try:
                ours = work.run(statement, window, row_id, consumer, entry) == 1
            except BaseException:
                work.rollback()
                raise
            if not ours:
                work.rollback()
            return ours

        async def on(do: Callable[[Work], T], limiter: anyio.CapacityLimiter) -> T:
            if isinstance(checked, SqlAlchemyAsyncConnection):
                return await checked.run_sync(lambda plain: do(Work(plain, self._style)))
            work = Work(checked, self._style)
            return await anyio.to_thread.run_sync(do, work, limiter=limiter)

        if not await on(begin, self._beginnings):
            raise LeaseLostError(f"the claim of key {key!r} was taken over by another consumer")
        try:
            yield
        except BaseException:
            with anyio.CancelScope(shield=True):
                await on(Work.rollback, self._endings)
            raise
        with anyio.CancelScope(shield=True):
            try:
                await on(Work.commit, self._endings)
            except BaseException:
                with suppress(Exception):
                    await on(Work.rollback, self._endings)  # noqa: ASYNC102 - shielded; a thread cannot be stopped
                raise


def _check_table(table: Any) -> str:
    text = check_text("table", table)
    if not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*\.)?[A-Za-z_][A-Za-z0-9_]*", text):
        refuse("table", table, "a name of letters, digits and underscores, or two of them with a dot in between")
    return text
