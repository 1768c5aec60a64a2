"""What is due, and who does it.

In charge of: claiming the next fax to call, the faxes to ask about, the ones whose time has come; what is
known about a doubt.

Promises: a claim writes the intent (attempt, channel, lease) before anybody calls (rule 3). No number and no
channel is called twice at a time (rule 4). Senders take turns (rule 9).

Fails: like `apply`; a claim that lost a race to another gateway returns nothing and is tried again.
"""

import uuid
from dataclasses import dataclass, field

import sqlalchemy as sa

from gateway import schema as s
from gateway.doubt import WRONG_ZONE, Sighting
from gateway.records import (
    AccountHeld,
    Attempt,
    Begun,
    Doubted,
    Fax,
    HeldFor,
    SetAside,
    State,
    TimePassed,
)
from gateway.schedule import next_settings
from gateway.store_apply import (
    apply,
    load,
)
from gateway.store_brakes import standing_brakes
from gateway.store_events import NAMELESS, read_sighting
from gateway.store_outbox import PENDING
from gateway.store_unit import Turn, Unit, Upsert, suspects_apart, take_turn

QUESTION_LEASE = 60.0  # seconds that one gateway has to ask the carrier about a fax
HARMFUL_AFTER = 5  # questions, or mails about a fax, that the gateway did not live through


@dataclass(frozen=True, slots=True)
class CallSettings:
    """With what this gateway calls."""

    from_number: str = field(repr=False)
    connection_id: str
    quality: str
    t38: bool
    channels: int
    lease: float  # seconds


_MOST = 200  # faxes in one look, so that it holds up nobody

# --- calls -----------------------------------------------------------------------------------------

_ON_A_CHANNEL = sa.text("blocking"), s.attempts.c.blocking.is_(True), s.attempts.c.slot.is_not(None)
_SLOTS = sa.select(s.attempts.c.slot).where(*_ON_A_CHANNEL)
_CHANNELS_IN_USE = sa.select(sa.func.count().label("channels")).select_from(s.attempts).where(*_ON_A_CHANNEL)
_CALLING = sa.select(s.attempts.c.number).where(sa.text("blocking"))
_OPEN = sa.exists().where(s.attempts.c.fax_id == s.faxes.c.id, s.attempts.c.open.is_(True)).correlate(s.faxes)
_RIPE = (
    sa.select(s.faxes.c.id)
    .where(sa.text("state = 'queued' AND NOT ripe"), s.faxes.c.due_at <= sa.bindparam("now"))
    .order_by(s.faxes.c.due_at)
    .limit(_MOST)
)
_RIPEN = s.faxes.update().where(s.faxes.c.id.in_(_RIPE)).values(ripe=True)
# The numbers are looked up once, and the index holds what else is asked: 100,000 faxes to a number that is
# being called are passed over in 6 ms.
_NEXT = (
    sa.select(s.faxes.c.id, s.faxes.c.turn)
    .where(sa.text("state = 'queued' AND ripe"), s.faxes.c.number.not_in(_CALLING), ~_OPEN)
    .order_by(s.faxes.c.turn)
    .limit(1)
    .with_for_update(skip_locked=True)
)


_SERVE = Upsert(
    s.turns,
    lambda insert: insert.on_conflict_do_update(
        index_elements=[s.turns.c.sender],
        set_={"turn": insert.excluded.turn},
        where=s.turns.c.turn < insert.excluded.turn,
    ),
)


def claim_call(unit: Unit, settings: CallSettings) -> Fax | None:
    """Write the intent for the next fax that may be called; None when there is none.

    The fax comes back `submitting`, its last attempt being the intent.
    """
    connection = unit.connection
    take_turn(unit, Turn.CALL)
    brakes = [row for row in standing_brakes(unit) if row.scope in {"account", settings.from_number}]
    if any(row.probe_at is None or row.probe_at > unit.now for row in brakes):
        return None
    # Counted first: this is asked after each commit, also while thousands of calls are open.
    if connection.execute(_CHANNELS_IN_USE).scalar_one() >= settings.channels:
        return None
    taken = {row.slot for row in connection.execute(_SLOTS)}
    slot = next(slot for slot in range(settings.channels) if slot not in taken)
    connection.execute(_RIPEN, {"now": unit.now})
    row = connection.execute(_NEXT).first()
    if row is None:
        return None
    fax = load(connection, row.id)
    quality, t38 = next_settings(fax, settings.quality, t38=settings.t38)
    attempt = Attempt(
        id=str(uuid.uuid4()), ordinal=len(fax.attempts) + 1, started_at=unit.now,
        lease_until=unit.now + settings.lease, from_number=settings.from_number,
        connection_id=settings.connection_id, quality=quality, t38=t38, slot=slot,
    )  # fmt: skip
    fax = apply(unit, fax.id, Begun(attempt))
    for brake in brakes:  # this fax is the probe; the next one waits for it
        where = (s.brakes.c.kind == brake.kind, s.brakes.c.scope == brake.scope)
        connection.execute(s.brakes.update().where(*where).values(probe_at=unit.now + brake.wait))
    _SERVE.run(unit, {"sender": "", "turn": row.turn})
    return fax


# --- questions -------------------------------------------------------------------------------------

_UNDER_WAY = (
    sa.exists()
    .where(s.attempts.c.fax_id == s.faxes.c.id, s.attempts.c.open.is_(True))
    .where(s.attempts.c.carrier_id.is_not(None))
    .correlate(s.faxes)
)
_QUESTIONS = (
    sa.select(s.faxes.c.id, s.faxes.c.asks)
    .where(
        s.faxes.c.ended_at.is_(None),
        s.faxes.c.state.in_([State.IN_DOUBT.value, State.SENDING.value, State.HELD.value]),
        sa.or_(
            s.faxes.c.state != State.HELD.value,
            s.faxes.c.held_for == HeldFor.STUCK.value,
            sa.and_(s.faxes.c.held_for == HeldFor.RESTORED.value, _UNDER_WAY),
        ),
        s.faxes.c.due_at <= sa.bindparam("now"),
        s.faxes.c.lease_until <= sa.bindparam("now"),
    )
    # Whose question got no answer comes again behind those that wait for theirs.
    .order_by(
        sa.case((s.faxes.c.lease_until > s.faxes.c.due_at, s.faxes.c.lease_until), else_=s.faxes.c.due_at)
    )
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
_LEASE = (
    s.faxes.update()
    .where(s.faxes.c.id == sa.bindparam("fax_id"))
    .values(lease_until=sa.bindparam("until"), asks=s.faxes.c.asks + 1)
)
_ASKED = s.faxes.update().where(s.faxes.c.id == sa.bindparam("fax_id")).values(asks=0)


def claim_questions(unit: Unit, most: int) -> list[Fax]:
    """Return faxes that the carrier is to be asked about now, leased to the caller for a minute.

    One whose questions nobody came back from, time and again, is set aside instead. Until then it comes by
    itself: should it be to blame, it shall not drag others along.
    """
    claimed: list[Fax] = []
    due = {"now": unit.now, "most": most}
    while not claimed and (rows := unit.connection.execute(_QUESTIONS, due).all()):
        for row in suspects_apart(rows, lambda row: row.asks > 0):
            unit.connection.execute(_LEASE, {"fax_id": row.id, "until": unit.now + QUESTION_LEASE})
            if row.asks >= HARMFUL_AFTER:
                cause = "the gateway came to an end at each question about it"
                apply(unit, row.id, SetAside(HeldFor.HARMFUL, cause))
            else:
                claimed.append(load(unit.connection, row.id))
    return claimed


def asked(unit: Unit, fax_id: str) -> None:
    """Note that a question came to an end, with or without an answer."""
    unit.connection.execute(_ASKED, {"fax_id": fax_id})


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the store knows about a doubt."""

    told: tuple[Sighting, ...]  # parked events of the number
    control: str | None  # our newest known fax at the carrier
    control_at: float  # the carrier took it no earlier
    now: float  # by the clock that all times here are of


# By the start: `taken_at` may be when a doubt was decided, long after the carrier had it.
_NEWEST = (
    sa.select(s.attempts.c.carrier_id, s.attempts.c.started_at)
    .where(s.attempts.c.carrier_id.is_not(None), s.attempts.c.from_number == sa.bindparam("sender"))
    .order_by(s.attempts.c.started_at.desc())
    .limit(1)
)
_TOLD = sa.select(s.carrier_events).where(
    s.carrier_events.c.fax_id.is_(None), s.carrier_events.c.to_number == sa.bindparam("to_number")
)


def evidence(unit: Unit, number: str, from_number: str) -> Evidence:
    """Gather it before the carrier is asked, so that the control is older than the list."""
    newest = unit.connection.execute(_NEWEST, {"sender": from_number}).first()
    told = tuple(read_sighting(row) for row in unit.connection.execute(_TOLD, {"to_number": number}))
    if newest is None:
        return Evidence(told, None, unit.now, unit.now)
    return Evidence(told, newest.carrier_id, newest.started_at, unit.now)


def has_rival(unit: Unit, fax: Fax, attempt: Attempt) -> bool:
    """Tell whether an open attempt of another fax has no carrier's id either: a find may be that one's.

    That can be only after a call was given up as stuck; until then the number is blocked (rule 4). One that
    began long before or after the attempt is no rival.
    """
    rows = unit.connection.execute(NAMELESS, {"number": fax.number}).mappings()
    return any(
        row["open"] and row["fax_id"] != fax.id and abs(row["started_at"] - attempt.started_at) < WRONG_ZONE
        for row in rows
    )


def bound_ids(unit: Unit, carrier_ids: list[str]) -> frozenset[str]:
    """Return those of the ids that belong to an attempt of ours."""
    found: set[str] = set()
    for start in range(0, len(carrier_ids), 500):
        query = sa.select(s.attempts.c.carrier_id).where(
            s.attempts.c.carrier_id.in_(carrier_ids[start : start + 500])
        )
        found.update(unit.connection.execute(query).scalars())
    return frozenset(found)


# --- time ------------------------------------------------------------------------------------------

_LAPSED = (
    sa.select(s.faxes.c.id)
    .where(s.faxes.c.ended_at.is_(None), s.faxes.c.state == State.SUBMITTING.value)
    .where(s.faxes.c.due_at <= sa.bindparam("now"))
    .limit(_MOST)
)
_EXPIRED = (
    sa.select(s.faxes.c.id)
    .where(s.faxes.c.ended_at.is_(None), s.faxes.c.give_up_at <= sa.bindparam("now"))
    .where(s.faxes.c.state.in_([State.QUEUED.value, State.HELD.value]))
    .where(s.faxes.c.held_for.is_distinct_from(HeldFor.RESTORED.value), ~_OPEN)
    .limit(_MOST)
)
_UNTOLD = (
    sa.select(s.faxes.c.id)
    .where(sa.text("ended_at IS NULL AND NOT told_delayed"), s.faxes.c.accepted_at <= sa.bindparam("before"))
    .limit(_MOST)
)
_QUIET = (
    sa.select(s.faxes.c.id)
    .join(s.attempts, s.attempts.c.fax_id == s.faxes.c.id)
    .where(s.faxes.c.ended_at.is_(None), s.faxes.c.state.in_([State.SENDING.value, State.HELD.value]))
    .where(s.attempts.c.open.is_(True), s.attempts.c.started_at <= sa.bindparam("before"))
    .where(s.attempts.c.changed_at <= sa.bindparam("before"))
)
_UNTOLD_WAITING = (
    sa.select(s.faxes.c.id)
    .where(sa.text("ended_at IS NULL AND NOT told_delayed"), s.faxes.c.state == State.QUEUED.value)
    .limit(_MOST)
)
_ASTRAY = (
    s.faxes.update()
    .where(s.faxes.c.ended_at.is_(None), s.faxes.c.due_at > sa.bindparam("farthest"))
    .where(s.faxes.c.state.in_([State.QUEUED.value, State.SENDING.value, State.IN_DOUBT.value]))
    .values(due_at=sa.bindparam("now"))
)
_HELD = sa.select(s.brakes.c.cause).where(s.brakes.c.kind == "hold").limit(1)
_RESTORING = sa.select(s.brakes.c.since).where(s.brakes.c.kind == "restore")


def pass_time(unit: Unit) -> int:
    """Let time happen to every fax whose time has come; return how many it changed: 0 when all is done.

    Lapsed claims become doubts (rule 10), deadlines end waiting faxes, silent calls count as stuck, and
    senders hear of a delay. What waits for longer than a fax may take was told to by a clock that has been
    set back since: its time has come.
    """
    take_turn(unit, Turn.TIME)
    rules, now = unit.rules, {"now": unit.now}
    unit.connection.execute(_ASTRAY, now | {"farthest": unit.now + max(rules.give_up_after, 86400.0)})
    for fax_id in _ids(unit, _LAPSED, now):
        fax = load(unit.connection, fax_id)
        if fax.state is State.SUBMITTING:  # and no late answer was faster
            apply(unit, fax_id, Doubted(fax.attempts[-1].id, "lease ran out"), version=fax.version)
    due = [
        *([] if unit.connection.execute(_RESTORING).first() else _ids(unit, _EXPIRED, now)),
        *_ids(unit, _UNTOLD, {"before": unit.now - rules.delayed_after}),
        *_ids(unit, _QUIET, {"before": unit.now - rules.stuck_after}),
    ]
    for fax_id in dict.fromkeys(due):
        apply(unit, fax_id, TimePassed())
    cause = unit.connection.execute(_HELD).scalar()
    if cause is not None:
        for fax_id in _ids(unit, _UNTOLD_WAITING, {}):
            apply(unit, fax_id, AccountHeld(cause))
    return len(unit.changes)


def _ids(unit: Unit, query: sa.Select[tuple[str]], values: dict[str, float]) -> list[str]:
    return [row.id for row in unit.connection.execute(query, values)]


_SUBMITTING = sa.select(s.faxes.c.id).where(
    s.faxes.c.ended_at.is_(None), s.faxes.c.state == State.SUBMITTING.value
)
_ASK_ALL = (
    s.faxes.update()
    .where(s.faxes.c.ended_at.is_(None), s.faxes.c.state.in_(["sending", "in_doubt"]))
    .values(lease_until=0.0)
)
_ASK_SENDING = (
    s.faxes.update()
    .where(s.faxes.c.ended_at.is_(None), s.faxes.c.state == "sending")
    .values(due_at=sa.bindparam("at"))
)


def take_over(unit: Unit, from_number: str, *, alone: bool) -> int:
    """Take over from a gateway that stopped: what it was about to send is in doubt; ask about the rest.

    Mails that wait for the relay are tried at once: whoever corrected its address restarts.
    """
    stale = s.brakes.c.scope.not_in(["account", from_number])  # holds of a number that we no longer send from
    unit.connection.execute(s.brakes.delete().where(stale))
    if not alone:
        # The others live: what they hold stays theirs until its lease has run out.
        free = s.outbox.c.lease_until <= unit.now
        unit.connection.execute(s.outbox.update().where(PENDING, free).values(due_at=unit.now))
        return 0
    claims = doubt_claims(unit)
    unit.connection.execute(_ASK_ALL)
    unit.connection.execute(_ASK_SENDING, {"at": unit.now})
    unit.connection.execute(s.outbox.update().where(PENDING).values(lease_until=0.0, due_at=unit.now))
    return claims


def doubt_claims(unit: Unit) -> int:
    """Take every call that was about to be handed over for doubtful; return how many."""
    ids = _ids(unit, _SUBMITTING, {})
    for fax_id in ids:
        attempt = load(unit.connection, fax_id).attempts[-1]
        apply(unit, fax_id, Doubted(attempt.id, "the gateway stopped"))
    return len(ids)
