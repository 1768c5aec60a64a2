"""Where a mail ends, what it is made of and when it is too much: octet for octet, in any pieces.

The second opinion is aiosmtpd's own reading of DATA, line by line, which `SmtpSession` replaces.
"""

import asyncio
import contextlib
import errno
import io
import itertools
import os
import re
import tempfile
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiosmtpd.smtp import SMTP, Envelope
from aiosmtpd.smtp import Session as Peer
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from smtp_peers import Taker, Wire

from gateway import smtp_session
from gateway.prepare import Received
from gateway.smtp_data import Fault, MailData
from gateway.smtp_session import Sessions, SmtpSession

LINE, SIZE = 64, 200
END = b".\r\n"
ENVELOPE = b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n"
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


# --- beside aiosmtpd ---------------------------------------------------------------------------------------


class Ours(SmtpSession):
    """The session under test, with limits that a short mail meets."""

    line_length_limit = LINE


class Theirs(SMTP):
    """aiosmtpd as it comes, with the same limits."""

    line_length_limit = LINE


class Keeper:
    """A handler for aiosmtpd that keeps what it is given."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    async def handle_DATA(self, _server: SMTP, _session: Peer, envelope: Envelope) -> str:  # noqa: N802
        """Keep the mail."""
        self.taken.append(envelope.original_content or b"")
        return "250 2.0.0 taken"


@dataclass
class Outcome:
    """What the handler got, and the codes of the answers since the 354."""

    taken: list[bytes]
    codes: list[str]


def busy(session: SMTP, wire: Wire) -> bool:
    """Say whether the session does not wait for octets and is not over."""
    waits = vars(session._reader)["_waiter"] is not None or vars(session).get("_incoming") is not None
    return not (waits or wire.closed or conversation(session).done())


def conversation(session: SMTP) -> asyncio.Task[None]:
    """Return what ends with the session."""
    assert session._handler_coroutine is not None
    return session._handler_coroutine


async def idle(session: SMTP, wire: Wire) -> None:
    """Wait until the session waits for more octets, or is over."""
    while busy(session, wire):  # noqa: ASYNC110 -- it is in another task's hands
        await asyncio.sleep(0)


async def to_rcpt(session: SMTP) -> Wire:
    """Connect to a session and go as far as RCPT; what it says from now on is in `said`."""
    wire = Wire()
    session.connection_made(wire)
    for command in (b"EHLO a\r\n", *ENVELOPE.splitlines(keepends=True)):
        session.data_received(command)
        await idle(session, wire)
    wire.said = b""
    return wire


async def leave(session: SMTP) -> None:
    """End the connection."""
    session.connection_lost(None)
    await asyncio.wait([conversation(session)])


async def hear_out(session: SMTP, pieces: Sequence[tuple[bytes, bool]]) -> bytes:
    """Send a session the pieces after its RCPT, each followed by a wait or not; return what it says."""
    wire = await to_rcpt(session)
    for piece, wait in (*pieces, (b"", True)):
        if wire.closed:  # what is sent now arrives nowhere
            break
        session.data_received(piece)
        if wait:
            await idle(session, wire)
    await leave(session)
    return wire.said


def codes(said: bytes) -> list[str]:
    """Return the codes of answers; a mail is just refused, be it for its size or for a line."""
    words = {
        b"552 Error: Too much": "refused",
        b"552 5.3.4 the mail is": "refused",
        b"500 Line too long": "refused",
        b"554 5.6.0 a line of ": "refused",
    }
    return [
        next((word for start, word in words.items() if line.startswith(start)), line[:3].decode())
        for line in said.split(b"\r\n")[:-1]  # aiosmtpd says a client's lone CR back
    ]


def ours(taker: Taker) -> Ours:
    """Return our session."""
    return Ours(taker, Sessions(1, 1), size_limit=SIZE, hostname="h.example", timeout=300)


async def ours_on(pieces: Sequence[tuple[bytes, bool]]) -> Outcome:
    """Return what our session makes of the pieces; no file may be left."""
    with tempfile.TemporaryDirectory() as folder:
        taker = Taker(Path(folder))
        said = await hear_out(ours(taker), pieces)
        assert not taker.files()
    return Outcome(taker.taken, codes(said))


async def theirs_on(pieces: Sequence[tuple[bytes, bool]]) -> Outcome:
    """Return what aiosmtpd makes of the pieces."""
    keeper = Keeper()
    session = Theirs(
        keeper, data_size_limit=SIZE, enable_SMTPUTF8=True, hostname="h.example", timeout=300,
        loop=asyncio.get_running_loop(),
    )  # fmt: skip
    return Outcome(keeper.taken, codes(await hear_out(session, pieces)))


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    """Let a mail be longer than these small limits by any factor, as it is for aiosmtpd."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smtp_session, "_PATIENCE", 1000)
        yield


FRAGMENTS = st.sampled_from([
    b".", b"..", b"\r\n", b"\r", b"\n", b"\r\n.", b"\r\n.\r", b"\0", b"letters", b"x" * 20, b"long" * LINE,
    b"y" * (LINE - 3), b"y" * (LINE - 2), b"y" * (LINE - 1), b"y" * LINE,
])  # fmt: skip
BODIES = st.lists(FRAGMENTS, max_size=25).map(b"".join)
AFTER = st.sampled_from([b"", b"NOOP\r\n", b"NOOP\r\nNOOP\r\nRSET\r\n", b"\r\n", b"NOOP"])


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[bytes, bool]]:
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


@given(conversations())
@example([(b"DATA\r\n.\r\nNOOP\r\n", True)])
@example([(b"DATA\r\n", True), (b".\r\n", True), (b"NOOP\r\n", True)])
@example([(b"DATA\r\n", True), (b"..\r\n.\r", True), (b"\n.\r\n.\r\n.\r\n", True)])
@settings(max_examples=400, deadline=None)
def test_every_mail_is_read_as_aiosmtpd_reads_it(pieces: list[tuple[bytes, bool]]) -> None:
    """Whatever a mail is made of, in whatever pieces, both get the same octets and obey the same commands."""
    outcome = asyncio.run(ours_on(pieces))
    event(f"{len(outcome.taken)} taken, {outcome.codes.count('refused')} refused")
    assert outcome == asyncio.run(theirs_on(pieces))


@given(st.lists(FRAGMENTS, max_size=25).map(lambda parts: b"".join(parts) + b"\r\n"), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_mail_is_taken_whole_or_not_at_all(body: bytes, step: int) -> None:
    """A client that doubles its dots gets its mail through as it was, or a refusal; no part counts as one."""

    async def sent() -> None:
        with tempfile.TemporaryDirectory() as folder:
            taker = Taker(Path(folder))
            octets = re.sub(rb"(\A|\r\n)\.", rb"\1..", body)
            whole = octets + END + b"NOOP\r\n"
            pieces = [(whole[start : start + step], True) for start in range(0, len(whole), step)]
            said = await hear_out(ours(taker), [(b"DATA\r\n", True), *pieces])
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


async def test_pipelined_mail_beyond_all_patience_runs_as_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mail far too large that comes together with its DATA is cut off, and no part of it is a command."""
    monkeypatch.setattr(smtp_session, "_PATIENCE", 4)
    taker = Taker(tmp_path)
    smuggled = b"letters\r\n" * 100 + ENVELOPE + b"DATA\r\n\r\nsmuggled\r\n.\r\n"
    said = await hear_out(ours(taker), [(b"DATA\r\n" + smuggled, True)])
    assert said.splitlines()[1:] == [b"552 5.3.4 the mail is too large: 200 octets at most"]
    assert taker.taken == []


# --- where a mail ends -------------------------------------------------------------------------------------

# What one server takes for an end and another one does not, by the advisories on SMTP smuggling of December
# 2023 (SEC Consult; CVE-2023-51764, CVE-2023-51765, CVE-2023-51766), and its like.
TRICKS = (
    b"\n.\n", b"\n.\r\n", b"\n.\r", b"\r.\r", b"\r.\n", b"\r.\r\n", b"\r\n.\r", b"\r\n.\n",
    b"\r\n.\n\r\n", b"\r\n.\r\r\n", b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"\r\n.\r\0\n", b"\r\n\r.\r\n",
    b"\r\n \r\n\n.\r\n", b"\n\r.\r\n", b"\n\n.\n\n", b"\r\r.\r\r", b"\r\n.\x0b\r\n", b"\r\n.\x85\r\n",
    b"\r\n. \r\n", b"\r\n \r.\r\n", b"\r\n..\r\n", b"\r\n.\r.\r\n", b"\x8d\x8a.\x8d\x8a",
)  # fmt: skip
SMUGGLED = b"MAIL FROM:<boss@b.example>\r\nRCPT TO:<x@d.example>\r\nDATA\r\n\r\nevil\r\n"


def all_cuts(sent: bytes) -> list[list[bytes]]:
    """Return the octets whole, in two pieces in every way there is, and one by one."""
    halves = [[sent[:place], sent[place:]] for place in range(1, len(sent))]
    return [[sent], *halves, [sent[n : n + 1] for n in range(len(sent))]]


@pytest.mark.parametrize("trick", TRICKS)
async def test_nothing_but_a_lone_dot_between_crlfs_ends_a_mail(trick: bytes, tmp_path: Path) -> None:
    """What another server takes for an end is a part of the mail, and what follows runs as no command."""
    sent = b"Subject: a\r\n\r\nhello" + trick + SMUGGLED + END
    # Of a line that begins with a dot, the dot is taken away (RFC 5321, 4.5.2), and nothing else.
    kept = b"\r\n" + trick[3:] if trick.startswith(b"\r\n.") else trick
    mail = b"Subject: a\r\n\r\nhello" + kept + SMUGGLED
    cuts = all_cuts(sent)
    taker = Taker(tmp_path)
    said = await hear_out(
        ours(taker), [(piece, True) for cut in cuts for piece in (b"DATA\r\n", *cut, ENVELOPE)]
    )
    assert codes(said) == ["354", "250", "250", "250"] * len(cuts)
    assert taker.taken == [mail] * len(cuts)


def test_no_trick_contains_the_end() -> None:
    """The tricks are tricks: in none of them a mail ends by the book."""
    assert not [trick for trick in TRICKS if b"\r\n.\r\n" in b"hello" + trick + SMUGGLED]


@pytest.mark.parametrize("mail", [b"", b"\r\n", b"a\r\n", b"\r\n\r\n", b"a\r\n\r\n", b"\n\r\n", b"\r\r\n"])
@pytest.mark.parametrize("rest", [b"", b"\r\n", b".\r\n", b"\r\n.\r\n", b"NOOP\r\n"])
def test_what_follows_the_end_is_handed_back_untouched(mail: bytes, rest: bytes) -> None:
    """The first lone dot is the end, also when the mail is empty; what comes after it is the next command."""
    for cut in all_cuts(mail + END + rest):
        file = io.BytesIO()
        data = MailData(file, size_limit=SIZE, line_limit=LINE)
        left = iter(cut)
        back = next(given_back for piece in left if (given_back := data.feed(piece)) is not None)
        assert (file.getvalue(), back + b"".join(left), data.fault) == (mail, rest, None)


@pytest.mark.parametrize(("mail", "code"), [(b"hello\r\n", "250"), (b"x" * SIZE + b"\r\n", "refused")])
async def test_a_client_that_shuts_its_side_with_the_dot_hears_its_answer(
    mail: bytes, code: str, tmp_path: Path
) -> None:
    """Whose last octets and end of connection come at once is still told what became of the mail."""
    session = ours(Taker(tmp_path))
    wire = await to_rcpt(session)
    session.data_received(b"DATA\r\n")
    await idle(session, wire)
    session.data_received(mail + END)
    assert session.eof_received() is True
    await idle(session, wire)
    await leave(session)
    assert codes(wire.said) == ["354", code, "421"]


# --- limits ------------------------------------------------------------------------------------------------


def read_in(sent: bytes, *, size_limit: int = SIZE, line_limit: int = LINE) -> Fault | OSError | None:
    """Return the fault of a mail, the same however it is cut; one without is in the file, octet for octet."""
    faults = set()
    for cut in all_cuts(sent + END):
        file = io.BytesIO()
        data = MailData(file, size_limit=size_limit, line_limit=line_limit)
        assert [data.feed(piece) for piece in cut] == [None] * (len(cut) - 1) + [b""]
        if data.fault is None:
            assert file.getvalue() == re.sub(rb"(\A|\r\n)\.", rb"\1", sent)
        faults.add(data.fault)
    (fault,) = faults
    return fault


@pytest.mark.parametrize("before", [b"", b"\r\n", b"a\r\n", b"\r\n..\r\n", b"x" * (LINE - 2) + b"\r\n"])
@pytest.mark.parametrize("after", [b"", b"\r\n", b"a\r\n", b"x" * (LINE - 2) + b"\r\n"])
@pytest.mark.parametrize("inside", [b"", b"\r", b"\n", b"."])
def test_a_line_may_be_as_long_as_its_limit_and_no_longer(before: bytes, after: bytes, inside: bytes) -> None:
    """A line of exactly the limit, its CR LF counted, passes; one octet more does not, wherever it stands."""
    line = b"x" * 7 + inside + b"x" * (LINE - 9 - len(inside))
    assert read_in(before + line + b"\r\n" + after) is None
    assert read_in(before + line + b"x\r\n" + after) is Fault.LONG_LINE
    assert read_in(before + line + b"\r\r\n" + after) is Fault.LONG_LINE


def test_a_doubled_dot_counts_in_its_line() -> None:
    """The limits are for what is received, before the doubled dots are taken away."""
    assert read_in(b".." + b"x" * (LINE - 4) + b"\r\n") is None
    assert read_in(b".." + b"x" * (LINE - 3) + b"\r\n") is Fault.LONG_LINE
    assert read_in(b"..\r\n" * 5, size_limit=20) is None
    assert read_in(b"..\r\n" * 5, size_limit=19) is Fault.TOO_LARGE


@pytest.mark.parametrize("filling", [b"x", b"\r", b"\n", b"\0", b"a\r\n", b"\r\n", b"..\r\n"])
def test_a_mail_may_be_as_large_as_its_limit_and_no_larger(filling: bytes) -> None:
    """A mail of exactly the limit passes, the CR LF before the final dot counted; one octet more does not."""
    body = (filling * SIZE)[: SIZE - 2] + b"\r\n"
    body = body.replace(b"\r\n.\r\n", b"\r\n..\r\n")[:SIZE]
    assert read_in(body, line_limit=1000) is None
    assert read_in(b"x" + body, line_limit=1000) is Fault.TOO_LARGE
    assert read_in(b"", size_limit=0) is None
    assert read_in(b"\r\n", size_limit=1) is Fault.TOO_LARGE


class FullDisk(io.FileIO):
    """A file on a disk with no room, which counts how often it was tried."""

    def __init__(self) -> None:
        super().__init__("/dev/full", "wb")
        self.tries = 0

    def write(self, octets: object, /) -> int:
        """Try."""
        self.tries += 1
        return super().write(octets)  # type: ignore[arg-type]  # any buffer, as the base has it


@needs_dev_full
@pytest.mark.parametrize("size", [10, 100_000], ids=["at the end", "on the way"])
def test_a_disk_without_room_is_told_at_the_end_of_the_mail(size: int) -> None:
    """A mail that cannot be written is read to its end, and no more of it is tried to be written."""
    disk = FullDisk()
    file = io.BufferedWriter(disk)
    data = MailData(file, size_limit=1_000_000, line_limit=1_000_000)
    assert data.feed(b"x" * size) is None
    assert (data.fault is None) == (size == 10)
    tries = disk.tries
    assert data.feed(b"y" * 5 + b"\r\n.\r") is None
    assert data.feed(b"\nNOOP\r\n") == b"NOOP\r\n"
    assert isinstance(data.fault, OSError)
    assert data.fault.errno == errno.ENOSPC
    assert disk.tries == (1 if size == 10 else tries) > 0
    with contextlib.suppress(OSError):
        file.close()


@needs_dev_full
def test_a_mail_that_is_refused_is_refused_for_what_it_is() -> None:
    """A mail that is too large is not put off for want of room: its last octets are not written any more."""
    disk = FullDisk()
    file = io.BufferedWriter(disk)
    data = MailData(file, size_limit=SIZE, line_limit=LINE)
    assert data.feed(b"x\r\n") is None
    assert data.feed(b"x\r\n" * SIZE + END) == b""
    assert (data.fault, disk.tries) == (Fault.TOO_LARGE, 0)
    with contextlib.suppress(OSError):
        file.close()


@needs_dev_full
@pytest.mark.parametrize("size", [10, 100_000], ids=["at the end", "on the way"])
async def test_a_disk_without_room_costs_the_mail_and_not_the_session(size: int, tmp_path: Path) -> None:
    """The client of a mail that cannot be written hears so after its dot, and may go on."""

    class Cramped(Taker):
        def receive(self) -> Received:
            whole = super().receive()
            whole.file.close()
            return Received(os.open("/dev/full", os.O_WRONLY), whole.path)

    taker = Cramped(tmp_path)
    session = SmtpSession(taker, Sessions(1, 1), size_limit=1_000_000, hostname="h.example", timeout=300)
    said = await hear_out(session, [(b"DATA\r\n", True), (b"x\r\n" * size, True), (END + b"NOOP\r\n", True)])
    assert said.splitlines()[1:] == [b"452 4.3.1 unwritten", b"250 2.0.0 ok"]
    assert [error.errno for error in taker.unwritten_for] == [errno.ENOSPC]
    assert taker.taken == []
    assert not taker.files()


async def test_a_mail_that_uses_up_the_reserve_is_put_off_and_gives_it_back(tmp_path: Path) -> None:
    """However many large mails have begun, what is left for events and replies stays free."""
    taker = Taker(tmp_path)
    taker.has_room = False
    session = SmtpSession(taker, Sessions(1, 1), size_limit=9_000_000, hostname="h.example", timeout=300)
    large = [(b"x\r\n" * 100_000, True)] * 10
    said = await hear_out(session, [(b"DATA\r\n", True), *large, (END + b"NOOP\r\n", True)])
    assert said.splitlines()[1:] == [b"452 4.3.1 unwritten", b"250 2.0.0 ok"]
    assert [error.errno for error in taker.unwritten_for] == [errno.ENOSPC]
    assert not taker.files()


def test_what_a_refused_mail_took_is_given_back_at_once() -> None:
    """A client that goes on for an hour after its mail was refused keeps no room meanwhile."""
    with tempfile.TemporaryFile(buffering=0) as file:

        def size() -> int:
            return os.fstat(file.fileno()).st_size

        data = MailData(file, size_limit=3_000_000, line_limit=LINE, room=lambda: size() == 0)
        for _ in range(2):
            assert data.feed(b"x\r\n" * 300_000) is None
        assert isinstance(data.fault, OSError)
        assert size() == 0


@pytest.mark.parametrize(
    ("first", "fault"), [(b"x" * (LINE - 1), Fault.LONG_LINE), (b"x\r\n" * 66, Fault.TOO_LARGE)]
)
def test_nothing_of_a_mail_is_written_once_it_is_refused(first: bytes, fault: Fault) -> None:
    """A mail that cannot be taken costs no more room, and its first fault is the one that is told."""
    file = io.BytesIO()
    data = MailData(file, size_limit=SIZE, line_limit=LINE)
    assert (data.feed(first), data.fault) == (None, None)
    assert (data.feed(b"yy\r\nz"), data.fault) == (None, fault)
    for piece in (b"short\r\n", b"x" * 1000, b"\r\n" * 100, b".", b"\r\n"):
        assert (data.feed(piece) is None, data.fault) == (piece != b"\r\n", fault)
    assert file.getvalue() == first.removesuffix(b"\r\n")


@pytest.mark.parametrize("piece", [b"x", b"x\r\n", b"\r\n..", b"\r", b"\r\n.\r"])
@pytest.mark.parametrize("line_limit", [LINE, 1_000_000_000], ids=["refused", "written"])
@pytest.mark.parametrize("size_limit", [SIZE, 1_000_000_000], ids=["small", "large"])
def test_an_endless_mail_costs_no_memory(piece: bytes, line_limit: int, size_limit: int) -> None:
    """However long a mail or a line of it is, what it holds in memory does not grow."""
    octets = piece * (65536 // len(piece))
    with Path(os.devnull).open("wb") as file:
        data = MailData(file, size_limit=size_limit, line_limit=line_limit)
        tracemalloc.start()
        try:
            for _ in range(300):
                assert data.feed(octets) is None
                assert len(data._held) <= 4
            held, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert held < 10_000
    assert most < 6 * len(octets)
