"""The picture of page 1: shown where it helps, and never a reason for the reply to stay behind."""

import asyncio
import email
from dataclasses import replace

import pytest
from faxes import at
from letters import PNG, notice
from outboxes import DELIVERED, DOCUMENTS, looping
from relays import TestRelay, serving

from gateway import notify
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
