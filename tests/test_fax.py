"""What becomes of a fax, event by event, held against the rules that the documentation promises."""

import pytest
from faxes import (
    ABOUT_FAX,
    ACCOUNT_HELD,
    CANCEL,
    DAY,
    FROM,
    HOLD,
    HOUR,
    NUMBER,
    PAGES,
    RELEASE,
    RETRY,
    RETRY_TWICE,
    SITUATIONS,
    STUCK,
    TIME,
    Maker,
    Walk,
    about_attempts,
    absent,
    at,
    cancel_sent,
    delivered,
    doubted,
    failed,
    from_the_carrier,
    gone,
    lost,
    not_taken,
    queued_fax,
    rejected,
    said,
    set_aside,
    taken,
    withdrawn,
)

from gateway.fax_steps import APART, LOST_IN_A_ROW, Misfit
from gateway.records import (
    Alert,
    Blame,
    Brake,
    End,
    HeldFor,
    Notice,
    Proof,
    Reached,
    Stage,
    State,
    Suspect,
    Taken,
)

EVENTS = ABOUT_FAX | about_attempts(0) | from_the_carrier(0)
LATER = {"4 h pass": 4 * HOUR, "a day passes": DAY}

# The whole machine. A state's name: the fax goes there. `same`: it stays there, changed somehow.
# `-`: nothing changes. `no`: refused by Misfit. `*`: cannot happen, the carrier's id being unknown.
COLUMNS = (
    "queued after busy", "submitting", "in doubt", "sending", "held by the operator", "held, refused",
    "held, doubt", "held, stuck", "held, gone", "held, contradiction", "delivered", "failed", "cancelled",
    "held, harmful", "held, restored", "held, call after call lost",
)  # fmt: skip
MACHINE = """
                               busy subm doub send oper refu hdou stuc gone cont deli fail canc harm rest lost
begun                        | subm no   no   no   no   no   no   no   no   no   no   no   no   no   no   no
taken                        | -    send send -    -    send send -    -    -    -    -    -    send -    send
taken under another id       | -    send send -    -    send send -    -    -    -    -    -    send -    send
rejected, fax                | -    fail -    -    -    -    -    -    -    -    -    -    -    -    -    -
rejected, account            | -    queu -    -    -    -    -    -    -    -    -    -    -    -    -    -
rejected, sender             | -    queu -    -    -    -    -    -    -    -    -    -    -    -    -    -
rejected, suspect            | -    held -    -    -    -    -    -    -    -    -    -    -    -    -    -
not taken                    | -    queu -    -    -    -    -    -    -    -    -    -    -    -    -    -
withdrawn                    | -    queu -    -    -    -    -    -    -    -    -    -    -    -    -    -
doubted                      | -    in_d same -    -    -    -    -    -    -    -    -    -    -    -    -
unanswered                   | -    -    same -    -    -    -    -    -    -    -    -    -    -    -    -
absent                       | -    -    queu -    -    -    -    -    -    -    -    -    -    -    -    -
unprovable                   | -    -    held -    -    -    -    -    -    -    -    -    -    -    -    -
cancel sent                  | same *    *    same same *    *    same same same same same same *    same *
gone                         | held *    *    held same *    *    same same same -    -    -    *    same *
nothing new                  | -    *    *    same -    *    *    same same -    -    -    -    *    -    *
dialled                      | -    *    *    same -    *    *    same same -    -    -    -    *    -    *
delivered                    | deli *    *    deli deli *    *    deli deli deli -    same same *    deli *
failed, None                 | -    *    *    queu -    *    *    queu queu -    -    -    -    *    -    *
failed, user_busy            | -    *    *    queu -    *    *    queu queu -    -    -    -    *    -    *
failed, receiver_decline     | -    *    *    queu -    *    *    queu queu -    -    -    -    *    -    *
failed, destination_invalid  | -    *    *    fail -    *    *    fail fail -    -    -    -    *    -    *
failed, user_channel_limit_exceeded | -    *    *    queu -    *    *    queu queu -    -    - - * - *
failed, account_disabled     | -    *    *    queu -    *    *    queu queu -    -    -    -    *    -    *
failed, success              | -    *    *    same -    *    *    same same -    -    -    -    *    -    *
polled failed                | -    *    *    same -    *    *    same same -    -    -    -    *    -    *
polled failed, user_busy     | -    *    *    queu -    *    *    queu queu -    -    -    -    *    -    *
polled failed, success       | -    *    *    held -    *    *    same same -    -    -    -    *    -    *
time                         | -    -    -    -    -    -    -    -    -    -    -    -    -    -    -    -
4 h pass                     | same same same held -    -    same -    same -    -    -    -    same -    -
a day passes                 | fail same same held fail fail same -    same fail -    -    -    same -    fail
account held                 | same -    -    -    -    queu -    -    -    -    -    -    -    -    -    -
set aside                    | held -    held held same same same same same -    -    -    -    same -    same
hold                         | held no   no   no   no   no   no   no   no   no   no   no   no   no   no   no
release                      | no   no   no   no   queu queu in_d send send no   no   no   no   in_d queu queu
cancel                       | canc same same same canc canc canc canc canc canc no   no   no   canc canc canc
retry                        | same no   no   no   queu queu no   no   no   no   no   no   no   no   no   queu
retry even if twice          | same no   queu no   queu queu queu queu queu queu no   no   no   queu queu queu
"""
ROWS = [line.split("|") for line in MACHINE.strip().splitlines()[1:]]
CELLS = [
    (situation, name.strip(), outcome)
    for name, cells in ROWS
    for situation, outcome in zip(COLUMNS, cells.split(), strict=True)
]


@pytest.mark.parametrize(("situation", "event", "outcome"), CELLS)
def test_machine(situation: str, event: str, outcome: str) -> None:
    """Each event does in each state what the table says, and nothing else."""
    walk = at(situation)
    before, maker = walk.fax, EVENTS.get(event, TIME)
    if outcome == "no":
        with pytest.raises(Misfit, match=before.id):
            walk.make(maker)
        return
    walk.make(maker, LATER.get(event, 15.0))
    if outcome == "-":
        assert walk.fax is before
    elif outcome == "same":
        assert walk.fax.state is before.state
        assert walk.fax != before
    elif outcome != "*":
        assert walk.fax.state.startswith(outcome)
        assert walk.fax.state is not before.state


def test_machine_is_complete() -> None:
    """No state and no event is left out of the table."""
    assert {event for _, event, _ in CELLS} == EVENTS.keys() | LATER.keys()
    assert {at(situation).fax.state for situation in COLUMNS} == set(State)
    assert {at(situation).fax.held_for for situation in COLUMNS} == {None, *HeldFor}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_another_faxes_attempt_is_a_fault(situation: str) -> None:
    """An event about an attempt that the fax never had changes nothing and is not swallowed."""
    with pytest.raises(KeyError):
        at(situation).do(Taken("a9", "c-1"))


# --- the way of a fax that arrives ------------------------------------------------------------------


def test_delivered_at_the_first_call() -> None:
    """A fax that goes through is called once and reported once, with its pages and its time."""
    walk = Walk().begin()
    assert (walk.fax.state, walk.fax.due_at) == (State.SUBMITTING, walk.last.lease_until)
    walk.make(taken())
    assert walk.fax.due_at == walk.now + 120.0 + 90.0 * PAGES, "2 minutes, and 90 s a page"
    assert (walk.last.stage, walk.last.taken_at, walk.last.changed_at) == (Stage.TAKEN, walk.now, walk.now)
    assert walk.effects == (Reached(Proof.TAKEN, FROM),)
    assert walk.make(said(Stage.CONVERTED)).effects == ()
    assert walk.make(said(Stage.DIALLED)).effects == (Reached(Proof.CALLED, FROM),)
    walk.make(delivered(), 79.0)
    assert (walk.fax.state, walk.fax.ended_at, walk.fax.reason) == (State.DELIVERED, walk.now, None)
    assert (walk.last.end, walk.last.pages, walk.last.ended_at) == (End.DELIVERED, PAGES, walk.now)
    assert (walk.last.blocking, walk.last.slot, walk.last.open) == (False, None, False)
    assert walk.notices == [Notice.DELIVERED]


def test_events_in_any_order() -> None:
    """A report that comes late, or twice, takes nothing back."""
    walk = Walk().call().make(said(Stage.SENDING))
    before = walk.fax
    for stage in (Stage.TAKEN, Stage.CONVERTED, Stage.DIALLED, Stage.SENDING, Stage.UNKNOWN):
        assert walk.make(said(stage)).fax is before
        assert walk.effects == ()
    after = walk.make(delivered()).fax
    for stage in (Stage.TAKEN, Stage.SENDING, Stage.DELIVERED):
        assert walk.make(said(stage)).fax is after
        assert walk.effects == ()
    assert walk.notices == [Notice.DELIVERED]


def test_only_our_question_moves_the_next_question() -> None:
    """Webhooks do not put off the polling that stands in for lost ones."""
    walk = Walk().call()
    due = walk.fax.due_at
    assert walk.make(said(Stage.SENDING), 20.0).fax.due_at == due
    assert walk.make(said(Stage.SENDING, asked=True), 780.0).fax.due_at == walk.now + 400.0


# --- answers to the POST ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maker", "brake"),
    [
        (not_taken(), Brake("pause", "account", "HTTP 429", Proof.TAKEN)),
        (not_taken(7.0), Brake("pause", "account", "HTTP 429", Proof.TAKEN, 7.0)),
        (rejected(Blame.ACCOUNT), Brake("hold", "account", "HTTP 403 10010", Proof.TAKEN)),
        (rejected(Blame.SENDER), Brake("hold", FROM, "HTTP 403 10010", Proof.TAKEN)),
    ],
)
def test_the_queue_waits_instead_of_the_fax(maker: Maker, brake: Brake) -> None:
    """What concerns everybody stops the queue or the sender; the fax stays queued and loses no call."""
    walk = Walk().begin().make(maker)
    assert walk.effect(Brake) == brake
    assert (walk.fax.state, walk.fax.due_at, walk.fax.calls) == (State.QUEUED, walk.now, ())
    assert not walk.last.blocking
    assert walk.notices == []
    assert (walk.effect(Alert) is not None) == (brake.kind == "hold"), "the postmaster hears of holds"


@pytest.mark.parametrize(("blame", "where"), [(Blame.ACCOUNT, ""), (Blame.SENDER, f" from {FROM}")])
def test_the_postmaster_reads_what_is_stopped(blame: Blame, where: str) -> None:
    """Where only one of our numbers is refused, the alert does not say that all faxes wait."""
    text = f"No faxes go out{where} until the carrier accepts one{where} again: HTTP 403 10010."
    assert Walk().begin().make(rejected(blame)).effect(Alert) == Alert("account_held", text)


def test_refused_fax() -> None:
    """A fax that the carrier refuses for itself fails at once, with the reason."""
    walk = Walk().begin().make(rejected(Blame.FAX))
    assert (walk.fax.state, walk.fax.reason) == (State.FAILED, "number_refused")
    assert (walk.last.end, walk.last.reason) == (End.REFUSED, "number_refused")
    assert walk.notices == [Notice.FAILED]
    assert walk.effect(Alert) is None


def test_refused_document_is_told_to_the_postmaster() -> None:
    """A document that passed our checks and not the carrier's is a fault of ours to be looked at."""
    walk = Walk().begin().make(rejected(Blame.FAX, reason="document_refused"))
    assert walk.effect(Alert) is not None
    assert walk.notices == [Notice.FAILED]


def test_suspect_refusal_holds_the_fax_alone() -> None:
    """A refusal that may concern the whole account holds this fax, tells its sender and asks about others."""
    walk = Walk().begin().make(rejected(Blame.SUSPECT))
    assert (walk.fax.held_for, walk.fax.held_detail) == (HeldFor.REFUSED, "HTTP 403 10010")
    assert walk.effect(Suspect) == Suspect("HTTP 403 10010")
    assert walk.effect(Brake) is None
    assert walk.notices == [Notice.DELAYED]
    walk.make(ACCOUNT_HELD)
    assert (walk.fax.state, walk.fax.held_for, walk.notices) == (State.QUEUED, None, [Notice.DELAYED])


def test_withdrawn_before_the_post() -> None:
    """A look that forbids the call puts the fax back for the time that the look named."""
    walk = Walk().fail("user_busy").begin().make(withdrawn(5000.0))
    assert (walk.fax.state, walk.fax.due_at, walk.last.end) == (
        State.QUEUED,
        walk.now + 5000.0,
        End.WITHDRAWN,
    )
    assert len(walk.fax.calls) == 1


def test_second_id_for_one_attempt() -> None:
    """If the carrier ever takes one POST twice, the postmaster hears of it."""
    walk = Walk().call().make(taken(carrier_id="c-other"))
    assert walk.effect(Alert) is not None
    assert walk.last.carrier_id == "c-a1"


# --- operators --------------------------------------------------------------------------------------


def test_hold_and_release() -> None:
    """A held fax is not called; its sender hears of it once, and released it is due at once."""
    walk = Walk().fail("receiver_decline").make(HOLD)
    assert (walk.fax.held_for, walk.notices) == (HeldFor.OPERATOR, [Notice.DELAYED])
    walk.make(RELEASE)
    assert (walk.fax.state, walk.fax.held_for, walk.fax.due_at) == (State.QUEUED, None, walk.now)
    assert walk.make(HOLD).notices == [Notice.DELAYED]


def test_release_of_an_open_call_waits_for_it_anew() -> None:
    """A released fax whose call never ended is asked about again, and is stuck only after a new term."""
    walk = at("held, stuck").make(RELEASE)
    assert (walk.fax.state, walk.fax.due_at) == (State.SENDING, walk.now)
    assert walk.make(TIME, STUCK).fax.state is State.SENDING
    assert walk.make(TIME, 1.0).fax.held_for is HeldFor.STUCK


@pytest.mark.parametrize("more", [(), (set_aside(HeldFor.RESTORED),)])
def test_contradiction_is_called_again_only_by_force(more: tuple[Maker, ...]) -> None:
    """A fax that may have arrived is called again only by an operator who says so, after a restore too."""
    walk = at("held, contradiction")
    for maker in more:
        walk.make(maker)
    for wish in (RETRY, RELEASE):
        with pytest.raises(Misfit, match="--even-if-twice"):
            walk.make(wish)
    assert walk.make(RETRY_TWICE).fax.state is State.QUEUED


@pytest.mark.parametrize("wish", [HOLD, RELEASE])
def test_only_a_waiting_fax_is_held_or_released(wish: Maker) -> None:
    """A fax with an open call can neither be held nor released; the operator reads why."""
    with pytest.raises(Misfit, match="m1-1 is sending"):
        at("sending").make(wish)


@pytest.mark.parametrize("situation", ["submitting", "sending"])
def test_open_call_is_not_repeated(situation: str) -> None:
    """Not even by force is a fax called while its call is open."""
    for wish in (RETRY, RETRY_TWICE):
        with pytest.raises(Misfit, match="its call is open"):
            at(situation).make(wish)


def test_retry_of_a_waiting_fax_is_now() -> None:
    """`retry` does not wait for the time that the plan had set."""
    walk = Walk().fail("receiver_decline").make(RETRY)
    assert walk.fax.due_at == walk.now


def test_retry_takes_back_the_wish_to_cancel() -> None:
    """A fax called again by force after a cancel is called in earnest, not cancelled once more."""
    walk = at("sending, cancel wished").make(TIME, STUCK + 1).make(RETRY_TWICE)
    assert (walk.fax.state, walk.last.end) == (State.QUEUED, End.OVERRULED)
    walk.call()
    assert not walk.last.cancel_wanted
    assert walk.make(not_taken()).fax.state is State.SENDING


CANCELLED_BY: dict[str, tuple[Maker, ...]] = {
    "not taken": (CANCEL, not_taken()),
    "withdrawn": (CANCEL, withdrawn()),
    "proved absent": (CANCEL, doubted(), absent()),
    **{f"refused, {blame}": (CANCEL, rejected(blame)) for blame in Blame},
    **{
        reason: (taken(), CANCEL, cancel_sent(), failed(reason))
        for reason in ("sender_canceled", "user_busy", "account_disabled", "destination_invalid")
    },
}


@pytest.mark.parametrize("way", CANCELLED_BY)
def test_cancelled_once_the_call_has_ended(way: str) -> None:
    """With a cancel asked, whatever ends the call without delivery ends the fax as cancelled."""
    walk = Walk().begin()
    for maker in CANCELLED_BY[way]:
        assert walk.notices == []
        walk.make(maker)
    assert (walk.fax.state, walk.notices) == (State.CANCELLED, [Notice.CANCELLED])


def test_cancel_after_a_suspect_refusal_stops_nobody_else() -> None:
    """A cancelled fax that met a refusal of unknown reach does not hold the account."""
    walk = Walk().begin().make(CANCEL).make(rejected(Blame.SUSPECT))
    assert walk.effect(Brake) is None


def test_delivery_wins_over_cancel() -> None:
    """A fax that was delivered before the cancel took hold is reported as delivered."""
    walk = Walk().call().make(CANCEL).make(cancel_sent()).make(delivered())
    assert walk.notices == [Notice.DELIVERED]


def test_carrier_is_asked_to_cancel_once() -> None:
    """The wish is kept until the carrier has an id for the call, and then put to it once."""
    walk = Walk().begin().make(CANCEL)
    lease = walk.fax.due_at
    assert (walk.fax.cancel_asked, walk.last.cancel_wanted, lease) == (True, False, walk.last.lease_until)
    walk.make(taken())
    assert (walk.last.cancel_wanted, walk.fax.due_at) == (True, walk.now)
    walk.make(cancel_sent())
    assert (walk.last.cancel_wanted, walk.last.cancel_asked) == (False, True)
    assert walk.fax.due_at == walk.now + 120.0
    assert not walk.make(CANCEL).last.cancel_wanted


def test_cancel_reaches_every_open_call() -> None:
    """When a call thought absent runs beside its retry, both are asked to stop."""
    walk = at("sending, first attempt found").make(CANCEL)
    assert [attempt.cancel_wanted for attempt in walk.fax.attempts] == [True, True]


@pytest.mark.parametrize("situation", ["held, doubt", "held, gone", "held, stuck"])
def test_cancel_of_a_held_fax_is_the_last_word(situation: str) -> None:
    """A fax held with an open call ends when the operator cancels it, and nobody waits for its number."""
    walk = at(situation).make(CANCEL)
    assert (walk.fax.state, walk.last.blocking, walk.last.slot) == (State.CANCELLED, False, None)
    assert walk.last.open, "what became of the call is still not known"
    walk.make(taken() if walk.last.carrier_id is None else delivered())
    assert walk.fax.state is State.CANCELLED
    assert walk.effect(Alert) is not None


def test_one_fax_found_twice_is_cancelled_as_delivered() -> None:
    """Where one of two calls was delivered, the operator's last word cannot make it undelivered."""
    walk = at("sending, first attempt found").make(delivered(ordinal=1)).make(gone()).make(CANCEL)
    assert walk.notices == [Notice.DELAYED, Notice.DELIVERED]


# --- set aside -------------------------------------------------------------------------------------


def test_set_aside_is_told() -> None:
    """A fax that is set aside keeps the cause for the operator; sender and postmaster hear of it once."""
    walk = Walk().make(set_aside(HeldFor.RESTORED))
    detail = "the carrier has a fax to the number that nobody knows"
    assert (walk.fax.held_for, walk.fax.held_detail) == (HeldFor.RESTORED, detail)
    assert walk.effect(Alert) == Alert("fax_held", f"Fax m1-1 is held: {detail}.")
    assert walk.make(set_aside(HeldFor.RESTORED)).effects == ()
    assert walk.notices == [Notice.DELAYED]


def test_fax_set_aside_in_doubt_keeps_its_doubt() -> None:
    """A fax that does harm when it is asked about is still not called before its doubt is cleared up."""
    walk = at("held, harmful")
    assert (walk.last.open, walk.last.blocking) == (True, True)
    with pytest.raises(Misfit, match="--even-if-twice"):
        walk.make(RETRY)
    assert walk.make(RELEASE).fax.state is State.IN_DOUBT
    assert walk.make(absent()).fax.state is State.QUEUED


def test_call_after_call_lost_is_held() -> None:
    """A fax whose calls are lost one after the other is left to a person after the fifth."""
    walk = lost(LOST_IN_A_ROW - 1)
    assert (walk.fax.state, walk.notices) == (State.QUEUED, [])
    walk.begin().make(doubted()).make(absent())
    assert (walk.fax.held_for, walk.notices) == (HeldFor.HARMFUL, [Notice.DELAYED])
    assert walk.effect(Alert) is not None
    assert walk.make(RELEASE).begin().make(doubted()).make(absent()).fax.state is State.HELD, "one more try"


def test_calls_lost_together_come_back_apart() -> None:
    """After a first loss a fax is called at once; after another one each channel's has a time of its own."""
    waits = set()
    for slot in range(3):
        walk = Walk()
        for lost_calls in (1, 2):
            walk.begin(slot=slot).make(doubted()).make(absent())
            if lost_calls == 1:
                assert walk.fax.due_at == walk.now
        waits.add(walk.fax.due_at - walk.now)
    assert waits == {0.0, APART, 2 * APART}


def test_calls_lost_now_and_then_are_not_held() -> None:
    """What counts is an unbroken row of lost calls: one that the carrier answers begins it anew."""
    walk = lost(LOST_IN_A_ROW - 1).begin().make(not_taken())
    for _ in range(LOST_IN_A_ROW - 1):
        assert walk.begin().make(doubted()).make(absent()).fax.state is State.QUEUED


def test_call_after_call_lost_and_forced_counts_anew() -> None:
    """An operator who calls by force takes the lost calls out of the row."""
    walk = at("held, call after call lost").make(RETRY_TWICE)
    for _ in range(LOST_IN_A_ROW - 1):
        assert walk.begin().make(doubted()).make(absent()).fax.state is State.QUEUED
    assert walk.begin().make(doubted()).make(absent()).fax.held_for is HeldFor.HARMFUL


def test_cancel_wins_over_setting_aside() -> None:
    """A fax whose last call is lost after a wish to cancel ends as cancelled, nobody need look."""
    walk = lost(LOST_IN_A_ROW - 1).begin().make(CANCEL).make(doubted()).make(absent())
    assert walk.notices == [Notice.CANCELLED]


# --- the account's hold -----------------------------------------------------------------------------


def test_account_hold_is_told_once() -> None:
    """A queued fax stays queued while the account is held, and its sender hears of it once."""
    walk = Walk().make(ACCOUNT_HELD).make(ACCOUNT_HELD)
    assert (walk.fax.state, walk.notices) == (State.QUEUED, [Notice.DELAYED])
    assert walk.make(TIME, 5 * HOUR).notices == [Notice.DELAYED]


def test_records_keep_numbers_to_themselves() -> None:
    """Whatever is printed of a fax or an attempt shows no telephone number."""
    walk = Walk().call()
    assert NUMBER not in repr(walk.fax)
    assert FROM not in repr(walk.last)
    assert (queued_fax().last, queued_fax().calls) == (None, ())
