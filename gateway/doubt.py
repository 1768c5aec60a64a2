"""The verdict on an attempt whose answer is missing.

In charge of: whether the carrier took it, judged from what it lists and what it told us by webhook.

Promises: "absent" only when it is proved: every page of the list was read, and our newest known fax was
in it, so the list is neither filtered away nor far behind. Exactly one candidate binds. Anything else
waits, and ends with a person.

Fails: never. The remaining risk, a list that shows the newest fax we know but lags with the doubtful
one beyond the last check, is told in docs/reliability.md.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from gateway.records import Attempt

CLOCK_SKEW = 3600.0
"""Seconds that the carrier's clock may be behind ours. Generous: what is older and ours is bound already."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """One fax that the carrier listed, or told of by an event that nobody claimed."""

    carrier_id: str
    to_number: str = field(repr=False)
    from_number: str = field(repr=False)
    connection_id: str
    seen_at: float  # created or occurred, by the carrier's clock


@dataclass(frozen=True, slots=True)
class Bind:
    """The attempt is this fax at the carrier."""

    carrier_id: str


@dataclass(frozen=True, slots=True)
class ProvedAbsent:
    """The carrier did not take it."""


@dataclass(frozen=True, slots=True)
class Undecided:
    """No proof yet; ask again."""


@dataclass(frozen=True, slots=True)
class NoProof:
    """There will be none: a person must decide."""

    cause: str


Verdict = Bind | ProvedAbsent | Undecided | NoProof


def judge(
    attempt: Attempt,
    number: str,
    *,
    listed: Collection[Sighting] | None,
    told: Iterable[Sighting],
    bound: Collection[str],
    control: str | None,
    last: bool,
    overdue: bool,
) -> Verdict:
    """Decide what became of `attempt`, which dialled `number`.

    `listed`: all rows of the carrier's list, None when it did not answer; `told`: parked events;
    `bound`: ids that belong to other attempts; `control`: the id of our newest known fax, if any;
    `last`: the last doubt check has come; `overdue`: so has the time after which a call is stuck.
    """
    candidates = {
        sighting.carrier_id
        for sighting in (*(listed or ()), *told)
        if sighting.carrier_id not in bound and fits(attempt, number, sighting)
    }
    if len(candidates) == 1:
        return Bind(candidates.pop())
    if not last:
        return Undecided()
    if candidates:
        return NoProof(f"{len(candidates)} faxes at the carrier fit it")
    if listed is not None and (control is None or any(row.carrier_id == control for row in listed)):
        return ProvedAbsent()
    if overdue:
        return NoProof(
            "the carrier's list did not answer" if listed is None else "the carrier's list is behind"
        )
    return Undecided()


def fits(attempt: Attempt, number: str, sighting: Sighting) -> bool:
    """Whether the fax that the carrier speaks of may be this attempt."""
    return (
        sighting.to_number == number
        and sighting.from_number == attempt.from_number
        and sighting.connection_id == attempt.connection_id
        and sighting.seen_at >= attempt.started_at - CLOCK_SKEW
    )
