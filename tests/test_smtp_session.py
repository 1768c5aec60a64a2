"""One SMTP conversation, in the test's own loop: what needs limits smaller than a daemon's."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from harness import until
from smtp_peers import Taker

from gateway.smtp_session import Sessions, SmtpSession


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


async def test_a_client_that_leaves_in_the_middle_of_a_mail_leaves_nothing(tmp_path: Path) -> None:
    """Half a mail is none: its file goes with the client, and the next client's mail is taken."""
    taker = Taker(tmp_path)
    async with served(taker) as (sessions, begin):
        leaving = await begin()
        assert (await leaving.say("DATA")).startswith("354")
        leaving.writer.write(b"x" * 70 + b"\r\n" + b"y" * 50_000)
        (half,) = await until(taker.files, "the file of the mail")
        await until(lambda: half.stat().st_size, "its first octets")
        leaving.writer.close()
        await until(lambda: not half.exists() and not sessions.open, "the session to end")
        client = await begin()
        assert (await client.say("DATA")).startswith("354")
        assert await client.say("\r\nhello\r\n.") == "250 2.0.0 taken"
    assert taker.taken == [b"\r\nhello\r\n"]
    assert not taker.files()


async def test_a_fault_of_ours_is_temporary_and_ends_the_conversation(tmp_path: Path) -> None:
    """An unforeseen fault is answered 451 without its words, and the rest of the mail runs as no command."""
    async with served(Taker(tmp_path, ValueError("the secret of the fault"))) as (_, begin):
        client = await begin()
        await client.say("DATA")
        answer = await client.say("\r\nhello\r\n.\r\nNOOP")
        assert answer.startswith("451 4.3.0")
        assert "secret" not in answer
        assert await client.answer() == ""


async def test_a_client_that_sends_fast_lets_the_others_have_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much of a mail has come already, between two large pieces everybody else is looked after."""
    loop, turn, large = asyncio.get_running_loop(), 0, []

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(next_turn)

    def noted(session: SmtpSession, data: bytes) -> None:
        if len(data) > 200_000:
            large.append(turn)
        receive(session, data)

    receive = SmtpSession.data_received
    monkeypatch.setattr(SmtpSession, "data_received", noted)
    next_turn()
    async with served(Taker(tmp_path)) as (_, begin):
        fast = await begin()
        assert (await fast.say("DATA")).startswith("354")
        with socket.socket(fileno=fast.writer.get_extra_info("socket").fileno()) as wire:
            sent = 0
            with contextlib.suppress(BlockingIOError):  # as much as fits: nobody reads it meanwhile
                while sent < 9_000_000:
                    sent += wire.send(b"x" * 998 + b"\r\n")
            wire.detach()
        assert sent > 1_000_000
        await until(lambda: len(large) > 3, "the mail to come in")
        assert len(set(large)) == len(large)
