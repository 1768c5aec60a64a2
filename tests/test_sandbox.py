"""The sandbox's API and controls, over HTTP as its users meet them."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sandbox_user import APPLICATION, FOUR, FROM, PDF, Fields, Receiver, User, pdf, running

from gateway.sandbox import Sandbox, SandboxOptions, serve
from gateway.sandbox_behaviours import BEHAVIOURS, REASONS
from gateway.sandbox_script import NUMBERS, WEIGHTS, ScriptError, read_script


@pytest.fixture
async def user() -> AsyncIterator[User]:
    """Give a user of a sandbox with default settings, but calls that take no time."""
    async with running() as someone:
        yield someone


async def test_a_fax_is_accepted_and_told_of_by_four_signed_webhooks(user: User) -> None:
    """A plain fax gets a 202 with its object, and four genuine events whose fields are Telnyx's."""
    fax = await user.send("+13125550100", pdf(3), {"quality": "very_high", "t38_enabled": "false"})
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", fax["id"])
    assert (fax["record_type"], fax["direction"], fax["status"]) == ("fax", "outbound", "queued")
    assert (fax["to"], fax["from"], fax["quality"]) == ("+13125550100", FROM, "very_high")
    await user.sandbox.until(lambda: len(user.sandbox.events) == 4)
    assert user.receiver.types() == FOUR
    assert all(event["genuine"] and abs(event["age"]) < 60 for event in user.receiver.events)
    assert [event["enveloped"] for event in user.receiver.events] == [True, False, True, False]
    first, last = user.receiver.events[0], user.receiver.events[-1]
    assert first["record_type"] == "event"
    assert first["meta"] == {"attempt": 1, "delivered_to": user.sandbox.events[0].url}
    payload = {key: value for key, value in last["payload"].items() if key != "user_id"}
    expected = {"fax_id": fax["id"], "connection_id": APPLICATION, "direction": "outbound", "to": fax["to"]}
    ending = {"from": FROM, "status": "delivered", "page_count": 3, "call_duration_secs": 199}
    assert payload == expected | ending
    shown = await user.show(fax["id"])
    assert (shown["status"], shown["page_count"], shown["failure_reason"]) == ("delivered", 3, None)
    (entry,) = user.sandbox.ledger
    assert (entry.order, entry.copy, entry.pages, entry.answered) == (1, 1, 3, "202")
    assert entry.fields["t38_enabled"] == "false"


@pytest.mark.parametrize(
    ("changes", "pointer", "code"),
    [
        ({"connection_id": None}, "/connection_id", "10004"),
        ({"connection_id": "7"}, "/connection_id", "10017"),
        ({"to": None}, "/to", "10004"),
        ({"to": ""}, "/to", "10004"),
        ({"to": "3125550100"}, "/to", "10016"),
        ({"from": None}, "/from", "10004"),
        ({"from": "fax"}, "/from", "10016"),
        ({"from": "+13125790016"}, "/from", "10017"),
        ({"quality": "best"}, "/quality", "10032"),
        ({"monochrome": "True"}, "/monochrome", "10032"),
        ({"t38_enabled": ""}, "/t38_enabled", "10032"),
        ({"store_media": "0"}, "/store_media", "10032"),
        ({"store_preview": "FALSE"}, "/store_preview", "10032"),
        ({"client_state": "aGV5"}, "/client_state", "10027"),
    ],
)
async def test_a_wrong_field_is_named(changes: Fields, pointer: str, code: str) -> None:
    """A form with one fault gets a 422 that points at the field, and nothing is taken."""
    async with running(from_numbers=(FROM,)) as user:
        response = await user.post("+13125550100", PDF, changes)
        (fault,) = (await response.json())["errors"]
        assert (response.status, fault["source"], fault["code"]) == (422, {"pointer": pointer}, code)
        assert fault["title"]
        assert not user.sandbox.ledger


@pytest.mark.parametrize(
    "files",
    [[], [("a.pdf", b"")], [(None, b"%PDF-1.4")], [("a.pdf", PDF), ("b.pdf", PDF)]],
    ids=["none", "empty", "without a name", "two"],
)
async def test_contents_must_be_one_file_with_a_name(
    user: User, files: list[tuple[str | None, bytes]]
) -> None:
    """Without a document, or with one that has no file name, the answer is a 422 on contents."""
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in {"connection_id": APPLICATION, "to": "+13125550100", "from": FROM}.items():
        form.add_field(name, value)
    for file_name, document in files:
        form.add_field("contents", document if file_name else document.decode(), filename=file_name)
    status, body = await user.ask("POST", "/faxes", data=form)
    assert (status, [fault["source"]["pointer"] for fault in body["errors"]]) == (422, ["/contents"])


async def test_what_is_not_the_api_is_refused_in_its_shape(user: User) -> None:
    """Wrong keys, types, sizes, forms, methods and addresses get the right status and an errors list."""
    other_key = {"Authorization": "Bearer other"}
    assert await code_of(user, "POST", "/faxes", data=b"", headers=other_key) == (401, "10009")
    assert await code_of(user, "GET", "/faxes", headers=other_key) == (401, "10009")
    assert await code_of(user, "POST", "/faxes", json={"to": "+13125550100"}) == (415, "10014")
    no_boundary = {"Content-Type": "multipart/form-data"}
    assert await code_of(user, "POST", "/faxes", data=b"x", headers=no_boundary) == (400, "10015")
    broken = {"Content-Type": "multipart/form-data; boundary=b"}
    assert await code_of(user, "POST", "/faxes", data=b"no boundary here", headers=broken) == (400, "10015")
    nameless = b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"
    assert await code_of(user, "POST", "/faxes", data=nameless, headers=broken) == (400, "10015")
    assert await code_of(user, "PUT", "/faxes", data=b"") == (405, "10030")
    assert await code_of(user, "GET", "/faxen") == (404, "10005")
    assert await code_of(user, "GET", "/faxes/0ccc7b54-4df3-4bca-a65a-3da1ecc777f0") == (404, "10005")
    largest = PDF + bytes(20_000_000 - len(PDF))
    assert (await user.post("+13125550100", largest + b"0")).status == 413
    assert (await user.post("+13125550100", largest)).status == 202
    seen = [request.status for request in user.sandbox.requests]
    assert seen == [401, 401, 415, 400, 400, 400, 405, 404, 404, 413, 202]


async def code_of(user: User, method: str, path: str, **more: Any) -> tuple[int, str]:
    """Send a request that must fail; return status and the first error's code."""
    status, body = await user.ask(method, path, **more)
    return status, body["errors"][0]["code"]


async def test_documents_that_cannot_be_faxed_fail_after_acceptance(user: User) -> None:
    """A file that is no PDF, or has over 350 pages, is accepted and then fails before any call."""
    assert await user.ended("+13125550100", b"MZ no PDF") == ("failed", "file_format_invalid")
    assert await user.ended("+13125550100", pdf(351)) == ("failed", "page_count_limit_exceeded")
    assert user.receiver.types() == ["fax.queued", "fax.failed"] * 2
    assert await user.ended("+13125550100", b"%PDF-1.7 damaged") == ("delivered", None)
    assert [entry.pages for entry in user.sandbox.ledger] == [None, 351, None]


async def test_the_list_is_filtered_and_a_raw_plus_finds_nothing(user: User) -> None:
    """Number, sender, direction and time select rows, newest first; a plus that is not encoded is a space."""
    first = (await user.send("+13125550100"))["id"]
    middle = (await user.send("+14165550111"))["id"]
    last = (await user.send("+13125550100", PDF, {"from": "+13125790099"}))["id"]
    moment = (await user.show(middle))["created_at"]
    assert await user.listed() == [last, middle, first]
    assert await user.listed("filter[to][eq]=%2B13125550100") == [last, first]
    assert await user.listed("filter[to][eq]=+13125550100") == []
    assert await user.listed("filter[to][eq]=%2B13125550100&filter[from][eq]=%2B13125790015") == [first]
    assert await user.listed("filter[direction][eq]=outbound&page[size]=250") == [last, middle, first]
    assert await user.listed("filter[direction][eq]=inbound") == []
    assert await user.listed(f"filter[created_at][gte]={moment}") == [last, middle]
    assert await user.listed(f"filter[created_at][gt]={moment}") == [last]
    assert await user.listed(f"filter[created_at][lte]={moment}") == [middle, first]
    assert await user.listed(f"filter[created_at][lt]={moment.removesuffix('Z')}") == [first]
    for wrong in (
        "filter[status][eq]=failed",
        "filter[created_at][gte]=noon",
        "page[size]=251",
        "page[number]=0",
    ):
        status, body = await user.ask("GET", f"/faxes?{wrong}")
        assert (status, body["errors"][0]["source"]) == (422, {"parameter": wrong.split("=")[0]})


async def test_the_list_comes_in_pages(user: User) -> None:
    """Twenty rows a page unless told otherwise; meta says how many there are."""
    for _ in range(21):
        await user.send("+13125550100")
    every = [entry.fax_id for entry in reversed(user.sandbox.ledger)]
    assert await user.listed() == every[:20]
    _, body = await user.ask("GET", "/faxes?page[number]=3&page[size]=8")
    assert [row["id"] for row in body["data"]] == every[16:]
    assert body["meta"] == {"page_number": 3, "page_size": 8, "total_pages": 3, "total_results": 21}
    assert await user.listed("page[number]=4&page[size]=8") == []


async def test_a_deleted_fax_is_gone(user: User) -> None:
    """Deleting answers 204 without a body; after that neither the list nor its own address knows the fax."""
    fax = await user.send("+13125550100")
    assert await user.ask("DELETE", f"/faxes/{fax['id']}") == (204, None)
    assert await user.listed() == []
    assert (await user.ask("DELETE", f"/faxes/{fax['id']}"))[0] == 404


async def test_the_application_and_its_voice_profile_can_be_checked(user: User) -> None:
    """A start-up check finds the application active, its webhook address, and an enabled voice profile."""
    _, body = await user.ask("GET", f"/fax_applications/{APPLICATION}")
    assert body["data"]["active"] is True
    assert body["data"]["webhook_event_url"].endswith("/hook")
    profile = body["data"]["outbound"]["outbound_voice_profile_id"]
    _, body = await user.ask("GET", f"/outbound_voice_profiles/{profile}")
    assert (body["data"]["enabled"], body["data"]["whitelisted_destinations"]) == (True, ["US", "CA"])
    assert (await user.ask("GET", "/fax_applications/1"))[0] == 404
    assert (await user.ask("GET", "/outbound_voice_profiles/1"))[0] == 404


async def test_webhooks_are_tried_three_times_and_only_a_2xx_counts(user: User) -> None:
    """A redirect and an error are followed by another try of the same event; after three tries it is lost."""
    user.receiver.statuses = [302, 503, 204, 500, 500, 500]
    await user.send("+13125550100")
    await user.sandbox.until(lambda: len(user.sandbox.events) == 8)
    sent = user.sandbox.events
    assert [event.attempt for event in sent] == [1, 2, 3, 1, 2, 3, 1, 1]
    assert [event.status for event in sent] == [302, 503, 204, 500, 500, 500, 200, 200]
    assert len({event.event_id for event in sent}) == 4
    assert user.receiver.events[2]["meta"]["attempt"] == 3


async def test_webhooks_nobody_hears_do_not_hold_up_the_call(user: User) -> None:
    """With no receiver the fax still ends and the log says why; without an address none is sent."""
    user.sandbox.set_webhook_url("http://127.0.0.1:1/hook")
    fax = await user.send("+13125550100")
    assert (await user.show(fax["id"]))["status"] == "delivered"
    await user.sandbox.until(lambda: len(user.sandbox.events) == 3)
    assert user.sandbox.events[0].status is None
    assert "ClientConnectorError" in user.sandbox.events[0].error
    user.sandbox.set_webhook_url(None)
    other = await user.send("+13125550100", pdf(2))
    assert (await user.show(other["id"]))["status"] == "delivered"
    assert other["id"] not in {event.fax_id for event in user.sandbox.events}


@pytest.mark.parametrize(("envelope", "forms"), [("data", [True] * 4), ("bare", [False] * 4)])
async def test_one_envelope_form_can_be_had(envelope: str, forms: list[bool]) -> None:
    """All events come in `data`, or all bare; the bare form has neither meta nor record_type."""
    async with running(envelope=envelope) as user:
        await user.ended("+13125550100")
        assert [event["enveloped"] for event in user.receiver.events] == forms
        assert ["record_type" in event for event in user.receiver.events] == forms


async def test_both_envelope_forms_come_in_turn(user: User) -> None:
    """The second fax begins with the bare form, so that ends come in both forms too."""
    for _ in range(2):
        await user.ended("+13125550100")
    assert [event["enveloped"] for event in user.receiver.events] == [True, False] * 2 + [False, True] * 2


async def test_a_script_decides_before_the_table(user: User, tmp_path: Path) -> None:
    """A script names behaviours in order of calls, from a file or while running; its faults are all named."""
    file = tmp_path / "script.toml"
    file.write_text('"+13125550100" = ["receiver_no_answer", "delivered"]\n"+14165550100" = "user_busy"\n')
    user.sandbox.set_script(read_script(file))
    assert [await user.ended("+13125550100") for _ in range(3)] == [
        ("failed", "receiver_no_answer"),
        ("delivered", None),
        ("delivered", None),
    ]
    assert await user.ended("+14165550100") == ("failed", "user_busy")
    assert await user.ask("PUT", "/sandbox/script", json={"+13125550100": ["user_busy"]}) == (204, None)
    assert await user.ended("+13125550100") == ("failed", "user_busy")
    assert await user.ended("+14165550100") == ("delivered", None)
    wrong = {"+13125550100": "user_buzy", "0123": "delivered", "+14165550100": [], "+14165550101": 7}
    status, body = await user.ask("PUT", "/sandbox/script", json=wrong)
    assert (status, len(body["errors"])) == (422, 4)
    assert "did you mean 'user_busy'?" in body["errors"][0]["detail"]
    assert await user.ended("+13125550100") == ("failed", "user_busy")
    file.write_text('"+13125550100" = \n')
    with pytest.raises(ScriptError, match=r"script\.toml"):
        read_script(file)


async def test_a_seed_repeats_its_outcomes() -> None:
    """The same seed draws the same behaviours in order of acceptance; numbers of the table draw none."""
    drawn = []
    for seed, first in ((7, "+13125550100"), (7, "+13125550101"), (8, "+13125550100")):
        async with running(seed=seed, webhook_url=None) as user:
            await user.post(first)
            for _ in range(60):
                try:
                    await user.post("+14165550100")
                except aiohttp.ClientError:
                    continue
            assert user.sandbox.ledger[0].behaviour == NUMBERS[first][0]
            drawn.append([entry.behaviour for entry in user.sandbox.ledger[1:]])
    assert drawn[0] == drawn[1] != drawn[2]
    assert 2 < len(set(drawn[0])) <= len(WEIGHTS)


async def test_the_account_can_be_broken_and_mended(user: User) -> None:
    """Each state answers with its status; an account without funds may still ask."""
    for state, post, ask in (
        ("401", 401, 401),
        ("402", 402, 200),
        ("429", 429, 429),
        ("503", 503, 503),
        ("ok", 202, 200),
    ):
        assert await user.ask("PUT", "/sandbox/account", json={"state": state}) == (204, None)
        assert (await user.post("+13125550100")).status == post
        async with user.http.get(f"{user.sandbox.url}/faxes") as response:
            assert response.status == ask
    assert len(user.sandbox.ledger) == 1
    status, body = await user.ask("PUT", "/sandbox/account", json={"state": "403"})
    assert (status, body["errors"][0]["detail"]) == (422, "state must be one of ok, 401, 402, 429, 503")


async def test_the_list_can_lag_or_stay_empty() -> None:
    """The list keeps faxes back for a time or for good; a fax's own address always knows it."""
    now = 1_800_000_000.0
    async with running(clock=lambda: now) as user:
        fax = await user.send("+13125550100")
        assert await user.ask("PUT", "/sandbox/list", json={"lag_seconds": 9.5}) == (204, None)
        assert await user.listed() == []
        assert (await user.show(fax["id"]))["id"] == fax["id"]
        now += 9.5
        assert await user.listed() == [fax["id"]]
        await user.ask("PUT", "/sandbox/list", json={"empty": True})
        assert await user.listed() == []
        await user.ask("PUT", "/sandbox/list", json={})
        assert await user.listed() == [fax["id"]]
        for wrong in ({"lag": 1}, {"empty": "yes"}, {"lag_seconds": "1"}, [1]):
            assert (await user.ask("PUT", "/sandbox/list", json=wrong))[0] == 422
        assert (await user.ask("PUT", "/sandbox/list", data=b"{"))[0] == 400


async def test_steps_are_announced_in_order(user: User) -> None:
    """A test's hook is awaited at each named step, before the sandbox goes on."""
    steps: list[str] = []

    async def on_step(name: str, told: dict[str, Any]) -> None:
        if name == "accepted":
            assert (told["to"], user.sandbox.ledger[-1].fax_id) == ("+13125550100", told["fax_id"])
            assert not user.receiver.events
        steps.append(name)

    user.sandbox.on_step = on_step
    await user.send("+13125550100")
    await user.sandbox.until(lambda: len(user.receiver.events) == 4)
    assert steps[:3] == ["request", "body_read", "accepted"]
    assert sorted(steps[3:]) == ["answered", *["webhook"] * 4]
    user.sandbox.set_account("401")
    await user.post("+13125550100")
    await user.sandbox.until(lambda: steps[8:] == ["request", "answered"])


async def test_the_logs_can_be_read_over_http(user: User) -> None:
    """Ledger, requests and webhooks are told as JSON, and need no key."""
    await user.ended("+13125550107")
    base = user.sandbox.url.removesuffix("/v2")
    async with aiohttp.ClientSession() as stranger:
        rows = {}
        for log in ("ledger", "requests", "webhooks"):
            async with stranger.get(f"{base}/sandbox/{log}") as response:
                rows[log] = (await response.json())["data"]
        async with stranger.get(f"{base}/sandbox/accounts") as response:
            assert response.status == 404
    (entry,) = rows["ledger"]
    assert (entry["to"], entry["from"]) == ("+13125550107", FROM)
    assert entry["behaviour"] == NUMBERS["+13125550107"][0]
    assert entry["sha256"] == hashlib.sha256(PDF).hexdigest()
    assert (rows["requests"][0]["method"], rows["requests"][0]["status"]) == ("POST", 202)
    assert [row["status"] for row in rows["webhooks"]] == [200] * 4


async def test_serving_says_where_and_what_happens() -> None:
    """The command's server tells its address, key and each fax, and ends when cancelled."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    task = asyncio.create_task(serve(SandboxOptions(call_time=0.0), lines.put_nowait))
    told = [await lines.get() for _ in range(4)]
    url = told[0].removeprefix("sandbox carrier at ")
    assert "sandbox-key" in told[1]
    sandbox = Sandbox(SandboxOptions(port=int(url.split(":")[2].removesuffix("/v2"))))
    with pytest.raises(OSError, match="address already in use"):
        await sandbox.start()
    await sandbox.close()
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer sandbox-key"}) as http:
        # The second sandbox never ran; its address is that of the first.
        await User(sandbox, http, Receiver()).send("+13125550100")
    assert "+13125550100: delivered" in await lines.get()
    assert await lines.get() == "POST /v2/faxes: 202"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_the_documentation_has_every_number() -> None:
    """The tables of numbers and weights in docs/sandbox.md are those of the program."""
    text = (Path(__file__).parent.parent / "docs" / "sandbox.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\+1[0-9]{10})` \| (.+?) \|(?: (.+) \|)?$", text, re.MULTILINE)
    assert {number: tuple(re.findall(r"`([^`]+)`", names)) for number, names, _ in rows} == dict(NUMBERS)
    assert [says or "none" for number, _, says in rows] == [
        "none" if names[0] in REASONS and len(names) == 1 else BEHAVIOURS[names[0]].says
        for names in (NUMBERS[number] for number, _, _ in rows)
    ]
    drawn = re.findall(r"^\| ([0-9]+) \| `([^`]+)` \|$", text, re.MULTILINE)
    assert {name: int(weight) for weight, name in drawn} == dict(WEIGHTS)
