"""What holds for every fax, whatever happens to it: every reachable situation, and random long lives."""

import functools
import math
import re
import typing
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from faxes import (
    ABOUT_FAX,
    CANCEL,
    DAY,
    NOW,
    RULES,
    STUCK,
    Maker,
    Walk,
    about_attempts,
    absent,
    at,
    delivered,
    doubted,
    from_the_carrier,
    lost,
    queued_fax,
    taken,
)
from hypothesis import given
from hypothesis import strategies as st

from gateway.fax import transition
from gateway.fax_steps import LOST_IN_A_ROW, Misfit, Step
from gateway.records import (
    Begun,
    CancelAsked,
    End,
    Event,
    Fax,
    HeldFor,
    HoldAsked,
    Notice,
    ReleaseAsked,
    RetryAsked,
    State,
    Tell,
)

MAY_BE_REFUSED = (Begun, HoldAsked, ReleaseAsked, CancelAsked, RetryAsked)
FINAL_NOTICES = {Notice.DELIVERED, Notice.FAILED, Notice.CANCELLED}
DRAWING = Path(__file__).parent.parent / "docs" / "states.md"


def possible(fax: Fax, *, most: int) -> dict[str, Maker]:
    """Return the events that can reach the fax; `most` limits its attempts."""
    makers = dict(ABOUT_FAX)
    if len(fax.attempts) >= most:
        del makers["begun"]
    for attempt in fax.attempts:
        about = about_attempts(attempt.ordinal)
        if attempt.carrier_id is not None:
            about |= from_the_carrier(attempt.ordinal)
        makers |= {f"{attempt.ordinal}: {name}": maker for name, maker in about.items()}
    return makers


def check(before: Fax, event: Event, step: Step) -> None:
    """Assert what must hold of every single step."""
    after = step.fax
    notices = [effect.notice for effect in step.effects if isinstance(effect, Tell)]
    ended = [notice.value for notice in notices if notice in FINAL_NOTICES]
    if before.final:
        unchanged = replace(after, attempts=before.attempts)
        assert unchanged == before, "an ended fax keeps its state, reason and times"
        assert notices == []
    else:
        assert ended == ([after.state.value] if after.final else []), "told of the end, once"
    assert (Notice.DELAYED in notices) == (after.told_delayed and not before.told_delayed)
    if isinstance(event, Begun):
        assert not before.open_attempts
        assert all(attempt.end is not End.DELIVERED for attempt in before.attempts)
        assert not before.cancel_asked
    known = {attempt.id: attempt.carrier_id for attempt in after.attempts}
    for attempt in before.attempts:
        assert attempt.carrier_id in {None, known[attempt.id]}, "a carrier's id is never lost"
    check_fax(after)


def check_fax(fax: Fax) -> None:
    """Assert what must hold of a fax at any time."""
    for attempt in fax.attempts:
        assert attempt.open or not attempt.blocking
        assert attempt.slot is None or attempt.blocking
        assert attempt.open == (attempt.end is None)
    assert sum(attempt.blocking for attempt in fax.attempts) <= 1
    assert (fax.held_for is not None) == (fax.state is State.HELD)
    assert fax.final == (fax.ended_at is not None)
    assert (fax.reason is None) or fax.state in {State.FAILED, State.CANCELLED}
    assert math.isfinite(fax.due_at)
    newest = fax.last
    match fax.state:
        case State.QUEUED:
            assert not fax.open_attempts, "else it could never be claimed"
        case State.SUBMITTING | State.IN_DOUBT:
            assert newest is not None
            assert newest.open
            assert newest.carrier_id is None
        case State.SENDING:
            assert any(attempt.carrier_id is not None for attempt in fax.open_attempts), "else nobody asks"
        case State.DELIVERED | State.FAILED | State.CANCELLED:
            assert not any(attempt.blocking for attempt in fax.attempts), "nobody waits for an ended fax"
            if fax.state is not State.DELIVERED:
                assert fax.ended_at is not None
                delivered_before = [
                    attempt
                    for attempt in fax.attempts
                    if attempt.end is End.DELIVERED and (attempt.ended_at or 0.0) < fax.ended_at
                ]
                assert delivered_before == []


# --- every reachable situation -------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """What the exploration found."""

    faxes: tuple[Fax, ...]
    arrows: frozenset[tuple[str, str, str]]  # from, to, event


def outline(fax: Fax) -> object:
    """Return what the next step can depend on, leaving out the times: so the situations are finitely many."""
    calls = tuple(
        (
            call.carrier_id is not None, call.blocking, call.end, call.cancel_asked,
            call.open and (call.reason, call.reasonless_at is None),
        )
        for call in fax.attempts
    )  # fmt: skip
    if fax.final:
        return fax.state, tuple((known, end) for known, _, end, *_ in calls)
    return fax.state, fax.held_for, fax.told_delayed, fax.cancel_asked, calls


@functools.cache
def explore() -> Reached:
    """Drive every event through every situation that up to two attempts can lead to; check each step."""
    start = queued_fax()
    seen = {outline(start): start}
    todo, arrows = deque([start]), set()
    # Longer rows of lost calls are looked at where they end; what else can be is as with two calls.
    todo.append(lost(LOST_IN_A_ROW - 1).begin().make(doubted()).fax)
    while todo:
        fax = todo.popleft()
        now = max(fax.due_at, NOW) + 1.0
        for name, maker in possible(fax, most=2).items():
            for later in (0.0, STUCK, DAY) if name == "time" else (0.0,):
                event = maker(fax)
                try:
                    step = transition(fax, event, now + later, RULES)
                except Misfit:
                    assert isinstance(event, MAY_BE_REFUSED), f"{event} may not be refused"
                    continue
                check(fax, event, step)
                if step.fax.state is not fax.state:
                    arrows.add((fax.state.value, step.fax.state.value, type(event).__name__))
                if len(fax.attempts) <= 2 and outline(step.fax) not in seen:
                    seen[outline(step.fax)] = step.fax
                    todo.append(step.fax)
    return Reached(tuple(seen.values()), frozenset(arrows))


def test_every_situation_keeps_the_promises() -> None:
    """No event in any situation breaks what is promised of states, notices, attempts and channels."""
    found = explore().faxes
    assert {fax.state for fax in found} == set(State)
    assert len(found) > 300, "the exploration went somewhere"


def test_every_situation_has_a_way_to_its_end() -> None:
    """From wherever a fax is, a carrier that answers and an operator who acts bring it to its end."""
    for fax in explore().faxes:
        walk = Walk(fax, max(fax.due_at, NOW) + 1.0)
        for _ in range(6):
            match walk.fax.state:
                case State.QUEUED:
                    walk.begin().make(taken())
                case State.SUBMITTING:
                    walk.make(doubted())
                case State.IN_DOUBT:
                    walk.make(absent())
                case State.SENDING:
                    calls = [call for call in walk.fax.open_attempts if call.carrier_id is not None]
                    walk.make(delivered(ordinal=calls[-1].ordinal))
                case State.HELD:
                    walk.make(CANCEL)
        assert walk.fax.final, fax
        assert len(walk.notices) == (0 if fax.final else 1)


@pytest.mark.parametrize(
    "name", [*about_attempts(0), *from_the_carrier(0), "time", "account held", "set aside"]
)
def test_only_claims_and_operators_are_refused(name: str) -> None:
    """Whatever our gateways or the carrier say, also about calls nobody can know of, raises nothing."""
    makers = about_attempts(0) | from_the_carrier(0) | ABOUT_FAX
    for fax in explore().faxes:
        if fax.attempts:
            assert transition(fax, makers[name](fax), NOW + DAY, RULES).fax.id == fax.id


def drawn() -> set[tuple[str, str, str]]:
    """Return the arrows of the drawing in the documentation."""
    text = DRAWING.read_text(encoding="utf-8")
    lines = re.findall(r"^ +(\w+) --> (\w+) ?: (.+)$", text, re.MULTILINE)
    return {(start, end, event.strip()) for start, end, events in lines for event in events.split(",")}


def test_drawing_shows_the_machine() -> None:
    """The drawing in docs/states.md has every arrow that a fax can take, and no other."""
    real = explore().arrows
    assert drawn() - real == set(), "drawn, but impossible"
    assert real - drawn() == set(), "possible, but not drawn"


def test_drawing_explains_every_state() -> None:
    """Each state has a paragraph of its own under the drawing."""
    text = DRAWING.read_text(encoding="utf-8")
    assert re.findall(r"^\*\*(\w+)\*\* ", text, re.MULTILINE) == [state.value for state in State]


def test_causes_of_a_hold_are_explained() -> None:
    """Each cause that `list` can show has its line in the table under **held**, and no other has one."""
    text = DRAWING.read_text(encoding="utf-8").partition("**held**")[2].partition("**delivered**")[0]
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [cause.value for cause in HeldFor]


def test_every_event_is_explained() -> None:
    """The table under the drawing has each event that the decisions know, and no other."""
    table = DRAWING.read_text(encoding="utf-8").partition("| from |")[2].partition("\n\n")[0]
    rows = [line.split("|")[2] for line in table.splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(
        kind.__name__ for kind in typing.get_args(Event)
    )


# --- random lives ----------------------------------------------------------------------------------------

PAUSES = st.sampled_from([0.0, 1.0, 30.0, 61.0, 700.0, STUCK + 1.0, DAY])


@given(st.data())
def test_random_lives_keep_the_promises(data: st.DataObject) -> None:
    """However many calls, doubts, contradictions and wishes a fax meets, the promises hold to its end."""
    fax, now, told = queued_fax(), NOW, list[Notice]()
    for _ in range(data.draw(st.integers(5, 40), label="events")):
        now += data.draw(PAUSES, label="pause")
        name, maker = data.draw(st.sampled_from(list(possible(fax, most=8).items())), label="event")
        event = maker(fax)
        try:
            step = transition(fax, event, now, RULES)
        except Misfit:
            assert isinstance(event, MAY_BE_REFUSED), name
            continue
        check(fax, event, step)
        fax = step.fax
        told += [effect.notice for effect in step.effects if isinstance(effect, Tell)]
    assert told.count(Notice.DELAYED) <= 1
    assert [notice.value for notice in told if notice in FINAL_NOTICES] == [fax.state.value] * fax.final


@given(st.data())
def test_repeated_webhooks_change_nothing(data: st.DataObject) -> None:
    """A webhook that comes twice in a row leaves the fax as it was after the first."""
    walk = at("sending")
    makers = from_the_carrier(1)
    webhooks = [name for name in makers if name.startswith(("dialled", "delivered", "failed"))]
    for _ in range(data.draw(st.integers(1, 5))):
        name = data.draw(st.sampled_from(webhooks))
        once = walk.make(makers[name], 0.0).fax
        notices = list(walk.notices)
        assert walk.make(makers[name], 0.0).fax == once
        assert walk.notices == notices
