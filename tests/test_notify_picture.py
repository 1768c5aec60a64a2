"""The picture of page 1: shown where it helps, and never a reason for the reply to stay behind."""

import asyncio
import email
from dataclasses import dataclass, field, replace

import pytest
from faxes import at
from letters import PNG, notice
from outboxes import DELIVERED, DOCUMENTS, looping
from relays import TestRelay, serving

from gateway import notify
from gateway.children import ChildFailed
from gateway.database import StoreUnavailable
from gateway.notify import Picture
from gateway.records import Notice, OutboxEntry


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
    """A delay or a cancelled fax is told in words, and nothing is drawn for it."""
    found = await parts_of(notice(kind, at("delivered").fax), draw, broken=RuntimeError("asked for"))
    assert found == (["text/plain"], ["reply_sent"])


async def test_report_has_no_picture() -> None:
    """A report for programs keeps to its three parts, and nothing is drawn for it."""
    found, logged = await parts_of(DELIVERED, draw, "report", RuntimeError("asked for"))
    assert "image/png" not in found
    assert logged == ["reply_sent"]


async def test_no_picture_when_switched_off() -> None:
    """Where pictures are switched off, for the privacy of patients, no page leaves the store."""
    found = await parts_of(DELIVERED, None, broken=RuntimeError("asked for"))
    assert found == (["text/plain"], ["reply_sent"])


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


# --- one drawing for all replies about a document ----------------------------------------------------------


@dataclass
class Painter:
    """Draws when the gate is open, and counts; each fault is raised once, before it draws."""

    faults: list[BaseException] = field(default_factory=list)
    drawn: list[bytes] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: bool = False

    async def __call__(self, document: bytes) -> bytes | None:
        """Draw page 1."""
        self.drawn.append(document)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.stopped = True
            raise
        if self.faults:
            raise self.faults.pop(0)
        return PNG


def about(document_id: str, count: int, start: int = 0) -> list[OutboxEntry]:
    """Return replies to different senders about one document."""
    assert DELIVERED.mail is not None
    mail = replace(DELIVERED.mail, document_id=document_id)
    return [
        replace(DELIVERED, id=f"{document_id}-{n}.delivered", recipient=f"{n}@example.org", mail=mail)
        for n in range(start, start + count)
    ]


def pictured(relay: TestRelay) -> list[bool]:
    """Tell of each mail that arrived whether it shows a page."""
    return [b"image/png" in taken.data for taken in relay.taken]


async def test_page_is_drawn_once_for_all_replies() -> None:
    """A mail to 20 numbers has its page drawn once, and all 20 replies show it."""
    painter, replies = Painter(), about("d1", 20)
    async with serving(TestRelay()) as relay, looping(relay, picture=painter) as loop:
        loop.put(*replies)
        await loop.until(lambda: painter.drawn and len(loop.shelf.held) == notify.AT_ONCE)
        painter.gate.set()
        await loop.settled(*replies)
        assert painter.drawn == [DOCUMENTS["d1"]]
        assert pictured(relay) == [True] * 20


@pytest.mark.parametrize(
    "fault", [ChildFailed("time"), ChildFailed("died"), RuntimeError("odd"), asyncio.CancelledError()]
)
async def test_failed_drawing_is_not_tried_again(fault: BaseException) -> None:
    """A page that killed its child is not drawn again for the next reply, and the log names it once."""
    painter = Painter([fault])
    painter.gate.set()
    async with serving(TestRelay()) as relay, looping(relay, picture=painter) as loop:
        for reply in about("d1", 6):
            loop.put(reply)
            await loop.settled(reply)
        assert len(painter.drawn) == 1
        assert pictured(relay) == [False] * 6
        assert loop.events() == ["child_failed", *["reply_sent"] * 6]
        assert loop.logged[0]["fax"] == "m1-1"
        assert type(fault).__name__ in loop.logged[0]["cause"]


async def test_page_that_cannot_be_drawn_is_asked_for_once() -> None:
    """Where there is nothing to show, nobody looks again for the next reply."""
    asked: list[bytes] = []

    async def nothing(document: bytes) -> bytes | None:
        asked.append(document)
        return None

    replies = about("d1", 6)
    async with serving(TestRelay()) as relay, looping(relay, picture=nothing) as loop:
        loop.put(*replies)
        await loop.settled(*replies)
    assert len(asked) == 1


async def test_fault_that_is_not_the_documents_passes() -> None:
    """When it was not a page's turn, or the store was away, a later reply shows it; the log has one line."""
    painter = Painter([TimeoutError()])
    painter.gate.set()
    async with serving(TestRelay()) as relay, looping(relay, picture=painter) as loop:
        for reply, broken in zip(about("d1", 4), [False, True, False, False], strict=True):
            if broken:
                loop.shelf.broken["document"] = StoreUnavailable("locked")
            loop.put(reply)
            await loop.settled(reply)
            loop.shelf.broken.clear()
        assert pictured(relay) == [False, False, True, True]
        assert len(painter.drawn) == 2
        assert loop.events().count("child_failed") == 1


@pytest.mark.parametrize(("name", "most"), [("PAGES_KEPT", 2), ("PICTURES_KEPT", 2 * len(PNG))])
async def test_few_pages_are_remembered(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway's memory does not grow with the documents: the page wanted longest ago is forgotten."""
    monkeypatch.setattr(notify, name, most)
    painter, wanted = Painter(), ["d1", "d2", "d1", "d3", "d1", "d2"]
    painter.gate.set()
    for document_id in set(wanted):
        monkeypatch.setitem(DOCUMENTS, document_id, document_id.encode())
    async with serving(TestRelay()) as relay, looping(relay, picture=painter) as loop:
        for place, document_id in enumerate(wanted):
            (reply,) = about(document_id, 1, place)
            loop.put(reply)
            await loop.settled(reply)
        assert pictured(relay) == [True] * len(wanted)
    assert painter.drawn == [b"d1", b"d2", b"d3", b"d2"]


async def test_second_stop_ends_the_drawing() -> None:
    """When the time to stop is over, no page goes on being drawn for a reply that is left behind."""
    painter = Painter()
    async with serving(TestRelay()) as relay, looping(relay, picture=painter) as loop:
        loop.put(DELIVERED)
        await loop.until(lambda: painter.drawn)
        loop.task.cancel()
        await asyncio.wait({loop.task}, timeout=0.05)
        loop.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop.task
        assert painter.stopped
        assert relay.taken == []
