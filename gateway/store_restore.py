"""After a restore: what the backup does not know.

In charge of: the brake that keeps everything waiting until the carrier was asked what happened since the
backup was made, and setting aside what may have been sent in that time.

Promises: while the brake stands nothing is called, through restarts too. A fax goes on by itself only if the
carrier has no fax to its number that the database does not know; else a person decides. That holds for open
calls, too: what the backup knows as one call may have ended and been followed by others.

Fails: like `apply`.
"""

from collections.abc import Sequence

import sqlalchemy as sa

from gateway import schema as s
from gateway.doubt import Sighting
from gateway.records import HeldFor, Proof, SetAside
from gateway.store_apply import apply
from gateway.store_unit import Unit, upsert
from gateway.store_work import bound_ids

_NUMBERS_AT_ONCE = 500

_LAST_CHANGE = sa.select(s.history.c.at).order_by(s.history.c.id.desc()).limit(1)
_LAST_MAIL = sa.select(sa.func.max(s.mails.c.received_at))
_STANDING = sa.select(s.brakes.c.since).where(s.brakes.c.kind == "restore")
_END = s.brakes.delete().where(s.brakes.c.kind == "restore")
_UNFINISHED = sa.select(s.faxes.c.id, s.faxes.c.number).where(
    s.faxes.c.ended_at.is_(None), s.faxes.c.number.in_(sa.bindparam("numbers", expanding=True))
)


def begin_restore(unit: Unit) -> None:
    """Let nothing be called until `end_restore`, nor after it without an operator's `release --all`."""
    moments = [unit.connection.execute(query).scalar() for query in (_LAST_CHANGE, _LAST_MAIL)]
    known_until = max((moment for moment in moments if moment is not None), default=unit.now)
    for kind, cause in (
        ("restore", "the carrier is asked what was sent since the backup"),
        ("operator", "started with --held: look at the held faxes, then release --all"),
    ):
        values = {
            "kind": kind, "scope": "account", "cause": cause, "since": known_until, "probe_at": None,
            "wait": 0.0, "proof": int(Proof.CALLED),
        }  # fmt: skip
        unit.connection.execute(upsert(unit.connection, s.brakes).values(values).on_conflict_do_nothing())


def restoring(unit: Unit) -> tuple[float, float] | None:
    """Return up to when the database knows everything, and now; None when no restore is under way."""
    since: float | None = unit.connection.execute(_STANDING).scalar()
    return None if since is None else (since, unit.now)


def end_restore(unit: Unit, sent: Sequence[Sighting]) -> int:
    """Set aside the faxes to whose numbers the carrier has one that is nobody's; return how many."""
    known = bound_ids(unit, [sighting.carrier_id for sighting in sent])
    unknown = {sighting.to_number: sighting for sighting in sent if sighting.carrier_id not in known}
    numbers = sorted(unknown)
    unfinished: list[tuple[str, str]] = []
    for start in range(0, len(numbers), _NUMBERS_AT_ONCE):
        part = {"numbers": numbers[start : start + _NUMBERS_AT_ONCE]}
        unfinished += [(row.id, row.number) for row in unit.connection.execute(_UNFINISHED, part)]
    for fax_id, number in unfinished:
        carrier_id = unknown[number].carrier_id
        detail = f"the carrier has a fax to the number that the backup does not know: {carrier_id}"
        apply(unit, fax_id, SetAside(HeldFor.RESTORED, detail))
    unit.connection.execute(_END)
    return len(unfinished)
