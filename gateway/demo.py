"""The whole way on this machine, shown step by step.

In charge of: starting a gateway (the real daemon, as a process), the sandbox carrier and a mailbox on free
ports, mailing a sample, and telling what happens as it happens.

Promises: nothing leaves this machine, and nothing is needed beforehand; everything is kept in one folder,
whose path is told.

Fails: with what went wrong and an exit code other than 0; the daemon's log lies in the folder.
"""

import asyncio
import contextlib
import email
import email.policy
import json
import signal
import smtplib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, Envelope
from aiosmtpd.smtp import Session as Peer

from gateway.sandbox import Sandbox, SandboxOptions

NUMBER = "+13125550100"  # the sandbox delivers it
SENDER = "you@example.com"
_ANY_PORT = "127.0.0.1:0"
_SILENT = 2.0  # seconds of an end that need no words
_PATIENCE = 60.0  # seconds for the sample to come through
_CONFIG = """\
[smtp]
listen = "{smtp}"

[telnyx]
api_key = "sandbox-key"
connection_id = "1232154810234"
from_number = "+13125790015"
public_key = "{public_key}"
api_base = "{api_base}"

[http]
listen = "{http}"

[replies]
relay = "smtp://127.0.0.1:{relay_port}"
postmaster = "postmaster@example.com"

[store]
url = "sqlite:///{folder}/gateway.db"

[retries]
busy = ["10s", "20s"]

[log]
format = "json"
mask_numbers = false
"""
_STEPS = {
    "started": "the gateway opened its store",
    "ready": "the gateway listens: mail on {smtp}, HTTP on {http}",
    "mail_accepted": "the gateway has the mail on its disk and said 250: mail {mail}",
    "call_begun": "the intent to call {to} is on the disk; the document goes to the carrier",
    "call_taken": "the carrier took it as {carrier_id}",
    "webhook_received": "the carrier's signed webhook: {type}",
    "fax_requeued": "fax {fax} will be called again, due in {due} s{because}",
    "account_held": "nothing more is called for now: {cause}",
    "fax_held": "fax {fax} is held: {cause}",
    "fax_ended": "fax {fax} ended: {outcome}",
    "reply_sent": "the reply for {recipient} was handed to the relay",
}
Show = Callable[[str], object]


class Demonstration:
    """The parts, and the clock that the steps are shown with."""

    def __init__(self, folder: Path, show: Show) -> None:
        self.folder = folder
        self._show = show
        self._begun = time.monotonic()
        self.replies: asyncio.Queue[EmailMessage] = asyncio.Queue()
        self.doors: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def tell(self, text: str) -> None:
        """Show a step with the time since the beginning."""
        self._show(f"{time.monotonic() - self._begun:6.2f} s  {text}")

    # --- the mailbox --------------------------------------------------------------------------------------

    async def handle_DATA(self, _server: SMTP, _session: Peer, envelope: Envelope) -> str:  # noqa: N802
        """Take a reply, as the relay would."""
        content = envelope.original_content or b""
        message = email.message_from_bytes(content, policy=email.policy.default)
        self.replies.put_nowait(message)
        return "250 2.0.0 taken"

    @contextlib.asynccontextmanager
    async def mailbox(self) -> AsyncIterator[int]:
        """Listen for replies; yields the port."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: SMTP(self, enable_SMTPUTF8=True, loop=loop), "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()

    # --- the gateway --------------------------------------------------------------------------------------

    def configure(self, carrier: Sandbox, relay_port: int, *, smtp: str, http: str) -> Path:
        """Write the configuration, with the addresses to listen on; returns its path."""
        config = self.folder / "config.toml"
        config.write_text(
            _CONFIG.format(
                public_key=carrier.public_key, api_base=carrier.url, relay_port=relay_port,
                folder=self.folder, smtp=smtp, http=http,
            )
        )  # fmt: skip
        config.chmod(0o640)
        return config

    @contextlib.asynccontextmanager
    async def gateway(self, config: Path) -> AsyncIterator[None]:
        """Run `serve` as a process and show what it logs."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", "serve", "--config", str(config),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours; the daemon is told to stop in order
        )  # fmt: skip
        reader = asyncio.create_task(self._follow(process))
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            ended = asyncio.create_task(process.wait())
            if not (await asyncio.wait([ended], timeout=_SILENT))[0]:
                self.tell("open requests to the carrier are finished first; Ctrl-C again ends it at once")
            await ended
            await reader

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        log = self.folder / "gateway.log"
        with log.open("ab") as file:
            while process.stdout is not None and (line := await process.stdout.readline()):
                file.write(line)
                file.flush()
                self._show_line(line)
        if not self.doors.done():
            self.doors.set_exception(RuntimeError(f"the gateway ended; see {log}"))

    def _show_line(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if record["event"] in _STEPS:
            record["smtp"] = ", ".join(record.get("smtp", ()))
            record["because"] = f": {record['reason']}" if record.get("reason") else ""
            self.tell(_STEPS[record["event"]].format(**record))
        if record["event"] == "ready" and not self.doors.done():
            self.doors.set_result(record)

    # --- the sample ---------------------------------------------------------------------------------------

    def sample(self) -> bytes:
        """Draw a page to be faxed; kept as sample.pdf."""
        from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 -- only here

        page = Image.new("L", (1240, 1754), 255)
        pen = ImageDraw.Draw(page)
        pen.rectangle((60, 60, 1180, 1694), outline=0, width=4)
        pen.text((120, 160), "A sample fax", font=ImageFont.load_default(96), fill=0)
        words = "It went by mail to the gateway,\nby HTTP to the sandbox carrier,\nand nowhere else."
        pen.multiline_text((120, 340), words, font=ImageFont.load_default(48), fill=0, spacing=24)
        path = self.folder / "sample.pdf"
        page.save(path, "PDF", resolution=150)
        return path.read_bytes()

    async def mail(self, port: int, document: bytes) -> str:
        """Mail the sample as any mail program would; returns the gateway's answer."""
        message = EmailMessage()
        message["From"], message["To"] = SENDER, f"{NUMBER}@fax.local"
        message["Subject"], message["Date"] = "A sample", formatdate()
        message["Message-ID"] = make_msgid(domain="example.com")
        message.set_content("Please fax the attachment.")
        message.add_attachment(document, maintype="application", subtype="pdf", filename="sample.pdf")

        def hand_over() -> None:
            with smtplib.SMTP("127.0.0.1", port, timeout=_PATIENCE) as door:
                door.send_message(message)

        await asyncio.to_thread(hand_over)
        return str(message["To"])

    def print_reply(self, reply: EmailMessage) -> None:
        """Show a reply's head and text, and keep its picture of page 1."""
        self._show("")
        for name in ("From", "To", "Subject", "Auto-Submitted", "X-Fax-Id", "X-Fax-Outcome"):
            if reply[name]:
                self._show(f"  | {name}: {reply[name]}")
        body = reply.get_body(("plain",))
        for line in body.get_content().splitlines() if body is not None else ():
            self._show(f"  | {line}".rstrip())
        for part in reply.walk():
            if part.get_content_type() == "image/png":
                path = self.folder / "page-1.png"
                path.write_bytes(part.get_payload(decode=True) or b"")  # type: ignore[arg-type]  # bytes: a leaf
                self._show(f"\n  page 1, as it went out: {path}")
        self._show("")


async def run(*, once: bool, show: Show) -> int:
    """Show the main job working; then go on serving, unless `once`. Returns the exit code."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed window must not leave the gateway behind
        loop.add_signal_handler(number, task.cancel if task else loop.stop)
    folder = Path(tempfile.mkdtemp(prefix="fax-gateway-demo-"))
    demonstration = Demonstration(folder, show)
    demonstration.tell(f"everything of this demonstration is in {folder}; remove it when done")
    carrier = Sandbox(SandboxOptions(call_time=1.0))
    await carrier.start()
    try:
        async with demonstration.mailbox() as relay_port:
            config = demonstration.configure(carrier, relay_port, smtp=_ANY_PORT, http=_ANY_PORT)
            demonstration.tell(f"the sandbox carrier listens at {carrier.url}")
            async with demonstration.gateway(config):
                async with asyncio.timeout(_PATIENCE):
                    doors = await demonstration.doors
                # For `fax-gateway send`: where the daemon really listens.
                demonstration.configure(carrier, relay_port, smtp=doors["smtp"], http=doors["http"])
                carrier.set_webhook_url(f"http://{doors['http']}/webhooks/telnyx")
                port = int(doors["smtp"].rpartition(":")[2])
                return await _show_way(demonstration, port, config, once=once, show=show)
    except (RuntimeError, TimeoutError, OSError) as error:
        show(f"the demonstration failed: {type(error).__name__} {error}; the log is {folder}/gateway.log")
        return 1
    finally:
        await carrier.close()


async def _show_way(demonstration: Demonstration, port: int, config: Path, *, once: bool, show: Show) -> int:
    async with asyncio.timeout(_PATIENCE):
        document = demonstration.sample()
        demonstration.tell(f"a mail with sample.pdf goes from {SENDER} to {NUMBER}@fax.local")
        await demonstration.mail(port, document)
        reply = await demonstration.replies.get()
    demonstration.tell("the sender's reply (the duration is simulated):")
    demonstration.print_reply(reply)
    if once:
        return 0 if reply["X-Fax-Outcome"] == "delivered" else 1
    program = f"{sys.executable} -m gateway"
    for line in (
        f"Still serving. Mail a PDF yourself, from any program that speaks SMTP to 127.0.0.1 port {port}:",
        f"  {program} send {demonstration.folder}/sample.pdf --to +13125550152 --from {SENDER} \\",
        f"      --config {config}",
        "  +13125550152 is busy once, and is called again after 10 s.",
        "docs/sandbox.md lists a number for every outcome. Some stop the queue, as a disabled account does;",
        f"this lets it go on: {program} release --all --config {config}",
        "Replies appear here. Ctrl-C ends it.",
        "",
    ):
        show(line)
    while True:
        demonstration.print_reply(await demonstration.replies.get())
