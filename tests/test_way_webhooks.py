"""Webhooks as they come in life, with real processes: early, doubled, in any order, forged, wrong, never."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from harness import World, numbers, until, words, world

from gateway.sandbox_webhooks import signature_headers

pytestmark = pytest.mark.asyncio(loop_scope="module")
FREE = numbers()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def w(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One world for most tests of this file; at its end every fax has exactly one final reply."""
    async with world(tmp_path_factory.mktemp("webhooks")) as made:
        yield made
        await made.everyone_told()


def _types(w: World, number: str) -> list[tuple[str, int | None]]:
    """Return the webhooks about the one call to a number: type and answer, in the order they were sent."""
    (call,) = w.taken(number)
    return [(sent.event_type, sent.status) for sent in w.carrier.events if sent.fax_id == call.fax_id]


def _asked(w: World, number: str) -> int:
    """Count how often the carrier was asked about the one call to a number."""
    (call,) = w.taken(number)
    return sum(request.path.endswith(call.fax_id) for request in w.carrier.requests)


async def _tell(w: World, fax_id: str, number: str, kind: str, **fields: Any) -> int:
    """Send a webhook that the carrier truly signed; return how the gateway answered."""
    payload = {
        "fax_id": fax_id,
        "connection_id": w.carrier.options.connection_id,
        "direction": "outbound",
        "from": "+13125790015",
        "to": number,
        "status": kind.removeprefix("fax."),
    }
    event = {
        "event_type": kind,
        "id": f"{fax_id}-{kind}",
        "occurred_at": "2026-11-20T12:00:00.000000Z",
        "payload": payload | fields,
    }
    body = json.dumps(event).encode()
    headers = signature_headers(w.carrier.options.signing_key, int(time.time()), body)
    async with (
        aiohttp.ClientSession() as client,
        client.post(w.gateway.webhook_url, data=body, headers=headers) as answer,
    ):
        return answer.status


async def test_webhooks_that_come_before_the_answer_count(w: World) -> None:
    """The whole story told before the carrier's own answer is one call, and delivered."""
    (reply,) = await w.replies("+13125550155")
    assert reply["X-Fax-Outcome"] == "delivered"
    assert len(w.taken("+13125550155")) == 1
    assert {status for _, status in _types(w, "+13125550155")} == {200}
    assert _asked(w, "+13125550155") == 0


async def test_webhooks_that_come_twice_count_once(w: World) -> None:
    """Each event twice at the same moment is answered 200 twice and told once."""
    (reply,) = await w.replies("+13125550156")
    assert reply["X-Fax-Outcome"] == "delivered"
    await until(lambda: len(_types(w, "+13125550156")) == 8, "every event, twice")
    assert {status for _, status in _types(w, "+13125550156")} == {200}
    assert len(w.taken("+13125550156")) == 1


async def test_webhooks_that_come_backwards_end_the_fax_all_the_same(w: World) -> None:
    """The end told before the beginning is the end."""
    (reply,) = await w.replies("+13125550157")
    assert reply["X-Fax-Outcome"] == "delivered"
    await until(lambda: len(_types(w, "+13125550157")) == 4, "every event")
    assert _types(w, "+13125550157")[0] == ("fax.delivered", 200)
    assert (await w.gateway.show(reply["X-Fax-Id"]))["fax"]["state"] == "delivered"
    assert len(w.taken("+13125550157")) == 1


async def test_a_forged_webhook_changes_nothing(w: World) -> None:
    """A stranger's webhook with the opposite end is refused 401; the sender reads the true one."""
    (reply,) = await w.replies("+13125550184")
    assert reply["X-Fax-Outcome"] == "delivered"
    (call,) = w.taken("+13125550184")
    answers = {(sent.signed, sent.status) for sent in w.carrier.events if sent.fax_id == call.fax_id}
    assert answers == {("forged", 401), ("truly", 200)}


async def test_an_unknown_event_is_a_hint_to_ask(w: World) -> None:
    """An event of a type nobody knows is answered 200, makes the gateway ask, and harms nothing."""
    (reply,) = await w.replies("+13125550186")
    assert reply["X-Fax-Outcome"] == "delivered"
    assert ("fax.sandbox.unknown", 200) in _types(w, "+13125550186")
    assert len(w.taken("+13125550186")) == 1


async def test_a_delivery_without_a_page_count_is_told_as_it_is(w: World) -> None:
    """Without a page count the reply claims none."""
    (reply,) = await w.replies("+13125550187")
    assert reply["X-Fax-Outcome"] == "delivered"
    assert reply["X-Fax-Pages-Confirmed"] is None
    assert "The receiving machine confirmed the transmission." in words(reply)


async def test_delivered_then_failed_is_told_to_the_postmaster(w: World) -> None:
    """What was told as delivered stays so; the postmaster hears of the contradiction; nobody is called."""
    (reply,) = await w.replies("+13125550164")
    assert reply["X-Fax-Outcome"] == "delivered"
    await until(
        lambda: [line for line in w.gateway.said("alert_raised") if reply["X-Fax-Id"] in line["text"]],
        "the alert",
    )
    await until(lambda: _alerts(w), "its mail")
    assert _types(w, "+13125550164")[-1] == ("fax.failed", 200)
    assert len(w.taken("+13125550164")) == 1


def _alerts(w: World) -> list[str]:
    return [words(mail) for mail in w.mailbox.alerts() if mail["X-Fax-Alert"] == "contradiction"]


async def test_webhooks_of_others_change_nothing(w: World) -> None:
    """Events of another application or about faxes that come in are answered 200 and go no further."""
    (reply,) = await w.replies(number := next(FREE))
    (call,) = w.taken(number)
    assert await _tell(w, call.fax_id, number, "fax.failed", connection_id="999") == 200
    assert await _tell(w, "inbound", number, "fax.received", direction="inbound") == 200
    await until(lambda: len(w.gateway.said("webhook_ignored")) == 2, "both to be passed over")
    assert (await w.gateway.show(reply["X-Fax-Id"]))["fax"]["state"] == "delivered"


async def test_what_is_no_event_is_refused(w: World) -> None:
    """Unsigned, unreadable and huge requests are refused, each by its own status."""
    url = w.gateway.webhook_url
    key, now = w.carrier.options.signing_key, int(time.time())
    async with aiohttp.ClientSession() as client:
        async with client.post(url, data=b"{}") as answer:
            assert answer.status == 401
        junk = b"[1, 2"
        async with client.post(url, data=junk, headers=signature_headers(key, now, junk)) as answer:
            assert answer.status == 400
        async with client.post(url, data=b"x" * 300_000) as answer:
            assert answer.status == 413
        async with client.get(url) as answer:
            assert answer.status == 405


async def test_failed_then_delivered_while_the_retry_waits_ends_as_delivered(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A delivery told after a failure makes the waiting retry needless: one call, told as delivered."""
    folder = tmp_path_factory.mktemp("late")
    async with world(folder, retries={"busy": ["5m"]}) as w:
        (reply,) = await w.replies("+13125550163")
        assert (reply["X-Fax-Outcome"], reply["X-Fax-Attempts"]) == ("delivered", "1")
        assert len(w.posts) == 1
        await w.everyone_told()


async def test_a_retry_asks_first_and_learns_of_the_delivery(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Before a new call the carrier is asked about the last one: what it delivered is not sent twice."""
    async with world(tmp_path_factory.mktemp("look"), retries={"busy": ["1s"]}) as w:
        held: list[dict[str, Any]] = []

        async def lose_the_delivery(step: str, told: dict[str, Any]) -> None:
            if step == "webhook" and told["event"]["event_type"] == "fax.delivered":
                held.append(told)
                await asyncio.Event().wait()  # this webhook never comes

        w.on_step = lose_the_delivery
        (reply,) = await w.replies("+13125550163")
        assert held
        assert (reply["X-Fax-Outcome"], reply["X-Fax-Attempts"]) == ("delivered", "1")
        assert len(w.posts) == 1
        await until(lambda: w.gateway.said("call_withheld", found="Reported"), "the log to say so")
        await w.everyone_told()


async def test_a_delivery_told_after_the_retry_began_ends_in_one_reply_and_an_alert(w: World) -> None:
    """Too late to stop the second call: the fax ends as delivered, once, and the postmaster is warned."""
    number = next(FREE)
    w.carrier.set_script({number: ["user_busy", "never-ends"]})
    mail_id = await w.mail(number)
    await until(lambda: len(w.taken(number)) == 2, "the second call")
    first, second = w.taken(number)
    await until(lambda: w.gateway.said("call_taken", carrier_id=second.fax_id), "its answer")
    assert await _tell(w, first.fax_id, number, "fax.delivered", page_count=1) == 200
    code, output, errors = await w.gateway.run("cancel", mail_id)
    assert (code, errors) == (0, "")
    assert "the outcome decides" in output
    reply = await w.reply(f"{mail_id}-1")
    assert (reply["X-Fax-Outcome"], reply["X-Fax-Attempts"]) == ("delivered", "2")
    assert len(w.taken(number)) == 2
    assert [line for line in w.gateway.said("alert_raised") if f"{mail_id}-1" in line["text"]]
    (alert,) = await until(lambda: _alerts(w), "the alert")  # one a day, however many contradictions
    assert "The sender was told what was known first" in alert


async def test_lost_and_stale_webhooks_are_made_up_for_by_asking(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Webhooks that never come, or come signed for long ago (401), delay the outcome and lose nothing."""
    async with world(tmp_path_factory.mktemp("lost")) as w:
        mail_id = await w.mail("+13125550158", "+13125550185")
        await until(lambda: len(w.gateway.said("call_taken")) == 2, "both calls")
        await until(lambda: any(sent.status == 401 for sent in w.carrier.events), "a stale webhook")
        assert w.mailbox.finals() == []
        await w.gateway.stop()
        await w.restart()  # a start asks about every open call at once
        for place in (1, 2):
            assert (await w.reply(f"{mail_id}-{place}"))["X-Fax-Outcome"] == "delivered"
        assert {sent.signed for sent in w.carrier.events} == {"stale"}
        assert {sent.status for sent in w.carrier.events} <= {401, None}
        assert len(w.posts) == len(w.carrier.ledger) == 2
        await w.everyone_told()


async def test_without_a_public_key_the_outcome_is_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Before there is a public address: no webhook door, and the outcome comes by asking."""
    folder = tmp_path_factory.mktemp("asking")
    async with world(folder, telnyx={"public_key": "", "poll_after": "300ms"}) as w:
        w.carrier.set_script({(busy := next(FREE)): ["user_busy", "delivered"]})
        delivered, retried, failed = await w.replies("+13125550158", busy, "+13125550130")
        assert [reply["X-Fax-Outcome"] for reply in (delivered, retried, failed)] == [
            "delivered",
            "delivered",
            "failed",
        ]
        assert failed["X-Fax-Reason"] == "receiver_unallocated_number"
        assert [len(w.taken(number)) for number in ("+13125550158", busy, "+13125550130")] == [1, 2, 1]
        await until(lambda: w.carrier.events, "a webhook to knock in vain")
        assert {sent.status for sent in w.carrier.events} == {404}
        await w.everyone_told()
