"""Mail on its way out: the durable outbox.

In charge of: handing each due mail to one sender at a time, and recording what became of it.

Promises: what is queued stays until the relay took it or it was given up, with an alert. A claim carries a
fence: who comes back after the lease with an old one records nothing, so a mail is at worst repeated under
the same Message-ID. Recipients take turns: thousands of mails to one keep nobody else's waiting.

Fails: like the database.
"""

from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from gateway import schema as s
from gateway.records import Alert, Notice, OutboxEntry, ReceivedMail
from gateway.store_apply import alert, load
from gateway.store_unit import Unit, suspects_apart

NOTICE_LEASE = 300.0  # seconds for one mail to be composed and handed over

HARMFUL_AFTER = 5  # claims in a row that nobody came back from: the gateway falls over this mail

PENDING = sa.text("sent_at IS NULL AND given_up_at IS NULL")
_DUE = (
    sa.select(s.outbox)
    .where(PENDING, s.outbox.c.due_at <= sa.bindparam("now"), s.outbox.c.lease_until <= sa.bindparam("now"))
    .order_by(s.outbox.c.turn)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
_LEASE = (
    s.outbox.update()
    .where(s.outbox.c.id == sa.bindparam("entry_id"))
    .values(lease_until=sa.bindparam("until"), fence=s.outbox.c.fence + 1, claims=s.outbox.c.claims + 1)
)
_HELD_BY = (s.outbox.c.id == sa.bindparam("entry_id"), s.outbox.c.fence == sa.bindparam("held"), PENDING)
_SENT = s.outbox.update().where(*_HELD_BY).values(sent_at=sa.bindparam("at"), payload=None, error="")
_DEFERRED = (
    s.outbox.update()
    .where(*_HELD_BY)
    .values(
        due_at=sa.bindparam("at"),
        lease_until=0.0,
        tries=s.outbox.c.tries + 1,
        claims=0,
        error=sa.bindparam("why"),
    )
)
_GIVEN_UP = (
    s.outbox.update()
    .where(*_HELD_BY)
    .values(given_up_at=sa.bindparam("at"), payload=None, error=sa.bindparam("why"))
)
_LOAD_MAIL = sa.select(s.mails).where(s.mails.c.id == sa.bindparam("mail_id"))
_CAUSE = sa.select(s.outbox.c.cause).where(s.outbox.c.id == sa.bindparam("entry_id"))


def claim_notices(unit: Unit, most: int) -> list[OutboxEntry]:
    """Return mails that are due, leased to the caller.

    A "still trying" that its end overtook is dropped; one that the gateway fell over each time is given up.
    One that was in somebody's hands when the gateway came to an end comes by itself, to be sent `alone`:
    should it be to blame, it shall not drag others along.
    """
    due = []
    rows = unit.connection.execute(_DUE, {"now": unit.now, "most": most}).all()
    for row in suspects_apart(rows, lambda row: row.claims > 0):
        # Whoever is to be sent alone waits for the others first.
        lease = NOTICE_LEASE * (2 if row.claims else 1)
        unit.connection.execute(_LEASE, {"entry_id": row.id, "until": unit.now + lease})
        if row.claims >= HARMFUL_AFTER:
            given_up(unit, row.id, row.fence + 1, "the gateway came to an end each time it worked on it")
            continue
        entry = _entry(unit, row)
        if entry.notice is Notice.DELAYED and entry.fax is not None and entry.fax.final:
            values = {
                "entry_id": entry.id,
                "held": entry.fence,
                "at": unit.now,
                "why": "overtaken by the end",
            }
            unit.connection.execute(_GIVEN_UP, values)
        else:
            due.append(entry)
    return due


def _entry(unit: Unit, row: Row[Any]) -> OutboxEntry:
    entry = OutboxEntry(row.id, row.recipient, row.queued_at, row.tries, row.fence + 1, row.claims > 0)
    payload: bytes = row.payload or b""
    if row.fax_id is None:
        if row.cause is None:
            return replace(entry, forward=payload)
        return replace(entry, alert=payload.decode(), cause=row.cause)
    fax = load(unit.connection, row.fax_id)
    return replace(entry, notice=Notice(row.notice), fax=fax, mail=load_mail(unit, fax.mail_id))


def load_mail(unit: Unit, mail_id: str) -> ReceivedMail:
    """Return what is kept of a mail."""
    row = unit.connection.execute(_LOAD_MAIL, {"mail_id": mail_id}).one()
    return ReceivedMail(
        id=row.id, sender=row.sender, received_at=row.received_at, message_id=row.message_id,
        references=row.thread, subject=row.subject, original_headers=row.original_headers,
        document_id=row.document_id,
    )  # fmt: skip


def sent(unit: Unit, entry_id: str, fence: int) -> bool:
    """Record that the relay took it; False when the claim had lapsed."""
    values = {"entry_id": entry_id, "held": fence, "at": unit.now}
    return bool(unit.connection.execute(_SENT, values).rowcount)


def deferred(unit: Unit, entry_id: str, fence: int, wait: float, why: str) -> bool:
    """Record that it is to be tried again in `wait` seconds."""
    values = {"entry_id": entry_id, "held": fence, "at": unit.now + wait, "why": why}
    return bool(unit.connection.execute(_DEFERRED, values).rowcount)


def given_up(unit: Unit, entry_id: str, fence: int, why: str) -> bool:
    """Record that it will not be tried again, and tell the postmaster, unless it was for the postmaster."""
    values = {"entry_id": entry_id, "held": fence, "at": unit.now, "why": why}
    if not unit.connection.execute(_GIVEN_UP, values).rowcount:
        return False
    row = unit.connection.execute(_CAUSE, {"entry_id": entry_id}).one()
    if row.cause is None:
        alert(unit, Alert("reply_given_up", f"The mail {entry_id} could not be handed over: {why}."))
    return True
