"""What a fax is, and everything that can happen to it.

In charge of: the vocabulary that travels between the modules: a fax with its attempts, the events
that reach it, the effects that follow. Values only; what becomes of a fax is decided in `fax`.

Promises: every record is frozen, so nobody changes a fax but by `fax.transition`. All times are
seconds since 1970, UTC. Numbers are E.164 and left out of every `repr`.

Fails: never; there is no logic here beyond reading one's own fields.
"""

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum


class State(StrEnum):
    """Where a fax is. The drawing in docs/states.md shows the ways between them."""

    QUEUED = "queued"  # waits for `due_at`, then is called
    SUBMITTING = "submitting"  # the intent to call is on the disk, the carrier's answer is not
    SENDING = "sending"  # the carrier has it under an id; `due_at` is the next question to it
    IN_DOUBT = "in_doubt"  # the answer to our POST is missing; `due_at` is the next doubt check
    HELD = "held"  # an operator must act on this fax
    DELIVERED = "delivered"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({State.DELIVERED, State.FAILED, State.CANCELLED})


class HeldFor(StrEnum):
    """Why one fax is held; `show` and the alert explain it."""

    OPERATOR = "operator"  # somebody said `hold`
    REFUSED = "refused"  # the carrier refused in a way that may concern the whole account
    DOUBT = "doubt"  # it could not be proved whether the carrier took it
    STUCK = "stuck"  # the call never ended
    GONE = "gone"  # the carrier no longer knows a fax that it took
    CONTRADICTION = "contradiction"  # the carrier says that it failed with success
    HARMFUL = "harmful"  # the gateway came to an end each time it worked on it
    RESTORED = "restored"  # the carrier has faxes to the number that the restored database does not know


class End(StrEnum):
    """How an attempt ended."""

    DELIVERED = "delivered"
    FAILED = "failed"
    REFUSED = "refused"  # the carrier refused the POST: no call
    NOT_TAKEN = "not_taken"  # certainly not taken: no connection, 429
    WITHDRAWN = "withdrawn"  # never posted: the look before it found a reason not to
    ABSENT = "absent"  # in doubt, then proved absent from the carrier's list
    OVERRULED = "overruled"  # an operator closed the doubt by `retry --even-if-twice`


class Stage(IntEnum):
    """How far the carrier is, in ranks: a report of a lower rank than known changes nothing."""

    UNKNOWN = 0
    TAKEN = 1
    CONVERTED = 2
    DIALLED = 3
    SENDING = 4
    DELIVERED = 5
    FAILED = 6


@dataclass(frozen=True, slots=True)
class Attempt:
    """One POST to the carrier and the call that came of it.

    `ordinal` counts up within the fax and is the fencing number of the claim that made the attempt.
    `blocking` keeps every other fax from calling the number and occupies `slot`, one of the channels.
    `open` (doubt not closed, or end not known) forbids this fax another call.
    """

    id: str
    ordinal: int
    started_at: float
    lease_until: float
    from_number: str = field(repr=False)
    connection_id: str
    quality: str
    t38: bool
    slot: int | None
    carrier_id: str | None = None
    taken_at: float | None = None
    stage: Stage = Stage.UNKNOWN
    changed_at: float = 0.0  # when the carrier last said something new
    doubted_at: float | None = None  # what the doubt checks are counted from
    reasonless_at: float | None = None  # first heard of a failure without its reason
    cancel_wanted: bool = False  # the carrier shall be asked to cancel
    cancel_asked: bool = False  # it was
    blocking: bool = True
    open: bool = True
    end: End | None = None
    ended_at: float | None = None
    reason: str | None = None
    internal_reason: str | None = None
    pages: int | None = None
    duration: int | None = None  # seconds


@dataclass(frozen=True, slots=True)
class Fax:
    """One document on its way to one number."""

    id: str
    mail_id: str
    number: str = field(repr=False)
    pages: int
    state: State
    due_at: float
    accepted_at: float
    give_up_at: float
    recipient: str = field(default="", repr=False)  # as the sender wrote it, for the report
    renews: str | None = None  # the ended fax that an operator sent again as this one
    version: int = 0  # counts the changes: the compare-and-set of every writer
    held_for: HeldFor | None = None
    held_detail: str = ""
    told_delayed: bool = False  # the one "still trying" notice was queued
    cancel_asked: bool = False  # the operator's wish
    ended_at: float | None = None
    reason: str | None = None  # why it failed: a name in `reasons`
    attempts: tuple[Attempt, ...] = ()

    @property
    def last(self) -> Attempt | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def open_attempts(self) -> tuple[Attempt, ...]:
        """Attempts whose fate is not known."""
        return tuple(attempt for attempt in self.attempts if attempt.open)

    @property
    def calls(self) -> tuple[Attempt, ...]:
        """Attempts that the carrier took: the only ones that count."""
        return tuple(attempt for attempt in self.attempts if attempt.carrier_id is not None)

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.state in FINAL

    def attempt(self, attempt_id: str) -> Attempt:
        """Return the attempt of that id; KeyError when it is another fax's."""
        for attempt in self.attempts:
            if attempt.id == attempt_id:
                return attempt
        raise KeyError(attempt_id)


@dataclass(frozen=True, slots=True)
class Report:
    """What the carrier said about one attempt, by webhook or when asked."""

    stage: Stage
    asked: bool  # True: the answer to our question; False: a webhook
    pages: int | None = None
    duration: int | None = None
    reason: str | None = None
    internal_reason: str | None = None


# --- events: from our own code -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begun:
    """A gateway claimed the fax and is about to call: the intent."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Taken:
    """The carrier took an attempt: its 2xx, or what a doubt check or a late event found."""

    attempt_id: str
    carrier_id: str


class Blame(StrEnum):
    """Whom a refusal of the carrier concerns."""

    FAX = "fax"  # this fax will never work
    ACCOUNT = "account"  # nothing works until somebody acts
    SENDER = "sender"  # nothing from this `from` number
    SUSPECT = "suspect"  # this fax, and the account once a second number meets the same


@dataclass(frozen=True, slots=True)
class Rejected:
    """The carrier answered the POST with a refusal: certainly not taken."""

    attempt_id: str
    blame: Blame
    cause: str  # short, stable: "HTTP 401 10009"
    reason: str  # a name in `reasons`, for the sender


@dataclass(frozen=True, slots=True)
class NotTaken:
    """The POST was certainly not taken, and a later one may be: no connection, 429."""

    attempt_id: str
    cause: str
    retry_after: float | None = None  # seconds, when the carrier named them


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The look just before a POST found that it must not be made now."""

    attempt_id: str
    cause: str
    wait: float  # seconds until the next try


@dataclass(frozen=True, slots=True)
class Doubted:
    """The answer to the POST is missing, or the lease of the claim ran out."""

    attempt_id: str
    cause: str


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A doubt check without a verdict."""

    attempt_id: str


@dataclass(frozen=True, slots=True)
class Absent:
    """The last doubt check proved that the carrier did not take the attempt."""

    attempt_id: str


@dataclass(frozen=True, slots=True)
class Unprovable:
    """The last doubt check found several candidates, or no provable answer."""

    attempt_id: str
    cause: str


@dataclass(frozen=True, slots=True)
class CancelSent:
    """The carrier was asked to cancel the call."""

    attempt_id: str


@dataclass(frozen=True, slots=True)
class Gone:
    """The carrier does not know a fax that it had taken (404)."""

    attempt_id: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The caretaker's look: deadlines, stuck calls, notices that are due."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """Working on it goes on only after a person looked: it does harm, or may have been sent already."""

    why: HeldFor
    detail: str


@dataclass(frozen=True, slots=True)
class AccountHeld:
    """The whole account waits: the sender is told once, and a suspect goes back to the queue."""

    cause: str


# --- events: from outside ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reported:
    """The carrier spoke about an attempt."""

    attempt_id: str
    report: Report


@dataclass(frozen=True, slots=True)
class HoldAsked:
    """An operator said `hold`."""


@dataclass(frozen=True, slots=True)
class ReleaseAsked:
    """An operator said `release`."""


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """An operator said `cancel`."""


@dataclass(frozen=True, slots=True)
class RetryAsked:
    """An operator said `retry` of a fax that has not ended."""

    even_if_twice: bool = False


OwnEvent = (
    Begun | Taken | Rejected | NotTaken | Withdrawn | Doubted | Unanswered | Absent | Unprovable
    | CancelSent | Gone | TimePassed | AccountHeld | SetAside
)  # fmt: skip
OperatorEvent = HoldAsked | ReleaseAsked | CancelAsked | RetryAsked
Event = OwnEvent | Reported | OperatorEvent


# --- effects ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReceivedMail:
    """What is kept of the mail that a fax came in, for the reply."""

    id: str
    sender: str = field(repr=False)  # the envelope's: where the reply goes
    received_at: float
    message_id: str | None = field(default=None, repr=False)  # with its angle brackets
    references: str = field(default="", repr=False)  # ids with angle brackets, by blanks
    subject: str = field(default="", repr=False)
    original_headers: bytes = field(default=b"", repr=False)  # RFC 5322 header block, for the report
    document_id: str | None = None


class Notice(StrEnum):
    """The mails a sender can get about one fax: at most one `DELAYED`, exactly one of the others."""

    DELAYED = "delayed"
    DELIVERED = "delivered"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Tell:
    """Queue a notice to the sender."""

    notice: Notice


@dataclass(frozen=True, slots=True)
class Alert:
    """Tell the postmaster, once for each cause and day."""

    cause: str  # closed set: the key of the day's mail and of the metric
    text: str


class Proof(IntEnum):
    """What a probe must reach before a brake comes off."""

    TAKEN = 1  # the carrier took a fax
    CALLED = 2  # a call was placed and not refused by the account


@dataclass(frozen=True, slots=True)
class Brake:
    """Stop the queue, or one `from` number, until a probe gets through.

    `kind` is "pause" (1 to 15 min apart) or "hold" (5 min to 1 h apart); `again_after` overrides the
    first wait (Retry-After, midnight UTC).
    """

    kind: str
    scope: str  # "account", or the `from` number
    cause: str
    proof: Proof
    again_after: float | None = None


@dataclass(frozen=True, slots=True)
class Suspect:
    """Put a brake on the account if another number already met the same refusal."""

    cause: str


@dataclass(frozen=True, slots=True)
class Unposted:
    """No call was made after all: if it was to be a brake's probe, another fax is, at once."""

    begun: float


@dataclass(frozen=True, slots=True)
class Reached:
    """The carrier let something through: brakes that asked for this proof come off."""

    proof: Proof
    from_number: str = field(repr=False)


Effect = Tell | Alert | Brake | Suspect | Unposted | Reached


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """One mail to be handed to the relay: a notice, an alert, or a mail forwarded to the postmaster.

    A notice has `notice`, `fax` and `mail`; an alert has `alert`, its text; a forwarded mail has
    `forward`, the message as it came.
    """

    id: str  # stable: the Message-ID is made of it, so that a repeat is recognised
    recipient: str = field(repr=False)
    queued_at: float
    tries: int
    fence: int  # the claim's number; only its holder may record what became of the mail
    alone: bool = False  # the gateway may have fallen over it: no other mail beside it
    notice: Notice | None = None
    fax: Fax | None = None
    mail: ReceivedMail | None = None
    alert: str | None = None
    cause: str | None = None  # of the alert
    forward: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Rules:
    """The configured times that decide what becomes of a fax; seconds."""

    waits: dict[str, tuple[float, ...]]  # by kind of failure: before each new call
    max_calls: int
    give_up_after: float
    delayed_after: float
    doubt_checks: tuple[float, ...]
    poll_first: float
    poll_page: float
    poll_longest: float = 900.0
    stuck_after: float = 3600.0
    stuck_page: float = 180.0
    reason_wait: float = 60.0  # how long a polled failure waits for the webhook with its reason
