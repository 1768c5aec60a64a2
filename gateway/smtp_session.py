"""One SMTP conversation, with the guards that aiosmtpd leaves to its user.

In charge of: limits on connections, commands, bytes, lines and time; the answers to faults; the RCPT line as
it was written. What a mail means is decided in `smtp`, through the `Handler`.

Promises: memory and time are bounded for every peer. A fault of ours is answered 451 and never with words of
the fault; inside DATA it closes the connection, or the rest of the mail would run as commands. A client that
shuts its side right after the final dot still gets its answer.

Fails: by closing the one connection.
"""

import asyncio
import collections
import re
from typing import Any, Protocol

from aiosmtpd.smtp import SMTP, Envelope
from aiosmtpd.smtp import Session as Peer

from gateway.address import Refusal
from gateway.log import get_logger

COMMAND_LIMITS = {"NOOP": 100, "HELP": 20, "VRFY": 20, "EXPN": 20, "HELO": 50, "EHLO": 50, "*": 100_000}
"""How often a session may give each command; the last is for those that carry mail."""
SESSION_LIMIT = 3600.0
"""Seconds that a session may last, whatever it does."""
LONGEST_LINE = 65536
"""Octets; RFC 5321 says 1000, old programs and scanners write what they like (4.5.3.1.6)."""
_MARGIN = 65536  # octets beyond the size limit after which a client that does not stop is cut off
_SIZE = re.compile(r"\bSIZE=([0-9]{1,20})\b", re.IGNORECASE)

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

    async def handle_DATA(  # noqa: N802
        self, server: "SmtpSession", session: Peer, envelope: MailEnvelope
    ) -> str:
        """Take the mail; 250 only once it is durable."""


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
            return "421 4.3.2 shutting down, try again later"
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

    def close_idle(self) -> None:
        """Say good-bye to every session that is not in the middle of a mail's DATA."""
        self.stopping = True
        for session in list(self.open):
            if not session.in_data:
                session.turn_away("421 4.3.2 shutting down, try again later")


class SmtpSession(SMTP):  # type: ignore[misc]  # aiosmtpd is not typed
    """aiosmtpd's conversation with limits."""

    line_length_limit = LONGEST_LINE

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
        self._received = 0
        self._half_closed = False
        self.in_data = False
        self._answering = False

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

    def turn_away(self, answer: str) -> None:
        """Say one line and close."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(answer.encode() + b"\r\n")
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Cut off a client that goes on and on in DATA, with line ends or without (reliability of memory)."""
        if self.in_data:
            self._received += len(data)
            if self._received > self.data_size_limit + _MARGIN:
                log.warning("mail_refused", peer=self._host, answer="552 5.3.4")
                self.turn_away("552 5.3.4 the mail is too large")
                return
        super().data_received(data)

    def eof_received(self) -> bool | None:
        """Keep the way back open while an answer is being made; aiosmtpd would cancel its making."""
        if self._answering:
            self._half_closed = True
            return True
        return super().eof_received()  # type: ignore[no-any-return]

    async def handle_exception(self, error: Exception) -> str:
        """Answer a fault of ours: temporary, without its words."""
        log.error("task_failed", task="smtp", error=repr(error), exc_info=error)
        if self.in_data and self.transport is not None:
            self.loop.call_soon(self.turn_away, "421 4.3.0 closing after a fault")
        return "451 4.3.0 a fault here; try again later"

    # --- commands -------------------------------------------------------------------------------------------

    async def smtp_MAIL(self, arg: str | None) -> None:  # noqa: N802 -- aiosmtpd's name
        """Refuse a declared size over the limit in RFC 1870's words, then go aiosmtpd's way."""
        declared = _SIZE.search(arg or "")
        if declared and int(declared[1]) > self.data_size_limit:
            await self.push(f"552 5.3.4 the mail is too large: {self.data_size_limit} octets at most")
            return
        await super().smtp_MAIL(arg)

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
        """Refuse before the bytes come if nobody can look at them; else go aiosmtpd's way, counted."""
        busy = self._mail_handler.busy() if self.envelope.rcpt_tos else None
        if busy is not None:
            await self.push(busy)
            return
        self._received = 0
        self.in_data = True
        await super().smtp_DATA(arg)
        # After a fault `in_data` stays: handle_exception must know.
        self.in_data = self._answering = False
        if self._half_closed or self._sessions.stopping:
            self.turn_away("421 4.3.2 closing")

    def begin_answer(self) -> None:
        """Note that the final dot came: from now on a half-closed connection waits for its answer."""
        self._answering = True

    async def push(self, status: Any) -> None:
        """Write one answer; a text of ours never becomes two lines."""
        if isinstance(status, str) and not status.startswith("250-"):
            status = status.replace("\r", " ").replace("\n", " ")
        await super().push(status)
