"""Mails of random octets in random pieces: read as aiosmtpd reads them, and taken whole or not at all.

The second opinion is aiosmtpd's own reading of DATA, line by line, which `SmtpSession` replaces.
"""

import asyncio
import base64
import itertools
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiosmtpd.smtp import SMTP, Envelope
from aiosmtpd.smtp import Session as Peer
from hypothesis import Phase, event, example, given, settings
from hypothesis import strategies as st
from smtp_peers import END, ENVELOPE, LimitedSession, Piece, Taker, codes, hear_out

from gateway import smtp_session
from gateway.smtp_session import LONGEST_LINE

LINE, SIZE = 64, 200
READ_AT_ONCE = 256 * 1024  # octets, by asyncio's transports


@dataclass(frozen=True)
class Limits:
    """Octets that a line and a mail may have."""

    line: int
    mail: int


@dataclass
class Outcome:
    """What the handler got, and the codes of the answers since the 354."""

    taken: list[bytes]
    codes: list[str]


# --- both sides --------------------------------------------------------------------------------------------


class Keeper:
    """A handler for aiosmtpd that keeps what it is given."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    async def handle_DATA(self, _server: SMTP, _session: Peer, envelope: Envelope) -> str:  # noqa: N802
        """Keep the mail."""
        self.taken.append(envelope.original_content or b"")
        return "250 2.0.0 taken"


class Theirs(SMTP):
    """aiosmtpd as it comes, with the limits of the other side."""

    command_size_limit = 1024

    def __init__(self, keeper: Keeper, limits: Limits) -> None:
        self.line_length_limit = limits.line
        super().__init__(
            keeper, data_size_limit=limits.mail, enable_SMTPUTF8=True, hostname="h.example", timeout=300,
            loop=asyncio.get_running_loop(),
        )  # fmt: skip


async def ours_on(pieces: Sequence[Piece], limits: Limits) -> Outcome:
    """Return what our session makes of the pieces; no file may be left."""
    with tempfile.TemporaryDirectory() as folder:
        taker = Taker(Path(folder))
        session = LimitedSession(taker, size_limit=limits.mail, line_limit=limits.line)
        said = await hear_out(session, pieces)
        assert not taker.files()
    return Outcome(taker.taken, codes(said))


async def theirs_on(pieces: Sequence[Piece], limits: Limits) -> Outcome:
    """Return what aiosmtpd makes of the pieces."""
    keeper = Keeper()
    said = await hear_out(Theirs(keeper, limits), pieces)
    return Outcome(keeper.taken, codes(said))


def first_difference(ours: Outcome, theirs: Outcome) -> str:
    """Say where two outcomes part, "" if they do not: a mail is too long to be shown."""
    if ours == theirs:
        return ""
    if ours.codes != theirs.codes or len(ours.taken) != len(theirs.taken):
        return f"{len(ours.taken)} taken, {ours.codes}; aiosmtpd: {len(theirs.taken)} taken, {theirs.codes}"
    place, (mine, other) = next(
        (place, pair)
        for place, pair in enumerate(zip(ours.taken, theirs.taken, strict=True))
        if pair[0] != pair[1]
    )
    octets = itertools.zip_longest(mine, other)
    octet = next(octet for octet, (one, another) in enumerate(octets) if one != another)
    shown = slice(max(0, octet - 8), octet + 8)
    return f"mail {place}, octet {octet}: {mine[shown]!r}; aiosmtpd: {other[shown]!r}"


def compared(pieces: Sequence[Piece], limits: Limits) -> Outcome:
    """Return what our session makes of the pieces, which is what aiosmtpd makes of them."""
    outcome = asyncio.run(ours_on(pieces, limits))
    assert first_difference(outcome, asyncio.run(theirs_on(pieces, limits))) == ""
    event(f"{len(outcome.taken)} taken, {outcome.codes.count('refused')} refused")
    return outcome


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    """Let a mail be longer than these small limits by any factor, as it is for aiosmtpd."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smtp_session, "_PATIENCE", 1000)
        yield


# --- short mails with small limits -------------------------------------------------------------------------

FRAGMENTS = st.sampled_from([
    b".", b"..", b"\r\n", b"\r", b"\n", b"\r\n.", b"\r\n.\r", b"\0", b"letters", b"x" * 20, b"long" * LINE,
    b"y" * (LINE - 3), b"y" * (LINE - 2), b"y" * (LINE - 1), b"y" * LINE,
    b"\x85", b"\x8d\x8a.\x8d\x8a", b"\xff\xfe",
])  # fmt: skip
# Any octet; every second one is what ends lines and mails, or would if its highest bit or another were lost.
TELLING = b"\r\n.\0\x85\x8a\x8d\xae"
OCTETS = st.lists(st.sampled_from(TELLING) | st.integers(0, 255), max_size=30).map(bytes)
BODIES = st.lists(FRAGMENTS | OCTETS, max_size=25).map(b"".join)
AFTER = st.sampled_from([b"", b"NOOP\r\n", b"NOOP\r\nNOOP\r\nRSET\r\n", b"\r\n", b"NOOP"])


@st.composite
def conversations(draw: st.DrawFn) -> list[Piece]:
    """Make one or two mails, and commands after them, in pieces that do or do not wait for each other."""
    sent = b"DATA\r\n" + draw(BODIES) + b"\r\n" + END + draw(AFTER)
    if draw(st.booleans()):
        sent += ENVELOPE + b"DATA\r\n" + draw(BODIES) + b"\r\n" + END + draw(AFTER)
    cuts = set(draw(st.lists(st.integers(1, len(sent) - 1), max_size=30)))
    if draw(st.booleans()):
        cuts |= {6}  # as a client cuts it that waits for the 354
    if draw(st.booleans()):
        step = draw(st.integers(1, 40))
        cuts |= set(range(6, len(sent), step))
    ends = [0, *sorted(cuts), len(sent)]
    wait = st.just(True) if draw(st.booleans()) else st.booleans()
    return [(sent[start:end], draw(wait)) for start, end in itertools.pairwise(ends)]


@given(conversations(), st.sampled_from([SIZE, 10 * SIZE]))
@example([(b"DATA\r\n.\r\nNOOP\r\n", True)], SIZE)
@example([(b"DATA\r\n", True), (b".\r\n", True), (b"NOOP\r\n", True)], SIZE)
@example([(b"DATA\r\n", True), (b"..\r\n.\r", True), (b"\n.\r\n.\r\n.\r\n", True)], SIZE)
@settings(max_examples=500, deadline=None)
def test_every_mail_is_read_as_aiosmtpd_reads_it(pieces: list[Piece], size_limit: int) -> None:
    """Whatever a mail is made of, in whatever pieces, both get the same octets and obey the same commands."""
    compared(pieces, Limits(LINE, size_limit))


@given(
    st.lists(FRAGMENTS | OCTETS, max_size=25).map(lambda parts: b"".join(parts) + b"\r\n"), st.integers(1, 40)
)
@settings(max_examples=200, deadline=None)
def test_mail_is_taken_whole_or_not_at_all(body: bytes, step: int) -> None:
    """A client that doubles its dots gets its mail through as it was, or a refusal; no part counts as one."""

    async def sent() -> None:
        with tempfile.TemporaryDirectory() as folder:
            taker = Taker(Path(folder))
            octets = re.sub(rb"(\A|\r\n)\.", rb"\1..", body)
            whole = octets + END + b"NOOP\r\n"
            pieces = [(whole[start : start + step], True) for start in range(0, len(whole), step)]
            session = LimitedSession(taker, size_limit=SIZE, line_limit=LINE)
            said = await hear_out(session, [(b"DATA\r\n", True), *pieces])
        too_long = max(map(len, octets.split(b"\r\n"))) + 2 > LINE
        answers = {
            (False, False): [b"250 2.0.0 taken"],
            (True, False): [b"552 5.3.4 the mail is too large: 200 octets at most"],
            (False, True): [b"554 5.6.0 a line of the mail is longer than 64 octets"],
        }
        answers[True, True] = answers[True, False] + answers[False, True]
        _, answer, noop = said.splitlines()
        assert answer in answers[len(octets) > SIZE, too_long]
        assert noop == b"250 2.0.0 ok"
        assert taker.taken == ([body] if answer.startswith(b"250") else [])

    asyncio.run(sent())


# --- long mails with real limits ---------------------------------------------------------------------------


def chosen(*shares: tuple[bytes, int]) -> bytes:
    """Return a table for `bytes.translate` by which each of some octets has `share` chances in 256 more."""
    some = b"".join(octets * share for octets, share in shares)
    return some + bytes(range(len(some), 256))


# Pairs of CR and LF are some 64 octets apart, or 4096.
SHORT_LINES = chosen((b"\r\n", 32), (b".", 24), (b"\0\x85\x8a\x8d", 4))
LONG_LINES = chosen((b"\r\n", 4), (b".\0", 8), (b"\x85\x8a\x8d", 8))


def base64_lines(chance: random.Random, size: int) -> bytes:
    """Make what an attachment is made of, in lines of 76 characters."""
    return base64.encodebytes(chance.randbytes(size * 3 // 4)).replace(b"\n", b"\r\n")


def doubled_dots(chance: random.Random, size: int) -> bytes:
    """Make lines that begin with a dot, a doubled one or one that was left single."""
    starts = [b"..", b"...", b".", b"..\r", b".\r", b".\n", b"..\x8d\x8a"]
    ends = [b"\r\n", b"letters\r\n", b"x" * 150 + b"\r\n"]
    return b"".join(chance.choice(starts) + chance.choice(ends) for _ in range(size // 50))


def endless_line(chance: random.Random, size: int) -> bytes:
    """Make octets that end no line: of CR and LF, only one is among them."""
    lost = chance.choice([b"\r", b"\n"])
    return chance.randbytes(size).translate(SHORT_LINES).replace(lost, b".")


MATERIALS: dict[str, Callable[[random.Random, int], bytes]] = {
    "base64": base64_lines,
    "any octets": lambda chance, size: chance.randbytes(size),
    "short lines": lambda chance, size: chance.randbytes(size).translate(SHORT_LINES),
    "long lines": lambda chance, size: chance.randbytes(size).translate(LONG_LINES),
    "doubled dots": doubled_dots,
    "endless line": endless_line,
}


@dataclass(frozen=True)
class Span:
    """Some `size` octets of a long mail; which, the seed tells."""

    material: str
    size: int
    seed: int

    def octets(self) -> bytes:
        """Make them."""
        chance = random.Random(self.seed)  # noqa: S311 -- repeatable on purpose
        return MATERIALS[self.material](chance, self.size)


@dataclass(frozen=True)
class Cutting:
    """How a long conversation is cut: where, the seed tells, and also at places where it matters.

    `longest`: octets of a piece, of every one if they are `even`.
    `near_ends` and `near_dots`: octets from a CR LF . CR LF, or from the CR LF before a dot, to a cut.
    """

    longest: int
    even: bool
    near_ends: frozenset[int]
    near_dots: frozenset[int]
    after_data: bool
    waits: bool
    seed: int

    def pieces(self, sent: bytes, ends: list[int]) -> list[Piece]:
        """Cut; `ends` are the places of each CR LF . CR LF."""
        chance = random.Random(self.seed)  # noqa: S311 -- repeatable on purpose
        dots = [found.start() for found in re.finditer(rb"\r\n\.", sent)]
        some_dots = chance.sample(dots, min(30, len(dots)))
        cuts = {end + near for end in ends for near in self.near_ends}
        cuts |= {dot + near for dot in some_dots for near in self.near_dots}
        at = 6 if self.after_data else 0
        while at < len(sent):
            cuts.add(at)
            at += self.longest if self.even else int((self.longest + 1) ** chance.random())
        places = [0, *sorted(cut for cut in cuts if 0 < cut < len(sent)), len(sent)]
        return [
            (sent[start:end], self.waits or chance.random() < 0.5)
            for start, end in itertools.pairwise(places)
        ]


# Given the longest line and the largest mail.
LIMITS: dict[str, Callable[[int, int], Limits]] = {
    "the gateway's": lambda _line, _mail: Limits(LONGEST_LINE, 28_000_000),
    "RFC 5321's": lambda _line, _mail: Limits(1000, 28_000_000),
    "just enough": Limits,
    "a line too long": lambda line, mail: Limits(line - 1, mail),
    "an octet too much": lambda line, mail: Limits(line, mail - 1),
}


@dataclass(frozen=True)
class Conversation:
    """Long mails, each followed by commands; all that is sent follows from these few words."""

    mails: tuple[tuple[Span | bytes, ...], ...]
    after: bytes
    cutting: Cutting

    def pieces(self, bodies: list[bytes]) -> list[Piece]:
        """Return what is sent, given the mails."""
        sent, ends = b"", []
        for body in bodies:
            sent += (ENVELOPE if sent else b"") + b"DATA\r\n" + body
            ends.append(len(sent) - 2)
            sent += END + self.after
        return self.cutting.pieces(sent, ends)

    def bodies(self) -> list[bytes]:
        """Return the mails as they are sent, their ends left away: none ends before its end."""
        joined = (
            b"".join(part if isinstance(part, bytes) else part.octets() for part in parts) + b"\r\n"
            for parts in self.mails
        )
        return [re.sub(rb"(\A|(?<=\r\n))\.(?=\r\n)", b"..", body) for body in joined]


def spans(least: int, most: int) -> st.SearchStrategy[Span]:
    """Draw a part of a mail."""
    materials = st.sampled_from(list(MATERIALS))
    return st.builds(Span, material=materials, size=st.integers(least, most), seed=st.integers(0, 2**32))


def cuttings() -> st.SearchStrategy[Cutting]:
    """Draw how a conversation is cut, into pieces of 1 octet to 256 KB."""
    nowhere = st.just(frozenset[int]())
    return st.builds(
        Cutting,
        longest=st.sampled_from([READ_AT_ONCE, 65_536, 1460]),
        even=st.booleans(),
        near_ends=nowhere | st.frozensets(st.integers(-4, 8)),
        near_dots=nowhere | st.frozensets(st.integers(0, 5)),
        after_data=st.booleans(),
        waits=st.booleans(),
        seed=st.integers(0, 2**32),
    )


def long_conversations() -> st.SearchStrategy[Conversation]:
    """Draw a mail longer than what is read at once, perhaps another mail, and how they are sent."""
    some = FRAGMENTS | spans(0, 1000) | spans(50_000, 200_000)
    long = st.tuples(some, spans(READ_AT_ONCE + 1000, 600_000), some)
    any_length = st.lists(some, max_size=3).map(tuple)
    return st.builds(
        Conversation,
        mails=st.tuples(long) | st.tuples(long, any_length) | st.tuples(any_length, long),
        after=st.sampled_from([b"", b"NOOP\r\n", b"NOOP\r\nNOOP\r\nRSET\r\n", b"\r\n"]),
        cutting=cuttings(),
    )


@pytest.mark.parametrize("which", LIMITS)
@given(talk=long_conversations())
@settings(max_examples=60, deadline=None, phases=set(Phase) - {Phase.explain})  # that takes minutes here
def test_a_long_mail_is_read_as_aiosmtpd_reads_it(talk: Conversation, which: str) -> None:
    """Of each long mail within the limits both get the same octets, and each other one both refuse."""
    bodies = talk.bodies()
    lines = [max(map(len, body.split(b"\r\n"))) + 2 for body in bodies]
    sizes = [len(body) for body in bodies]
    assert max(sizes) > READ_AT_ONCE
    limits = LIMITS[which](max(lines), max(sizes))
    outcome = compared(talk.pieces(bodies), limits)
    fit = [line <= limits.line and size <= limits.mail for line, size in zip(lines, sizes, strict=True)]
    assert (len(outcome.taken), outcome.codes.count("refused")) == (fit.count(True), fit.count(False))
