"""What each number of the sandbox does, seen by an API client and its webhook receiver."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import aiohttp
import pytest
from sandbox_user import FOUR, User, number_of, pdf, running

from gateway.sandbox_behaviours import REASONS
from gateway.sandbox_script import NUMBERS


@pytest.fixture
async def user() -> AsyncIterator[User]:
    """Give a user of a sandbox with default settings, but calls that take no time."""
    async with running() as someone:
        yield someone


async def test_each_failure_reason_has_its_number(user: User) -> None:
    """The forty numbers from 0101 on fail with the forty reasons in alphabetical order."""
    assert (len(REASONS), list(REASONS)) == (40, sorted(set(REASONS)))
    for last, reason in enumerate(REASONS, start=101):
        assert await user.ended(f"+1312555{last:04}") == ("failed", reason)
        shown = await user.show(user.sandbox.ledger[-1].fax_id)
        assert (shown["status"], shown["failure_reason"]) == ("failed", reason)
        assert "page_count" not in shown
    assert await user.ended("+13125550100") == ("delivered", None)
    assert await user.ended("+14165550999") == ("delivered", None)


async def test_steps_are_counted_by_number_and_document(user: User) -> None:
    """Busy, busy, then delivered: counted by document, so that another document starts anew."""
    twice_busy = number_of("user_busy", "user_busy", "delivered")
    ends = [await user.ended(twice_busy) for _ in range(4)]
    assert ends == [("failed", "user_busy")] * 2 + [("delivered", None)] * 2
    assert await user.ended(twice_busy, pdf(2)) == ("failed", "user_busy")
    assert [entry.copy for entry in user.sandbox.ledger] == [1, 2, 3, 4, 1]
    assert await user.ended(number_of("no-reason")) == ("failed", None)
    assert await user.ended(number_of("invented-reason")) == ("failed", "sandbox_invented_reason")


@pytest.mark.parametrize(
    ("name", "status", "code", "pointer", "header"),
    [
        ("401", 401, "10009", None, None),
        ("402", 402, "20100", None, None),
        ("403", 403, "19999", None, None),
        ("404", 404, "10005", None, None),
        ("422-to", 422, "10002", "/to", None),
        ("422-from", 422, "10017", "/from", None),
        ("422-contents", 422, "10027", "/contents", None),
        ("429", 429, "10011", None, None),
        ("429-retry-after", 429, "10011", None, "Retry-After"),
        ("429-reset", 429, "10011", None, "x-ratelimit-reset"),
        ("500-before-acceptance", 500, "10007", None, None),
        ("503-html", 503, None, None, None),
        ("307", 307, None, None, "Location"),
    ],
)
async def test_a_refusing_number_takes_nothing(
    user: User, name: str, status: int, code: str | None, pointer: str | None, header: str | None
) -> None:
    """Each refusal has its status, code, pointer and headers; some let the next call pass."""
    names = next(row for row in NUMBERS.values() if row[0] == name)
    response = await user.post(number_of(*names))
    assert response.status == status
    told = [name for name in ("Retry-After", "x-ratelimit-reset", "Location") if name in response.headers]
    assert told == ([header] if header else [])
    if code is None:
        assert response.content_type == "text/html"
    else:
        (fault,) = (await response.json())["errors"]
        assert (fault["code"], fault.get("source", {}).get("pointer")) == (code, pointer)
    assert not user.sandbox.ledger
    again = await user.post(number_of(*names))
    assert again.status == (202 if names[1:] == ("delivered",) else status)


async def test_an_answer_may_be_lost_after_acceptance(user: User) -> None:
    """The connection is cut, yet the fax is taken, once for each POST; webhooks and the list tell of it."""
    number = number_of("answer-lost")
    for count in (1, 2):
        with pytest.raises(aiohttp.ClientError):
            await user.post(number)
        await user.sandbox.until(lambda: user.receiver.types() == FOUR * count)  # noqa: B023 - awaited here
        assert len((await user.ask("GET", "/faxes"))[1]["data"]) == count
    assert [(entry.copy, entry.answered) for entry in user.sandbox.ledger] == [(1, "cut"), (2, "cut")]
    assert [request.status for request in user.sandbox.requests] == [None, 200, None, 200]


async def test_only_the_list_knows_of_a_fax_and_perhaps_later() -> None:
    """Answer and webhooks are lost; one number shows in the list at once, the other after the lag."""
    now = 1_800_000_000.0
    async with running(clock=lambda: now, lag=5.0) as user:
        for name in ("answer-and-webhooks-lost", "answer-lost-and-hidden"):
            with pytest.raises(aiohttp.ClientError):
                await user.post(number_of(name))
        shown, hidden = (entry.fax_id for entry in user.sandbox.ledger)
        assert await user.listed() == [shown]
        now += 5.0
        assert await user.listed() == [hidden, shown]
        assert (await user.show(hidden))["status"] == "delivered"
        assert not user.receiver.events


async def test_a_connection_may_be_cut_before_acceptance(user: User) -> None:
    """The request was read and the connection cut: nothing is taken, and the next call gets through."""
    number = number_of("cut-before-acceptance", "delivered")
    with pytest.raises(aiohttp.ClientError):
        await user.post(number)
    assert not user.sandbox.ledger
    assert await user.ended(number) == ("delivered", None)


async def test_a_client_that_leaves_in_mid_body_sent_nothing(
    user: User, caplog: pytest.LogCaptureFixture
) -> None:
    """A POST whose body breaks off takes nothing, and is no fault worth a log line."""
    host = user.sandbox.url.removeprefix("http://").removesuffix("/v2")
    reader, writer = await asyncio.open_connection(*host.split(":"))
    head = f"POST /v2/faxes HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer sandbox-key\r\n"
    form = "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 5000\r\n\r\n--b\r\n"
    begun = asyncio.Event()

    async def on_step(name: str, _told: dict[str, Any]) -> None:
        begun.set() if name == "request" else None

    user.sandbox.on_step = on_step
    writer.write((head + form).encode())
    await begun.wait()
    writer.close()
    await writer.wait_closed()
    assert await reader.read() == b""
    assert await user.listed() == []
    assert not user.sandbox.ledger
    assert [request.status for request in user.sandbox.requests] == [None, 200]
    assert not [record for record in caplog.records if record.name.startswith("aiohttp")]


async def test_a_client_may_leave_in_mid_answer(user: User, caplog: pytest.LogCaptureFixture) -> None:
    """Who hangs up on a huge answer is no fault worth a log line; the fax is taken all the same."""
    answered = asyncio.Event()

    async def on_step(name: str, _told: dict[str, Any]) -> None:
        answered.set() if name == "answered" else None

    user.sandbox.on_step = on_step
    response = await user.start(number_of("202-huge"))
    response.close()
    await answered.wait()
    assert len(user.sandbox.ledger) == 1
    assert not [record for record in caplog.records if record.name.startswith("aiohttp")]


@pytest.mark.parametrize(
    ("names", "step", "taken"),
    [(("silence", "delivered"), "body_read", 0), (("silence-after-acceptance",), "accepted", 1)],
)
async def test_answers_that_never_come(user: User, names: tuple[str, ...], step: str, taken: int) -> None:
    """Silence holds the connection open: one number has taken the fax, the other has not."""
    come = asyncio.Event()

    async def on_step(name: str, _told: dict[str, Any]) -> None:
        come.set() if name == step else None

    user.sandbox.on_step = on_step
    post = asyncio.create_task(user.post(number_of(*names)))
    await come.wait()
    answered, _ = await asyncio.wait({post}, timeout=0.2)
    assert not answered
    assert len(user.sandbox.ledger) == taken
    post.cancel()
    await user.sandbox.until(lambda: user.receiver.types() == FOUR * taken)


@pytest.mark.parametrize("name", ["500-after-acceptance", "202-without-id", "202-html", "202-huge"])
async def test_answers_that_cannot_be_read(user: User, name: str) -> None:
    """The fax is taken and its webhooks come, but the answer does not give its id away in the usual way."""
    response = await user.post(number_of(name))
    text = await response.text()
    assert response.status == (500 if name.startswith("500") else 202)
    (entry,) = user.sandbox.ledger
    assert (entry.fax_id in text[-2000:], len(text) > 8_000_000) == (
        (True, True) if name == "202-huge" else (False, False)
    )
    assert (response.content_type == "text/html") == (name == "202-html")
    await user.sandbox.until(lambda: user.receiver.types() == FOUR)


async def test_a_slow_answer_comes_after_the_lag() -> None:
    """The call is over and told of before the slow answer comes."""
    async with running(lag=1.0) as user:
        await user.send(number_of("slow-answer"))
        assert user.receiver.types() == FOUR


async def test_webhooks_may_all_come_before_the_answer() -> None:
    """Even the last webhook is out before the 202, however slow calls are."""
    async with running(call_time=600.0) as user:
        fax = await user.send(number_of("webhooks-before-answer"))
        assert user.receiver.types() == FOUR
        assert fax["status"] == "delivered"


async def test_webhooks_may_come_twice_backwards_or_not_at_all(user: User) -> None:
    """Copies bear the same event id; backwards begins with the end; of lost ones only asking tells."""
    await user.send(number_of("webhooks-twice"))
    await user.sandbox.until(lambda: len(user.sandbox.events) == 8)
    assert sorted(user.receiver.types()) == sorted(FOUR * 2)
    assert len({event["id"] for event in user.receiver.events}) == 4
    user.receiver.events.clear()
    await user.send(number_of("webhooks-backwards"))
    await user.sandbox.until(lambda: len(user.sandbox.events) == 12)
    assert user.receiver.types() == FOUR[::-1]
    fax = await user.send(number_of("webhooks-lost"))
    assert (await user.show(fax["id"]))["status"] == "delivered"
    assert len(user.sandbox.events) == 12


async def test_forged_webhooks_come_before_the_true_ones(user: User) -> None:
    """A forged copy bears the true event's id and, at the end, the opposite outcome."""
    user.receiver.refuse_forgeries = True
    await user.send(number_of("webhooks-forged"))
    await user.sandbox.until(lambda: len(user.sandbox.events) == 8)
    assert [event["genuine"] for event in user.receiver.events] == [False, True] * 4
    forged, true = user.receiver.events[-2:]
    assert (forged["event_type"], true["event_type"]) == ("fax.failed", "fax.delivered")
    assert forged["id"] == true["id"]
    assert [(sent.signed, sent.status) for sent in user.sandbox.events[-2:]] == [
        ("forged", 401),
        ("truly", 200),
    ]
    user.receiver.events.clear()
    user.sandbox.set_script({"+14165550100": "webhooks-forged"})
    await user.send("+14165550100", b"no PDF")
    await user.sandbox.until(lambda: len(user.sandbox.events) == 12)
    assert user.receiver.types() == ["fax.queued", "fax.queued", "fax.delivered", "fax.failed"]


async def test_stale_webhooks_are_true_but_old(user: User) -> None:
    """Every event is signed for a time outside the tolerance, so that only asking finds out the end."""
    fax = await user.send(number_of("webhooks-stale"))
    await user.sandbox.until(lambda: len(user.sandbox.events) == 4)
    assert all(event["genuine"] and event["age"] > 300 for event in user.receiver.events)
    assert (await user.show(fax["id"]))["status"] == "delivered"


async def test_unknown_events_and_missing_page_counts(user: User) -> None:
    """An event nobody knows comes before the end; a delivered fax may lack its page count."""
    await user.ended(number_of("unknown-event"))
    assert user.receiver.types() == [*FOUR[:3], "fax.sandbox.unknown", FOUR[3]]
    await user.ended(number_of("no-page-count"))
    payload = user.receiver.events[-1]["payload"]
    assert ("page_count" in payload, payload["call_duration_secs"]) == (False, 79)
    assert "page_count" not in await user.show(payload["fax_id"])


@pytest.mark.parametrize(
    ("name", "ends"),
    [("failed-then-delivered", ["failed", "delivered"]), ("delivered-then-failed", ["delivered", "failed"])],
)
async def test_an_end_may_be_contradicted(user: User, name: str, ends: list[str]) -> None:
    """Both ends are told of in turn, and whoever asks is told the later one."""
    fax = await user.send(number_of(name))
    await user.sandbox.until(lambda: len(user.sandbox.events) == 5)
    assert [event["payload"]["status"] for event in user.receiver.events[3:]] == ends
    assert (await user.show(fax["id"]))["status"] == ends[1]


async def test_a_fax_that_never_ends_can_be_cancelled(user: User) -> None:
    """It stays sending; a cancel ends it as sender_canceled; an ended fax takes none."""
    fax = await user.send(number_of("never-ends"))
    await user.sandbox.until(lambda: user.receiver.types() == FOUR[:3])
    assert (await user.show(fax["id"]))["status"] == "sending"
    cancel = f"/faxes/{fax['id']}/actions/cancel"
    assert await user.ask("POST", cancel) == (202, {"data": {"result": "ok"}})
    await user.sandbox.until(lambda: len(user.receiver.events) == 4)
    payload = user.receiver.events[-1]["payload"]
    assert (payload["status"], payload["failure_reason"]) == ("failed", "sender_canceled")
    status, body = await user.ask("POST", cancel)
    assert (status, body["errors"][0]["code"]) == (422, "90080")
    assert (await user.ask("POST", "/faxes/unknown/actions/cancel"))[0] == 404


async def test_a_running_call_can_be_cancelled() -> None:
    """A cancel ends a call that has time left, without waiting for its next step."""
    async with running(call_time=600.0) as user:
        fax = await user.send("+13125550100")
        await user.ask("POST", f"/faxes/{fax['id']}/actions/cancel")
        await user.sandbox.until(lambda: user.receiver.types() == ["fax.queued", "fax.failed"])


async def test_a_call_is_spread_over_the_call_time() -> None:
    """The four events of a call come no earlier than at each third of the call time."""
    async with running(call_time=0.6) as user:
        await user.ended("+13125550100")
        moments = [datetime.fromisoformat(event["occurred_at"]) for event in user.receiver.events]
    since = [(moment - moments[0]).total_seconds() for moment in moments]
    assert all(after > due - 0.1 for after, due in zip(since, (0, 0.2, 0.4, 0.6), strict=True)), since
