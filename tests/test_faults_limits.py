"""A daemon that may write no more: what a full disk is like, on any machine and for anybody."""

import asyncio
import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import letter, numbers, program_after, until, world
from papers import heavy
from putting_off import contents, mail_again, send, to_data

FREE = numbers()
# A small mail fits, in the folder for incoming mail; no page of the database's log does.
LIMIT = 8 * 1024
_LATER = "451 4.3.0 the mail could not be examined now; try again later"
_FULL = "452 4.3.1 no space left here; try again later"
# While a file is there the database must not grow: SQLite takes no limit below what it has already.
FULL_STORE = """
import pathlib
from gateway import sqlite
full, run_group = pathlib.Path({path!r}), sqlite._run_group
def limited(connection, statements, units):
    most = 1 if full.exists() else 2**32 - 2
    statements.driver.execute(f"PRAGMA max_page_count={{most}}").close()
    run_group(connection, statements, units)
sqlite._run_group = limited
"""


@contextlib.contextmanager
def file_size(pid: int, limit: int) -> Iterator[None]:
    """Let each write of a process beyond the size fail (EFBIG), until it is lifted again."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_daemon_that_may_write_no_more_loses_nothing_and_keeps_nothing_half(tmp_path: Path) -> None:
    """Mail that fits into no file is put off by 451, events by 503; with the limit lifted all goes on."""
    called, small, large = next(FREE), next(FREE), next(FREE)
    messages = {small: letter(small), large: letter(large, document=heavy(600_000))}
    assert len(messages[small].as_bytes()) < LIMIT
    limited, lifted = asyncio.Event(), asyncio.Event()

    async def events_wait(step: str, told: dict[str, Any]) -> None:
        if step == "webhook" and told["event"]["payload"]["to"] == called:
            await (limited if told["attempt"] == 1 else lifted).wait()

    async with world(tmp_path) as w, contextlib.AsyncExitStack() as opened:
        w.on_step = events_wait
        mail_id = await w.mail(called)
        await until(lambda: w.gateway.said("call_taken", fax=f"{mail_id}-1"), "the call")
        clients = {number: await to_data(w, number, opened) for number in messages}
        kept = contents(tmp_path)
        with file_size(w.gateway.pid, LIMIT):
            for number, client in clients.items():
                assert await send(client, messages[number]) == _LATER
            limited.set()
            await until(
                lambda: w.gateway.said("store_failed", verb="remember_event"), "an event to be put off"
            )
            assert contents(tmp_path) == kept
            assert list((tmp_path / "incoming").iterdir()) == []
        for number, client in clients.items():
            await mail_again(client, w, number, messages[number])
        lifted.set()
        assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
        await w.everyone_told()
        told = [sent.status for sent in w.carrier.events if sent.fax_id == w.taken(called)[0].fax_id]
        assert set(told) == {503, 200}
        errors = [line["error"].partition(":")[0] for line in w.gateway.said("mail_failed")]
        assert errors == ["StoreUnavailable", "OSError"]
        assert [len(w.taken(number)) for number in (called, small, large)] == [1, 1, 1]


async def test_a_store_that_says_it_is_full_loses_nothing_and_keeps_nothing_half(tmp_path: Path) -> None:
    """While the database may not grow, mail hears 452 and leaves nothing; with room again it is one fax."""
    small, large = next(FREE), next(FREE)
    # One goes in with its mail, the other piece by piece before it.
    messages = {
        number: letter(number, document=heavy(size)) for number, size in ((small, 100_000), (large, 600_000))
    }
    full = tmp_path / "full"
    program = program_after(FULL_STORE.format(path=str(full)))
    async with world(tmp_path, program=program) as w, contextlib.AsyncExitStack() as opened:
        await w.replies(next(FREE))
        clients = {number: await to_data(w, number, opened) for number in messages}
        kept = contents(tmp_path)
        full.touch()
        for number, client in clients.items():
            assert await send(client, messages[number]) == _FULL
        told = "StoreFull: OperationalError: database or disk is full"
        await until(lambda: len(w.gateway.said("mail_failed", error=told)) == 2, "both in the log")
        assert contents(tmp_path) == kept
        assert list((tmp_path / "incoming").iterdir()) == []
        full.unlink()
        for number, client in clients.items():
            await mail_again(client, w, number, messages[number])
        await w.everyone_told()
        assert [len(w.taken(number)) for number in messages] == [1, 1]
