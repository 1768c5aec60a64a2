"""Random lives of a whole gateway: the real store and dispatcher, against a carrier that keeps the truth.

Mails, calls, webhooks in any order, crashes, clocks that are set, operators and restored backups come in
random order; after each step the promises are looked up in the database and in the carrier's ledger, and at
the end everything must come to its end. `make test` runs the same few lives each time. For many more, and
other ones each time: STATEFUL_LIVES=2000 python -m pytest tests/test_store_stateful.py --timeout=0
"""

import asyncio
import functools
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog
from carriers import Entry, MemoryCarrier, Post
from faxes import DAY, FROM, HOUR, RULES
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from stores import SETTINGS, Clock, TriedStore, empty_database

from gateway.carrier import InDoubt, Refused, Unavailable
from gateway.dispatch import Dispatcher
from gateway.fax_steps import Misfit
from gateway.metrics import Metrics
from gateway.records import (
    Blame,
    CancelAsked,
    HeldFor,
    HoldAsked,
    OperatorEvent,
    ReleaseAsked,
    RetryAsked,
    SetAside,
    Stage,
    State,
)
from gateway.store_brakes import StillRestoring

T = TypeVar("T")

LIVES = os.environ.get("STATEFUL_LIVES")
NUMBERS = ("+13125550001", "+13125550002")
# Half of what is drawn leads on; else few lives would come far.
ANSWERS = (*["taken"] * 6, *["taken, lost"] * 3, *["lost"] * 3, "away", *Blame)
REASONS = ("user_busy", "user_busy", "receiver_no_answer", "receiver_decline", "destination_invalid",
           "account_disabled", "user_channel_limit_exceeded", "success", None)  # fmt: skip
ENDS = st.sampled_from(
    [
        (Stage.TAKEN, None),
        (Stage.DIALLED, None),
        (Stage.DELIVERED, None),
        *((Stage.FAILED, why) for why in REASONS),
    ]
)
WISHES: tuple[OperatorEvent, ...] = (
    HoldAsked(),
    ReleaseAsked(),
    CancelAsked(),
    RetryAsked(),
    RetryAsked(True),
)
FINAL = {"delivered", "failed", "cancelled"}
METRICS = Metrics()
PICK = st.integers(0, 5)  # one of those there are
PAUSE = st.sampled_from((0.0, 1.0, 11.0, 61.0, 301.0, 700.0, HOUR, 5 * HOUR))


class Turns:
    """What a loop waits with, so that it makes one turn when the test says so."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.over = asyncio.Event()
        self._next = asyncio.Event()

    async def wait(self, timeout: float) -> None:  # noqa: ARG002, ASYNC109 -- as the protocol has it
        """Say that a turn is over, and wait for the next."""
        self.over.set()
        await self._next.wait()
        self._next.clear()

    def begin(self, loop: Callable[["Turns"], Coroutine[Any, Any, None]]) -> None:
        """Begin the next turn."""
        self.over.clear()
        self._next.set()
        if self.task is None:
            self._next.clear()
            self.task = asyncio.create_task(loop(self))


class Gateway:
    """One process: a store, and a dispatcher whose loops the test turns."""

    def __init__(self, url: str, clock: Clock, carrier: MemoryCarrier) -> None:
        self.store = TriedStore(url, clock=clock)
        self._carrier = carrier
        self._dispatcher = Dispatcher(
            self.store, carrier, settings=SETTINGS, rules=RULES, metrics=METRICS, keep_documents=DAY,
            keep_records=365 * DAY,
            longest_post=0.0,
        )  # fmt: skip
        self._loops = {
            "calls": (self._dispatcher.run_calls, Turns()),
            "questions": (self._dispatcher.run_questions, Turns()),
            "caretaker": (self._dispatcher.run_caretaker, Turns()),
        }

    async def turn(self, name: str) -> None:
        """Let a loop make one turn, as far as it goes without the test; calls go as far as their POST."""
        run, turns = self._loops[name]
        if turns.task is not None and not turns.over.is_set():
            return  # it waits for an answer
        self._carrier.still.clear()
        turns.begin(run)
        await self._any(turns.over)
        for call in self._calls():
            if not any(call.get_name() == f"call {post.fax_id}" for post in self._carrier.waiting.values()):
                await self._any(call)

    async def _any(self, what: "asyncio.Event | asyncio.Task[Any]") -> None:
        waits = [asyncio.create_task(self._carrier.still.wait())]
        waits.append(asyncio.create_task(what.wait()) if isinstance(what, asyncio.Event) else what)
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            if wait is not what:
                wait.cancel()

    def _calls(self) -> list[asyncio.Task[Any]]:
        return [task for task in asyncio.all_tasks() if task.get_name().startswith("call ")]

    async def recorded(self, post: Post) -> None:
        """Wait until the answer to a POST is written down."""
        for task in self._calls():
            if task.get_name() == f"call {post.fax_id}":
                await asyncio.wait({task})

    async def crash(self) -> None:
        """End everything that is under way."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.store.close()


class Lives(RuleBasedStateMachine):
    """The machine of Hypothesis: rules are what can happen, invariants what must hold after each."""

    def __init__(self, template: Path) -> None:
        super().__init__()
        self.closing = ExitStack()
        # In memory: nobody pulls the plug here, and thousands of commits wait for no disk.
        memory = Path("/dev/shm")  # noqa: S108 -- the folder in it is a new one of our own
        base = memory if os.access(memory, os.W_OK) else template
        self.folder = Path(self.closing.enter_context(tempfile.TemporaryDirectory(dir=base)))
        self.url = self.closing.enter_context(empty_database("sqlite", self.folder, template))
        self.file, self.copy = self.folder / "gateway.db", self.folder / "backup.db"
        self.log = self.closing.enter_context(structlog.testing.capture_logs())
        self.runner = self.closing.enter_context(asyncio.Runner())
        self.clock = Clock()
        self.carrier = self.do(self._new_carrier())
        self.gateway = self.do(self._new_gateway())
        self.accepted: list[str] = []  # in their order: the ids are drawn by nobody
        self.backed_up: list[str] = []
        self.risked: set[str] = set()  # an operator took it upon himself that it arrives twice
        self.ended: dict[str, str] = {}
        self.restored = False

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        """Let something happen to its end."""
        return self.runner.run(what)

    async def _new_carrier(self) -> MemoryCarrier:
        return MemoryCarrier(self._who_calls)

    async def _new_gateway(self) -> Gateway:
        return Gateway(self.url, self.clock, self.carrier)

    def waiting(self) -> list[str]:
        """Return the faxes that have not ended."""
        return [fax_id for fax_id in self.accepted if fax_id not in self.ended]

    def _who_calls(self, number: str) -> tuple[str, str]:
        """Look up whose call it is, and whether it may be."""
        attempt_id, fax_id = self._look(
            "SELECT id, fax_id FROM attempts WHERE blocking AND number = :number", number=number
        )[0]
        assert attempt_id not in self.carrier.posted, "an attempt was posted twice"
        earlier = [entry for entry in self.carrier.ledger.values() if entry.fax_id == fax_id]
        if fax_id not in self.risked:
            assert all(entry.stage is Stage.FAILED for entry in earlier), "called again, though it may arrive"
        return attempt_id, fax_id

    def _look(self, query: str, **values: Any) -> list[Any]:
        """Read the database from outside."""
        with self.gateway.store.database.engines[-1].connect() as connection:
            return list(connection.execute(sa.text(query), values))

    # --- what can happen -----------------------------------------------------------------------------

    @initialize()
    def first_mail(self) -> None:
        """No life begins with nothing to do."""
        self.mail([NUMBERS[0]], 0)

    @precondition(lambda self: len(self.waiting()) < 4)
    @rule(to=st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=2, unique=True), sender=PICK)
    def mail(self, to: list[str], sender: int) -> None:
        """Take in a mail: it is answered 250."""
        taken = self.do(self.gateway.store.mail_in(*to, sender=f"clerk{sender}@example.com"))
        self.accepted += taken.fax_ids

    @precondition(lambda self: self.waiting())
    @rule(answer=st.sampled_from(("later", *ANSWERS)), end=ENDS, told=st.booleans(), after=PAUSE)
    def call(self, answer: str, end: tuple[Stage, str | None], told: bool, after: float) -> None:  # noqa: FBT001 -- drawn
        """Let the calls' loop come round; what it begins may go on at once."""
        self.time_passes(after)
        before = set(self.carrier.waiting)
        self.do(self.gateway.turn("calls"))
        for attempt_id in self.carrier.waiting.keys() - before:
            post = self.carrier.waiting[attempt_id]
            if answer != "later":
                self._answer(post, answer)
            if post.entry is not None and end[0] is not Stage.TAKEN:
                self.carrier.reach(post.entry, *end)
                if told:
                    self.do(self.gateway.store.webhook(post.entry.events[-1]))

    @precondition(lambda self: self.waiting())
    @rule(name=st.sampled_from(("questions", "questions", "caretaker")), after=PAUSE)
    def turn(self, name: str, after: float) -> None:
        """Let another loop come round, some time later."""
        self.time_passes(after)
        self.do(self.gateway.turn(name))

    def _post(self, pick: int) -> Post:
        posts = list(self.carrier.waiting.values())
        return posts[pick % len(posts)]

    @precondition(lambda self: self.carrier.waiting)
    @rule(pick=PICK)
    def carrier_takes(self, pick: int) -> None:
        """Let the carrier take a fax that it does not answer yet."""
        post = self._post(pick)
        if post.entry is None:
            self.carrier.take(post)

    @precondition(lambda self: self.carrier.waiting)
    @rule(pick=PICK, answer=st.sampled_from(ANSWERS))
    def carrier_answers(self, pick: int, answer: str) -> None:
        """Answer a POST, or lose the answer."""
        self._answer(self._post(pick), answer)

    def _answer(self, post: Post, answer: str) -> None:
        """Answer a POST; what was taken is not refused any more."""
        if answer in {"taken", "taken, lost"} and post.entry is None:
            self.carrier.take(post)
        if post.entry is not None and answer == "taken":
            post.answer.set_result(post.entry.carrier_id)
        elif post.entry is not None or answer == "lost":
            post.answer.set_exception(InDoubt("timeout"))
        elif answer == "away":
            post.answer.set_exception(Unavailable("HTTP 503"))
        else:
            post.answer.set_exception(Refused("HTTP 403 10010", Blame(answer), "number_refused"))
        del self.carrier.waiting[post.attempt_id]
        self.do(self.gateway.recorded(post))

    def _entry(self, pick: int) -> Entry:
        entries = list(self.carrier.ledger.values())
        return entries[-1 - pick % len(entries)]

    @precondition(lambda self: self.carrier.ledger)
    @rule(pick=PICK, end=ENDS)
    def call_goes_on(self, pick: int, end: tuple[Stage, str | None]) -> None:
        """Let a call come a step further; a webhook tells of it, some time or never."""
        entry = self._entry(pick)
        if not entry.ended and end[0] > entry.stage:
            self.carrier.reach(entry, *end)

    @precondition(lambda self: self.carrier.ledger)
    @rule(pick=PICK, event=PICK)
    def webhook(self, pick: int, event: int) -> None:
        """Let a webhook arrive: early, late, once more, in any order."""
        events = self._entry(pick).events
        self.do(self.gateway.store.webhook(events[-1 - event % len(events)]))

    @rule(
        what=st.sampled_from(("answers", "answers", "silent", "lag 0", "lag 60", "lag 300", "contradiction",
                              "set forth", "set back", "sweep")),
        pick=PICK,
    )  # fmt: skip
    def world(self, what: str, pick: int) -> None:
        """Let the carrier be away, lag or contradict itself; set our clock."""
        kind, _, value = what.partition(" ")
        match kind:
            case "answers" | "silent":
                self.carrier.answers = kind == "answers"
            case "lag":
                self.carrier.lag = float(value)
            case "contradiction" if self.carrier.ledger and self._entry(pick).stage is Stage.FAILED:
                self.carrier.reach(self._entry(pick), Stage.DELIVERED)
            case "set":  # up to two hours wrong
                ahead = self.carrier.ahead(self.clock.now) + (2 * HOUR if value == "forth" else -2 * HOUR)
                if abs(ahead) <= 2 * HOUR:
                    self.clock.now = self.carrier.now + ahead
            case "sweep":
                self.do(self.gateway.store.sweep_parked())

    def time_passes(self, seconds: float) -> None:
        """Time passes for everybody."""
        self.carrier.now += seconds
        self.clock.now += seconds

    # --- people ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.accepted)
    @rule(pick=PICK, wish=st.sampled_from(WISHES))
    def operator(self, pick: int, wish: OperatorEvent) -> None:
        """Wish something of a fax, as an operator."""
        fax_id = self.accepted[-1 - pick % len(self.accepted)]
        [held_for] = self._look("SELECT held_for FROM faxes WHERE id = :id", id=fax_id)[0]
        if wish == RetryAsked(True) or (held_for == HeldFor.RESTORED and wish != HoldAsked()):
            self.risked.add(fax_id)
        try:
            self.do(self.gateway.store.apply(fax_id, wish))
        except Misfit:
            return

    @rule(
        what=st.sampled_from((*["release"] * 5, "hold", "set aside", "mail out", "mail lost")),
        pick=PICK,
    )  # fmt: skip
    def desk(self, what: str, pick: int) -> None:
        """Stop the queue or let it go on, set a fax aside, hand the outbox over."""
        store = self.gateway.store
        match what:
            case "release":
                with suppress(StillRestoring):
                    self.do(store.release_all())
            case "hold":
                self.do(store.hold_all())
            case "set aside" if self.accepted:
                why = HeldFor.HARMFUL if pick % 2 else HeldFor.RESTORED
                fax_id = self.accepted[-1 - pick % len(self.accepted)]
                self.do(store.apply(fax_id, SetAside(why, "for a test")))
            case "mail out":
                self.do(store.mail_out())
            case "mail lost":  # the relay took them, and the gateway forgot
                self.do(store.claim_notices(10))

    # --- disasters -------------------------------------------------------------------------------------

    async def _start_again(self, prepare: Callable[[], None], *, held: bool = False) -> None:
        await self.gateway.crash()
        self.carrier.waiting.clear()
        self.carrier.hangs = False
        prepare()
        self.gateway = await self._new_gateway()
        if held:
            await self.gateway.store.begin_restore()
        await self.gateway.store.take_over(FROM)

    @rule(what=st.sampled_from((*["crash"] * 6, *["crash while asking", "backup"] * 2, "restore")))
    def disaster(self, what: str) -> None:
        """Kill the gateway and start it again, perhaps on a backup of its database."""
        if what == "backup":
            self.backup()
        elif what == "restore" and self.copy.exists():
            self.restore()
        else:
            if what == "crash while asking":
                self.carrier.hangs = True
                self.do(self.gateway.turn("questions"))
            self.do(self._start_again(lambda: None))

    def backup(self) -> None:
        """Make a backup beside the running gateway."""
        with sqlite3.connect(self.file) as source, sqlite3.connect(self.copy) as target:
            source.backup(target)
        target.close()
        source.close()
        self.backed_up = list(self.accepted)

    def restore(self) -> None:
        """Put the backup in the database's place; what came in later is lost."""

        def put_back() -> None:
            for suffix in ("-wal", "-shm"):
                Path(f"{self.file}{suffix}").unlink(missing_ok=True)
            shutil.copy(self.copy, self.file)

        self.do(self._start_again(put_back, held=True))
        self.accepted, self.restored, self.ended = list(self.backed_up), True, {}

    # --- what must hold --------------------------------------------------------------------------------

    @invariant()
    def every_accepted_fax_is_there_and_waits_for_something(self) -> None:
        """I1, I4: what was answered 250 has ended, or has a time or a cause; what has ended stays so."""
        rows = self._look("SELECT id, state, due_at, held_for, ended_at FROM faxes")
        assert sorted(self.accepted) == sorted(row.id for row in rows)
        for row in rows:
            assert (row.state in FINAL) == (row.ended_at is not None)
            assert (row.state == State.HELD) == (row.held_for is not None)
            assert self.ended.get(row.id, row.state) == row.state, "an ended fax has another state"
            assert row.due_at <= self.clock.now + DAY + 4 * HOUR
            if row.state in FINAL:
                self.ended[row.id] = row.state

    @invariant()
    def one_open_call(self) -> None:
        """I2: no fax has two calls of unknown end, no number two calls at a time."""
        rows = self._look("SELECT fax_id, number, blocking FROM attempts WHERE open")
        faxes = [row.fax_id for row in rows if row.fax_id not in self.risked]
        assert len(faxes) == len(set(faxes))
        numbers = [row.number for row in rows if row.blocking]
        assert len(numbers) == len(set(numbers))

    @invariant()
    def calls_are_told_apart(self) -> None:
        """I3: the carrier took each attempt at most once, and each is bound to the call that it made."""
        made = [entry.attempt_id for entry in self.carrier.ledger.values()]
        assert len(made) == len(set(made))
        if self.restored:  # the backup does not know who made what came after it
            return
        for row in self._look("SELECT id, carrier_id FROM attempts WHERE carrier_id IS NOT NULL"):
            assert self.carrier.ledger[row.carrier_id].attempt_id == row.id, "bound to another fax's call"

    @invariant()
    def one_final_notice(self) -> None:
        """I5: a fax has exactly one final notice once it has ended, and none before."""
        told = self._look(
            "SELECT fax_id, notice FROM outbox WHERE notice IN ('delivered', 'failed', 'cancelled')"
        )
        assert sorted(tuple(row) for row in told) == sorted(self.ended.items())

    @invariant()
    def delivered_is_true(self) -> None:
        """Who is told that a fax was delivered has had it delivered."""
        arrived = {entry.fax_id for entry in self.carrier.ledger.values() if entry.stage is Stage.DELIVERED}
        if not self.restored:
            assert {fax_id for fax_id, state in self.ended.items() if state == State.DELIVERED} <= arrived

    @invariant()
    def nothing_unforeseen(self) -> None:
        """No loop met a fault that nobody thought of."""
        assert [line for line in self.log if line["event"] == "task_failed"] == []

    # --- the end ---------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Let the world become calm: then every fax comes to its end (I4)."""
        try:
            self._come_to_the_end()
        finally:
            self.do(self.gateway.crash())
            self.closing.close()

    def _come_to_the_end(self) -> None:
        self.carrier.answers, self.carrier.lag = True, 0.0
        for _ in range(40):
            while self.carrier.waiting:
                self.carrier_answers(0, "taken")
            for entry in self.carrier.ledger.values():
                if not entry.ended:
                    self.carrier.reach(entry, Stage.DELIVERED)
            with suppress(StillRestoring):  # until the caretaker has asked the carrier
                self.do(self.gateway.store.release_all())
            for name in ("caretaker", "questions", "calls", "calls"):
                self.do(self.gateway.turn(name))
            for fax_id in self.waiting():
                [state] = self._look("SELECT state FROM faxes WHERE id = :id", id=fax_id)[0]
                if state == State.HELD:
                    self.do(self.gateway.store.apply(fax_id, CancelAsked()))
            self.every_accepted_fax_is_there_and_waits_for_something()
            if not self.waiting() and not self.carrier.waiting:
                break
            self.time_passes(HOUR)
        assert not self.waiting(), "a fax waits for ever"
        self.one_final_notice()


def test_random_lives_keep_the_promises(tmp_path: Path) -> None:
    """Whatever happens in whatever order, nothing accepted is lost, sent twice or left without its answer."""
    lives = settings(
        max_examples=int(LIVES or 40), stateful_step_count=60, deadline=None, derandomize=not LIVES,
        database=None, suppress_health_check=list(HealthCheck), print_blob=True,
    )  # fmt: skip
    made: Any = functools.partial(Lives, tmp_path)  # it is only called
    run_state_machine_as_test(made, settings=lives)
