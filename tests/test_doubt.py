"""The verdict on a POST whose answer is missing: never absent without proof, never bound to a stranger."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from faxes import APPLICATION, FROM, NOW, NUMBER, Walk, doubted
from hypothesis import given
from hypothesis import strategies as st

from gateway.doubt import (
    Bind,
    NoProof,
    ProvedAbsent,
    Sighting,
    Undecided,
    Verdict,
    fits,
    judge,
)

ATTEMPT = Walk().begin(after=0.0).make(doubted()).last
OURS = Sighting("c-1", NUMBER, FROM, APPLICATION, NOW + 2.0)
SECOND = replace(OURS, carrier_id="c-2")
CONTROL = Sighting("c-0", "+13125550199", FROM, APPLICATION, NOW - 3600.0)
ELSEWHERE = replace(OURS, carrier_id="c-3", to_number="+13125550123")


@pytest.mark.parametrize(
    ("listed", "told", "bound", "control", "early", "last", "overdue"),
    [
        # Exactly one candidate: it is the attempt, whenever and wherever it is seen.
        ([OURS], [], [], None, Bind("c-1"), Bind("c-1"), Bind("c-1")),
        ([], [OURS], [], None, Bind("c-1"), Bind("c-1"), Bind("c-1")),
        (None, [OURS], [], "c-0", Bind("c-1"), Bind("c-1"), Bind("c-1")),
        ([OURS, CONTROL], [OURS, OURS], [], "c-0", Bind("c-1"), Bind("c-1"), Bind("c-1")),
        ([OURS, SECOND], [], ["c-2"], None, Bind("c-1"), Bind("c-1"), Bind("c-1")),
        ([OURS, ELSEWHERE], [], [], "c-9", Bind("c-1"), Bind("c-1"), Bind("c-1")),
        # None, and the list is whole: absent at the last check, not before.
        ([CONTROL], [], [], "c-0", Undecided(), ProvedAbsent(), ProvedAbsent()),
        ([], [], [], None, Undecided(), ProvedAbsent(), ProvedAbsent()),
        ([ELSEWHERE], [], [], None, Undecided(), ProvedAbsent(), ProvedAbsent()),
        ([OURS], [], ["c-1"], "c-1", Undecided(), ProvedAbsent(), ProvedAbsent()),
        # None, and the list proves nothing: asked on, then a person.
        ([], [], [], "c-0", Undecided(), Undecided(), NoProof("the carrier's list is behind")),
        ([ELSEWHERE], [], [], "c-0", Undecided(), Undecided(), NoProof("the carrier's list is behind")),
        (None, [], [], None, Undecided(), Undecided(), NoProof("the carrier's list did not answer")),
        (None, [CONTROL], [], "c-0", Undecided(), Undecided(), NoProof("the carrier's list did not answer")),
        # Several: later checks may tell them apart, the last one does not guess.
        ([OURS, SECOND], [], [], None, Undecided(), *[NoProof("2 faxes at the carrier fit it")] * 2),
        ([OURS], [SECOND], [], None, Undecided(), *[NoProof("2 faxes at the carrier fit it")] * 2),
    ],
)
def test_verdict(
    listed: Sequence[Sighting] | None,
    told: Sequence[Sighting],
    bound: Sequence[str],
    control: str | None,
    early: Verdict,
    last: Verdict,
    overdue: Verdict,
) -> None:
    """Each doubt is bound, proved, asked on or given to a person, by what the carrier shows."""
    verdicts = [
        judge(
            ATTEMPT, NUMBER, listed=listed, told=told, bound=bound, control=control, last=end, overdue=late
        )
        for end, late in ((False, False), (True, False), (True, True))
    ]  # fmt: skip
    assert verdicts == [early, last, overdue]


@pytest.mark.parametrize(
    ("sighting", "fitting"),
    [
        (OURS, True),
        (replace(OURS, to_number="+13127367277"), False),
        (replace(OURS, to_number=NUMBER.removeprefix("+")), False),
        (replace(OURS, from_number="+13125550101"), False),
        (replace(OURS, connection_id="1"), False),
        (replace(OURS, seen_at=NOW - 3600.0), True),
        (replace(OURS, seen_at=NOW - 3600.1), False),
        (replace(OURS, seen_at=NOW + 86400.0), True),
    ],
)
def test_only_a_fax_of_the_same_call_fits(sighting: Sighting, *, fitting: bool) -> None:
    """A fax at the carrier is ours only by number, sender, application and time together."""
    assert fits(ATTEMPT, NUMBER, sighting) is fitting


def test_numbers_stay_out_of_logs() -> None:
    """A sighting that is printed shows no telephone number."""
    assert NUMBER not in repr(OURS)
    assert FROM not in repr(OURS)


SIGHTINGS = st.builds(
    Sighting,
    carrier_id=st.sampled_from(["c-0", "c-1", "c-2", "c-3"]),
    to_number=st.sampled_from([NUMBER, "+13125550199"]),
    from_number=st.sampled_from([FROM, "+13125550101"]),
    connection_id=st.sampled_from([APPLICATION, "1"]),
    seen_at=st.sampled_from([NOW - 1000.0, NOW, NOW + 5.0]),
)


@given(
    listed=st.none() | st.lists(SIGHTINGS, max_size=5),
    told=st.lists(SIGHTINGS, max_size=3),
    bound=st.sets(st.sampled_from(["c-0", "c-1", "c-2", "c-3"])),
    control=st.sampled_from([None, "c-0", "c-1"]),
    last=st.booleans(),
    overdue=st.booleans(),
)
def test_no_verdict_without_its_proof(
    *,
    listed: list[Sighting] | None,
    told: list[Sighting],
    bound: set[str],
    control: str | None,
    last: bool,
    overdue: bool,
) -> None:
    """Whatever the carrier shows, absence is said only with proof, and only a free fax that fits is bound."""
    verdict = judge(
        ATTEMPT, NUMBER, listed=listed, told=told, bound=bound, control=control, last=last, overdue=overdue
    )  # fmt: skip
    seen = [sighting for sighting in [*(listed or []), *told] if sighting.carrier_id not in bound]
    fitting = {sighting.carrier_id for sighting in seen if fits(ATTEMPT, NUMBER, sighting)}
    match verdict:
        case Bind(carrier_id):
            assert fitting == {carrier_id}
        case ProvedAbsent():
            assert last
            assert fitting == set()
            assert listed is not None
            assert control is None or control in {row.carrier_id for row in listed}
        case NoProof(cause):
            assert last
            assert cause
            assert len(fitting) > 1 or overdue
        case Undecided():
            assert not (last and overdue), "a doubt does not last for ever"
            assert len(fitting) != 1
