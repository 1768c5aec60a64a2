"""Handing a mail to the relay: what counts as taken, what is tried again, and what nobody may overhear."""

import asyncio
import datetime as dt
import email
import socket
import ssl
from email import policy
from pathlib import Path
from typing import Literal

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from faxes import at
from hypothesis import given
from hypothesis import strategies as st
from letters import notice, write
from relays import CUT, STALL, TestRelay, serving

from gateway.records import Notice
from gateway.relay import Relay, RelayAway, RelayRefused, check_recipient

CLERK = "clerk@example.org"
Security = Literal["none", "tls", "starttls"]
MESSAGE = write(notice(Notice.DELIVERED, at("delivered").fax))
QUICK = 0.3  # seconds; only tests of silence wait for it


def client(
    relay: TestRelay, security: Security = "none", host: str = "127.0.0.1", timeout: float = 10.0
) -> Relay:
    """Return a client of the relay."""
    return Relay(security, host, relay.port, hostname="fax.example.com", timeout=timeout)


async def test_mail_arrives_from_the_null_sender() -> None:
    """A reply reaches the relay byte for byte, and no bounce of it can come back."""
    async with serving(TestRelay()) as relay:
        await client(relay).send(CLERK, MESSAGE)
        (taken,) = relay.taken
    assert taken.sender in {"", "<>"}
    assert taken.recipient == CLERK
    assert taken.data == MESSAGE.as_bytes()
    assert taken.options == [f"SIZE={len(MESSAGE.as_bytes())}"]
    assert relay.verbs == ["EHLO", "MAIL", "RCPT", "DATA", "QUIT"]


async def test_forwarded_mail_keeps_its_bytes() -> None:
    """A mail to the postmaster goes on as it came, lines beginning with a dot and 8-bit text included."""
    forward = b"Subject: \xc3\xbc\r\n\r\n.\r\n..\r\nend\r\n"
    async with serving(TestRelay()) as relay:
        await client(relay).send(CLERK, forward)
        assert relay.taken[0].data == forward
        assert "BODY=8BITMIME" in relay.taken[0].options


async def test_bare_line_ends_cannot_end_the_mail() -> None:
    """A forwarded mail with a disguised final dot is one mail to the relay, not two."""
    smuggled = b"Subject: x\n\n.\nMAIL FROM:<a@b>\n\r.\rend"
    async with serving(TestRelay()) as relay:
        await client(relay).send(CLERK, smuggled)
        assert len(relay.taken) == 1
        assert relay.verbs == ["EHLO", "MAIL", "RCPT", "DATA", "QUIT"]
        assert b"MAIL FROM:<a@b>" in relay.taken[0].data


async def test_relay_without_extensions_is_asked_for_none() -> None:
    """A relay that knows nothing but SMTP gets a MAIL command without parameters."""
    async with serving(TestRelay(), data_size_limit=None) as relay:
        await client(relay).send(CLERK, MESSAGE)
        assert relay.taken[0].options == []


# --- what is tried again, and what is not -------------------------------------------------------------------

FAULTS = [
    ("GREETING", "554 no service", RelayAway),
    ("GREETING", "421 busy", RelayAway),
    ("GREETING", "this is no mail server", RelayAway),
    ("GREETING", CUT, RelayAway),
    ("EHLO", "550 who are you", RelayAway),
    ("EHLO", "421 closing", RelayAway),
    ("EHLO", CUT, RelayAway),
    ("MAIL", "451 later", RelayAway),
    ("MAIL", "530 log in", RelayAway),
    ("MAIL", "550 no null sender here", RelayAway),
    ("MAIL", "552 5.3.4 too large", True),
    ("MAIL", CUT, False),
    ("RCPT", "450 greylisted", False),
    ("RCPT", "421 closing", RelayAway),
    ("RCPT", "550 5.1.1 no such user", True),
    ("RCPT", "553 no such user", True),
    ("RCPT", "554 5.7.1 relay access denied", False),
    ("RCPT", "530 5.7.0 log in", False),
    ("RCPT", "211 nonsense", False),
    ("RCPT", CUT, False),
    ("DATA", "451 later", False),
    ("DATA", "554 5.7.1 not wanted", True),
    ("DATA", CUT, False),
    ("DOT", "451 later", False),
    ("DOT", "452 disk full", False),
    ("DOT", "421 closing", RelayAway),
    ("DOT", "554 5.6.0 spam", True),
    ("DOT", "552 too large", True),
    ("DOT", CUT, False),
]


@pytest.mark.parametrize(("stage", "reply", "verdict"), FAULTS)
async def test_fault_is_judged_by_its_stage(
    stage: str,
    reply: str,
    verdict: bool | type[RelayAway],  # noqa: FBT001 -- a column of the table
) -> None:
    """A refusal ends a reply only if it is about this mail; everything else is tried again."""
    async with serving(TestRelay(faults={stage: reply})) as relay:
        with pytest.raises((RelayAway, RelayRefused)) as refusal:
            await client(relay).send(CLERK, MESSAGE)
        assert relay.taken == []
    found = refusal.value
    assert isinstance(found, RelayAway | RelayRefused)
    assert (found.permanent if isinstance(found, RelayRefused) else type(found)) == verdict
    assert reply == CUT or reply[:3] in found.text
    assert "\n" not in found.text


@pytest.mark.parametrize("stage", ["GREETING", "EHLO", "MAIL", "RCPT", "DATA", "DOT"])
async def test_silent_relay_is_left_and_tried_again(stage: str) -> None:
    """A relay that falls silent costs the time of one hand-over, and never the reply."""
    async with serving(TestRelay(faults={stage: STALL})) as relay:
        with pytest.raises((RelayAway, RelayRefused)) as refusal:
            await client(relay, timeout=QUICK).send(CLERK, MESSAGE)
        assert relay.stalled.is_set()
    assert "no answer in time" in str(refusal.value)
    assert getattr(refusal.value, "permanent", False) is False
    assert isinstance(refusal.value, RelayAway) == (stage in {"GREETING", "EHLO"})


async def test_absent_relay_is_away() -> None:
    """While nothing listens at the relay's port, replies wait."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(RelayAway, match="Error connecting"):
            await Relay("none", "127.0.0.1", port, hostname="fax.example.com").send(CLERK, MESSAGE)


async def test_name_that_no_resolver_takes_is_away() -> None:
    """A relay whose name cannot even be asked for is a relay that is away, not a fault of the mail."""
    with pytest.raises(RelayAway):
        await Relay("none", f"{'a' * 70}.example", 25, hostname="fax.example.com").send(CLERK, MESSAGE)


@pytest.mark.parametrize("reply", ["500 what", CUT, STALL])
async def test_trouble_at_the_goodbye_changes_nothing(reply: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the relay took is taken, whatever happens to the connection afterwards."""
    monkeypatch.setattr("gateway.relay.QUIT_LIMIT", QUICK)
    async with serving(TestRelay(faults={"QUIT": reply})) as relay:
        await client(relay).send(CLERK, MESSAGE)
        assert len(relay.taken) == 1


# --- addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipient",
    [
        "", "a@b\r\nRCPT TO:<victim@example.net>", "a@b\nx", "a@b\0", "a b@c", '"a b"@c', "a@b ", " a@b",
        "a@b> SIZE=1", "a\u2028@b", "\ud800@b", "clerk(x)@example.org", "a@b,c@d", "A <a@b>", "a\t@b",
        "a\x7f@b",
    ],
)  # fmt: skip
async def test_dangerous_address_never_reaches_the_relay(recipient: str) -> None:
    """An address that could end its line, or be taken for another one, gets no mail."""
    async with serving(TestRelay()) as relay:
        with pytest.raises(RelayRefused) as refusal:
            await client(relay).send(recipient, MESSAGE)
        assert refusal.value.permanent
        assert relay.sessions == 0


@given(st.text())
def test_accepted_address_stays_on_its_line(recipient: str) -> None:
    """Whatever passes as an address is one word without control characters."""
    try:
        check_recipient(recipient)
    except RelayRefused:
        return
    assert recipient.split() == [recipient]
    assert recipient.isprintable()
    assert "(" not in recipient.partition('"')[0]


async def test_international_address_needs_a_relay_that_knows_them() -> None:
    """An address beyond ASCII is served where the relay can, and refused for good where it cannot."""
    async with serving(TestRelay(), enable_SMTPUTF8=True) as relay:
        await client(relay).send("büro@example.org", MESSAGE)
        assert relay.taken[0].recipient == "büro@example.org"
        assert "SMTPUTF8" in relay.taken[0].options
    async with serving(TestRelay()) as relay:
        with pytest.raises(RelayRefused, match="SMTPUTF8") as refusal:
            await client(relay).send("büro@example.org", MESSAGE)
        assert refusal.value.permanent


# --- login and TLS ------------------------------------------------------------------------------------------


async def test_login() -> None:
    """A relay that wants a password gets it before the mail."""
    async with serving(TestRelay(password="right")) as relay:
        sender = Relay("none", "127.0.0.1", relay.port, hostname="h.example", user="fax", password="right")
        await sender.send(CLERK, MESSAGE)
        assert relay.verbs[:3] == ["EHLO", "AUTH", "MAIL"]
        assert len(relay.taken) == 1


async def test_wrong_password_keeps_the_replies() -> None:
    """A password that no longer fits is a fault of the set-up: replies wait until it is corrected."""
    async with serving(TestRelay(password="right")) as relay:
        sender = Relay("none", "127.0.0.1", relay.port, hostname="h.example", user="fax", password="wrong")
        with pytest.raises(RelayAway, match="535") as refusal:
            await sender.send(CLERK, MESSAGE)
        assert "wrong" not in refusal.value.text
        assert relay.taken == []


class Certificate:
    """A certificate for a name, signed by itself, and the context of a server that shows it."""

    def __init__(self, folder: Path, name: str) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .sign(key, hashes.SHA256())
        )
        self.file = folder / f"{name}.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self.file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(self.file)


@pytest.mark.parametrize("security", ["tls", "starttls"])
async def test_mail_goes_out_under_tls(
    security: Security, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a certificate that fits, the mail is handed over encrypted."""
    good = Certificate(tmp_path, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(good.file))
    async with serving(TestRelay(), tls=good.context, implicit=security == "tls") as relay:
        await client(relay, security, "localhost").send(CLERK, MESSAGE)
        assert len(relay.taken) == 1
        assert ("STARTTLS" in relay.verbs) == (security == "starttls")


@pytest.mark.parametrize("security", ["tls", "starttls"])
@pytest.mark.parametrize("name", ["localhost", "elsewhere.example"])
async def test_certificate_that_does_not_fit_gets_no_mail(
    security: Security, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody who only pretends to be the relay is handed a mail: unknown signer or another name."""
    shown = Certificate(tmp_path, name)
    if name != "localhost":
        monkeypatch.setenv("SSL_CERT_FILE", str(shown.file))
    async with serving(TestRelay(), tls=shown.context, implicit=security == "tls") as relay:
        with pytest.raises(RelayAway, match="CERTIFICATE_VERIFY_FAILED"):
            await client(relay, security, "localhost").send(CLERK, MESSAGE)
        assert "MAIL" not in relay.verbs


async def test_stripped_starttls_gets_no_mail() -> None:
    """When somebody removes the offer of encryption, nothing is said in clear."""
    async with serving(TestRelay(password="right")) as relay:
        where = ("127.0.0.1", relay.port)
        sender = Relay("starttls", *where, hostname="h.example", user="fax", password="right")
        with pytest.raises(RelayAway, match="STARTTLS"):
            await sender.send(CLERK, MESSAGE)
        assert set(relay.verbs) <= {"EHLO", "QUIT"}


@pytest.mark.parametrize("answer", ["454 not now", CUT])
async def test_refused_starttls_gets_no_mail(answer: str, tmp_path: Path) -> None:
    """When encryption is offered and then refused, nothing is said in clear."""
    shown = Certificate(tmp_path, "localhost")
    async with serving(TestRelay(faults={"STARTTLS": answer}), tls=shown.context) as relay:
        with pytest.raises(RelayAway):
            await client(relay, "starttls", "localhost").send(CLERK, MESSAGE)
        assert "MAIL" not in relay.verbs


async def test_plain_relay_is_not_asked_for_tls(tmp_path: Path) -> None:
    """A relay on this machine with a made-up certificate takes mail in clear where clear is configured."""
    shown = Certificate(tmp_path, "localhost")
    async with serving(TestRelay(), tls=shown.context) as relay:
        await client(relay).send(CLERK, MESSAGE)
        assert len(relay.taken) == 1
        assert "STARTTLS" not in relay.verbs


# --- configuration and cancelling ---------------------------------------------------------------------------


async def test_hand_over_can_be_cancelled() -> None:
    """A stop does not wait for a relay that is silent."""
    async with serving(TestRelay(faults={"DOT": STALL})) as relay:
        task = asyncio.create_task(client(relay).send(CLERK, MESSAGE))
        await relay.stalled.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_reply_survives_the_way_through_the_relay() -> None:
    """What the sender's mail program reads is what was composed."""
    async with serving(TestRelay()) as relay:
        await client(relay).send(CLERK, MESSAGE)
        arrived = email.message_from_bytes(relay.taken[0].data, policy=policy.default)
    assert arrived["X-Fax-Outcome"] == "delivered"
    assert arrived.get_content().splitlines() == MESSAGE.get_content().splitlines()
