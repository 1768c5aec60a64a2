"""Large bodies that go past the standard parser: nothing tells the mail from one that it read whole."""

import base64
import gc
import itertools
import sys
import time
import tracemalloc
from collections.abc import Iterator
from email.parser import BytesParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from papers import heavy, mail, mail_of, multipart, paper, part, text

from gateway.message import Mail, MailRefused, _Bounded, _Budget, parse
from gateway.message_bodies import Bodies, Part

PDF = paper()
LINES = base64.encodebytes(PDF).replace(b"\n", b"\r\n")
SMALL = 64
"""Octets from which on a body is lifted out here, so that small mails have such bodies."""
NEVER = 1 << 40


def outcome(raw: bytes, large: int) -> Mail | tuple[int, str, str, str]:
    """Return what becomes of a mail, be it the refusal."""
    try:
        return parse(raw, large)
    except MailRefused as refused:
        return refused.code, refused.status, refused.text, refused.log


def tree(raw: bytes, large: int) -> list[object]:
    """Return everything the parser made of a mail, with what was lifted out back in its place."""
    bodies = Bodies(raw, large)

    def read(part: Part) -> Iterator[object]:
        yield (
            part.get_unixfrom(),
            part.get_content_type(),
            list(part.raw_items()),
            list(map(repr, part.defects)),
        )
        yield [None if text is None else bodies.whole(text) for text in (part.preamble, part.epilogue)]
        inner = part._payload
        if isinstance(inner, list):
            yield len(inner)
            for child in inner:
                assert isinstance(child, Part)
                yield from read(child)
        else:
            yield inner and bodies.whole(inner)
            yield part.content()

    try:
        message = BytesParser(policy=_Bounded(_Budget(bodies))).parsebytes(bodies.rest)
        assert isinstance(message, Part)
        return list(read(message))
    except (MailRefused, ValueError) as fault:
        return [repr(fault)]


def same(raw: bytes, large: int = SMALL) -> bool:
    """Assert that lifting changes nothing in a mail; return whether anything was lifted."""
    # What the parser says of a line it does not like, it says of the same line.
    assert tree(raw, large) == tree(raw, NEVER)
    assert outcome(raw, large) == outcome(raw, NEVER)
    return Bodies(raw, large).rest != raw


# Where a body may stand

HEAD = b"Subject: x\r\nContent-Type: "
ENCODED = b"Content-Transfer-Encoding: base64\r\n\r\n" + LINES
CONTEXTS = {
    "one part": b"application/pdf\r\n" + ENCODED,
    "preamble": b"multipart/mixed; boundary=b\r\n\r\n" + LINES + b"--b\r\n\r\nx\r\n--b--\r\n",
    "epilogue": b"multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nx\r\n--b--\r\n\r\n" + LINES,
    "header block": b"multipart/mixed; boundary=b\r\n\r\n--b\r\n" + ENCODED + b"\r\n--b--\r\n",
    "no header": b"multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\n" + LINES + b"--b--\r\n",
    "forwarded": b"message/rfc822\r\n\r\n" + LINES,
    "forwarded part": b"message/rfc822\r\n\r\nContent-Type: application/pdf\r\n" + ENCODED,
    "digest": b"multipart/digest; boundary=b\r\n\r\n--b\r\n\r\n" + LINES + b"--b\r\n\r\n" + ENCODED + b"--b",
    "report": b"message/delivery-status\r\n\r\n" + LINES + b"A-B: c\r\n\r\n" + LINES + b"-\r\n\r\nA: b",
    "report, to a blank line": b"message/delivery-status\r\n\r\n" + b"QUJD\r\n" * 40 + b"\r\nA: bc\r\nA-B: c",
    "report of fields": b"message/delivery-status\r\n\r\n" + b"AB:D\r\n" * 40 + b"-",
    "report of blanks": b"message/delivery-status\r\n\r\n" + b" BCD\r\n" * 40 + b"-",
    "no boundary": b"multipart/mixed\r\n\r\n" + LINES,
    "empty boundary": b'multipart/mixed; boundary=""\r\n\r\n--\r\n' + ENCODED + b"----\r\n",
    "boundary never": b"multipart/mixed; boundary=b\r\n\r\n" + LINES,
    "not closed": b"multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: application/pdf\r\n" + ENCODED,
    "cut off": b"multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: application/pdf\r\n" + ENCODED[:-2],
    "nested": multipart(multipart(part(PDF), boundary="bb"), boundary="b")[len("Content-Type: ") :],
    "outer boundary": b"multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: multipart/mixed; boundary=c"
    b"\r\n\r\n--c\r\nContent-Type: application/pdf\r\n" + ENCODED + b"--b--\r\n",
    "hyphens": b"multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: application/pdf\r\n"
    + ENCODED
    + b"--bb\r\n--b --\r\n-b\r\n--b--\r\n",
    "two blank lines": b"application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n\r\n\r\n" + LINES,
    "blank lines behind": b"application/pdf\r\n" + ENCODED + b"\r\n\r\n\r\n",
    "twice": b"application/pdf\r\n" + ENCODED + b"-\r\n\r\n" + LINES,
    "7bit": b"application/pdf\r\n\r\n%PDF-\r\n\r\n" + LINES,
    "plain": b"text/plain\r\n\r\n" + LINES,
    "quoted-printable": b"text/plain\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + LINES,
    "uuencode": b"text/plain\r\nContent-Transfer-Encoding: x-uuencode\r\n\r\nbegin 644 a\r\n\r\n" + LINES,
    "html": b"text/html\r\n" + ENCODED,
    "beyond ASCII": b"application/pdf\r\n" + ENCODED + b"\xe4\r\n",
    "no charset": b"application/pdf; charset=undefined\r\n" + ENCODED + b"\xe4\r\n",
    "junk in front": b"application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n*\r\n\r\n" + LINES,
    "separator in front": b"application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n\x1c\r\n\r\n" + LINES,
}  # fmt: skip


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("alone", [True, False], ids=["whole mail", "part"])
def test_body_in_every_place(context: str, alone: bool) -> None:  # noqa: FBT001  # pytest's way
    """Wherever in a mail the lines of base64 stand, the mail reads as if they had not been lifted out."""
    raw = HEAD + CONTEXTS[context]
    if not alone:
        raw = mail(multipart(text(), HEAD + CONTEXTS[context], part(PDF, name="other.pdf"), boundary="outer"))
    assert same(raw) or " of " in context


@pytest.mark.parametrize("encoding", ["base64", "BASE64 ", "7bit", "quoted-printable", "x-unknown"])
@pytest.mark.parametrize(
    "end",
    [
        b"",
        b"=",
        b"==",
        b"===",
        b"QQ",
        b"QQ=",
        b"QQ==",
        b"QQ==\r\n\r\n",
        b"QQ==\x0b\x0c \t",
        b"QQ===",
        b"QQ==QQ==",
        b"QUI=",
        b"QUI==",
        b"Q=UI",
        b"QUJD=",
        b"=QUJD",
        b"Q",
        b"QUJD\r",
        b"QU\n-JD",
        b"*",
        b"\xa0",
        b"\x00",
    ],
)
def test_end_of_the_base64(end: bytes, encoding: str) -> None:
    """How the encoding ends decides as ever whether it is taken, and as what."""
    head = f"Content-Type: application/pdf\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n".encode()
    for body in (LINES.rstrip(), LINES.replace(b"=", b"Q").rstrip(), b"\r\n".join([b"QUJD"] * 40)):
        assert same(mail(multipart(head + body + b"\r\n" + end)))
        assert same(mail(multipart(head + body + b"\r\n" + end + b" " * 5)))
        same(mail(head + body + end))


@pytest.mark.parametrize("width", [1, 2, 3, 5, 64, 75, 76, 77, 998])
def test_lines_of_every_length(width: int) -> None:
    """However long its lines, a document arrives whole."""
    letters = base64.b64encode(PDF * 20)
    lines = b"\r\n".join(letters[place : place + width] for place in range(0, len(letters), width))
    raw = mail(b"Content-Type: application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n" + lines)
    assert same(raw)
    assert parse(raw, SMALL).attachments[0].data == PDF * 20


@pytest.mark.parametrize("octet", [b"*", b"=", b"-", b":", b" ", b"\r", b"\n", b"\x00", b"\xff", b"\r\n"])
def test_octet_that_does_not_belong(octet: bytes) -> None:
    """An octet that is no letter, anywhere in the encoding, is judged as ever."""
    raw = mail(part(PDF))
    start = raw.index(LINES)
    for place in range(start, start + len(LINES), 5):
        same(raw[:place] + octet + raw[place + 1 :])
        same(raw[:place] + octet * 4 + raw[place + 4 :])
        same(raw[:place] + octet + raw[place:])


@pytest.mark.parametrize("line", [b"QQ:Q", b"QQQ*", b"QQQ="])
def test_no_end_with_padding_in_it_makes_up_for_a_missing_letter(line: bytes) -> None:
    """A decoder that goes on behind padding (pybase64 before 1.5) makes no lines of base64 out of others."""
    for kind in (b"text/html", b"message/rfc822", b"application/pdf\r\nContent-Transfer-Encoding: base64"):
        for end in (b"QQQ=Q=", b"Q=QQ=", b"QQQ=Q==", b"QQ=Q="):
            same(mail(b"Content-Type: " + kind + b"\r\n\r\n" + line + b"\r\n" + b"QUJD\r\n" * 23 + end))


@pytest.mark.parametrize("octet", [b"*", b"=", b":"])
def test_no_end_makes_up_for_an_octet_that_does_not_belong(octet: bytes) -> None:
    """Whatever follows them, lines with an octet that is no letter are not taken for sound by length."""
    head = b"Content-Type: application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    for count in (1, 2, 3, 4):
        body = (b"QUJD" * 9 + octet * count + b"QUJD"[count:] + b"\r\n") * 40
        for length in range(6):
            for end in itertools.product(b"A=:", repeat=length):
                same(mail(head + body + bytes(end)))


def test_mail_that_holds_the_line_in_place_of_a_body() -> None:
    """A sender who writes the line that stands for a lifted body gets it read as the text that it is."""
    raw = mail_of(PDF)
    mark = Bodies(raw, SMALL).rest.partition(b"*")[2].partition(b"*")[0]
    assert mark
    for words in (b"*" + mark + b"*", b"*" + mark, b"*lifted from octet 99*", b"*lifted from octet *"):
        forged = raw.replace(b"Please fax this.", words)
        same(forged)
        assert parse(forged, SMALL).attachments[0].data == PDF
        same(mail(multipart(part(words), part(words + b"\r\n\r\n" + LINES, encoding="7bit"))))
        same(raw.replace(b"Order 4711", words))
        same(raw.replace(b"=_limit", words))


def test_line_feeds_only() -> None:
    """A mail whose lines end in a bare line feed is left to the standard parser, and no different."""
    assert not same(mail_of(PDF).replace(b"\r\n", b"\n"))


# What it is for


def test_parser_sees_little_of_a_large_mail() -> None:
    """The standard parser, slow as it is, gets no more of a scanned page than of a short letter."""
    for raw in (mail_of(heavy(100_000)), mail_of(heavy(50_000), heavy(50_000))):
        assert len(Bodies(raw).rest) < 3_000


def test_memory_for_a_large_mail() -> None:
    """Reading a large mail takes the memory for its document once, and hardly more."""
    raw = mail_of(heavy(4_000_000))
    tracemalloc.start()
    try:
        parse(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize("raw", [mail_of(PDF), mail(text()), mail(multipart(text()) * 1001)])
def test_nothing_is_kept_of_a_mail(raw: bytes) -> None:
    """A mail that was read, or refused, does not stay in memory until somebody tidies up."""
    gc.disable()
    try:
        before = sys.getrefcount(raw)
        outcome(raw, SMALL)
        assert sys.getrefcount(raw) == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "hostile",
    [
        b"\r\n\r\n",
        b"\r\n\r\n-",
        b"\r\n\r\nA",
        b"A\r\n",
        b"\r\n\r\n" + b"A" * 2100 + b"-",
        b"\r\n\r\n" + b"AA\r\n" * 600 + b"A:",
        b"\r\n\r\n" + b"AAAA\r\n" * 350 + b"-",
        b"\r\n\r\n*lifted from octet 0*\r\n\r\n" + b"AAAA\r\n" * 350 + b"-",
    ],
)
def test_search_cannot_be_made_slow(hostile: bytes) -> None:
    """No arrangement of blank lines and near misses makes the search cost more than a moment."""
    raw = mail(hostile * (8_000_000 // len(hostile)))
    begun = time.process_time()
    Bodies(raw)
    assert time.process_time() - begun < 1


# Mails at random

FRONTS = st.sampled_from([b"\r\n\r\n"] * 5 + [b"\r\n\r\n\r\n", b"\r\n", b""])
WIDTHS = st.sampled_from([1, 2, 4, 7, 8, 76, 76, 76])
LETTERS = st.sampled_from([base64.b64encode(PDF), base64.b64encode(PDF), b"QUJD" * 100, b"A" * 397])
ENDS = st.sampled_from(
    [
        b"\r\n-",
        b"\r\n--b\r\n",
        b"\r\n--b--\r\n",
        b"\r\n",
        b"\r\n\r\n",
        b"QQ\r\n",
        b"=\r\n",
        b"=",
        b":",
        b"\n",
        b"",
    ]
)

SPOILING = st.sampled_from(
    [b"", b"", b"", b":", b"=", b"*", b"****", b"====", b"\r", b"\n", b"\r\n", b"\xff", b" "]
)


@st.composite
def runs(draw: st.DrawFn) -> bytes:
    """Return lines of base64, mostly sound, and behind a blank line as a rule."""
    width, letters = draw(WIDTHS), draw(LETTERS)
    letters = letters[: draw(st.just(len(letters)) | st.integers(1, 12).map(lambda count: count * width))]
    lines = b"\r\n".join(letters[place : place + width] for place in range(0, len(letters), width))
    spoiling, place = draw(SPOILING), draw(st.integers(0, 40)) * draw(st.sampled_from([1, width + 2]))
    lines = lines[:place] + spoiling + lines[place + len(spoiling) :]
    return draw(FRONTS) + lines + draw(ENDS)


KINDS = st.sampled_from(
    ["application/pdf"] * 4 + ["text/plain", "text/html", "message/rfc822", "message/delivery-status", "x/y"]
)
ENCODINGS = st.sampled_from(["base64"] * 4 + ["7bit", "8bit", "quoted-printable", "x-uuencode"])
BOUNDARIES = st.sampled_from(
    ["b"] * 4 + ["bb", "=_limit", "-", "", "b b", "b--", "QUJD", "*lifted from octet 9*"]
)
HOLDERS = st.sampled_from(["multipart/mixed"] * 3 + ["multipart/digest", "multipart/x", "message/rfc822"])


@st.composite
def leaves(draw: st.DrawFn) -> bytes:
    """Return a part that holds no others, now and then without its header."""
    head = f"Content-Type: {draw(KINDS)}\r\nContent-Transfer-Encoding: {draw(ENCODINGS)}".encode()
    return draw(st.sampled_from([head, head, head, b"no field", b""])) + draw(runs())


def holders(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Return parts that hold these, with base64 in front of and behind them now and then."""

    def hold(kind: str, boundary: str, parts: list[bytes], before: bytes, behind: bytes) -> bytes:
        whole = multipart(*parts, kind=kind, boundary=boundary)
        return whole.replace(b"\r\n\r\n", b"\r\n\r\n" + before, 1) + behind

    around = st.just(b"") | runs()
    return st.builds(hold, HOLDERS, BOUNDARIES, st.lists(inner, min_size=1, max_size=3), around, around)


MAILS = st.recursive(leaves() | st.just(part(PDF)), holders, max_leaves=5).map(mail)
WORDS = (
    b"Content-Type: |multipart/mixed|; boundary=b|message/rfc822|message/delivery-status|application/pdf|"
    b"Content-Transfer-Encoding: base64|--b|--b--|%PDF-1.4|=|:|From |*lifted from octet |0*|"
    b"\r\n|\r\n\r\n|\n|\r|\xff"
)
SOUP = st.lists(st.sampled_from(WORDS.split(b"|")) | runs(), max_size=30).map(b"".join)


@settings(deadline=None)  # the machine may be busy
@given(MAILS | SOUP, st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 40), runs()), max_size=3))
def test_random_mails(raw: bytes, splices: list[tuple[int, int, bytes]]) -> None:
    """Whatever a mail holds and wherever base64 is thrown into it, lifting changes nothing."""
    for place, cut, run in splices:
        at = place % (len(raw) + 1)
        raw = raw[:at] + run + raw[at + cut :]
    for large in (1, SMALL, 200):
        same(raw, large)
