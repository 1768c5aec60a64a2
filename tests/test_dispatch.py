"""The dispatcher at a carrier that follows a script: what one fax meets does not stop the others."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import stores
from faxes import APPLICATION, DAY, FROM, HOUR, NUMBER, RULES, STUCK
from stores import SETTINGS, TriedStore, newest, numbers

from gateway import store_brakes
from gateway.bell import Bell
from gateway.carrier import Call, CarrierEvent, NotKnown, Unavailable
from gateway.dispatch import QUESTIONS_AT_ONCE, Dispatcher
from gateway.doubt import Sighting
from gateway.metrics import Metrics
from gateway.records import (
    Absent,
    Brake,
    Doubted,
    End,
    Fax,
    HeldFor,
    Proof,
    Report,
    Reported,
    Stage,
    State,
)
from gateway.store_work import HARMFUL_AFTER, QUESTION_LEASE, CallSettings

store = stores.store

MANY = replace(SETTINGS, channels=1000)
OTHER = "+13125550199"
UNDER_WAY = Report(Stage.SENDING, asked=True)
BUSY = Report(Stage.FAILED, asked=False, reason="user_busy")


class ScriptedCarrier:
    """A carrier that takes every fax at once, and answers as the test wrote down; else all calls go on."""

    def __init__(self) -> None:
        self.posts: list[str] = []  # the numbers
        self.asked: list[str] = []  # its ids
        self.answers: dict[str, Report | Exception] = {}  # to questions, by its ids
        self.listed: list[Sighting] = []
        self.silent = False
        self.reached = asyncio.Event()

    async def send(self, call: Call, may_begin: Callable[[], bool]) -> str:
        """Take it."""
        assert may_begin()
        self.posts.append(call.number)
        return f"posted-{len(self.posts)}"

    async def status(self, carrier_id: str) -> Report:
        """Answer by the script."""
        self.asked.append(carrier_id)
        self.reached.set()
        if self.silent:
            await asyncio.Event().wait()
        answer = self.answers.get(carrier_id, UNDER_WAY)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sent_since(
        self, from_number: str, since: float, to_number: str | None = None
    ) -> list[Sighting]:
        """List by the script."""
        del since
        assert from_number == FROM
        return [row for row in self.listed if to_number in {None, row.to_number}]

    def ahead(self, now: float) -> float:
        """Have the same time."""
        del now
        return 0.0

    async def cancel(self, carrier_id: str) -> bool:
        """Do so, or meet the same fault as other questions."""
        return (await self.status(carrier_id)).stage is not Stage.FAILED

    def read_event(self, headers: Mapping[str, str], body: bytes, now: float) -> CarrierEvent:
        """Nothing: there is no webhook door here."""
        raise AssertionError(headers, body, now)


def at(store: TriedStore, carrier: ScriptedCarrier, settings: CallSettings = SETTINGS) -> Dispatcher:
    """Return a dispatcher whose turns the test makes."""
    return Dispatcher(
        store, carrier, settings=settings, rules=RULES, metrics=Metrics(), keep_documents=DAY,
        keep_records=365 * DAY, longest_post=0.0,
    )  # fmt: skip


async def call_all(dispatcher: Dispatcher) -> None:
    """Call whatever may be called now."""
    while await dispatcher._begin_call():
        await asyncio.gather(*dispatcher._calls)


# --- calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "paused"),
    [(Unavailable("HTTP 500"), False), (UNDER_WAY, True), (UNDER_WAY, False)],
    ids=["no answer", "contradicted, during a pause", "contradicted"],
)
async def test_a_fax_that_may_not_be_called_again_yet_stops_nobody(
    store: TriedStore,
    answer: Report | Exception,
    paused: bool,  # noqa: FBT001 -- a parameter
) -> None:
    """While the carrier does not confirm that the last call failed, that fax waits, and all others go out."""
    carrier = ScriptedCarrier()
    dispatcher = at(store, carrier, MANY)
    waiting = await store.called("c-old")
    await store.apply(waiting.id, Reported(newest(waiting), BUSY))
    store.clock.now += 200.0
    for place, number in enumerate(numbers(5)):
        await store.queued(number, sender=f"s{place}@example.com")
    if paused:
        await store._do(store_brakes.set_brake, Brake("pause", "account", "HTTP 429", Proof.TAKEN))
    carrier.answers["c-old"] = answer
    for _ in range(20):
        await call_all(dispatcher)
        store.clock.now += 30.0
    assert "c-old" in carrier.asked
    assert sorted(carrier.posts) == numbers(5)
    assert (await store.fax(waiting.id)).state is State.QUEUED
    carrier.answers["c-old"] = replace(BUSY, asked=True)
    store.clock.now += 200.0
    await call_all(dispatcher)
    assert carrier.posts[5:] == [NUMBER]


async def thought_absent(store: TriedStore) -> Fax:
    """Return a fax whose first call was proved absent."""
    await store.queued()
    fax = await store.claimed()
    await store.apply(fax.id, Doubted(newest(fax), "no answer"))
    store.clock.now += 600.0
    fax = await store.apply(fax.id, Absent(newest(fax)))
    store.clock.now += 1.0
    assert fax.state is State.QUEUED
    return fax


async def test_a_call_thought_absent_that_the_list_shows_later_is_found(store: TriedStore) -> None:
    """The look before the new call finds the lost one, and the recipient gets the fax once."""
    carrier = ScriptedCarrier()
    fax = await thought_absent(store)
    carrier.listed = [Sighting("c-late", NUMBER, FROM, APPLICATION, fax.attempts[0].started_at + 1)]
    await call_all(at(store, carrier))
    fax = await store.fax(fax.id)
    assert carrier.posts == []
    assert fax.state is State.SENDING
    assert [(one.carrier_id, one.end) for one in fax.attempts] == [("c-late", None), (None, End.WITHDRAWN)]


async def test_a_list_that_is_behind_permits_no_second_call(store: TriedStore) -> None:
    """If the carrier's list lacks our newest known fax, a call thought absent is not made again as yet."""
    carrier = ScriptedCarrier()
    dispatcher = at(store, carrier)
    known = await store.called("c-newest", OTHER)
    store.clock.now += 1
    fax = await thought_absent(store)
    await call_all(dispatcher)
    assert carrier.posts == []
    assert (await store.fax(fax.id)).state is State.QUEUED
    carrier.listed = [Sighting("c-newest", OTHER, FROM, APPLICATION, known.attempts[0].started_at)]
    await call_all(dispatcher)
    assert carrier.posts == [], "it is not asked again at once"
    store.clock.now += 120.0
    await call_all(dispatcher)
    assert carrier.posts == [NUMBER]


async def test_a_call_that_the_carrier_no_longer_knows_frees_its_channel(store: TriedStore) -> None:
    """Its number stays blocked for now, but others are called, even with a single channel."""
    carrier = ScriptedCarrier()
    dispatcher = at(store, carrier, replace(SETTINGS, channels=1))
    gone = await store.called("c-gone")
    carrier.answers["c-gone"] = NotKnown("HTTP 404")
    await store.queued()
    await store.queued(OTHER)
    await call_all(dispatcher)
    assert carrier.posts == []
    store.clock.now = gone.due_at
    assert await dispatcher._ask_some()
    gone = await store.fax(gone.id)
    assert (gone.state, gone.held_for) == (State.HELD, HeldFor.GONE)
    await call_all(dispatcher)
    assert carrier.posts == [OTHER]


# --- questions ---------------------------------------------------------------------------------------


async def test_questions_that_hang_starve_nobody(store: TriedStore) -> None:
    """If the carrier lets us wait for an answer about many calls, each of the others has its turn."""
    carrier = ScriptedCarrier()
    dispatcher = at(store, carrier, MANY)
    silent = [f"c-silent-{place}" for place in range(4 * QUESTIONS_AT_ONCE)]
    for carrier_id, number in zip([*silent, "c-good"], numbers(len(silent) + 1), strict=True):
        await store.queued(number)
        await store.taken(await store.claimed(MANY), carrier_id)
        store.clock.now += 1
    carrier.answers = dict.fromkeys(silent, Unavailable("no answer (TimeoutError)"))
    store.clock.now += HOUR / 4
    for _ in range(5):
        assert await dispatcher._ask_some()
        store.clock.now += 20.0  # so long it took
    assert "c-good" in carrier.asked


async def test_stopping_in_the_middle_of_a_question_counts_as_no_harm(store: TriedStore) -> None:
    """However often the gateway is stopped while it waits for an answer, the fax is not blamed for it."""
    fax = await store.called("c1")
    store.clock.now = fax.due_at
    for _ in range(HARMFUL_AFTER + 1):
        carrier = ScriptedCarrier()
        carrier.silent = True
        asking = asyncio.create_task(at(store, carrier).run_questions(Bell().listener()))
        async with asyncio.timeout(20):
            await carrier.reached.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        store.clock.now += QUESTION_LEASE
    fax = await store.fax(fax.id)
    assert (fax.state, fax.held_for) == (State.SENDING, None)


async def test_an_answer_that_nobody_foresaw_starves_nobody(store: TriedStore) -> None:
    """A stuck call whose questions fail by a fault of ours is left to a person; others are asked about."""
    carrier = ScriptedCarrier()
    dispatcher = at(store, carrier)
    odd = await store.called("c-odd")
    carrier.answers["c-odd"] = OverflowError("an odd answer")
    store.clock.now += STUCK + 1
    await store.pass_time()
    await store.called("c-good", OTHER)
    for _ in range(20):
        await dispatcher._ask_some()
        store.clock.now += QUESTION_LEASE + 1
    assert carrier.asked.count("c-odd") == HARMFUL_AFTER
    assert "c-good" in carrier.asked
    odd = await store.fax(odd.id)
    assert (odd.state, odd.held_for) == (State.HELD, HeldFor.HARMFUL)
