"""The operators' commands, as processes beside a running daemon."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from harness import World, letter, numbers, until, words, world
from papers import heavy, paper

from gateway import __version__

pytestmark = pytest.mark.asyncio(loop_scope="module")
FREE = numbers()
COMMANDS = (
    "serve", "check", "health", "demo", "sandbox", "send", "explain",
    "list", "show", "hold", "release", "cancel", "retry",
)  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def w(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One world whose retries wait for an operator; each test leaves the queue free behind it."""
    async with world(tmp_path_factory.mktemp("cli"), retries={"no_answer": ["5m"]}) as made:
        yield made
        await made.everyone_told()


async def _run(*command: str) -> tuple[int, str, str]:
    """Run a command without a configuration; return exit code, output and errors."""
    environ = {name: os.environ[name] for name in os.environ if not name.startswith("FAX_GATEWAY_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", *command,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environ | {"COLUMNS": "200"},
    )  # fmt: skip
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


# --- without a daemon --------------------------------------------------------------------------------


async def test_each_command_explains_itself_with_an_example() -> None:
    """`--help` of the program names every command, and that of a command shows how it is used."""
    answers = await asyncio.gather(_run("--help"), *(_run(name, "--help") for name in COMMANDS))
    assert [code for code, _, _ in answers] == [0] * len(answers)
    (_, overview, _), *each = answers
    for name, (_, text, _) in zip(COMMANDS, each, strict=True):
        assert re.search(rf"\b{name}\b", overview)
        assert f"Example: fax-gateway {name}" in text


async def test_the_version_is_told() -> None:
    """`--version` prints the version and nothing else."""
    assert await _run("--version") == (0, f"{__version__}\n", "")


async def test_a_slip_on_the_command_line_is_a_usage_error(tmp_path: Path) -> None:
    """Unknown commands, options and states, a missing file: 64, and a word about what is wrong."""
    slips = [
        ("lst",),
        ("list", "--nonsense"),
        ("list", "--state", "lost"),
        ("hold",),
        ("release", "some-id", "--all"),
        ("show",),
        ("send", str(tmp_path / "missing.pdf"), "--to", "+13125550100", "--from", "a@example.com"),
        *(("sandbox", "--listen", wrong) for wrong in ("localhost:http", "18093")),
        *(("sandbox", wrong, "nowhere") for wrong in ("--webhooks", "--script")),
    ]
    for code, _, errors in await asyncio.gather(*(_run(*slip) for slip in slips)):
        assert code == 64
        assert errors


@pytest.mark.parametrize("command", ["check", "serve", "list", "send"])
async def test_a_wrong_configuration_is_told_key_by_key(tmp_path: Path, command: str) -> None:
    """Every fault is named with its key, and the exit code is 78, whatever the command."""
    config = tmp_path / "config.toml"
    config.write_text('[telnyx]\napi_kee = "k"\nquality = "best"\n[smtp]\nlisten = "nowhere"\n')
    document = tmp_path / "letter.pdf"
    document.write_bytes(paper())
    extra = {"send": (str(document), "--to", "+13125550100", "--from", "a@example.com")}.get(command, ())
    code, output, errors = await _run(command, *extra, "--config", str(config))
    assert (code, output) == (78, "")
    keys = {line.partition(":")[0] for line in errors.splitlines()}
    assert keys >= {"telnyx.api_kee", "telnyx.quality", "smtp.listen", "replies.postmaster"}
    assert ("telnyx.api_key" in keys) == (command in {"check", "serve"})  # the others need no secret


async def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    """A file that is not there is told by its name, 78."""
    code, _, errors = await _run("check", "--config", str(tmp_path / "nothing.toml"))
    assert code == 78
    assert "nothing.toml" in errors


async def test_explain_prints_a_row() -> None:
    """A reason's class, its retries, what the sender is told; for a slip the one that was meant."""
    asked = ("receiver_no_answer", "account_disabled", "fax_signaling_error", "user_bsy")
    busy, account, robust, slip = await asyncio.gather(*(_run("explain", reason) for reason in asked))
    assert busy[0] == 0
    assert "class:     no_answer" in busy[1]
    assert "retries:   after 15 min, 30 min, 60 min" in busy[1]
    assert "told:      The phone rang, but nothing picked up." in busy[1]
    assert "a probe every 5 min to 1 h" in account[1]
    assert "the postmaster is told" in account[1]
    assert "pages may have arrived" in robust[1]
    assert slip[0] == 65
    assert "did you mean user_busy?" in slip[2]


async def test_the_sandbox_serves_until_it_is_stopped() -> None:
    """`sandbox` says where it is and with which key, answers like the carrier, and ends on Ctrl-C with 0."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "sandbox", "--listen", "127.0.0.1:0", "--call-time", "0",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            lines = [(await process.stdout.readline()).decode() for _ in range(4)]
        url = lines[0].split()[-1]
        assert lines[1].startswith("api_key = sandbox-key, connection_id = ")
        assert lines[2].startswith("public_key = ")
        async with aiohttp.ClientSession() as client:
            async with client.get(f"{url}/faxes", headers={"Authorization": "Bearer sandbox-key"}) as answer:
                assert answer.status == 200
            async with client.get(f"{url}/faxes") as answer:
                assert answer.status == 401
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")


async def test_without_a_database_commands_say_so(tmp_path: Path, w: World) -> None:
    """Only `serve` makes a database: before that, 78 and a word about it."""
    config = tmp_path / "config.toml"
    config.write_text(w.gateway.config.read_text().replace("gateway.db", "other.db"))
    code, _, errors = await _run("list", "--config", str(config))
    assert code == 78
    assert errors.startswith("fax-gateway: store.url: ")
    assert not list(w.gateway.folder.glob("other.db*"))


async def test_a_second_daemon_is_refused(tmp_path: Path, w: World) -> None:
    """On the same port a daemon ends with 69, on the same database with 78; the first one goes on."""
    text = w.gateway.config.read_text()
    configs = [tmp_path / "port.toml", tmp_path / "store.toml"]
    configs[0].write_text(text.replace(f"{w.gateway.folder}/gateway.db", f"{tmp_path}/gateway.db"))
    configs[1].write_text(re.sub(r'listen = "[^"]*"', 'listen = "127.0.0.1:0"', text))
    port, store = await asyncio.gather(*(_run("serve", "--config", str(config)) for config in configs))
    assert port[0] == 69
    assert "cannot start" in port[2]
    assert store[0] == 78
    assert "store.url" in store[2]
    assert (await w.gateway.run("health"))[0] == 0


# --- beside the daemon -------------------------------------------------------------------------------


async def test_check_says_that_the_configuration_is_good(w: World) -> None:
    """`check` says so; with `--online` the carrier is asked about key and application; nothing is sent."""
    code, output, errors = await w.gateway.run("check")
    assert (code, errors) == (0, "")
    assert output.startswith("warning: telnyx.doubt_checks: ends before 270 s")  # the tests' are short
    assert output.endswith("\nconfiguration: good\n")
    calls = len(w.posts)
    code, output, _ = await w.gateway.run("check", "--online")
    assert code == 0
    assert "ok: telnyx.api_key works; fax application: Sandbox" in output
    w.carrier.set_account("401")
    code, output, _ = await w.gateway.run("check", "--online")
    w.carrier.set_account("ok")
    assert code == 78
    assert "error: telnyx.api_key is not accepted (HTTP 401)" in output
    assert len(w.posts) == calls


async def test_check_online_opens_the_database(w: World, tmp_path: Path) -> None:
    """An unreachable database is an error, one that the first start makes is none, and nothing is made."""
    name = f"sqlite:///{w.gateway.folder}/gateway.db"
    answers = []
    for url in (name, f"sqlite:///{tmp_path}/none.db", "postgresql://fax:hush@127.0.0.1:1/fax"):
        config = tmp_path / "config.toml"
        config.write_text(w.gateway.config.read_text().replace(name, url))
        answers.append(await _run("check", "--online", "--config", str(config)))
    assert [code for code, _, _ in answers] == [0, 0, 78]
    good, none, away = (output.splitlines()[-1] for _, output, _ in answers)
    assert good == "ok: store.url: the database can be used"
    assert none.startswith("warning: store.url: there is no database at ")
    assert away.startswith("error: store.url: ")
    assert "refused" in away
    assert "hush" not in away
    assert not (tmp_path / "none.db").exists()


async def test_a_list_that_was_cut_says_so(w: World) -> None:
    """`list` shows the newest; that there are more, and how to see them, is told beside it."""
    await w.replies(next(FREE), next(FREE))
    code, output, errors = await w.gateway.run("list", "--all", "--most", "1")
    assert (code, len(output.splitlines())) == (0, 2)
    assert errors == "fax-gateway: these are the newest 1; --most 10 shows more\n"
    listed = json.loads((await w.gateway.run("list", "--all", "--most", "1", "--json"))[1])
    assert len(listed["faxes"]) == 1
    assert (await w.gateway.run("list", "--all", "--most", "500"))[2] == ""


async def test_send_goes_through_the_door(w: World, tmp_path: Path) -> None:
    """`send` mails a PDF, also a large one, through the daemon's own door, under the same rules."""
    document, number = tmp_path / "letter.pdf", next(FREE)
    document.write_bytes(heavy(400_000))
    code, output, errors = await w.gateway.run(
        "send", str(document), "--to", number, "--from", "clerk@example.com"
    )
    assert (code, errors) == (0, "")
    mail_id = output.split()[-1]
    w.accepted[mail_id] = 1
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
    assert w.taken(number)[0].size == document.stat().st_size
    document.write_bytes(b"no PDF")
    refused = await asyncio.gather(
        w.gateway.run("send", str(document), "--to", number, "--from", "clerk@example.com"),
        w.gateway.run("send", str(document), "--to", "+4930123456", "--from", "clerk@example.com"),
    )
    assert [(code, errors.split()[1:3]) for code, _, errors in refused] == [
        (65, ["554", "5.6.0"]),
        (65, ["550", "5.7.1"]),
    ]


async def test_send_dials_the_number_as_it_was_written(w: World, tmp_path: Path) -> None:
    """Parentheses belong to the number: read as a comment they would make it another city's."""
    document = tmp_path / "letter.pdf"
    document.write_bytes(paper())
    for written in ("+49(40)30123456", "+49 (40) 30123456"):
        code, _, errors = await w.gateway.run(
            "send", str(document), "--to", written, "--from", "clerk@example.com"
        )
        assert code == 65
        assert "+494030123456 is in the region DE" in errors


async def test_the_queue_can_be_looked_at_without_the_secrets(w: World, tmp_path: Path) -> None:
    """Operators run commands outside the unit that has the credentials; only the daemon needs them."""
    config = tmp_path / "config.toml"
    config.write_text(re.sub(r"api_key = .*\n", "", w.gateway.config.read_text()))
    assert (await _run("list", "--config", str(config)))[0] == 0
    code, _, errors = await _run("check", "--config", str(config))
    assert (code, errors.partition(":")[0]) == (78, "telnyx.api_key")


async def test_explain_knows_the_configured_waits(tmp_path: Path) -> None:
    """The plan is the one of the configuration in force, cut at `retries.max_calls`."""
    config = tmp_path / "config.toml"
    config.write_text(
        '[telnyx]\napi_key = "KEY0"\nconnection_id = "1"\nfrom_number = "+13127367276"\n'
        '[replies]\npostmaster = "a@example.com"\n[retries]\nbusy = ["20s", "8m", "9m"]\nmax_calls = 3\n'
    )
    config.chmod(0o600)
    assert "after 20 s, 8 min\n" in (await _run("explain", "user_busy", "--config", str(config)))[1]


async def test_a_daemon_that_is_down_is_told(w: World, tmp_path: Path) -> None:
    """`send` ends with 75 when nobody listens, so that a script tries again; `health` ends with 1."""
    config, document = tmp_path / "config.toml", tmp_path / "letter.pdf"
    config.write_text(re.sub(r'listen = "[^"]*"', 'listen = "127.0.0.1:1"', w.gateway.config.read_text()))
    document.write_bytes(paper())
    where = ("--config", str(config))
    sent, health = await asyncio.gather(
        _run("send", str(document), "--to", "+13125550100", "--from", "a@example.com", *where),
        _run("health", *where),
    )
    assert (sent[0], health[0]) == (75, 1)
    assert "does not answer on 127.0.0.1:1" in sent[2]
    assert "not ready" in health[2]


async def test_holding_the_queue_keeps_mail_and_calls_nobody(w: World) -> None:
    """`hold --all` stops every call and no mail; single faxes can be held, released, cancelled meanwhile."""
    going, held, dropped = next(FREE), next(FREE), next(FREE)
    assert (await w.gateway.run("hold", "--all"))[0] == 0
    mail_id = await w.mail(going, held, dropped)
    one, two, three = (f"{mail_id}-{place}" for place in (1, 2, 3))
    code, output, _ = await w.gateway.run("hold", two)
    assert (code, output) == (0, f"{two}: held\n")
    assert "has put it on hold" in words(await w.reply(two, "delayed"))
    code, output, _ = await w.gateway.run("cancel", three)
    assert (code, output) == (0, f"{three}: cancelled\n")
    reply = await w.reply(three)
    assert reply["X-Fax-Outcome"] == "cancelled"
    assert "No call for it is on record here." in words(reply)
    code, output, _ = await w.gateway.run("list")
    assert code == 0
    assert output.startswith("! operator since ")
    rows = {line.split()[0]: line for line in output.splitlines()[2:]}
    assert {one, two} <= set(rows)
    assert three not in rows
    assert f"held:operator  {held}" in rows[two]
    listed = json.loads((await w.gateway.run("list", "--json", "--state", "held"))[1])
    assert [(fax["id"], fax["held_for"]) for fax in listed["faxes"]] == [(two, "operator")]
    assert [hold["kind"] for hold in listed["holds"]] == ["operator"]
    assert '"holds": [{' in (await w.gateway.run("health"))[1]  # ready all the same
    assert (await w.gateway.run("release", "--all"))[0] == 0
    assert (await w.reply(one))["X-Fax-Outcome"] == "delivered"
    assert w.posts.count(held) == 0
    assert (await w.gateway.run("release", two))[1] == f"{two}: queued\n"
    assert (await w.reply(two))["X-Fax-Outcome"] == "delivered"
    assert [len(w.taken(number)) for number in (going, held, dropped)] == [1, 1, 0]


async def test_show_tells_the_whole_history(w: World) -> None:
    """`show` tells a person what happened and when, call by call; with a mail's id, all its faxes."""
    number = next(FREE)
    w.carrier.set_script({number: ["user_busy", "delivered"]})
    busy, plain = await w.replies(number, next(FREE))
    code, output, _ = await w.gateway.run("show", busy["X-Fax-Mail-Id"])
    assert code == 0
    assert f"fax       {busy['X-Fax-Id']}" in output
    assert f"fax       {plain['X-Fax-Id']}" in output
    first, second = (call.fax_id for call in w.taken(number))
    assert re.search(rf"call 1 .* {first} failed user_busy", output)
    assert re.search(rf"call 2 .* {second} delivered", output)
    assert "reply     delivered: sent" in output
    shown = await w.gateway.show(busy["X-Fax-Id"])
    assert [attempt["carrier_id"] for attempt in shown["fax"]["attempts"]] == [first, second]
    assert [moment["event"] for moment in shown["moments"]].count("Begun") == 2
    assert shown["mail"]["sender"] == "clerk@example.com"
    ended = json.loads((await w.gateway.run("list", "--all", "--json", "--most", "500"))[1])["faxes"]
    assert {busy["X-Fax-Id"], plain["X-Fax-Id"]} <= {
        fax["id"] for fax in ended if fax["state"] == "delivered"
    }


async def test_what_cannot_be_done_is_an_error_of_the_data(w: World) -> None:
    """No such fax, or a fax in no state for it: 65, and why."""
    (reply,) = await w.replies(next(FREE))
    fax_id = reply["X-Fax-Id"]
    commands = [
        ("show", "nobody-1"),
        ("hold", fax_id),
        ("release", fax_id),
        ("cancel", fax_id),
        ("retry", fax_id),
    ]
    for code, _, errors in await asyncio.gather(*(w.gateway.run(*command) for command in commands)):
        assert code == 65
        assert errors.startswith("fax-gateway: ")
    assert len(w.mailbox.about(fax_id)) == 1


async def test_one_fax_that_cannot_does_not_spare_the_others_of_its_mail(w: World) -> None:
    """`cancel` of a mail whose first fax has ended still cancels the rest, and says how many."""
    done, waiting = next(FREE), next(FREE)
    w.carrier.set_script({waiting: ["receiver_no_answer"]})
    mail_id = await w.mail(done, waiting)
    await w.reply(f"{mail_id}-1", "delivered")
    await until(lambda: w.gateway.said("fax_requeued", fax=f"{mail_id}-2"), "the second to wait")
    code, output, errors = await w.gateway.run("cancel", mail_id)
    assert (code, output) == (65, f"{mail_id}-2: cancelled\n")
    assert "done to 1 of 2 faxes" in errors
    await w.reply(f"{mail_id}-2", "cancelled")


async def test_an_open_call_is_cancelled_at_the_carrier(w: World) -> None:
    """With a call open the carrier is asked; the sender hears of it once the carrier says that it ended."""
    mail_id = await w.mail("+13125550154")
    await until(lambda: w.gateway.said("call_taken", fax=f"{mail_id}-1"), "the call")
    code, output, _ = await w.gateway.run("cancel", mail_id)
    assert code == 0
    assert "(cancel asked, the outcome decides)" in output
    reply = await w.reply(f"{mail_id}-1")
    assert reply["X-Fax-Outcome"] == "cancelled"
    (call,) = w.taken("+13125550154")
    assert [r.path for r in w.carrier.requests].count(f"/v2/faxes/{call.fax_id}/actions/cancel") == 1


async def test_a_delivery_wins_over_a_cancel(w: World) -> None:
    """Cancelled too late: the sender reads that it was delivered, not that it was cancelled."""
    number, told = next(FREE), asyncio.Event()

    async def hold_back(step: str, about: dict[str, object]) -> None:
        if step == "webhook" and about["fax_id"] in {call.fax_id for call in w.taken(number)}:
            await told.wait()

    w.on_step = hold_back
    mail_id = await w.mail(number)
    await until(lambda: w.gateway.said("call_taken", fax=f"{mail_id}-1"), "the call")
    assert (await w.gateway.run("cancel", mail_id))[0] == 0
    await until(
        lambda: w.gateway.said("carrier_asked", fax=f"{mail_id}-1", cancel="too late"), "the question"
    )
    told.set()
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
    w.on_step = None


async def test_a_waiting_fax_can_be_tried_now(w: World) -> None:
    """`retry` of a fax that waits for its next call makes that call now."""
    number = next(FREE)
    w.carrier.set_script({number: ["receiver_no_answer", "delivered"]})
    mail_id = await w.mail(number)
    await until(lambda: w.gateway.said("fax_requeued", fax=f"{mail_id}-1"), "the wait")
    code, output, _ = await w.gateway.run("retry", mail_id)
    assert (code, output) == (0, f"{mail_id}-1: queued\n")
    assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
    assert len(w.taken(number)) == 2


async def test_an_ended_fax_is_sent_again_as_a_new_one(w: World) -> None:
    """`retry` of an ended fax makes a new one that names the old; if delivered, only with --even-if-twice."""
    number = next(FREE)
    w.carrier.set_script({number: ["receiver_unallocated_number", "delivered"]})
    (failed,) = await w.replies(number)
    old = failed["X-Fax-Id"]
    code, output, _ = await w.gateway.run("retry", old)
    assert code == 0
    new = output.partition(":")[0]
    assert output == f"{new}: queued, renews {old}\n"
    assert new != old
    w.accepted[failed["X-Fax-Mail-Id"]] = 2
    reply = await w.reply(new)
    assert reply["X-Fax-Outcome"] == "delivered"
    assert f"sent again in place of {old}" in words(reply)
    assert (await w.gateway.run("retry", new))[0] == 65
    code, output, _ = await w.gateway.run("retry", new, "--even-if-twice")
    assert code == 0
    w.accepted[failed["X-Fax-Mail-Id"]] = 3
    await w.reply(output.partition(":")[0], "delivered")
    assert [call.copy for call in w.taken(number)] == [1, 2, 3]


async def test_a_document_that_is_gone_cannot_be_sent_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    """After `keep_documents` the document leaves the store; what is known of the fax stays."""
    async with world(tmp_path_factory.mktemp("purge"), store={"keep_documents": "100ms"}) as w:
        (reply,) = await w.replies("+13125550105")
        await until(lambda: w.gateway.said("purged"), "the document to go")
        code, _, errors = await w.gateway.run("retry", reply["X-Fax-Id"])
        assert code == 65
        assert "document" in errors
        assert (await w.gateway.show(reply["X-Fax-Id"]))["fax"]["reason"] == "destination_invalid"


async def test_the_daemon_tells_nobody_what_the_mails_say(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Log and errors hold masked numbers, and nothing of content, names of files, passwords or keys."""
    secrets = {"relay_user": "postbox", "relay_password": "relay-secret"}
    async with world(tmp_path_factory.mktemp("quiet"), replies=secrets | {"attach_first_page": True}) as w:
        message = letter(
            "+13125550152", "+13125550167", "+13125550159", name="severance.pdf", text="You are dismissed"
        )
        message.replace_header("Subject", "Dismissal of J. Doe")
        await w.mail("+13125550152", "+13125550167", "+13125550159", message=message)
        with pytest.raises(Exception, match="554"):
            await w.mail("+13125550100", message=letter(document=b"junk", name="severance.pdf"))
        await until(lambda: len(w.gateway.said("fax_ended")) == 2, "two to end")
        await until(lambda: w.gateway.said("fax_held"), "one to be held")
        await until(lambda: w.gateway.said("reply_deferred"), "the relay to refuse the password")
        assert await w.gateway.stop() == 0
        said = w.gateway.stdout + w.gateway.stderr
        assert w.gateway.stderr == ""
        assert '"number": "+1312*****52"' in said
        for secret in (
            "3125550",
            "sandbox-key",
            "relay-secret",
            "severance",
            "Dismissal",
            "dismissed",
            "Please fax",
        ):
            assert secret not in said


async def test_monitors_see_the_queue(w: World) -> None:
    """`/healthz`, `/readyz` and `/metrics` answer, and the counters count what happened."""
    await w.replies(next(FREE), "+13125550105")
    where = f"http://127.0.0.1:{w.gateway.http_port}"
    async with aiohttp.ClientSession() as client:
        async with client.get(f"{where}/healthz") as answer:
            assert (answer.status, await answer.json()) == (200, {"status": "ok"})
        async with client.get(f"{where}/readyz") as answer:
            assert (answer.status, (await answer.json())["overdue"]) == (200, 0)
        async with client.get(f"{where}/metrics") as answer:
            text = await answer.text()
    ended = {
        line.partition("}")[0]: float(line.split()[-1]) for line in text.splitlines() if "outcome=" in line
    }
    assert any(value >= 1 for name, value in ended.items() if "failed" in name)
    assert any(value >= 1 for name, value in ended.items() if "delivered" in name)
