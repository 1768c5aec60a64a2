"""Faxes in every situation, made by the events that lead there, for the tests of what becomes of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Self, TypeVar

from gateway.fax import transition
from gateway.fax_steps import LOST_IN_A_ROW
from gateway.records import (
    Absent,
    AccountHeld,
    Attempt,
    Begun,
    Blame,
    CancelAsked,
    CancelSent,
    Doubted,
    Effect,
    Event,
    Fax,
    Gone,
    HeldFor,
    HoldAsked,
    Notice,
    NotTaken,
    Rejected,
    ReleaseAsked,
    Report,
    Reported,
    RetryAsked,
    Rules,
    SetAside,
    Stage,
    State,
    Taken,
    Tell,
    TimePassed,
    Unanswered,
    Unprovable,
    Withdrawn,
)

NOW = 1_772_452_800.0  # 2 March 2026, 12:00 UTC
HOUR = 3600.0
DAY = 24 * HOUR
NUMBER = "+13127367276"
FROM = "+13125550100"
APPLICATION = "2866012345678901234"
PAGES = 3
STUCK = HOUR + PAGES * 180.0  # rule 4: 1 h plus 3 min a page
RULES = Rules(
    waits={
        "busy": (180.0, 360.0, 720.0, 1200.0),
        "no_answer": (900.0, 1800.0, 3600.0),
        "line": (120.0, 600.0, 1800.0),
        "provider": (300.0, 900.0, 3600.0),
        "declined": (3600.0,),
    },
    max_calls=5,
    give_up_after=DAY,
    delayed_after=4 * HOUR,
    doubt_checks=(10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
    poll_first=120.0,
    poll_page=90.0,
)

EffectKind = TypeVar("EffectKind")
Maker = Callable[[Fax], Event]  # an event about a fax, mostly about its newest attempt


def queued_fax() -> Fax:
    """Return a fax that was just accepted."""
    return Fax(
        id="m1-1", mail_id="m1", number=NUMBER, pages=PAGES, state=State.QUEUED, due_at=NOW,
        accepted_at=NOW, give_up_at=NOW + RULES.give_up_after,
    )  # fmt: skip


def intent(fax: Fax, now: float) -> Attempt:
    """Return the attempt that a claim would add to the fax."""
    ordinal = len(fax.attempts) + 1
    return Attempt(
        id=f"a{ordinal}", ordinal=ordinal, started_at=now, lease_until=now + 300.0, from_number=FROM,
        connection_id=APPLICATION, quality="high", t38=True, slot=0,
    )  # fmt: skip


class Walk:
    """One fax on its way. Every step is a real transition; its effects and notices are kept."""

    def __init__(self, fax: Fax | None = None, now: float = NOW, rules: Rules = RULES) -> None:
        self.fax = fax or queued_fax()
        self.now = now
        self.rules = rules
        self.effects: tuple[Effect, ...] = ()  # of the newest step
        self.notices: list[Notice] = []  # of all steps

    def do(self, event: Event, after: float = 1.0) -> Self:
        """Let an event happen `after` seconds from the last one."""
        self.now += after
        step = transition(self.fax, event, self.now, self.rules)
        self.fax, self.effects = step.fax, step.effects
        self.notices += [effect.notice for effect in step.effects if isinstance(effect, Tell)]
        return self

    def make(self, maker: Maker, after: float = 1.0) -> Self:
        """Let the event that `maker` makes of the fax happen."""
        return self.do(maker(self.fax), after)

    def begin(self, after: float = 1.0, slot: int = 0) -> Self:
        """Claim the fax for a channel: the intent is written."""
        return self.do(Begun(replace(intent(self.fax, self.now + after), slot=slot)), after)

    def call(self, after: float = 1.0) -> Self:
        """Claim the fax, and the carrier takes it."""
        return self.begin(after).make(taken())

    def fail(self, reason: str | None, after: float = 60.0) -> Self:
        """Place a call that fails, as a webhook says."""
        return self.call().make(failed(reason), after)

    @property
    def last(self) -> Attempt:
        """The newest attempt."""
        return self.fax.attempts[-1]

    def effect(self, kind: type[EffectKind]) -> EffectKind | None:
        """Return the newest step's effect of that type."""
        return next((effect for effect in self.effects if isinstance(effect, kind)), None)


# --- events ------------------------------------------------------------------------------------------


def _id(fax: Fax, ordinal: int) -> str:
    return f"a{ordinal or len(fax.attempts)}"


def taken(ordinal: int = 0, carrier_id: str = "") -> Maker:
    """Make `Taken`; as below, ordinal 0 means the newest attempt."""
    return lambda fax: Taken(_id(fax, ordinal), carrier_id or f"c-{_id(fax, ordinal)}")


def rejected(blame: Blame, ordinal: int = 0, reason: str = "number_refused") -> Maker:
    """Make a refusal of the POST."""
    return lambda fax: Rejected(_id(fax, ordinal), blame, "HTTP 403 10010", reason)


def not_taken(retry_after: float | None = None, ordinal: int = 0) -> Maker:
    """Make the answer of a carrier that was not there, or had too much to do."""
    return lambda fax: NotTaken(_id(fax, ordinal), "HTTP 429", retry_after)


def withdrawn(wait: float = 900.0, ordinal: int = 0) -> Maker:
    """Make the outcome of a look that forbids the POST."""
    return lambda fax: Withdrawn(_id(fax, ordinal), "the last call is not known to have failed", wait)


def doubted(ordinal: int = 0) -> Maker:
    """Make the loss of the answer."""
    return lambda fax: Doubted(_id(fax, ordinal), "timeout")


def unanswered(ordinal: int = 0) -> Maker:
    """Make a doubt check without a verdict."""
    return lambda fax: Unanswered(_id(fax, ordinal))


def absent(ordinal: int = 0) -> Maker:
    """Make the proof of absence."""
    return lambda fax: Absent(_id(fax, ordinal))


def unprovable(ordinal: int = 0) -> Maker:
    """Make the end of a doubt without proof."""
    return lambda fax: Unprovable(_id(fax, ordinal), "2 faxes at the carrier fit it")


def cancel_sent(ordinal: int = 0) -> Maker:
    """Make the news that the carrier was asked to cancel."""
    return lambda fax: CancelSent(_id(fax, ordinal))


def gone(ordinal: int = 0) -> Maker:
    """Make the carrier's 404."""
    return lambda fax: Gone(_id(fax, ordinal))


def set_aside(why: HeldFor = HeldFor.RESTORED) -> Maker:
    """Make the decision that a person must look first."""
    return lambda _fax: SetAside(why, "the carrier has a fax to the number that nobody knows")


def said(
    stage: Stage,
    reason: str | None = None,
    *,
    asked: bool = False,
    ordinal: int = 0,
    pages: int | None = None,
) -> Maker:
    """Make a report: by webhook, or as the answer to our question."""
    return lambda fax: Reported(_id(fax, ordinal), Report(stage, asked, pages=pages, reason=reason))


def failed(reason: str | None, *, asked: bool = False, ordinal: int = 0) -> Maker:
    """Make the report of a failure."""
    return said(Stage.FAILED, reason, asked=asked, ordinal=ordinal)


def delivered(*, asked: bool = False, ordinal: int = 0) -> Maker:
    """Make the report of a delivery."""
    return said(Stage.DELIVERED, asked=asked, ordinal=ordinal, pages=PAGES)


def always(event: Event) -> Maker:
    """Make an event that is about the fax as a whole."""
    return lambda _fax: event


HOLD = always(HoldAsked())
RELEASE = always(ReleaseAsked())
CANCEL = always(CancelAsked())
RETRY = always(RetryAsked())
RETRY_TWICE = always(RetryAsked(even_if_twice=True))
TIME = always(TimePassed())
ACCOUNT_HELD = always(AccountHeld("HTTP 401 10009"))


def begun(fax: Fax) -> Event:
    """Make the next claim."""
    return Begun(intent(fax, NOW))


def about_attempts(ordinal: int) -> dict[str, Maker]:
    """Return an event of each kind and content that is about one attempt."""
    return {
        "taken": taken(ordinal),
        "taken under another id": taken(ordinal, "c-other"),
        **{f"rejected, {blame}": rejected(blame, ordinal) for blame in Blame},
        "not taken": not_taken(None, ordinal),
        "withdrawn": withdrawn(0.0, ordinal),
        "doubted": doubted(ordinal),
        "unanswered": unanswered(ordinal),
        "absent": absent(ordinal),
        "unprovable": unprovable(ordinal),
    }


def from_the_carrier(ordinal: int) -> dict[str, Maker]:
    """Return an event of each kind that needs the carrier's id: only a call can meet these."""
    reasons = (None, "user_busy", "receiver_decline", "destination_invalid", "user_channel_limit_exceeded",
               "account_disabled", "success")  # fmt: skip
    return {
        "cancel sent": cancel_sent(ordinal),
        "gone": gone(ordinal),
        "nothing new": said(Stage.UNKNOWN, asked=True, ordinal=ordinal),
        "dialled": said(Stage.DIALLED, ordinal=ordinal),
        "delivered": delivered(ordinal=ordinal),
        **{f"failed, {reason}": failed(reason, ordinal=ordinal) for reason in reasons},
        "polled failed": failed(None, asked=True, ordinal=ordinal),
        "polled failed, user_busy": failed("user_busy", asked=True, ordinal=ordinal),
        "polled failed, success": failed("success", asked=True, ordinal=ordinal),
    }


ABOUT_FAX: dict[str, Maker] = {
    "begun": begun,
    "time": TIME,
    "account held": ACCOUNT_HELD,
    "set aside": set_aside(),
    "hold": HOLD,
    "release": RELEASE,
    "cancel": CANCEL,
    "retry": RETRY,
    "retry even if twice": RETRY_TWICE,
}


# --- situations ----------------------------------------------------------------------------------------


def _ghost() -> Walk:
    """Let attempt 1, proved absent, turn up at the carrier after its retry has begun."""
    return Walk().begin().make(doubted()).make(absent()).begin().make(taken(1))


def lost(calls: int) -> Walk:
    """Let so many calls in a row be proved absent."""
    walk = Walk()
    for _ in range(calls):
        walk.begin().make(doubted()).make(absent())
    return walk


SITUATIONS: dict[str, Callable[[], Walk]] = {
    "queued": Walk,
    "queued after busy": lambda: Walk().fail("user_busy"),
    "queued after absence": lambda: Walk().begin().make(doubted()).make(absent()),
    "submitting": lambda: Walk().begin(),
    "submitting, cancel wished": lambda: Walk().begin().make(CANCEL),
    "submitting a retry": lambda: Walk().fail("user_busy").begin(),
    "submitting, first attempt found": _ghost,
    "in doubt": lambda: Walk().begin().make(doubted()),
    "in doubt, cancel wished": lambda: Walk().begin().make(doubted()).make(CANCEL),
    "in doubt, first attempt found": lambda: _ghost().make(doubted()),
    "sending": lambda: Walk().call(),
    "sending, cancel wished": lambda: Walk().call().make(CANCEL),
    "sending, cancel sent": lambda: Walk().call().make(CANCEL).make(cancel_sent()),
    "sending, first attempt found": lambda: _ghost().make(taken()),
    "held by the operator": lambda: Walk().fail("user_busy").make(HOLD),
    "held, refused": lambda: Walk().begin().make(rejected(Blame.SUSPECT)),
    "held, doubt": lambda: Walk().begin().make(doubted()).make(unprovable()),
    "held, stuck": lambda: Walk().call().make(TIME, STUCK + 1),
    "held, gone": lambda: Walk().call().make(gone()),
    "held, contradiction": lambda: Walk().call().make(failed("success", asked=True)),
    "delivered": lambda: Walk().call().make(delivered()),
    "failed": lambda: Walk().fail("destination_invalid"),
    "failed, given up": lambda: Walk().make(TIME, DAY),
    "held, harmful": lambda: Walk().begin().make(doubted()).make(set_aside(HeldFor.HARMFUL)),
    "held, restored": lambda: Walk().fail("user_busy").make(set_aside()),
    "held, call after call lost": lambda: lost(LOST_IN_A_ROW),
    "cancelled": lambda: Walk().fail("user_busy").make(CANCEL),
    "cancelled in doubt": lambda: Walk().begin().make(doubted()).make(unprovable()).make(CANCEL),
}


def at(situation: str) -> Walk:
    """Return a fax in a situation, with the effects that led there."""
    return SITUATIONS[situation]()


def older(fax: Fax, seconds: float) -> Fax:
    """Return the fax as if it had been accepted so much earlier."""
    return replace(fax, accepted_at=fax.accepted_at - seconds, give_up_at=fax.give_up_at - seconds)
