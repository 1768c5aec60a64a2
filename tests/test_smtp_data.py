"""Where a mail ends, what it is made of and when it is too much: case by case, in any pieces."""

import contextlib
import errno
import io
import os
import re
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from smtp_peers import END, ENVELOPE, LimitedSession, Taker, codes, hear_out, idle, leave, to_rcpt

from gateway.prepare import Received
from gateway.smtp_data import Fault, MailData
from gateway.smtp_session import Sessions, SmtpSession

LINE, SIZE = 64, 200
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


def ours(taker: Taker) -> LimitedSession:
    """Return our session, with limits that a short mail meets."""
    return LimitedSession(taker, size_limit=SIZE, line_limit=LINE)


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


async def test_pipelined_mail_beyond_all_patience_runs_as_no_command(tmp_path: Path) -> None:
    """A mail far too large that comes together with its DATA is cut off, and no part of it is a command."""
    taker = Taker(tmp_path)
    smuggled = b"letters\r\n" * 100 + ENVELOPE + b"DATA\r\n\r\nsmuggled\r\n.\r\n"
    said = await hear_out(ours(taker), [(b"DATA\r\n" + smuggled, True)])
    assert said.splitlines()[1:] == [b"552 5.3.4 the mail is too large: 200 octets at most"]
    assert taker.taken == []


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


def test_a_disk_that_cannot_tell_its_room_costs_the_mail_and_nothing_else() -> None:
    """A file system that goes away while a mail comes in is a fault of that mail, told at its end."""

    def gone() -> bool:
        raise OSError(errno.EIO, "gone")

    data = MailData(io.BytesIO(), size_limit=3_000_000, line_limit=LINE, room=gone)
    assert data.feed(b"x\r\n" * 600_000) is None
    assert data.feed(b"\r\n.\r\nNOOP\r\n") == b"NOOP\r\n"
    assert isinstance(data.fault, OSError)
    assert data.fault.errno == errno.EIO


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
