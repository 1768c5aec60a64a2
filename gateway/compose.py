"""The gateway's mails: the reply to the sender, the alert to the postmaster.

In charge of: `compose`, a pure function from an entry of the outbox to the mail that is handed to the relay,
as plain mail for people or as `multipart/report` (RFC 6522, 3464) for programs. What they say is in
`compose_text`.

Promises: it never raises on what came from outside. Whatever gets near a header is printable ASCII, cut, and
written without being interpreted, so no subject, address, message id or word of the carrier's can add a line.
A composed mail is 7-bit ASCII. Its Message-ID depends on the entry alone, so that a repeat is recognised.

Fails: ValueError for an entry that is none of the three kinds of mail, which is a mistake of ours.
"""

import hashlib
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email import policy
from email.headerregistry import BaseHeader, HeaderRegistry, UnstructuredHeader
from email.message import EmailMessage, Message, MIMEPart
from email.policy import EmailPolicy, Policy
from email.utils import format_datetime, parseaddr
from functools import lru_cache
from typing import Any, Literal

from gateway import reasons
from gateway.compose_text import (
    WIDTH,
    alert_letter,
    alert_subject,
    clean,
    delivery_of,
    letter,
    reason_for,
    subject,
)
from gateway.records import Fax, Notice, OutboxEntry, ReceivedMail

LONGEST_THREAD = 2000  # characters of References
LONGEST_HEADERS = 32_768  # characters of the original headers that a report returns


@dataclass(frozen=True, slots=True)
class Letterhead:
    """What all mails of this gateway have in common.

    `sender` is the From (`Fax gateway <fax@fax.local>`), `postmaster` the address that answers go to,
    `hostname` the reporting MTA. `format` "mail" is for people,
    "report" for programs; alerts are always mail.
    """

    sender: str
    postmaster: str
    hostname: str
    format: Literal["mail", "report"] = "mail"


def compose(
    entry: OutboxEntry, letterhead: Letterhead, now: float, picture: bytes | None
) -> EmailMessage | bytes:
    """Return the mail of `entry`; bytes for one that is forwarded as it came.

    `now` is the Date, in seconds since 1970. `picture` is page 1 as PNG and stands at the end of a reply in
    format "mail"; a report has no place for it, since its parts are fixed (RFC 6522, 3).
    """
    if entry.forward is not None:
        return entry.forward
    message = _begin(entry, letterhead, now)
    if entry.alert is not None:
        message["Subject"] = alert_subject(entry.cause)
        message["Auto-Submitted"] = "auto-generated"  # RFC 3834, 5: no answer to anything
        message["X-Fax-Alert"] = _ascii(entry.cause or "other")
        _set_text(message, alert_letter(entry.cause, entry.alert, entry.queued_at))
        return message
    if entry.notice is None or entry.fax is None or entry.mail is None:
        raise ValueError(f"outbox entry {entry.id} is neither a notice nor an alert nor a forwarded mail")
    fax, mail = entry.fax, entry.mail
    message["Subject"] = subject(entry.notice, fax)
    message["Reply-To"] = letterhead.postmaster
    message["Auto-Submitted"] = "auto-replied"  # RFC 3834, 5
    _thread(message, mail)
    for name, value in _for_programs(entry.notice, fax):
        message[name] = _ascii(value)
    text = letter(entry.notice, fax, mail)
    if letterhead.format == "report":
        _fill_report(message, text, _status(entry.notice, fax, letterhead), mail, letterhead)
    else:
        _set_text(message, text)
        if picture is not None:
            message.add_attachment(
                picture, maintype="image", subtype="png", disposition="inline", filename="page-1.png"
            )
            message.set_boundary(_boundary(message))
    return message


# --- headers ------------------------------------------------------------------------------------------------


class _Verbatim(UnstructuredHeader):
    """A header that is written as it is and folded at blanks only.

    The standard class decodes and encodes RFC 2047 words: it breaks long message ids in two, and turns
    "=?...?=" in a value from outside into what its author hid there.
    """

    name: str

    @classmethod
    def parse(cls, value: str, kwds: dict[str, Any]) -> None:
        """Take `value` as it is; there is no tree, `fold` needs none."""
        kwds["parse_tree"] = None
        kwds["decoded"] = value

    def fold(self, *, policy: Policy) -> str:
        """Return the header's lines, each ended."""
        lines = textwrap.wrap(
            str(self), WIDTH, initial_indent=f"{self.name}: ", subsequent_indent=" ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        return policy.linesep.join([*lines, ""])


class _Fields(HeaderRegistry):
    """The standard registry, which would make a class and parse the value for each field of each mail."""

    def __init__(self, *classes: Any) -> None:
        super().__init__(*classes)
        self._classes: dict[str, Any] = {}
        self._parsed = lru_cache(_FIELDS_KEPT)(super().__call__)

    def __getitem__(self, name: str) -> Any:
        """Return the class for fields of that name."""
        if name not in self._classes:  # our mails have two dozen
            self._classes[name] = super().__getitem__(name)
        return self._classes[name]

    def __call__(self, name: str, value: Any) -> Any:
        """Return the field; many mails have some of them alike."""
        return self._parsed(name, value)


_FIELDS_KEPT = 256


def _own_policy() -> "EmailPolicy[EmailMessage]":
    registry = _Fields(BaseHeader, _Verbatim)
    # Addresses of ours and the MIME fields keep the standard classes.
    for name in ("subject", "to", "date", "message-id"):
        del registry.registry[name]
    return policy.SMTP.clone(header_factory=registry, cte_type="7bit")


_POLICY = _own_policy()

# What needs no quotes in a header (RFC 5322, 3.4.1), address literals included.
_PLAIN_ADDRESS = re.compile(r"[\w!#$%&'*+/=?^`{|}~.-]{1,64}@[\w.:\[\]-]{1,255}", re.ASCII)
# A message id of 250 characters: with the header's name a line stays far below 998 (RFC 5322, 2.1.1).
_NOT_IN_ID = re.compile(r"[^\w.+-]", re.ASCII)
_MESSAGE_ID = re.compile(r"<[!-;=?-~]{1,250}>")


def _ascii(value: str) -> str:
    return clean(value).encode("ascii", "replace").decode()


def _begin(entry: OutboxEntry, letterhead: Letterhead, now: float) -> EmailMessage:
    message = EmailMessage(_POLICY)
    message["From"] = letterhead.sender
    # The envelope delivers the mail; an address that a reader might take for two is not shown.
    shown = _PLAIN_ADDRESS.fullmatch(entry.recipient) is not None
    message["To"] = entry.recipient if shown else "undisclosed-recipients:;"
    message["Date"] = _date(now)
    # The same from every gateway: whichever repeats a mail, the reader sees one.
    domain = parseaddr(letterhead.sender)[1].rpartition("@")[2]
    message["Message-ID"] = f"<{_NOT_IN_ID.sub('-', entry.id[:150])}@{domain}>"
    return message


def _thread(message: EmailMessage, mail: ReceivedMail) -> None:
    """Continue the sender's thread (RFC 5322, 3.6.4), as far as its ids can be repeated."""
    ids = _MESSAGE_ID.findall(mail.references[-100_000:])
    if mail.message_id is not None and _MESSAGE_ID.fullmatch(mail.message_id):
        message["In-Reply-To"] = mail.message_id
        ids.append(mail.message_id)
    # The first id names the thread, the last ones the place in it.
    while sum(len(known) + 1 for known in ids) > LONGEST_THREAD:
        del ids[1]
    if ids:
        message["References"] = " ".join(ids)


def _for_programs(notice: Notice, fax: Fax) -> Iterator[tuple[str, str]]:
    """Yield the headers that programs may rely on."""
    yield "X-Fax-Id", fax.id
    yield "X-Fax-Mail-Id", fax.mail_id
    yield "X-Fax-Number", fax.number
    yield "X-Fax-Outcome", notice.value
    reason = reason_for(notice, fax)
    if reason is not None:
        yield "X-Fax-Reason", reason.name
    yield "X-Fax-Pages", str(fax.pages)
    yield "X-Fax-Attempts", str(len(fax.calls))
    delivery = delivery_of(fax)
    if notice is Notice.DELIVERED and delivery is not None:
        if delivery.pages is not None:
            yield "X-Fax-Pages-Confirmed", str(delivery.pages)
        if delivery.duration is not None:
            yield "X-Fax-Duration", str(delivery.duration)  # seconds


# --- parts --------------------------------------------------------------------------------------------------


def _set_text(part: MIMEPart, text: str, subtype: str = "plain") -> None:
    # Lines of the letter are ASCII as a rule, short, and never look like a boundary; others are encoded.
    readable = text.isascii() and subtype == "plain"
    charset, encoding = ("us-ascii", "7bit") if readable else ("utf-8", "quoted-printable")
    part.set_content(text, subtype, charset=charset, cte=encoding)


def _boundary(message: EmailMessage) -> str:
    # The same for each repeat of a mail. "=_" cannot stand in quoted-printable (RFC 2045, 6.7).
    return f"=_{hashlib.sha256(str(message['Message-ID']).encode('utf-8', 'replace')).hexdigest()[:24]}"


def _fill_report(
    message: EmailMessage,
    text: str,
    status: Iterable[tuple[str, str]],
    mail: ReceivedMail,
    letterhead: Letterhead,
) -> None:
    """Make `message` a report of three parts: for people, for programs, what it is about (RFC 6522, 3)."""
    letter_part, status_part, original_part = MIMEPart(_POLICY), MIMEPart(_POLICY), MIMEPart(_POLICY)
    _set_text(letter_part, text)
    about = [("Reporting-MTA", f"dns; {letterhead.hostname}"), ("Arrival-Date", _date(mail.received_at))]
    status_part["Content-Type"] = "message/delivery-status"
    status_part.set_payload([_fields(about), _fields(status)])
    _set_text(original_part, _header_block(mail.original_headers), "rfc822-headers")
    message["MIME-Version"] = "1.0"
    message["Content-Type"] = "multipart/report; report-type=delivery-status"
    message.set_payload([letter_part, status_part, original_part])
    message.set_boundary(_boundary(message))


def _status(notice: Notice, fax: Fax, letterhead: Letterhead) -> Iterator[tuple[str, str]]:
    """Yield the fields about the recipient (RFC 3464, 2.3).

    Both addresses are of type rfc822: 2.3.2 asks for the envelope's, as it was when the mail was accepted,
    and no type for telephone numbers is registered (IANA, "Delivery Status Notification Types").
    """
    recipient = _ascii(fax.recipient or f"{fax.number}@{letterhead.hostname}")
    reason = reason_for(notice, fax)
    status = "5.0.0" if reason is None else reason.status
    yield "Original-Recipient", f"rfc822; {recipient}"
    yield "Final-Recipient", f"rfc822; {recipient}"
    match notice:
        case Notice.DELIVERED:
            yield "Action", "delivered"
            yield "Status", "2.0.0"
        case Notice.DELAYED:
            yield "Action", "delayed"
            yield "Status", f"4{status[1:]}"  # the same trouble, while it may pass (RFC 3463, 2)
        case Notice.FAILED | Notice.CANCELLED:
            yield "Action", "failed"
            yield "Status", status
    if reason is not None:
        source = "x-fax-gateway" if reason in reasons.LOCAL else "x-telnyx"
        yield "Diagnostic-Code", f"{source}; {_ascii(reason.name)}"
    if fax.last is not None:
        yield "Last-Attempt-Date", _date(fax.last.started_at)
    if notice is Notice.DELAYED and not fax.final:
        yield "Will-Retry-Until", _date(fax.give_up_at)


def _fields(fields: Iterable[tuple[str, str]]) -> "Message[str, str]":
    block: Message[str, str] = Message(_POLICY)
    for name, value in fields:
        block[name] = value
    return block


def _date(at: float) -> str:
    return format_datetime(datetime.fromtimestamp(int(at), UTC))


def _header_block(headers: bytes) -> str:
    """Return the original headers, whole lines, without anything that follows them."""
    lines = re.split(r"\r\n|\r|\n", headers[:LONGEST_HEADERS].decode("utf-8", "replace").strip("\r\n"))
    if len(headers) > LONGEST_HEADERS:
        del lines[-1:]
    if "" in lines:
        del lines[lines.index("") :]
    return "\n".join([*lines, ""])
