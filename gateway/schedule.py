"""When a fax is due next, and with which settings it is called.

In charge of: the waits before a retry, the polls of an open call, the checks of a doubt, the limit after
which a call counts as stuck, and what the next call does differently after a protocol failure.

Promises: pure functions of the fax, the time and the rules; nothing here changes a state.

Fails: never.
"""

from datetime import UTC, datetime, timedelta

from gateway import reasons
from gateway.reasons import Adjust, Kind
from gateway.records import Attempt, Fax, Rules, Stage

RETRIED = frozenset({Kind.BUSY, Kind.NO_ANSWER, Kind.LINE, Kind.PROVIDER, Kind.DECLINED})
_NO_CALL = frozenset({Kind.CAPACITY, Kind.ACCOUNT, Kind.SENDER, Kind.SPEND})
_AFTER_MIDNIGHT = 300.0  # the carrier's day turns at 00:00 UTC; not every clock of its does


def wait_before_retry(fax: Fax, row: reasons.Reason, rules: Rules) -> float | None:
    """Return the seconds before the next call, None when there is none.

    A reason's own cap cuts the list of its kind; `max_calls` counts every kind but those that never
    became calls.
    """
    failures = _failures(fax)
    of_kind = sum(1 for failure in failures if failure.kind is row.kind)
    of_reason = sum(1 for failure in failures if failure.name == row.name)
    waits = rules.waits[row.kind.value]
    if of_kind > len(waits) or len(failures) >= rules.max_calls:
        return None
    if row.cap is not None and of_reason > row.cap:
        return None
    return waits[of_kind - 1]


def next_settings(fax: Fax, quality: str, *, t38: bool) -> tuple[str, bool]:
    """Say with which quality and T.38 setting to place the next call, from how the earlier ones failed.

    The plan is the carrier's help centre's: another mode after a protocol failure, robust ones at last.
    """
    adjusts = [failure.adjust for failure in _failures(fax)]
    for adjust in adjusts:
        match adjust:
            case Adjust.WITHOUT_T38:
                t38 = False
            case Adjust.FLIP_T38:
                t38 = not t38
    if len(adjusts) > 1 and Adjust.ROBUST in adjusts:  # what follows is the third call or a later one
        quality, t38 = "normal", not t38
    return quality, t38


def _failures(fax: Fax) -> list[reasons.Reason]:
    """Return how the calls placed so far failed; what the account or its limits refused was no call."""
    ends = [reasons.lookup(attempt.reason) for attempt in fax.attempts if attempt.stage is Stage.FAILED]
    return [end for end in ends if end.kind not in _NO_CALL]


def first_poll(fax: Fax, rules: Rules) -> float:
    """Return the seconds from acceptance to the first question: transmission takes over a minute a page."""
    return rules.poll_first + rules.poll_page * fax.pages


def next_poll(attempt: Attempt, now: float, rules: Rules) -> float:
    """Ask again after half the time that the call has taken so far, within the configured bounds."""
    age = now - (attempt.taken_at or attempt.started_at)
    return now + min(rules.poll_longest, max(rules.poll_first, age / 2))


def next_check(counted_from: float, due_at: float, now: float, rules: Rules) -> float:
    """Return when the next doubt check is due, `due_at` being when the fax was to be looked at last.

    The last check repeats, soon at first, then ever less often, until there is a verdict. If nobody looked
    for longer than the longest wait, that was an outage, which may not be quite over: again soon.
    """
    checks = rules.doubt_checks
    for wait in checks:
        if counted_from + wait > now:
            return counted_from + wait
    since_last = 0.0 if now - due_at > checks[-1] else now - (counted_from + checks[-1])
    return now + min(checks[-1], max(checks[0], since_last / 2))


def last_check(attempt: Attempt, now: float, rules: Rules) -> bool:
    """Whether the doubt check made now is the last: the one that must bring a verdict."""
    return now >= (attempt.doubted_at or attempt.started_at) + rules.doubt_checks[-1]


def stuck_limit(fax: Fax, rules: Rules) -> float:
    """Seconds without a change after which a call counts as stuck (rule 4)."""
    return rules.stuck_after + rules.stuck_page * fax.pages


def until_midnight(now: float) -> float:
    """Return the seconds until the carrier's daily spend limit starts anew, 00:00 UTC and a little."""
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return (today + timedelta(days=1)).timestamp() + _AFTER_MIDNIGHT - now
