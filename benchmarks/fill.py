"""Stores with a past: faxes by the hundred thousand, written by SQL into the file of a stopped gateway.

What is written is what the gateway itself would have left: see `gateway/schema.py`.
"""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from samples import number

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


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    """Open the file of a gateway that does not run, without waiting for the disk."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("PRAGMA cache_size=-500000")
        connection.execute("BEGIN")
        yield connection
        connection.execute("COMMIT")  # and no ANALYZE, which the gateway does not use either
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def finished(file: Path, count: int) -> None:
    """Add so many delivered faxes, their documents purged."""
    begin = time.time() - _SPAN - _DAY
    with _opened(file) as connection:
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


def waiting(file: Path, count: int) -> None:
    """Add so many faxes that wait for tomorrow, all with one document."""
    now = time.time()
    with _opened(file) as connection:
        connection.execute(
            "INSERT INTO documents (id, sha256, pages, size, stored_at) VALUES ('wd', 'x', 1, 10, ?)", (now,)
        )
        connection.execute(
            "INSERT INTO document_chunks (document_id, position, stored_at, data) VALUES ('wd', 0, ?, x'00')",
            (now,),
        )
        connection.executemany(
            "INSERT INTO mails (id, sender, received_at, thread, subject, original_headers, document_id)"
            " VALUES (?, 'waiting@example.com', ?, '', 'x', x'', 'wd')",
            ((f"w{place:07}", now) for place in range(count)),
        )
        connection.executemany(
            "INSERT INTO faxes (id, mail_id, number, recipient, pages, state, due_at, accepted_at,"
            " give_up_at, version, held_detail, told_delayed, cancel_asked, turn, lease_until, ripe)"
            " VALUES (?, ?, ?, '', 1, 'queued', ?, ?, ?, 0, '', 0, 0, ?, 0, 0)",
            (
                (f"w{p:07}-1", f"w{p:07}", number(500_000 + p), now + _DAY, now, now + 2 * _DAY, float(p + 2))
                for p in range(count)
            ),
        )


def sending(file: Path, count: int) -> list[tuple[str, str]]:
    """Add so many faxes that the carrier has; return its id and the number of each."""
    now = time.time()
    known = [(f"c{place:07}-0000-4000-8000-000000000000", number(place)) for place in range(count)]
    with _opened(file) as connection:
        connection.execute(
            "INSERT INTO documents (id, sha256, pages, size, stored_at) VALUES ('sd', 'x', 1, 10, ?)", (now,)
        )
        connection.execute(
            "INSERT INTO mails (id, sender, received_at, thread, subject, original_headers, document_id)"
            " VALUES ('s', 'clerk@example.com', ?, '', 'x', x'', 'sd')", (now,),
        )  # fmt: skip
        for place, (carrier_id, to) in enumerate(known):
            fax = f"s-{place + 1}"
            connection.execute(
                "INSERT INTO faxes (id, mail_id, number, recipient, pages, state, due_at, accepted_at,"
                " give_up_at, version, held_detail, told_delayed, cancel_asked, turn, lease_until, ripe)"
                " VALUES (?, 's', ?, '', 1, 'sending', ?, ?, ?, 2, '', 0, 0, ?, 0, 1)",
                (fax, to, now + _DAY, now, now + _DAY, float(place)),
            )
            connection.execute(
                "INSERT INTO attempts (id, fax_id, ordinal, number, started_at, lease_until, from_number,"
                " connection_id, quality, t38, slot, carrier_id, taken_at, stage, changed_at, cancel_wanted,"
                " cancel_asked, blocking, open) VALUES (?, ?, 1, ?, ?, ?, '+13125790015', '1232154810234',"
                " 'high', 1, ?, ?, ?, 1, ?, 0, 0, 1, 1)",
                (f"sa{place}", fax, to, now, now + 100, place, carrier_id, now, now),
            )
            connection.execute(
                "INSERT INTO carrier_ids (carrier_id, seen_at) VALUES (?, ?)", (carrier_id, now)
            )
    return known
