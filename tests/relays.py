"""A mail relay on a free port, with faults at every stage of a session, for the tests of mail out."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from aiosmtpd.smtp import SMTP, AuthResult

CUT = "(the connection is cut)"
STALL = "(no answer)"


@dataclass
class Taken:
    """A mail that the relay answered 250."""

    sender: str
    recipient: str
    data: bytes
    options: list[str]


@dataclass
class TestRelay:
    """What the relay does, and what it saw.

    `faults` replaces its answer to a verb, the greeting ("GREETING") or the final dot ("DOT") by another
    reply, `CUT` or `STALL`. `refused` does so for single recipients. `password` is what AUTH wants.
    """

    __test__ = False

    faults: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    password: str | None = None
    port: int = 0
    taken: list[Taken] = field(default_factory=list)
    verbs: list[str] = field(default_factory=list)
    sessions: int = 0
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle_RCPT(  # noqa: N802 -- aiosmtpd's name
        self, server: Any, _session: Any, envelope: Any, address: str, _options: list[str]
    ) -> str:
        """Take or refuse a recipient."""
        reply: str = await server.fault(self.refused.get(address, "250 OK"))
        if reply.startswith("250"):
            envelope.rcpt_tos.append(address)
        return reply

    async def handle_DATA(self, server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 -- as above
        """Keep the mail, or not."""
        if (fault := self.faults.get("DOT")) is not None:
            return await server.fault(fault)  # type: ignore[no-any-return]  # untyped library
        self.taken.append(
            Taken(envelope.mail_from, envelope.rcpt_tos[0], envelope.content, envelope.mail_options)
        )
        return "250 OK"


class _Session(SMTP):
    """One session with the faults of its relay."""

    def __init__(self, relay: TestRelay, **settings: Any) -> None:
        super().__init__(relay, hostname="relay.test", ident="test", **settings)
        self._relay = relay
        for verb in list(self._smtp_methods):
            method = self._answer if verb in relay.faults else self._smtp_methods[verb]
            self._smtp_methods[verb] = partial(self._note, verb, method)

    async def _note(self, verb: str, method: Any, argument: str | None) -> None:
        self._relay.verbs.append(verb)
        await method(self._relay.faults.get(verb, argument))

    async def _answer(self, fault: str) -> None:
        await self.push(await self.fault(fault))

    async def push(self, status: Any) -> None:
        if status == f"220 {self.hostname} {self.__ident__}":
            self._relay.sessions += 1
            if "GREETING" in self._relay.faults:
                status = await self.fault(self._relay.faults["GREETING"])
        if status:
            await super().push(status)

    async def fault(self, fault: str) -> str:
        """Return the reply to give, or do what was asked for instead."""
        if fault == CUT:
            cast("asyncio.Transport", self.transport).abort()
            return ""
        if fault == STALL:
            self._relay.stalled.set()
            await self._relay.released.wait()
            return "250 OK"
        return fault


@contextlib.asynccontextmanager
async def serving(
    relay: TestRelay, *, tls: ssl.SSLContext | None = None, implicit: bool = False, **settings: Any
) -> AsyncIterator[TestRelay]:
    """Run a relay, with STARTTLS or (`implicit`) TLS from the start where `tls` is given.

    `settings` are aiosmtpd's.
    """
    loop = asyncio.get_running_loop()
    sessions: list[_Session] = []

    def login(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        good = relay.password is not None and data.password == relay.password.encode()
        return AuthResult(success=good, handled=False)

    def session() -> _Session:
        sessions.append(
            _Session(
                relay,
                loop=loop,
                tls_context=None if implicit else tls,
                auth_require_tls=False,
                authenticator=login,
                auth_exclude_mechanism=["LOGIN"] if relay.password is not None else ["LOGIN", "PLAIN"],
                **settings,
            )
        )
        return sessions[-1]

    server = await loop.create_server(session, "127.0.0.1", relay.port, ssl=tls if implicit else None)
    relay.port = server.sockets[0].getsockname()[1]
    try:
        yield relay
    finally:
        relay.released.set()
        server.close()
        tasks = [task for task in (one._handler_coroutine for one in sessions) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for left in [one.transport for one in sessions if one.transport is not None]:
            cast("asyncio.Transport", left).abort()
        await asyncio.sleep(0)  # the transports close in the next turn of the loop
