"""Gateways on PostgreSQL: the door and the way, with one gateway and with two on one server.

The server is the tests', but with its folder on the disk and nothing relaxed: a commit waits for the disk.
The same with SQLite takes its turn among them. Each run is half as long as those of `door` and `way`.
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import door
import postgres
import way
from gateways import Gateway
from load import Sent, send
from plan import Plan
from processes import Failed, cpu_seconds, shut_to_others
from results import Results
from samples import SIZES, letter_file

VARIANTS = {"SQLite": 0, "PostgreSQL": 1, "PostgreSQL, two gateways": 2}
"""How many gateways are on PostgreSQL."""
_TRIAL = {"2 KB": 60, "100 KB": 60, "1 MB": 30, "20 MB": 10}  # mails
_TRIAL_FAXES = 60


@dataclass(frozen=True, slots=True)
class _Variant:
    """One of those that are compared."""

    name: str
    server: postgres.Server
    folder: Path

    def gateways(self, stack: ExitStack) -> list[Gateway]:
        """Return its gateways, not yet started, with an empty store; the stack removes it."""
        if not VARIANTS[self.name]:
            return [Gateway(way.fresh(stack, self.folder / "alone"))]
        url = self.server.create()
        stack.callback(self.server.drop, url)
        folders = [self.folder / f"gateway-{n}" for n in range(VARIANTS[self.name])]
        return [Gateway(way.fresh(stack, folder), url=url) for folder in folders]

    def with_server(self, measured: Callable[[], dict[str, float]], unit: str) -> dict[str, float]:
        """Add to a run's figures the CPU milliseconds of PostgreSQL for each of `unit`."""
        if not VARIANTS[self.name]:
            return measured()
        first, *_ = (self.folder / "postgresql" / "data" / "postmaster.pid").read_text().splitlines()
        before = cpu_seconds(int(first))
        row = measured()
        return row | {"server": round((cpu_seconds(int(first)) - before) / row[unit] * 1000, 3)}


def measure(results: Results, plan: Plan, folder: Path) -> None:
    """Measure the variants in turn."""
    if os.geteuid() == 0 and (shut := shut_to_others(folder)):
        results.skipped["PostgreSQL"] = f"its user cannot enter {shut}: name another folder"
        return
    with ExitStack() as stack:
        server = postgres.Server(folder / "postgresql", shared_buffers="256MB")
        stack.callback(shutil.rmtree, folder / "postgresql")
        server.start()
        stack.callback(server.stop)
        results.machine["PostgreSQL"] = (folder / "postgresql" / "data" / "PG_VERSION").read_text().strip()
        variants = [_Variant(name, server, folder) for name in VARIANTS]
        counts: dict[str, dict[str, int]] = {}
        for turn in range(plan.rounds + 1):
            for variant in variants:
                plan.say(f"{variant.name}: " + (f"round {turn} of {plan.rounds}" if turn else "trial"))
                if turn:
                    _round(results, plan, variant, counts[variant.name])
                else:
                    counts[variant.name] = _trial(plan, variant)


def _trial(plan: Plan, variant: _Variant) -> dict[str, int]:
    """Return how many mails of each size make a run, and how many faxes."""
    rows = _door(variant, [(size, way.SESSIONS, _TRIAL[size]) for size in plan.sizes])
    faxes = _way(variant, _TRIAL_FAXES)["rate"]
    counts = {size: round(row["rate"] * plan.seconds / 2) for size, row in zip(plan.sizes, rows, strict=True)}
    return counts | {"faxes": max(way.SESSIONS, round(faxes * plan.way_seconds / 2))}


def _round(results: Results, plan: Plan, variant: _Variant, counts: dict[str, int]) -> None:
    runs = [
        (size, sessions, max(door.least(sessions), counts[size]))
        for size in plan.sizes
        for sessions in plan.sessions
        # Of two gateways one would have nothing to do for a single session.
        if sessions >= VARIANTS[variant.name]
    ]
    for (size, sessions, _), row in zip(runs, _door(variant, runs), strict=True):
        results.add("several door", variant=variant.name, size=size, sessions=sessions, **row)
    results.add("several way", variant=variant.name, **_way(variant, counts["faxes"]))
    results.add("several webhooks", variant=variant.name, **_webhooks(variant, plan.webhooks // 2))
    with ExitStack() as stack:
        row = way.replies(variant.gateways(stack), variant.folder, plan.replies)
    results.add("several replies", variant=variant.name, **row)


def _door(variant: _Variant, runs: list[tuple[str, int, int]]) -> list[dict[str, float]]:
    """Return the figures of each run: of a size, over so many sessions, so many mails."""
    rows = []
    with ExitStack() as stack:
        gateways = variant.gateways(stack)
        for gateway in gateways:
            stack.enter_context(gateway)
        gateways[0].run("hold", "--all")
        for size, sessions, count in runs:
            letter = letter_file(variant.folder, SIZES[size])
            rows.append(variant.with_server(partial(_mails, gateways, letter, sessions, count), "mails"))
    return rows


def _mails(gateways: list[Gateway], letter: Path, sessions: int, count: int) -> dict[str, float]:
    """Share sessions and mails out among the gateways; what was answered 250 must be in the store."""
    share = [sessions // len(gateways), count // len(gateways)]
    stored, before = gateways[0].count("faxes"), sum(cpu_seconds(gateway.pid) for gateway in gateways)
    with ThreadPoolExecutor() as threads:
        runs = list(threads.map(lambda each: send(each.smtp_port, letter, *share), gateways))
    sent = Sent(max(r.seconds for r in runs), sum(r.taken for r in runs), sum(r.rejected for r in runs))
    cpu = sum(cpu_seconds(gateway.pid) for gateway in gateways) - before
    if (stored := gateways[0].count("faxes") - stored) != sent.taken:
        raise Failed(f"answered 250: {sent.taken}, in the store: {stored}")
    return door.figures(sent, cpu)


def _way(variant: _Variant, count: int) -> dict[str, float]:
    with ExitStack() as stack:
        gateways = variant.gateways(stack)
        around = way.wire(stack, variant.folder, gateways)
        for gateway in gateways:
            stack.enter_context(gateway)
        letter = letter_file(variant.folder, SIZES["100 KB"])
        return variant.with_server(partial(way.run, gateways, around, letter, count), "faxes")


def _webhooks(variant: _Variant, count: int) -> dict[str, float]:
    with ExitStack() as stack:
        gateways = variant.gateways(stack)
        known = way.on_their_way(gateways, variant.folder, count)
        for gateway in gateways:
            stack.enter_context(gateway)
        return variant.with_server(partial(way.webhooks, gateways, known, variant.folder), "webhooks")
