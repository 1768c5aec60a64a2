"""Random lives of a whole gateway: the real store and dispatcher, against a carrier that keeps the truth.

Mails and their repeats, calls, webhooks in any order, a second gateway, crashes, clocks that are set,
operators and restored backups come in random order; after each step, and when it is all over, the `promises`
must hold. `make test` runs the same few lives each time. For many more, and other ones each time:
STATEFUL_LIVES=2000 python -m pytest tests/test_store_stateful.py --timeout=0
"""

import functools
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from carriers import Entry, Post
from faxes import DAY, HOUR
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lives import Sent
from promises import Promises

from gateway.fax_steps import Misfit
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
)
from gateway.store_brakes import StillRestoring

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
PICK = st.integers(0, 5)  # one of those there are
AT = st.integers(0, 1)  # which gateway, if there are two
PAUSE = st.sampled_from((0.0, 1.0, 11.0, 61.0, 301.0, 700.0, HOUR, 5 * HOUR))


class Lives(Promises):
    """The machine of Hypothesis: its rules are what can happen, and it has invariants from `Promises`."""

    # --- what can happen -----------------------------------------------------------------------------

    @initialize(together=st.booleans())
    def first_mail(self, together: bool) -> None:  # noqa: FBT001 -- drawn
        """No life begins with nothing to do; half of them have two gateways."""
        self.world.begin(together=together)
        self.mail([NUMBERS[0]], 0, 0)

    @precondition(lambda self: len(self.past.waiting) < 4)
    @rule(to=st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=2, unique=True), sender=PICK, at=AT)
    def mail(self, to: list[str], sender: int, at: int) -> None:
        """Take in a mail: it is answered 250."""
        self.past.sent.append(Sent(tuple(to), f"clerk{sender}@example.com", f"<{len(self.past.sent)}>"))
        self._send(self.past.sent[-1], at)

    @precondition(lambda self: self.past.sent)
    @rule(pick=PICK, at=AT)
    def mail_again(self, pick: int, at: int) -> None:
        """Take in a mail once more: only what failed, was cancelled or is long past becomes another fax."""
        self._send(self.past.sent[-1 - pick % len(self.past.sent)], at)

    def _send(self, mail: Sent, at: int) -> None:
        rows = self.world.look(
            "SELECT number, mails.id AS mail_id FROM faxes JOIN mails ON mails.id = mail_id"
            " WHERE message_id = :message_id AND state NOT IN ('failed', 'cancelled')"
            " AND accepted_at > :then",
            message_id=mail.message_id,
            then=self.world.clock.now - DAY,
        )
        known = {row.number: row.mail_id for row in rows if row.number in mail.to}
        taken = self.do(
            self.world.at(at).store.mail_in(
                *mail.to, sender=mail.sender, message_id=mail.message_id, window=DAY
            )
        )
        self.past.accepted += taken.fax_ids
        assert len(taken.fax_ids) == len(mail.to) - len(known)
        assert taken.mail_id in known.values() if taken.repeated else taken.fax_ids

    @precondition(lambda self: self.past.waiting)
    @rule(answer=st.sampled_from(("later", "asleep", *ANSWERS)), end=ENDS, told=st.booleans(),
          after=PAUSE, at=AT)  # fmt: skip
    def call(self, answer: str, end: tuple[Stage, str | None], told: bool, after: float, at: int) -> None:  # noqa: FBT001 -- drawn
        """Let the calls' loop come round; what it begins may go on at once, or wait for an earlier call."""
        self.world.time_passes(after)
        before = set(self.carrier.waiting)
        self._begin_call(at, asleep=answer == "asleep")
        for attempt_id in self.carrier.waiting.keys() - before:
            post = self.carrier.waiting[attempt_id]
            if answer not in {"later", "asleep"}:
                self.world.answer(post, answer)
            if post.entry is not None and end[0] is not Stage.TAKEN:
                self.carrier.reach(post.entry, *end)
                if told:
                    self.do(self.world.at(at).store.webhook(post.entry.events[-1]))

    @precondition(lambda self: self.past.waiting)
    @rule(name=st.sampled_from(("questions", "questions", "caretaker")), after=PAUSE, at=AT)
    def turn(self, name: str, after: float, at: int) -> None:
        """Let another loop come round, some time later."""
        self.world.time_passes(after)
        self.do(self.world.at(at).turn(name))

    @precondition(lambda self: self.carrier.hanging)
    @rule(pick=PICK)
    def call_wakes(self, pick: int) -> None:
        """Let a call go on that waited to hear of an earlier one; its lease may be over."""
        tasks = list(self.carrier.hanging)
        self.world.wake(tasks[pick % len(tasks)])

    @precondition(lambda self: self.past.waiting)
    @rule(asleep=st.booleans(), takes=st.booleans(), jumps=st.booleans(), looks=st.integers(1, 6),
          each=st.sampled_from((30.0, 301.0, 301.0)), at=AT)  # fmt: skip
    def slow_call(self, asleep: bool, takes: bool, jumps: bool, looks: int, each: float, at: int) -> None:  # noqa: FBT001 -- drawn
        """Let a call be handed over so slowly that its lease lapses, while the other gateway is at work."""
        self.world.time_passes(700.0)  # what waits for a while is due then
        self._begin_call(at, asleep=asleep)
        for post in list(self.carrier.waiting.values()) if takes else ():
            self.world.take(post)
        if jumps:
            self._set_clock(2 * HOUR)
        for _ in range(looks):
            self.world.time_passes(each)
            for name in ("caretaker", "questions", "calls"):
                self.do(self.world.at(at + 1).turn(name))
        for task in list(self.carrier.hanging):
            self.world.wake(task)

    def _begin_call(self, at: int, *, asleep: bool) -> None:
        self.carrier.hangs = asleep
        self.do(self.world.at(at).turn("calls"))
        self.carrier.hangs = False

    def _post(self, pick: int) -> Post:
        posts = list(self.carrier.waiting.values())
        return posts[pick % len(posts)]

    @precondition(lambda self: self.carrier.waiting)
    @rule(pick=PICK)
    def carrier_takes(self, pick: int) -> None:
        """Let the carrier take a fax that it does not answer yet."""
        self.world.take(self._post(pick))

    @precondition(lambda self: self.carrier.waiting)
    @rule(pick=PICK, answer=st.sampled_from(ANSWERS))
    def carrier_answers(self, pick: int, answer: str) -> None:
        """Answer a POST, or lose the answer."""
        self.world.answer(self._post(pick), answer)

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
    @rule(pick=PICK, event=PICK, at=AT)
    def webhook(self, pick: int, event: int, at: int) -> None:
        """Let a webhook arrive: early, late, once more, in any order."""
        events = self._entry(pick).events
        self.do(self.world.at(at).store.webhook(events[-1 - event % len(events)]))

    @rule(
        what=st.sampled_from(("answers", "answers", "silent", "lag 0", "lag 60", "lag 300", "contradiction",
                              "set forth", "set back", "sweep")),
        pick=PICK,
    )  # fmt: skip
    def world_changes(self, what: str, pick: int) -> None:
        """Let the carrier be away, lag or contradict itself; set our clock."""
        kind, _, value = what.partition(" ")
        match kind:
            case "answers" | "silent":
                self.carrier.answers = kind == "answers"
            case "lag":
                self.carrier.lag = float(value)
            case "contradiction" if self.carrier.ledger and self._entry(pick).stage is Stage.FAILED:
                self.carrier.reach(self._entry(pick), Stage.DELIVERED)
            case "set":
                self._set_clock(2 * HOUR if value == "forth" else -2 * HOUR)
            case "sweep":
                self.do(self.world.at(pick).store.sweep_parked())

    def _set_clock(self, seconds: float) -> None:
        """Set our clock forth or back: at most it is two hours wrong."""
        clock = self.world.clock
        if abs(self.carrier.ahead(clock.now) + seconds) <= 2 * HOUR:
            clock.now += seconds

    # --- people ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.past.accepted)
    @rule(pick=PICK, wish=st.sampled_from(WISHES))
    def operator(self, pick: int, wish: OperatorEvent) -> None:
        """Wish something of a fax, as an operator."""
        fax_id = self.past.accepted[-1 - pick % len(self.past.accepted)]
        [held_for] = self.world.look("SELECT held_for FROM faxes WHERE id = :id", id=fax_id)[0]
        if wish == RetryAsked(True) or (held_for == HeldFor.RESTORED and wish != HoldAsked()):
            self.past.risked.add(fax_id)
        try:
            self.do(self.world.at(pick).store.apply(fax_id, wish))
        except Misfit:
            return

    @rule(
        what=st.sampled_from((*["release"] * 5, "hold", "set aside", "mail out", "mail lost")),
        pick=PICK,
    )  # fmt: skip
    def desk(self, what: str, pick: int) -> None:
        """Stop the queue or let it go on, set a fax aside, hand the outbox over."""
        store = self.world.at(pick).store
        match what:
            case "release":
                with suppress(StillRestoring):
                    self.do(store.release_all())
            case "hold":
                self.do(store.hold_all())
            case "set aside" if self.past.accepted:
                why = HeldFor.HARMFUL if pick % 2 else HeldFor.RESTORED
                fax_id = self.past.accepted[-1 - pick % len(self.past.accepted)]
                self.do(store.apply(fax_id, SetAside(why, "for a test")))
            case "mail out":
                self.do(store.mail_out())
            case "mail lost":  # the relay took them, and the gateway forgot
                self.do(store.claim_notices(10))

    # --- disasters -------------------------------------------------------------------------------------

    @rule(
        what=st.sampled_from(
            (*["crash"] * 6, *["crash while asking", "backup", "stays away"] * 2, "restore")
        ),
        at=AT,
    )
    def disaster(self, what: str, at: int) -> None:
        """Kill a gateway and start it again, perhaps on a backup, or leave the work to the other."""
        if what == "backup":
            self.world.backup()
        elif what == "restore":
            self.world.restore()
        elif what != "stays away":
            if what == "crash while asking":
                self.carrier.hangs = True
                self.do(self.world.at(at).turn("questions"))
                self.carrier.hangs = False
            self.do(self.world.crash(self.world.at(at)))
            self.do(self.world.start())
        elif len(self.world.gateways) > 1:
            self.do(self.world.crash(self.world.at(at)))

    @precondition(lambda self: self.world.together and len(self.world.gateways) < 2)
    @rule()
    def second_gateway(self) -> None:
        """Let a second gateway join the one that runs."""
        self.do(self.world.start())


def test_random_lives_keep_the_promises(tmp_path: Path) -> None:
    """Whatever happens in whatever order, nothing accepted is lost, sent twice or left without its answer."""
    lives = settings(
        max_examples=int(LIVES or 32), stateful_step_count=60, deadline=None, derandomize=not LIVES,
        database=None, suppress_health_check=list(HealthCheck), print_blob=True,
    )  # fmt: skip
    made: Any = functools.partial(Lives, tmp_path)  # it is only called
    run_state_machine_as_test(made, settings=lives)
