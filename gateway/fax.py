"""What becomes of a fax: the one place that decides.

In charge of: `transition`, a pure and total function from a fax and an event to the new fax and the
effects that the store writes in the same transaction. docs/states.md draws it.

Promises:
- A fax that has ended never changes its state again. What comes later is kept in its history, and the
  postmaster hears of it when it contradicts what the sender was told.
- No fax is called while one of its attempts is open, nor after one of them delivered.
- An event from outside that is late, doubled or out of order changes nothing. An event of our own that
  does not fit raises `Misfit`, except what a gateway past its lease may still say: that is ignored,
  but a carrier's id is always kept.

Fails: `Misfit` is a fault of ours or a wish of an operator that cannot be granted; nothing was changed.
"""

from collections.abc import Callable
from dataclasses import replace

from gateway import fax_wishes, reasons
from gateway.fax_steps import (
    Misfit,
    Step,
    alert_if,
    answers,
    arrived,
    brake_alert,
    closed,
    doubtful,
    ended,
    failed_for_good,
    held,
    last_reason,
    never_arrives,
    perhaps_twice,
    requeue,
    wait_after_loss,
    with_attempt,
)
from gateway.reasons import Kind
from gateway.records import (
    Absent,
    AccountHeld,
    Alert,
    Attempt,
    Begun,
    Blame,
    Brake,
    CancelAsked,
    CancelSent,
    Doubted,
    Effect,
    End,
    Event,
    Fax,
    Gone,
    HeldFor,
    HoldAsked,
    Notice,
    NotTaken,
    Proof,
    Reached,
    Rejected,
    ReleaseAsked,
    Report,
    Reported,
    RetryAsked,
    Rules,
    SetAside,
    Stage,
    State,
    Suspect,
    Taken,
    Tell,
    TimePassed,
    Unanswered,
    Unposted,
    Unprovable,
    Withdrawn,
)
from gateway.schedule import (
    RETRIED,
    first_poll,
    next_check,
    next_poll,
    stuck_limit,
    until_midnight,
    wait_before_retry,
)

_POLLED = frozenset({State.SENDING, State.HELD})  # where an open call is asked about


def transition(fax: Fax, event: Event, now: float, rules: Rules) -> Step:
    """Decide what `event` makes of `fax`; raises Misfit and KeyError (an attempt of another fax)."""
    decide: Callable[..., Step] = _DECISIONS[type(event)]
    return decide(fax, event, now, rules)


# --- our own way: intent, answer, doubt --------------------------------------------------------------


def _begun(fax: Fax, event: Begun, now: float, rules: Rules) -> Step:
    del now, rules
    if fax.state is not State.QUEUED or fax.open_attempts:
        raise Misfit(f"fax {fax.id} is {fax.state}: it cannot be called now")
    due_at = event.attempt.lease_until
    return Step(replace(fax, state=State.SUBMITTING, due_at=due_at, attempts=(*fax.attempts, event.attempt)))


def _taken(fax: Fax, event: Taken, now: float, rules: Rules) -> Step:
    attempt = fax.attempt(event.attempt_id)
    if attempt.carrier_id == event.carrier_id:
        return Step(fax)
    if attempt.carrier_id is not None:
        return Step(fax, (perhaps_twice(fax, "one attempt has two ids at the carrier"),))
    known = replace(
        attempt, carrier_id=event.carrier_id, taken_at=now, stage=Stage.TAKEN, changed_at=now,
        open=True, end=None, ended_at=None, reason=None, cancel_wanted=fax.cancel_asked,
    )  # fmt: skip
    fax = with_attempt(fax, known)
    if fax.final:
        return Step(fax, (perhaps_twice(fax, f"reported {fax.state}, then found at the carrier"),))
    # Rule 3: a closed doubt that turns up stops its retry; an alert, if that has begun.
    later = [other for other in fax.attempts if other.ordinal > attempt.ordinal]
    effects: tuple[Effect, ...] = ()
    if any(other.open or other.carrier_id is not None for other in later):
        effects = (perhaps_twice(fax, "an attempt thought absent was taken after all"),)
    if any(other.open for other in later):
        return Step(fax, effects)
    # A call found after a doubt may have ended long ago, and told us so in vain.
    ask_now = fax.cancel_asked or attempt.doubted_at is not None
    due_at = now if ask_now else now + first_poll(fax, rules)
    fax = replace(fax, due_at=due_at)
    if fax.held_for is not HeldFor.RESTORED:  # that one may have been called again since
        fax = replace(fax, state=State.SENDING, held_for=None, held_detail="")
    return Step(fax, (*effects, Reached(Proof.TAKEN, attempt.from_number)))


def _rejected(fax: Fax, event: Rejected, now: float, rules: Rules) -> Step:
    del rules
    attempt = fax.attempt(event.attempt_id)
    if not answers(fax, attempt):
        return Step(fax)
    fax = with_attempt(fax, closed(attempt, End.REFUSED, now, reason=event.reason))
    match event.blame:
        case Blame.FAX:
            alert = reasons.lookup(event.reason).alert
            return failed_for_good(fax, event.reason, now, alert_if(alert, "call_refused", fax, event.cause))
        case Blame.SUSPECT:
            onward = requeue(fax, now, now)
            if onward.fax.state is not State.QUEUED:  # cancelled, or another of its calls decides
                return onward
            fax, tell = held(fax, HeldFor.REFUSED, event.cause)
            alerted = Alert("fax_held", f"Fax {fax.id} is held: the carrier refused it ({event.cause}).")
            return Step(fax, (*tell, alerted, Suspect(event.cause)))
    scope = attempt.from_number if event.blame is Blame.SENDER else "account"
    brake = Brake("hold", scope, event.cause, Proof.TAKEN)
    return requeue(fax, now, now, (brake, brake_alert(brake)))


def _not_taken(fax: Fax, event: NotTaken, now: float, rules: Rules) -> Step:
    del rules
    attempt = fax.attempt(event.attempt_id)
    if not answers(fax, attempt):
        return Step(fax)
    fax = with_attempt(fax, closed(attempt, End.NOT_TAKEN, now))
    return requeue(fax, now, now, (Brake("pause", "account", event.cause, Proof.TAKEN, event.retry_after),))


def _withdrawn(fax: Fax, event: Withdrawn, now: float, rules: Rules) -> Step:
    del rules
    attempt = fax.attempt(event.attempt_id)
    if not answers(fax, attempt):
        return Step(fax)
    fax = with_attempt(fax, closed(attempt, End.WITHDRAWN, now))
    return requeue(fax, now + event.wait, now, (Unposted(attempt.started_at),))


def _doubted(fax: Fax, event: Doubted, now: float, rules: Rules) -> Step:
    attempt = fax.attempt(event.attempt_id)
    if doubtful(fax, attempt):  # its POST has ended only now: no check so far could know
        fax = with_attempt(fax, replace(attempt, doubted_at=now))
        return Step(replace(fax, due_at=now + rules.doubt_checks[0]))
    if not answers(fax, attempt):
        return Step(fax)
    fax = with_attempt(fax, replace(attempt, doubted_at=attempt.started_at))
    due_at = next_check(attempt.started_at, fax.due_at, now, rules)
    return Step(replace(fax, state=State.IN_DOUBT, due_at=due_at))


def _unanswered(fax: Fax, event: Unanswered, now: float, rules: Rules) -> Step:
    attempt = fax.attempt(event.attempt_id)
    if not doubtful(fax, attempt):
        return Step(fax)
    counted_from = attempt.doubted_at or attempt.started_at
    return Step(replace(fax, due_at=next_check(counted_from, fax.due_at, now, rules)))


def _absent(fax: Fax, event: Absent, now: float, rules: Rules) -> Step:
    attempt = fax.attempt(event.attempt_id)
    if not doubtful(fax, attempt):
        return Step(fax)
    fax = with_attempt(fax, closed(attempt, End.ABSENT, now))
    onward = requeue(fax, now + wait_after_loss(fax, attempt), now)
    if onward.fax.state is State.QUEUED and never_arrives(onward.fax):
        detail = "call after call was lost on its way to the carrier"
        return _set_aside(onward.fax, SetAside(HeldFor.HARMFUL, detail), now, rules)
    return onward


def _unprovable(fax: Fax, event: Unprovable, now: float, rules: Rules) -> Step:
    del now, rules
    attempt = fax.attempt(event.attempt_id)
    looked_again = fax.state is State.QUEUED and attempt.end is End.ABSENT  # just before the next POST
    if not (doubtful(fax, attempt) or looked_again):
        return Step(fax)
    fax, tell = held(fax, HeldFor.DOUBT, event.cause)
    text = f"Fax {fax.id} is held: whether the carrier took it could not be proved ({event.cause})."
    return Step(fax, (*tell, Alert("fax_held", text)))


def _cancel_sent(fax: Fax, event: CancelSent, now: float, rules: Rules) -> Step:
    attempt = fax.attempt(event.attempt_id)
    fax = with_attempt(fax, replace(attempt, cancel_wanted=False, cancel_asked=True))
    return Step(replace(fax, due_at=now + rules.poll_first) if fax.state is State.SENDING else fax)


def _gone(fax: Fax, event: Gone, now: float, rules: Rules) -> Step:
    attempt = fax.attempt(event.attempt_id)
    if fax.state is State.HELD:
        return Step(replace(fax, due_at=now + rules.poll_longest))
    looked_again = fax.state is State.QUEUED and attempt.end is End.FAILED  # just before the next POST
    if not (looked_again or (fax.state is State.SENDING and attempt.open)):
        return Step(fax)
    fax, tell = held(with_attempt(fax, replace(attempt, slot=None)), HeldFor.GONE, "404")
    return Step(fax, (*tell, Alert("fax_held", f"Fax {fax.id} is held: the carrier no longer knows it.")))


# --- the carrier's reports ---------------------------------------------------------------------------


def _reported(fax: Fax, event: Reported, now: float, rules: Rules) -> Step:
    attempt = fax.attempt(event.attempt_id)
    report = event.report
    if attempt.end is not None:
        return _late(fax, attempt, report, now)
    if report.stage is Stage.DELIVERED:
        return _delivered(fax, attempt, report, now)
    if report.stage is Stage.FAILED:
        return _failed(fax, attempt, report, now, rules)
    effects: tuple[Effect, ...] = ()
    if report.stage > attempt.stage:
        attempt = replace(attempt, stage=report.stage, changed_at=now)
        fax = with_attempt(fax, attempt)
        if report.stage >= Stage.DIALLED:
            effects = (Reached(Proof.CALLED, attempt.from_number),)
    if report.asked and fax.state in _POLLED:
        fax = replace(fax, due_at=next_poll(attempt, now, rules))
    return Step(fax, effects)


def _delivered(fax: Fax, attempt: Attempt, report: Report, now: float) -> Step:
    fax = with_attempt(fax, closed(attempt, End.DELIVERED, now, report=report))
    if fax.final:
        return Step(fax, (perhaps_twice(fax, f"reported {fax.state}, then delivered"),))
    if fax.open_attempts:
        return Step(fax, (perhaps_twice(fax, "one call was delivered while another is open"),))
    return ended(fax, State.DELIVERED, now, (Reached(Proof.CALLED, attempt.from_number),))


def _failed(fax: Fax, attempt: Attempt, report: Report, now: float, rules: Rules) -> Step:
    # The answer to our question need not name a reason; a webhook that contradicted itself did.
    report = replace(report, reason=report.reason or attempt.reason)
    kind = reasons.lookup(report.reason).kind
    since = now if attempt.reasonless_at is None else attempt.reasonless_at
    if report.reason is None and report.asked and now < since + rules.reason_wait:
        # Rule 5: a polled failure without a reason waits for its webhook.
        fax = with_attempt(fax, replace(attempt, reasonless_at=since))
        return Step(replace(fax, due_at=since + rules.reason_wait) if fax.state in _POLLED else fax)
    if kind is Kind.CONTRADICTION and fax.state in _POLLED and not arrived(fax):
        if not report.asked:  # ask; only a second such answer counts
            return Step(with_attempt(replace(fax, due_at=now), replace(attempt, reason=report.reason)))
        fax, tell = held(fax, HeldFor.CONTRADICTION, report.reason or "")
        fax = with_attempt(fax, closed(attempt, End.FAILED, now, report=report))
        text = f"Fax {fax.id} is held: the carrier says that it failed with '{report.reason}'."
        return Step(fax, (*tell, Alert("fax_held", text)))
    fax = with_attempt(fax, closed(attempt, End.FAILED, now, report=report))
    if fax.final or fax.open_attempts:
        return Step(fax)
    if fax.held_for is HeldFor.RESTORED and not (fax.cancel_asked or arrived(fax)):
        return Step(fax)  # it may have been called again since, which only a person finds out
    return _after_failure(fax, attempt, report.reason, now, rules)


def _after_failure(fax: Fax, attempt: Attempt, reason: str | None, now: float, rules: Rules) -> Step:
    row = reasons.lookup(reason)
    if row.kind is Kind.CAPACITY:
        return requeue(fax, now, now, (Brake("pause", "account", row.name, Proof.CALLED),))
    if row.kind in {Kind.ACCOUNT, Kind.SENDER, Kind.SPEND}:
        scope = attempt.from_number if row.kind is Kind.SENDER else "account"
        again = until_midnight(now) if row.kind is Kind.SPEND else None
        brake = Brake("hold", scope, row.name, Proof.CALLED, again)
        return requeue(fax, now, now, (brake, brake_alert(brake)))
    # Other failures can come before a call: of the document, of the number, of the carrier's own making.
    placed = row.kind in RETRIED - {Kind.PROVIDER}
    called: tuple[Effect, ...] = (Reached(Proof.CALLED, attempt.from_number),) if placed else ()
    wait = wait_before_retry(fax, row, rules) if row.kind in RETRIED else None
    if wait is not None and (now + wait < fax.give_up_at or fax.cancel_asked):
        return requeue(fax, now + wait, now, called)
    return failed_for_good(fax, row.name, now, called + alert_if(row.alert, "call_refused", fax, row.name))


def _late(fax: Fax, attempt: Attempt, report: Report, now: float) -> Step:
    """Take a report about an attempt that had ended: rule 5's contradictions, else nothing."""
    if report.stage is Stage.DELIVERED and attempt.end is not End.DELIVERED:
        return _delivered(fax, attempt, report, now)
    if report.stage is Stage.FAILED and attempt.end is End.DELIVERED:
        return Step(fax, (perhaps_twice(fax, f"delivered, then reported failed ({report.reason})"),))
    return Step(fax)


# --- time ----------------------------------------------------------------------------------------------


def _time_passed(fax: Fax, event: TimePassed, now: float, rules: Rules) -> Step:
    del event
    if fax.final:
        return Step(fax)
    effects: list[Effect] = []
    uncertain = fax.open_attempts or fax.held_for is HeldFor.RESTORED
    if fax.state in {State.QUEUED, State.HELD} and not uncertain and now >= fax.give_up_at:
        return failed_for_good(fax, last_reason(fax), now, ())
    for attempt in fax.open_attempts:
        quiet = now - max(attempt.changed_at, attempt.started_at)
        waited_for = attempt.blocking or (fax.state is State.SENDING and attempt is fax.open_attempts[-1])
        if waited_for and quiet > stuck_limit(fax, rules) and fax.state in _POLLED:
            # Rule 4: given up as stuck. It frees the number and the channel, one cancel, and a person.
            cancel = attempt.carrier_id is not None and not attempt.cancel_asked
            fax = with_attempt(
                replace(fax, due_at=now), replace(attempt, blocking=False, slot=None, cancel_wanted=cancel)
            )
            effects.append(Alert("call_stuck", f"Fax {fax.id}: a call has not ended for {quiet:.0f} s."))
            if fax.state is State.SENDING:
                fax, tell = held(fax, HeldFor.STUCK, f"no change for {quiet:.0f} s")
                effects.extend(tell)
    if not fax.told_delayed and now >= fax.accepted_at + rules.delayed_after:
        fax = replace(fax, told_delayed=True)
        effects.append(Tell(Notice.DELAYED))
    return Step(fax, tuple(effects))


def _account_held(fax: Fax, event: AccountHeld, now: float, rules: Rules) -> Step:
    del event, rules
    if fax.state is State.HELD and fax.held_for is HeldFor.REFUSED:
        return Step(replace(fax, state=State.QUEUED, due_at=now, held_for=None, held_detail=""))
    if fax.state is State.QUEUED and not fax.told_delayed:
        return Step(replace(fax, told_delayed=True), (Tell(Notice.DELAYED),))
    return Step(fax)


def _set_aside(fax: Fax, event: SetAside, now: float, rules: Rules) -> Step:
    del now, rules
    # What only force calls again stays so.
    known = {event.why, HeldFor.CONTRADICTION, HeldFor.RESTORED}
    waits = fax.state is State.HELD and fax.held_for not in known
    if not waits and fax.state not in {State.QUEUED, State.SENDING, State.IN_DOUBT}:
        return Step(fax)
    fax, tell = held(fax, event.why, event.detail)
    return Step(fax, (*tell, Alert("fax_held", f"Fax {fax.id} is held: {event.detail}.")))


_DECISIONS: dict[type, Callable[..., Step]] = {
    Begun: _begun,
    Taken: _taken,
    Rejected: _rejected,
    NotTaken: _not_taken,
    Withdrawn: _withdrawn,
    Doubted: _doubted,
    Unanswered: _unanswered,
    Absent: _absent,
    Unprovable: _unprovable,
    CancelSent: _cancel_sent,
    Gone: _gone,
    Reported: _reported,
    TimePassed: _time_passed,
    AccountHeld: _account_held,
    SetAside: _set_aside,
    HoldAsked: fax_wishes.hold_asked,
    ReleaseAsked: fax_wishes.release_asked,
    CancelAsked: fax_wishes.cancel_asked,
    RetryAsked: fax_wishes.retry_asked,
}
