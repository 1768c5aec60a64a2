"""The demonstration: what a newcomer sees first."""

import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import until


def _is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


async def _demo(*words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "demo", *words,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip


async def test_the_demonstration_shows_the_whole_way_and_ends() -> None:
    """`demo --once` shows each step, prints the delivered reply, keeps the picture of page 1, and exits 0."""
    process = await _demo("--once")
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    steps = ("HTTP on", "said 250", "goes to the carrier", "took it as", "ended: delivered", "reply (")
    places = [output.index(step) for step in steps]
    assert places == sorted(places)
    assert "Subject: Fax delivered: +1 312-555-0100, 1 page" in output
    picture = re.search(r"page 1, as it went out: (\S+\.png)", output)
    assert picture is not None
    assert _is_picture(Path(picture[1]))
    seconds = [float(found) for found in re.findall(r"^ *(\d+\.\d\d) s  ", output, re.MULTILINE)]
    assert seconds == sorted(seconds)


@contextlib.asynccontextmanager
async def _serving() -> AsyncIterator[tuple[asyncio.subprocess.Process, list[str]]]:
    """Run the demonstration until it serves; yields it and the lines that it prints."""
    process = await _demo()
    stdout, seen = process.stdout, list[str]()
    assert stdout is not None

    async def read() -> None:
        while line := await stdout.readline():
            seen.append(line.decode().rstrip())

    reader = asyncio.create_task(read())
    try:
        await until(
            lambda: process.returncode is not None or [line for line in seen if "Ctrl-C" in line],
            "the demonstration to serve",
        )
        assert process.returncode is None, "\n".join(seen)
        yield process, seen
    finally:
        if process.returncode is None:
            process.kill()
        await reader


async def _send(seen: list[str], *changed: tuple[str, str]) -> str:
    """Mail the sample with the command that was printed, changed word by word; returns the answer."""
    command = next(line for line in seen if " -m gateway send " in line)
    config = next(line for line in seen if line.strip().startswith("--config"))
    words = [dict(changed).get(word, word) for word in command.replace("\\", "").split()[3:]]
    sent = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", *words, *config.split(),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    answer = (await sent.communicate())[0].decode()
    assert sent.returncode == 0, answer
    return answer


async def test_the_demonstration_goes_on_serving_until_it_is_told_to_end() -> None:
    """Without `--once` it says how to mail by hand, answers a mail sent so, and ends cleanly on Ctrl-C."""
    async with _serving() as (process, seen):
        assert "queued as" in await _send(seen)
        await until(
            lambda: [line for line in seen if "will be called again" in line], "the busy call's retry"
        )
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0


def _processes_below(pid: int) -> list[Path]:
    """Return the directories in /proc of a process's children, and of theirs."""
    below: list[Path] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text(encoding="ascii").split():
            below += [Path(f"/proc/{child}"), *_processes_below(int(child))]
    return below


def _lives(process: Path) -> bool:
    """Tell whether a process runs; one that only waits for its parent to ask about its end does not."""
    try:
        return "State:\tZ" not in (process / "status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_a_demonstration_that_waits_for_the_carrier_at_its_end_says_so() -> None:
    """Ctrl-C while a request hangs: it says what it waits for, and that a second Ctrl-C ends all at once."""
    async with _serving() as (process, seen):
        await _send(seen, ("+13125550152", "+13125550182"))
        await until(lambda: [line for line in seen if "to call +13125550182" in line], "the call to begin")
        process.send_signal(signal.SIGINT)
        await until(
            lambda: [line for line in seen if "Ctrl-C again ends it" in line], "a word about the wait"
        )
        below = _processes_below(process.pid)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            await process.wait()
    assert len(below) >= 2  # the daemon, and what examines documents for it
    await until(lambda: not any(_lives(each) for each in below), "every process to end")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
async def test_a_demonstration_whose_window_closes_leaves_nothing_behind(number: signal.Signals) -> None:
    """SIGHUP or SIGTERM ends the gateway of the demonstration with it, and every process of the gateway."""
    process = await _demo()
    assert process.stdout is not None
    below: list[Path] = []
    async with asyncio.timeout(60):
        while line := (await process.stdout.readline()).decode():
            if "said 250" in line:
                below = _processes_below(process.pid)
                process.send_signal(number)
        assert await process.wait() == 0
    assert len(below) >= 2  # the daemon, and what examines documents for it
    await until(lambda: not any(_lives(each) for each in below), "every process to end")
