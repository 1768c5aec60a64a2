"""A long queue: how soon the daemon is ready, what it weighs, and that the queue moves."""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import World, until, world

WAITING = 100_000
READY = 3.0  # seconds
MEMORY = 300_000_000  # octets, children included


def fill(folder: Path, number: Callable[[int], str]) -> None:
    """Put 100,000 queued faxes into a stopped gateway's database, each with a mail; one document for all."""
    now = time.time()
    with sqlite3.connect(folder / "gateway.db") as connection:
        document = connection.execute("SELECT id FROM documents").fetchone()[0]
        mails = [f"m{place:07}" for place in range(WAITING)]
        connection.executemany(
            "INSERT INTO mails VALUES (?, 'clerk@example.com', ?, NULL, '', 'x', x'', ?)",
            ((mail, now, document) for mail in mails),
        )
        connection.executemany(
            "INSERT INTO faxes (id, mail_id, number, recipient, pages, state, due_at, accepted_at,"
            " give_up_at, version, held_detail, told_delayed, cancel_asked, turn, lease_until)"
            " VALUES (?, ?, ?, '', 1, 'queued', ?, ?, ?, 0, '', 0, 0, ?, 0)",
            (
                (f"{mail}-1", mail, number(place), now, now, now + 86400, float(place + 2))
                for place, mail in enumerate(mails)
            ),
        )


def memory_of(pid: int) -> int:
    """Return the octets that a process and its children keep, shared pages counted once (Pss, proc(5))."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0
    for each in (str(pid), *children):
        lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


async def start(w: World) -> float:
    """Start the gateway; return the seconds until it was ready."""
    begun = time.monotonic()
    await w.restart()
    return time.monotonic() - begun


@pytest.mark.parametrize(
    "number",
    [lambda place: f"+1312{5561000 + place}", lambda _place: "+13125561000"],
    ids=["each to its own number", "all to one number"],
)
async def test_a_hundred_thousand_waiting_faxes_delay_no_start(
    tmp_path: Path, number: Callable[[int], str]
) -> None:
    """Ready again within 3 s, under 300 MB, the queue moves, and another sender need not wait for it."""
    async with world(tmp_path, call_time=0.0) as w:
        await w.replies("+13125550151")  # its document is the others', too
        await w.gateway.stop()
        empty = await start(w)
        await w.gateway.stop()
        fill(tmp_path, number)
        # A machine that is busy with other tests is as slow with an empty queue.
        assert await start(w) < max(READY, empty + 1.0)
        await until(lambda: len(w.carrier.ledger) > 20, "the queue to move")
        mail_id = await w.mail("+13125550152", sender="other@example.com")
        await w.reply(f"{mail_id}-1")
        assert len(w.carrier.ledger) < WAITING / 100
        assert memory_of(w.gateway.pid) < MEMORY
