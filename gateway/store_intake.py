"""How a mail gets into the store.

In charge of: the accepting transaction with its document, faxes and duplicate keys; renewing an ended fax.

Promises: `accept` keeps all faxes of a mail or none. Above 256 KB a document goes in before, in chunks of
short transactions, and only becomes visible here; chunks that nobody claimed are purged by age. A mail seen
before, within the window, becomes no second fax (RFC 1047; rule 6).

Fails: `StoreFull`, `StoreUnavailable`; `NotRenewable` with the reason for an operator.
"""

import hashlib
import secrets
from dataclasses import dataclass, field, replace

import sqlalchemy as sa

from gateway import schema as s
from gateway.database import StoreError
from gateway.reasons import Kind, lookup
from gateway.records import End, Fax, ReceivedMail, State
from gateway.store_apply import fax_values, load, post
from gateway.store_unit import Turn, Unit, Upsert, take_turn

CHUNK = 256 * 1024  # bytes; a larger write would hold up the other units of work
_WINDOW_WITHOUT_ID = 600.0  # seconds: without a Message-ID only a repeat soon after is the same mail
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's: no letters that look like digits


class NotRenewable(StoreError):
    """The fax cannot be sent again; the text is for the operator."""


@dataclass(frozen=True, slots=True)
class Paper:
    """The document of a mail: stored already under `id`, unless `data` brings it along."""

    id: str
    sha256: str
    pages: int
    size: int
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Submission:
    """A mail that passed every check."""

    mail: ReceivedMail  # its id is empty: the store names it
    digest: str  # SHA-256 over the attachments as received
    recipients: tuple[tuple[str, str], ...] = field(repr=False)  # number, and the address as written
    paper: Paper | None = None
    forward: bytes | None = field(
        default=None, repr=False
    )  # the whole mail, if it also goes to the postmaster
    message_key: str | None = None  # SHA-256 over the Message-ID as received; None without one


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the client is told."""

    mail_id: str
    fax_ids: tuple[str, ...]
    repeated: bool  # every recipient had been accepted before; the id is the first mail's


def new_mail_id(now: float) -> str:
    """Return a mail id of 13 characters: sorted by time, never the same twice, easy to read out."""
    ticks = int(now * 1000)
    stamp = "".join(_ALPHABET[ticks >> shift & 31] for shift in range(40, -1, -5))
    return stamp + "".join(secrets.choice(_ALPHABET) for _ in range(4))


def add_chunk(unit: Unit, document_id: str, position: int, data: bytes) -> None:
    """Keep one piece of a document."""
    values = {"document_id": document_id, "position": position, "stored_at": unit.now, "data": data}
    unit.connection.execute(_ADD_CHUNK, values)


def accept(unit: Unit, submission: Submission, duplicate_window: float) -> Accepted:
    """Keep the mail and its faxes; the caller says 250 once this is committed."""
    mail_id = new_mail_id(unit.now)
    if submission.forward is not None:
        post(unit, f"{mail_id}.forward", unit.postmaster, payload=submission.forward)
    fresh: list[Fax] = []
    first_mail = mail_id
    recipients: dict[str, str] = {}  # two spellings of a number are one fax, whatever the window
    for number, recipient in submission.recipients:
        recipients.setdefault(number, recipient)
    for number, recipient in recipients.items():
        fax_id = f"{mail_id}-{len(fresh) + 1}"
        earlier = _claim_key(unit, submission, number, mail_id, fax_id, duplicate_window)
        if earlier is not None:
            first_mail = earlier
            continue
        paper = submission.paper
        fresh.append(_fax(unit, fax_id, mail_id, number, recipient, paper.pages if paper else 0))
    if fresh and submission.paper is not None:
        _keep(unit, submission, mail_id, submission.paper)
    turn = _turn(unit, submission.mail.sender, len(fresh))
    for place, fax in enumerate(fresh):
        unit.connection.execute(_ADD_FAX, fax_values(fax) | {"turn": turn + place, **_NEW})
    repeated = bool(submission.recipients) and not fresh
    return Accepted(first_mail if repeated else mail_id, tuple(fax.id for fax in fresh), repeated)


def renew(unit: Unit, fax_id: str, *, even_if_twice: bool) -> Fax:
    """Send an ended fax again as a new one that names it. Raises UnknownFax, NotRenewable."""
    take_turn(unit, Turn.PAPER)
    old = load(unit.connection, fax_id)
    if _may_have_arrived(old) and not even_if_twice:
        raise NotRenewable(f"fax {fax_id} was delivered, or may have been; --even-if-twice sends it again")
    renewed = unit.connection.execute(_RENEWED, {"mail_id": old.mail_id, "fax_id": fax_id}).scalar()
    if renewed is not None and not even_if_twice:
        raise NotRenewable(f"fax {fax_id} was sent again already, as {renewed}; --even-if-twice repeats that")
    row = unit.connection.execute(_DOCUMENT_OF, {"mail_id": old.mail_id}).one()
    if row.purged_at is not None:
        raise NotRenewable(f"the document of fax {fax_id} has been purged; it must be mailed again")
    place = unit.connection.execute(_COUNT_FAXES, {"mail_id": old.mail_id}).scalar_one() + 1
    fax = _fax(unit, f"{old.mail_id}-{place}", old.mail_id, old.number, old.recipient, old.pages)
    fax = replace(fax, renews=old.id)
    turn = _turn(unit, row.sender, 1)
    unit.connection.execute(_ADD_FAX, fax_values(fax) | {"turn": turn, **_NEW})
    return fax


def _may_have_arrived(fax: Fax) -> bool:
    return fax.state is State.DELIVERED or any(
        attempt.open
        or attempt.end in {End.DELIVERED, End.OVERRULED}
        or (attempt.end is End.FAILED and lookup(attempt.reason).kind is Kind.CONTRADICTION)
        for attempt in fax.attempts
    )


# --- parts -----------------------------------------------------------------------------------------

_ADD_CHUNK = s.document_chunks.insert()
_ADD_DOCUMENT = s.documents.insert()
_ADD_MAIL = s.mails.insert()
_ADD_FAX = s.faxes.insert()
_NEW = {"lease_until": 0.0, "ripe": True, "asks": 0}
_DOCUMENT_OF = (
    sa.select(s.documents.c.purged_at, s.mails.c.sender)
    .join_from(s.mails, s.documents, s.mails.c.document_id == s.documents.c.id)
    .where(s.mails.c.id == sa.bindparam("mail_id"))
)
_RENEWED = sa.select(s.faxes.c.id).where(
    s.faxes.c.mail_id == sa.bindparam("mail_id"),
    s.faxes.c.renews == sa.bindparam("fax_id"),
    s.faxes.c.state.not_in(["failed", "cancelled"]),
)
_COUNT_FAXES = (
    sa.select(sa.func.count()).select_from(s.faxes).where(s.faxes.c.mail_id == sa.bindparam("mail_id"))
)
_OLD_KEY = sa.select(s.duplicates.c.mail_id).where(s.duplicates.c.key == sa.bindparam("key"))
_TURNS = sa.select(s.turns.c.sender, s.turns.c.turn).where(
    sa.or_(s.turns.c.sender == sa.bindparam("who"), s.turns.c.sender == "")
)
_LAST_TURN = Upsert(
    s.turns,
    lambda insert: insert.on_conflict_do_update(
        index_elements=[s.turns.c.sender], set_={"turn": insert.excluded.turn}
    ),
)
# An expired key is taken over in place.
_TAKE_KEY = Upsert(
    s.duplicates,
    lambda insert: insert.on_conflict_do_update(
        index_elements=[s.duplicates.c.key],
        set_={name: insert.excluded[name] for name in ("mail_id", "fax_id", "expires_at")},
        where=s.duplicates.c.expires_at <= sa.bindparam("now"),
    ).returning(s.duplicates.c.key),
)


def _fax(unit: Unit, fax_id: str, mail_id: str, number: str, recipient: str, pages: int) -> Fax:
    return Fax(
        id=fax_id, mail_id=mail_id, number=number, recipient=recipient, pages=pages, state=State.QUEUED,
        due_at=unit.now, accepted_at=unit.now, give_up_at=unit.now + unit.rules.give_up_after,
    )  # fmt: skip


def _keep(unit: Unit, submission: Submission, mail_id: str, paper: Paper) -> None:
    unit.connection.execute(
        _ADD_DOCUMENT,
        {
            "id": paper.id,
            "sha256": paper.sha256,
            "pages": paper.pages,
            "size": paper.size,
            "stored_at": unit.now,
        },
    )
    if paper.data is not None:
        add_chunk(unit, paper.id, 0, paper.data)
    mail = submission.mail
    unit.connection.execute(
        _ADD_MAIL,
        {
            "id": mail_id, "sender": mail.sender, "received_at": unit.now, "message_id": mail.message_id,
            "thread": mail.references, "subject": mail.subject, "original_headers": mail.original_headers,
            "document_id": paper.id,
        },
    )  # fmt: skip


def _claim_key(
    unit: Unit, submission: Submission, number: str, mail_id: str, fax_id: str, window: float
) -> str | None:
    """Take the key of this mail to this number; return the id of the mail that holds it already."""
    if window <= 0:
        return None
    # Not `mail.message_id`: that is cleaned and cut, for replies, and two mails' may read alike.
    parts = (submission.message_key or "", submission.mail.sender, number, submission.digest)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    lasts = window if submission.message_key else min(window, _WINDOW_WITHOUT_ID)
    values = {"key": key, "mail_id": mail_id, "fax_id": fax_id, "expires_at": unit.now + lasts}
    if _TAKE_KEY.run(unit, values | {"now": unit.now}).first() is not None:
        return None
    return str(unit.connection.execute(_OLD_KEY, {"key": key}).scalar_one())


def _turn(unit: Unit, sender: str, count: int) -> float:
    """Give a sender the next `count` turns: after its own last, and not before the one being served."""
    known: dict[str, float] = {
        row.sender: row.turn for row in unit.connection.execute(_TURNS, {"who": sender})
    }
    first = max(known.get(sender, 0.0), known.get("", 0.0)) + 1
    if count:
        _LAST_TURN.run(unit, {"sender": sender, "turn": first + count - 1})
    return first
