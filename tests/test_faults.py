"""Faults of the machine under a real daemon: a disk that fills up, a clock that is set."""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crashes import Client, rows
from harness import PATIENCE, SENDER, World, letter, numbers, until, world
from papers import heavy
from putting_off import contents, mail_again, send, taken_in, to_data
from wall_clocks import clocked, refused_events

FREE = numbers()
HOUR, MINUTE = 3600.0, 60.0

# --- the disk --------------------------------------------------------------------------------------------

DISK_SIZE = "72m"  # the daemon keeps 64 MiB in reserve
_FULL = "452 4.3.1 no space left here; try again later"


class SmallDisk:
    """A file system of its own, which the test can fill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, leave: int = 0) -> None:
        """Take all the space but `leave` octets."""
        with self._filler.open("ab") as file:
            while (room := shutil.disk_usage(self.folder).free - leave) > 0:
                with contextlib.suppress(OSError):  # a running daemon took some of it since: look again
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, room)

    def clear(self) -> None:
        """Give the space back."""
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Mount a small file system, where that is permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("there is no program to mount a file system with")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={DISK_SIZE},mode=0700", "tmpfs", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S607 -- stands beside mount


async def test_a_disk_that_fills_up_loses_nothing_and_keeps_nothing_half(
    disk: SmallDisk, tmp_path: Path
) -> None:
    """With the database's disk full, mail is put off by 452, events by 503; with room again all goes on."""
    files = tmp_path / "incoming"  # elsewhere, so that it is the database that meets the full disk
    files.mkdir()
    (disk.folder / "incoming").symlink_to(files)
    called, small, large = next(FREE), next(FREE), next(FREE)
    messages = {small: letter(small), large: letter(large, document=heavy(600_000))}
    full, cleared = asyncio.Event(), asyncio.Event()

    async def events_wait(step: str, told: dict[str, Any]) -> None:
        if step == "webhook" and told["event"]["payload"]["to"] == called:
            await (full if told["attempt"] == 1 else cleared).wait()

    async with world(disk.folder) as w, contextlib.AsyncExitStack() as opened:
        w.on_step = events_wait
        mail_id = await w.mail(called)
        await until(lambda: w.gateway.said("call_taken", fax=f"{mail_id}-1"), "the call")
        clients = {number: await to_data(w, number, opened) for number in messages}
        kept = contents(disk.folder)
        disk.fill()
        for number, client in clients.items():
            assert await send(client, messages[number]) == _FULL
        full.set()
        await until(lambda: w.gateway.said("store_failed", verb="remember_event"), "an event to be put off")
        assert contents(disk.folder) == kept
        assert list(files.iterdir()) == []
        disk.clear()
        for number, client in clients.items():
            await mail_again(client, w, number, messages[number])
        cleared.set()
        assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
        await w.everyone_told()
        told = [sent.status for sent in w.carrier.events if sent.fax_id == w.taken(called)[0].fax_id]
        assert set(told) == {503, 200}
        assert failures(w) == ["StoreFull", "StoreFull"]
        assert [len(w.taken(number)) for number in (called, small, large)] == [1, 1, 1]


def failures(w: World) -> list[str]:
    """Return why mails were put off, as the log has it."""
    return [line["error"].partition(":")[0] for line in w.gateway.said("mail_failed", answer="452 4.3.1")]


async def test_a_disk_that_is_nearly_full_begins_no_mail_and_finishes_those_begun(disk: SmallDisk) -> None:
    """Below the reserve a new mail hears 452 at MAIL, one begun is taken; on a full disk it hears 452."""
    async with world(disk.folder) as w, contextlib.AsyncExitStack() as clients:
        begun, stuck = next(FREE), next(FREE)
        message = letter(stuck)
        first, second = await to_data(w, begun, clients), await to_data(w, stuck, clients)
        late = clients.enter_context(contextlib.closing(await Client.connect(w.gateway.smtp_port)))
        disk.fill(leave=32 * 1024 * 1024)
        for command, answer in (("", "220"), ("HELO a", "250"), (f"MAIL FROM:<{SENDER}>", _FULL)):
            await late.send(command.encode() + b"\r\n" if command else b"")
            assert (await late.answer()).startswith(answer)
        await taken_in(w, await send(first, letter(begun)))
        disk.fill()
        assert await send(second, message) == _FULL
        assert list((disk.folder / "incoming").iterdir()) == []
        await until(lambda: failures(w) == ["disk reserve", "OSError"], "both refusals in the log")
        disk.clear()
        await mail_again(second, w, stuck, message)
        await w.everyone_told()


# --- the clock -------------------------------------------------------------------------------------------


async def test_a_clock_set_forward_makes_a_waiting_fax_early_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry that waits is made when the clock says so; the events it refuses are made up for by asking."""
    async with clocked(tmp_path, monkeypatch, retries={"busy": ["30m"]}) as (w, clock):
        number = next(FREE)
        w.carrier.set_script({number: ["user_busy", "delivered"]})
        mail_id = await w.mail(number)
        await until(lambda: w.gateway.said("fax_requeued", fax=f"{mail_id}-1"), "the wait")
        clock.set(2 * HOUR)
        await refused_events(w, number, calls=2)
        assert w.mailbox.finals() == []
        clock.set(2 * HOUR + 10 * MINUTE)
        reply = await w.reply(f"{mail_id}-1")
        assert (reply["X-Fax-Outcome"], reply["X-Fax-Attempts"]) == ("delivered", "2")
        assert len(w.posts) == 2


async def test_a_clock_set_back_makes_a_waiting_fax_late_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry waits until the clock has come round to it; other mail goes out at once all the same."""
    async with clocked(tmp_path, monkeypatch, retries={"busy": ["30m"]}) as (w, clock):
        waiting, other = next(FREE), next(FREE)
        w.carrier.set_script({waiting: ["user_busy", "delivered"]})
        waits = await w.mail(waiting)
        await until(lambda: w.gateway.said("fax_requeued", fax=f"{waits}-1"), "the wait")
        clock.set(-2 * HOUR)
        goes = await w.mail(other)
        await refused_events(w, other, calls=1)
        clock.set(-2 * HOUR + 10 * MINUTE)
        assert (await w.reply(f"{goes}-1"))["X-Fax-Outcome"] == "delivered"
        assert len(w.taken(waiting)) == 1
        clock.set(0.0)
        again = await w.mail(last := next(FREE))
        assert (await w.reply(f"{again}-1"))["X-Fax-Outcome"] == "delivered"
        assert {sent.status for sent in w.carrier.events if sent.fax_id == w.taken(last)[0].fax_id} == {200}
        assert len(w.taken(waiting)) == 1
        clock.set(31 * MINUTE)
        await refused_events(w, waiting, calls=2)
        clock.set(41 * MINUTE)
        assert (await w.reply(f"{waits}-1"))["X-Fax-Outcome"] == "delivered"
        assert [len(w.taken(number)) for number in (waiting, other, last)] == [2, 1, 1]


async def test_a_clock_set_forward_while_a_call_is_handed_over_makes_no_second_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that lapses only by the clock, its request still on its way, is never proved absent."""
    async with clocked(tmp_path, monkeypatch) as (w, clock):
        number, arrived, goes_on = next(FREE), asyncio.Event(), asyncio.Event()

        async def halt(step: str, told: dict[str, Any]) -> None:
            if step == "request" and told["method"] == "POST" and not arrived.is_set():
                arrived.set()
                await goes_on.wait()

        w.on_step = halt
        mail_id = await w.mail(number)
        async with asyncio.timeout(PATIENCE):
            await arrived.wait()
        clock.set(2 * HOUR)
        looks: set[tuple[Any, ...]] = set()

        def looked_thrice() -> bool:
            looks.update(rows(tmp_path / "gateway.db", "SELECT due_at FROM faxes WHERE state = 'in_doubt'"))
            return len(looks) > 3 or bool(w.posts)

        await until(looked_thrice, "the doubt to be looked at")
        goes_on.set()
        await refused_events(w, number, calls=1)
        clock.set(2 * HOUR + 10 * MINUTE)
        assert (await w.reply(f"{mail_id}-1"))["X-Fax-Outcome"] == "delivered"
        assert len(w.taken(number)) == 1
