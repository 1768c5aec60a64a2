"""Statements compiled once: SQLAlchemy's own way to run one costs many times what SQLite needs for it.

In charge of: running the statements that are constants of a module as text, straight on the driver. A
statement that comes for the first time goes SQLAlchemy's way, and so does each that is built for one use or
whose text depends on its values (a list that is expanded).

Promises: what the store sees is the same either way: rows with names, values of the columns' types. It is for
SQLite alone: psycopg has its own text for values and its own prepared statements.

Fails: with the driver's own errors, or SQLAlchemy's around them.
"""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData
from sqlalchemy.sql.dml import UpdateBase

Values = dict[str, Any]
_NONE: Values = {}


@dataclass(frozen=True, slots=True)
class _Text:
    """A statement as the driver takes it."""

    sql: str
    names: tuple[str, ...]  # of the values, in the order of the question marks
    constants: Values  # those that the statement brings along
    columns: SimpleResultMetaData | None  # of the rows that it returns
    readers: tuple[tuple[int, Callable[[Any], Any]], ...]  # for columns whose type the driver does not know


@dataclass(frozen=True, slots=True)
class Done:
    """What is known of a statement that returns no rows."""

    rowcount: int


class Statements:
    """A connection inside a transaction that its owner began: quicker at what the store's verbs do most."""

    def __init__(self, connection: Connection) -> None:
        driver = connection.connection.driver_connection
        if not isinstance(driver, sqlite3.Connection):
            raise TypeError(f"{type(driver)} is not a connection to SQLite")
        self.driver = driver
        self._connection = connection
        # By statement, then by the names of its values: those decide on the text of an INSERT. Weak, for a
        # statement that is built for one use shall not stay.
        self._texts: WeakKeyDictionary[sa.Executable, dict[tuple[str, ...], _Text | None]] = (
            WeakKeyDictionary()
        )

    def __getattr__(self, name: str) -> Any:
        """Leave all else to the connection."""
        return getattr(self._connection, name)

    def execute(self, statement: sa.Executable, values: Values | None = None) -> Any:
        """Do what `Connection.execute` does with one set of values."""
        values = values or _NONE
        known = self._texts.get(statement)
        if known is None:  # perhaps it never comes again
            self._texts[statement] = {}
        if known is None or not isinstance(values, dict):  # a list of sets of values is not ours
            return self._connection.execute(statement, values)
        names = tuple(values)
        try:
            text = known[names]
        except KeyError:
            text = known[names] = self._compiled(statement, names)
        if text is None:
            return self._connection.execute(statement, values)
        given = {**text.constants, **values} if text.constants else values
        cursor = self.driver.execute(text.sql, [given[name] for name in text.names])
        if text.columns is None:
            return Done(cursor.rowcount)
        rows = cursor.fetchall()
        if text.readers:
            rows = [_read(row, text.readers) for row in rows]
        return IteratorResult(text.columns, iter(rows))

    def _compiled(self, statement: sa.Executable, names: tuple[str, ...]) -> _Text | None:
        """Return the statement's text; None if there is none that holds for all values."""
        if not isinstance(statement, sa.Select | UpdateBase):
            return None
        compiled: Any = statement.compile(dialect=self._connection.dialect, column_keys=names or None)
        wanted = {name for name, bind in compiled.binds.items() if bind.required}
        columns = list(statement.exported_columns)
        nameless = any(column.key is None for column in columns)
        if compiled.post_compile_params or compiled.literal_execute_params or wanted - set(names) or nameless:
            return None
        dialect = self._connection.dialect
        processors = [column.type.dialect_impl(dialect).result_processor(dialect, None) for column in columns]
        return _Text(
            sql=str(compiled),
            names=tuple(compiled.positiontup or ()),
            constants={name: value for name, value in compiled.params.items() if name not in names},
            columns=SimpleResultMetaData([column.key or "" for column in columns]) if columns else None,
            readers=tuple((place, reader) for place, reader in enumerate(processors) if reader is not None),
        )


def _read(row: tuple[Any, ...], readers: tuple[tuple[int, Callable[[Any], Any]], ...]) -> tuple[Any, ...]:
    values = list(row)
    for place, reader in readers:
        values[place] = reader(values[place])
    return tuple(values)
