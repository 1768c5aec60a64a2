"""How the store's questions are answered: by an index, however many years of faxes it keeps."""

import re
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import stores
from faxes import DAY, FROM, NUMBER
from stores import SETTINGS, TriedStore, overheard, reported

from gateway.records import CancelAsked, Stage, TimePassed

store = stores.store

GROWING = ("documents", "document_chunks", "mails", "faxes", "attempts", "history", "outbox", "duplicates",
           "carrier_ids", "carrier_events")  # fmt: skip
# Indexes that hold only what is open, and so stay small, or whose order lets the search end at the limit.
WALKED = {"ix_faxes_waiting", "ix_faxes_due", "ix_faxes_untold", "uq_attempts_channel", "ix_outbox_due",
          "ix_carrier_events_parked"}  # fmt: skip
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
async def test_nothing_is_searched_from_end_to_end(store: TriedStore, name: str) -> None:
    """With ten million old faxes a claim, a webhook, a list or a purge takes as long as with ten."""
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
