"""What the tests of PostgreSQL share: databases, units of work, a gateway without its other parts."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator

import postgres
import psycopg
import pytest
import sqlalchemy as sa
from postgres import Server

from gateway.database import Work
from gateway.postgresql import PostgresqlDatabase

PATIENCE = 30.0  # seconds
WORDS = sa.Table("words", sa.MetaData(), sa.Column("word", sa.String, unique=True))


@pytest.fixture
def url() -> Iterator[str]:
    """Return the URL of an empty database of the gateway's, with one more table to write into."""
    url = postgres.server().create(postgres.template())
    execute(url, "CREATE TABLE words (word TEXT UNIQUE)")
    yield url
    postgres.server().drop(url)


@pytest.fixture
async def database(url: str) -> AsyncIterator[PostgresqlDatabase]:
    """Return that database as one gateway has it open."""
    database = PostgresqlDatabase(url)
    database.open(serve=True)
    yield database
    await asyncio.to_thread(database.close)


@pytest.fixture
def nothing() -> Iterator[str]:
    """Return the URL of a database without anything in it."""
    url = postgres.server().create()
    yield url
    postgres.server().drop(url)


@pytest.fixture(scope="module")
def machine() -> Iterator[Server]:
    """Return a server that a test may start and stop as it likes."""
    server = postgres.new_server()
    yield server
    server.stop()


def execute(url: str, statements: str) -> list[tuple[object, ...]]:
    """Execute statements as somebody else; return the rows of a single one."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statements.encode())
        return cursor.fetchall() if cursor.description else []


def statement(text: str, **values: object) -> Work[None]:
    """Make a unit of work that executes one statement."""
    return lambda connection: connection.execute(sa.text(text), values).close()


def say(word: str) -> Work[None]:
    """Make a unit of work that writes a word."""
    return lambda connection: connection.execute(WORDS.insert().values(word=word)).close()


def words(url: str) -> set[object]:
    """Return the words that are committed."""
    return {word for (word,) in execute(url, "SELECT word FROM words")}


class Bell:
    """Counts the news."""

    def __init__(self) -> None:
        self.rung = 0
        self._changed = threading.Condition()

    def __call__(self) -> None:
        """Take one."""
        with self._changed:
            self.rung += 1
            self._changed.notify_all()

    async def wait(self, rung: int, patience: float = PATIENCE) -> bool:
        """Wait until it has been rung so often; return whether it was."""

        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: self.rung >= rung, patience)

        return await asyncio.to_thread(wait)


@contextlib.asynccontextmanager
async def gateway(url: str, *, serve: bool = True) -> AsyncIterator[tuple[PostgresqlDatabase, Bell]]:
    """Open the database once more; wait until it hears the others."""
    bell = Bell()
    database = PostgresqlDatabase(url, bell)
    database.open(serve=serve)
    assert not serve or await bell.wait(1)
    bell.rung = 0
    try:
        yield database, bell
    finally:
        await asyncio.to_thread(database.close)
