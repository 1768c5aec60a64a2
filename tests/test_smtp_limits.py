"""What the SMTP door does to clients that want too much: of connections, time, memory or work."""

import asyncio
import contextlib
import os
import shutil
import signal
import smtplib
import socket
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from harness import SENDER, Gateway, World, letter, until, world
from papers import mail, mail_of, multipart, paper, part, stream, text, written
from ports import GONE

ENOUGH = 20.0


class Line:
    """One connection to the door."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def hear(self) -> str:
        """Return the last line of the next answer, "" at the server's close."""
        async with asyncio.timeout(ENOUGH):
            while (line := (await self.reader.readline()).decode())[3:4] == "-":
                pass
        return line.rstrip()

    async def say(self, words: str) -> str:
        """Send a command; return its answer."""
        self.writer.write(words.encode() + b"\r\n")
        return await self.hear()

    async def to_data(self, number: str = "+13125560100") -> None:
        """Go as far as DATA."""
        for words in ("EHLO a", f"MAIL FROM:<{SENDER}>", f"RCPT TO:<{number}@fax.local>"):
            assert (await self.say(words)).startswith("250 ")
        assert (await self.say("DATA")).startswith("354 ")

    async def send(self, data: bytes) -> str:
        """Send a mail after DATA; return the answer after the dot."""
        with contextlib.suppress(*GONE):
            self.writer.write(data + b"\r\n.\r\n")
            await self.writer.drain()
        return await self.hear()


@contextlib.asynccontextmanager
async def line(w: World, source: str = "127.0.0.1") -> AsyncIterator[Line]:
    """Open a connection and close it."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", w.gateway.smtp_port, local_addr=(source, 0), limit=2**20
    )
    try:
        yield Line(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def until_true(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Ask again and again until the answer is yes."""
    end = time.monotonic() + ENOUGH
    while not await condition():
        assert time.monotonic() < end, f"waited in vain for {what}"


def resident(gateway: Gateway) -> int:
    """Return how much memory the daemon holds, in octets."""
    words = Path(f"/proc/{gateway.pid}/status").read_text(encoding="ascii").split()
    return int(words[words.index("VmRSS:") + 1]) * 1024


def slow_paper() -> bytes:
    """Return a mail whose document, of 50 KB, keeps a child busy until it is killed."""
    bomb = stream(zlib.compress(bytes(50_000_000)), b"/Filter /FlateDecode")
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents [%b] >>" % (b"4 0 R " * 2000)
    tree = b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>"
    return mail_of(written(b"<< /Type /Catalog /Pages 2 0 R >>", tree, page, bomb))


def children(gateway: Gateway) -> list[int]:
    """Return the processes that examine documents."""
    found = Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text(encoding="ascii")
    return [int(pid) for pid in found.split()]


# --- connections -------------------------------------------------------------------------------------------


async def test_connections_are_capped_by_host_and_in_all(tmp_path: Path) -> None:
    """One host, or all together, cannot take every place; whoever leaves makes room."""
    async with world(tmp_path, smtp={"max_connections": 3, "max_connections_per_host": 2}) as w:
        async with line(w) as first, line(w) as second, line(w, "127.0.0.2") as third:
            for open_line in (first, second, third):
                assert (await open_line.hear()).startswith("220 ")
            for source in ("127.0.0.1", "127.0.0.3"):
                async with line(w, source) as refused:
                    assert await refused.hear() == "421 4.7.0 too many connections, try again later"
                    assert await refused.hear() == ""
            assert await third.say("QUIT") == "221 2.0.0 bye"
            assert await third.hear() == ""
            async with line(w) as refused:  # there is room, but not for this host
                assert (await refused.hear()).startswith("421 4.7.0 ")
            async with line(w, "127.0.0.2") as taken:
                assert (await taken.hear()).startswith("220 ")
            assert (await first.say("NOOP")) == "250 2.0.0 ok"
        await until(lambda: len(w.gateway.said("session_refused")) == 3, "the refusals in the log")
        mail_id = await w.mail("+13125560100")
        assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"


async def test_noop_does_not_keep_a_session_for_ever(tmp_path: Path) -> None:
    """A client that only says NOOP is sent away after a hundred, and others are not affected."""
    async with world(tmp_path) as w, line(w) as idler:
        assert (await idler.hear()).startswith("220 ")
        answers = [await idler.say("NOOP") for _ in range(101)]
        assert set(answers[:100]) == {"250 2.0.0 ok"}
        assert answers[100].startswith("421 4.7.0 ")
        assert await idler.hear() == ""


async def test_fifty_recipients_are_fifty_faxes(tmp_path: Path) -> None:
    """A mail may go to fifty numbers; the next is put off, with words that say what to do."""
    numbers = [f"+131255610{n:02}" for n in range(50)]
    async with world(tmp_path, call_time=0, telnyx={"channels": 16}) as w:
        with pytest.raises(smtplib.SMTPResponseException, match="too many recipients: 50 a mail") as put_off:
            await w.mail(*numbers, "+13125561050")
        assert put_off.value.smtp_code == 452
        mail_id = await w.mail(*numbers)
        await until(lambda: len(w.carrier.ledger) == 50, "fifty calls")
        assert {entry.to for entry in w.carrier.ledger} == set(numbers)
        assert (await w.reply(f"{mail_id}-50"))["X-Fax-Outcome"] == "delivered"


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [b"x" * 65536, b"x" * 997 + b"\r\n"], ids=["one endless line", "lines"])
async def test_endless_mail_costs_no_memory_and_is_cut_off(tmp_path: Path, chunk: bytes) -> None:
    """A client that never stops is told 552 and cut off, and the daemon does not grow with what it sends."""
    small = {"max_message_size": "2MB"}
    async with world(tmp_path, smtp=small, documents={"max_size": "1MB"}) as w, line(w) as client:
        await client.hear()
        await client.to_data()
        told = asyncio.create_task(client.hear())
        before, sent, most = resident(w.gateway), 0, 0
        with contextlib.suppress(*GONE):
            while sent < 60_000_000 and not told.done():
                client.writer.write(chunk)
                sent += len(chunk)
                await client.writer.drain()
                await asyncio.sleep(0)  # the loop's turn, to hear the answer
                most = max(most, resident(w.gateway))
        assert await told == "552 5.3.4 the mail is too large: 2000000 octets at most"
        assert most - before < 8_000_000
        assert sent < 60_000_000
        (refused,) = await until(lambda: w.gateway.said("mail_refused"), "the refusal in the log")
        assert (refused["answer"], refused["sender"]) == ("552 5.3.4", SENDER)
        async with line(w) as other:
            assert (await other.hear()).startswith("220 ")


async def test_large_mails_at_once_cost_no_memory(tmp_path: Path) -> None:
    """However many large mails come in at the same time, the daemon does not grow: they lie on the disk."""
    size, several, incoming = 8_000_000, 6, tmp_path / "incoming"
    async with world(tmp_path) as w, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(line(w)) for _ in range(several)]
        for client in clients:
            await client.hear()
            await client.to_data()
        before, most = resident(w.gateway), 0
        for _ in range(size // 100_000):
            for client in clients:
                client.writer.write((b"x" * 998 + b"\r\n") * 100)
                await client.writer.drain()
            most = max(most, resident(w.gateway))

        def on_disk() -> int:
            return sum(path.stat().st_size for path in incoming.iterdir())

        await until(lambda: on_disk() > several * size - 100_000, "the mails to be on the disk")
        most = max(most, resident(w.gateway))
        assert most - before < 8_000_000
        answers = [await client.send(b"") for client in clients]
        assert {answer[:4] for answer in answers} == {"554 "}
        assert max(most, resident(w.gateway)) - before < 8_000_000
        assert not list(incoming.iterdir())


async def test_line_without_end_is_no_mail(tmp_path: Path) -> None:
    """A line longer than any program writes is refused with words about lines."""
    async with world(tmp_path) as w, line(w) as client:
        await client.hear()
        await client.to_data()
        answer = await client.send(mail(multipart(text("x" * 65_540), part(b"%PDF"))))
        assert answer == "554 5.6.0 a line of the mail is longer than 65536 octets"
        assert await client.say("QUIT") == "221 2.0.0 bye"


async def test_client_that_does_not_read_loses_its_place(tmp_path: Path) -> None:
    """Who sends commands and never takes an answer is thrown out, although it keeps the connection up."""
    smtp = {"timeout": "1s", "max_connections_per_host": 1}
    async with world(tmp_path, smtp=smtp) as w:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with deaf:
            deaf.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, ("127.0.0.1", w.gateway.smtp_port))
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(ENOUGH):
                    while True:
                        await loop.sock_sendall(deaf, b"MAIL\r\n" * 10_000)

            async def welcome() -> bool:
                async with line(w) as other:
                    return (await other.hear()).startswith("220 ")

            await until_true(welcome, "the deaf client's place to be free")


# --- time --------------------------------------------------------------------------------------------------


async def test_silent_and_dripping_clients_are_cut_off(tmp_path: Path) -> None:
    """Silence, a command that never ends and a mail that drips are cut off in time; a steady mail is not."""
    async with (
        world(tmp_path, smtp={"timeout": "1s"}) as w,
        line(w) as silent,
        line(w) as slow,
        line(w) as drip,
    ):
        for client in (silent, slow, drip):
            await client.hear()
        await drip.to_data()
        begun = time.monotonic()

        async def dripping(client: Line) -> str:
            told = asyncio.create_task(client.hear())
            with contextlib.suppress(*GONE):
                while not told.done():
                    client.writer.write(b"x")
                    await asyncio.wait([told], timeout=0.05)
            return await told

        answers = await asyncio.gather(silent.hear(), dripping(slow), dripping(drip))
        assert set(answers) == {"421 4.4.2 nothing came for too long"}
        assert 0.9 < time.monotonic() - begun < 5
        assert not w.gateway.said("mail_accepted")

        async with line(w) as steady:  # slower than the time for silence allows in all, and yet welcome
            await steady.hear()
            await steady.to_data()
            raw = mail_of(b"%PDF-1.4\n" + b"x" * 3000)
            for start in range(0, len(raw), 400):
                steady.writer.write(raw[start : start + 400])
                await asyncio.sleep(0.15)
            assert (await steady.send(b"")).startswith("554 5.6.0 ")


async def test_hostile_document_costs_its_own_mail_only(tmp_path: Path) -> None:
    """A document that never ends is answered within 30 s; a mail of somebody else passes meanwhile."""
    async with world(tmp_path, smtp={"timeout": "1s"}) as w, line(w) as hostile:
        await hostile.hear()
        await hostile.to_data()
        begun = time.monotonic()
        answer = asyncio.create_task(hostile.send(slow_paper()))
        mail_id = await w.mail("+13125560101")
        assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
        told = await answer
        assert told[:9] in {"451 4.3.0", "554 5.6.0"}, told
        assert time.monotonic() - begun < 30
        assert len(w.carrier.ledger) == 1
        assert not list((tmp_path / "incoming").iterdir())


async def test_full_pool_puts_mails_off_before_they_are_sent(tmp_path: Path) -> None:
    """While every child is stuck and a mail has waited long, others are put off at DATA; then all go on."""
    async with world(tmp_path, call_time=0) as w, contextlib.AsyncExitStack() as stack:
        stuck = children(w.gateway)
        for pid in stuck:
            os.kill(pid, signal.SIGSTOP)

        async def to_data(place: int) -> tuple[Line, str]:
            client = await stack.enter_async_context(line(w))
            await client.hear()
            for words in ("EHLO a", f"MAIL FROM:<{SENDER}>", f"RCPT TO:<+1312556{1000 + place}@fax.local>"):
                await client.say(words)
            return client, await client.say("DATA")

        sent: list[asyncio.Task[str]] = []
        for place in range(len(stuck) + 1):  # one must wait
            client, answer = await to_data(place)
            assert answer.startswith("354 ")
            sent.append(asyncio.create_task(client.send(mail_of(paper()))))
        client, answer = await to_data(len(sent))
        async with asyncio.timeout(ENOUGH):
            while answer.startswith("354 "):
                client.writer.close()
                client, answer = await to_data(len(sent))
        assert answer == "451 4.3.2 too much to do here; try again later"
        for pid in stuck:
            os.kill(pid, signal.SIGCONT)
        assert all(told.startswith("250 ") for told in await asyncio.gather(*sent))
        assert (await client.say("DATA")).startswith("354 ")
        assert (await client.send(mail_of(paper()))).startswith("250 ")


@pytest.mark.parametrize(
    ("networks", "answer"), [("10.0.0.0/8", "552 5.3.4 the mail is"), ("127.0.0.1/32", "250 ")]
)
async def test_the_world_sends_small_mails_to_the_postmaster(
    networks: str, answer: str, tmp_path: Path
) -> None:
    """Who may not fax takes no more than 1 MB of the disk with a mail that everybody may send."""
    async with world(tmp_path, senders={"networks": [networks]}) as w, line(w) as client:
        await client.hear()
        for words in ("EHLO a", f"MAIL FROM:<{SENDER}>", "RCPT TO:<postmaster@fax.local>", "DATA"):
            await client.say(words)
        assert (await client.send(b"Subject: a\r\n\r\n" + b"x\r\n" * 400_000)).startswith(answer)
        await client.say(f"MAIL FROM:<{SENDER}>")
        for words in ("RCPT TO:<postmaster@fax.local>", "DATA"):
            await client.say(words)
        assert (await client.send(b"Subject: a\r\n\r\nhello")).startswith("250 ")


# --- faults of ours ----------------------------------------------------------------------------------------


async def test_fault_of_ours_puts_the_mail_off_without_its_words(tmp_path: Path) -> None:
    """When the gateway's own folder is gone, mail is put off and nothing of the fault is told."""
    incoming = tmp_path / "incoming"
    async with world(tmp_path) as w:
        await asyncio.to_thread(shutil.rmtree, incoming)
        with pytest.raises(smtplib.SMTPResponseException) as caught:
            await w.mail("+13125560100")
        assert caught.value.smtp_code == 451
        assert caught.value.smtp_error == b"4.3.0 the mail could not be examined now; try again later"
        (failed,) = await until(lambda: w.gateway.said("mail_failed"), "the fault in the log")
        assert failed["level"] == "error"
        assert "FileNotFoundError" in failed["error"]
        await asyncio.to_thread(incoming.mkdir, 0o700)
        await w.mail("+13125560100", message=letter("+13125560100"))
