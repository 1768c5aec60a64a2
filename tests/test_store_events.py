"""The carrier's events: before the answer, twice, in any order, or about a doubt; conflicting answers."""

import asyncio

import pytest
import stores
from faxes import DAY, FROM, HOUR, NOW, NUMBER
from stores import SETTINGS, TriedStore, events_of, newest, reported

from gateway.carrier import CarrierEvent
from gateway.records import (
    Absent,
    Doubted,
    End,
    Fax,
    HeldFor,
    HoldAsked,
    RetryAsked,
    Stage,
    State,
    Taken,
    Unprovable,
)
from gateway.store_events import Fate

store = stores.store

OTHER = "+442071234567"


async def doubtful(store: TriedStore, number: str = NUMBER) -> Fax:
    """Return a fax whose answer from the carrier is missing."""
    await store.queued(number)
    fax = await store.claimed()
    return await store.apply(fax.id, Doubted(newest(fax), "timeout"))


async def absent(store: TriedStore, number: str = NUMBER) -> Fax:
    """Return a fax whose doubt was closed: the carrier does not list it."""
    fax = await doubtful(store, number)
    return await store.apply(fax.id, Absent(newest(fax)))


async def alerts(store: TriedStore) -> set[str]:
    """Return the causes that the postmaster was told of."""
    return {entry.cause for entry in await store.claim_notices(99) if entry.cause is not None}


# --- in any order ------------------------------------------------------------------------------------


async def test_an_event_is_applied_to_its_call(store: TriedStore) -> None:
    """A webhook moves the fax that it is about, and is part of its history."""
    fax = await store.called()
    assert await store.remember_event(reported("c1", Stage.DELIVERED)) == (Fate.APPLIED, fax.id)
    assert (await store.fax(fax.id)).state is State.DELIVERED
    moments = (await store.show(fax.id)).moments
    assert [(moment.event, moment.state) for moment in moments] == [
        ("Begun", "submitting"), ("Taken", "sending"), ("Reported", "delivered"),
    ]  # fmt: skip
    assert await store.mail_out() == [f"{fax.id}.delivered"]


async def test_an_event_before_the_answer_waits_for_it(store: TriedStore) -> None:
    """A webhook that overtakes the answer to our POST is kept, and happens together with the answer."""
    await store.queued()
    fax = await store.claimed()
    for stage in (Stage.DIALLED, Stage.DELIVERED):
        assert await store.remember_event(reported("c1", stage)) == (Fate.PARKED, None)
    assert (await store.count()).parked == 2
    assert (await store.fax(fax.id)).state is State.SUBMITTING
    store.news.clear()
    assert (await store.taken(fax, "c1")).state is State.DELIVERED
    assert events_of(store.changes) == ["Taken", "Reported", "Reported"]
    assert (await store.count()).parked == 0
    await store.taken(fax, "c1")  # said twice, it does not happen twice
    assert events_of(store.changes) == ["Taken", "Reported", "Reported"]
    assert await store.mail_out() == [f"{fax.id}.delivered"]


async def test_an_event_that_comes_twice_happens_once(store: TriedStore) -> None:
    """The carrier repeats what we did not answer in time; the second time changes nothing."""
    fax = await store.called()
    event = reported("c1", Stage.FAILED, reason="user_busy")
    assert await store.webhook(event) is Fate.APPLIED
    before = await store.show(fax.id)
    assert await store.remember_event(event) == (Fate.DUPLICATE, None)
    assert await store.show(fax.id) == before
    parked = reported("c7", Stage.DIALLED)
    assert [await store.webhook(parked), await store.webhook(parked)] == [Fate.PARKED, Fate.DUPLICATE]


@pytest.mark.parametrize("event_first", [False, True])
async def test_answer_and_event_at_once_find_each_other(
    store: TriedStore,
    event_first: bool,  # noqa: FBT001 -- a parameter
) -> None:
    """Whichever comes first, neither is missed."""
    await store.queued()
    fax = await store.claimed()
    both = [store.taken(fax, "c1"), store.webhook(reported("c1", Stage.DELIVERED))]
    await asyncio.gather(*(both[::-1] if event_first else both))
    assert (await store.fax(fax.id)).state is State.DELIVERED


async def test_an_old_event_changes_nothing(store: TriedStore) -> None:
    """A late "dialled" after the failure does not bring the call back, and cannot touch the retry."""
    await store.called()
    await store.webhook(reported("c1", Stage.FAILED, reason="user_busy"))
    store.clock.now += HOUR
    fax = await store.taken(await store.claimed(), "c2")
    await store.webhook(reported("c1", Stage.DIALLED))
    after = await store.fax(fax.id)
    assert after == fax
    assert (await store.show(fax.id)).moments[-1].event == "Reported", "it is kept all the same"


async def test_an_unknown_kind_of_event_leads_to_a_question(store: TriedStore) -> None:
    """What we cannot read is a hint that something happened: the carrier is asked now."""
    fax = await store.called()
    assert await store.claim_questions(9) == []
    assert await store.remember_event(reported("c1", None)) == (Fate.APPLIED, fax.id)
    assert [asked.id for asked in await store.claim_questions(9)] == [fax.id]
    await store.webhook(reported("c1", None, id="again"))
    assert len(await store.claim_questions(9)) == 1, "also while somebody is asking"


async def test_an_unknown_kind_of_event_waits_for_the_answer_too(store: TriedStore) -> None:
    """Before the answer it is parked, and goes with the answer without harm."""
    await store.queued()
    fax = await store.claimed()
    assert await store.webhook(reported("c1", None)) is Fate.PARKED
    assert (await store.taken(fax, "c1")).state is State.SENDING
    assert (await store.count()).parked == 0


async def test_the_history_names_nobody(store: TriedStore) -> None:
    """What is kept of a call for a year holds no number but the fax's own."""
    fax = await store.called()
    await store.webhook(reported("c1", Stage.FAILED, reason="user_busy"))
    assert await store.rows("SELECT detail FROM history WHERE detail LIKE '%+%'") == []
    details = [moment.detail for moment in (await store.show(fax.id)).moments]
    assert details[1]["carrier_id"] == "c1"
    assert details[2]["report"] == {"stage": 6, "asked": False, "pages": None, "duration": None,
                                    "reason": "user_busy", "internal_reason": None}  # fmt: skip


# --- about a doubt -----------------------------------------------------------------------------------


async def test_a_doubt_is_looked_at_when_an_event_fits(store: TriedStore) -> None:
    """A webhook about the number in doubt brings the next check forward, whoever is checking now."""
    fax = await doubtful(store)
    store.clock.now = fax.due_at
    (asked,) = await store.claim_questions(9)
    assert await store.webhook(reported("c1", Stage.DIALLED)) is Fate.PARKED
    (again,) = await store.claim_questions(9)
    assert again.id == asked.id
    stale = await store.apply(fax.id, Absent(newest(fax)), version=asked.version)
    assert stale.state is State.IN_DOUBT, "a verdict without the event is void"
    (told,) = (await store.evidence(NUMBER, FROM)).told
    assert told.carrier_id == "c1"


async def test_a_doubt_left_to_a_person_is_opened_again(store: TriedStore) -> None:
    """An event that fits a fax held for doubt is better than a guess: the carrier is asked anew."""
    fax = await doubtful(store)
    held = await store.apply(fax.id, Unprovable(newest(fax), "the carrier's list did not answer"))
    assert held.held_for is HeldFor.DOUBT
    store.clock.now += HOUR
    await store.webhook(reported("c1", Stage.DELIVERED, at=NOW + HOUR))
    assert [asked.state for asked in await store.claim_questions(9)] == [State.IN_DOUBT]
    assert (await store.apply(fax.id, Taken(newest(fax), "c1"))).state is State.DELIVERED


@pytest.mark.parametrize("overruled", [False, True])
async def test_a_late_event_binds_to_a_closed_doubt(
    store: TriedStore,
    overruled: bool,  # noqa: FBT001 -- a parameter
) -> None:
    """A fax thought absent that turns up is not called again: its outcome counts."""
    fax = await (doubtful(store) if overruled else absent(store))
    if overruled:
        await store.apply(fax.id, RetryAsked(even_if_twice=True))
    assert await store.remember_event(reported("c1", Stage.DIALLED)) == (Fate.APPLIED, fax.id)
    after = await store.fax(fax.id)
    assert after.state is State.SENDING
    assert [attempt.carrier_id for attempt in after.attempts] == ["c1"]
    assert await store.claim_call(SETTINGS) is None
    await store.webhook(reported("c1", Stage.DELIVERED))
    assert (await store.fax(fax.id)).state is State.DELIVERED


async def test_a_late_event_after_the_retry_began_alarms(store: TriedStore) -> None:
    """When the retry is under way already, the postmaster hears that the fax may arrive twice."""
    await absent(store)
    retry = await store.claimed()
    assert await store.webhook(reported("c1", Stage.DIALLED)) is Fate.PARKED  # it may be the retry's own
    await store.taken(retry, "c2")
    assert await store.sweep_parked() == 1
    after = await store.fax(retry.id)
    assert [attempt.carrier_id for attempt in after.attempts] == ["c1", "c2"]
    assert await alerts(store) == {"contradiction"}
    assert await store.sweep_parked() == 0


async def test_what_fits_two_doubts_stays_parked(store: TriedStore) -> None:
    """An event that may be about either of two faxes binds to neither."""
    first = await absent(store)
    await store.apply(first.id, HoldAsked())
    second = await absent(store)
    assert first.id != second.id
    assert await store.webhook(reported("c1", Stage.DIALLED)) is Fate.PARKED
    assert await store.sweep_parked() == 0
    faxes = [await store.fax(fax.id) for fax in (first, second)]
    assert [fax.attempts[0].end for fax in faxes] == [End.ABSENT] * 2
    assert (await store.count()).parked == 1


async def test_of_two_doubts_of_one_fax_the_later_is_bound(store: TriedStore) -> None:
    """Where an event fits two attempts of the same fax, what matters is that there is no third."""
    fax = await absent(store)
    again = await store.claimed()
    for event in (Doubted(newest(again), "timeout"), Absent(newest(again))):
        await store.apply(fax.id, event)
    assert await store.webhook(reported("c1", Stage.DIALLED)) is Fate.APPLIED
    after = await store.fax(fax.id)
    assert after.state is State.SENDING
    assert [attempt.carrier_id for attempt in after.attempts] == [None, "c1"]


@pytest.mark.parametrize(
    "event",
    [
        reported("c1", Stage.DIALLED, at=NOW - 2 * HOUR),
        reported("c1", Stage.DIALLED, connection_id="another"),
        reported("c1", Stage.DIALLED, number=OTHER),
    ],
    ids=["earlier", "another application", "another number"],
)
async def test_what_cannot_be_ours_binds_to_nothing(store: TriedStore, event: CarrierEvent) -> None:
    """A fax of somebody else's on the same account is not taken for ours."""
    fax = await absent(store)
    assert await store.webhook(event) is Fate.PARKED
    assert (await store.fax(fax.id)).state is State.QUEUED


async def test_the_sweep_finds_what_became_clear(store: TriedStore) -> None:
    """What was parked for another doubt binds once only one is left; after a day nobody looks any more."""
    first = await absent(store)
    await store.apply(first.id, HoldAsked())
    second = await absent(store)
    await store.webhook(reported("c1", Stage.DIALLED))
    store.clock.now += DAY
    await store.change("DELETE FROM history WHERE fax_id = :fax", fax=first.id)
    await store.change("DELETE FROM attempts WHERE fax_id = :fax", fax=first.id)
    assert await store.sweep_parked() == 0
    store.clock.now -= 1
    assert await store.sweep_parked() == 1
    assert (await store.fax(second.id)).state is State.SENDING


# --- answers that conflict ---------------------------------------------------------------------------


async def test_two_ids_for_one_call_alarm(store: TriedStore) -> None:
    """An attempt that the carrier took under two ids keeps the first, and a person is told."""
    fax = await store.called("c1")
    after = await store.taken(fax, "c2")
    assert after.last is not None
    assert after.last.carrier_id == "c1"
    assert await alerts(store) == {"contradiction"}
    assert "c2" in str((await store.show(fax.id)).moments[-1].detail)


async def test_one_id_for_two_calls_is_for_a_person(store: TriedStore) -> None:
    """When the carrier answers with an id that another fax was bound to, nothing is called again."""
    first = await store.called("c1")
    await store.queued(OTHER)
    second = await store.claimed()
    after = await store.taken(second, "c1")
    assert (after.state, after.held_for) == (State.HELD, HeldFor.DOUBT)
    assert after.held_detail == f"the carrier's fax c1 belongs to {first.id}"
    assert await store.fax(first.id) == first
    assert await alerts(store) == {"fax_held"}


async def test_a_contradiction_after_the_end_is_told(store: TriedStore) -> None:
    """A fax reported failed and then delivered stays as the sender was told, and the postmaster hears."""
    fax = await store.called()
    await store.webhook(reported("c1", Stage.FAILED, reason="destination_invalid"))
    await store.webhook(reported("c1", Stage.DELIVERED))
    assert (await store.fax(fax.id)).state is State.FAILED
    assert "contradiction" in await alerts(store)


async def test_an_event_of_an_open_call_ends_no_other_fax_that_was_in_doubt(store: TriedStore) -> None:
    """With our clock an hour and a half ahead, another fax's delivery does not become this one's."""
    lost = await store.queued(sender="a@example.com")
    fax = await store.claimed()
    await store.apply(fax.id, Doubted(newest(fax), "timeout"))
    await store.apply(fax.id, Absent(newest(fax)))
    await store.apply(fax.id, HoldAsked())
    store.clock.now += 2 * HOUR
    await store.queued(sender="b@example.com")
    calling = await store.claimed()
    assert calling.id != lost.id
    await store.webhook(reported("c2", Stage.DELIVERED, at=store.clock.now - 1.5 * HOUR))
    assert (await store.fax(lost.id)).state is State.HELD
