"""What a person reads in the gateway's mails: subjects, sentences, lists.

In charge of: the wording of replies and alerts, and of making values from outside fit to stand in them.

Promises: plain text for somebody who knows nothing of the gateway, most important things first, in lines of
at most 76 columns. Times are UTC and say so. No line begins with "--": none can be taken for a MIME boundary.

Fails: never; it works on values alone.
"""

import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

import phonenumbers

from gateway import reasons
from gateway.reasons import Kind, Reason
from gateway.records import Attempt, End, Fax, HeldFor, Notice, ReceivedMail, State

WIDTH = 76  # columns; RFC 5322, 2.1.1 wants lines below 79
LONGEST_VALUE = 200  # characters of one value from outside
MOST_CALLS = 20  # listed one by one

_OWN_SIDE = frozenset({Kind.ACCOUNT, Kind.SENDER, Kind.SPEND, Kind.CAPACITY})
_NEVER_POSTED = frozenset({End.NOT_TAKEN, End.WITHDRAWN, End.ABSENT})  # the fax just went on waiting
_ASK_FIRST = "Please ask the recipient before you send it again."
_LOOKED_INTO = "The operator of this gateway must look into it."


def clean(value: str, longest: int = LONGEST_VALUE) -> str:
    """Return `value` on one line, cut, without controls, surrogates and marks that turn the text around."""
    # Blanks and controls are unlikely to take more than nine tenths; the rest of 10 MB is not looked at.
    kept = "".join(char if char.isprintable() else " " for char in value[: 10 * longest])
    kept = " ".join(kept.split())
    return kept if len(kept) <= longest else kept[: longest - 3] + "..."


# --- what is known of a fax ---------------------------------------------------------------------------------


def delivery_of(fax: Fax) -> Attempt | None:
    """Return the attempt that was delivered."""
    return next((attempt for attempt in fax.attempts if attempt.end is End.DELIVERED), None)


def reason_for(notice: Notice, fax: Fax) -> Reason | None:
    """Return the row of why it failed; for a delay that of the last failure, if there was one."""
    if notice is Notice.DELIVERED:
        return None
    if fax.reason is not None:
        return reasons.lookup(fax.reason)
    if notice is Notice.FAILED:
        return reasons.UNKNOWN
    failures = _failures(fax) if notice is Notice.DELAYED else []
    return reasons.lookup(failures[-1].reason) if failures else None


def _failures(fax: Fax) -> list[Attempt]:
    return [attempt for attempt in fax.attempts if attempt.end in {End.FAILED, End.REFUSED}]


def _may_have_arrived(fax: Fax) -> bool:
    """Whether pages may lie on the recipient's floor though nobody confirmed them."""
    return any(
        attempt.open
        or attempt.end is End.OVERRULED
        or bool(attempt.pages)
        or (attempt.end is End.FAILED and reasons.lookup(attempt.reason).pages_may_have_arrived)
        for attempt in fax.attempts
    ) or (fax.reason is not None and reasons.lookup(fax.reason).pages_may_have_arrived)


# --- subjects -----------------------------------------------------------------------------------------------

_KINDS_IN_SHORT = {
    Kind.BUSY: "busy",
    Kind.NO_ANSWER: "no answer",
    Kind.LINE: "the call failed",
    Kind.PROVIDER: "fault at the fax service",
    Kind.DECLINED: "declined",
    Kind.CAPACITY: "no line free",
    Kind.ACCOUNT: "fault in our account",
    Kind.SENDER: "fault in our account",
    Kind.SPEND: "spending limit reached",
    Kind.CONTRADICTION: "outcome unclear",
}
_STATUSES_IN_SHORT = {  # for the kind "never"
    "5.0.0": "outcome unknown",
    "5.1.1": "wrong number",
    "5.1.3": "wrong number",
    "5.4.7": "time ran out",
    "5.7.1": "destination not allowed",
}


def subject(notice: Notice, fax: Fax) -> str:
    """Return the reply's subject: `Fax delivered: +1 312-736-7276, 3 pages`; ASCII."""
    in_short = _in_short(notice, fax)
    return f"Fax {notice}: {_number(fax)}" + (f", {in_short}" if in_short else "")


def _in_short(notice: Notice, fax: Fax) -> str:
    match notice:
        case Notice.DELIVERED:
            delivery = delivery_of(fax)
            if delivery is None or delivery.pages in {None, fax.pages}:
                return _pages(fax.pages)
            return f"{delivery.pages} of {_pages(fax.pages)}"
        case Notice.FAILED:
            reason = reason_for(notice, fax) or reasons.UNKNOWN
            if reason.kind is Kind.NEVER:
                return _STATUSES_IN_SHORT.get(reason.status, "document not accepted")
            return _KINDS_IN_SHORT[reason.kind]
        case Notice.CANCELLED:
            return ""
        case Notice.DELAYED:
            if fax.final:
                return "result follows"
            if fax.state is State.HELD:
                return "on hold"
            return "being checked" if fax.state in {State.IN_DOUBT, State.SUBMITTING} else "still trying"


# --- the reply ----------------------------------------------------------------------------------------------


def letter(notice: Notice, fax: Fax, mail: ReceivedMail) -> str:
    """Return the text of a reply, its last line ended."""
    sections = [textwrap.fill(text, WIDTH) for text in _SAYS[notice](fax)]
    sections.append(
        "\n".join(_item(f"{label + ':':<15}", value) for label, value in _facts(notice, fax, mail))
    )
    if tried := list(_tried(fax)):
        sections.append("\n".join(["What was tried:", *tried]))
    sections.append("\n".join(["_" * 20, *_small_print(fax, mail)]))
    return "\n\n".join(sections) + "\n"


def _say_delivered(fax: Fax) -> list[str]:
    delivery = delivery_of(fax)
    confirmed = None if delivery is None else delivery.pages
    what = "the transmission" if confirmed is None else _pages(confirmed)
    proof = (
        f"The receiving machine confirmed {what}. That proves that a machine at this number took the fax; it "
        "cannot prove that the right person reads it."
    )
    paragraphs = ["Your fax was delivered.", proof]
    if confirmed not in {None, fax.pages}:
        paragraphs.append(
            f"Attention: the document has {_pages(fax.pages)}, but {confirmed} were confirmed. Please ask "
            "the recipient whether all of them are there."
        )
    return paragraphs


def _say_failed(fax: Fax) -> list[str]:
    reason = reason_for(Notice.FAILED, fax) or reasons.UNKNOWN
    paragraphs = ["Your fax could not be delivered.", f"{reason.sentence} {reason.advice}"]
    if reason.pages_may_have_arrived:  # its advice says what to ask
        paragraphs.append("Some or all of the pages may have arrived all the same.")
    elif _may_have_arrived(fax):
        paragraphs.append(f"Some or all of the pages may have arrived all the same. {_ASK_FIRST}")
    return paragraphs


def _say_cancelled(fax: Fax) -> list[str]:
    paragraphs = ["Your fax was cancelled by the operator of this gateway."]
    if _may_have_arrived(fax):
        paragraphs.append(
            "The fax service had been asked to send it before; some or all of the pages may have arrived. "
            f"{_ASK_FIRST}"
        )
    elif not fax.calls:
        paragraphs.append("No call for it is on record here.")  # a restored record may lack some
    return paragraphs


def _say_delayed(fax: Fax) -> list[str]:
    if fax.final:  # it waited for the relay longer than for the line
        return ["Your fax took longer than usual.", "By now it has ended; the mail with the result follows."]
    until = "" if fax.open_attempts else f", at the latest after {_time(fax.give_up_at)}"
    paragraphs = [
        "Your fax has not been delivered yet.",
        _waits_for(fax),
        f"You need not send it again. You will get one final mail with the result{until}.",
    ]
    if _may_have_arrived(fax):
        paragraphs.append("Some or all of the pages may have arrived already.")
    return paragraphs


_SAYS = {
    Notice.DELIVERED: _say_delivered,
    Notice.FAILED: _say_failed,
    Notice.CANCELLED: _say_cancelled,
    Notice.DELAYED: _say_delayed,
}
_HELD_BECAUSE = {
    HeldFor.OPERATOR: "The operator of this gateway has put it on hold.",
    HeldFor.REFUSED: f"The fax service did not accept it. {_LOOKED_INTO}",
    HeldFor.DOUBT: f"We could not find out whether the fax service accepted it. {_LOOKED_INTO}",
    HeldFor.STUCK: f"The call has not come to an end. {_LOOKED_INTO}",
    HeldFor.GONE: f"The fax service has lost track of it. {_LOOKED_INTO}",
    HeldFor.CONTRADICTION: f"The fax service reported a result that makes no sense. {_LOOKED_INTO}",
    HeldFor.HARMFUL: f"The gateway could not work on it. {_LOOKED_INTO}",
    HeldFor.RESTORED: f"After a repair here it is not certain whether it was sent already. {_LOOKED_INTO}",
}


def _waits_for(fax: Fax) -> str:
    """Say what a fax that has not ended waits for."""
    if fax.state is State.HELD:
        return _HELD_BECAUSE[fax.held_for or HeldFor.OPERATOR]
    if fax.state in {State.IN_DOUBT, State.SUBMITTING}:
        return "We are checking whether the fax was accepted by the fax service."
    if fax.state is State.SENDING:
        return "The fax service has accepted it, but has not told us the result yet."
    reason = reason_for(Notice.DELAYED, fax)
    refused = fax.last is not None and fax.last.end in {End.REFUSED, End.NOT_TAKEN}
    if reason is None or refused or reason.kind in _OWN_SIDE:
        return (
            "It waits for its turn: faxes go out slowly or not at all at the moment, for a cause on our "
            "side. There is nothing wrong with your document or the number."
        )
    return f"{reason.sentence} We are still trying; the next call is due at about {_time(fax.due_at)}."


def _facts(notice: Notice, fax: Fax, mail: ReceivedMail) -> Iterator[tuple[str, str]]:
    yield "Fax number", _number(fax)
    yield "Outcome", notice.value
    delivery = delivery_of(fax) if notice is Notice.DELIVERED else None
    if delivery is None or delivery.pages in {None, fax.pages}:
        yield "Pages", str(fax.pages)
    else:
        yield "Pages", f"{delivery.pages} confirmed, {fax.pages} in the document"
    if delivery is not None and delivery.duration is not None:
        minutes, seconds = divmod(delivery.duration, 60)
        yield "Duration", f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    yield "Mail received", _time(mail.received_at)
    if fax.ended_at is not None:
        yield "Fax ended", _time(fax.ended_at)
    if quoted := clean(mail.subject):
        yield "Your subject", f'"{quoted}"'


def _tried(fax: Fax) -> Iterator[str]:
    """Yield an item for each attempt that says something to the sender."""
    told = [attempt for attempt in fax.attempts if attempt.end not in _NEVER_POSTED]
    if len(told) > MOST_CALLS:
        yield f"  ({len(told) - MOST_CALLS} earlier calls are left out)"
    for place, attempt in list(enumerate(told, 1))[-MOST_CALLS:]:
        yield _item(f"  {place}. ", f"{_time(attempt.started_at)}: {_came_of(attempt)}")


def _came_of(attempt: Attempt) -> str:
    match attempt.end:
        case End.DELIVERED:
            return "Delivered." if attempt.pages is None else f"Delivered, {_pages(attempt.pages)}."
        case End.FAILED:
            return reasons.lookup(attempt.reason).sentence
        case End.REFUSED:
            return f"No call. {reasons.lookup(attempt.reason).sentence}"
        case _ if attempt.carrier_id is not None:
            return "The result of this call is not known."
        case _:
            return "It is not known whether the fax service accepted it."


def _small_print(fax: Fax, mail: ReceivedMail) -> Iterator[str]:
    """Yield what support will ask for, verbatim but cleaned."""
    words = [] if delivery_of(fax) is not None else _failure_reasons(fax)
    if words:
        yield _item("failure_reason: ", ", ".join(words))
    renewed = "" if fax.renews is None else f", sent again in place of {clean(fax.renews)}"
    yield _item("Fax id: ", f"{clean(fax.id)}{renewed}")
    yield _item("Mail id: ", clean(mail.id))
    if known := [clean(call.carrier_id or "") for call in fax.calls[-MOST_CALLS:]]:
        yield _item("Id at the fax service: ", ", ".join(known))


def _failure_reasons(fax: Fax) -> list[str]:
    """Return the words for the failures, each once, the carrier's as it said them."""
    words = [_verbatim(failure) for failure in _failures(fax) if failure.reason is not None]
    if fax.reason is not None and all(failure.reason != fax.reason for failure in _failures(fax)):
        words.append(clean(fax.reason))
    return list(dict.fromkeys(words))[-MOST_CALLS:]


def _verbatim(failure: Attempt) -> str:
    inner = "" if failure.internal_reason is None else f" ({clean(failure.internal_reason)})"
    return clean(failure.reason or "") + inner


# --- alerts -------------------------------------------------------------------------------------------------


class _Advice(NamedTuple):
    """What an alert says: its cause in words, and what to do."""

    title: str
    text: str


_ALERTS = {
    "fax_held": _Advice(
        "a fax is held",
        "It goes nowhere until you act: `fax-gateway show ID` tells what happened, `fax-gateway release ID` "
        "lets it go on, `fax-gateway cancel ID` ends it and tells its sender.",
    ),
    "call_stuck": _Advice(
        "a call does not end",
        "Its number and its line were given free for other faxes, and the fax is held. `fax-gateway show ID` "
        "has the id to ask the fax service for; then `fax-gateway release ID` or `fax-gateway cancel ID`.",
    ),
    "call_refused": _Advice(
        "a fax failed because of the set-up",
        "The sender was told that it failed. Please correct the account or the configuration, then send the "
        "fax again by `fax-gateway retry ID`; `fax-gateway show ID` and `fax-gateway list` tell more.",
    ),
    "contradiction": _Advice(
        "the fax service contradicts itself",
        "The sender was told what was known first, and is not told again. `fax-gateway show ID` has all "
        "reports; please ask the recipient what arrived, and inform the sender if need be.",
    ),
    "account_held": _Advice(
        "faxes do not go out",
        "Mail is still accepted and waits; the senders are told. Please look at the account with the fax "
        "service. One fax is tried from time to time, and once it gets through all go on by themselves; "
        "`fax-gateway release --all` tries at once, `fax-gateway list` shows what waits.",
    ),
    "reply_given_up": _Advice(
        "a reply could not be delivered",
        "The sender does not know what became of the fax. `fax-gateway show ID` tells it; please inform the "
        "sender, and look at the mail relay if this happens again.",
    ),
}
_OTHER = _Advice("something needs attention", "`fax-gateway list` shows the queue; the log tells more.")


def alert_subject(cause: str | None) -> str:
    """Return the subject of an alert: the cause in words; ASCII."""
    return f"Fax gateway alert: {_ALERTS.get(cause or '', _OTHER).title}"


def alert_letter(cause: str | None, text: str, queued_at: float) -> str:
    """Return what an alert says: what happened, what to do, and that there is one a day."""
    rest = (
        f"This mail was queued at {_time(queued_at)}. There is one for each cause and day (UTC): what else "
        "happens today for the same cause is in the log and the metrics only."
    )
    paragraphs = (clean(text, 1000), _ALERTS.get(cause or "", _OTHER).text, rest)
    return "\n\n".join(textwrap.fill(paragraph, WIDTH) for paragraph in paragraphs) + "\n"


# --- parts --------------------------------------------------------------------------------------------------


def _item(label: str, value: str) -> str:
    return textwrap.fill(
        value, WIDTH, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False
    )


def _number(fax: Fax) -> str:
    try:
        parsed = phonenumbers.parse(fax.number)
    except phonenumbers.NumberParseException:
        return clean(fax.number, 30).encode("ascii", "replace").decode()
    return phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.INTERNATIONAL)


def _pages(count: int) -> str:
    return "1 page" if count == 1 else f"{count} pages"


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
