"""A crash run: a stream of mails, gateways that are killed all the time, and three ledgers to compare.

A real daemon (on PostgreSQL: two on one server) takes mails over SMTP, calls the sandbox carrier, hears its
webhooks and replies to a relay, while it is killed, stopped and frozen at chosen moments and at random ones,
and PostgreSQL with it. In the end each fax whose mail was answered 250 must have been sent once and answered
once. All choices follow from the seed; times do not.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import postgres
from torture_mails import FASTEST, MailServer, Plan
from torture_verdict import Ledgers, Mailed, Stored, Verdict, judge
from torture_world import World

GATEWAYS = {"sqlite": 1, "postgresql": 2}
PAUSE = {"sqlite": 1.6, "postgresql": 1.8}  # seconds between two deeds on average
MOST_OPEN = 400  # faxes on their way at a time
SETTLE_LIMIT = 180.0  # seconds for everything to end, once nothing is killed any more
LONGEST = 2.0  # times the minutes, and a minute, when the targets are not reached before
TELL_EVERY = 10.0
MEMORY = Path("/dev/shm")  # noqa: S108 -- no disk is waited for: a kill loses nothing that was written

EXAMPLES = """examples:
  make torture                                    5 minutes on SQLite, with a seed of chance
  make torture SEED=7 MINUTES=30 STORE=sqlite     as long as the runs that docs/reliability.md tells of
  make torture SEED=7 MINUTES=30 STORE=postgresql two gateways on a PostgreSQL of their own
  make torture MINUTES=1 FAXES=1000 KILLS=30      one minute, and longer until both are reached
The exit code is 1 when a fax was lost, sent twice or not answered, or a reply came twice by different names;
the folder with the database and all logs is kept then.
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What to run; `faxes` and `kills` are reached at least, if need be in a longer time."""

    seed: int
    minutes: float = 5.0
    store: str = "sqlite"
    faxes: int = 0
    kills: int = 0
    pause: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run."""

    verdict: Verdict
    world: World
    mails: MailServer
    faults: list[str]
    seconds: float
    parked: int

    @property
    def faxes(self) -> int:
        """How many faxes were told 250."""
        return self.mails.faxes


class Run:
    """One crash run."""

    def __init__(self, options: Options, folder: Path, say: Callable[[str], None]) -> None:
        self._options = options
        self._folder = folder
        self._say = say
        self._begun = time.monotonic()
        most = max((options.minutes * LONGEST + 1) * 60 * FASTEST, options.faxes) + 100
        self._plan = Plan(options.seed, int(most))

    async def run(self) -> Result:
        """Run it. Raises what the harness itself could not do."""
        options, server = self._options, None
        if options.store == "postgresql":
            server = postgres.new_server()
            server.start()
        pause = options.pause or PAUSE[options.store]
        try:
            self._world = World(
                options.seed, self._folder, self._plan.script, server, GATEWAYS[options.store], pause
            )
            return await self._run()
        finally:
            if server is not None:
                await asyncio.to_thread(server.stop)

    async def _run(self) -> Result:
        world = self._world
        self._mails = MailServer(
            self._options.seed, world.gateways, world.executioner.reached, lambda: self._open() > MOST_OPEN
        )
        try:
            await world.open()
            self._begun = time.monotonic()
            async with asyncio.TaskGroup() as group:
                telling = group.create_task(self._tell())
                striking = group.create_task(world.executioner.run(self._enough))
                await self._mails.run(self._plan.letters(), self._enough)
                await striking
                seconds = time.monotonic() - self._begun
                self._say("no more kills; waiting for every fax to end")
                await self._settle()
                telling.cancel()
            await world.stop_gateways()
            return self._result(seconds)
        finally:
            await world.close()

    # --- while it runs ---------------------------------------------------------------------------------

    def _enough(self) -> bool:
        options, passed = self._options, time.monotonic() - self._begun
        if passed < options.minutes * 60:
            return False
        reached = self._mails.faxes >= options.faxes and self._world.figures.killed >= options.kills
        return reached or passed > (options.minutes * LONGEST + 1) * 60

    def _open(self) -> int:
        return self._mails.faxes - len(self._world.answered)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(TELL_EVERY)
            self._world.forget()
            figures = self._world.figures
            passed = time.monotonic() - self._begun
            self._say(
                f"{passed:6.0f} s  faxes {self._mails.faxes}, {self._open()} of them open"
                f"  kills {figures.killed}  SIGTERM {figures.stops}  freezes {figures.freezes}"
                f"  PostgreSQL restarts {figures.database.total()}"
            )

    async def _settle(self) -> None:
        """Wait until every fax has ended or is held, and every mail has left."""
        world = self._world
        await world.all_ready()
        end = time.monotonic() + SETTLE_LIMIT
        unsettled = (
            "SELECT (SELECT count(*) FROM faxes WHERE ended_at IS NULL AND state <> 'held')"
            " + (SELECT count(*) FROM outbox WHERE sent_at IS NULL AND given_up_at IS NULL)"
        )
        while time.monotonic() < end:
            if world.storage.rows(unsettled) == [(0,)]:
                return
            await asyncio.sleep(0.5)

    # --- the end -----------------------------------------------------------------------------------------

    def _result(self, seconds: float) -> Result:
        world, storage = self._world, self._world.storage
        query = "SELECT id, mail_id, number, state, accepted_at, ended_at FROM faxes ORDER BY accepted_at, id"
        ledgers = Ledgers(
            mails=[
                Mailed(letter.message_id, letter.numbers, letter.pages, tuple(letter.told))
                for letter in self._mails.letters
            ],
            calls=world.carrier.calls(),
            replies=world.replies,
            faxes=[Stored(*row) for row in storage.rows(query)],
            ends={number: fate.end for number, fate in self._plan.fates.items()},
        )
        faults = [fault for gateway in world.gateways for fault in gateway.faults]
        faults += [f"refused: {answer}" for answer in self._mails.refused]
        faults += [f"left behind: {file}" for file in world.leftovers()]
        parked = int(storage.rows("SELECT count(*) FROM carrier_events WHERE fax_id IS NULL")[0][0])
        verdict = judge(ledgers)
        if not verdict.clean or faults:
            storage.dump(self._folder)
            _write_histories(self._folder, storage.rows, verdict)
        return Result(verdict, world, self._mails, faults, seconds, parked)


def _write_histories(folder: Path, rows: Callable[[str], list[tuple[Any, ...]]], verdict: Verdict) -> None:
    """Write all that is stored about the faxes concerned."""
    names = {name for found in verdict.findings.values() for name in found}
    numbers = dict(rows("SELECT id, number FROM faxes"))
    with (folder / "findings.txt").open("w") as file:
        for kind, found in verdict.findings.items():
            file.writelines(f"{kind}: {name}: {why}\n" for name, why in found.items())
        for fax_id, number in numbers.items():
            if not names & {fax_id, number}:
                continue
            file.write(f"\n{fax_id} to {number}\n")
            for query in (
                f"SELECT at, event, state, detail FROM history WHERE fax_id = '{fax_id}' ORDER BY id",  # noqa: S608 -- ids of ours
                f"SELECT * FROM attempts WHERE fax_id = '{fax_id}' ORDER BY ordinal",  # noqa: S608
                f"SELECT id, notice, fence, tries, sent_at, error FROM outbox WHERE fax_id = '{fax_id}'",  # noqa: S608
            ):
                file.writelines(f"  {json.dumps(row, default=str)}\n" for row in rows(query))


def report(options: Options, result: Result) -> list[str]:
    """Say in lines what was done and what came of it."""
    figures, verdict, world = result.world.figures, result.verdict, result.world
    told = [letter for letter in result.mails.letters if letter.told]
    lines = [
        ("seed", options.seed),
        ("commit", _commit()),
        ("store", options.store),
        ("gateways", len(world.gateways)),
        ("minutes", f"{result.seconds / 60:.1f}"),
        ("faxes", f"{result.faxes} ({result.faxes / result.seconds:.1f} a second)"),
        ("mails told 250", len(told)),
        (
            "mails mailed again",
            f"{sum(1 for letter in told if letter.tries > 1)}, {result.mails.repeats} times",
        ),
        ("SIGKILLs", f"{figures.killed} (one every {result.seconds / max(1, figures.killed):.1f} s)"),
        *((f"  {moment}", count) for moment, count in figures.kills.most_common()),
        ("SIGTERMs", figures.stops),
        ("freezes", figures.freezes),
        ("PostgreSQL restarts", ", ".join(f"{how} {n}" for how, n in figures.database.items()) or 0),
        ("calls asked for", world.carrier.asked),
        ("calls taken", len(world.carrier.sandbox.ledger)),
        ("alerts", ", ".join(f"{cause} {n}" for cause, n in figures.alerts.items()) or 0),
        *((kind, len(found)) for kind, found in verdict.findings.items()),
        ("replies doubled under the same Message-ID", verdict.repeated),
        ("held", len(verdict.held)),
        ("events of nobody", result.parked),
        ("other faults", len(result.faults)),
    ]
    text = [f"{name:<42}{value}" for name, value in lines]
    for kind, found in verdict.findings.items():
        text += [f"{kind}: {name}: {why}" for name, why in list(found.items())[:20]]
    return text + [f"held: {fax_id}" for fax_id in verdict.held[:20]] + result.faults[:20]


def exit_code(options: Options, result: Result) -> int:
    """Return 0 when nothing is wrong and the targets were reached, else 1."""
    reached = result.faxes >= options.faxes and result.world.figures.killed >= options.kills
    return 0 if result.verdict.clean and not result.faults and reached else 1


def _commit() -> str:
    git = ("git", "-C", str(Path(__file__).parent))
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        )
        changed = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True)
        return commit.stdout.strip() + (" and changes" if changed.stdout else "")
    return "unknown"


def read_options(arguments: Sequence[str]) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="make torture",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=None, help="SEED=: decides all choices (one of chance)")
    parser.add_argument("--minutes", type=float, default=5.0, help="MINUTES=: how long mails are mailed (5)")
    parser.add_argument("--store", choices=GATEWAYS, default="sqlite", help="STORE=: (sqlite)")
    parser.add_argument("--faxes", type=int, default=0, help="FAXES=: at least so many")
    parser.add_argument("--kills", type=int, default=0, help="KILLS=: at least so many")
    read = parser.parse_args(arguments)
    seed = secrets.randbelow(1_000_000) if read.seed is None else read.seed
    return Options(seed, read.minutes, read.store, read.faxes, read.kills)


def main(arguments: Sequence[str]) -> int:
    """Run, tell, and return the exit code."""
    options = read_options(arguments)
    folder = Path(tempfile.mkdtemp(prefix="fax-torture-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None))

    def say(line: str) -> None:
        print(line, flush=True)  # noqa: T201 -- a program for a terminal

    say(f"seed {options.seed}, {options.minutes:g} minutes, {options.store}; logs in {folder}")
    result = asyncio.run(Run(options, folder, say).run())
    for line in report(options, result):
        say(line)
    code = exit_code(options, result)
    if code:
        say(f"kept: {shutil.move(folder, tempfile.mkdtemp(prefix='fax-torture-'))}")
    else:
        shutil.rmtree(folder)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
