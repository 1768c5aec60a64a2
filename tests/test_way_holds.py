"""The account, the limits, the carrier's refusals, with real processes: the queue stops, and goes on."""

import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
from harness import World, letter, numbers, until, words, world

from gateway.sandbox_control import RequestSeen

pytestmark = pytest.mark.asyncio(loop_scope="module")
FREE = numbers()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def w(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One world for most tests of this file: each of them leaves the queue free behind it."""
    async with world(tmp_path_factory.mktemp("holds")) as made:
        yield made
        await made.everyone_told()


async def _release(w: World) -> None:
    code, _, errors = await w.gateway.run("release", "--all")
    assert (code, errors) == (0, "")


async def _holds(w: World) -> list[dict[str, str]]:
    """Return what `/readyz` says: it stays 200, or balancers would cut off mail and webhooks."""
    url = f"http://127.0.0.1:{w.gateway.http_port}/readyz"
    async with aiohttp.ClientSession() as client, client.get(url) as answer:
        assert answer.status == 200
        holds: list[dict[str, str]] = (await answer.json())["holds"]
        return holds


def _posts(w: World) -> list[RequestSeen]:
    return [seen for seen in w.carrier.requests if (seen.method, seen.path) == ("POST", "/v2/faxes")]


@pytest.mark.parametrize(("state", "status"), [("401", "HTTP 401 10009"), ("402", "HTTP 402 20100")])
async def test_a_broken_account_stops_the_queue_and_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, state: str, status: str
) -> None:
    """Without a valid key or money mail is taken and nobody called; senders and postmaster are told once."""
    async with world(tmp_path_factory.mktemp("account")) as w:
        w.carrier.set_account(state)
        first = await w.mail(next(FREE), next(FREE), next(FREE))
        for place in (1, 2, 3):
            delayed = await w.reply(f"{first}-{place}", "delayed")
            assert (
                "for a cause on our side. There is nothing wrong with your document or the number."
                in words(delayed)
            )
        (alert,) = await until(w.mailbox.alerts, "the alert")
        assert alert["Subject"] == "Fax gateway alert: faxes do not go out"
        assert status in words(alert)
        assert await _holds(w) == [{"kind": "hold", "cause": status}]
        # Whatever comes now waits without a call, across a restart too, but for one probe.
        calls = len(_posts(w))
        await w.gateway.stop()
        await w.restart()
        second = await w.mail(next(FREE), message=letter(text="second"))
        await w.reply(f"{second}-1", "delayed")
        assert len(_posts(w)) == calls
        await _release(w)
        await until(lambda: w.gateway.said("call_refused", cause=status), "the probe")
        assert json.loads((await w.gateway.run("list", "--json"))[1])["holds"][0]["cause"] == status
        assert len(_posts(w)) == calls + 1
        # The account is mended: one fax gets through, and all others follow by themselves.
        w.carrier.set_account("ok")
        await _release(w)
        for fax_id in (f"{first}-1", f"{first}-2", f"{first}-3", f"{second}-1"):
            assert (await w.reply(fax_id))["X-Fax-Outcome"] == "delivered"
            assert len(w.mailbox.about(fax_id, "delayed")) == 1
        assert len(w.carrier.ledger) == 4
        assert len(w.mailbox.alerts()) == 1
        assert await _holds(w) == []
        await w.everyone_told()


@pytest.mark.parametrize("refusal", ["403", "404", "422-from"])
async def test_an_unclear_refusal_holds_one_fax_and_the_account_at_the_second_number(
    w: World, refusal: str
) -> None:
    """One refused number may be that number's own; the same refusal of a second one stops the queue."""
    one, another, two, waiting = (next(FREE) for _ in range(4))
    w.carrier.set_script({one: [refusal, "delivered"], two: [refusal, "delivered"]})
    first = await w.mail(one)
    await until(lambda: w.gateway.said("fax_held", fax=f"{first}-1", cause="refused"), "the one to be held")
    await w.reply(f"{first}-1", "delayed")
    assert await _holds(w) == []
    (reply,) = await w.replies(another)  # others go on
    assert reply["X-Fax-Outcome"] == "delivered"
    second = await w.mail(two)
    await until(lambda: w.gateway.said("fax_held", fax=f"{second}-1"), "the second one to be held")
    (hold,) = await _holds(w)
    assert hold["cause"].startswith(f"HTTP {refusal[:3]}")
    third = await w.mail(waiting)
    await w.reply(f"{third}-1", "delayed")
    assert [w.posts.count(number) for number in (one, two, waiting)] == [1, 1, 0]
    await _release(w)
    for fax_id in (f"{first}-1", f"{second}-1", f"{third}-1"):
        assert (await w.reply(fax_id))["X-Fax-Outcome"] == "delivered"
        assert len(w.mailbox.about(fax_id, "delayed")) == 1
    assert [len(w.taken(number)) for number in (one, two, waiting)] == [1, 1, 1]
    assert await _holds(w) == []


async def test_a_redirect_is_not_followed(w: World) -> None:
    """An API that points elsewhere gets no document there: the queue stops until somebody looked."""
    number = next(FREE)
    w.carrier.set_script({number: ["307", "delivered"]})
    mail_id = await w.mail(number)
    await w.reply(f"{mail_id}-1", "delayed")
    assert w.posts.count(number) == 1
    assert [hold["cause"] for hold in await _holds(w)] == ["HTTP 307 redirect"]
    await _release(w)
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
    assert len(w.taken(number)) == 1


@pytest.mark.parametrize("number", ["+13125550172", "+13125550173"], ids=["Retry-After", "x-ratelimit-reset"])
async def test_too_many_requests_wait_as_long_as_the_carrier_says(w: World, number: str) -> None:
    """A 429 is no call and no failure: after the time it names the fax goes out, and nobody is bothered."""
    (reply,) = await w.replies(number)
    assert (reply["X-Fax-Outcome"], reply["X-Fax-Attempts"]) == ("delivered", "1")
    assert [w.posts.count(number), len(w.taken(number))] == [2, 1]
    refused, taken = _posts(w)[-2:]
    assert (refused.status, taken.status) == (429, 202)
    assert taken.time - refused.time >= 0.9
    assert w.mailbox.about(reply["X-Fax-Id"], "delayed") == []


@pytest.mark.parametrize("limit", ["429", "user_channel_limit_exceeded"])
async def test_a_limit_pauses_the_whole_queue(w: World, limit: str) -> None:
    """When the carrier has no line free, nothing else is tried either until the pause is over."""
    number, other = next(FREE), next(FREE)
    w.carrier.set_script({number: [limit, "delivered"]})
    first = await w.mail(number)
    await until(lambda: w.gateway.said("fax_requeued", fax=f"{first}-1"), "the pause")
    (hold,) = await _holds(w)
    assert hold["kind"] == "pause"
    second = await w.mail(other)
    await _release(w)
    for fax_id in (f"{first}-1", f"{second}-1"):
        assert (await w.reply(fax_id))["X-Fax-Outcome"] == "delivered"
        assert w.mailbox.about(fax_id, "delayed") == []
    assert w.posts[-3:] == [number, number, other]
    assert await _holds(w) == []


@pytest.mark.parametrize(
    "reason",
    [
        "account_disabled",
        "no_outbound_profile",
        "unverified_origination_number",
        "outbound_profile_daily_spend_limit_exceeded",
    ],
)
async def test_a_reason_that_concerns_the_account_stops_the_queue_until_a_call_succeeds(
    w: World, reason: str
) -> None:
    """A call that fails for our account's sake is not the sender's loss: it goes out once the account can."""
    number, other = next(FREE), next(FREE)
    w.carrier.set_script({number: [reason, "delivered"]})
    first = await w.mail(number)
    await w.reply(f"{first}-1", "delayed")
    assert [hold["cause"] for hold in await _holds(w)] == [reason]
    second = await w.mail(other)
    await w.reply(f"{second}-1", "delayed")
    assert w.posts.count(other) == 0
    await _release(w)
    for fax_id in (f"{first}-1", f"{second}-1"):
        assert (await w.reply(fax_id))["X-Fax-Outcome"] == "delivered"
        assert len(w.mailbox.about(fax_id, "delayed")) == 1
    assert [len(w.taken(number)), len(w.taken(other))] == [2, 1]
    assert await _holds(w) == []


async def test_a_failure_that_calls_itself_a_success_is_left_to_a_person(w: World) -> None:
    """Nobody knows whether it arrived: no second call unless an operator says so."""
    number = next(FREE)
    w.carrier.set_script({number: ["success", "delivered"]})
    fax_id = f"{await w.mail(number)}-1"
    delayed = await w.reply(fax_id, "delayed")
    assert "The fax service reported a result that makes no sense." in words(delayed)
    for command in (("release", fax_id), ("retry", fax_id)):
        code, _, errors = await w.gateway.run(*command)
        assert code == 65
        assert "may have been sent already" in errors
    assert w.posts.count(number) == 1
    assert (await w.gateway.run("retry", fax_id, "--even-if-twice"))[0] == 0
    assert (await w.reply(fax_id))["X-Fax-Outcome"] == "delivered"
    assert len(w.taken(number)) == 2
