"""A store over a real database for the tests of the store's verbs, with a clock that the test sets.

A test module takes a fixture by `store = stores.store`. `store` runs on each kind of database in turn,
`sqlite_store` and `postgresql_store` on one; `gateways` are two gateways at one database, if it allows that.
"""

import contextlib
import io
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import postgres
import pytest
import sqlalchemy as sa
from faxes import APPLICATION, FROM, NOW, NUMBER, RULES

from gateway import store_apply
from gateway.carrier import CarrierEvent
from gateway.database import Database
from gateway.doubt import Sighting
from gateway.postgresql import PostgresqlDatabase
from gateway.records import Alert, Begun, Event, Fax, ReceivedMail, Report, Rules, Stage, State, Taken
from gateway.sqlite import SqliteDatabase
from gateway.store import Store
from gateway.store_events import Fate
from gateway.store_intake import CHUNK, Accepted, Paper, Submission
from gateway.store_unit import Change, News
from gateway.store_work import CallSettings

BACKENDS = ("sqlite", "postgresql")
SENDER = "clerk@example.com"
POSTMASTER = "postmaster@example.com"
DOCUMENT = b"%PDF-1.7 a small document"
LEASE = 300.0
SETTINGS = CallSettings(FROM, APPLICATION, "high", t38=True, channels=2, lease=LEASE)


class Clock:
    """The time, as the test wants it."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self, _connection: object = None) -> float:
        """Return the time, seconds since 1970."""
        return self.now


class TriedStore(Store):
    """The store, with what a test needs beside it."""

    def __init__(
        self, url: str, *, rules: Rules = RULES, serve: bool = True, clock: Clock | None = None
    ) -> None:
        self.url = url
        self.clock = clock or Clock()
        self.news: list[News] = []
        self.database = database_at(url)
        self.database.open(serve=serve)
        super().__init__(
            self.database, rules=rules, postmaster=POSTMASTER, observe=self.news.append, clock=self.clock
        )

    @property
    def changes(self) -> list[Change]:
        """Every change of a fax so far."""
        return [news for news in self.news if isinstance(news, Change)]

    async def alert(self, alert: Alert) -> None:
        """Queue a mail to the postmaster."""
        await self._do(store_apply.alert, alert)

    async def mail_in(
        self,
        *numbers: str,
        sender: str = SENDER,
        message_id: str | None = None,
        digest: str = "d1",
        document: bytes = DOCUMENT,
        window: float = 0.0,
    ) -> Accepted:
        """Take in a mail, as the door does. Duplicates are looked for only if a window is given."""
        paper = small_paper(document)
        if len(document) > CHUNK:
            paper = replace(paper, id=await self.keep_document(io.BytesIO(document)), data=None)
        mail = ReceivedMail(
            id="", sender=sender, received_at=self.clock.now, message_id=message_id, subject="An order",
            original_headers=b"Subject: An order\r\n",
        )  # fmt: skip
        recipients = tuple((number, f"{number}@fax.local") for number in numbers or (NUMBER,))
        message_key = None if message_id is None else sha256(message_id.encode()).hexdigest()
        submission = Submission(mail, digest, recipients, paper, message_key=message_key)
        return await self.accept(submission, window)

    async def queued(self, number: str = NUMBER, **mail: Any) -> Fax:
        """Return a fax that was just accepted."""
        return await self.fax((await self.mail_in(number, **mail)).fax_ids[0])

    async def fax(self, fax_id: str) -> Fax:
        """Return a fax as it is now."""
        return (await self.show(fax_id)).fax

    async def claimed(self, settings: CallSettings = SETTINGS) -> Fax:
        """Claim the next call; there must be one."""
        fax = await self.claim_call(settings)
        assert fax is not None, "nothing could be claimed"
        assert fax.state is State.SUBMITTING
        return fax

    async def called(self, carrier_id: str = "c1", number: str = NUMBER, **mail: Any) -> Fax:
        """Take in a fax, claim it and let the carrier take it."""
        await self.queued(number, **mail)
        return await self.taken(await self.claimed(), carrier_id)

    async def taken(self, fax: Fax, carrier_id: str = "c1") -> Fax:
        """Let the carrier take the newest attempt."""
        return await self.apply(fax.id, Taken(newest(fax), carrier_id))

    async def ended(self, fax_id: str, event: Event) -> Fax:
        """Let an event end the fax, and the relay take every mail about it."""
        fax = await self.apply(fax_id, event)
        assert fax.final
        await self.mail_out()
        return fax

    async def mail_out(self) -> list[str]:
        """Let the relay take every mail that is due; return their ids."""
        entries = await self.claim_notices(1000)
        for entry in entries:
            assert await self.notice_sent(entry.id, entry.fence)
        return [entry.id for entry in entries]

    async def webhook(self, event: CarrierEvent) -> Fate:
        """Let the carrier's event come in."""
        return (await self.remember_event(event))[0]

    async def rows(self, query: str, **values: Any) -> list[tuple[Any, ...]]:
        """Look into the tables."""
        return await self.database.read(
            lambda connection: [tuple(row) for row in connection.execute(sa.text(query), values)]
        )

    async def change(self, statement: str, **values: Any) -> None:
        """Change the tables, as nobody but a test may."""
        await self.database.write(lambda connection: connection.execute(sa.text(statement), values).close())

    async def brakes(self) -> set[tuple[str, str]]:
        """Return what stops the queue: kind and scope."""
        return {(brake.kind, brake.scope) for brake in (await self.count()).brakes}


def small_paper(document: bytes) -> Paper:
    """Make a document that comes along with its mail."""
    return Paper(str(uuid.uuid4()), sha256(document).hexdigest(), 3, len(document), document)


def newest(fax: Fax) -> str:
    """Return the id of the fax's newest attempt."""
    assert fax.last is not None
    return fax.last.id


def numbers(count: int) -> list[str]:
    """Return that many numbers."""
    return [f"+1312555{n:04}" for n in range(count)]


def reported(
    carrier_id: str,
    stage: Stage | None,
    *,
    id: str = "",  # noqa: A002 -- the event's
    number: str = NUMBER,
    reason: str | None = None,
    at: float = NOW,
    connection_id: str = APPLICATION,
) -> CarrierEvent:
    """Make a webhook's event; without a stage it is of a kind that says nothing about progress."""
    report = None if stage is None else Report(stage, asked=False, reason=reason)
    sighting = Sighting(carrier_id, number, FROM, connection_id, at)
    return CarrierEvent(id or f"e-{carrier_id}-{stage}", "fax.event", sighting, outbound=True, report=report)


def events_of(changes: list[Change]) -> list[str]:
    """Name the events that changed a fax; claims aside."""
    return [type(change.event).__name__ for change in changes if not isinstance(change.event, Begun)]


Hear = Callable[[object, str, Any], None]


@contextlib.contextmanager
def _listening(database: Database, hear: Hear) -> Iterator[None]:
    """Call `hear` with the connection, the statement and its values, before each statement.

    SQLite tells it itself, with the values in the statement: not all goes SQLAlchemy's way.
    """

    def listen(connection: object, _c: object, sql: str, values: Any, _x: object, _many: object) -> None:
        hear(connection, sql, values)

    drivers: list[Any] = []
    for engine in database.engines:
        if engine.dialect.name == "sqlite":
            drivers.append(engine.raw_connection().driver_connection)
            drivers[-1].set_trace_callback(partial(_tell, hear, engine))
        else:
            sa.event.listen(engine, "before_cursor_execute", listen)
    try:
        yield
    finally:
        for driver in drivers:
            driver.set_trace_callback(None)
        for engine in database.engines:
            if engine.dialect.name != "sqlite":
                sa.event.remove(engine, "before_cursor_execute", listen)


def _tell(hear: Hear, engine: object, sql: str) -> None:
    hear(engine, sql, None)


@contextlib.contextmanager
def overheard(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """Listen to the statements that reach the database, with their values."""
    heard: list[tuple[str, Any]] = []
    with _listening(database, lambda _, sql, values: heard.append((sql, values))):
        yield heard


@contextlib.contextmanager
def transactions(database: Database) -> Iterator[list[list[tuple[str, Any]]]]:
    """Listen like `overheard`, to each transaction by itself: several may be under way at a time."""
    began: list[list[tuple[str, Any]]] = []
    of_connection: dict[object, list[tuple[str, Any]]] = {}

    def hear(connection: object, sql: str, values: Any) -> None:
        if "BEGIN" in sql:
            began.append([])
            of_connection[connection] = began[-1]
        else:
            of_connection.setdefault(connection, []).append((sql, values))

    with _listening(database, hear):
        yield began


def sqlite_url(folder: Path) -> str:
    """Return the URL of a database in the folder."""
    return f"sqlite:///{folder / 'gateway.db'}"


def database_at(url: str) -> Database:
    """Return the database of that URL, not yet open."""
    return SqliteDatabase(url, busy_timeout=1.0) if url.startswith("sqlite:") else PostgresqlDatabase(url)


@contextlib.contextmanager
def empty_database(backend: str, folder: Path, base: Path) -> Iterator[str]:
    """Yield the URL of an empty database of the gateway's; `base` keeps what many tests copy."""
    if backend == "postgresql":
        url = postgres.server().create(postgres.template())
        yield url
        postgres.server().drop(url)
        return
    template = base / "template.db"  # migrating takes longer than most tests
    if not template.exists():
        database = SqliteDatabase(f"sqlite:///{template}")
        database.open(serve=True)
        database.close()
    shutil.copy(template, folder / "gateway.db")
    yield sqlite_url(folder)


@contextlib.asynccontextmanager
async def _opened(backend: str, folder: Path, base: Path) -> AsyncIterator[TriedStore]:
    with empty_database(backend, folder, base) as url:
        tried = TriedStore(url)
        yield tried
        await tried.close()


@pytest.fixture(params=BACKENDS)
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[TriedStore]:
    """Return an empty store over a database of its own, of each kind in turn."""
    async with _opened(request.param, tmp_path, tmp_path_factory.getbasetemp()) as tried:
        yield tried


@pytest.fixture
async def sqlite_store(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TriedStore]:
    """Return an empty store in a file, for what only concerns a file that one gateway serves alone."""
    async with _opened("sqlite", tmp_path, tmp_path_factory.getbasetemp()) as tried:
        yield tried


@pytest.fixture
async def postgresql_store(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[TriedStore]:
    """Return an empty store on a server, for what only concerns gateways that share one."""
    async with _opened("postgresql", tmp_path, tmp_path_factory.getbasetemp()) as tried:
        yield tried


@pytest.fixture(params=BACKENDS)
async def gateways(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[TriedStore, TriedStore]]:
    """Return two gateways at one empty database; of a file, the one gateway twice. They have one clock."""
    async with _opened(request.param, tmp_path, tmp_path_factory.getbasetemp()) as one:
        if request.param == "sqlite":
            yield one, one
            return
        other = TriedStore(one.url, clock=one.clock)
        yield one, other
        await other.close()


async def purged(store: TriedStore, keep_documents: float, keep_records: float) -> int:
    """Throw away everything that is over, as the caretaker does in turns; return how many went."""
    gone = 0
    while some := await store.purge(keep_documents, keep_records):
        gone += some
    await store.give_space_back()
    return gone
