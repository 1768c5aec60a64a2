"""Mails of the gateway, for the tests of what they say and of how they are sent."""

import email
from dataclasses import replace
from email import policy
from email.message import EmailMessage
from typing import Literal

from faxes import NOW

from gateway.compose import Letterhead, compose
from gateway.records import Fax, Notice, OutboxEntry, ReceivedMail

LATER = NOW + 5 * 3600
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010100000000376ef9240000000a49444154789c6360000000020001"
    "48afa4710000000049454e44ae426082"
)
MAIL = ReceivedMail(
    id="m1",
    sender="clerk@example.org",
    received_at=NOW,
    message_id="<offer-4711@example.org>",
    references="<first@example.org> <second@example.org>",
    subject="Offer 4711",
    original_headers=b"From: A Clerk <clerk@example.org>\r\nSubject: Offer 4711\r\n",
    document_id="d1",
)
LETTERHEAD = Letterhead("Fax gateway <fax@fax.local>", "postmaster@example.com", "fax.example.com")


def notice(kind: Notice, fax: Fax, mail: ReceivedMail = MAIL) -> OutboxEntry:
    """Return a notice about `fax` as the outbox hands it out."""
    fax = replace(fax, recipient="1-312-736-7276@fax.local")
    return OutboxEntry(f"{fax.id}.{kind}", mail.sender, NOW, 0, 1, notice=kind, fax=fax, mail=mail)


def alert(cause: str, text: str) -> OutboxEntry:
    """Return an alert as the outbox hands it out."""
    return OutboxEntry(
        f"alert.{cause}.2026-03-02", "postmaster@example.com", NOW, 0, 1, alert=text, cause=cause
    )


def write(
    entry: OutboxEntry, form: Literal["mail", "report"] = "mail", picture: bytes | None = None
) -> EmailMessage:
    """Compose a mail at a fixed time."""
    message = compose(entry, replace(LETTERHEAD, format=form), LATER, picture)
    assert isinstance(message, EmailMessage)
    return message


def read(message: EmailMessage) -> EmailMessage:
    """Return what the standard parser makes of the mail's bytes."""
    return email.message_from_bytes(message.as_bytes(), policy=policy.default)


def text_of(message: EmailMessage) -> str:
    """Return the words a person reads, as one line."""
    body = read(message).get_body(("plain",))
    assert body is not None
    return " ".join(str(body.get_content()).split())
