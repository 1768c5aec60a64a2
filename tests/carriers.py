"""A carrier in memory that does only what a test decides, and keeps the truth about every call.

It answers questions at once, unless it hangs; a POST stays open until the test says what becomes of it. Its
clock is the true time, from which the gateways' may differ.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from faxes import APPLICATION, FROM, NOW

from gateway.carrier import Call, CarrierEvent, NotKnown, Unavailable
from gateway.doubt import Sighting
from gateway.records import Report, Stage

Task = asyncio.Task[Any]


@dataclass
class Entry:
    """One fax that the carrier took."""

    carrier_id: str
    attempt_id: str
    fax_id: str
    number: str
    at: float  # true time
    stage: Stage = Stage.TAKEN
    reason: str | None = None
    events: list[CarrierEvent] = field(default_factory=list)  # what it tells by webhook
    contradicted: bool = False  # reported failed, then delivered

    @property
    def ended(self) -> bool:
        """Whether the call is over."""
        return self.stage in {Stage.DELIVERED, Stage.FAILED}


@dataclass
class Post:
    """A POST whose answer is missing as yet."""

    attempt_id: str
    fax_id: str
    number: str
    at: float  # true time
    task: Task  # of the gateway's that waits for the answer
    answer: asyncio.Future[str]
    entry: Entry | None = None  # once it was taken


class MemoryCarrier:
    """What `gateway.carrier.Carrier` asks for.

    `newest` names the newest attempt of a fax, `look` sees each POST that arrives: its attempt and its fax.
    """

    def __init__(self, newest: Callable[[str], str], look: Callable[[str, str], None]) -> None:
        self.now = NOW
        self.ledger: dict[str, Entry] = {}
        self.posted: list[str] = []  # the attempts, in the order of their POSTs
        self.waiting: dict[str, Post] = {}  # by attempt
        self.answers = True
        self.hangs = False  # what is asked now gets its answer only when the test says so
        self.hanging: dict[Task, asyncio.Event] = {}  # to set, for whoever waits
        self.lag = 0.0  # seconds until the list shows a fax
        self.still = asyncio.Event()  # a request has come that waits for the test
        self._newest = newest
        self._look = look
        self._callers: dict[Task, str] = {}  # the attempt that each call is about, its first word to us tells

    # --- what the gateway asks ---------------------------------------------------------------------

    async def send(self, call: Call, may_begin: Callable[[], bool]) -> str:
        """Wait for the test to decide."""
        task, fax_id, attempt_id = self._caller()
        await self._hang(task)  # the machine may stand still just then
        if not may_begin():
            raise Unavailable("past the lease")
        self._look(attempt_id, fax_id)
        self.posted.append(attempt_id)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.waiting[attempt_id] = Post(attempt_id, fax_id, call.number, self.now, task, answer)
        self.still.set()
        return await answer

    async def status(self, carrier_id: str) -> Report:
        """Tell how far a call is."""
        await self._question()
        if carrier_id not in self.ledger:
            raise NotKnown("HTTP 404")
        entry = self.ledger[carrier_id]
        return Report(entry.stage, asked=True, reason=entry.reason)

    async def sent_since(
        self, from_number: str, since: float, to_number: str | None = None
    ) -> list[Sighting]:
        """List what is old enough to be seen."""
        await self._question()
        assert from_number == FROM
        return [
            Sighting(entry.carrier_id, entry.number, FROM, APPLICATION, entry.at)
            for entry in self.ledger.values()
            if since <= entry.at <= self.now - self.lag and to_number in {None, entry.number}
        ]

    def ahead(self, now: float) -> float:
        """Compare the clocks."""
        return now - self.now

    async def cancel(self, carrier_id: str) -> bool:
        """End a call that has not ended."""
        await self._question()
        if carrier_id not in self.ledger:
            raise NotKnown("HTTP 404")
        entry = self.ledger[carrier_id]
        if entry.ended:
            return False
        self.reach(entry, Stage.FAILED, "sender_canceled")
        return True

    def read_event(self, headers: Mapping[str, str], body: bytes, now: float) -> CarrierEvent:
        """Nothing: there is no webhook door here."""
        raise AssertionError(headers, body, now)

    async def _question(self) -> None:
        task, *_ = self._caller()
        await self._hang(task)
        if not self.answers:
            raise Unavailable("HTTP 503")

    async def _hang(self, task: Task) -> None:
        if not self.hangs:
            return
        self.hanging[task] = asyncio.Event()
        self.still.set()
        try:
            await self.hanging[task].wait()
        finally:
            self.hanging.pop(task, None)

    def _caller(self) -> tuple[Task, str, str]:
        """Return the gateway's task that asks, and the fax and the attempt that it is calling."""
        task = asyncio.current_task()
        assert task is not None
        fax_id = task.get_name().removeprefix("call ")
        if task not in self._callers and fax_id != task.get_name():
            self._callers[task] = self._newest(fax_id)
        return task, fax_id, self._callers.get(task, "")

    def rests(self, task: Task) -> bool:
        """Whether a gateway's task waits for the test."""
        return task in self.hanging or any(post.task is task for post in self.waiting.values())

    # --- what the test decides ---------------------------------------------------------------------

    def take(self, post: Post) -> Entry:
        """Take the fax; the answer is another matter."""
        carrier_id = f"c{len(self.ledger) + 1}"
        entry = Entry(carrier_id, post.attempt_id, post.fax_id, post.number, self.now)
        self.ledger[carrier_id] = post.entry = entry
        self._tell(entry)
        return entry

    def reach(self, entry: Entry, stage: Stage, reason: str | None = None) -> None:
        """Let the call come so far."""
        entry.contradicted |= entry.stage is Stage.FAILED and stage is Stage.DELIVERED
        entry.stage, entry.reason = stage, reason
        self._tell(entry)

    def _tell(self, entry: Entry) -> None:
        sighting = Sighting(entry.carrier_id, entry.number, FROM, APPLICATION, self.now)
        report = Report(entry.stage, asked=False, reason=entry.reason)
        event_id = f"e-{entry.carrier_id}-{len(entry.events)}"
        entry.events.append(CarrierEvent(event_id, "fax.event", sighting, outbound=True, report=report))
