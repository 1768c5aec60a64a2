"""Both ends of an SMTP session in the test's own process: a handler, and a connection in memory."""

import asyncio
import sys
import tempfile
from pathlib import Path

from aiosmtpd.smtp import Session as Peer

from gateway.prepare import Received
from gateway.smtp_session import MailEnvelope, SmtpSession


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
