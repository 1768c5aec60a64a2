"""What the daemon tells about its users: planted marks are looked for in everything that it writes."""

import asyncio
import contextlib
import json
import signal
import smtplib
import sqlite3
import stat
import sys
from collections.abc import AsyncIterator
from email.message import EmailMessage
from pathlib import Path

import aiohttp
from harness import SENDER, World, letter, until, world
from papers import locked, paper

from gateway.sandbox_script import NUMBERS

DELIVERED = "+13125564711"
KEY = "sandbox-key"
MARKS = {
    "the API key": KEY,
    "the document's text": "Krankenakte",
    "the subject": "Betreffzeile",
    "the mail's text": "Begleittext",
    "the file's name": "Befund",
    "the sender's name": "Erika",
    "a header": "Kopfzeile",
    "octets of a stranger": "Fremdtext",
}


def number_of(behaviour: str) -> str:
    """Return the sandbox's number for a behaviour."""
    return next(number for number, names in NUMBERS.items() if names == (behaviour,))


def marked(number: str, pdf: bytes | None = None, name: str = "Befund.pdf") -> EmailMessage:
    """Return a mail with a mark in every place."""
    message = letter(number)
    message.clear_content()
    del message["From"], message["Subject"]
    message["From"] = f"Erika <{SENDER}>"
    message["Subject"] = f"Betreffzeile {number}"
    message["X-Internal"] = "Kopfzeile"
    message.set_content(f"Begleittext, {number}")
    pdf = paper(text=f"Krankenakte {number}") if pdf is None else pdf
    message.add_attachment(pdf, maintype="application", subtype="pdf", filename=name)
    return message


class Recorded:
    """The world's daemon once more, everything that it writes going into one file."""

    def __init__(self, w: World, folder: Path, process: asyncio.subprocess.Process) -> None:
        self.world = w
        self.folder = folder
        self.file = folder / "output"
        self.process = process

    def output(self) -> str:
        """Return what was written so far."""
        return self.file.read_text(encoding="utf-8")

    def events(self) -> list[str]:
        """Return the names of the events so far."""
        lines = [line for line in self.output().splitlines() if line.startswith("{")]
        return [json.loads(line)["event"] for line in lines]

    async def refused(self, message: EmailMessage, to: str = DELIVERED) -> str:
        """Mail what is refused; return code and words of the answer."""
        try:
            await self.world.mail(to, message=message)
        except smtplib.SMTPResponseException as error:
            return str(error)
        raise AssertionError("the mail was taken")


@contextlib.asynccontextmanager
async def recorded(folder: Path) -> AsyncIterator[Recorded]:
    """Run the daemon at level debug."""
    async with world(folder, log={"level": "debug"}) as w:
        await w.gateway.stop()
        w.gateway.write_config()
        with (folder / "output").open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gateway", "serve", "--config", str(w.gateway.config),
                stdout=output, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
        daemon = Recorded(w, folder, process)
        try:
            await until(lambda: "ready" in daemon.events() or process.returncode is not None, "the daemon")
            yield daemon
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.wait()


async def http(port: int, data: bytes) -> None:
    """Send octets to the HTTP door and wait for its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    async with asyncio.timeout(10):
        await reader.read(100)
    writer.close()


async def a_days_work(daemon: Recorded) -> None:
    """Let happen what does: faxes that arrive, fail, are refused or repeated, and strangers at both doors."""
    w = daemon.world
    for number in (
        DELIVERED,
        number_of("receiver_unallocated_number"),
        number_of("422-to"),
        number_of("answer-lost"),
        number_of("webhooks-forged"),
        number_of("invented-reason"),
    ):
        message = marked(number)
        mail_id = await w.mail(number, message=message)
        await w.reply(f"{mail_id}-1")
        if number == DELIVERED:
            assert await w.mail(number, message=message) == mail_id

    assert (await daemon.refused(marked(DELIVERED, locked(user="a")))).startswith("(554, b'5.6.1 ")
    assert (await daemon.refused(marked(DELIVERED, b"%PDF-1.4 Krankenakte"))).startswith("(554, b'5.6.0 ")
    assert (await daemon.refused(marked(DELIVERED, b"Krankenakte", "Befund.xls"))).startswith("(554, b'5.6.")
    for to in ("Erika", "+49Krankenakte", "+3314268530012", "13125564711 5", "+19005551234"):
        assert (await daemon.refused(marked(DELIVERED), to)).startswith("(550, ")

    reader, writer = await asyncio.open_connection("127.0.0.1", w.gateway.smtp_port)
    writer.write(b"Fremdtext\r\nEHLO Fremdtext\r\nMAIL FROM:<Fremdtext\r\nVRFY Fremdtext\r\nQUIT\r\n")
    async with asyncio.timeout(10):
        await reader.read()
    writer.close()

    port = w.gateway.http_port
    await http(port, b"Fremdtext +13125564711\r\n\r\n")
    await http(port, b"GET /Fremdtext?to=+13125564711 HTTP/1.1\r\nHost: Fremdtext\r\nFremdtext\r\n\r\n")
    await http(
        port,
        b"POST /webhooks/telnyx HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 9\r\n\r\nFremdtext",
    )
    body = json.dumps({"data": {"event_type": "fax.Fremdtext", "payload": {"to": DELIVERED}}})
    signed = {"telnyx-timestamp": "Fremdtext", "telnyx-signature-ed25519": "Fremdtext"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(w.gateway.webhook_url, data=body, headers=signed) as answer,
    ):
        assert answer.status == 401


async def test_log_holds_no_content_no_secret_and_no_whole_number(tmp_path: Path) -> None:
    """Even at level debug nothing that a user wrote, no key and no whole number is in the output."""
    async with recorded(tmp_path) as daemon:
        await a_days_work(daemon)
    output = daemon.output()
    assert daemon.process.returncode == 0
    told = set(daemon.events())
    assert {"mail_accepted", "mail_duplicate", "mail_refused", "call_in_doubt", "fax_ended"} <= told
    assert {"webhook_received", "webhook_refused", "reply_sent", "stopped"} <= told
    assert not {"task_failed", "store_failed"} & told
    found = {what: line for what, mark in MARKS.items() for line in output.splitlines() if mark in line}
    assert not found
    whole = [n for n in (DELIVERED, *NUMBERS) if n.lstrip("+1") in output]
    assert not whole
    assert "+1312*****11" in output  # masked, so it was there to be found


async def test_files_are_closed_to_others_and_nothing_stays_behind(tmp_path: Path) -> None:
    """The database is closed to other users, and no document lies outside it once its mail is answered."""
    async with recorded(tmp_path) as daemon:
        incoming = tmp_path / "incoming"
        assert stat.S_IMODE(incoming.stat().st_mode) == 0o700
        mail_id = await daemon.world.mail(DELIVERED, message=marked(DELIVERED))
        assert (await daemon.refused(marked(DELIVERED, locked(user="a")))).startswith("(554, ")
        await daemon.world.reply(f"{mail_id}-1")
        files = modes(tmp_path, "gateway.db*")
        assert {"gateway.db", "gateway.db-wal"} <= files.keys()
        assert set(files.values()) == {0o600}
        assert not list(incoming.iterdir())
        assert not documents(tmp_path, besides="gateway.db")
    assert not list(incoming.iterdir())
    with sqlite3.connect(tmp_path / "gateway.db") as database:
        (kept,) = database.execute("SELECT count(*) FROM faxes").fetchone()
    assert kept == 1


def modes(folder: Path, pattern: str) -> dict[str, int]:
    """Return the permissions of the files of these names."""
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.glob(pattern)}


def documents(folder: Path, besides: str) -> list[Path]:
    """Return the files below `folder` that hold the document's text."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(besides)]
    return [path for path in files if b"Krankenakte" in path.read_bytes()]


async def test_process_list_and_children_know_no_secret(tmp_path: Path) -> None:
    """Who may look at the process list sees no key, and a child with a hostile document has none to lose."""
    async with recorded(tmp_path) as daemon:
        own, children = await asyncio.to_thread(processes, daemon.process.pid)
        assert KEY not in own
        assert children
        assert all("gateway.prepare_child" in words and not environment for words, environment in children)


async def test_the_process_that_knows_the_secrets_never_loads_what_reads_documents(tmp_path: Path) -> None:
    """A hole in a PDF library is one in a child that knows nothing, after a day's work, too."""
    async with recorded(tmp_path) as daemon:
        await a_days_work(daemon)
        maps = await asyncio.to_thread(Path(f"/proc/{daemon.process.pid}/maps").read_text)
        assert "libcrypto" in maps  # so that the next line can fail
        assert not [name for name in ("pdfium", "qpdf", "pikepdf") if name in maps]


def processes(pid: int) -> tuple[str, list[tuple[str, bytes]]]:
    """Return the command line of a process, and command line and environment of its children."""
    process = Path(f"/proc/{pid}")
    pids = (process / "task" / str(pid) / "children").read_text(encoding="ascii").split()
    children = [Path(f"/proc/{child}") for child in pids]
    told = [((child / "cmdline").read_text(), (child / "environ").read_bytes()) for child in children]
    return (process / "cmdline").read_text(), told
