"""A POST whose answer is lost, with real processes: nothing is sent twice, and nothing is lost."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from harness import World, numbers, until, words, world
from papers import paper

from gateway.sandbox import Sandbox

pytestmark = pytest.mark.asyncio(loop_scope="module")
FREE = numbers()

# The last check comes well after a first one that proves nothing.
PATIENT = {"channels": 20, "doubt_checks": ["400ms", "1s", "2s", "4s"]}
HASTY = {"doubt_checks": ["200ms", "400ms"]}

TAKEN = {
    "+13125550159": "answer-lost",
    "+13125550160": "answer-and-webhooks-lost",
    "+13125550177": "202-without-id",
    "+13125550178": "202-html",
    "+13125550179": "202-huge",
}
TAKEN_500 = "+13125550176"  # 500-after-acceptance
NOT_TAKEN = {
    "+13125550162": "cut-before-acceptance",
    "+13125550175": "500-before-acceptance",
    "+13125550188": "503-html",
}


@dataclass
class Doubts:
    """A world in which one mail went to every number whose answer is lost, and when each was posted."""

    w: World
    mail_id: str = ""
    numbers: tuple[str, ...] = (*TAKEN, TAKEN_500, *NOT_TAKEN)
    posted: list[tuple[str, float]] = field(default_factory=list)

    def fax(self, number: str) -> str:
        """Return the id of the fax to a number."""
        return f"{self.mail_id}-{self.numbers.index(number) + 1}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doubts(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doubts]:
    """All doubts at once; at the end every fax has exactly one final reply."""
    async with world(tmp_path_factory.mktemp("doubts"), telnyx=PATIENT) as w:
        made = Doubts(w)

        async def note(step: str, told: dict[str, Any]) -> None:
            if step == "body_read":
                made.posted.append((told["to"], asyncio.get_running_loop().time()))

        w.on_step = note
        await w.replies(next(FREE))  # a fax that the carrier knows and must list
        made.mail_id = await w.mail(*made.numbers)
        yield made
        await w.everyone_told()


@pytest.mark.parametrize("number", TAKEN, ids=TAKEN.values())
async def test_what_the_carrier_took_is_never_posted_again(doubts: Doubts, number: str) -> None:
    """Answer lost or unreadable after acceptance: the call is found, told as delivered, not made twice."""
    await found_and_not_made_twice(doubts, number)


async def test_a_500_after_the_carrier_took_the_fax_is_a_doubt_and_no_refusal(doubts: Doubts) -> None:
    """Carrier 5xx after taking the fax: the call is found, told as delivered, not made twice."""
    await found_and_not_made_twice(doubts, TAKEN_500)


async def test_a_list_that_lags_behind_the_acceptance_proves_no_absence(doubts: Doubts) -> None:
    """List lagging after acceptance: the first look proves nothing, a later one finds the call; one POST."""
    w, number = doubts.w, next(FREE)
    w.carrier.set_script({number: "answer-lost-and-hidden"})
    mail_id = await w.mail(number)
    (taken,) = await until(lambda: w.taken(number), "the call")
    call = w.carrier._exchange.faxes[taken.fax_id]
    call.hidden_until = math.inf  # older faxes are listed all the time
    looks = partial(w.gateway.said, "doubt_checked", fax=f"{mail_id}-1")
    await until(looks, "a look in vain")
    call.hidden_until = 0.0
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
    assert w.posts.count(number) == len(w.taken(number)) == 1
    *before, last = (look["verdict"] for look in looks())
    assert (set(before), last) == ({"Undecided"}, "Bind")


async def found_and_not_made_twice(doubts: Doubts, number: str) -> None:
    """See that a call whose answer was lost was doubted, found, and told as delivered: one POST, one call."""
    reply = await doubts.w.reply(doubts.fax(number))
    assert (reply["X-Fax-Outcome"], reply["X-Fax-Attempts"]) == ("delivered", "1")
    assert doubts.w.gateway.said("call_in_doubt", fax=doubts.fax(number))
    assert doubts.w.posts.count(number) == len(doubts.w.taken(number)) == 1


@pytest.mark.parametrize("number", NOT_TAKEN, ids=NOT_TAKEN.values())
async def test_what_the_carrier_did_not_take_is_posted_once_more(doubts: Doubts, number: str) -> None:
    """Nothing is posted again before the last check proved the first one absent; then once."""
    reply = await doubts.w.reply(doubts.fax(number))
    assert (reply["X-Fax-Outcome"], reply["X-Fax-Attempts"]) == ("delivered", "1")
    first, second = (at for to, at in doubts.posted if to == number)
    assert second - first >= 3.9
    assert len(doubts.w.taken(number)) == 1
    (proved,) = doubts.w.gateway.said("doubt_checked", fax=doubts.fax(number), verdict="ProvedAbsent")
    assert proved["attempt"] == 1


async def test_an_answer_that_is_only_slow_is_waited_for(doubts: Doubts) -> None:
    """A slow answer is no lost one: no doubt, one call."""
    (reply,) = await doubts.w.replies("+13125550181")
    assert reply["X-Fax-Outcome"] == "delivered"
    assert doubts.w.posts.count("+13125550181") == 1
    assert not doubts.w.gateway.said("call_in_doubt", fax=reply["X-Fax-Id"])


async def test_two_faxes_that_may_be_ours_are_left_to_a_person(doubts: Doubts) -> None:
    """If another program faxed the same number meanwhile, nobody guesses: held, alerted, told, cancelled."""
    w, number = doubts.w, next(FREE)
    w.carrier.set_script({number: "answer-and-webhooks-lost"})
    await _post_as_another_program(w, number)
    mail_id = await w.mail(number)
    delayed = await w.reply(f"{mail_id}-1", "delayed")
    assert "We could not find out whether the fax service accepted it." in words(delayed)
    alert = await until(
        lambda: [m for m in w.mailbox.alerts() if m["X-Fax-Alert"] == "fax_held"], "the alert"
    )
    assert f"Fax {mail_id}-1 is held" in words(alert[0])
    assert "2 faxes at the carrier fit it" in words(alert[0])
    assert [len(w.taken(number)), w.posts.count(number)] == [2, 2]  # the stranger's and ours
    assert (await w.gateway.run("retry", f"{mail_id}-1"))[0] == 65  # not without saying --even-if-twice
    assert (await w.gateway.run("cancel", f"{mail_id}-1"))[0] == 0
    reply = await w.reply(f"{mail_id}-1")
    assert reply["X-Fax-Outcome"] == "cancelled"
    assert "may have arrived" in words(reply)
    assert w.posts.count(number) == 2


async def _post_as_another_program(w: World, number: str) -> None:
    form = aiohttp.FormData()
    for name, value in (
        ("connection_id", w.carrier.options.connection_id),
        ("from", "+13125790015"),
        ("to", number),
    ):
        form.add_field(name, value)
    form.add_field("contents", paper(text="other"), filename="other.pdf", content_type="application/pdf")
    headers = {"Authorization": f"Bearer {w.carrier.options.api_key}"}
    async with aiohttp.ClientSession(headers=headers) as client:
        with contextlib.suppress(aiohttp.ClientError):  # its answer is lost as well
            await client.post(f"{w.carrier.url}/faxes", data=form)
    assert len(w.taken(number)) == 1


async def test_a_power_cut_during_the_post_loses_nothing_and_doubles_nothing(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Killed while the carrier stays silent: what it took is found after the start, what not is sent."""
    silent, taken = "+13125550182", "+13125550183"
    async with world(tmp_path_factory.mktemp("silence"), telnyx={"doubt_checks": ["500ms", "1s", "3s"]}) as w:
        await w.replies(next(FREE))
        mail_id = await w.mail(silent, taken)
        await until(lambda: {silent, taken} <= set(w.posts) and w.taken(taken), "both posts")
        await w.gateway.kill()
        await w.restart()
        for place in (1, 2):
            assert (await w.reply(f"{mail_id}-{place}"))["X-Fax-Outcome"] == "delivered"
        assert [w.posts.count(number) for number in (silent, taken)] == [2, 1]
        assert [len(w.taken(number)) for number in (silent, taken)] == [1, 1]
        await w.everyone_told()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hasty(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Open a world whose last doubt check comes soon."""
    async with world(tmp_path_factory.mktemp("hasty"), telnyx=HASTY) as w:
        yield w
        await w.everyone_told()


@pytest.mark.parametrize("rules", [{"empty": True}, {"lag_seconds": 600.0}], ids=["empty", "lagging"])
async def test_a_list_that_does_not_show_what_it_must_proves_nothing(
    hasty: World, rules: dict[str, Any]
) -> None:
    """List empty or minutes behind after acceptance: nothing is posted again; later the call is found."""
    w, number = hasty, next(FREE)
    await w.replies(next(FREE))
    w.carrier.set_list(**rules)
    w.carrier.set_script({number: "answer-and-webhooks-lost"})
    mail_id = await w.mail(number)
    checked = {"fax": f"{mail_id}-1", "verdict": "Undecided"}
    await until(lambda: len(w.gateway.said("doubt_checked", **checked)) >= 5, "checks beyond the last one")
    assert w.posts.count(number) == 1
    w.carrier.set_list()
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
    assert w.posts.count(number) == len(w.taken(number)) == 1


async def test_a_carrier_that_is_down_is_asked_until_it_answers(hasty: World) -> None:
    """While the carrier answers 503 to everything nothing is posted again; then the fax goes out."""
    w, number = hasty, next(FREE)
    w.carrier.set_account("503")
    mail_id = await w.mail(number)
    checked = {"fax": f"{mail_id}-1", "verdict": "Undecided"}
    await until(lambda: len(w.gateway.said("doubt_checked", **checked)) >= 4, "questions in vain")
    requests = [
        request for request in w.carrier.requests if request.method == "POST" and request.status == 503
    ]
    assert len(requests) == 1
    w.carrier.set_account("ok")
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
    assert w.posts.count(number) == len(w.taken(number)) == 1


async def test_a_clock_two_hours_ahead_of_the_carriers_sends_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even the first fax of a new gateway, whose answer is lost, is found by the carrier's own time."""
    monkeypatch.setattr("harness.Sandbox", partial(Sandbox, clock=lambda: time.time() - 7200.0))
    async with world(tmp_path_factory.mktemp("ahead"), telnyx=HASTY) as w:
        number = next(FREE)
        w.carrier.set_script({number: "answer-lost"})
        (reply,) = await w.replies(number)
        assert reply["X-Fax-Outcome"] == "delivered"
        assert w.posts.count(number) == len(w.taken(number)) == 1
        await w.everyone_told()


async def test_news_about_a_closed_doubt_stop_the_retry(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An event that comes after the proof of absence, but before the new call, makes that call needless."""
    async with world(tmp_path_factory.mktemp("news"), telnyx=HASTY) as w:
        number, cut, late = next(FREE), asyncio.Event(), asyncio.Event()
        _lose_the_first_call(w, number, cut, late)
        mail_id = await w.mail(number)
        await until(lambda: w.taken(number), "the post")
        assert (await w.gateway.run("hold", "--all"))[0] == 0
        cut.set()
        await until(lambda: w.gateway.said("doubt_checked", verdict="ProvedAbsent"), "the wrong proof")
        late.set()
        assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
        assert (await w.gateway.run("release", "--all"))[0] == 0
        await w.replies(next(FREE))
        assert w.posts.count(number) == len(w.taken(number)) == 1
        await w.everyone_told()


async def test_the_one_way_to_two_copies_is_told_to_the_postmaster(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A carrier that hides a call from its list, and tells of it after the last check, is told on."""
    async with world(tmp_path_factory.mktemp("twice"), telnyx=HASTY) as w:
        number, cut, late = next(FREE), asyncio.Event(), asyncio.Event()
        _lose_the_first_call(w, number, cut, late)
        cut.set()
        mail_id = await w.mail(number)
        assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
        assert len(w.taken(number)) == 2
        late.set()
        (alert,) = await until(w.mailbox.alerts, "the alert")
        assert alert["X-Fax-Alert"] == "contradiction"
        assert "The recipient may hold it twice" in words(alert)
        await w.everyone_told()


def _lose_the_first_call(w: World, number: str, cut: asyncio.Event, late: asyncio.Event) -> None:
    """Let the first call to a number be taken, cut without an answer at `cut`, not heard of before `late`."""
    w.carrier.set_list(empty=True)
    w.carrier.set_script({number: ["answer-lost", "delivered"]})

    async def hold_back(step: str, told: dict[str, Any]) -> None:
        if step == "accepted":
            await cut.wait()
        if step == "webhook" and told["fax_id"] == w.taken(number)[0].fax_id:
            await late.wait()

    w.on_step = hold_back
