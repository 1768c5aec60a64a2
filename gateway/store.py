"""The store: everything the gateway must not forget, as verbs.

In charge of: one method for each thing the doors and loops may do with what is stored; each is one unit of
work in `database`, told in `store_intake` (mail in), `store_work` (calls, questions, time), `store_events`
(the carrier's), `store_apply` (the one door through which a fax changes), `store_brakes` (what stops the
queue), `store_outbox` (mail out), `store_desk` (operators, purge) and `store_restore`.

Promises: a verb that returned is on the disk. Of every change of a fax, alert and brake `observe` hears after
the commit.

Fails: `StoreFull` and `StoreUnavailable`; verbs about one fax also `UnknownFax`, `Misfit` or `Conflict`, and
`release_all` also `StillRestoring`.
"""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import BinaryIO, Concatenate, ParamSpec, TypeVar

from sqlalchemy.engine import Connection

from gateway import (
    store_apply,
    store_brakes,
    store_desk,
    store_events,
    store_intake,
    store_outbox,
    store_restore,
    store_work,
)
from gateway.carrier import CarrierEvent
from gateway.database import Database
from gateway.doubt import Sighting
from gateway.records import Attempt, Event, Fax, OutboxEntry, Rules
from gateway.store_events import Fate
from gateway.store_intake import CHUNK, Accepted, Submission
from gateway.store_restore import Restoring
from gateway.store_unit import News, Unit
from gateway.store_work import CallSettings, Evidence

P = ParamSpec("P")
T = TypeVar("T")


_PIECES_AT_ONCE = 4  # as many as SQLite's writer takes into one transaction (`sqlite.LARGE_LIMIT`)


def _next_pieces(file: BinaryIO) -> list[bytes]:
    """Read some more of a document; nothing at its end."""
    return [piece for _ in range(_PIECES_AT_ONCE) if (piece := file.read(CHUNK))]


class Store:
    """The verbs over one database."""

    def __init__(
        self,
        database: Database,
        *,
        rules: Rules,
        postmaster: str,
        observe: Callable[[News], None] | None = None,
        clock: Callable[[Connection], float] | None = None,
    ) -> None:
        """`observe` hears of every change after its commit; `clock` is the database's own unless given."""
        self._database = database
        self._clock = clock or database.clock
        self._rules = rules
        self._postmaster = postmaster
        self._observe = observe

    async def _do(self, verb: Callable[Concatenate[Unit, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        unit: list[Unit] = []

        def work(connection: Connection) -> T:
            # The time is taken when the work begins, not when it was asked for: leases count from it.
            unit.append(self._unit(connection))
            return verb(unit[-1], *args, **kwargs)

        def observe(done: asyncio.Future[T]) -> None:
            if self._observe is not None and done.exception() is None:
                for news in unit[-1].news:
                    self._observe(news)

        committed = self._database.write(work, large=verb is store_intake.add_chunk)
        committed.add_done_callback(observe)  # a cancelled caller's work happens all the same
        return await asyncio.shield(committed)

    @property
    def place(self) -> str:
        """Where it is, without a password, for the log."""
        return str(self._database.url)

    @property
    def shared(self) -> bool:
        """Whether other gateways may work on it at the same time."""
        return not self._database.alone

    async def now(self) -> float:
        """Return the time by the clock that all its times are of."""
        return await self._do(lambda unit: unit.now)

    def _unit(self, connection: Connection) -> Unit:
        return Unit(connection, self._clock(connection), self._rules, self._postmaster)

    # --- mail in -----------------------------------------------------------------------------------

    async def keep_document(self, file: BinaryIO) -> str:
        """Store a large document in short transactions; it stays invisible until `accept` names it.

        Of the file only a few pieces are in memory at a time. Raises also OSError.
        """
        document_id, position = str(uuid.uuid4()), 0
        while pieces := await asyncio.to_thread(_next_pieces, file):
            kept = [
                self._do(store_intake.add_chunk, document_id, place, piece)
                for place, piece in enumerate(pieces, position)
            ]
            await asyncio.gather(*kept)
            position += len(pieces)
        return document_id

    async def accept(self, submission: Submission, duplicate_window: float) -> Accepted:
        """Keep a mail and its faxes; say 250 after this."""
        return await self._do(store_intake.accept, submission, duplicate_window)

    # --- calls, questions, time --------------------------------------------------------------------

    async def claim_call(self, settings: CallSettings) -> Fax | None:
        """Write the intent for the next fax that may be called; None when there is none."""
        return await self._do(store_work.claim_call, settings)

    async def claim_questions(self, most: int) -> list[Fax]:
        """Return faxes that the carrier is to be asked about now."""
        return await self._do(store_work.claim_questions, most)

    async def asked(self, fax_id: str) -> None:
        """Note that a question came to an end, with or without an answer."""
        await self._do(store_work.asked, fax_id)

    async def evidence(self, number: str, from_number: str) -> Evidence:
        """Gather what is known about a doubt, before the carrier is asked."""
        return await self._do(store_work.evidence, number, from_number)

    async def has_rival(self, fax: Fax, attempt: Attempt) -> bool:
        """Tell whether what the carrier shows may be a call of another fax to the number, also in doubt."""
        return await self._do(store_work.has_rival, fax, attempt)

    async def bound_ids(self, carrier_ids: list[str]) -> frozenset[str]:
        """Return those of the carrier's ids that are attempts of ours."""
        return await self._do(store_work.bound_ids, carrier_ids)

    async def apply(self, fax_id: str, event: Event, *, version: int | None = None) -> Fax:
        """Let an event happen to a fax, if it is still at `version`; return the fax as it is now."""
        return await self._do(store_apply.apply, fax_id, event, version=version)

    async def remember_event(self, event: CarrierEvent) -> tuple[Fate, str | None]:
        """Keep a carrier's event; answer 200 after this."""
        return await self._do(store_events.remember_event, event)

    async def take_over(self, from_number: str) -> int:
        """After a start: doubt what the last process was about to send; return how many that were."""
        return await self._do(store_work.take_over, from_number, alone=self._database.alone)

    async def begin_restore(self) -> None:
        """Let nothing be called until the carrier was asked what happened since the backup."""
        await self._do(store_restore.begin_restore)

    async def restoring(self) -> Restoring | None:
        """Return what the carrier is to be asked about a restored database; None: no restore is under way."""
        return await self._do(store_restore.restoring)

    async def end_restore(self, sent: Sequence[Sighting] | None, control: str | None) -> int:
        """Set aside the faxes that may be among `sent`, or all; return how many."""
        return await self._do(store_restore.end_restore, sent, control)

    async def pass_time(self) -> int:
        """Let time happen to every fax whose time has come; return how many it changed."""
        return await self._do(store_work.pass_time)

    async def sweep_parked(self) -> int:
        """Look at parked events again; return how many found their fax."""
        return await self._do(store_events.sweep_parked)

    # --- mail out ----------------------------------------------------------------------------------

    async def claim_notices(self, most: int) -> list[OutboxEntry]:
        """Return mails that are due."""
        return await self._do(store_outbox.claim_notices, most)

    async def notice_sent(self, entry_id: str, fence: int) -> bool:
        """Record that the relay took it."""
        return await self._do(store_outbox.sent, entry_id, fence)

    async def notice_deferred(self, entry_id: str, fence: int, wait: float, why: str) -> bool:
        """Record that it is to be tried again in `wait` seconds."""
        return await self._do(store_outbox.deferred, entry_id, fence, wait, why)

    async def notice_given_up(self, entry_id: str, fence: int, why: str) -> bool:
        """Record that it will not be tried again."""
        return await self._do(store_outbox.given_up, entry_id, fence, why)

    # --- operators, monitors, purge ----------------------------------------------------------------

    async def renew(self, fax_id: str, *, even_if_twice: bool) -> Fax:
        """Send an ended fax again as a new one; raises NotRenewable."""
        return await self._do(store_intake.renew, fax_id, even_if_twice=even_if_twice)

    async def hold_all(self) -> None:
        """Call nothing until `release_all`."""
        await self._do(store_brakes.hold_all)

    async def release_all(self) -> None:
        """End the operator's hold; other holds are probed at once. Raises StillRestoring."""
        await self._do(store_brakes.release_all)

    async def list_faxes(self, states: tuple[str, ...], most: int) -> list[store_desk.Listed]:
        """Return faxes in these states, newest first; no states: all that have not ended."""
        return await self._database.read(partial(store_desk.list_faxes, states=states, most=most))

    async def fax_ids_of(self, name: str) -> list[str]:
        """Return the ids of the fax, or of all faxes of the mail, of that name."""
        return await self._database.read(partial(store_desk.fax_ids_of, name=name))

    async def show(self, fax_id: str) -> store_desk.Dossier:
        """Return everything about one fax; raises UnknownFax."""
        return await self._database.read(lambda connection: store_desk.show(self._unit(connection), fax_id))

    async def count(self) -> store_desk.Counts:
        """Count the queue."""
        return await self._database.read(lambda connection: store_desk.count(self._unit(connection)))

    async def document(self, document_id: str) -> bytes | None:
        """Return a document's bytes, None once purged."""
        return await self._database.read(partial(store_desk.document, document_id=document_id))

    async def paper_of(self, mail_id: str) -> tuple[str, str] | None:
        """Return id and SHA-256 of a mail's document, None once purged."""
        return await self._database.read(partial(store_desk.paper_of, mail_id=mail_id))

    async def purge(self, keep_documents: float, keep_records: float) -> int:
        """Throw away some of what is over; return how many documents and mails went, 0 when all is gone."""
        gone = await self._do(store_desk.purge_documents, keep_documents)
        return gone + await self._do(store_desk.purge_records, keep_records)

    async def give_space_back(self) -> None:
        """Return to the disk what purging freed."""
        await self._database.give_space_back()

    async def close(self) -> None:
        """Finish what was asked, then let go of the database."""
        await asyncio.get_running_loop().run_in_executor(None, self._database.close)
