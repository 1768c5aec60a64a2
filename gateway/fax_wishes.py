"""What operators wish of a fax, and what becomes of it.

In charge of: `hold`, `release`, `cancel` and `retry`, as decisions like all others of `fax.transition`.

Promises: a wish never makes a second call while the first may be open, unless it was said by force.

Fails: `Misfit`, with the text for the operator.
"""

from dataclasses import replace

from gateway.fax_steps import (
    Misfit,
    Step,
    closed,
    ended,
    held,
    requeue,
    with_attempt,
)
from gateway.records import (
    CancelAsked,
    End,
    Fax,
    HeldFor,
    HoldAsked,
    ReleaseAsked,
    RetryAsked,
    Rules,
    State,
)


def hold_asked(fax: Fax, event: HoldAsked, now: float, rules: Rules) -> Step:
    """Hold a fax that waits."""
    del event, now, rules
    if fax.state is not State.QUEUED:
        raise Misfit(f"fax {fax.id} is {fax.state}; only a queued fax can be held (cancel stops a call)")
    fax, tell = held(fax, HeldFor.OPERATOR, "")
    return Step(fax, tell)


def release_asked(fax: Fax, event: ReleaseAsked, now: float, rules: Rules) -> Step:
    """Let a held fax go on: to the queue, or to the question that was open."""
    del event
    if fax.state is not State.HELD:
        raise Misfit(f"fax {fax.id} is {fax.state}, not held")
    fax = _given_time(fax, now, rules)
    free = replace(fax, state=State.QUEUED, due_at=now, held_for=None, held_detail="")
    if not fax.open_attempts:
        if fax.held_for is HeldFor.CONTRADICTION:
            raise Misfit(f"fax {fax.id} may have been sent already; retry --even-if-twice, or cancel")
        return Step(free)
    attempt = fax.open_attempts[-1]
    if attempt.carrier_id is None:  # ask the carrier about the doubt all over again
        fax = with_attempt(free, replace(attempt, doubted_at=now))
        return Step(replace(fax, state=State.IN_DOUBT))
    return Step(replace(with_attempt(free, replace(attempt, changed_at=now)), state=State.SENDING))


def cancel_asked(fax: Fax, event: CancelAsked, now: float, rules: Rules) -> Step:
    """End a fax that waits; for an open call, note the wish and let the outcome decide."""
    del event, rules
    if fax.final:
        raise Misfit(f"fax {fax.id} has ended: {fax.state}")
    fax = replace(fax, cancel_asked=True)
    if fax.state in {State.QUEUED, State.HELD}:  # a held fax with an open call: the operator's last word
        return ended(fax, State.CANCELLED, now, ())
    for attempt in fax.open_attempts:
        if attempt.carrier_id is not None:
            fax = with_attempt(fax, replace(attempt, cancel_wanted=not attempt.cancel_asked))
    return Step(replace(fax, due_at=now) if fax.state is State.SENDING else fax)


def retry_asked(fax: Fax, event: RetryAsked, now: float, rules: Rules) -> Step:
    """Call a waiting fax now; an uncertain one only by force."""
    if fax.final:
        raise Misfit(f"fax {fax.id} has ended: {fax.state}")
    if fax.state in {State.SUBMITTING, State.SENDING}:
        raise Misfit(f"fax {fax.id} is {fax.state}: its call is open")
    uncertain = fax.open_attempts or fax.held_for in {HeldFor.CONTRADICTION, HeldFor.RESTORED}
    if uncertain and not event.even_if_twice:
        raise Misfit(f"fax {fax.id} may have been sent already; --even-if-twice calls all the same")
    for attempt in fax.attempts if event.even_if_twice else ():
        if attempt.open:
            fax = with_attempt(fax, closed(attempt, End.OVERRULED, now))
        elif attempt.end in {End.FAILED, End.ABSENT}:  # the look before the next call passes it over
            fax = with_attempt(fax, replace(attempt, end=End.OVERRULED))
    return requeue(replace(_given_time(fax, now, rules), cancel_asked=False), now, now)


def _given_time(fax: Fax, now: float, rules: Rules) -> Fax:
    """Give a fax that an operator sends on past its deadline another one, or it would end at once."""
    return replace(fax, give_up_at=now + rules.give_up_after) if now >= fax.give_up_at else fax
