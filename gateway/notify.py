"""Mail out: takes what is due from the outbox and hands it to the relay.

In charge of: `run`, the loop that claims mails, has them composed, hands them over and records what became of
each.

Promises: what was accepted is told. A mail stays in the outbox until the relay took it, refused it for good,
or `give_up_after` has passed; a relay that is away is asked again by one mail at a time. A mail goes out
twice only when the relay fell silent after the final dot, or when the gateway died between the relay's 250
and the record of it, and then under the same Message-ID. One slow or hopeless mail holds up no other. The
picture of a document is drawn once, not once for each reply, and no reply waits for it for longer than
`PICTURE_LIMIT`.

Fails: a fault of the store or in a mail is logged as `task_failed` or `store_failed`, and the loop goes on.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
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
PICTURE_LIMIT = 20.0  # seconds that a reply waits for page 1: 10 for its turn, 10 for a child to draw it
LARGEST_PICTURE = 1_000_000  # bytes; no relay refuses a reply for its size
PAGES_KEPT = 32  # documents whose picture, or the lack of one, is remembered
PICTURES_KEPT = 8_000_000  # bytes of all pictures remembered
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

    async def notice_deferred(self, entry_id: str, fence: int, wait: float, why: str) -> bool:
        """Record that it is to be tried again in `wait` seconds."""

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

    `picture` draws page 1 of a PDF as PNG (None: it cannot be drawn; TimeoutError: not now); where it is None
    itself, no reply shows a page. `give_up_after` are the seconds from queueing
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
        self._pages = None if picture is None else _FirstPages(picture, outbox)
        self._give_up_after = give_up_after
        self._count = count
        self._tasks: set[asyncio.Task[None]] = set()
        self._alone: asyncio.Task[None] | None = None  # no other mail begins before it is done
        self._away_at: float | None = None  # when the relay was last found away
        self._taken: set[str] = set()  # the relay took these, and the store could not be told

    @property
    def _most(self) -> int:
        """How many mails may be on their way: a relay that is away is tried with one."""
        return AT_ONCE if self._away_at is None else 1

    @property
    def full(self) -> bool:
        """Whether no mail can begin before another one is done."""
        return len(self._tasks) >= self._most or self._alone in self._tasks

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
            task = asyncio.create_task(self._treat(entry, set(self._tasks) if entry.alone else set()))
            self._alone = task if entry.alone else None
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return LOOK_EVERY

    async def finish(self) -> None:
        """Wait for the mails on their way; when cancelled meanwhile, let them go."""
        try:
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            left = [*self._tasks, *(self._pages.drawings.values() if self._pages is not None else ())]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _treat(self, entry: OutboxEntry, before: set[asyncio.Task[None]]) -> None:
        """Do all that is to be done with one mail, after those `before` it, and outlive whatever happens."""
        try:
            if before:
                await asyncio.wait(before)
            await self._deliver(entry)
        except asyncio.CancelledError:  # told to stop at once: it was not this mail that ended the gateway
            with contextlib.suppress(StoreError):
                await self._outbox.notice_deferred(entry.id, entry.fence, 0.0, "the gateway stopped")
            raise
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
        wait = min(FIRST_WAIT * 2 ** min(entry.tries, 10), LONGEST_WAIT)
        await self._outbox.notice_deferred(entry.id, entry.fence, wait, why)
        self._count(_kind(entry), "deferred")
        due = datetime.fromtimestamp(now + wait, UTC).isoformat(timespec="seconds")
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
        if self._pages is None or document_id is None:
            return None
        return await self._pages.of(document_id, _about(entry)["fax"])


@dataclass(frozen=True, slots=True)
class _Page:
    """What became of a drawing; when it is not `final`, the next reply may ask again."""

    picture: bytes | None
    final: bool


class _FirstPages:
    """The pictures of page 1: the ones being drawn, and the last ones that were, failures among them."""

    def __init__(self, picture: Picture, outbox: Outbox) -> None:
        self._picture = picture
        self._outbox = outbox
        self._known: OrderedDict[str, _Page] = OrderedDict()  # by document, the last one wanted at the end
        self.drawings: dict[str, asyncio.Task[bytes | None]] = {}  # by document

    async def of(self, document_id: str, fax: str) -> bytes | None:
        """Return the picture, None if there is none; whoever wants one that is being drawn waits for it.

        `fax` goes into the log if the drawing fails.
        """
        page = self._known.get(document_id)
        if page is not None and page.final:
            self._known.move_to_end(document_id)
            return page.picture
        drawing = self.drawings.get(document_id)
        if drawing is None:
            # In a task of its own: whatever happens to it, the replies go out.
            drawing = self.drawings[document_id] = asyncio.create_task(self._draw(document_id))
            drawing.add_done_callback(partial(self._end, document_id, fax))
        await asyncio.wait({drawing})
        return drawing.result() if _failure(drawing) is None else None

    async def _draw(self, document_id: str) -> bytes | None:
        async with asyncio.timeout(PICTURE_LIMIT):
            document = await self._outbox.document(document_id)
            drawn = None if document is None else await self._picture(document)
        return drawn if drawn is not None and len(drawn) <= LARGEST_PICTURE else None

    def _end(self, document_id: str, fax: str, drawing: asyncio.Task[bytes | None]) -> None:
        """Remember what became of a drawing; a failure is logged once for each document."""
        del self.drawings[document_id]
        failure = _failure(drawing)
        if failure is None:
            page = _Page(drawing.result(), final=True)
        else:
            # What the document is not to blame for may go better next time.
            page = _Page(None, final=not isinstance(failure, StoreError | TimeoutError))
            if document_id not in self._known:
                late = isinstance(failure, TimeoutError)
                cause = "page 1 was not drawn in time" if late else repr(failure)
                log.warning("child_failed", fax=fax, cause=cause)
        self._known[document_id] = page
        self._known.move_to_end(document_id)
        while len(self._known) > PAGES_KEPT or self._size() > PICTURES_KEPT:
            self._known.popitem(last=False)

    def _size(self) -> int:
        return sum(len(page.picture) for page in self._known.values() if page.picture is not None)


def _failure(drawing: asyncio.Task[bytes | None]) -> BaseException | None:
    return asyncio.CancelledError() if drawing.cancelled() else drawing.exception()


def _kind(entry: OutboxEntry) -> ReplyKind:
    if entry.notice is not None:
        return entry.notice.value
    return "postmaster" if entry.forward is not None else "alert"


def _about(entry: OutboxEntry) -> dict[str, str]:
    """Return the fields that name a mail in the log; one that is about no fax goes by its own id."""
    return {"fax": entry.id if entry.fax is None else entry.fax.id, "kind": _kind(entry)}
