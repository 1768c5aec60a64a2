"""The parts that the decisions about a fax share.

In charge of: what it takes to close an attempt, to queue, hold or end a fax; `Step`, the outcome of one
event, and `Misfit`.

Promises: whatever else was wanted, a delivered call wins; no fax goes back to the queue while a call is open.

Fails: never.
"""

from dataclasses import dataclass, replace
from itertools import takewhile

from gateway import reasons
from gateway.records import (
    Alert,
    Attempt,
    Brake,
    Effect,
    End,
    Fax,
    HeldFor,
    Notice,
    Report,
    Stage,
    State,
    Tell,
)

LOST_IN_A_ROW = 5
"""Calls that were proved absent, one after the other, until a person is asked."""

APART = 10.0
"""Seconds between calls that come back after they were lost together, and not for the first time."""


class Misfit(ValueError):
    """The event does not fit the fax; the text is for an operator."""


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of one event. `fax` is the same object when nothing changed."""

    fax: Fax
    effects: tuple[Effect, ...] = ()


def answers(fax: Fax, attempt: Attempt) -> bool:
    """Whether an answer to the POST still may move the fax: not after the lease was taken away."""
    return fax.state is State.SUBMITTING and fax.last is not None and fax.last.id == attempt.id


def doubtful(fax: Fax, attempt: Attempt) -> bool:
    """Whether a verdict on the attempt is still wanted: not after another gateway brought one."""
    return fax.state is State.IN_DOUBT and attempt.open and attempt.carrier_id is None


def arrived(fax: Fax) -> bool:
    """Whether one of the calls has delivered."""
    return any(attempt.end is End.DELIVERED for attempt in fax.attempts)


def never_arrives(fax: Fax) -> bool:
    """Whether the newest calls were all lost on their way, as when the gateway falls over each of them."""
    return _lost_in_a_row(fax) >= LOST_IN_A_ROW


def wait_after_loss(fax: Fax, lost: Attempt) -> float:
    """Return the seconds after which a fax may be called again whose newest call, `lost`, did not arrive.

    Calls that were under way together were lost together, whichever of them the gateway fell over, and would
    be again. Each had a channel of its own.
    """
    return APART * (lost.slot or 0) if _lost_in_a_row(fax) > 1 else 0.0


def _lost_in_a_row(fax: Fax) -> int:
    return len(list(takewhile(lambda attempt: attempt.end is End.ABSENT, reversed(fax.attempts))))


def with_attempt(fax: Fax, changed: Attempt) -> Fax:
    """Return the fax with one attempt changed."""
    attempts = tuple(changed if attempt.id == changed.id else attempt for attempt in fax.attempts)
    return replace(fax, attempts=attempts)


def closed(
    attempt: Attempt, end: End, now: float, *, reason: str | None = None, report: Report | None = None
) -> Attempt:
    """Return the attempt as it ended."""
    attempt = replace(
        attempt, blocking=False, slot=None, open=False, end=end, ended_at=now, cancel_wanted=False
    )
    if report is None:
        return replace(attempt, reason=reason)
    return replace(
        attempt, stage=report.stage, changed_at=now, reason=report.reason, pages=report.pages,
        internal_reason=report.internal_reason, duration=report.duration,
    )  # fmt: skip


def requeue(fax: Fax, due_at: float, now: float, effects: tuple[Effect, ...] = ()) -> Step:
    """Back to the queue, unless another call is open or has delivered, or an operator cancelled."""
    if fax.open_attempts:  # found at the carrier while its retry was under way: its end decides
        return Step(replace(fax, state=State.SENDING, due_at=now, held_for=None, held_detail=""), effects)
    if fax.cancel_asked or arrived(fax):
        return ended(fax, State.CANCELLED, now, effects)
    return Step(replace(fax, state=State.QUEUED, due_at=due_at, held_for=None, held_detail=""), effects)


def failed_for_good(fax: Fax, reason: str, now: float, effects: tuple[Effect, ...]) -> Step:
    """End the fax as failed, unless another call is still open."""
    if fax.open_attempts:
        return requeue(fax, now, now, effects)
    return ended(fax, State.CANCELLED if fax.cancel_asked else State.FAILED, now, effects, reason)


def ended(fax: Fax, state: State, now: float, effects: tuple[Effect, ...], reason: str | None = None) -> Step:
    """End the fax and tell its sender; whatever else was wanted, a delivered call wins."""
    if arrived(fax):
        state, reason = State.DELIVERED, None
    for attempt in fax.open_attempts:  # an operator's last word: nobody else waits for this call
        fax = with_attempt(fax, replace(attempt, blocking=False, slot=None))
    fax = replace(fax, state=state, ended_at=now, due_at=now, held_for=None, held_detail="", reason=reason)
    return Step(fax, (*effects, Tell(Notice(state.value))))


def held(fax: Fax, cause: HeldFor, detail: str) -> tuple[Fax, tuple[Effect, ...]]:
    """Hold the fax for a person; the sender is told once."""
    tell: tuple[Effect, ...] = () if fax.told_delayed else (Tell(Notice.DELAYED),)
    return replace(fax, state=State.HELD, held_for=cause, held_detail=detail, told_delayed=True), tell


def perhaps_twice(fax: Fax, what: str) -> Alert:
    """Return the alert about a contradiction."""
    return Alert("contradiction", f"Fax {fax.id}: {what}. The recipient may hold it twice, or not at all.")


def brake_alert(brake: Brake) -> Alert:
    """Return the alert about an account, or one of its numbers, that cannot send."""
    where = "" if brake.scope == "account" else f" from {brake.scope}"
    text = f"No faxes go out{where} until the carrier accepts one{where} again: {brake.cause}."
    return Alert("account_held", text)


def alert_if(wanted: bool, cause: str, fax: Fax, why: str) -> tuple[Effect, ...]:  # noqa: FBT001 -- read from a row
    """Return an alert about the set-up, or nothing."""
    return (Alert(cause, f"Fax {fax.id} failed in a way that concerns the set-up: {why}."),) if wanted else ()


def last_reason(fax: Fax) -> str:
    """Return why the last call failed, or that there was none."""
    for attempt in reversed(fax.attempts):
        if attempt.reason is not None and (attempt.stage is Stage.FAILED or attempt.end is End.REFUSED):
            return reasons.lookup(attempt.reason).name
    return "gave_up_waiting"
