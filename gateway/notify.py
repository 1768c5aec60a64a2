"""Mail out: takes what is due from the outbox and hands it to the relay.

In charge of: `run`, the loop that claims mails, has them composed, hands them over and records what became of
each.

Promises: what was accepted is told. A mail stays in the outbox until the relay took it, refused it for good,
or `give_up_after` has passed; a relay that is away is asked again by one mail at a time. A mail goes out
twice only when the relay fell silent after the final dot, or when the gateway died between the relay's 250
and the record of it, and then under the same Message-ID. One slow or hopeless mail holds up no other.

Fails: a fault of the store or in a mail is logged as `task_failed` or `store_failed`, and the loop goes on.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Protocol

from gateway.bell import Wake
from gateway.compose import Letterhead, compose
from gateway.database import StoreError
from gateway.log import get_logger
from gateway.metrics import ReplyKind, ReplyResult
from gateway.records import Notice, OutboxEntry
from gateway.relay import Relay, RelayAway, RelayRefused

__all__ = ["Count", "Outbox", "Picture", "Relay", "Wake", "run"]

AT_ONCE = 4  # mails on their way to the relay
PICTURE_LIMIT = 10.0  # seconds for page 1 to be drawn
LARGEST_PICTURE = 1_000_000  # bytes; no relay refuses a reply for its size
RELAY_PAUSE = 30.0  # seconds before a relay that is away is tried again
STORE_PAUSE = 2.0  # seconds before a store that is away is asked again
LOOK_EVERY = 1.0  # seconds: due times ring no bell
FIRST_WAIT, LONGEST_WAIT = 60.0, 3600.0  # seconds before the second try of a mail, and at most

Picture = Callable[[bytes], Awaitable[bytes | None]]
Count = Callable[[ReplyKind, ReplyResult], None]

log = get_logger()


class Outbox(Protocol):
    """What the loop needs of the store."""

    async def claim_notices(self, most: int) -> list[OutboxEntry]:
        """Return mails that are due, each leased to the caller."""

    async def notice_sent(self, entry_id: str, fence: int) -> bool:
        """Record that the relay took it; False when the claim had lapsed."""

    async def notice_deferred(self, entry_id: str, fence: int, due_at: float, why: str) -> bool:
        """Record that it is to be tried again at `due_at`."""

    async def notice_given_up(self, entry_id: str, fence: int, why: str) -> bool:
        """Record that it will not be tried again, and tell the postmaster."""

    async def document(self, document_id: str) -> bytes | None:
        """Return a document, None once purged."""


async def run(
    outbox: Outbox,
    relay: Relay,
    letterhead: Letterhead,
    *,
    clock: Callable[[], float],
    wake: Wake,
    picture: Picture | None,
    give_up_after: float,
    count: Count,
) -> None:
    """Send what is due until cancelled; then finish the mails on their way, until cancelled once more.

    `picture` draws page 1 of a PDF as PNG, None leaves it out. `give_up_after` are the seconds from queueing
    until a mail is given up. `count` is told each mail's kind and `sent`, `deferred` or `given_up`.
    """
    sender = _Sender(outbox, relay, letterhead, clock, picture, give_up_after, count)
    try:
        while True:
            pause = await sender.turn()
            if sender.full:
                await sender.any_done()
            else:
                await wake.wait(pause)
    finally:
        await sender.finish()


class _Sender:
    """The mails on their way, and what is known of the relay."""

    def __init__(
        self,
        outbox: Outbox,
        relay: Relay,
        letterhead: Letterhead,
        clock: Callable[[], float],
        picture: Picture | None,
        give_up_after: float,
        count: Count,
    ) -> None:
        self._outbox = outbox
        self._relay = relay
        self._letterhead = letterhead
        self._clock = clock
        self._picture = picture
        self._give_up_after = give_up_after
        self._count = count
        self._tasks: set[asyncio.Task[None]] = set()
        self._away_at: float | None = None  # when the relay was last found away
        self._taken: set[str] = set()  # the relay took these, and the store could not be told

    @property
    def _most(self) -> int:
        """How many mails may be on their way: a relay that is away is tried with one."""
        return AT_ONCE if self._away_at is None else 1

    @property
    def full(self) -> bool:
        """Whether no mail can begin before another one is done."""
        return len(self._tasks) >= self._most

    async def any_done(self) -> None:
        """Return when a mail on its way is done."""
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def turn(self) -> float:
        """Begin what may begin now; return the seconds until the next look."""
        # A clock that was set back must not prolong the pause.
        if self._away_at is not None and 0 <= self._clock() - self._away_at < RELAY_PAUSE:
            return LOOK_EVERY
        try:
            entries = [] if self.full else await self._outbox.claim_notices(self._most - len(self._tasks))
        except StoreError as error:
            log.warning("store_failed", verb="claim_notices", error=str(error))
            return STORE_PAUSE
        except Exception:  # outermost: nothing may end the loop
            log.exception("task_failed", task="notify")
            return STORE_PAUSE
        for entry in entries:
            task = asyncio.create_task(self._treat(entry))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return LOOK_EVERY

    async def finish(self) -> None:
        """Wait for the mails on their way; when cancelled meanwhile, let them go."""
        try:
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            left = list(self._tasks)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _treat(self, entry: OutboxEntry) -> None:
        """Do all that is to be done with one mail, and outlive whatever happens."""
        try:
            await self._deliver(entry)
        except StoreError as error:  # the claim lapses, and the mail comes back
            log.warning("store_failed", verb="notice", error=str(error))
        except Exception as error:  # outermost: no mail may harm another one
            log.exception("task_failed", task="notify")
            with contextlib.suppress(StoreError):
                await self._try_later(entry, repr(error))

    async def _deliver(self, entry: OutboxEntry) -> None:
        if entry.id not in self._taken:
            page = await self._first_page(entry)
            message = compose(entry, self._letterhead, self._clock(), page)
            try:
                await self._relay.send(entry.recipient, message)
            except RelayAway as error:
                self._away_at = self._clock()
                return await self._try_later(entry, error.text)
            except RelayRefused as error:
                if error.permanent:
                    return await self._give_up(entry, error.text)
                return await self._try_later(entry, error.text)
            self._away_at = None
            self._taken.add(entry.id)
            self._count(_kind(entry), "sent")
            log.info("reply_sent", **_about(entry), recipient=entry.recipient, relay=self._relay.name)
        await self._outbox.notice_sent(entry.id, entry.fence)
        self._taken.discard(entry.id)
        return None

    async def _try_later(self, entry: OutboxEntry, why: str) -> None:
        now = self._clock()
        if now - entry.queued_at >= self._give_up_after:
            return await self._give_up(entry, why)
        due_at = now + min(FIRST_WAIT * 2 ** min(entry.tries, 10), LONGEST_WAIT)
        await self._outbox.notice_deferred(entry.id, entry.fence, due_at, why)
        self._count(_kind(entry), "deferred")
        due = datetime.fromtimestamp(due_at, UTC).isoformat(timespec="seconds")
        log.info("reply_deferred", **_about(entry), error=why, due=due)
        return None

    async def _give_up(self, entry: OutboxEntry, why: str) -> None:
        await self._outbox.notice_given_up(entry.id, entry.fence, why)
        self._count(_kind(entry), "given_up")
        log.warning("reply_given_up", **_about(entry), error=why)

    async def _first_page(self, entry: OutboxEntry) -> bytes | None:
        """Return the picture for a final reply, None when there is to be none or it takes too long."""
        final = entry.notice in {Notice.DELIVERED, Notice.FAILED} and self._letterhead.format == "mail"
        document_id = entry.mail.document_id if final and entry.mail is not None else None
        if self._picture is None or document_id is None:
            return None
        # In a task of its own: whatever happens to it, the reply goes out.
        drawing = asyncio.create_task(self._draw(self._picture, document_id))
        try:
            await asyncio.wait({drawing}, timeout=PICTURE_LIMIT)
            ended = drawing.done() and not drawing.cancelled()
            failure = drawing.exception() if ended else None
            if ended and failure is None:
                return drawing.result()
            cause = "page 1 was not drawn in time" if failure is None else repr(failure)
            log.warning("child_failed", fax=_about(entry)["fax"], cause=cause)
            return None
        finally:
            drawing.cancel()

    async def _draw(self, picture: Picture, document_id: str) -> bytes | None:
        document = await self._outbox.document(document_id)
        drawn = None if document is None else await picture(document)
        return drawn if drawn is not None and len(drawn) <= LARGEST_PICTURE else None


def _kind(entry: OutboxEntry) -> ReplyKind:
    if entry.notice is not None:
        return entry.notice.value
    return "postmaster" if entry.forward is not None else "alert"


def _about(entry: OutboxEntry) -> dict[str, str]:
    """Return the fields that name a mail in the log; one that is about no fax goes by its own id."""
    return {"fax": entry.id if entry.fax is None else entry.fax.id, "kind": _kind(entry)}
