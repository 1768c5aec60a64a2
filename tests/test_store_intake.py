"""Mail into the store: all faxes of a mail or none, repeats, large documents, faxes sent again."""

import asyncio
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import stores
from faxes import DAY, HOUR, NOW, NUMBER
from stores import DOCUMENT, POSTMASTER, SENDER, TriedStore, newest, numbers, reported, transactions

from gateway.database import StoreFull
from gateway.records import (
    Blame,
    CancelAsked,
    Doubted,
    Event,
    Fax,
    ReceivedMail,
    Rejected,
    RetryAsked,
    Stage,
    State,
    Unprovable,
)
from gateway.store_apply import UnknownFax
from gateway.store_intake import CHUNK, NotRenewable, Submission, new_mail_id

store = stores.store
sqlite_store = stores.sqlite_store
postgresql_store = stores.postgresql_store

OTHER = "+442071234567"
TABLES = ("documents", "document_chunks", "mails", "faxes", "duplicates", "outbox", "turns")


async def contents(store: TriedStore) -> dict[str, int]:
    """Return how many rows each table holds."""
    return {table: (await store.rows(f"SELECT count(*) FROM {table}"))[0][0] for table in TABLES}  # noqa: S608 -- ours


# --- all or none -------------------------------------------------------------------------------------


async def test_a_mail_to_five_numbers_is_five_faxes_of_one_document(store: TriedStore) -> None:
    """Each number gets a fax under the mail's id, waiting to be called now, and the document is kept once."""
    accepted = await store.mail_in(*numbers(5), message_id="<a@b>")
    assert accepted.fax_ids == tuple(f"{accepted.mail_id}-{n}" for n in range(1, 6))
    assert not accepted.repeated
    for fax_id, number in zip(accepted.fax_ids, numbers(5), strict=True):
        file = await store.show(fax_id)
        assert (file.fax.number, file.fax.recipient) == (number, f"{number}@fax.local")
        assert (file.fax.state, file.fax.due_at, file.fax.pages) == (State.QUEUED, NOW, 3)
        assert (file.fax.accepted_at, file.fax.give_up_at) == (NOW, NOW + DAY)
        assert (file.mail.sender, file.mail.message_id, file.mail.received_at) == (SENDER, "<a@b>", NOW)
    assert await contents(store) == dict.fromkeys(TABLES, 1) | {"faxes": 5, "duplicates": 0, "outbox": 0}


async def test_a_mail_that_does_not_fit_on_the_disk_leaves_nothing(sqlite_store: TriedStore) -> None:
    """A mail answered 452 is not half there, and is taken in once there is room."""
    store = sqlite_store
    pages = (await store.database.write(lambda c: c.exec_driver_sql("PRAGMA page_count").scalar_one())) + 3
    await store.change(f"PRAGMA max_page_count={pages}")
    mail: dict[str, Any] = {"message_id": "<a@b>", "window": DAY, "document": bytes(CHUNK)}
    before = await contents(store)
    with pytest.raises(StoreFull):
        await store.mail_in(*numbers(3), **mail)
    assert await contents(store) == before
    await store.change("PRAGMA max_page_count=1000000")
    accepted = await store.mail_in(*numbers(3), **mail)
    assert len(accepted.fax_ids) == 3


async def test_a_mail_that_does_not_fit_on_the_servers_disk_leaves_nothing(
    postgresql_store: TriedStore,
) -> None:
    """The same where the disk is the server's: what it says of a full disk is told as that."""
    store = postgresql_store
    await store.change(
        "CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'could not extend file' USING ERRCODE = 'disk_full'; END $$"
    )
    await store.change("CREATE TRIGGER full_disk BEFORE INSERT ON faxes EXECUTE FUNCTION fill()")
    before = await contents(store)
    with pytest.raises(StoreFull, match="could not extend file"):
        await store.mail_in(*numbers(3), message_id="<a@b>", window=DAY)
    assert await contents(store) == before
    await store.change("DROP TRIGGER full_disk ON faxes")
    assert len((await store.mail_in(*numbers(3), message_id="<a@b>", window=DAY)).fax_ids) == 3


async def test_mail_to_the_postmaster_goes_to_the_outbox_as_it_came(store: TriedStore) -> None:
    """The postmaster gets his mail also when it made no fax, and from nobody in particular."""
    mail = ReceivedMail(id="", sender="", received_at=NOW)
    accepted = await store.accept(Submission(mail, "", (), forward=b"From: x\r\n\r\nhelp"), DAY)
    assert accepted.fax_ids == ()
    assert not accepted.repeated
    (entry,) = await store.claim_notices(10)
    assert (entry.recipient, entry.forward, entry.fax, entry.alert) == (
        POSTMASTER, b"From: x\r\n\r\nhelp", None, None,
    )  # fmt: skip
    assert entry.id == f"{accepted.mail_id}.forward"


async def test_what_was_accepted_stays_when_the_client_left(store: TriedStore) -> None:
    """A caller that is cancelled while the commit is under way changes nothing about it."""
    accepting = asyncio.ensure_future(store.mail_in(NUMBER))
    await asyncio.sleep(0)
    accepting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await accepting
    while not await store.list_faxes((), 9):
        await store.pass_time()
    assert (await contents(store))["faxes"] == 1


# --- the same mail twice -----------------------------------------------------------------------------


async def test_the_same_mail_twice_is_one_fax(store: TriedStore) -> None:
    """A client that lost our answer sends again, and hears the first mail's id."""
    first = await store.mail_in(NUMBER, OTHER, message_id="<a@b>", window=DAY)
    store.clock.now += DAY - 1
    again = await store.mail_in(NUMBER, OTHER, message_id="<a@b>", window=DAY)
    assert again.repeated
    assert (again.mail_id, again.fax_ids) == (first.mail_id, ())
    assert (await contents(store))["faxes"] == 2
    assert (await contents(store))["mails"] == 1


async def test_a_repeat_counts_for_each_recipient(store: TriedStore) -> None:
    """A relay that repeats a mail with one recipient more gets a fax for that one."""
    await store.mail_in(NUMBER, message_id="<a@b>", window=DAY)
    again = await store.mail_in(NUMBER, OTHER, message_id="<a@b>", window=DAY)
    assert not again.repeated
    assert again.fax_ids == (f"{again.mail_id}-1",)
    assert (await store.fax(again.fax_ids[0])).number == OTHER


@pytest.mark.parametrize(
    "difference",
    [{"message_id": "<c@d>"}, {"sender": "boss@example.com"}, {"digest": "d2"}, {"number": OTHER}],
    ids=lambda difference: next(iter(difference)),
)
async def test_another_mail_is_another_fax(store: TriedStore, difference: dict[str, str]) -> None:
    """Only the same Message-ID, sender, number and attachments make a mail the same."""
    mail: dict[str, Any] = {"number": NUMBER, "message_id": "<a@b>", "sender": SENDER, "digest": "d1"}
    for wanted in (mail, mail | difference):
        number = wanted.pop("number")
        assert not (await store.mail_in(number, window=DAY, **wanted)).repeated
    assert (await contents(store))["faxes"] == 2


async def test_mails_that_only_look_alike_are_two_faxes(store: TriedStore) -> None:
    """The key is made from the Message-ID as received: what a reply shows of it may be the same for two."""
    mail = ReceivedMail(id="", sender=SENDER, received_at=NOW, message_id="<looks-alike@example.com>")
    outcomes = [
        await store.accept(
            Submission(mail, "d1", ((NUMBER, "x"),), stores.small_paper(DOCUMENT), message_key=key), DAY
        )
        for key in ("k1", "k2", "k1")
    ]
    assert [outcome.repeated for outcome in outcomes] == [False, False, True]
    assert outcomes[2].mail_id == outcomes[0].mail_id


async def test_after_the_window_the_same_mail_is_a_new_fax(store: TriedStore) -> None:
    """The window counts anew from the mail that was taken as new."""
    mail: dict[str, Any] = {"message_id": "<a@b>", "window": HOUR}
    first = await store.mail_in(**mail)
    store.clock.now += HOUR
    second = await store.mail_in(**mail)
    assert not second.repeated
    store.clock.now += HOUR - 1
    third = await store.mail_in(**mail)
    assert third.repeated
    assert third.mail_id == second.mail_id != first.mail_id


@pytest.mark.parametrize(("window", "lasts"), [(DAY, 600.0), (60.0, 60.0)])
async def test_without_a_message_id_a_repeat_counts_for_ten_minutes(
    store: TriedStore, window: float, lasts: float
) -> None:
    """A device without Message-IDs may send the same page again tomorrow."""
    await store.mail_in(window=window)
    store.clock.now += lasts - 1
    assert (await store.mail_in(window=window)).repeated
    store.clock.now += 1
    assert not (await store.mail_in(window=window)).repeated


async def test_a_window_of_nothing_is_off(store: TriedStore) -> None:
    """Who turned the recognition off gets a fax for every mail."""
    for _ in range(2):
        assert not (await store.mail_in(message_id="<a@b>", window=0.0)).repeated
    assert (await contents(store))["faxes"] == 2


def refused(fax: Fax) -> Event:
    """Make the refusal that ends the fax."""
    return Rejected(newest(fax), Blame.FAX, "HTTP 422", "number_refused")


@pytest.mark.parametrize(
    ("end", "counts"),
    [(refused, False), (lambda _fax: CancelAsked(), False), (None, True)],
    ids=["failed", "cancelled", "delivered"],
)
async def test_what_did_not_arrive_may_be_mailed_again(
    store: TriedStore,
    end: Callable[[Fax], Event] | None,
    counts: bool,  # noqa: FBT001 -- a parameter
) -> None:
    """A fax that failed or was cancelled is no reason to swallow its repetition; a delivered one is."""
    fax = await store.queued(message_id="<a@b>", window=DAY)
    if end is None:
        await store.taken(await store.claimed())
        await store.webhook(reported("c1", Stage.DELIVERED))
    else:
        claimed = await store.claimed() if end is refused else fax
        await store.apply(fax.id, end(claimed))
    assert (await store.fax(fax.id)).final
    assert (await store.mail_in(message_id="<a@b>", window=DAY)).repeated is counts


async def test_the_same_mail_at_once_is_one_fax(store: TriedStore) -> None:
    """Two connections that bring the same mail in the same moment make one fax, in another process too."""
    beside = TriedStore(store.url, serve=False)
    outcomes = await asyncio.gather(
        *(door.mail_in(message_id="<a@b>", window=DAY) for door in (store, beside) * 5)
    )
    await beside.close()
    assert sorted(outcome.repeated for outcome in outcomes) == [False] + [True] * 9
    assert len({outcome.mail_id for outcome in outcomes}) == 1
    assert (await contents(store))["faxes"] == 1


async def test_two_spellings_of_a_number_are_one_fax(store: TriedStore) -> None:
    """A mail that names a number twice is faxed once there, under its first spelling."""
    recipients = ((NUMBER, "+1 312 736 7276@fax.local"), (OTHER, "x@fax.local"), (NUMBER, "1312…@fax.local"))
    mail = ReceivedMail(id="", sender=SENDER, received_at=NOW)
    paper = stores.small_paper(DOCUMENT)
    accepted = await store.accept(Submission(mail, "d1", recipients, paper), 0.0)
    faxes = [await store.fax(fax_id) for fax_id in accepted.fax_ids]
    assert [(fax.number, fax.recipient) for fax in faxes] == list(recipients[:2])


# --- documents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, CHUNK, CHUNK + 1, 3 * CHUNK])
async def test_a_document_is_read_back_as_it_came(store: TriedStore, size: int) -> None:
    """What the carrier gets is byte for byte what was checked, whatever its size."""
    document = (b"%PDF" + bytes(range(256)) * (size // 256 + 1))[:size]
    fax = await store.queued(document=document)
    paper = await store.paper_of(fax.mail_id)
    assert paper is not None
    assert await store.document(paper[0]) == document
    assert paper == (paper[0], stores.small_paper(document).sha256)


PIECES, MOST_PIECES = 9, 4


async def test_a_large_document_goes_in_piece_by_piece(store: TriedStore) -> None:
    """A document of 20 MB never holds up the writer for more than 1 MB, and shows only once accepted."""
    with transactions(store.database) as heard:
        document_id = await store.keep_document(io.BytesIO(bytes(PIECES * CHUNK)))
    chunks = [
        [values for sql, values in transaction if sql.startswith("INSERT INTO document_chunks")]
        for transaction in heard
    ]
    assert max(len(written) for written in chunks) <= MOST_PIECES
    assert sum(len(written) for written in chunks) == PIECES
    sizes = "SELECT length(data) FROM document_chunks ORDER BY position"
    assert await store.rows(sizes) == [(CHUNK,)] * PIECES
    assert (await contents(store))["documents"] == 0
    paper = replace(stores.small_paper(bytes(PIECES * CHUNK)), id=document_id, data=None)
    mail = ReceivedMail(id="", sender=SENDER, received_at=NOW)
    accepted = await store.accept(Submission(mail, "d1", ((NUMBER, "x"),), paper), DAY)
    assert await store.paper_of(accepted.mail_id) == (document_id, paper.sha256)


async def test_pieces_that_nobody_claimed_are_purged_by_age(store: TriedStore) -> None:
    """Where a client left before the end, its document goes after an hour; no other document does."""
    orphan = await store.keep_document(io.BytesIO(bytes(2 * CHUNK)))
    kept = await store.queued(document=bytes(2 * CHUNK))
    store.clock.now += HOUR - 1
    assert await store.purge(DAY, DAY) == 0
    assert await store.document(orphan) is not None
    store.clock.now += 1
    assert await store.purge(DAY, DAY) == 1
    assert await store.document(orphan) is None
    paper = await store.paper_of(kept.mail_id)
    assert paper is not None
    assert await store.document(paper[0]) == bytes(2 * CHUNK)


# --- sent again --------------------------------------------------------------------------------------


async def test_an_ended_fax_is_sent_again_as_a_new_one(store: TriedStore) -> None:
    """`retry` of a failed fax makes a fax that names the old one and starts afresh."""
    old = (await store.mail_in(NUMBER, OTHER)).fax_ids[0]
    await store.apply(old, refused(await store.claimed()))
    store.clock.now += HOUR
    fax = await store.renew(old, even_if_twice=False)
    assert await store.fax(fax.id) == fax
    assert fax.id == f"{fax.mail_id}-3"
    assert (fax.renews, fax.number, fax.state, fax.attempts) == (old, NUMBER, State.QUEUED, ())
    assert (fax.accepted_at, fax.give_up_at) == (NOW + HOUR, NOW + HOUR + DAY)
    assert (await store.fax(old)).state is State.FAILED
    assert {(await store.claimed()).id for _ in range(2)} == {fax.id, f"{fax.mail_id}-2"}


async def delivered(store: TriedStore) -> str:
    """Return a fax that arrived."""
    fax = await store.called()
    await store.webhook(reported("c1", Stage.DELIVERED))
    return fax.id


async def cancelled_in_doubt(store: TriedStore) -> str:
    """Return a fax that was cancelled while nobody knew whether it is on its way."""
    await store.queued()
    fax = await store.claimed()
    for event in (Doubted(newest(fax), "timeout"), Unprovable(newest(fax), "no list"), CancelAsked()):
        await store.apply(fax.id, event)
    return fax.id


async def overruled(store: TriedStore) -> str:
    """Return a fax whose doubt an operator overruled before it failed."""
    await store.queued()
    fax = await store.claimed()
    for event in (Doubted(newest(fax), "timeout"), RetryAsked(even_if_twice=True)):
        await store.apply(fax.id, event)
    again = await store.claimed()
    await store.apply(fax.id, refused(again))
    return fax.id


@pytest.mark.parametrize("ended", [delivered, cancelled_in_doubt, overruled])
async def test_what_may_have_arrived_is_only_sent_again_on_purpose(
    store: TriedStore, ended: Callable[[TriedStore], Any]
) -> None:
    """Nobody gets a second copy by a slip of the operator's."""
    old = await ended(store)
    assert (await store.fax(old)).final
    with pytest.raises(NotRenewable, match="--even-if-twice sends it again"):
        await store.renew(old, even_if_twice=False)
    assert (await store.renew(old, even_if_twice=True)).renews == old


async def test_a_purged_document_cannot_be_sent_again(store: TriedStore) -> None:
    """When the document is gone, `retry` says that it must be mailed again."""
    fax = await store.queued()
    await store.ended(fax.id, CancelAsked())
    store.clock.now += DAY
    assert await store.purge(DAY, 9 * DAY) == 1
    with pytest.raises(NotRenewable, match="has been purged; it must be mailed again"):
        await store.renew(fax.id, even_if_twice=True)


async def test_what_was_never_there_cannot_be_sent_again(store: TriedStore) -> None:
    """A mistyped id is named in the error."""
    with pytest.raises(UnknownFax, match="no fax m9-9"):
        await store.renew("m9-9", even_if_twice=False)


def test_mail_ids_sort_by_time_and_differ() -> None:
    """A later mail has a later id, easy to read out over the telephone."""
    ids = [new_mail_id(NOW + second) for second in range(1000)]
    assert ids == sorted(ids)
    assert len({new_mail_id(NOW) for _ in range(100)}) > 95
    assert all(len(mail_id) == 13 and not set(mail_id) & set("ilouILOU") for mail_id in ids)
