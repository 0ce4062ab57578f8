"""The kinds of database connections that a store can work with: any DB-API connection, and those of SQLAlchemy."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypeVar, Union, runtime_checkable

from .._ground.checks import check_choice, refuse
from .._ground.errors import ValidationError

T = TypeVar("T")

ParamStyle = Literal["qmark", "format", "pyformat", "numeric", "named"]
PARAM_STYLES: Final[tuple[ParamStyle, ...]] = ("qmark", "format", "pyformat", "numeric", "named")

Parameters = Union[Sequence[Any], Mapping[str, Any]]


class Cursor(Protocol):
    """A DB-API cursor, as far as it is needed."""

    @property
    def rowcount(self) -> int: ...

    def execute(self, statement: str, parameters: Any, /) -> Any: ...

    def fetchall(self) -> Sequence[Any]: ...

    def close(self) -> None: ...


@runtime_checkable
class DBConnection(Protocol):
    """A DB-API connection, as far as it is needed."""

    def cursor(self) -> Any: ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...

    def close(self) -> None: ...


class Dialect(Protocol):
    @property
    def paramstyle(self) -> str: ...


@runtime_checkable
class SqlAlchemyConnection(Protocol):
    """A connection of SQLAlchemy, as far as it is needed."""

    @property
    def dialect(self) -> Any: ...

    def exec_driver_sql(self, statement: str, parameters: Any = None) -> Any: ...

    def in_transaction(self) -> bool: ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class SqlAlchemyAsyncConnection(Protocol):
    """An ``AsyncConnection`` of SQLAlchemy: it runs plain functions with its synchronous connection."""

    async def run_sync(self, fn: Callable[[Any], T], /) -> T: ...


def with_parameters(statement: str, values: Sequence[Any], style: str) -> tuple[str, Parameters]:
    """A statement with ``?`` for its parameters, in the style of a driver."""
    head, *rest = statement.split("?")
    names = [f"p{number}" for number in range(1, len(rest) + 1)]
    if style == "qmark":
        return statement, tuple(values)
    if style in ("format", "pyformat"):
        marks = ["%s"] * len(rest)
    elif style == "numeric":
        marks = [f":{number}" for number in range(1, len(rest) + 1)]
    elif style == "numeric_dollar":  # how SQLAlchemy calls the style of some drivers
        marks = [f"${number}" for number in range(1, len(rest) + 1)]
    else:
        marks = [f":{name}" for name in names]
    text = head + "".join(mark + part for mark, part in zip(marks, rest, strict=True))
    return text, dict(zip(names, values, strict=True)) if style == "named" else tuple(values)


class Work:
    """A connection with one way to run statements. Every method blocks, so it is called in a worker thread.

    :param style: the parameter style of a DB-API connection. (Those of SQLAlchemy know their own.)
    """

    def __init__(self, connection: DBConnection | SqlAlchemyConnection, style: str) -> None:
        self._connection = connection
        self._style = style
        if isinstance(connection, SqlAlchemyConnection):
            self._style = connection.dialect.paramstyle

    def run(self, statement: str, *values: Any) -> int:
        """Run a statement; return how many rows it changed."""
        text, parameters = with_parameters(statement, values, self._style)
        if isinstance(self._connection, SqlAlchemyConnection):
            return int(self._connection.exec_driver_sql(text, parameters).rowcount)
        cursor: Cursor = self._connection.cursor()
        try:
            cursor.execute(text, parameters)
            return cursor.rowcount
        finally:
            cursor.close()

    def rows(self, statement: str, *values: Any) -> Sequence[Any]:
        text, parameters = with_parameters(statement, values, self._style)
        if isinstance(self._connection, SqlAlchemyConnection):
            found: Sequence[Any] = self._connection.exec_driver_sql(text, parameters).fetchall()
            return found
        cursor: Cursor = self._connection.cursor()
        try:
            cursor.execute(text, parameters)
            return cursor.fetchall()
        finally:
            cursor.close()

    def begin(self) -> None:
        """Prepare for a transaction of our own. Most drivers begin it with the first statement.

        :raises ValidationError: if a transaction is open.
        """
        connection = self._connection
        if isinstance(connection, sqlite3.Connection):
            if connection.in_transaction:
                raise ValidationError("connection must have no open transaction (sqlite3: in_transaction is true)")
            try:
                # It also begins with isolation_level=None, and it does not have to become a writer later on.
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.ProgrammingError as error:
                if "thread" not in str(error):
                    raise
                raise ValidationError(
                    "connection must be usable in worker threads: sqlite3.connect(..., check_same_thread=False)"
                ) from error
        elif isinstance(connection, SqlAlchemyConnection) and connection.in_transaction():
            raise ValidationError("connection must have no open transaction (SQLAlchemy: in_transaction() is true)")

    def commit(self) -> None:
        self._connection.commit()

    def rollback(self) -> None:
        self._connection.rollback()

    def close(self) -> None:
        self._connection.close()


def check_connection(connection: object) -> DBConnection | SqlAlchemyConnection | SqlAlchemyAsyncConnection:
    if not isinstance(connection, (SqlAlchemyAsyncConnection, SqlAlchemyConnection, DBConnection)):
        refuse("connection", connection, "a DB-API connection, or a connection of SQLAlchemy")
    return connection


def check_style(style: object) -> ParamStyle:
    return check_choice("paramstyle", style, PARAM_STYLES)
