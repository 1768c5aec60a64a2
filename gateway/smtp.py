"""Mail in: from the final dot to the 250 that means durable.

In charge of: what each SMTP command is answered: the sender at MAIL, each number at RCPT, the document at
DATA, and the one line that names the mail once it is on the disk.

Promises: everything that can be refused is refused while the client still listens, so that its own mail
system tells the sender. 250 is said after the commit and not before; the commit is shielded from the client's
leaving, so that it happens whole or not at all (rule 1). The answer after the dot comes within 30 s.

Fails: a fault of ours is 451, a full disk 452; never a 250, never a 5xx.
"""

import asyncio
import errno
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

from aiosmtpd.smtp import Session as Peer

from gateway.address import Policy, Refusal, split_rcpt
from gateway.children import ChildFailed
from gateway.database import StoreError, StoreFull
from gateway.log import get_logger
from gateway.message import MAX_HOPS, MailRefused
from gateway.metrics import Metrics
from gateway.prepare import Prepared, Preparer, Received
from gateway.records import ReceivedMail
from gateway.relay import RelayRefused, check_recipient
from gateway.smtp_session import MailEnvelope, Sessions, SmtpSession
from gateway.store import Store
from gateway.store_intake import CHUNK, Accepted, Paper, Submission

ANSWER_LIMIT = 25.0
"""Seconds for examining a mail."""
WHOLE_LIMIT = 28.0
"""Seconds from the final dot to the answer, also when the store is slow."""
DISK_RESERVE = 64 * 1024 * 1024
"""Octets that stay free for events and replies: below, no new mail is begun."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_TRY_LATER = "451 4.3.0 the mail could not be examined now; try again later"
_FULL = "452 4.3.1 no space left here; try again later"
_LARGEST_FROM_STRANGERS = 1_000_000  # octets of a mail to the postmaster from outside senders.networks

log = get_logger()


class MailDoor:
    """aiosmtpd's handler: one for all sessions."""

    def __init__(
        self,
        store: Store,
        preparer: Preparer,
        *,
        policy: Policy,
        hostname: str,
        max_recipients: int,
        duplicate_window: float,
        folder: Path,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._preparer = preparer
        self._policy = policy
        self._hostname = hostname
        self._max_recipients = max_recipients
        self._duplicate_window = duplicate_window
        self._folder = folder
        self._metrics = metrics
        self.accepting: set[asyncio.Task[str]] = set()

    # --- MAIL and RCPT ------------------------------------------------------------------------------------

    async def handle_MAIL(  # noqa: N802 -- aiosmtpd's name
        self, _server: SmtpSession, session: Peer, envelope: MailEnvelope, address: str, options: list[str]
    ) -> str:
        """Begin a mail, if there is room for one."""
        if shutil.disk_usage(self._folder).free < DISK_RESERVE:
            log.error("mail_failed", peer=_host(session), answer=_FULL[:9], error="disk reserve")
            self._metrics.mail("failed")
            return _FULL
        if not _replyable(address):
            answer = "501 5.1.7 this sender address could not be answered"
            return self._turned_away(session, envelope, answer, "the sender cannot be answered")
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        envelope.sender = "" if address == "<>" else address
        return "250 2.1.0 sender ok"

    async def recipient(self, session: Peer, envelope: MailEnvelope, raw: str) -> str:
        """Say whether this sender may send a fax to this address. Raises Refusal."""
        if len(envelope.rcpt_tos) >= self._max_recipients:
            answer = (
                f"452 4.5.3 too many recipients: {self._max_recipients} a mail; send the rest in another one"
            )
            return self._turned_away(session, envelope, answer, "too many recipients")
        try:
            local, domain = split_rcpt(raw)
            if self._policy.is_postmaster(local, domain):
                envelope.postmaster = True
            else:
                envelope.numbers.setdefault(
                    self._number(session, envelope, local, domain), f"{local}@{domain}"
                )
        except Refusal as refusal:
            self._turned_away(session, envelope, f"{refusal.code} {refusal.status}", refusal.log)
            raise
        envelope.rcpt_tos.append(f"{local}@{domain}")
        return "250 2.1.5 recipient ok"

    def _turned_away(self, session: Peer, envelope: MailEnvelope, answer: str, cause: str) -> str:
        """Write the line of a mail that ended before its DATA, and return the answer."""
        about = {"peer": _host(session), "sender": envelope.sender}
        log.info("mail_refused", answer=answer[:9], cause=cause, **about)
        self._metrics.mail("refused")
        return answer

    def _number(self, session: Peer, envelope: MailEnvelope, local: str, domain: str) -> str:
        policy = self._policy
        number = policy.parse_recipient(local, domain)
        policy.permit_client(_host(session))
        policy.permit_sender(envelope.sender)
        policy.permit_destination(number)
        return number

    # --- DATA ---------------------------------------------------------------------------------------------

    def busy(self) -> str | None:
        """Return an answer if the children have more than enough to do (rule 9)."""
        if not self._preparer.full:
            return None
        log.error("mail_failed", answer="451 4.3.2", error="the children have more than enough to do")
        self._metrics.mail("failed")
        return "451 4.3.2 too much to do here; try again later"

    def receive(self) -> Received:
        """Return a file for a mail that comes. Raises OSError."""
        return self._preparer.receive()

    def room(self) -> bool:
        """Say whether a mail that comes may go on: it may use half of what no new mail may touch."""
        return shutil.disk_usage(self._folder).free >= DISK_RESERVE / 2

    def largest(self, session: Peer, envelope: MailEnvelope) -> int:
        """Return how many octets a mail may have: few if all the world may send it."""
        stranger = not envelope.numbers and not self._policy.knows_client(_host(session))
        return _LARGEST_FROM_STRANGERS if stranger else sys.maxsize

    def unwritten(self, session: Peer, envelope: MailEnvelope, error: OSError) -> str:
        """Return the answer for a mail that could not be written down."""
        return self._unavailable(error, time.monotonic(), {"peer": _host(session), "sender": envelope.sender})

    async def take(self, session: Peer, envelope: MailEnvelope, received: Received) -> str:
        """Take the mail. The work goes on to its end even if the client leaves."""
        task = asyncio.create_task(self._take(session, envelope, received), name="accept")
        self.accepting.add(task)
        task.add_done_callback(self.accepting.discard)
        try:
            async with asyncio.timeout(WHOLE_LIMIT):
                return await asyncio.shield(task)
        except TimeoutError as error:  # if it is stored after all, the next try is recognised
            about = {"peer": _host(session), "sender": envelope.sender}
            return self._unavailable(error, time.monotonic(), about)

    async def _take(self, session: Peer, envelope: MailEnvelope, received: Received) -> str:
        begun = time.monotonic()
        about = {"peer": _host(session), "sender": envelope.sender}
        try:
            with received:
                accepted = await self._accept(session, envelope, received)
        except MailRefused as refusal:
            answer = f"{refusal.code} {refusal.status} {refusal.text}"
            log.info("mail_refused", answer=answer[:9], cause=refusal.log, **about)
            self._metrics.mail("refused", time.monotonic() - begun)
            return answer
        except (ChildFailed, StoreError, OSError) as error:
            return self._unavailable(error, begun, about)
        seconds = round(time.monotonic() - begun, 3)
        if accepted.repeated:
            self._metrics.mail("duplicate", seconds)
            log.info("mail_duplicate", mail=accepted.mail_id, seconds=seconds, **about)
        else:
            self._metrics.mail("accepted", seconds)
            faxes = len(accepted.fax_ids)
            log.info("mail_accepted", mail=accepted.mail_id, faxes=faxes, seconds=seconds, **about)
        return f"250 2.0.0 queued as {accepted.mail_id}"

    def _unavailable(self, error: Exception, begun: float, about: dict[str, str]) -> str:
        full = isinstance(error, StoreFull) or getattr(error, "errno", None) in _NO_SPACE
        answer = _FULL if full else _TRY_LATER
        log.error("mail_failed", answer=answer[:9], error=f"{type(error).__name__}: {error}", **about)
        self._metrics.mail("failed", time.monotonic() - begun)
        return answer

    async def _accept(self, session: Peer, envelope: MailEnvelope, received: Received) -> Accepted:
        """Examine and store the mail. Raises MailRefused, ChildFailed, StoreError, OSError."""
        forward = await self._forwarded(session, received) if envelope.postmaster else None
        if not envelope.numbers:
            mail = ReceivedMail("", envelope.sender, 0.0)
            return await self._store.accept(Submission(mail, "", (), forward=forward), self._duplicate_window)
        with await self._prepare(received) as prepared:
            paper = await self._paper(prepared)
            submission = Submission(
                mail=ReceivedMail(
                    id="", sender=envelope.sender, received_at=0.0, message_id=prepared.message_id,
                    references=prepared.references, subject=prepared.subject,
                    original_headers=prepared.original_headers,
                ),
                digest=prepared.digest,
                recipients=tuple(envelope.numbers.items()),
                paper=paper,
                forward=forward,
                message_key=prepared.message_key,
            )  # fmt: skip
            return await self._store.accept(submission, self._duplicate_window)

    async def _prepare(self, received: Received) -> Prepared:
        try:
            async with asyncio.timeout(ANSWER_LIMIT):  # waiting for a child counts
                return await self._preparer.mail(received)
        except TimeoutError:
            raise ChildFailed("time") from None

    async def _paper(self, prepared: Prepared) -> Paper:
        paper = Paper(str(uuid.uuid4()), prepared.sha256, prepared.pages, prepared.size)
        if prepared.size <= CHUNK:
            return replace(paper, data=prepared.document.read_bytes())  # the child wrote it just now
        with prepared.document.open("rb") as file:
            return replace(paper, id=await self._store.keep_document(file))

    async def _forwarded(self, session: Peer, received: Received) -> bytes:
        """Add the trace line that every hop adds (RFC 5321, 4.4); a mail that loops is refused."""
        raw = await asyncio.to_thread(received.path.read_bytes)
        head = raw.partition(b"\r\n\r\n")[0].lower()
        if (b"\r\n" + head).count(b"\r\nreceived:") > MAX_HOPS:
            raise MailRefused(554, "5.4.6", "this mail goes round in circles", "too many hops")
        stamp = (
            f"Received: from [{_host(session)}] by {self._hostname} with ESMTP; {formatdate(localtime=False)}"
        )
        return stamp.encode("ascii", "replace") + b"\r\n" + raw


def _host(session: Peer) -> str:
    return str(session.peer[0]) if session.peer else ""


def _replyable(address: str) -> bool:
    """Whether the address can stand in a reply: the null sender can (only the postmaster takes it)."""
    if address in {"", "<>"}:
        return True
    local, at, domain = address.rpartition("@")
    if not (local and at and domain and address.isprintable()):
        return False
    try:
        check_recipient(address)  # what could not be handed to the relay must not be taken in
    except RelayRefused:
        return False
    return True


def session_factory(
    door: MailDoor, sessions: Sessions, *, size_limit: int, hostname: str, timeout: float
) -> Callable[[], SmtpSession]:
    """Return what `loop.create_server` calls for each connection; `timeout`: seconds of silence."""
    return lambda: SmtpSession(door, sessions, size_limit=size_limit, hostname=hostname, timeout=timeout)
