"""How the store's questions are answered: by an index, however many years of faxes it keeps.

SQLite tells its plan, which does not depend on what is stored. PostgreSQL plans for what it finds: there each
statement is run in a database of 10,000 old faxes, and the rows are counted that it looked at.
"""

import contextlib
import itertools
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import postgres
import psycopg
import pytest
import sqlalchemy as sa
import stores
import years
from faxes import DAY, FROM, NUMBER
from stores import SETTINGS, TriedStore, overheard, reported

from gateway.records import CancelAsked, Stage, TimePassed

sqlite_store = stores.sqlite_store

GROWING = ("documents", "document_chunks", "mails", "faxes", "attempts", "history", "outbox", "duplicates",
           "carrier_ids", "carrier_events")  # fmt: skip
# Indexes that hold only what is open, and so stay small, or whose order lets the search end at the limit.
WALKED = {"ix_faxes_ripe", "ix_faxes_due", "ix_faxes_untold", "uq_attempts_channel", "ix_outbox_turn",
          "ix_outbox_recipient", "ix_carrier_events_parked"}  # fmt: skip
WALKED_TO_A_LIMIT = {"ix_attempts_newest", "ix_faxes_ended"}

Verb = Callable[[TriedStore], Awaitable[Any]]
VERBS: dict[str, Verb] = {
    "claim a call": lambda store: store.claim_call(SETTINGS),
    "claim questions": lambda store: store.claim_questions(4),
    "evidence": lambda store: store.evidence(NUMBER, FROM),
    "bound ids": lambda store: store.bound_ids(["c1", "c2"]),
    "event of a call": lambda store: store.webhook(reported("c9", Stage.DIALLED)),
    "event of nobody": lambda store: store.webhook(reported("c10", Stage.DIALLED)),
    "time": lambda store: store.pass_time(),
    "sweep": lambda store: store.sweep_parked(),
    "take over": lambda store: store.take_over(FROM),
    "claim notices": lambda store: store.claim_notices(3),
    "accept": lambda store: store.mail_in(message_id="<9>", window=DAY),
    "list": lambda store: store.list_faxes((), 50),
    "list ended": lambda store: store.list_faxes(("failed", "cancelled"), 50),
    "count": lambda store: store.count(),
    "show": lambda store: store.show(store.changes[0].after.id),
    "renew": lambda store: store.renew(store.changes[0].after.id, even_if_twice=True),
    "apply": lambda store: store.apply(store.changes[-1].after.id, TimePassed()),
    "paper": lambda store: store.paper_of(store.changes[0].after.mail_id),
    "document": lambda store: store.document("d9"),
    "ids": lambda store: store.fax_ids_of("m9"),
    "purge": lambda store: store.purge(0.0, 0.0),
}


async def fill(store: TriedStore) -> None:
    """Store faxes in several situations, and a hold of the account."""
    for n in range(3):
        await store.called(f"c{n}", f"+131255500{n:02}", message_id=f"<{n}>", window=DAY)
        await store.webhook(reported(f"c{n}", Stage.DELIVERED, number=f"+131255500{n:02}"))
        await store.mail_out()
    await store.called("c9")
    await store.queued("+13125550199")
    cancelled = await store.queued("+13125550198")
    await store.apply(cancelled.id, CancelAsked())
    await store.change("INSERT INTO brakes VALUES ('hold', 'account', 'HTTP 401', 0, 0, 60, 1)")


def walks(plan: list[str], statement: str) -> list[str]:
    """Return the steps of a plan that grow with the years."""
    found = []
    for step in plan:
        scanned = re.fullmatch(r"SCAN (\w+)(?: USING (?:COVERING )?INDEX (\w+))?", step)
        if scanned is None or scanned[1] not in GROWING or scanned[2] in WALKED:
            continue
        sorted_whole = "USE TEMP B-TREE FOR ORDER BY" in plan
        if scanned[2] in WALKED_TO_A_LIMIT and "LIMIT" in statement and not sorted_whole:
            continue
        found.append(step)
    return found


@pytest.mark.parametrize("name", VERBS)
async def test_nothing_is_searched_from_end_to_end(sqlite_store: TriedStore, name: str) -> None:
    """With ten million old faxes a claim, a webhook, a list or a purge takes as long as with ten."""
    store = sqlite_store
    await fill(store)
    store.clock.now += 60 if name == "count" else 3 * DAY
    with overheard(store.database) as heard:
        await VERBS[name](store)
    asked = [(sql, values) for sql, values in heard if sql.split()[0] in {"SELECT", "UPDATE", "DELETE"}]
    assert asked != []
    connection = sqlite3.connect(store.url.removeprefix("sqlite:///"))
    for sql, values in asked:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
        assert walks(plan, sql) == [], f"{sql}\n{plan}"
    connection.close()


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
    assert walks(["SCAN brakes", "SEARCH faxes USING INDEX ix_faxes_due (state=?)"], "SELECT 1") == []


# --- PostgreSQL --------------------------------------------------------------------------------------

FEW = 300  # rows that one step may look at: there are a few open faxes, and limits of 200
WORDS = {"SELECT", "INSERT", "UPDATE", "DELETE"}
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
    assert [statement for statement in statements if statement[1]] == []


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
