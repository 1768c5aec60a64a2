"""The threads that do the store's work, whatever the database; what is said to it is the store's.

In charge of: queues of units of work, the threads that serve them, and handing each result back to the event
loop. `sqlite` and `postgresql` are the two kinds; they say how a thread works off its queue.

Promises: what `write` returned is committed and on the disk. Each unit of work happens whole or not at all,
whatever becomes of its neighbours and of the task that asked for it.

Fails: `StoreFull` when the disk is full, `StoreUnavailable` for every other trouble of the database; in
both cases nothing of the unit was kept, but for a PostgreSQL that fell silent during its commit: then nobody
knows. `Conflict` when another gateway was faster, time and again. `WrongDatabase` at opening: missing, older
or newer than the program, set up so that it may lose what it confirmed, or served by another process.
"""

import abc
import asyncio
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gateway import migrations

T = TypeVar("T")
Work = Callable[[Connection], T]


class StoreError(Exception):
    """Base of the store's faults; the text is for the log."""


class StoreFull(StoreError):
    """No space left; nothing was kept."""


class StoreUnavailable(StoreError):
    """The database did not do it, for now; nothing was kept."""


class Conflict(StoreError):
    """Another writer changed the same thing in between; look again."""


class WrongDatabase(StoreError):
    """The database cannot be used by this program as it is; the text says what to do."""


class NotYet(WrongDatabase):
    """A start of the daemon makes it usable: there is none, or it is empty or older than the program."""


@dataclass(slots=True)
class Unit:
    """One unit of work, and whoever waits for it."""

    work: Work[Any]
    future: Future[Any]
    large: bool  # it writes a lot, and whoever waits for it can wait longer than others

    def answer(self, result: Any, failure: Exception | None) -> None:
        """Hand over the result, or the fault."""
        if not self.future.set_running_or_notify_cancel():
            return
        if failure is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(failure)


Units = queue.SimpleQueue[Unit | None]
"""Work that waits; None tells whoever takes it to end."""


def _raise(error: Exception) -> None:
    raise error


class Database(abc.ABC):
    """One database, with the threads that write and read it."""

    alone: bool
    """Whether no other process serves it at the same time."""

    def __init__(
        self, url: str, news: Callable[[], None] = lambda: None, broken: Callable[[Exception], None] = _raise
    ) -> None:
        """Take two calls that come from threads.

        `news` follows commits that changed something, ours and other processes'; `broken` says that a thread
        ended for good: nothing more is kept, and only a new start helps.
        """
        self.url = sa.make_url(url)
        self.engines: list[Engine] = []
        self._news = news
        self._broken = broken
        self._writes: Units = queue.SimpleQueue()
        self._reads: Units = queue.SimpleQueue()
        self._door = threading.Lock()  # nobody asks for work after the threads were told to end
        self._serving = False
        self._threads: list[threading.Thread] = []

    # --- what each kind says of itself -------------------------------------------------------------------

    @abc.abstractmethod
    def clock(self, connection: Connection) -> float:
        """Return the database's time in a transaction, seconds since 1970."""

    @abc.abstractmethod
    async def give_space_back(self) -> None:
        """Return to the disk what was thrown away."""

    @abc.abstractmethod
    def _connect(self, *, serve: bool) -> Iterable[Callable[[], None]]:
        """Make it ready, with `serve` also create and migrate it; return what each thread is to do."""

    @abc.abstractmethod
    def _let_go(self) -> None:
        """Release what `_connect` took, beside the engines."""

    # --- opening and closing -----------------------------------------------------------------------------

    def open(self, *, serve: bool) -> None:
        """Open it; with `serve` also create, migrate and claim it. Raises WrongDatabase, StoreError."""
        try:
            loops = list(self._connect(serve=serve))
        except BaseException:
            self.close()
            raise
        self._serving = True
        for loop in loops:
            thread = threading.Thread(target=self._serve, args=(loop,), name=loop.__name__, daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Finish what was asked, then let go. May be called twice."""
        with self._door:
            self._serving = False
            self._writes.put(None)
            self._reads.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for engine in self.engines:
            engine.dispose()
        self.engines.clear()
        self._let_go()

    def _migrate(self, connection: Connection, *, serve: bool) -> None:
        """Bring the schema up to date, or only see that it is; inside a transaction."""
        try:
            if serve:
                migrations.upgrade(connection)
            else:
                migrations.require_current(connection)
        except migrations.NotYet as error:
            raise NotYet(str(error)) from error
        except migrations.WrongRevision as error:
            raise WrongDatabase(str(error)) from error

    # --- work --------------------------------------------------------------------------------------------

    def write(self, work: Work[T], *, large: bool = False) -> asyncio.Future[T]:
        """Run `work` in a transaction that writes; the future has its result once it is committed.

        Work that is `large` lets other work go first where they have to share.

        Cancelling the future does not cancel the work. Raises StoreError, or what `work` raised. If the
        transaction has to begin anew, `work` is run more than once.
        """
        return self._ask(self._writes, work, large=large)

    def read(self, work: Work[T]) -> asyncio.Future[T]:
        """Run `work` on a consistent view of what is committed."""
        return self._ask(self._reads, work, large=False)

    def _ask(self, where: Units, work: Work[T], *, large: bool) -> asyncio.Future[T]:
        future: Future[T] = Future()
        with self._door:
            if not self._serving:
                raise StoreUnavailable("the store is closed")
            where.put(Unit(work, future, large))
        return asyncio.wrap_future(future)

    def _serve(self, loop: Callable[[], None]) -> None:
        """Run a thread's loop; if ever a fault ends it, nobody waits for it in vain."""
        try:
            loop()
        except Exception as error:  # noqa: BLE001 -- outermost of the thread: all of the store ends with it
            with self._door:
                self._serving = False
            for units in (self._writes, self._reads):
                while not units.empty():
                    if (unit := units.get()) is not None:
                        unit.answer(None, StoreUnavailable("the store's thread ended"))
                units.put(None)
            self._broken(error)
