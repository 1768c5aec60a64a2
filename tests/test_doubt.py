"""The verdict on a POST whose answer is missing: never absent without proof, never bound to a stranger."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import pytest
import stores
from faxes import APPLICATION, DAY, FROM, HOUR, NOW, NUMBER, RULES, STUCK, Walk, doubted
from harness import until
from hypothesis import given
from hypothesis import strategies as st
from stores import SETTINGS, Clock, TriedStore, events_of

from gateway.bell import Bell
from gateway.carrier import Call
from gateway.dispatch import Dispatcher
from gateway.doubt import (
    Bind,
    NoProof,
    ProvedAbsent,
    Sighting,
    Undecided,
    Verdict,
    fits,
    judge,
)
from gateway.metrics import Metrics
from gateway.records import Fax, HeldFor, State
from gateway.sandbox import Sandbox, SandboxOptions
from gateway.telnyx import Telnyx

store = stores.store

ATTEMPT = Walk().begin(after=0.0).make(doubted()).last
OURS = Sighting("c-1", NUMBER, FROM, APPLICATION, NOW + 2.0)
SECOND = replace(OURS, carrier_id="c-2")
CONTROL = Sighting("c-0", "+13125550199", FROM, APPLICATION, NOW - 3600.0)
ELSEWHERE = replace(OURS, carrier_id="c-3", to_number="+13125550123")
OLDER = replace(OURS, seen_at=NOW - 5 * HOUR)
LONG_AGO = replace(OURS, seen_at=NOW - 26 * HOUR - 1.0)
PERHAPS = NoProof("an older fax at the carrier may be it, if the clock was wrong")


@pytest.mark.parametrize(
    ("listed", "told", "bound", "control", "early", "last", "overdue"),
    [
        # Exactly one candidate: it is the attempt, whenever and wherever it is seen.
        ([OURS], [], [], None, Bind("c-1"), Bind("c-1"), Bind("c-1")),
        ([], [OURS], [], None, Bind("c-1"), Bind("c-1"), Bind("c-1")),
        (None, [OURS], [], "c-0", Bind("c-1"), Bind("c-1"), Bind("c-1")),
        ([OURS, CONTROL], [OURS, OURS], [], "c-0", Bind("c-1"), Bind("c-1"), Bind("c-1")),
        ([OURS, SECOND], [], ["c-2"], None, Bind("c-1"), Bind("c-1"), Bind("c-1")),
        ([OURS, ELSEWHERE], [], [], "c-9", Bind("c-1"), Bind("c-1"), Bind("c-1")),
        # None, and the list is whole: absent at the last check, not before.
        ([CONTROL], [], [], "c-0", Undecided(), ProvedAbsent(), ProvedAbsent()),
        ([], [], [], None, Undecided(), ProvedAbsent(), ProvedAbsent()),
        ([ELSEWHERE], [], [], None, Undecided(), ProvedAbsent(), ProvedAbsent()),
        ([OURS], [], ["c-1"], "c-1", Undecided(), ProvedAbsent(), ProvedAbsent()),
        # None, and the list proves nothing: asked on, then a person.
        ([], [], [], "c-0", Undecided(), Undecided(), NoProof("the carrier's list is behind")),
        ([ELSEWHERE], [], [], "c-0", Undecided(), Undecided(), NoProof("the carrier's list is behind")),
        (None, [], [], None, Undecided(), Undecided(), NoProof("the carrier's list did not answer")),
        (None, [CONTROL], [], "c-0", Undecided(), Undecided(), NoProof("the carrier's list did not answer")),
        # Several: later checks may tell them apart, the last one does not guess.
        ([OURS, SECOND], [], [], None, Undecided(), *[NoProof("2 faxes at the carrier fit it")] * 2),
        ([OURS], [SECOND], [], None, Undecided(), *[NoProof("2 faxes at the carrier fit it")] * 2),
        # Older than the attempt by our clock, which may have been wrong: no candidate, and no absence either.
        ([OLDER], [], [], None, Undecided(), PERHAPS, PERHAPS),
        ([OLDER, CONTROL], [], [], "c-0", Undecided(), PERHAPS, PERHAPS),
        ([], [OLDER], [], None, Undecided(), PERHAPS, PERHAPS),
        (None, [OLDER], [], None, Undecided(), PERHAPS, PERHAPS),
        ([OLDER, SECOND], [], [], None, Bind("c-2"), Bind("c-2"), Bind("c-2")),
        ([OLDER], [], ["c-1"], None, Undecided(), ProvedAbsent(), ProvedAbsent()),
        ([replace(OLDER, to_number=FROM)], [], [], None, Undecided(), ProvedAbsent(), ProvedAbsent()),
        ([replace(OLDER, connection_id="1")], [], [], None, Undecided(), ProvedAbsent(), ProvedAbsent()),
        ([LONG_AGO], [], [], None, Undecided(), ProvedAbsent(), ProvedAbsent()),
    ],
)
def test_verdict(
    listed: Sequence[Sighting] | None,
    told: Sequence[Sighting],
    bound: Sequence[str],
    control: str | None,
    early: Verdict,
    last: Verdict,
    overdue: Verdict,
) -> None:
    """Each doubt is bound, proved, asked on or given to a person, by what the carrier shows."""
    verdicts = [
        judge(
            ATTEMPT, NUMBER, listed=listed, told=told, bound=bound, control=control, ahead=0.0, last=end,
            overdue=late,
        )
        for end, late in ((False, False), (True, False), (True, True))
    ]  # fmt: skip
    assert verdicts == [early, last, overdue]


@pytest.mark.parametrize(
    ("sighting", "fitting"),
    [
        (OURS, True),
        (replace(OURS, to_number="+13127367277"), False),
        (replace(OURS, to_number=NUMBER.removeprefix("+")), False),
        (replace(OURS, from_number="+13125550101"), False),
        (replace(OURS, connection_id="1"), False),
        (replace(OURS, seen_at=NOW - 3600.0), True),
        (replace(OURS, seen_at=NOW - 3600.1), False),
        (replace(OURS, seen_at=NOW + 86400.0), True),
    ],
)
def test_only_a_fax_of_the_same_call_fits(sighting: Sighting, *, fitting: bool) -> None:
    """A fax at the carrier is ours only by number, sender, application and time together."""
    assert fits(ATTEMPT, NUMBER, sighting) is fitting


@pytest.mark.parametrize(
    ("seen_at", "verdict"),
    [
        (NOW - 3 * HOUR, Bind("c-1")),
        (NOW - 4 * HOUR, Bind("c-1")),
        (NOW - 4 * HOUR - 0.1, PERHAPS),
        (NOW - 29 * HOUR, PERHAPS),
        (NOW - 29 * HOUR - 0.1, ProvedAbsent()),
    ],
)
def test_a_clock_that_is_known_to_be_ahead_hides_nothing(seen_at: float, verdict: Verdict) -> None:
    """When our clock is three hours ahead of the carrier's, so are the times that a fax is held against."""
    verdicts = judge(
        ATTEMPT, NUMBER, listed=[replace(OURS, seen_at=seen_at)], told=[], bound=[], control=None,
        ahead=3 * HOUR, last=True, overdue=False,
    )  # fmt: skip
    assert verdicts == verdict


def test_numbers_stay_out_of_logs() -> None:
    """A sighting that is printed shows no telephone number."""
    assert NUMBER not in repr(OURS)
    assert FROM not in repr(OURS)


SIGHTINGS = st.builds(
    Sighting,
    carrier_id=st.sampled_from(["c-0", "c-1", "c-2", "c-3"]),
    to_number=st.sampled_from([NUMBER, "+13125550199"]),
    from_number=st.sampled_from([FROM, "+13125550101"]),
    connection_id=st.sampled_from([APPLICATION, "1"]),
    seen_at=st.sampled_from([NOW - 27 * HOUR, NOW - 5 * HOUR, NOW - 1000.0, NOW, NOW + 5.0]),
)


@given(
    listed=st.none() | st.lists(SIGHTINGS, max_size=5),
    told=st.lists(SIGHTINGS, max_size=3),
    bound=st.sets(st.sampled_from(["c-0", "c-1", "c-2", "c-3"])),
    control=st.sampled_from([None, "c-0", "c-1"]),
    ahead=st.sampled_from([0.0, 3.0, 5 * HOUR]),
    last=st.booleans(),
    overdue=st.booleans(),
)
def test_no_verdict_without_its_proof(
    *,
    listed: list[Sighting] | None,
    told: list[Sighting],
    bound: set[str],
    control: str | None,
    ahead: float,
    last: bool,
    overdue: bool,
) -> None:
    """Whatever the carrier shows, absence is said only with proof, and only a free fax that fits is bound."""
    verdict = judge(
        ATTEMPT, NUMBER, listed=listed, told=told, bound=bound, control=control, ahead=ahead, last=last,
        overdue=overdue,
    )  # fmt: skip
    seen = [sighting for sighting in [*(listed or []), *told] if sighting.carrier_id not in bound]
    fitting = {sighting.carrier_id for sighting in seen if fits(ATTEMPT, NUMBER, sighting, ahead=ahead)}
    of_the_day = {
        sighting.carrier_id for sighting in seen if fits(ATTEMPT, NUMBER, sighting, ahead=ahead + 25 * HOUR)
    }
    match verdict:
        case Bind(carrier_id):
            assert fitting == {carrier_id}
        case ProvedAbsent():
            assert last
            assert fitting == set()
            assert of_the_day == set()
            assert listed is not None
            assert control is None or control in {row.carrier_id for row in listed}
        case NoProof(cause):
            assert last
            assert cause
            assert len(fitting) > 1 or overdue or of_the_day > fitting
        case Undecided():
            assert not (last and overdue), "a doubt does not last for ever"
            assert len(fitting) != 1


# --- what the dispatcher makes of it -----------------------------------------------------------------


@dataclass
class Scene:
    """A dispatcher over a real store, the stand-in carrier, and a clock for each of them."""

    store: TriedStore
    sandbox: Sandbox
    carrier: Telnyx
    carriers_clock: Clock
    bell: Bell
    dispatcher: Dispatcher

    async def until(self, *events: str) -> None:
        """Wait until one of the events has happened to a fax since the last wait."""
        await until(lambda: not {*events}.isdisjoint(events_of(self.store.changes)), " or ".join(events))
        self.store.news.clear()

    def let_pass(self, seconds: float) -> None:
        """Let time pass for both, and wake the loops."""
        self.store.clock.now += seconds
        self.carriers_clock.now += seconds
        self.bell.ring()

    async def called(self, number: str, behaviour: str, *events: str) -> Fax:
        """Let a fax be called, the carrier behaving like that; return it after one of the events."""
        self.sandbox.set_script({number: behaviour})
        fax = await self.store.queued(number)
        self.bell.ring()
        await self.until(*events)
        return await self.store.fax(fax.id)

    async def fax_by_another_program(self) -> None:
        """Send a fax that the gateway knows nothing of."""
        self.sandbox.set_script({NUMBER: "delivered"})
        await self.carrier.send(
            Call(NUMBER, FROM, "high", t38=True, document=b"%PDF-1.7 other"), lambda: True
        )

    def taken(self, number: str = NUMBER) -> int:
        """Return how often the carrier took a fax to the number."""
        return sum(1 for entry in self.sandbox.ledger if entry.to == number)


@pytest.fixture
async def scene(store: TriedStore) -> AsyncIterator[Scene]:
    """Open a scene; store and carrier have one time, the process has another. The carrier sends no events."""
    clock, bell = Clock(), Bell()
    sandbox = Sandbox(SandboxOptions(call_time=0.0), clock=clock)
    await sandbox.start()
    application = sandbox.options.connection_id
    carrier = Telnyx(
        api_base=sandbox.url, api_key=sandbox.options.api_key, connection_id=application, public_key="",
        monochrome=False, version="test",
    )  # fmt: skip
    dispatcher = Dispatcher(
        store, carrier, settings=replace(SETTINGS, connection_id=application), rules=RULES, metrics=Metrics(),
        keep_documents=DAY, keep_records=DAY, longest_post=-SETTINGS.lease,  # no other gateway posts
    )  # fmt: skip
    async with carrier:
        loops = [
            asyncio.create_task(dispatcher.run_calls(bell.listener())),
            asyncio.create_task(dispatcher.run_questions(bell.listener())),
        ]
        yield Scene(store, sandbox, carrier, clock, bell, dispatcher)
        for loop in loops:
            loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await loop
    await sandbox.close()


@pytest.mark.parametrize("ahead", [0.0, 3 * HOUR, 40 * DAY])
@pytest.mark.parametrize("age", [10.0, 600.0], ids=["first check", "last check"])
async def test_a_clock_ahead_of_the_carriers_is_allowed_for(scene: Scene, ahead: float, age: float) -> None:
    """What the carrier took is found and not sent twice, however far our clock is ahead of its clock."""
    scene.store.clock.now += ahead
    fax = await scene.called(NUMBER, "answer-lost", "Doubted")
    scene.let_pass(age)
    if ahead and age == 10.0:  # what the carrier's clock says is learned by this check
        await scene.until("Unanswered")
        scene.let_pass(20.0)
    await scene.until("Taken", "Absent", "Unprovable")
    after = await scene.store.fax(fax.id)
    assert [attempt.carrier_id for attempt in after.attempts] == [scene.sandbox.ledger[0].fax_id]
    assert scene.taken() == 1


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
async def test_a_lease_that_ran_out_by_a_clock_that_was_set_proves_nothing(scene: Scene) -> None:
    """The POST of another gateway may be on its way yet: until that is over nothing counts as absent."""
    scene.dispatcher._longest_call = 270.0
    fax = await scene.called(NUMBER, "cut-before-acceptance", "Doubted")
    scene.sandbox.set_script({NUMBER: "delivered"})
    scene.let_pass(700.0)
    await scene.until("Unanswered", "Absent")
    assert ((await scene.store.fax(fax.id)).state, scene.taken()) == (State.IN_DOUBT, 0)
    scene.dispatcher._longest_call = 0.0  # as after the time that it takes
    scene.let_pass(600.0)
    await scene.until("Taken")
    assert scene.taken() == 1


async def test_a_clock_that_was_set_right_during_a_doubt_leads_to_a_person(scene: Scene) -> None:
    """Nobody knows any more what the clock was when the fax was sent: nothing is bound or sent on a guess."""
    scene.store.clock.now += 3 * HOUR
    fax = await scene.called(NUMBER, "answer-lost", "Doubted")
    scene.store.clock.now -= 3 * HOUR
    scene.let_pass(3 * HOUR + 600.0)
    await scene.until("Taken", "Absent", "Unprovable")
    held = await scene.store.fax(fax.id)
    assert (held.held_for, held.held_detail) == (HeldFor.DOUBT, PERHAPS.cause)
    assert scene.taken() == 1


@pytest.mark.parametrize(("hours", "proved"), [(5.0, False), (25.9, False), (26.1, True), (300.0, True)])
async def test_a_fax_of_another_program_is_nobodys_doubt_for_ever(
    scene: Scene, hours: float, *, proved: bool
) -> None:
    """Only what another program sent to the number within the last day keeps us from sending again."""
    await scene.fax_by_another_program()
    scene.let_pass(hours * HOUR)
    fax = await scene.called(NUMBER, "cut-before-acceptance", "Doubted")
    scene.sandbox.set_script({NUMBER: "delivered"})
    scene.let_pass(600.0)
    await scene.until("Absent" if proved else "Unprovable")
    if proved:
        await scene.until("Taken")
    assert (await scene.store.fax(fax.id)).held_for is (None if proved else HeldFor.DOUBT)
    assert scene.taken() == 1 + proved


async def test_of_two_doubts_about_one_number_none_is_guessed(scene: Scene) -> None:
    """One call at the carrier for two faxes in doubt is given to neither, and in the end a person decides."""
    await scene.called("+13125550199", "delivered", "Taken")  # a fax that the list must show
    scene.sandbox.set_list(empty=True)
    first = await scene.called(NUMBER, "cut-before-acceptance", "Doubted")
    scene.let_pass(STUCK + 1)
    await scene.until("Unprovable")
    await scene.store.pass_time()  # its number is free for others
    second = await scene.called(NUMBER, "answer-lost", "Doubted")
    scene.sandbox.set_list()
    scene.let_pass(10.0)
    await scene.until("Unanswered", "Taken")
    assert (await scene.store.fax(second.id)).state is State.IN_DOUBT
    scene.let_pass(STUCK)
    await scene.until("Unprovable", "Taken")
    held = [await scene.store.fax(fax.id) for fax in (first, second)]
    assert [(fax.state, fax.held_for, fax.calls) for fax in held] == [(State.HELD, HeldFor.DOUBT, ())] * 2
    assert held[1].held_detail == "another fax to the number is in doubt too"
    assert scene.taken() == 1
