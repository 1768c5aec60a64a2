"""The world of the random lives in `test_store_stateful`: one gateway, or two at one database, and a carrier.

The gateways are real stores and dispatchers, whose loops make a turn when the test says so. Two gateways know
of each other, as they do on PostgreSQL; yet all their work is in one file, one thing after another.
"""

import asyncio
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import sqlalchemy as sa
import structlog
from carriers import MemoryCarrier, Post, Task
from faxes import DAY, FROM, RULES
from stores import SETTINGS, Clock, TriedStore, empty_database

from gateway import dispatch
from gateway.carrier import InDoubt, Refused, Unavailable
from gateway.clocks import Steadiness
from gateway.dispatch import Dispatcher
from gateway.metrics import Metrics
from gateway.records import Blame, Stage

T = TypeVar("T")

LONGEST_POST = 290.0  # seconds of true time after which a POST reaches nobody
METRICS = Metrics()


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

    def __init__(self, url: str, clock: Clock, carrier: MemoryCarrier, *, alone: bool) -> None:
        self.store = TriedStore(url, clock=clock, serve=alone)
        self.store.database.alone = alone
        self._carrier = carrier
        self._dispatcher = Dispatcher(
            self.store, carrier, settings=SETTINGS, rules=RULES, metrics=METRICS, keep_documents=DAY,
            keep_records=365 * DAY, longest_post=LONGEST_POST,
        )  # fmt: skip
        self._dispatcher._steadiness = Steadiness(lambda: carrier.now)
        self._loops = {
            "calls": (self._dispatcher.run_calls, Turns()),
            "questions": (self._dispatcher.run_questions, Turns()),
            "caretaker": (self._dispatcher.run_caretaker, Turns()),
        }

    @property
    def calls(self) -> set[Task]:
        """The calls that it works on."""
        return self._dispatcher._calls

    async def turn(self, name: str) -> None:
        """Let a loop make one turn, as far as it goes without the test; calls go as far as their POST."""
        run, turns = self._loops[name]
        if turns.task is not None and not turns.over.is_set():
            return  # it waits for an answer
        self._carrier.still.clear()
        turns.begin(run)
        await self._any(turns.over)
        await self.come_to_rest()

    async def come_to_rest(self) -> None:
        """Let its calls go on until each waits for the test, or is over."""
        while moving := [call for call in self.calls if not self._carrier.rests(call)]:
            self._carrier.still.clear()
            await self._any(moving[0])

    async def _any(self, what: asyncio.Event | Task) -> None:
        waits = [asyncio.create_task(self._carrier.still.wait())]
        waits.append(asyncio.create_task(what.wait()) if isinstance(what, asyncio.Event) else what)
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            if wait is not what:
                wait.cancel()

    async def crash(self) -> None:
        """End everything that is under way, with its requests."""
        loops = {turns.task for _, turns in self._loops.values() if turns.task is not None}
        tasks = loops | self.calls
        for post in list(self._carrier.waiting.values()):
            if post.task in tasks:
                del self._carrier.waiting[post.attempt_id]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.store.close()


@dataclass(frozen=True)
class Sent:
    """A mail as the client has it, who may send it again."""

    to: tuple[str, ...]
    sender: str
    message_id: str


@dataclass
class Memory:
    """What the test knows of the past."""

    accepted: list[str] = field(default_factory=list)  # in their order: the ids are drawn by nobody
    backed_up: list[str] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    risked: set[str] = field(default_factory=set)  # an operator took it upon himself that it arrives twice
    ended: dict[str, str] = field(default_factory=dict)
    restored: bool = False

    @property
    def waiting(self) -> list[str]:
        """The faxes that have not ended."""
        return [fax_id for fax_id in self.accepted if fax_id not in self.ended]


class World:
    """The gateways with their database, the carrier, the clocks, and what the test remembers."""

    def __init__(self, template: Path) -> None:
        self._closing = ExitStack()
        # In memory: nobody pulls the plug here, and thousands of commits wait for no disk.
        memory = Path("/dev/shm")  # noqa: S108 -- the folder in it is a new one of our own
        base = memory if os.access(memory, os.W_OK) else template
        folder = Path(self._closing.enter_context(tempfile.TemporaryDirectory(dir=base)))
        self._url = self._closing.enter_context(empty_database("sqlite", folder, template))
        self._file, self._copy = folder / "gateway.db", folder / "backup.db"
        self.log = self._closing.enter_context(structlog.testing.capture_logs())
        self._runner = self._closing.enter_context(asyncio.Runner())
        self.clock = Clock()
        self.past = Memory()
        self.carrier = self.do(self._new_carrier())
        self._closing.enter_context(patch.object(dispatch, "elapsed", lambda: self.carrier.now))
        self.together = False
        self.gateways: list[Gateway] = []  # those that run: one at least

    def begin(self, *, together: bool) -> None:
        """Start one gateway, or two that share the work."""
        self.together = together
        for _ in range(1 + together):
            self.do(self.start())

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        """Let something happen to its end."""
        return self._runner.run(what)

    def at(self, place: int) -> Gateway:
        """Return one of the gateways that run."""
        return self.gateways[place % len(self.gateways)]

    def look(self, query: str, **values: Any) -> list[Any]:
        """Read the database from outside."""
        with self.gateways[0].store.database.engines[-1].connect() as connection:
            return list(connection.execute(sa.text(query), values))

    def time_passes(self, seconds: float) -> None:
        """Time passes for everybody."""
        self.carrier.now += seconds
        self.clock.now += seconds

    def close(self) -> None:
        """End everything."""
        for gateway in self.gateways:
            self.do(gateway.crash())
        self._closing.close()

    # --- the carrier -----------------------------------------------------------------------------------

    async def _new_carrier(self) -> MemoryCarrier:
        return MemoryCarrier(self._newest, self._see_post)

    def _newest(self, fax_id: str) -> str:
        query = "SELECT id FROM attempts WHERE fax_id = :fax_id ORDER BY ordinal DESC LIMIT 1"
        return str(self.look(query, fax_id=fax_id)[0].id)

    def _see_post(self, attempt_id: str, fax_id: str) -> None:
        """Rule 3, as a POST arrives."""
        assert attempt_id not in self.carrier.posted, "an attempt was posted twice"
        if fax_id in self.past.risked:
            return
        earlier = [entry for entry in self.carrier.ledger.values() if entry.fax_id == fax_id]
        assert all(entry.stage is Stage.FAILED for entry in earlier), "called again, though it may arrive"
        others = [post for post in self.carrier.waiting.values() if post.fax_id == fax_id]
        assert not any(self._arrives(post) for post in others), "called again, though a POST is on its way"

    def _arrives(self, post: Post) -> bool:
        """Whether a POST may yet reach the carrier. How long one may take matters only among several."""
        return post.entry is None and not (self.together and self.carrier.now >= post.at + LONGEST_POST)

    def take(self, post: Post) -> None:
        """Let the carrier take a fax, if its POST still arrives."""
        if self._arrives(post):
            self.carrier.take(post)

    def answer(self, post: Post, answer: str) -> None:
        """Answer a POST; what was taken is not refused any more, what did not arrive is not taken."""
        if answer in {"taken", "taken, lost"}:
            self.take(post)
        if post.entry is not None and answer == "taken":
            post.answer.set_result(post.entry.carrier_id)
        elif post.entry is not None or answer in {"lost", "taken", "taken, lost"}:
            post.answer.set_exception(InDoubt("timeout"))
        elif answer == "away":
            post.answer.set_exception(Unavailable("HTTP 503"))
        else:
            post.answer.set_exception(Refused("HTTP 403 10010", Blame(answer), "number_refused"))
        del self.carrier.waiting[post.attempt_id]
        self.do(self._over(post.task))

    async def _over(self, task: Task) -> None:
        await asyncio.wait({task})

    def wake(self, task: Task) -> None:
        """Let a call go on that waited for an answer of the carrier's."""
        self.carrier.hanging.pop(task).set()
        for gateway in self.gateways:
            self.do(gateway.come_to_rest())

    # --- disasters -------------------------------------------------------------------------------------

    async def start(self, *, held: bool = False) -> None:
        """Start a gateway."""
        gateway = Gateway(self._url, self.clock, self.carrier, alone=not self.together)
        self.gateways.append(gateway)
        if held:
            await gateway.store.begin_restore()
        await gateway.store.take_over(FROM)

    async def crash(self, gateway: Gateway) -> None:
        """Kill a gateway."""
        self.gateways.remove(gateway)
        await gateway.crash()

    def backup(self) -> None:
        """Make a backup beside the running gateways."""
        with sqlite3.connect(self._file) as source, sqlite3.connect(self._copy) as target:
            source.backup(target)
        target.close()
        source.close()
        self.past.backed_up = list(self.past.accepted)

    def restore(self) -> None:
        """Put the last backup, if there is one, in the database's place; what came in later is lost."""
        if not self._copy.exists():
            return
        for gateway in list(self.gateways):
            self.do(self.crash(gateway))
        for suffix in ("-wal", "-shm"):
            Path(f"{self._file}{suffix}").unlink(missing_ok=True)
        shutil.copy(self._copy, self._file)
        self.do(self.start(held=True))
        self.past.accepted = list(self.past.backed_up)
        self.past.restored, self.past.ended = True, {}
