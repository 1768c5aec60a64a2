"""What strangers would like to write into the gateway's mails: nothing of it gets there."""

import email
import re
from collections.abc import Iterator
from dataclasses import replace
from email.message import EmailMessage
from typing import Literal

import pytest
from faxes import NOW, Walk, at
from hypothesis import given
from hypothesis import strategies as st
from letters import MAIL, alert, notice, read, write

from gateway.compose import LONGEST_THREAD
from gateway.records import Notice, OutboxEntry

NASTY = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "Zs"]), max_size=30),
    st.sampled_from(
        [
            "x\r\nBcc: victim@example.net",
            "x\nX-Fax-Outcome: delivered",
            "=?utf-8?q?x=0D=0ABcc:_victim@example.net?=",
            "=?utf-8?b?" + "QUJD" * 500 + "?=",
            "a" * 3000,
            "ab " * 1000,
            "--=_x\r\n\r\n",
            "\ud800\udfff\x00\x85\u2028\u202e",
            "<a@b>\r\n <c@d>",
            "<" + "i" * 300 + "@example.org>",
            '"a\\"b"@example.org, victim@example.net',
            "clerk(comment)@example.org",
            "",
        ]
    ),
    st.builds(lambda one, other: f"{one}\r\n{other}", st.text(max_size=20), st.text(max_size=20)),
)
OURS = {
    "From", "To", "Date", "Message-ID", "Subject", "Reply-To", "Auto-Submitted", "In-Reply-To", "References",
    "MIME-Version", "Content-Type", "Content-Transfer-Encoding", "X-Fax-Id", "X-Fax-Mail-Id", "X-Fax-Number",
    "X-Fax-Outcome", "X-Fax-Reason", "X-Fax-Pages", "X-Fax-Pages-Confirmed", "X-Fax-Attempts",
    "X-Fax-Duration", "X-Fax-Alert",
}  # fmt: skip
FIELDS = {
    "Reporting-MTA", "Arrival-Date", "Original-Recipient", "Final-Recipient", "Action", "Status",
    "Diagnostic-Code", "Last-Attempt-Date", "Will-Retry-Until", "Content-Type", "Content-Transfer-Encoding",
}  # fmt: skip


def blocks(data: bytes) -> Iterator[list[str]]:
    """Yield the header names of the mail, of its parts, and of the blocks in a delivery status."""
    message = email.message_from_bytes(data)
    for part in message.walk():
        yield part.keys()


def check(message: EmailMessage) -> None:
    """Assert that the mail has our headers, each once, and no more parts than it should."""
    data = message.as_bytes()
    assert data.isascii()
    assert max(map(len, data.split(b"\r\n"))) < 998
    assert re.search(rb"[^\r]\n|\r[^\n]", data) is None
    first, *others = blocks(data)
    assert len(first) == len(set(first))
    assert set(first) <= OURS
    for names in others:
        assert len(names) == len(set(names))
        assert set(names) <= FIELDS | {"MIME-Version", "Content-Disposition"}


@given(
    subject=NASTY,
    message_id=NASTY,
    references=NASTY,
    headers=st.one_of(st.binary(max_size=200), NASTY.map(lambda text: text.encode("utf-8", "surrogatepass"))),
    sender=NASTY,
    recipient=NASTY,
    number=NASTY,
    reason=NASTY,
    inner=NASTY,
    carrier_id=NASTY,
    kind=st.sampled_from(Notice),
    form=st.sampled_from(["mail", "report"]),
)
def test_nothing_from_outside_adds_a_line(
    subject: str, message_id: str, references: str, headers: bytes, sender: str, recipient: str, number: str,
    reason: str, inner: str, carrier_id: str, kind: Notice, form: Literal["mail", "report"],
) -> None:  # fmt: skip
    """Neither sender nor carrier can put a header, a recipient or a part into a reply, or prevent it."""
    fax = Walk().fail("user_busy").fax
    attempt = replace(fax.attempts[0], reason=reason, internal_reason=inner, carrier_id=carrier_id)
    fax = replace(fax, number=number, reason=reason, recipient=recipient, attempts=(attempt,))
    mail = replace(
        MAIL, subject=subject, message_id=message_id, references=references, original_headers=headers
    )
    entry = OutboxEntry("m1-1.x", sender, NOW, 0, 1, notice=kind, fax=fax, mail=mail)
    message = write(entry, form)
    check(message)
    assert len(list(read(message).iter_parts())) == (3 if form == "report" else 0)
    assert "victim" not in str(read(message)["To"])


@given(cause=NASTY, text=NASTY)
def test_nothing_from_outside_adds_a_line_to_an_alert(cause: str, text: str) -> None:
    """What the carrier said can be quoted to the postmaster without harm."""
    check(write(alert(cause, text)))


@given(st.lists(st.integers(min_value=1, max_value=200), max_size=60), st.booleans())
def test_long_threads_are_shortened_in_the_middle(lengths: list[int], has_id: bool) -> None:  # noqa: FBT001 -- drawn
    """A thread of any length keeps its first and its last mail, and every id whole."""
    ids = [f"<{place}.{'i' * length}@example.org>" for place, length in enumerate(lengths)]
    mail = replace(MAIL, references=" ".join(ids), message_id="<last@example.org>" if has_id else None)
    message = write(notice(Notice.DELIVERED, at("delivered").fax, mail))
    expected = [*ids, "<last@example.org>"] if has_id else ids
    shown = str(read(message)["References"] or "").split()
    assert shown[:1] == expected[:1]
    assert shown[1:] == expected[len(expected) - len(shown) + 1 :]
    assert len(" ".join(shown)) <= LONGEST_THREAD
    assert len(shown) == len(expected) or len(" ".join(shown)) > LONGEST_THREAD - 250
    assert message["In-Reply-To"] == ("<last@example.org>" if has_id else None)


@pytest.mark.parametrize("sender", ["a@b", "o'neil+fax@sub.example.org", "clerk@[192.0.2.1]"])
def test_usual_addresses_are_shown(sender: str) -> None:
    """The sender sees the own address in the To line."""
    entry = replace(notice(Notice.DELIVERED, at("delivered").fax), recipient=sender)
    assert read(write(entry))["To"] == sender
