"""The database: group commit, faults of disk and file, other processes beside it, opening and closing."""

import asyncio
import contextlib
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection
from stores import overheard, sqlite_url

from gateway import migrations
from gateway.database import StoreError, StoreFull, StoreUnavailable, Work, WrongDatabase
from gateway.sqlite import LARGE_LIMIT, VACUUM_STEP, SqliteDatabase, _empty_log, _vacuum_some

SECRET = b"the terms of the contract "
SQL_SHELL = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
for line in sys.stdin:
    connection.execute(line).fetchall()
    print("done", flush=True)
"""


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[SqliteDatabase]:
    """Return an open database of the gateway's, with one more table to write into."""
    database = SqliteDatabase(sqlite_url(tmp_path), busy_timeout=0.2)
    database.open(serve=True)
    await database.write(statement("CREATE TABLE words (word TEXT UNIQUE)"))
    yield database
    await asyncio.to_thread(database.close)


def statement(text: str, **values: object) -> Work[None]:
    """Make a unit of work that executes one statement."""
    return lambda connection: connection.execute(sa.text(text), values).close()


def say(word: str) -> Work[None]:
    """Make a unit of work that writes a word."""
    return statement("INSERT INTO words VALUES (:word)", word=word)


def chunk(position: int, data: bytes = SECRET * 4000) -> Work[None]:
    """Make a unit of work that writes about 100 KB."""
    return statement(
        "INSERT INTO document_chunks VALUES ('d', :position, 0, :data)", position=position, data=data
    )


def number_of(query: str) -> Work[int]:
    """Make a unit of work that returns a number."""
    return lambda connection: connection.exec_driver_sql(query).scalar_one()


async def words(database: SqliteDatabase) -> list[str]:
    """Return the words that are committed."""
    return await database.read(
        lambda connection: list(connection.exec_driver_sql("SELECT word FROM words ORDER BY rowid").scalars())
    )


@contextlib.contextmanager
def busy_writer(database: SqliteDatabase) -> Iterator[None]:
    """Keep the writer busy meanwhile: all that is asked within becomes one group."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(_connection: Connection) -> None:
        begun.set()
        assert go_on.wait(30)

    database.write(wait)
    assert begun.wait(30)
    try:
        yield
    finally:
        go_on.set()


@contextlib.asynccontextmanager
async def other_process(database: SqliteDatabase) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start another process that has the database open and executes the statements it reads."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-IS", "-c", SQL_SHELL, str(database.url.database),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        await process.wait()


async def tell(process: asyncio.subprocess.Process, sql: str) -> None:
    """Let the other process execute a statement, and wait until it has."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{sql}\n".encode())
    assert await process.stdout.readline() == b"done\n"


# --- units of work -----------------------------------------------------------------------------------


async def test_a_failing_unit_leaves_its_neighbours_alone(database: SqliteDatabase) -> None:
    """One mail that cannot be stored takes nothing from the mails that are stored with it."""

    def half_done(connection: Connection) -> None:
        say("half")(connection)
        raise LookupError("the rest fails")

    with busy_writer(database):
        units = [database.write(work) for work in (say("one"), half_done, say("one"), say("two"))]
    outcomes = await asyncio.gather(*units, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), LookupError, StoreUnavailable, type(None)]
    assert await words(database) == ["one", "two"]


async def test_what_waits_together_is_committed_together(database: SqliteDatabase) -> None:
    """Fifty units that wait cost one transaction, so that a burst is not fifty times as slow."""
    with overheard(database) as heard:
        with busy_writer(database):
            units = [database.write(say(str(n))) for n in range(50)]
        await asyncio.gather(*units)
    assert await words(database) == [str(n) for n in range(50)]
    assert [sql for sql, _ in heard].count("BEGIN IMMEDIATE") <= 2  # the first was for the busy one


async def test_the_work_of_a_cancelled_caller_is_committed(database: SqliteDatabase) -> None:
    """When a client leaves during DATA, what was begun for it happens whole."""
    with busy_writer(database):
        caller = asyncio.ensure_future(database.write(say("kept")))
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
    await database.write(say("next"))
    assert await words(database) == ["kept", "next"]


async def test_a_reader_sees_only_what_is_committed(database: SqliteDatabase) -> None:
    """A list never shows a fax whose mail was not accepted yet, and does not wait for the writer."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        say("soon")(connection)
        begun.set()
        assert go_on.wait(30)

    writing = database.write(slow)
    assert begun.wait(30)
    assert await words(database) == []
    go_on.set()
    await writing
    assert await words(database) == ["soon"]
    with pytest.raises(StoreUnavailable, match="readonly"):
        await database.read(say("smuggled"))


# --- trouble -----------------------------------------------------------------------------------------


async def test_a_full_disk_is_told_and_left_behind(database: SqliteDatabase) -> None:
    """On a full disk nothing is half kept, small work beside it succeeds, and space ends the trouble."""
    pages = await database.write(number_of("PRAGMA page_count"))
    await database.write(number_of(f"PRAGMA max_page_count={pages + 2}"))
    with busy_writer(database):
        units = [database.write(work) for work in (say("before"), chunk(0), say("after"))]
    outcomes = await asyncio.gather(*units, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), StoreFull, type(None)]
    assert await words(database) == ["before", "after"]
    with pytest.raises(StoreFull):
        await database.write(chunk(0))
    await database.write(number_of("PRAGMA max_page_count=1000000"))
    await database.write(chunk(0))
    assert await database.read(number_of("SELECT count(*) FROM document_chunks")) == 1


async def test_a_lock_held_too_long_is_told_and_left_behind(database: SqliteDatabase) -> None:
    """When another process keeps the database locked, callers hear of it and can go on later."""
    async with other_process(database) as other:
        await tell(other, "BEGIN IMMEDIATE")
        units = [database.write(say(word)) for word in ("a", "b")]
        outcomes = await asyncio.gather(*units, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StoreUnavailable, StoreUnavailable]
        assert "locked" in str(outcomes[0])
        await tell(other, "COMMIT")
    await database.write(say("c"))
    assert await words(database) == ["c"]


async def test_the_news_of_another_process_comes_within_a_second(tmp_path: Path) -> None:
    """A daemon notices what a command did without being told."""
    heard = threading.Event()
    database = SqliteDatabase(sqlite_url(tmp_path), heard.set)
    database.open(serve=True)
    async with other_process(database) as other:
        await tell(other, "SELECT 1")
        assert not heard.is_set()
        await tell(other, "INSERT INTO turns VALUES ('somebody', 1)")
        assert await asyncio.to_thread(heard.wait, 1.0)
    heard.clear()
    await database.write(statement("DELETE FROM turns"))
    assert await asyncio.to_thread(heard.wait, 1.0), "our own commits are news too"
    await asyncio.to_thread(database.close)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_nobody_waits_for_a_thread_that_ended(tmp_path: Path) -> None:
    """Should a fault ever end the writer, whoever asks hears that the store is away, and need not wait."""
    waited_for = threading.Event()

    def fault() -> None:
        assert waited_for.wait(30)
        raise RuntimeError("a fault of ours")

    database = SqliteDatabase(sqlite_url(tmp_path), fault)
    database.open(serve=True)
    await database.write(statement("INSERT INTO turns VALUES ('somebody', 1)"))  # answered before the news
    units = [database.write(number_of("SELECT 1")) for _ in range(3)]
    waited_for.set()
    outcomes = await asyncio.wait_for(asyncio.gather(*units, return_exceptions=True), 30)
    assert [str(outcome) for outcome in outcomes] == ["the store's thread ended"] * 3
    with pytest.raises(StoreUnavailable, match="closed"):
        database.read(number_of("SELECT 1"))
    await asyncio.to_thread(database.close)


# --- opening and closing -----------------------------------------------------------------------------


async def test_closing_finishes_what_was_asked(database: SqliteDatabase) -> None:
    """What waited when the gateway was told to stop is still done; what comes later is refused at once."""

    async def go_on_saying() -> None:
        while True:
            units.append(database.write(say(f"late {len(units)}")))
            await asyncio.sleep(0)

    with busy_writer(database):
        units = [database.write(say(str(n))) for n in range(600)]  # more than one group
        reading = database.read(number_of("SELECT 1"))
        closing = asyncio.create_task(asyncio.to_thread(database.close))
        with pytest.raises(StoreUnavailable, match="closed"):
            await go_on_saying()
    await asyncio.gather(*units, reading, closing)
    await asyncio.to_thread(database.close)  # once more does no harm
    with contextlib.closing(sqlite3.connect(str(database.url.database))) as connection:
        assert connection.execute("SELECT count(*) FROM words").fetchone() == (len(units),)


def test_a_second_server_is_refused(tmp_path: Path) -> None:
    """Two daemons on one file are a mistake; the second says so, and a command works beside the first."""
    first, second, command = (SqliteDatabase(sqlite_url(tmp_path)) for _ in range(3))
    first.open(serve=True)
    with pytest.raises(WrongDatabase, match="another `fax-gateway serve` uses"):
        second.open(serve=True)
    command.open(serve=False)
    command.close()
    first.close()
    second.open(serve=True)
    second.close()


def test_only_the_server_creates_a_database(tmp_path: Path) -> None:
    """A command with a wrong path says that there is no database, and leaves none behind."""
    with pytest.raises(WrongDatabase, match=r"no database at .*serve` creates it"):
        SqliteDatabase(sqlite_url(tmp_path)).open(serve=False)
    assert list(tmp_path.iterdir()) == []


def test_an_older_database_is_not_for_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an upgrade of the program, commands say that the daemon must come first."""
    server = SqliteDatabase(sqlite_url(tmp_path))
    server.open(serve=True)
    server.close()
    monkeypatch.setattr(migrations, "REVISIONS", (*migrations.REVISIONS, "9999"))
    with pytest.raises(WrongDatabase, match="older than this program: start `fax-gateway serve` once"):
        SqliteDatabase(sqlite_url(tmp_path)).open(serve=False)


@pytest.mark.parametrize("serve", [True, False])
def test_a_newer_database_is_left_alone(tmp_path: Path, serve: bool) -> None:  # noqa: FBT001 -- a parameter
    """A program that is too old says so, changes nothing, and lets go of the file."""
    database = SqliteDatabase(sqlite_url(tmp_path))
    database.open(serve=True)
    database.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    before = (tmp_path / "gateway.db").read_bytes()
    with pytest.raises(WrongDatabase, match=r"newer fax-gateway \(revision 9999\): upgrade the program"):
        database.open(serve=serve)
    assert (tmp_path / "gateway.db").read_bytes() == before
    with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", migrations.REVISIONS[-1:])
        connection.commit()
    again = SqliteDatabase(sqlite_url(tmp_path))
    again.open(serve=True)
    again.close()


@pytest.mark.parametrize("keep", [0, 100])
def test_a_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    """A damaged database ends the start with the file's name, before anything is accepted."""
    database = SqliteDatabase(sqlite_url(tmp_path))
    database.open(serve=True)
    database.close()
    file = tmp_path / "gateway.db"
    whole = file.read_bytes()
    file.write_bytes(whole[:keep] + bytes(byte ^ 0x55 for byte in whole[keep:]))
    with pytest.raises(
        WrongDatabase, match=r"gateway\.db cannot be used: (file is not a|database disk image)"
    ):
        SqliteDatabase(sqlite_url(tmp_path)).open(serve=True)


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    """Who names a folder instead of a file is told so, and the folder stays as it was."""
    folder = tmp_path / "gateway.db"
    folder.mkdir(mode=0o755)
    with pytest.raises(WrongDatabase, match=r"gateway\.db cannot be used: unable to open"):
        SqliteDatabase(sqlite_url(tmp_path)).open(serve=True)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A path below a file is refused with the folder's name."""
    (tmp_path / "file").touch()
    with pytest.raises(WrongDatabase, match=r"folder of the database, .*/file/below, cannot be used"):
        SqliteDatabase(sqlite_url(tmp_path / "file" / "below")).open(serve=True)


async def test_nobody_else_may_read_the_files(tmp_path: Path) -> None:
    """Folder, database and SQLite's own files beside it are the gateway's alone, also one from a backup."""
    folder = tmp_path / "new" / "folder"
    for _ in ("created", "restored from a backup"):
        database = SqliteDatabase(sqlite_url(folder))
        database.open(serve=True)
        await database.write(statement("DELETE FROM turns"))
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
        assert modes == {"folder": 0o700} | {
            f"gateway.db{suffix}": 0o600 for suffix in ("", "-wal", "-shm", ".lock")
        }
        await asyncio.to_thread(database.close)
        (folder / "gateway.db").chmod(0o644)


@pytest.mark.parametrize("existing", [False, True])
async def test_the_settings_are_in_force(tmp_path: Path, existing: bool) -> None:  # noqa: FBT001 -- a parameter
    """Durability, erasure and shrinking really are on, also in a file that an operator created empty."""
    if existing:
        (tmp_path / "gateway.db").touch()
    database = SqliteDatabase(sqlite_url(tmp_path))
    database.open(serve=True)
    expected = {"page_size": 16384, "auto_vacuum": 2, "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}
    for ask in (database.write, database.read):
        assert {name: await ask(number_of(f"PRAGMA {name}")) for name in expected} == expected
        assert await ask(lambda c: c.exec_driver_sql("PRAGMA journal_mode").scalar_one()) == "wal"
    assert await database.read(number_of("PRAGMA query_only")) == 1
    await asyncio.to_thread(database.close)


# --- space -------------------------------------------------------------------------------------------


async def test_freed_space_goes_back_to_the_disk_and_leaves_no_trace(database: SqliteDatabase) -> None:
    """After a purge the file is as small as before, and the bytes stand neither in it nor beside it."""
    folder = Path(str(database.url.database)).parent
    await database.give_space_back()
    small = (folder / "gateway.db").stat().st_size
    await asyncio.gather(*(database.write(chunk(n)) for n in range(100)))

    def found() -> list[str]:
        return [path.name for path in folder.iterdir() if SECRET in path.read_bytes()]

    assert found() != []
    await database.write(statement("DELETE FROM document_chunks"))
    freed = await database.read(number_of("PRAGMA freelist_count"))
    assert freed > VACUUM_STEP
    assert await database.write(_vacuum_some)
    assert await database.read(number_of("PRAGMA freelist_count")) == freed - VACUUM_STEP
    await database.give_space_back()
    assert await database.read(number_of("PRAGMA freelist_count")) == 0
    assert (folder / "gateway.db").stat().st_size == small
    assert found() == []


async def test_a_long_reader_only_puts_off_the_erasure(database: SqliteDatabase) -> None:
    """A backup that reads for long hinders nobody; the log is emptied the next time."""

    def log() -> int:
        return Path(f"{database.url.database}-wal").stat().st_size

    await database.give_space_back()
    async with other_process(database) as other:
        await tell(other, "BEGIN")
        await tell(other, "SELECT * FROM words")
        await database.write(say("later"))
        await database.give_space_back()
        assert log() > 0
        await tell(other, "COMMIT")
    await database.give_space_back()
    assert log() == 0


def test_a_log_that_cannot_be_emptied_is_a_fault_of_the_store(tmp_path: Path) -> None:
    """Callers know how to wait for the store; SQLite's own errors do not get through to them."""
    with pytest.raises(StoreError, match="unable to open"):
        _empty_log(str(tmp_path))


async def test_large_units_let_others_go_first(database: SqliteDatabase) -> None:
    """A webhook waits for a few pieces of a document, not for all that were asked for before it."""
    done: list[str] = []

    def note(name: str) -> Callable[[Any], None]:
        return lambda _connection: done.append(name)

    with busy_writer(database):
        waits = [database.write(note(f"large {n}"), large=True) for n in range(10)]
        waits.append(database.write(note("small")))
    await asyncio.gather(*waits)
    assert done == ["small", *(f"large {n}" for n in range(10))]


def dies(first: str) -> Work[None]:
    """Make a unit of work that undoes its transaction: `first` for that reason, then since fsync failed."""
    causes = iter([first])

    def work(connection: Any) -> None:
        connection.driver.execute("ROLLBACK")
        error = sqlite3.OperationalError(next(causes, "disk I/O error"))
        if "I/O" in str(error):
            error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
        raise error

    return work


@pytest.mark.parametrize("first", ["disk I/O error", "database or disk is full"])
async def test_nobody_waits_for_a_store_that_has_ended(first: str, tmp_path: Path) -> None:
    """When the disk fails to sync, all that waits is refused, also what was put off or is done one by one."""
    broken: list[Exception] = []
    database = SqliteDatabase(sqlite_url(tmp_path), lambda: None, broken.append)
    database.open(serve=True)
    with busy_writer(database):
        waits = [database.write(dies(first)), *(database.write(chunk(n)) for n in range(3))]
        waits += [database.write(chunk(n), large=True) for n in range(3, 3 + 3 * LARGE_LIMIT)]
    async with asyncio.timeout(30):
        answers = await asyncio.gather(*waits, return_exceptions=True)
    assert {type(answer) for answer in answers} == {StoreUnavailable}
    assert len(broken) == 1
    await asyncio.to_thread(database.close)


async def test_closing_finishes_what_was_put_off(tmp_path: Path) -> None:
    """Pieces of documents that wait behind others are written before the file is let go."""
    database = SqliteDatabase(sqlite_url(tmp_path))
    database.open(serve=True)
    waits = [database.write(chunk(n), large=True) for n in range(3 * LARGE_LIMIT)]
    await asyncio.to_thread(database.close)
    await asyncio.gather(*waits)
    with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db")) as connection:
        assert connection.execute("SELECT count(*) FROM document_chunks").fetchone() == (3 * LARGE_LIMIT,)


def test_opening_needs_no_migrations_library(tmp_path: Path) -> None:
    """A command beside the daemon answers quickly: what only an upgrade needs is not loaded."""
    server = SqliteDatabase(sqlite_url(tmp_path))
    server.open(serve=True)
    script = (
        "import sys; from gateway.sqlite import SqliteDatabase; "
        f"SqliteDatabase({sqlite_url(tmp_path)!r}).open(serve=False); print('alembic' in sys.modules)"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert outcome.stdout == "False\n"
    server.close()
