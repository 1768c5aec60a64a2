"""What stops the queue: pauses, holds of the account or a number, an operator's word.

In charge of: the rows of `brakes`, the growing distances between their probes, and what proves that one is
over.

Promises: a brake stays, through restarts too, until a probe reached what it asked for, or an operator ended
it; a clock that was set back prolongs none.

Fails: `StillRestoring`; otherwise like the database.
"""

from typing import Any

import sqlalchemy as sa

from gateway import reasons
from gateway import schema as s
from gateway.database import StoreError
from gateway.reasons import Kind
from gateway.records import Brake, Proof
from gateway.schedule import until_midnight
from gateway.store_unit import Unit, Upsert

_BRAKE_WAITS = {"pause": (60.0, 900.0), "hold": (300.0, 3600.0)}  # first and longest wait of the probes, s
_FARTHEST_PROBE = 3600.0  # seconds: the longest wait of ours, and the longest that a carrier may ask for
_PROBED = sa.or_(s.brakes.c.kind == "hold", s.brakes.c.kind == "pause")  # the others end by other ways


ADD_BRAKE = Upsert(s.brakes, lambda insert: insert.on_conflict_do_nothing())


class StillRestoring(StoreError):
    """What was sent since a backup is not known yet; the text is for the operator."""


def set_brake(unit: Unit, brake: Brake) -> None:
    """Put a brake on, or, if it is on already, let the next probe wait longer."""
    unit.news.append(brake)
    first, longest = _BRAKE_WAITS[brake.kind]
    where = (s.brakes.c.kind == brake.kind, s.brakes.c.scope == brake.scope)
    known = unit.connection.execute(sa.select(s.brakes.c.wait).where(*where)).scalar()
    wait = first if known is None else known
    if brake.again_after is not None:
        wait = max(1.0, brake.again_after) if known is None else max(brake.again_after, known)
    values = {"cause": brake.cause, "probe_at": unit.now + wait, "proof": int(brake.proof)}
    if known is None:
        values |= {
            "kind": brake.kind,
            "scope": brake.scope,
            "since": unit.now,
            "wait": min(first * 2, longest),
        }
        ADD_BRAKE.run(unit, values)
    else:
        doubled = min(known * 2, longest)
        unit.connection.execute(s.brakes.update().where(*where).values(values | {"wait": doubled}))


_DROP_BRAKES = s.brakes.delete().where(
    _PROBED,
    s.brakes.c.proof <= sa.bindparam("reached"),
    s.brakes.c.since <= sa.bindparam("begun"),  # an older call proves nothing
    sa.or_(s.brakes.c.scope == "account", s.brakes.c.scope == sa.bindparam("sender")),
)


def drop_brakes(unit: Unit, proof: Proof, from_number: str, begun: float) -> None:
    """Take off what a call proved to be over that was begun at that time."""
    values = {"reached": int(proof), "sender": from_number, "begun": begun}
    unit.connection.execute(_DROP_BRAKES, values)


_RETURN_PROBE = (
    s.brakes.update()
    .where(_PROBED, s.brakes.c.probe_at == sa.bindparam("begun") + s.brakes.c.wait)
    .values(probe_at=sa.bindparam("at"))
)


def return_probe(unit: Unit, begun: float) -> None:
    """Let another fax be the probe of a brake in place of one that was begun then and never posted."""
    unit.connection.execute(_RETURN_PROBE, {"begun": begun, "at": unit.now})


_ACCOUNT_HOLD = sa.select(s.brakes.c.cause).where(s.brakes.c.kind == "hold", s.brakes.c.scope == "account")


def account_held_for(unit: Unit) -> str | None:
    """Return the cause of the account's hold, None if there is none."""
    cause: str | None = unit.connection.execute(_ACCOUNT_HOLD).scalar()
    return cause


_BRAKES = sa.select(s.brakes)
_SET_BRAKE = (
    s.brakes.update()
    .where(s.brakes.c.kind == sa.bindparam("of_kind"), s.brakes.c.scope == sa.bindparam("of_scope"))
    .values(since=sa.bindparam("new_since"), probe_at=sa.bindparam("new_probe_at"))
)


def standing_brakes(unit: Unit) -> list[Any]:
    """Return what stops the queue.

    When the clock was set back, a brake would begin in the future, where no new call is proof that it is
    over, and its probe might be hours away: both are brought back to where they can be.
    """
    brakes, moved = unit.connection.execute(_BRAKES).all(), False
    for brake in brakes:
        spend = reasons.lookup(brake.cause).kind is Kind.SPEND
        farthest = unit.now + max(_FARTHEST_PROBE, until_midnight(unit.now) if spend else 0.0)
        since = min(brake.since, unit.now)
        probe_at = None if brake.probe_at is None else min(brake.probe_at, farthest)
        if (since, probe_at) != (brake.since, brake.probe_at):
            moved = True
            values = {"of_kind": brake.kind, "of_scope": brake.scope}
            unit.connection.execute(_SET_BRAKE, values | {"new_since": since, "new_probe_at": probe_at})
    return list(unit.connection.execute(_BRAKES) if moved else brakes)


def hold_all(unit: Unit) -> None:
    """Call nothing until `release_all`."""
    values = {
        "kind": "operator", "scope": "account", "cause": "an operator said hold --all", "since": unit.now,
        "probe_at": None, "wait": 0.0, "proof": int(Proof.CALLED),
    }  # fmt: skip
    ADD_BRAKE.run(unit, values)


def release_all(unit: Unit) -> None:
    """End the operator's hold, and let the probes of the other holds and pauses go at once.

    Raises StillRestoring while a restored database may not know what was sent: the operator could not look at
    that yet, so the hold stays.
    """
    if unit.connection.execute(sa.select(s.brakes.c.kind).where(s.brakes.c.kind == "restore")).first():
        raise StillRestoring(
            "first the carrier must tell what was sent since the backup (`restore_checked` in the log): "
            "the hold stays, try again later"
        )
    unit.connection.execute(s.brakes.delete().where(s.brakes.c.kind == "operator"))
    unit.connection.execute(s.brakes.update().where(_PROBED).values(probe_at=unit.now))
