"""The verdict on an attempt whose answer is missing.

In charge of: whether the carrier took it, judged from what it lists and what it told us by webhook.

Promises: "absent" only when it is proved: every page of the list was read, and our newest known fax was
in it, so the list is neither filtered away nor far behind. Exactly one candidate binds. Anything else
waits, and ends with a person.

The clocks: a fax at the carrier has the carrier's time, the attempt has ours. How far ours is ahead is known
from the carrier's answers, and what was created up to `CLOCK_SKEW` before the attempt is a candidate. But our
clock may have been set since the attempt. So a fax that is nobody's and like the attempt in all but its time,
from up to `WRONG_ZONE` before it, is never bound, and yet disproves the absence: a person decides.

Fails: never. The remaining risks, told in docs/reliability.md: a list that shows the newest fax we know but
lags with the doubtful one beyond the last check, and a clock that was further off than any time zone.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from gateway.records import Attempt

CLOCK_SKEW = 3600.0
"""Seconds that the carrier's clock may be behind what we know of it. Generous: what is older and ours is
bound already."""

WRONG_ZONE = 26 * 3600.0
"""Seconds between the clocks of the two farthest time zones (UTC+14 and UTC-12): a clock that is set wrong by
more is noticed in other ways."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """One fax that the carrier listed, or told of by an event that nobody claimed."""

    carrier_id: str
    to_number: str = field(repr=False)
    from_number: str = field(repr=False)
    connection_id: str
    seen_at: float  # created or occurred, by the carrier's clock, however wrong ours is


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
    ahead: float,
    last: bool,
    overdue: bool,
) -> Verdict:
    """Decide what became of `attempt`, which dialled `number`.

    `listed`: all rows of the carrier's list, None when it did not answer, and at the last check also those
    to the number from up to `WRONG_ZONE` before the attempt; `told`: parked events; `bound`: ids that belong
    to other attempts; `control`: the id of our newest known fax, if any; `ahead`: seconds that our clock is
    ahead of the carrier's; `last`: the last doubt check has come; `overdue`: so has the time after which a
    call is stuck.
    """
    free = [
        sighting
        for sighting in (*(listed or ()), *told)
        if sighting.carrier_id not in bound and alike(attempt, number, sighting)
    ]
    candidates = {sighting.carrier_id for sighting in free if fits(attempt, number, sighting, ahead=ahead)}
    if len(candidates) == 1:
        return Bind(candidates.pop())
    if not last:
        return Undecided()
    if candidates:
        return NoProof(f"{len(candidates)} faxes at the carrier fit it")
    if any(sighting.seen_at >= attempt.started_at - ahead - WRONG_ZONE for sighting in free):
        return NoProof("an older fax at the carrier may be it, if the clock was wrong")
    if listed is not None and (control is None or any(row.carrier_id == control for row in listed)):
        return ProvedAbsent()
    if overdue:
        return NoProof(
            "the carrier's list did not answer" if listed is None else "the carrier's list is behind"
        )
    return Undecided()


def fits(attempt: Attempt, number: str, sighting: Sighting, *, ahead: float = 0.0) -> bool:
    """Whether the fax that the carrier speaks of may be this attempt, made by a clock that is `ahead`."""
    in_time = sighting.seen_at >= attempt.started_at - ahead - CLOCK_SKEW
    return in_time and alike(attempt, number, sighting)


def alike(attempt: Attempt, number: str, sighting: Sighting) -> bool:
    """Whether the fax that the carrier speaks of is this attempt in all but the time."""
    return (
        sighting.to_number == number
        and sighting.from_number == attempt.from_number
        and sighting.connection_id == attempt.connection_id
    )
