"""`make bench`: the gateway measured beside its peers, and the report written.

Each benchmark lets those that are compared take turns and says every single figure; the report holds medians.
The table goes into docs/performance.md, the plot beside it, the figures of all runs into benchmarks/results/.
"""

import argparse
import contextlib
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import door
import machine
import plot
import psycopg
import report
import scale
import several
import sqlalchemy as sa
import stalls
import way
from load import SMTP_SOURCE
from plan import QUICK, Plan
from processes import Failed
from results import Results

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS: dict[str, Callable[[Results, Plan, Path], None]] = {
    "door": door.measure,
    "stalls": stalls.measure,
    "way": way.measure,
    "scale": scale.measure,
    "postgresql": several.measure,
}
NEED_SMTP_SOURCE = {"door", "stalls", "scale", "postgresql"}
FAULTS = (Failed, OSError, subprocess.SubprocessError, sqlite3.Error, psycopg.Error, sa.exc.SQLAlchemyError)
EXAMPLES = """examples:
  make bench                   everything, about 40 minutes; the report is written
  make bench ONLY=door,way     only these; what the report says of the others stays
  make bench QUICK=1           does everything work? the report goes to build/, its figures mean nothing
  make bench SCRATCH=/mnt/ssd  with stores and queues on another disk
Leave the machine alone meanwhile. smtp-source and Postfix come with Debian's package postfix, which need not
run; Postfix is measured for root only, who must let others enter the folder (SCRATCH).
"""


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="NAMES", help=f"some of {','.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="one short round of each")
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / "build", help="the folder for stores and queues"
    )
    given = parser.parse_args()
    given.names = [name for name in given.only.split(",") if name] or list(BENCHMARKS)
    if unknown := set(given.names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    return given


def main() -> int:
    """Measure and write the report; return the exit code."""
    given = options()
    plan = QUICK if given.quick else Plan()
    saved = (given.scratch if given.quick else ROOT / "benchmarks" / "results") / "bench.json"
    results = Results() if given.quick else Results.load(saved)
    begun = time.monotonic()
    failed = []
    with _folder(given.scratch) as folder:
        plan.say("the machine: disk and loopback")
        results.machine = machine.facts(ROOT, folder)
        results.begin("machine")
        for _ in range(plan.rounds):
            results.add(
                "bounds",
                fsync=round(machine.fsync_rate(folder, plan.seconds), 1),
                loopback=round(machine.loopback_rate(plan.seconds) / 1e6, 1),
            )
        results.skipped.clear()
        for name in given.names:
            if SMTP_SOURCE is None and name in NEED_SMTP_SOURCE:
                results.skipped[name] = "smtp-source is not installed (Debian: apt install postfix)"
                continue
            results.begin(name)
            try:
                BENCHMARKS[name](results, plan, folder)
            except FAULTS as fault:
                failed.append(name)
                results.begin(name)  # figures of a run that failed are worth nothing
                results.skipped[name] = f"failed: {fault}".replace(str(folder), "…")
                plan.say(f"{name} FAILED: {fault}")
            results.save(saved)
    text = report.written(results)
    print(text)
    docs = given.scratch if given.quick else ROOT / "docs"
    plot.draw(results, docs / "performance.png")
    if given.quick:
        (docs / "performance.md").write_text(text)
    else:
        report.put(text, docs / "performance.md")
    minutes = (time.monotonic() - begun) / 60
    plan.say(f"{docs / 'performance.md'} and its plot are written, after {minutes:.0f} minutes")
    if failed:
        plan.say(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


@contextlib.contextmanager
def _folder(scratch: Path) -> Iterator[Path]:
    """Make a folder that Postfix and PostgreSQL may enter; it goes at the end."""
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=scratch.resolve()))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ended(_number: int, _frame: FrameType | None) -> None:
    sys.exit("ended by a signal")  # so that everything that was started is ended, too


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _ended)
    sys.exit(main())
