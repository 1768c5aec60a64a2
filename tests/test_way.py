"""The whole way with real processes: mail in, calls, webhooks, the reply."""

import asyncio
import email.policy
import hashlib
import itertools
import smtplib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from harness import POSTMASTER, SENDER, World, letter, numbers, until, words, world
from papers import heavy, paper

from gateway.sandbox_exchange import LedgerEntry

pytestmark = pytest.mark.asyncio(loop_scope="module")
FREE = numbers()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def w(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One world for all tests of this file; at its end every fax has exactly one final reply."""
    async with world(tmp_path_factory.mktemp("way")) as made:
        yield made
        await made.everyone_told()
        assert await made.gateway.stop() == 0


def _ended_at(w: World, call: LedgerEntry) -> float:
    """Return when the carrier first told how a call ended."""
    ends = ("fax.delivered", "fax.failed")
    return min(e.time for e in w.carrier.events if e.fax_id == call.fax_id and e.event_type in ends)


async def test_a_mailed_pdf_is_delivered_and_the_sender_told(w: World) -> None:
    """A PDF mailed to a number is called once, as it was mailed, and the sender reads: delivered."""
    message = letter("+13125550100", text="delivered", message_id="<contract@example.com>")
    (reply,) = await w.replies("+13125550100", message=message)
    (call,) = w.taken("+13125550100")
    assert call.sha256 == hashlib.sha256(paper(text="delivered")).hexdigest()
    assert (call.from_, call.fields["quality"], call.fields["t38_enabled"]) == (
        "+13125790015",
        "high",
        "true",
    )
    assert reply["X-Fax-Outcome"] == "delivered"
    assert reply["Subject"] == "Fax delivered: +1 312-555-0100, 1 page"
    assert (reply["To"], reply["Reply-To"]) == (SENDER, POSTMASTER)
    assert (reply["In-Reply-To"], reply["Auto-Submitted"]) == ("<contract@example.com>", "auto-replied")
    text = words(reply)
    assert "Your fax was delivered. The receiving machine confirmed 1 page." in text
    assert "Duration: 1 min 19 s" in text
    assert call.fax_id in text
    place = w.mailbox.mails.index(reply)
    assert w.mailbox.envelopes[place] == ("<>", [SENDER])  # the null sender: no reply to the reply


async def test_a_busy_line_is_called_again_until_it_is_free(w: World) -> None:
    """A busy line is called again with the same document; the sender hears once, of the delivery."""
    (reply,) = await w.replies("+13125550152")
    first, second = w.taken("+13125550152")
    assert first.sha256 == second.sha256
    assert _ended_at(w, first) <= second.time
    assert (reply["X-Fax-Outcome"], reply["X-Fax-Attempts"]) == ("delivered", "2")
    text = words(reply)
    assert text.index("The line of the recipient's fax was busy.") < text.index("Delivered, 1 page.")
    assert "failure_reason" not in text  # it arrived: no need to worry anybody


async def test_five_recipients_have_five_outcomes(w: World) -> None:
    """One mail to five numbers is five faxes of one document, each with its own outcome and reply."""
    five = ["+13125550144", "+13125550130", "+13125550153", "+13125550110", "+13125550169"]
    replies = await w.replies(*five, message=letter(*five, text="five"))
    calls = [w.taken(number) for number in five]
    assert [len(made) for made in calls] == [1, 1, 3, 4, 0]
    assert {call.sha256 for made in calls for call in made} == {
        hashlib.sha256(paper(text="five")).hexdigest()
    }
    told = [(reply["X-Fax-Outcome"], reply["X-Fax-Reason"], reply["X-Fax-Attempts"]) for reply in replies]
    assert told == [
        ("delivered", None, "1"),
        ("failed", "receiver_unallocated_number", "1"),
        ("delivered", None, "3"),
        ("failed", "fax_signaling_error", "4"),
        ("failed", "number_refused", "0"),
    ]
    assert "Nobody has this fax number at present." in words(replies[1])
    # What the machines could not agree on is tried in another way: from the third call on without frills.
    assert [call.fields["quality"] for call in calls[3]] == ["high", "high", "normal", "normal"]
    assert [call.fields["t38_enabled"] for call in calls[3]] == ["true", "true", "false", "false"]
    assert "No call. The fax service does not accept the number" in words(replies[4])


async def test_the_same_mail_twice_is_one_fax(w: World) -> None:
    """A mail that a client sends again gets the first one's id and makes no second call."""
    number = next(FREE)
    message = letter(number)
    first = await w.mail(number, message=message)
    await w.reply(f"{first}-1")
    assert await w.mail(number, message=message) == first
    await until(lambda: w.gateway.said("mail_duplicate", mail=first), "the log to name the repeat")
    assert len(w.taken(number)) == 1


async def test_the_same_mail_twice_at_once_is_one_fax(w: World) -> None:
    """A mail that comes over several connections at the same moment is one fax all the same."""
    number = next(FREE)
    message = letter(number)
    ids = await asyncio.gather(*(w.mail(number, message=message) for _ in range(4)))
    assert len(set(ids)) == 1
    await w.reply(f"{ids[0]}-1")
    assert len(w.taken(number)) == 1


async def test_mails_whose_long_message_ids_end_differently_are_two_faxes(w: World) -> None:
    """Two mails of one document that only the end of a long Message-ID tells apart are both called."""
    number, document = next(FREE), paper(text="long")
    ids = [f"<{'a' * 300}{end}@example.com>" for end in (1, 2, 1)]
    mails = [letter(number, document=document, message_id=message_id) for message_id in ids]
    first, second, repeat = [await w.mail(number, message=message) for message in mails]
    assert (first == second, first == repeat) == (False, True)
    for mail_id in (first, second):
        await w.reply(f"{mail_id}-1", "delivered")
    assert len(w.taken(number)) == 2


async def test_the_same_mail_to_a_further_number_is_one_fax_more(w: World) -> None:
    """A repeat that names a number more is a fax to that number only."""
    first, second = next(FREE), next(FREE)
    message = letter(first, second)
    await w.replies(first, message=message)
    mail_id = await w.mail(first, second, message=message)
    w.accepted[mail_id] = 1
    await until(lambda: w.taken(second), "the call to the further number")
    await until(lambda: w.mailbox.about(f"{mail_id}-1", "delivered"), "its reply")
    assert [len(w.taken(number)) for number in (first, second)] == [1, 1]


async def test_a_fax_that_failed_may_be_mailed_again(w: World) -> None:
    """The same mail after a failure is a new fax with a call and a reply of its own."""
    message = letter("+13125550106", text="again")
    first = await w.mail("+13125550106", message=message)
    assert (await w.reply(f"{first}-1"))["X-Fax-Reason"] == "destination_not_in_countries_whitelist"
    second = await w.mail("+13125550106", message=message)
    assert second != first
    await w.reply(f"{second}-1", "failed")
    assert len(w.taken("+13125550106")) == 2


async def test_one_number_gets_one_call_at_a_time(w: World) -> None:
    """Mails to one number at the same moment are called one after another, never into a busy line."""
    number, other = next(FREE), next(FREE)
    mails = [letter(number, text=f"queue {place}") for place in range(4)]
    ids = await asyncio.gather(w.mail(other), *(w.mail(number, message=message) for message in mails))
    for mail_id in ids:
        await w.reply(f"{mail_id}-1", "delivered")
    calls = w.taken(number)
    assert len({call.sha256 for call in calls}) == len(calls) == 4
    for earlier, later in itertools.pairwise(calls):
        assert _ended_at(w, earlier) <= later.time
    assert len(w.taken(other)) == 1


async def test_one_number_written_in_two_ways_is_one_fax(w: World) -> None:
    """A number written with and without punctuation in one mail is called once."""

    def hand_over() -> bytes:
        with smtplib.SMTP("127.0.0.1", w.gateway.smtp_port, timeout=30) as door:
            door.ehlo()
            door.mail(SENDER)
            for written in ("+1(312)556-0999", "fax=+13125560999", "312.556.0999"):
                code, answer = door.docmd("RCPT", f"TO:<{written}@fax.local>")
                assert code == 250, answer
            return door.data(letter("+13125560999").as_bytes(policy=email.policy.SMTP))[1]

    mail_id = (await asyncio.to_thread(hand_over)).decode().rpartition(" ")[2]
    w.accepted[mail_id] = 1
    await w.reply(f"{mail_id}-1", "delivered")
    assert len(w.taken("+13125560999")) == 1


async def test_several_pdfs_are_one_fax_in_their_order(w: World) -> None:
    """The PDFs of one mail are joined and sent in one call."""
    number = next(FREE)
    message = letter(number, text="first")
    for pages in (2, 3):
        message.add_attachment(paper(pages), maintype="application", subtype="pdf", filename=f"{pages}.pdf")
    (reply,) = await w.replies(number, message=message)
    (call,) = w.taken(number)
    assert call.pages == 6
    assert reply["Subject"].endswith(", 6 pages")
    assert (reply["X-Fax-Pages"], reply["X-Fax-Pages-Confirmed"]) == ("6", "6")


async def test_a_fax_of_twenty_megabytes_arrives_unchanged(w: World) -> None:
    """A document of the greatest size goes the whole way, octet for octet, beside a small one."""
    number, other = next(FREE), next(FREE)
    data = heavy(19_900_000)
    assert 19_900_000 < len(data) <= 20_000_000
    message = letter(number, document=data)
    large, small = await asyncio.gather(w.mail(number, message=message), w.mail(other))
    await w.reply(f"{small}-1", "delivered")
    await w.reply(f"{large}-1", "delivered")
    (call,) = w.taken(number)
    assert (call.size, call.sha256) == (len(data), hashlib.sha256(data).hexdigest())
