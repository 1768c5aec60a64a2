"""The HTTP door of a real gateway: events of the carrier, health and metrics."""

import asyncio
import base64
import gzip
import json
import smtplib
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from harness import SENDER, World, until, world
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from gateway.sandbox_script import NUMBERS

pytestmark = pytest.mark.asyncio(loop_scope="module")
ORDER = 2**252 + 27742317777372353535851937790883648493  # of the group of Ed25519 (RFC 8032, 5.1)
STRANGER = Ed25519PrivateKey.generate()
STORE_AWAY = b"4.3.0 the mail could not be examined now; try again later"
HEALTH, READY, METRICS, WEBHOOK = "/healthz", "/readyz", "/metrics", "/webhooks/telnyx"


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes


class Visitor:
    """A client of the HTTP door that knows the carrier's key."""

    def __init__(self, w: World, session: aiohttp.ClientSession) -> None:
        self.world = w
        self.base = f"http://127.0.0.1:{w.gateway.http_port}"
        self._session = session

    async def ask(self, method: str, path: str, data: bytes | None = None, headers: Any = None) -> Answer:
        """Send one request as it is."""
        url = URL(self.base + path, encoded=True)
        async with self._session.request(method, url, data=data, headers=headers) as response:
            return Answer(response.status, dict(response.headers), await response.read())

    def signed(
        self, body: bytes, moment: str | None = None, key: Ed25519PrivateKey | None = None
    ) -> dict[str, str]:
        """Return the headers of the carrier for this body."""
        moment = str(int(time.time())) if moment is None else moment
        key = key or self.world.carrier.options.signing_key
        signature = base64.b64encode(key.sign(moment.encode() + b"|" + body)).decode()
        return {
            "Content-Type": "application/json",
            "telnyx-timestamp": moment,
            "telnyx-signature-ed25519": signature,
        }

    async def event(self, body: bytes) -> Answer:
        """Send an event under a good signature."""
        return await self.ask("POST", WEBHOOK, body, self.signed(body))

    async def metrics(self) -> dict[tuple[str, str], float]:
        """Return each sample under its name and the values of its labels."""
        answer = await self.ask("GET", METRICS)
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return {
            (sample.name.removeprefix("fax_gateway_"), " ".join(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(answer.body.decode())
            for sample in family.samples
        }

    async def webhooks(self) -> dict[str, float]:
        """Return how many requests to the webhook door had which result."""
        samples = await self.metrics()
        return {labels: value for (name, labels), value in samples.items() if name == "webhooks_total"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def visitor(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Visitor]:
    """Run one gateway for these tests."""
    async with world(tmp_path_factory.mktemp("web")) as w, aiohttp.ClientSession() as session:
        yield Visitor(w, session)


def event(event_type: str = "fax.delivered", /, **payload: Any) -> bytes:
    """Return an event about a fax that nobody knows."""
    told = {
        "fax_id": str(uuid.uuid4()),
        "connection_id": "1232154810234",
        "direction": "outbound",
        "from": "+13125790015",
        "to": "+13125560001",
        "status": "delivered",
        "page_count": 1,
    }
    record = {
        "record_type": "event",
        "event_type": event_type,
        "id": str(uuid.uuid4()),
        "occurred_at": "2026-01-05T22:23:40.250000Z",
        "payload": told | payload,
    }
    return json.dumps({"data": record, "meta": {"attempt": 1}}).encode()


# --- events ------------------------------------------------------------------------------------------------


async def test_event_is_in_the_database_when_it_is_answered(visitor: Visitor) -> None:
    """An event about an unknown fax is answered 200 and kept, so that even a power cut then loses nothing."""
    before = await visitor.webhooks()
    fax_id = str(uuid.uuid4())
    answer = await visitor.event(event(fax_id=fax_id))
    with sqlite3.connect(visitor.world.gateway.folder / "gateway.db") as database:
        kept = [row for row in database.iterdump() if fax_id in row]
    assert answer.status == 200
    assert kept
    after = await visitor.webhooks()
    assert after["parked"] == before["parked"] + 1
    assert (await visitor.metrics())["events_parked", ""] >= 1


async def test_event_before_the_answer_finds_its_fax(visitor: Visitor) -> None:
    """When every event comes before the carrier's answer to us, the fax ends as they say, once."""
    w = visitor.world
    number = next(n for n, names in NUMBERS.items() if names == ("webhooks-before-answer",))
    mail_id = await w.mail(number)
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
    assert len(w.taken(number)) == 1


async def test_same_event_many_times_at_once_counts_once(visitor: Visitor) -> None:
    """Fifty deliveries of one event at the same time are all acknowledged, and one of them counts."""
    before, body = await visitor.webhooks(), event()
    answers = await asyncio.gather(*(visitor.event(body) for _ in range(50)))
    assert {answer.status for answer in answers} == {200}
    after = await visitor.webhooks()
    assert after["parked"] == before["parked"] + 1
    assert after["duplicate"] == before["duplicate"] + 49


@pytest.mark.parametrize(
    "payload",
    [
        {"connection_id": "9999999999999"},
        {"direction": "inbound", "media_url": "http://127.0.0.1:1/never"},
        {"connection_id": None},
    ],
    ids=["another application", "inbound", "no application"],
)
async def test_event_of_somebody_else_is_acknowledged_and_forgotten(
    visitor: Visitor, payload: dict[str, Any]
) -> None:
    """An event for another application, or of an incoming fax, is answered 200, counted, and nothing else."""
    before, parked = await visitor.webhooks(), (await visitor.metrics())["events_parked", ""]
    answer = await visitor.event(event(**payload))
    after = await visitor.webhooks()
    assert answer.status == 200
    assert {name for name in after if after[name] != before[name]} == {"ignored"}
    assert (await visitor.metrics())["events_parked", ""] == parked


def forgeries() -> dict[str, Any]:
    """Return each way to forge an event, as a function from visitor and body to headers and body."""

    def malleated(v: Visitor, body: bytes) -> dict[str, str]:
        headers = v.signed(body)
        raw = base64.b64decode(headers["telnyx-signature-ed25519"])
        high = (int.from_bytes(raw[32:], "little") + ORDER).to_bytes(32, "little")
        return headers | {"telnyx-signature-ed25519": base64.b64encode(raw[:32] + high).decode()}

    def without(name: str) -> Any:
        return lambda v, body: {k: value for k, value in v.signed(body).items() if k != name}

    def replaced(value: str) -> Any:
        return lambda v, body: v.signed(body) | {"telnyx-signature-ed25519": value}

    def at(moment: str) -> Any:
        return lambda v, body: v.signed(body, moment)

    now = int(time.time())
    return {
        "unsigned": lambda _v, _body: {},
        "no signature": without("telnyx-signature-ed25519"),
        "no timestamp": without("telnyx-timestamp"),
        "another key": lambda v, body: v.signed(body, key=STRANGER),
        "all zeros": replaced(base64.b64encode(bytes(64)).decode()),
        "too short": replaced(base64.b64encode(bytes(63)).decode()),
        "empty": replaced(""),
        "not Base64": replaced("%%%"),
        "non-canonical S": malleated,
        "over other octets": lambda v, body: v.signed(body + b" "),
        "over the JSON written anew": lambda v, body: v.signed(
            json.dumps(json.loads(body), indent=1).encode()
        ),
        "timestamp changed": lambda v, body: v.signed(body) | {"telnyx-timestamp": str(now + 1)},
        "six minutes old": at(str(now - 360)),
        "from the future": at(str(now + 360)),
        "negative": at(f"-{now}"),
        "exponent": at("1e9"),
        "far beyond": at("1" + "0" * 30),
        "fraction": at(f"{now}.0"),
        "empty timestamp": at(""),
    }


@pytest.mark.parametrize("way", forgeries())
async def test_forged_event_is_refused_and_changes_nothing(visitor: Visitor, way: str) -> None:
    """Whoever cannot sign with the account's key, for now and these very octets, is told 401."""
    body = event()
    before, parked = await visitor.webhooks(), (await visitor.metrics())["events_parked", ""]
    answer = await visitor.ask("POST", WEBHOOK, body, forgeries()[way](visitor, body))
    after = await visitor.webhooks()
    assert (answer.status, answer.body) == (401, b"")
    assert {name for name in after if after[name] != before[name]} == {"forged"}
    assert (await visitor.metrics())["events_parked", ""] == parked


@pytest.mark.parametrize("name", ["telnyx-timestamp", "telnyx-signature-ed25519"])
async def test_header_twice_is_refused(visitor: Visitor, name: str) -> None:
    """Of two signatures, or two times, none is picked, even if they are the same."""
    body = event()
    headers = visitor.signed(body)
    answer = await visitor.ask("POST", WEBHOOK, body, [*headers.items(), (name, headers[name])])
    assert answer.status == 401


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"{",
        b'{"data": {}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"event_type": "fax.delivered", "payload": {"fax_id": NaN}}',
        b'{"event_type": "fax.delivered", "payload": []}',
        b'{"event_type": "call.hangup", "payload": {"fax_id": "1"}}',
        b'{"event_type": "fax.delivered", "payload": {"fax_id": 1' + b"0" * 5000 + b"}}",
    ],
    ids=lambda body: repr(body[:40]),
)
async def test_signed_nonsense_is_no_event(visitor: Visitor, body: bytes) -> None:
    """What is signed but no event of a fax is told 400; nothing breaks, and nothing of it is kept."""
    before = await visitor.webhooks()
    answer = await visitor.event(body)
    after = await visitor.webhooks()
    assert (answer.status, answer.body) == (400, b"")
    assert {name for name in after if after[name] != before[name]} == {"malformed"}
    assert not visitor.world.gateway.said("task_failed")


async def test_unknown_event_of_a_fax_is_acknowledged(visitor: Visitor) -> None:
    """An event of a kind that does not exist yet is answered 200, or the carrier would repeat it for ever."""
    assert (await visitor.event(event("fax.teleported"))).status == 200


async def test_store_that_does_not_answer_makes_the_carrier_repeat(tmp_path: Path) -> None:
    """While the database is locked, an event is told 503 and mail 451; afterwards both are taken."""
    async with world(tmp_path) as w, aiohttp.ClientSession() as session:
        visitor, body = Visitor(w, session), event()
        lock = sqlite3.connect(tmp_path / "gateway.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        away, told = await asyncio.gather(visitor.event(body), w.mail("+13125560001"), return_exceptions=True)
        lock.execute("ROLLBACK")
        lock.close()
        assert isinstance(away, Answer)
        assert away.status == 503
        assert int(away.headers["Retry-After"]) > 0
        assert isinstance(told, smtplib.SMTPResponseException)
        assert (told.smtp_code, told.smtp_error) == (451, STORE_AWAY)
        assert (await visitor.event(body)).status == 200
        mail_id = await w.mail("+13125560001")
        assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"


# --- what is too much --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "in chunks"])
async def test_large_body_is_refused(visitor: Visitor, *, chunked: bool) -> None:
    """A body beyond 256 KiB is told 413, signed or not, and whether or not its length is declared."""
    body = event(filler="x" * 256 * 1024)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    data: Any = pieces() if chunked else body
    assert (await visitor.ask("POST", WEBHOOK, data, visitor.signed(body))).status == 413
    fitting = event(filler="x" * 255 * 1024)
    assert (await visitor.event(fitting)).status == 200


async def test_compressed_body_is_never_unpacked(visitor: Visitor) -> None:
    """A small body that would unpack to hundreds of megabytes costs neither memory nor time."""
    bomb = gzip.compress(bytes(200_000_000))
    status = Path(f"/proc/{visitor.world.gateway.pid}/status")
    headers = visitor.signed(bomb) | {"Content-Encoding": "gzip"}
    before = peak(status)
    assert (await visitor.ask("POST", WEBHOOK, bomb, headers)).status in {400, 413}
    assert peak(status) - before < 20_000_000
    body = event()
    packed = await visitor.ask(
        "POST", WEBHOOK, gzip.compress(body), visitor.signed(body) | {"Content-Encoding": "gzip"}
    )
    assert packed.status == 401  # the carrier signs what it sends, and it sends no such thing


async def test_slow_body_is_not_waited_for(visitor: Visitor) -> None:
    """A body that never arrives is told 408 after some seconds, and others are served meanwhile."""
    reader, writer = await asyncio.open_connection("127.0.0.1", visitor.world.gateway.http_port)
    head = f"POST {WEBHOOK} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{{"
    writer.write(head.encode())
    begun = time.monotonic()
    assert (await visitor.event(event())).status == 200
    async with asyncio.timeout(30):
        line = await reader.readline()
    writer.close()
    assert line.startswith(b"HTTP/1.1 408 ")
    assert 5 < time.monotonic() - begun < 20


# --- everything else ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", WEBHOOK, 405),
        ("PUT", WEBHOOK, 405),
        ("DELETE", WEBHOOK, 405),
        ("POST", HEALTH, 405),
        ("POST", METRICS, 405),
        ("HEAD", HEALTH, 200),
        ("GET", "/", 404),
        ("GET", "/webhooks", 404),
        ("POST", "/webhooks/telnyx/", 404),
        ("POST", "/webhooks/telnyx/../telnyx", 404),
        ("POST", "//webhooks/telnyx", 404),
        ("GET", "/metrics/../../etc/passwd", 404),
        ("GET", "/%2e%2e/gateway.db", 404),
        ("OPTIONS", "/", 404),
    ],
)
async def test_other_paths_and_methods_lead_nowhere(
    visitor: Visitor, method: str, path: str, status: int
) -> None:
    """Only what is documented answers, and no answer names a program or its version."""
    answer = await visitor.ask(method, path)
    assert answer.status == status
    assert answer.headers["Server"] == "fax"
    whole = (str(answer.headers) + answer.body.decode()).lower()
    assert not [word for word in ("aiohttp", "python", "telnyx", "traceback") if word in whole]


async def test_garbage_instead_of_http_names_no_program(visitor: Visitor) -> None:
    """Octets that are no HTTP are refused without a banner."""
    reader, writer = await asyncio.open_connection("127.0.0.1", visitor.world.gateway.http_port)
    writer.write(b"\x16\x03\x01 nonsense\r\n\r\n")
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    assert answer.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 "))
    assert b"aiohttp" not in answer.lower()
    assert b"python" not in answer.lower()


async def test_health_and_readiness(visitor: Visitor) -> None:
    """A monitor learns that the gateway lives, and that it takes mail."""
    health, ready = await visitor.ask("GET", HEALTH), await visitor.ask("GET", READY)
    assert (health.status, json.loads(health.body)) == (200, {"status": "ok"})
    assert ready.status == 200
    assert json.loads(ready.body) == {"status": "ready", "holds": [], "overdue": 0}


async def test_metrics_move_and_name_nobody(visitor: Visitor) -> None:
    """Counters follow a fax from mail to reply; no label holds a number or an address."""
    w, before = visitor.world, await visitor.metrics()
    mail_id = await w.mail("+13125560002")
    await w.reply(f"{mail_id}-1")

    async def moved() -> bool:
        after = await visitor.metrics()
        return all(
            after[key] == before[key] + 1
            for key in (
                ("mails_total", "accepted"),
                ("calls_total", "taken"),
                ("faxes_total", "delivered"),
                ("replies_total", "delivered sent"),
                ("accept_seconds_count", ""),
            )
        )

    end = time.monotonic() + 10
    while not await moved():
        assert time.monotonic() < end, "the counters do not move"
    text = (await visitor.ask("GET", METRICS)).body.decode()
    assert not [word for word in ("312556", "@", SENDER.partition("@")[0], mail_id) if word in text]
    assert before["faxes_overdue", ""] == 0


async def test_hold_is_told_and_stopping_is_not_ready(tmp_path: Path) -> None:
    """On hold the gateway takes mail, so it is ready and says why it waits; while it stops it is not."""
    async with world(tmp_path) as w, aiohttp.ClientSession() as session:
        visitor = Visitor(w, session)
        assert (await w.gateway.run("hold", "--all"))[0] == 0
        held = await visitor.ask("GET", READY)
        assert held.status == 200
        assert len(json.loads(held.body)["holds"]) == 1
        assert (await visitor.metrics())["on_hold", ""] == 1
        # A mail in the middle of its DATA keeps the stop from being over at once.
        reader, writer = await asyncio.open_connection("127.0.0.1", w.gateway.smtp_port)
        for words in ("EHLO a", f"MAIL FROM:<{SENDER}>", "RCPT TO:<postmaster>", "DATA"):
            writer.write(words.encode() + b"\r\n")
        while not (await reader.readline()).startswith(b"354"):
            pass
        stopping = asyncio.create_task(w.gateway.stop())
        await until(lambda: w.gateway.said("stopping"), "the stop to begin")
        ready = await visitor.ask("GET", READY)
        assert ready.status == 503
        assert json.loads(ready.body)["status"] == "not taking mail"
        writer.write(b"Subject: the last\r\n\r\none\r\n.\r\n")
        assert (await reader.readline()).startswith(b"250 2.0.0 queued as ")
        writer.close()
        assert await stopping == 0


async def test_without_a_key_the_webhook_door_is_shut_and_faxes_are_asked_about(tmp_path: Path) -> None:
    """Without the public key nobody can send events, and a fax is finished by asking the carrier."""
    asking = {"public_key": "", "poll_after": "100ms"}
    async with world(tmp_path, telnyx=asking) as w, aiohttp.ClientSession() as session:
        visitor, body = Visitor(w, session), event()
        assert (await visitor.event(body)).status == 404
        assert (await visitor.ask("GET", WEBHOOK)).status == 404
        mail_id = await w.mail("+13125560003")
        assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
        assert not w.gateway.said("webhook_received")


def peak(status: Path) -> int:
    """Return the most memory that a process ever held, in octets."""
    words = status.read_text(encoding="ascii").split()
    return int(words[words.index("VmHWM:") + 1]) * 1024
