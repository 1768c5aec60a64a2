"""What operators and monitors see, what they may do at once to everything, and what is thrown away.

In charge of: lists, histories, counts; purging documents and old records.

Promises: reading changes nothing. A document goes only when every fax of its mail has ended, every reply is
out or given up, and `keep_documents` has passed; its pages are overwritten and given back to the disk.

Fails: `UnknownFax`; otherwise like the database.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gateway import schema as s
from gateway.records import FINAL, Fax, ReceivedMail, State
from gateway.store_apply import load
from gateway.store_outbox import load_mail
from gateway.store_unit import Turn, Unit, take_turn

# What one unit of work throws away: every page of it is overwritten, and nobody else writes meanwhile.
_STEP = 20  # mails or documents
_STEP_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of `list`."""

    id: str
    state: str
    number: str = field(repr=False)
    sender: str = field(repr=False)
    pages: int
    accepted_at: float
    due_at: float
    calls: int
    held_for: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Moment:
    """One line of a fax's history."""

    at: float
    event: str
    state: str
    detail: dict[str, object]


@dataclass(frozen=True, slots=True)
class Dossier:
    """Everything about one fax."""

    fax: Fax
    mail: ReceivedMail
    moments: tuple[Moment, ...]
    replies: tuple[tuple[str, str], ...]  # which mail, and what became of it


@dataclass(frozen=True, slots=True)
class StandingBrake:
    """One reason why nothing is called."""

    kind: str
    scope: str
    cause: str
    since: float
    probe_at: float | None


@dataclass(frozen=True, slots=True)
class Counts:
    """The queue in numbers."""

    states: dict[str, int]  # faxes that have not ended, by state
    overdue: int  # accepted, past their deadline, not ended: the target is 0
    oldest_waiting: float  # seconds, 0 when nothing waits
    outbox: int
    parked: int
    brakes: tuple[StandingBrake, ...]


# --- reading ---------------------------------------------------------------------------------------

_CALLS = (
    sa.select(sa.func.count())
    .where(s.attempts.c.fax_id == s.faxes.c.id, s.attempts.c.carrier_id.is_not(None))
    .scalar_subquery()
)
_LISTED = sa.select(s.faxes, s.mails.c.sender, _CALLS.label("calls")).join_from(
    s.faxes, s.mails, s.faxes.c.mail_id == s.mails.c.id
)
_HISTORY = sa.select(s.history).where(s.history.c.fax_id == sa.bindparam("fax_id")).order_by(s.history.c.id)
_REPLIES = (
    sa.select(s.outbox).where(s.outbox.c.fax_id == sa.bindparam("fax_id")).order_by(s.outbox.c.queued_at)
)
_STATES = (
    sa.select(s.faxes.c.state, sa.func.count().label("faxes"))
    .where(s.faxes.c.ended_at.is_(None))
    .group_by(s.faxes.c.state)
)
_OVERDUE = sa.select(sa.func.count()).where(
    s.faxes.c.ended_at.is_(None), s.faxes.c.give_up_at <= sa.bindparam("now")
)
_OLDEST = sa.select(sa.func.min(s.faxes.c.accepted_at)).where(s.faxes.c.ended_at.is_(None))
_OUTBOX = (
    sa.select(sa.func.count()).where(sa.text("sent_at IS NULL AND given_up_at IS NULL")).select_from(s.outbox)
)
_PARKED = sa.select(sa.func.count()).where(s.carrier_events.c.fax_id.is_(None))
_DOCUMENT = (
    sa.select(s.document_chunks.c.data)
    .where(s.document_chunks.c.document_id == sa.bindparam("document_id"))
    .order_by(s.document_chunks.c.position)
)
_PAPER = (
    sa.select(s.documents.c.id, s.documents.c.sha256)
    .join_from(s.mails, s.documents, s.mails.c.document_id == s.documents.c.id)
    .where(s.mails.c.id == sa.bindparam("mail_id"), s.documents.c.purged_at.is_(None))
)


def list_faxes(connection: Connection, states: tuple[str, ...], most: int) -> list[Listed]:
    """Return faxes in these states, newest first; no states: those that have not ended."""
    query = _LISTED.order_by(s.faxes.c.accepted_at.desc(), s.faxes.c.id.desc()).limit(most)
    wanted = states or tuple(set(State) - FINAL)
    rows: list[sa.Row[Any]] = []
    # Each part has an index: the years of ended faxes are not searched for the open ones.
    for part, states_of_part in (
        (s.faxes.c.ended_at.is_(None), [state for state in wanted if state not in FINAL]),
        (s.faxes.c.ended_at.is_not(None), [state for state in wanted if state in FINAL]),
    ):
        if states_of_part:
            rows += connection.execute(query.where(part, s.faxes.c.state.in_(states_of_part)))
    rows.sort(key=lambda row: (row.accepted_at, row.id), reverse=True)
    return [
        Listed(
            row.id, row.state, row.number, row.sender, row.pages, row.accepted_at, row.due_at, row.calls,
            row.held_for, row.reason,
        )
        for row in rows[:most]
    ]  # fmt: skip


def fax_ids_of(connection: Connection, name: str) -> list[str]:
    """Return the fax of that id, or every fax of the mail of that id."""
    query = sa.select(s.faxes.c.id).where(sa.or_(s.faxes.c.id == name, s.faxes.c.mail_id == name))
    return [row.id for row in connection.execute(query.order_by(s.faxes.c.id))]


def show(unit: Unit, fax_id: str) -> Dossier:
    """Return everything about one fax; raises UnknownFax."""
    fax = load(unit.connection, fax_id)
    values = {"fax_id": fax_id}
    moments = tuple(
        Moment(row.at, row.event, row.state, json.loads(row.detail))
        for row in unit.connection.execute(_HISTORY, values)
    )
    replies = tuple(
        (row.notice, _fate(row.sent_at, row.given_up_at, row.error))
        for row in unit.connection.execute(_REPLIES, values)
    )
    return Dossier(fax, load_mail(unit, fax.mail_id), moments, replies)


def _fate(sent_at: float | None, given_up_at: float | None, error: str) -> str:
    if sent_at is not None:
        return "sent"
    return f"{'given up' if given_up_at is not None else 'waiting'}{': ' + error if error else ''}"


def count(unit: Unit) -> Counts:
    """Count the queue."""
    connection, now = unit.connection, unit.now
    oldest = connection.execute(_OLDEST).scalar()
    return Counts(
        states={row.state: row.faxes for row in connection.execute(_STATES)},
        overdue=connection.execute(_OVERDUE, {"now": now}).scalar_one(),
        oldest_waiting=0.0 if oldest is None else max(0.0, now - oldest),
        outbox=connection.execute(_OUTBOX).scalar_one(),
        parked=connection.execute(_PARKED).scalar_one(),
        brakes=tuple(
            StandingBrake(row.kind, row.scope, row.cause, row.since, row.probe_at)
            for row in connection.execute(sa.select(s.brakes))
        ),
    )


def document(connection: Connection, document_id: str) -> bytes | None:
    """Return the bytes of a document, None once purged."""
    return b"".join(connection.execute(_DOCUMENT, {"document_id": document_id}).scalars()) or None


def paper_of(connection: Connection, mail_id: str) -> tuple[str, str] | None:
    """Return id and SHA-256 of a mail's document, None once purged."""
    row = connection.execute(_PAPER, {"mail_id": mail_id}).first()
    return None if row is None else (row.id, row.sha256)


# --- throwing away ---------------------------------------------------------------------------------

_MAILS_OF = s.mails.c.document_id == s.documents.c.id
_UNFINISHED = sa.exists().where(
    _MAILS_OF,
    s.faxes.c.mail_id == s.mails.c.id,
    sa.or_(s.faxes.c.ended_at.is_(None), s.faxes.c.ended_at > sa.bindparam("before")),
)
_UNTOLD = sa.exists().where(
    _MAILS_OF,
    s.faxes.c.mail_id == s.mails.c.id,
    s.outbox.c.fax_id == s.faxes.c.id,
    s.outbox.c.sent_at.is_(None),
    s.outbox.c.given_up_at.is_(None),
)
_OVER = (
    sa.select(s.documents.c.id, s.documents.c.size)
    .where(s.documents.c.purged_at.is_(None), s.documents.c.stored_at <= sa.bindparam("before"))
    .where(~_UNFINISHED, ~_UNTOLD)
    .limit(_STEP)
)
_ORPHANED = 3600.0  # seconds after which nobody will claim a chunk any more
_ORPHANS = (
    sa.select(s.document_chunks.c.document_id)
    .where(sa.text("position = 0"), s.document_chunks.c.stored_at <= sa.bindparam("before"))
    .where(~sa.exists().where(s.documents.c.id == s.document_chunks.c.document_id))
    .limit(1)
)
_DROP_CHUNKS = s.document_chunks.delete().where(s.document_chunks.c.document_id == sa.bindparam("gone"))
_MARK = (
    s.documents.update().where(s.documents.c.id == sa.bindparam("gone")).values(purged_at=sa.bindparam("at"))
)
# With the document goes what the mail said: records hold no content.
_BLANK = (
    s.mails.update()
    .where(s.mails.c.document_id == sa.bindparam("gone"))
    .values(subject="", original_headers=b"")
)


def purge_documents(unit: Unit, keep: float) -> int:
    """Throw away some documents that nobody needs any more; return how many, 0 when none is left."""
    take_turn(unit, Turn.PAPER)
    gone: list[str] = []
    room = _STEP_BYTES
    for row in unit.connection.execute(_OVER, {"before": unit.now - keep}).all():
        if room > 0:
            room -= row.size
            gone.append(row.id)
            unit.connection.execute(_MARK, {"gone": row.id, "at": unit.now})
            unit.connection.execute(_BLANK, {"gone": row.id})
    orphans = list(unit.connection.execute(_ORPHANS, {"before": unit.now - _ORPHANED}).scalars())
    for document_id in gone + orphans:
        unit.connection.execute(_DROP_CHUNKS, {"gone": document_id})
    return len(gone) + len(orphans)


_OLD_MAILS = (
    sa.select(s.mails.c.id, s.mails.c.document_id)
    .join_from(s.mails, s.documents, _MAILS_OF)
    .where(s.mails.c.received_at <= sa.bindparam("before"), s.documents.c.purged_at.is_not(None))
    .where(
        ~sa.exists().where(
            s.faxes.c.mail_id == s.mails.c.id,
            sa.or_(s.faxes.c.ended_at.is_(None), s.faxes.c.ended_at > sa.bindparam("before")),
        )
    )
    .order_by(s.mails.c.received_at)  # by its index: what is younger is not looked at
    .limit(_STEP)
)


def purge_records(unit: Unit, keep: float) -> int:
    """Throw away what is known of some mails that ended long ago; return how many, 0 when none is left."""
    take_turn(unit, Turn.PAPER)
    connection, before = unit.connection, {"before": unit.now - keep}
    rows = connection.execute(_OLD_MAILS, before).all()
    for row in rows:
        ids = sa.select(s.faxes.c.id).where(s.faxes.c.mail_id == row.id).scalar_subquery()
        calls = sa.select(s.attempts.c.carrier_id).where(s.attempts.c.fax_id.in_(ids))
        connection.execute(s.carrier_events.delete().where(s.carrier_events.c.carrier_id.in_(calls)))
        for table in (s.outbox, s.history, s.attempts, s.duplicates):
            connection.execute(table.delete().where(table.c.fax_id.in_(ids)))
        connection.execute(s.faxes.delete().where(s.faxes.c.mail_id == row.id))
        connection.execute(s.mails.delete().where(s.mails.c.id == row.id))
        connection.execute(s.documents.delete().where(s.documents.c.id == row.document_id))
    done = s.outbox.c.sent_at.is_not(None) | s.outbox.c.given_up_at.is_not(None)
    old = s.outbox.c.fax_id.is_(None) & (s.outbox.c.queued_at <= before["before"])
    connection.execute(s.outbox.delete().where(done, old))
    connection.execute(s.duplicates.delete().where(s.duplicates.c.expires_at <= unit.now))
    stale = s.carrier_events.c.fax_id.is_(None) & (s.carrier_events.c.received_at <= unit.now - 30 * 86400.0)
    connection.execute(s.carrier_events.delete().where(stale))
    connection.execute(s.carrier_ids.delete().where(s.carrier_ids.c.seen_at <= before["before"]))
    served = sa.select(s.turns.c.turn).where(s.turns.c.sender == "").scalar_subquery()
    connection.execute(s.turns.delete().where(s.turns.c.sender != "", s.turns.c.turn <= served))
    return len(rows)
