"""Mail out with real processes: the relay comes and goes, reports for programs, pictures, the postmaster."""

import email.policy
import io
import itertools
from collections.abc import AsyncIterator
from email.message import MIMEPart

import pytest
import pytest_asyncio
from harness import POSTMASTER, SENDER, World, letter, numbers, until, words, world
from PIL import Image

pytestmark = pytest.mark.asyncio(loop_scope="module")
FREE = numbers()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def w(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One world with pictures for most tests of this file."""
    async with world(tmp_path_factory.mktemp("replies"), replies={"attach_first_page": True}) as made:
        yield made
        await made.everyone_told()


async def test_the_reply_shows_the_first_page(w: World) -> None:
    """The reply comes with a picture of the first page, so that nobody has to guess which fax it was."""
    delivered, failed = await w.replies(next(FREE), "+13125550105")
    for reply in (delivered, failed):
        (picture,) = reply.iter_attachments()
        assert (picture.get_content_type(), picture.get_filename()) == ("image/png", "page-1.png")
        with Image.open(io.BytesIO(picture.get_content())) as image:
            assert image.format == "PNG"
            assert 300 < image.width <= 500 < image.height
            tones = image.convert("L").histogram()
            assert sum(tones[:64]) > 50  # black
            assert tones[255] > image.width * image.height / 2  # on white


async def test_mail_to_the_postmaster_is_forwarded(w: World) -> None:
    """`postmaster@` takes mail from everybody, the null sender too, and hands it on as it came."""
    for sender, subject in ((SENDER, "A question"), ("", "Undeliverable")):
        message = letter("postmaster")
        message.replace_header("Subject", subject)
        raw = message.as_bytes(policy=email.policy.SMTP)
        await w.mail("postmaster", message=message, sender=sender)
        found = lambda subject=subject: [m for m in w.mailbox.mails if m["Subject"] == subject]  # noqa: E731 -- asked twice
        (mail,) = await until(found, "the forwarded mail")
        assert w.mailbox.envelopes[w.mailbox.mails.index(mail)] == ("<>", [POSTMASTER])
        assert mail["Received"].startswith("from [127.0.0.1] by ")
        del mail["Received"]
        assert mail.as_bytes(policy=email.policy.SMTP) == raw


async def test_mail_to_a_number_and_the_postmaster_is_both(w: World) -> None:
    """One mail may be a fax and a letter to the postmaster; the fax is told about as always."""
    number = next(FREE)
    message = letter(number)
    message.replace_header("Subject", "Both")
    mail_id = await w.mail(number, "postmaster", message=message)
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
    await until(lambda: [mail for mail in w.mailbox.mails if mail["Subject"] == "Both"], "the forwarded mail")
    assert len(w.taken(number)) == 1


async def test_a_recipient_that_the_relay_refuses_for_good_holds_up_nobody(w: World) -> None:
    """A sender who does not exist is told in vain; the postmaster hears of it; others get their replies."""

    def answer(recipient: str) -> str:
        return "550 5.1.1 no such user" if recipient.startswith("gone@") else "250 2.1.5 taken"

    w.mailbox.answer = answer
    first = await w.mail(next(FREE), sender="gone@example.com")
    w.accepted.pop(first)  # nobody can be told
    (reply,) = await w.replies(next(FREE))
    assert reply["X-Fax-Outcome"] == "delivered"
    (alert,) = await until(w.mailbox.alerts, "the alert")
    assert alert["Subject"] == "Fax gateway alert: a reply could not be delivered"
    assert "550 5.1.1 no such user" in words(alert)
    assert alert["Auto-Submitted"] == "auto-generated"
    shown = await w.gateway.show(f"{first}-1")
    assert shown["fax"]["state"] == "delivered"
    assert shown["replies"] == [["delivered", "given up: 550 5.1.1 no such user"]]


async def test_a_relay_that_is_away_gets_every_reply_when_it_is_back(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Without the relay mail is taken and faxes go out; each reply waits and comes when the relay is back."""
    async with world(tmp_path_factory.mktemp("away")) as w:
        await w.mailbox.close()
        first = await w.mail(next(FREE), "+13125550105")
        await until(lambda: len(w.gateway.said("fax_ended")) == 2, "both to end")
        await until(lambda: w.gateway.said("reply_deferred"), "the reply to be put off")
        second = await w.mail(next(FREE), message=letter(text="second"))
        await until(lambda: len(w.gateway.said("fax_ended")) == 3, "the third to end")
        assert w.mailbox.mails == []
        ((notice, fate),) = (await w.gateway.show(f"{second}-1"))["replies"]
        assert (notice, fate.partition(":")[0]) == ("delivered", "waiting")
        await w.mailbox.open()
        await w.gateway.stop()
        await w.restart()  # a start tries at once what waits
        outcomes = [
            (await w.reply(fax_id))["X-Fax-Outcome"] for fax_id in (f"{first}-1", f"{first}-2", f"{second}-1")
        ]
        assert outcomes == ["delivered", "failed", "delivered"]
        assert len(w.posts) == 3
        await w.everyone_told()


async def test_reports_for_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With format "report" each outcome is a multipart/report that a mail system understands (RFC 3464)."""
    folder = tmp_path_factory.mktemp("reports")
    async with world(folder, replies={"format": "report", "attach_first_page": True}) as w:
        w.carrier.set_script({(busy := next(FREE)): ["user_busy", "account_disabled", "delivered"]})
        two = ("+13125550130", next(FREE))
        failed, delivered = await w.replies(*two, message=letter(*two, message_id="<order@example.com>"))
        for reply, action, status in ((failed, "failed", "5.1.1"), (delivered, "delivered", "2.0.0")):
            assert reply.get_content_type() == "multipart/report"
            assert reply.get_param("report-type") == "delivery-status"
            parts = list(reply.iter_parts())
            kinds = [part.get_content_type() for part in parts]
            assert kinds == ["text/plain", "message/delivery-status", "text/rfc822-headers"]
            fields = _status(parts[1])
            number = reply["X-Fax-Number"]
            assert fields["Action"] == action
            assert fields["Status"] == status
            assert fields["Original-Recipient"] == f"rfc822; {number}@fax.local"
            assert fields["Arrival-Date"]
            assert "Message-ID: <order@example.com>" in str(parts[2].get_content())
        assert (
            _status(list(failed.iter_parts())[1])["Diagnostic-Code"]
            == "x-telnyx; receiver_unallocated_number"
        )
        assert "Diagnostic-Code" not in _status(list(delivered.iter_parts())[1])
        mail_id = await w.mail(busy)
        delayed = await w.reply(f"{mail_id}-1", "delayed")
        fields = _status(list(delayed.iter_parts())[1])
        assert (fields["Action"], fields["Status"][:2]) == ("delayed", "4.")
        assert fields["Will-Retry-Until"]
        assert (await w.gateway.run("release", "--all"))[0] == 0
        await w.everyone_told()


def _status(part: MIMEPart) -> dict[str, str]:
    """Return all fields of a delivery-status part, those of the message and of the recipient."""
    assert part.is_multipart()
    return dict(itertools.chain.from_iterable(block.items() for block in part.iter_parts()))
