"""Real mail programs: swaks, msmtp and Postfix, against a real gateway."""

import asyncio
import contextlib
import os
import pwd
import re
import shutil
import signal
import smtplib
import tempfile
from collections.abc import AsyncIterator
from email.message import EmailMessage
from pathlib import Path

import pytest
from harness import SENDER, World, letter, until, world
from papers import locked, paper
from ports import free_port

PAGES = ("README.md", "docs/mail-servers.md")
"""The pages that show the lines for Postfix: they are run here as they stand there."""
NUMBER = "+13125550100"
TO = f"{NUMBER}@fax.local"


def needs(program: str) -> pytest.MarkDecorator:
    """Skip a test where a program of Debian's is missing."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


async def run(*words: str, feed: bytes = b"") -> tuple[int, str]:
    """Run a program; return its exit code and everything it said."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate(feed)
    assert process.returncode is not None
    return process.returncode, said.decode(errors="replace")


# --- swaks and msmtp ---------------------------------------------------------------------------------------


async def swaks(w: World, *more: str, to: str = TO.removeprefix("+")) -> tuple[int, str]:
    """Send a mail by swaks, which takes a word that begins with a plus for an option."""
    server = ("--server", "127.0.0.1", "--port", str(w.gateway.smtp_port))
    return await run("swaks", *server, "--from", SENDER, "--to", to, "--helo", "client.example.com", *more)


@needs("swaks")
async def test_swaks_sends_a_fax_and_shows_the_refusals(tmp_path: Path) -> None:
    """Whoever tries the door by hand with swaks sees 250 and the mail's id, or the reason in words."""
    good, secret = tmp_path / "letter.pdf", tmp_path / "secret.pdf"
    good.write_bytes(paper(pages=2))
    secret.write_bytes(locked(user="a"))
    async with world(tmp_path) as w:
        code, said = await swaks(w, "--attach-type", "application/pdf", "--attach", f"@{good}")
        assert code == 0, said
        taken = re.search(r"250 2\.0\.0 queued as (\S+)", said)
        assert taken, said
        reply = await w.reply(f"{taken[1]}-1")
        assert (reply["X-Fax-Outcome"], reply["To"]) == ("delivered", SENDER)
        assert [entry.pages for entry in w.taken(NUMBER)] == [2]

        code, said = await swaks(w, "--attach-type", "application/pdf", "--attach", f"@{secret}")
        assert (code, "554 5.6." in said, '"secret.pdf"' in said) == (26, True, True), said
        code, said = await swaks(w, "--body", "no document")
        assert (code, "554 5.6.1 The mail holds no PDF" in said) == (26, True), said
        code, said = await swaks(w, to="office@fax.local")
        assert (code, "550 5.1.1" in said, "+13125550123@fax.local" in said) == (24, True, True), said
        assert len(w.carrier.ledger) == 1


@needs("msmtp")
async def test_msmtp_sends_a_fax(tmp_path: Path) -> None:
    """A program that calls msmtp as its sendmail can fax, and its user gets the outcome by mail."""
    async with world(tmp_path) as w:
        config = tmp_path / "msmtprc"
        config.write_text(
            "account fax\n"
            "host 127.0.0.1\n"
            f"port {w.gateway.smtp_port}\n"
            f"from {SENDER}\n"
            "auth off\n"
            "tls off\n"
            f"logfile {tmp_path}/msmtp.log\n"
            "account default : fax\n"
        )
        config.chmod(0o600)
        code, said = await run("msmtp", "-C", str(config), "-t", feed=letter(NUMBER).as_bytes())
        assert code == 0, said
        taken = re.search(r"queued as ([\w-]+)", (tmp_path / "msmtp.log").read_text())
        assert taken, "msmtp's log holds no answer"
        assert (await w.reply(f"{taken[1]}-1"))["X-Fax-Outcome"] == "delivered"
        assert len(w.taken(NUMBER)) == 1

        code, said = await run("msmtp", "-C", str(config), "office@fax.local", feed=letter().as_bytes())
        assert code == os.EX_DATAERR, said
        assert "550 5.1.1" in said


# --- Postfix -----------------------------------------------------------------------------------------------

MASTER = """\
127.0.0.1:{port} inet n - n - - smtpd
cleanup   unix  n - n - 0 cleanup
qmgr      unix  n - n 300 1 qmgr
rewrite   unix  - - n - - trivial-rewrite
bounce    unix  - - n - 0 bounce
defer     unix  - - n - 0 bounce
trace     unix  - - n - 0 bounce
proxymap  unix  - - n - - proxymap
smtp      unix  - - n - - smtp
error     unix  - - n - - error
retry     unix  - - n - - error
anvil     unix  - - n - 1 anvil
postlog   unix-dgram n - n - 1 postlogd
"""
MAIN = """\
compatibility_level = 3.6
myhostname = mail.example.com
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
smtp_host_lookup = native
smtpd_peername_lookup = no
queue_directory = {folder}/queue
data_directory = {folder}/data
maillog_file = {folder}/mail.log
maillog_file_prefixes = {folder}
relayhost = [127.0.0.1]:{relay}
local_recipient_maps =
alias_maps =
smtp_tls_security_level = none
"""


def documented(page: str, file: str) -> str:
    """Return the lines that a page gives for one of Postfix's files."""
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    (block,) = re.findall(rf"<!-- postfix-{re.escape(file)} -->\n```\n(.*?)```", text, re.DOTALL)
    return str(block)


def set_up(w: World, page: str, networks: str | None, port: int) -> Path:
    """Write a configuration of Postfix with the documentation's lines; return its folder.

    Only addresses are changed: the folder, the gateway's port and, if the test wants it, `mynetworks`.
    """
    # Not in tmp_path, which is closed to the user that Postfix's processes run as.
    folder = Path(tempfile.mkdtemp(prefix="postfix-"))
    folder.chmod(0o755)
    lines = documented(page, "main.cf").replace("/etc/postfix/", f"{folder}/")
    if networks is not None:
        lines, changed = re.subn(r"(?m)^mynetworks = .*$", f"mynetworks = {networks}", lines)
        assert changed == 1
    route = documented(page, "transport").replace("[127.0.0.1]:2525", f"[127.0.0.1]:{w.gateway.smtp_port}")
    assert str(w.gateway.smtp_port) in route
    (folder / "main.cf").write_text(MAIN.format(folder=folder, relay=w.mailbox.port) + lines)
    (folder / "master.cf").write_text(MASTER.format(port=port))
    (folder / "transport").write_text(route)
    (folder / "queue").mkdir()
    (folder / "data").mkdir()
    os.chown(folder / "data", pwd.getpwnam("postfix").pw_uid, -1)
    return folder


@contextlib.asynccontextmanager
async def postfix(w: World, page: str, networks: str | None = None) -> AsyncIterator[int]:
    """Run a Postfix with a page's lines beside the gateway; yield its port."""
    port = free_port()
    folder = await asyncio.to_thread(set_up, w, page, networks, port)
    process = await asyncio.create_subprocess_exec(
        "postfix", "-c", str(folder), "start-fg",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    log = folder / "mail.log"
    try:
        await until(
            lambda: process.returncode is not None or (log.exists() and "daemon started" in log.read_text()),
            "Postfix to start",
        )
        assert process.returncode is None, log.read_text() if log.exists() else "Postfix said nothing"
        yield port
    finally:
        await asyncio.to_thread(stop, folder / "queue" / "pid" / "master.pid")
        await process.wait()
        shutil.rmtree(folder)


def stop(pid_file: Path) -> None:
    """Stop Postfix's master, which takes its children along; `start-fg` only waits for it."""
    if pid_file.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid_file.read_text()), signal.SIGTERM)


def hand_over(port: int, message: EmailMessage, to: str, source: str = "127.0.0.1") -> None:
    """Give a mail to Postfix, as a client at the address `source`."""
    with smtplib.SMTP("127.0.0.1", port, timeout=20, source_address=(source, 0)) as door:
        door.send_message(message, SENDER, [to])


needs_postfix = pytest.mark.skipif(
    shutil.which("postfix") is None or os.geteuid() != 0,
    reason="postfix is not installed" if shutil.which("postfix") is None else "Postfix starts as root only",
)


@needs_postfix
async def test_postfix_relays_faxes_and_brings_refusals_back(tmp_path: Path) -> None:
    """A user of Postfix faxes by mail; what the gateway refuses comes back as Postfix's bounce."""
    async with world(tmp_path) as w, postfix(w, PAGES[0]) as port:
        await asyncio.to_thread(hand_over, port, letter(NUMBER), TO)
        (line,) = await until(lambda: w.gateway.said("mail_accepted"), "the fax to come from Postfix")
        assert (await w.reply(f"{line['mail']}-1"))["X-Fax-Outcome"] == "delivered"
        assert len(w.taken(NUMBER)) == 1

        def bounces() -> list[str]:
            mails = [mail for mail in w.mailbox.mails if "MAILER-DAEMON" in str(mail["From"])]
            return [str(mail["To"]) + " " + mail.as_string().replace("\n    ", " ") for mail in mails]

        await asyncio.to_thread(hand_over, port, letter("office"), "office@fax.local")
        await until(lambda: len(bounces()) == 1, "a bounce for the refusal at RCPT")
        empty = EmailMessage()
        empty["From"], empty["To"], empty["Subject"] = SENDER, TO, "no document"
        empty.set_content("nothing is attached")
        await asyncio.to_thread(hand_over, port, empty, TO)
        at_rcpt, at_data = await until(
            lambda: len(bounces()) > 1 and bounces(), "a bounce for the refusal at DATA"
        )
        assert at_rcpt.startswith(SENDER)
        assert "550 5.1.1 letters and extensions cannot be called" in at_rcpt
        assert at_data.startswith(SENDER)
        assert "554 5.6.1 The mail holds no PDF" in at_data
        assert len(w.carrier.ledger) == 1


@needs_postfix
@pytest.mark.parametrize("page", PAGES)
async def test_postfix_lets_no_stranger_in(tmp_path: Path, page: str) -> None:
    """Who is not in Postfix's `mynetworks` cannot fax through it, while those who are can."""
    async with world(tmp_path) as w, postfix(w, page, "127.0.0.1/32") as port:
        with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
            await asyncio.to_thread(hand_over, port, letter(NUMBER), TO, "127.0.0.2")
        assert refused.value.recipients[TO] == (554, f"5.7.1 <{TO}>: Relay access denied".encode())
        assert not w.gateway.said("mail_accepted")
        await asyncio.to_thread(hand_over, port, letter(NUMBER), TO, "127.0.0.1")
        await until(lambda: w.gateway.said("mail_accepted"), "the fax of a known client")
