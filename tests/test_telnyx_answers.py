"""What an answer to a POST means: every status and code that Telnyx documents, and bodies of every shape."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_http import FAX, FROM, NOW, TO, Peer, answering, raw_server, reply, telnyx

from gateway import reasons
from gateway.carrier import Call, CarrierError, InDoubt, Refused, Unavailable
from gateway.records import Blame, Stage
from gateway.telnyx_answers import (
    Answer,
    read_count,
    read_json,
    read_moment,
    read_number,
    read_taken,
    read_text,
    retry_after,
    stage_of,
)

CALL = Call(TO, FROM, "high", t38=True, document=b"%PDF-1.7")


async def answered(answer: bytes) -> str | CarrierError:
    """Send a fax to a server that gives this answer; hold that it was asked once."""
    async with raw_server(answering(answer)) as server:
        try:
            return await telnyx(server.base).send(CALL, lambda: True)
        except CarrierError as error:
            return error
        finally:
            assert (server.connections, len(server.requests), server.stray) == (1, 1, b"")


def errors(
    code: object = None, pointer: object = None, parameter: object = None, detail: object = None
) -> Any:
    """Return an error body of Telnyx's with one error."""
    error: dict[str, object] = {"title": "Bad", "meta": {"url": "https://developers.telnyx.com"}}
    error |= {} if code is None else {"code": code}
    error |= {} if detail is None else {"detail": detail}
    source = {"pointer": pointer, "parameter": parameter}
    if found := {key: value for key, value in source.items() if value is not None}:
        error["source"] = found
    return {"errors": [error]}


@pytest.mark.parametrize("status", ["200 OK", "201 Created", "202 Accepted", "299 New"])
async def test_any_success_with_an_id_is_taken(status: str) -> None:
    """A fax counts as taken by its id, not by which of the success codes came with it."""
    assert await answered(reply(status, {"data": {"id": FAX, "client_state": None}})) == FAX


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"OK",
        b"<html>Accepted</html>",
        b"null",
        b"[]",
        b"{}",
        b'{"data": null}',
        b'{"data": []}',
        b'{"data": {}}',
        b'{"data": {"id": null}}',
        b'{"data": {"id": ""}}',
        b'{"data": {"id": 17}}',
        b'{"data": {"id": "../faxes"}}',
        b'{"data": {"id": "a b"}}',
        b'{"data": {"id": "' + b"a" * 101 + b'"}}',
        b'{"data": {"id": "a"}, "data": {"id": "b"}}',
        b'{"data": {"id": "a"}, "x": NaN}',
        b'{"data": {"id": "a", "x": "\\ud800"}}',
        b'{"data": {"id": "\xff"}}',
        b"[" * 30_000,
        b'{"data": {"id": "a", "x": ' + b"9" * 5_000 + b"}}",
        b'{"data": {"id": "a", "x": "' + b"x" * 70_000 + b'"}}',
    ],
    ids=lambda body: str(body[:30]),
)
async def test_success_without_an_id_is_in_doubt(body: bytes) -> None:
    """A success code alone proves nothing, and neither does an id that cannot be relied on."""
    error = await answered(reply("202 Accepted", body))
    assert isinstance(error, InDoubt)
    assert error.cause == "HTTP 202 without a fax id"


CODES_OF_THE_ACCOUNT = [
    10009, 10010, 10038, 10039, 20001, 20002, 20008, 20012, 20013, 20014, 20015, 20016, 20017, 20100,
]  # fmt: skip
ACCOUNT = (Blame.ACCOUNT, "account_disabled")
ODD_ACCOUNT = (Blame.SUSPECT, "account_disabled")
ODD_SET_UP = (Blame.SUSPECT, "no_outbound_profile")
ODD_SENDER = (Blame.SUSPECT, "unverified_origination_number")
NUMBER = (Blame.FAX, "number_refused")
DOCUMENT = (Blame.FAX, "document_refused")

REFUSALS: list[tuple[int, Any, str, tuple[Blame, str]]] = [
    (400, errors("10015"), "10015", DOCUMENT),
    (400, errors("10023"), "10023", DOCUMENT),
    (400, errors("10028"), "10028", DOCUMENT),
    (400, errors("10015", "/from"), "10015 /from", ODD_SENDER),
    (400, errors("10015", "/to"), "10015 /to", NUMBER),
    (401, errors("10009"), "10009", ACCOUNT),
    (401, errors("20002"), "20002", ACCOUNT),
    (401, b"", "", ACCOUNT),
    *((402, errors(f"{code}"), f"{code}", ACCOUNT) for code in CODES_OF_THE_ACCOUNT),
    *((403, errors(f"{code}"), f"{code}", ACCOUNT) for code in CODES_OF_THE_ACCOUNT),
    (402, b"", "", ODD_ACCOUNT),
    (403, b"", "", ODD_ACCOUNT),
    (403, errors("10017"), "10017 /from", ODD_ACCOUNT),
    (404, errors("404"), "", ODD_SET_UP),
    (404, errors("10005"), "10005", ODD_SET_UP),
    (405, errors("10030"), "10030", DOCUMENT),
    (413, b"<html>", "", DOCUMENT),
    (415, errors("10014"), "10014", DOCUMENT),
    (415, errors("10024"), "10024", DOCUMENT),
    (422, errors("422"), "", DOCUMENT),
    (422, errors("10004"), "10004", DOCUMENT),
    (422, errors("10027"), "10027", DOCUMENT),
    (422, errors("20100"), "20100", ACCOUNT),
    (422, errors("10016", "/to"), "10016 /to", NUMBER),
    (422, errors(10016, "/to"), "10016 /to", NUMBER),
    (422, errors("10002"), "10002 /to", NUMBER),
    (422, errors("10016"), "10016 /to", NUMBER),
    (422, errors("10017"), "10017 /from", ODD_SENDER),
    (422, errors("10017", "/to"), "10017 /to", NUMBER),
    (422, errors(None, "#/body/from"), "/from", ODD_SENDER),
    (422, errors(None, None, "from"), "/from", ODD_SENDER),
    (422, errors("422", "/connection_id"), "/connection_id", ODD_SET_UP),
    (422, errors("422", None, "connection_id"), "/connection_id", ODD_SET_UP),
    (422, errors("422", "/contents"), "/contents", DOCUMENT),
    (422, errors("422", None, None, "contents is invalid"), "/contents", DOCUMENT),
    (422, errors("422", None, None, "The 'to' number is bad"), "/to", NUMBER),
    (422, errors("422", None, None, "`from` is not yours"), "/from", ODD_SENDER),
    (422, errors("422", None, None, "no such connection_id"), "/connection_id", ODD_SET_UP),
    (422, errors("422", None, None, "failed to read from it"), "", DOCUMENT),
    (422, errors("422", "/", None, "the 'to' field"), "/to", NUMBER),
    (422, {"errors": [errors("10016", "/to")["errors"][0], errors("10017", "/from")["errors"][0]]},
     "10016 /from", ODD_SENDER),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "detail", "meaning"), REFUSALS)
async def test_refusal_says_whom_it_concerns(
    status: int, body: Any, detail: str, meaning: tuple[Blame, str]
) -> None:
    """Each refusal that Telnyx documents stops the fax, or may concern the set-up, or does: as fits it."""
    error = await answered(reply(f"{status} No", body))
    assert isinstance(error, Refused)
    assert (error.blame, error.reason) == meaning
    assert error.cause == f"HTTP {status} {detail}".strip()
    assert reasons.lookup(error.reason) in {*reasons.TABLE, *reasons.LOCAL}


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
async def test_redirect_is_a_fault_of_the_set_up(status: int) -> None:
    """A redirect is never followed; it stops the queue until somebody corrects the address."""
    error = await answered(reply(f"{status} Elsewhere", b"", "Location: http://127.0.0.1:1/faxes"))
    assert isinstance(error, Refused)
    assert (error.cause, error.blame) == (f"HTTP {status} redirect", Blame.ACCOUNT)


@pytest.mark.parametrize("status", [101, 406, 408, 409, 410, 418, 425, 500, 502, 503, 504, 524, 599])
async def test_what_nobody_classified_is_in_doubt(status: int) -> None:
    """A status that may stand for a fax that was taken after all leads to questions, not to another call."""
    error = await answered(reply(f"{status} Oops", errors("10007")))
    assert isinstance(error, InDoubt)
    assert error.cause == f"HTTP {status}"


WRONG_BODIES = [
    b"",
    b"\x00\xff\xfe",
    b"<html><body>502 Bad Gateway</body></html>",
    b"null",
    b'"error"',
    b"[1, 2]",
    b"[" * 30_000,
    b'{"errors": null}',
    b'{"errors": {"code": "10009"}}',
    b'{"errors": [null, 1, "x", [], {}]}',
    b'{"errors": [{"code": {"a": 1}, "title": 5, "detail": [], "source": "to"}]}',
    b'{"errors": [{"code": null, "source": {"pointer": ["/to"], "parameter": 7}}]}',
    b'{"errors": [{"code": "' + b"1" * 200 + b'"}]}',
    b'{"errors": [{"code": "+13125550123", "detail": "+13125550123 secret"}]}',
    b'{"errors": [' + b'{"code": "x"}, ' * 20_000 + b"{}]}",
    b"x" * 1_000_000,
]


@pytest.mark.parametrize("body", WRONG_BODIES, ids=lambda body: str(body[:30]))
@pytest.mark.parametrize(
    ("status", "kind", "cause"),
    [
        ("401 Unauthorized", Refused, "HTTP 401"),
        ("403 Forbidden", Refused, "HTTP 403"),
        ("422 Unprocessable Entity", Refused, "HTTP 422"),
        ("429 Too Many Requests", Unavailable, "HTTP 429"),
        ("500 Internal Server Error", InDoubt, "HTTP 500"),
    ],
)
async def test_odd_error_body_changes_nothing(
    status: str, kind: type[CarrierError], cause: str, body: bytes
) -> None:
    """An error body of any shape and size is understood by its status, and none of it gets into the log."""
    error = await answered(reply(status, body, "Content-Type: application/json"))
    assert type(error) is kind
    assert str(error) == cause


@pytest.mark.parametrize(
    ("status", "kind"), [("401 Unauthorized", Refused), ("429 Slow", Unavailable), ("500 Oops", InDoubt)]
)
async def test_cut_body_leaves_the_status(status: str, kind: type[CarrierError]) -> None:
    """The status line alone says what became of the fax, when the rest of the answer is lost."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(reply(status, b"{}").replace(b"Length: 2", b"Length: 200"))

    async with raw_server(script) as server:
        with pytest.raises(kind, match=rf"^HTTP {status[:3]}$"):
            await telnyx(server.base).send(CALL, lambda: True)


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ((), None),
        (("Retry-After: 7",), 7.0),
        (("retry-after: 0",), 0.0),
        (("Retry-After: 1.5",), 1.5),
        (("Retry-After: 7200",), 3600.0),
        (("Retry-After: 7", "x-ratelimit-reset: 9"), 7.0),
        (("x-ratelimit-reset: 9",), 9.0),
        (("Retry-After: soon", "x-ratelimit-reset: 9"), 9.0),
        (("Retry-After: -5", "x-ratelimit-reset: 9"), 9.0),
        (("Retry-After: 999999999999999", "x-ratelimit-reset: 9"), 9.0),
        (("x-ratelimit-reset: 1767651830",), None),
        (("Retry-After: nan",), None),
        (("Retry-After: 1e3",), None),
        (("Retry-After: 7, 8",), None),
        (("Retry-After: Mon, 05 Jan 2026 22:24:46 GMT",), 60.0),
        (("Retry-After: Mon, 05 Jan 2026 22:20:00 GMT",), 0.0),
        (("Retry-After: Mon, 05 Jan 2099 22:20:00 GMT",), None),
        (("Retry-After: Fri, 30 Feb 2026 22:20:00 GMT",), None),
        (("Retry-After: Mon, 05 Jan 2026 22:24:46 +0000",), None),
    ],
)
async def test_rate_limit_pauses_as_long_as_it_asks(headers: tuple[str, ...], wait: float | None) -> None:
    """A 429 costs the fax nothing, and the queue waits as long as Telnyx says, at most an hour."""
    error = await answered(reply("429 Too Many Requests", errors("10011"), *headers))
    assert isinstance(error, Unavailable)
    assert (error.cause, error.retry_after) == ("HTTP 429", wait)


def meaning_of(status: int, body: bytes) -> str:
    """Return the id, or the cause of one of the three errors; anything else fails the test."""
    try:
        return read_taken(Answer(status, {}, bytearray(body)), NOW)
    except (Refused, Unavailable, InDoubt) as error:
        return error.cause


@given(st.binary(max_size=200), st.integers(100, 599))
def test_no_answer_raises_anything_else(body: bytes, status: int) -> None:
    """Whatever comes back ends as an id or as one of the three errors, with a short cause."""
    assert 0 < len(meaning_of(status, body)) < 60


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["/to", "10017"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["errors", "data", "id", "code", "source", "pointer", "parameter", "title", "detail"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values, st.sampled_from([202, 400, 401, 403, 404, 422, 429, 500]))
def test_no_json_raises_anything_else(content: Any, status: int) -> None:
    """Wrong types anywhere inside an answer's JSON end as an id or as one of the three errors."""
    body = json.dumps({"errors": [content, {"source": content}], "data": content}).encode()
    assert 0 < len(meaning_of(status, body)) < 60


@given(st.text(max_size=40))
def test_no_rate_limit_header_raises(value: str) -> None:
    """Any header text is a wait of at most an hour or none."""
    wait = retry_after({"Retry-After": value}, NOW)
    assert wait is None or 0 <= wait <= 3600


# --- words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("+13125550123", "+13125550123"),
        (" 13125550123", "+13125550123"),
        ("13125550123", "+13125550123"),
        ("+1 (312) 555-0123", "+13125550123"),
        ("+1.312.555.0123", "+13125550123"),
        ("sip:fax@example.com", "sip:fax@example.com"),
        ("anonymous", "anonymous"),
        ("++13125550123", "++13125550123"),
        ("+0312", "+0312"),
        ("+1312555****", "+1312555****"),
        ("+\u0661\u0663\u0661\u0662\u0665\u0665\u0665", "+\u0661\u0663\u0661\u0662\u0665\u0665\u0665"),
        (13125550123, ""),
        (None, ""),
    ],
)
def test_number_is_compared_as_e164(written: object, number: str) -> None:
    """A number whose + was lost on the way, or that was written for people, is recognised."""
    assert read_number(written) == number


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (3, 3), ("3", 3), (0, 0), (3.0, 3), (79.6, 79), (-1, None), ("-1", None), (True, None), (None, None),
        ("three", None), ("\u0663", None), (10**400, None), (float("inf"), None), (float("nan"), None),
        ("1" * 50, None), ([], None), (1_000_001, None),
    ],
)  # fmt: skip
def test_count_is_sane_or_none(value: object, count: int | None) -> None:
    """Pages and seconds come as numbers or numeric strings; anything else is left out."""
    assert read_count(value) == count


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        ("2026-01-05T22:23:46Z", NOW),
        ("2026-01-05T22:23:46.500000Z", NOW + 0.5),
        ("2026-01-05T22:23:46", NOW),
        ("2026-01-05T23:23:46+01:00", NOW),
        ("0001-01-01T00:00:00+23:59", -62135596800 - 86340),
        ("yesterday", None),
        ("", None),
        (NOW, None),
        (None, None),
    ],
)
def test_time_is_utc_unless_it_says_otherwise(value: object, moment: float | None) -> None:
    """Telnyx writes its times with and without fractions and zone."""
    assert read_moment(value) == moment


def test_text_is_printable_and_short() -> None:
    """Line breaks, control and direction characters of the carrier's reach no log and no mail."""
    assert read_text("a\r\nb\x00\x1b[31m\u202ec\u2028") == "ab[31mc"
    assert read_text("x" * 10_000, 80) == "x" * 80
    assert read_text(17) == ""


@pytest.mark.parametrize(
    ("status", "stage"),
    [
        ("queued", Stage.TAKEN),
        ("media.processed", Stage.CONVERTED),
        ("originated", Stage.DIALLED),
        ("sending", Stage.SENDING),
        ("sending.started", Stage.SENDING),
        ("delivered", Stage.DELIVERED),
        ("failed", Stage.FAILED),
        ("received", Stage.UNKNOWN),
        ("paused", Stage.UNKNOWN),
    ],
)
def test_status_words_have_a_stage(status: str, stage: Stage) -> None:
    """Every status word of an outbound fax is known, and an unknown one is never an end."""
    assert stage_of(status) is stage


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": 1, "a": 2}', b"NaN", b"-Infinity", b"[" * 100_000, b"1" * 5000, b'"\\ud800"', b"\xff", b"{",
        b"\xef\xbb\xbf{}",
    ],
)  # fmt: skip
def test_json_is_strict(raw: bytes) -> None:
    """JSON that two readers could understand differently, or that breaks a reader, is none."""
    with pytest.raises(ValueError):  # noqa: PT011 -- the type is the promise, the text is json's
        read_json(raw)


def test_json_keeps_whole_surrogate_pairs() -> None:
    """An escaped emoji is text like any other."""
    assert read_json(b'["\\ud83d\\ude00", 1]') == ["\U0001f600", 1]
