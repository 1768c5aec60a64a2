"""Mail out: each mail to one sender at a time, kept until it is taken or given up, alerts once a day."""

import asyncio

import stores
from faxes import DAY, NOW, NUMBER
from stores import POSTMASTER, SENDER, TriedStore, reported

from gateway import store_apply
from gateway.records import Alert, HoldAsked, Notice, ReceivedMail, Stage
from gateway.store_intake import Submission
from gateway.store_outbox import NOTICE_LEASE

store = stores.store


async def test_a_reply_brings_what_is_needed_to_write_it(store: TriedStore) -> None:
    """Who composes the reply gets the fax as it ended and the mail that it came in."""
    fax = await store.called(message_id="<a@b>")
    await store.webhook(reported("c1", Stage.DELIVERED))
    (entry,) = await store.claim_notices(10)
    assert (entry.id, entry.recipient, entry.notice) == (f"{fax.id}.delivered", SENDER, Notice.DELIVERED)
    assert (entry.queued_at, entry.tries) == (NOW, 0)
    assert entry.fax == await store.fax(fax.id)
    assert entry.mail == (await store.show(fax.id)).mail
    assert entry.mail.message_id == "<a@b>"
    assert entry.mail.original_headers == b"Subject: An order\r\n"
    assert (entry.alert, entry.forward, entry.cause) == (None, None, None)


async def test_a_mail_has_one_sender_at_a_time(store: TriedStore) -> None:
    """Two gateways never send the same reply at once; if one dies, the other takes over after the lease."""
    await store.alert(Alert("call_stuck", "A call."))
    claims = await asyncio.gather(*(store.claim_notices(10) for _ in range(5)))
    assert sorted(len(claim) for claim in claims) == [0, 0, 0, 0, 1]
    store.clock.now += NOTICE_LEASE - 1
    assert await store.claim_notices(10) == []
    store.clock.now += 1
    assert len(await store.claim_notices(10)) == 1


async def test_who_lost_the_lease_records_nothing(store: TriedStore) -> None:
    """A sender that slept cannot overwrite what its successor found out."""
    await store.alert(Alert("call_stuck", "A call."))
    (old,) = await store.claim_notices(10)
    store.clock.now += NOTICE_LEASE
    (new,) = await store.claim_notices(10)
    assert (old.id, old.fence + 1) == (new.id, new.fence)
    assert not await store.notice_sent(old.id, old.fence)
    assert not await store.notice_deferred(old.id, old.fence, 60.0, "451")
    assert not await store.notice_given_up(old.id, old.fence, "550")
    assert await store.notice_sent(new.id, new.fence)
    assert not await store.notice_given_up(new.id, new.fence, "550"), "what is sent is sent"


async def test_a_deferred_mail_comes_back_when_it_is_due(store: TriedStore) -> None:
    """While the relay is away, a reply waits and is tried again, and counts its tries."""
    fax = await store.queued()
    await store.apply(fax.id, HoldAsked())
    for tries in range(3):
        (entry,) = await store.claim_notices(10)
        assert entry.tries == tries
        assert await store.notice_deferred(entry.id, entry.fence, 900.0, "the relay is away")
        assert (await store.show(fax.id)).replies == (("delayed", "waiting: the relay is away"),)
        store.clock.now += 899
        assert await store.claim_notices(10) == []
        store.clock.now += 1
    assert (await store.count()).outbox == 1


async def due(store: TriedStore, recipient: str, count: int = 1) -> None:
    """Queue so many mails to a recipient, due now."""
    for place in range(count):
        name = f"{recipient}.{store.clock.now}.{place}"
        await store._do(store_apply.post, name, recipient, cause="test", payload=b"text")


async def served(store: TriedStore, turns: int) -> list[str]:
    """Let so many mails go out, one after the other; return who got them, sorted."""
    recipients = []
    for _ in range(turns):
        (entry,) = await store.claim_notices(1)
        assert await store.notice_sent(entry.id, entry.fence)
        recipients.append(entry.recipient)
    return sorted(recipients)


async def test_the_longest_due_goes_first(store: TriedStore) -> None:
    """No mail is overtaken for ever by newer ones."""
    for cause in ("c", "a", "b"):
        await store.alert(Alert(cause, "text"))
        store.clock.now += 1
    assert [entry.cause for entry in await store.claim_notices(2)] == ["c", "a"]
    assert [entry.cause for entry in await store.claim_notices(2)] == ["b"]


async def test_recipients_take_turns(store: TriedStore) -> None:
    """Those who have many mails waiting get them in turn, and whoever comes later waits for one round."""
    many = ["a", "b", "c", "d", "e"]
    for recipient in many:
        await due(store, recipient, 4)
    assert await served(store, 5) == many
    store.clock.now += 0.5
    await due(store, "late", 2)
    assert await served(store, 6) == [*many, "late"]
    assert await served(store, 6) == [*many, "late"]
    assert await served(store, 5) == many


async def test_hundreds_of_mails_to_one_keep_nobody_waiting(store: TriedStore) -> None:
    """A reply goes out with the next mails, even if hundreds to somebody else were there before it."""
    await due(store, "flood", 300)
    store.clock.now += 2
    await due(store, "single")
    assert "single" in await served(store, 4)


async def test_a_mail_that_the_gateway_falls_over_is_given_up(store: TriedStore) -> None:
    """After five claims that nobody came back from, the rest goes out, and the postmaster is told which."""
    fax = await store.called("c1")
    await store.webhook(reported("c1", Stage.DELIVERED))
    for _ in range(5):
        assert len(await store.claim_notices(4)) == 1
        store.clock.now += 2 * NOTICE_LEASE + 1
    await due(store, "other")
    entries = [*await store.claim_notices(4), *await store.claim_notices(4)]
    told = {entry.recipient: entry.alert or "" for entry in entries}
    assert told.keys() == {POSTMASTER, "other"}
    assert f"{fax.id}.delivered" in told[POSTMASTER]
    fate = "given up: the gateway came to an end each time it worked on it"
    assert (await store.show(fax.id)).replies == (("delivered", fate),)


async def test_what_was_in_hand_at_a_crash_goes_out_one_by_one(store: TriedStore) -> None:
    """Of those that a dying gateway had in its hands one may be to blame: it takes no other along again."""
    for recipient in ("a", "b"):
        await due(store, recipient)
    assert [entry.alone for entry in await store.claim_notices(4)] == [False, False]
    store.clock.now += NOTICE_LEASE + 1
    for recipient in ("c", "d"):
        await due(store, recipient)
    claims = [await store.claim_notices(4) for _ in range(3)]
    assert [[(entry.recipient, entry.alone) for entry in claim] for claim in claims] == [
        [("a", True)], [("b", True)], [("c", False), ("d", False)],
    ]  # fmt: skip


async def test_a_mail_put_off_in_good_order_is_never_given_up_for_that(store: TriedStore) -> None:
    """However often the relay was away, or the gateway was stopped, it counts as no harm."""
    await due(store, "somebody")
    for _ in range(12):
        (entry,) = await store.claim_notices(1)
        assert await store.notice_deferred(entry.id, entry.fence, 0.0, "the gateway stopped")
    assert len(await store.claim_notices(1)) == 1


async def test_no_mail_is_claimed_twice(store: TriedStore) -> None:
    """Gateways that claim at the same time share the mails out, and nothing is left."""
    for recipient in ("a", "b", "c"):
        await due(store, recipient, 10)
    claimed: list[str] = []
    while len(claimed) < 30:
        for claim in await asyncio.gather(*(store.claim_notices(2) for _ in range(12))):
            for entry in claim:
                assert await store.notice_sent(entry.id, entry.fence)
                claimed.append(entry.id)
    assert len(set(claimed)) == 30
    assert await store.claim_notices(8) == []


async def test_a_reply_given_up_is_told_once_a_day(store: TriedStore) -> None:
    """When replies cannot be delivered for days, the postmaster hears once each day, not of his own mail."""
    faxes = [await store.queued(number) for number in stores.numbers(3)]
    for fax in faxes:
        await store.apply(fax.id, HoldAsked())
    for entry in await store.claim_notices(10):
        assert await store.notice_given_up(entry.id, entry.fence, "the relay refuses it")
    (alert,) = await store.claim_notices(10)
    assert (alert.recipient, alert.cause) == (POSTMASTER, "reply_given_up")
    assert alert.alert is not None
    assert "could not be handed over: the relay refuses it" in alert.alert
    assert await store.notice_given_up(alert.id, alert.fence, "nor this")
    assert await store.claim_notices(10) == []
    for fax in faxes:
        assert (await store.show(fax.id)).replies == (("delayed", "given up: the relay refuses it"),)


async def test_an_alert_is_one_mail_for_each_cause_and_day(store: TriedStore) -> None:
    """A thousand stuck calls are one mail; the next day (UTC) there is another."""
    for _ in range(2):
        for cause, text in (("call_stuck", "first"), ("call_stuck", "second"), ("fax_held", "other")):
            await store.alert(Alert(cause, text))
        entries = await store.claim_notices(10)
        told = [(entry.cause, entry.alert) for entry in entries]
        assert told == [("call_stuck", "first"), ("fax_held", "other")]
        assert await store.mail_out() == []
        store.clock.now += DAY / 2 - 1  # 23:59:59
        await store.alert(Alert("call_stuck", "third"))
        assert (await store.count()).outbox == 2
        for entry in entries:
            assert await store.notice_sent(entry.id, entry.fence)
        store.clock.now += DAY / 2 + 1  # noon


async def test_what_was_handed_over_is_not_kept(store: TriedStore) -> None:
    """The text of a mail that went to the postmaster does not stay in the database, sent or given up."""
    for _ in range(2):
        mail = ReceivedMail(id="", sender="x@example.com", received_at=NOW)
        await store.accept(Submission(mail, "", (), forward=b"a private matter"), DAY)
        store.clock.now += 1
    first, second = await store.claim_notices(10)
    assert await store.rows("SELECT count(*) FROM outbox WHERE payload IS NOT NULL") == [(2,)]
    assert await store.notice_sent(first.id, first.fence)
    assert await store.notice_given_up(second.id, second.fence, "refused")
    assert await store.rows("SELECT id FROM outbox WHERE payload = :it", it=b"a private matter") == []


async def test_exactly_one_final_reply(store: TriedStore) -> None:
    """However often the end is reported, the sender gets one mail about it."""
    fax = await store.called(number=NUMBER)
    for n in range(3):
        await store.webhook(reported("c1", Stage.DELIVERED, id=f"e{n}"))
    assert (await store.show(fax.id)).replies == (("delivered", "waiting"),)
    assert await store.mail_out() == [f"{fax.id}.delivered"]
    assert (await store.show(fax.id)).replies == (("delivered", "sent"),)
