"""Whom the gateways of a crash run talk to: the carrier, the balancer of its webhooks, the relay of each.

Each tells the executioner what moment has come at which gateway.
"""

import asyncio
import contextlib
import email.parser
import random
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from aiosmtpd.smtp import SMTP, Envelope
from aiosmtpd.smtp import Session as Peer
from crashes import Gate, HaltingMailbox
from harness import FINAL
from torture_deeds import (
    RELAY_MOMENTS,
    Executioner,
    RestlessGateway,
)
from torture_verdict import Call, Reply

from gateway.sandbox import Sandbox, SandboxOptions
from gateway.sandbox_calls import SandboxFax

CALL_TIME = 0.2
FORGOTTEN_AFTER = 30.0  # seconds: the carrier's list would grow without end, and each doubt reads all of it


class Carrier:
    """The sandbox, with a memory that does not grow, and its moments told."""

    def __init__(self, script: dict[str, Sequence[str]], reached: Executioner | None = None) -> None:
        self.sandbox = Sandbox(SandboxOptions(call_time=CALL_TIME, lag=1.0, script=script))
        self.sandbox.on_step = self._step
        self.asked = 0
        self.executioner = reached
        self._caller: dict[str, str] = {}  # number: gateway that said it calls it
        self._ended: dict[str, tuple[float, bool]] = {}
        self._number: ContextVar[str] = ContextVar("number")

    def heard(self, gateway: str, line: dict[str, Any]) -> None:
        """Learn from a gateway's log that it is about to call a number."""
        if line["event"] == "call_begun":
            self._caller[line["to"]] = gateway
            while len(self._caller) > 1000:
                del self._caller[next(iter(self._caller))]

    async def _step(self, name: str, told: dict[str, Any]) -> None:
        if name == "body_read":
            self.asked += 1
            self._number.set(told["to"])
            await self._reached("after the POST was read", told["to"])
        elif name == "accepted":
            await self._reached("right before the 202", told["to"])
        elif name == "answered" and told["method"] == "POST" and told["path"].endswith("/faxes"):
            await self._reached("right after the 202", self._number.get(""))

    async def _reached(self, moment: str, number: str) -> None:
        if self.executioner is None or not self.executioner.waits_for(moment):
            return
        for _ in range(20):  # its log may come a little later than its request
            if (gateway := self._caller.get(number)) is not None:
                await self.executioner.reached(moment, gateway)
                return
            await asyncio.sleep(0.01)

    def forget(self, told: set[str]) -> None:
        """Drop what is over: ended calls to numbers whose end was told."""
        self.sandbox.requests.clear()
        self.sandbox.events.clear()
        faxes = self.sandbox._exchange.faxes
        before = time.time() - FORGOTTEN_AFTER
        for fax in [fax for fax in faxes.values() if fax.created_at < before and fax.to in told]:
            self._note_end(fax)
            del faxes[fax.id]

    def _note_end(self, fax: SandboxFax) -> None:
        if fax.outcome is not None:
            self._ended[fax.id] = (fax.updated_at, fax.outcome.status == "delivered")

    def calls(self) -> list[Call]:
        """Return the ledger, each call with its end."""
        for fax in self.sandbox._exchange.faxes.values():
            self._note_end(fax)
        made = []
        for entry in self.sandbox.ledger:
            ended_at, delivered = self._ended.get(entry.fax_id, (None, False))
            made.append(Call(entry.to, entry.fax_id, entry.time, ended_at, delivered, entry.pages))
        return made


class Balancer:
    """Hands each webhook to a gateway that listens, as a balancer would; where none does, it fails."""

    def __init__(self, seed: int, gateways: Sequence[RestlessGateway], executioner: Executioner) -> None:
        self._chance = random.Random(f"{seed} webhooks")  # noqa: S311 -- repeatable on purpose
        self._gateways = gateways
        self._executioner = executioner
        self._server: asyncio.Server | None = None

    async def open(self) -> str:
        """Listen; return the address for the carrier."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/webhooks/telnyx"

    async def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            async with asyncio.timeout(10):
                request = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.partition(b":")[2])
                    for line in request.split(b"\r\n")
                    if line.lower().startswith(b"content-length:")
                )
                request += await reader.readexactly(length)
                for gateway in self._chance.sample(self._gateways, len(self._gateways)):
                    try:
                        inward, outward = await asyncio.open_connection("127.0.0.1", gateway.http_port)
                    except OSError:
                        continue
                    with contextlib.closing(outward):
                        writer.write(await self._exchange(gateway.name, request, inward, outward))
                        await writer.drain()
                    return

    async def _exchange(
        self, gateway: str, request: bytes, inward: asyncio.StreamReader, outward: asyncio.StreamWriter
    ) -> bytes:
        half = len(request) // 2
        if self._executioner.waits_for("in the middle of a webhook"):
            outward.write(request[:half])
            await outward.drain()
            await self._executioner.reached("in the middle of a webhook", gateway)
            request = request[half:]
        outward.write(request)
        await outward.drain()
        answer = await inward.readuntil(b"\r\n\r\n")
        if await self._executioner.reached("before a webhook's answer arrives", gateway):
            raise ConnectionResetError
        return answer


class _Checkpoint(Gate):
    """A moment of the relay; it lasts as long as whatever is done to the gateway there."""

    def __init__(self, moment: str, gateway: str, executioner: Executioner) -> None:
        super().__init__()
        self._told = (moment, gateway)
        self._executioner = executioner

    async def hold(self) -> None:
        await self._executioner.reached(*self._told)


class Relay(HaltingMailbox):
    """Where the replies of one gateway go; now and then it puts one off."""

    def __init__(
        self, seed: int, gateway: str, executioner: Executioner, note: Callable[[Reply], None]
    ) -> None:
        moments = zip(("rcpt", "data", "dot"), RELAY_MOMENTS, strict=True)
        super().__init__(gates={name: _Checkpoint(moment, gateway, executioner) for name, moment in moments})
        self._chance = random.Random(f"{seed} relay {gateway}")  # noqa: S311 -- repeatable on purpose
        self._note = note
        self.answer = lambda _recipient: "451 4.3.0 later" if self._chance.random() < 0.01 else "250 2.0.0 ok"
        self._parser = email.parser.BytesHeaderParser()

    async def handle_DATA(self, _server: SMTP, _session: Peer, envelope: Envelope) -> str:  # noqa: N802
        """Write down which fax the mail is about."""
        mail = self._parser.parsebytes((envelope.original_content or b"").partition(b"\r\n\r\n")[0])
        if mail["X-Fax-Outcome"] in FINAL:
            told = ("Message-ID", "X-Fax-Id", "X-Fax-Number", "X-Fax-Outcome")
            self._note(Reply(*(str(mail[name]) for name in told)))
        await self.gates["dot"].hold()
        return "250 2.0.0 taken"
