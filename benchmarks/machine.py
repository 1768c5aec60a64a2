"""The machine: what it is, and what its disk and its loopback interface give at best."""

import importlib.metadata
import os
import platform
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

LIBRARIES = (
    "aiosmtpd",
    "aiohttp",
    "sqlalchemy",
    "psycopg",
    "pikepdf",
    "pybase64",
    "cryptography",
    "aiosmtplib",
    "uvloop",
)
_BLOCK = 16384  # octets: the gateway's database pages
_PIECE = 1 << 20


def facts(checkout: Path, folder: Path) -> dict[str, str]:
    """Return what a reader needs to compare figures with those of another machine."""
    return {
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Commit": _commit(checkout),
        "Processor": f"{_processor()}, {os.cpu_count()} cores",
        "Memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "Disk": _file_system(folder),
        "Kernel": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_version()}, SQLite {sqlite3.sqlite_version}",
        "Libraries": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES),
    }


def _commit(checkout: Path) -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", checkout, *words], capture_output=True, text=True, check=False)  # noqa: S607 -- the caller's git
        return done.stdout.strip()

    # The report itself is written into the checkout: it changes nothing that is measured.
    changed = git("status", "--porcelain", "--", "gateway", "benchmarks/*.py")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if changed else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(folder: Path) -> str:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [mount for mount in mounts if folder.is_relative_to(mount[1])]
    device, _, kind, *_ = max(inside, key=lambda mount: len(mount[1]))
    return f"{kind} on {device}"


def fsync_rate(folder: Path, seconds: float) -> float:
    """Return how many pages a second can be appended to a file and confirmed by the disk, one by one."""
    path = folder / "fsync"
    page, count = os.urandom(_BLOCK), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        end = (begun := time.monotonic()) + seconds
        while time.monotonic() < end:
            os.write(handle, page)
            os.fdatasync(handle)
            count += 1
        return count / (time.monotonic() - begun)
    finally:
        os.close(handle)
        path.unlink()


def loopback_rate(seconds: float) -> float:
    """Return the octets a second that Python reads from a connection over loopback, doing nothing else."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = (
            f"import socket\npeer = socket.create_connection(('127.0.0.1', {port}))\n"
            f"piece = bytes({_PIECE})\n"
            "try:\n    while True: peer.sendall(piece)\nexcept OSError: pass\n"
        )
        sender = subprocess.Popen([sys.executable, "-c", program])
        killer = threading.Timer(seconds + 10, sender.kill)  # so that nothing waits for ever
        killer.start()
        try:
            with server.accept()[0] as connection:
                buffer, total = bytearray(_PIECE), 0
                end = (begun := time.monotonic()) + seconds
                while time.monotonic() < end:
                    total += connection.recv_into(buffer)
                return total / (time.monotonic() - begun)
        finally:
            killer.cancel()
            sender.kill()
            sender.wait()
