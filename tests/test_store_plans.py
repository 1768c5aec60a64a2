"""How the store's questions are answered: by an index, however many years of faxes it keeps."""

import sqlite3
from collections.abc import Awaitable, Callable

import pytest
import sqlalchemy as sa
import stores
from faxes import DAY, FROM, NUMBER
from stores import SETTINGS, TriedStore, overheard, reported

from gateway.records import Alert, Report, Reported, Stage, Taken
from gateway.schema import metadata

store = stores.store

GROWING = {"documents", "document_chunks", "mails", "faxes", "attempts", "history", "carrier_ids",
           "carrier_events", "outbox", "duplicates"}  # fmt: skip
PARTIAL = {
    index.name
    for table in metadata.tables.values()
    for index in table.indexes
    if index.dialect_options["sqlite"]["where"] is not None
}


async def fill(store: TriedStore) -> None:
    for n in range(3):
        await store.called(f"c{n}", f"+131255500{n:02}", message_id=f"<{n}>", digest=str(n), window=DAY)
        store.clock.now += 1
        await store.webhook(reported(f"c{n}", Stage.DELIVERED))
    await store.called("c9")
    await store.queued("+13125550199")


def scans(path: str, statement: str, values: object) -> list[str]:
    connection = sqlite3.connect(path)
    plan = [row[3] for row in connection.execute("EXPLAIN QUERY PLAN " + statement, values)]
    connection.close()
    return plan

async def test_x(store):
    await fill(store)
    V = {
     "claim": lambda: store.claim_call(SETTINGS),
     "q": lambda: store.claim_questions(4),
     "ev": lambda: store.evidence(NUMBER, FROM),
     "bound": lambda: store.bound_ids(["c1"]),
     "webhook": lambda: store.webhook(reported("c9", Stage.DIALLED)),
     "webhook2": lambda: store.webhook(reported("c10", Stage.DIALLED)),
     "time": store.pass_time, "sweep": store.sweep_parked, "take": store.take_over,
     "notices": lambda: store.claim_notices(3),
     "list": lambda: store.list_faxes((),50),
     "list2": lambda: store.list_faxes(("failed",),50),
     "list3": lambda: store.list_faxes(("failed","queued"),50),
     "count": store.count, "ids": lambda: store.fax_ids_of("x"),
     "purge": lambda: store.purge(0,0),
    }
    await store.hold_all(); await store.release_all()
    await store.change("insert into brakes values ('hold','account','x',0,0,60,1)")
    for name, verb in V.items():
        if name=="purge": store.clock.now += 400*DAY
        with overheard(store.database) as h: await verb()
        print("##",name)
        for st, v in h:
            if st.split()[0] not in ("SELECT","UPDATE","DELETE"): continue
            if len(v)<st.count("?"): print("?",st); continue
            print("   ", " ".join(st.split())[:90], "=>", scans(store.url.removeprefix("sqlite:///"), st, v))
