"""The one door through which a fax changes.

In charge of: loading a fax with its attempts, asking `fax.transition`, and writing the new fax, its history
and every effect in the same transaction.

Promises: the row changes by compare-and-set, so of two writers one loses and looks again. An answer and an
event about the same carrier's id both insert that id first; whoever comes second finds the other (rule 5).

Fails: `UnknownFax`; `fax.Misfit` from the decision; `Conflict` when another writer was faster. In each case
the unit of work is undone whole.
"""

import json
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from gateway import schema as s
from gateway.database import Conflict, StoreError
from gateway.fax import transition
from gateway.records import (
    AccountHeld,
    Alert,
    Attempt,
    Brake,
    Doubted,
    Effect,
    End,
    Event,
    Fax,
    HeldFor,
    NotTaken,
    Proof,
    Reached,
    Rejected,
    Report,
    Reported,
    Stage,
    State,
    Suspect,
    Taken,
    Tell,
    Unposted,
    Unprovable,
    Withdrawn,
)
from gateway.store_brakes import account_held_for, drop_brakes, return_probe, set_brake
from gateway.store_unit import Change, Turn, Unit, Upsert, take_turn


class UnknownFax(StoreError):
    """There is no fax of that id."""


# --- rows and records ------------------------------------------------------------------------------

_ATTEMPT_FIELDS = tuple(f.name for f in fields(Attempt))
_FAX_FIELDS = tuple(f.name for f in fields(Fax) if f.name != "attempts")

_LOAD_FAX = sa.select(s.faxes).where(s.faxes.c.id == sa.bindparam("fax_id"))
_LOAD_ATTEMPTS = (
    sa.select(s.attempts).where(s.attempts.c.fax_id == sa.bindparam("fax_id")).order_by(s.attempts.c.ordinal)
)
# What never changes stays out of the updates, or every index would be written each time.
_FAX_CHANGES = (
    "state", "due_at", "give_up_at", "version", "held_for", "held_detail", "told_delayed", "cancel_asked",
    "ended_at", "reason",
)  # fmt: skip
_ATTEMPT_CHANGES = tuple(name for name in _ATTEMPT_FIELDS if name not in {"id", "ordinal", "started_at"})
_SAVE_FAX = (
    s.faxes.update()
    .where(s.faxes.c.id == sa.bindparam("fax_id"), s.faxes.c.version == sa.bindparam("old_version"))
    .values({name: sa.bindparam(name) for name in (*_FAX_CHANGES, "lease_until", "ripe", "asks")})
)
_ADD_ATTEMPT = s.attempts.insert()
_SAVE_ATTEMPT = (
    s.attempts.update()
    .where(s.attempts.c.id == sa.bindparam("attempt_id"))
    .values({name: sa.bindparam(name) for name in _ATTEMPT_CHANGES})
)
_ADD_HISTORY = s.history.insert()


def read_attempt(row: RowMapping) -> Attempt:
    """Build the record of a row of `attempts`."""
    values = {name: row[name] for name in _ATTEMPT_FIELDS}
    values["stage"] = Stage(values["stage"])
    values["end"] = End(values["end"]) if values["end"] else None
    return Attempt(**values)


def read_fax(row: RowMapping, attempts: tuple[Attempt, ...]) -> Fax:
    """Build the record of a row of `faxes` and its attempts, oldest first."""
    values = {name: row[name] for name in _FAX_FIELDS}
    values["state"] = State(values["state"])
    values["held_for"] = HeldFor(values["held_for"]) if values["held_for"] else None
    return Fax(**values, attempts=attempts)


def fax_values(fax: Fax) -> dict[str, Any]:
    """Return the columns of a fax."""
    return {name: getattr(fax, name) for name in _FAX_FIELDS}


def load(connection: Connection, fax_id: str) -> Fax:
    """Return the fax; raises UnknownFax."""
    row = connection.execute(_LOAD_FAX, {"fax_id": fax_id}).mappings().first()
    if row is None:
        raise UnknownFax(f"there is no fax {fax_id}")
    attempts = connection.execute(_LOAD_ATTEMPTS, {"fax_id": fax_id}).mappings()
    return read_fax(row, tuple(read_attempt(attempt) for attempt in attempts))


# --- the door --------------------------------------------------------------------------------------


def apply(unit: Unit, fax_id: str, event: Event, *, version: int | None = None) -> Fax:
    """Let `event` happen to the fax and return it as it is now.

    With `version`, the event rests on the fax as it was then: if it has changed since, nothing happens.
    """
    fax = load(unit.connection, fax_id)
    if version is not None and fax.version != version:
        return fax
    if isinstance(event, Taken):
        know_carrier_id(unit, event.carrier_id)
        owner = unit.connection.execute(OWNER, {"carrier_id": event.carrier_id}).first()
        if owner is not None and owner.id != event.attempt_id:
            return _contested(unit, fax_id, event, owner.fax_id)
    event = _fenced(fax, event, unit.now)
    step = transition(fax, event, unit.now, unit.rules)
    after = fax
    if step.fax is not fax:
        after = replace(step.fax, version=fax.version + 1)
        _save(unit, fax, after)
    if step.fax is not fax or step.effects or isinstance(event, Reported):
        _record(unit, after, event)
        unit.news.append(Change(fax, after, event, step.effects))
    for effect in step.effects:
        _carry_out(unit, after, event, effect)
    if isinstance(event, Taken):
        after = _replay(unit, after, event.carrier_id)
    if any(isinstance(effect, Suspect) for effect in step.effects):
        after = load(unit.connection, fax_id)  # it may be back in the queue
    if after.final and not fax.final and after.state is not State.DELIVERED:
        # Rule 6: what failed or was cancelled may be mailed again.
        unit.connection.execute(_FORGET_DUPLICATE, {"fax_id": fax_id})
    return after


_FORGET_DUPLICATE = s.duplicates.delete().where(s.duplicates.c.fax_id == sa.bindparam("fax_id"))


def _fenced(fax: Fax, event: Event, now: float) -> Event:
    """Rule 10: who is past the lease may not move a state; only a carrier's id still counts."""
    if not isinstance(event, NotTaken | Rejected | Withdrawn) or fax.state is not State.SUBMITTING:
        return event
    if fax.attempt(event.attempt_id).lease_until < now:
        return Doubted(event.attempt_id, "lease ran out")
    return event


def _save(unit: Unit, before: Fax, after: Fax) -> None:
    connection = unit.connection
    values = {name: getattr(after, name) for name in _FAX_CHANGES}
    values |= {"fax_id": after.id, "old_version": before.version}
    values |= {"lease_until": 0.0, "ripe": after.due_at <= unit.now, "asks": 0}
    if connection.execute(_SAVE_FAX, values).rowcount != 1:
        raise Conflict(f"fax {after.id} was changed by another gateway")
    known = {attempt.id: attempt for attempt in before.attempts}
    # What stops blocking is written first, or the unique indexes would see two calls for a moment.
    for attempt in sorted(after.attempts, key=lambda attempt: attempt.blocking):
        if attempt.id not in known:
            values = _values(attempt) | {"fax_id": after.id, "number": after.number}
            connection.execute(_ADD_ATTEMPT, values)
        elif attempt != known[attempt.id]:
            values = {name: getattr(attempt, name) for name in _ATTEMPT_CHANGES}
            connection.execute(_SAVE_ATTEMPT, values | {"attempt_id": attempt.id})


def _record(unit: Unit, fax: Fax, event: Event) -> None:
    # Every value here is ours or cleaned at the border; numbers of other people are not among them.
    detail = {
        name: value
        for name, value in _values(event).items()
        if name != "attempt" and value not in (None, "", False)
    }
    unit.connection.execute(
        _ADD_HISTORY,
        {
            "fax_id": fax.id,
            "at": unit.now,
            "event": type(event).__name__,
            "state": fax.state.value,
            "detail": json.dumps(detail, default=_plain),
        },
    )


def _values(record: Event | Attempt | Report) -> dict[str, Any]:
    """Return the fields of a record; `asdict` copies each value, deeply, at ten times the cost."""
    return {name: getattr(record, name) for name in type(record).__dataclass_fields__}


def _plain(value: object) -> object:
    return _values(value) if isinstance(value, Report) else str(value)


# --- the carrier's ids and events (rule 5) ---------------------------------------------------------

_PARKED = (
    sa.select(s.carrier_events)
    .where(s.carrier_events.c.carrier_id == sa.bindparam("carrier_id"), s.carrier_events.c.fax_id.is_(None))
    .order_by(s.carrier_events.c.occurred_at, s.carrier_events.c.received_at)
)
OWNER = sa.select(s.attempts.c.id, s.attempts.c.fax_id).where(
    s.attempts.c.carrier_id == sa.bindparam("carrier_id")
)
CLAIM_EVENT = (
    s.carrier_events.update()
    .where(s.carrier_events.c.id == sa.bindparam("event_id"))
    .values(fax_id=sa.bindparam("owner"))
)


# Not DO NOTHING: that would not wait for whoever found the row there too.
_KNOW = Upsert(
    s.carrier_ids,
    lambda insert: insert.on_conflict_do_update(
        index_elements=["carrier_id"], set_={"seen_at": s.carrier_ids.c.seen_at}
    ),
)


def know_carrier_id(unit: Unit, carrier_id: str) -> None:
    """Insert the carrier's id where answers and events meet; the second to come waits for the first."""
    _KNOW.run(unit, {"carrier_id": carrier_id, "seen_at": unit.now})


def _contested(unit: Unit, fax_id: str, event: Taken, owner: str) -> Fax:
    """Leave to a person a call that two attempts claim: one by the carrier's answer, one by a verdict."""
    cause = f"the carrier's fax {event.carrier_id} belongs to {owner}"
    apply(unit, fax_id, Doubted(event.attempt_id, cause))
    return apply(unit, fax_id, Unprovable(event.attempt_id, cause))


def _replay(unit: Unit, fax: Fax, carrier_id: str) -> Fax:
    attempt = next((attempt for attempt in fax.attempts if attempt.carrier_id == carrier_id), None)
    if attempt is None:  # the attempt has another id, and the postmaster was told
        return fax
    for row in unit.connection.execute(_PARKED, {"carrier_id": carrier_id}).mappings().all():
        unit.connection.execute(CLAIM_EVENT, {"event_id": row["id"], "owner": fax.id})
        report = read_report(row["report"])
        if report is not None:
            fax = apply(unit, fax.id, Reported(attempt.id, report))
    return fax


def read_report(text: str | None) -> Report | None:
    """Build the report that `write_report` wrote."""
    if text is None:
        return None
    values = json.loads(text)
    return Report(**values | {"stage": Stage(values["stage"])})


def write_report(report: Report | None) -> str | None:
    """Return the report as JSON text."""
    return None if report is None else json.dumps(_values(report))


# --- effects ---------------------------------------------------------------------------------------

_SUSPECTS = sa.select(s.faxes.c.id, s.faxes.c.number).where(
    s.faxes.c.state == State.HELD.value,
    s.faxes.c.ended_at.is_(None),
    s.faxes.c.held_for == HeldFor.REFUSED.value,
    s.faxes.c.held_detail == sa.bindparam("cause"),
)
_SENDER_OF = (
    sa.select(s.mails.c.sender)
    .join_from(s.mails, s.faxes, s.faxes.c.mail_id == s.mails.c.id)
    .where(s.faxes.c.id == sa.bindparam("fax_id"))
)


def _carry_out(unit: Unit, fax: Fax, event: Event, effect: Effect) -> None:
    match effect:
        case Tell(notice):
            sender = unit.connection.execute(_SENDER_OF, {"fax_id": fax.id}).scalar_one()
            post(unit, f"{fax.id}.{notice}", sender, fax_id=fax.id, notice=notice.value)
        case Alert():
            alert(unit, effect)
        case Brake():
            set_brake(unit, effect)
        case Reached(proof, from_number) if isinstance(event, Taken | Reported):
            begun = fax.attempt(event.attempt_id).started_at
            drop_brakes(unit, proof, from_number, begun)
        case Unposted(begun):
            return_probe(unit, begun)
        case Suspect(cause):
            take_turn(unit, Turn.REFUSAL)
            suspects = unit.connection.execute(_SUSPECTS, {"cause": cause}).all()
            known = account_held_for(unit) == cause  # this fax was its probe
            if known or len({row.number for row in suspects}) > 1:
                set_brake(unit, Brake("hold", "account", cause, Proof.TAKEN))
                alert(unit, Alert("account_held", f"Two numbers met the same refusal ({cause})."))
                for row in suspects:
                    apply(unit, row.id, AccountHeld(cause))


_SPACING = 1.0  # seconds, though not of any clock: a mail more is as if it had come so much later
_LAST_TURN = sa.select(sa.func.max(s.outbox.c.turn).label("last")).where(
    sa.text("sent_at IS NULL AND given_up_at IS NULL"), s.outbox.c.recipient == sa.bindparam("of")
)

_POST = Upsert(s.outbox, lambda insert: insert.on_conflict_do_nothing())


def post(
    unit: Unit, entry_id: str, recipient: str, *, fax_id: str | None = None, notice: str | None = None,
    cause: str | None = None, payload: bytes | None = None,
) -> None:  # fmt: skip
    """Put one mail into the outbox; a second one of the same id is the same mail.

    Its turn is now, or behind the recipient's last mail that waits: so recipients take turns.
    """
    last = unit.connection.execute(_LAST_TURN, {"of": recipient}).scalar()
    turn = unit.now if last is None else max(unit.now, last + _SPACING)
    values = {
        "id": entry_id, "fax_id": fax_id, "notice": notice, "cause": cause, "recipient": recipient,
        "payload": payload, "queued_at": unit.now, "due_at": unit.now, "lease_until": 0.0, "fence": 0,
        "tries": 0, "error": "", "turn": turn,
    }  # fmt: skip
    _POST.run(unit, values)


def alert(unit: Unit, effect: Alert) -> None:
    """Queue the postmaster's mail: one for each cause and day (UTC)."""
    entry_id = f"alert.{effect.cause}.{datetime.fromtimestamp(unit.now, UTC).date().isoformat()}"
    post(unit, entry_id, unit.postmaster, cause=effect.cause, payload=effect.text.encode())
    unit.news.append(effect)  # a log line and the metric each time
