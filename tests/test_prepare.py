import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import papers
import pytest
from papers import blank, forms_calling_forms, locked, mail_of, page_texts, paper, saved
from pikepdf import Dictionary, Name

from gateway.children import ChildFailed, Pool
from gateway.message import MailRefused, parse
from gateway.prepare import COMMAND, Prepared, Preparer, Received
from gateway.prepare_child import work

# A child that takes the jobs of a Preparer and answers what the test wants.
LIAR = """
import sys, time
from gateway.child import serve

def lie(job):
    time.sleep(%s)
    return %s

serve(lie, sys.stdin.buffer, sys.stdout.buffer)
"""
# A child that begins to draw when somebody opens the pipe `gate` for writing.
SLOW_PAINTER = """
import sys
from gateway import prepare_child

def work(job):
    if job["do"] == "picture":
        open(%r, "w").close()
        open(%r).close()
    return done(job)

done, prepare_child.work = prepare_child.work, work
prepare_child.main()
"""
LIMITS = {"max_pages": 10, "max_size": 1_000_000}

Opened = Callable[..., Awaitable[Preparer]]


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Opened]:
    """Open Preparers over children of their own; at the end nothing may be left of their files."""
    pools: list[Pool] = []

    async def start(
        command: tuple[str, ...] = COMMAND, *, size: int = 1, time_limit: float = 60.0, **limits: int
    ) -> Preparer:
        pool = Pool(command, size=size, patience=0.0, time_limit=time_limit)
        pools.append(pool)
        await pool.start()
        preparer = Preparer(pool, tmp_path / "work", **(LIMITS | limits))
        preparer.sweep()
        return preparer

    yield start
    for pool in pools:
        await pool.close()
    assert not list((tmp_path / "work").iterdir())


def liar(answer: dict[str, Any] | None, wait: float = 0) -> tuple[str, ...]:
    """Return the command of a child that gives this answer, whatever it is asked."""
    return (sys.executable, "-I", "-c", LIAR % (wait, answer))


class Easel:
    """What a slow painter waits for."""

    def __init__(self, folder: Path) -> None:
        self.gate, self.begun = folder / "gate", folder / "begun"
        os.mkfifo(self.gate)
        self.command = (sys.executable, "-I", "-c", SLOW_PAINTER % (str(self.begun), str(self.gate)))

    async def go(self) -> None:
        """Wait until a page is being drawn, and let it be finished."""
        await until(self.begun.exists)
        self.begun.unlink()
        await asyncio.to_thread(self.gate.write_text, "")


async def prepared_of(preparer: Preparer, raw: bytes) -> Prepared:
    """Have a mail prepared that came in as `raw`."""
    with preparer.receive() as received:
        received.file.write(raw)
        received.file.flush()
        return await preparer.mail(received)


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in other processes
            await asyncio.sleep(0.005)


async def refusal(job: Awaitable[object]) -> MailRefused:
    """Return why a mail was refused."""
    with pytest.raises(MailRefused) as caught:
        await job
    return caught.value


async def failure(job: Awaitable[object]) -> ChildFailed:
    """Return why a job failed."""
    with pytest.raises(ChildFailed) as caught:
        await job
    return caught.value


async def test_mail_becomes_one_document(opened: Opened, tmp_path: Path) -> None:
    """A mail with two PDFs comes back as one document with everything the reply needs to know."""
    preparer = await opened()
    raw = mail_of(paper(2, text="a"), paper(1, text="b"))
    with await prepared_of(preparer, raw) as prepared:
        data = prepared.document.read_bytes()
        assert page_texts(data) == ["a 1", "a 2", "b 1"]
        assert (prepared.pages, prepared.size) == (3, len(data))
        assert prepared.sha256 == hashlib.sha256(data).hexdigest()
        known = parse(raw)
        assert (prepared.message_id, prepared.subject) == (known.message_id, known.subject)
        assert (
            prepared.message_key
            == known.message_key
            == hashlib.sha256(b"<order-4711@example.com>").hexdigest()
        )
        assert (prepared.references, prepared.digest) == (known.references, known.digest)
        assert prepared.original_headers == known.original_headers
        assert [path.stat().st_mode & 0o777 for path in (tmp_path / "work").iterdir()] == [0o600]
        assert (tmp_path / "work").stat().st_mode & 0o777 == 0o700
    assert not prepared.document.exists()
    prepared.discard()


async def test_mail_comes_in_by_a_private_file_of_its_own(opened: Opened, tmp_path: Path) -> None:
    """Nobody else can read a mail that comes in, and nothing of it stays once it is discarded."""
    preparer = await opened()
    with preparer.receive() as received, preparer.receive() as other:
        assert {received.path, other.path} == set((tmp_path / "work").iterdir())
        assert received.path.stat().st_mode & 0o777 == 0o600
        received.file.write(b"a mail")
        received.file.flush()
        assert (received.path.stat().st_size, other.path.stat().st_size) == (6, 0)
        received.file.write(b" and what nobody waits for")
    assert received.file.closed
    assert not list((tmp_path / "work").iterdir())
    received.discard()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_mail_that_the_disk_has_no_room_for_is_discarded_all_the_same(tmp_path: Path) -> None:
    """What could not be written keeps neither its file nor its descriptor."""
    path = tmp_path / "mail"
    path.touch()
    received = Received(os.open("/dev/full", os.O_WRONLY), path)
    received.file.write(b"a mail")
    received.discard()
    assert received.file.closed
    assert not path.exists()


async def test_healthy_document_is_stored_as_it_came(opened: Opened) -> None:
    """One healthy PDF passes through the child octet for octet, raw header octets included."""
    preparer = await opened()
    raw = b"X-Raw: \xff\xfe\x00\r\n" + mail_of(paper())
    with await prepared_of(preparer, raw) as prepared:
        assert prepared.document.read_bytes() == paper()
        assert prepared.original_headers.startswith(b"X-Raw: \xff\xfe\x00\r\n")


@pytest.mark.parametrize(
    ("raw", "code", "status", "part"),
    [
        (papers.mail(papers.text()), 554, "5.6.1", "attach the document as a PDF"),
        (mail_of(locked(user="x")), 554, "5.6.1", '"paper1.pdf" is protected'),
        (mail_of(paper(11)), 554, "5.6.0", "11 pages; at most 10"),
    ],
)
async def test_refusal_comes_through(opened: Opened, raw: bytes, code: int, status: str, part: str) -> None:
    """What is wrong with a mail reaches the sender in the words of the module that found it."""
    answer = await refusal(prepared_of(await opened(), raw))
    assert (answer.code, answer.status) == (code, status)
    assert part in answer.text
    assert answer.log


async def test_size_limit_comes_through(opened: Opened) -> None:
    """The largest document is the one that was configured."""
    assert (await refusal(prepared_of(await opened(max_size=100), mail_of(paper())))).code == 552


async def test_largest_mail_fits_into_a_child(opened: Opened) -> None:
    """A document of 19 MB, near the carrier's limit, is prepared within the child's memory."""
    pdf = blank(1)
    picture = pdf.make_stream(os.urandom(19_000_000), Subtype=Name.Image, Width=19_000, Height=1_000)
    pdf.pages[0].obj.Resources.XObject = Dictionary(Photo=picture)
    large = saved(pdf)
    with await prepared_of(await opened(max_size=20_000_000), mail_of(large, paper(2))) as prepared:
        assert (prepared.pages, prepared.size > 19_000_000) == (3, True)


async def test_hostile_document_costs_only_itself(opened: Opened) -> None:
    """While one document keeps its child busy until that is killed, a neighbour's mail is prepared."""
    preparer = await opened(size=2, time_limit=2.0)
    hanging = asyncio.create_task(preparer.picture(forms_calling_forms(16, 40)))
    with await prepared_of(preparer, mail_of(paper())) as prepared:
        assert prepared.pages == 1
    assert (await failure(hanging)).reason in {"time", "died"}
    with await prepared_of(preparer, mail_of(paper())) as prepared:
        assert prepared.pages == 1
    assert await preparer.picture(paper())


async def test_slow_pages_keep_no_mail_waiting(opened: Opened, tmp_path: Path) -> None:
    """However many pages are slow to draw, new mail finds a child: one page is drawn at a time."""
    easel = Easel(tmp_path)
    preparer = await opened(easel.command, size=2)
    pictures = [asyncio.create_task(preparer.picture(paper())) for _ in range(3)]
    await until(easel.begun.exists)
    async with asyncio.timeout(20):
        for _ in range(3):
            with await prepared_of(preparer, mail_of(paper(2))) as prepared:
                assert prepared.pages == 2
    assert not any(picture.done() for picture in pictures)
    for _ in pictures:
        await easel.go()
    assert all((picture or b"").startswith(b"\x89PNG") for picture in await asyncio.gather(*pictures))


async def test_picture_does_not_wait_long_for_its_turn(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a slow page a picture is done without after a while, and the slow one is none the worse."""
    monkeypatch.setattr("gateway.prepare.TURN_LIMIT", 0.05)
    easel = Easel(tmp_path)
    preparer = await opened(easel.command, size=2)
    slow = asyncio.create_task(preparer.picture(paper()))
    await until(easel.begun.exists)
    with pytest.raises(TimeoutError):
        await preparer.picture(paper())
    await easel.go()
    assert await slow


async def test_child_that_hangs_over_a_mail(opened: Opened) -> None:
    """A mail that takes longer than its time fails, for the door to put off; nothing of it stays."""
    preparer = await opened(liar({}, wait=1000), time_limit=0.3)
    assert (await failure(prepared_of(preparer, mail_of(paper())))).reason == "time"


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"ok": {}},
        {"ok": 7},
        {"refused": 7},
        {"refused": {"code": 554}},
        {"ok": {"original_headers": "!"}},
        None,
    ],
)
async def test_child_that_lies(opened: Opened, answer: dict[str, Any] | None) -> None:
    """An answer of the wrong shape, from a child that a document took over, fails the job and no more."""
    preparer = await opened(liar(answer))
    assert (await failure(prepared_of(preparer, mail_of(paper())))).reason in {"fault", "died"}


async def test_client_that_leaves(opened: Opened, tmp_path: Path) -> None:
    """When the client leaves while its mail is being prepared, nothing of the mail stays on the disk."""
    preparer = await opened(liar({}, wait=1000))
    task = asyncio.create_task(prepared_of(preparer, mail_of(paper())))
    await until(lambda: any(path.stat().st_size for path in (tmp_path / "work").iterdir()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not list((tmp_path / "work").iterdir())


async def test_full_is_passed_on(opened: Opened) -> None:
    """The door can ask whether it should put off a mail before reading it."""
    preparer = await opened(liar({}, wait=1000))
    assert [preparer.full] == [False]
    tasks = [asyncio.create_task(prepared_of(preparer, mail_of(paper()))) for _ in range(3)]
    await until(lambda: preparer.full)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_sweep_removes_what_a_killed_daemon_left(opened: Opened, tmp_path: Path) -> None:
    """Documents that a killed daemon left are gone after the next start; other files are not touched."""
    preparer = await opened()
    prepared = await prepared_of(preparer, mail_of(paper()))
    other = tmp_path / "work" / "other"
    other.touch()
    preparer.sweep()
    assert not prepared.document.exists()
    other.unlink()


async def test_picture_of_the_first_page(opened: Opened) -> None:
    """The first page of a document is drawn as a PNG."""
    assert (await (await opened()).picture(paper(2)) or b"").startswith(b"\x89PNG")


@pytest.mark.parametrize("data", [b"", b"%PDF-1.7", locked(user="x")])
async def test_no_picture_of_what_cannot_be_drawn(opened: Opened, data: bytes) -> None:
    """A document that cannot be drawn leaves the reply without a picture, and nothing worse."""
    assert await (await opened()).picture(data) is None


async def test_no_picture_while_closing(tmp_path: Path) -> None:
    """A closing gateway does not pretend that a document has no picture."""
    pool = Pool(COMMAND, size=1)
    preparer = Preparer(pool, tmp_path, max_pages=1, max_size=1)
    await pool.close()
    assert (await failure(preparer.picture(paper()))).reason == "closed"


# The child's side


def test_work_in_this_process(tmp_path: Path) -> None:
    """Each kind of job fills its file and answers with nothing but what is asked."""
    source, result = tmp_path / "in", tmp_path / "out"
    result.touch()
    job = {"path": str(source), "out": str(result)} | LIMITS
    source.write_bytes(mail_of(paper(2)))
    answer = work(job | {"do": "mail"})["ok"]
    assert result.read_bytes() == paper(2)
    assert (answer["pages"], answer["size"]) == (2, len(paper(2)))
    source.write_bytes(paper(2))
    assert work(job | {"do": "picture"}) == {"ok": {}}
    assert result.read_bytes().startswith(b"\x89PNG")
    source.write_bytes(b"no mail at all")
    refused = work(job | {"do": "mail"})["refused"]
    assert (refused["code"], sorted(refused)) == (554, ["code", "log", "status", "text"])


def test_child_never_brings_a_removed_file_back(tmp_path: Path) -> None:
    """A child that finishes after its job was given up does not leave a document on the disk."""
    source = tmp_path / "in"
    source.write_bytes(mail_of(paper()))
    with pytest.raises(FileNotFoundError):
        work({"do": "mail", "path": str(source), "out": str(tmp_path / "out")} | LIMITS)
    assert not (tmp_path / "out").exists()


def test_libraries_cannot_speak_for_the_child() -> None:
    """What a library prints does not mix with the child's answers."""
    noisy = "lambda job: os.write(1, b'noise\\n') and {'ok': {}}"
    script = f"import gateway.prepare_child as p, os\np.work = {noisy}\np.main()\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script],
        input=b'{"memory": 1000000000, "seconds": 10}\n{}\n',
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout == b'{"ready": true}\n{"ok": {}}\n'
