"""The loop that sends mail: every mail goes out once, or is given up with a word, and none waits for another."""

import asyncio
import contextlib
import email
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import stores
from faxes import DAY, NOW, at
from letters import LETTERHEAD, PNG, alert, notice
from relays import CUT, STALL, TestRelay, serving
from stores import POSTMASTER, SENDER, TriedStore, newest
from structlog.testing import capture_logs

from gateway import notify
from gateway.bell import Bell
from gateway.database import StoreUnavailable
from gateway.notify import Picture, run
from gateway.records import Notice, OutboxEntry, Report, Reported, Stage
from gateway.relay import Relay

store = stores.store
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
        self.claims = 0
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
        self.claims += 1
        self._begin("claim")
        ready = [entry_id for entry_id, due in self.due.items() if due <= self.now][:most]
        for entry_id in ready:
            del self.due[entry_id]
            self.entries[entry_id] = replace(self.entries[entry_id], fence=self.entries[entry_id].fence + 1)
        return [self.entries[entry_id] for entry_id in ready]

    async def notice_sent(self, entry_id: str, fence: int) -> bool:
        """Record that the relay took it."""
        self._begin("sent")
        self.fates[entry_id] = ("sent", "")
        return fence == self.entries[entry_id].fence

    async def notice_deferred(self, entry_id: str, fence: int, due_at: float, why: str) -> bool:
        """Record that it is to be tried again."""
        self._begin("deferred")
        entry = self.entries[entry_id]
        self.entries[entry_id] = replace(entry, tries=entry.tries + 1)
        self.due[entry_id] = due_at
        self.whys.append(why)
        return fence == entry.fence

    async def notice_given_up(self, entry_id: str, fence: int, why: str) -> bool:
        """Record that it will not be tried again."""
        self._begin("given_up")
        self.fates[entry_id] = ("given_up", why)
        return fence == self.entries[entry_id].fence

    async def document(self, document_id: str) -> bytes | None:
        """Return a document."""
        self._begin("document")
        return DOCUMENTS.get(document_id)


@dataclass
class Loop:
    """A running loop, its outbox and its relay."""

    shelf: Shelf
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

    def events(self) -> list[str]:
        """Return the names of what was logged."""
        return [record["event"] for record in self.logged]


@contextlib.asynccontextmanager
async def looping(
    relay: TestRelay, *, picture: Picture | None = None, form: Any = "mail", timeout: float = 10.0
) -> AsyncIterator[Loop]:
    """Run the loop over a fresh outbox; the relay must be serving, or have been."""
    shelf, bell = Shelf(), Bell()
    counted: list[tuple[str, str]] = []
    with capture_logs() as logged:
        task = asyncio.create_task(
            run(
                shelf,
                Relay(f"smtp://127.0.0.1:{relay.port}", hostname="fax.example.com", timeout=timeout),
                replace(LETTERHEAD, format=form),
                clock=lambda: shelf.now,
                wake=bell.listener(),
                picture=picture,
                give_up_after=GIVE_UP_AFTER,
                count=lambda kind, result: counted.append((kind, result)),
            )
        )
        try:
            yield Loop(shelf, relay, bell, task, counted, logged)
        finally:
            task.cancel()
            await asyncio.wait({task}, timeout=0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def numbered(count: int) -> list[OutboxEntry]:
    """Return replies to senders 0, 1, 2, ..."""
    return [
        replace(DELIVERED, id=f"m{place}-1.delivered", recipient=f"{place}@example.org")
        for place in range(count)
    ]


# --- sent ------------------------------------------------------------------------------------------------


async def test_each_kind_of_mail_is_sent_once() -> None:
    """Replies, alerts and mail for the postmaster go out, are recorded, counted and logged."""
    forward = OutboxEntry(
        "m1.forward", "postmaster@example.com", NOW, 0, 0, forward=b"Subject: hello\r\n\r\n"
    )
    mails = [
        *(replace(notice(kind, at("delivered").fax)) for kind in Notice),
        alert("fax_held", "Fax m1-1 is held."),
        forward,
    ]
    async with serving(TestRelay()) as relay, looping(relay) as loop:
        loop.put(*mails)
        await loop.settled(*mails)
        assert len(relay.taken) == len(mails)
        assert {fate for fate, _ in loop.shelf.fates.values()} == {"sent"}
        kinds = ["alert", "cancelled", "delayed", "delivered", "failed", "postmaster"]
        assert sorted(loop.counted) == [(kind, "sent") for kind in kinds]
        assert loop.events() == ["reply_sent"] * len(mails)
        record = next(record for record in loop.logged if record["kind"] == "delivered")
        assert record["fax"] == "m1-1"
        assert record["recipient"] == "clerk@example.org"
        assert record["relay"] == f"127.0.0.1:{relay.port}"
        assert {record["fax"] for record in loop.logged} == {
            "m1-1",
            "alert.fax_held.2026-03-02",
            "m1.forward",
        }


async def test_slow_recipient_holds_up_nobody() -> None:
    """One recipient at whom the relay falls silent holds up no other reply, however many there are."""
    slow, *others = numbered(9)
    async with serving(TestRelay(refused={slow.recipient: STALL})) as relay, looping(relay) as loop:
        loop.put(slow)
        await relay.stalled.wait()
        loop.put(*others)
        await loop.settled(*others)
        assert slow.id not in loop.shelf.fates


async def test_no_more_than_four_mails_are_on_their_way() -> None:
    """A thousand replies at once do not become a thousand connections."""
    mails = numbered(12)
    async with serving(TestRelay(faults={"DOT": STALL})) as relay, looping(relay) as loop:
        loop.put(*mails)
        await loop.until(lambda: loop.shelf.claims > 0)
        await relay.stalled.wait()
        loop.bell.ring()
        assert len(loop.shelf.due) == len(mails) - notify.AT_ONCE
        relay.faults.clear()
        relay.released.set()
        await loop.settled(*mails)


# --- tried again, given up -------------------------------------------------------------------------------


async def test_waits_between_tries_double_up_to_an_hour() -> None:
    """A greylisted reply is tried after 1, 2, 4 ... minutes, then every hour."""
    async with serving(TestRelay(refused={"clerk@example.org": "450 greylisted"})) as relay:
        async with looping(relay) as loop:
            waits = []
            loop.put(DELIVERED)
            for tries in range(1, 10):
                await loop.until(lambda: DELIVERED.id in loop.shelf.due)
                waits.append(loop.shelf.due[DELIVERED.id] - loop.shelf.now)
                assert loop.shelf.entries[DELIVERED.id].tries == tries
                loop.wait(waits[-1])
                await loop.until(lambda: DELIVERED.id not in loop.shelf.due)
            relay.refused.clear()
            await loop.until(lambda: DELIVERED.id in loop.shelf.due or loop.shelf.fates)
            loop.wait(3600.0)
            await loop.settled(DELIVERED)
    assert waits == [60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3600.0, 3600.0, 3600.0]
    assert loop.shelf.whys[0] == "450 greylisted"
    record = loop.logged[0]
    assert record["event"] == "reply_deferred"
    assert record["error"] == "450 greylisted"
    assert record["due"] == "2026-03-02T12:01:00+00:00"
    assert ("delivered", "deferred") in loop.counted


async def test_refusal_for_good_ends_the_reply() -> None:
    """A sender whose address does not exist is not written to again, and the log says so."""
    async with serving(TestRelay(refused={"clerk@example.org": "550 5.1.1 no such user"})) as relay:
        async with looping(relay) as loop:
            loop.put(DELIVERED)
            await loop.settled(DELIVERED)
    assert loop.shelf.fates[DELIVERED.id] == ("given_up", "550 5.1.1 no such user")
    assert loop.counted == [("delivered", "given_up")]
    assert loop.events() == ["reply_given_up"]


async def test_reply_is_given_up_after_its_time() -> None:
    """After the configured days a reply ends, with the last error as the reason."""
    async with serving(TestRelay(faults={"RCPT": "451 try later"})) as relay, looping(relay) as loop:
        old = replace(DELIVERED, queued_at=NOW - GIVE_UP_AFTER)
        young = replace(old, id="m2-1.delivered", queued_at=NOW - GIVE_UP_AFTER + 1)
        loop.put(old, young)
        await loop.settled(old)
        await loop.until(lambda: young.id in loop.shelf.due)
        assert loop.shelf.fates == {old.id: ("given_up", "451 try later")}


async def test_silence_after_the_dot_repeats_the_same_mail() -> None:
    """A reply whose fate is unknown goes out again under the same Message-ID, so that it is recognised."""
    async with serving(TestRelay(faults={"DOT": STALL})) as relay, looping(relay, timeout=0.3) as loop:
        loop.put(DELIVERED)
        await loop.until(lambda: loop.shelf.whys)
        relay.faults.clear()
        loop.wait(60.0)
        await loop.settled(DELIVERED)
        arrived = email.message_from_bytes(relay.taken[-1].data)
        assert arrived["Message-ID"] == "<m1-1.delivered@fax.example.com>"
        assert "no answer in time" in loop.shelf.whys[0]


async def test_absent_relay_is_asked_by_one_mail_at_a_time() -> None:
    """While the relay is away it is not stormed; when it is back, everything goes out."""
    mails = numbered(20)
    async with serving(TestRelay(faults={"GREETING": "421 closed"})) as relay, looping(relay) as loop:
        loop.put(*mails)
        await loop.until(lambda: len(loop.shelf.whys) == notify.AT_ONCE)
        for probe in range(1, 4):
            loop.wait(notify.RELAY_PAUSE - 1)  # too early
            loop.wait(1)
            await loop.until(lambda: len(loop.shelf.whys) == notify.AT_ONCE + probe)  # noqa: B023 -- awaited here
            assert relay.sessions == notify.AT_ONCE + probe
        relay.faults.clear()
        loop.wait(3600.0)
        await loop.settled(*mails)
    assert len(relay.taken) == len(mails)


async def test_clock_set_back_does_not_prolong_the_pause() -> None:
    """After a correction of the clock, replies do not wait for the old time to come again."""
    first, second = numbered(2)
    async with serving(TestRelay(faults={"GREETING": CUT})) as relay, looping(relay) as loop:
        loop.put(first)
        await loop.until(lambda: loop.shelf.whys)
        relay.faults.clear()
        loop.wait(-7200.0)
        loop.put(second)
        await loop.settled(second)


# --- faults of our own -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "event"),
    [(StoreUnavailable("locked"), "store_failed"), (RuntimeError("unforeseen"), "task_failed")],
)
async def test_loop_outlives_a_store_that_fails(fault: Exception, event: str) -> None:
    """When the store is away the loop waits for it, and then goes on."""
    async with serving(TestRelay()) as relay, looping(relay) as loop:
        loop.shelf.broken["claim"] = fault
        loop.put(DELIVERED)
        await loop.until(lambda: loop.events() == [event])
        loop.shelf.broken.clear()
        loop.bell.ring()
        await loop.settled(DELIVERED)


async def test_mail_that_could_not_be_recorded_is_not_sent_again() -> None:
    """A full disk does not make the gateway repeat a reply that the relay has taken."""
    async with serving(TestRelay()) as relay, looping(relay) as loop:
        loop.shelf.broken["sent"] = StoreUnavailable("disk full")
        loop.put(DELIVERED)
        await loop.until(lambda: "store_failed" in loop.events())
        loop.shelf.broken.clear()
        loop.put(loop.shelf.entries[DELIVERED.id])  # its claim lapses
        await loop.settled(DELIVERED)
        assert len(relay.taken) == 1
        assert loop.counted == [("delivered", "sent")]


async def test_broken_entry_harms_no_other() -> None:
    """A mail that cannot be written is put off and reported; those behind it go out."""
    broken = OutboxEntry("m9-1.delivered", "clerk@example.org", NOW, 0, 0)
    async with serving(TestRelay()) as relay, looping(relay) as loop:
        loop.put(broken, DELIVERED)
        await loop.settled(DELIVERED)
        await loop.until(lambda: loop.shelf.whys)
        assert "task_failed" in loop.events()
        assert "m9-1.delivered is neither" in loop.shelf.whys[0]
        loop.shelf.broken["deferred"] = StoreUnavailable("locked")
        again = replace(broken, id="m8-1.delivered")
        other = replace(DELIVERED, id="m2-1.delivered")
        loop.put(again, other)
        await loop.settled(other)


async def test_stop_lets_a_mail_arrive() -> None:
    """When the gateway stops, a mail on its way is finished and recorded."""
    async with serving(TestRelay(faults={"RCPT": STALL})) as relay, looping(relay) as loop:
        loop.put(DELIVERED)
        await relay.stalled.wait()
        loop.task.cancel()
        await asyncio.wait({loop.task}, timeout=0.05)
        assert not loop.task.done()
        relay.faults.clear()
        relay.released.set()
        with pytest.raises(asyncio.CancelledError):
            await loop.task
        assert loop.shelf.whys or loop.shelf.fates


async def test_second_stop_does_not_wait() -> None:
    """When the time to stop is over, a mail on its way is left for the next start."""
    async with serving(TestRelay(faults={"DOT": STALL})) as relay, looping(relay) as loop:
        loop.put(DELIVERED)
        await relay.stalled.wait()
        loop.task.cancel()
        await asyncio.wait({loop.task}, timeout=0.05)
        loop.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop.task
        assert loop.shelf.fates == {}
        assert loop.shelf.whys == []


# --- the picture -----------------------------------------------------------------------------------------


async def draw(document: bytes) -> bytes | None:
    """Draw page 1."""
    assert document == DOCUMENTS["d1"]
    return PNG


async def parts_of(
    entry: OutboxEntry, picture: Picture | None, form: str = "mail", broken: Exception | None = None
) -> tuple[list[str], list[str]]:
    """Send a mail; return the types of the parts that arrived, and what was logged before."""
    async with serving(TestRelay()) as relay, looping(relay, picture=picture, form=form) as loop:
        if broken is not None:
            loop.shelf.broken["document"] = broken
        loop.put(entry)
        await loop.settled(entry)
        arrived = email.message_from_bytes(relay.taken[0].data)
        return [part.get_content_type() for part in arrived.walk()], loop.events()


@pytest.mark.parametrize("kind", [Notice.DELIVERED, Notice.FAILED])
async def test_final_reply_shows_page_1(kind: Notice) -> None:
    """Delivered or failed: the sender sees which document the reply is about."""
    found, _ = await parts_of(notice(kind, at("delivered").fax), draw)
    assert found == ["multipart/mixed", "text/plain", "image/png"]


@pytest.mark.parametrize("kind", [Notice.DELAYED, Notice.CANCELLED])
async def test_other_replies_show_no_page(kind: Notice) -> None:
    """A delay or a cancelled fax is told in words."""
    found, _ = await parts_of(notice(kind, at("delivered").fax), draw)
    assert found == ["text/plain"]


async def test_report_has_no_picture() -> None:
    """A report for programs keeps to its three parts."""
    found, _ = await parts_of(DELIVERED, draw, "report")
    assert "image/png" not in found


async def test_no_picture_when_switched_off() -> None:
    """Where pictures are switched off, for the privacy of patients, no page leaves the store."""
    found, _ = await parts_of(DELIVERED, None, broken=RuntimeError("nobody may ask for the document"))
    assert found == ["text/plain"]


async def _none(_document: bytes) -> bytes | None:
    return None


async def _large(_document: bytes) -> bytes | None:
    return PNG + bytes(notify.LARGEST_PICTURE)


@pytest.mark.parametrize("picture", [_none, _large])
async def test_reply_without_a_fit_picture_goes_out(picture: Picture) -> None:
    """A page that cannot be drawn, or becomes too large for a mail, is left out."""
    assert await parts_of(DELIVERED, picture) == (["text/plain"], ["reply_sent"])


async def test_reply_about_a_purged_document_goes_out() -> None:
    """After a week without relay the document may be gone; the reply still tells the outcome."""
    assert DELIVERED.mail is not None
    purged = replace(DELIVERED, mail=replace(DELIVERED.mail, document_id="gone"))
    assert await parts_of(purged, draw) == (["text/plain"], ["reply_sent"])


async def _fails(_document: bytes) -> bytes | None:
    raise OSError("no space left")


async def _cancels(_document: bytes) -> bytes | None:
    raise asyncio.CancelledError


async def _hangs(_document: bytes) -> bytes | None:
    await asyncio.Event().wait()
    return PNG


@pytest.mark.parametrize("picture", [_fails, _cancels, _hangs])
async def test_failed_drawing_does_not_stop_the_reply(
    picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens to the child process that draws, the sender is told the outcome."""
    monkeypatch.setattr("gateway.notify.PICTURE_LIMIT", 0.2)
    assert await parts_of(DELIVERED, picture) == (["text/plain"], ["child_failed", "reply_sent"])


async def test_store_that_cannot_give_the_document_does_not_stop_the_reply() -> None:
    """A document that cannot be read costs the picture, not the reply."""
    found, logged = await parts_of(DELIVERED, draw, broken=StoreUnavailable("locked"))
    assert (found, logged) == (["text/plain"], ["child_failed", "reply_sent"])


# --- with the real store ---------------------------------------------------------------------------------


async def test_outbox_of_the_real_store(store: TriedStore) -> None:
    """What the store queued goes out once: put off, sent, recorded, and a refused one told to the postmaster."""
    bell = Bell()
    fax = await store.called()
    await store.apply(fax.id, Reported(newest(fax), Report(Stage.DELIVERED, asked=False, pages=3)))
    async with serving(TestRelay(refused={SENDER: "450 greylisted"})) as relay:
        sending = asyncio.create_task(
            run(
                store,
                Relay(f"smtp://127.0.0.1:{relay.port}", hostname="fax.example.com"),
                LETTERHEAD,
                clock=store.clock,
                wake=bell.listener(),
                picture=None,
                give_up_after=GIVE_UP_AFTER,
                count=lambda _kind, _result: bell.ring(),
            )
        )
        watch = bell.listener()

        async def until(query: str) -> None:
            async with asyncio.timeout(20):
                while not await store.rows(f"SELECT 1 FROM outbox WHERE {query}"):
                    await watch.wait(0.05)

        await until("tries = 1 AND error = '450 greylisted'")
        store.clock.now += 60.0
        relay.refused[SENDER] = "550 5.1.1 no such user"
        bell.ring()
        await until("given_up_at IS NOT NULL")
        await until("cause = 'reply_given_up' AND sent_at IS NOT NULL")
        assert [mail.recipient for mail in relay.taken] == [POSTMASTER]
        assert f"{fax.id}.delivered".encode() in relay.taken[0].data
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
