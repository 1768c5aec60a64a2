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
_TRIAL = {"2 KB": 60, "100 KB": 60, "1 MB": 30, "20 MB": 10, "way": 60}
_LEAST = 2 * way.SESSIONS  # mails of a run


def measure(results: Results, plan: Plan, folder: Path) -> None:
    """Measure the variants in turn."""
    if os.geteuid() == 0 and (shut := shut_to_others(folder)):
        results.skipped["PostgreSQL"] = f"its user cannot enter {shut}: name another folder"
        return
    letters = {size: letter_file(folder, SIZES[size]) for size in plan.sizes}
    with ExitStack() as stack:
        server = postgres.Server(folder / "postgresql", shared_buffers="256MB")
        stack.callback(shutil.rmtree, folder / "postgresql")
        server.start()
        stack.callback(server.stop)
        results.machine["PostgreSQL"] = (folder / "postgresql" / "data" / "PG_VERSION").read_text().strip()
        counts = {name: dict(_TRIAL) for name in VARIANTS}
        for turn in range(plan.rounds + 1):
            for name in VARIANTS:
                plan.say(f"{name}: " + (f"round {turn} of {plan.rounds}" if turn else "trial"))
                count = counts[name]
                taken = _door(name, server, folder, letters, count)
                sent = _way(name, server, folder, letters["100 KB"], count["way"])
                if not turn:
                    for size, row in taken.items():
                        count[size] = max(_LEAST, round(row["rate"] * plan.seconds))
                    count["way"] = max(way.SESSIONS, round(sent["rate"] * plan.way_seconds / 2))
                    continue
                for size, row in taken.items():
                    results.add("several door", variant=name, size=size, **row)
                results.add("several way", variant=name, **sent)


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


def _door(
    name: str, server: postgres.Server, folder: Path, letters: dict[str, Path], counts: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Return the figures of each size."""
    rows = {}
    with ExitStack() as stack:
        gateways = _gateways(name, server, folder, stack)
        for gateway in gateways:
            stack.enter_context(gateway)
        gateways[0].run("hold", "--all")
        for size, letter in letters.items():
            rows[size] = _mails(gateways, folder, letter, counts[size])
    return rows


def _mails(gateways: list[Gateway], folder: Path, letter: Path, count: int) -> dict[str, float]:
    share = [count // len(gateways), way.SESSIONS // len(gateways)]
    stored = gateways[0].count("faxes")
    before, theirs = sum(cpu_seconds(gateway.pid) for gateway in gateways), _server_cpu(folder)
    with ThreadPoolExecutor() as threads:
        runs = list(threads.map(lambda each: send(each.smtp_port, letter, share[1], share[0]), gateways))
    sent = Sent(max(r.seconds for r in runs), sum(r.taken for r in runs), sum(r.rejected for r in runs))
    cpu = sum(cpu_seconds(gateway.pid) for gateway in gateways) - before
    theirs = _server_cpu(folder) - theirs
    if (stored := gateways[0].count("faxes") - stored) != sent.taken:
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
