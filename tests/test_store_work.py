"""What is due and who does it: claims, leases, questions to the carrier, the passing of time."""

import asyncio
from dataclasses import replace

import pytest
import sqlalchemy as sa
import stores
from faxes import DAY, FROM, HOUR, NOW, NUMBER, PAGES, RULES, STUCK, Maker
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import LEASE, POSTMASTER, SETTINGS, TriedStore, events_of, newest, numbers, reported

from gateway import store_intake, store_work
from gateway.database import Conflict, StoreUnavailable
from gateway.records import (
    Absent,
    Alert,
    Blame,
    Doubted,
    End,
    HeldFor,
    HoldAsked,
    NotTaken,
    ReceivedMail,
    Rejected,
    ReleaseAsked,
    Stage,
    State,
    TimePassed,
    Unanswered,
    Unprovable,
    Withdrawn,
)
from gateway.schema import metadata
from gateway.store_apply import UnknownFax, _save
from gateway.store_intake import Paper, Submission
from gateway.store_unit import Unit
from gateway.store_work import QUESTION_LEASE

store = stores.store
sqlite_store = stores.sqlite_store
postgresql_store = stores.postgresql_store

OTHER = "+442071234567"
MANY = replace(SETTINGS, channels=1000)


# --- claims ------------------------------------------------------------------------------------------


async def test_a_claim_writes_the_intent_first(store: TriedStore) -> None:
    """Before anybody calls, the database says who calls whom, with what, and until when."""
    assert await store.claim_call(SETTINGS) is None
    queued = await store.queued()
    fax = await store.claimed()
    assert await store.fax(queued.id) == fax
    assert (fax.state, fax.due_at, fax.version) == (State.SUBMITTING, NOW + LEASE, queued.version + 1)
    (attempt,) = fax.attempts
    assert (attempt.ordinal, attempt.started_at, attempt.lease_until) == (1, NOW, NOW + LEASE)
    assert (attempt.from_number, attempt.connection_id) == (SETTINGS.from_number, SETTINGS.connection_id)
    assert (attempt.quality, attempt.t38, attempt.slot) == ("high", True, 0)
    assert attempt.blocking
    assert attempt.open
    assert await store.claim_call(SETTINGS) is None


async def test_one_call_per_number(store: TriedStore) -> None:
    """A second fax to a number waits until the first has ended; another number does not wait."""
    first, second = await store.queued(), await store.queued()
    other = await store.queued(OTHER)
    await store.taken(await store.claimed(MANY), "c1")
    assert (await store.claimed(MANY)).id == other.id
    assert await store.claim_call(MANY) is None
    await store.webhook(reported("c1", Stage.DELIVERED))
    assert (await store.fax(first.id)).state is State.DELIVERED
    assert (await store.claimed(MANY)).id == second.id


async def test_no_more_calls_than_channels(store: TriedStore) -> None:
    """With two channels two calls are open at a time; each end lets the next one go."""
    await store.mail_in(*numbers(4))
    await store.taken(await store.claimed(), "c1")
    second = await store.claimed()
    assert await store.claim_call(SETTINGS) is None
    await store.webhook(reported("c1", Stage.DELIVERED, number=numbers(1)[0]))
    third = await store.claimed()
    assert second.last is not None
    assert third.last is not None
    assert (second.last.slot, third.last.slot) == (1, 0)
    assert await store.claim_call(SETTINGS) is None


async def test_the_database_itself_holds_both_rules(store: TriedStore) -> None:
    """Even a gateway with a fault cannot have two open calls to a number, or two on a channel."""
    await store.mail_in(*numbers(2))
    first, second = await store.claimed(), await store.claimed()
    for column, rule in (("number", "uq_attempts_calling"), ("slot", "uq_attempts_channel")):
        with pytest.raises(StoreUnavailable, match=rf"UNIQUE .*: attempts.{column}$|unique .* \"{rule}\"$"):
            await store.change(
                f"UPDATE attempts SET {column} = (SELECT {column} FROM attempts WHERE fax_id = :one) "  # noqa: S608 -- ours
                "WHERE fax_id = :two",
                one=first.id, two=second.id,
            )  # fmt: skip


async def test_what_is_not_due_is_not_called(store: TriedStore) -> None:
    """A fax that waits for its retry lets others go first, and is called when its time has come."""
    fax = await store.called()
    await store.webhook(reported("c1", Stage.FAILED, reason="user_busy"))
    due_at = (await store.fax(fax.id)).due_at
    assert due_at == NOW + 180.0
    store.clock.now = due_at - 1
    assert await store.claim_call(SETTINGS) is None
    store.clock.now = due_at
    again = await store.claimed()
    assert [attempt.ordinal for attempt in again.attempts] == [1, 2]


async def test_the_next_call_is_placed_otherwise_after_a_protocol_failure(store: TriedStore) -> None:
    """What the carrier's help centre advises is done: T.38 is turned over."""
    await store.called()
    await store.webhook(reported("c1", Stage.FAILED, reason="invalid_ecm_response_from_receiver"))
    store.clock.now += DAY / 2
    again = await store.claimed()
    assert [attempt.t38 for attempt in again.attempts] == [True, False]


async def test_hundreds_of_claims_at_once_get_hundreds_of_channels(store: TriedStore) -> None:
    """However many ask at once, nobody shares a fax, a number or a channel."""
    most = 500 if store.database.alone else 100  # on a server each claim is a transaction of its own
    await store.mail_in(*numbers(most))
    faxes = await asyncio.gather(*(store.claim_call(MANY) for _ in range(most + 1)))
    claimed = [fax for fax in faxes if fax is not None]
    assert len({fax.id for fax in claimed}) == most
    assert {fax.last.slot for fax in claimed if fax.last is not None} == set(range(most))


async def test_a_fax_with_an_open_call_is_passed_over(store: TriedStore) -> None:
    """Should a fax ever wait with a call whose end nobody knows, it is not called, and blocks nobody."""
    await store.called()
    await store.webhook(reported("c1", Stage.FAILED, reason="user_busy"))
    await store.change("UPDATE attempts SET open = true")
    other = await store.queued(OTHER)
    store.clock.now += HOUR
    assert (await store.claimed()).id == other.id
    assert await store.claim_call(SETTINGS) is None


async def test_senders_take_turns(store: TriedStore) -> None:
    """A hundred faxes of one sender do not make another sender wait for a hundred calls."""
    await store.mail_in(*numbers(100), sender="many@example.com")
    for _ in range(3):
        await store.claimed(MANY)
    late = await store.queued(OTHER, sender="one@example.com")
    assert late.id in {(await store.claimed(MANY)).id for _ in range(2)}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.none(), st.tuples(st.sampled_from("abc"), st.integers(1, 4))), max_size=40))
def test_nobody_is_passed_over_for_long(steps: list[tuple[str, int] | None]) -> None:
    """In whatever order mails come and calls begin: between two calls of one who waits, another has two."""
    engine = sa.create_engine("sqlite://")
    metadata.create_all(engine)
    waiting = dict.fromkeys("abc", 0)
    others = {
        sender: dict.fromkeys("abc", 0) for sender in "abc"
    }  # calls since one's own last, or since one waits
    with engine.begin() as connection:
        unit = Unit(connection, NOW, RULES, POSTMASTER)
        for place, step in enumerate([*steps, *[None] * 161]):  # at last, everybody is called
            if step is not None:
                sender, count = step
                mail = ReceivedMail(id="", sender=sender, received_at=NOW)
                called = tuple((f"+1{place:03}{n}", sender) for n in range(count))
                paper = Paper(f"d{place}", "", PAGES, 1, b"%")
                store_intake.accept(unit, Submission(mail, "", called, paper), 0.0)
                if not waiting[sender]:
                    others[sender] = dict.fromkeys("abc", 0)
                waiting[sender] += count
            elif (fax := store_work.claim_call(unit, MANY)) is not None:
                sender = fax.recipient
                waiting[sender] -= 1
                others[sender] = dict.fromkeys("abc", 0)
                for other in set("abc") - {sender}:
                    others[other][sender] += 1
                    assert not waiting[other] or others[other][sender] <= 2
    assert not any(waiting.values())
    engine.dispose()


# --- leases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        lambda fax: Rejected(newest(fax), Blame.FAX, "HTTP 422", "number_refused"),
        lambda fax: NotTaken(newest(fax), "HTTP 429"),
        lambda fax: Withdrawn(newest(fax), "an earlier attempt", 0.0),
    ],
    ids=["rejected", "not taken", "withdrawn"],
)
async def test_an_answer_past_the_lease_is_a_doubt(store: TriedStore, answer: Maker) -> None:
    """A gateway that slept through its lease cannot say any more what became of the call."""
    await store.queued()
    fax = await store.claimed()
    store.clock.now += LEASE + 1
    after = await store.apply(fax.id, answer(fax))
    assert after.state is State.IN_DOUBT
    assert after.last is not None
    assert after.last.open
    assert events_of(store.changes) == ["Doubted"]
    assert await store.brakes() == set()


async def test_a_carrier_id_past_the_lease_still_counts(store: TriedStore) -> None:
    """The carrier's id is our only proof: it is kept however late, and ends the doubt."""
    await store.queued()
    fax = await store.claimed()
    store.clock.now += LEASE + 1
    assert await store.pass_time() == 1
    assert (await store.fax(fax.id)).state is State.IN_DOUBT
    taken = await store.taken(fax, "c1")
    assert taken.state is State.SENDING
    assert taken.last is not None
    assert taken.last.carrier_id == "c1"


async def test_a_lapsed_claim_is_a_doubt_never_a_retry(store: TriedStore) -> None:
    """When a gateway dies in mid-call, the carrier is asked before anything else happens."""
    await store.queued()
    fax = await store.claimed()
    store.clock.now += LEASE - 1
    assert await store.pass_time() == 0
    store.clock.now += 1
    assert await store.pass_time() == 1
    assert (await store.fax(fax.id)).state is State.IN_DOUBT
    assert await store.claim_call(SETTINGS) is None
    store.clock.now += LEASE
    assert [fax.id for fax in await store.claim_questions(9)] == [fax.id]


async def test_a_restart_doubts_what_was_being_sent(sqlite_store: TriedStore) -> None:
    """After kill -9 nothing waits for a lease: doubts, open calls and mails are looked at now."""
    store = sqlite_store
    await store.called("c1", OTHER)
    await store.queued()
    fax = await store.claimed()
    store.clock.now += 1000
    assert await store.claim_questions(1) != []
    await store.hold_all()
    await store.alert(Alert("store_full", "The disk is full."))
    assert len(await store.claim_notices(9)) == 1
    assert await store.take_over(FROM) == 1
    assert (await store.fax(fax.id)).state is State.IN_DOUBT
    assert await store.take_over(FROM) == 0
    (mail,) = await store.claim_notices(9)
    assert await store.notice_deferred(mail.id, mail.fence, DAY, "wrong address")
    await store.take_over(FROM)  # with the relay's address corrected
    assert len(await store.claim_notices(9)) == 1
    assert [asked.number for asked in await store.claim_questions(9)] == [OTHER]


async def test_a_gateway_that_starts_beside_others_takes_nothing_from_them(
    postgresql_store: TriedStore,
) -> None:
    """What a living gateway holds is its own until the lease is over; mails that wait are tried now."""
    store = postgresql_store
    await store.called("c1", OTHER)
    await store.queued()
    submitting = await store.claimed()
    await store.alert(Alert("store_full", "The disk is full."))
    held = await store.queued(numbers(1)[0])
    await store.apply(held.id, HoldAsked())
    waiting, sending = await store.claim_notices(2)
    assert await store.notice_deferred(waiting.id, waiting.fence, DAY, "wrong address")
    before = await store.rows("SELECT * FROM faxes ORDER BY id")
    assert await store.take_over("+13125550199") == 0
    assert await store.rows("SELECT * FROM faxes ORDER BY id") == before
    assert [entry.id for entry in await store.claim_notices(9)] == [waiting.id]
    assert await store.notice_sent(sending.id, sending.fence)
    store.clock.now += LEASE
    assert await store.pass_time() == 1
    assert (await store.fax(submitting.id)).state is State.IN_DOUBT


# --- compare and set ---------------------------------------------------------------------------------


async def test_a_verdict_on_an_old_fax_changes_nothing(store: TriedStore) -> None:
    """Of two gateways that judge one doubt, the slower one is not heard."""
    await store.queued()
    fax = await store.claimed()
    doubt = await store.apply(fax.id, Doubted(newest(fax), "timeout"))
    store.news.clear()
    first = await store.apply(fax.id, Unanswered(newest(fax)), version=doubt.version)
    assert first.version == doubt.version + 1
    second = await store.apply(fax.id, Absent(newest(fax)), version=doubt.version)
    assert second == first
    assert events_of(store.changes) == ["Unanswered"]


async def test_a_writer_that_was_overtaken_is_undone(store: TriedStore) -> None:
    """Two writers that read the same fax cannot both change it."""
    fax = await store.queued()
    changed = replace(fax, version=fax.version + 1, told_delayed=True)
    await store.database.write(lambda connection: _save(store._unit(connection), fax, changed))
    with pytest.raises(Conflict, match=f"fax {fax.id} was changed by another gateway"):
        await store.database.write(lambda connection: _save(store._unit(connection), fax, changed))


async def test_an_unknown_fax_is_an_error(store: TriedStore) -> None:
    """A mistyped id is named."""
    with pytest.raises(UnknownFax, match="there is no fax m9-9"):
        await store.apply("m9-9", HoldAsked())


async def test_changes_are_told_even_when_the_caller_has_gone(store: TriedStore) -> None:
    """The log line of a change is written although the task that asked for it was stopped."""
    fax = await store.queued()
    asking = asyncio.ensure_future(store.apply(fax.id, HoldAsked()))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    while not store.changes:
        await store.count()
    await store.apply(fax.id, ReleaseAsked())
    assert events_of(store.changes) == ["HoldAsked", "ReleaseAsked"]


# --- questions ---------------------------------------------------------------------------------------


async def test_a_silent_call_is_asked_about_by_one_gateway_at_a_time(store: TriedStore) -> None:
    """A question is leased for a minute; when the asker died, another asks."""
    fax = await store.called()
    store.clock.now = fax.due_at - 1
    assert await store.claim_questions(9) == []
    store.clock.now = fax.due_at
    assert [asked.id for asked in await store.claim_questions(9)] == [fax.id]
    assert await store.claim_questions(9) == []
    store.clock.now += QUESTION_LEASE
    assert len(await store.claim_questions(9)) == 1


async def test_the_longest_due_is_asked_about_first(store: TriedStore) -> None:
    """When many are silent, nobody's turn is skipped."""
    await store.mail_in(*numbers(3))
    faxes = [await store.claimed(MANY) for _ in range(3)]
    for n, delay in ((2, 0), (0, 10), (1, 10)):
        store.clock.now += delay
        await store.taken(faxes[n], f"c{n}")
    store.clock.now += HOUR
    assert [fax.id for fax in await store.claim_questions(2)] == [faxes[2].id, faxes[0].id]
    assert [fax.id for fax in await store.claim_questions(2)] == [faxes[1].id]


async def test_what_was_asked_about_at_a_crash_comes_one_by_one(store: TriedStore) -> None:
    """Of the questions that a dying gateway had begun one may be to blame: no other is begun beside it."""
    await store.mail_in(*numbers(3))
    faxes = [await store.taken(await store.claimed(MANY), f"c{n}") for n in range(3)]
    store.clock.now += HOUR
    begun = [fax.id for fax in await store.claim_questions(2)]
    store.clock.now += QUESTION_LEASE
    assert [[fax.id for fax in await store.claim_questions(9)] for _ in range(3)] == [
        [fax.id for fax in faxes if fax.id not in begun], begun[:1], begun[1:],
    ]  # fmt: skip


async def test_of_the_held_only_a_stuck_call_is_asked_about(store: TriedStore) -> None:
    """A call that never ended is asked to cancel; what waits for a person is left to the person."""
    stuck = await store.called("c1")
    await store.queued(OTHER)
    doubtful = await store.claimed()
    for event in (Doubted(newest(doubtful), "timeout"), Unprovable(newest(doubtful), "no list")):
        await store.apply(doubtful.id, event)
    store.clock.now += STUCK + 1
    await store.pass_time()
    held = [await store.fax(fax.id) for fax in (stuck, doubtful)]
    assert [fax.held_for for fax in held] == [HeldFor.STUCK, HeldFor.DOUBT]
    assert [fax.id for fax in await store.claim_questions(9)] == [stuck.id]


async def test_the_evidence_for_a_doubt(store: TriedStore) -> None:
    """Known are the parked events of the number, and the newest fax that the carrier certainly has."""
    nothing = await store.evidence(NUMBER, FROM)
    assert (nothing.told, nothing.control, nothing.control_at, nothing.now) == ((), None, NOW, NOW)
    await store.queued()
    doubtful = await store.claimed(MANY)
    store.clock.now += 10
    await store.called("c2", OTHER)
    store.clock.now += HOUR
    await store.taken(doubtful, "c1")  # found late: at the carrier it is older than c2
    await store.webhook(reported("c8", Stage.DIALLED))
    await store.webhook(reported("c9", Stage.DIALLED, number=OTHER))
    known = await store.evidence(NUMBER, FROM)
    assert [sighting.carrier_id for sighting in known.told] == ["c8"]
    assert (known.control, known.control_at, known.now) == ("c2", NOW + 10, NOW + 10 + HOUR)
    assert (await store.evidence(NUMBER, OTHER)).control is None


async def test_ids_that_are_ours(store: TriedStore) -> None:
    """Of a long list of the carrier's, exactly our own calls are recognised."""
    await store.called("c600")
    assert await store.bound_ids([f"c{n}" for n in range(1100)]) == {"c600"}


# --- time --------------------------------------------------------------------------------------------


async def test_a_deadline_ends_only_what_waits(store: TriedStore) -> None:
    """After a day a waiting or held fax fails and its sender is told; an open call is let end."""
    open_call = await store.called("c1")
    waiting = await store.queued()  # the same number
    held = await store.queued(OTHER)
    await store.apply(held.id, HoldAsked())
    await store.mail_out()
    store.clock.now += DAY
    await store.pass_time()
    ended = [await store.fax(fax.id) for fax in (waiting, held)]
    assert [(fax.state, fax.reason) for fax in ended] == [(State.FAILED, "gave_up_waiting")] * 2
    assert not (await store.fax(open_call.id)).final
    assert {f"{fax.id}.failed" for fax in ended} < set(await store.mail_out())


async def test_a_delay_is_told_once(store: TriedStore) -> None:
    """After four hours the sender hears that the fax is still under way, and not again after eight."""
    fax = await store.queued()
    store.clock.now += 4 * HOUR - 1
    assert await store.pass_time() == 0
    for _ in range(2):
        store.clock.now += 4 * HOUR
        await store.pass_time()
    assert await store.mail_out() == [f"{fax.id}.delayed"]
    assert events_of(store.changes) == ["TimePassed"]


async def test_a_call_without_an_end_is_given_up(store: TriedStore) -> None:
    """A stuck call frees its number and its channel, and a person is asked to look."""
    fax = await store.called()
    waiting = await store.queued()
    store.clock.now += STUCK
    assert await store.pass_time() == 0, "quiet is not stuck yet, and the caretaker comes to rest"
    store.clock.now += 1
    assert await store.pass_time() == 1
    assert (await store.fax(fax.id)).held_for is HeldFor.STUCK
    assert await store.mail_out() == ["alert.call_stuck.2026-03-02", f"{fax.id}.delayed"]
    assert (await store.claimed()).id == waiting.id
    assert await store.pass_time() == 0


async def test_a_released_call_can_be_stuck_again(store: TriedStore) -> None:
    """An operator who lets a stuck call go on hears of it again when it stays silent."""
    fax = await store.called()
    for _ in range(2):
        store.clock.now += STUCK + 1
        await store.pass_time()
        assert (await store.fax(fax.id)).held_for is HeldFor.STUCK
        await store.apply(fax.id, ReleaseAsked())
        assert (await store.fax(fax.id)).state is State.SENDING


async def test_many_are_looked_at_in_several_rounds(store: TriedStore) -> None:
    """A thousand deadlines at once hold up nobody: they are met some at a time, until none is left."""
    await store.mail_in(*numbers(450))
    store.clock.now += DAY
    rounds = []
    while done := await store.pass_time():
        rounds.append(done)
    assert len(rounds) > 2
    assert (await store.count()).states == {}


async def test_faxes_of_other_states_are_left_alone_by_time(store: TriedStore) -> None:
    """Time that passes over an ended fax changes nothing."""
    fax = await store.called()
    await store.webhook(reported("c1", Stage.DELIVERED))
    store.clock.now += DAY
    assert await store.pass_time() == 0
    assert (await store.apply(fax.id, TimePassed())).state is State.DELIVERED


async def test_a_closed_doubt_goes_back_to_the_queue(store: TriedStore) -> None:
    """What was proved absent is called again, as a second attempt."""
    await store.queued()
    fax = await store.claimed()
    for event in (Doubted(newest(fax), "timeout"), Absent(newest(fax))):
        await store.apply(fax.id, event)
    again = await store.claimed()
    assert [attempt.end for attempt in again.attempts] == [End.ABSENT, None]
