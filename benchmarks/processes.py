"""Programs under measurement: started, watched by way of /proc, and ended however the benchmark ends.

What a program says goes to a file: reading a pipe would cost the benchmark's process time of the two cores.
"""

import contextlib
import ctypes
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

PATIENCE = 60.0  # seconds for a program to be ready, or gone
HERE = Path(__file__).parent
_TICKS = os.sysconf("SC_CLK_TCK")
_PR_SET_PDEATHSIG = 1


class Failed(Exception):
    """A measurement that cannot be believed, or could not be made; the text says why."""


def until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Wait until the condition holds. Raises Failed."""
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"waited {patience:.0f} s in vain for {what}")
        time.sleep(0.02)


def _end_with_the_benchmark() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Process:
    """One program; a context that ends it."""

    def __init__(self, command: Sequence[str | Path], log: Path, **environ: str) -> None:
        """`environ` comes on top of what the benchmark itself was given."""
        self.log = log
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | environ,
                preexec_fn=_end_with_the_benchmark,  # noqa: PLW1509 -- one libc call, from the main thread
            )  # fmt: skip

    @classmethod
    def of_ours(cls, program: str, *words: str | Path | float, log: Path) -> "Process":
        """Start a program of this folder."""
        return cls([sys.executable, HERE / f"{program}.py", *map(str, words)], log)

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.stop()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._process.poll() is not None

    def wait_for(self, words: str) -> str:
        """Return the line of its output that holds these words, once it is there. Raises Failed."""
        end = time.monotonic() + PATIENCE
        while True:
            ended = self.ended
            text = self.log.read_text(errors="replace")
            for line in text.splitlines():
                if words in line:
                    return line
            if ended or time.monotonic() > end:
                raise Failed(f"{self._process.args!r} did not say {words!r}: {text[-2000:]}")
            time.sleep(0.02)

    def result(self, patience: float) -> str:
        """Wait for its end and return what it said; it must have gone well. Raises Failed."""
        try:
            code = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self._process.args!r} took longer than {patience:.0f} s") from None
        said = self.log.read_text(errors="replace")
        if code:
            raise Failed(f"{self._process.args!r} ended with {code}: {said[-2000:]}")
        return said

    def stop(self, patience: float = PATIENCE) -> None:
        """End it; by force if it takes too long."""
        if not self.ended:
            self._process.terminate()
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                for pid in tree(self.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                self._process.wait()


def tree(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found, left = [], [pid]
    while left:
        each = left.pop()
        with contextlib.suppress(OSError):  # ended meanwhile
            for thread in Path(f"/proc/{each}/task").iterdir():
                left += [int(child) for child in (thread / "children").read_text().split()]
            found.append(each)
    return found


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and its descendants, those that ended included (proc(5))."""
    ticks = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])  # utime, stime, and those of reaped children
    return ticks / _TICKS


def shut_to_others(folder: Path) -> Path | None:
    """Return the outermost folder on the way to this one that other users cannot enter, None if they can."""
    shut = [each for each in (folder, *folder.parents) if not each.stat().st_mode & stat.S_IXOTH]
    return shut[-1] if shut else None


def memory(pid: int) -> int:
    """Return the octets that a process and its descendants keep in memory (proc(5), smaps).

    What they map from the same place of a file is one copy, of which the one that touched most of it is
    counted, in full: other programs that have the same library open make nothing smaller.
    """
    own, mapped = 0, dict[tuple[str, ...], int]()
    for each in tree(pid):
        place, resident = tuple[str, ...](), 0
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{each}/smaps").read_text().splitlines():
                match line.split():
                    case ["Rss:", size, _]:
                        resident = int(size) * 1024
                    case ["Anonymous:", size, _]:
                        own += int(size) * 1024
                        mapped[place] = max(mapped.get(place, 0), resident - int(size) * 1024)
                    case [addresses, _, offset, device, inode, *_] if "-" in addresses:
                        place = (device, inode, offset) if inode != "0" else (str(each), addresses)
    return own + sum(mapped.values())
