"""The store in one SQLite file, for one machine.

In charge of: opening, locking and migrating the file, one writer thread that takes everything that waits into
one transaction (group commit), a reader thread, and the news that another process committed.

Promises: what was committed is on the disk (WAL with synchronous=FULL). Each unit of work has a savepoint of
its own. Only one process serves a file, by whatever name it opens it; commands may work beside it.

Fails: as `database` says. When the disk refuses an fsync, the whole store ends: only the recovery of the file
at the next start tells what was kept.
"""

import asyncio
import collections
import contextlib
import fcntl
import queue
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.interfaces import DBAPIConnection

from gateway.database import Database, NotYet, StoreFull, StoreUnavailable, Unit, WrongDatabase
from gateway.sqlite_statements import Statements

BUSY_TIMEOUT = 5.0  # seconds to wait for another process's write
GROUP_LIMIT = 256  # units in one transaction
LARGE_LIMIT = 4  # large ones among them: the others wait for what these write
REST = 0.0005  # a writer that commits back to back starves other processes for good
VACUUM_STEP = 500  # pages given back in one unit of work
NEWS_INTERVAL = 0.5  # seconds between looks for another process's commits
_UNSAFE = {"SQLITE_IOERR_FSYNC", "SQLITE_IOERR_DIR_FSYNC"}


class SqliteDatabase(Database):
    """One SQLite file, its writer and its reader."""

    alone = True

    def __init__(self, *details: Any, busy_timeout: float = BUSY_TIMEOUT) -> None:
        """See `Database`; `busy_timeout` are the seconds to wait for another process's write."""
        super().__init__(*details)
        self._busy_timeout = busy_timeout
        self._lock: IO[str] | None = None
        self._larger: collections.deque[Unit] = collections.deque()  # large units that let others go first
        self._ending = False  # nothing comes any more but what was put off

    def clock(self, connection: Connection) -> float:
        """Return this machine's time: there is no other."""
        del connection
        return time.time()

    # --- opening and closing ---------------------------------------------------------------------------

    def _connect(self, *, serve: bool) -> Iterable[Callable[[], None]]:
        path = Path(self.url.database or "").resolve()  # by whatever name, one file has one lock
        if serve:
            self._claim(path)
        elif not path.exists():
            raise NotYet(f"there is no database at {path}: `fax-gateway serve` creates it")
        try:
            fresh = path.stat().st_size == 0
            self._writer = self._engine(begin="BEGIN IMMEDIATE", fresh=fresh, read_only=False)
            if serve:
                with self._writer.begin() as connection:
                    self._migrate(connection, serve=True)
            self._reader = self._engine(begin="BEGIN", fresh=False, read_only=True)
            with self._reader.begin() as connection:  # a command that only looks waits for no writer
                self._migrate(connection, serve=False)
        except sa.exc.DBAPIError as error:
            if any(word in str(error.orig) for word in ("locked", "busy", "full", "disk I/O")):
                raise translate(error) from error  # another time it may be well
            raise WrongDatabase(f"the database at {path} cannot be used: {error.orig}") from error
        return self._write_loop, self._read_loop

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _claim(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock_path = path.with_name(path.name + ".lock")
            for file in (path, lock_path):
                file.touch(mode=0o600)
            if path.is_file():
                path.chmod(0o600)  # before SQLite opens it: the log files beside it get the same mode
            lock = lock_path.open("a")
        except OSError as error:
            raise WrongDatabase(
                f"the folder of the database, {path.parent}, cannot be used: {error}"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise WrongDatabase(f"another `fax-gateway serve` uses the database at {path}") from error
        self._lock = lock

    def _engine(self, *, begin: str, fresh: bool, read_only: bool) -> Engine:
        engine = sa.create_engine(
            self.url,
            connect_args={"timeout": self._busy_timeout, "check_same_thread": False},
            poolclass=sa.pool.StaticPool,
            hide_parameters=True,  # numbers and addresses stay out of error texts
        )
        self.engines.append(engine)

        @sa.event.listens_for(engine, "connect")
        def configure(connection: DBAPIConnection, _record: object) -> None:
            connection.isolation_level = None  # BEGIN is ours: see below
            cursor = connection.cursor()
            for statement in _pragmas(fresh=fresh, read_only=read_only):
                cursor.execute(statement)
            cursor.close()

        @sa.event.listens_for(engine, "begin")
        def start(connection: Connection) -> None:
            # A deferred transaction that turns writer fails at once with BUSY_SNAPSHOT, whatever the timeout.
            connection.exec_driver_sql(begin)

        return engine

    # --- work --------------------------------------------------------------------------------------------

    async def give_space_back(self) -> None:
        """Return freed pages to the disk, some at a time so that nobody waits long."""
        while await self.write(_vacuum_some):
            pass
        await asyncio.to_thread(_empty_log, str(self.url.database))

    def _write_loop(self) -> None:
        try:
            self._work_off()
        finally:
            while self._larger:  # only after a fault: nobody shall wait for them in vain
                self._larger.popleft().answer(None, StoreUnavailable("the store's thread ended"))

    def _work_off(self) -> None:
        with self._writer.connect() as connection:
            statements = Statements(connection)
            seen = _news_of(statements.driver)
            while not self._ending or self._larger:
                units = self._group()
                if units:
                    _run_group(connection, statements, units)
                latest = _news_of(statements.driver)
                if latest != seen:  # a look that changed nothing must not wake those who look
                    seen = latest
                    self._news()
                if units:
                    time.sleep(REST)

    def _group(self) -> list[Unit]:
        """Wait for work for some time; return what goes into the next transaction."""
        units: list[Unit] = []
        with contextlib.suppress(queue.Empty):
            wait = not (self._larger or self._ending)
            while len(units) < GROUP_LIMIT:
                unit = self._writes.get(block=wait, timeout=NEWS_INTERVAL)
                if unit is None:
                    self._ending = True
                    break
                wait = False
                (self._larger if unit.large else units).append(unit)
        few = min(len(self._larger), LARGE_LIMIT)
        return units + [self._larger.popleft() for _ in range(few)]

    def _read_loop(self) -> None:
        with self._reader.connect() as connection:
            statements = Statements(connection)
            while (unit := self._reads.get()) is not None:
                _run_group(connection, statements, [unit])


def _run_group(connection: Connection, statements: Statements, units: list[Unit]) -> None:
    """Run the units in one transaction; their callers hear once it is committed."""
    outcomes: list[tuple[Any, Exception | None]] = []
    begun = False
    try:
        with connection.begin():
            begun = True
            outcomes.extend(_run_unit(statements, unit) for unit in units)
    except Exception as error:
        if _fsync_failed(error):
            for unit in units:
                unit.answer(None, StoreUnavailable("the disk did not confirm what was written"))
            raise
        if begun and len(units) > 1:
            # A full disk makes SQLite undo everybody's work: who is not to blame gets another transaction.
            _run_each(connection, statements, units)
            return
        outcomes = [(None, translate(error))] * len(units)
    for unit, (result, failure) in zip(units, outcomes, strict=True):
        unit.answer(result, failure)


def _run_each(connection: Connection, statements: Statements, units: list[Unit]) -> None:
    """Run each unit in a transaction of its own; whatever ends that, all callers hear."""
    waiting = collections.deque(units)
    try:
        while waiting:
            _run_group(connection, statements, [waiting.popleft()])
    finally:
        for unit in waiting:
            unit.answer(None, StoreUnavailable("the store's thread ended"))


def _fsync_failed(error: Exception) -> bool:
    """Whether nobody knows what is on the disk: a later fsync would confirm what the first one lost."""
    return getattr(getattr(error, "orig", error), "sqlite_errorname", "") in _UNSAFE


def _run_unit(statements: Statements, unit: Unit) -> tuple[Any, Exception | None]:
    """Run one unit in a savepoint; return its result or its fault. Raises when the transaction is gone."""
    statements.driver.execute("SAVEPOINT unit")
    result, failure = None, None
    try:
        result = unit.work(cast("Connection", statements))  # as good as one for all that a unit does
    except Exception as error:  # noqa: BLE001 -- belongs to the caller, who gets it
        try:
            statements.driver.execute("ROLLBACK TO unit")
        except sqlite3.Error:
            raise error from None
        failure = translate(error)
    statements.driver.execute("RELEASE unit")
    return result, failure


def translate(error: Exception) -> Exception:
    """Turn the driver's errors into ours; leave the others as they are."""
    if not isinstance(error, sa.exc.SQLAlchemyError | sqlite3.Error):
        return error
    cause = getattr(error, "orig", None) or error
    text = f"{type(cause).__name__}: {cause}"
    if "disk is full" in text or "No space left" in text:
        return StoreFull(text)
    return StoreUnavailable(text)


def _vacuum_some(connection: Connection) -> bool:
    """Free some pages; return whether there are more."""
    left: int = connection.exec_driver_sql("PRAGMA freelist_count").scalar_one()
    for _ in range(min(left, VACUUM_STEP)):
        # One page at a time: of a larger number, sqlite3's `execute` only takes the first step.
        connection.exec_driver_sql("PRAGMA incremental_vacuum(1)")
    return left > VACUUM_STEP


def _empty_log(path: str) -> None:
    """Move everything out of SQLite's write-ahead log: purged pages would stay readable in it."""
    try:
        # The lock keeps writers out while readers finish: not for long, the next purge is another chance.
        with contextlib.closing(sqlite3.connect(path, timeout=1.0)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        raise translate(error) from error


def _news_of(driver: sqlite3.Connection) -> tuple[int, int]:
    """Return what changes when another process committed (PRAGMA data_version) or we changed a row."""
    try:  # not by way of SQLAlchemy, which would begin a transaction
        row = driver.execute("PRAGMA data_version").fetchone()
    except sqlite3.Error:
        return 0, driver.total_changes
    return row[0] if row else 0, driver.total_changes


def _pragmas(*, fresh: bool, read_only: bool) -> tuple[str, ...]:
    # The first two only take effect before the first table exists.
    creation = ("PRAGMA page_size=16384", "PRAGMA auto_vacuum=INCREMENTAL") if fresh and not read_only else ()
    always = (
        "PRAGMA journal_mode=WAL",
        "PRAGMA synchronous=FULL",  # NORMAL may lose the last commits on power loss
        "PRAGMA foreign_keys=ON",
        "PRAGMA secure_delete=ON",  # purged documents are overwritten, not only forgotten
        "PRAGMA cache_size=-16384",  # KB; what a transaction does not keep in it goes to the disk twice
        # The log goes into the file after each 4 MB instead of 16, since all others wait meanwhile.
        "PRAGMA wal_autocheckpoint=256",
        "PRAGMA temp_store=MEMORY",  # what is sorted stays out of files that others may read
    )
    return creation + always + (("PRAGMA query_only=ON",) if read_only else ())
