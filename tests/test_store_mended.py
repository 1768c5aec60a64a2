"""Faults that were found in the store and mended: each has its test."""

import pytest
import stores
from faxes import DAY, FROM, NUMBER, STUCK
from stores import SETTINGS, TriedStore, newest, numbers, reported

from gateway.records import (
    Alert,
    Blame,
    Brake,
    CancelAsked,
    Doubted,
    HoldAsked,
    Notice,
    Rejected,
    Report,
    Reported,
    Stage,
    State,
    TimePassed,
    Unprovable,
)
from gateway.store_intake import NotRenewable

store = stores.store
sqlite_store = stores.sqlite_store


async def test_a_notice_that_its_end_overtook_is_not_sent(store: TriedStore) -> None:
    """Whose fax has ended hears of the end, and not afterwards that it is still being tried."""
    fax = await store.queued()
    await store.apply(fax.id, HoldAsked())
    await store.apply(fax.id, CancelAsked())
    entries = await store.claim_notices(10)
    assert [entry.notice for entry in entries] == [Notice.CANCELLED]
    store.clock.now += DAY
    await store.notice_sent(entries[0].id, entries[0].fence)
    assert await store.claim_notices(10) == []
    assert (await store.count()).outbox == 0


async def test_a_hold_of_a_number_that_is_no_longer_ours_ends_with_the_restart(store: TriedStore) -> None:
    """When the number that faxes are sent from was changed, the hold of the old one stops nobody."""
    await store.queued()
    fax = await store.claimed()
    await store.apply(fax.id, Rejected(newest(fax), Blame.SENDER, "HTTP 403", "account_disabled"))
    assert await store.brakes() == {("hold", FROM)}
    await store.take_over(FROM)
    assert await store.brakes() == {("hold", FROM)}
    await store.take_over("+13125550199")
    assert await store.brakes() == set()


async def test_questions_that_get_no_answer_harm_nobody(store: TriedStore) -> None:
    """However often the carrier does not answer about a call, its fax is not set aside for that."""
    fax = await store.called()
    for _ in range(12):
        store.clock.now += 300.0
        for due in await store.claim_questions(9):
            await store.asked(due.id)
    assert (await store.fax(fax.id)).state is State.SENDING


async def test_an_ended_fax_is_renewed_once(store: TriedStore) -> None:
    """A second `retry` of the same ended fax does not make a third fax, unless by force."""
    fax = await store.queued()
    await store.ended(fax.id, CancelAsked())
    again = await store.renew(fax.id, even_if_twice=False)
    with pytest.raises(NotRenewable, match=again.id):
        await store.renew(fax.id, even_if_twice=False)
    assert (await store.renew(fax.id, even_if_twice=True)).id not in {fax.id, again.id}


async def test_a_fax_that_failed_with_success_is_renewed_by_force_only(store: TriedStore) -> None:
    """What the carrier calls failed and successful at once may have arrived."""
    fax = await store.called()
    await store.webhook(reported("c1", Stage.FAILED, reason="success"))
    answer = Report(Stage.FAILED, asked=True, reason="success")
    await store.apply(fax.id, Reported(newest(fax), answer))
    held = await store.fax(fax.id)
    assert held.state is State.HELD
    store.clock.now = held.give_up_at
    assert (await store.apply(fax.id, TimePassed())).state is State.FAILED
    with pytest.raises(NotRenewable, match="--even-if-twice"):
        await store.renew(fax.id, even_if_twice=False)


async def test_records_keep_nothing_of_what_the_mail_said(store: TriedStore) -> None:
    """Subject and headers go together with the document."""
    fax = await store.queued()
    await store.ended(fax.id, CancelAsked())
    assert (await store.show(fax.id)).mail.subject == "An order"
    store.clock.now += 2 * DAY
    assert await stores.purged(store, DAY, 99 * DAY) == 1
    mail = (await store.show(fax.id)).mail
    assert (mail.subject, mail.original_headers) == ("", b"")


async def test_every_alert_and_brake_is_heard_of_once(store: TriedStore) -> None:
    """Log and metrics hear of each mail to the postmaster, and of all that stops the queue."""
    for number in (NUMBER, *numbers(1)):
        await store.queued(number)
        fax = await store.claimed(SETTINGS)
        await store.apply(fax.id, Rejected(newest(fax), Blame.SUSPECT, "HTTP 404", "no_outbound_profile"))
    alerts = [news.cause for news in store.news if isinstance(news, Alert)]
    assert sorted(alerts) == ["account_held", "fax_held", "fax_held"]
    assert [(news.kind, news.scope) for news in store.news if isinstance(news, Brake)] == [
        ("hold", "account")
    ]


async def test_two_doubts_about_one_number_know_of_each_other(store: TriedStore) -> None:
    """Once a doubt no longer blocks its number, what the carrier shows may be the other fax's call."""
    first = await store.queued()
    doubt = await store.apply(first.id, Doubted(newest(await store.claimed()), "timeout"))
    await store.apply(first.id, Unprovable(newest(doubt), "no list"))
    assert not await store.has_rival(doubt, doubt.attempts[0])
    store.clock.now += STUCK + 1  # given up as stuck: the number is free
    await store.pass_time()
    await store.queued()
    await store.claimed()
    assert await store.has_rival(doubt, doubt.attempts[0])
