"""Questions to the carrier: one fax's status, the list that settles a doubt, and cancelling."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from raw_http import (
    CONNECTION,
    FAX,
    FROM,
    NOW,
    TO,
    Peer,
    RawServer,
    Request,
    Script,
    answering,
    raw_server,
    reply,
    telnyx,
)

from gateway.carrier import Carrier, CarrierError, NotKnown, Unavailable
from gateway.doubt import Sighting
from gateway.records import Report, Stage
from gateway.telnyx import Limits, Telnyx

SHORT = Limits(connect=0.3, post=0.3, question=0.3)
SINCE = NOW - 60.7

Question = Callable[[Telnyx], Awaitable[object]]


async def ask_status(carrier: Carrier) -> object:
    """Ask about a fax."""
    return await carrier.status(FAX)


async def ask_list(carrier: Carrier) -> object:
    """Ask for the list."""
    return await carrier.sent_since(FROM, SINCE)


async def ask_cancel(carrier: Carrier) -> object:
    """Ask to cancel."""
    return await carrier.cancel(FAX)


async def outcome(server: RawServer, question: Question, limits: Limits | None = None) -> object:
    """Put a question; return the answer or the error."""
    async with telnyx(server.base, limits=limits) as carrier:
        try:
            return await question(carrier)
        except CarrierError as error:
            return error


async def answered(question: Question, *answers: bytes) -> object:
    """Put a question to a server that gives these answers, on one connection."""
    async with raw_server(answering(*answers)) as server:
        result = await outcome(server, question)
        assert (server.connections, server.stray) == (1, b"")
    return result


def fax(**members: object) -> dict[str, object]:
    """Return a fax as Telnyx shows it."""
    return {
        "record_type": "fax",
        "id": FAX,
        "connection_id": CONNECTION,
        "direction": "outbound",
        "to": TO,
        "from": FROM,
        "status": "sending",
        "created_at": "2026-01-05T22:23:46.000000Z",
    } | members


# --- any question --------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [ask_status, ask_list, ask_cancel])
@pytest.mark.parametrize("status", [301, 400, 401, 403, 405, 408, 409, 500, 502, 503])
async def test_answer_of_no_use_is_unavailable(question: Question, status: int) -> None:
    """A question that is answered with trouble is not answered, and its cause is told by the status."""
    error = await answered(question, reply(f"{status} No", {"errors": [{"code": "10009", "detail": "x"}]}))
    assert isinstance(error, Unavailable)
    assert (error.cause, error.retry_after) == (f"HTTP {status}", None)


@pytest.mark.parametrize("question", [ask_status, ask_list, ask_cancel])
async def test_rate_limit_of_a_question_is_passed_on(question: Question) -> None:
    """A 429 says when to ask again."""
    error = await answered(question, reply("429 Slow", b"", "Retry-After: 5"))
    assert isinstance(error, Unavailable)
    assert (error.cause, error.retry_after) == ("HTTP 429", 5.0)


async def hang_up(peer: Peer) -> None:
    """Close after the request."""
    await peer.request()


async def reset(peer: Peer) -> None:
    """Reset after the request."""
    await peer.request()
    peer.reset()


async def stall(peer: Peer) -> None:
    """Say nothing."""
    await peer.request()
    await peer.silence()


async def cut_status_line(peer: Peer) -> None:
    """Close within the status line."""
    await peer.request()
    await peer.say(b"HTTP/1.1 2")


async def stall_in_header(peer: Peer) -> None:
    """Fall silent within the headers."""
    await peer.request()
    await peer.say(b"HTTP/1.1 200 OK\r\nContent-Le")
    await peer.silence()


async def garble(peer: Peer) -> None:
    """Say something that is no HTTP."""
    await peer.request()
    await peer.say(b"hello\r\n\r\n")


@pytest.mark.parametrize("question", [ask_status, ask_list, ask_cancel])
@pytest.mark.parametrize("script", [hang_up, reset, stall, cut_status_line, stall_in_header, garble])
async def test_trouble_on_the_way_is_unavailable(question: Question, script: Script) -> None:
    """A question that is cut or stalls is put once, on one connection, and then left for later."""
    async with raw_server(script) as server:
        error = await outcome(server, question, SHORT)
        assert isinstance(error, Unavailable)
        assert error.cause.startswith("no answer (")
        assert (server.connections, len(server.requests)) == (1, 1)


@pytest.mark.parametrize("question", [ask_status, ask_list, ask_cancel])
async def test_no_connection_is_unavailable(question: Question, unused_tcp_port: int) -> None:
    """A carrier that cannot be reached answers nothing."""
    error = await outcome(RawServer([], port=unused_tcp_port), question)
    assert isinstance(error, Unavailable)
    assert error.cause == "no answer (ClientConnectorError)"


@pytest.mark.parametrize("question", [ask_status, ask_list])
async def test_cut_body_is_unavailable(question: Question) -> None:
    """Half an answer to a question is none, even if what came looks whole."""
    whole = reply("200 OK", {"data": fax(), "meta": {}})

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(whole.replace(b"Content-Length: ", b"Content-Length: 9"))

    async with raw_server(script) as server:
        error = await outcome(server, question)
        assert isinstance(error, Unavailable)
        assert error.cause == "no answer (ClientPayloadError)"


async def test_questions_share_a_connection() -> None:
    """Polling does not cost a TLS handshake each time; cancelling, which changes something, does."""
    answer = reply("200 OK", {"data": fax()})
    async with raw_server(answering(answer)) as server, telnyx(server.base) as carrier:
        await carrier.status(FAX)
        await carrier.status(FAX)
        assert server.connections == 1
        assert await carrier.cancel(FAX) is True
        assert server.connections == 2


async def test_kept_connection_that_dies_is_not_asked_twice() -> None:
    """A question on a kept connection that breaks is put again by us when it is due, never by a library."""

    async def once(peer: Peer) -> None:
        await peer.request()
        await peer.say(reply("200 OK", {"data": fax()}))
        await peer.request()
        peer.reset()

    async with raw_server(once, answering(reply("200 OK", {"data": fax()}))) as server:
        async with telnyx(server.base) as carrier:
            await carrier.status(FAX)
            with pytest.raises(Unavailable, match=r"no answer \(Client"):
                await carrier.status(FAX)
            assert (server.connections, len(server.requests)) == (1, 2)
            assert (await carrier.status(FAX)).stage is Stage.SENDING
        assert (server.connections, len(server.requests)) == (2, 3)


async def test_question_needs_an_open_carrier() -> None:
    """A carrier that was not opened, or was closed, says so plainly."""
    carrier = telnyx("http://127.0.0.1:1/v2")
    with pytest.raises(RuntimeError, match="not opened"):
        await carrier.status(FAX)
    async with carrier:
        pass
    with pytest.raises(RuntimeError, match="not opened"):
        await carrier.status(FAX)
    await carrier.__aexit__()


# --- one fax -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "report"),
    [
        ({"status": "queued"}, Report(Stage.TAKEN, asked=True)),
        ({"status": "media.processed"}, Report(Stage.CONVERTED, asked=True)),
        ({"status": "originated"}, Report(Stage.DIALLED, asked=True)),
        ({"status": "sending.started", "id": None}, Report(Stage.SENDING, asked=True)),
        (
            {"status": "delivered", "page_count": 3, "call_duration_secs": "79"},
            Report(Stage.DELIVERED, asked=True, pages=3, duration=79),
        ),
        (
            {"status": "failed", "failure_reason": "user_busy", "internal_failure_reason": "sip\r\n486"},
            Report(Stage.FAILED, asked=True, reason="user_busy", internal_reason="sip486"),
        ),
        ({"status": "failed", "failure_reason": None}, Report(Stage.FAILED, asked=True)),
        ({"status": "failed", "failure_reason": {"a": 1}}, Report(Stage.FAILED, asked=True)),
        ({"status": "on_the_moon"}, Report(Stage.UNKNOWN, asked=True)),
    ],
)
async def test_status_is_reported(members: dict[str, object], report: Report) -> None:
    """What the carrier knows of a fax comes back in our words, marked as an answer to a question."""
    assert await answered(ask_status, reply("200 OK", {"data": fax(**members)})) == report


async def test_status_asks_for_the_one_fax() -> None:
    """The question names the fax in its path, and carries the key."""
    async with raw_server(answering(reply("200 OK", {"data": fax()}))) as server:
        await outcome(server, ask_status)
        assert (server.request.method, server.request.target) == ("GET", f"/v2/faxes/{FAX}")
        assert server.request.headers["authorization"] == "Bearer KEY0123456789"


@pytest.mark.parametrize("question", [ask_status, ask_cancel])
async def test_unknown_fax_is_not_known(question: Question) -> None:
    """A 404 says that the carrier does not know the fax, and is not taken for trouble."""
    assert isinstance(await answered(question, reply("404 Not Found", b"")), NotKnown)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        {"data": None},
        {"data": [fax()]},
        {"data": {}},
        {"data": fax(status=None)},
        {"data": fax(status=["sending"])},
        {"data": fax(status="\n")},
        {"data": fax(id="another")},
    ],
)
async def test_unreadable_status_is_unavailable(content: object) -> None:
    """An answer without a status, or about another fax, moves nothing."""
    assert isinstance(await answered(ask_status, reply("200 OK", content)), Unavailable)


async def test_odd_ids_stay_one_segment_of_the_path() -> None:
    """An id from outside cannot lead a question to another resource."""
    async with raw_server(answering(reply("404 No", b""))) as server, telnyx(server.base) as carrier:
        for question in (carrier.status, carrier.cancel):
            with pytest.raises(NotKnown):
                await question("a/../b?c=d#e")
        assert server.requests[0].target == "/v2/faxes/a%2F..%2Fb%3Fc%3Dd%23e"
        assert server.requests[1].target == "/v2/faxes/a%2F..%2Fb%3Fc%3Dd%23e/actions/cancel"


@pytest.mark.parametrize(
    ("status", "asked"),
    [("202 Accepted", True), ("200 OK", True), ("204 No Content", True), ("422 Late", False)],
)
async def test_cancel_says_whether_it_was_asked_in_time(status: str, asked: bool) -> None:  # noqa: FBT001 -- a table's column
    """Cancelling is taken as a command, or comes too late."""
    async with raw_server(answering(reply(status))) as server:
        assert await outcome(server, ask_cancel) is asked
        assert (server.request.method, server.request.path) == ("POST", f"/v2/faxes/{FAX}/actions/cancel")
        assert server.request.body == b""


async def test_cancel_with_a_cut_answer_was_asked() -> None:
    """The status line of a 202 is all that is needed to know that the command was taken."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(reply("202 Accepted", b"{}").replace(b"Length: 2", b"Length: 20"))

    async with raw_server(script) as server:
        assert await outcome(server, ask_cancel) is True


# --- the list ------------------------------------------------------------------------------------------


def pages(*contents: list[Any], **meta: object) -> list[bytes]:
    """Return the answers of a list with these pages."""
    total = sum(len(rows) for rows in contents)
    numbers = {"page_size": 250, "total_pages": len(contents), "total_results": total}
    return [
        reply("200 OK", {"data": rows, "meta": numbers | {"page_number": number} | meta})
        for number, rows in enumerate(contents, 1)
    ]


def sighting(carrier_id: str, to_number: str = TO) -> Sighting:
    """Return what `fax(id=carrier_id)` says."""
    return Sighting(carrier_id, to_number, FROM, CONNECTION, NOW)


async def test_list_is_asked_by_a_query_that_a_server_reads_right() -> None:
    """The + of the number survives the way, or the list would come back empty and the fax go out twice."""
    async with raw_server(answering(*pages([]))) as server:
        assert await outcome(server, ask_list) == []
        assert server.request.path == "/v2/faxes"
        assert server.request.query == {
            "filter[direction][eq]": "outbound",
            "filter[from][eq]": FROM,
            "filter[created_at][gte]": "2026-01-05T22:22:45Z",
            "page[size]": "250",
            "page[number]": "1",
        }
        assert f"=%2B{FROM[1:]}&" in server.request.target
        assert "+" not in server.request.target


async def test_list_is_read_to_its_end() -> None:
    """Every page is read, a row that moved to the next page meanwhile is one fax."""
    answers = pages([fax(id="a"), fax(id="b")], [fax(id="b"), fax(id="c")], [fax(id="d")], total_results=4)
    async with raw_server(answering(*answers)) as server:
        assert await outcome(server, ask_list) == [sighting(name) for name in "abcd"]
        assert [request.query["page[number]"] for request in server.requests] == ["1", "2", "3"]
        assert server.connections == 1


async def test_list_keeps_our_own_faxes_only() -> None:
    """Incoming faxes and other senders' are left out, whatever the filter did."""
    rows = [
        fax(id="a", to=TO[1:], created_at="2026-01-05T22:23:46", connection_id=int(CONNECTION)),
        fax(id="b", direction="inbound", to=None, created_at=None),
        fax(id="c", **{"from": "+13125550999"}),
        fax(id="d", to="sip:fax@example.com", **{"from": " " + FROM[1:]}),
    ]
    listed = await answered(ask_list, *pages(rows))
    assert listed == [sighting("a"), sighting("d", "sip:fax@example.com")]


@pytest.mark.parametrize("total_pages", [0, 1])
async def test_empty_list_is_an_answer(total_pages: int) -> None:
    """That there is no fax is a good answer, however the pages of nothing are counted."""
    assert await answered(ask_list, *pages([], total_pages=total_pages)) == []


@pytest.mark.parametrize(
    "row",
    [
        None,
        "fax",
        fax(id=None),
        fax(id="a/b"),
        fax(direction=None),
        fax(to=None),
        fax(to="+1312555****"),
        fax(**{"from": "anonymous"}),
        fax(connection_id=None),
        fax(created_at=None),
        fax(created_at="yesterday"),
    ],
)
async def test_unreadable_row_spoils_the_list(row: object) -> None:
    """A row that cannot be read might be the very fax that is in doubt: the list proves nothing."""
    error = await answered(ask_list, *pages([fax(id="a"), row]))
    assert isinstance(error, Unavailable)
    assert error.cause == "list holds an unreadable row"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        {"data": []},
        {"meta": {"page_number": 1, "total_pages": 1}},
        {"data": {}, "meta": {"page_number": 1, "total_pages": 1}},
        {"data": [], "meta": None},
        {"data": [], "meta": {"page_number": 1}},
        {"data": [], "meta": {"total_pages": 1}},
        {"data": [], "meta": {"page_number": 2, "total_pages": 1}},
        {"data": [], "meta": {"page_number": 1, "total_pages": -1}},
        {"data": [], "meta": {"page_number": 1, "total_pages": 1, "total_results": "many"}},
        {"data": [], "meta": {"page_number": 1, "total_pages": 1, "total_results": 1}},
        {"data": [], "meta": {"page_number": 1, "total_pages": 2}},
        b" " * (8 * 1024 * 1024) + b'{"data": [], "meta": {"page_number": 1, "total_pages": 1}}',
    ],
    ids=lambda content: str(content)[:60],
)
async def test_unreadable_or_incomplete_list_is_unavailable(content: object) -> None:
    """An answer that may have left something out is no proof that a fax is absent."""
    assert isinstance(await answered(ask_list, reply("200 OK", content)), Unavailable)


async def test_page_that_repeats_spoils_the_list() -> None:
    """A carrier that ignores the page number does not pass for a complete list."""
    rows = [fax(id="a")]
    error = await answered(ask_list, *pages(rows, rows))
    assert isinstance(error, Unavailable)
    assert error.cause == "list repeats or skips a page"


async def test_missing_row_spoils_the_list() -> None:
    """Fewer rows than the carrier promised are not the whole list."""
    error = await answered(ask_list, *pages([fax(id="a")], [fax(id="b")], total_results=3))
    assert isinstance(error, Unavailable)
    assert error.cause == "list is incomplete"


async def test_second_page_that_fails_spoils_the_list() -> None:
    """Half a list is none."""
    error = await answered(ask_list, pages([fax(id="a")], [fax(id="b")])[0], reply("500 Oops"))
    assert isinstance(error, Unavailable)
    assert error.cause == "HTTP 500"


async def test_endless_list_ends() -> None:
    """A list that never ends is given up after 400 pages."""

    async def script(peer: Peer) -> None:
        while request := await peer.request():
            number = request.query["page[number]"]
            meta = {"page_number": number, "total_pages": 100_000}
            await peer.say(reply("200 OK", {"data": [fax(id=f"a{number}")], "meta": meta}))

    async with raw_server(script) as server:
        error = await outcome(server, ask_list)
        assert isinstance(error, Unavailable)
        assert error.cause == "list has too many pages"
        assert len(server.requests) == 400


def test_request_helper_reads_plus_as_space() -> None:
    """The query of the test server is read as a server reads it, so that a bare + would show."""
    assert Request("GET", "/faxes?a=+1", {}, b"", b"").query == {"a": " 1"}
