"""Statements that go straight to SQLite's driver: the same answers as SQLAlchemy's way."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from gateway.sqlite_statements import Statements
from gateway.store_unit import Unit, Upsert

PAPERS = sa.Table(
    "papers", sa.MetaData(), sa.Column("id", sa.String, primary_key=True), sa.Column("pages", sa.Integer),
    sa.Column("colour", sa.Boolean, nullable=False), sa.Column("data", sa.LargeBinary),
    sa.Column("at", sa.Float),
)  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"id": "a", "pages": 1, "colour": True, "data": b"\0\xff", "at": 1.5},
    {"id": "b", "pages": None, "colour": False, "data": None, "at": None},
]
ADD = sa.insert(PAPERS)
ALL = sa.select(PAPERS).order_by(PAPERS.c.id)
ONE = sa.select(PAPERS.c.colour, PAPERS.c.pages).where(PAPERS.c.id == sa.bindparam("wanted"))
LISTED = (
    sa.select(PAPERS.c.id).where(PAPERS.c.id.in_(sa.bindparam("ids", expanding=True))).order_by(PAPERS.c.id)
)
LONGER = (
    sa.update(PAPERS)
    .where(PAPERS.c.id == sa.bindparam("wanted"))
    .values(pages=PAPERS.c.pages + 1, colour=True)
)
KEEP = Upsert(
    PAPERS,
    lambda insert: insert.on_conflict_do_update(
        index_elements=["id"],
        set_={"pages": insert.excluded.pages},
        where=PAPERS.c.at < sa.bindparam("now"),
    ).returning(PAPERS.c.id, PAPERS.c.colour),
)


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sa.Connection]:
    """Return a connection with some rows."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'papers.db'}")
    with engine.begin() as connection:
        PAPERS.create(connection)
        connection.execute(ADD, ROWS)
        yield connection
    engine.dispose()


def times(
    statements: Statements, statement: sa.Executable, values: dict[str, Any] | None = None
) -> list[Any]:
    """Return what a statement answers the first time, the second and the third."""
    return [statements.execute(statement, values).mappings().all() for _ in range(3)]


def test_rows_are_the_same_each_time(connection: sa.Connection) -> None:
    """Names, numbers, truth values and octets come as the columns' types say, whichever way they go."""
    statements = Statements(connection)
    first, second, third = (statements.execute(ALL).mappings().all() for _ in range(3))
    assert first == second == third == ROWS
    assert [type(row["colour"]) for row in third] == [bool, bool]
    assert [type(row["data"]) for row in third] == [bytes, type(None)]


def test_values_find_their_places(connection: sa.Connection) -> None:
    """A row is found by its value, as a tuple with names."""
    statements = Statements(connection)
    for wanted, found in (("a", (True, 1)), ("b", (False, None)), ("a", (True, 1)), ("c", None)):
        assert statements.execute(ONE, {"wanted": wanted}).first() == found


def test_changes_are_counted(connection: sa.Connection) -> None:
    """Who compares and sets hears whether a row was there; constants of the statement are set, too."""
    statements = Statements(connection)
    counts = [statements.execute(LONGER, {"wanted": wanted}).rowcount for wanted in ("a", "a", "c", "a")]
    assert counts == [1, 1, 0, 1]
    assert statements.execute(ONE, {"wanted": "a"}).one() == (True, 4)


def test_rows_are_added_with_what_is_given(connection: sa.Connection) -> None:
    """An INSERT takes the columns that it is given, different ones each time."""
    statements = Statements(connection)
    for name in ("c", "d", "e"):
        statements.execute(ADD, {"id": name, "colour": False})
        statements.execute(ADD, {"id": f"{name}-2", "colour": True, "pages": 7})
    added = statements.execute(ALL).all()[2:]
    assert [(row.id, row.pages) for row in added] == [
        ("c", None), ("c-2", 7), ("d", None), ("d-2", 7), ("e", None), ("e-2", 7)
    ]  # fmt: skip


def test_conflicts_are_answered(connection: sa.Connection) -> None:
    """An INSERT that meets its row changes it if it may, and tells what it did."""
    unit: Any = Unit(Statements(connection), 0.0, None, "")  # type: ignore[arg-type]  # it needs no more
    row = {"id": "a", "colour": False, "pages": 9}
    answers = [KEEP.run(unit, row | {"now": now}).first() for now in (1.0, 1.0, 2.0, 1.0)]
    assert answers == [None, None, ("a", True), None]


def test_lists_of_any_length_are_expanded(connection: sa.Connection) -> None:
    """A statement whose text depends on its values is written anew for each."""
    statements = Statements(connection)
    for ids in (["a"], ["a", "b"], [], ["b", "c", "a"]):
        found = statements.execute(LISTED, {"ids": ids}).scalars().all()
        assert found == sorted({"a", "b"} & set(ids))


def test_a_value_that_is_missing_is_a_fault(connection: sa.Connection) -> None:
    """A forgotten value is never taken for NULL."""
    statements = Statements(connection)
    for _ in range(3):
        with pytest.raises(sa.exc.StatementError, match="wanted"):
            statements.execute(ONE, {})


def test_other_texts_go_through(connection: sa.Connection) -> None:
    """What is no statement of a table's goes SQLAlchemy's way, as does all else that a connection can do."""
    statements = Statements(connection)
    assert [statements.execute(sa.text("SELECT 1")).scalar() for _ in range(2)] == [1, 1]
    text = sa.text("SELECT count(*) FROM papers")
    assert [statements.execute(text).scalar() for _ in range(3)] == [2, 2, 2]
    assert statements.dialect.name == "sqlite"


def test_faults_are_the_drivers(connection: sa.Connection) -> None:
    """What the database refuses is told each time, by SQLAlchemy or by the driver."""
    statements = Statements(connection)
    for _ in range(3):
        with pytest.raises((sa.exc.IntegrityError, sqlite3.IntegrityError)):
            statements.execute(ADD, {"id": "a", "colour": True})


def test_only_sqlite_is_spoken(connection: sa.Connection) -> None:
    """A connection to something else is refused at once."""

    class Other:
        driver_connection = object()

    class Foreign:
        connection = Other()

    with pytest.raises(TypeError, match="SQLite"):
        Statements(Foreign())  # type: ignore[arg-type]  # on purpose
    del connection
