"""The gateway's mails: what a clerk reads, what a program reads, and that nobody else can write in them."""

import os
import re
from dataclasses import replace
from email.message import EmailMessage, Message
from pathlib import Path
from typing import Any, Literal

import pytest
from faxes import (
    CANCEL,
    NOW,
    NUMBER,
    SITUATIONS,
    Walk,
    at,
    delivered,
    doubted,
    failed,
    not_taken,
    said,
    unprovable,
)
from letters import LATER, LETTERHEAD, MAIL, PNG, alert, notice, read, text_of, write

from gateway import reasons
from gateway.compose import compose
from gateway.records import End, Fax, HeldFor, Notice, OutboxEntry, Stage, State

GOLDEN = Path(__file__).parent / "golden"


def timed(walk: Walk) -> Fax:
    """Return the fax with a duration on the attempt that was delivered."""
    attempts = (replace(one, duration=95) if one.end is End.DELIVERED else one for one in walk.fax.attempts)
    return replace(walk.fax, attempts=tuple(attempts))


def busy_for_good() -> Fax:
    """Return a fax that met a busy line until its tries were used up."""
    walk = Walk()
    while walk.fax.state is State.QUEUED:
        walk.fail("user_busy", 1300.0)
    return walk.fax


MAILS: dict[str, OutboxEntry] = {
    "delivered": notice(
        Notice.DELIVERED, timed(Walk().fail("user_busy").call(180.0).make(delivered(), 95.0))
    ),
    "delivered-in-part": notice(
        Notice.DELIVERED, Walk().call().make(said(Stage.DELIVERED, pages=2), 95.0).fax
    ),
    "failed-busy": notice(Notice.FAILED, busy_for_good()),
    "failed-unknown-reason": notice(
        Notice.FAILED,
        Walk().fail("quantum_flux").fail("quantum_flux", 1300.0).fax,
        replace(MAIL, subject="Grüße"),
    ),
    "cancelled": notice(Notice.CANCELLED, Walk().fail("user_busy").make(CANCEL).fax),
    "cancelled-in-doubt": notice(Notice.CANCELLED, at("cancelled in doubt").fax),
    "delayed-account": notice(Notice.DELAYED, Walk().fax),
    "delayed-held": notice(Notice.DELAYED, at("held, doubt").fax),
    "delayed-doubt": notice(Notice.DELAYED, at("in doubt").fax),
    "delayed-retrying": notice(Notice.DELAYED, at("queued after busy").fax),
}
ALERT = alert("fax_held", "Fax m1-1 is held: the carrier refused it (HTTP 403 10010).")


def golden(name: str, message: EmailMessage) -> None:
    """Compare a mail with the file of that name, or write it there (UPDATE_GOLDEN)."""
    file = GOLDEN / f"{name}.eml"
    data = message.as_bytes()
    assert data.isascii()
    assert re.search(rb"[^\r]\n|\r[^\n]", data) is None, "every line ends in CR LF"
    kept = data.replace(b"\r\n", b"\n")
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_bytes(kept)
    assert kept.decode() == file.read_text()


@pytest.mark.parametrize("form", ["mail", "report"])
@pytest.mark.parametrize("name", MAILS)
def test_reply_reads_as_written_down(name: str, form: Literal["mail", "report"]) -> None:
    """Each kind of reply says, word for word, what was reviewed.

    `UPDATE_GOLDEN=1 python -m pytest tests/test_compose.py` writes the files in tests/golden anew.
    """
    golden(f"{name}.{form}", write(MAILS[name], form))


def test_alert_reads_as_written_down() -> None:
    """The postmaster's mail says what happened and what to do; it is never a report."""
    golden("alert", write(ALERT))
    assert write(ALERT, "report").as_bytes() == write(ALERT).as_bytes()


def test_reply_with_picture_reads_as_written_down() -> None:
    """The picture of page 1 stands at the end of the reply."""
    message = write(MAILS["delivered"], picture=PNG)
    golden("delivered-with-picture.mail", message)
    parts = list(read(message).iter_parts())
    assert [part.get_content_type() for part in parts] == ["text/plain", "image/png"]
    assert parts[1].get_filename() == "page-1.png"
    assert parts[1].get_content_disposition() == "inline"
    assert parts[1].get_content() == PNG


# --- what people read --------------------------------------------------------------------------------------


def test_reply_goes_back_into_the_senders_thread() -> None:
    """The reply stands below the sender's own mail, and answers to it reach the postmaster."""
    found = read(write(MAILS["delivered"]))
    assert found["To"] == "clerk@example.org"
    assert found["Reply-To"] == "postmaster@example.com"
    assert found["In-Reply-To"] == "<offer-4711@example.org>"
    assert found["References"] == "<first@example.org> <second@example.org> <offer-4711@example.org>"
    assert found["Message-ID"] == "<m1-1.delivered@fax.local>"
    assert found["Auto-Submitted"] == "auto-replied"
    assert found["Date"].datetime.timestamp() == LATER


def test_message_id_is_the_same_for_each_try() -> None:
    """A reply that goes out twice after a crash is recognised as the same one."""
    first = write(MAILS["failed-busy"])
    again = compose(replace(MAILS["failed-busy"], tries=7, fence=9), LETTERHEAD, LATER + 3600, None)
    assert isinstance(again, EmailMessage)
    assert first["Message-ID"] == again["Message-ID"]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("user_busy", "busy"),
        ("receiver_no_answer", "no answer"),
        ("carrier_lost", "the call failed"),
        ("destination_invalid", "wrong number"),
        ("destination_not_in_countries_whitelist", "destination not allowed"),
        ("file_format_invalid", "document not accepted"),
        ("gave_up_waiting", "time ran out"),
        (None, "the call failed"),
    ],
)
def test_subject_tells_a_failure_in_two_words(reason: str | None, words: str) -> None:
    """Reading the subject is enough to know which fax failed, and roughly why."""
    fax = replace(Walk().fax, state=State.FAILED, reason=reason)
    assert write(notice(Notice.FAILED, fax))["Subject"] == f"Fax failed: +1 312-736-7276, {words}"


@pytest.mark.parametrize("reason", [*reasons.TABLE, *reasons.LOCAL], ids=lambda reason: reason.name)
def test_every_failure_is_explained_and_named(reason: reasons.Reason) -> None:
    """The sender reads a sentence, an advice, and the carrier's own word, for support to search."""
    fax = replace(Walk().call().make(failed(reason.name)).fax, state=State.FAILED, reason=reason.name)
    text = text_of(write(notice(Notice.FAILED, fax)))
    assert reason.sentence in text
    assert reason.advice in text
    assert f"failure_reason: {reason.name} " in text
    assert ("may have arrived" in text) == reason.pages_may_have_arrived


def test_carriers_inner_reason_is_shown_too() -> None:
    """Support finds the carrier's second word for the failure behind the first."""
    fax = at("failed").fax
    fax = replace(fax, attempts=(replace(fax.attempts[0], internal_reason="ISUP 1"),))
    assert "failure_reason: destination_invalid (ISUP 1)" in text_of(write(notice(Notice.FAILED, fax)))


def test_one_page_is_not_pages() -> None:
    """A fax of one page, over in less than a minute, is told in the singular."""
    fax = Walk(replace(Walk().fax, pages=1)).call().make(said(Stage.DELIVERED, pages=1)).fax
    fax = replace(fax, attempts=(replace(fax.attempts[0], duration=42),))
    message = write(notice(Notice.DELIVERED, fax))
    assert message["Subject"].endswith(", 1 page")
    assert "confirmed 1 page." in text_of(message)
    assert "Duration: 42 s" in text_of(message)


def test_delivery_without_a_page_count_claims_none() -> None:
    """When the carrier does not say how many pages went through, neither do we."""
    message = write(notice(Notice.DELIVERED, Walk().call().make(said(Stage.DELIVERED)).fax))
    assert "confirmed the transmission." in text_of(message)
    assert "X-Fax-Pages-Confirmed" not in message
    assert "X-Fax-Duration" not in message


def test_missing_pages_are_pointed_out() -> None:
    """A delivery of fewer pages than the document has is no quiet success."""
    message = write(MAILS["delivered-in-part"])
    assert message["Subject"] == "Fax delivered: +1 312-736-7276, 2 of 3 pages"
    assert "Attention: the document has 3 pages, but 2 were confirmed." in text_of(message)


@pytest.mark.parametrize("held_for", [*HeldFor, None])
def test_delay_by_an_operator_says_what_is_wrong(held_for: HeldFor | None) -> None:
    """Whoever waits for a held fax reads that a person must act, and that nothing is to be sent again."""
    fax = replace(Walk().fax, state=State.HELD, held_for=held_for)
    message = write(notice(Notice.DELAYED, fax))
    assert message["Subject"] == "Fax delayed: +1 312-736-7276, on hold"
    assert re.search(
        r"The operator of this gateway (has put it on hold|must look into it)\.", text_of(message)
    )
    assert "You need not send it again. You will get one final mail" in text_of(message)


@pytest.mark.parametrize(
    ("situation", "says"),
    [
        ("queued", "for a cause on our side"),
        ("queued after absence", "for a cause on our side"),
        (
            "queued after busy",
            "busy. We are still trying; the next call is due at about 2026-03-02 12:04 UTC.",
        ),
        ("submitting", "We are checking whether the fax was accepted"),
        ("in doubt", "We are checking whether the fax was accepted"),
        ("sending", "has not told us the result yet"),
        ("delivered", "By now it has ended; the mail with the result follows."),
    ],
)
def test_delay_says_what_the_fax_waits_for(situation: str, says: str) -> None:
    """The one notice before the result tells the truth about where the fax is."""
    assert says in text_of(write(notice(Notice.DELAYED, at(situation).fax)))


@pytest.mark.parametrize("reason", ["account_disabled", "user_channel_limit_exceeded"])
def test_delay_by_our_account_is_not_blamed_on_the_recipient(reason: str) -> None:
    """A fax that waits for our account or our lines is told as a fault of ours."""
    text = text_of(write(notice(Notice.DELAYED, Walk().fail(reason).fax)))
    assert "for a cause on our side" in text


def test_delay_by_a_carrier_without_room_is_not_blamed_on_the_recipient() -> None:
    """A busy line first, then a carrier that takes nothing: the delay is told as it is now."""
    fax = Walk().fail("user_busy").begin(200.0).make(not_taken()).fax
    assert "for a cause on our side" in text_of(write(notice(Notice.DELAYED, fax)))


@pytest.mark.parametrize("situation", ["in doubt", "sending", "held, stuck"])
def test_delay_with_an_open_call_promises_no_time(situation: str) -> None:
    """While a call is open, pages may have arrived, and no deadline ends the fax."""
    text = text_of(write(notice(Notice.DELAYED, at(situation).fax)))
    assert "may have arrived already" in text
    assert "at the latest" not in text


def test_call_of_unknown_end_is_said_to_have_left_pages() -> None:
    """Whoever reads of a failure learns when an earlier call may have come through after all."""
    walk = Walk().call().make(doubted()).make(unprovable())
    attempts = (replace(walk.fax.attempts[0], end=End.OVERRULED, open=False),)
    fax = replace(walk.fax, state=State.FAILED, reason="user_busy", attempts=attempts)
    text = text_of(write(notice(Notice.FAILED, fax)))
    assert "may have arrived all the same. Please ask the recipient before you send it again." in text


def test_pages_of_a_failed_call_are_not_kept_back() -> None:
    """A call that failed after its first page is told as one that may have left it there."""
    fax = at("failed").fax
    assert "may have arrived" not in text_of(write(notice(Notice.FAILED, fax)))
    fax = replace(fax, attempts=(replace(fax.attempts[0], pages=1),))
    assert "may have arrived" in text_of(write(notice(Notice.FAILED, fax)))


def test_many_calls_are_cut() -> None:
    """A fax that was tried a hundred times is told with the last twenty calls."""
    call = Walk().call().make(failed("user_channel_limit_exceeded")).fax.attempts[0]
    fax = replace(at("failed").fax, attempts=(call,) * 100)
    text = text_of(write(notice(Notice.FAILED, fax)))
    assert "(80 earlier calls are left out) 81. 2026-03-02" in text
    assert "100. 2026-03-02" in text


def test_renewed_fax_names_the_old_one() -> None:
    """The reply to a fax that an operator sent again says which one it repeats."""
    fax = replace(at("delivered").fax, id="m1-2", renews="m1-1")
    assert "Fax id: m1-2, sent again in place of m1-1" in text_of(write(notice(Notice.DELIVERED, fax)))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_there_are_words_for_every_situation(situation: str) -> None:
    """Whatever became of a fax, each reply about it can be written, in lines that no mail program wraps."""
    for kind in Notice:
        for form in ("mail", "report"):
            message = write(notice(kind, at(situation).fax), form)
            assert message["Subject"].startswith(f"Fax {kind}: +1 312-736-7276")
            assert max(map(len, message.as_string().splitlines())) < 78


@pytest.mark.parametrize(
    "cause",
    ["fax_held", "call_stuck", "call_refused", "contradiction", "account_held", "reply_given_up",
     "something_new"],
)  # fmt: skip
def test_each_alert_says_what_to_do(cause: str) -> None:
    """The postmaster reads what happened and the next step, without looking anything up."""
    message = write(alert(cause, "Fax m1-1: it happened."))
    assert re.fullmatch(r"Fax gateway alert: [a-z][a-z' -]+", message["Subject"])
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["X-Fax-Alert"] == cause
    text = text_of(message)
    assert text.startswith("Fax m1-1: it happened. ")
    assert re.search(r"`fax-gateway |[Pp]lease ", text)
    assert "In-Reply-To" not in message


def test_mail_to_the_postmaster_is_forwarded_as_it_came() -> None:
    """The postmaster gets the mail itself, to the byte."""
    entry = OutboxEntry("m1.forward", "postmaster@example.com", NOW, 0, 1, forward=b"Subject: \xff\n\nhelp\n")
    assert compose(entry, LETTERHEAD, LATER, None) == b"Subject: \xff\n\nhelp\n"


def test_entry_of_no_kind_is_a_mistake() -> None:
    """An outbox entry without content is reported, not sent as an empty mail."""
    with pytest.raises(ValueError, match=r"m9\.delivered is neither"):
        compose(OutboxEntry("m9.delivered", "clerk@example.org", NOW, 0, 1), LETTERHEAD, LATER, None)


# --- what programs read ------------------------------------------------------------------------------------


def test_headers_for_programs() -> None:
    """A program reads the outcome from headers whose names do not change."""
    found = {name: value for name, value in write(MAILS["delivered"]).items() if name.startswith("X-")}
    assert found == {
        "X-Fax-Id": "m1-1",
        "X-Fax-Mail-Id": "m1",
        "X-Fax-Number": NUMBER,
        "X-Fax-Outcome": "delivered",
        "X-Fax-Pages": "3",
        "X-Fax-Pages-Confirmed": "3",
        "X-Fax-Attempts": "2",
        "X-Fax-Duration": "95",
    }
    failure = write(MAILS["failed-busy"])
    assert (failure["X-Fax-Outcome"], failure["X-Fax-Reason"]) == ("failed", "user_busy")


def report(entry: OutboxEntry) -> tuple[EmailMessage, "Message[str, str]", "Message[str, str]", EmailMessage]:
    """Return the parts of a report: text, fields of the mail, fields of the recipient, original headers."""
    found = read(write(entry, "report", PNG))
    assert found.get_content_type() == "multipart/report"
    assert found.get_param("report-type") == "delivery-status"
    parts: list[Any] = list(found.iter_parts())
    assert [part.get_content_type() for part in parts] == [
        "text/plain",
        "message/delivery-status",
        "text/rfc822-headers",
    ]
    about, status = parts[1].get_payload()
    return parts[0], about, status, parts[2]


@pytest.mark.parametrize(
    ("name", "action", "status", "diagnosis"),
    [
        ("delivered", "delivered", "2.0.0", None),
        ("failed-busy", "failed", "5.4.1", "x-telnyx; user_busy"),
        ("failed-unknown-reason", "failed", "5.0.0", "x-telnyx; quantum_flux"),
        ("cancelled", "failed", "5.0.0", None),
        ("delayed-account", "delayed", "4.0.0", None),
        ("delayed-retrying", "delayed", "4.4.1", "x-telnyx; user_busy"),
    ],
)
def test_report_is_a_delivery_status_notification(
    name: str, action: str, status: str, diagnosis: str | None
) -> None:
    """A mail system reads the outcome of the fax as it reads that of any mail (RFC 3464)."""
    _, about, fields, original = report(MAILS[name])
    assert about["Reporting-MTA"] == "dns; fax.example.com"
    assert about["Arrival-Date"] == "Mon, 02 Mar 2026 12:00:00 +0000"
    assert fields["Original-Recipient"] == "rfc822; 1-312-736-7276@fax.local"
    assert fields["Final-Recipient"] == "rfc822; 1-312-736-7276@fax.local"
    assert (fields["Action"], fields["Status"]) == (action, status)
    assert fields["Diagnostic-Code"] == diagnosis
    assert ("Last-Attempt-Date" in fields) == (name != "delayed-account")
    assert ("Will-Retry-Until" in fields) == (action == "delayed")
    assert "Subject: Offer 4711" in original.get_content()


def test_report_of_our_own_reason_does_not_quote_the_carrier() -> None:
    """A failure that the carrier knows nothing of carries a diagnostic code of our own."""
    _, _, fields, _ = report(notice(Notice.FAILED, at("failed, given up").fax))
    assert fields["Diagnostic-Code"] == "x-fax-gateway; gave_up_waiting"


def test_report_names_the_number_when_the_address_is_not_known() -> None:
    """A fax without its original recipient is still reported under an address."""
    entry = notice(Notice.DELIVERED, at("delivered").fax)
    assert entry.fax is not None
    _, _, fields, _ = report(replace(entry, fax=replace(entry.fax, recipient="")))
    assert fields["Final-Recipient"] == f"rfc822; {NUMBER}@fax.example.com"


@pytest.mark.parametrize(
    ("headers", "returned"),
    [
        (b"", ""),
        (b"A: 1\r\nB: 2\r\n\r\nsecret body\r\n", "A: 1\nB: 2"),
        (b"A: 1\rB: \xff\n", "A: 1\nB: \ufffd"),
        (b"A: --=_0\r\n" * 10_000, "\n".join(["A: --=_0"] * 3276)),
    ],
    ids=["none", "with a body", "with odd bytes", "endless"],
)
def test_report_returns_headers_only(headers: bytes, returned: str) -> None:
    """The report carries the original headers, never the text, and never without end."""
    entry = notice(Notice.DELIVERED, at("delivered").fax, replace(MAIL, original_headers=headers))
    assert report(entry)[3].get_content().replace("\r\n", "\n").strip() == returned
