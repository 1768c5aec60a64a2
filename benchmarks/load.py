"""Load by Postfix's `smtp-source`, and what came of it."""

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from processes import Failed
from samples import SENDER, number

SMTP_SOURCE = shutil.which("smtp-source", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
"""The generator, None where it is not installed."""
_LIMIT = 240.0  # seconds for one run
_start_times: dict[Path, float] = {}


@dataclass(frozen=True, slots=True)
class Sent:
    """What a run of the generator did: seconds, mails answered 250 and mails answered otherwise."""

    seconds: float
    taken: int
    rejected: int


def command(port: int, letter: Path, sessions: int, count: int) -> list[str]:
    """Return how to send a letter so many times, a connection for each."""
    if SMTP_SOURCE is None:
        raise Failed("smtp-source is not installed (Debian: apt install postfix)")
    return [
        SMTP_SOURCE, "-A", "-F", str(letter), "-m", str(count), "-s", str(sessions),
        "-M", "client.example.com", "-f", SENDER, "-t", f"{number(0)}@fax.local", f"127.0.0.1:{port}",
    ]  # fmt: skip


def send(port: int, letter: Path, sessions: int, count: int) -> Sent:
    """Send a letter; the time is counted from when the generator has read it. Raises Failed."""
    begun = time.monotonic()
    done = subprocess.run(
        command(port, letter, sessions, count), capture_output=True, text=True, timeout=_LIMIT, check=False
    )
    seconds = time.monotonic() - begun - _start_time(letter)
    if done.returncode:
        raise Failed(f"smtp-source ended with {done.returncode}: {done.stderr[-1000:]}")
    rejected = sum("reject" in line for line in done.stderr.splitlines())
    if rejected != len(done.stderr.splitlines()):
        raise Failed(f"smtp-source said: {done.stderr[-1000:]}")
    return Sent(seconds, count - rejected, rejected)


def _start_time(letter: Path) -> float:
    """Return how long the generator takes before it connects: it reads the letter first, octet by octet."""
    if letter not in _start_times:
        times = []
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(_LIMIT)
            for _ in range(3):
                begun = time.monotonic()
                with subprocess.Popen(
                    command(server.getsockname()[1], letter, 1, 1),
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                ) as source, server.accept()[0]:  # fmt: skip
                    times.append(time.monotonic() - begun)
                    source.kill()
        _start_times[letter] = min(times)
    return _start_times[letter]
