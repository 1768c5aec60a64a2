"""What grows: the cost of a fax with a long past, memory with many large mails, the file on the disk.

`past`: the whole way, shorter, with stores of different pasts in turn. `memory`: all processes of the
gateway, idle and while 50 sessions send 20 MB each. `purge`: the database's file before and after its
documents go.
"""

import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import fill
import way
from gateways import Gateway
from load import command
from plan import Plan
from processes import Failed, memory, until
from results import Results
from samples import SIZES, letter_file

_TRIAL = 60  # faxes
_IDLE = 2.0  # seconds after the start
_CALM = 2.5  # seconds for which the file must keep its size; the gateway looks each second


@dataclass(frozen=True, slots=True)
class Past:
    """What a store begins with."""

    finished: int
    waiting: int = 0

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.finished:,} finished" + (f", {self.waiting:,} waiting" if self.waiting else "")


def pasts(plan: Plan) -> list[Past]:
    """Return the pasts to compare; the first is what the others are held against."""
    first = plan.finished[0]
    return [*map(Past, plan.finished), Past(first, plan.waiting)]


def measure(results: Results, plan: Plan, folder: Path) -> None:
    """Measure all three."""
    _costs(results, plan, folder)
    for turn in range(plan.rounds):
        plan.say(f"memory: round {turn + 1} of {plan.rounds}")
        results.add("memory", **_memory(folder, max(plan.sessions)))
    for turn in range(plan.rounds):
        plan.say(f"purge: round {turn + 1} of {plan.rounds}")
        results.add("purge", **_purge(folder, plan.purged))


def _costs(results: Results, plan: Plan, folder: Path) -> None:
    letter = letter_file(folder, SIZES["100 KB"])
    with ExitStack() as stack:
        places = {
            past: way.fresh(stack, folder / f"past-{past.finished}-{past.waiting}") for past in pasts(plan)
        }
        for past, place in places.items():
            plan.say(f"scale: a store with {past.name}")
            with Gateway(place) as gateway:
                pass  # makes it
            begun = time.monotonic()
            fill.finished(gateway.file, past.finished)
            with gateway.opened() as connection:
                fill.waiting(connection, past.waiting)
            megabytes = round(gateway.file.stat().st_size / 1e6)
            results.add("store", past=past.name, megabytes=megabytes, seconds=round(time.monotonic() - begun))
        count, trial = _TRIAL, 0.0
        for turn in range(plan.rounds + 1):
            for past, place in places.items():
                plan.say(f"scale, {past.name}: " + (f"round {turn} of {plan.rounds}" if turn else "trial"))
                with ExitStack() as inner:
                    gateway = Gateway(place)
                    around = way.wire(inner, folder, [gateway])
                    inner.enter_context(gateway)
                    row = way.run([gateway], around, letter, count)
                if turn:
                    results.add("past", past=past.name, **row)
                elif past == next(iter(places)):
                    trial = row["rate"]
            count = max(way.SESSIONS, round(trial * plan.way_seconds / 2))


def _memory(folder: Path, sessions: int) -> dict[str, float]:
    letter, peak = letter_file(folder, SIZES["20 MB"]), 0
    with ExitStack() as stack:
        gateway = stack.enter_context(Gateway(way.fresh(stack, folder / "memory")))
        gateway.run("hold", "--all")
        time.sleep(_IDLE)
        idle = memory(gateway.pid)
        with subprocess.Popen(
            command(gateway.smtp_port, letter, sessions, sessions),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        ) as stream:  # fmt: skip
            while stream.poll() is None:
                peak = max(peak, memory(gateway.pid))
                time.sleep(0.05)
            rejected = len((stream.stderr.read() if stream.stderr else b"").splitlines())
        if rejected:
            raise Failed(f"{rejected} of {sessions} mails at once were not taken")
        gateway.until_count("faxes", sessions)
        after = memory(gateway.pid)
    kept = {"idle": idle, "peak": peak, "after": after}
    return {name: round(octets / 1e6, 1) for name, octets in kept.items()} | {"sessions": sessions}


def _purge(folder: Path, count: int) -> dict[str, float]:
    with ExitStack() as stack:
        place = way.fresh(stack, folder / "purge")
        gateway = Gateway(place)
        around = way.wire(stack, folder, [gateway])
        with gateway:
            way.run([gateway], around, letter_file(folder, SIZES["100 KB"]), count)
        before = gateway.file.stat().st_size
        with Gateway(place, store={"keep_documents": "1s"}) as later:
            until(lambda: not later.count("documents WHERE purged_at IS NULL"), "the purge")
            size, since = before, time.monotonic()
            while time.monotonic() - since < _CALM:
                time.sleep(0.2)
                if (now := later.file.stat().st_size) != size:
                    size, since = now, time.monotonic()
        if not later.count("faxes") == count:
            raise Failed("the purge took faxes along")
    return {"faxes": count, "before": round(before / 1e6, 2), "after": round(size / 1e6, 2)}
