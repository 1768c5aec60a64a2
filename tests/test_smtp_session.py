"""One SMTP conversation, in the test's own loop: what needs limits smaller than a daemon's."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from aiosmtpd.smtp import Session as Peer

from gateway import smtp_session
from gateway.smtp_session import MailEnvelope, Sessions, SmtpSession


class Taker:
    """A handler that takes every mail, or meets a fault when it shall take one."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.taken: list[bytes] = []

    async def handle_MAIL(  # noqa: N802 -- aiosmtpd's name
        self, _server: SmtpSession, _session: Peer, envelope: MailEnvelope, address: str, _options: list[str]
    ) -> str:
        """Take any sender."""
        envelope.mail_from = envelope.sender = address
        return "250 2.1.0 ok"

    async def recipient(self, _session: Peer, envelope: MailEnvelope, raw: str) -> str:
        """Take any recipient."""
        envelope.rcpt_tos.append(raw)
        return "250 2.1.5 ok"

    def busy(self) -> str | None:
        """Have time."""
        return None

    async def handle_DATA(self, server: SmtpSession, _session: Peer, envelope: MailEnvelope) -> str:  # noqa: N802
        """Take the mail, or fail."""
        server.begin_answer()
        if self.fault is not None:
            raise self.fault
        self.taken.append(envelope.original_content or b"")
        return "250 2.0.0 taken"


@contextlib.asynccontextmanager
async def served(
    taker: Taker,
) -> AsyncIterator[tuple[Sessions, Callable[[], "asyncio.Future[Conversation]"]]]:
    """Serve on a free port; yields the sessions, and what opens a conversation that got as far as RCPT."""
    sessions = Sessions(100, 100)
    server = await asyncio.get_running_loop().create_server(
        lambda: SmtpSession(taker, sessions, size_limit=10_000_000, hostname="h.example", timeout=30),
        "127.0.0.1",
    )
    port = server.sockets[0].getsockname()[1]
    opened: list[Conversation] = []

    async def begin() -> Conversation:
        conversation = Conversation(*await asyncio.open_connection("127.0.0.1", port))
        opened.append(conversation)
        assert await conversation.answer() == "220 h.example ESMTP"
        for line in ("HELO me", "MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>"):
            assert (await conversation.say(line)).startswith("250")
        return conversation

    try:
        yield sessions, lambda: asyncio.ensure_future(begin())
    finally:
        for conversation in opened:
            conversation.writer.close()
            with contextlib.suppress(OSError):
                await conversation.writer.wait_closed()
        server.close()
        async with asyncio.timeout(20):
            while sessions.open:  # noqa: ASYNC110 -- each ends in its own task
                await asyncio.sleep(0)


class Conversation:
    """The client's side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def answer(self) -> str:
        """Return the next line, empty at the end."""
        async with asyncio.timeout(20):
            return (await self.reader.readline()).decode().rstrip()

    async def say(self, line: str) -> str:
        """Say a line and return its answer."""
        self.writer.write(line.encode() + b"\r\n")
        return await self.answer()


async def test_mails_in_flight_are_capped_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the mails coming in hold too much memory, new ones are put off before they are sent."""
    monkeypatch.setattr(smtp_session, "MOST_OCTETS", 1_000_000)
    taker = Taker()
    async with served(taker) as (sessions, begin):
        large = await begin()
        assert (await large.say("DATA")).startswith("354")
        large.writer.write(b"x" * 70 + b"\r\n" + b"y" * 1_100_000)
        await large.writer.drain()
        async with asyncio.timeout(20):
            while sessions.octets <= 1_000_000:  # noqa: ASYNC110 -- it is in another task's hands
                await asyncio.sleep(0)
        small = await begin()
        assert await small.say("DATA") == "451 4.3.2 too much to do here; try again later"
        large.writer.close()
        async with asyncio.timeout(20):
            while sessions.octets:  # noqa: ASYNC110 -- as above
                await asyncio.sleep(0)
        assert (await small.say("DATA")).startswith("354")
        assert await small.say("\r\nhello\r\n.") == "250 2.0.0 taken"
    assert taker.taken == [b"\r\nhello\r\n"]


async def test_a_fault_of_ours_is_temporary_and_ends_the_conversation() -> None:
    """An unforeseen fault is answered 451 without its words, and the rest of the mail runs as no command."""
    async with served(Taker(ValueError("the secret of the fault"))) as (_, begin):
        client = await begin()
        await client.say("DATA")
        answer = await client.say("\r\nhello\r\n.\r\nNOOP")
        assert answer.startswith("451 4.3.0")
        assert "secret" not in answer
        assert await client.answer() == ""
