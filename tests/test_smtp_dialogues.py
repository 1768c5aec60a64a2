r"""Conversations at the SMTP door, written down line by line in data/dialogues and replayed in pieces.

A file begins with the behaviour that it shows, in one sentence. Then come header fields, an empty line, and:

    C: text      send the line; Python's escapes such as \0 and \xe4 stand for octets, {x*2000} for 2000 x
    C| text      the same without the end of line
    <: name      send one of the contents below (a mail, or a part of one), its dots stuffed
    S: text      the next answer; its last line begins so. `S: 250-text` before it: one of its lines is so
    N: text      the answer just read does not hold that
    HALF         shut down the sending side only
    S: EOF       the server closes; files that do not say so end with QUIT, 221 and the server's close

Fields: `faxes:` the numbers that the carrier then gets, `postmaster:` how many mails are forwarded, `from:`
the client's address, `chunks:` the sizes of the pieces, where not all of them are wanted.
"""

import asyncio
import codecs
import collections
import re
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from email.message import EmailMessage
from functools import partial
from pathlib import Path

import pikepdf
import pytest
import pytest_asyncio
from harness import POSTMASTER, SENDER, World, until, world
from papers import locked, mail, mail_of, multipart, paper, part, saved, text

DIALOGUES = sorted((Path(__file__).parent / "data" / "dialogues").glob("*.txt"))
LIMIT = 64_000
PATIENCE = 10.0
pytestmark = pytest.mark.asyncio(loop_scope="module")


# --- what is sent ------------------------------------------------------------------------------------------


def split_mail() -> tuple[bytes, bytes]:
    """Return a mail up to its text, which is left open, and the rest with the document."""
    words, document = text("OPEN"), part(paper())
    head, _, tail = mail(multipart(words, document)).partition(b"OPEN")
    return head, tail


def fields(*lines: str) -> bytes:
    """Return the usual mail with further header fields."""
    return mail(multipart(text(), part(paper())), *lines)


CONTENTS: dict[str, Callable[[], bytes]] = {
    "letter": lambda: mail_of(paper()),
    "head": lambda: split_mail()[0],
    "tail": lambda: split_mail()[1],
    "no document": lambda: mail(text()),
    "damaged": lambda: mail_of(b"%PDF-1.4\nnothing of one"),
    "encrypted": lambda: mail_of(locked(user="secret")),
    "no pages": lambda: mail_of(saved(pikepdf.new())),
    "four pages": lambda: mail_of(paper(4)),
    "spreadsheet": lambda: mail(
        multipart(text(), part(paper()), part(b"PK", "application/vnd.ms-excel", "sums.xls"))
    ),
    "picture": lambda: mail(multipart(text(), part(b"\x89PNG", "image/png", "scan.png"))),
    "text called pdf": lambda: mail(multipart(text(), part(b"hello", "application/pdf", "hello.pdf"))),
    "automatic reply": lambda: fields("Auto-Submitted: auto-replied"),
    "automatically generated": lambda: fields("Auto-Submitted: auto-generated"),
    "list mail": lambda: fields("List-Id: <news.example.com>"),
    "report": lambda: mail(multipart(text(), kind="multipart/report")),
    "in circles": lambda: fields(*["Received: from a by b; Fri, 20 Nov 2026 09:00:00 +0000"] * 51),
    "eight bits": lambda: mail(multipart(text("Grüße, 你好"), part(paper())), "Subject: Grüße"),
    "dots": lambda: mail(multipart(text(".\r\n..\r\n.x\r\n"), part(paper()))),
    "a line of 10000": lambda: mail(multipart(text("x" * 10_000), part(paper()))),
    "a bit too large": lambda: mail(multipart(text("xyz\r\n" * (LIMIT // 5)), part(paper()))),
    "much too large": lambda: mail(multipart(text("xyz.\r\n" * (3 * LIMIT // 6)), part(paper()))),
    "one endless line": lambda: mail(text("x" * 3 * LIMIT)),
}


def content(name: str) -> bytes:
    """Return a content as it goes over the wire, under a Message-ID of its own."""
    raw = CONTENTS[name]().replace(
        b"<order-4711@example.com>", b"<%b@example.com>" % uuid.uuid4().hex.encode()
    )
    if name != "head" and not raw.endswith(b"\r\n"):
        raw += b"\r\n"
    return re.sub(rb"(?m)^\.", b"..", raw)


def octets(words: str) -> bytes:
    """Return what a line of a file stands for."""
    words = re.sub(r"\{(.)\*([0-9]+)\}", lambda many: many[1] * int(many[2]), words)
    return codecs.escape_decode(words.encode())[0]


@dataclass
class Dialogue:
    """One file."""

    sentence: str
    lines: list[str]
    faxes: list[str] = field(default_factory=list)
    postmaster: int = 0
    source: str = "127.0.0.1"
    chunks: tuple[int, ...] = (4096, 16, 1)


def read(path: Path) -> Dialogue:
    """Read a file."""
    head, _, body = path.read_text(encoding="utf-8").partition("\n\n")
    sentence, *more = head.splitlines()
    told = dict(line.split(": ", 1) for line in more)
    unknown = told.keys() - {"faxes", "postmaster", "from", "chunks"}
    assert not unknown, f"{path.name}: {unknown}"
    lines = [line for line in body.splitlines() if line]
    if "S: EOF" not in lines:
        lines += ["C: QUIT", "S: 221 2.0.0", "S: EOF"]
    return Dialogue(
        sentence=sentence,
        lines=lines,
        faxes=told.get("faxes", "").split(),
        postmaster=int(told.get("postmaster", "0")),
        source=told.get("from", "127.0.0.1"),
        chunks=tuple(int(size) for size in told.get("chunks", "4096 16 1").split()),
    )


# --- the replay --------------------------------------------------------------------------------------------


class Client:
    """One connection, which sends in pieces of `chunk` octets."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chunk: int) -> None:
        self.reader = reader
        self.writer = writer
        self.chunk = chunk
        self.answer: list[str] = []
        self.mail_ids: list[str] = []

    async def send(self, data: bytes) -> None:
        """Send in pieces; the loop's turn between them is where the server may read."""
        for start in range(0, len(data), self.chunk):
            self.writer.write(data[start : start + self.chunk])
            await self.writer.drain()
            await asyncio.sleep(0)

    async def hear(self) -> list[str]:
        """Return the lines of the next answer, [] at the server's close."""
        lines: list[str] = []
        while not lines or lines[-1][3:4] == "-":
            line = await self.reader.readline()
            if not line:
                assert not lines, f"cut off after {lines}"
                return []
            assert re.fullmatch(rb"[2-5][0-9][0-9][ -][ -~]+\r\n", line), line
            lines.append(line.decode().rstrip())
        code = lines[-1]
        if code[0] in "45":
            assert re.match(rf"{code[0]}[0-9][0-9] {code[0]}\.[0-9]\.[0-9]+ [^ ]", code), f"no status: {code}"
        return lines

    async def expect(self, wanted: list[str]) -> None:
        """Hear the next answer and compare."""
        async with asyncio.timeout(PATIENCE):
            self.answer = await self.hear()
        if wanted == ["EOF"]:
            assert not self.answer, f"instead of the end: {self.answer}"
            return
        assert self.answer, f"the end instead of {wanted}"
        assert self.answer[-1].startswith(wanted[-1]), f"{self.answer} instead of {wanted}"
        missing = [line for line in wanted[:-1] if line not in self.answer]
        assert not missing, f"{self.answer} lacks {missing}"
        if self.answer[-1].startswith("250 2.0.0 queued as "):
            self.mail_ids.append(self.answer[-1].rpartition(" ")[2])

    async def play(self, lines: list[str]) -> None:
        """Go through the lines of a file."""
        wanted: list[str] = []
        for line in lines:
            kind, words = line[:2], line[3:]
            if kind in {"C:", "C|"}:
                await self.send(octets(words) + (b"\r\n" if kind == "C:" else b""))
            elif kind == "<:":
                await self.send(content(words))
            elif kind == "S:":
                wanted.append(words)
                if words[3:4] != "-":
                    await self.expect(wanted)
                    wanted = []
            elif kind == "N:":
                assert words not in " ".join(self.answer), self.answer
            else:
                assert line == "HALF", f"no such line: {line}"
                self.writer.write_eof()


async def connect(w: World, chunk: int = 4096, source: str = "127.0.0.1") -> Client:
    """Open a connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", w.gateway.smtp_port, local_addr=(source, 0))
    return Client(reader, writer, chunk)


@dataclass
class Door:
    """A world, and what its carrier and mailbox must have got once all is done."""

    world: World
    numbers: collections.Counter[str] = field(default_factory=collections.Counter)
    forwarded: int = 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Door]:
    """Run one gateway for all dialogues."""
    everybody = ["*@example.com", "*@ex*mple.com", "*@fax.local"]
    settings = world(
        tmp_path_factory.mktemp("door"),
        call_time=0,
        smtp={"max_recipients": 3, "max_message_size": "64kB", "hostname": "fax.test"},
        documents={"max_pages": 3, "max_size": "40kB"},
        senders={"networks": ["127.0.0.1/32"], "addresses": everybody},
        destinations={"countries": ["US", "CA", "DE", "LI"], "deny": ["+13125569*"]},
        telnyx={"channels": 16},
    )
    async with settings as w:
        yield Door(w)


CASES = [
    pytest.param(path, size, id=f"{path.stem}-{size}") for path in DIALOGUES for size in read(path).chunks
]


@pytest.mark.parametrize(("path", "size"), CASES)
async def test_dialogue(door: Door, path: Path, size: int) -> None:
    """Each client, however it misbehaves, gets the answers written down, in pieces of any size."""
    dialogue = read(path)
    client = await connect(door.world, size, dialogue.source)
    try:
        await client.play(dialogue.lines)
    finally:
        client.writer.close()
    door.numbers.update(dialogue.faxes)
    door.forwarded += dialogue.postmaster
    log = door.world.gateway
    accepted = [
        await until(partial(log.said, "mail_accepted", mail=mail_id), f"{mail_id} in the log")
        for mail_id in client.mail_ids
    ]
    assert sum(line["faxes"] for lines in accepted for line in lines) == len(dialogue.faxes)
    assert not log.said("task_failed")


async def test_client_that_leaves_after_the_dot_gets_one_fax(door: Door) -> None:
    """A client that hangs up without waiting is faxed once, and mailing again repeats nothing."""
    w, number, letter = door.world, "+13125563001", content("letter")
    before = len(w.gateway.said("mail_accepted"))
    lines = ("EHLO a", f"MAIL FROM:<{SENDER}>", f"RCPT TO:<{number}@fax.local>", "DATA")
    client = await connect(w)
    for line in lines:
        await client.expect(["2"])
        await client.send(line.encode() + b"\r\n")
    await client.expect(["354"])
    await client.send(letter + b".\r\n")
    client.writer.transport.abort()
    (line,) = await until(
        lambda: w.gateway.said("mail_accepted")[before:], "the mail of the client that left"
    )
    client = await connect(w)
    for command in lines:
        await client.expect(["2"])
        await client.send(command.encode() + b"\r\n")
    await client.expect(["354"])
    await client.send(letter + b".\r\n")
    await client.expect([f"250 2.0.0 queued as {line['mail']}"])
    client.writer.close()
    assert (await w.reply(f"{line['mail']}-1"))["X-Fax-Outcome"] == "delivered"
    assert len(w.taken(number)) == 1
    door.numbers.update([number])


async def test_dots_are_taken_off_and_nothing_else(door: Door) -> None:
    """A text with lines that begin with dots reaches the postmaster as it was written."""
    w = door.world
    client = await connect(w)
    for line in ("EHLO a", f"MAIL FROM:<{SENDER}>", "RCPT TO:<postmaster@fax.local>", "DATA"):
        await client.expect(["2"])
        await client.send(line.encode() + b"\r\n")
    await client.expect(["354"])
    await client.send(b"Subject: dots in the text\r\n\r\n..\r\n...\r\n..x\r\n....\r\n.\r\n")
    await client.expect(["250 2.0.0 queued as"])
    client.writer.close()
    door.forwarded += 1

    def forwarded() -> list[EmailMessage]:
        return [mail for mail in w.mailbox.mails if mail["Subject"] == "dots in the text"]

    (got,) = await until(forwarded, "the forwarded mail")
    assert str(got.get_payload()).splitlines() == [".", "..", ".x", "..."]
    assert w.mailbox.envelopes[w.mailbox.mails.index(got)][1] == [POSTMASTER]


async def test_carrier_got_exactly_the_faxes_that_were_promised(door: Door) -> None:
    """After all dialogues each 250 has become its calls and its forwards, and nothing else was called."""
    w = door.world
    await until(lambda: len(w.carrier.ledger) >= door.numbers.total(), "all faxes to be called")
    assert collections.Counter(entry.to for entry in w.carrier.ledger) == door.numbers
    forwards = await until(
        lambda: (
            len(found := [to for _, to in w.mailbox.envelopes if to == [POSTMASTER]]) >= door.forwarded
            and found
        ),
        "all mails to the postmaster",
    )
    assert len(forwards) == door.forwarded
    assert door.numbers.total() > 0
