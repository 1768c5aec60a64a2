"""A whole gateway as real processes: the daemon, the stand-in carrier, a mailbox behind a relay."""

import asyncio
import contextlib
import email
import email.policy
import json
import os
import signal
import smtplib
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, Envelope
from aiosmtpd.smtp import Session as Peer
from papers import paper
from ports import free_port

from gateway.sandbox import OnStep, Sandbox, SandboxOptions

SENDER = "clerk@example.com"
POSTMASTER = "postmaster@example.com"
PATIENCE = 30.0
"""Seconds that a test waits for something to happen before it fails."""


async def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until `condition()` is true and return its value; fail with `what` after `patience` seconds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + patience
    while not (value := condition()):
        assert loop.time() < end, f"waited {patience:.0f} s in vain for {what}"
        await asyncio.sleep(0.02)
    return value


@dataclass
class Mailbox:
    """The relay that replies go to: a real SMTP server in the test's loop; `answer` decides on each mail."""

    mails: list[EmailMessage] = field(default_factory=list)
    envelopes: list[tuple[str, list[str]]] = field(default_factory=list)
    answer: Callable[[str], str] = field(default=lambda _recipient: "250 2.0.0 taken")
    port: int = field(default_factory=free_port)
    _server: asyncio.Server | None = None

    async def handle_RCPT(  # noqa: N802 -- aiosmtpd's name
        self, _server: SMTP, _session: Peer, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        """Answer RCPT as the test wants it."""
        answer = self.answer(address)
        if answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(self, _server: SMTP, _session: Peer, envelope: Envelope) -> str:  # noqa: N802
        """Keep the mail."""
        content = envelope.original_content or b""
        self.mails.append(email.message_from_bytes(content, policy=email.policy.default))
        self.envelopes.append((envelope.mail_from or "", list(envelope.rcpt_tos)))
        return "250 2.0.0 taken"

    async def open(self) -> None:
        """Listen, after `close` on the same port as before."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: SMTP(self, enable_SMTPUTF8=True, loop=loop), "127.0.0.1", self.port
        )

    async def close(self) -> None:
        """Stop listening: the relay is away."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def about(self, fax_id: str, outcome: str | None = None) -> list[EmailMessage]:
        """Return the replies about a fax."""
        found = [mail for mail in self.mails if mail["X-Fax-Id"] == fax_id]
        return [mail for mail in found if outcome in {None, mail["X-Fax-Outcome"]}]

    def finals(self) -> list[EmailMessage]:
        """Return the final replies, each once although it may have come twice under one Message-ID."""
        finals = {mail["Message-ID"]: mail for mail in self.mails if mail["X-Fax-Outcome"] in FINAL}
        return list(finals.values())

    def alerts(self) -> list[EmailMessage]:
        """Return the mails to the postmaster."""
        return [mail for mail in self.mails if mail["To"] == POSTMASTER]


FINAL = {"delivered", "failed", "cancelled"}

QUICK: dict[str, dict[str, Any]] = {
    "smtp": {"listen": "127.0.0.1:0"},
    "http": {"listen": "127.0.0.1:0"},
    "telnyx": {
        "api_key": "sandbox-key",
        "connection_id": "1232154810234",
        "from_number": "+13125790015",
        "channels": 8,
        "poll_after": "30s",
        "doubt_checks": ["300ms", "600ms", "900ms"],
    },
    "replies": {"postmaster": POSTMASTER, "attach_first_page": False},
    "retries": {
        "busy": ["100ms"] * 4,
        "no_answer": ["100ms"] * 3,
        "line": ["100ms"] * 3,
        "provider": ["100ms"] * 3,
        "declined": ["100ms"],
    },
    "log": {"format": "json"},
}
"""Settings with the waits of minutes made milliseconds."""


PROGRAM = (sys.executable, "-m", "gateway")


def program_after(lines: str) -> tuple[str, ...]:
    """Return how to start a gateway after these lines of Python, which shorten what no setting does."""
    return (sys.executable, "-c", f"{lines}\nfrom gateway import cli\ncli.main()")


class Gateway:
    """One `fax-gateway serve` with a folder and a configuration of its own.

    `program` starts it, with `environ` beside what every command needs.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, dict[str, Any]],
        program: Sequence[str] = PROGRAM,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self._program = program
        self._environ = environ or {}
        self.config = folder / "config.toml"
        self.log: list[dict[str, Any]] = []  # since the last start
        self.stdout = self.stderr = ""
        self.options: tuple[str, ...] = ()  # of `serve`
        self.smtp_port = self.http_port = 0
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []

    def write_config(self) -> None:
        """Write the configuration file."""
        sections = [
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())
            for name, section in self.settings.items()
        ]
        self.config.write_text("\n".join(sections))
        self.config.chmod(0o640)

    async def start(self) -> None:
        """Start the daemon and return when it says that it is ready, after a restart on the same ports."""
        for section in (self.settings["smtp"], self.settings["http"]):
            if section["listen"] == "127.0.0.1:0":
                section["listen"] = f"127.0.0.1:{free_port()}"
        self.write_config()
        self.log.clear()
        self._process = await asyncio.create_subprocess_exec(
            *self._program, "serve", *self.options, "--config", str(self.config),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=self._environment(),
            limit=2**20,
        )  # fmt: skip
        self._readers = [asyncio.create_task(self._read_log()), asyncio.create_task(self._read_stderr())]
        ready = await until(lambda: self.said("ready") or self._ended(), "the gateway to be ready")
        assert ready is not True, f"the gateway ended at once: {self.stderr}"
        self.smtp_port = int(ready[0]["smtp"][0].rpartition(":")[2])
        self.http_port = int(ready[0]["http"].rpartition(":")[2])

    def _environment(self) -> dict[str, str]:
        wanted = ("PATH", "HOME", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG", "COVERAGE_FILE")
        return {name: os.environ[name] for name in wanted if name in os.environ} | dict(self._environ)

    def _ended(self) -> bool:
        return self._process is not None and self._process.returncode is not None

    async def _read_log(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.stdout += line.decode(errors="replace")
            with contextlib.suppress(ValueError):
                self.log.append(json.loads(line))

    async def _read_stderr(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            self.stderr += line.decode(errors="replace")

    def said(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the log lines of that name with these fields."""
        return [
            line
            for line in self.log
            if line["event"] == event and all(line.get(name) == value for name, value in fields.items())
        ]

    @property
    def webhook_url(self) -> str:
        """Where the carrier sends its events."""
        return f"http://127.0.0.1:{self.http_port}/webhooks/telnyx"

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self._process is not None
        return self._process.pid

    async def kill(self) -> None:
        """Stop it as a power cut would, and return when it is gone."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """Stop it as systemd would; return its exit code."""
        return await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        code = await self._process.wait()
        await asyncio.gather(*self._readers)
        return code

    async def close(self) -> None:
        """Make sure that it is gone."""
        if self._process is not None and self._process.returncode is None:
            await self.kill()

    async def run(self, *words: str) -> tuple[int, str, str]:
        """Run an operator's command beside the daemon; return exit code, output and errors."""
        process = await asyncio.create_subprocess_exec(
            *self._program, *words, "--config", str(self.config),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=self._environment(),
        )  # fmt: skip
        output, errors = await process.communicate()
        assert process.returncode is not None
        return process.returncode, output.decode(), errors.decode()

    async def show(self, fax_id: str) -> dict[str, Any]:
        """Return what `show --json` says about one fax."""
        code, output, errors = await self.run("show", fax_id, "--json")
        assert code == 0, errors
        shown: dict[str, Any] = json.loads(output)[0]
        return shown


def letter(
    *numbers: str,
    name: str = "letter.pdf",
    message_id: str | None = None,
    text: str = "",
    document: bytes | None = None,
) -> EmailMessage:
    """Make a mail with one PDF to these numbers: `document`, or one that `text` tells from others."""
    document = paper(text=text or "page") if document is None else document
    message = EmailMessage()
    message["From"] = SENDER
    message["To"] = ", ".join(f"{number}@fax.local" for number in numbers)
    message["Subject"] = "A letter"
    message["Message-ID"] = message_id or email.utils.make_msgid(domain="example.com")
    message.set_content("Please fax this.")
    message.add_attachment(document, maintype="application", subtype="pdf", filename=name)
    return message


def _hand_over(port: int, message: EmailMessage, sender: str, recipients: list[str]) -> str:
    with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE) as door:
        door.ehlo()
        for code, answer in (door.mail(sender), *(door.rcpt(to) for to in recipients)):
            if code >= 400:
                raise smtplib.SMTPResponseException(code, answer)
        code, answer = door.data(message.as_bytes(policy=email.policy.SMTP))
        if code >= 400:
            raise smtplib.SMTPResponseException(code, answer)
        return answer.decode()


def words(mail: EmailMessage) -> str:
    """Return what a person reads in a mail, as one line."""
    body = mail.get_body(("plain",))
    assert body is not None
    return " ".join(str(body.get_content()).split())


@dataclass
class World:
    """Gateway, carrier and mailbox, wired to each other.

    `posts` are the numbers that the carrier was asked to call, in order, also where it took nothing;
    `on_step` is the sandbox's hook. `accepted` counts the faxes of each mail that was answered 250.
    """

    gateway: Gateway
    carrier: Sandbox
    mailbox: Mailbox
    posts: list[str] = field(default_factory=list)
    on_step: OnStep | None = None
    accepted: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look over the carrier's shoulder."""
        self.carrier.on_step = self._step

    async def _step(self, name: str, told: dict[str, Any]) -> None:
        if name == "body_read":
            self.posts.append(told["to"])
        if self.on_step is not None:
            await self.on_step(name, told)

    async def mail(
        self,
        *numbers: str,
        message: EmailMessage | None = None,
        sender: str = SENDER,
        gateway: Gateway | None = None,
    ) -> str:
        """Mail a letter to numbers, to `gateway` where there are several; return the mail's id.

        Raises smtplib's errors.
        """
        message = message or letter(*numbers)
        recipients = [f"{number}@fax.local" for number in numbers]
        port = (gateway or self.gateway).smtp_port
        answer = await asyncio.to_thread(_hand_over, port, message, sender, recipients)
        assert answer.startswith("2.0.0 queued as "), answer
        mail_id = answer.rpartition(" ")[2]
        self.accepted.setdefault(mail_id, len({number for number in numbers if number != "postmaster"}))
        return mail_id

    async def replies(self, *numbers: str, message: EmailMessage | None = None) -> list[EmailMessage]:
        """Mail a letter to numbers; return the final reply about each, in their order."""
        mail_id = await self.mail(*numbers, message=message)
        found = [await self.reply(f"{mail_id}-{place}") for place in range(1, len(numbers) + 1)]
        assert [reply["X-Fax-Number"] for reply in found] == list(numbers)
        return found

    async def everyone_told(self) -> None:
        """Wait until each fax that was accepted has its final reply; fail if one has two, or a stranger one.

        Two are two by their Message-ID. It also fails on whatever the daemon did not expect.
        """
        faxes = {f"{mail_id}-{n}" for mail_id, most in self.accepted.items() for n in range(1, most + 1)}
        await until(
            lambda: faxes <= {reply["X-Fax-Id"] for reply in self.mailbox.finals()},
            "a final reply about every fax",
        )
        assert sorted(reply["X-Fax-Id"] for reply in self.mailbox.finals()) == sorted(faxes)
        assert self.gateway.said("task_failed") == []
        assert self.gateway.stderr == ""

    async def reply(self, fax_id: str, outcome: str | None = None) -> EmailMessage:
        """Wait for a reply about a fax (a final one, unless `outcome` names another)."""

        def found() -> list[EmailMessage]:
            mails = self.mailbox.about(fax_id, outcome)
            return [mail for mail in mails if outcome or mail["X-Fax-Outcome"] in FINAL]

        mails: list[EmailMessage] = await until(found, f"a reply about {fax_id}: {outcome or 'final'}")
        return mails[0]

    def taken(self, number: str) -> list[Any]:
        """Return what the carrier took for a number: each entry is a call that costs money."""
        return [entry for entry in self.carrier.ledger if entry.to == number]

    async def restart(self) -> None:
        """Start the gateway again after a kill or a stop."""
        await self.gateway.start()


@contextlib.asynccontextmanager
async def world(
    folder: Path,
    call_time: float = 0.05,
    program: Sequence[str] = PROGRAM,
    environ: Mapping[str, str] | None = None,
    **sections: dict[str, Any],
) -> AsyncIterator[World]:
    """Open a world; `sections` are settings over `QUICK`, as in `telnyx={"channels": 1}`.

    `program` and `environ` are the gateway's.
    """
    mailbox = Mailbox()
    await mailbox.open()
    carrier = Sandbox(SandboxOptions(call_time=call_time, lag=1.0))
    await carrier.start()
    settings = {name: dict(section) for name, section in QUICK.items()}
    settings["telnyx"] |= {"api_base": carrier.url, "public_key": carrier.public_key}
    settings["replies"] |= {"relay": f"smtp://127.0.0.1:{mailbox.port}"}
    settings["store"] = {"url": f"sqlite:///{folder}/gateway.db"}
    for name, section in sections.items():
        settings[name] = settings.get(name, {}) | section
    gateway = Gateway(folder, settings, program, environ)
    try:
        await gateway.start()
        carrier.set_webhook_url(gateway.webhook_url)
        yield World(gateway, carrier, mailbox)
    finally:
        await gateway.close()
        await carrier.close()
        await mailbox.close()


def numbers() -> Iterator[str]:
    """Yield numbers that the sandbox delivers to, outside its table."""
    for line in range(1000, 9999):
        yield f"+1312556{line}"
