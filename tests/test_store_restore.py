"""What a restored database may not know: the brake that stands meanwhile, and who is set aside."""

import pytest
import stores
from faxes import APPLICATION, FROM, HOUR, NUMBER
from stores import TriedStore, newest, numbers, reported

from gateway.doubt import Sighting
from gateway.records import Doubted, Fax, HeldFor, HoldAsked, Report, Reported, Stage, State
from gateway.store_brakes import Restoring

store = stores.store

BRAKES = {("restore", "account"), ("operator", "account")}
DETAIL = "the carrier has a fax to the number that the backup does not know: "


def sent(carrier_id: str, number: str = NUMBER, at: float = 0.0) -> Sighting:
    """Make a row of the carrier's list."""
    return Sighting(carrier_id, number, FROM, APPLICATION, at)


async def restored(store: TriedStore, *rows: Sighting) -> int:
    """Begin and end a restore, as a start with --held does with the carrier's list."""
    await store.begin_restore()
    return await store.end_restore(rows)


def fate(fax: Fax) -> tuple[State, HeldFor | None]:
    """Return what became of a fax."""
    return fax.state, fax.held_for


# --- the brake -------------------------------------------------------------------------------------


async def test_nothing_is_called_before_the_carrier_has_told(store: TriedStore) -> None:
    """Until the carrier's list is known nothing is called, `release --all` or a restart notwithstanding."""
    await store.queued()
    await store.begin_restore()
    assert await store.brakes() == BRAKES
    with pytest.raises(Restoring, match="what was sent since the backup"):
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
    assert await store.restoring() == (last, store.clock.now)


async def test_an_empty_database_is_restored_as_of_now(store: TriedStore) -> None:
    """A backup that never saw a mail has nothing to ask about before the start."""
    await store.begin_restore()
    assert await store.restoring() == (store.clock.now, store.clock.now)


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


# --- once more -------------------------------------------------------------------------------------


async def test_a_second_start_with_the_option_changes_nothing(store: TriedStore) -> None:
    """Whoever says --held twice in a row still asks from the backup's end on, and holds nothing twice."""
    fax = await store.queued()
    await store.begin_restore()
    since = await store.restoring()
    store.clock.now += HOUR
    await store.begin_restore()
    assert await store.restoring() == (since[0], store.clock.now) if since else False
    assert await store.end_restore([sent("c-new")]) == 1
    changes = len(store.changes)
    assert await restored(store, sent("c-new")) == 1
    assert len(store.changes) == changes
    assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.RESTORED)
    assert [entry for entry in await store.mail_out() if entry.endswith("delayed")] == [f"{fax.id}.delayed"]


@pytest.mark.parametrize("told", [Stage.DELIVERED, Stage.FAILED])
async def test_events_of_unknown_faxes_hold_nobody_up(store: TriedStore, told: Stage) -> None:
    """Webhooks about what the backup does not know are kept, and do not move a fax set aside."""
    fax = await store.queued()
    await restored(store, sent("c-new"))
    await store.webhook(reported("c-new", told))
    assert fate(await store.fax(fax.id)) == (State.HELD, HeldFor.RESTORED)
