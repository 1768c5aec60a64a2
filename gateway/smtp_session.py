"""One SMTP conversation, with the guards that aiosmtpd leaves to its user.

In charge of: limits on connections, commands, bytes, lines and time; the octets of a mail, which go straight
from the network into its file; the answers to faults; the RCPT line as it was written. What a mail means is
decided in `smtp`, through the `Handler`.

Promises: memory and time are bounded for every peer. A fault of ours is answered 451 and never with words of
the fault; inside DATA it closes the connection, or the rest of the mail would run as commands. A client that
shuts its side right after the final dot still gets its answer.

Fails: by closing the one connection.
"""

import asyncio
import collections
import contextlib
import re
import sys
from typing import Any, Protocol

from aiosmtpd.smtp import SMTP, Envelope
from aiosmtpd.smtp import Session as Peer

from gateway.address import Refusal
from gateway.log import get_logger
from gateway.prepare import Received
from gateway.smtp_data import Fault, MailData

COMMAND_LIMITS = {"NOOP": 100, "HELP": 20, "VRFY": 20, "EXPN": 20, "HELO": 50, "EHLO": 50, "*": 100_000}
"""How often a session may give each command; the last is for those that carry mail."""
SESSION_LIMIT = 3600.0
"""Seconds that a session may last, whatever it does."""
LONGEST_LINE = 65536
"""Octets; RFC 5321 says 1000, old programs and scanners write what they like (4.5.3.1.6)."""
ANSWER_TIME = 60.0
"""Seconds after the final dot in which the connection is not cut, however short the time for silence is."""
SLOWEST = 500
"""Octets a second that a mail must come in with in the long run, as Postfix's `smtpd_min_data_rate`."""
_LARGE_READ = 128 * 1024  # octets that come at once from a client with more behind them
_PATIENCE = 4  # times the size limit that a client may send before it is cut off
_GRACE = 10.0  # seconds to take our last line, before a connection that is not read from is torn down
_SIZE = re.compile(r"\bSIZE=([0-9]{1,20})\b", re.IGNORECASE)
_PATH = re.compile(
    r"\s*(?:<(?:@[^<>:]*:)?(?P<inner>[^<>]*)>|(?P<bare>[^<>\s]+))(?:\s+(?P<rest>.*))?\s*", re.DOTALL
)

_SHUTTING_DOWN = "421 4.3.2 shutting down, try again later"

# aiosmtpd's own answers, given the codes of RFC 3463 and no words of the client.
_UNCODED = re.compile(r"([45][0-9][0-9]) (?![45]\.[0-9])(?:Error: )?(.*)", re.DOTALL)
_CODES = {
    "454": "4.7.0", "500": "5.5.2", "501": "5.5.4", "502": "5.5.1", "503": "5.5.1", "552": "5.3.4",
    "555": "5.5.4",
}  # fmt: skip
_WORDED = {
    "250 OK": "250 2.0.0 ok",
    "221 Bye": "221 2.0.0 bye",
    "553 5.1.3 Error: malformed address": "501 5.1.7 this sender address is malformed",
}

log = get_logger()


class MailEnvelope(Envelope):
    """What MAIL and RCPT said so far."""

    def __init__(self) -> None:
        super().__init__()
        self.sender = ""
        self.numbers: dict[str, str] = {}  # each number once: the address as written
        self.postmaster = False


class Handler(Protocol):
    """What decides about a mail; each answers one line, code and enhanced status code first."""

    async def handle_MAIL(  # noqa: N802 -- aiosmtpd's name
        self, server: "SmtpSession", session: Peer, envelope: MailEnvelope, address: str, options: list[str]
    ) -> str:
        """Decide about the sender."""

    async def recipient(self, session: Peer, envelope: MailEnvelope, raw: str) -> str:
        """Decide about the argument of RCPT, as written. Raises Refusal."""

    def busy(self) -> str | None:
        """Return an answer if no mail can be examined now."""

    def receive(self) -> Received:
        """Return a file for the mail that comes. Raises OSError."""

    def room(self) -> bool:
        """Say whether the disk has room for more of it."""

    def largest(self, session: Peer, envelope: MailEnvelope) -> int:
        """Return how many octets this mail may have."""

    def unwritten(self, session: Peer, envelope: MailEnvelope, error: OSError) -> str:
        """Return the answer for a mail that could not be written down."""

    async def take(self, session: Peer, envelope: MailEnvelope, received: Received) -> str:
        """Take the mail, whose file is the handler's from now on; 250 only once it is durable."""


class Sessions:
    """The sessions of one door, counted."""

    def __init__(self, most: int, most_per_host: int) -> None:
        self._most = most
        self._most_per_host = most_per_host
        self._hosts: collections.Counter[str] = collections.Counter()
        self.open: set[SmtpSession] = set()
        self.stopping = False

    def refusal(self, host: str) -> str | None:
        """Return the answer to a connection too many (RFC 5321, 3.8), None when it is welcome."""
        if self.stopping:
            return _SHUTTING_DOWN
        if len(self.open) >= self._most or self._hosts[host] >= self._most_per_host:
            return "421 4.7.0 too many connections, try again later"
        return None

    def enter(self, session: "SmtpSession", host: str) -> None:
        """Count one in."""
        self.open.add(session)
        self._hosts[host] += 1

    def leave(self, session: "SmtpSession", host: str) -> None:
        """Count one out."""
        if session in self.open:
            self.open.discard(session)
            self._hosts[host] -= 1
            if not self._hosts[host]:
                del self._hosts[host]

    async def finish(self, seconds: float) -> None:
        """Turn away who is not in the middle of a mail's DATA, and after `seconds` who still sends.

        Returns when nobody does; whoever got as far as the final dot may still wait for the answer.
        """
        self.stopping = True
        for session in list(self.open):
            if not session.in_data:
                session.turn_away(_SHUTTING_DOWN)
        if self.open:
            await asyncio.wait([session.conversation for session in self.open], timeout=seconds)
        for session in list(self.open):
            if not session.answering:
                session.turn_away(_SHUTTING_DOWN)


class SmtpSession(SMTP):
    """aiosmtpd's conversation with limits."""

    line_length_limit = LONGEST_LINE
    # aiosmtpd's types leave open what is certain here.
    data_size_limit: int
    envelope: MailEnvelope
    session: Peer
    transport: asyncio.Transport | None
    _handler_coroutine: asyncio.Task[None]

    def __init__(
        self, handler: Handler, sessions: Sessions, *, size_limit: int, hostname: str, timeout: float
    ) -> None:
        # The class's own dict is shared by all its sessions: each gets its own.
        self.command_size_limits = collections.defaultdict(lambda: 1024)
        super().__init__(
            handler, data_size_limit=size_limit, enable_SMTPUTF8=True, hostname=hostname, ident="ESMTP",
            timeout=timeout, command_call_limit=COMMAND_LIMITS, loop=asyncio.get_running_loop(),
        )  # fmt: skip
        self._mail_handler = handler
        self._sessions = sessions
        self._host = ""
        self._over: asyncio.TimerHandle | None = None
        self._incoming: MailData | None = None  # between the 354 and the final dot
        self._arrived = asyncio.Event()  # the final dot
        self._octets = 0  # since the 354
        self._begun = 0.0  # the time of the 354
        self._leaving = False
        self._half_closed = False
        self.in_data = False
        self.answering = False

    def __dir__(self) -> list[str]:
        """Name the commands alone: aiosmtpd looks for them among all that is named, for each connection."""
        return _COMMANDS

    def _create_envelope(self) -> MailEnvelope:
        return MailEnvelope()

    # --- the connection -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the peer in, unless there are too many."""
        peer = transport.get_extra_info("peername")
        self._host = str(peer[0]) if peer else ""
        refusal = self._sessions.refusal(self._host)
        super().connection_made(transport)
        if refusal is not None:
            log.warning("session_refused", peer=self._host, answer=refusal)
            self._handler_coroutine.cancel()
            self.turn_away(refusal)
            return
        self._sessions.enter(self, self._host)
        self._over = self.loop.call_later(SESSION_LIMIT, self.turn_away, "421 4.4.2 session too long")

    def connection_lost(self, error: Exception | None) -> None:
        """Count the peer out."""
        self._sessions.leave(self, self._host)
        if self._over is not None:
            self._over.cancel()
        super().connection_lost(error)

    @property
    def conversation(self) -> asyncio.Task[None]:
        """What ends with the session."""
        return self._handler_coroutine

    def turn_away(self, answer: str, *, linger: bool = False) -> None:
        """Say one line and close, soon even if the peer does not read it.

        With `linger` what the peer still sends is dropped until it closes: a close with octets unread resets
        the connection (RFC 1122, 4.2.2.13), and the peer may never see the line.
        """
        if self.transport is None or self.transport.is_closing() or self._leaving:
            return
        self.transport.write(answer.encode() + b"\r\n")
        self._leaving = True
        if linger:
            self.transport.write_eof()
        else:
            self.transport.close()
        self.loop.call_later(_GRACE, self.transport.abort)

    def _timeout_cb(self) -> None:
        self.turn_away("421 4.4.2 nothing came for too long")

    def data_received(self, data: bytes) -> None:
        """Hand a mail's octets to its file, the rest to aiosmtpd; bound the time that a mail may take."""
        if self._leaving:
            return
        if self._incoming is None:
            super().data_received(data)
            return
        self._octets += len(data)
        # aiosmtpd's time limit is for the whole of a mail: what comes in steadily gets more of it.
        left = self._begun + self._timeout_duration + self._octets / SLOWEST - self.loop.time()
        self._reset_timeout(max(0.001, min(self._timeout_duration, left)))
        if self._octets > _PATIENCE * self.data_size_limit:
            self._log_refused("552 5.3.4", "size")
            self.turn_away(self._too_large(self.data_size_limit), linger=True)
            return
        rest = self._incoming.feed(data)
        if rest is not None:
            self._incoming = None
            self._arrived.set()
            # From now on a half-closed connection waits for its answer.
            self.answering = True
            self._reset_timeout(max(ANSWER_TIME, self._timeout_duration))
            super().data_received(rest)
        elif len(data) >= _LARGE_READ and self.transport is not None:
            # libuv would read up to 32 times in a row what has come; the others shall have their turn.
            self.transport.pause_reading()
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def _too_large(self, most: int) -> str:
        return f"552 5.3.4 the mail is too large: {most} octets at most"

    def _log_refused(self, answer: str, cause: str) -> None:
        log.info("mail_refused", peer=self._host, sender=self.envelope.sender, answer=answer, cause=cause)

    def eof_received(self) -> bool | None:
        """Keep the way back open while an answer is being made; aiosmtpd would cancel its making."""
        if self._leaving:
            return False  # both sides are done: close
        if self.answering:
            self._half_closed = True
            return True
        return super().eof_received()

    async def handle_exception(self, error: Exception) -> str:
        """Answer a fault of ours: temporary, without its words."""
        log.error("task_failed", task="smtp", error=repr(error), exc_info=error)
        answer = "451 4.3.0 a fault here; try again later"
        if self.in_data:
            self.turn_away(answer, linger=True)
            # Ends the conversation here and now: octets that are read already must not run as commands.
            raise asyncio.CancelledError
        return answer

    # --- commands -------------------------------------------------------------------------------------------

    async def smtp_MAIL(self, arg: str | None) -> None:  # noqa: N802 -- aiosmtpd's name
        """Refuse a declared size over the limit in RFC 1870's words, then go aiosmtpd's way."""
        declared = _SIZE.search(arg or "")
        if declared and int(declared[1]) > self.data_size_limit:
            self._log_refused("552 5.3.4", "size")
            await self.push(self._too_large(self.data_size_limit))
            return
        await super().smtp_MAIL(arg)

    def _getaddr(self, arg: str) -> tuple[str | None, str | None]:
        """Read the sender as written: aiosmtpd's parser raises IndexError on `<` and decodes RFC 2047."""
        found = _PATH.fullmatch(arg)
        if found is None:
            return (None, None) if arg.strip() else ("", "")
        address = found["bare"] or found["inner"] or "<>"
        return address, found["rest"] or ""

    async def smtp_RCPT(self, arg: str | None) -> None:  # noqa: N802
        """Hand the address on as written: aiosmtpd's parser would drop what looks like a comment."""
        if await self.check_helo_needed():
            return
        if not self.envelope.mail_from:
            await self.push("503 5.5.1 need MAIL before RCPT")
            return
        if arg is None or not arg.upper().startswith("TO:"):
            await self.push("501 5.5.4 syntax: RCPT TO:<address>")
            return
        try:
            answer = await self._mail_handler.recipient(self.session, self.envelope, arg)
        except Refusal as refusal:
            answer = f"{refusal.code} {refusal.status} {refusal.text}"
        await self.push(answer)

    async def smtp_DATA(self, arg: str | None) -> None:  # noqa: N802
        """Take a mail in place of aiosmtpd, which reads it line by line: most of the work for a large one."""
        if await self.check_helo_needed():
            return
        if not self.envelope.rcpt_tos:
            await self.push("503 5.5.1 need RCPT before DATA")
            return
        if arg:
            await self.push("501 5.5.4 syntax: DATA")
            return
        if (busy := self._mail_handler.busy()) is not None:
            await self.push(busy)
            return
        try:
            received = self._mail_handler.receive()
        except OSError as error:
            await self.push(self._mail_handler.unwritten(self.session, self.envelope, error))
            return
        self.in_data = True
        with contextlib.ExitStack() as files:
            files.callback(received.discard)
            answer = await self._receive(received)
            if answer is None:
                files.pop_all()
                answer = await self._mail_handler.take(self.session, self.envelope, received)
        self.envelope = self._create_envelope()
        await self.push(answer)
        # After a fault `in_data` stays: handle_exception must know.
        self.in_data = self.answering = False
        if self._half_closed or self._sessions.stopping:
            self.turn_away("421 4.3.2 closing")

    async def _receive(self, received: Received) -> str | None:
        """Return, when the mail has come whole, the answer if it cannot be taken."""
        await self.push("354 end data with <CR><LF>.<CR><LF>")
        most = min(self.data_size_limit, self._mail_handler.largest(self.session, self.envelope))
        data = MailData(
            received.file, size_limit=most, line_limit=self.line_length_limit, room=self._mail_handler.room
        )
        self._begun, self._octets = self.loop.time(), 0
        self._arrived.clear()
        # Some of the mail may have come together with DATA. An octet more, and this reads without a wait, in
        # which more would come to this reader and be lost.
        self._reader.feed_data(b".")
        early = (await self._reader.read(sys.maxsize))[:-1]
        self._incoming = data
        if early:
            self.data_received(early)
        await self._arrived.wait()
        match data.fault:
            case Fault.TOO_LARGE:
                self._log_refused("552 5.3.4", "size")
                return self._too_large(most)
            case Fault.LONG_LINE:
                self._log_refused("554 5.6.0", "line")
                return f"554 5.6.0 a line of the mail is longer than {self.line_length_limit} octets"
            case OSError() as error:
                return self._mail_handler.unwritten(self.session, self.envelope, error)
        return None

    async def push(self, status: Any) -> None:
        """Write one answer, with its enhanced status code; it never becomes two lines."""
        if isinstance(status, str) and not status.startswith("250-"):
            status = self._worded(status).replace("\r", " ").replace("\n", " ")
        if not self._leaving:
            await super().push(status)

    def _worded(self, status: str) -> str:
        if status.startswith("500 Error: command"):
            return "500 5.5.1 no such command"
        if status.startswith("502 Could not VRFY"):
            return "502 5.5.1 no such command"
        found = _UNCODED.fullmatch(status)
        return (
            f"{found[1]} {_CODES.get(found[1], '5.0.0')} {found[2]}" if found else _WORDED.get(status, status)
        )


_COMMANDS = [name for name in dir(SmtpSession) if name.startswith(("smtp_", "auth_"))]
