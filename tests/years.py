"""A database of the gateway's that has been in use for years, for the tests of how long its questions take.

`old_database()` fills one on the tests' PostgreSQL, once; many tests copy it.
"""

import functools

import postgres
import psycopg
from faxes import DAY, NOW

FAXES = 10_000  # enough for the planner to see what grows
_SPAN = 300 * DAY  # over which they came; of the last day's there are documents

_FILL = f"""
CREATE TEMPORARY TABLE old AS
    SELECT n, {NOW} - {_SPAN} + n * {_SPAN} / {FAXES} AS t,
           '+1312' || lpad((n % 5000)::text, 7, '0') AS number,
           (ARRAY['failed', 'cancelled', 'delivered'])[least(n % 10 + 1, 3)] AS state,
           n > {FAXES} * (1 - {DAY} / {_SPAN}) AS fresh
    FROM generate_series(1, {FAXES}) AS n;
INSERT INTO documents (id, sha256, pages, size, stored_at, purged_at)
    SELECT 'od' || n, 'x', 3, 50000, t, CASE WHEN fresh THEN NULL ELSE t + {DAY} END FROM old;
INSERT INTO document_chunks (document_id, position, stored_at, data)
    SELECT 'od' || n, position, t, 'x' FROM old, generate_series(0, 3) AS position WHERE fresh;
INSERT INTO mails (id, sender, received_at, message_id, thread, subject, original_headers, document_id)
    SELECT 'o' || n, n % 200 || '@example.com', t, '<' || n || '>', '', '', '', 'od' || n FROM old;
INSERT INTO faxes (id, mail_id, number, recipient, pages, state, due_at, accepted_at, give_up_at, version,
                   held_detail, told_delayed, cancel_asked, ended_at, turn, lease_until)
    SELECT 'o' || n || '-1', 'o' || n, number, 'x', 3, state, t + 60, t, t + {DAY}, 4,
           '', false, false, t + 60, n, 0
    FROM old;
INSERT INTO attempts (id, fax_id, ordinal, number, started_at, lease_until, from_number, connection_id,
                      quality, t38, carrier_id, stage, changed_at, cancel_wanted, cancel_asked, blocking,
                      open, "end")
    SELECT 'oa' || n || '-' || ordinal, 'o' || n || '-1', ordinal, number, t + ordinal, t, '+13125550100',
           'x', 'high', true, CASE ordinal WHEN 1 THEN 'oc' || n END, 6, t, false, false, false, false,
           'failed'
    FROM old, generate_series(1, 2) AS ordinal WHERE ordinal = 1 OR n % 5 = 0;
INSERT INTO history (fax_id, at, event, state, detail)
    SELECT 'o' || n || '-1', t, 'Reported', state, '{{}}' FROM old, generate_series(1, 3);
INSERT INTO outbox (id, fax_id, notice, recipient, queued_at, due_at, lease_until, fence, tries,
                    sent_at, error)
    SELECT 'o' || n, 'o' || n || '-1', state, n % 200 || '@example.com', t, t, 0, 1, 0, t, '' FROM old;
INSERT INTO carrier_ids (carrier_id, seen_at) SELECT 'oc' || n, t FROM old;
INSERT INTO carrier_events (id, carrier_id, type, received_at, to_number, from_number, connection_id,
                            occurred_at, fax_id)
    SELECT 'oe' || n || '-' || time, 'oc' || n, 'fax.event', t, number, '+13125550100', 'x', t,
           'o' || n || '-1'
    FROM old, generate_series(1, 2) AS time;
INSERT INTO duplicates (key, mail_id, fax_id, expires_at)
    SELECT md5(n::text), 'o' || n, 'o' || n || '-1', t + 400 * {DAY} FROM old;
INSERT INTO turns (sender, turn) SELECT n || '@example.com', {FAXES} FROM generate_series(0, 199) AS n;
DROP TABLE old;
"""  # noqa: S608 -- numbers of ours


@functools.cache
def _template() -> str:
    url = postgres.server().create(postgres.template())
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(_FILL.encode())
        connection.execute("VACUUM ANALYZE")
    return url.rpartition("/")[2]


def old_database() -> str:
    """Make one and return its URL."""
    return postgres.server().create(_template())
