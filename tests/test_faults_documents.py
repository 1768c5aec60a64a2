"""Documents that crash or hang whoever looks at them, under a real daemon."""

import asyncio
import contextlib
import smtplib
import sqlite3
import sys
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from harness import World, letter, numbers, program_after, world
from papers import paper

pytestmark = pytest.mark.asyncio(loop_scope="module")
FREE = numbers()
TIME_LIMIT = 2.0  # seconds for a document
MARKS = {"hang": "while True: pass", "crash": "os.kill(os.getpid(), signal.SIGSEGV)", "swell": "b'x' * 2**40"}
CHILD = f"""
import os, pathlib, signal
from gateway import prepare_child

def work(job, sound=prepare_child.work):
    data = pathlib.Path(job["path"]).read_bytes()
    for mark, deed in {MARKS!r}.items():
        if f"{{job['do']}} {{mark}}".encode() in data:
            exec(deed)
    return sound(job)

prepare_child.work = work
prepare_child.main()
"""
PROGRAM = program_after(
    f"""
from functools import partial
from gateway import children, prepare
prepare.COMMAND = {(sys.executable, "-I", "-c", CHILD)!r}
children.Pool = partial(children.Pool, time_limit={TIME_LIMIT})
"""
)
"""Real children, in which a library has faults that the marks in a mail or a document bring out."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def w(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One world for all tests of this file; at its end every fax has exactly one final reply."""
    folder = tmp_path_factory.mktemp("documents")
    async with world(folder, program=PROGRAM, replies={"attach_first_page": True}) as made:
        yield made
        await made.everyone_told()
        assert list((folder / "incoming").iterdir()) == []


async def test_a_document_that_changed_in_the_store_is_not_sent(w: World) -> None:
    """If the stored octets are not those that were checked, nothing is sent and the sender is told."""
    number = next(FREE)
    assert (await w.gateway.run("hold", "--all"))[0] == 0
    mail_id = await w.mail(number)
    other = "CAST(substr(data, 1, 200) || X'00' || substr(data, 202) AS BLOB)"
    with contextlib.closing(sqlite3.connect(w.gateway.folder / "gateway.db", timeout=30)) as database:
        database.execute(f"UPDATE document_chunks SET data = {other}")  # noqa: S608 -- ours
        database.commit()
    assert (await w.gateway.run("release", "--all"))[0] == 0
    reply = await w.reply(f"{mail_id}-1")
    assert (reply["X-Fax-Outcome"], reply["X-Fax-Reason"]) == ("failed", "document_refused")
    assert w.taken(number) == []
    assert number not in w.posts


async def test_a_document_that_crashes_or_hangs_its_worker(w: World) -> None:
    """Whatever a document does to the process that examines it: 451 in time; others are served meanwhile."""
    begun = time.monotonic()
    bad = {next(FREE): mark for mark in MARKS}
    sending = [
        asyncio.create_task(w.mail(to, message=letter(to, name=f"mail {mark}.pdf")))
        for to, mark in bad.items()
    ]
    replies = await w.replies(next(FREE), next(FREE))
    assert [reply["X-Fax-Outcome"] for reply in replies] == ["delivered", "delivered"]
    for outcome in await asyncio.gather(*sending, return_exceptions=True):
        assert isinstance(outcome, smtplib.SMTPResponseException)
        assert outcome.smtp_code == 451
    assert time.monotonic() - begun < TIME_LIMIT + 10.0
    failures = sorted(line["error"] for line in w.gateway.said("mail_failed"))
    assert failures == ["ChildFailed: died", "ChildFailed: died", "ChildFailed: time"]
    assert set(bad).isdisjoint(w.posts)


async def test_a_document_that_crashes_or_hangs_the_worker_that_draws_it(w: World) -> None:
    """Its fax goes out and its reply comes, without a picture; the next document is drawn again."""
    for mark in MARKS:
        document = paper(text=mark) + f"% picture {mark}\n".encode()
        (reply,) = await w.replies(next(FREE), message=letter(document=document))
        assert reply["X-Fax-Outcome"] == "delivered"
        assert list(reply.iter_attachments()) == []
    (reply,) = await w.replies(next(FREE), message=letter(text="sound"))
    assert [part.get_content_type() for part in reply.iter_attachments()] == ["image/png"]
    assert len(w.gateway.said("child_failed")) == len(MARKS)
