"""The three ledgers of a crash run, and the verdict that comes of comparing them.

What the mail server was told (250), what the carrier took, what replies arrived; and beside them what the
database says in the end. Everything here is a pure function of the ledgers, so that a test can show that the
verdict finds what it should.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

OVER = frozenset({"delivered", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class Mailed:
    """A mail: its numbers, its pages, and the ids in the 250s that its server heard."""

    message_id: str
    numbers: tuple[str, ...]
    pages: int
    told: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A fax that the carrier took; `ended_at` None: not yet. `pages` None: unreadable."""

    number: str
    carrier_id: str
    taken_at: float
    ended_at: float | None
    delivered: bool
    pages: int | None


@dataclass(frozen=True, slots=True)
class Reply:
    """A final reply that came to the relay."""

    message_id: str
    fax_id: str
    number: str
    outcome: str


@dataclass(frozen=True, slots=True)
class Stored:
    """A fax in the gateway's database at the end."""

    id: str
    mail_id: str
    number: str
    state: str
    accepted_at: float
    ended_at: float | None


@dataclass(frozen=True, slots=True)
class Ledgers:
    """All of them. `ends` says how the fax to each number has to end: "delivered" or "failed"."""

    mails: Sequence[Mailed]
    calls: Sequence[Call]
    replies: Sequence[Reply]
    faxes: Sequence[Stored]
    ends: Mapping[str, str]


@dataclass(slots=True)
class Verdict:
    """What is wrong, by number or fax id, with a word on why; and what is counted but is not wrong."""

    lost: dict[str, str] = field(default_factory=dict)
    doubled: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    strange: dict[str, str] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)
    repeated: int = 0  # replies that came again under the same Message-ID

    @property
    def findings(self) -> dict[str, dict[str, str]]:
        """Every kind of fault by its name."""
        return {
            "lost": self.lost,
            "doubled": self.doubled,
            "replies missing": self.missing,
            "replies doubled under another Message-ID": self.renamed,
            "at odds": self.strange,
        }

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong, and nothing is left to people."""
        return not (any(self.findings.values()) or self.held)


def judge(ledgers: Ledgers) -> Verdict:
    """Compare the ledgers."""
    verdict = Verdict()
    faxes, calls, replies = _by_number(ledgers.faxes), _by_number(ledgers.calls), _by_number(ledgers.replies)
    for mail in ledgers.mails:
        for number in mail.numbers:
            if not mail.told:
                verdict.strange[number] = "never answered 250"
            if not {*mail.told} <= {fax.mail_id for fax in faxes[number]}:
                verdict.strange[number] = "the id in the 250 is not that of the mail"
            if fault := _lost(faxes[number], calls[number], ledgers.ends.get(number)):
                verdict.lost[number] = fault
            if fault := _doubled(calls[number], faxes[number]):
                verdict.doubled[number] = fault
            if any(call.pages != mail.pages for call in calls[number]):
                verdict.strange[number] = "another document was sent"
    mailed = {number for mail in ledgers.mails for number in mail.numbers}
    for number in {*faxes, *calls, *replies} - mailed:
        verdict.strange[number] = "nobody mailed to this number"
    _judge_replies(ledgers, verdict)
    return verdict


Row = TypeVar("Row", Call, Reply, Stored)


def _by_number(rows: Iterable[Row]) -> defaultdict[str, list[Row]]:
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.number].append(row)
    return found


def _lost(faxes: list[Stored], calls: list[Call], end: str | None) -> str:
    """Say why a fax whose mail was answered 250 is lost; "" when it is not."""
    if not faxes:
        return "no fax was stored"
    if any(fax.state == "held" for fax in faxes):
        return ""
    if open_ones := [fax.state for fax in faxes if fax.state not in OVER]:
        return f"still {open_ones[0]} in the end"
    if any(fax.state == "delivered" for fax in faxes) and not any(call.delivered for call in calls):
        return "said to be delivered, and the carrier never did"
    if end is not None and faxes[-1].state != end:
        return f"ended as {faxes[-1].state} instead of {end}"
    return ""


def _doubled(calls: list[Call], faxes: list[Stored]) -> str:
    """Say why a number was called twice without need; "" when it was not."""
    calls = sorted(calls, key=lambda call: call.taken_at)
    for earlier, later in itertools.pairwise(calls):
        if earlier.delivered:
            return f"{later.carrier_id} was taken although {earlier.carrier_id} was delivered"
        if earlier.ended_at is None or earlier.ended_at > later.taken_at:
            return f"{later.carrier_id} was taken while {earlier.carrier_id} was under way"
    faxes = sorted(faxes, key=lambda fax: fax.accepted_at)
    for first, second in itertools.pairwise(faxes):
        # What failed may be mailed again, by a server that did not hear the first 250.
        if first.state != "failed" or first.ended_at is None or first.ended_at > second.accepted_at:
            return f"{second.id} was accepted beside {first.id}"
    return ""


def _judge_replies(ledgers: Ledgers, verdict: Verdict) -> None:
    known = {fax.id: fax for fax in ledgers.faxes}
    names: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for reply in ledgers.replies:
        names[reply.fax_id][reply.message_id] += 1
        fax = known.get(reply.fax_id)
        if fax is None or (fax.number, fax.state) != (reply.number, reply.outcome):
            verdict.strange[reply.fax_id] = f"a reply says {reply.outcome}, the database says otherwise"
    for fax in ledgers.faxes:
        if fax.state == "held":
            verdict.held.append(fax.id)
        elif fax.id not in names:
            verdict.missing[fax.id] = f"{fax.state}, and nobody was told"
    for fax_id, ids in names.items():
        verdict.repeated += ids.total() - len(ids)
        if len(ids) > 1:
            verdict.renamed[fax_id] = ", ".join(ids)
