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
from dataclasses import dataclass, replace

from gateway import reasons
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
    Stage,
    State,
    Suspect,
    Taken,
    Tell,
    TimePassed,
    Unanswered,
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


class Misfit(ValueError):
    """The event does not fit the fax; the text is for an operator."""


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of one event. `fax` is the same object when nothing changed."""

    fax: Fax
    effects: tuple[Effect, ...] = ()


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
        return Step(fax, (_twice(fax, "one attempt has two ids at the carrier"),))
    known = replace(
        attempt, carrier_id=event.carrier_id, taken_at=now, stage=Stage.TAKEN, changed_at=now,
        open=True, end=None, ended_at=None, reason=None, cancel_wanted=fax.cancel_asked,
    )  # fmt: skip
    fax = _with(fax, known)
    if fax.final:
        return Step(fax, (_twice(fax, f"reported {fax.state}, then found at the carrier"),))
    # Rule 3: a closed doubt that turns up stops its retry; an alert, if that has begun.
    later = [other for other in fax.attempts if other.ordinal > attempt.ordinal]
    effects: tuple[Effect, ...] = ()
    if any(other.open or other.carrier_id is not None for other in later):
        effects = (_twice(fax, "an attempt thought absent was taken after all"),)
    if any(other.open for other in later):
        return Step(fax, effects)
    # A call found after a doubt may have ended long ago, and told us so in vain.
    ask_now = fax.cancel_asked or attempt.doubted_at is not None
    due_at = now if ask_now else now + first_poll(fax, rules)
    fax = replace(fax, state=State.SENDING, due_at=due_at, held_for=None, held_detail="")
    return Step(fax, (*effects, Reached(Proof.TAKEN, attempt.from_number)))


def _rejected(fax: Fax, event: Rejected, now: float, rules: Rules) -> Step:
    del rules
    attempt = fax.attempt(event.attempt_id)
    if not _answers(fax, attempt):
        return Step(fax)
    fax = _with(fax, _closed(attempt, End.REFUSED, now, reason=event.reason))
    match event.blame:
        case Blame.FAX:
            alert = reasons.lookup(event.reason).alert
            return _fail(fax, event.reason, now, _alerts(alert, "call_refused", fax, event.cause))
        case Blame.SUSPECT:
            onward = _requeue(fax, now, now)
            if onward.fax.state is not State.QUEUED:  # cancelled, or another of its calls decides
                return onward
            fax, tell = _hold(fax, HeldFor.REFUSED, event.cause)
            alerted = Alert("fax_held", f"Fax {fax.id} is held: the carrier refused it ({event.cause}).")
            return Step(fax, (*tell, alerted, Suspect(event.cause)))
    scope = attempt.from_number if event.blame is Blame.SENDER else "account"
    brake = Brake("hold", scope, event.cause, Proof.TAKEN)
    return _requeue(fax, now, now, (brake, _brake_alert(event.cause)))


def _not_taken(fax: Fax, event: NotTaken, now: float, rules: Rules) -> Step:
    del rules
    attempt = fax.attempt(event.attempt_id)
    if not _answers(fax, attempt):
        return Step(fax)
    fax = _with(fax, _closed(attempt, End.NOT_TAKEN, now))
    return _requeue(fax, now, now, (Brake("pause", "account", event.cause, Proof.TAKEN, event.retry_after),))


def _withdrawn(fax: Fax, event: Withdrawn, now: float, rules: Rules) -> Step:
    del rules
    attempt = fax.attempt(event.attempt_id)
    if not _answers(fax, attempt):
        return Step(fax)
    return _requeue(_with(fax, _closed(attempt, End.WITHDRAWN, now)), event.again_at, now)


def _doubted(fax: Fax, event: Doubted, now: float, rules: Rules) -> Step:
    attempt = fax.attempt(event.attempt_id)
    if not _answers(fax, attempt):
        return Step(fax)
    fax = _with(fax, replace(attempt, doubted_at=attempt.started_at))
    return Step(replace(fax, state=State.IN_DOUBT, due_at=next_check(attempt.started_at, now, rules)))


def _unanswered(fax: Fax, event: Unanswered, now: float, rules: Rules) -> Step:
    attempt = fax.attempt(event.attempt_id)
    if not _doubtful(fax, attempt):
        return Step(fax)
    return Step(replace(fax, due_at=next_check(attempt.doubted_at or attempt.started_at, now, rules)))


def _absent(fax: Fax, event: Absent, now: float, rules: Rules) -> Step:
    del rules
    attempt = fax.attempt(event.attempt_id)
    if not _doubtful(fax, attempt):
        return Step(fax)
    return _requeue(_with(fax, _closed(attempt, End.ABSENT, now)), now, now)


def _unprovable(fax: Fax, event: Unprovable, now: float, rules: Rules) -> Step:
    del now, rules
    attempt = fax.attempt(event.attempt_id)
    looked_again = fax.state is State.QUEUED and attempt.end is End.ABSENT  # just before the next POST
    if not (_doubtful(fax, attempt) or looked_again):
        return Step(fax)
    fax, tell = _hold(fax, HeldFor.DOUBT, event.cause)
    text = f"Fax {fax.id} is held: whether the carrier took it could not be proved ({event.cause})."
    return Step(fax, (*tell, Alert("fax_held", text)))


def _cancel_sent(fax: Fax, event: CancelSent, now: float, rules: Rules) -> Step:
    attempt = fax.attempt(event.attempt_id)
    fax = _with(fax, replace(attempt, cancel_wanted=False, cancel_asked=True))
    return Step(replace(fax, due_at=now + rules.poll_first) if fax.state is State.SENDING else fax)


def _gone(fax: Fax, event: Gone, now: float, rules: Rules) -> Step:
    attempt = fax.attempt(event.attempt_id)
    if fax.state is State.HELD:
        return Step(replace(fax, due_at=now + rules.poll_longest))
    looked_again = fax.state is State.QUEUED and attempt.end is End.FAILED  # just before the next POST
    if not (looked_again or (fax.state is State.SENDING and attempt.open)):
        return Step(fax)
    fax, tell = _hold(fax, HeldFor.GONE, "404")
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
        fax = _with(fax, attempt)
        if report.stage >= Stage.DIALLED:
            effects = (Reached(Proof.CALLED, attempt.from_number),)
    if report.asked and fax.state in _POLLED:
        fax = replace(fax, due_at=next_poll(attempt, now, rules))
    return Step(fax, effects)


def _delivered(fax: Fax, attempt: Attempt, report: Report, now: float) -> Step:
    fax = _with(fax, _closed(attempt, End.DELIVERED, now, report=report))
    if fax.final:
        return Step(fax, (_twice(fax, f"reported {fax.state}, then delivered"),))
    if fax.open_attempts:
        return Step(fax, (_twice(fax, "one call was delivered while another is open"),))
    return _end(fax, State.DELIVERED, now, (Reached(Proof.CALLED, attempt.from_number),))


def _failed(fax: Fax, attempt: Attempt, report: Report, now: float, rules: Rules) -> Step:
    # The answer to our question need not name a reason; a webhook that contradicted itself did.
    report = replace(report, reason=report.reason or attempt.reason)
    kind = reasons.lookup(report.reason).kind
    since = now if attempt.reasonless_at is None else attempt.reasonless_at
    if report.reason is None and report.asked and now < since + rules.reason_wait:
        # Rule 5: a polled failure without a reason waits for its webhook.
        fax = _with(fax, replace(attempt, reasonless_at=since))
        return Step(replace(fax, due_at=since + rules.reason_wait) if fax.state in _POLLED else fax)
    if kind is Kind.CONTRADICTION and fax.state in _POLLED and not _arrived(fax):
        if not report.asked:  # ask; only a second such answer counts
            return Step(_with(replace(fax, due_at=now), replace(attempt, reason=report.reason)))
        fax, tell = _hold(fax, HeldFor.CONTRADICTION, report.reason or "")
        fax = _with(fax, _closed(attempt, End.FAILED, now, report=report))
        text = f"Fax {fax.id} is held: the carrier says that it failed with '{report.reason}'."
        return Step(fax, (*tell, Alert("fax_held", text)))
    fax = _with(fax, _closed(attempt, End.FAILED, now, report=report))
    if fax.final or fax.open_attempts:
        return Step(fax)
    return _after_failure(fax, attempt, report.reason, now, rules)


def _after_failure(fax: Fax, attempt: Attempt, reason: str | None, now: float, rules: Rules) -> Step:
    row = reasons.lookup(reason)
    if row.kind is Kind.CAPACITY:
        return _requeue(fax, now, now, (Brake("pause", "account", row.name, Proof.CALLED),))
    if row.kind in {Kind.ACCOUNT, Kind.SENDER, Kind.SPEND}:
        scope = attempt.from_number if row.kind is Kind.SENDER else "account"
        again = until_midnight(now) if row.kind is Kind.SPEND else None
        return _requeue(
            fax, now, now, (Brake("hold", scope, row.name, Proof.CALLED, again), _brake_alert(row.name))
        )
    # Other failures can come before a call: of the document, of the number, of the carrier's own making.
    placed = row.kind in RETRIED - {Kind.PROVIDER}
    called: tuple[Effect, ...] = (Reached(Proof.CALLED, attempt.from_number),) if placed else ()
    wait = wait_before_retry(fax, row, rules) if row.kind in RETRIED else None
    if wait is not None and (now + wait < fax.give_up_at or fax.cancel_asked):
        return _requeue(fax, now + wait, now, called)
    return _fail(fax, row.name, now, called + _alerts(row.alert, "call_refused", fax, row.name))


def _late(fax: Fax, attempt: Attempt, report: Report, now: float) -> Step:
    """Take a report about an attempt that had ended: rule 5's contradictions, else nothing."""
    if report.stage is Stage.DELIVERED and attempt.end is not End.DELIVERED:
        return _delivered(fax, attempt, report, now)
    if report.stage is Stage.FAILED and attempt.end is End.DELIVERED:
        return Step(fax, (_twice(fax, f"delivered, then reported failed ({report.reason})"),))
    return Step(fax)


# --- time ----------------------------------------------------------------------------------------------


def _time_passed(fax: Fax, event: TimePassed, now: float, rules: Rules) -> Step:
    del event
    if fax.final:
        return Step(fax)
    effects: list[Effect] = []
    if fax.state in {State.QUEUED, State.HELD} and not fax.open_attempts and now >= fax.give_up_at:
        return _fail(fax, _last_reason(fax), now, ())
    for attempt in fax.open_attempts:
        quiet = now - max(attempt.changed_at, attempt.started_at)
        waited_for = attempt.blocking or (fax.state is State.SENDING and attempt is fax.open_attempts[-1])
        if waited_for and quiet > stuck_limit(fax, rules) and fax.state in _POLLED:
            # Rule 4: given up as stuck. It frees the number and the channel, one cancel, and a person.
            cancel = attempt.carrier_id is not None and not attempt.cancel_asked
            fax = _with(
                replace(fax, due_at=now), replace(attempt, blocking=False, slot=None, cancel_wanted=cancel)
            )
            effects.append(Alert("call_stuck", f"Fax {fax.id}: a call has not ended for {quiet:.0f} s."))
            if fax.state is State.SENDING:
                fax, tell = _hold(fax, HeldFor.STUCK, f"no change for {quiet:.0f} s")
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


# --- operators -----------------------------------------------------------------------------------------


def _hold_asked(fax: Fax, event: HoldAsked, now: float, rules: Rules) -> Step:
    del event, now, rules
    if fax.state is not State.QUEUED:
        raise Misfit(f"fax {fax.id} is {fax.state}; only a queued fax can be held (cancel stops a call)")
    fax, tell = _hold(fax, HeldFor.OPERATOR, "")
    return Step(fax, tell)


def _release_asked(fax: Fax, event: ReleaseAsked, now: float, rules: Rules) -> Step:
    del event, rules
    if fax.state is not State.HELD:
        raise Misfit(f"fax {fax.id} is {fax.state}, not held")
    free = replace(fax, state=State.QUEUED, due_at=now, held_for=None, held_detail="")
    if not fax.open_attempts:
        if fax.held_for is HeldFor.CONTRADICTION:
            raise Misfit(f"fax {fax.id} may have been sent already; retry --even-if-twice, or cancel")
        return Step(free)
    attempt = fax.open_attempts[-1]
    if attempt.carrier_id is None:  # ask the carrier about the doubt all over again
        fax = _with(free, replace(attempt, doubted_at=now))
        return Step(replace(fax, state=State.IN_DOUBT))
    return Step(replace(_with(free, replace(attempt, changed_at=now)), state=State.SENDING))


def _cancel_asked(fax: Fax, event: CancelAsked, now: float, rules: Rules) -> Step:
    del event, rules
    if fax.final:
        raise Misfit(f"fax {fax.id} has ended: {fax.state}")
    fax = replace(fax, cancel_asked=True)
    if fax.state in {State.QUEUED, State.HELD}:  # a held fax with an open call: the operator's last word
        return _end(fax, State.CANCELLED, now, ())
    for attempt in fax.open_attempts:
        if attempt.carrier_id is not None:
            fax = _with(fax, replace(attempt, cancel_wanted=not attempt.cancel_asked))
    return Step(replace(fax, due_at=now) if fax.state is State.SENDING else fax)


def _retry_asked(fax: Fax, event: RetryAsked, now: float, rules: Rules) -> Step:
    del rules
    if fax.final:
        raise Misfit(f"fax {fax.id} has ended: {fax.state}")
    if fax.state in {State.SUBMITTING, State.SENDING}:
        raise Misfit(f"fax {fax.id} is {fax.state}: its call is open")
    uncertain = fax.open_attempts or fax.held_for is HeldFor.CONTRADICTION
    if uncertain and not event.even_if_twice:
        raise Misfit(f"fax {fax.id} may have been sent already; --even-if-twice calls all the same")
    for attempt in fax.attempts if event.even_if_twice else ():
        if attempt.open:
            fax = _with(fax, _closed(attempt, End.OVERRULED, now))
        elif attempt.end in {End.FAILED, End.ABSENT}:  # the look before the next call passes it over
            fax = _with(fax, replace(attempt, end=End.OVERRULED))
    return _requeue(replace(fax, cancel_asked=False), now, now)


# --- parts that the decisions share ----------------------------------------------------------------------


def _answers(fax: Fax, attempt: Attempt) -> bool:
    """Whether an answer to the POST still may move the fax: not after the lease was taken away."""
    return fax.state is State.SUBMITTING and fax.last is not None and fax.last.id == attempt.id


def _doubtful(fax: Fax, attempt: Attempt) -> bool:
    """Whether a verdict on the attempt is still wanted: not after another gateway brought one."""
    return fax.state is State.IN_DOUBT and attempt.open and attempt.carrier_id is None


def _arrived(fax: Fax) -> bool:
    return any(attempt.end is End.DELIVERED for attempt in fax.attempts)


def _with(fax: Fax, changed: Attempt) -> Fax:
    attempts = tuple(changed if attempt.id == changed.id else attempt for attempt in fax.attempts)
    return replace(fax, attempts=attempts)


def _closed(
    attempt: Attempt, end: End, now: float, *, reason: str | None = None, report: Report | None = None
) -> Attempt:
    attempt = replace(
        attempt, blocking=False, slot=None, open=False, end=end, ended_at=now, cancel_wanted=False
    )
    if report is None:
        return replace(attempt, reason=reason)
    return replace(
        attempt, stage=report.stage, changed_at=now, reason=report.reason, pages=report.pages,
        internal_reason=report.internal_reason, duration=report.duration,
    )  # fmt: skip


def _requeue(fax: Fax, due_at: float, now: float, effects: tuple[Effect, ...] = ()) -> Step:
    """Back to the queue, unless another call is open or has delivered, or an operator cancelled."""
    if fax.open_attempts:  # found at the carrier while its retry was under way: its end decides
        return Step(replace(fax, state=State.SENDING, due_at=now, held_for=None, held_detail=""), effects)
    if fax.cancel_asked or _arrived(fax):
        return _end(fax, State.CANCELLED, now, effects)
    return Step(replace(fax, state=State.QUEUED, due_at=due_at, held_for=None, held_detail=""), effects)


def _fail(fax: Fax, reason: str, now: float, effects: tuple[Effect, ...]) -> Step:
    if fax.open_attempts:
        return _requeue(fax, now, now, effects)
    return _end(fax, State.CANCELLED if fax.cancel_asked else State.FAILED, now, effects, reason)


def _end(fax: Fax, state: State, now: float, effects: tuple[Effect, ...], reason: str | None = None) -> Step:
    """End the fax and tell its sender; whatever else was wanted, a delivered call wins."""
    if _arrived(fax):
        state, reason = State.DELIVERED, None
    for attempt in fax.open_attempts:  # an operator's last word: nobody else waits for this call
        fax = _with(fax, replace(attempt, blocking=False, slot=None))
    fax = replace(fax, state=state, ended_at=now, due_at=now, held_for=None, held_detail="", reason=reason)
    return Step(fax, (*effects, Tell(Notice(state.value))))


def _hold(fax: Fax, cause: HeldFor, detail: str) -> tuple[Fax, tuple[Effect, ...]]:
    tell: tuple[Effect, ...] = () if fax.told_delayed else (Tell(Notice.DELAYED),)
    return replace(fax, state=State.HELD, held_for=cause, held_detail=detail, told_delayed=True), tell


def _twice(fax: Fax, what: str) -> Alert:
    return Alert("contradiction", f"Fax {fax.id}: {what}. The recipient may hold it twice, or not at all.")


def _brake_alert(cause: str) -> Alert:
    return Alert("account_held", f"No faxes go out until the carrier accepts one again: {cause}.")


def _alerts(wanted: bool, cause: str, fax: Fax, why: str) -> tuple[Effect, ...]:  # noqa: FBT001 -- read from a row
    return (Alert(cause, f"Fax {fax.id} failed in a way that concerns the set-up: {why}."),) if wanted else ()


def _last_reason(fax: Fax) -> str:
    for call in reversed(fax.calls):
        if call.stage is Stage.FAILED:
            return reasons.lookup(call.reason).name
    return "gave_up_waiting"


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
    HoldAsked: _hold_asked,
    ReleaseAsked: _release_asked,
    CancelAsked: _cancel_asked,
    RetryAsked: _retry_asked,
}
