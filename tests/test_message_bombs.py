"""Hostile mail: each is refused within seconds, and nothing but a refusal comes out."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from papers import mail, multipart, paper, part, refusal, text

from gateway.message import MailRefused, cleaned, parse, printable

PDF = paper()


def refused_soon(raw: bytes) -> MailRefused:
    """Return the refusal of a hostile mail, having seen that it cost less than two seconds."""
    begun = time.process_time()
    answer = refusal(raw)
    assert time.process_time() - begun < 2
    return answer


@pytest.mark.parametrize("levels", [101, 1000, 5000])
def test_deep_nesting(levels: int) -> None:
    """A mail nested like a Russian doll is refused."""
    content = part(PDF)
    for level in range(levels):
        content = multipart(content, boundary=f"b{level}")
    assert refused_soon(mail(content)).status == "5.6.0"


def test_nesting_up_to_the_limit() -> None:
    """A hundred levels are still read."""
    content = part(PDF)
    for level in range(99):
        content = multipart(content, boundary=f"b{level}")
    assert len(parse(mail(content)).attachments) == 1


def test_deeply_forwarded_mail() -> None:
    """A mail forwarded a thousand times over is refused."""
    refused_soon(mail(b"Content-Type: message/rfc822\r\n\r\n" * 1000 + part(PDF)))


def test_too_many_parts() -> None:
    """A mail of 100,000 parts is refused without reading them all; a thousand less is read."""
    small = text("x")
    assert refused_soon(mail(multipart(*[small] * 100_000))).status == "5.6.0"
    assert len(parse(mail(multipart(part(PDF), *[small] * 998))).attachments) == 1
    assert "structure" in refusal(mail(multipart(part(PDF), *[small] * 999))).text


@pytest.mark.parametrize(
    "field",
    [
        "Subject: " + "=?utf-8?q?x?= " * 13_000,
        "X-Long: " + "y" * 1_000_000,
        "\r\n".join(["X-Many: y"] * 100_000),
        "Subject: " + "=?utf-8?q?x?=\r\n " * 998,
    ],
)
def test_huge_header(field: str) -> None:
    """A header of too many octets or lines is refused before it is read."""
    refused_soon(mail(multipart(part(PDF)), field))


def test_long_subject_within_the_limits() -> None:
    """A subject as long as the header may be costs no noticeable time."""
    begun = time.process_time()
    parse(mail(multipart(part(PDF)), "Subject: " + "=?utf-8?q?x?= " * 7_000))
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("value", ["; " * 500_000, ';a="' * 250_000, ";a*0=b" * 100_000])
def test_parameters_without_end(value: str) -> None:
    """A part whose header field has endless parameters is refused before they are counted."""
    refused_soon(mail(multipart(b"Content-Type: application/pdf" + value.encode() + b"\r\n\r\nx")))


def test_many_long_fields_in_parts() -> None:
    """Long fields, each just short enough, spread over many parts are refused in the sum."""
    noted = text().replace(b"\r\n\r\n", b"\r\nX-Note: " + b"y" * 9_000 + b"\r\n\r\n", 1)
    assert refused_soon(mail(multipart(part(PDF), *[noted] * 200))).log.endswith("fields too long")


def test_hostile_addresses_are_not_read() -> None:
    """Address fields that break the standard parser do no harm: the envelope says who and whereto."""
    fields = ("To: " + "(" * 500, "From: =?utf-8?q?a=0D=0Ab?= <x@example.com>", "Cc: " + "<" * 5000)
    assert len(parse(mail(multipart(part(PDF)), *fields)).attachments) == 1


def test_multipart_without_boundary() -> None:
    """A multipart whose parts cannot be found is refused, since a PDF may be among them."""
    raw = mail(b"Content-Type: multipart/mixed\r\n\r\n" + part(PDF))
    assert refusal(raw).status == "5.6.0"


def test_parser_fault_is_a_refusal() -> None:
    """A field on which the standard parser itself fails refuses the mail and does not end the session."""
    # RFC 2231 continuation numbers beyond what Python turns into an integer raise ValueError.
    field = b"Content-Disposition: attachment; filename*%b=x.pdf" % (b"9" * 5000)
    answer = refusal(mail(multipart(b"Content-Type: application/pdf\r\n" + field + b"\r\n\r\n" + PDF)))
    assert (answer.status, "ValueError" in answer.log) == ("5.6.0", True)


@settings(deadline=None)  # the machine may be busy
@given(st.binary(max_size=2000))
def test_random_octets(raw: bytes) -> None:
    """No octets whatever bring anything but an answer."""
    try:
        parse(raw)
    except MailRefused as answer:
        assert 400 <= answer.code < 600  # noqa: PT017  # either outcome is right


WORDS = (
    b"Content-Type: |multipart/mixed|; boundary=b|message/rfc822|text/html|Content-Transfer-Encoding: |"
    b"base64|x-uuencode|quoted-printable|begin 644 a|%PDF-1.4|Content-Disposition: |attachment; filename*0*=|"
    b"utf-8''%|=?utf-8?b?|?=|JVBERi0=|: |Subject: |Message-ID: <|>|cid:|Content-ID: |--b|--b--|"
)
PIECES = st.sampled_from([*WORDS.split(b"|"), b"\r\n", b"\n", b"\r", b"\x00", b"\xff"])


@settings(deadline=None)  # the machine may be busy
@given(st.lists(PIECES, max_size=60).map(b"".join))
def test_random_mime(raw: bytes) -> None:
    """No arrangement of the pieces that mails are made of brings anything but an answer."""
    try:
        found = parse(raw)
    except MailRefused:
        return
    assert all(b"%PDF" in attachment.data[:1028] for attachment in found.attachments)


@settings(deadline=None)  # the machine may be busy
@given(st.text(), st.integers(min_value=4, max_value=80))
def test_cleaned_text_is_one_short_line(words: str, limit: int) -> None:
    """Whatever a sender writes comes out as one short printable line."""
    assert len(cleaned(words, limit)) <= limit
    assert printable(words, limit).isascii()
    assert printable(words, limit).isprintable()
