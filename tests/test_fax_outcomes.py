"""How a fax ends: doubts, the carrier's reports, contradictions, and the passing of time."""

from collections.abc import Callable

import pytest
from faxes import (
    CANCEL,
    DAY,
    FROM,
    HOLD,
    HOUR,
    RELEASE,
    RETRY_TWICE,
    RULES,
    STUCK,
    TIME,
    Maker,
    Walk,
    absent,
    always,
    at,
    cancel_sent,
    delivered,
    doubted,
    failed,
    gone,
    not_taken,
    older,
    queued_fax,
    rejected,
    said,
    taken,
    unanswered,
    unprovable,
    withdrawn,
)

from gateway.reasons import TABLE, UNKNOWN, Kind, Reason
from gateway.records import (
    Alert,
    Blame,
    Brake,
    End,
    HeldFor,
    Notice,
    Proof,
    Reached,
    Report,
    Reported,
    Stage,
    State,
    TimePassed,
)

# --- doubt (rule 3) ---------------------------------------------------------------------------------


def test_doubt_is_checked_and_closed() -> None:
    """A fax whose answer is lost blocks its number until its absence is proved; then it may be called."""
    walk = Walk().begin()
    start = walk.now
    walk.make(doubted())
    for due in (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 610.0, 620.0):
        assert walk.fax.due_at == start + due
        assert walk.last.blocking
        walk.make(unanswered(), walk.fax.due_at - walk.now)
    walk.make(absent())
    assert (walk.fax.state, walk.fax.due_at, walk.last.end) == (State.QUEUED, walk.now, End.ABSENT)
    assert not walk.last.blocking
    assert walk.fax.calls == (), "no call was placed"


def test_a_doubt_from_before_an_outage_is_asked_about_at_once() -> None:
    """When the gateway was away for two hours, what it was about to send is not left for ten minutes more."""
    walk = Walk().begin().make(doubted(), 2 * HOUR)
    assert walk.fax.due_at == walk.now + 10.0
    walk.make(unanswered(), 2 * HOUR)
    assert walk.fax.due_at == walk.now + 10.0


def test_unproved_doubt_waits_for_a_person() -> None:
    """What cannot be proved is never called again by itself; sender and postmaster are told."""
    walk = Walk().begin().make(doubted()).make(unprovable())
    assert (walk.fax.held_for, walk.last.blocking, walk.last.open) == (HeldFor.DOUBT, True, True)
    assert walk.notices == [Notice.DELAYED]
    assert walk.effect(Alert) is not None
    walk.make(RELEASE)
    assert (walk.fax.state, walk.fax.due_at, walk.last.doubted_at) == (State.IN_DOUBT, walk.now, walk.now)


@pytest.mark.parametrize("verdict", [absent(1), unprovable(1), unanswered(1)])
def test_stale_verdict_about_a_closed_doubt(verdict: Maker) -> None:
    """The verdict of a slower gateway does not close the doubt about a newer attempt."""
    walk = Walk().begin().make(doubted()).make(absent()).begin().make(doubted())
    before = walk.fax
    assert walk.make(verdict).fax is before


WAITING: dict[str, Walk] = {
    "retry waits": Walk().begin().make(doubted()).make(absent()),
    "retry withdrawn": Walk().begin().make(doubted()).make(absent()).begin().make(withdrawn()),
    "retry not taken": Walk().begin().make(doubted()).make(absent()).begin().make(not_taken()),
    "operator's hold": Walk().begin().make(doubted()).make(absent()).make(HOLD),
    "overruled": Walk().begin().make(doubted()).make(RETRY_TWICE),
}


@pytest.mark.parametrize("waiting", WAITING)
def test_closed_doubt_turns_up_before_its_retry(waiting: str) -> None:
    """A fax found at the carrier after all is followed there, and its retry does not take place."""
    walk = Walk(WAITING[waiting].fax, WAITING[waiting].now).make(taken(1))
    assert (walk.fax.state, walk.fax.held_for) == (State.SENDING, None)
    assert walk.effect(Alert) is None, "nothing was sent twice"
    assert not walk.fax.attempt("a1").blocking, "another fax may be calling the number"
    assert walk.make(delivered(ordinal=1)).fax.state is State.DELIVERED


def test_closed_doubt_turns_up_after_its_retry_was_called() -> None:
    """Found too late to stop the retry, it is followed all the same and the postmaster is told."""
    walk = Walk().begin().make(doubted()).make(absent()).fail("user_busy").make(taken(1))
    assert walk.effect(Alert) is not None
    assert walk.fax.state is State.SENDING, "its retry waits no longer"


@pytest.mark.parametrize(
    "answer",
    [withdrawn(), not_taken(), absent(), *(rejected(blame) for blame in Blame), failed("user_busy")],
)
def test_closed_doubt_turns_up_while_its_retry_is_under_way(answer: Maker) -> None:
    """With two attempts open the second one's end decides nothing: the first is waited for."""
    walk = Walk().begin().make(doubted()).make(absent()).begin().make(taken(1))
    assert walk.fax.state is State.SUBMITTING
    assert walk.effect(Alert) is not None
    if answer(walk.fax) == absent()(walk.fax):
        walk.make(doubted())
    elif answer(walk.fax) == failed("user_busy")(walk.fax):
        walk.make(taken())
    walk.make(answer)
    assert (walk.fax.state, walk.notices) == (State.SENDING, [])
    assert walk.make(delivered(ordinal=1)).notices == [Notice.DELIVERED]


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (lambda walk: walk.fail("destination_invalid"), State.FAILED),
        (lambda walk: walk.make(CANCEL), State.CANCELLED),
        (lambda walk: walk.call().make(delivered()), State.DELIVERED),
    ],
)
def test_closed_doubt_turns_up_after_the_end(end: Callable[[Walk], Walk], state: State) -> None:
    """A carrier's id learned after the fax has ended is kept as proof, and the postmaster told."""
    walk = end(Walk().begin().make(doubted()).make(absent())).make(taken(1))
    assert walk.fax.attempt("a1").carrier_id == "c-a1"
    assert walk.effect(Alert) is not None
    walk.make(delivered(ordinal=1))
    assert walk.effect(Alert) is not None
    assert walk.fax.state is state
    assert len(walk.notices) == 1, "the sender was told once"


@pytest.mark.parametrize(
    ("walk", "found", "cause"),
    [
        (Walk().begin().make(doubted()).make(absent()), unprovable(1), HeldFor.DOUBT),
        (Walk().fail("user_busy"), gone(1), HeldFor.GONE),
    ],
)
def test_look_before_the_retry_finds_no_proof(walk: Walk, found: Maker, cause: HeldFor) -> None:
    """When the look just before a retry cannot clear the earlier call, a person decides, for good."""
    walk.begin().make(withdrawn()).make(found)
    assert (walk.fax.held_for, walk.notices) == (cause, [Notice.DELAYED])
    assert walk.effect(Alert) is not None
    walk.make(RETRY_TWICE)
    assert walk.fax.state is State.QUEUED
    assert walk.fax.attempts[0].end is End.OVERRULED, "the next look passes it over"
    assert walk.fax.attempts[0].reason in {None, "user_busy"}, "the report still names it"


# --- failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [*TABLE, UNKNOWN], ids=lambda row: row.name)
def test_every_reason_is_answered_by_its_kind(row: Reason) -> None:
    """A failed call is repeated, waited with, given up or asked about, as its reason's row says."""
    walk = Walk().call().make(failed(row.name))
    outcome = (walk.fax.state, walk.fax.due_at - walk.now, walk.fax.reason)
    brake = walk.effect(Brake)
    match row.kind:
        case Kind.CAPACITY:
            assert outcome == (State.QUEUED, 0.0, None)
            assert brake == Brake("pause", "account", row.name, Proof.CALLED)
        case Kind.ACCOUNT | Kind.SENDER | Kind.SPEND:
            assert outcome == (State.QUEUED, 0.0, None)
            until = 12 * HOUR + 300.0 - 3.0 if row.kind is Kind.SPEND else None  # from noon to after midnight
            scope = FROM if row.kind is Kind.SENDER else "account"
            assert brake == Brake("hold", scope, row.name, Proof.CALLED, until)
        case Kind.NEVER:
            assert outcome == (State.FAILED, 0.0, row.name)
        case Kind.CONTRADICTION:
            assert outcome == (State.SENDING, 0.0, None)
        case retried:
            assert outcome == (State.QUEUED, RULES.waits[retried.value][0], None)
    alerted = row.alert and row.kind is not Kind.CONTRADICTION
    assert (walk.effect(Alert) is not None) == alerted
    assert walk.notices == ([Notice.FAILED] if row.kind is Kind.NEVER else [])


@pytest.mark.parametrize(
    ("reason", "lifts"),
    [
        ("user_busy", True),
        ("receiver_decline", True),
        ("service_unavailable", False),
        ("file_format_invalid", False),
        ("account_disabled", False),
        ("user_channel_limit_exceeded", False),
    ],
)
def test_only_a_call_that_was_placed_lifts_a_hold(reason: str, *, lifts: bool) -> None:
    """A probe that never rang a telephone does not prove that the account may call again."""
    walk = Walk().call().make(failed(reason))
    assert (walk.effect(Reached) == Reached(Proof.CALLED, FROM)) == lifts


def test_busy_until_the_calls_are_used_up() -> None:
    """A number that stays busy is called five times, then the sender reads that it was busy."""
    walk = Walk()
    for wait in (180.0, 360.0, 720.0, 1200.0):
        walk.fail("user_busy", wait)
        assert (walk.fax.state, walk.fax.due_at - walk.now) == (State.QUEUED, wait)
    walk.fail("user_busy")
    assert (walk.fax.state, walk.fax.reason, len(walk.fax.calls)) == (State.FAILED, "user_busy", 5)
    assert walk.notices == [Notice.FAILED]


def test_channel_limits_use_up_no_call() -> None:
    """However often all lines are in use, the fax keeps its calls."""
    walk = Walk()
    for _ in range(20):
        walk.fail("user_channel_limit_exceeded")
    walk.fail("user_busy")
    assert (walk.fax.state, walk.fax.due_at - walk.now) == (State.QUEUED, 180.0)


def test_retry_beyond_the_deadline_is_not_waited_for() -> None:
    """A fax whose next call would come after the deadline fails at once, so that the sender knows sooner."""
    for left, state in ((181.0, State.QUEUED), (180.0, State.FAILED)):
        walk = Walk(older(queued_fax(), DAY - left - 3.0)).fail("user_busy", 1.0)
        assert (walk.fax.state, walk.fax.give_up_at - walk.now) == (state, left)


def test_report_of_a_failed_call_is_kept() -> None:
    """Each call keeps its own end, reason and duration for the report."""
    walk = Walk().call()
    walk.do(Reported("a1", Report(Stage.FAILED, False, 1, 33, "user_busy", "sip_486")), 40.0)
    call = walk.last
    assert (call.end, call.reason, call.internal_reason) == (End.FAILED, "user_busy", "sip_486")
    assert (call.pages, call.duration, call.ended_at, call.changed_at) == (1, 33, walk.now, walk.now)
    assert (call.blocking, call.slot, call.open) == (False, None, False)
    ended = walk.fax
    assert walk.make(failed("receiver_decline")).fax is ended, "and a later word about it takes nothing back"
    assert walk.effects == ()


# --- a failure without its reason (rule 5) ----------------------------------------------------------


@pytest.mark.parametrize("situation", ["sending", "held, stuck"])
def test_polled_failure_waits_for_its_reason(situation: str) -> None:
    """A failure learned by asking waits 60 s for the webhook that names its reason."""
    walk = at(situation).make(failed(None, asked=True))
    heard = walk.now
    assert (walk.last.open, walk.fax.due_at) == (True, heard + 60.0)
    walk.make(failed(None, asked=True), 30.0)
    assert (walk.last.open, walk.fax.due_at) == (True, heard + 60.0)
    walk.make(failed("destination_invalid"), 10.0)
    assert walk.fax.reason == "destination_invalid"


def test_polled_failure_without_a_webhook() -> None:
    """When no webhook names the reason within 60 s, the fax gets one cautious retry."""
    walk = Walk().call().make(failed(None, asked=True)).make(failed(None, asked=True), 59.9)
    assert walk.last.open
    walk.make(failed(None, asked=True), 0.1)
    assert (walk.fax.state, walk.fax.due_at, walk.last.reason) == (State.QUEUED, walk.now + 120.0, None)
    walk.fail(None)
    assert (walk.fax.state, walk.fax.reason) == (State.FAILED, "unknown")


# --- a failure that calls itself a success ----------------------------------------------------------


@pytest.mark.parametrize("reason", ["success", "received"])
@pytest.mark.parametrize("answer", ["the same", None])
def test_contradiction_is_asked_about_then_held(reason: str, answer: str | None) -> None:
    """A call that failed with success is never repeated by itself, whatever the answer leaves out."""
    walk = Walk().call().make(failed(reason))
    assert (walk.fax.state, walk.fax.due_at, walk.last.open) == (State.SENDING, walk.now, True)
    walk.make(failed(answer and reason, asked=True))
    assert (walk.fax.held_for, walk.fax.held_detail) == (HeldFor.CONTRADICTION, reason)
    assert (walk.last.end, walk.last.blocking, walk.last.reason) == (End.FAILED, False, reason)
    assert walk.notices == [Notice.DELAYED]
    assert walk.effect(Alert) is not None


def test_contradiction_resolved_by_asking() -> None:
    """When the carrier, asked again, says something definite, that counts."""
    assert Walk().call().make(failed("success")).make(delivered(asked=True)).notices == [Notice.DELIVERED]
    walk = Walk().call().make(failed("success")).make(failed("user_busy", asked=True))
    assert (walk.fax.state, walk.last.reason) == (State.QUEUED, "user_busy")


def test_contradiction_of_a_stuck_call() -> None:
    """A stuck call that ends with such a contradiction is not reported as failed; it stays with a person."""
    walk = at("held, stuck").make(failed("success"))
    assert (walk.fax.state, walk.fax.due_at) == (State.HELD, walk.now)
    walk.make(failed("success", asked=True))
    assert (walk.fax.held_for, walk.notices) == (HeldFor.CONTRADICTION, [Notice.DELAYED])


def test_contradiction_of_a_fax_that_arrived_by_its_other_call() -> None:
    """Where another call was delivered, a contradiction changes nothing: the fax was delivered."""
    walk = at("sending, first attempt found").make(delivered(ordinal=1)).make(failed("success"))
    assert walk.notices == [Notice.DELIVERED]
    assert walk.fax.reason is None


# --- late contradictions (rule 5) -------------------------------------------------------------------


@pytest.mark.parametrize("wait", [always(TimePassed()), HOLD])
def test_late_delivery_ends_a_waiting_fax(wait: Maker) -> None:
    """A call reported failed and then delivered ends the fax as delivered while its retry waits."""
    walk = Walk().fail("user_busy").make(wait).make(delivered(ordinal=1))
    assert (walk.fax.state, walk.fax.held_for, walk.last.end) == (State.DELIVERED, None, End.DELIVERED)
    assert walk.notices[-1] is Notice.DELIVERED
    assert walk.effect(Alert) is None, "it was sent once"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (withdrawn(), []),
        (not_taken(), []),
        (rejected(Blame.FAX), []),
        (rejected(Blame.SUSPECT), []),
        (doubted(), [absent()]),
        (taken(), [failed("user_busy")]),
        (taken(), [failed("destination_invalid")]),
        (taken(), [delivered()]),
    ],
)
def test_late_delivery_while_the_retry_is_under_way(answer: Maker, told: list[Maker]) -> None:
    """A delivery learned after the retry began is alerted; however the retry ends, the fax was delivered."""
    walk = Walk().fail("user_busy").begin().make(delivered(ordinal=1))
    assert (walk.fax.state, walk.notices) == (State.SUBMITTING, [])
    assert walk.effect(Alert) is not None
    for maker in (answer, *told):
        walk.make(maker)
    assert (walk.notices, walk.fax.reason) == ([Notice.DELIVERED], None)


@pytest.mark.parametrize(
    ("situation", "report"),
    [("failed", delivered()), ("cancelled", delivered()), ("delivered", failed("user_busy"))],
)
def test_contradiction_after_the_end(situation: str, report: Maker) -> None:
    """What contradicts the final reply is recorded and goes to the postmaster; the sender hears no more."""
    walk = at(situation)
    state, told = walk.fax.state, list(walk.notices)
    walk.make(report)
    assert (walk.fax.state, walk.notices) == (state, told)
    assert walk.effect(Alert) is not None


# --- time -------------------------------------------------------------------------------------------


def test_delay_is_told_once() -> None:
    """After four hours the sender hears that the fax is still being tried, and never again."""
    walk = Walk().fail("user_busy").make(TIME, 4 * HOUR - 63.0)
    assert walk.notices == []
    for _ in range(3):
        assert walk.make(TIME, 1.0).notices == [Notice.DELAYED]
    assert walk.make(HOLD).notices == [Notice.DELAYED]


@pytest.mark.parametrize(
    ("walk", "reason"),
    [
        (Walk(), "gave_up_waiting"),
        (Walk().make(HOLD), "gave_up_waiting"),
        (Walk().begin().make(rejected(Blame.SUSPECT)), "number_refused"),
        (Walk().fail("user_channel_limit_exceeded"), "user_channel_limit_exceeded"),
        (Walk().fail("user_busy").begin().make(not_taken()), "user_busy"),
        (at("held, contradiction"), "success"),
        (Walk().fail("user_busy").call().make(TIME, STUCK + 1.0).make(RETRY_TWICE), "user_busy"),
    ],
)
def test_given_up_after_a_day(walk: Walk, reason: str) -> None:
    """A fax that has waited for 24 hours fails, with the reason of its last call if there was one."""
    rest = queued_fax().give_up_at - walk.now
    ended = Walk(walk.fax, walk.now).make(TIME, rest - 1.0)
    assert not ended.fax.final
    ended.make(TIME, 1.0)
    assert (ended.fax.state, ended.fax.reason) == (State.FAILED, reason)
    assert ended.notices[-1] is Notice.FAILED


@pytest.mark.parametrize("situation", ["submitting", "in doubt", "sending", "held, doubt", "held, gone"])
def test_open_call_outlives_the_deadline(situation: str) -> None:
    """The deadline never ends a fax that the carrier may be sending at this moment."""
    assert not at(situation).make(TIME, 2 * DAY).fax.final


def test_stuck_call() -> None:
    """A call without news for 1 h and 3 min a page frees its number and line, is cancelled, and is held."""
    walk = Walk().call().make(said(Stage.SENDING), 600.0)
    assert walk.make(TIME, STUCK).fax.state is State.SENDING
    walk.make(TIME, 1.0)
    assert (walk.fax.held_for, walk.fax.due_at) == (HeldFor.STUCK, walk.now)
    assert (walk.last.blocking, walk.last.slot, walk.last.open) == (False, None, True)
    assert walk.last.cancel_wanted
    assert walk.notices == [Notice.DELAYED]
    assert walk.effect(Alert) is not None
    held = walk.make(cancel_sent()).fax
    assert walk.make(TIME, DAY).fax is held, "one cancel"


def test_stuck_call_that_ends_after_all() -> None:
    """The end of a call that was given up as stuck still counts."""
    assert at("held, stuck").make(delivered()).notices == [Notice.DELAYED, Notice.DELIVERED]
    assert at("held, stuck").make(failed("sender_canceled")).fax.state is State.QUEUED


def test_stuck_after_the_operators_cancel() -> None:
    """A call that was asked to cancel already is not asked again when it counts as stuck."""
    walk = at("sending, cancel sent").make(TIME, STUCK + 1.0)
    assert (walk.fax.held_for, walk.last.cancel_wanted) == (HeldFor.STUCK, False)


def test_held_doubt_gives_its_number_back() -> None:
    """A doubt that waits for a person keeps the number from others no longer than a stuck call would."""
    walk = at("held, doubt")
    assert walk.make(TIME, STUCK - 60.0).last.blocking
    walk.make(TIME, 61.0)
    assert (walk.last.blocking, walk.last.slot, walk.last.cancel_wanted) == (False, None, False)
    assert walk.fax.held_for is HeldFor.DOUBT


def test_found_call_that_never_ends() -> None:
    """A call found after its doubt was closed is given up as stuck like any other."""
    walk = at("queued after absence").make(taken(1)).make(TIME, STUCK + 1.0)
    assert (walk.fax.held_for, walk.last.cancel_wanted) == (HeldFor.STUCK, True)


def test_gone() -> None:
    """A fax that the carrier no longer knows is held with its call open, and asked about ever more rarely."""
    walk = Walk().call().make(gone())
    assert (walk.fax.held_for, walk.last.open, walk.last.blocking) == (HeldFor.GONE, True, True)
    assert (walk.notices, walk.effect(Alert) is not None) == ([Notice.DELAYED], True)
    assert walk.make(gone()).fax.due_at == walk.now + 900.0
    assert walk.effects == ()


@pytest.mark.parametrize("wish", [RETRY_TWICE, RELEASE])
def test_an_operator_gives_an_old_fax_new_time(wish: Maker) -> None:
    """A doubt that an operator sends on after the fax's deadline is not given up at the next look."""
    walk = Walk().begin().make(doubted()).make(unprovable())
    walk.fax = older(walk.fax, 2 * DAY)
    walk.make(wish)
    assert walk.fax.give_up_at > walk.now
    assert walk.make(TIME).fax.state is not State.FAILED
