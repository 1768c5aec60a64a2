"""The carrier's events.

In charge of: keeping each under its own id, finding the attempt that it is about, and letting it happen
there.

Promises: an event is kept before it is answered, and applied as soon as its attempt is known (rule 5); until
then it is parked. One that nobody owns binds to a closed doubt that it fits, and has the open ones looked at
(rule 3).

Fails: like `apply`.
"""

from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from gateway import schema as s
from gateway.carrier import CarrierEvent
from gateway.doubt import Sighting, alike, fits
from gateway.records import Attempt, End, HeldFor, ReleaseAsked, Report, Reported, Taken
from gateway.store_apply import (
    CLAIM_EVENT,
    OWNER,
    apply,
    know_carrier_id,
    load,
    read_attempt,
    read_report,
    write_report,
)
from gateway.store_unit import Unit, Upsert

_MOST = 200  # events in one look, so that it holds up nobody


class Fate(StrEnum):
    """What became of a carrier's event."""

    APPLIED = "applied"
    PARKED = "parked"
    DUPLICATE = "duplicate"


NAMELESS = (
    sa.select(s.attempts)
    .where(s.attempts.c.carrier_id.is_(None), s.attempts.c.number == sa.bindparam("number"))
    .order_by(s.attempts.c.started_at)
)
_CLOSED_DOUBT = frozenset({End.ABSENT, End.OVERRULED})
# The new version makes a verdict void that is being reached without this news.
_ASK_NOW = (
    s.faxes.update()
    .where(s.faxes.c.id == sa.bindparam("fax_id"), s.faxes.c.state.in_(["sending", "in_doubt"]))
    .values(due_at=sa.bindparam("now"), lease_until=0.0, version=s.faxes.c.version + 1)
)


def remember_event(unit: Unit, event: CarrierEvent) -> tuple[Fate, str | None]:
    """Keep an authentic event and let it happen to its fax if that is known; returns the fax's id too."""
    know_carrier_id(unit, event.sighting.carrier_id)
    owner = _owner(unit, event.sighting)
    if not _add_event(unit, event, None if owner is None else owner.fax_id):
        return Fate.DUPLICATE, None
    if owner is not None:
        return _happen(unit, owner, event.report)
    fate, fax_id = _bind_closed(unit, event.sighting)
    if fate is Fate.PARKED:
        _ask_about(unit, event.sighting)
    return fate, fax_id


def _owner(unit: Unit, sighting: Sighting) -> Any:
    """Return the attempt (`id`, `fax_id`) of the sighting's carrier's id, None if it is not known."""
    return unit.connection.execute(OWNER, {"carrier_id": sighting.carrier_id}).first()


def _happen(unit: Unit, owner: Any, report: Report | None) -> tuple[Fate, str]:
    """Let an event happen to the attempt that it is about."""
    if report is None:  # a kind we do not know: a hint to ask
        unit.connection.execute(_ASK_NOW, {"fax_id": owner.fax_id, "now": unit.now})
    else:
        apply(unit, owner.fax_id, Reported(owner.id, report))
    return Fate.APPLIED, owner.fax_id


_ADD_EVENT = Upsert(
    s.carrier_events, lambda insert: insert.on_conflict_do_nothing().returning(s.carrier_events.c.id)
)


def _add_event(unit: Unit, event: CarrierEvent, fax_id: str | None) -> bool:
    """Keep an event, parked if it is nobody's yet; False when it is known."""
    seen = event.sighting
    values = {
        "id": event.id, "carrier_id": seen.carrier_id, "type": event.type, "received_at": unit.now,
        "to_number": seen.to_number, "from_number": seen.from_number, "connection_id": seen.connection_id,
        "occurred_at": seen.seen_at, "report": write_report(event.report),
        "fax_id": fax_id,
    }  # fmt: skip
    return _ADD_EVENT.run(unit, values).first() is not None


def _alike(unit: Unit, sighting: Sighting) -> list[tuple[str, Attempt]]:
    """Return the attempts without a carrier's id that the sighting is like, each after its fax's id."""
    rows = unit.connection.execute(NAMELESS, {"number": sighting.to_number}).mappings()
    found = [(row["fax_id"], read_attempt(row)) for row in rows]
    return [(fax_id, attempt) for fax_id, attempt in found if alike(attempt, sighting.to_number, sighting)]


def _bind_closed(unit: Unit, sighting: Sighting) -> tuple[Fate, str | None]:
    """Bind what nobody owns to the closed doubt of the one fax that it fits (rule 3), or leave it parked.

    An open attempt that it may be about, whatever the time that our clock had, comes first: its own answer or
    check takes the event.
    """
    alike_it = _alike(unit, sighting)
    closed = [
        (fax_id, attempt)
        for fax_id, attempt in alike_it
        if attempt.end in _CLOSED_DOUBT and fits(attempt, sighting.to_number, sighting)
    ]
    if len({fax_id for fax_id, _ in closed}) != 1 or any(attempt.open for _, attempt in alike_it):
        return Fate.PARKED, None
    fax_id, attempt = closed[-1]
    apply(unit, fax_id, Taken(attempt.id, sighting.carrier_id))  # replays the event
    return Fate.APPLIED, fax_id


def _ask_about(unit: Unit, sighting: Sighting) -> None:
    """Let the doubts that a new event may be about be looked at now, also one that was left to a person."""
    doubts = [(fax_id, attempt) for fax_id, attempt in _alike(unit, sighting) if attempt.open]
    for fax_id, _ in doubts:
        unit.connection.execute(_ASK_NOW, {"fax_id": fax_id, "now": unit.now})
    if len(doubts) == 1 and load(unit.connection, doubts[0][0]).held_for is HeldFor.DOUBT:
        apply(unit, doubts[0][0], ReleaseAsked())


def read_sighting(row: Any) -> Sighting:
    """Build the record of a row of `carrier_events`."""
    return Sighting(row.carrier_id, row.to_number, row.from_number, row.connection_id, row.occurred_at)


_WAITING_EVENTS = (
    sa.select(s.carrier_events)
    .where(s.carrier_events.c.fax_id.is_(None), s.carrier_events.c.received_at > sa.bindparam("since"))
    .order_by(s.carrier_events.c.received_at.desc())
    .limit(_MOST)
)


def sweep_parked(unit: Unit) -> int:
    """Look at parked events again, a day long: the net under rule 5, and the late word on a closed doubt."""
    rows = unit.connection.execute(_WAITING_EVENTS, {"since": unit.now - 86400.0}).all()
    fates = [_place(unit, row) for row in rows]
    return sum(1 for fate, _ in fates if fate is Fate.APPLIED)


def _place(unit: Unit, row: Any) -> tuple[Fate, str | None]:
    """Let a parked event happen to the attempt of its carrier's id, or leave it parked."""
    sighting = read_sighting(row)
    owner = _owner(unit, sighting)
    if owner is None:
        return _bind_closed(unit, sighting)
    unit.connection.execute(CLAIM_EVENT, {"event_id": row.id, "owner": owner.fax_id})
    return _happen(unit, owner, read_report(row.report))
