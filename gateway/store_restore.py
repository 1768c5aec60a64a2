"""After a restore: what the backup does not know.

In charge of: the brake that keeps everything waiting until the carrier was asked what happened since the
backup was made, and setting aside what may have been sent in that time.

Promises: while the brake stands nothing is called, through restarts too. A fax goes on by itself only if the
carrier has no fax to its number that the database does not know; else a person decides. That holds for open
calls, too: what the backup knows as one call may have ended and been followed by others. A list that does not
show the newest fax that the backup knows proves nothing: then every fax is left to a person.

Fails: like `apply`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from gateway import schema as s
from gateway.doubt import Sighting
from gateway.records import HeldFor, Proof, SetAside
from gateway.store_apply import apply
from gateway.store_brakes import ADD_BRAKE
from gateway.store_unit import Unit
from gateway.store_work import bound_ids, doubt_claims

_NUMBERS_AT_ONCE = 500
_CONTROL_AGE = 86400.0  # seconds: an older fax may be gone from the carrier's list

_LAST_CHANGE = sa.select(s.history.c.at).order_by(s.history.c.id.desc()).limit(1)
_LAST_MAIL = sa.select(sa.func.max(s.mails.c.received_at))
_STANDING = sa.select(s.brakes.c.since).where(s.brakes.c.kind == "restore")
_END = s.brakes.delete().where(s.brakes.c.kind == "restore")
_GIVE_TIME = (
    s.faxes.update()
    .where(s.faxes.c.ended_at.is_(None))
    .values(give_up_at=s.faxes.c.give_up_at + sa.bindparam("more"))
)
_UNFINISHED = sa.select(s.faxes.c.id, s.faxes.c.number).where(s.faxes.c.ended_at.is_(None))
_TO_NUMBERS = _UNFINISHED.where(s.faxes.c.number.in_(sa.bindparam("numbers", expanding=True)))
_SENDERS = sa.select(s.attempts.c.from_number).distinct()
_NEWEST = (
    sa.select(s.attempts.c.carrier_id, s.attempts.c.started_at)
    .where(s.attempts.c.carrier_id.is_not(None), s.attempts.c.from_number == sa.bindparam("sender"))
    .where(s.attempts.c.started_at >= sa.bindparam("since"))
    .order_by(s.attempts.c.started_at.desc())
    .limit(1)
)


@dataclass(frozen=True, slots=True)
class Restoring:
    """What to ask the carrier: what was sent `since`, from each of `senders`, as it is `now`.

    `control` is the newest fax that the database knows at the carrier, None when there is none of late.
    """

    since: float
    now: float
    senders: tuple[str, ...]
    control: str | None


def begin_restore(unit: Unit) -> None:
    """Let nothing be called until `end_restore`, nor after it without an operator's `release --all`."""
    if unit.connection.execute(_STANDING).scalar() is not None:
        return
    moments = [unit.connection.execute(query).scalar() for query in (_LAST_CHANGE, _LAST_MAIL)]
    known_until = max((moment for moment in moments if moment is not None), default=unit.now)
    doubt_claims(unit)
    # No fax shall fail for the time that nobody knows of.
    unit.connection.execute(_GIVE_TIME, {"more": max(0.0, unit.now - known_until)})
    for kind, cause in (
        ("restore", "the carrier is asked what was sent since the backup"),
        ("operator", "started with --held: look at the held faxes, then release --all"),
    ):
        values = {
            "kind": kind, "scope": "account", "cause": cause, "since": known_until, "probe_at": None,
            "wait": 0.0, "proof": int(Proof.CALLED),
        }  # fmt: skip
        ADD_BRAKE.run(unit, values)


def restoring(unit: Unit) -> Restoring | None:
    """Return what is to be asked; None when no restore is under way."""
    since: float | None = unit.connection.execute(_STANDING).scalar()
    if since is None:
        return None
    senders = tuple(unit.connection.execute(_SENDERS).scalars())
    asked = [{"sender": sender, "since": since - _CONTROL_AGE} for sender in senders]
    known = [row for values in asked if (row := unit.connection.execute(_NEWEST, values).first()) is not None]
    if not known:
        return Restoring(since, unit.now, senders, None)
    newest = max(known, key=lambda row: row.started_at)
    return Restoring(min(since, newest.started_at), unit.now, senders, newest.carrier_id)


def end_restore(unit: Unit, sent: Sequence[Sighting] | None, control: str | None) -> int:
    """Set aside the faxes to whose numbers the carrier has one that is nobody's; return how many.

    If the carrier did not answer (`sent` is None), or `control` is not in the answer, all that have not ended
    are set aside. Another gateway may have been faster; then nothing happens.
    """
    if unit.connection.execute(_STANDING).scalar() is None:
        return 0
    if sent is None or (control is not None and control not in {sighting.carrier_id for sighting in sent}):
        cause = "the carrier did not answer" if sent is None else "the carrier's list lacks what is known"
        rows = unit.connection.execute(_UNFINISHED).all()
        for row in rows:
            apply(unit, row.id, SetAside(HeldFor.RESTORED, cause))
        unit.connection.execute(_END)
        return len(rows)
    known = bound_ids(unit, [sighting.carrier_id for sighting in sent])
    unknown = {sighting.to_number: sighting for sighting in sent if sighting.carrier_id not in known}
    numbers = sorted(unknown)
    unfinished: list[tuple[str, str]] = []
    for start in range(0, len(numbers), _NUMBERS_AT_ONCE):
        part = {"numbers": numbers[start : start + _NUMBERS_AT_ONCE]}
        unfinished += [(row.id, row.number) for row in unit.connection.execute(_TO_NUMBERS, part)]
    for fax_id, number in unfinished:
        carrier_id = unknown[number].carrier_id
        detail = f"the carrier has a fax to the number that the backup does not know: {carrier_id}"
        apply(unit, fax_id, SetAside(HeldFor.RESTORED, detail))
    unit.connection.execute(_END)
    return len(unfinished)
