"""Two gateways at one queue, at the same moment: each race that they could lose, met many times.

On a file there is one gateway; there the same verbs at once must do as well.
"""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Awaitable
from dataclasses import replace
from email.message import EmailMessage
from typing import Any

import pytest
import stores
from faxes import DAY, HOUR, NUMBER, PAGES
from letters import LETTERHEAD
from sqlalchemy.engine import Connection
from stores import LEASE, SETTINGS, TriedStore, newest, numbers, reported

from gateway import store_apply
from gateway.compose import compose
from gateway.database import Work
from gateway.fax_steps import Misfit
from gateway.records import (
    Blame,
    CancelAsked,
    Fax,
    Notice,
    NotTaken,
    Rejected,
    Report,
    Reported,
    Stage,
    State,
    Taken,
)
from gateway.store_events import Fate
from gateway.store_intake import CHUNK, NotRenewable
from gateway.store_outbox import NOTICE_LEASE
from gateway.store_unit import Change

gateways = stores.gateways
on_a_server = pytest.mark.parametrize("gateways", ["postgresql"], indirect=True)

Two = tuple[TriedStore, TriedStore]
ROUNDS = 30  # on a server; on a file there is one writer, and nothing to meet


async def at_once(*asked: Awaitable[Any]) -> list[Any]:
    """Let all of it happen at the same time, in any order; return what came of each, faults too."""
    order = random.sample(range(len(asked)), len(asked))
    tasks = {place: asyncio.ensure_future(asked[place]) for place in order}
    return await asyncio.gather(*(tasks[place] for place in range(len(asked))), return_exceptions=True)


def rounds(gateways: Two, most: int = ROUNDS) -> range:
    """Return how often a race is run."""
    return range(3 if gateways[0] is gateways[1] else most)


def changes(gateways: Two) -> list[Change]:
    """Return what both have changed."""
    one, other = gateways
    return one.changes if one is other else one.changes + other.changes


async def sending(store: TriedStore, number: str, carrier_id: str) -> Fax:
    """Return a fax that the carrier took."""
    await store.queued(number)
    return await store.taken(await store.claimed(MANY), carrier_id)


MANY = replace(SETTINGS, channels=1000)


# --- claims ------------------------------------------------------------------------------------------


async def test_fewer_channels_than_calls_that_are_open_let_no_further_call_begin(gateways: Two) -> None:
    """Calls on channels that a gateway's own, lower setting does not name count for it, too."""
    one, other = gateways
    await one.mail_in(*numbers(4))
    await one.taken(await one.claimed(MANY), "c1")
    open_calls = [await one.claimed(MANY) for _ in range(2)]
    await one.webhook(reported("c1", Stage.DELIVERED, number=numbers(1)[0]))
    assert [fax.last.slot for fax in open_calls if fax.last] == [1, 2]  # and 0 is free
    assert await other.claim_call(SETTINGS) is None


async def test_two_claimants_share_nothing(gateways: Two) -> None:
    """Nobody calls the same fax, number or channel as another gateway, and no more call than may."""
    one, other = gateways
    settings = replace(SETTINGS, channels=5)
    for _ in range(2):
        await one.mail_in(*numbers(12))
    calls: Counter[str] = Counter()
    while calls.total() < 2 * 12:
        claims = await at_once(*(store.claim_call(settings) for store in (one, other) * 5))
        faxes = [fax for fax in claims if fax is not None]
        assert 0 < len(faxes) <= 5
        assert len({fax.number for fax in faxes}) == len(faxes)
        assert len({fax.attempts[-1].slot for fax in faxes}) == len(faxes)
        calls.update(fax.id for fax in faxes)
        events = [reported(f"c-{fax.id}", Stage.DELIVERED, number=fax.number) for fax in faxes]
        answers = [other.taken(fax, f"c-{fax.id}") for fax in faxes]
        await at_once(*answers, *(one.remember_event(event) for event in events))
    assert set(calls.values()) == {1}
    assert {line.calls for line in await one.list_faxes(("delivered",), 99)} == {1}
    assert (await one.count()).states == {}


async def test_one_probe_during_a_hold(gateways: Two) -> None:
    """While the account is held, one real fax is the probe, however many gateways would send one."""
    one, other = gateways
    await one.mail_in(*numbers(9))
    fax = await one.claimed()
    for _ in rounds(gateways, ROUNDS // 2):
        await one.apply(fax.id, Rejected(newest(fax), Blame.ACCOUNT, "HTTP 401 10009", "account_refused"))
        one.clock.now += HOUR
        claims = await at_once(*(store.claim_call(MANY) for store in (one, other) * 3))
        (fax,) = [claim for claim in claims if claim is not None]


async def test_a_question_is_asked_by_one(gateways: Two) -> None:
    """The carrier is asked about each silent call by one gateway, and about none not at all."""
    one, other = gateways
    faxes = [await sending(one, number, f"c-{number}") for number in numbers(12)]
    one.clock.now += HOUR / 2
    for _ in rounds(gateways):
        claims = await at_once(*(store.claim_questions(3) for store in (one, other) * 2))
        claims += [await one.claim_questions(99)]  # who looked at the same time may have passed some over
        asked = [fax for claim in claims for fax in claim]
        assert sorted(fax.id for fax in asked) == sorted(fax.id for fax in faxes)
        answers = [Reported(newest(fax), Report(Stage.UNKNOWN, asked=True)) for fax in asked]
        await at_once(*(other.apply(fax.id, answer) for fax, answer in zip(asked, answers, strict=True)))
        one.clock.now += HOUR / 4


async def test_a_reply_is_sent_by_one(gateways: Two) -> None:
    """Each mail that is due is handed over by one gateway."""
    one, other = gateways
    handed: Counter[str] = Counter()
    faxes = []
    for turn in rounds(gateways, 10):
        for place, number in enumerate(numbers(6)):
            fax = await one.queued(number, sender=f"s{place}@example.com")
            faxes.append(fax.id)
            await other.apply(fax.id, CancelAsked())
        while len(handed) < 6 * (turn + 1):
            claims = await at_once(*(store.claim_notices(3) for store in (one, other) * 2))
            entries = [entry for claim in claims for entry in claim]
            handed.update(entry.id for entry in entries)
            assert all(await at_once(*(other.notice_sent(entry.id, entry.fence) for entry in entries)))
    assert handed == Counter(f"{fax_id}.{Notice.CANCELLED}" for fax_id in faxes)


async def test_a_reply_that_the_other_repeats_is_recognised(gateways: Two) -> None:
    """If one dies with a reply in hand, the other sends it under the same Message-ID, whatever its name."""
    fax = await gateways[0].queued()
    await gateways[0].apply(fax.id, CancelAsked())
    ids = []
    for store, name in zip(gateways, ("fax1.example.com", "fax2.example.com"), strict=True):
        (entry,) = await store.claim_notices(4)
        message = compose(entry, replace(LETTERHEAD, hostname=name), store.clock.now, None)
        assert isinstance(message, EmailMessage)
        ids.append(message["Message-ID"])
        store.clock.now += NOTICE_LEASE
    assert ids == [f"<{fax.id}.cancelled@fax.local>"] * 2


# --- compare and set ---------------------------------------------------------------------------------


async def test_no_change_overwrites_another(gateways: Two) -> None:
    """Of many events at once each has its place in the history, and none undoes what another one did."""
    one, other = gateways
    stages = (Stage.CONVERTED, Stage.DIALLED, Stage.SENDING, Stage.DELIVERED)
    for turn in rounds(gateways, ROUNDS // 2):
        fax = await sending(one, NUMBER, f"c{turn}")
        events = [Reported(newest(fax), Report(stage, asked=False)) for stage in stages]
        outcomes = await at_once(
            other.apply(fax.id, CancelAsked()),
            *(store.apply(fax.id, event) for store, event in zip((one, other) * 2, events, strict=True)),
        )
        refused = [outcome for outcome in outcomes if not isinstance(outcome, Fax)]
        assert all(isinstance(outcome, Misfit) for outcome in refused)  # a wish that came after the end
        after = await one.show(fax.id)
        assert (after.fax.state, after.fax.cancel_asked) == (State.DELIVERED, not refused)
        assert Counter(moment.event for moment in after.moments) == Counter(
            {"Begun": 1, "Taken": 1, "Reported": 4, "CancelAsked": 1 - len(refused)}
        )
        done = [change for change in changes(gateways) if change.after.id == fax.id]
        moved = sorted((change.before.version, change.after.version) for change in done if _moved(change))
        assert moved == [(version, version + 1) for version in range(after.fax.version)]
        assert after.replies == (("delivered", "waiting"),)


def _moved(change: Change) -> bool:
    return change.after.version != change.before.version


@on_a_server
async def test_a_deadlock_ends_well(gateways: Two) -> None:
    """Two gateways that want the same two faxes in opposite order both get their work done."""
    one, other = gateways
    faxes = [await sending(one, number, f"c-{number}") for number in numbers(2)]
    met = threading.Barrier(2)
    begun: list[TriedStore] = []

    def report_both(store: TriedStore, first: Fax, second: Fax) -> Work[None]:
        def work(connection: Connection) -> None:
            begun.append(store)
            for fax in (first, second):
                event = Reported(newest(fax), Report(Stage.DIALLED, asked=False))
                store_apply.apply(store._unit(connection), fax.id, event)
                if fax is first and begun.count(store) == 1:
                    met.wait(30)  # each has one now, and wants the other's

        return work

    outcomes = await at_once(
        one.database.write(report_both(one, *faxes)), other.database.write(report_both(other, *faxes[::-1]))
    )
    assert outcomes == [None, None]
    assert len(begun) > 2, "one of them gave way and began anew"
    for fax in faxes:
        moments = [moment.event for moment in (await one.show(fax.id)).moments]
        assert moments == ["Begun", "Taken", "Reported", "Reported"]


async def test_two_refusals_at_once_hold_the_account(gateways: Two) -> None:
    """A second number that meets the same refusal holds the account, also when it is not later."""
    one, other = gateways
    for _ in rounds(gateways, ROUNDS // 2):
        await one.mail_in(*numbers(2))
        faxes = [await store.claimed() for store in gateways]
        refusals = [
            Rejected(newest(fax), Blame.SUSPECT, "HTTP 422 10015", "account_refused") for fax in faxes
        ]
        await at_once(one.apply(faxes[0].id, refusals[0]), other.apply(faxes[1].id, refusals[1]))
        assert await one.brakes() == {("hold", "account")}
        assert [(await one.fax(fax.id)).state for fax in faxes] == [State.QUEUED] * 2
        await at_once(*(one.apply(fax.id, CancelAsked()) for fax in faxes))
        await one.change("DELETE FROM brakes")


# --- the carrier's answers and events ----------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
async def test_answer_and_event_never_miss_each_other(gateways: Two, known: bool) -> None:  # noqa: FBT001 -- a parameter
    """Whichever gateway hears what first, the fax moves on at once: nothing stays parked.

    The carrier's id may be known already, from an event that was there earlier.
    """
    one, other = gateways
    for turn in rounds(gateways):
        await one.queued()
        fax = await one.claimed()
        if known:
            await other.webhook(reported(f"c{turn}", Stage.CONVERTED))
        answer, *fates = await at_once(
            one.taken(fax, f"c{turn}"),
            other.webhook(reported(f"c{turn}", Stage.DIALLED)),
            other.webhook(reported(f"c{turn}", Stage.DELIVERED)),
        )
        assert isinstance(answer, Fax)
        assert set(fates) <= {Fate.APPLIED, Fate.PARKED}
        after = await one.show(fax.id)
        assert after.fax.state is State.DELIVERED
        assert (await one.count()).parked == 0
        assert Counter(moment.event for moment in after.moments)["Reported"] == 2 + known
        assert after.replies == (("delivered", "waiting"),)


async def test_a_webhook_at_both_is_applied_once(gateways: Two) -> None:
    """The carrier may repeat an event at the other gateway while the first still works on it."""
    one, other = gateways
    for turn in rounds(gateways):
        fax = await sending(one, NUMBER, f"c{turn}")
        event = reported(f"c{turn}", Stage.DELIVERED)
        fates = await at_once(*(store.webhook(event) for store in (one, other) * 2))
        assert Counter(fates) == {Fate.APPLIED: 1, Fate.DUPLICATE: 3}
        after = await one.show(fax.id)
        assert [moment.event for moment in after.moments] == ["Begun", "Taken", "Reported"]
        assert after.replies == (("delivered", "waiting"),)


# --- leases ------------------------------------------------------------------------------------------


async def test_a_late_answer_still_binds(gateways: Two) -> None:
    """A gateway that slept past its lease meets another one that doubts its call: the carrier's id wins."""
    one, other = gateways
    for turn in rounds(gateways):
        await one.queued(sender=f"s{turn}@example.com")
        fax = await one.claimed()
        one.clock.now += LEASE + 1
        outcomes = await at_once(
            other.pass_time(), one.apply(fax.id, Taken(newest(fax), f"c{turn}")), other.pass_time()
        )
        assert [type(outcome) for outcome in outcomes] == [int, Fax, int]
        after = await other.fax(fax.id)
        assert after.state is State.SENDING
        assert [attempt.carrier_id for attempt in after.attempts] == [f"c{turn}"]
        await one.webhook(reported(f"c{turn}", Stage.DELIVERED))


async def test_a_lapsed_claim_is_doubted_once(gateways: Two) -> None:
    """Whoever notices that a gateway is gone, its call is a doubt, and no answer of its own changes that."""
    one, other = gateways
    for _ in rounds(gateways, ROUNDS // 2):
        await one.queued()
        fax = await one.claimed()
        one.clock.now += LEASE + 1
        await at_once(
            one.pass_time(), other.pass_time(), one.apply(fax.id, NotTaken(newest(fax), "no connection"))
        )
        after = await other.show(fax.id)
        assert after.fax.state is State.IN_DOUBT
        assert Counter(moment.event for moment in after.moments)["Doubted"] == 1, after.moments
        assert await one.claim_call(SETTINGS) is None
        await one.taken(fax, f"c-{fax.id}")
        await other.webhook(reported(f"c-{fax.id}", Stage.DELIVERED))


# --- mail in and documents ---------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
async def test_the_same_mail_at_both_is_one_fax(gateways: Two, turned: bool) -> None:  # noqa: FBT001 -- a parameter
    """A client that tries the other gateway while the first still answers gets one fax for each number.

    Also if it names them in another order, where each may wait for the other.
    """
    one, other = gateways
    called = numbers(3)
    for turn in rounds(gateways, 4 if turned else ROUNDS):
        outcomes = await at_once(
            *(one.mail_in(*called, message_id=f"<{turn}>", window=DAY) for _ in range(2)),
            *(
                other.mail_in(*(called[::-1] if turned else called), message_id=f"<{turn}>", window=DAY)
                for _ in range(2)
            ),
        )
        assert sorted(outcome.repeated for outcome in outcomes) == [False, True, True, True]
        assert len({outcome.mail_id for outcome in outcomes}) == 1
        faxes = await one.list_faxes((), 99)
        assert sorted(fax.number for fax in faxes) == sorted(called * (turn + 1))


async def test_a_document_of_one_is_read_by_the_other(gateways: Two) -> None:
    """The gateway that calls need not be the one that took the mail in, and large ones do not mix."""
    one, other = gateways
    documents = [bytes([65 + place]) * (3 * CHUNK + place) for place in range(4)]
    faxes = await at_once(
        *(
            store.queued(numbers(4)[place], document=documents[place])
            for place, store in enumerate((one, other) * 2)
        )
    )
    for fax, document, reader in zip(faxes, documents, (other, one) * 2, strict=True):
        paper = await reader.paper_of(fax.mail_id)
        assert paper is not None
        assert await reader.document(paper[0]) == document


async def document_of(store: TriedStore, fax: Fax) -> bytes | None:
    """Return the fax's document, None once purged."""
    paper = await store.paper_of(fax.mail_id)
    return None if paper is None else await store.document(paper[0])


async def test_what_is_sent_again_keeps_its_document(gateways: Two) -> None:
    """While one gateway throws a document away, an operator at the other hears so, or has it back whole."""
    one, other = gateways
    for turn in rounds(gateways):
        fax = await one.queued(sender=f"s{turn}@example.com")
        await one.ended(fax.id, CancelAsked())
        one.clock.now += DAY
        gone, again = await at_once(one.purge(DAY, 99 * DAY), other.renew(fax.id, even_if_twice=False))
        if isinstance(again, Fax):
            assert gone == 0
            assert await document_of(other, again) == stores.DOCUMENT
            await one.ended(again.id, CancelAsked())
            one.clock.now += DAY
            assert await one.purge(DAY, 99 * DAY) == 1
        else:
            assert isinstance(again, NotRenewable)
            assert (gone, await document_of(other, fax)) == (1, None)


async def test_what_is_being_sent_keeps_its_document(gateways: Two) -> None:
    """A document is there as long as a fax of its mail may be called, however the others ended."""
    one, other = gateways
    for turn in rounds(gateways, ROUNDS // 2):
        mail = await one.mail_in(*numbers(2), sender=f"s{turn}@example.com")
        await one.ended(mail.fax_ids[0], CancelAsked())
        one.clock.now += 2 * DAY
        gone, fax = await at_once(one.purge(DAY, 99 * DAY), other.claim_call(SETTINGS))
        assert gone == 0
        assert await document_of(other, fax) == stores.DOCUMENT
        gone, after = await at_once(
            one.purge(DAY, 99 * DAY),
            other.apply(fax.id, Rejected(newest(fax), Blame.FAX, "422", "number_refused")),
        )
        assert (gone, after.state, after.pages) == (0, State.FAILED, PAGES)
        await one.mail_out()
        one.clock.now += DAY
        assert await one.purge(DAY, 99 * DAY) == 1
