"""What the gateway falls over: whoever is to blame is set aside, and keeps nobody else waiting."""

from dataclasses import replace

import stores
from faxes import DAY, HOUR, STUCK
from stores import SETTINGS, TriedStore, numbers

from gateway.records import CancelAsked, Fax, HeldFor, OutboxEntry, State
from gateway.store_outbox import NOTICE_LEASE
from gateway.store_work import HARMFUL_AFTER, QUESTION_LEASE

store = stores.store

MANY = replace(SETTINGS, channels=1000)
AT_ONCE = 4  # questions that a gateway claims at a time


async def asked_about(store: TriedStore) -> list[str]:
    """Claim questions, and return the faxes that they are about."""
    return [fax.id for fax in await store.claim_questions(AT_ONCE)]


async def test_a_stuck_call_that_is_never_asked_about_in_peace_starves_nobody(store: TriedStore) -> None:
    """A call without an end that the gateway falls over is left to a person; the others are asked about."""
    harmful = await store.called("c-harmful")
    store.clock.now += STUCK + 1
    await store.pass_time()
    held = await store.fax(harmful.id)
    assert (held.state, held.held_for) == (State.HELD, HeldFor.STUCK)
    other = await store.called("c-other", "+13125550199")
    for _ in range(HARMFUL_AFTER):
        assert await asked_about(store) == [harmful.id]
        store.clock.now += QUESTION_LEASE + 1
    store.clock.now = max(store.clock.now, other.due_at)
    assert await asked_about(store) == [other.id]  # at once: nobody looks again for a second
    held = await store.fax(harmful.id)
    assert (held.state, held.held_for) == (State.HELD, HeldFor.HARMFUL)


async def test_questions_without_an_answer_come_again_behind_the_others(store: TriedStore) -> None:
    """However many calls the carrier says nothing about, each of the others has its turn."""
    faxes: list[Fax] = []
    for place, number in enumerate(numbers(17)):
        await store.queued(number)
        faxes.append(await store.taken(await store.claimed(MANY), f"c{place}"))
        store.clock.now += 1
    store.clock.now += HOUR
    asked: list[str] = []
    for _ in range(5):
        for fax_id in await asked_about(store):
            await store.asked(fax_id)  # no answer
            asked.append(fax_id)
        store.clock.now += QUESTION_LEASE / 3  # so the first may be asked about before the last was
    assert asked[:17] == [fax.id for fax in faxes]


async def claimed(store: TriedStore) -> OutboxEntry:
    """Claim the one mail that is due."""
    (entry,) = await store.claim_notices(4)
    return entry


async def test_only_deaths_in_a_row_give_a_mail_up(store: TriedStore) -> None:
    """A mail that power cuts met on several days, and that was put off in order between, still goes out."""
    fax = await store.queued()
    await store.apply(fax.id, CancelAsked())
    for _ in range(HARMFUL_AFTER + 1):
        await claimed(store)
        store.clock.now += NOTICE_LEASE
        entry = await claimed(store)
        assert entry.alone
        assert await store.notice_deferred(entry.id, entry.fence, HOUR, "450 greylisted")
        store.clock.now += DAY
    entry = await claimed(store)
    assert not entry.alone
    assert await store.notice_sent(entry.id, entry.fence)
    assert (await store.show(fax.id)).replies == (("cancelled", "sent"),)
