"""Stores with a past: faxes by the hundred thousand, written into the store of a gateway that does not run.

What is written is what the gateway itself would have left: see `gateway/schema.py`. A million finished ones
are made by SQLite itself, in its file; the others come through SQLAlchemy, whatever the store is kept in.
"""

import contextlib
import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from samples import number

from gateway import schema

_DAY = 86400.0
_SPAN = 300 * _DAY  # over which the finished faxes came

_FINISHED = """
INSERT INTO documents (id, sha256, pages, size, stored_at, purged_at)
    SELECT 'od' || n, 'x', 3, 100000, t, t + 86400 FROM old;
INSERT INTO mails (id, sender, received_at, message_id, thread, subject, original_headers, document_id)
    SELECT 'o' || n, n % 2000 || '@example.com', t, '<' || n || '@example.com>', '', 'Order', x'00', 'od' || n
    FROM old;
INSERT INTO faxes (id, mail_id, number, recipient, pages, state, due_at, accepted_at, give_up_at, version,
                   held_detail, told_delayed, cancel_asked, ended_at, turn, lease_until)
    SELECT 'o' || n || '-1', 'o' || n, number, number || '@fax.local', 3, 'delivered', t + 60, t, t + 86400,
           7, '', 0, 0, t + 60, 0, 0 FROM old;
INSERT INTO attempts (id, fax_id, ordinal, number, started_at, lease_until, from_number, connection_id,
                      quality, t38, carrier_id, taken_at, stage, changed_at, cancel_wanted, cancel_asked,
                      blocking, open, "end", ended_at, pages, duration)
    SELECT 'oa' || n, 'o' || n || '-1', 1, number, t + 1, t + 100, '+13125790015', '1232154810234',
           'high', 1, 'oc' || n, t + 2, 5, t + 60, 0, 0, 0, 0, 'delivered', t + 60, 3, 60 FROM old;
INSERT INTO history (fax_id, at, event, state, detail)
    SELECT 'o' || n || '-1', t + place, 'Reported', 'sending', '{}' FROM old, places;
INSERT INTO outbox (id, fax_id, notice, recipient, queued_at, due_at, lease_until, fence, tries, sent_at,
                    error)
    SELECT 'o' || n, 'o' || n || '-1', 'delivered', n % 2000 || '@example.com', t, t, 0, 1, 1, t + 61, ''
    FROM old;
INSERT INTO carrier_ids (carrier_id, seen_at) SELECT 'oc' || n, t FROM old;
INSERT INTO carrier_events (id, carrier_id, type, received_at, to_number, from_number, connection_id,
                            occurred_at, report, fax_id)
    SELECT 'oe' || n || '-' || place, 'oc' || n, 'fax.queued', t, number, '+13125790015', '1232154810234', t,
           '{}', 'o' || n || '-1' FROM old, places WHERE place <= 4;
"""


def finished(file: Path, count: int) -> None:
    """Add so many delivered faxes, their documents purged, to a file of SQLite's; no disk is waited for."""
    begin = time.time() - _SPAN - _DAY
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("PRAGMA cache_size=-500000")
        connection.execute("BEGIN")
        connection.execute(
            "CREATE TEMPORARY TABLE old AS WITH RECURSIVE counted (n) AS"
            " (SELECT 1000000 UNION ALL SELECT n + 1 FROM counted WHERE n < 1000000 + ? - 1)"
            " SELECT n, ? + (n - 1000000) * ? AS t, '+1312' || (2900000 + n % 5000) AS number FROM counted",
            (count, begin, _SPAN / count),
        )
        connection.execute(
            "CREATE TEMPORARY TABLE places AS SELECT column1 AS place FROM (VALUES (1),(2),(3),(4),(5),(6))"
        )
        for statement in _FINISHED.split(";"):
            connection.execute(statement)
        connection.execute("COMMIT")  # and no ANALYZE, which the gateway does not use either
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def waiting(connection: sa.Connection, count: int) -> None:
    """Add so many faxes that wait for tomorrow, all with one document."""
    if not count:
        return
    now = time.time()
    connection.execute(schema.documents.insert(), _document("wd", now))
    chunk = {"document_id": "wd", "position": 0, "stored_at": now, "data": b"\0"}
    connection.execute(schema.document_chunks.insert(), chunk)
    mails = [_mail(f"w{place:07}", "waiting@example.com", "wd", now) for place in range(count)]
    connection.execute(schema.mails.insert(), mails)
    faxes = [
        _fax(f"w{place:07}", 1, number(500_000 + place), now)
        | {"state": "queued", "give_up_at": now + 2 * _DAY, "turn": place + 2.0, "ripe": False}
        for place in range(count)
    ]
    connection.execute(schema.faxes.insert(), faxes)


def sending(connection: sa.Connection, count: int) -> list[tuple[str, str]]:
    """Add so many faxes that the carrier has; return its id and the number of each."""
    now = time.time()
    known = [(f"c{place:07}-0000-4000-8000-000000000000", number(place)) for place in range(count)]
    connection.execute(schema.documents.insert(), _document("sd", now))
    connection.execute(schema.mails.insert(), _mail("s", "clerk@example.com", "sd", now))
    faxes = [
        _fax("s", place + 1, to, now) | {"state": "sending", "version": 2, "turn": float(place)}
        for place, (_, to) in enumerate(known)
    ]
    connection.execute(schema.faxes.insert(), faxes)
    attempts: list[dict[str, Any]] = [
        {
            "id": f"sa{place}", "fax_id": f"s-{place + 1}", "ordinal": 1, "number": to, "started_at": now,
            "lease_until": now + 100, "from_number": "+13125790015", "connection_id": "1232154810234",
            "quality": "high", "t38": True, "slot": place, "carrier_id": carrier_id, "taken_at": now,
            "stage": 1, "changed_at": now, "cancel_wanted": False, "cancel_asked": False, "blocking": True,
            "open": True,
        }
        for place, (carrier_id, to) in enumerate(known)
    ]  # fmt: skip
    connection.execute(schema.attempts.insert(), attempts)
    seen = [{"carrier_id": carrier_id, "seen_at": now} for carrier_id, _ in known]
    connection.execute(schema.carrier_ids.insert(), seen)
    return known


def _document(name: str, now: float) -> dict[str, Any]:
    return {"id": name, "sha256": "x", "pages": 1, "size": 10, "stored_at": now}


def _mail(name: str, sender: str, document: str, now: float) -> dict[str, Any]:
    return {
        "id": name, "sender": sender, "received_at": now, "thread": "", "subject": "x",
        "original_headers": b"", "document_id": document,
    }  # fmt: skip


def _fax(mail: str, place: int, to: str, now: float) -> dict[str, Any]:
    """Return what the faxes here have in common; nothing is due before tomorrow."""
    return {
        "id": f"{mail}-{place}", "mail_id": mail, "number": to, "recipient": "", "pages": 1,
        "due_at": now + _DAY, "accepted_at": now, "give_up_at": now + _DAY, "version": 0, "held_detail": "",
        "told_delayed": False, "cancel_asked": False, "lease_until": 0.0, "ripe": True,
    }  # fmt: skip
