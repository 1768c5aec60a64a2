"""What is due: calls, questions to the carrier, the passing of time.

In charge of: taking due work from the store, doing it at the carrier, and recording what came of it.
Three loops: `run_calls`, `run_questions`, `run_caretaker`.

Promises: nothing is posted whose intent is not on the disk; before a second call the carrier is asked about
the first (rule 5), and about a doubt closed as absent (rule 3). The carrier's id of a POST is recorded
whatever it takes. Each loop outlives every fault of one fax.

Fails: a fault after the intent was written leads to doubt, never to another call. When the store is away,
the loops wait for it.
"""

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import Awaitable, Callable

from gateway.bell import Wake
from gateway.carrier import (
    Call,
    Carrier,
    InDoubt,
    NotKnown,
    Refused,
    Unavailable,
)
from gateway.clocks import Steadiness, elapsed
from gateway.database import StoreError
from gateway.doubt import (
    CLOCK_SKEW,
    WRONG_ZONE,
    Bind,
    NoProof,
    ProvedAbsent,
    Sighting,
    Undecided,
    Verdict,
    alike,
    judge,
)
from gateway.log import get_logger
from gateway.metrics import Metrics
from gateway.records import (
    Absent,
    Attempt,
    Blame,
    CancelSent,
    Doubted,
    End,
    Event,
    Fax,
    Gone,
    NotTaken,
    Rejected,
    Reported,
    Rules,
    Stage,
    State,
    Taken,
    Unanswered,
    Unprovable,
    Withdrawn,
)
from gateway.schedule import last_check, stuck_limit
from gateway.store import Store
from gateway.store_restore import Restoring
from gateway.store_work import CallSettings, Evidence

QUESTIONS_AT_ONCE = 4
_LOOK_EVERY = 1.0  # seconds: due times need no bell
_STORE_AWAY = 2.0  # seconds until a loop tries the store again
_SWEEP_EVERY = 15.0
_RESTORE_EVERY = 30.0  # seconds until the carrier is asked again what a restored backup does not know
_RESTORE_PATIENCE = 3600.0  # seconds until people are left to find out about every fax instead
_STILL_OPEN = 120.0  # seconds until a retry looks again at a call that should have ended

log = get_logger()


class Dispatcher:
    """The loops over one store and one carrier."""

    def __init__(
        self,
        store: Store,
        carrier: Carrier,
        *,
        settings: CallSettings,
        rules: Rules,
        metrics: Metrics,
        keep_documents: float,
        keep_records: float,
        longest_post: float,
    ) -> None:
        """`longest_post`: seconds after which a POST that a gateway began within its lease has ended."""
        self._store = store
        self._carrier = carrier
        self._settings = settings
        self._rules = rules
        self._metrics = metrics
        self._keep = (keep_documents, keep_records)
        self._longest_call = settings.lease + longest_post
        self._steadiness = Steadiness()
        self._calls: set[asyncio.Task[None]] = set()
        self._answers_due: set[str] = set()  # attempts whose POST is under way in this process
        self._claiming = asyncio.Lock()  # from the look at `_stopping` until the call is in `_calls`
        self._stopping = False
        self._begun = time.monotonic()

    # --- loops --------------------------------------------------------------------------------------------

    async def run_calls(self, wake: Wake) -> None:
        """Call what is due, as many at a time as there are channels, until cancelled."""
        await self._loop("calls", wake, self._begin_call)

    async def run_questions(self, wake: Wake) -> None:
        """Ask the carrier about silent calls and doubts, until cancelled."""
        await self._loop("questions", wake, self._ask_some)

    async def run_caretaker(self, wake: Wake) -> None:
        """Let time happen: deadlines, lapsed claims, parked events, purge; until cancelled."""
        swept = purged = time.monotonic()
        purge_every = max(1.0, min(600.0, self._keep[0] / 4))

        restored = -math.inf  # when the carrier was last asked what a restored backup does not know

        async def care() -> bool:
            nonlocal swept, purged, restored
            if time.monotonic() - restored > _RESTORE_EVERY:
                restored = math.inf if await self._end_restore() else time.monotonic()
            more = bool(await self._store.pass_time())
            if time.monotonic() - swept > _SWEEP_EVERY:
                swept = time.monotonic()
                await self._store.sweep_parked()
                self._steadiness.see(await self._store.now())
            if time.monotonic() - purged > purge_every:
                gone = await self._store.purge(*self._keep)
                if gone:  # in steps: a turn shall not last
                    log.info("purged", gone=gone)
                    return True
                await self._store.give_space_back()
                purged = time.monotonic()
            return more

        await self._loop("caretaker", wake, care)

    async def _end_restore(self) -> bool:
        """If the database is a restored backup, find out what was sent since; return whether that is done."""
        restoring = await self._store.restoring()
        if restoring is None:
            return True
        try:
            sent = await self._sent_since(restoring)
            sent = await self._sent_since(restoring)  # now that the answer told the carrier's time
        except Unavailable as error:
            log.warning("restore_checked", error=error.cause)
            if time.monotonic() - self._begun < _RESTORE_PATIENCE:
                return False
            sent = None
        held = await self._store.end_restore(sent, restoring.control)
        log.warning("restore_checked", listed=None if sent is None else len(sent), held=held)
        return True

    async def _sent_since(self, restoring: Restoring) -> list[Sighting]:
        sent = []
        for sender in {self._settings.from_number, *restoring.senders}:
            since = restoring.since - self._carrier.ahead(restoring.now) - CLOCK_SKEW
            sent += await self._carrier.sent_since(sender, since)
        return sent

    async def drain(self, grace: float) -> None:
        """Begin no more calls; let open POSTs finish for `grace` seconds. The rest stays to be doubted."""
        self._stopping = True
        async with self._claiming:  # an intent may be about to be written: its call is the last to begin
            pass
        if self._calls:
            await asyncio.wait(self._calls, timeout=grace)
        for task in self._calls:
            task.cancel()

    async def _loop(self, name: str, wake: Wake, turn: Callable[[], Awaitable[bool]]) -> None:
        """Turn for ever; at once again when a turn says that there is more to do."""
        while True:
            try:
                pause = 0.0 if await turn() else _LOOK_EVERY
            except StoreError as error:
                log.warning("store_failed", verb=name, error=str(error))
                pause = _STORE_AWAY
            except Exception as error:  # outermost: no fax may stop the loop
                log.exception("task_failed", task=name, error=repr(error))
                pause = _STORE_AWAY
            await wake.wait(pause)

    # --- calls --------------------------------------------------------------------------------------------

    async def _begin_call(self) -> bool:
        """Begin the next call; False when there is none to begin."""
        async with self._claiming:
            begun = elapsed()  # before the claim: the lease counts from its commit
            fax = None if self._stopping else await self._store.claim_call(self._settings)
            if fax is None or fax.last is None:
                return False
            task = asyncio.create_task(self._call(fax, fax.last, begun), name=f"call {fax.id}")
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
            attempt_id = fax.last.id
            self._answers_due.add(attempt_id)
            task.add_done_callback(lambda _: self._answers_due.discard(attempt_id))
            return True

    async def _call(self, fax: Fax, attempt: Attempt, begun: float) -> None:
        def may_begin() -> bool:
            """Rule 10: whoever is past the lease may not begin a POST."""
            return elapsed() - begun < self._settings.lease

        try:
            events = await self._look_before(fax, attempt)
            if not events:
                log.info("call_begun", fax=fax.id, attempt=attempt.ordinal, to=fax.number, pages=fax.pages)
                events = [await self._post(fax, attempt, may_begin)]
        except StoreError as error:  # before the POST, which needs the document
            log.warning("store_failed", verb="call", fax=fax.id, error=str(error))
            events = [Withdrawn(attempt.id, "the store did not answer", 0.0)]
        except Exception as error:  # outermost: after the intent, the unknown is a doubt
            log.exception("task_failed", task="call", fax=fax.id, error=repr(error))
            events = [Doubted(attempt.id, "unforeseen fault")]
        for event in events:
            await self._record(fax.id, event)

    async def _look_before(self, fax: Fax, attempt: Attempt) -> list[Event]:
        """Ask about the earlier attempts; return what keeps this one from being posted."""
        for earlier in fax.attempts[:-1]:
            try:
                found = await self._look_at(fax, earlier)
            except Unavailable as error:
                # The trouble may be this fax's own: the others find out about the carrier by themselves.
                wait = max(_STILL_OPEN, error.retry_after or 0.0)
                log.warning("call_withheld", fax=fax.id, attempt=attempt.ordinal, cause=error.cause)
                return [Withdrawn(attempt.id, error.cause, wait)]
            if found is not None:
                log.info("call_withheld", fax=fax.id, attempt=attempt.ordinal, found=type(found).__name__)
                return [Withdrawn(attempt.id, "an earlier attempt", _STILL_OPEN), found]
        return []

    async def _look_at(self, fax: Fax, earlier: Attempt) -> Event | None:
        """Ask the carrier about an attempt that ended; None when it permits another. Raises Unavailable."""
        if earlier.end is End.FAILED and earlier.carrier_id is not None:
            try:
                report = await self._carrier.status(earlier.carrier_id)
            except NotKnown:
                return Gone(earlier.id)
            return None if report.stage is Stage.FAILED else Reported(earlier.id, report)
        if earlier.end is End.ABSENT:
            match await self._judge(fax, earlier):
                case Bind(carrier_id):
                    return Taken(earlier.id, carrier_id)
                case NoProof(cause):
                    return Unprovable(earlier.id, cause)
                case Undecided():  # what was proved once cannot be seen now: that permits nothing
                    raise Unavailable("the carrier's list is behind")
        return None

    async def _post(self, fax: Fax, attempt: Attempt, may_begin: Callable[[], bool]) -> Event:
        document = await self._document(fax)
        if document is None:
            return Rejected(attempt.id, Blame.FAX, "the stored document is damaged", "document_refused")
        call = Call(fax.number, attempt.from_number, attempt.quality, attempt.t38, document)
        begun = time.monotonic()
        try:
            carrier_id = await self._carrier.send(call, may_begin)
        except Refused as error:
            self._metrics.call("refused")
            log.warning("call_refused", fax=fax.id, attempt=attempt.ordinal, cause=error.cause)
            return Rejected(attempt.id, error.blame, error.cause, error.reason)
        except Unavailable as error:
            self._metrics.call("unavailable")
            log.warning("call_unavailable", fax=fax.id, attempt=attempt.ordinal, cause=error.cause)
            return NotTaken(attempt.id, error.cause, error.retry_after)
        except InDoubt as error:
            self._metrics.call("in_doubt")
            log.warning("call_in_doubt", fax=fax.id, attempt=attempt.ordinal, cause=error.cause)
            return Doubted(attempt.id, error.cause)
        finally:
            self._metrics.carrier("submit", time.monotonic() - begun)
        self._metrics.call("taken")
        seconds = round(time.monotonic() - begun, 3)
        log.info("call_taken", fax=fax.id, attempt=attempt.ordinal, carrier_id=carrier_id, seconds=seconds)
        return Taken(attempt.id, carrier_id)

    async def _document(self, fax: Fax) -> bytes | None:
        """Return the document as it was checked; None when the stored bytes are others."""
        paper = await self._store.paper_of(fax.mail_id)
        if paper is None:
            return None
        document = await self._store.document(paper[0])
        if document is None or hashlib.sha256(document).hexdigest() != paper[1]:
            return None
        return document

    async def _record(self, fax_id: str, event: Event) -> None:
        """Write down what happened; a carrier's id is our only proof, so wait for the store if need be."""
        while True:
            try:
                await self._store.apply(fax_id, event)
            except StoreError as error:
                log.warning("store_failed", verb=type(event).__name__, fax=fax_id, error=str(error))
                await asyncio.sleep(_STORE_AWAY)
            else:
                return

    # --- questions ----------------------------------------------------------------------------------------

    async def _ask_some(self) -> bool:
        faxes = await self._store.claim_questions(QUESTIONS_AT_ONCE)
        await asyncio.gather(*(self._ask(fax) for fax in faxes))
        return bool(faxes)

    async def _ask(self, fax: Fax) -> None:
        """Ask about one fax; its lease keeps it from being asked about again at once when that fails."""
        try:
            await self._ask_carrier(fax)
            await self._store.asked(fax.id)
        except asyncio.CancelledError:  # told to stop: it was not this fax that ended the gateway
            with contextlib.suppress(StoreError):
                await self._store.asked(fax.id)
            raise
        except StoreError as error:
            log.warning("store_failed", verb="question", fax=fax.id, error=str(error))
        except Exception as error:  # outermost: the next fax is asked about all the same
            log.exception("task_failed", task="question", fax=fax.id, error=repr(error))

    async def _ask_carrier(self, fax: Fax) -> None:
        try:
            if fax.state is State.IN_DOUBT:
                await self._check_doubt(fax, fax.open_attempts[-1])
                return
            for attempt in fax.open_attempts:
                if attempt.carrier_id is not None:
                    await self._store.apply(fax.id, await self._question(fax, attempt, attempt.carrier_id))
        except Unavailable as error:
            log.warning("carrier_asked", fax=fax.id, error=error.cause)

    async def _question(self, fax: Fax, attempt: Attempt, carrier_id: str) -> Event:
        try:
            if attempt.cancel_wanted:
                taken = await self._carrier.cancel(carrier_id)
                log.info(
                    "carrier_asked",
                    fax=fax.id,
                    carrier_id=carrier_id,
                    cancel="asked" if taken else "too late",
                )
                return CancelSent(attempt.id)
            begun = time.monotonic()
            report = await self._carrier.status(carrier_id)
        except NotKnown:
            log.warning("carrier_asked", fax=fax.id, carrier_id=carrier_id, status="not known")
            return Gone(attempt.id)
        self._metrics.carrier("ask", time.monotonic() - begun)
        log.info("carrier_asked", fax=fax.id, carrier_id=carrier_id, status=report.stage.name.lower())
        return Reported(attempt.id, report)

    async def _check_doubt(self, fax: Fax, attempt: Attempt) -> None:
        if attempt.id in self._answers_due:
            # The clock was set: by it the claim has lapsed, while the POST may yet reach the carrier. No list
            # proves anything before that has ended.
            await self._store.apply(fax.id, Unanswered(attempt.id), version=fax.version)
            return
        verdict = await self._judge(fax, attempt)
        log.info("doubt_checked", fax=fax.id, attempt=attempt.ordinal, verdict=type(verdict).__name__)
        event: Event = Unanswered(attempt.id)
        match verdict:
            case Bind(carrier_id):
                event = Taken(attempt.id, carrier_id)
            case ProvedAbsent():
                event = Absent(attempt.id)
            case NoProof(cause):
                event = Unprovable(attempt.id, cause)
        # The verdict rests on the fax as it was: whoever was faster wins.
        await self._store.apply(fax.id, event, version=fax.version)

    async def _judge(self, fax: Fax, attempt: Attempt) -> Verdict:
        known = await self._store.evidence(fax.number, attempt.from_number)
        steady = self._steadiness.see(known.now)
        overdue = known.now - attempt.started_at > stuck_limit(fax, self._rules)
        last = not attempt.open or last_check(attempt, known.now, self._rules)
        listed = await self._list(fax.number, attempt, known, last=last)
        like_it = [row for row in (*(listed or ()), *known.told) if alike(attempt, fax.number, row)]
        verdict = judge(
            attempt,
            fax.number,
            listed=listed,
            told=known.told,
            bound=await self._store.bound_ids([row.carrier_id for row in like_it]),
            control=known.control,
            ahead=self._carrier.ahead(known.now),
            last=last,
            overdue=overdue,
        )
        if isinstance(verdict, Bind) and await self._store.has_rival(fax, attempt):
            return NoProof("another fax to the number is in doubt too") if overdue else Undecided()
        unsteady = self._store.shared and steady < self._longest_call
        if isinstance(verdict, ProvedAbsent) and attempt.open and unsteady:
            return Undecided()  # another gateway's POST may still be on its way
        return verdict

    async def _list(
        self, number: str, attempt: Attempt, known: Evidence, *, last: bool
    ) -> list[Sighting] | None:
        """Ask what was sent since the attempt and our control; None when an open doubt gets no answer."""
        begun = time.monotonic()
        since = min(attempt.started_at, known.control_at) - CLOCK_SKEW
        try:
            rows = await self._carrier.sent_since(attempt.from_number, since - self._carrier.ahead(known.now))
            if last:  # what a wrong clock hides; only to the number, for a day may have many pages
                since = attempt.started_at - WRONG_ZONE - self._carrier.ahead(known.now)
                rows += await self._carrier.sent_since(attempt.from_number, since, number)
        except Unavailable:
            if not attempt.open:  # before a new POST an unanswered question is no answer
                raise
            return None
        else:
            return rows
        finally:
            self._metrics.carrier("list", time.monotonic() - begun)
