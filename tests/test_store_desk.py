"""What operators and monitors see, and what is thrown away when nobody needs it any more."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import stores
from faxes import DAY, HOUR, NOW, NUMBER
from stores import POSTMASTER, SENDER, TriedStore, newest, numbers, reported

from gateway import store_desk
from gateway.records import Alert, CancelAsked, HoldAsked, Stage, State
from gateway.schema import metadata
from gateway.store_apply import UnknownFax

store = stores.store
sqlite_store = stores.sqlite_store

OTHER = "+442071234567"
SECRET = b"%PDF-1.7 the terms of the contract " * 2000


# --- what is seen ------------------------------------------------------------------------------------


async def test_the_list_shows_what_has_not_ended(store: TriedStore) -> None:
    """Without further wishes `list` shows the open faxes, newest first, and as many as asked for."""
    ended = await store.called()
    await store.webhook(reported("c1", Stage.DELIVERED))
    for number in numbers(2):
        await store.queued(number)
        store.clock.now += 1
    last = await store.queued(numbers(3)[2])
    assert [line.number for line in await store.list_faxes((), 2)] == numbers(3)[:0:-1]
    assert len(await store.list_faxes((), 9)) == 3
    first = (await store.list_faxes((), 9))[0]
    assert (first.id, first.state, first.sender, first.pages) == (last.id, "queued", SENDER, 3)
    assert (first.accepted_at, first.due_at, first.calls) == (NOW + 2, NOW + 2, 0)
    (line,) = await store.list_faxes(("delivered",), 9)
    assert (line.id, line.calls, line.held_for, line.reason) == (ended.id, 1, None, None)
    assert NUMBER not in repr(line)
    assert SENDER not in repr(line)


async def test_the_list_mixes_open_and_ended(store: TriedStore) -> None:
    """Whatever states are asked for, the newest come first."""
    faxes = []
    for number in numbers(4):
        store.clock.now += 1
        faxes.append(await store.queued(number))
    for fax in faxes[::2]:
        await store.apply(fax.id, CancelAsked())
    await store.apply(faxes[1].id, HoldAsked())
    wanted = ("queued", "held", "cancelled")
    assert [line.id for line in await store.list_faxes(wanted, 9)] == [fax.id for fax in faxes[::-1]]
    assert [line.id for line in await store.list_faxes(wanted, 3)] == [fax.id for fax in faxes[:0:-1]]
    assert [line.held_for for line in await store.list_faxes(("held", "failed"), 9)] == ["operator"]


async def test_a_mail_names_all_its_faxes(store: TriedStore) -> None:
    """Commands take the id of a fax or of its mail."""
    accepted = await store.mail_in(*numbers(3))
    assert await store.fax_ids_of(accepted.mail_id) == list(accepted.fax_ids)
    assert await store.fax_ids_of(accepted.fax_ids[1]) == [accepted.fax_ids[1]]
    assert await store.fax_ids_of("m9") == []


async def test_show_tells_the_whole_story(store: TriedStore) -> None:
    """`show` has each event with its time and what it brought, and what became of the replies."""
    fax = await store.called(message_id="<a@b>")
    store.clock.now += 60
    await store.webhook(reported("c1", Stage.FAILED, reason="destination_invalid"))
    file = await store.show(fax.id)
    assert (file.fax.state, file.mail.message_id, file.mail.subject) == (State.FAILED, "<a@b>", "An order")
    assert [(moment.at, moment.event, moment.state) for moment in file.moments] == [
        (NOW, "Begun", "submitting"), (NOW, "Taken", "sending"), (NOW + 60, "Reported", "failed"),
    ]  # fmt: skip
    assert file.moments[1].detail == {"attempt_id": newest(file.fax), "carrier_id": "c1"}
    assert file.replies == (("failed", "waiting"),)
    with pytest.raises(UnknownFax, match="no fax m9-9"):
        await store.show("m9-9")


async def test_the_queue_in_numbers(store: TriedStore) -> None:
    """Monitors see how many wait, for how long, what is overdue, and why nothing is called."""
    empty = await store.count()
    assert (empty.states, empty.overdue, empty.oldest_waiting, empty.outbox) == ({}, 0, 0.0, 0)
    assert (empty.parked, empty.brakes) == (0, ())
    await store.called()
    store.clock.now += HOUR
    await store.mail_in(*numbers(2))
    await store.webhook(reported("c9", Stage.DIALLED))
    await store.alert(Alert("call_stuck", "A call."))
    await store.hold_all()
    store.clock.now += DAY - 1
    counts = await store.count()
    assert counts.states == {"queued": 2, "sending": 1}
    assert (counts.overdue, counts.oldest_waiting) == (1, DAY + HOUR - 1)
    assert (counts.outbox, counts.parked) == (1, 1)
    (brake,) = counts.brakes
    assert (brake.kind, brake.scope, brake.since, brake.probe_at) == ("operator", "account", NOW + HOUR, None)


# --- documents ---------------------------------------------------------------------------------------


async def document_of(store: TriedStore, fax_id: str) -> bytes | None:
    """Return the document of a fax as far as it is kept."""
    mail = (await store.show(fax_id)).mail
    assert mail.document_id is not None
    assert (await store.paper_of(mail.id) is None) == (await store.document(mail.document_id) is None)
    return await store.document(mail.document_id)


async def nothing(_store: TriedStore, _fax_id: str) -> None:
    """Leave it as it is."""


async def renew(store: TriedStore, fax_id: str) -> None:
    """Send the fax again."""
    await store.renew(fax_id, even_if_twice=True)


async def fail_other(store: TriedStore, fax_id: str) -> None:
    """End the mail's other fax later."""
    store.clock.now += HOUR
    await store.ended(fax_id.replace("-1", "-2"), CancelAsked())


@pytest.mark.parametrize(
    ("recipients", "hindrance", "kept"),
    [(1, nothing, False), (2, nothing, True), (2, fail_other, True), (1, renew, True)],
    ids=["nobody needs it", "another fax of the mail is open", "another fax ended later", "it is sent again"],
)
async def test_a_document_goes_when_its_last_fax_is_over(
    store: TriedStore,
    recipients: int,
    hindrance: Callable[[TriedStore, str], Awaitable[None]],
    kept: bool,  # noqa: FBT001 -- a parameter
) -> None:
    """A document is kept for a day after the last fax of its mail has ended, and no longer."""
    fax_id = (await store.mail_in(*numbers(recipients))).fax_ids[0]
    await store.ended(fax_id, CancelAsked())
    await hindrance(store, fax_id)
    store.clock.now = NOW + DAY - 1
    assert await stores.purged(store, DAY, 99 * DAY) == 0
    store.clock.now += 1
    assert await stores.purged(store, DAY, 99 * DAY) == (0 if kept else 1)
    assert (await document_of(store, fax_id) is not None) is kept
    for open_fax in await store.list_faxes((), 9):
        await store.ended(open_fax.id, CancelAsked())
    store.clock.now += DAY
    await stores.purged(store, DAY, 99 * DAY)
    assert await document_of(store, fax_id) is None


@pytest.mark.parametrize("given_up", [False, True])
async def test_a_document_waits_for_its_reply(store: TriedStore, given_up: bool) -> None:  # noqa: FBT001 -- a parameter
    """The picture of page 1 is drawn when the reply is written: until it is out, the document stays."""
    fax = await store.queued()
    await store.apply(fax.id, CancelAsked())
    store.clock.now += 3 * DAY
    assert await stores.purged(store, DAY, 99 * DAY) == 0
    (entry,) = await store.claim_notices(9)
    if given_up:
        assert await store.notice_given_up(entry.id, entry.fence, "the relay was away")
    else:
        assert await store.notice_sent(entry.id, entry.fence)
    assert await stores.purged(store, DAY, 99 * DAY) == 1


async def test_of_a_purged_document_nothing_is_left(store: TriedStore) -> None:
    """After the purge no row holds a byte of it; that there was a fax is still known."""
    for number in numbers(3):
        mail = await store.mail_in(number, document=SECRET * 20)
        await store.ended(mail.fax_ids[0], CancelAsked())
    kept = await store.queued(document=SECRET)
    store.clock.now += DAY
    assert await stores.purged(store, DAY, 99 * DAY) == 3
    (left,) = await store.rows("SELECT document_id FROM document_chunks")
    assert left == ((await store.show(kept.id)).mail.document_id,)
    assert [line.state for line in await store.list_faxes(("cancelled",), 99)] == ["cancelled"] * 3


async def test_a_purged_document_leaves_no_trace_in_the_file(sqlite_store: TriedStore) -> None:
    """After the purge the bytes are nowhere on the disk, and the file has shrunk."""
    store = sqlite_store
    folder = Path(store.url.removeprefix("sqlite:///")).parent

    def found() -> list[str]:
        return [path.name for path in folder.iterdir() if SECRET[:34] in path.read_bytes()]

    def size() -> int:
        return (folder / "gateway.db").stat().st_size

    await stores.purged(store, DAY, DAY)
    before = size()
    accepted = [await store.mail_in(number, document=SECRET * 20) for number in numbers(12)]
    for mail in accepted:
        await store.ended(mail.fax_ids[0], CancelAsked())
    await stores.purged(store, DAY, 99 * DAY)
    assert found() == ["gateway.db"]
    grown = size()
    store.clock.now += DAY
    assert await stores.purged(store, DAY, 99 * DAY) == 12
    assert found() == []
    assert size() - before < (grown - before) / 100


async def test_a_purge_goes_in_small_steps(store: TriedStore) -> None:
    """Where a thousand documents are over at once, mail that comes in does not wait for all of them."""
    for number in numbers(45):
        mail = await store.mail_in(number)
        await store.apply(mail.fax_ids[0], CancelAsked())
    await store.mail_out()
    store.clock.now += DAY
    with stores.transactions(store.database) as heard:
        assert await stores.purged(store, DAY, 99 * DAY) == 45
    steps = [sum(sql.startswith("UPDATE documents") for sql, _ in transaction) for transaction in heard]
    assert [documents for documents in steps if documents] == [20, 20, 5]


async def test_a_large_document_is_a_step_of_its_own(store: TriedStore) -> None:
    """The bytes that are overwritten at a time are limited too."""
    for number in numbers(3):
        mail = await store.mail_in(number, document=bytes(3 * 2**20))
        await store.ended(mail.fax_ids[0], CancelAsked())
    store.clock.now += DAY
    assert [await store._do(store_desk.purge_documents, DAY) for _ in range(3)] == [2, 1, 0]


# --- records -----------------------------------------------------------------------------------------


async def every_row(store: TriedStore) -> dict[str, int]:
    """Return how many rows each table holds, empty tables aside."""
    counts = {table: (await store.rows(f"SELECT count(*) FROM {table}"))[0][0] for table in metadata.tables}  # noqa: S608 -- ours
    return {table: count for table, count in counts.items() if count}


async def test_after_a_year_nothing_is_known_any_more(store: TriedStore) -> None:
    """Records go with everything that hangs on them, alerts, foreign events and senders' turns included."""
    fax = await store.called(message_id="<a@b>", window=DAY)
    await store.webhook(reported("c1", Stage.DELIVERED))
    await store.webhook(reported("c9", Stage.DIALLED, number=OTHER))
    await store.alert(Alert("call_stuck", "A call."))
    await store.mail_out()
    full = await every_row(store)
    assert set(full) >= {"faxes", "attempts", "history", "outbox", "duplicates", "carrier_events", "turns"}
    store.clock.now += 365 * DAY - 1
    assert await stores.purged(store, DAY, 365 * DAY) == 1  # the document
    assert (await store.fax(fax.id)).state is State.DELIVERED
    store.clock.now += 1
    assert await stores.purged(store, DAY, 365 * DAY) == 1  # the mail
    assert await every_row(store) == {"turns": 1}  # the turn that is being served: nobody's
    assert await store.rows("SELECT sender FROM turns") == [("",)]


async def test_records_stay_while_something_is_open(store: TriedStore) -> None:
    """An old mail whose fax is still held, or whose reply or alert waits, is kept whole."""
    held = await store.queued(NUMBER)
    await store.apply(held.id, HoldAsked())
    untold = await store.queued(OTHER)
    await store.apply(untold.id, CancelAsked())
    await store.alert(Alert("call_stuck", "A call."))
    store.clock.now += 400 * DAY
    assert await stores.purged(store, DAY, 365 * DAY) == 0
    assert (await store.fax(held.id)).held_for is not None
    assert {entry.recipient for entry in await store.claim_notices(9)} == {SENDER, POSTMASTER}
    assert await document_of(store, untold.id) == stores.DOCUMENT


async def test_a_mail_stays_for_its_youngest_fax(store: TriedStore) -> None:
    """A fax that was sent again keeps the record of its mail as long as its own."""
    fax = await store.queued()
    await store.ended(fax.id, CancelAsked())
    again = await store.renew(fax.id, even_if_twice=False)
    store.clock.now += DAY
    await store.ended(again.id, CancelAsked())
    store.clock.now += 9 * DAY
    assert await stores.purged(store, DAY, 10 * DAY) == 1  # the document
    assert await store.fax_ids_of(fax.mail_id) == [fax.id, again.id]
    store.clock.now += DAY
    assert await stores.purged(store, DAY, 10 * DAY) == 1
    assert await store.fax_ids_of(fax.mail_id) == []


async def test_foreign_events_go_after_a_month(store: TriedStore) -> None:
    """Events of faxes that are not ours do not pile up."""
    await store.webhook(reported("c9", Stage.DIALLED))
    store.clock.now += 30 * DAY - 1
    await stores.purged(store, DAY, 365 * DAY)
    assert (await store.count()).parked == 1
    store.clock.now += 1
    await stores.purged(store, DAY, 365 * DAY)
    assert (await store.count()).parked == 0
