"""The store in PostgreSQL, for several gateways that share one queue.

In charge of: connections, a few threads that each work off one unit in one transaction, a thread that reads,
and the news between gateways (LISTEN and NOTIFY, and nobody relies on them: each loop looks by itself too).

Promises: what was committed is as safe as the server makes it; one that would confirm before its disk has the
commit is refused. All times are the server's. A transaction that lost to another one begins anew; one that
stands still is ended by the server, so that a frozen gateway holds up no other.

Fails: as `database` says. While the server is away, work fails at once instead of queueing up; one that is
there and does not answer is given up after `ANSWER_LIMIT`.
"""

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.abc import RV, PQGen
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.interfaces import DBAPIConnection

from gateway.database import (
    Conflict,
    Database,
    StoreFull,
    StoreUnavailable,
    Unit,
    Units,
    WrongDatabase,
)

WRITERS = 4  # threads, each with a connection; their commits share the server's flushes
TRIES = 6  # of a unit that met another one
OLDEST = 130000  # the first server version that was tried
CONNECT_LIMIT = 5  # seconds
ANSWER_LIMIT = 20.0  # seconds for a statement: longer than the server's own limits, and a 451 comes in time
AWAY_PAUSE = 1.0  # seconds for which a server that could not be reached is not asked again
NEWS_PAUSE = 0.02  # seconds between two messages to the other gateways: a commit with NOTIFY waits for others
LISTEN_TURN = 0.5  # seconds
_CHANNEL = "fax_gateway"
_MIGRATING = (0x666178, 0)
"""The advisory lock under which one gateway migrates; the store has others of the same class."""

_LIMITS = {
    "statement_timeout": "18s",
    "idle_in_transaction_session_timeout": "10s",  # a frozen gateway shall not keep its locks
    "lock_timeout": "11s",  # who waits for one that froze outlasts it; else the caller hears, after one wait
}
_SAFE = {"synchronous_commit": {"on", "remote_apply"}, "fsync": {"on"}, "full_page_writes": {"on"}}
_AGAIN = {"40001", "40P01", "23505"}  # serialization, deadlock, unique row
_FULL = {"53100"}
_NOW = "SELECT extract(epoch FROM clock_timestamp())::float8"


class PostgresqlDatabase(Database):
    """One database on a PostgreSQL server, and this gateway's connections to it."""

    alone = False

    def __init__(self, *details: Any) -> None:
        """See `Database`."""
        super().__init__(*details)
        self._name = f"{random.getrandbits(64):016x}"  # who sends a NOTIFY need not hear it
        self._changed = threading.Event()
        self._untold = False  # whether a commit of ours changed something since the last NOTIFY
        self._listens = False
        self._closing = threading.Event()
        self._finished = threading.Semaphore(0)  # one for each writer that has ended
        self._away_until = 0.0  # monotonic; 0.0: it was there when it was last asked

    def clock(self, connection: Connection) -> float:
        """Return the server's time at the beginning of the transaction."""
        return float(connection.info["now"])

    async def give_space_back(self) -> None:
        """Do nothing: the server's autovacuum does it, for the rows to come."""

    def _let_go(self) -> None:
        """Do nothing: there are only the connections."""

    # --- opening and closing ---------------------------------------------------------------------------

    def _connect(self, *, serve: bool) -> Iterable[Callable[[], None]]:
        self._writer = self._engine(r"read\ committed", "BEGIN", WRITERS + 2)
        # Not the session: of a read-only one libpq's `target_session_attrs=read-write` holds that the server
        # does not write.
        self._reader = self._engine(r"repeatable\ read", "BEGIN READ ONLY", 1)
        try:
            with self._writer.begin() as connection:
                driver: Any = connection.connection.driver_connection
                if serve:
                    driver.patience = math.inf  # a large table takes what it takes to be changed
                    connection.exec_driver_sql("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
                    connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s, %s)", _MIGRATING)
                self._migrate(connection, serve=serve)
            driver.patience = ANSWER_LIMIT
        except sa.exc.DBAPIError as error:
            raise translate(error) from error
        self._listens = serve
        loops = [*[self._write_loop] * WRITERS, self._read_loop, self._tell_loop]
        return [*loops, self._listen_loop] if serve else loops

    def close(self) -> None:
        """Finish what was asked, then let go. May be called twice."""
        self._closing.set()
        self._changed.set()
        super().close()

    def _engine(self, isolation: str, begin: str, size: int) -> Engine:
        options = {**_LIMITS, "default_transaction_isolation": isolation}
        engine = sa.create_engine(
            self.url,
            connect_args={
                "connect_timeout": CONNECT_LIMIT,
                "options": " ".join(f"-c {name}={value}" for name, value in options.items()),
                "application_name": "fax-gateway",
                # A server that was unplugged is noticed within half a minute.
                "keepalives_idle": 15,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 30_000,
            },
            pool_size=size,
            max_overflow=0,
            hide_parameters=True,  # numbers and addresses stay out of error texts
        )
        self.engines.append(engine)
        sa.event.listen(engine, "do_connect", _open)
        sa.event.listen(engine, "connect", _configure)
        sa.event.listen(engine, "after_cursor_execute", _note)

        @sa.event.listens_for(engine, "begin")
        def start(connection: Connection) -> None:
            # Both in one journey; BEGIN turns the transaction of the first statement into its own.
            connection.info["now"] = connection.exec_driver_sql(f"{_NOW}; {begin}").scalar_one()
            connection.info["changed"] = False

        return engine

    # --- work --------------------------------------------------------------------------------------------

    def _write_loop(self) -> None:
        try:
            self._work_off(self._writes, self._writer)
        finally:
            self._finished.release()

    def _read_loop(self) -> None:
        self._work_off(self._reads, self._reader)

    def _work_off(self, units: Units, engine: Engine) -> None:
        while (unit := units.get()) is not None:
            self._run(engine, unit)
        units.put(None)  # for the next thread

    def _run(self, engine: Engine, unit: Unit) -> None:
        """Run one unit in a transaction of its own, anew when it met another one."""
        if time.monotonic() < self._away_until:
            unit.answer(None, StoreUnavailable("PostgreSQL cannot be reached"))
            return
        if self._away_until:  # this unit finds out whether it is back; the others need not wait for that
            self._away_until = time.monotonic() + CONNECT_LIMIT
        for left in reversed(range(TRIES)):
            connected = finished = False
            try:
                with engine.connect() as connection:
                    connected = True
                    transaction = connection.begin()
                    result = unit.work(connection)
                    finished = True
                    transaction.commit()
                    changed = connection.info["changed"]
                    self._away_until = 0.0
            except Exception as error:  # noqa: BLE001 -- this thread must live, and the caller must hear of it
                if left and _once_more(error, finished=finished):
                    time.sleep(random.uniform(0, 0.05 * (TRIES - left)))  # noqa: S311 -- no secret
                    continue
                # A connection that broke says nothing of the server: it ends those of whoever was frozen.
                away = not connected or isinstance(getattr(error, "orig", None), _NoAnswer)
                self._away_until = time.monotonic() + AWAY_PAUSE if away else 0.0
                unit.answer(None, translate(error))
                return
            unit.answer(result, None)
            if changed:
                self._untold = True
                self._changed.set()
                self._news()
            return

    # --- news --------------------------------------------------------------------------------------------

    def _tell_loop(self) -> None:
        """Tell the other gateways of commits, many in one message; at last of what closing finished."""
        while not self._closing.is_set():
            self._changed.wait()
            if not self._closing.is_set():
                self._tell()
                self._closing.wait(NEWS_PAUSE)
        for _ in range(WRITERS):
            self._finished.acquire()
        if self._untold or self._listens:  # our own listener hears it too, and ends
            self._tell()

    def _tell(self) -> None:
        self._changed.clear()
        self._untold = False
        # Whoever does not hear it looks by itself.
        with (
            contextlib.suppress(sa.exc.SQLAlchemyError, WrongDatabase),
            self._writer.begin() as connection,
        ):
            connection.exec_driver_sql("SELECT pg_notify(%s, %s)", (_CHANNEL, self._name))

    def _listen_loop(self) -> None:
        """Hear what other gateways and commands tell."""
        while not self._closing.is_set():
            try:
                connection = self._writer.raw_connection()
            except (sa.exc.SQLAlchemyError, psycopg.Error, WrongDatabase):  # here SQLAlchemy wraps nothing
                self._closing.wait(LISTEN_TURN)
                continue
            driver: Any = connection.driver_connection
            try:
                driver.execute(f"LISTEN {_CHANNEL}")
                self._news()  # whatever was told before
                while not self._closing.is_set():
                    heard = {notify.payload for notify in driver.notifies(timeout=LISTEN_TURN, stop_after=1)}
                    if heard - {self._name}:
                        self._news()
            except psycopg.Error:
                self._closing.wait(LISTEN_TURN)
            finally:
                connection.invalidate()  # nobody else shall get one that listens


# --- connections and transactions ----------------------------------------------------------------------


class _NoAnswer(psycopg.OperationalError):
    """The server is there and does not answer."""


class _Connection(psycopg.Connection[Any]):
    """A connection that does not wait for ever: libpq would, as long as the server's machine lives."""

    patience = ANSWER_LIMIT

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Do what psycopg does, for as long as `patience` says."""
        del timeout
        return super().wait(self._in_time(gen), interval)

    def _in_time(self, steps: PQGen[RV]) -> PQGen[RV]:
        deadline = time.monotonic() + self.patience
        ready: Any = None
        try:
            while True:
                ready = yield steps.send(ready)
                if not ready and time.monotonic() > deadline:
                    self.close()  # what it was not told to commit, it will not commit
                    raise _NoAnswer(f"no answer within {self.patience:.0f} s")
        except StopIteration as end:
            result: RV = end.value
            return result


def _open(_dialect: object, _record: object, arguments: Any, options: Any) -> _Connection:
    connection = _Connection.connect(*arguments, **options)
    # Before SQLAlchemy asks it anything: what SQL_ASCII answers is octets, which it does not understand.
    if connection.info.parameter_status("server_encoding") != "UTF8":
        connection.close()
        raise WrongDatabase(
            "the database must have the encoding UTF8: create it with ENCODING 'UTF8' TEMPLATE template0"
        )
    return connection


def _configure(connection: DBAPIConnection, _record: object) -> None:
    driver: Any = connection
    driver.autocommit = True  # BEGIN is ours
    settings = dict(
        driver.execute("SELECT name, setting FROM pg_settings WHERE name = ANY(%s)", (list(_SAFE),))
    )
    for name, safe in _SAFE.items():
        if settings[name] not in safe:
            raise WrongDatabase(
                f"PostgreSQL runs with {name} = {settings[name]} and may lose what it confirmed: set it to on"
            )
    if driver.info.server_version < OLDEST:
        raise WrongDatabase(f"PostgreSQL {OLDEST // 10000} or newer is needed")


def _note(
    connection: Connection, cursor: Any, _statement: str, _values: Any, context: Any, _many: Any
) -> None:
    if cursor.rowcount and (context.isinsert or context.isupdate or context.isdelete):
        connection.info["changed"] = True


# --- faults --------------------------------------------------------------------------------------------


def _sqlstate(error: Exception) -> str | None:
    return getattr(getattr(error, "orig", None), "sqlstate", None)


def _once_more(error: Exception, *, finished: bool) -> bool:
    """Whether the transaction surely did not happen and may well succeed when it begins anew, and soon."""
    if isinstance(getattr(error, "orig", None), _NoAnswer):
        return False
    if isinstance(error, Conflict) or _sqlstate(error) in _AGAIN:
        return True
    return not finished and isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated


def translate(error: Exception) -> Exception:
    """Turn the driver's errors into ours; leave the others as they are."""
    if not isinstance(error, sa.exc.SQLAlchemyError):
        return error
    cause: Any = getattr(error, "orig", None) or error
    # The message's other parts show values: numbers, addresses.
    primary = cause.diag.message_primary if isinstance(cause, psycopg.Error) else None
    text = primary or str(cause).partition("\n")[0] or type(cause).__name__
    return StoreFull(text) if _sqlstate(error) in _FULL else StoreUnavailable(text)
