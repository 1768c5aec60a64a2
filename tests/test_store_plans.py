"""How the store's questions are answered: by an index, however many years of faxes it keeps.

SQLite tells its plan, which does not depend on what is stored. PostgreSQL plans for what it finds: there each
statement is run in a database of 10,000 old faxes, and the rows are counted that it looked at.
"""

import contextlib
import inspect
import itertools
import re
import shutil
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import postgres
import psycopg
import pytest
import sqlalchemy as sa
import stores
import years
from examined import VERBS, fill
from faxes import DAY
from stores import TriedStore

from gateway.store import Store
from gateway.store_unit import Upsert

sqlite_store = stores.sqlite_store

WORDS = {"SELECT", "INSERT", "UPDATE", "DELETE"}
GROWING = ("documents", "document_chunks", "mails", "faxes", "attempts", "history", "outbox", "duplicates",
           "carrier_ids", "carrier_events")  # fmt: skip
# Indexes that hold only what is open, and so stay small, or whose order lets the search end at the limit.
WALKED = {"ix_faxes_ripe", "ix_faxes_due", "ix_faxes_untold", "uq_attempts_channel", "ix_outbox_turn",
          "ix_outbox_recipient", "ix_carrier_events_parked"}  # fmt: skip
WALKED_TO_A_LIMIT = {"ix_attempts_newest", "ix_faxes_ended"}
# What looks at all that is open without a limit, or at more than that, and why it may.
LAWFUL = {
    "SELECT attempts.slot": "calls under way: no more than there are channels",
    "SELECT faxes.id, faxes.turn": "the numbers being called: as many",
    "SELECT faxes.state, count(*)": "the metrics count the queue",
    "SELECT count(*)": "as above",
    "UPDATE outbox SET due_at": "a start tries each waiting mail at once: whoever mended the relay restarts",
    "UPDATE faxes SET give_up_at": "a restore gives every waiting fax the time that nobody knows of",
    "SELECT faxes.id, faxes.number": "a restore looks at every waiting fax",
    "SELECT DISTINCT attempts.from_number": "a restore asks for every number that ever called",
    "SELECT history.at": "a restore reads the newest line: the table is in the order of its keys",
}
# What the other statements are made of, what is said of `brakes` only, and what only PostgreSQL hears.
NOT_EXAMINED = {"store_desk._LISTED", "store_work._CALLING", "store_work._RIPE",
                "store_brakes._SET_BRAKE", "store_unit._TAKE_TURN"}  # fmt: skip


def lawful(statement: str) -> bool:
    """Whether a statement is known to look at more than a few rows."""
    return " ".join(statement.split()).startswith(tuple(LAWFUL))


def walks(plan: list[str], statement: str) -> list[str]:
    """Return the steps of a plan that grow with the years."""
    found = []
    for step in plan:
        scanned = re.fullmatch(r"SCAN (\w+)(?: USING (?:COVERING )?INDEX (\w+))?", step)
        if scanned is None or scanned[1] not in GROWING or lawful(statement):
            continue
        if scanned[2] in WALKED and "LIMIT" in statement:
            continue
        sorted_whole = "USE TEMP B-TREE FOR ORDER BY" in plan
        if scanned[2] in WALKED_TO_A_LIMIT and "LIMIT" in statement and not sorted_whole:
            continue
        found.append(step)
    return found


def test_every_verb_is_looked_at() -> None:
    """No verb of the store is left out of what follows, but for those that say nothing about the tables."""
    verbs = {name for name, verb in vars(Store).items() if inspect.iscoroutinefunction(verb)}
    verbs -= {"_do", "now", "close", "give_space_back"}
    assert {name.partition(",")[0] for name in VERBS} == verbs


@pytest.mark.parametrize("name", VERBS)
async def test_nothing_is_searched_from_end_to_end(sqlite_store: TriedStore, name: str) -> None:
    """With ten million old faxes a claim, a webhook, a list or a purge takes as long as with ten."""
    await fill(sqlite_store)
    await sqlite_store.close()
    store = TriedStore(sqlite_store.url)  # what it has not sent before goes SQLAlchemy's way, and is heard
    store.news += sqlite_store.news
    store.clock.now += 60 if name == "count" else 3 * DAY
    asked: list[tuple[str, Any]] = []

    def listen(_c: object, _cursor: object, sql: str, values: Any, _x: object, _many: object) -> None:
        if sql.split(maxsplit=1)[0] in WORDS:
            asked.append((sql, values))

    for engine in store.database.engines:
        sa.event.listen(engine, "before_cursor_execute", listen)
    await VERBS[name](store)
    await store.close()
    assert asked != []
    connection = sqlite3.connect(store.url.removeprefix("sqlite:///"))
    for sql, values in asked:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
        assert walks(plan, sql) == [], f"{sql}\n{plan}"
    connection.close()


async def test_every_statement_is_looked_at(tmp_path: Path) -> None:
    """Each statement that the store's modules keep is among those that the verbs send here."""
    filled = tmp_path / "filled"
    filled.mkdir()
    with stores.empty_database("sqlite", filled, tmp_path) as url:
        first = TriedStore(url)
        await fill(first)
        await first.close()
    sent: list[object] = []
    for name, verb in VERBS.items():
        shutil.copy(filled / "gateway.db", tmp_path / "gateway.db")
        store = TriedStore(stores.sqlite_url(tmp_path))
        store.news += first.news
        store.clock.now += 60 if name == "count" else 3 * DAY
        for engine in store.database.engines:
            sa.event.listen(engine, "before_execute", lambda _, statement, *_more: sent.append(statement))
        await verb(store)
        await store.close()
    modules = [sys.modules[name] for name in sys.modules if name.startswith("gateway.store_")]
    kept = {
        f"{module.__name__.removeprefix('gateway.')}.{name}": (
            statement.spelled["sqlite"] if isinstance(statement, Upsert) else statement
        )
        for module in modules
        for name, statement in vars(module).items()
        if isinstance(statement, sa.Select | sa.UpdateBase | Upsert)
    }
    known = {id(statement) for statement in sent}
    assert {name for name, statement in kept.items() if id(statement) not in known} == NOT_EXAMINED


def test_a_walk_would_be_found() -> None:
    """The look at the plans is no empty promise: it knows a full search when it sees one."""
    full = (
        "SCAN faxes",
        "SCAN mails USING INDEX ix_mails_received_at",
        "SCAN attempts USING COVERING INDEX x",
    )
    for step in full:
        assert walks([step], "SELECT 1") == [step]
    ordered = ["SCAN faxes USING INDEX ix_faxes_ended", "USE TEMP B-TREE FOR ORDER BY"]
    assert walks(ordered, "SELECT 1 LIMIT 50") == ordered[:1]
    assert walks(ordered[:1], "SELECT 1 LIMIT 50") == []
    assert walks(["SCAN faxes USING INDEX ix_faxes_due"], "SELECT 1") != []
    assert walks(["SCAN brakes", "SEARCH faxes USING INDEX ix_faxes_due (state=?)"], "SELECT 1") == []


# --- PostgreSQL --------------------------------------------------------------------------------------

FEW = 300  # rows that one step may look at: there are a few open faxes, and limits of 200
AT_WORK = VERBS | {"purge": lambda store: store.purge(DAY, 365 * DAY)}  # on a day like any other

Step = dict[str, Any]
_names = itertools.count(1)


def steps(plan: Step) -> Iterator[Step]:
    """Return the step and all that are below it."""
    yield plan
    for below in plan.get("Plans", ()):
        yield from steps(below)


def visited(step: Step) -> int:
    """Return how many rows a step looked at, also in vain."""
    rows = sum(step.get(f"{what}", 0) for what in ("Actual Rows", "Rows Removed by Filter"))
    return int((rows + step.get("Rows Removed by Index Recheck", 0)) * step["Actual Loops"])


def long_ways(plan: Step) -> list[str]:
    """Return the steps of a plan that grow with the years."""
    return [
        f"{step['Node Type']} of {step.get('Relation Name')} by {step.get('Index Name')}: {visited(step)}"
        for step in steps(plan)
        if ("Relation Name" in step or "Index Name" in step)
        and (visited(step) > FEW or (step["Node Type"] == "Seq Scan" and step["Relation Name"] in GROWN))
    ]


GROWN = set(GROWING) - {"document_chunks"}  # which are purged after a day


def explain(cursor: Any, sql: str, values: Any) -> Iterator[Step]:
    """Run a statement twice, and undo it: planned for its values, and as prepared for any values.

    The server makes the second plan once a connection has often said the same.
    """
    cursor.execute("SAVEPOINT look")
    cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {sql}", values)
    yield cursor.fetchone()[0][0]["Plan"]
    cursor.execute("ROLLBACK TO look")
    names = re.findall(r"%\((\w+)\)s", sql)
    places = (f"${place}" for place in itertools.count(1))
    prepared = re.sub(r"%\(\w+\)s", lambda _: next(places), sql)
    name = f"look_{next(_names)}"
    cursor.execute("SET LOCAL plan_cache_mode = force_generic_plan")
    cursor.execute(f"PREPARE {name} AS {prepared}")
    given = psycopg.sql.SQL(", ").join(psycopg.sql.Literal(values[name]) for name in names)
    execute = psycopg.sql.SQL(f"EXECUTE {name} ({{}})" if names else f"EXECUTE {name}").format(given)
    cursor.execute(psycopg.sql.SQL("EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {}").format(execute))
    yield cursor.fetchone()[0][0]["Plan"]
    cursor.execute("ROLLBACK TO look")


@contextlib.contextmanager
def explained(store: TriedStore) -> Iterator[list[tuple[str, list[str]]]]:
    """Look at each statement before it is done; yield it with its steps that grow with the years."""
    found: list[tuple[str, list[str]]] = []

    def look(_c: object, cursor: Any, sql: str, values: Any, _x: object, _many: object) -> None:
        if sql.split(maxsplit=1)[0] not in WORDS or "BEGIN" in sql or "pg_" in sql:
            return
        with cursor.connection.cursor() as beside:
            found.extend((sql, long_ways(plan)) for plan in explain(beside, sql, values))

    for engine in store.database.engines:
        sa.event.listen(engine, "before_cursor_execute", look)
    try:
        yield found
    finally:
        for engine in store.database.engines:
            sa.event.remove(engine, "before_cursor_execute", look)


@pytest.fixture
async def old_store() -> AsyncIterator[TriedStore]:
    """Return a store on a server that has sent thousands of faxes, and has some in several situations."""
    if not _filled:
        first = TriedStore(years.old_database())
        await fill(first)
        await first.close()
        _filled.append(first)
    url = postgres.server().create(_filled[0].url.rpartition("/")[2])
    tried = TriedStore(url, serve=False)
    tried.news += _filled[0].news
    yield tried
    await tried.close()
    postgres.server().drop(url)


_filled: list[TriedStore] = []  # what each test gets a copy of


@pytest.mark.parametrize("name", AT_WORK)
async def test_old_faxes_slow_nothing_down(old_store: TriedStore, name: str) -> None:
    """Whatever a gateway does on a server that has kept faxes for a year, it looks at few rows."""
    old_store.clock.now += 60 if name == "count" else 3 * DAY
    with explained(old_store) as statements:
        await AT_WORK[name](old_store)
    assert statements != []
    assert [(sql, found) for sql, found in statements if found and not lawful(sql)] == []


@pytest.mark.parametrize(
    ("query", "walk"),
    [
        ("SELECT * FROM faxes WHERE reason = 'busy'", "Seq Scan of faxes by None: 10006"),
        (
            "SELECT id FROM faxes WHERE ended_at IS NOT NULL ORDER BY accepted_at DESC",
            "Index Scan of faxes by ix_faxes_ended: 10004",
        ),
        ("SELECT * FROM mails LIMIT 3", "Seq Scan of mails by None: 3"),
    ],
)
async def test_a_long_way_would_be_found(old_store: TriedStore, query: str, walk: str) -> None:
    """The count is no empty promise either: a full search, by whatever index, is told."""
    await old_store.change("SET enable_bitmapscan = off")
    with explained(old_store) as statements:
        await old_store.rows(query)
    assert statements == [(query, [walk])] * 2
