"""The database's threads and transactions; what is said in them is the store's.

In charge of: opening and migrating the database, one writer thread that takes everything that waits into
one transaction (group commit), a reader thread, and the news that another process committed.

Promises: what `write` returned is committed and on the disk (SQLite: WAL with synchronous=FULL). Each
unit of work has a savepoint of its own: it happens whole or not at all, whatever becomes of its
neighbours and of the task that asked for it.

Fails: `StoreFull` when the disk is full, `StoreUnavailable` for every other trouble of the database; in
both cases nothing of the unit was kept. `WrongDatabase` at opening: missing, older or newer than the
program, or served by another process.
"""

import asyncio
import contextlib
import fcntl
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.interfaces import DBAPIConnection

from gateway import migrations

T = TypeVar("T")
Work = Callable[[Connection], T]

BUSY_TIMEOUT = 5.0  # seconds to wait for another process's write
GROUP_LIMIT = 256  # units in one transaction
REST = 0.0005  # a writer that commits back to back starves other processes for good
VACUUM_STEP = 500  # pages given back in one unit of work
NEWS_INTERVAL = 0.5  # seconds between looks for another process's commits


def folder_of(url: str) -> Path:
    """Return the folder of the database, where the gateway keeps its other files too."""
    return Path(sa.make_url(url).database or "").parent


class StoreError(Exception):
    """Base of the store's faults; the text is for the log."""


class StoreFull(StoreError):
    """No space left; nothing was kept."""


class StoreUnavailable(StoreError):
    """The database did not do it, for now; nothing was kept."""


class WrongDatabase(StoreError):
    """The database cannot be used by this program as it is; the text says what to do."""


@dataclass(slots=True)
class _Unit:
    work: Work[Any]
    future: Future[Any]


class Database:
    """One SQLite file, its writer and its reader."""

    def __init__(
        self, url: str, news: Callable[[], None] = lambda: None, *, busy_timeout: float = BUSY_TIMEOUT
    ) -> None:
        """`news` is called from the writer thread after commits, ours and other processes'."""
        self.url = sa.make_url(url)
        self._news = news
        self._busy_timeout = busy_timeout
        self._units: queue.SimpleQueue[_Unit | None] = queue.SimpleQueue()
        self._reads: queue.SimpleQueue[_Unit | None] = queue.SimpleQueue()
        self._door = threading.Lock()  # nobody asks for work after the threads were told to end
        self._serving = False
        self._threads: list[threading.Thread] = []
        self._engines: list[Engine] = []
        self._lock: IO[str] | None = None

    # --- opening and closing ---------------------------------------------------------------------------

    def open(self, *, serve: bool) -> None:
        """Open it; with `serve` also create, migrate and lock it. Raises WrongDatabase, StoreError."""
        path = Path(self.url.database or "").resolve()  # by whatever name, one file has one lock
        if serve:
            self._claim(path)
        elif not path.exists():
            raise WrongDatabase(f"there is no database at {path}: `fax-gateway serve` creates it")
        try:
            fresh = path.stat().st_size == 0
            writer = self._engine(begin="BEGIN IMMEDIATE", fresh=fresh, read_only=False)
            self._prepare(writer, serve=serve)
            reader = self._engine(begin="BEGIN", fresh=False, read_only=True)
            reader.connect().close()  # what is wrong shows here, not in the thread
        except (sa.exc.DBAPIError, WrongDatabase) as error:
            self.close()
            if isinstance(error, WrongDatabase):
                raise
            if any(word in str(error.orig) for word in ("locked", "busy", "full", "disk I/O")):
                raise translate(error) from error  # another time it may be well
            raise WrongDatabase(f"the database at {path} cannot be used: {error.orig}") from error
        self._serving = True
        for target, engine, units in (
            (self._write_loop, writer, self._units),
            (self._read_loop, reader, self._reads),
        ):
            thread = threading.Thread(
                target=self._serve, args=(target, engine, units), name=target.__name__, daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Finish what was asked, then let go. May be called twice."""
        with self._door:
            self._serving = False
            self._units.put(None)
            self._reads.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for engine in self._engines:
            engine.dispose()
        self._engines.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _claim(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            for file in (path, path.with_name(path.name + ".lock")):
                file.touch(mode=0o600)
            if path.is_file():
                path.chmod(0o600)  # before SQLite opens it: the log files beside it get the same mode
            lock = file.open("a")
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
        self._engines.append(engine)

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

    def _prepare(self, engine: Engine, *, serve: bool) -> None:
        try:
            with engine.connect() as connection:
                if serve:
                    migrations.upgrade(connection)
                else:
                    migrations.require_current(connection)
        except migrations.WrongRevision as error:
            raise WrongDatabase(str(error)) from error

    # --- work --------------------------------------------------------------------------------------------

    def write(self, work: Work[T]) -> asyncio.Future[T]:
        """Run `work` in the writer's transaction; the future has its result once it is committed.

        Cancelling the future does not cancel the work. Raises StoreError, or what `work` raised.
        """
        return self._ask(self._units, work)

    def read(self, work: Work[T]) -> asyncio.Future[T]:
        """Run `work` on a consistent view of what is committed."""
        return self._ask(self._reads, work)

    async def give_space_back(self) -> None:
        """Return freed pages to the disk, some at a time so that nobody waits long."""
        while await self.write(_vacuum_some):
            pass
        await asyncio.to_thread(_empty_log, str(self.url.database))

    def _ask(self, where: queue.SimpleQueue[_Unit | None], work: Work[T]) -> asyncio.Future[T]:
        future: Future[T] = Future()
        with self._door:
            if not self._serving:
                raise StoreUnavailable("the store is closed")
            where.put(_Unit(work, future))
        return asyncio.wrap_future(future)

    def _serve(
        self, loop: Callable[[Engine], None], engine: Engine, units: queue.SimpleQueue[_Unit | None]
    ) -> None:
        """Run a thread's loop; if ever a fault ends it, nobody waits for it in vain."""
        try:
            loop(engine)
        finally:
            with self._door:
                self._serving = False
            while not units.empty():
                if (unit := units.get()) is not None:
                    _answer(unit, None, StoreUnavailable("the store's thread ended"))

    def _write_loop(self, engine: Engine) -> None:
        with engine.connect() as connection:
            seen = _news_of(connection)
            while True:
                try:
                    units = self._group(self._units.get(timeout=NEWS_INTERVAL))
                except queue.Empty:
                    units = []
                if units is None:
                    return
                if units:
                    _run_group(connection, units)
                latest = _news_of(connection)
                if latest != seen:  # a look that changed nothing must not wake those who look
                    seen = latest
                    self._news()
                if units:
                    time.sleep(REST)

    def _group(self, first: _Unit | None) -> list[_Unit] | None:
        if first is None:
            return None
        units = [first]
        while len(units) < GROUP_LIMIT:
            try:
                unit = self._units.get_nowait()
            except queue.Empty:
                break
            if unit is None:
                self._units.put(None)  # close after this group
                break
            units.append(unit)
        return units

    def _read_loop(self, engine: Engine) -> None:
        with engine.connect() as connection:
            while (unit := self._reads.get()) is not None:
                _run_group(connection, [unit])


def _run_group(connection: Connection, units: list[_Unit]) -> None:
    """Run the units in one transaction; their callers hear once it is committed."""
    outcomes: list[tuple[Any, Exception | None]] = []
    begun = False
    try:
        with connection.begin():
            begun = True
            outcomes.extend(_run_unit(connection, unit) for unit in units)
    except Exception as error:  # noqa: BLE001 -- this thread must live, and the callers must hear of it
        if begun and len(units) > 1:
            # A full disk makes SQLite undo everybody's work: who is not to blame gets another transaction.
            for unit in units:
                _run_group(connection, [unit])
            return
        outcomes = [(None, translate(error))] * len(units)
    for unit, (result, failure) in zip(units, outcomes, strict=True):
        _answer(unit, result, failure)


def _run_unit(connection: Connection, unit: _Unit) -> tuple[Any, Exception | None]:
    """Run one unit in a savepoint; return its result or its fault. Raises when the transaction is gone."""
    connection.exec_driver_sql("SAVEPOINT unit")
    result, failure = None, None
    try:
        result = unit.work(connection)
    except Exception as error:  # noqa: BLE001 -- belongs to the caller, who gets it
        try:
            connection.exec_driver_sql("ROLLBACK TO unit")
        except sa.exc.SQLAlchemyError:
            raise error from None
        failure = translate(error)
    connection.exec_driver_sql("RELEASE unit")
    return result, failure


def _answer(unit: _Unit, result: Any, failure: Exception | None) -> None:
    if not unit.future.set_running_or_notify_cancel():
        return
    if failure is None:
        unit.future.set_result(result)
    else:
        unit.future.set_exception(failure)


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


def _news_of(connection: Connection) -> tuple[int, int]:
    """Return what changes when another process committed (PRAGMA data_version) or we changed a row."""
    driver: Any = connection.connection.driver_connection  # SQLAlchemy would begin a transaction
    try:
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
        "PRAGMA cache_size=-16384",
        "PRAGMA temp_store=MEMORY",
    )
    return creation + always + (("PRAGMA query_only=ON",) if read_only else ())
