"""Both ends of an SMTP session in the test's own process: a handler, and a connection in memory."""

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from aiosmtpd.smtp import SMTP
from aiosmtpd.smtp import Session as Peer

from gateway.prepare import Received
from gateway.smtp_session import MailEnvelope, Sessions, SmtpSession

END = b".\r\n"
ENVELOPE = b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n"

Piece = tuple[bytes, bool]
"""Octets that arrive at once, and whether the client then waits until the session has done what it can."""


class Taker:
    """A handler that takes every mail by way of files in `folder`, or meets `fault` instead."""

    def __init__(self, folder: Path, fault: Exception | None = None) -> None:
        self._folder = folder
        self._fault = fault
        self.taken: list[bytes] = []
        self.unwritten_for: list[OSError] = []
        self.has_room = True

    def files(self) -> list[Path]:
        """Return what lies in the folder now."""
        return list(self._folder.iterdir())

    async def handle_MAIL(  # noqa: N802 -- aiosmtpd's name
        self, _server: SmtpSession, _session: Peer, envelope: MailEnvelope, address: str, _options: list[str]
    ) -> str:
        """Take any sender."""
        envelope.mail_from = envelope.sender = address
        return "250 2.1.0 ok"

    async def recipient(self, _session: Peer, envelope: MailEnvelope, raw: str) -> str:
        """Take any recipient."""
        envelope.rcpt_tos.append(raw)
        return "250 2.1.5 ok"

    def busy(self) -> str | None:
        """Have time."""
        return None

    def receive(self) -> Received:
        """Give a file."""
        handle, name = tempfile.mkstemp(dir=self._folder)
        return Received(handle, Path(name))

    def room(self) -> bool:
        """Have room."""
        return self.has_room

    def largest(self, _session: Peer, _envelope: MailEnvelope) -> int:
        """Take any size."""
        return sys.maxsize

    def unwritten(self, _session: Peer, _envelope: MailEnvelope, error: OSError) -> str:
        """Note what the file did."""
        self.unwritten_for.append(error)
        return "452 4.3.1 unwritten"

    async def take(self, _session: Peer, _envelope: MailEnvelope, received: Received) -> str:
        """Take the mail, or fail."""
        with received:
            if self._fault is not None:
                raise self._fault
            self.taken.append(received.path.read_bytes())
        return "250 2.0.0 taken"


class Wire(asyncio.Transport):
    """A connection in memory, so that the server gets exactly the pieces that a test chooses."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 25)})
        self.said = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep an answer."""
        if not self.closed:
            self.said += data

    def write_eof(self) -> None:
        """Say nothing more."""
        self.closed = True

    def is_closing(self) -> bool:
        """Tell whether it was closed."""
        return self.closed

    def close(self) -> None:
        """Be closed."""
        self.closed = True

    abort = close

    def pause_reading(self) -> None:
        """Go on all the same."""

    def resume_reading(self) -> None:
        """Go on."""


class LimitedSession(SmtpSession):
    """The session under test, with limits of the test's own."""

    def __init__(self, handler: Taker, *, size_limit: int, line_limit: int) -> None:
        self.line_length_limit = line_limit
        super().__init__(handler, Sessions(1, 1), size_limit=size_limit, hostname="h.example", timeout=300)


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


async def hear_out(session: SMTP, pieces: Sequence[Piece]) -> bytes:
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
