"""What the door refuses while the client still listens: with its code, before any call, with no reply."""

import smtplib
from collections.abc import AsyncIterator
from email.message import EmailMessage
from typing import Any

import pytest
import pytest_asyncio
from harness import SENDER, World, letter, world
from papers import heavy, locked, paper

pytestmark = pytest.mark.asyncio(loop_scope="module")
NUMBER = "+13125550100"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def w(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One world for all tests of this file; at its end nothing was called and nobody told."""
    async with world(
        tmp_path_factory.mktemp("refusals"),
        smtp={"max_message_size": "300kB", "max_recipients": 3},
        senders={"addresses": ["*@example.com"]},
        destinations={"countries": ["US", "CA", "LI"], "deny": ["+1312666*"]},
        documents={"max_pages": 20, "max_size": "100kB"},
    ) as made:
        yield made
        assert made.carrier.requests == []
        assert made.mailbox.mails == []
        assert made.gateway.stderr == ""


async def _refused(w: World, *numbers: str, **mail: Any) -> tuple[str, str]:
    """Mail something that must be refused; return code with enhanced code, and the text."""
    with pytest.raises(smtplib.SMTPResponseException) as caught:
        await w.mail(*numbers, **mail)
    text = caught.value.smtp_error
    status, _, rest = (text.decode() if isinstance(text, bytes) else text).partition(" ")
    return f"{caught.value.smtp_code} {status}", rest


@pytest.mark.parametrize(
    ("recipient", "status", "says"),
    [
        ("office", "550 5.1.1", "+13125550123@fax.local"),
        ("+1312555", "550 5.1.1", "+13125550123@fax.local"),
        ("4232345678", "550 5.1.3", "+14232345678"),
        ("+4930123456", "550 5.7.1", "the region DE"),
        ("+19005551234", "550 5.7.1", "a premium-rate number"),
        ("+13126660000", "550 5.7.1", "not allowed here"),
    ],
)
async def test_a_number_that_cannot_be_faxed_is_refused_at_once(
    w: World, recipient: str, status: str, says: str
) -> None:
    """Wrong, unclear and forbidden numbers are refused at RCPT, with words that help."""
    code, text = await _refused(w, recipient)
    assert code == status
    assert says in text


@pytest.mark.parametrize("sender", ["stranger@example.net", "", "+13125550123@fax.local"])
async def test_a_sender_who_may_not_send_is_refused(w: World, sender: str) -> None:
    """A stranger, the null sender and a fax number as the sender: nobody could or should be told."""
    assert (await _refused(w, NUMBER, sender=sender))[0] == "550 5.7.1"


async def test_other_domains_are_not_relayed(w: World) -> None:
    """The gateway is no open relay."""
    with smtplib.SMTP("127.0.0.1", w.gateway.smtp_port, timeout=30) as door:
        door.ehlo()
        door.mail(SENDER)
        code, answer = door.rcpt(f"{NUMBER}@example.net")
    assert (code, answer[:20]) == (550, b"5.7.1 relaying denie")


async def test_one_recipient_too_many_is_for_the_next_mail(w: World) -> None:
    """Beyond the limit each further recipient is put off, so that the client sends another mail."""
    many = [f"+1312555010{place}" for place in range(4)]
    assert (await _refused(w, *many))[0] == "452 4.5.3"


def _with_word_file() -> EmailMessage:
    message = letter(NUMBER)
    message.add_attachment(b"PK...", maintype="application", subtype="msword", filename="offer.doc")
    return message


def _without_pdf() -> EmailMessage:
    message = EmailMessage()
    message["From"] = SENDER
    message.set_content("I forgot the attachment.")
    return message


def _with_header(name: str, value: str) -> EmailMessage:
    message = letter(NUMBER)
    message[name] = value
    return message


@pytest.mark.parametrize(
    ("message", "status", "says"),
    [
        (_without_pdf(), "554 5.6.1", "holds no PDF"),
        (_with_word_file(), "554 5.6.1", "offer.doc"),
        (letter(document=b"%PDF-1.7 and then nothing"), "554 5.6.0", "letter.pdf"),
        (letter(document=b"<html>not a PDF</html>"), "554 5.6.0", "is not a PDF, though it is marked as one"),
        (letter(document=b""), "554 5.6.0", "is empty"),
        (letter(document=locked(user="secret")), "554 5.6.1", "protected by a password"),
        (letter(document=paper(21)), "554 5.6.0", "21 pages"),
        (letter(document=heavy(120_000)), "552 5.3.4", "at most"),
        (_with_header("Auto-Submitted", "auto-replied"), "550 5.7.1", "Automatic replies"),
        (_with_header("List-Id", "<all.example.com>"), "550 5.7.1", "list mail"),
        (_with_header("Precedence", "bulk"), "550 5.7.1", "list mail"),
    ],
    ids=["none", "word", "damaged", "html", "empty", "password", "pages", "size", "vacation", "list", "bulk"],
)
async def test_a_mail_that_cannot_be_faxed_is_refused_after_its_last_dot(
    w: World, message: EmailMessage, status: str, says: str
) -> None:
    """What is wrong with a mail is said in the session, so that the sender's own system can tell."""
    code, text = await _refused(w, NUMBER, message=message)
    assert code == status
    assert says in text
    assert w.gateway.said("mail_accepted") == []


@pytest.mark.parametrize("declared", [True, False])
async def test_a_mail_over_the_limit_is_refused(w: World, declared: bool) -> None:  # noqa: FBT001 -- by parametrize
    """A mail over the size limit is refused: at MAIL if it says so, else at its end, in the same words."""
    message = letter(NUMBER, document=heavy(250_000))
    if declared:
        with smtplib.SMTP("127.0.0.1", w.gateway.smtp_port, timeout=30) as door:
            door.ehlo()
            code, answer = door.mail(SENDER, ["SIZE=350000"])
            assert (code, answer[:5]) == (552, b"5.3.4")
    else:
        assert (await _refused(w, NUMBER, message=message))[0] == "552 5.3.4"


async def test_a_line_without_end_is_refused(w: World) -> None:
    """A line of a hundred kilobytes is no mail; the answer says so, and the session goes on."""
    with smtplib.SMTP("127.0.0.1", w.gateway.smtp_port, timeout=30) as door:
        door.ehlo()
        door.mail(SENDER)
        door.rcpt(f"{NUMBER}@fax.local")
        code, answer = door.data(b"Subject: " + b"x" * 100_000)
        assert (code, answer[:6]) == (554, b"5.6.0 ")
        assert door.noop()[0] == 250
