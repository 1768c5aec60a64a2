"""A running loop over an outbox in memory and a relay that is real, for the tests of mail out."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from faxes import DAY, NOW, at
from letters import LETTERHEAD, notice
from relays import TestRelay
from structlog.testing import capture_logs

from gateway.bell import Bell, Listener
from gateway.notify import Picture, run
from gateway.records import Notice, OutboxEntry
from gateway.relay import Relay

GIVE_UP_AFTER = 5 * DAY
DELIVERED = notice(Notice.DELIVERED, at("delivered").fax)
DOCUMENTS = {"d1": b"%PDF-1.7"}


class Shelf:
    """An outbox that keeps the store's promises in memory, and breaks them where a test says so."""

    def __init__(self) -> None:
        self.now = NOW
        self.entries: dict[str, OutboxEntry] = {}
        self.due: dict[str, float] = {}  # of those that nobody has claimed
        self.fates: dict[str, tuple[str, str]] = {}  # by id: sent or given up, and why
        self.whys: list[str] = []  # of each deferral
        self.broken: dict[str, Exception] = {}  # by verb
        self.held: set[str] = set()  # claimed, and nothing recorded yet
        self.most_held = 0
        self.changed = asyncio.Event()

    def put(self, *entries: OutboxEntry) -> None:
        """Queue mails, due at once."""
        for entry in entries:
            self.entries[entry.id] = entry
            self.due[entry.id] = self.now

    def _begin(self, verb: str) -> None:
        self.changed.set()
        if verb in self.broken:
            raise self.broken[verb]

    async def claim_notices(self, most: int) -> list[OutboxEntry]:
        """Return mails that are due."""
        self._begin("claim")
        ready = [entry_id for entry_id, due in self.due.items() if due <= self.now][:most]
        for entry_id in ready:
            del self.due[entry_id]
            self.entries[entry_id] = replace(self.entries[entry_id], fence=self.entries[entry_id].fence + 1)
            self.held.add(entry_id)
        self.most_held = max(self.most_held, len(self.held))
        return [self.entries[entry_id] for entry_id in ready]

    async def notice_sent(self, entry_id: str, fence: int) -> bool:
        """Record that the relay took it."""
        self._begin("sent")
        self.held.discard(entry_id)
        self.fates[entry_id] = ("sent", "")
        return fence == self.entries[entry_id].fence

    async def notice_deferred(self, entry_id: str, fence: int, wait: float, why: str) -> bool:
        """Record that it is to be tried again."""
        self._begin("deferred")
        self.held.discard(entry_id)
        entry = self.entries[entry_id]
        self.entries[entry_id] = replace(entry, tries=entry.tries + 1)
        self.due[entry_id] = self.now + wait
        self.whys.append(why)
        return fence == entry.fence

    async def notice_given_up(self, entry_id: str, fence: int, why: str) -> bool:
        """Record that it will not be tried again."""
        self._begin("given_up")
        self.held.discard(entry_id)
        self.fates[entry_id] = ("given_up", why)
        return fence == self.entries[entry_id].fence

    async def document(self, document_id: str) -> bytes | None:
        """Return a document."""
        self._begin("document")
        return DOCUMENTS.get(document_id)


class Watched:
    """The loop's wait, which tells that it was reached."""

    def __init__(self, listener: Listener, changed: asyncio.Event) -> None:
        self._listener = listener
        self._changed = changed
        self.waits = 0

    async def wait(self, timeout: float) -> None:  # noqa: ASYNC109 -- as the loop wants it
        """Wait as the listener does."""
        self.waits += 1
        self._changed.set()
        await self._listener.wait(timeout)


@dataclass
class Loop:
    """A running loop, its outbox and its relay."""

    shelf: Shelf
    wake: Watched
    relay: TestRelay
    bell: Bell
    task: asyncio.Task[None]
    counted: list[tuple[str, str]] = field(default_factory=list)
    logged: list[Any] = field(default_factory=list)

    def put(self, *entries: OutboxEntry) -> None:
        """Queue mails and wake the loop."""
        self.shelf.put(*entries)
        self.bell.ring()

    def wait(self, seconds: float) -> None:
        """Let time pass and wake the loop."""
        self.shelf.now += seconds
        self.bell.ring()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition that the outbox's changes bring about."""
        async with asyncio.timeout(20):
            while not condition():
                self.shelf.changed.clear()
                await self.shelf.changed.wait()

    async def settled(self, *entries: OutboxEntry) -> None:
        """Wait until the mails were sent or given up."""
        await self.until(lambda: all(entry.id in self.shelf.fates for entry in entries))

    async def looked(self) -> None:
        """Wake the loop and wait until it has nothing more to begin."""
        waits = self.wake.waits
        self.bell.ring()
        await self.until(lambda: self.wake.waits > waits)

    def events(self) -> list[str]:
        """Return the names of what was logged."""
        return [record["event"] for record in self.logged]


@contextlib.asynccontextmanager
async def looping(
    relay: TestRelay, *, picture: Picture | None = None, form: Any = "mail", hand_over: float = 10.0
) -> AsyncIterator[Loop]:
    """Run the loop over a fresh outbox; the relay must be serving, or have been."""
    shelf, bell = Shelf(), Bell()
    wake = Watched(bell.listener(), shelf.changed)
    counted: list[tuple[str, str]] = []
    with capture_logs() as logged:
        task = asyncio.create_task(
            run(
                shelf,
                Relay("none", "127.0.0.1", relay.port, hostname="fax.example.com", timeout=hand_over),
                replace(LETTERHEAD, format=form),
                clock=lambda: shelf.now,
                wake=wake,
                picture=picture,
                give_up_after=GIVE_UP_AFTER,
                count=lambda kind, result: counted.append((kind, result)),
            )
        )
        try:
            yield Loop(shelf, wake, relay, bell, task, counted, logged)
        finally:
            task.cancel()
            await asyncio.wait({task}, timeout=0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
