"""The schema's history: what the migrations build, and that they do it whole or not at all."""

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import postgres
import psycopg
import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from stores import sqlite_url

from gateway import migrations
from gateway.database import WrongDatabase
from gateway.schema import metadata
from gateway.sqlite import SqliteDatabase


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Look into a database file."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        yield connection


def served(path: Path) -> None:
    """Let a server create or upgrade the database, and stop."""
    database = SqliteDatabase(f"sqlite:///{path}")
    database.open(serve=True)
    database.close()


def schema_of(path: Path) -> set[str]:
    """Return the statements that made the tables and indexes, each column of a table by itself."""
    with opened(path) as connection:
        statements = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    found = set()
    for (statement,) in statements:
        name = statement.split("(")[0]
        if name.startswith("CREATE TABLE"):
            found |= {f"{name}: {line}" for line in re.split(r",?\s*\n\s*|, (?=\w+ [A-Z])", statement)[1:]}
        else:
            found.add(" ".join(statement.split()))
    return {line for line in found if "alembic_version" not in line}


def test_the_migrations_build_what_the_program_expects(tmp_path: Path) -> None:
    """A database that grew through all releases equals one made new, indexes and conditions included."""
    served(tmp_path / "grown.db")
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'new.db'}")
    metadata.create_all(engine)
    engine.dispose()
    assert schema_of(tmp_path / "grown.db") == schema_of(tmp_path / "new.db")
    assert any(
        "uq_attempts_calling" in line and "WHERE blocking" in line for line in schema_of(tmp_path / "new.db")
    )


def test_the_migrations_build_the_indexes_that_postgresql_needs() -> None:
    """On PostgreSQL, too, a database that grew has the indexes of one made new, conditions included."""
    server = postgres.server()
    new = server.create()
    engine = sa.create_engine(new)
    metadata.create_all(engine)
    engine.dispose()
    grown = server.create(postgres.template())
    try:
        assert indexes_of(grown) == indexes_of(new)
        assert any("uq_attempts_calling" in line and "WHERE blocking" in line for line in indexes_of(new))
    finally:
        server.drop(grown)
        server.drop(new)


def indexes_of(url: str) -> set[str]:
    """Return the statements that make the indexes of a database on PostgreSQL."""
    query = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
    with psycopg.connect(url) as connection:
        return {statement for (statement,) in connection.execute(query)}


def test_every_migration_is_listed_in_its_order() -> None:
    """A release that forgot to list its migration would never apply it."""
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert tuple(script.revision for script in scripts.walk_revisions())[::-1] == migrations.REVISIONS


def test_a_current_database_is_not_touched(tmp_path: Path) -> None:
    """A restart neither rewrites the schema nor loses what is stored."""
    file = tmp_path / "gateway.db"
    served(file)
    with opened(file) as connection:
        connection.execute("INSERT INTO turns VALUES ('somebody', 7)")
        connection.commit()
        version = connection.execute("PRAGMA schema_version").fetchone()
    served(file)
    with opened(file) as connection:
        assert connection.execute("SELECT * FROM turns").fetchall() == [("somebody", 7.0)]
        assert connection.execute("PRAGMA schema_version").fetchone() == version


def test_an_upgrade_happens_whole_or_not_at_all(tmp_path: Path) -> None:
    """A failed upgrade leaves the database as it was: the old program still runs, a later try succeeds."""
    file = tmp_path / "gateway.db"
    with opened(file) as connection:
        connection.execute("CREATE TABLE outbox (id)")  # in the way of the last table
    with pytest.raises(WrongDatabase, match="table outbox already exists"):
        served(file)
    with opened(file) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("outbox",)]
        connection.execute("DROP TABLE outbox")
    served(file)


def test_a_folder_with_a_percent_sign_is_fine(tmp_path: Path) -> None:
    """The path of a database may hold what a configuration file of Alembic's would interpret."""
    (tmp_path / "100%").mkdir()
    served(tmp_path / "100%" / "gateway.db")
    command = SqliteDatabase(sqlite_url(tmp_path / "100%"))
    command.open(serve=False)
    command.close()
