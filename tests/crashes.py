"""A world that can be made to stand still, so that the gateway can be ended at a moment of one's choice.

Nothing in the gateway helps: the carrier halts inside a request, the relay before an answer, the client in
the middle of its mail; somebody else locks the store. `stages` has the moments.
"""

import asyncio
import contextlib
import email.policy
import itertools
import signal
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, Envelope
from aiosmtpd.smtp import Session as Peer
from harness import FINAL, PATIENCE, SENDER, Mailbox, World, letter, numbers, until, world
from ports import GONE

Here = Callable[[str, Mapping[str, Any]], bool]
"""Whether a step of the sandbox, by its name and what is told of it, is where to stand still."""
MAILBOX_MOMENTS = ("rcpt", "data", "dot")


class Gate:
    """A moment that the test waits for and that lasts until the test opens the gate."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()
        self._open = asyncio.Event()

    async def hold(self) -> None:
        """Say that the moment has come, and make it last."""
        self._reached.set()
        await self._open.wait()

    async def reached(self) -> None:
        """Return when the moment has come."""
        async with asyncio.timeout(PATIENCE):
            await self._reached.wait()

    def open(self) -> None:
        """Let the world move on, now and whenever it comes here again."""
        self._open.set()


def _open_gate() -> Gate:
    gate = Gate()
    gate.open()
    return gate


# --- the relay ---------------------------------------------------------------------------------------


@dataclass
class HaltingMailbox(Mailbox):
    """A relay that stands still where a gate is shut.

    The gates are "rcpt" (not answered yet), "data" (354 said) and "dot" (the mail is kept, 250 not said).
    """

    gates: dict[str, Gate] = field(default_factory=lambda: {name: _open_gate() for name in MAILBOX_MOMENTS})

    async def handle_RCPT(  # noqa: N802 -- aiosmtpd's name
        self, _server: SMTP, _session: Peer, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        """Answer RCPT when the gate is open."""
        await self.gates["rcpt"].hold()
        return await super().handle_RCPT(_server, _session, envelope, address, _options)

    async def handle_DATA(self, _server: SMTP, _session: Peer, envelope: Envelope) -> str:  # noqa: N802
        """Keep the mail, and answer when the gate is open."""
        answer = await super().handle_DATA(_server, _session, envelope)
        await self.gates["dot"].hold()
        return answer

    async def open(self) -> None:
        """Listen, on the same port as before if there was one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _HaltingSession(self, enable_SMTPUTF8=True, loop=loop), "127.0.0.1", self.port
        )
        self.port = self._server.sockets[0].getsockname()[1]


class _HaltingSession(SMTP):
    """A session that stands still once it has said 354."""

    async def push(self, status: Any) -> None:
        await super().push(status)
        if status.startswith("354"):
            await self.event_handler.gates["data"].hold()


# --- the client --------------------------------------------------------------------------------------


class Client:
    """A mail client that goes on when it is told to, and to whom a connection may be lost."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, port: int) -> "Client":
        """Connect; the greeting is the first answer."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def begin(self, *numbers: str) -> None:
        """Go as far as 354."""
        recipients = [f"RCPT TO:<{number}@fax.local>" for number in numbers]
        assert (await self.answer()).startswith("220")
        for command in ("HELO client", f"MAIL FROM:<{SENDER}>", *recipients, "DATA"):
            await self.send(command.encode() + b"\r\n")
            answer = await self.answer()
            assert answer[:1] in {"2", "3"}, answer

    async def send(self, data: bytes) -> None:
        """Send, as far as there is somebody to take it."""
        with contextlib.suppress(*GONE):
            self._writer.write(data)
            await self._writer.drain()

    async def answer(self) -> str:
        """Return the next answer, "" when the connection is gone."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE):
                return (await self._reader.readline()).decode().rstrip()
        return ""

    def close(self) -> None:
        """Leave without a word."""
        self._writer.close()


# --- the store ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Keep everybody else from writing to the store."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None, timeout=PATIENCE)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    """Look into the store."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


# --- one mail on its way -------------------------------------------------------------------------------


@dataclass
class Scene:
    """One mail in a world that may have seen others before, and what its client was told."""

    world: World
    relay: HaltingMailbox
    store: Path
    numbers: tuple[str, ...]
    behaviours: tuple[str, ...] = ("delivered",)  # what the carrier's ledger shows for each number in the end
    told: str = ""  # the mail's id, once a 250 was read
    afterwards: Callable[[], Awaitable[object]] | None = None  # what an operator does after the restart
    alerts: frozenset[str] = frozenset()  # of these the postmaster may hear
    _message: EmailMessage | None = None
    _holds: list[tuple[Gate, Here]] = field(default_factory=list)
    _up: Gate = field(default_factory=_open_gate)
    _exit: asyncio.Task[int] | None = None
    _faxes: int = 0  # of earlier mails
    _mails: int = 0  # that had come to the relay

    def __post_init__(self) -> None:
        """Listen to the carrier's steps from now on, and to nothing that was said before."""
        self.world.on_step = self._step
        self.world.gateway.log.clear()
        self._faxes = len(rows(self.store, "SELECT id FROM faxes"))
        self._mails = len(self.relay.mails)

    async def _step(self, name: str, told: Mapping[str, Any]) -> None:
        for gate, here in self._holds:
            if here(name, told):
                await gate.hold()
        if name == "webhook":  # while nobody listens, the carrier would give up after three tries
            await self._up.hold()

    def hold(self, here: Here) -> Gate:
        """Let the carrier stand still at the steps that fit."""
        gate = Gate()
        self._holds.append((gate, here))
        return gate

    # the mail

    @property
    def message(self) -> EmailMessage:
        """The mail: the same one each time."""
        if self._message is None:
            self._message = letter(*self.numbers)
        return self._message

    @message.setter
    def message(self, message: EmailMessage) -> None:
        self._message = message

    @property
    def data(self) -> bytes:
        """The mail as it goes over the wire, with its final dot."""
        return self.message.as_bytes(policy=email.policy.SMTP) + b".\r\n"

    async def client(self) -> Client:
        """Return a client that was just told 354."""
        client = await Client.connect(self.world.gateway.smtp_port)
        await client.begin(*self.numbers)
        return client

    async def mail(self) -> None:
        """Mail it and hear the 250."""
        client = await self.client()
        await client.send(self.data)
        await self.hear(client)
        assert self.told

    async def hear(self, client: Client) -> None:
        """Remember what the client is told after the final dot, if anything."""
        answer = await client.answer()
        client.close()
        if answer.startswith("250 2.0.0 queued as "):
            self.told = answer.rpartition(" ")[2]

    # the gateway

    async def logged(self, event: str, **fields: Any) -> None:
        """Return when the gateway has said that."""
        await until(lambda: self.world.gateway.said(event, **fields), f"the log to say {event}")

    async def in_state(self, state: str) -> None:
        """Return when a fax is in that state."""
        query = f"SELECT 1 FROM faxes WHERE state = '{state}'"  # noqa: S608 -- a word of ours
        await until(lambda: rows(self.store, query), f"a fax that is {state}")

    async def kill(self) -> None:
        """End the gateway as a power cut would."""
        self._up = Gate()
        await self.world.gateway.kill()

    async def end_starting(self, number: signal.Signals, moment: Callable[[], Any]) -> int:
        """Start the gateway, send it a signal as soon as `moment` finds something, return its exit code."""
        gateway = self.world.gateway
        gateway.log.clear()
        start = asyncio.create_task(gateway.start())
        await until(moment, "a moment of the start")
        code = await gateway._end(number)
        await asyncio.gather(start, return_exceptions=True)  # it complains of a start without an end
        return code

    async def terminate(self, *, carrier_waits: bool = True) -> None:
        """Tell the gateway to stop, and return when it has begun to."""
        if carrier_waits:
            self._up = Gate()
        self._exit = asyncio.create_task(self.world.gateway.stop())
        await self.logged("stopping")

    async def stopped(self) -> int:
        """Return the exit code of a gateway that was told to stop."""
        assert self._exit is not None
        return await asyncio.wait_for(self._exit, PATIENCE)

    async def restart(self) -> None:
        """Start the gateway again, and let an operator do what is to be done."""
        await self.world.restart()
        self._up.open()
        if self.afterwards is not None:
            await self.afterwards()

    # the end

    async def check(self) -> None:
        """Assert what must be true in the end: for every 250 one fax to each number and one final reply.

        A client that saw no 250 mails again first.
        """
        if not self.told:
            await self.mail()
        await until(self._settled, "every fax to end and every mail to leave")
        ended = [(f"{self.told}-{place}", "delivered") for place, _ in enumerate(self.numbers, start=1)]
        assert rows(self.store, "SELECT id, state FROM faxes ORDER BY id")[self._faxes :] == ended
        for number in self.numbers:
            assert tuple(entry.behaviour for entry in self.world.taken(number)) == self.behaviours
        assert sorted(self.finals()) == ended
        new = self.relay.mails[self._mails :]
        assert {mail["X-Fax-Alert"] for mail in new} - {None} <= self.alerts
        assert not list((self.store.parent / "incoming").iterdir())
        self.calm()

    def finals(self) -> list[tuple[str, str]]:
        """Return fax and outcome of each final reply that came, told apart by their Message-IDs."""
        new = {mail["Message-ID"]: mail for mail in self.relay.mails[self._mails :]}
        told = [(mail["X-Fax-Id"], mail["X-Fax-Outcome"]) for mail in new.values()]
        return [(fax, outcome) for fax, outcome in told if outcome in FINAL]

    def _settled(self) -> bool:
        faxes, ended = rows(self.store, "SELECT count(*), count(ended_at) FROM faxes")[0]
        left = rows(self.store, "SELECT count(*) FROM outbox WHERE sent_at IS NULL AND given_up_at IS NULL")
        return faxes == ended == self._faxes + len(self.numbers) and left == [(0,)]

    def calm(self) -> None:
        """Assert that the gateway has not complained since its last start, nor a library ever."""
        assert [line for line in self.world.gateway.log if line["level"] == "error"] == []
        assert self.world.gateway.stderr == ""


class Theatre:
    """A world in which scene follows scene; a new world, where a scene ended in disorder."""

    def __init__(self, stack: contextlib.AsyncExitStack, folders: Iterator[Path], **sections: Any) -> None:
        self._stack = stack
        self._folders = folders
        self._sections = sections
        self._numbers = numbers()
        self._last: tuple[World, HaltingMailbox, Path] | None = None

    @asynccontextmanager
    async def scene(self, mails_to: int = 1) -> AsyncIterator[Scene]:
        """Yield a mail to that many numbers."""
        parts = self._last or await self._world()
        self._last = None
        yield Scene(*parts, tuple(next(self._numbers) for _ in range(mails_to)))
        self._last = parts

    async def _world(self) -> tuple[World, HaltingMailbox, Path]:
        await self._stack.aclose()
        folder = next(self._folders)
        relay = HaltingMailbox()
        await relay.open()
        self._stack.push_async_callback(relay.close)
        sections: dict[str, Any] = dict(self._sections)
        sections["replies"] = {"relay": f"smtp://127.0.0.1:{relay.port}"}
        opened = await self._stack.enter_async_context(world(folder, **sections))
        return opened, relay, folder / "gateway.db"


@asynccontextmanager
async def theatre(folder: Path, **sections: dict[str, Any]) -> AsyncIterator[Theatre]:
    """Open a theatre below `folder`; `sections` are settings over `harness.QUICK`."""

    def folders() -> Iterator[Path]:
        for place in itertools.count(1):
            (folder / str(place)).mkdir()
            yield folder / str(place)

    async with contextlib.AsyncExitStack() as stack:
        yield Theatre(stack, folders(), **sections)
