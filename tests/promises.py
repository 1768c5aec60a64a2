"""What must hold in the random lives of `test_store_stateful`: after each step, and when all is calm again.

The promises are looked up in the database and in the carrier's ledger, not asked of the gateways.
"""

from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from faxes import DAY, HOUR
from hypothesis.stateful import RuleBasedStateMachine, invariant
from lives import World

from gateway.records import CancelAsked, Stage, State
from gateway.store_brakes import StillRestoring

FINAL = {"delivered", "failed", "cancelled"}


class Promises(RuleBasedStateMachine):
    """A world without anything that happens: the invariants, and the end."""

    def __init__(self, template: Path) -> None:
        super().__init__()
        self.world = World(template)
        self.carrier, self.past, self.do = self.world.carrier, self.world.past, self.world.do

    # --- what must hold --------------------------------------------------------------------------------

    @invariant()
    def every_accepted_fax_is_there_and_waits_for_something(self) -> None:
        """Nothing lost: what was answered 250 has ended for good, or has a time or a cause to wait for."""
        rows = self.world.look("SELECT id, state, due_at, held_for, ended_at FROM faxes")
        assert sorted(self.past.accepted) == sorted(row.id for row in rows)
        for row in rows:
            assert (row.state in FINAL) == (row.ended_at is not None)
            assert (row.state == State.HELD) == (row.held_for is not None)
            assert self.past.ended.get(row.id, row.state) == row.state, "an ended fax has another state"
            assert row.due_at <= self.world.clock.now + DAY + 4 * HOUR
            if row.state in FINAL:
                self.past.ended[row.id] = row.state

    @invariant()
    def one_fax_of_a_mail(self) -> None:
        """No mail twice: a mail became one fax to each number, however often it came within a day."""
        rows = self.world.look(
            "SELECT message_id, number, accepted_at FROM faxes JOIN mails ON mails.id = mail_id"
            " WHERE state NOT IN ('failed', 'cancelled') ORDER BY message_id, number, accepted_at"
        )
        for row, later in pairwise(rows):
            same = row[:2] == later[:2]
            assert not same or later.accepted_at - row.accepted_at >= DAY, "a mail became two faxes"

    @invariant()
    def one_open_call(self) -> None:
        """One call at a time: no fax has two calls of unknown end, no number two calls at a time."""
        rows = self.world.look("SELECT fax_id, number, blocking FROM attempts WHERE open")
        faxes = [row.fax_id for row in rows if row.fax_id not in self.past.risked]
        assert len(faxes) == len(set(faxes))
        numbers = [row.number for row in rows if row.blocking]
        assert len(numbers) == len(set(numbers))

    @invariant()
    def calls_are_told_apart(self) -> None:
        """No call twice: the carrier took each attempt at most once, and it is bound to the call it made."""
        made = [entry.attempt_id for entry in self.carrier.ledger.values()]
        assert len(made) == len(set(made))
        if self.past.restored:  # the backup does not know who made what came after it
            return
        for row in self.world.look(
            "SELECT id, fax_id, carrier_id FROM attempts WHERE carrier_id IS NOT NULL"
        ):
            entry = self.carrier.ledger[row.carrier_id]
            assert entry.fax_id == row.fax_id, "bound to another fax's call"
            # Of two calls that an operator wanted in spite of a doubt, nobody knows which is which.
            assert entry.attempt_id == row.id or row.fax_id in self.past.risked, "bound to another call"

    @invariant()
    def one_final_notice(self) -> None:
        """Told once: a fax has exactly one final notice once it has ended, and none before."""
        told = self.world.look(
            "SELECT fax_id, notice FROM outbox WHERE notice IN ('delivered', 'failed', 'cancelled')"
        )
        assert sorted(tuple(row) for row in told) == sorted(self.past.ended.items())

    @invariant()
    def delivered_is_true(self) -> None:
        """Nothing untrue: who is told that a fax was delivered has had it delivered."""
        arrived = {entry.fax_id for entry in self.carrier.ledger.values() if entry.stage is Stage.DELIVERED}
        if not self.past.restored:
            ended = self.past.ended.items()
            assert {fax_id for fax_id, state in ended if state == State.DELIVERED} <= arrived

    @invariant()
    def nothing_unforeseen(self) -> None:
        """Nothing unforeseen: no loop met a fault that nobody thought of."""
        assert [line for line in self.world.log if line["event"] == "task_failed"] == []

    # --- the end ---------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Let the world become calm: then every fax comes to its end, none waits for ever."""
        try:
            self._come_to_the_end()
        finally:
            self.world.close()

    def _come_to_the_end(self) -> None:
        self.carrier.answers, self.carrier.lag = True, 0.0
        for hour in range(40):
            gateway = self.world.at(hour)
            for task in list(self.carrier.hanging):
                self.world.wake(task)
            while self.carrier.waiting:
                self.world.answer(next(iter(self.carrier.waiting.values())), "taken")
            for entry in self.carrier.ledger.values():
                if not entry.ended:
                    self.carrier.reach(entry, Stage.DELIVERED)
            with suppress(StillRestoring):  # until the caretaker has asked the carrier
                self.do(gateway.store.release_all())
            for name in ("caretaker", "questions", "calls", "calls"):
                self.do(gateway.turn(name))
            for fax_id in self.past.waiting:
                [state] = self.world.look("SELECT state FROM faxes WHERE id = :id", id=fax_id)[0]
                if state == State.HELD:
                    self.do(gateway.store.apply(fax_id, CancelAsked()))
            self.every_accepted_fax_is_there_and_waits_for_something()
            if not self.past.waiting and not self.carrier.waiting:
                break
            self.world.time_passes(HOUR)
        assert not self.past.waiting, "a fax waits for ever"
        self.one_final_notice()
