"""What a restored database may not know: the brake that stands meanwhile, and who is set aside."""

from dataclasses import replace

import pytest
import stores
from faxes import APPLICATION, DAY, FROM, HOUR, NUMBER, STUCK
from stores import TriedStore, newest, numbers, reported

from gateway.doubt import Sighting
from gateway.fax_steps import Misfit
from gateway.records import Doubted, Fax, HeldFor, HoldAsked, Report, Reported, RetryAsked, Stage, State
from gateway.store_brakes import StillRestoring
from gateway.store_restore import Restoring

store = stores.store

BRAKES = {("restore", "account"), ("operator", "account")}
DETAIL = "the carrier has a fax to the number that the backup does not know: "


def sent(carrier_id: str, number: str = NUMBER, at: float = 0.0) -> Sighting:
    """Make a row of the carrier's list."""
    return Sighting(carrier_id, number, FROM, APPLICATION, at)


async def restored(store: TriedStore, *rows: Sighting) -> int:
    """Begin and end a restore, as a start with --held does with the carrier's list."""
    await store.begin_restore()
    begun = await store.restoring()
    assert begun is not None
    return await store.end_restore(
        [*rows, *(() if begun.control is None else (sent(begun.control),))], begun.control
    )


def fate(fax: Fax) -> tuple[State, HeldFor | None]:
    """Return what became of a fax."""
    return fax.state, fax.held_for


# --- the brake -------------------------------------------------------------------------------------


async def test_nothing_is_called_before_the_carrier_has_told(store: TriedStore) -> None:
    """Until the carrier's list is known nothing is called, `release --all` or a restart notwithstanding."""
    await store.queued()
    await store.begin_restore()
    assert await store.brakes() == BRAKES
    with pytest.raises(StillRestoring, match="what was sent since the backup"):
        await store.release_all()
    assert await store.take_over(FROM) == 0
    assert await store.brakes() == BRAKES, "the operator has not yet seen what is held"
    store.clock.now += 100 * HOUR
    assert await store.claim_call(stores.SETTINGS) is None
    assert await store.restoring() is not None


async def test_afterwards_an_operator_says_when_to_go_on(store: TriedStore) -> None:
    """With the carrier's list known the queue still waits for `release --all`, and then goes on."""
    await store.queued()
    assert await restored(store) == 0
    assert await store.restoring() is None
    assert await store.claim_call(stores.SETTINGS) is None
    await store.release_all()
    await store.claimed()


async def test_a_call_that_goes_through_does_not_end_the_restore(store: TriedStore) -> None:
    """What an old call comes to proves nothing about what the backup does not know."""
    fax = await store.called()
    await store.begin_restore()
    await store.apply(fax.id, Reported(newest(fax), Report(Stage.DELIVERED, asked=True)))
    assert await store.brakes() == BRAKES


async def test_the_carrier_is_asked_from_the_last_known_moment_on(store: TriedStore) -> None:
    """The list begins where the backup ends: at its last mail or change, whenever it is restored."""
    fax = await store.queued()
    store.clock.now += HOUR
    await store.apply(fax.id, HoldAsked())
    last = store.clock.now
    store.clock.now += 30 * HOUR
    await store.begin_restore()
    assert await store.restoring() == Restoring(last, store.clock.now, (), None)


async def test_an_empty_database_is_restored_as_of_now(store: TriedStore) -> None:
    """A backup that never saw a mail has nothing to ask about before the start."""
    await store.begin_restore()
    assert await store.restoring() == Restoring(store.clock.now, store.clock.now, (), None)


async def test_no_restore_is_under_way_by_itself(store: TriedStore) -> None:
    """An ordinary start asks for no restore."""
    assert await store.restoring() is None


# --- who is set aside ------------------------------------------------------------------------------


async def test_a_fax_that_may_have_been_sent_is_held(store: TriedStore) -> None:
    """A waiting fax to whose number the carrier has one that nobody knows is held and names it."""
    fax, other = await store.queued(), await store.queued("+13125550199")
    assert await restored(store, sent("c-new")) == 1
    held = await store.fax(fax.id)
    assert fate(held) == (State.HELD, HeldFor.RESTORED)
    assert held.held_detail == DETAIL + "c-new"
    assert fate(await store.fax(other.id)) == (State.QUEUED, None)
    letter, alert = sorted(await store.mail_out())
    assert letter == f"{fax.id}.delayed"
    assert alert.startswith("alert.fax_held.")


async def test_a_fax_that_an_operator_held_may_have_been_sent_too(store: TriedStore) -> None:
    """Somebody may have released it after the backup: it is held for the stronger cause."""
    fax = await store.queued()
    await store.apply(fax.id, HoldAsked())
    assert await restored(store, sent("c-new")) == 1
    assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.RESTORED)


async def test_what_the_backup_knows_holds_nobody(store: TriedStore) -> None:
    """A fax to the same number that the database has itself tells nothing about the waiting one."""
    known = await store.called("c-known")
    waiting = await store.queued()
    assert await restored(store, sent("c-known")) == 0
    assert (await store.fax(waiting.id)).state is State.QUEUED
    assert (await store.fax(known.id)).state is State.SENDING


async def test_an_open_call_may_have_been_followed_by_another(store: TriedStore) -> None:
    """A fax whose call was open at the backup is asked about, and not called again if that call failed."""
    fax = await store.called("c-known")
    assert await restored(store, sent("c-known"), sent("c-new")) == 1
    await store.release_all()
    store.clock.now += HOUR
    assert [asked.id for asked in await store.claim_questions(1)] == [fax.id]
    await store.apply(fax.id, Reported(newest(fax), Report(Stage.FAILED, asked=True, reason="user_busy")))
    assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.RESTORED)
    store.clock.now += HOUR
    assert await store.claim_questions(1) == []
    assert await store.claim_call(stores.SETTINGS) is None


async def test_a_call_that_was_stuck_at_the_backup_may_have_been_followed_by_another(
    store: TriedStore,
) -> None:
    """A fax held for a call that never ended is not called again when it turns out that the call failed."""
    fax = await store.called("c-known")
    store.clock.now += STUCK + 1
    await store.pass_time()
    assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.STUCK)
    assert await restored(store, sent("c-known"), sent("c-new")) == 1
    await store.release_all()
    store.clock.now += HOUR
    await store.apply(fax.id, Reported(newest(fax), Report(Stage.FAILED, asked=True, reason="user_busy")))
    store.clock.now += HOUR
    assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.RESTORED)
    assert await store.claim_call(stores.SETTINGS) is None


async def test_an_open_call_that_was_delivered_needs_nobody(store: TriedStore) -> None:
    """The other fax to the number was none of this one's if its own call arrived."""
    fax = await store.called("c-known")
    await restored(store, sent("c-known"), sent("c-new"))
    await store.ended(fax.id, Reported(newest(fax), Report(Stage.DELIVERED, asked=True)))
    assert (await store.fax(fax.id)).state is State.DELIVERED


async def test_a_doubt_is_not_decided_by_a_later_fax(store: TriedStore) -> None:
    """A fax to the number may be what became of the doubt, or another mail's: a person looks."""
    await store.queued()
    fax = await store.claimed()
    await store.apply(fax.id, Doubted(newest(fax), "the gateway stopped"))
    assert await restored(store, sent("c-new")) == 1
    assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.RESTORED)
    store.clock.now += HOUR
    assert await store.claim_questions(1) == []


async def test_a_call_about_to_be_placed_at_the_backup_may_have_been_placed(store: TriedStore) -> None:
    """A fax that was being handed over when the backup was made is held like those that waited."""
    await store.queued()
    fax = await store.claimed()
    store.clock.now += 10 * HOUR
    await store.begin_restore()
    await store.take_over(FROM)
    assert await store.end_restore([sent("c-new", at=store.clock.now - HOUR)], None) == 1
    await store.pass_time()
    assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.RESTORED)


async def test_a_carrier_that_does_not_answer_leaves_every_fax_to_a_person(store: TriedStore) -> None:
    """If nobody can say what was sent since the backup, all that has not ended is held, whatever it was."""
    waiting, called = await store.queued(), await store.called("c-known", "+13125550199")
    over = await store.called("c-over", "+13125550177")
    await store.ended(over.id, Reported(newest(over), Report(Stage.DELIVERED, asked=True)))
    await store.begin_restore()
    assert await store.end_restore(None, "c-over") == 2
    for fax in (waiting, called):
        held = await store.fax(fax.id)
        assert fate(held) == (State.HELD, HeldFor.RESTORED)
        assert held.held_detail == "the carrier did not answer"
    assert (await store.fax(over.id)).state is State.DELIVERED
    assert await store.restoring() is None


async def test_a_fax_set_aside_is_called_again_by_force_only(store: TriedStore) -> None:
    """An operator who says `retry` is told that the fax may have been sent, and must say --even-if-twice."""
    fax = await store.queued()
    await restored(store, sent("c-new"))
    await store.release_all()
    with pytest.raises(Misfit, match="--even-if-twice"):
        await store.apply(fax.id, RetryAsked())
    assert await store.claim_call(stores.SETTINGS) is None
    await store.apply(fax.id, RetryAsked(even_if_twice=True))
    assert (await store.claimed()).id == fax.id


async def test_a_list_without_what_the_backup_knows_proves_nothing(store: TriedStore) -> None:
    """If the carrier does not show even the newest fax of the backup, every fax is left to a person."""
    known, waiting = await store.called("c-known", "+13125550199"), await store.queued()
    await store.begin_restore()
    asked = await store.restoring()
    assert asked is not None
    assert (asked.control, asked.senders) == ("c-known", (FROM,))
    assert await store.end_restore([], asked.control) == 2
    for fax in (known, waiting):
        assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.RESTORED)


async def test_an_uncertain_fax_waits_for_its_person(store: TriedStore) -> None:
    """Nobody is told that a fax failed which may have been delivered before the restore."""
    fax = await store.queued()
    assert await restored(store, sent("c-new")) == 1
    store.clock.now += 365 * DAY
    await store.pass_time()
    assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.RESTORED)


async def test_faxes_of_an_earlier_number_are_asked_about_too(store: TriedStore) -> None:
    """The carrier is asked about every number that faxes went out from, and from the newest known one on."""
    fax = await store.called("c-known")
    started = newest(fax)
    store.clock.now += HOUR
    await store.queued("+13125550199")
    await store.begin_restore()
    asked = await store.restoring()
    assert asked is not None
    assert asked.senders == (FROM,)
    assert asked.since == (await store.fax(fax.id)).attempt(started).started_at


async def test_more_numbers_than_one_statement_takes(store: TriedStore) -> None:
    """However many faxes went out since the backup, each is found."""
    many = numbers(1200)
    await store.mail_in(*many)
    rows = [sent(f"c{place}", number) for place, number in enumerate(many)]
    assert await restored(store, *rows) == 1200
    assert await store.rows("SELECT DISTINCT state, held_for FROM faxes") == [("held", "restored")]


async def test_the_last_ended_fax_stays_ended(store: TriedStore) -> None:
    """What had ended before the backup is nothing to hold."""
    fax = await store.called("c-known")
    await store.ended(fax.id, Reported(newest(fax), Report(Stage.DELIVERED, asked=True)))
    assert await restored(store, sent("c-new")) == 0
    assert (await store.fax(fax.id)).state is State.DELIVERED


# --- the time that nobody knows of -------------------------------------------------------------------


async def test_a_fax_whose_time_ran_out_meanwhile_does_not_fail_for_that(store: TriedStore) -> None:
    """What may have been delivered after the backup is left to a person, not reported as failed at once."""
    fax = await store.queued()
    store.clock.now += 12 * HOUR
    await store.queued("+13125550177")  # the last that the backup knows
    store.clock.now += 13 * HOUR
    assert await restored(store, sent("c-new")) == 1
    await store.pass_time()
    assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.RESTORED)


async def test_no_fax_fails_before_the_carrier_has_told(store: TriedStore) -> None:
    """While the carrier is asked what was sent, however long that takes, no fax ends for want of time."""
    fax = await store.queued()
    store.clock.now += 25 * HOUR
    await store.begin_restore()
    await store.pass_time()
    store.clock.now += 25 * HOUR
    await store.pass_time()
    assert (await store.fax(fax.id)).state is State.QUEUED


# --- once more -------------------------------------------------------------------------------------


async def test_a_second_start_with_the_option_changes_nothing(store: TriedStore) -> None:
    """Whoever says --held twice in a row still asks from the backup's end on, and holds nothing twice."""
    fax = await store.queued()
    await store.begin_restore()
    first = await store.restoring()
    assert first is not None
    store.clock.now += HOUR
    await store.begin_restore()
    assert await store.restoring() == replace(first, now=store.clock.now)
    assert await store.end_restore([sent("c-new")], None) == 1
    changes = len(store.changes)
    assert await restored(store, sent("c-new")) == 1
    assert len(store.changes) == changes
    assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.RESTORED)
    assert [entry for entry in await store.mail_out() if entry.endswith("delayed")] == [f"{fax.id}.delayed"]


async def test_a_list_that_comes_after_the_end_holds_nobody(store: TriedStore) -> None:
    """Of two gateways that ask the carrier, the slower one does not set aside what was sent meanwhile."""
    await restored(store)
    await store.release_all()
    called, waiting = await store.queued(), await store.queued()
    assert (await store.claimed()).id == called.id
    assert await store.end_restore([sent("c-of-the-called", at=store.clock.now)], None) == 0
    assert await store.end_restore(None, None) == 0
    assert [(await store.fax(fax.id)).state for fax in (called, waiting)] == [State.SUBMITTING, State.QUEUED]


@pytest.mark.parametrize("told", [Stage.DELIVERED, Stage.FAILED])
async def test_events_of_unknown_faxes_hold_nobody_up(store: TriedStore, told: Stage) -> None:
    """Webhooks about what the backup does not know are kept, and do not move a fax set aside."""
    fax = await store.queued()
    await restored(store, sent("c-new"))
    await store.webhook(reported("c-new", told))
    assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.RESTORED)
