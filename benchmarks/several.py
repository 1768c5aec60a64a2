"""Gateways on PostgreSQL: the door and the way, with one gateway and with two on one server.

The server is the tests', but with its folder on the disk and nothing relaxed: a commit waits for the disk.
The same with SQLite takes its turn among them.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import postgres
import way
from door import figures
from gateways import Gateway
from load import Sent, send
from plan import Plan
from processes import Failed, cpu_seconds, shut_to_others
from results import Results
from samples import SIZES, letter_file

VARIANTS = {"SQLite": 0, "PostgreSQL": 1, "PostgreSQL, two gateways": 2}
"""How many gateways are on PostgreSQL."""
_TRIAL = 60


def measure(results: Results, plan: Plan, folder: Path) -> None:
    """Measure the variants in turn."""
    if os.geteuid() == 0 and (shut := shut_to_others(folder)):
        results.skipped["PostgreSQL"] = f"its user cannot enter {shut}: name another folder"
        return
    letter = letter_file(folder, SIZES["100 KB"])
    with ExitStack() as stack:
        server = postgres.Server(folder / "postgresql", shared_buffers="256MB")
        stack.callback(shutil.rmtree, folder / "postgresql")
        server.start()
        stack.callback(server.stop)
        results.machine["PostgreSQL"] = (folder / "postgresql" / "data" / "PG_VERSION").read_text().strip()
        rates: dict[str, tuple[float, float]] = {}
        for turn in range(plan.rounds + 1):
            for name in VARIANTS:
                plan.say(f"{name}: " + (f"round {turn} of {plan.rounds}" if turn else "trial"))
                counts = [
                    max(way.SESSIONS, round(rate * seconds))
                    for rate, seconds in zip(rates[name], (plan.seconds, plan.way_seconds / 2), strict=True)
                ] if turn else [_TRIAL, _TRIAL]  # fmt: skip
                taken = _door(name, server, folder, letter, counts[0])
                sent = _way(name, server, folder, letter, counts[1])
                if turn:
                    results.add("several door", variant=name, **taken)
                    results.add("several way", variant=name, **sent)
                else:
                    rates[name] = taken["rate"], sent["rate"]


def _gateways(name: str, server: postgres.Server, folder: Path, stack: ExitStack) -> list[Gateway]:
    """Return the gateways of a variant, not yet started, with an empty store."""
    if not VARIANTS[name]:
        return [Gateway(way.fresh(stack, folder / "alone"))]
    url = server.create()
    stack.callback(server.drop, url)
    return [Gateway(way.fresh(stack, folder / f"gateway-{n}"), url=url) for n in range(VARIANTS[name])]


def _server_cpu(folder: Path) -> float:
    first, *_ = (folder / "postgresql" / "data" / "postmaster.pid").read_text().splitlines()
    return cpu_seconds(int(first))


def _door(name: str, server: postgres.Server, folder: Path, letter: Path, count: int) -> dict[str, float]:
    with ExitStack() as stack:
        gateways = _gateways(name, server, folder, stack)
        for gateway in gateways:
            stack.enter_context(gateway)
        gateways[0].run("hold", "--all")
        share = [count // len(gateways), way.SESSIONS // len(gateways)]
        before, theirs = sum(cpu_seconds(gateway.pid) for gateway in gateways), _server_cpu(folder)
        with ThreadPoolExecutor() as threads:
            runs = list(threads.map(lambda each: send(each.smtp_port, letter, share[1], share[0]), gateways))
        sent = Sent(max(r.seconds for r in runs), sum(r.taken for r in runs), sum(r.rejected for r in runs))
        cpu = sum(cpu_seconds(gateway.pid) for gateway in gateways) - before
        theirs = _server_cpu(folder) - theirs
        if (stored := gateways[0].count("faxes")) != sent.taken:
            raise Failed(f"answered 250: {sent.taken}, in the store: {stored}")
    return figures(sent, cpu) | {"server": round(theirs / sent.taken * 1000, 3)}


def _way(name: str, server: postgres.Server, folder: Path, letter: Path, count: int) -> dict[str, float]:
    with ExitStack() as stack:
        gateways = _gateways(name, server, folder, stack)
        around = way.wire(stack, folder, gateways)
        for gateway in gateways:
            stack.enter_context(gateway)
        theirs = _server_cpu(folder)
        row = way.run(gateways, around, letter, count)
        return row | {"server": round((_server_cpu(folder) - theirs) / count * 1000, 3)}
