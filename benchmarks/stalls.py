"""Stalls: how long another client waits for an answer while large mails stream in from ten sessions."""

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from door import Peers, Server, available
from gateways import Template
from load import command
from plan import Plan
from processes import Failed, Process, until
from results import Results
from samples import SIZES, letter_file

_SESSIONS = 10
_ENDLESS = 100_000  # mails: the stream is cut when the time is over


def measure(results: Results, plan: Plan, folder: Path) -> None:
    """Measure the peers in turn; ours and stock with webhooks, too."""
    peers = Peers(folder, Template(folder))
    letter = letter_file(folder, SIZES["20 MB"])
    for turn in range(plan.rounds):
        for name in available(results, folder):
            plan.say(f"stalls, {name}: round {turn + 1} of {plan.rounds}")
            with ExitStack() as stack:
                server = peers.start(name, stack)
                found, mails = _run(server, letter, plan.stall_seconds, folder)
                for kind, times in found.items():
                    results.add("stalls", peer=name, kind=kind, mails=mails, **percentiles(times))


def _run(server: Server, letter: Path, seconds: float, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Return the milliseconds of each answer, and the mails a second that were taken meanwhile."""
    with subprocess.Popen(
        command(server.port, letter, _SESSIONS, _ENDLESS),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as stream:
        try:
            until(lambda: server.accepted() > 0, "a first mail")
            taken, log = server.accepted(), folder / "probe.log"
            log.unlink(missing_ok=True)
            with Process.of_ours("probe", seconds, server.port, server.http_port, log=log) as probe:
                found: dict[str, list[float]] = json.loads(probe.result(seconds + 120))
            mails = (server.accepted() - taken) / seconds
            if stream.poll() is not None:
                raise Failed("smtp-source ended before it was told to")
        finally:
            stream.kill()
    if not mails:
        raise Failed("no mail was taken while the answers were timed")
    if server.events() < len(found["webhook"]):
        raise Failed(f"{len(found['webhook'])} webhooks answered 200, {server.events()} in the store")
    return {kind: times for kind, times in found.items() if times}, mails


def percentiles(times: list[float]) -> dict[str, float]:
    """Return the percentiles in milliseconds."""
    times = sorted(times)
    last = len(times) - 1
    return {
        "p50": round(median(times), 3),
        "p99": round(times[min(last, round(last * 0.99))], 3),
        "max": times[-1],
        "answers": len(times),
    }
