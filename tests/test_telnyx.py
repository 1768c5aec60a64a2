"""One POST of a fax: its exact bytes, and one connection and one request whatever goes wrong."""

import asyncio
import datetime as dt
import ssl
from collections.abc import Callable
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from raw_http import CONNECTION, FAX, FROM, TO, Peer, Script, answering, raw_server, reply, telnyx

from gateway.carrier import Call, Carrier, CarrierError, InDoubt, Refused, Unavailable
from gateway.records import Blame
from gateway.telnyx import POST_LIMIT, Limits

DOCUMENT = b"%PDF-1.7\r\n--not a boundary\r\n\x00\xff\n%%EOF"
CALL = Call(TO, FROM, "high", t38=True, document=DOCUMENT)
TAKEN = reply("202 Accepted", {"data": {"id": FAX, "record_type": "fax", "status": "queued"}})
SHORT = Limits(connect=0.3, post=0.3, question=0.3)


def always() -> bool:
    """Say that the lease still holds."""
    return True


async def outcome(base: str, call: Call = CALL, limits: Limits | None = None) -> str | CarrierError:
    """Send a fax; return its id, or the error."""
    carrier: Carrier = telnyx(base, limits=limits)
    try:
        return await carrier.send(call, always)
    except CarrierError as error:
        return error


async def answered(answer: bytes) -> str | CarrierError:
    """Send a fax to a server that gives this answer; hold that it was asked once."""
    async with raw_server(answering(answer)) as server:
        result = await outcome(server.base)
        assert (server.connections, len(server.requests), server.stray) == (1, 1, b"")
    return result


# --- the request -----------------------------------------------------------------------------------------


async def test_form_has_exactly_the_parts_of_the_schema() -> None:
    """The carrier gets the six text fields and the PDF in the one form that its API accepts."""
    async with raw_server(answering(TAKEN)) as server:
        carrier = telnyx(server.base, monochrome=True)
        assert await carrier.send(Call(TO, FROM, "normal", t38=False, document=DOCUMENT), always) == FAX
        request = server.request
    assert (request.method, request.target) == ("POST", "/v2/faxes")
    assert request.headers["authorization"] == "Bearer KEY0123456789"
    assert request.headers["user-agent"] == "email-fax-gateway/1.2.3"
    assert request.headers["connection"] == "close"
    assert int(request.headers["content-length"]) == len(request.body)
    assert "transfer-encoding" not in request.headers
    assert "expect" not in request.headers
    kind, boundary = request.headers["content-type"].split("; boundary=")
    assert kind == "multipart/form-data"
    text = '--{0}\r\nContent-Disposition: form-data; name="{1}"\r\n\r\n{2}\r\n'
    fields = {
        "connection_id": CONNECTION,
        "to": TO,
        "from": FROM,
        "quality": "normal",
        "t38_enabled": "false",
        "monochrome": "true",
    }
    expected = "".join(text.format(boundary, name, value) for name, value in fields.items())
    expected += (
        f"--{boundary}\r\nContent-Type: application/pdf\r\n"
        'Content-Disposition: form-data; name="contents"; filename="fax.pdf"\r\n\r\n'
    )
    assert request.body == expected.encode() + DOCUMENT + f"\r\n--{boundary}--\r\n".encode()


async def test_form_reads_back_by_another_parser() -> None:
    """A large document arrives byte for byte, by the reading of a parser that is not ours."""
    document = bytes(range(256)) * 12_000  # 3 MB
    async with raw_server(answering(TAKEN)) as server:
        assert await outcome(server.base, Call(TO, FROM, "high", t38=True, document=document)) == FAX
        request = server.request
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    parts = list(BytesParser(policy=HTTP).parsebytes(head + request.body).iter_parts())
    names = [part.get_param("name", header="content-disposition") for part in parts]
    assert names == ["connection_id", "to", "from", "quality", "t38_enabled", "monochrome", "contents"]
    assert [part.get_content_type() for part in parts[:-1]] == ["text/plain"] * 6
    assert parts[4].get_payload() == "true"
    assert parts[5].get_payload() == "false"
    assert parts[-1].get_filename() == "fax.pdf"
    assert request.body.partition(b'"fax.pdf"\r\n\r\n')[2].startswith(document + b"\r\n--")


async def test_each_fax_has_a_connection_of_its_own() -> None:
    """A fax never travels on a connection that another one used."""
    async with raw_server(answering(TAKEN)) as server:
        carrier = telnyx(server.base + "/")
        assert [await carrier.send(CALL, always) for _ in range(3)] == [FAX] * 3
        assert server.connections == 3
        assert {request.target for request in server.requests} == {"/v2/faxes"}


async def test_environment_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy named by the environment gets neither the key nor the document."""
    async with raw_server(answering(TAKEN)) as proxy, raw_server(answering(TAKEN)) as server:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        assert await outcome(server.base) == FAX
        assert proxy.connections == 0


async def test_redirect_is_not_followed() -> None:
    """A redirect stops the queue as a fault of the set-up; the document goes nowhere else."""
    async with raw_server(answering(TAKEN)) as other:
        error = await answered(reply("307 Temporary Redirect", b"", f"Location: {other.base}/faxes"))
        assert other.connections == 0
    assert isinstance(error, Refused)
    assert (error.cause, error.blame) == ("HTTP 307 redirect", Blame.ACCOUNT)


# --- the last moment ---------------------------------------------------------------------------------------


async def test_nothing_leaves_after_the_lease_ran_out() -> None:
    """A gateway whose lease ran out while it connected sends no byte, and hangs up."""
    asked = []

    def may_begin() -> bool:
        asked.append(server.stray)
        return False

    async with raw_server(Peer.silence) as server:
        with pytest.raises(Unavailable, match="lease ran out"):
            await telnyx(server.base).send(CALL, may_begin)
        await server.ended.wait()
        assert (asked, server.connections, server.stray) == ([b""], 1, b"")


async def test_lease_is_asked_once_and_only_when_the_connection_stands() -> None:
    """The question is put after the server has accepted the connection, and before the first byte."""
    stands = asyncio.Event()

    async def script(peer: Peer) -> None:
        stands.set()
        await answering(TAKEN)(peer)

    asked: list[int] = []

    def may_begin() -> bool:
        asked.append(len(server.requests))
        return True

    async with raw_server(script) as server:
        assert await telnyx(server.base).send(CALL, may_begin) == FAX
        assert stands.is_set()
        assert asked == [0]


async def test_lease_is_not_asked_without_a_connection(unused_tcp_port: int) -> None:
    """Without a connection nobody needs to know whether the POST may begin."""
    asked: list[bool] = []

    def may_begin() -> bool:
        asked.append(True)
        return True

    with pytest.raises(Unavailable):
        await telnyx(f"http://127.0.0.1:{unused_tcp_port}").send(CALL, may_begin)
    assert asked == []


# --- certainly not taken -----------------------------------------------------------------------------------


async def test_no_connection_is_unavailable(unused_tcp_port: int) -> None:
    """A port where nobody listens costs the fax nothing."""
    error = await outcome(f"http://127.0.0.1:{unused_tcp_port}/v2")
    assert isinstance(error, Unavailable)
    assert error.cause == "no connection (ClientConnectorError)"
    assert error.retry_after is None


async def test_unknown_host_is_unavailable() -> None:
    """A name that does not resolve costs the fax nothing."""
    error = await outcome("http://carrier.invalid/v2")
    assert isinstance(error, Unavailable)
    assert error.cause == "no connection (ClientConnectorDNSError)"


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """Return a server's TLS context with a certificate that nobody trusts."""
    folder: Path = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    start = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    certificate = builder.not_valid_before(start).not_valid_after(start + dt.timedelta(days=2))
    (folder / "pair.pem").write_bytes(
        certificate.sign(key, SHA256()).public_bytes(Encoding.PEM)
        + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "pair.pem")
    return context


async def test_untrusted_certificate_is_unavailable(stranger: ssl.SSLContext) -> None:
    """A server with a wrong certificate sees nothing of the fax, so it was not taken."""
    async with raw_server(answering(TAKEN), tls=stranger) as server:
        error = await outcome(server.base)
        assert isinstance(error, Unavailable)
        assert error.cause == "no connection (ClientConnectorCertificateError)"
        assert (server.requests, server.stray) == ([], b"")


async def cut_handshake(peer: Peer) -> None:
    """Close in the middle of the TLS handshake."""
    await peer.reader.read(1)


async def garbled_handshake(peer: Peer) -> None:
    """Answer the TLS handshake with something else."""
    await peer.reader.read(1)
    await peer.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await peer.reader.read()


async def reset_handshake(peer: Peer) -> None:
    """Cut the TLS handshake with a RST."""
    await peer.reader.read(1)
    peer.reset()


@pytest.mark.parametrize("script", [cut_handshake, garbled_handshake, reset_handshake, Peer.silence])
@pytest.mark.parametrize("limits", [Limits(connect=0.3, post=9), Limits(connect=9, post=0.3)])
async def test_failed_tls_handshake_is_unavailable(script: Script, limits: Limits) -> None:
    """A TLS handshake that fails or stalls, by whichever limit, is before the first byte of the fax."""
    async with raw_server(script) as server:
        error = await outcome(server.base.replace("http:", "https:"), limits=limits)
        assert isinstance(error, Unavailable)
        assert error.cause.startswith("no connection (")
        assert server.connections == 1


# --- in doubt ----------------------------------------------------------------------------------------------


def after(count: int | None, then: Callable[[Peer], object]) -> Script:
    """Return a script that reads so many bytes of the request (None: all), then does something."""

    async def script(peer: Peer) -> None:
        if count is None:
            await peer.request()
        else:
            await peer.reader.readexactly(count)
        result = then(peer)
        if asyncio.iscoroutine(result):
            await result

    return script


def close(peer: Peer) -> None:
    """Hang up: the script's end closes the connection."""


@pytest.mark.parametrize("end", [close, Peer.reset, Peer.silence])
@pytest.mark.parametrize("count", [0, 1, 200, 700, None])
async def test_cut_or_stalled_request_is_in_doubt(count: int | None, end: Callable[[Peer], object]) -> None:
    """However much of the request went out before the trouble: nobody sends it a second time."""
    async with raw_server(after(count, end)) as server:
        error = await outcome(server.base, limits=SHORT)
        assert isinstance(error, InDoubt)
        assert error.cause.startswith("no answer (")
        assert server.connections == 1
        assert len(server.requests) == (1 if count is None else 0)


@pytest.mark.parametrize("end", [close, Peer.reset, Peer.silence])
@pytest.mark.parametrize("cut", [1, 12, 20, 40, len(TAKEN) - 40, len(TAKEN) - 1])
async def test_cut_answer_is_in_doubt(cut: int, end: Callable[[Peer], object]) -> None:
    """An answer that breaks off anywhere before the fax's id is whole tells nothing."""

    async def script(peer: Peer) -> None:
        await peer.say(TAKEN[:cut])
        await asyncio.sleep(0)
        result = end(peer)
        if asyncio.iscoroutine(result):
            await result

    async with raw_server(after(None, script)) as server:
        error = await outcome(server.base, limits=SHORT)
        assert isinstance(error, InDoubt)
        assert (server.connections, len(server.requests), server.stray) == (1, 1, b"")


async def test_answer_byte_by_byte_that_stalls_is_in_doubt() -> None:
    """A trickle of an answer does not keep the fax beyond the limit."""

    async def script(peer: Peer) -> None:
        for byte in TAKEN[:60]:
            await peer.say(bytes([byte]))
            await asyncio.sleep(0)
        await peer.silence()

    async with raw_server(after(None, script)) as server:
        assert isinstance(await outcome(server.base, limits=SHORT), InDoubt)
        assert (server.connections, len(server.requests)) == (1, 1)


async def test_answer_byte_by_byte_that_ends_is_taken() -> None:
    """A slow answer is as good as a quick one."""

    async def script(peer: Peer) -> None:
        for byte in TAKEN:
            await peer.say(bytes([byte]))

    async with raw_server(after(None, script)) as server:
        assert await outcome(server.base) == FAX


@pytest.mark.parametrize(
    "answer",
    [
        b"SMTP ready\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello\r\n\r\n",
        b"HTTP/1.1 2x2 OK\r\n\r\n",
        b"HTTP/1.1 202 Accepted\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 202 Accepted\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        b"HTTP/1.1 202 Accepted\r\nContent-Length: 9\r\nContent-Encoding: gzip\r\n\r\nnot gzip!",
    ],
)
async def test_answer_that_is_not_http_is_in_doubt(answer: bytes) -> None:
    """Bytes that are no HTTP answer tell nothing about the fax."""

    async def script(peer: Peer) -> None:
        await peer.say(answer)

    async with raw_server(after(None, script)) as server:
        assert isinstance(await outcome(server.base), InDoubt)
        assert (server.connections, len(server.requests)) == (1, 1)


async def test_whole_id_counts_even_when_the_rest_is_cut() -> None:
    """A fax whose id arrived is known, also when the connection breaks right behind it."""
    cut = TAKEN.replace(b"Content-Length: ", b"Content-Length: 9")

    async def script(peer: Peer) -> None:
        await peer.say(cut)

    async with raw_server(after(None, script)) as server:
        assert await outcome(server.base) == FAX


async def test_interim_answer_is_passed_over() -> None:
    """A 100 or 103 before the answer is not the answer."""
    assert await answered(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + TAKEN) == FAX


async def test_refusal_in_the_middle_of_the_upload() -> None:
    """A proxy that refuses the size after the first bytes is understood, and the rest stays here."""

    async def script(peer: Peer) -> None:
        await peer.reader.readexactly(100)
        await peer.say(reply("413 Payload Too Large", b"", "Connection: close"))
        await peer.silence()

    async with raw_server(script) as server:
        error = await outcome(server.base, Call(TO, FROM, "high", t38=True, document=bytes(19_000_000)))
        assert isinstance(error, Refused)
        assert (error.cause, error.reason) == ("HTTP 413", "document_refused")
        assert server.connections == 1


async def test_cancelling_hangs_up_and_passes_on() -> None:
    """A stop of the program is not swallowed, and leaves no connection behind."""
    began = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        began.set()
        await peer.silence()

    async with raw_server(script) as server:
        task = asyncio.create_task(telnyx(server.base).send(CALL, always))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.ended.wait()
        assert (server.connections, len(server.requests)) == (1, 1)


def test_limits_are_those_that_the_lease_is_built_on() -> None:
    """The longest POST is the published number unless somebody says otherwise."""
    assert Limits().post == POST_LIMIT


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("api_base", "api.telnyx.com/v2"),
        ("api_base", "ftp://api.telnyx.com"),
        ("api_base", "https://"),
        ("api_key", ""),
        ("api_key", "KEY0123\n"),
        ("api_key", "clé"),
        ("public_key", "AAAA"),
    ],
)
def test_setting_that_cannot_work_is_refused_at_once(setting: str, value: str) -> None:
    """A base address, key or public key that cannot work fails at the start and not at the first fax."""
    settings = {"base": "https://api.telnyx.com/v2"} | {setting.replace("api_base", "base"): value}
    with pytest.raises(ValueError, match=r"base address|API key|public key"):
        telnyx(**settings)
